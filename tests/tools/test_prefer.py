"""`alignvlm prefer`: sampled answers, ranked, and what DPO then trains on."""

import json
import shutil

import pytest
from datasets import Dataset, load_dataset
from PIL import Image
from safetensors.torch import load_file, save_file

from alignvlm.data.sources import read_source
from alignvlm.evaluation.rewards import make_rewards
from alignvlm.stages.reward_stage import main as train
from alignvlm.tools.prefer import main, pair_of, parser, prefer
from tests import forked
from tests.running import arguments_for


SOURCES = json.dumps([{"name": "scenes", "annotations": ["short_caption"], "count": 4}])
OPTIONS = ["--sources", SOURCES, "--samples", "6", "--max_new_tokens", "12", "--temperature", "1", "--use_cpu"]


@pytest.fixture(scope="module")
def pairs(speaking, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    summary = prefer(parser().parse_args([str(speaking), *OPTIONS, "--reward", "cider", "--output_dir", str(folder)]))
    return folder, summary


def test_the_best_sample_is_preferred_to_the_worst(pairs):
    folder, summary = pairs
    rows = load_dataset("parquet", data_files=str(folder / "pairs.parquet"), split="train")  # as TRL takes it
    assert len(rows) == summary["pairs"] and 0 < summary["pairs"] <= summary["prompts"] == 4
    (progress,) = folder.glob(".pairs-*/*.jsonl")
    outputs = [output for line in progress.read_text().splitlines() for output in json.loads(line)["outputs"]]
    captions = [c.responses for found in read_source(json.loads(SOURCES)[0]).conversations() for c in found]
    (reward,) = make_rewards(["cider"], captions)
    expected = []
    for output, references in zip(outputs, captions, strict=True):
        scored = reward([None] * 6, output["answers"], references=[references] * 6, metric=["cider"] * 6)
        assert scored == output["rewards"]
        said = [(value, text) for value, text in zip(scored, output["answers"]) if text]
        best, worst = (choose(said, key=lambda each: each[0]) for choose in (max, min))
        if best[0] > worst[0]:
            expected.append((best[1], worst[1]))
    assert [
        (row["chosen"][0]["content"][0]["text"], row["rejected"][0]["content"][0]["text"]) for row in rows
    ] == expected
    assert rows[0]["images"][0].size == (64, 64)


def test_empty_answers_are_left_out_before_the_best_and_the_worst_are_chosen():
    asked = Dataset.from_list(
        [{"images": [], "prompt": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]}]
    )

    def texts(answers: list[str], rewards: list[float]) -> list[str] | None:
        row = pair_of(asked, 0, answers, rewards)
        return row and [row[name][0]["content"][0]["text"] for name in ("chosen", "rejected")]

    assert (
        texts(["a dog", "", "a cat"], [1, 0, 0.5]) == texts(["a cat", "", "a dog"], [0.5, 2, 1]) == ["a dog", "a cat"]
    )
    assert texts(["a dog", "a dog", ""], [1, 1, 0]) is texts(["", ""], [1, 0]) is texts(["a dog", ""], [1, 0]) is None


def test_the_error_without_a_pair_counts_empty_answers(speaking, tmp_path):
    """Behind a prompt without room, all answers are empty."""
    checkpoint = shutil.copytree(speaking, tmp_path / "short")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 20
    (checkpoint / "config.json").write_text(json.dumps(config))
    sources = json.dumps([{**json.loads(SOURCES)[0], "tag": "red " * 20}])
    words = [str(checkpoint), *OPTIONS, "--sources", sources, "--output_dir", str(tmp_path / "out")]
    message = "None of 4 prompts has two answers of which one is better; 24 of 24 answers are empty"
    with pytest.warns(UserWarning, match="prompts are not answered"), pytest.raises(ValueError, match=message):
        prefer(parser().parse_args(words))


def test_answers_are_sampled_from_all_tokens(speaking, tmp_path):
    """Also those that the checkpoint's own way of generating leaves out: with `top_k` of 1 all samples would be alike."""
    checkpoint = tmp_path / "narrow"
    shutil.copytree(speaking, checkpoint)
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": True, "top_k": 1, "top_p": 0.01}))
    words = [str(checkpoint), *OPTIONS, "--reward", "cider", "--output_dir", str(tmp_path / "out")]
    assert prefer(parser().parse_args(words))["pairs"] > 0


def test_a_prompt_without_room_makes_no_pair_and_ends_nothing(speaking, tmp_path):
    checkpoint = tmp_path / "short"
    shutil.copytree(speaking, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 100
    (checkpoint / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (9, 8), (200, 30, 60)).save(tmp_path / "0.png")
    (tmp_path / "long.jsonl").write_text(json.dumps({"image": "0.png", "captions": ["a red circle"]}) + "\n")
    sources = [*json.loads(SOURCES), {"data": str(tmp_path / "long.jsonl"), "prompt": "red " * 200}]
    words = [str(checkpoint), *OPTIONS, "--sources", json.dumps(sources), "--reward", "cider"]
    with pytest.warns(UserWarning, match="6 prompts are not answered"):
        summary = prefer(parser().parse_args([*words, "--output_dir", str(tmp_path / "out")]))
    assert summary["prompts"] == 5 and 0 < summary["pairs"] <= 4


def test_stage_5_trains_on_the_pairs(pairs, checkpoint, tmp_path):
    folder, summary = pairs
    fields = {
        "stage": 5,
        "method": "dpo",
        "language_learning_rate": 1e-3,
        "max_steps": 1,
        "per_device_train_batch_size": 1,
    }
    entry = train(arguments_for(checkpoint, tmp_path, **fields, sources=[{"data": str(folder / "pairs.parquet")}]))
    assert entry["steps"] == 1 and entry["data"][0]["records"] == summary["pairs"]


def test_finished_work_is_not_done_again(pairs, speaking, capsys):
    folder, summary = pairs
    before = (folder / "pairs.parquet").read_bytes()
    main([str(speaking), *OPTIONS, "--reward", "cider", "--output_dir", str(folder)])
    assert f"{summary['pairs']} pairs of 4 prompts" in capsys.readouterr().out
    assert (folder / "pairs.parquet").read_bytes() == before


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_make_the_pairs_of_one(speaking, tmp_path):
    given = [str(speaking), *OPTIONS, "--batch_size", "6", "--output_dir"]  # a prompt a batch
    forked.run("alignvlm.tools.prefer:main", [*given, str(tmp_path / "two")], log=tmp_path / "log", processes=2)
    main([*given, str(tmp_path / "one")])
    finished = sorted((tmp_path / "two").glob(".pairs-*/*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in finished] == [2, 2]
    for name in ("pairs.parquet", "pairs.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("changed", ["weights", "sources"])
def test_answers_of_another_model_or_to_other_prompts_are_not_reused(speaking, tmp_path, changed):
    def pairs_in(name: str, tag: str = "") -> bytes:
        sources = json.dumps([{**json.loads(SOURCES)[0], "tag": tag}])
        prefer(parser().parse_args([str(model), *OPTIONS, "--sources", sources, "--output_dir", str(tmp_path / name)]))
        return (tmp_path / name / "pairs.parquet").read_bytes()

    model = shutil.copytree(speaking, tmp_path / "model")
    before, tag = pairs_in("out"), ""
    if changed == "weights":  # the stage was run again into the same folder
        weights = load_file(model / "model.safetensors")
        save_file(
            {name: value * 1.1 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"}
        )
    else:
        tag = "Now:"
    again = pairs_in("out", tag)
    assert again != before and again == pairs_in("fresh", tag)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--samples", "1"],
            "--samples 1 is out of range: give a whole number of 2 or more, of which a pair is made.",
        ),
        *(
            (["--temperature", value], f"--temperature {float(value)} is out of range: give a number above 0.")
            for value in ("0", "-1", "nan", "inf")
        ),
        (["--seed", "-1"], "--seed -1 is out of range: give a whole number from 0 to 4294967295."),
        (["--seed", str(2**32)], f"--seed {2**32} is out of range: give a whole number from 0 to {2**32 - 1}."),
        (["--reward", "accuracy"], "The reward 'accuracy' judges no answer of these sources"),
        (
            ["--sources", '[{"name": "scenes", "count": 4, "share": 0.5}]'],
            "share=0.5 of a source: every prompt is answered once. Set its `limit`",
        ),
        (["--sources", "[{]"], "--sources is not valid JSON"),
        (["--sources", '{"data": "a.jsonl"}'], "--sources is {'data': 'a.jsonl'}; expected a list of sources"),
        (["--sources", '["a.jsonl"]'], r"--sources is \['a.jsonl'\]; expected a list of sources"),
    ],
)
def test_what_makes_no_pairs_is_refused(checkpoint, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prefer(parser().parse_args([str(checkpoint), *OPTIONS, *options, "--output_dir", str(tmp_path)]))
    assert not (tmp_path / "pairs.parquet").exists()


@pytest.mark.parametrize("option", ["--batch_size", "--max_new_tokens"])
def test_a_number_that_counts_nothing_is_refused(checkpoint, tmp_path, option):
    with pytest.raises(SystemExit, match=f"{option}: '0' is no whole number of 1 or more"):
        parser().parse_args([str(checkpoint), *OPTIONS, option, "0", "--output_dir", str(tmp_path)])


def test_answers_that_are_judged_in_pairs_have_no_accuracy_each(checkpoint, tmp_path):
    columns = {"question": ["Is it red?", "Is it blue?"], "answer": ["Yes", "No"]}
    columns |= {"image": [Image.new("RGB", (8, 8), "red")] * 2, "category": ["color"] * 2, "question_id": ["1"] * 2}
    Dataset.from_dict(columns).to_parquet(tmp_path / "mme.parquet")
    sources = json.dumps([{"name": "mme", "data": str(tmp_path / "mme.parquet")}])
    given = [str(checkpoint), *OPTIONS, "--sources", sources, "--reward", "accuracy", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="The reward 'accuracy' judges no answer of these sources"):
        prefer(parser().parse_args(given))

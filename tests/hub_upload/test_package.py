"""Packaging: what is taken along, what stays behind, and what the card says."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignvlm.evaluation.judge import METRICS, headlines_of, load_metric, numbers_of
from alignvlm.stages.checkpoint import save_checkpoint
from alignvlm.stages.lora import merge_saved_lora
from alignvlm.stages.stage import main as run_stage
from hub_upload.card import HEADLINES, MINIMUM_TRANSFORMERS, make_card
from hub_upload.card_text import FOLDER, GENERATED, author_of
from hub_upload.checks import check, try_loading
from hub_upload.package import files_of, main, note_releases, package, sha256_of, weights_of, without_local_paths
from modeling_alignvlm import AlignVLMForConditionalGeneration
from tests.running import arguments_for


def result_for(folder: Path, **fields) -> dict:
    """A result as the evaluation writes it."""
    numbers = {"cider": 0.87654, "count": 5, "intervals": {"cider": [0.8, 0.95]}}
    return {
        "task": "coco_captions",
        "model": {"name": "x", "weights_sha256": sha256_of(weights_of(folder))},
        "data": {"data": "yerevann/coco-karpathy", "split": "test", "revision": "abc123"},
        "control": None,
        "limit": None,
        "metrics": {"cider": {**numbers, "by_prompt": {"Write a short caption.": numbers}}},
        "definitions": {"cider": "CIDEr-D."},
        "predictions": [{"prediction": "not to be published"}],
        **fields,
    }


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory) -> Path:
    """A stage's output folder as it is after a run with checkpoints, an evaluation, and what people leave lying about."""
    folder = tmp_path_factory.mktemp("trained") / "stage4"
    fields = {"stage": 4, "projector_learning_rate": 1e-3, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run_stage(arguments_for(checkpoint, folder, **fields))
    (folder / ".env").write_text("HF_TOKEN=hf_" + "x" * 30)
    (folder / "optimizer.pt").write_bytes(b"\x80\x05state")
    (folder / "notes.txt").write_text("to do")
    (folder / "evil_code.py").write_text("import os")
    os.symlink("/etc/passwd", folder / "merges.txt")
    (folder / "results").mkdir()
    (folder / "results/coco_captions.json").write_text(json.dumps(result_for(folder)))
    for name, fields in {
        "other": {"model": {"weights_sha256": "0" * 64}},
        "blank": {"control": "blank_image"},
        "part": {"limit": 10},
    }.items():
        (folder / f"results/{name}.json").write_text(json.dumps(result_for(folder, task=name, **fields)))
    return folder


@pytest.fixture(scope="module")
def packaged(trained, tmp_path_factory) -> Path:
    return package(trained, tmp_path_factory.mktemp("packaged") / "out", repository="user/my-model")


def test_only_what_belongs_there_is_taken_along(trained, packaged):
    assert set(files_of(packaged)) == {
        *("LICENSE", "README.md", "alignvlm_run.json", "chat_template.jinja", "config.json", "generation_config.json"),
        *("configuration_alignvlm.py", "masking_alignvlm.py", "modeling_alignvlm.py", "processing_alignvlm.py"),
        *("manifest.sha256", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert (packaged / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    text = "".join((packaged / name).read_text() for name in files_of(packaged) if not name.endswith(".safetensors"))
    assert str(trained.parent) not in text and "not to be published" not in text


def test_it_passes_every_check(packaged):
    assert check(packaged, load=False) == []  # loading: see test_large_weights_are_split_and_still_load


def test_made_twice_it_is_the_same(trained, packaged, tmp_path):
    again = package(trained, tmp_path / "again", repository="user/my-model")
    assert files_of(again) == files_of(packaged)
    assert all((again / name).read_bytes() == (packaged / name).read_bytes() for name in files_of(again))
    package(trained, again, repository="user/my-model")  # into the folder of before
    assert all((again / name).read_bytes() == (packaged / name).read_bytes() for name in files_of(packaged))


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_packaged_again_it_keeps_its_results(trained, packaged, tmp_path, size):
    first = package(trained, tmp_path / "first", size, repository="user/my-model")
    again = package(first, tmp_path / "again", size, repository="user/my-model")
    assert files_of(again) == files_of(first) and "`cider`: CIDEr-D." in (again / "README.md").read_text()
    assert all((again / name).read_bytes() == (first / name).read_bytes() for name in files_of(first))
    # In other files, too, the weights are those that were measured.
    other = package(packaged, tmp_path / "other", "60KB" if size == "5GB" else size, repository="user/my-model")
    assert (other / "README.md").read_bytes() == (first / "README.md").read_bytes()
    # Measured again, the new result takes the place of the old one; others stand beside it.
    (first / "results").mkdir()
    newer = {"metrics": {"cider": {"cider": 0.5, "count": 5}}}
    for name, fields in {"coco_captions": newer, "nocaps": {**newer, "task": "nocaps"}}.items():
        (first / f"results/{name}.json").write_text(json.dumps(result_for(first, **fields)))
    results = json.loads((package(first, again) / "alignvlm_run.json").read_text())["results"]
    assert [(each["task"], each["metrics"]["cider"]["cider"]) for each in results] == [
        ("coco_captions", 0.5),
        ("nocaps", 0.5),
    ]


def test_results_of_other_weights_are_not_kept(packaged, tmp_path):
    mine = shutil.copytree(packaged, tmp_path / "mine")
    weights = load_file(mine / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    out = package(mine, tmp_path / "out")
    assert json.loads((out / "alignvlm_run.json").read_text())["results"] == []
    assert "None are on record for these weights" in (out / "README.md").read_text()


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "bos_token_id": None}


@pytest.mark.parametrize("text", [{}, GPT2], ids=["llama", "gpt2, whose weights are transposed"])
def test_lora_weights_left_apart_are_merged(make_model, processor, tmp_path, text):
    checkpoint = tmp_path / "stage0"
    free = {"license": "apache-2.0"}
    backbones = {"vision": "tiny", "vision_licence": free, "language": "tiny", "language_licence": free}
    save_checkpoint(make_model(text=text), processor, checkpoint, {"backbones": backbones, "stages": []})
    fields = {"language_learning_rate": 1e-1, "lora_r": 2, "max_steps": 2, "max_length": 512}
    for merge in (True, False):
        run_stage(arguments_for(checkpoint, tmp_path / str(merge), lora_merge=merge, **fields))
        package(tmp_path / str(merge), tmp_path / f"packaged {merge}")
    merged, apart = (load_file(tmp_path / f"packaged {merge}/model.safetensors") for merge in (True, False))
    base = load_file(tmp_path / "False/model.safetensors")
    for name, value in merged.items():
        torch.testing.assert_close(apart[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert sum(not torch.equal(value, merged[name]) for name, value in base.items()) > 5
    assert not (tmp_path / "packaged False/lora").exists()
    loaded = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "False")
    assert merge_saved_lora(loaded, tmp_path / "False")
    for name, value in merged.items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_large_weights_are_split_and_still_load(trained, tmp_path):
    out = package(trained, tmp_path / "out", max_shard_size="40KB")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (out / "model.safetensors").exists()
    whole = load_file(trained / "model.safetensors")
    parts = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert parts.keys() == whole.keys() and all((parts[name] == whole[name]).all() for name in whole)
    with safe_open(shards[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert check(out, load=False) == []
    problems, releases = try_loading(out)
    assert problems == [] and releases["transformers"] == transformers.__version__
    # What it was loaded with stands in record and card, and the manifest is still true.
    card = (out / "README.md").read_text()
    note_releases(out, releases)
    assert check(out, load=False) == []
    assert json.loads((out / "alignvlm_run.json").read_text())["loaded_with"] == releases
    sentence = f"`transformers` {MINIMUM_TRANSFORMERS} or newer. Loaded and asked about an image with `transformers` "
    assert sentence + releases["transformers"] in (out / "README.md").read_text() and sentence not in card


def test_the_card_has_what_is_on_record_and_nothing_else(packaged):
    text = (packaged / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-text-to-text"
    assert front["license"] == "apache-2.0" and front["language"] == "en" and "custom_code" in front["tags"]
    assert "base_model" not in front and "datasets" not in front  # backbones and data were local
    (entry,) = front["model-index"]
    (found,) = entry["results"]
    assert found["dataset"]["type"] == "yerevann/coco-karpathy" and found["dataset"]["split"] == "test"
    assert found["metrics"] == [{"type": "cider", "value": 0.8765, "name": "CIDEr"}]
    assert "0.8000 to 0.9500" in text and "`cider`: CIDEr-D." in text and 'name, revision = "user/my-model"' in text
    record = json.loads((packaged / "alignvlm_run.json").read_text())
    assert [result["task"] for result in record["results"]] == ["coco_captions"]
    assert "{{" not in text and "{%" not in text
    assert "| 4 | projector (0.001) | `image` | scenes, scene_texts |" in text


def test_every_metric_has_a_title_on_cards():
    names = {folder.name for folder in METRICS.iterdir() if (folder / f"{folder.name}.py").is_file()}
    assert set(HEADLINES) == {*names, "text"}
    for name in names:
        assert HEADLINES[name][0] in {*numbers_of(load_metric(name)), *headlines_of(load_metric(name))}


def test_a_card_of_hub_backbones_and_data(packaged):
    record = {
        "backbones": {"vision": "google/siglip-so400m-patch14-384", "language": "Qwen/Qwen2.5-0.5B"},
        "stages": [
            {
                **json.loads((packaged / "alignvlm_run.json").read_text())["stages"][0],
                "data": [
                    {"name": "pathvqa", "data": "flaviagiammarino/path-vqa", "revision": "f" * 40, "licence": "MIT"},
                    {"name": "daquar/train.jsonl", "data": "train.jsonl"},
                    {"name": "vqa_rad/train.jsonl", "data": "train.jsonl"},
                ],
                "evaluation_tag": "[vqa]",
            }
        ],
    }
    config = json.loads((packaged / "config.json").read_text())
    text = make_card(record, config, 914_000_000)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == ["google/siglip-so400m-patch14-384", "Qwen/Qwen2.5-0.5B"]
    assert front["base_model_relation"] == "finetune" and front["datasets"] == ["flaviagiammarino/path-vqa"]
    assert "| flaviagiammarino/path-vqa | " + "f" * 40 + " | MIT |" in text and "`[vqa]`" in text and "914.0M" in text
    assert all(f"| {each}/train.jsonl | - | not stated |" in text for each in ("daquar", "vqa_rad"))
    assert "None are on record" in text and "model-index" not in front
    asked = [
        {
            "task": "local",
            "name": name,
            "data": {"data": "test.jsonl", "split": "test"},
            "metrics": {"pathvqa_accuracy": {"accuracy": value}},
            "definitions": {},
        }
        for name, value in (("daquar", 0.2), ("vqa_rad", 0.3))
    ]
    (entry,) = yaml.safe_load(make_card({**record, "results": asked}, config, 10).split("---")[1])["model-index"]
    assert [(each["dataset"]["name"], each["metrics"][0]["value"]) for each in entry["results"]] == [
        ("daquar", 0.2),
        ("vqa_rad", 0.3),
    ]
    assert 'ask("photo.jpg", "[vqa] Write a short caption.")' in text and '"[vqa] How many are there?"' in text
    assert 'ask("photo.jpg", "Write a short caption.")' in (packaged / "README.md").read_text()
    untrained = make_card({"stages": []}, config, 10)
    assert "its projector has random weights" in untrained


def test_a_card_edited_in_the_folder_keeps_its_text(checkpoint, make_model, processor, tmp_path):
    mine = shutil.copytree(checkpoint, tmp_path / "mine")
    readme = mine / "README.md"
    written = readme.read_text()
    # Metadata alone: the text is ours, and is written anew.
    readme.write_text(written.replace("tags:", "thumbnail: cat.png\ntags:\n- cats"))
    text = (package(mine, tmp_path / "out", repository="user/mine") / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["thumbnail"] == "cat.png" and "cats" in front["tags"] and "alignvlm" in front["tags"]
    assert front["model_name"] == "mine" and '"user/mine"' in text and author_of(text) == GENERATED
    # The text too: it stays through packaging and another stage in the same folder, with metadata of ours.
    readme.write_text(readme.read_text().replace("## Limits and risks", "## My cat's limits"))
    save_checkpoint(make_model(), processor, mine, json.loads((mine / "alignvlm_run.json").read_text()))
    text = (package(mine, tmp_path / "out", repository="user/mine") / "README.md").read_text()
    assert "My cat's limits" in text and '"user/mine"' in text and "Limits and risks" not in text
    assert yaml.safe_load(text.split("---")[1]) == front and author_of(text) == FOLDER
    note_releases(tmp_path / "out", {"torch": "9"}, "user/mine")
    assert (tmp_path / "out/README.md").read_text() == text and check(tmp_path / "out", load=False) == []
    fresh = (package(mine, tmp_path / "out", overwrite_card=True) / "README.md").read_text()
    assert fresh == (package(checkpoint, tmp_path / "out") / "README.md").read_text()
    # One that cannot be read does not end a training, but cannot be packaged.
    readme.write_text("---\nlicense: [\n---\nMine")
    save_checkpoint(make_model(), processor, mine, json.loads((mine / "alignvlm_run.json").read_text()))
    assert readme.read_text().endswith("Mine") and (mine / "alignvlm_run.json").is_file()
    with pytest.raises(ValueError, match=r"(?s)README.md: its metadata are no YAML.*--overwrite_card writes it anew"):
        package(mine, tmp_path / "out")


def test_a_card_edited_in_the_packaged_folder_is_kept(checkpoint, tmp_path):
    """Text and metadata of one's own stay however often it is packaged; what packaging itself wrote is renewed."""
    out = package(checkpoint, tmp_path / "out", license="cc-by-nc-4.0")
    written = (out / "README.md").read_text()
    fresh = (package(checkpoint, out) / "README.md").read_text()
    assert (
        "license: apache-2.0" in fresh and (package(checkpoint, tmp_path / "other") / "README.md").read_text() == fresh
    )
    edited = fresh.replace("tags:", "thumbnail: cat.png\ntags:\n- cats")
    for text in (edited, edited.replace("## Limits and risks", "## My cat's limits")):
        (out / "README.md").write_text(text)
        for _ in range(3):
            package(checkpoint, out)
            found = (out / "README.md").read_text()
            front = yaml.safe_load(found.split("---")[1])
            assert front["thumbnail"] == "cat.png" and "cats" in front["tags"] and front["license"] == "apache-2.0"
            assert check(out, load=False) == []
        assert ("My cat's limits" in found) == ("My cat's limits" in text) and ("Limits and risks" in found) == (
            text is edited
        )
    # That of the packaged folder stays, as that on the Hub does; a licence that is given is written.
    mine = shutil.copytree(checkpoint, tmp_path / "mine")
    (mine / "README.md").write_text(
        (mine / "README.md").read_text().replace("## Limits and risks", "## My dog's limits")
    )
    text = (package(mine, out, license="cc-by-nc-4.0") / "README.md").read_text()
    assert "My cat's limits" in text and "My dog" not in text and "license: cc-by-nc-4.0" in text
    (out / "README.md").write_text("---\nlicense: [\n---\nMine")
    with pytest.raises(ValueError, match=r"(?s)out/README.md: its metadata are no YAML.*\(--overwrite_card"):
        package(checkpoint, out)
    assert package(checkpoint, out, license="cc-by-nc-4.0", overwrite_card=True)
    assert (out / "README.md").read_text() == written


@pytest.mark.parametrize("size", ["3", "5GiB", "GB", "0GB", "-1GB"])
def test_a_packaging_that_fails_leaves_what_was_there(trained, tmp_path, size):
    out = package(trained, tmp_path / "out")
    before = {name: (out / name).read_bytes() for name in files_of(out)}
    with pytest.raises(ValueError, match=rf"max_shard_size '{size}' is no size.* such as 5GB"):
        package(trained, out, max_shard_size=size)
    lora = shutil.copytree(trained, tmp_path / "lora")
    (lora / "lora").mkdir()  # found when everything else is there
    (lora / "lora/adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    weights = {f"base_model.model.none.lora_{half}.weight": torch.zeros(1, 1) for half in "AB"}
    save_file(weights, lora / "lora/adapter_model.safetensors")
    with pytest.raises(ValueError, match="LoRA weights of layers the checkpoint does not have"):
        package(lora, out)
    assert {name: (out / name).read_bytes() for name in files_of(out)} == before
    with pytest.raises(ValueError, match="max_shard_size"):
        package(trained, tmp_path / "new", max_shard_size=size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "out"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("/home/me/out/stage3", "stage3"),
        ("C:\\Users\\me\\x.json", "x.json"),
        ("~/data/x.jpg", "x.jpg"),
        ("photos: Cannot read '/lustre/data/x.jpg': [Errno 2]", "photos: Cannot read 'x.jpg': [Errno 2]"),
        ("coco/train", "coco/train"),
        ("a/b.jsonl", "a/b.jsonl"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("/home/jane doe/Patients Smith and Jones/train.jsonl", "train.jsonl"),
        ("/media/jane/My Passport/hospital scans 2025/", "hospital scans 2025"),
        ("C:\\Users\\Jane Doe\\pics\\a.jsonl", "a.jsonl"),
        ("\\\\server\\share\\jane\\x.jsonl", "x.jsonl"),
        ("~jane/private work/stage1", "stage1"),
        ("../../home/jane/x.jsonl", "x.jsonl"),
        ("file:///home/jane/x.jsonl", "x.jsonl"),
        ("jane@host:/home/jane/x.jsonl", "x.jsonl"),
        ("/home/jane doe/x.jsonl: line 3 is not JSON", "x.jsonl: line 3 is not JSON"),
        ("photos: Cannot read '/home/jane doe/x.jpg': [Errno 2]", "photos: Cannot read 'x.jpg': [Errno 2]"),
        ("read from jane@host:/home/jane/x.jsonl and file:///srv/jane/y", "read from x.jsonl and y"),
        ("s3://bucket/a.parquet?X-Amz-Signature=abc", "s3://bucket/a.parquet"),
        ("from https://me:secret@x.org/y.parquet?token=abc again", "from https://x.org/y.parquet again"),
        ("Is this a/b? Write: yes/no.", "Is this a/b? Write: yes/no."),
        ("/no_think Which is 3/4?", "/no_think Which is 3/4?"),
        ("It's 'red/blue' or \"a/b\".", "It's 'red/blue' or \"a/b\"."),
        ("yes / no", "yes / no"),
        ("1/2/3", "1/2/3"),
    ],
)
def test_local_paths_lose_their_folders(text, expected):
    assert without_local_paths({"a": [text, 3, None]}) == {"a": [expected, 3, None]}


def test_what_else_lies_in_the_folder_of_results_is_left_aside(checkpoint, tmp_path):
    """A list there was a traceback, and half a file an error without its name."""
    mine = tmp_path / "mine"
    shutil.copytree(checkpoint, mine)
    (mine / "results").mkdir(exist_ok=True)
    for name, content in (("list", "[]"), ("notes", '{"model": "mine"}'), ("text", '"seen"')):
        (mine / f"results/{name}.json").write_text(content)
    expected = (package(checkpoint, tmp_path / "plain") / "alignvlm_run.json").read_bytes()
    assert (package(mine, tmp_path / "out") / "alignvlm_run.json").read_bytes() == expected
    (mine / "results/half.json").write_text('{"model":\n{')
    with pytest.raises(ValueError, match=r"half\.json, line 2, column 2: not JSON"):
        package(mine, tmp_path / "out")


def test_what_is_no_checkpoint_is_refused(trained, tmp_path):
    unfinished = shutil.copytree(trained / "checkpoint-2", tmp_path / "unfinished")
    for name in ("LICENSE", "alignvlm_run.json"):
        (unfinished / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"not a complete checkpoint: LICENSE, alignvlm_run\.json missing"):
        package(unfinished, tmp_path / "out")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis\.tex.* would be lost"):
        package(trained, mine)
    assert (mine / "thesis.tex").exists()
    other = tmp_path / "other"  # another checkpoint, all of whose files have names a package has
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained / name, other)
    for output in (other, trained):
        with pytest.raises(ValueError, match=r"was not made by packaging.* would be lost. Name a new folder"):
            package(trained, output)
        assert (output / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match=r"error: .*not a complete checkpoint"):
        main([str(tmp_path), str(tmp_path / "out")])


def test_weights_that_are_cut_off_are_told_in_a_sentence(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^The weights in .*cut/model\.safetensors are damaged or cut off"):
        package(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(trained, tmp_path, capsys):
    main([str(trained), str(tmp_path / "out"), "--license", "cc-by-nc-4.0"])
    assert "model.safetensors" in capsys.readouterr().out
    assert "license: cc-by-nc-4.0" in (tmp_path / "out/README.md").read_text()
    shutil.rmtree(tmp_path / "out")

"""VLMEvalKit's own code asks a checkpoint about local sets in its TSV form; the answers are those of `alignvlm evaluate`."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignvlm.evaluation.evaluate_model import main


if importlib.util.find_spec("vlmeval") is None:
    pytest.skip("VLMEvalKit is not installed", allow_module_level=True)
pandas = pytest.importorskip("pandas")

CHOICES = ["a circle", "a square", "a triangle"]


@pytest.fixture(autouse=True)
def gradients(speaking):
    """Importing VLMEvalKit turns gradients off for the process: other tests want them, and `speaking` is trained before."""
    yield
    torch.set_grad_enabled(True)


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (9, 8), (80 * number, 30, 90))


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def ours(speaking, tmp_path):
    """A function that returns what `alignvlm evaluate` writes as answers to rows of a jsonl file, in their order."""

    def evaluate(task: str, rows: list[dict]) -> list[str]:
        folder = tmp_path / "ours"
        folder.mkdir()
        for number in range(3):
            picture(number).save(folder / f"{number}.png")
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [str(speaking), "--task", task, "--data", str(folder / "test.jsonl"), "--use_cpu"]
        main([*words, "--output_dir", str(folder / "results")])
        found = json.loads((folder / f"results/{task}.json").read_text())["predictions"]
        by_prompt = {(item["id"], item["prompt"]): item["prediction"] for item in found}
        assert len(by_prompt) == len(rows)
        return [item["prediction"] for item in found]

    return evaluate


def infer(checkpoint: Path, folder: Path, name: str, rows: list[dict]) -> list[str]:
    """What VLMEvalKit's `run.py` writes down as answers to a local data set."""
    data = folder / "LMUData"
    data.mkdir()
    pandas.DataFrame(rows).to_csv(data / f"{name}.tsv", sep="\t", index=False)
    command = [sys.executable, "-m", "alignvlm.evaluation.vlmeval_adapter", "--model", f"mine={checkpoint}"]
    command += ["--data", name, "--mode", "infer", "--work-dir", str(folder / "out")]
    environment = {"LMUData": str(data), "PRED_FORMAT": "tsv", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    files = list((folder / "out").glob(f"**/mine_{name}.tsv"))
    assert files, done.stdout + done.stderr
    found = pandas.read_csv(files[0], sep="\t", keep_default_na=False, dtype=str)
    return found.sort_values("index", key=lambda column: column.astype(int))["prediction"].tolist()


def test_choices_are_asked_as_in_our_evaluation(speaking, ours, tmp_path):
    questions = [("What is it?", ""), ("What is shown?", "Look at the middle."), ("Which shape?", "")]
    letters = dict(zip("ABC", CHOICES))
    rows = [
        {"index": n, "image": encoded(picture(n)), "question": asked, "hint": hint, **letters, "answer": "A"}
        for n, (asked, hint) in enumerate(questions)
    ]
    same = [
        {"image": f"{n}.png", "question": asked, "hint": hint, "options": CHOICES, "answer": "A"}
        for n, (asked, hint) in enumerate(questions)
    ]
    assert infer(speaking, tmp_path, "shapes", rows) == ours("ai2d", same)


def test_open_questions_are_asked_as_in_our_evaluation(speaking, ours, tmp_path):
    """The second question is about two images."""
    questions = ["How many shapes are there?", "What colour is the shape?", "Is there a red circle?"]
    images = [[0], [1, 2], [2]]
    rows = [
        {"index": n, "image": encoded(picture(own[0])) if len(own) == 1 else str([encoded(picture(i)) for i in own])}
        | {"question": asked, "answer": "two"}
        for n, (asked, own) in enumerate(zip(questions, images))
    ]
    same = [
        {"images": [f"{i}.png" for i in own], "question": asked, "answer": "two"}
        for asked, own in zip(questions, images)
    ]
    assert infer(speaking, tmp_path, "questions", rows) == ours("local", same)


def test_images_between_texts_and_earlier_turns_reach_the_model(speaking, tmp_path):
    """A dialogue of VLMEvalKit's form, by its code for several turns; each turn sees the answers before it."""
    from vlmeval.dataset.image_mt import MMDUDataset
    from vlmeval.inference_mt import infer_data_job_mt

    from alignvlm.evaluation.answer import answer
    from alignvlm.evaluation.vlmeval_adapter import AlignVLM

    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    asked = ["Compare <ImageHere> with <ImageHere>.", "Is this the same? <ImageHere>"]

    class Dialogues(MMDUDataset):
        def load_data(self, dataset):
            return pandas.DataFrame(
                [{"index": 0, "image_path": str(paths), "question": str(asked), "answer": "['', '']"}]
            )

    adapter = AlignVLM(str(speaking), use_cpu=True, max_new_tokens=8)
    infer_data_job_mt(adapter, str(tmp_path), "mine", Dialogues("dialogues"))
    (file,) = tmp_path.glob("mine_dialogues.*")
    first_turn = [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "text", "text": " with "},
        {"type": "image"},
        {"type": "text", "text": "."},
    ]
    second_turn = [{"type": "text", "text": "Is this the same? "}, {"type": "image"}]
    told = [{"role": "user", "content": first_turn}]
    images = [picture(0), picture(1), picture(2)]
    ((first,),) = answer(adapter.model, adapter.processor, [images], [[told]], max_new_tokens=8)
    told += [
        {"role": "assistant", "content": [{"type": "text", "text": first}]},
        {"role": "user", "content": second_turn},
    ]
    ((second,),) = answer(adapter.model, adapter.processor, [images], [[told]], max_new_tokens=8)
    from vlmeval.smp import load

    assert str(load(str(file))["prediction"][0]) == str([first, second])


def test_a_question_longer_than_the_context_does_not_end_a_data_set(speaking):
    from alignvlm.evaluation.vlmeval_adapter import AlignVLM

    adapter = AlignVLM(str(speaking), use_cpu=True, max_new_tokens=8)
    adapter.model.config.text_config.max_position_embeddings = 60
    with pytest.warns(UserWarning, match="1 prompts are not answered"):
        assert adapter.generate([{"type": "text", "value": "What is it? " * 40}]) == ""


def test_a_data_set_that_asks_in_its_own_way_is_left_to_it(speaking, tmp_path):
    from vlmeval.dataset import ImageMCQDataset, MMMUDataset

    from alignvlm.evaluation.vlmeval_adapter import AlignVLM

    class Common(ImageMCQDataset):
        def load_data(self, dataset):
            row = {"index": 7, "image_path": str(tmp_path / "0.png"), "question": "Which?", "A": "one", "C": "three"}
            return pandas.DataFrame([row])

    class Own(MMMUDataset, Common):
        pass

    adapter = AlignVLM(str(speaking), use_cpu=True, tag="")
    assert not adapter.use_custom_prompt("any")
    adapter.set_dump_image(Own("any").dump_image)
    assert not adapter.use_custom_prompt("any")
    common = Common("any")
    adapter.set_dump_image(common.dump_image)
    assert adapter.use_custom_prompt("any")
    with pytest.raises(ValueError, match="index 7: the choices are A, C; a letter is left out"):
        adapter.build_prompt(common.data.iloc[0], "any")

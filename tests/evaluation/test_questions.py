"""Data in the forms it has on the Hub and on disk becomes the right questions, with all references."""

import io
import json
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from alignvlm.data import scenes
from alignvlm.data.catalogue import CATALOGUE
from alignvlm.data.record import BadRow
from alignvlm.data.sources import read_source
from alignvlm.evaluation.judge import load_metric
from alignvlm.evaluation.questions import blank, load_task, shuffled, without_images
from tests.data import test_sources as sources
from tests.records import exchanges_of


def png(colour) -> dict:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


@pytest.fixture
def karpathy(tmp_path) -> Path:
    """A folder with Karpathy's `dataset_coco.json` and its photos."""
    images = []
    for index, (split, captions) in enumerate([("train", 5), ("test", 7), ("val", 5), ("test", 5)]):
        file = tmp_path / "val2014" / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        PILImage.new("RGB", (8, 6), (index, 0, 0)).save(file)
        sentences = [{"raw": f"Caption {n} of {index}.", "tokens": []} for n in range(captions)]
        images.append({"filepath": "val2014", "filename": file.name, "split": split, "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return tmp_path


def test_karpathy_splits_keep_all_their_references(karpathy):
    found = load_task("coco_captions", "test", str(karpathy), prompt="Caption it.")
    assert [len(one.conversations[0].responses) for one in found.asked] == [7, 5]
    assert len(found.notes.pop("image_files_hash")) == 64
    assert found.notes == {"images": 2, "questions": 2, "references": 12}
    question = found.asked[0].conversations[0]
    assert (question.prompt, found.source.metric_of(question)) == ("Caption it.", "cider")
    assert question.responses[6] == "Caption 6 of 1."
    assert [image.getpixel((0, 0))[0] for (image,) in found.images(found.asked)] == [1, 3]
    (file,) = found.source.identity["files"]
    assert found.source.identity["split"] == "test" and len(file["sha256"]) == 64
    assert len(load_task("coco_captions", "val", str(karpathy)).asked) == 1
    assert len(load_task("coco_captions", "test", str(karpathy), limit=1).asked) == 1


def test_images_may_lie_elsewhere(karpathy, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("photos")
    (karpathy / "val2014").rename(elsewhere / "val2014")
    with pytest.raises(ValueError, match=r"line|entry 2: Cannot read .*1\.png.*image_dir"):
        load_task("coco_captions", "test", str(karpathy))
    found = load_task("coco_captions", "test", str(karpathy), image_dir=str(elsewhere))
    assert found.images(found.asked)[0][0].size == (8, 6)


def test_parquet_in_the_schema_of_flickr30k(tmp_path):
    features = Features({"image": Image(), "alt_text": List(Value("string")), "img_id": Value("string")})
    for split, count in (("test", 3), ("validation", 2)):
        rows = [{"image": png((9, n, 0)), "alt_text": ["a", "b"] * (n + 1), "img_id": str(n)} for n in range(count)]
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    found = load_task("flickr30k_captions", "test", str(tmp_path))
    assert found.notes == {"images": 3, "questions": 3, "references": 12}
    assert load_task("flickr30k_captions", "val", str(tmp_path)).notes["images"] == 2


def test_pathvqa_with_and_without_exact_duplicates(tmp_path):
    rows = [
        {"image": png((1, 0, 0)), "question": "Is it a cell?", "answer": "yes"},
        {"image": png((1, 0, 0)), "question": "What is it?", "answer": "a cell"},
        {"image": png((2, 0, 0)), "question": "Is it a cell?", "answer": "yes"},  # another image
        {"image": png((1, 0, 0)), "question": "Is it a cell?", "answer": "yes"},  # the duplicate
        {"image": png((1, 0, 0)), "question": "Is it a cell?", "answer": "no"},  # another answer
    ]
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    found = load_task("pathvqa", "test", str(tmp_path))
    assert [[c.prompt for c in one.conversations] for one in found.asked] == [
        ["Is it a cell?", "What is it?", "Is it a cell?"],
        ["Is it a cell?"],
    ]
    assert found.notes["questions"] == 4
    assert (found.notes["exact_duplicates"], found.notes["exact_duplicates_are"]) == (1, "removed")
    kept = load_task("pathvqa", "test", str(tmp_path), keep_duplicates=True)
    assert (kept.notes["questions"], kept.notes["exact_duplicates_are"]) == (5, "kept")


@pytest.mark.slow
def test_pathvqa_has_as_many_questions_as_the_field_counts(shared_data, tmp_path):
    rows = [json.loads(line) for line in (shared_data / "pathvqa/qa.jsonl").open()]
    for name in {row["image_id"] for row in rows}:  # the images are not there: one drawn image stands for each
        (tmp_path / f"{name}.png").write_bytes(png((1, 0, 0))["bytes"])
    rows = [{**row, "image": f"{row['image_id']}.png"} for row in rows]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, with_duplicates, without in (("train", 19755, 19654), ("val", 6279, 6259)):
        found = load_task("pathvqa", split, str(tmp_path / "qa.jsonl"))
        assert found.notes["questions"] == without
        assert found.notes["exact_duplicates"] == with_duplicates - without
    assert load_task("pathvqa", "val", str(tmp_path / "qa.jsonl"), keep_duplicates=True).notes["questions"] == 6279


def test_pathvqa_itself_and_vqa_rad_are_asked_as_their_files_have_them(shared_data):
    """Every question of the official training split's held-out images, with its image."""
    found = load_task("local", "dev", str(shared_data / "pathvqa/dev.jsonl"))
    assert (found.notes["images"], found.notes["questions"]) == (300, 2278)
    kinds = {c.kind for one in found.asked for c in one.conversations}
    assert kinds == {"yes/no", "open"}
    found = load_task("local", "train", str(shared_data / "vqa_rad/train.jsonl"))
    assert (found.notes["images"], found.notes["questions"]) == (313, 1797)


def test_local_rows_are_judged_by_what_they_hold(tmp_path):
    PILImage.new("RGB", (8, 6)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "What?", "answer": "a chair", "split": "val"}]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_task("local", "val", str(tmp_path / "qa.jsonl"))
    (question,) = found.asked[0].conversations
    assert (question.prompt, question.responses) == ("What?", ["a chair"])
    assert found.source.metric_of(question) == "pathvqa_accuracy"
    rows = [{"image": "a.png", "captions": ["one", "two"], "split": "val"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_task("local", "val", str(tmp_path / "captions.jsonl"))
    assert found.source.metric_of(found.asked[0].conversations[0]) == "cider"
    with pytest.raises(ValueError, match="has no rows of split 'test'"):
        load_task("local", "test", str(tmp_path / "captions.jsonl"))


def test_another_split_is_not_taken_for_the_one_asked_for(tmp_path):
    rows = {"image": [png((1, 0, 0))], "captions": [["one"]]}
    Dataset.from_dict(rows, Features({"image": Image(), "captions": List(Value("string"))})).to_parquet(
        tmp_path / "train-00000-of-00001.parquet"
    )
    with pytest.raises(ValueError, match=r"The files in .* are named after other splits than 'test'"):
        load_task("local", "test", str(tmp_path))
    assert load_task("local", "train", str(tmp_path)).notes["images"] == 1
    assert load_task("local", "test", str(tmp_path / "train-00000-of-00001.parquet")).notes["images"] == 1


QUESTION = {"image": "a.png", "question": "What?", "answer": "a cat"}
CAPTION = {"image": "a.png", "captions": ["a cat", "a grey cat"]}
ANNOTATED = {"image": "a.png", "annotations": [{"prompt": "What?", "response": "a cat", "kind": "answer"}]}
BAD_ROWS = {
    "null": (QUESTION, {"answer": None}, "`answer` is None"),
    "int": (QUESTION, {"answer": 3}, r"`answer` is 3 \(int\)"),
    "bool": (QUESTION, {"answer": True}, r"`answer` is True \(bool\)"),
    "list": (QUESTION, {"answer": ["a", "b"]}, r"`answer` is \['a', 'b'\]"),
    "placeholder": (QUESTION, {"question": "<image> What?"}, "`question` holds the image placeholder"),
    "empty caption": (CAPTION, {"captions": ["a cat", " "]}, r"`captions\[1\]` is empty"),
    "no caption": (CAPTION, {"captions": None}, "No caption: none of the columns captions"),
    "response": (
        ANNOTATED,
        {"annotations": [{"prompt": "What?", "response": 1}]},
        r"`annotations\[0\].response` is 1",
    ),
    "no image": (QUESTION, {"image": None}, "`image` is empty"),
    "no picture": (CAPTION, {"image": None}, "A caption without an image"),
    "missing image": (QUESTION, {"image": "gone.png"}, r"Cannot read the image .*gone\.png"),
    "truncated image": (QUESTION, {"image": "half.png"}, r"Cannot read the image .*half\.png"),
    "truncated caption image": (CAPTION, {"image": "half.png"}, r"Cannot read the image .*half\.png"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_found_before_anything_is_asked(tmp_path, kind):
    good, change, message = BAD_ROWS[kind]
    PILImage.new("RGB", (8, 6)).save(tmp_path / "a.png")
    PILImage.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "whole.png").unlink()
    rows = [{**good, "split": "val"}, {**good, "split": "test"}, {**good, "split": "test", **change}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadRow, match=f"^rows.jsonl, line 3: .*{message}.*--on_bad_row skip"):
        load_task("local", "test", str(tmp_path / "rows.jsonl"))
    found = load_task("local", "test", str(tmp_path / "rows.jsonl"), on_bad_row="skip")
    assert found.notes["images"] == 1 and found.notes["bad_rows"] == 1
    (problem,) = found.notes["bad_row_list"]
    assert problem.startswith("rows.jsonl, line 3: ")
    assert [image.size for (image,) in found.images(found.asked)] == [(8, 6)]
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(ValueError, match=r"None of the 1 rows .* can be used|1 of 1 rows of bad.jsonl cannot be used"):
        load_task("local", "test", str(tmp_path / "bad.jsonl"), on_bad_row="skip")


def test_scenes_are_captioned_and_questioned(tmp_path):
    scenes.make_scenes(2, "test").to_parquet(tmp_path / "test.parquet")
    found = load_task("scenes", "test", str(tmp_path))
    metrics = [found.source.metric_of(conversation) for conversation in found.asked[0].conversations]
    assert metrics == ["cider"] * 2 + ["pathvqa_accuracy"] * 8
    assert found.images(found.asked)[1][0].size == (64, 64)


def test_training_and_evaluation_read_a_row_alike(tmp_path):
    """A row with `alt_text` and `caption` trains on the very captions it is judged by."""
    PILImage.new("RGB", (8, 6)).save(tmp_path / "a.png")
    row = {"image": "a.png", "alt_text": ["one"], "caption": "another"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    found = load_task("local", "test", str(tmp_path))
    trained = read_source({"data": "test.jsonl"}, tmp_path)[0]
    asked = [(c.prompt, response) for c in found.asked[0].conversations for response in c.responses]
    assert asked == exchanges_of(trained) == [("Write a short caption.", "one")]


def test_every_image_of_a_conversation_is_shown(tmp_path):
    for index in range(2):
        PILImage.new("RGB", (8, 6), (index, 0, 0)).save(tmp_path / f"{index}.png")
    turns = [("human", "<image> or <image>?"), ("gpt", "the second"), ("human", "Why?"), ("gpt", "It is red.")]
    row = {"images": ["0.png", "1.png"], "conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    found = load_task("local", "test", str(tmp_path))
    (images,) = found.images(found.asked)
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 1]
    (conversation,) = found.asked[0].conversations
    assert (conversation.prompt, conversation.responses) == ("Why?", ["It is red."]) and len(
        conversation.messages
    ) == 3


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown task 'coco'.*coco_captions"):
        load_task("coco", "test")
    with pytest.raises(ValueError, match="'scenes' needs data"):
        load_task("scenes", "test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for missing in ("out/data/rows.jsonl", "data/rows.jsonl", str(tmp_path / "gone"), "data/gone"):
        with pytest.raises(FileNotFoundError, match="No such file or folder: "):
            load_task("local", "test", missing)
    with pytest.raises(ValueError, match="holds no"):
        load_task("local", "test", str(tmp_path))
    (tmp_path / "book.txt").write_text("Once upon a time.\n\nThe end.")
    with pytest.raises(ValueError, match=r"paragraph 1: plain text asks nothing\. .*text_perplexity"):
        load_task("local", "test", str(tmp_path / "book.txt"))
    (tmp_path / "book.txt").unlink()
    Dataset.from_list(
        [{"image": png((1, 0, 0)), "text": "x"}], Features({"image": Image(), "text": Value("string")})
    ).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"'cauldron'\. No metric here judges it as the field does\. Valid tasks: "):
        load_task("cauldron", "val")
    with pytest.raises(ValueError, match="needs a column filename"):
        load_task("coco_captions", "test", str(tmp_path))


def test_controls_change_every_image(tmp_path):
    scenes.make_scenes(7, "test").to_parquet(tmp_path / "test.parquet")
    found = load_task("scenes", "test", str(tmp_path))
    grey = blank(found.images(found.asked))
    assert all(image.getcolors() == [(64 * 64, (128, 128, 128))] for (image,) in grey)
    for seed in range(20):
        mixed = shuffled(found.asked, seed)
        assert sorted(one.index for one in mixed) == list(range(7))
        assert all(new.index != old.index for new, old in zip(mixed, found.asked))
        assert [one.conversations for one in mixed] == [one.conversations for one in found.asked]


# How a set is asked and judged: its fixture, a split that is taken if none is named, references and kinds of the first record.
ASKED = {
    "nocaps": (sources.nocaps, ["shade 0", "still 0"], ["short_caption"]),
    "vqav2": (sources.vqav2, ["no"], ["other", "other"]),
    "textvqa": (lambda f: sources.people(f, "textvqa"), ["no", "shade 0", "shade 0"], ["question", "question"]),
    "scienceqa": (sources.scienceqa, ["A"], ["natural science"]),
    "mmstar": (sources.mmstar, ["A"], ["math"]),
    "pope": (sources.pope, ["no"], ["random", "popular"]),
    "mme": (sources.mme, ["No"], ["count", "count"]),
    "chartqa": (sources.chartqa, ["0"], ["augmented_test"]),
    "docvqa": (sources.docvqa, ["shade 0", "Shade 0."], ["question"]),
    "ocrbench": (sources.ocrbench, ["shade 0"], ["Regular Text Recognition"]),
}


@pytest.mark.parametrize("task", ASKED)
def test_a_benchmark_is_asked_as_the_field_asks_it(task, tmp_path):
    make, references, kinds = ASKED[task]
    made = make(tmp_path)
    usual = CATALOGUE[task].split == made["split"] or None  # the fixture of TextVQA is shared with VizWiz's
    found = load_task(task, None if usual else made["split"], str(tmp_path / made["data"]))
    conversations = found.asked[0].conversations
    assert conversations[0].responses == references
    assert [c.kind for c in conversations] == kinds
    assert len(found.asked) == 3 and found.source.metric_of(conversations[0]) == CATALOGUE[task].metric
    choices = {"scienceqa": ["one", "two", "three"], "mmstar": ["A", "B", "C", "D"]}.get(task)
    assert conversations[0].choices == choices
    metric = load_metric(CATALOGUE[task].metric)
    assert isinstance(metric.features["references"], Value) == (len(references) == 1 and task not in ("vqav2", "chartqa", "ocrbench"))  # fmt: skip


def test_people_are_not_replaced_by_their_most_frequent_answer(tmp_path):
    """VQA accuracy gave 0 to every right answer."""
    PILImage.new("RGB", (8, 6)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "q?", "multiple_choice_answer": "yes"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    data = str(tmp_path / "test.jsonl")
    with pytest.raises(BadRow, match=r"test\.jsonl, line 1: The row has no `answers`: .*--task local"):
        load_task("vqav2", "test", data)
    (one,) = load_task("local", data=data).asked
    assert one.conversations[0].responses == ["yes"]
    assert len(read_source({"name": "vqav2", "data": data, "split": "test"})) == 1  # to train on, one is enough


def test_at_least_one_record_is_asked(tmp_path):
    scenes.make_scenes(2, "test").to_parquet(tmp_path / "test.parquet")
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit={limit} asks no question"):
            load_task("scenes", "test", str(tmp_path), limit)


def test_an_answer_that_is_no_choice_is_named(tmp_path):
    PILImage.new("RGB", (8, 6)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Which?", "options": ["one", "two"], "answer": "2"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadRow, match=r"`answer` is '2'; expected one of A, B, or an index from 0"):
        load_task("ai2d", data=str(tmp_path / "test.jsonl"))


def test_a_question_alone_has_no_image_part(tmp_path):
    scenes.make_scenes(2, "test").to_parquet(tmp_path / "test.parquet")
    for one in load_task("scenes", "test", str(tmp_path)).asked:
        for conversation in one.conversations:
            alone = without_images(conversation)
            assert alone.image_count == 0 and conversation.image_count == 1
            assert (alone.prompt, alone.responses) == (conversation.prompt, conversation.responses)

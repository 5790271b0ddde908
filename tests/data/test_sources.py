"""Every kind of data set, from files of the schema it has on the Hub, with images made here."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from alignvlm.data.catalogue import BY_KIND, CATALOGUE
from alignvlm.data.formats import BY_LETTER, FORMATS
from alignvlm.data.images import BadImage, read_image
from alignvlm.data.record import BadRow, Record
from alignvlm.data.sources import read_source
from alignvlm.evaluation.judge import METRICS
from tests.records import exchanges_of, responses_of


def png(shade: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (6, 4), (shade, 10, 20)).save(file, "PNG")
    return file.getvalue()


def embedded(shade: int) -> dict:
    return {"bytes": png(shade), "path": f"{shade}.png"}


def said(*turns: tuple[str, str], role: str = "from", content: str = "value") -> list[dict]:
    return [{role: speaker, content: words} for speaker, words in turns]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Loose images below `images/`, of shades 0 to 5."""
    (tmp_path / "images").mkdir()
    for shade in range(6):
        (tmp_path / f"images/{shade}.png").write_bytes(png(shade))
    return tmp_path


def parquet(folder: Path, name: str, rows: list[dict], **features) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features) if features else None).to_parquet(path)
    return name


def lines(folder: Path, name: str, rows: list[dict]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def llava(folder: Path, name: str) -> dict:
    """`conversations` in one json list, images in folders beside it."""
    rows = [
        {
            "id": f"00453000{i}",
            "image": f"images/{i}.png",
            "conversations": [
                {
                    "from": "human",
                    "value": "Give a brief description of the image.\n<image>" if i else "<image>\nWhat is this?",
                },
                {"from": "gpt", "value": f"shade {i}"},
            ],
        }
        for i in range(3)
    ]
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return {"data": f"{name}.json"}


def coco(folder: Path) -> dict:
    """yerevann/coco-karpathy: captions and file names, no images."""
    rows = [
        {
            "filepath": "images",
            "sentids": [10 * i, 10 * i + 1],
            "filename": f"{i}.png",
            "imgid": i,
            "split": "restval" if i == 2 else "train",
            "sentences": [f"shade {i}", f"still {i}"],
            "cocoid": 1000 + i,
            "url": f"http://images.cocodataset.org/{i}",
        }
        for i in range(3)
    ]
    parquet(folder, "coco/train-00000-of-00001.parquet", rows)
    return {"data": "coco", "image_dir": ".", "split": "train+restval"}


def karpathy(folder: Path) -> dict:
    """The split file of Karpathy's own archive."""
    images = [
        {
            "filepath": "images",
            "filename": f"{i}.png",
            "split": "train" if i < 3 else "test",
            "imgid": i,
            "sentids": [i],
            "sentences": [{"tokens": ["shade"], "raw": f"shade {i}", "imgid": i, "sentid": i}],
        }
        for i in range(5)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return {"data": "dataset_coco.json"}


def flickr30k(folder: Path) -> dict:
    rows = [
        {
            "image": embedded(i),
            "alt_text": ["rewritten"],
            "original_alt_text": [f"shade {i}", f"still {i}"],
        }
        for i in range(3)
    ]
    texts = List(Value("string"))
    parquet(
        folder,
        "flickr/data/train-00000-of-00001.parquet",
        rows,
        image=Image(),
        alt_text=texts,
        original_alt_text=texts,
    )
    return {"data": "flickr"}


def cauldron(folder: Path) -> dict:
    turns = [
        {"user": "What shade?\nAnswer briefly.", "assistant": "shade {}", "source": "VQAv2"},
        {"user": "q", "assistant": "a", "source": "VQAv2"},
    ]
    rows = [
        {"images": [embedded(i)], "texts": [{**t, "assistant": t["assistant"].format(i)} for t in turns]}
        for i in range(3)
    ]
    text = Value("string")
    parquet(
        folder,
        "cauldron/vqav2/train-00000-of-00001.parquet",
        rows,
        images=List(Image()),
        texts=List({"user": text, "assistant": text, "source": text}),
    )
    return {"data": "cauldron", "config": "vqav2"}


def vqav2(folder: Path) -> dict:
    answer = {"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")}
    rows = [
        {
            "question_type": "what",
            "multiple_choice_answer": f"shade {i}" if q == 0 else "yes",
            "answers": [{"answer": "no", "answer_confidence": "yes", "answer_id": 1}],
            "image_id": i,
            "answer_type": "other",
            "question_id": 10 * i + q,
            "question": f"question {q}?",
            "image": embedded(i),
        }
        for i in range(3)
        for q in range(2)
    ]
    text, number = Value("string"), Value("int64")
    parquet(
        folder,
        "vqav2/data/validation-00000-of-00001.parquet",
        rows,
        question_type=text,
        multiple_choice_answer=text,
        answers=List(answer),
        image_id=number,
        answer_type=text,
        question_id=number,
        question=text,
        image=Image(),
    )
    return {"data": "vqav2", "split": "validation"}


def pathvqa(folder: Path) -> dict:
    """One row per question; one of them twice."""
    rows = [
        {"image": embedded(i), "question": q, "answer": a}
        for i in range(3)
        for q, a in (("what shade?", f"shade {i}"), ("is it dark?", "yes"), ("is it dark?", "yes"))
    ]
    text = Value("string")
    parquet(folder, "pathvqa/data/train-00000-of-00001.parquet", rows, image=Image(), question=text, answer=text)
    return {"data": "pathvqa"}


def people(folder: Path, name: str, **columns) -> dict:
    """OK-VQA, TextVQA and VizWiz: `answers` of several people; the most frequent is the one."""
    rows = [
        {
            "image": embedded(i),
            "question_id": str(10 * i + q),
            "question": f"question {q}?",
            "answers": ["no", f"shade {i}" if q == 0 else "yes", f"shade {i}" if q == 0 else "yes"],
            **columns,
        }
        for i in range(3)
        for q in range(2)
    ]
    text = Value("string")
    features = {"image": Image(), "question_id": text, "question": text, "answers": List(text)}
    features |= dict.fromkeys(columns, text)
    parquet(folder, f"{name}/data/val-00000-of-00001.parquet", rows, **features)
    return {"data": name, "split": "val"}


def gqa(folder: Path) -> dict:
    """Questions name images that stand in another config; one image is asked about in no question."""
    instructions = [
        {
            "id": f"{i}{q}",
            "imageId": str(i),
            "question": f"question {q}?",
            "answer": f"shade {i}" if q == 0 else "yes",
            "fullAnswer": "A whole sentence.",
            "isBalanced": True,
        }
        for i in range(3)
        for q in range(2)
    ]
    parquet(folder, "gqa/train_balanced_instructions/train-00000-of-00001.parquet", instructions)
    images = [{"id": str(i), "image": embedded(i)} for i in (3, 2, 1, 0)]
    parquet(folder, "gqa/train_balanced_images/train-0.parquet", images, id=Value("string"), image=Image())
    return {"data": "gqa"}


def slake(folder: Path) -> dict:
    """One json list per split, in two languages; images in `imgs/`."""
    rows = [
        {
            "img_id": i,
            "img_name": f"{i}.png",
            "question": f"question {q}?" if language == "en" else "什么?",
            "answer": f"shade {i}" if q == 0 else "Yes",
            "q_lang": language,
            "location": "Lung",
            "answer_type": "OPEN" if q == 0 else "CLOSED",
            "qid": 10 * i + q,
        }
        for i in range(3)
        for language in ("zh", "en")
        for q in range(2)
    ]
    (folder / "slake").mkdir()
    (folder / "slake/train.json").write_text(json.dumps(rows))
    return {"data": "slake", "image_dir": "images"}


def asked_of(folder: Path, name: str, split: str, rows, config: str = "data", **columns) -> dict:
    """A parquet file of questions: `rows(i)` about the image of shade i; `columns` are features that are not texts."""
    found = [{"image": embedded(i), **row} for i in range(3) for row in rows(i)]
    features = {key: Value("string") for key in found[0]} | {"image": Image()} | columns
    parquet(folder, f"{name}/{config}/{split}-00000-of-00001.parquet", found, **features)
    return {"data": name, "split": split}


TEXTS, NUMBER = List(Value("string")), Value("int64")


def nocaps(folder: Path) -> dict:
    def rows(i):
        captions = [f"shade {i}", f"still {i}"]
        yield {"image_file_name": "a.jpg", "image_id": i, "image_open_images_id": "0", "annotations_ids": [1, 2], "annotations_captions": captions}  # fmt: skip

    return asked_of(
        folder, "nocaps", "validation", rows, image_id=NUMBER, annotations_ids=List(NUMBER), annotations_captions=TEXTS
    )


def textcaps(folder: Path) -> dict:
    def rows(i):
        captions = [f"shade {i}", f"still {i}"]
        yield {"question_id": str(i), "question": "Provide a one-sentence caption", "image_id": "a", "image_classes": ["Sign"], "caption_str": captions, "reference_strs": captions}  # fmt: skip

    return asked_of(folder, "textcaps", "val", rows, image_classes=TEXTS, caption_str=TEXTS, reference_strs=TEXTS)


def scienceqa(folder: Path) -> dict:
    def rows(i):
        yield {"question": "Which?", "choices": ["one", "two", "three"], "answer": i, "hint": "Look." if i == 1 else "", "task": "closed choice", "grade": "grade2", "subject": "natural science", "lecture": "", "solution": ""}  # fmt: skip

    return asked_of(folder, "scienceqa", "test", rows, "ScienceQA-IMG", choices=TEXTS, answer=NUMBER)


def ai2d(folder: Path) -> dict:
    def rows(i):
        yield {"question": "Which?", "options": ["one", "two", "three"], "answer": str(i)}

    return asked_of(folder, "ai2d", "test", rows, options=TEXTS)


def mmstar(folder: Path) -> dict:
    def rows(i):
        question = "Which?\nOptions: A: one, B: two, C: three, D: four"
        yield {"index": i, "question": question, "answer": "ABC"[i], "category": "math", "l2_category": "geometry"}

    return asked_of(folder, "mmstar", "val", rows, index=NUMBER)


def pope(folder: Path) -> dict:
    """One question twice, for two ways to choose absent objects."""

    def rows(i):
        for number, category in enumerate(("random", "popular")):
            yield {"id": str(number), "question_id": str(number), "question": "Is there a cat?", "answer": ("no", "yes")[i % 2], "image_source": "COCO_val2014_0", "category": category}  # fmt: skip

    return asked_of(folder, "pope", "test", rows)


def mme(folder: Path) -> dict:
    def rows(i):
        for answer in (("No", "Yes"), ("Yes", "No"))[i % 2]:
            yield {"question_id": f"count/{i}.png", "question": f"{answer}? Please answer yes or no.", "answer": answer, "category": "count"}  # fmt: skip

    return asked_of(folder, "mme", "test", rows)


def chartqa(folder: Path) -> dict:
    def rows(i):
        yield {"type": "human_test" if i else "augmented_test", "question": "How many?", "answer": str(i)}

    return asked_of(folder, "chartqa", "test", rows)


def docvqa(folder: Path) -> dict:
    def rows(i):
        yield {"questionId": str(i), "question": "Which?", "question_types": ["form"], "docId": i, "answers": [f"shade {i}", f"Shade {i}."], "data_split": "val"}  # fmt: skip

    return asked_of(folder, "docvqa", "validation", rows, "DocVQA", question_types=TEXTS, docId=NUMBER, answers=TEXTS)


def ocrbench(folder: Path) -> dict:
    def rows(i):
        yield {"dataset": "IIIT5K", "question": "what is written?", "question_type": "Regular Text Recognition", "answer": [f"shade {i}"]}  # fmt: skip

    return asked_of(folder, "ocrbench", "test", rows, answer=TEXTS)


def conversation_of(i: int) -> list[dict]:
    """Two turns; the image stands in the middle of the first question."""
    return said(("human", "Is this <image> dark?"), ("gpt", f"shade {i}"), ("human", "And now?"), ("gpt", "no"))


def llava_instruct(folder: Path) -> dict:
    rows = [{"id": str(i), "image": f"images/{i}.png", "conversations": conversation_of(i)} for i in range(3)]
    (folder / "mix665k.json").write_text(json.dumps(rows))
    return {"data": "mix665k.json"}


def llava_onevision(folder: Path) -> dict:
    text = Value("string")
    rows = [
        {"id": str(i), "image": embedded(i), "conversations": conversation_of(i), "data_source": "sharegpt4v"}
        for i in range(3)
    ]
    features = {
        "id": text,
        "image": Image(),
        "conversations": List({"from": text, "value": text}),
        "data_source": text,
    }
    parquet(folder, "onevision/sharegpt4v(coco)/train-00000-of-00001.parquet", rows, **features)
    return {"data": "onevision", "config": "sharegpt4v(coco)"}


def finevision(folder: Path) -> dict:
    """Four ratings per turn, some of them missing; the fourth row has no turn that is rated well."""
    ratings = ("relevance", "image_correspondence", "visual_dependency", "formatting")
    rows = [
        {
            "images": [embedded(i)],
            "texts": [
                {"user": "Spam?", "assistant": "spam"},
                {"user": "What shade?", "assistant": f"shade {i}"},
                {"user": "And now?", "assistant": "no"},
            ],
            "source": "made",
            **{f"{name}_ratings": [1, 5, None] if i < 3 else [1, 1, 2] for name in ratings},
            **{f"{name}_min": 1 for name in ratings},
        }
        for i in range(4)
    ]
    text, number = Value("string"), Value("int64")
    features = {"images": List(Image()), "texts": List({"user": text, "assistant": text}), "source": text}
    features |= {f"{name}_ratings": List(number) for name in ratings} | {f"{name}_min": number for name in ratings}
    parquet(folder, "finevision/made/train-00000-of-00001.parquet", rows, **features)
    return {"data": "finevision", "config": "made", "min_relevance": 3, "min_formatting": 2}


def webdataset(folder: Path) -> dict:
    """Two shards of images with a caption beside each."""
    for shard, shades in enumerate(((0, 1), (2,))):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for i in shades:
                for name, content in ((f"{i:05d}.png", png(i)), (f"{i:05d}.txt", f"shade {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return {"data": "."}


def imagefolder(folder: Path) -> dict:
    lines(folder, "images/metadata.jsonl", [{"file_name": f"{i}.png", "text": f"shade {i}"} for i in range(3)])
    for shade in range(3, 6):
        (folder / f"images/{shade}.png").unlink()
    return {"data": "images"}


def metadata_csv(folder: Path) -> dict:
    rows = "".join(f"{i}.png,shade {i}\n" for i in range(3))
    (folder / "images/metadata.csv").write_text(f"file_name,text\n{rows}")
    return {"data": "images"}


def local_records(folder: Path) -> dict:
    rows = [{"image": f"images/{i}.png", "annotations": [{"prompt": "p", "response": f"shade {i}"}]} for i in range(3)]
    return {"data": lines(folder, "rows.jsonl", rows)}


def local_parquet(folder: Path) -> dict:
    annotation = {"prompt": Value("string"), "response": Value("string"), "kind": Value("string")}
    rows = [
        {"images": [embedded(i)], "annotations": [{"prompt": "p", "response": f"shade {i}", "kind": "k"}]}
        for i in range(3)
    ]
    return {"data": parquet(folder, "records.parquet", rows, images=List(Image()), annotations=List(annotation))}


def local_csv(folder: Path) -> dict:
    (folder / "rows.csv").write_text(
        "image,question,answer\n" + "".join(f"images/{i}.png,What?,shade {i}\n" for i in range(3))
    )
    return {"data": "rows.csv"}


def trl(folder: Path) -> dict:
    """`messages` and `images`, as TRL's vision data sets have them: typed content, keys that only some parts have."""
    rows = [
        {
            "images": [embedded(i)],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What shade?", "index": None},
                        {"type": "image", "text": None, "index": 0},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"shade {i}", "index": None}]},
            ],
        }
        for i in range(3)
    ]
    text = Value("string")
    part = {"type": text, "text": text, "index": Value("int64")}
    features = {"images": List(Image()), "messages": List({"role": text, "content": List(part)})}
    return {"data": parquet(folder, "trl.parquet", rows, **features)}


# For each: the source, what a recipe says, the first prompt of record 1, and its number of exchanges.
LISTED = "A. one\nB. two\nC. three"
BLIP, CAPTION = "Give a brief description of the image.", "Write a short caption."


def rlaif_v(folder: Path) -> dict:
    def said(role: str, words: str, *parts: dict) -> list[dict]:
        return [{"role": role, "content": [*parts, {"type": "text", "text": words}]}]

    rows = [
        {
            "images": [embedded(i)],
            "prompt": said("user", "What shade?", {"type": "image", "text": None}),
            "chosen": said("assistant", f"shade {i}"),
            "rejected": said("assistant", "none"),
        }
        for i in range(3)
    ]
    text = Value("string")
    messages = List({"role": text, "content": List({"type": text, "text": text})})
    features = {"images": List(Image()), "prompt": messages, "chosen": messages, "rejected": messages}
    return {"data": parquet(folder, "rlaif_v.parquet", rows, **features)}


FIXTURES = {
    "llava_pretrain": (lambda f: llava(f, "blip_laion_cc_sbu_558k"), f"{BLIP}<image>", 1),
    "sharegpt4v": (lambda f: llava(f, "share-captioner"), "<image>Describe the picture in detail.", 1),
    "llava_instruct": (llava_instruct, "Is this<image>dark?", 2),
    "llava_onevision": (llava_onevision, "Is this<image>dark?", 2),
    "coco_captions": (coco, f"<image>{CAPTION}", 2),
    "coco_captions, Karpathy's file": (karpathy, f"<image>{CAPTION}", 1),
    "flickr30k_captions": (flickr30k, f"<image>{CAPTION}", 2),
    "cauldron": (cauldron, "<image>What shade?\nAnswer briefly.", 2),
    "finevision": (finevision, "<image>What shade?", 2),
    "vqav2": (vqav2, "<image>question 0?", 2),
    "gqa": (gqa, "<image>question 0?", 2),
    "okvqa": (lambda f: people(f, "okvqa", question_type="one", answer_type="other"), "<image>question 0?", 2),
    "textvqa": (lambda f: people(f, "textvqa", image_id="a", set_name="val"), "<image>question 0?", 2),
    "vizwiz": (lambda f: people(f, "vizwiz", category="other"), "<image>question 0?", 2),
    "nocaps": (nocaps, f"<image>{CAPTION}", 2),
    "textcaps": (textcaps, f"<image>{CAPTION}", 2),
    "scienceqa": (scienceqa, f"<image>Context: Look.\nWhich?\n{LISTED}\n{BY_LETTER}", 1),
    "ai2d": (ai2d, f"<image>Which?\n{LISTED}\n{BY_LETTER}", 1),
    "mmstar": (mmstar, f"<image>Which?\nOptions: A: one, B: two, C: three, D: four\n{BY_LETTER}", 1),
    "pope": (pope, "<image>Is there a cat?", 1),
    "mme": (mme, "<image>Yes? Please answer yes or no.", 2),
    "chartqa": (chartqa, "<image>How many?", 1),
    "docvqa": (docvqa, "<image>Which?", 1),
    "ocrbench": (ocrbench, "<image>what is written?", 1),
    "pathvqa": (pathvqa, "<image>what shade?", 2),
    "vqa_rad": (pathvqa, "<image>what shade?", 2),
    "slake": (slake, "<image>question 0?", 2),
    "rlaif_v": (rlaif_v, "<image>What shade?", 1),
    "imagefolder": (imagefolder, f"<image>{CAPTION}", 1),
    "webdataset": (webdataset, f"<image>{CAPTION}", 1),
    "local": (local_records, "<image>p", 1),
    "local, parquet": (local_parquet, "<image>p", 1),
    "local, csv": (local_csv, "<image>What?", 1),
    "local, imagefolder": (imagefolder, f"<image>{CAPTION}", 1),
    "local, metadata.csv": (metadata_csv, f"<image>{CAPTION}", 1),
    "local, TRL": (trl, "What shade?<image>", 1),
    "local, tar": (webdataset, f"<image>{CAPTION}", 1),
}


def written(messages: list[dict]) -> list[str]:
    """Each message as text, with `<image>` for an image."""
    return [
        "".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"])
        for message in messages
    ]


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
@pytest.mark.parametrize("fixture", FIXTURES)
def test_a_data_set_of_the_hubs_schema_becomes_records(fixture, folder, streaming, processor):
    """Image and response belong together: the shade of the picture is the number in the text."""
    from alignvlm.rows.collator import AlignVLMCollator

    make, prompt, count = FIXTURES[fixture]
    name = fixture.split(",")[0]
    arguments = {"name": name, **make(folder)}
    if name == "gqa" and streaming:
        with pytest.raises(ValueError, match="images in a config of their own, which a stream cannot look up"):
            read_source(arguments, folder, streaming)
        return
    source = read_source(arguments, folder, streaming)
    records = list(source.rows if streaming else source)
    assert len(records) == 3
    for index, row in enumerate(records):
        (image,) = row["images"]
        assert read_image(image).getpixel((0, 0)) == (index, 10, 20)
        record = Record.from_row(row)
        turns = [
            text
            for conversation in record.conversations
            for text in (*written(conversation.messages)[1::2], *conversation.responses)
        ]
        answers = (str(index), f"shade {index}", "ABC"[index], ("no", "yes")[index % 2])
        assert turns[0].lower() in map(str.lower, answers) and len(turns) == count
    assert written(Record.from_row(records[1]).conversations[0].messages)[0] == prompt
    assert source.identity["data"]
    sent = pickle.loads(pickle.dumps(source))  # to a data worker that is not forked
    again = next(islice(sent.rows, 2, None)) if streaming else sent[2]
    assert Record.from_row(again).conversations == record.conversations
    assert read_image(again["images"][0]).getpixel((0, 0)) == (2, 10, 20)
    batch = AlignVLMCollator(processor)(records)
    assert len(batch["pixel_values"]) == 3 and (batch["labels"] != -100).any(1).all()


def test_every_data_set_of_the_catalogue_is_tested():
    drawn = {name for name, kind in CATALOGUE.items() if kind.generate}
    assert {name.split(",")[0] for name in FIXTURES} == set(CATALOGUE) - {"text"} - drawn
    for kind in CATALOGUE.values():
        assert kind.licence and (kind.data is None or kind.licence != "unknown")
        assert kind.metric in (None, BY_KIND) or (METRICS / kind.metric).is_dir()


def test_a_licence_is_that_of_the_data_set_and_not_of_any_text(folder):
    texts, captions = lines(folder, "texts.jsonl", [{"text": "A."}]), folder / "captions.json"
    captions.write_text(
        json.dumps([{"image": "images/0.png", "conversations": said(("human", "What?"), ("gpt", "A."))}])
    )
    assert "licence" not in read_source({"name": "text", "data": texts}, folder).identity
    copy = read_source({"name": "llava_pretrain", "data": "captions.json"}, folder)
    assert copy.identity["licence"] == CATALOGUE["llava_pretrain"].licence


def test_the_page_about_data_has_all_names_and_schemas():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    for name, kind in CATALOGUE.items():
        assert f"`{name}`" in page and (kind.data is None or f"`{kind.data}`" in page)
    assert all(f"| `{name}` |" in page for name in FORMATS)


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
def test_turns_are_kept_whole_or_made_independent(folder, streaming, processor):
    """Whole, the second answer is trained behind the first exchange; independent, both see the image alone, which is there once."""
    from alignvlm.rows.collator import AlignVLMCollator

    arguments = {"name": "llava_instruct", **llava_instruct(folder)}
    collator = AlignVLMCollator(processor)

    def first(**options) -> tuple[list, dict]:
        source = read_source({**arguments, **options}, folder, streaming)
        row = next(iter(source.rows if streaming else source))
        return Record.from_row(row).conversations, collator([row])

    (whole,), batch = first()
    assert whole.train_on == "all" and written(whole.messages) == ["Is this<image>dark?", "shade 0", "And now?"]
    trained = processor.decode(batch["input_ids"][batch["labels"] != -100])
    assert "shade 0" in trained and trained.strip().endswith("no</s>") and batch["branch_ids"].max() == 0
    _, batch = first(train_on="last")
    assert processor.decode(batch["input_ids"][batch["labels"] != -100]).strip() == "no</s>"
    apart, batch = first(turns="independent")
    assert [written(c.messages) for c in apart] == [["Is this<image>dark?"], ["<image>And now?"]]
    assert [c.responses for c in apart] == [["shade 0"], ["no"]] and batch["pixel_values"].shape[0] == len(apart)


def test_a_name_may_be_left_out_and_a_schema_named(folder):
    rows = [{"image": "images/0.png", "conversations": said(("human", "h"), ("gpt", "g")), "text": "other"}]
    data = lines(folder, "rows.jsonl", rows)
    assert exchanges_of(read_source({"data": data}, folder)[0]) == [("h", "g")]
    assert exchanges_of(read_source({"data": data, "format": "captions"}, folder)[0]) == [(CAPTION, "other")]
    for key in ("format", "turns", "train_on"):
        with pytest.raises(ValueError, match=f"{key}='chatml'. Valid values: "):
            read_source({"data": data, key: "chatml"}, folder)


def test_what_the_options_leave_out_is_counted(folder):
    source = read_source({"name": "finevision", **finevision(folder)}, folder)
    assert (len(source), source.left_out, source.bad_rows) == (3, 1, [])
    with pytest.raises(ValueError, match="leave out all 12 rows"):
        read_source({"name": "slake", **slake(folder), "language": "fr"}, folder)
    with pytest.raises(BadRow, match="min_relevance=3 needs the column `relevance_ratings`"):
        read_source({"name": "cauldron", **cauldron(folder), "min_relevance": 3}, folder)


def test_an_image_that_is_not_in_the_images_config_is_named(folder):
    gqa(folder)
    row = {"imageId": "9", "question": "q?", "answer": "a", "id": "1"}
    parquet(folder, "gqa/train_balanced_instructions/train-00000-of-00001.parquet", [row])
    with pytest.raises(BadRow, match="`imageId` is '9', of which there is no image"):
        read_source({"name": "gqa", "data": "gqa"}, folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
@pytest.mark.parametrize(
    "row, messages, response",
    [
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "x"}]}, ["Hi"], "Hello"),
        ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, ["Be kind.", "Hi"], "Hello"),
        ({"messages": said(("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two"), role="role", content="content")}, ["1?", "one", "2?"], "two"),
        ({"prompt": "2 + 2?", "completion": "4"}, ["2 + 2?"], "4"),
        ({"question": "2 + 2?", "answer": "4", "image_id": "x"}, ["2 + 2?"], "4"),
        ({"text": "Once upon a time."}, [], "Once upon a time."),
        ({"text": "Once upon a time.", "image": "gone.png"}, [], "Once upon a time."),
    ],
)  # fmt: skip
def test_texts(tmp_path, row, messages, response, streaming):
    lines(tmp_path, "texts.jsonl", [row, row])
    source = read_source({"name": "text", "data": "texts.jsonl"}, tmp_path, streaming)
    records = list(source.rows if streaming else source)
    assert len(records) == 2
    (conversation,) = Record.from_row(records[0]).conversations
    assert records[0]["images"] == [] and conversation.responses == [response]
    assert written(conversation.messages) == messages


def test_a_text_file_is_read_by_paragraph(tmp_path, processor):
    from alignvlm.rows.collator import AlignVLMCollator

    (tmp_path / "book.txt").write_text("One line\nand another.\n\nA second paragraph.\n")
    source = read_source({"name": "text", "data": "book.txt"}, tmp_path)
    assert [responses_of(record)[0] for record in source] == ["One line\nand another.", "A second paragraph."]
    batch = AlignVLMCollator(processor)([source[1]])  # no template: every token but the first is trained
    assert processor.decode(batch["input_ids"][0]) == "A second paragraph.</s>"
    assert (batch["labels"][0, 1:] == batch["input_ids"][0, 1:]).all() and batch["labels"][0, 0] == -100


def test_labels_of_an_image_folder(folder):
    for name in ("black_cat", "dog"):
        (folder / "by_label" / name).mkdir(parents=True)
        (folder / f"by_label/{name}/0.png").write_bytes(png(7))
    source = read_source({"name": "imagefolder", "data": "by_label"}, folder)
    assert [responses_of(record)[0] for record in source] == ["black cat", "dog"]


@pytest.mark.parametrize("path", ["images/0.png", "./images/0.png", "images//0.png", "images/../images/0.png"])
def test_questions_of_one_image_are_one_record_wherever_their_rows_stand(folder, path):
    rows = [{"image": f"images/{i}.png", "question": f"q{n} ?", "answer": "a"} for n, i in enumerate((0, 1, 0))]
    rows[2]["image"] = path
    source = read_source({"name": "local", "data": lines(folder, "rows.jsonl", rows)}, folder)
    assert [[prompt for prompt, _ in exchanges_of(record)] for record in source] == [["q0 ?", "q2 ?"], ["q1 ?"]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"revision": "v1.0"}, r"'v1.0' would be of a data set on the Hub, but .*rows.jsonl is here"),
        ({"config": "plain"}, r"'plain' would be a folder .*rows.jsonl is a file. Leave the config out"),
    ],
)
def test_what_local_data_have_not_is_refused(folder, options, message):
    file = lines(folder, "rows.jsonl", [{"image": "images/0.png", "question": "q ?", "answer": "a"}])
    with pytest.raises(ValueError, match=message):
        read_source({"data": file, **options}, folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
def test_every_row_of_an_image_is_kept_whatever_its_form(folder, streaming):
    turns = [
        {"user": "What?", "assistant": "turn", "source": "x"},
        {"user": "And?", "assistant": "next", "source": "x"},
    ]
    forms = [
        {"conversations": said(("human", "<image>\nWhat is it?"), ("gpt", "first"))},
        {"conversations": said(("human", "And this?"), ("gpt", "second"))},
        {"texts": turns},
        {"question": "q?", "answer": "a"},
        {"question": "q?", "answer": "a"},  # an exact repetition is taken once
        {"annotations": [{"prompt": "p", "response": "r"}]},
        {"captions": ["c", "d"]},
    ]
    rows = [{"image": "images/0.png", **form} for form in forms] + [{"image": "images/1.png", **forms[0]}]
    source = read_source({"name": "local", "data": lines(folder, "rows.jsonl", rows)}, folder, streaming)
    records = list(source.rows if streaming else source)
    assert [responses_of(record) for record in records] == [
        ["first", "second", "next", "a", "r", "c", "d"],
        ["first"],
    ]


CONVERSATIONS = [
    ([("assistant", "Hello! Ask me."), ("user", "What?"), ("assistant", "A cat.")], ["What?", "A cat."]),
    ([("system", "Be brief."), ("user", "What?"), ("assistant", "A cat.")], ["Be brief.", "What?", "A cat."]),
    ([("user", "What?"), ("assistant", "A cat."), ("system", "Be brief."), ("user", "And?"), ("assistant", "A dog.")], ["What?", "A cat.", "Be brief.\nAnd?", "A dog."]),
    ([("user", "Look."), ("user", "What?"), ("assistant", "A cat.")], ["Look.\nWhat?", "A cat."]),
    ([("user", "What?"), ("assistant", "A cat."), ("assistant", "Grey.")], ["What?", "A cat.\nGrey."]),
    ([("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two"), ("user", "3?")], ["1?", "one", "2?", "two"]),
]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
@pytest.mark.parametrize("turns, expected", CONVERSATIONS)
def test_conversations_stay_whole_and_are_paired_by_who_speaks(folder, turns, expected, streaming):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    llava = {"image": "images/0.png", "conversations": said(*((names[speaker], words) for speaker, words in turns))}
    chat = {"messages": said(*turns, role="role", content="content")}
    shown = {**chat, "images": ["images/0.png"]}  # images nobody placed stand before the first prompt
    for name, row, image in (
        ("llava_pretrain", llava, True),
        ("local", llava, True),
        ("local", shown, True),
        ("text", chat, False),
    ):
        source = read_source({"name": name, "data": lines(folder, f"{name}.jsonl", [row])}, folder, streaming)
        (record,) = source.rows if streaming else source
        (conversation,) = Record.from_row(record).conversations
        said_by_all = [*written(conversation.messages), *conversation.responses]
        first = next(i for i, message in enumerate(conversation.messages) if message["role"] == "user")
        assert said_by_all[first].startswith("<image>") == image
        assert [text.removeprefix("<image>") for text in said_by_all] == expected


QUESTION = {"image": "images/0.png", "question": "q?", "answer": "a"}
CAPTIONS = {"image": "images/0.png", "captions": ["c", "d"]}
CHAT = {"messages": said(("user", "u"), ("assistant", "a"), role="role", content="content")}
LLAVA = {"image": "images/0.png", "conversations": said(("human", "<image>h"), ("gpt", "g"))}
# For each: the source, a good row, a bad one, and what is said of it.
BAD_ROWS = {
    "null": ("local", QUESTION, {"answer": None}, r"`answer` is None \(NoneType\), not a text"),
    "int": ("local", QUESTION, {"answer": 3}, r"`answer` is 3 \(int\), not a text"),
    "float": ("local", QUESTION, {"answer": 2.5}, r"`answer` is 2.5 \(float\), not a text"),
    "bool": ("local", QUESTION, {"answer": True}, r"`answer` is True \(bool\), not a text"),
    "list": ("local", QUESTION, {"answer": ["a", "b"]}, r"`answer` is \['a', 'b'\] \(list\), not a text"),
    "mapping": ("pathvqa", QUESTION, {"answer": {"a": "b"}}, r"`answer` is \{'a': 'b'\} \(dict\), not a text"),
    "empty": ("pathvqa", QUESTION, {"answer": "  "}, "`answer` is empty"),
    "placeholder": ("local", QUESTION, {"answer": "the <image> shows"}, "`answer` holds the image placeholder <image>"),
    "question": ("local", QUESTION, {"question": 7}, r"`question` is 7 \(int\)"),
    "empty question": ("local", QUESTION, {"question": ""}, "`question` is empty"),
    "caption": ("local", CAPTIONS, {"captions": ["c", ""]}, r"`captions\[1\]` is empty"),
    "captions": ("local", CAPTIONS, {"captions": []}, "`captions` is \\[\\]; expected a list"),
    "no image": ("flickr30k_captions", CAPTIONS, {"image": None}, "A caption without an image"),
    "odd image": ("local", QUESTION, {"image": 3}, r"An image is 3 \(int\), neither a path"),
    "message": ("text", CHAT, {"messages": said(("user", "u"), ("assistant", None), role="role", content="content")}, r"`messages\[1\].content` is None"),
    "unknown role": ("text", CHAT, {"messages": said(("tool", "u"), ("assistant", "x"), role="role", content="content")}, r"`messages\[0\].role` is 'tool'. Valid"),
    "nobody asked": ("local", LLAVA, {"conversations": said(("gpt", "g"))}, "no prompt of the user with a response"),
    "turn": ("local", LLAVA, {"conversations": said(("human", "h"), ("gpt", 4))}, r"`conversations\[1\].value` is 4 \(int\)"),
    "response": ("local", {"annotations": [{"prompt": "p", "response": "r"}]}, {"annotations": [{"prompt": "p"}]}, r"`annotations\[0\].response` is None"),
    "nothing": ("local", QUESTION, {"question": None, "answer": None}, r"matches no schema: it has \['image', 'split'\]; `captions` lacks captions or"),
    "places": ("local", LLAVA, {"conversations": said(("human", "<image> or <image>?"), ("gpt", "g"))}, r"has 2 image part\(s\) or <image>, and the row 1 image"),
    "URL": ("local", QUESTION, {"image": "https://a.b/c.jpg"}, "download them first"),
    "empty image": ("local", QUESTION, {"image": None}, "`image` is empty"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_when_it_is_read(folder, kind, streaming):
    """File and line, also behind rows of another split; its neighbours stay, those of the same image too."""
    name, good, change, message = BAD_ROWS[kind]
    rows = [{**good, "split": "val"}, good, {**good, **change}, {**good, "image": "images/1.png"}]
    rows = [{"split": "train", **row} for row in rows]
    arguments = {"name": name, "data": lines(folder, "rows.jsonl", rows)}
    with pytest.raises(BadRow, match=f"^rows.jsonl, line 3: .*{message}"):
        list(read_source(arguments, folder, streaming).rows)
    source = read_source(arguments, folder, streaming, max_bad_rows=0.01)
    records = list(source.rows if streaming else source)
    problems = [record["bad_row"] for record in records if record["bad_row"]] if streaming else source.bad_rows
    (problem,) = problems
    assert re.search(f"^rows.jsonl, line 3: .*{message}", problem)
    expected = list(read_source({**arguments, "data": lines(folder, "good.jsonl", rows[1:2] + rows[3:])}, folder))
    assert [r["conversations"] for r in records if r["conversations"]] == [r["conversations"] for r in expected]


def test_bad_rows_are_found_wherever_rows_come_from(folder):
    rows = [{"image": embedded(i), "question": "q?", "answer": None if i == 2 else "a"} for i in range(3)]
    features = {"image": Image(), "question": Value("string"), "answer": Value("string")}
    parquet(folder, "qa/train-00000-of-00002.parquet", rows[:2], **features)
    parquet(folder, "qa/train-00001-of-00002.parquet", [*rows[:1], rows[2]], **features)
    place = r"^train-00001-of-00002.parquet, row 1 \(counted from 0\): `answer` is None"
    for streaming in (False, True):
        with pytest.raises(BadRow, match=place):
            list(read_source({"name": "pathvqa", "data": "qa"}, folder, streaming).rows)
    (folder / "list.json").write_text(json.dumps([QUESTION, {**QUESTION, "answer": 1}]))
    with pytest.raises(BadRow, match=r"^list.json, entry 2: "):
        read_source({"name": "local", "data": "list.json"}, folder)
    (folder / "broken.jsonl").write_text(json.dumps(QUESTION) + '\n{"image": "images/1.png", "question": \n')
    for streaming in (False, True):
        with pytest.raises(BadRow, match=r"^broken.jsonl, line 2: not JSON .*Expecting value"):
            list(read_source({"name": "local", "data": "broken.jsonl"}, folder, streaming).rows)


def test_one_sentence_says_where_a_line_is_not_json(folder, caplog):
    (folder / "cut.jsonl").write_text(
        '{"image": "images/1.png", "caption": "a"}\n{"image": "images/1.png", "caption": "b"\n'
    )
    with pytest.raises(BadRow, match=r"^cut.jsonl, line 2: not JSON \(Expecting ',' delimiter at column 41\): '\{"):
        read_source({"data": "cut.jsonl"}, folder)
    assert not caplog.records


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
@pytest.mark.parametrize("with_splits", [False, True])
def test_a_line_that_is_not_json_is_skipped_as_other_bad_rows(folder, streaming, with_splits):
    split = {"split": "train"} if with_splits else {}
    good = [json.dumps({**QUESTION, **split, "image": f"images/{i}.png"}) for i in range(3)]
    (folder / "broken.jsonl").write_text("\n".join([*good[:2], '{"image": "images/1.png", "question": ', good[2]]))
    source = read_source({"data": "broken.jsonl"}, folder, streaming, max_bad_rows=0.01)
    records = list(source.rows if streaming else source)
    problems = [record["bad_row"] for record in records if record["bad_row"]] if streaming else source.bad_rows
    assert len([record for record in records if record["conversations"]]) == 3
    (problem,) = problems
    assert problem.startswith("broken.jsonl, line 3: not JSON (Expecting value")


def test_too_many_bad_rows_are_not_skipped(folder):
    bad = {**QUESTION, "answer": 1}
    data = lines(folder, "rows.jsonl", [QUESTION] * 20 + [bad] * 11)
    with pytest.raises(
        BadRow, match=r"11 of 31 rows of rows.jsonl cannot be used, more than max_bad_rows=0.01.*line 21"
    ):
        read_source({"name": "local", "data": data}, folder, max_bad_rows=0.01)
    assert len(read_source({"name": "local", "data": data}, folder, max_bad_rows=0.02).bad_rows) == 11
    with pytest.raises(BadRow, match="1 of 1 rows"):
        read_source({"name": "local", "data": lines(folder, "one.jsonl", [bad])}, folder, max_bad_rows=0.01)


def test_a_plain_folder_of_images_says_what_it_lacks(folder):
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"images is a folder of images that says nothing.*metadata\.jsonl"):
            read_source({"name": "imagefolder", "data": "images"}, folder, streaming)
        with pytest.raises(
            ValueError, match=r"holds no train-.*For captions of the images there: `alignvlm recaption"
        ):
            read_source({"data": "images"}, folder, streaming)


def test_what_a_source_does_not_know_is_told_with_the_nearest_name(folder):
    given = {"name": "local", "data": lines(folder, "rows.jsonl", [{"image": "images/0.png", "caption": "A."}])}
    for wrong, right in (("shar", "share"), ("tagg", "tag"), ("image-dir", "image_dir"), ("promt", "prompt")):
        with pytest.raises(
            ValueError, match=rf"does not know \['{wrong}'\]. Did you mean {right}\? Its arguments: data,"
        ):
            read_source({**given, wrong: "x"}, folder)
    with pytest.raises(ValueError, match=r"does not know \['cuont'\]. Did you mean count\? .*, share, tag\."):
        read_source({"name": "scenes", "cuont": 3})


def test_a_path_of_windows_is_told(folder):
    with pytest.raises(BadImage, match=r"Cannot read .*images.0\.png.*; write / between folders"):
        read_image({"bytes": None, "path": str(folder / "images\\0.png")})


def test_splits_limits_prompts_and_tags(folder):
    rows = [{"image": f"images/{i}.png", "captions": [f" {i} "], "split": "train" if i else "val"} for i in range(3)]
    given = {"name": "local", "data": lines(folder, "rows.jsonl", rows)}
    assert len(read_source({**given, "split": "train"}, folder)) == 2
    assert len(read_source({**given, "split": "validation"}, folder)) == 1
    assert len(read_source({**given, "split": "train", "limit": 1}, folder)) == 1
    assert len(list(read_source({**given, "split": "train", "limit": 1}, folder, streaming=True).rows)) == 1
    (conversation,) = Record.from_row(read_source({**given, "prompt": "Describe."}, folder)[0]).conversations
    assert (conversation.prompt, conversation.responses) == ("Describe.", ["1"])
    assert conversation.kind == "short_caption"
    with pytest.raises(ValueError, match="no rows of split 'test'"):
        read_source({**given, "split": "test"}, folder)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"name": "imagenet"}, ValueError, "Unknown source 'imagenet'. Valid names: llava_pretrain"),
        ({"name": "local"}, ValueError, "needs `data`"),
        ({"name": "local", "data": "gone.jsonl"}, FileNotFoundError, "gone.jsonl"),
        ({"name": "local", "data": "rows.jsonl", "promt": "x"}, ValueError, r"does not know \['promt'\].*prompt"),
        ({"name": "scenes", "number": 3}, ValueError, r"does not know \['number'\].*count"),
        (
            {"name": "scenes", "count": "8"},
            ValueError,
            "Source 'scenes': count='8'. Expected a whole number, 1 or more",
        ),
        ({"name": "scene_texts", "count": 0}, ValueError, "Source 'scene_texts': count=0. Expected .*, 1 or more"),
        ({"name": "scene_signs", "count": True}, ValueError, "Source 'scene_signs': count=True. Expected"),
        ({"name": "scenes", "count": 2, "seed": -1}, ValueError, "seed=-1. Expected a whole number, 0 or more"),
        ({"name": "scenes", "count": 2, "image_size": 0}, ValueError, "image_size=0. Expected .*, 1 or more"),
        (
            {"name": "scenes", "count": 2, "annotations": []},
            ValueError,
            r"annotations=\[\]. Expected a list of any of short_caption",
        ),
        (
            {"name": "scenes", "count": 2, "annotations": "questions"},
            ValueError,
            "annotations='questions'. Expected a list of any of short_caption",
        ),
        (
            {"name": "cauldron", "data": "rows.jsonl"},
            ValueError,
            r"needs a column images; rows.jsonl has \['image', 'text'\]. For rows of another schema",
        ),
        ({"name": "local", "data": "rows.jsonl", "image_dir": "nowhere"}, FileNotFoundError, "No such image_dir"),
        (
            {"name": "local", "data": "odd.jsonl"},
            ValueError,
            r"odd.jsonl, line 1.*matches no schema: it has \['image', 'words'\]; `captions` lacks captions or",
        ),
        ({"name": "local", "data": "picture.png"}, ValueError, "expected a file of json"),
        ({"name": "local", "data": "empty"}, ValueError, r"holds no train-\*.parquet"),
        (
            {"name": "local", "data": "named", "split": "test"},
            ValueError,
            "No file in .* is named after the split 'test'",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_spent(folder, arguments, error, message):
    lines(folder, "rows.jsonl", [{"image": "images/0.png", "text": "a"}])
    lines(folder, "odd.jsonl", [{"image": "images/0.png", "words": "a"}])
    (folder / "picture.png").write_bytes(png(0))
    (folder / "empty").mkdir()
    (folder / "named").mkdir()
    lines(folder, "named/rows.jsonl", [{"image": "images/0.png", "text": "a"}])
    with pytest.raises(error, match=message):
        read_source(arguments, folder)


def test_generated_sources_are_records():
    source = read_source({"name": "scenes", "count": 3, "annotations": ["questions"]})
    assert len(source) == 3 and read_image(source[0]["images"][0]).size == (64, 64)


@pytest.mark.slow
def test_the_shared_data_run_through_whole(shared_data, tmp_path, processor):
    """Flickr8k, DAQUAR and the text of PathVQA: every record becomes a row, every photo a picture."""
    from alignvlm.rows.collator import AlignVLMCollator

    collator = AlignVLMCollator(processor, max_length=2048)
    expected = {"flickr8k/captions.jsonl": (6000, 30000), "daquar/qa.jsonl": (None, None)}
    for data, (records, annotations) in expected.items():
        source = read_source({"name": "local", "data": data}, shared_data)
        rows = load_dataset("json", data_files=str(shared_data / data), split="train").filter(
            lambda s: s == "train", input_columns="split"
        )
        found, images = 0, set()
        for index, record in enumerate(source):
            assert index % 10 or collator.token_counts(record)[0] == 4
            found += len(responses_of(record))
            images.add(record["images"][0]["path"])
        assert images == set(rows["image"]) and len(images) == len(source)
        if records:
            assert (len(source), found) == (records, annotations)
        for path in sorted(images)[:: max(1, len(images) // 800)]:
            assert (
                min(read_image({"bytes": None, "path": path, "folder": str((shared_data / data).parent)}).size) > 100
            )
    texts = read_source({"name": "text", "data": "pathvqa/qa.jsonl"}, shared_data)
    assert len(texts) == 19755
    assert all(collator.token_counts(texts[i])[0] == 0 for i in range(0, len(texts), 10))


@pytest.mark.parametrize("split", ["test", "val[:10]", "train+test"])
def test_a_data_set_of_one_file_has_no_split_but_train(split, tmp_path):
    """Whatever split was named, an evaluation's `test` too, all of the file was read."""
    with pytest.raises(ValueError, match=r"blip_laion_cc_sbu_558k\.json, which has no splits, so there is no "):
        read_source({"name": "llava_pretrain", "split": split, "image_dir": str(tmp_path)}, tmp_path)


def test_independent_turns_are_those_that_are_trained(tmp_path):
    row = {
        "prompt": said(("user", "u"), ("assistant", "a"), ("user", "v"), role="role", content="content"),
        "completion": "b",
    }
    data = {"data": lines(tmp_path, "rows.jsonl", [row]), "turns": "independent"}
    for train_on, expected in ((None, ["b"]), ("last", ["b"]), ("all", ["a", "b"])):
        (record,) = read_source({**data, "train_on": train_on}, tmp_path)
        assert [said.responses for said in Record.from_row(record).conversations] == [[answer] for answer in expected]


def test_a_name_that_no_hub_answers_for_is_told(tmp_path):
    """As at a mistyped folder, in a process without a network."""
    code = "from alignvlm.data.files import read_rows; read_rows('user/nothing', 'train')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=170)
    told = done.stderr.splitlines()[-1]
    assert told.startswith("FileNotFoundError: No such file or folder: user/nothing, and the Hub gives no data set"), (
        told
    )


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    """As with a home folder that is read-only."""
    (tmp_path / "rows.jsonl").write_text('{"text": "A ship came in."}\n')
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home/.cache")
    with pytest.raises(OSError, match=r"cache of data sets, .*home/.cache, cannot be written to: .*Set HF_HOME"):
        read_source({"data": str(tmp_path / "rows.jsonl")})
    monkeypatch.undo()
    assert len(read_source({"data": str(tmp_path / "rows.jsonl")})) == 1

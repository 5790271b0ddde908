"""Files as people have them: what is read is what is written in them."""

import base64
import csv
import io
import json
import re
import tarfile
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageColumn
from PIL import Image

from alignvlm.data.images import BadImage, read_image
from alignvlm.data.mixture import load_mixture
from alignvlm.data.record import BadRow, Record
from alignvlm.data.sources import read_source


def records_of(folder: Path, streaming: bool = False, **arguments) -> list[Record]:
    source = read_source(arguments, folder, streaming)
    return [Record.from_row(row) for row in (source.rows if streaming else source)]


def said(record: Record) -> list[list[str | None]]:
    """What each conversation of a record says, turn by turn, and its responses; None is an image."""
    return [
        [part.get("text") for message in c.messages for part in c.parts(message)] + c.responses
        for c in record.conversations
    ]


def lines(folder: Path, name: str, rows: list[dict], encoding: str = "utf-8") -> None:
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding=encoding)


def png(shade: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes | str]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])


@both_ways
def test_a_value_of_json_is_what_is_written_wherever_it_stands(tmp_path, streaming):
    """`datasets` fits all values to those of the first 10 MB, reads dates as times, and refuses long integers."""
    shown = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}]
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "id": 1, "notes": "x" * 11_000_000},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "2020-01-01"}], "id": "x"},
        {"messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": "3"}], "id": 10**30},
        {"question": "When?", "answer": "2020-01-01", "score": float("nan"), "image": "1.png"},
    ]  # fmt: skip
    lines(tmp_path, "rows.jsonl", rows)
    found = records_of(tmp_path, streaming, data="rows.jsonl")
    assert [said(record)[0] for record in found] == [
        ["Hi", "Hello"],
        ["Hi", "2020-01-01"],
        [None, "What?", "3"],
        [None, "When?", "2020-01-01"],
    ]
    assert [len(record.images) for record in found] == [0, 0, 1, 1]


def test_a_changed_file_is_read_anew(tmp_path):
    for answer in ("one", "two"):
        lines(tmp_path, "rows.jsonl", [{"question": "?", "answer": answer}])
        (record,) = records_of(tmp_path, data="rows.jsonl")
        assert said(record) == [["?", answer]]


@both_ways
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_a_byte_order_mark_is_no_part_of_a_column_or_text(tmp_path, name, streaming):
    """As Excel and Windows' editor write it. A column `\\ufeffimage` was read as a row without an image."""
    row = {"image": "0.png", "question": "Wo?", "answer": "Über"}
    if name.endswith(".jsonl"):
        lines(tmp_path, name, [row], "utf-8-sig")
    else:
        written = {".json": json.dumps([row]), ".csv": "image,question,answer\r\n0.png,Wo?,Über\r\n", ".txt": "Über\n"}
        (tmp_path / name).write_text(written[Path(name).suffix], encoding="utf-8-sig")
    (record,) = records_of(tmp_path, streaming, data=name)
    assert said(record) == ([["Über"]] if name == "rows.txt" else [[None, "Wo?", "Über"]])


@both_ways
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_another_encoding_is_named_with_the_file(tmp_path, name, streaming):
    text = {".jsonl": '{"text": "Öl"}', ".json": '[{"text": "Öl"}]', ".csv": "text\nÖl\n", ".txt": "Öl"}[
        Path(name).suffix
    ]
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{name} is not UTF-8 text: .*Save it as UTF-8"):
        records_of(tmp_path, streaming, data=name)


@both_ways
@pytest.mark.parametrize("written", [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "image,text\n"), ("a.csv", ""), ("a.txt", "\n"), ("a.tar", "\0" * 10240)])  # fmt: skip
def test_a_file_without_rows_is_called_that(tmp_path, written, streaming):
    (tmp_path / written[0]).write_text(written[1])
    with pytest.raises(ValueError, match=f"^{written[0]} has no rows of split 'train'"):
        records_of(tmp_path, streaming, data=written[0])


@both_ways
@pytest.mark.parametrize(
    "name, separator", [("rows.csv", ";"), ("rows.csv", "\t"), ("rows.tsv", "\t"), ("rows.csv", ",")]
)
def test_columns_may_be_separated_as_a_spreadsheet_does(tmp_path, name, separator, streaming):
    """Excel writes semicolons where a comma is the decimal sign, a byte order mark, and rows of separators alone at the end."""
    rows = [
        ["question", "answer"],
        ["How many, roughly?", "3"],
        ['"A; b"?', "b\tc"],
        ["", ""],
        ["Last?", "d"],
        ["", ""],
    ]
    with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream, delimiter=separator).writerows(rows)
    found = records_of(tmp_path, streaming, data=name)
    assert [record.conversations[0].responses for record in found] == [["3"], ["b\tc"], ["d"]]
    assert found[0].conversations[0].prompt == "How many, roughly?"
    found = records_of(tmp_path, streaming, data=".", split="train")
    assert len(found) == 3


@both_ways
def test_a_row_of_csv_with_too_many_values_is_named_or_skipped(tmp_path, streaming):
    (tmp_path / "rows.csv").write_text("question,answer\nA?,b\nHow many, roughly?,3\n")
    with pytest.raises(ValueError, match=r"^rows.csv, row 2: more values than columns: \['3'\] is left over"):
        records_of(tmp_path, streaming, data="rows.csv")
    source = read_source({"data": "rows.csv"}, tmp_path, streaming, max_bad_rows=0.01)
    assert len([row for row in (source.rows if streaming else source) if row["conversations"]]) == 1


@both_ways
@pytest.mark.parametrize("after", ["E?,e", 'E?,"e"', '"D\nd?",d'])
@pytest.mark.parametrize("bad", ['"Welcome sign', '"Welcome" says the sign'])
def test_a_row_of_csv_whose_quotes_do_not_close_takes_no_other_row_with_it(tmp_path, bad, after, streaming):
    (tmp_path / "rows.csv").write_text(f'question,answer\n"A\n?",a\n\nB?,{bad}\nC?,c\n{after}\n')
    with pytest.raises(BadRow, match=f"^rows.csv, row 2: line 5 is not CSV .*: 'B.,{bad}'. Close the quotation mark"):
        records_of(tmp_path, streaming, data="rows.csv")
    source = read_source({"data": "rows.csv"}, tmp_path, streaming, max_bad_rows=0.01)
    rows = list(source.rows) if streaming else list(source)
    assert [row["conversations"][0]["responses"] for row in rows if row["conversations"]] == [
        ["a"],
        ["c"],
        ["d" if after.startswith('"D') else "e"],
    ]
    bad_rows = [row["bad_row"] for row in rows if row["bad_row"]] if streaming else source.bad_rows
    assert len(bad_rows) == 1 and bad_rows[0].startswith("rows.csv, row 2: line 5 is not CSV")


def test_a_header_of_csv_whose_quotes_do_not_close_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text('question,"answer\nA?,a\n')
    for max_bad_rows in (None, 0.01):
        with pytest.raises(BadRow, match=r"rows\.csv: line 1 is not CSV"):
            read_source({"data": "rows.csv"}, tmp_path, max_bad_rows=max_bad_rows)


@both_ways
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("bad", ["null", "3", '"text"', "[1]"])
def test_a_row_that_is_no_mapping_is_named_or_skipped(tmp_path, name, bad, streaming):
    written = ['{"text": "A."}', bad, '{"text": "B."}']
    (tmp_path / name).write_text("\n".join(written) if name == "rows.jsonl" else f"[{','.join(written)}]")
    place = rf"^{name}, (line|entry) 2: .* is no row; expected a mapping"
    with pytest.raises(BadRow, match=place):
        records_of(tmp_path, streaming, data=name)
    source = read_source({"data": name}, tmp_path, streaming, max_bad_rows=0.01)
    rows = list(source.rows) if streaming else list(source)
    assert [row["conversations"][0]["responses"] for row in rows if row["conversations"]] == [["A."], ["B."]]
    (problem,) = [row["bad_row"] for row in rows if row["bad_row"]] if streaming else source.bad_rows
    assert re.match(place, problem)


@both_ways
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_of_columns_is_no_record(tmp_path, indent, streaming):
    """As `to_json` of a table writes it by columns: one record of all images was trained."""
    (tmp_path / "rows.json").write_text(
        json.dumps({"image": ["0.png", "1.png"], "caption": ["A.", "B."]}, indent=indent)
    )
    with pytest.raises(ValueError, match=r"rows\.json .*`image`, `caption`.* lists of 2 values.*a list of rows"):
        records_of(tmp_path, streaming, data="rows.json")
    row = {"images": ["0.png", "1.png"], "captions": ["A.", "B."]}
    (tmp_path / "rows.json").write_text(f"{json.dumps(row)}\n" * 2)  # rows of lists, one on each line
    assert len(records_of(tmp_path, streaming, data="rows.json")[0].images) == 2
    chat = {"images": ["0.png", "1.png"], "messages": [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "A."}]}  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(chat, indent=indent))
    assert len(records_of(tmp_path, streaming, data="rows.json")[0].images) == 2


@both_ways
def test_texts_of_csv_keep_line_breaks_quotes_and_length(tmp_path, streaming):
    """Both ways read what `csv` reads; a text may be longer than its 128 KiB."""
    long = "word " * 40_000
    (tmp_path / "rows.csv").write_text(f'question,answer\r\n"A,\n""b""?",None\r\nC?,"{long}"\r\nD?,3\r\n', newline="")
    found = records_of(tmp_path, streaming, data="rows.csv")
    assert [said(record) for record in found] == [[['A,\n"b"?', "None"]], [["C?", long.strip()]], [["D?", "3"]]]


@both_ways
def test_no_image_in_a_list_of_images_is_a_bad_row(tmp_path, streaming):
    there = {"bytes": png(0), "path": None}
    rows = [
        {"images": [there, there], "text": "two"},
        {"images": [there, None], "text": "one"},
        {"images": None, "text": "?"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(BadRow, match=r"^rows.parquet, row 1 .*: An image is None"):
        records_of(tmp_path, streaming, data="rows.parquet")
    source = read_source({"data": "rows.parquet"}, tmp_path, streaming, max_bad_rows=0.01)
    assert [len(row["images"]) for row in (source.rows if streaming else source) if row["conversations"]] == [2, 0]


@both_ways
def test_all_images_of_a_webdataset_are_seen(tmp_path, streaming):
    """`datasets` tells columns by the first five samples: of all others it dropped images of another type, and captions became plain text."""
    kinds = ["png"] * 6 + ["jpeg", "PNG", "gif", "bmp", "tiff", "webp"]
    members = {}
    for index, kind in enumerate(kinds):
        members[f"{index:02}.{kind}"] = png(20 * index, "PNG" if kind == "PNG" else kind)
        members |= {f"{index:02}.txt": f"Number {index}."} if index % 2 else {f"{index:02}.json": json.dumps({"caption": f"Number {index}.", "extra": {f"k{index}": index}})}  # fmt: skip
    tar(tmp_path / "shard.tar", members)
    found = records_of(tmp_path, streaming, data="shard.tar")
    assert [said(record)[0][-1] for record in found] == [f"Number {index}." for index in range(12)]
    for index, record in enumerate(found):
        (image,) = record.images
        assert abs(read_image(image).getpixel((0, 0))[0] - 20 * index) < 3


@both_ways
def test_a_samples_endings_may_be_in_capitals(tmp_path, streaming):
    members = {
        "0.PNG": png(0),
        "0.TXT": "A.",
        "1.Png": png(20),
        "1.JSON": '{"caption": "B."}',
        "2.jpg": png(40, "JPEG"),
    }
    tar(tmp_path / "shard.tar", {**members, "2.JPG": png(80, "JPEG"), "2.txt": "C."})
    found = records_of(tmp_path, streaming, data="shard.tar")
    assert [(said(record)[0][-1], len(record.images)) for record in found] == [("A.", 1), ("B.", 1), ("C.", 2)]


@both_ways
def test_images_of_a_sample_are_in_the_order_of_their_numbers(tmp_path, streaming):
    tar(tmp_path / "shard.tar", {"a.txt": "Many."} | {f"a.{index}.png": png(20 * index) for index in range(12)})
    (record,) = records_of(tmp_path, streaming, data="shard.tar")
    assert [read_image(image).getpixel((0, 0))[0] for image in record.images] == [20 * index for index in range(12)]


@both_ways
def test_members_of_a_sample_may_stand_apart_and_others_are_left_out(tmp_path, streaming):
    """As `tar cf shard.tar *.png *.txt` writes them, on macOS with resource forks."""
    images, texts = {f"photos/{i}.png": png(i) for i in range(3)}, {f"photos/{i}.txt": f"T{i}." for i in range(3)}
    tar(tmp_path / "shard.tar", {**images, "._0.png": b"fork", "README": "?", "LICENSE.md": "?", **texts})
    found = records_of(tmp_path, streaming, data="shard.tar")
    assert [said(record)[0][-1] for record in found] == ["T0.", "T1.", "T2."]


@both_ways
@pytest.mark.parametrize(
    "members, problem",
    [
        ({"a.json": "{x"}, r"sample a: `json` is not JSON \(Expecting property name"),
        ({"a.json": "[1]"}, r"sample a: `json` is \[1\]; expected a mapping"),
        ({"a.txt": b"L\xf6we"}, "sample a: `txt` is not UTF-8 text"),
    ],
)
def test_a_bad_sample_is_named_or_skipped(tmp_path, members, problem, streaming):
    tar(tmp_path / "shard.tar", {"a.png": png(0), **members, "b.png": png(1), "b.txt": "Fine."})
    with pytest.raises(BadRow, match=rf"^shard.tar, {problem}"):
        records_of(tmp_path, streaming, data="shard.tar")
    source = read_source({"data": "shard.tar"}, tmp_path, streaming, max_bad_rows=0.01)
    good = [row for row in (source.rows if streaming else source) if row["conversations"]]
    assert [row["conversations"][0]["responses"] for row in good] == [["Fine."]]


@both_ways
def test_a_damaged_tar_file_is_named(tmp_path, streaming):
    tar(tmp_path / "shard.tar", {f"{i}.png": png(i) for i in range(40)})
    whole = (tmp_path / "shard.tar").read_bytes()
    for content in (b"", b"text" * 1000, whole[:3000]):
        (tmp_path / "shard.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"shard\.tar is no complete tar file"):
            records_of(tmp_path, streaming, data="shard.tar")


def trl_rows(*answers: str) -> Dataset:
    """Rows as TRL's examples make them, an image in each part; Arrow fills the keys that a part does not have with None."""
    part = {"type": Value("string"), "text": Value("string"), "image": ImageColumn()}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    rows = [
        [
            {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (4, 4), (20 * i, 0, 0))}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for i, answer in enumerate(answers)
    ]  # fmt: skip
    return Dataset.from_list([{"messages": messages} for messages in rows], features=features)


@both_ways
def test_what_save_to_disk_wrote_is_read(tmp_path, streaming):
    trl_rows("A.", "B.").save_to_disk(tmp_path / "alone")
    DatasetDict(train=trl_rows("C."), validation=trl_rows("D.")).save_to_disk(tmp_path / "splits")
    for arguments, expected in (
        ({"data": "alone"}, ["A.", "B."]),
        ({"data": "splits"}, ["C."]),
        ({"data": "splits", "split": "val"}, ["D."]),
        ({"data": "splits", "split": "train+validation"}, ["C.", "D."]),
    ):
        found = records_of(tmp_path, streaming, **arguments)
        assert [said(record) for record in found] == [[[None, "What?", answer]] for answer in expected]
        assert [len(record.images) for record in found] == [1] * len(expected)
    identity = read_source({"data": "splits"}, tmp_path).identity
    assert [file["name"] for file in identity["files"]] == ["data-00000-of-00001.arrow"]
    with pytest.raises(ValueError, match="splits has no split 'test'; its splits: train, validation"):
        records_of(tmp_path, streaming, data="splits", split="test")


@both_ways
@pytest.mark.parametrize("names", [("my_train.jsonl", "my_test.jsonl"), ("train/0.parquet", "test/0.parquet"), ("train_0.parquet", "test_0.parquet"), ("rows.jsonl", "test.jsonl")])  # fmt: skip
def test_a_folders_test_rows_are_not_trained(tmp_path, names, streaming):
    for name, text in zip(names, ("For training.", "For testing.")):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist([{"text": text}]), tmp_path / "data" / name)
        else:
            lines(tmp_path / "data", name, [{"text": text}])
    for split, text in (("train", "For training."), ("test", "For testing.")):
        (record,) = records_of(tmp_path, streaming, data="data", split=split)
        assert said(record) == [[text]]


def test_a_folder_of_other_splits_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("test.jsonl", "my-dev.jsonl"):
        lines(tmp_path / "data", name, [{"text": "A."}])
    with pytest.raises(
        ValueError, match=r"named after other splits than 'train': my-dev\.jsonl, test\.jsonl\. Name the split"
    ):
        records_of(tmp_path, data="data")


@both_ways
def test_images_are_found_in_every_form_that_names_them(tmp_path, streaming):
    """A data URL as in messages for OpenAI's API, a mapping of a path, and paths with every sign."""
    odd = "a b/ünï [1] #2 50%.png"
    (tmp_path / "a b").mkdir()
    (tmp_path / odd).write_bytes(png(40))
    url = "data:image/png;base64," + base64.b64encode(png(40)).decode()
    asked = {"type": "text", "text": "What?"}
    forms = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": odd}},
        {"type": "image", "image": url},
        {"type": "image", "image": {"path": odd, "bytes": None}},
        {"type": "image", "path": odd},
    ]
    rows = [
        {"messages": [{"role": "user", "content": [form, asked]}, {"role": "assistant", "content": f"{i}."}]}
        for i, form in enumerate(forms)
    ]
    lines(tmp_path, "rows.jsonl", [*rows, {"image": url, "text": "5."}, {"images": [{"path": odd}], "text": "6."}])
    found = records_of(tmp_path, streaming, data="rows.jsonl")
    assert [said(record)[0][-1] for record in found] == [f"{i}." for i in range(7)]
    assert [read_image(record.images[0]).getpixel((0, 0)) for record in found] == [(40, 0, 0)] * 7


@pytest.mark.parametrize(
    "image, problem",
    [
        ("data:image/png;base64,%%%", "An image is a data URL that is not base64"),
        ("data:image/png,abc", "An image is a data URL that is not base64: it begins with 'data:image/png'"),
        (
            "iVBORw0KGgo" * 500,
            r"An image is a text of 5,500 characters, 'iVBORw.*too long for a path. Write base64 as data:",
        ),
    ],
)
def test_an_image_that_is_no_path_is_named_in_one_line(tmp_path, image, problem):
    lines(tmp_path, "rows.jsonl", [{"image": image, "text": "A."}])
    with pytest.raises(BadRow, match=f"^rows.jsonl, line 1: {problem}") as error:
        records_of(tmp_path, data="rows.jsonl")
    assert len(str(error.value)) < 400


@both_ways
def test_a_path_out_of_the_folder_is_a_bad_image_when_it_is_read(tmp_path, streaming):
    """Also of a stream: `on_bad_image: skip` leaves it out."""
    (tmp_path / "data").mkdir()
    (tmp_path / "out.png").write_bytes(png(0))
    for path in ("../out.png", str(tmp_path / "out.png")):
        lines(tmp_path / "data", "rows.jsonl", [{"image": path, "text": "A."}])
        (record,) = records_of(tmp_path / "data", streaming, data="rows.jsonl")
        with pytest.raises(BadImage, match=r"out\.png.* leads out of the folder"):
            read_image(record.images[0])


@both_ways
def test_a_folders_name_is_no_pattern(tmp_path, streaming):
    folder = tmp_path / "photos [2024] {a,b}"
    for name, shade in (("by_label/cat", 20), ("by_label/dog", 40), ("described/sub", 60)):
        (folder / name).mkdir(parents=True)
        (folder / name / "0 [a].png").write_bytes(png(shade))
    lines(folder / "described", "metadata.jsonl", [{"file_name": "sub/0 [a].png", "text": "A cat."}])
    pq.write_table(pa.Table.from_pylist([{"image": png(80), "text": "A cow."}]), folder / "rows [1].parquet")
    for arguments, expected in (
        ({"name": "imagefolder", "data": "by_label"}, [("cat", 20), ("dog", 40)]),
        ({"name": "imagefolder", "data": "described"}, [("A cat.", 60)]),
        ({"data": "described"}, [("A cat.", 60)]),
        ({"data": "rows [1].parquet"}, [("A cow.", 80)]),
    ):
        found = records_of(folder, streaming, **arguments)
        assert [(said(r)[0][-1], read_image(r.images[0]).getpixel((0, 0))[0]) for r in found] == expected


@both_ways
@pytest.mark.parametrize("limit", [0, -1, "2", 1.5, True])
def test_a_limit_is_a_number_of_records(tmp_path, limit, streaming):
    lines(tmp_path, "rows.jsonl", [{"text": f"{i}."} for i in range(3)])
    with pytest.raises(ValueError, match=rf"limit={limit!r}\. Expected a number of records, 1 or more"):
        records_of(tmp_path, streaming, data="rows.jsonl", limit=limit)


def test_a_stream_mixes_paths_of_images_bytes_and_texts(tmp_path):
    """As of LLaVA's json, a webdataset and plain text: `datasets` takes the features of each from its first record."""
    (tmp_path / "0.png").write_bytes(png(20))
    lines(tmp_path, "paths.jsonl", [{"image": "0.png", "text": "Path."}])
    tar(tmp_path / "bytes.tar", {"0.png": png(40), "0.txt": "Bytes."})
    lines(tmp_path, "texts.jsonl", [{"text": "Text."}])
    sources = [
        {"data": name, "share": share}
        for name, share in (("paths.jsonl", 0.4), ("bytes.tar", 0.4), ("texts.jsonl", 0.2))
    ]
    mixture = load_mixture(sources, lambda record: (4 * len(record["images"]), 4), tmp_path, streaming=True)
    seen = {}
    for record in islice(mixture.dataset, 60):
        shades = [read_image(image).getpixel((0, 0))[0] for image in record["images"]]
        seen[record["source"]] = (Record.from_row(record).conversations[0].responses, shades)
    assert seen == {"paths.jsonl": (["Path."], [20]), "bytes.tar": (["Bytes."], [40]), "texts.jsonl": (["Text."], [])}


def test_a_json_file_may_be_one_mapping_over_several_lines(tmp_path):
    row = {"question": "How many?", "answer": "two"}
    (tmp_path / "one.json").write_text(json.dumps(row, indent=1))
    assert [said(record) for record in records_of(tmp_path, data="one.json")] == [
        said(record) for record in records_of(tmp_path, data="one.json", streaming=True)
    ]
    (tmp_path / "lines.json").write_text("\n".join([json.dumps(row)] * 2))
    assert len(list(records_of(tmp_path, data="lines.json"))) == 2
    (tmp_path / "bad.json").write_text(
        '{"question": "How\n' + json.dumps(row)
    )  # a bad row of several is no mapping over lines
    mixture = load_mixture([{"data": "bad.json"}], lambda record: (0, 1), tmp_path, max_bad_rows=0.5)
    assert len(mixture.dataset) == 1 and "bad.json, line 1: not JSON" in mixture.bad_rows[0]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_mapping_that_holds_the_rows_is_told_from_a_row(tmp_path, indent):
    """As SQuAD's and TextVQA's files are."""
    questions = [{"question_id": 1, "question": "How many?"}, {"question_id": 2, "question": "Where?"}]
    (tmp_path / "v2.json").write_text(json.dumps({"info": {"version": "2"}, "data": questions}, indent=indent))
    with pytest.raises(
        BadRow,
        match=r"v2\.json, .* 1: .*it has .'data', 'info'.*`data` holds 2 mappings: .*save this list alone",
    ):
        list(records_of(tmp_path, data="v2.json"))

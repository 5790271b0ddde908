"""Which files, folders and rows a source reads: all of the split that is asked for, and nothing else in its place."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from alignvlm.data.bare_images import list_images
from alignvlm.data.catalogue import CATALOGUE
from alignvlm.data.images import BadImage, read_image
from alignvlm.data.record import BadRow
from alignvlm.data.sources import read_source
from tests.data.test_files import both_ways, lines, png, records_of, tar


def texts_of(folder: Path, streaming: bool = False, **arguments) -> list[str]:
    return [
        text for record in records_of(folder, streaming, **arguments) for text in record.conversations[0].responses
    ]


def photo(file: Path, shade: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(shade))


def described(folder: Path, text: str) -> None:
    photo(folder / "0.png", 0)
    lines(folder, "metadata.jsonl", [{"file_name": "0.png", "text": text}])


@both_ways
@pytest.mark.parametrize("asked", ["validation", "train+validation", "dev"])
def test_a_folder_of_images_without_the_split_gives_no_other(tmp_path, asked, streaming):
    for split in ("train", "test"):
        described(tmp_path / "photos" / split, split)
    described(tmp_path / "one" / "train", "train")
    for data, there in (("photos", "test, train"), ("one", "train")):
        with pytest.raises(
            ValueError, match=f"{data} has no folder of the split '{asked.split('+')[-1]}'; it has {there}"
        ):
            texts_of(tmp_path, streaming, name="imagefolder", data=data, split=asked)


@both_ways
def test_all_named_splits_of_a_folder_of_images_are_read(tmp_path, streaming):
    for split in ("train", "val", "test"):
        described(tmp_path / "photos" / split, f"{split}.")
        photo(tmp_path / "labels" / split / f"of {split}" / "0.png", 0)
        photo(tmp_path / "labels" / split / "of all" / "1.png", 0)
    given = {"name": "imagefolder", "split": "train+validation"}
    assert sorted(texts_of(tmp_path, streaming, data="photos", **given)) == ["train.", "val."]
    found = sorted(texts_of(tmp_path, streaming, data="labels", **given))
    assert found == ["of all", "of all", "of train", "of val"]


def test_the_identity_of_a_folder_of_images_changes_with_its_texts_and_images(tmp_path):
    described(tmp_path, "A cat.")
    seen = [read_source({"name": "imagefolder", "data": "."}, tmp_path, hash_all=hashed).identity for hashed in (0, 1)]
    described(tmp_path, "A dog.")
    assert texts_of(tmp_path, name="imagefolder", data=".") == ["A dog."]
    seen.append(read_source({"name": "imagefolder", "data": "."}, tmp_path).identity)
    photo(tmp_path / "0.png", 200)
    seen.append(read_source({"name": "imagefolder", "data": "."}, tmp_path, hash_all=True).identity)
    (tmp_path / "0.png").write_bytes(png(0, "BMP"))
    seen.append(read_source({"name": "imagefolder", "data": "."}, tmp_path).identity)
    assert len({json.dumps(identity) for identity in seen}) == 5
    assert len(seen[0]["files"][0]["sha256"]) == 64 and seen[0]["files"][0]["name"] == "metadata.jsonl"


@both_ways
@pytest.mark.parametrize("data", ["rows.jsonl", "files", "saved", "splits", "photos"])
def test_a_slice_of_local_data_is_refused(tmp_path, data, streaming):
    rows = [{"text": "A."}, {"text": "B."}]
    lines(tmp_path, "rows.jsonl", rows)
    (tmp_path / "files").mkdir()
    lines(tmp_path / "files", "train.jsonl", rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "splits")
    described(tmp_path / "photos", "A.")
    name = {"name": "imagefolder"} if data == "photos" else {}
    with pytest.raises(
        ValueError,
        match=rf"split 'train\[:1\]' of .*{data}: only .* the Hub can be sliced. Write 'train', .* by `limit`",
    ):
        texts_of(tmp_path, streaming, data=data, split="train[:1]", **name)


@both_ways
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_image_paths_start_beside_their_own_file(tmp_path, kind, streaming):
    for shade, name in ((0, "0.png"), (40, "a/0.png"), (80, "b/c/0.png")):
        photo(tmp_path / name, shade)
    for name in ("a", "b/c"):
        rows = [{"image": "0.png", "text": f"{name}."}]
        if kind == "jsonl":
            lines(tmp_path / name, "train.jsonl", rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "train-0.parquet")

    def shades(**arguments) -> list[tuple]:
        found = records_of(tmp_path, streaming, **arguments)
        return [
            (record.conversations[0].responses, read_image(record.images[0]).getpixel((0, 0))[0]) for record in found
        ]

    assert shades(data=".") == [(["a."], 40), (["b/c."], 80)]
    assert shades(data=".", config="a") == [(["a."], 40)]
    assert shades(data="b") == [(["b/c."], 80)]
    of_both = [(["a."], 0), (["b/c."], 0)] if streaming else [(["a.", "b/c."], 0)]  # a stream merges rows of one file
    assert shades(data=".", image_dir=".") == of_both


@both_ways
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_a_bad_row_of_files_in_several_folders_is_named_with_its_folder(tmp_path, kind, streaming):
    for name in "ab":
        (tmp_path / name).mkdir()
        rows = [{"question": "What?", "answer": "A." if name == "a" else ""}]
        if kind == "jsonl":
            lines(tmp_path / name, "train.jsonl", rows)
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "train.parquet")
        else:
            tar(tmp_path / name / "train.tar", {"0.png": png(0), "0.json": json.dumps(rows[0])})
    with pytest.raises(BadRow, match=rf"^b/train\.{kind}, (line 1|row 0|sample 0)"):
        records_of(tmp_path, streaming, data=".")


@both_ways
def test_numbered_files_of_a_split_are_read_with_the_first(tmp_path, streaming):
    for name in ("train.jsonl", "train_2.jsonl", "train-00003.jsonl", "trainer.jsonl", "test.jsonl"):
        lines(tmp_path, name, [{"text": f"{name}."}])
    assert sorted(texts_of(tmp_path, streaming, data=".")) == ["train-00003.jsonl.", "train.jsonl.", "train_2.jsonl."]


def test_files_of_several_types_for_one_split_are_refused(tmp_path):
    lines(tmp_path, "train.jsonl", [{"text": "A."}])
    (tmp_path / "train.json").write_text('[{"text": "B."}]')
    with pytest.raises(ValueError, match=r"several types for split 'train': train\.json, train\.jsonl\. Name one"):
        texts_of(tmp_path, data=".")


def rows_in(folder: Path, name: str) -> None:
    """Writes a file whose one row says the file's name."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    row = {"text": name}
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), file)
    elif file.suffix == ".tar":
        tar(file, {"0.png": png(0), "0.txt": name})
    else:
        written = {".csv": f"text\n{name}\n", ".jsonl": json.dumps(row) + "\n", ".json": json.dumps([row])}
        file.write_text(written.get(file.suffix.lower(), name))


@both_ways
@pytest.mark.parametrize(
    "read, beside",
    [
        *(([f"rows.{kind}", f"sub/rows.{kind}"], []) for kind in ("jsonl", "csv", "json", "txt", "parquet", "tar")),
        (["train/rows.jsonl", "train/sub/more.jsonl"], ["rows.csv", "test/rows.jsonl", "val.parquet"]),
        (["rows.jsonl"], [".cache/a.parquet", "._rows.jsonl", "sub/.old/rows.jsonl", ".hidden.csv", "test.csv"]),
        (["a.parquet"], ["README.md", "LICENSE.txt", "notes.txt", "sub/meta.json", "dataset_infos.json"]),
        (["a.tar"], ["README.md", "LICENSE.txt", "meta.json", "0.json"]),
        (["rows.jsonl"], ["README.md", "requirements.txt", "dataset_infos.json", "sub/annotations.json"]),
        (["sub/rows.json"], ["LICENSE.txt", "saved/dataset_dict.json", "saved/train/state.json"]),
        (["ROWS.JSONL", "sub/rows.jsonl"], []),
        (["rows.CSV"], ["notes.TXT"]),
        (["book.txt"], ["LICENSE.txt", "README.txt", "README.md"]),
    ],
)
def test_a_folders_rows_of_one_type_are_read_wherever_they_stand(tmp_path, read, beside, streaming):
    for name in (*read, *beside):
        rows_in(tmp_path, name)
    assert sorted(texts_of(tmp_path, streaming, data=".")) == sorted(read)


@pytest.mark.parametrize(
    "names",
    [
        ("captions.jsonl", "questions.csv"),
        ("cache/old.parquet", "captions.jsonl"),
        ("0.tar", "sub/rows.csv"),
        ("train/a.jsonl", "train/b.csv"),
        ("captions.jsonl", "more.json"),
        ("a/more.json", "a/rows.csv"),
    ],
)
def test_rows_of_several_types_are_refused(tmp_path, names):
    for name in (*names, "test.parquet", "LICENSE.txt"):
        rows_in(tmp_path, name)
    with pytest.raises(ValueError, match=f"several types for split 'train': {', '.join(names)}. Name one of them as"):
        texts_of(tmp_path, data=".")


@both_ways
@pytest.mark.parametrize("name", ["train.jsonl", "rows.parquet"])
def test_rows_of_a_linked_folder_are_read_once(tmp_path, name, streaming):
    data = tmp_path / "data"
    for place in ("data", "elsewhere", "data/.store"):
        rows_in(tmp_path, f"{place}/{name}")
    photo(tmp_path / "elsewhere/0.png", 40)
    (data / "more").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(tmp_path / "elsewhere")
    (data / "stored").symlink_to(data / ".store")
    (data / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "loop").symlink_to(data)
    assert sorted(texts_of(tmp_path, streaming, data="data")) == sorted(
        [f"data/{name}", f"elsewhere/{name}", f"data/.store/{name}"]
    )


@both_ways
@pytest.mark.parametrize(
    "names, problem",
    [
        (("0.png", "0.txt", "1.png", "1.txt"), r"0\.txt, 1\.txt.* texts beside images"),
        (("a/0.JPG", "a/0.txt"), r"a/0\.txt.* texts beside images"),
        (("Images/0.jpg", "captions.txt"), r"captions\.txt.* texts beside images"),
        (("0.png", "0.json", "1.png", "1.json"), r"0\.json, 1\.json.* texts beside images"),
        (("0.avif", "0.avif.json", "rows.json"), r"0\.avif\.json.* texts beside images"),
        (("train/0.png", "train/0.json", "test/0.json"), r"train/0\.json.* texts beside images"),
    ],
)
def test_texts_beside_images_are_not_trained_without_them(tmp_path, names, problem, streaming):
    for name in names:
        rows_in(tmp_path, name)
    with pytest.raises(ValueError, match=problem + ".*column `image`.*`name: imagefolder`.*`name: text`"):
        texts_of(tmp_path, streaming, data=".")
    texts = {name for name in names if Path(name).suffix in (".txt", ".json") and "test" not in name}
    assert set(texts_of(tmp_path, streaming, data=".", name="text")) == texts
    rows_in(tmp_path, "rows.jsonl")
    (tmp_path / "rows.json").unlink(missing_ok=True)
    if "train/0.json" not in names:
        assert texts_of(tmp_path, streaming, data=".") == ["rows.jsonl"]


@both_ways
@pytest.mark.parametrize("first", ["image,caption", "10.jpg#0\tA dog.", "0.png|A cat."])
def test_a_table_of_images_is_not_trained_as_plain_text(tmp_path, first, streaming):
    """As Flickr8k's captions.txt, whose images are in another folder."""
    (tmp_path / "captions.txt").write_text(f"\ufeff{first}\n0.png,A dog.\n", encoding="utf-8")
    for data in ("captions.txt", "."):
        with pytest.raises(ValueError, match=r"captions\.txt, line 1: .* table of images.*Save it as \.csv"):
            texts_of(tmp_path, streaming, data=data)
    assert len(texts_of(tmp_path, streaming, data="captions.txt", name="text")) == 1


@both_ways
@pytest.mark.parametrize("name", ["llava_pretrain", "sharegpt4v", "llava_instruct"])
def test_of_a_copy_of_a_repository_the_file_of_its_name_is_read(tmp_path, name, streaming):
    file = CATALOGUE[name].file
    for number, other in enumerate((file, "conversation_58k.json", f"{file[:-5]}_meta.json", "train.json")):
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{number}."}]
        (tmp_path / other).write_text(json.dumps([{"image": "0.png", "conversations": said}]))
    given = {"name": name, "data": ".", "image_dir": "."}
    assert texts_of(tmp_path, streaming, **given) == ["0."]
    assert [each["name"] for each in read_source(given, tmp_path).identity["files"]] == [file]
    with pytest.raises(ValueError, match="the split 'test'"):
        texts_of(tmp_path, streaming, **given, split="test")
    (tmp_path / file).unlink()  # another copy: by the files' names, as any folder
    assert texts_of(tmp_path, streaming, **given) == ["3."]


@both_ways
def test_each_split_of_a_sum_must_be_there(tmp_path, streaming):
    rows = [{"text": "A."}]
    DatasetDict(train_sft=Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    lines(tmp_path / "files", "train.jsonl", rows)
    with pytest.raises(ValueError, match="saved has no split 'val'; its splits: train_sft"):
        texts_of(tmp_path, streaming, data="saved", split="train_sft+val")
    with pytest.raises(ValueError, match=r"No file in .*files is named after the split 'val'"):
        texts_of(tmp_path, streaming, data="files", split="train+val")


@both_ways
def test_a_longer_word_names_a_split_only_where_it_is_one_for_it(tmp_path, streaming):
    (tmp_path / "photos").mkdir()
    lines(tmp_path / "photos", "valuable.jsonl", [{"text": "A."}])
    with pytest.raises(ValueError, match=r"No file in .* is named after the split 'val'"):
        texts_of(tmp_path, streaming, data="photos", split="val")
    assert texts_of(tmp_path, streaming, data="photos") == ["A."]


@both_ways
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_each_split_of_a_sum_must_be_among_the_rows(tmp_path, kind, streaming):
    rows = [{"text": "A.", "split": "train"}, {"text": "B.", "split": "dev"}]
    lines(tmp_path, "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert texts_of(tmp_path, streaming, data=f"rows.{kind}", split="train+dev") == ["A.", "B."]
    with pytest.raises(
        ValueError, match=r"no rows of split 'val'\. Rows by their column `split`: 'train': 1, 'dev': 1\. Name"
    ):
        texts_of(tmp_path, streaming, data=f"rows.{kind}", split="train+val")


@both_ways
@pytest.mark.parametrize("empty, name", [(None, "rows.jsonl"), ("", "rows.csv"), (" ", "rows.csv"), ("", "rows.parquet")])  # fmt: skip
def test_a_split_is_found_in_capitals_and_rows_without_one_are_counted(tmp_path, empty, name, streaming):
    rows = [{"text": f"{split}.", "split": split} for split in ["train", "Train", empty, "val"]]
    if name == "rows.csv":
        (tmp_path / name).write_text("text,split\n" + "".join(f"{row['text']},{row['split']}\n" for row in rows))
    elif name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        lines(tmp_path, name, rows)
    assert texts_of(tmp_path, streaming, data=name) == ["train.", "Train."]
    if not streaming:
        assert read_source({"data": name}, tmp_path).left_out == 1
    with pytest.raises(ValueError, match=rf"split 'test'\. .*'train': 1, 'Train': 1, {empty!r}: 1, 'val': 1\."):
        texts_of(tmp_path, streaming, data=name, split="test")


KARPATHY = {"images": [{"filename": "0.png", "split": "train", "sentences": [{"raw": "A cat."}]}], "dataset": "x"}


@both_ways
@pytest.mark.parametrize("about", ["dataset_info.json", "dataset_infos.json"])
def test_a_description_of_data_sets_is_no_data(tmp_path, about, streaming):
    described(tmp_path, "A cat.")
    (tmp_path / about).write_text(json.dumps({"features": {}, "splits": {}}))
    assert texts_of(tmp_path, streaming, data=".") == ["A cat."]


@both_ways
@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_is_karpathys_by_its_content(tmp_path, indent, streaming):
    row = {"image": "0.png", "text": "A dog."}
    (tmp_path / "dataset_rows.json").write_text(f"{json.dumps(row)}\n" * 2)
    (tmp_path / "dataset_one.json").write_text(json.dumps(row, indent=indent))
    (tmp_path / "dataset_x.json").write_text(json.dumps(KARPATHY, indent=indent))
    given = {"streaming": streaming, "keep_duplicates": True}
    assert texts_of(tmp_path, data="dataset_rows.json", **given) == ["A dog."] * 2
    assert texts_of(tmp_path, data="dataset_one.json", **given) == ["A dog."]
    assert texts_of(tmp_path, data="dataset_x.json", **given) == ["A cat."]
    assert texts_of(tmp_path, data=".", **given) == ["A cat."]


@both_ways
@pytest.mark.parametrize("name", ["local", "webdataset"])
def test_the_images_that_img2dataset_wrote_are_read_and_not_their_table(tmp_path, name, streaming):
    for shard in ("00000", "00001"):
        tar(tmp_path / f"{shard}.tar", {f"{shard}.png": png(40), f"{shard}.txt": f"In {shard}."})
        pq.write_table(
            pa.Table.from_pylist([{"url": "https://x/y.png", "caption": "Z."}]), tmp_path / f"{shard}.parquet"
        )
        (tmp_path / f"{shard}_stats.json").write_text('{"count": 1}')
    assert texts_of(tmp_path, streaming, name=name, data=".") == ["In 00000.", "In 00001."]


@both_ways
def test_a_webdataset_reads_tars_only(tmp_path, streaming):
    pq.write_table(pa.Table.from_pylist([{"text": "A."}]), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"holds no tar files. Leave out `name: webdataset`"):
        texts_of(tmp_path, streaming, name="webdataset", data=".")
    tar(tmp_path / "0.tar", {"0.png": png(40), "0.txt": "In the tar."})
    assert texts_of(tmp_path, streaming, name="webdataset", data=".") == ["In the tar."]


@both_ways
def test_repeated_captions_of_an_image_are_dropped_unless_kept(tmp_path, streaming):
    rows = [{"image": "0.png", "captions": captions} for captions in (["x", "x"], ["x"], ["y"], ["y", "z"])]
    lines(tmp_path, "rows.jsonl", rows)
    given = {"data": "rows.jsonl", "streaming": streaming}
    assert texts_of(tmp_path, **given) == ["x", "x", "y", "z"]  # of one row, all are kept
    assert texts_of(tmp_path, **given, keep_duplicates=True) == ["x", "x", "x", "y", "y", "z"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data": ["a.jsonl", "b.jsonl"]}, r"data=\['a.jsonl', 'b.jsonl'\]. Expected a text: .* a source of its own"),
        ({"data": 2024}, "data=2024. Expected a text: .*in quotes"),
        ({"config": 3}, "config=3. Expected a text: a number stands in quotes"),
        ({"revision": 3}, "revision=3. Expected a text"),
        ({"image_dir": 5}, "image_dir=5. Expected a text: one folder"),
        ({"split": ["train", "val"]}, r"split=\['train', 'val'\]. Expected a text: `train\+val` joins"),
        ({"keep_duplicates": "no"}, "keep_duplicates='no'. Write true or false, without quotes"),
        ({"keep_duplicates": 0}, "keep_duplicates=0. Write true or false"),
        ({"name": ["local"]}, r"Unknown source \['local'\]"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_option(tmp_path, arguments, message):
    lines(tmp_path, "rows.jsonl", [{"text": "A."}])
    with pytest.raises(ValueError, match=message):
        read_source({"data": "rows.jsonl", **arguments}, tmp_path)


def test_a_broken_link_is_a_bad_image_when_it_is_read(tmp_path):
    photo(tmp_path / "0.png", 40)
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    images = list_images(str(tmp_path))
    assert len(images) == 2 and read_image(images[0]).size == (4, 4)
    with pytest.raises(BadImage, match=r"1\.png"):
        read_image(images[1])


def test_images_below_a_linked_folder_are_listed_once(tmp_path):
    photo(tmp_path / "elsewhere" / "0.png", 40)
    photo(tmp_path / "photos" / "b" / "1.png", 40)
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "photos" / "b")
    (tmp_path / "photos" / "b" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "far again").symlink_to(tmp_path / "elsewhere")
    images = list_images(str(tmp_path / "photos"))
    assert [images[index]["path"] for index in range(len(images))] == ["b/1.png", "far/0.png"]
    assert read_image(images[1]).size == (4, 4)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "JPEG"])
def test_images_of_every_type_that_pillow_reads_are_listed(tmp_path, kind):
    name = {"AVIF": "0.avif", "JPEG2000": "0.JP2", "JPEG": "0.jfif"}[kind]
    (tmp_path / name).write_bytes(png(200, kind))
    images = list_images(str(tmp_path))
    assert images[0]["path"] == name and read_image(images[0]).size == (4, 4)


def test_a_type_that_pillow_cannot_read_is_a_bad_image_when_it_is_read(tmp_path):
    for name in ("0.heic", "1.heif", "notes.md"):
        (tmp_path / name).write_bytes(b"?")
    images = list_images(str(tmp_path))
    assert len(images) == 2
    with pytest.raises(BadImage, match=r"0\.heic"):
        read_image(images[0])


def test_a_file_name_that_is_not_utf_8_is_named(tmp_path):
    photo(tmp_path / "0.png", 40)
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(png(80))
    with pytest.raises(ValueError, match=r"'caf\\udce9\.png' in .* is not UTF-8.*Rename the file"):
        list_images(str(tmp_path))
    images = list_images(str(tmp_path), on_bad_row="skip")
    assert len(images) == 1 and "caf\\udce9.png" in images.bad_rows[0]
    with pytest.raises(ValueError, match=r"'caf\\udce9\.png' in .* is not UTF-8"):
        texts_of(tmp_path, name="imagefolder", data=".")


@both_ways
def test_linked_folders_of_a_folder_of_images_are_read(tmp_path, streaming):
    photo(tmp_path / "elsewhere" / "deep" / "0.png", 40)
    photo(tmp_path / "photos" / "dog" / "1.png", 80)
    for name in ("cow", "hen"):  # of one label `datasets` makes none
        photo(tmp_path / "splits" / "train" / name / "1.png", 120)
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "photos" / "dog" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "splits" / "test").symlink_to(tmp_path / "photos")
    given = {"name": "imagefolder", "streaming": streaming}
    assert sorted(texts_of(tmp_path, data="photos", **given)) == ["cat", "dog"]
    assert sorted(texts_of(tmp_path, data="splits", **given, split="train")) == ["cow", "hen"]
    assert sorted(texts_of(tmp_path, data="splits", **given, split="test")) == ["cat", "dog"]
    assert sorted(texts_of(tmp_path, data="splits", **given, split="train+test")) == ["cat", "cow", "dog", "hen"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_path_in_a_mapping_starts_beside_its_file(tmp_path, name):
    photo(tmp_path / "z.png", 40)
    rows = [{"image": {"bytes": None, "path": "z.png"}}]
    if name.endswith("jsonl"):
        lines(tmp_path, name, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    images = list_images(str(tmp_path / name))
    assert read_image(images[0]).getpixel((0, 0)) == (40, 0, 0) and images.all_paths


def test_images_of_rows_in_several_folders_are_told_apart(tmp_path):
    for shade, name in ((40, "a"), (80, "b")):  # not called as images, or the folder would be one of images
        photo(tmp_path / name / "0.image", shade)
        lines(tmp_path / name, "train.jsonl", [{"image": "0.image"}])
    images = list_images(str(tmp_path))
    assert [read_image(images[index]).getpixel((0, 0))[0] for index in range(len(images))] == [40, 80]
    assert [images[index]["path"] for index in range(len(images))] == ["a/0.image", "b/0.image"]


def test_images_that_are_not_there_are_no_common_image(tmp_path):
    """As a table has them whose writer could not embed them: each is told, or skipped, by itself."""
    rows = [{"image": {"bytes": None, "path": None}, "caption": said} for said in ("A cat.", "A dog.")]
    lines(tmp_path, "rows.jsonl", rows)
    assert [record.conversations[0].responses for record in records_of(tmp_path, data="rows.jsonl")] == [
        ["A cat."],
        ["A dog."],
    ]
    assert len(list_images(str(tmp_path / "rows.jsonl"))) == 2


def test_images_beside_parquet_are_not_taken_for_the_data(tmp_path):
    """As the pictures of a data set's card beside its rows."""
    photo(tmp_path / "assets/logo.png", 0)
    rows = Dataset.from_list([{"image": {"bytes": png(9), "path": None}}] * 2)
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"in files, as assets/logo\.png, and in rows, as train\.parquet\. Name one"):
        list_images(str(tmp_path))
    assert len(list_images(str(tmp_path / "train.parquet"))) == 1  # one image, twice


@pytest.mark.parametrize("name", [None, "coco_captions"])
@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
def test_captions_in_cocos_own_form_are_read(tmp_path, name, streaming):
    images = [{"id": 7, "file_name": "b.jpg", "height": 1}, {"id": 3, "file_name": "a.jpg", "height": 1}]
    annotations = [{"id": n, "image_id": 3 + 4 * (n % 2), "caption": f"Caption {n}."} for n in range(4)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (tmp_path / "captions_train2014.json").write_text(json.dumps(content, indent=1))
    given = {"data": "captions_train2014.json", **({"name": name} if name else {})}
    first, second = (record.conversations[0].responses for record in records_of(tmp_path, streaming, **given))
    assert (first, second) == (["Caption 1.", "Caption 3."], ["Caption 0.", "Caption 2."])
    content["annotations"].append({"image_id": 5, "caption": "Of no image."})
    (tmp_path / "captions_train2014.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"entry 5 of `annotations`: image_id=5 is no `id` of `images`"):
        records_of(tmp_path, streaming, **given)


@both_ways
@pytest.mark.parametrize("names", [("TrainData", "TestData"), ("trainset", "testset"), ("myTrain", "myTest")])
def test_a_split_is_found_in_words_written_together(tmp_path, names, streaming):
    for name, said in zip(names, ("train", "test")):
        lines(tmp_path, f"{name}.jsonl", [{"prompt": "p", "completion": said}])
    assert texts_of(tmp_path, streaming, data=".") == ["train"]
    assert texts_of(tmp_path, streaming, data=".", split="test") == ["test"]


@both_ways
def test_compressed_files_of_the_split_are_not_left_out_in_silence(tmp_path, streaming):
    lines(tmp_path, "part-0.jsonl", [{"prompt": "p", "completion": "a"}])
    (tmp_path / "part-1.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"part-1\.jsonl\.gz in .* would be left out: unpack compressed files"):
        texts_of(tmp_path, streaming, data=".")
    (tmp_path / "part-1.jsonl.gz").rename(tmp_path / "test-1.jsonl.gz")  # of another split
    (tmp_path / "part-0.jsonl.gz").write_bytes(b"")  # unpacked
    assert texts_of(tmp_path, streaming, data=".") == ["a"]


@both_ways
def test_a_damaged_file_of_parquet_is_named(tmp_path, streaming):
    for number in range(2):
        rows = [{"prompt": "p", "completion": f"{number}"}]
        Dataset.from_list(rows).to_parquet(tmp_path / f"train-{number}.parquet")
    whole = (tmp_path / "train-1.parquet").read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train-1\.parquet cannot be read as parquet: .*Replace the file"):
        texts_of(tmp_path, streaming, data=".")


@both_ways
def test_an_image_with_a_space_in_its_name_is_not_two_images(tmp_path, streaming):
    for name in ("a b.png", "a", "b.png"):
        photo(tmp_path / name, 0)
    rows = [{"image": ["a", "b.png"], "caption": "both"}, {"image": ["a b.png"], "caption": "one"}]
    lines(tmp_path, "train.jsonl", rows)
    assert [len(record.images) for record in records_of(tmp_path, streaming, data=".")] == [2, 1]

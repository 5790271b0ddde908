"""Lists the images of a folder, a file of rows or a data set of the Hub, each once, whatever is said about them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset

from alignvlm.data.file_rows import type_of
from alignvlm.data.files import FOLDER, NOT_UTF_8, is_utf_8, listing_hash, read_rows
from alignvlm.data.formats import images_of, is_image_column
from alignvlm.data.reader import below, image_key, path_of
from alignvlm.data.record import BadRow
from alignvlm.data.sources import undecoded
from alignvlm.data.which_files import IMAGE_SUFFIXES, visible_files


@dataclass
class BareImages:
    """Images without texts, undecoded: `len(images)`, `images[i]`.

    Args:
        rows: the columns that hold images or their paths.
        positions: of each image, its row and its number in the row.
        folder: where paths start; None for a data set of the Hub.
        identity: what was read, by names and sizes where the images are files; goes into settings.
        place: returns where the row of an index stands.
        bad_rows: what is wrong with the rows that were left out, each with its place.
        all_paths: whether every image is a path below `folder`, rather than bytes in a row.
        of_rows: whether rows name or hold the images; else they are the files of a folder.
    """

    rows: Dataset
    positions: list[tuple[int, int]]
    folder: Path | None
    identity: dict
    place: Callable[[int], str]
    bad_rows: list[str]
    all_paths: bool = True
    of_rows: bool = True

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict:
        """Returns an image as `read_image` takes it."""
        row, number = self.positions[index]
        found = self.rows[row]
        value = below(found.get(FOLDER), images_of(found)[number])
        path = path_of(value)
        return (
            value if path is None or self.folder is None else {"bytes": None, "path": path, "folder": str(self.folder)}
        )

    def place_of(self, index: int) -> str:
        """Returns where an image stands."""
        return self.place(self.positions[index][0])


def list_images(
    data: str,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    image_dir: str | None = None,
    limit: int | None = None,
    on_bad_row: str = "raise",
) -> BareImages:
    """Lists the images of a folder with image files in it (all below it, hidden ones excepted), or else of rows of any form that `read_rows`
    reads. Rows of one image give it once; rows without an image give none.

    Args:
        split, config, revision: of rows, as for `read_rows`.
        image_dir: where the paths of rows start; by default beside the file that names them.
        limit: at most this number of images, from the first.
        on_bad_row: `raise`, or `skip` a row whose image is a URL or no image at all, and a file whose name is not UTF-8.

    Raises:
        FileNotFoundError: if there is no such data, or no such `image_dir`.
        ValueError: for data without images, for a folder that has images in files and in rows (parquet, tar), for an option of rows with a
            folder of images, and for a bad row or a file name that is not UTF-8 (`BadRow`).
    """
    folder = Path(data)
    there = visible_files(folder) if folder.is_dir() else []
    if files := [file for file in there if type_of(file) in IMAGE_SUFFIXES]:
        if with_rows := [file for file in there if type_of(file) in (".parquet", ".tar")]:
            raise ValueError(
                f"{data} holds images in files, as {files[0].relative_to(folder)}, and in rows, as {with_rows[0].relative_to(folder)}. Name one "
                "of the files with rows, or the folder that holds images alone."
            )
        if image_dir is not None:
            raise ValueError(f"{data} is a folder of images: leave out the image_dir, which is for paths in rows.")
        for name, value, default in (
            ("split", split, "train"),
            ("data_config", config, None),
            ("data_revision", revision, None),
        ):
            if value != default:
                raise ValueError(f"{data} is a folder of images: leave out --{name} {value}, which is for rows.")
        names, bad_rows = [], []
        for file in files:
            name = file.relative_to(folder).as_posix()
            if is_utf_8(name):
                names.append(name)
                continue
            problem = BadRow(NOT_UTF_8.format(name=ascii(name), folder=folder))
            if on_bad_row == "raise":
                raise problem
            bad_rows.append(str(problem))
        names = names[:limit]
        identity = {"data": folder.resolve().name, "listing_sha256": listing_hash(folder, names)}
        positions = [(index, 0) for index in range(len(names))]
        place = partial(_name_at, names)
        return BareImages(
            Dataset.from_dict({"image": names}), positions, folder, identity, place, bad_rows, of_rows=False
        )
    found = read_rows(data, split, config, revision, image_dir=image_dir)
    rows = undecoded(found, data)
    columns = [name for name in rows.column_names if is_image_column(name) or name == "filepath"]
    if not columns:
        raise ValueError(f"{data} has no column of images. Columns found: {sorted(found.columns)}.")
    rows = rows.select_columns([*columns, *(name for name in rows.column_names if name == FOLDER)])
    images = BareImages(rows, [], found.folder, found.identity, found.place, [])
    seen: set[str] = set()
    for index, row in enumerate(rows):
        if len(images) == limit:
            break
        try:
            values = images_of(row)
        except BadRow as error:
            if on_bad_row == "raise":
                raise error.at(found.place(index)) from error
            images.bad_rows.append(str(error.at(found.place(index))))
            continue
        for number, value in enumerate(values):
            value = below(row.get(FOLDER), value)
            key = image_key({"image": value})
            if not (key and key in seen) and len(images) != limit:
                seen.add(key)
                images.positions.append((index, number))
                images.all_paths &= path_of(value) is not None and images.folder is not None
    if not images.positions:
        raise ValueError(f"{data} holds no image in its columns {columns}.")
    return images


def _name_at(names: list[str], index: int) -> str:
    return names[index]

"""Mixes sources into one stream of records: shares measured in tokens, and the order of the records.

Images stay undecoded here; the collator reads them in the data loader's workers.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets
from torch.utils.data import Sampler
from transformers.utils import logging

from alignvlm.data.formats import IMAGE_TOKEN
from alignvlm.data.record import Record, shown
from alignvlm.data.sources import Source, read_source
from alignvlm.data.streams import UNDECODED_RECORD, read_without_end, rows_of


logger = logging.get_logger(__name__)

MEASURED_RECORDS = 1000  # of a source, for its mean number of tokens
SHUFFLE_BUFFER = 1000  # records, of a stream
RECORD_COLUMNS = ("images", "conversations", "id")
TAGGED_RECORD = Features({**UNDECODED_RECORD, "bad_row": Value("string"), "source": Value("string")})
TokenCounts = Callable[[dict], tuple[int, int]]  # of a record: its image and its text tokens


@dataclass
class Part:
    """One entry of a recipe's `sources`.

    Args:
        share: of all tokens of the stage; None: each record once per epoch.
        tag: a fixed text before the first prompt of every conversation of the source (prefix conditioning).
        image_tokens, text_tokens: means per record, as rows hold them; measured when a share needs them.
    """

    name: str
    source: Source
    share: float | None = None
    tag: str = ""
    image_tokens: float | None = None
    text_tokens: float | None = None

    @property
    def tokens(self) -> float:
        return self.image_tokens + self.text_tokens

    def measure(self, token_counts: TokenCounts, records: int = MEASURED_RECORDS) -> None:
        """Sets the mean tokens per record from records spread evenly over the source (of a stream: its first).

        Raises:
            ValueError: for a stream without any record.
        """
        counts = np.array([token_counts(record) for record in self.sample(records)], dtype=float)
        if not len(counts):
            bad = next((record["bad_row"] for record in self.source.rows), None)
            reason = f"The first bad row: {bad}" if bad else "Its options leave out all rows. Correct or remove them."
            raise ValueError(f"Source {self.name!r} has no record that can be used. {reason}")
        self.image_tokens, self.text_tokens = counts.mean(axis=0).tolist()

    def sample(self, records: int) -> Iterator[dict]:
        """Returns at most `records` records, images undecoded, with the tag."""
        if isinstance(self.source.rows, IterableDataset):
            found = islice((record for record in self.source.rows if not record.get("bad_row")), records)
        else:
            chosen = np.linspace(0, len(self.source) - 1, min(records, len(self.source))).round().astype(int)
            found = (self.source[int(index)] for index in chosen)
        return (tagged(record, self.name, self.tag) for record in found)


def tagged(record: dict, name: str, tag: str) -> dict:
    """Returns the record with its source's name, and with the tag before the first prompt of every conversation."""
    if tag and record["conversations"]:
        found = Record.from_row(record)
        record = {**record, **replace(found, conversations=[c.with_prefix(tag) for c in found.conversations]).to_row()}
    return {**{name: record[name] for name in RECORD_COLUMNS}, "source": name, "bad_row": record.get("bad_row")}


def image_sample_probability(
    image_token_share: float, image_tokens: float, caption_tokens: float, text_tokens: float
) -> float:
    """Returns the probability of drawing a record with an image at which image tokens make up a share r of all tokens.

    With v image and c text tokens per record with an image, and T tokens per record without, drawing images with probability
    p gives r = p v / (p (v + c) + (1 - p) T), so p = r T / (v - r (v + c - T)). It is feasible iff r <= v / (v + c).
    (After "Should VLMs be Pre-trained with Image Data?", arXiv 2503.07603, whose ratios are measured in tokens.)

    Args:
        image_token_share: r, from 0 to 1.
        image_tokens, caption_tokens, text_tokens: v, c and T, means.

    Raises:
        ValueError: if r cannot be reached; the message gives the largest share that can.
    """
    largest = image_tokens / (image_tokens + caption_tokens)
    if not 0 <= image_token_share <= largest:
        raise ValueError(
            f"An image_token_share of {image_token_share:g} cannot be reached: a record with an image has on average "
            f"{image_tokens:.1f} image and {caption_tokens:.1f} text tokens. The largest feasible share is {math.floor(largest * 1e4) / 1e4:g}."
        )
    v, c, t, r = image_tokens, caption_tokens, text_tokens, image_token_share
    return r * t / (v - r * (v + c - t))


def records_per_epoch(parts: list[Part], image_token_share: float | None = None) -> list[int]:
    """Returns how many records of each part an epoch draws.

    Without shares, an epoch draws every record once. The draws of a part with a share s make its tokens the share s of all tokens, so a
    part may be drawn less or more than once; parts without a share are drawn once. If all parts have a share, the shares must sum to 1,
    and the epoch ends when the first part is used up. `image_token_share` scales the records without images against all others.

    Raises:
        ValueError: for shares that are not positive, sum to more than 1, or leave nothing to the parts without one.
    """
    shares = [part.share for part in parts]
    given = [share for share in shares if share is not None]
    if any(share <= 0 for share in given):
        raise ValueError(f"Shares must be positive; got {given}. Leave out a source that should not be read.")
    draws: list[float]
    if len(given) == len(parts):
        if not math.isclose(sum(given), 1, abs_tol=1e-6):
            raise ValueError(
                f"All sources have a share, and the shares sum to {sum(given):g} instead of 1. The largest feasible share of the "
                f"last is {max(0.0, 1 - sum(given[:-1])):g}."
            )
        total = min(len(part.source) * part.tokens / part.share for part in parts)
        draws = [total * part.share / part.tokens for part in parts]
    elif given:
        if sum(given) >= 1:
            raise ValueError(
                f"Shares sum to {sum(given):g}, which leaves no tokens to the sources without one. The largest feasible share of "
                f"the last is just below {max(0.0, 1 - sum(given[:-1])):g}."
            )
        once = sum(len(part.source) * part.tokens for part in parts if part.share is None)
        total = once / (1 - sum(given))
        draws = [len(p.source) if p.share is None else total * p.share / p.tokens for p in parts]
    else:
        draws = [len(part.source) for part in parts]
    return [max(1, round(draw)) for draw in _with_image_share(parts, draws, image_token_share)]


def _with_image_share(parts: list[Part], draws: list[float], image_token_share: float | None) -> list[float]:
    """Scales the draws of the parts without images so that image tokens reach their share."""
    if image_token_share is None:
        return draws
    with_images = [part.image_tokens > 0 for part in parts]
    if all(with_images) or not any(with_images):
        raise ValueError("image_token_share needs sources with images and sources without any.")

    def mean(values: list[float], images: bool) -> float:
        weights = [draw for draw, has in zip(draws, with_images) if has is images]
        chosen = [value for value, has in zip(values, with_images) if has is images]
        return sum(w * v for w, v in zip(weights, chosen)) / sum(weights)

    image, text = [part.image_tokens for part in parts], [part.text_tokens for part in parts]
    p = image_sample_probability(image_token_share, mean(image, True), mean(text, True), mean(text, False))
    if p == 0:
        raise ValueError("An image_token_share of 0 leaves no images to train on. Leave out their sources instead.")
    images, texts = (sum(d for d, has in zip(draws, with_images) if has is kind) for kind in (True, False))
    factor = images * (1 - p) / p / texts
    return [draw if has else draw * factor for draw, has in zip(draws, with_images)]


class MixtureSampler(Sampler):
    """The order of an epoch's records: fixed by seed and epoch, the same on resume and for any number of processes or workers.

    Each part has an endless chain of random orders of its records, and every epoch takes the next ones of it. So no record comes again
    before all have come. The draws of all parts are mixed at random.

    Args:
        sizes: records of each part; indices count through the parts one after the other.
        draws: records that an epoch takes of each part.
        has_images: of each part.
        seed: of the order.
        records: of the stage, over all epochs and processes; by default those of one epoch.
        image_start_fraction: no record of a part with images comes before this fraction of the stage's records
            (after arXiv 2503.07603, where images late in training did best).

    Raises:
        ValueError: if there are too few records without images to begin with; the message gives the largest feasible fraction.
    """

    def __init__(
        self,
        sizes: list[int],
        draws: list[int],
        has_images: list[bool],
        seed: int = 0,
        records: float | None = None,
        image_start_fraction: float = 0.0,
    ):
        self.sizes, self.draws, self.has_images = sizes, draws, has_images
        self.seed, self.epoch = seed, 0
        total = sum(draws)
        texts = sum(draw for draw, images in zip(draws, has_images) if not images)
        records = total if records is None else records
        self._texts_of_stage = round(image_start_fraction * records)
        if min(self._texts_of_stage, total) > texts:
            raise ValueError(
                f"image_start_fraction={image_start_fraction:g} needs {self._texts_of_stage} records without images at the beginning, "
                f"and an epoch has {texts} among {total}. The largest feasible fraction is {math.floor(texts / records * 1e4) / 1e4:g}."
            )

    def __len__(self) -> int:
        return sum(self.draws)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def texts_first(self) -> int:
        """How many records without images the epoch begins with."""
        return min(max(self._texts_of_stage - self.epoch * len(self), 0), len(self))

    def _drawn(self, part: int) -> np.ndarray:
        """Returns the epoch's records of a part."""
        size, draw = self.sizes[part], self.draws[part]
        first, last = self.epoch * draw, (self.epoch + 1) * draw
        rounds = range(first // size, (last - 1) // size + 1)
        chain = np.concatenate([np.random.default_rng([self.seed, part, r]).permutation(size) for r in rounds])
        start = first - rounds.start * size
        return chain[start : start + draw]

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch, 1])
        parts = rng.permutation(np.repeat(np.arange(len(self.draws)), self.draws))
        if self.texts_first:
            is_text = ~np.array(self.has_images)[parts]
            first = np.flatnonzero(is_text)[: self.texts_first]
            parts = np.concatenate([parts[first], np.delete(parts, first)])
        order = np.empty(len(parts), dtype=np.int64)
        offset = 0
        for part, size in enumerate(self.sizes):
            order[parts == part] = offset + self._drawn(part)
            offset += size
        return iter(order.tolist())


@dataclass
class Mixture:
    """What a stage trains on.

    Args:
        parts: the recipe's sources.
        dataset: records by index, or, when streaming, one after the other; images undecoded.
        sampler: the order to read `dataset` in; None for a stream, which has its own.
        draws: records per epoch of each part; None for a stream.
    """

    parts: list[Part]
    dataset: Dataset | IterableDataset
    sampler: MixtureSampler | None = None
    draws: list[int] | None = None

    @property
    def bad_rows(self) -> list[str]:
        """What is wrong with the rows that were left out, each with its source and place; a stream does not know its own yet."""
        return [f"{part.name}: {problem}" for part in self.parts for problem in part.source.bad_rows]

    def record(self) -> list[dict]:
        """Returns what was read, for the run record."""
        entries = []
        for index, part in enumerate(self.parts):
            entry = {"name": part.name, **part.source.identity}
            if self.draws is not None:
                entry |= {"records": len(part.source), "records_per_epoch": self.draws[index]}
            entry |= {"rows_left_out": part.source.left_out} if part.source.left_out else {}
            for name in ("share", "image_tokens", "text_tokens"):
                value = getattr(part, name)
                entry |= {} if value is None else {name: round(value, 4)}
            entries.append(entry | ({"tag": part.tag} if part.tag else {}))
        return entries


def _resolve(parts: list[Part], pointers: dict[str, list[int]]) -> dict[str, list]:
    """Returns the records that rows of (part, record) numbers point to."""
    records = [
        tagged(parts[p].source[r], parts[p].name, parts[p].tag) for p, r in zip(pointers["part"], pointers["record"])
    ]
    columns = {name: [record[name] for record in records] for name in (*RECORD_COLUMNS, "source")}
    return {**columns, "number": [f"[{number}]" for number in pointers["record"]]}


def read_parts(
    sources: list[dict],
    token_counts: TokenCounts,
    data_dir: str | Path = ".",
    streaming: bool = False,
    earlier_stages: list[dict] | None = None,
    max_bad_rows: float | None = None,
) -> list[Part]:
    """Reads the parts of a recipe's `sources`.

    `{name: rehearsal, stage: N, ...}` stands for the sources of an earlier stage, as the model's run record lists them. Its share is divided
    among them in proportion to their tokens in that stage (of a stream: in proportion to their shares).

    Raises:
        ValueError: also for a rehearsal of a stage the model has not been through.
    """
    parts = []
    for entry in sources:
        options = dict(entry)
        share, tag = options.pop("share", None), options.pop("tag", "")
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float)):
            raise ValueError(
                f"share={shown(share)} of source {shown(entry)} is no number. Write it with a point: 0.1."
            )
        if share is not None and not 0 < share < math.inf:
            raise ValueError(
                f"share={share} of source {shown(entry)} is not positive or no finite number. Leave out a source that should not be read."
            )
        if tag is not None and not isinstance(tag, str):
            raise ValueError(f"tag={shown(tag)} of source {shown(entry)} is no text. Write it in quotes.")
        if tag and IMAGE_TOKEN in tag:
            raise ValueError(f"tag={shown(tag)} of source {shown(entry)} holds the image placeholder. Remove it.")
        if options.get("name") != "rehearsal":
            source = read_source(options, data_dir, streaming, max_bad_rows)
            parts.append(Part(options.get("name") or str(options.get("data")), source, share, tag))
            continue
        stage = options.get("stage")
        known = earlier_stages or []
        found = [index for index, each in enumerate(known) if each["stage"] == stage]
        if not found or set(options) != {"name", "stage"}:
            raise ValueError(
                f"Cannot rehearse {entry}: expected `stage`, one of {[each['stage'] for each in known]}, the stages of the "
                "model's run record, and optionally `share` and `tag`."
            )
        before, rehearsed = known[: found[-1]], known[found[-1]]["sources"]  # which may have rehearsed one before it
        again = read_parts(rehearsed, token_counts, data_dir, streaming, before, max_bad_rows)
        for part, proportion in zip(again, _proportions(again, token_counts, streaming)):
            part.tag = tag or part.tag
            part.share = None if share is None else share * proportion
        parts += again
    return parts


def _proportions(parts: list[Part], token_counts: TokenCounts, streaming: bool) -> list[float]:
    """Returns each part's share of the tokens of a stage that reads these parts."""
    if streaming:
        weights = [part.share or 1.0 for part in parts]
    else:
        for part in parts:
            part.measure(token_counts)
        weights = [draws * part.tokens for part, draws in zip(parts, records_per_epoch(parts))]
    return [weight / sum(weights) for weight in weights]


def load_mixture(
    sources: list[dict],
    token_counts: TokenCounts,
    data_dir: str | Path = ".",
    *,
    seed: int = 0,
    epochs: float = 1,
    image_token_share: float | None = None,
    image_start_fraction: float = 0.0,
    streaming: bool = False,
    records: int | None = None,
    readers: int = 1,
    earlier_stages: list[dict] | None = None,
    max_bad_rows: float | None = None,
) -> Mixture:
    """Reads a recipe's sources and fixes how they are mixed.

    Args:
        sources: each `{name, share, tag, ...}`: see `Part` and `records_per_epoch` for share and tag, `read_source` for all others.
        token_counts: returns the image and the text tokens of a record's rows (`AlignVLMCollator.token_counts`).
        data_dir: where relative paths start.
        epochs: of the stage, if `records` does not say how much of the data it reads.
        image_start_fraction, seed: see `MixtureSampler`.
        image_token_share: see `image_sample_probability`.
        streaming: read rows as they are needed. Every source then needs a share, unless there is only one.
        records: of the stage, over all processes; `image_start_fraction` is a fraction of them.
        readers: of a stream: the data workers of all processes, or the processes if they have none.
        earlier_stages: the `stages` of the model's run record, for rehearsal.
        max_bad_rows: see `read_source`.

    Raises:
        ValueError: for sources, shares or fractions that are not possible; the message says what is.
    """
    parts = read_parts(sources, token_counts, data_dir, streaming, earlier_stages, max_bad_rows)
    for part in parts:
        if bad := part.source.bad_rows:
            logger.warning(f"Source {part.name!r}: {len(bad)} bad rows are left out. The first: {bad[0]}")
    if (
        streaming
        or image_token_share is not None
        or image_start_fraction
        or any(part.share is not None for part in parts)
    ):
        for part in parts:
            part.measure(token_counts)
    if streaming:
        return Mixture(parts, _stream(parts, seed, image_token_share, image_start_fraction, records, readers))
    draws = records_per_epoch(parts, image_token_share)
    for part, draw in zip(parts, draws):
        if draw > len(part.source):
            logger.warning(
                f"Source {part.name!r} has {len(part.source)} records and is read {draw / len(part.source):.1f} times an epoch."
            )
    sizes = [len(part.source) for part in parts]
    pointers = Dataset.from_dict(
        {
            "part": np.repeat(np.arange(len(parts)), sizes),
            "record": np.concatenate([np.arange(size) for size in sizes]),
        }
    )
    has_images = [part.image_tokens is None or part.image_tokens > 0 for part in parts]
    records = epochs * sum(draws) if records is None else records
    sampler = MixtureSampler(sizes, draws, has_images, seed, records, image_start_fraction)
    return Mixture(parts, pointers.with_transform(partial(_resolve, parts)), sampler, draws)


def _stream(
    parts: list[Part],
    seed: int,
    image_token_share: float | None,
    image_start_fraction: float,
    records: int | None,
    readers: int,
) -> IterableDataset:
    """Interleaves the parts with the probabilities of their shares, without end: a part that is used up begins again. The shards of the stream
    are its readers: one if it begins with texts, since each of several would have to begin with its own."""
    if len(parts) > 1 and any(part.share is None for part in parts) and image_token_share is None:
        missing = [part.name for part in parts if part.share is None]
        raise ValueError(
            f"A stream's length is not known, so every source needs a share; {', '.join(missing)} has none."
        )
    weights = [(part.share or 1.0) / part.tokens for part in parts]
    weights = _with_image_share(parts, weights, image_token_share)
    texts = [index for index, part in enumerate(parts) if part.image_tokens == 0]
    if image_start_fraction and (not texts or records is None):
        raise ValueError("image_start_fraction needs a source without images and, for a stream, max_steps.")
    readers = 1 if image_start_fraction else readers
    streams = []
    for index, part in enumerate(parts):
        given = {"readers": list(range(readers)), "count": readers, "seed": (seed, index), "records": part.source.rows}
        given["prepare"] = partial(tagged, name=part.name, tag=part.tag)
        # Without features `datasets` would take them from the first record, and not mix paths of images with bytes.
        streams.append(IterableDataset.from_generator(read_without_end, features=TAGGED_RECORD, gen_kwargs=given))

    if image_start_fraction:
        first = round(image_start_fraction * records)
        # Shuffled each by itself: those without images go on where they ended.
        shuffled = tuple(stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) for stream in streams)
        given = {"streams": shuffled, "weights": tuple(weights), "texts": tuple(texts), "first": first, "seed": seed}
        return IterableDataset.from_generator(_texts_first, features=TAGGED_RECORD, gen_kwargs=given)
    # A single part has no end either: a resumed run skips what it read of the first epoch, so it must never leave that epoch.
    everything = streams[0]
    if len(parts) > 1:
        shares = (np.array(weights) / sum(weights)).tolist()
        everything = interleave_datasets(streams, probabilities=shares, seed=seed)
    return everything.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)  # after the mixing, where `set_epoch` reaches it


def _texts_first(
    streams: tuple[IterableDataset, ...], weights: tuple[float, ...], texts: tuple[int, ...], first: int, seed: int
) -> Iterator[dict]:
    """Yields the `first` records of the streams that are `texts` alone, then of all."""
    rng, opened = np.random.default_rng(seed), [rows_of(stream) for stream in streams]
    for chosen, count in ((texts, range(first)), (range(len(streams)), itertools.count())):
        probabilities = np.array([weights[index] for index in chosen])
        probabilities /= probabilities.sum()
        for _ in count:
            yield next(opened[rng.choice(chosen, p=probabilities)])

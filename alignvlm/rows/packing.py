"""Packs the branches of a record into rows that hold their common beginning, the trunk, once.

A branch sees the trunk and itself, and its positions continue from the trunk's end. So a row trains exactly what separate sequences
would.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from alignvlm.rows.encode import Branch, Encoder, shared_length


IGNORED = -100  # the label of tokens that are not predicted


@dataclass
class Row:
    """One sequence of a batch; the lists have one entry per token."""

    images: list
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    record_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    branch_ids: list[int] = field(default_factory=list)
    prompt_mask: list[bool] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)

    def append(
        self, branch: Branch, number: int, images: Sequence = (), start: int = 0, end: int | None = None
    ) -> None:
        """Adds the tokens from `start` to `end` of a branch, as branch `number` of the row's record (0: its trunk), and their images, of
        all `images` of the record."""
        end = len(branch) if end is None else end
        before = branch.image_count(start)
        shift = len(self.images) - before
        self.image_ids += [index if index < 0 else index + shift for index in branch.image_ids[start:end]]
        self.images = [*self.images, *images[before : branch.image_count(end)]]
        labels = [token if trained else IGNORED for token, trained in zip(branch.input_ids, branch.trained)]
        self.input_ids += branch.input_ids[start:end]
        self.labels += labels[start:end]
        self.record_ids += [0] * (end - start)
        self.position_ids += range(start, end)
        self.branch_ids += [number] * (end - start)
        self.prompt_mask += [index < branch.prompt_length for index in range(start, end)]

    def extend(self, other: "Row") -> None:
        """Appends the records of another row. They keep their positions, and this row's records do not see them."""
        first_record = self.record_ids[-1] + 1
        self.image_ids += [index if index < 0 else index + len(self.images) for index in other.image_ids]
        self.images = [*self.images, *other.images]
        self.record_ids += [first_record + record for record in other.record_ids]
        for name in ("input_ids", "labels", "position_ids", "branch_ids", "prompt_mask"):
            getattr(self, name).extend(getattr(other, name))

    def __len__(self) -> int:
        return len(self.input_ids)


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Divides items of these lengths among rows of at most `row_length` tokens: the longest first, each into the fullest row that has
    room for it (best fit decreasing, as TRL packs texts). An item of more tokens has a row to itself.

    Returns:
        for each row the indices of its items in their order; rows in the order of their first items.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of each row: the tokens it has room for, and its index; ascending
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fullest = bisect_left(rooms, (lengths[item], -1))
        if fullest == len(rooms):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(fullest)
        rows[row].append(item)
        if room >= lengths[item]:
            insort(rooms, (room - lengths[item], row))
    return sorted(sorted(row) for row in rows)


def fuller_row_length(lengths: Sequence[int], row_length: int, fill: float = 0.95) -> int | None:
    """The multiple of 16 closest to `row_length`, of two the shorter, whose rows `best_fit` fills to `fill`: at most twice as long, and at
    least as long as the longest item. None if there is none."""
    shortest, tokens = -(-max(lengths) // 16) * 16, sum(lengths)
    for length in sorted(range(shortest, 2 * row_length + 1, 16), key=lambda length: abs(length - row_length)):
        if tokens >= fill * length * len(best_fit(lengths, length)):
            return length
    return None


def joined(rows: list[Row]) -> Row:
    """Joins rows to one. Their records keep their positions and do not see each other."""
    first, *others = rows
    for row in others:
        first.extend(row)
    return first


def trunk_length(branches: list[Branch]) -> int:
    """Returns how many first tokens a record's branches share.

    The trunk ends at least one token before each branch's first trained token, as the token before it predicts it, and never inside an
    image. The same holds for prompts: the last token of each predicts the first token of its answer.
    """
    furthest = max(min(branch.prompt_length for branch in branches) - 1, 0)
    return before_image(branches[0], shared_length([branch.input_ids[:furthest] for branch in branches]))


def before_image(branch: Branch, length: int) -> int:
    """Returns `length`, or the beginning of an image that a cut there would divide."""
    image = branch.image_ids[length - 1] if 0 < length < len(branch) else -1
    return branch.image_ids.index(image) if image >= 0 and branch.image_ids[length] == image else length


def shortened(branch: Branch, length: int) -> Branch | None:
    """Returns the first tokens of a branch, at most `length`, up to the last trained one among them; None if there is none. Never cuts an
    image: leaves it out with what follows it."""
    length = before_image(branch, min(length, len(branch)))
    while length and not branch.trained[length - 1]:
        length -= 1
    if not length:
        return None
    return Branch(branch.input_ids[:length], branch.trained[:length], branch.prompt_length, branch.image_ids[:length])


class Packer:
    """Makes rows of the branches of a record.

    Args:
        encoder: the encoder that made the branches.
        max_length: the longest row of a record; None: no limit.
        row_length: join the rows of a batch to rows of at most this number of tokens; None: one record per row.
        shares_trunk: False makes a row of each branch.
    """

    def __init__(
        self,
        encoder: Encoder,
        max_length: int | None = None,
        row_length: int | None = None,
        shares_trunk: bool = True,
    ):
        self.encoder = encoder
        self.pad_token_id = encoder.tokenizer.pad_token_id or 0
        self.max_length = max_length
        self.row_length = row_length
        self.shares_trunk = shares_trunk

    def rows(self, images: list, branches: list[Branch], dropped: list[dict]) -> list[Row]:
        """Returns the rows of one record: one, or more where its branches are longer than one row, or one per branch if the trunk cannot
        be shared; none if nothing fits.

        Args:
            images: the record's images, as the rows will hold them.
            dropped: gets a mapping for each response that is cut, and each branch or record that does not fit: see `AlignVLMCollator`.
        """
        fitting = self._fitting(branches, dropped)
        if not self.shares_trunk:
            groups = [[branch] for branch in fitting]
        elif self.max_length is None or len(fitting) < 2:
            groups = [fitting] if fitting else []
        else:
            trunk = self.trunk_length(fitting)
            rows = best_fit([len(branch) - trunk for branch in fitting], self.max_length - trunk)
            groups = [[fitting[i] for i in row] for row in rows]
        return [self._row(images, group) for group in groups]

    def arranged(self, rows: list[Row]) -> list[Row]:
        """Returns the rows of a batch from those of its records; without any, one row of one token without a label."""
        if not rows:
            rows = [Row([])]
            rows[0].append(Branch((self.pad_token_id,), (False,), 1, (-1,)), 0)
        if self.row_length is None:
            return rows
        return [joined([rows[i] for i in row]) for row in best_fit(list(map(len, rows)), self.row_length)]

    def trunk_length(self, branches: list[Branch]) -> int:
        """Returns how many first tokens the branches share."""
        return trunk_length(branches)

    def _row(self, images: list, branches: list[Branch]) -> Row:
        row = Row([])
        trunk = len(branches[0]) if len(branches) == 1 else self.trunk_length(branches)
        row.append(branches[0], 0, images, end=trunk)
        if len(branches) > 1:
            for number, branch in enumerate(branches, 1):
                row.append(branch, number, images, start=trunk)
        return row

    def _fitting(self, branches: list[Branch], dropped: list[dict]) -> list[Branch]:
        """Returns the branches that fit into `max_length`, of longer ones the beginning up to a trained token, if there is one."""
        if self.max_length is None:
            return branches
        if branches[0].image_count() and self.max_length < self.encoder.up_to_an_image + 2:
            tiles = getattr(self.encoder.processor, "max_tiles", 1)
            of_tiles = f" of up to {tiles} tiles" if tiles > 1 else ""
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt and a response behind {self.encoder.up_to_an_image} tokens up "
                f"to the end of an image{of_tiles}. Raise max_length."
            )
        chosen, losses = [], []
        for branch in branches:
            cut = branch if len(branch) <= self.max_length else shortened(branch, self.max_length)
            if cut is None:
                what = f"{branch.prompt_length} + {branch.response_length} tokens"
                losses.append({"kind": "dropped_annotation", "what": what})
                continue
            chosen.append(cut)
            if cut is not branch:
                what = f"{branch.response_length} tokens to {cut.response_length}"
                losses.append({"kind": "cut_response", "what": what})
        if not chosen:
            what = f"{len(branches)} prompts, none of which leaves room for a response"
            losses = [{"kind": "dropped_record", "what": what}]
        dropped += losses
        return chosen

"""Lines and marks as SVG without text, stretched to the width they get; labels are HTML beside them and keep their size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, by logarithms where they are far apart."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], log: bool | None = None, floor: float | None = None) -> "Scale | None":
        """Returns an axis that holds the finite values; None without any. `floor` is the least that is drawn."""
        values = [value for value in values if value is not None and math.isfinite(value)]
        if not values:
            return None
        low, high = min(values), max(values)
        if log is None:
            log = low > 0 and high > 10 * low
        if log:
            low = max(low, floor or 0, high * 1e-6)
            return cls(low / 1.15, high * 1.15, True)
        low = min(low, 0)
        return cls(low, high + 0.06 * ((high - low) or 1))

    def place(self, value: float) -> float:
        """Returns how many percent of the axis lie below a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(max(100 * (value - low) / ((high - low) or 1), 0), 100)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns a few round values, with their places."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if len(powers) > 4 else (1, 3)
            values = [step * 10.0**power for power in powers for step in steps]
        else:
            step = 10 ** math.floor(math.log10((self.high - self.low) or 1))
            step = next(s for s in (step / 5, step / 2, step, 2 * step) if (self.high - self.low) / s <= 5)
            first = math.ceil(self.low / step)
            values = [step * number for number in range(first, math.floor(self.high / step) + 1)]
        return [(self.place(value), number(value)) for value in values if self.low <= value <= self.high]


def number(value: float | int | None, digits: int = 3) -> str:
    """Writes a number for people: 12,300 and 0.0123, not 1.23e4."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "unknown"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{round(value):,}"
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    text = f"{value:.{min(decimals, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def round_end(value: float) -> float:
    """Returns a round number at least as large, for the end of an axis; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value)


def duration(seconds: float | None) -> str:
    """Writes a time: 45 s, 2 min 43 s, 3 h 5 min."""
    if seconds is None:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


@dataclass(frozen=True)
class Series:
    """A line through `points` `(x in percent, value)`, drawn as the class `name` of the style sheet; one point is a dot."""

    name: str
    points: list[tuple[float, float]]
    marks: bool = False  # draw each point, too


def plot(series: Sequence[Series], scale: Scale, label: str) -> Markup:
    """Draws lines in a box; `label` says in a sentence what they show, for those who do not see them."""
    parts = []
    for tick, _ in scale.ticks():
        parts.append(f'<path class="grid" d="M0 {100 - tick:.2f}H100"/>')
    for each in series:
        places = [(x, 100 - scale.place(y)) for x, y in each.points if y is not None and math.isfinite(y)]
        if len(places) > 1:
            line = "L".join(f"{x:.2f} {y:.2f}" for x, y in places)
            parts.append(f'<path class="line {escape(each.name)}" d="M{line}"/>')
        if each.marks or len(places) == 1:
            dots = "".join(f"M{x:.2f} {y:.2f}h0.01" for x, y in places)
            parts.append(f'<path class="dot {escape(each.name)}" d="{dots}"/>')
    return Markup(
        f'<svg class="plot" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )

"""Numbers become the geometry of small drawings: histograms, and intervals by category.

Nothing here is HTML: positions are in the units of an SVG, which the report's template prints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from diffsynth_metrics.evaluation.tables import shown

__all__ = [
    "BAR",
    "HEIGHT",
    "WIDTH",
    "Histogram",
    "Interval",
    "IntervalChart",
    "IntervalRow",
    "Mark",
    "Outline",
    "histogram",
    "interval_chart",
]

WIDTH, HEIGHT = 360.0, 150.0
"""Size of a histogram."""
BAR = 200.0
"""Width of the drawing of an interval."""

_BINS = 24
_FEW_VALUES = 12
_MARGIN = 8.0


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval around it where one is known."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return _short(self.value)
        # As many decimals as give the width of the interval three digits.
        width = self.high - self.low
        decimals = max(0, 2 - math.floor(math.log10(width))) if width > 0 else 3
        return f"{self.value:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends; the value itself where there is no interval."""
        if self.low is None or self.high is None:
            return self.value, self.value
        return self.low, self.high


@dataclass(frozen=True)
class Mark:
    """An interval on the scale: a dot on a line.

    Attributes:
        color: Number of the run whose colour it has; None: of no run.
        x: Position of the estimate.
        left: Where the line begins.
        right: Where it ends.
        y: Its height in the drawing.
        text: The numbers.
    """

    color: int | None
    x: float
    left: float
    right: float
    y: float
    text: str


@dataclass(frozen=True)
class IntervalRow:
    """The intervals of one category, one below the other; `label` is None for all samples."""

    label: str | None
    marks: tuple[Mark, ...]
    height: float
    value: float | None


@dataclass(frozen=True)
class IntervalChart:
    """Intervals of one metric, a row per category, on one scale.

    Attributes:
        title: What is estimated.
        note: What the interval is.
        rows: The categories.
        zero: Position of zero where it is on the scale.
        ends: What the left and the right end of the scale mean.
    """

    title: str
    note: str
    rows: tuple[IntervalRow, ...]
    zero: float | None
    ends: tuple[str, str]


def interval_chart(
    title: str,
    note: str,
    rows: Sequence[tuple[str | None, Sequence[tuple[int | None, Interval]]]],
    *,
    with_zero: bool,
) -> IntervalChart:
    """Lay out intervals on one scale.

    Args:
        title: What is estimated.
        note: What the interval is.
        rows: Per category its label and its intervals, each with the number of its run.
        with_zero: Whether zero must be on the scale, as for differences.
    """
    values = [end for _, marks in rows for _, interval in marks for end in interval.ends]
    low, high = _range([*values, 0.0] if with_zero else values)

    def position(value: float) -> float:
        return _MARGIN + (value - low) / (high - low) * (BAR - 2 * _MARGIN)

    def mark(line: int, color: int | None, interval: Interval) -> Mark:
        left, right = interval.ends
        return Mark(
            color,
            x=position(interval.value),
            left=position(left),
            right=position(right),
            y=10.0 + 12 * line,
            text=str(interval),
        )

    drawn = tuple(
        IntervalRow(
            label,
            tuple(mark(line, *numbered) for line, numbered in enumerate(marks)),
            height=8.0 + 12 * max(1, len(marks)),
            value=marks[0][1].value if marks else None,
        )
        for label, marks in rows
    )
    zero = position(0.0) if with_zero else None
    return IntervalChart(title, note, drawn, zero, (_short(low), _short(high)))


@dataclass(frozen=True)
class Outline:
    """The scores of one run in a histogram.

    Attributes:
        color: Number of the run.
        path: The outline, as an SVG path.
        mean: Position of the mean.
        text: Number of scores, mean, smallest and largest score.
    """

    color: int
    path: str
    mean: float
    text: str


@dataclass(frozen=True)
class Histogram:
    """How the scores of one metric are distributed, the runs over each other.

    Attributes:
        metric: What is counted.
        outlines: The runs that have scores.
        ticks: Positions on the horizontal axis, with what they mean.
        top: What the upper end of the vertical axis means.
    """

    metric: str
    outlines: tuple[Outline, ...]
    ticks: tuple[tuple[float, str], ...]
    top: str


def histogram(metric: str, scores: Mapping[int, Sequence[float]]) -> Histogram | None:
    """Lay out the distribution of a metric; None where there is no score.

    Every run is drawn by shares of its own scores, so that runs of different sizes can be compared.

    Args:
        metric: What is counted.
        scores: The finite scores of each run, by its number.
    """
    scores = {run: values for run, values in scores.items() if len(values)}
    everything = [value for values in scores.values() for value in values]
    if not everything:
        return None
    edges = _edges(everything)
    shares = {run: _shares(values, edges) for run, values in scores.items()}
    highest = max(share for values in shares.values() for share in values)
    low, high = edges[0], edges[-1]

    def across(value: float) -> float:
        return (value - low) / (high - low) * WIDTH

    def outline(run: int) -> Outline:
        values, mean = scores[run], math.fsum(scores[run]) / len(scores[run])
        steps = [f"M0,{HEIGHT:.0f}"]
        for left, right, share in zip(edges[:-1], edges[1:], shares[run], strict=True):
            height = HEIGHT - share / highest * (HEIGHT - 10)
            steps.append(f"L{across(left):.1f},{height:.1f}L{across(right):.1f},{height:.1f}")
        text = (
            f"{len(values)} scores, mean {shown(mean)}, "
            f"from {shown(float(min(values)))} to {shown(float(max(values)))}"
        )
        return Outline(run, "".join([*steps, f"L{WIDTH:.0f},{HEIGHT:.0f}"]), across(mean), text)

    middle = [low + (high - low) * part for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return Histogram(
        metric,
        tuple(outline(run) for run in scores),
        tuple((across(value), shown(value)) for value in middle),
        f"{highest:.0%}",
    )


def _edges(values: Sequence[float]) -> list[float]:
    """Return the borders of bins; a score with few values, such as a judge's, gets one bin per value."""
    different = sorted(set(values))
    gaps = [right - left for left, right in pairwise(different)]
    if gaps and len(different) <= _FEW_VALUES < len(values):
        step = min(gaps)
        if (different[-1] - different[0]) / step < 2 * _BINS:
            count = round((different[-1] - different[0]) / step) + 1
            return [different[0] + step * (index - 0.5) for index in range(count + 1)]
    low, high = _range(values)
    bins = min(_BINS, max(6, round(math.sqrt(len(values)))))
    return [low + (high - low) * index / bins for index in range(bins + 1)]


def _shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    counts = [0] * (len(edges) - 1)
    width = (edges[-1] - edges[0]) / len(counts)
    for value in values:
        counts[min(len(counts) - 1, max(0, int((value - edges[0]) / width)))] += 1
    return [count / len(values) for count in counts]


def _short(value: float) -> str:
    """Return a number with three digits."""
    return f"{value:.3g}" if abs(value) < 1_000 else shown(value)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest value, or a range around the only one."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high > low:
        return low, high
    around = abs(low) / 10 or 1.0
    return low - around, high + around

"""Results and comparisons become one HTML file: plain data first, then one template prints it.

The page needs nothing but itself: style, script, data and small pictures are inside it. What the
browser sorts, filters and counts comes from the same data (``templates/report.js``). docs/report.md
describes the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffsynth_metrics.evaluation.charts import (
    Histogram,
    Interval,
    IntervalChart,
    histogram,
    interval_chart,
)
from diffsynth_metrics.evaluation.gallery import Item, by_importance, finite, gather_items, read_pictures
from diffsynth_metrics.evaluation.tables import Table, shown

if TYPE_CHECKING:
    from diffsynth_metrics.evaluation.comparison import Comparison, Difference
    from diffsynth_metrics.evaluation.results import Results

    Reported: TypeAlias = "Results | Comparison | Sequence[Results]"

__all__ = ["ReportData", "report", "report_data", "write_report"]

_FAILURES_SHOWN = 200


@dataclass(frozen=True)
class Cell:
    """A value of a table.

    Attributes:
        text: What is shown.
        value: What is sorted by: a number, a text, or None for "not known".
    """

    text: str
    value: float | str | None

    @property
    def number(self) -> bool:
        """Whether it stands to the right."""
        return isinstance(self.value, (int, float))


@dataclass(frozen=True)
class Grid:
    """A table whose columns can be sorted."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportData:
    """All that a report shows, as plain values; the template only prints it.

    Attributes:
        title: Heading of the page.
        verdict: What may be said, in a sentence.
        facts: Short counts below it.
        warnings: What to know before comparing numbers.
        runs: Names of the runs.
        summary: Means with coverage.
        sets: Scores of whole sets, such as FID.
        differences: The comparison's numbers.
        strengths: Bradley-Terry strengths, for three and more runs.
        intervals: Drawings of estimates by category.
        histograms: Drawings of distributions.
        reasons: How many scores are missing for which kind of reason.
        failures: Samples without a score, with the reason.
        unpaired: What the comparison left out.
        provenance: What made the numbers, a table per metric.
        pictures: Which pictures are inside the page.
        gallery: Runs, metrics, items and pictures, for the page's script.
    """

    title: str
    verdict: str
    facts: tuple[str, ...]
    warnings: tuple[str, ...]
    runs: tuple[str, ...]
    summary: Grid
    sets: Grid | None
    differences: Grid | None
    strengths: tuple[Grid, ...]
    intervals: tuple[IntervalChart, ...]
    histograms: tuple[Histogram, ...]
    reasons: Grid | None
    failures: Grid | None
    unpaired: Grid | None
    provenance: tuple[Grid, ...]
    pictures: str
    gallery: dict[str, Any]


def report(
    results: Reported,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    thumbnail: int = 160,
    size_limit: int = 8_000_000,
) -> Path:
    """Write one HTML file that shows results or a comparison; it opens without a network.

    It begins with the verdict, and has the summary, distributions, intervals by category, a gallery that
    can be sorted and filtered, failures with their reasons, and what made the numbers.

    Args:
        results: Results, a comparison, or several results. Several are compared with each other; where
            that is refused, the page says why and shows them side by side.
        path: The file to write; it is replaced.
        title: Heading of the page; by default the names of the runs.
        thumbnail: Longest side of the small pictures in the page, in pixels.
        size_limit: Bytes that small pictures may take in the page. The others are linked: the page finds
            them as long as it stays where it is relative to them.

    Returns:
        The file.

    Raises:
        TypeError: `results` is something else.
        ValueError: There are no results, or `thumbnail` or `size_limit` is out of its range.
        FileNotFoundError: The folder of `path` does not exist.
        OSError: The file cannot be written.
    """
    if thumbnail < 16:
        raise ValueError(f"thumbnail must be at least 16 pixels, got {thumbnail}")
    if size_limit < 0:
        raise ValueError(f"size_limit must be 0 or more bytes, got {size_limit}")
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"path must be the file to write, such as {str(path / 'report.html')!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"make the folder of the report first: there is no {str(path.parent)!r}")
    data = report_data(results, path.parent, title=title, thumbnail=thumbnail, size_limit=size_limit)
    return write_report(data, path)


def report_data(
    results: Reported, folder: Path, *, title: str | None, thumbnail: int, size_limit: int
) -> ReportData:
    """Gather what a report shows; see :func:`report`. `folder` is where it will be written."""
    runs, comparison, refusal = _runs_of(results)
    names = comparison.names if comparison else _different_names(runs)
    metrics = _metrics_of(runs)
    frames = [run.to_pandas().to_dict("records") for run in runs]
    items = gather_items(frames, list(metrics))
    gallery = _gallery(items, names, metrics, folder, thumbnail, size_limit)
    return ReportData(
        title=title or " and ".join(names),
        verdict=comparison.verdict if comparison else _coverage(runs, metrics),
        facts=_facts(runs, items, metrics),
        warnings=comparison.notes if comparison else refusal,
        runs=tuple(names),
        summary=_summary(runs, names),
        sets=_sets(runs, names, comparison),
        differences=_differences(comparison) if comparison else None,
        strengths=_strengths(comparison) if comparison else (),
        intervals=_difference_charts(comparison) if comparison else _mean_charts(runs, metrics),
        histograms=_histograms(items, metrics),
        reasons=_reasons(frames, names),
        failures=_failures(runs, names),
        unpaired=_unpaired(comparison) if comparison else None,
        provenance=_provenance(runs, names),
        pictures=_about_pictures(gallery["pictures"]),
        gallery=gallery,
    )


def write_report(data: ReportData, path: Path) -> Path:
    """Print the data into the template, and write the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diffsynth_metrics.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _template("report.css"), _template("report.js")
    page = environment.get_template("report.html.j2").render(
        data=data, style=style, script=script, style_hash=_hash(style), script_hash=_hash(script)
    )
    # Half of a surrogate pair, which a manifest may hold, has no bytes.
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def _template(name: str) -> str:
    return files("diffsynth_metrics.evaluation").joinpath(f"templates/{name}").read_text("utf-8")


def _hash(text: str) -> str:
    """Return how a Content-Security-Policy names a text that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _runs_of(results: Reported) -> tuple[list[Results], Comparison | None, tuple[str, ...]]:
    """Return the runs, their comparison if there is one, and why that was refused."""
    from diffsynth_metrics.evaluation.comparison import Comparison, compare
    from diffsynth_metrics.evaluation.results import Results

    if isinstance(results, Comparison):
        return list(results.runs), results, ()
    if isinstance(results, Results):
        return [results], None, ()
    if not isinstance(results, Sequence) or not all(isinstance(run, Results) for run in results):
        raise TypeError(
            "results must be Results, a Comparison or a list of Results, such as "
            f"Results.open('runs/a'); got {type(results).__name__}"
        )
    if not results:
        raise ValueError("results is empty; pass at least one run")
    if len(results) == 1:
        return [results[0]], None, ()
    try:
        return list(results), compare(*results), ()
    except ValueError as error:
        return list(results), None, (f"These runs are not compared. {error}",)


def _different_names(runs: Sequence[Results]) -> list[str]:
    """Return the names of runs, numbered where two are equal."""
    counts = Counter(run.name for run in runs)
    seen: Counter[str] = Counter()
    names = []
    for run in runs:
        seen[run.name] += 1
        names.append(f"{run.name} ({seen[run.name]})" if counts[run.name] > 1 else run.name)
    return names


def _metrics_of(runs: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """Return the metrics of samples by label, each with the provenance of the first run that has it."""
    metrics: dict[str, dict[str, Any]] = {}
    for run in runs:
        for label, provenance in run.metrics.items():
            if not provenance.get("scores_sets"):
                metrics.setdefault(label, provenance)
    return metrics


def _card(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    card = provenance.get("card")
    return card if isinstance(card, Mapping) else {}


def _coverage(runs: Sequence[Results], metrics: Mapping[str, Any]) -> str:
    """Say how much was scored, in one sentence."""
    records = [record for run in runs for record in run.summary().records()]
    scored = sum(record["scored"] for record in records)
    without = sum(record["failed"] + record["missing"] for record in records)
    if not scored + without:
        return "There is nothing to show: no sample was scored."
    if not without:
        return f"All {scored:,} scores are there."
    every = scored + without
    return f"{scored:,} of {every:,} scores are there. {without:,} are not, and no mean counts them."


def _facts(
    runs: Sequence[Results], items: Sequence[Item], metrics: Mapping[str, Any]
) -> tuple[str, ...]:
    from diffsynth_metrics import __version__

    pictures = sum(name is not None for item in items for name in item.ids)
    prompts = len({item.prompt_id for item in items})
    complete = sum(None not in item.ids for item in items)
    together = "pair" if len(runs) == 2 else "complete group"
    return (
        *([_count(len(runs), "run"), _count(complete, together)] if len(runs) > 1 else []),
        _count(pictures, "picture"),
        _count(prompts, "prompt"),
        _count(len(metrics), "metric"),
        f"{datetime.now():%Y-%m-%d %H:%M}, diffsynth_metrics {__version__}",
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _grid(table: Table, title: str = "") -> Grid:
    """Keep of every value what is shown and what is sorted by; the page has its own headings."""
    return Grid(
        title,
        tuple(table.columns),
        tuple(tuple(_cell(value) for value in row) for row in table.rows),
        tuple(table.notes),
    )


def _cell(value: Any) -> Cell:
    number = None if isinstance(value, (bool, str)) else finite(value)
    return Cell(
        shown(value),
        (str(value) if isinstance(value, (bool, str)) else None) if number is None else number,
    )


def _summary(runs: Sequence[Results], names: Sequence[str]) -> Grid:
    """Return the means of all runs, those of one metric below each other."""
    tables = [run.summary() for run in runs]
    columns = tables[0].columns
    if len(runs) == 1:
        return Grid("", columns, _grid(tables[0]).rows)
    rows = [
        (row[0], name, *row[1:]) for name, table in zip(names, tables, strict=True) for row in table.rows
    ]
    metrics = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: metrics.index(row[0]))
    return Grid("", (columns[0], "run", *columns[1:]), tuple(tuple(map(_cell, row)) for row in rows))


def _sets(runs: Sequence[Results], names: Sequence[str], comparison: Comparison | None) -> Grid | None:
    """Return the scores of whole sets."""
    if comparison:
        return _grid(comparison.sets) if comparison.sets.rows else None
    columns = ("metric", "score", "reference", "count")
    rows = tuple(
        (_cell(name), *(_cell(score.get(column)) for column in columns))
        for name, run in zip(names, runs, strict=True)
        for score in run.sets
    )
    return Grid("", ("run", *columns), rows) if rows else None


def _differences(comparison: Comparison) -> Grid:
    """Return the comparison's numbers, a row per metric, category and pair of runs."""
    several = len(comparison.names) > 2
    columns = ("metric", "category", "runs") if several else ("metric", "category")
    rows = []
    for difference in comparison.differences:
        pair = [_cell(f"{difference.second} − {difference.first}")] if several else []
        rows.append(
            (
                _cell(difference.metric),
                Cell(difference.category or "all", difference.category or ""),
                *pair,
                _cell(finite(difference.mean_first)),
                _cell(finite(difference.mean_second)),
                _estimate(difference.difference),
                Cell(difference.better or "not decided", difference.better or ""),
                _cell(finite(difference.p_holm)),
                _estimate(difference.win_rate, percent=True),
                _cell(difference.difference.prompts),
                _cell(difference.difference.images),
                _cell(finite(difference.effect)),
                _cell(finite(difference.p)),
            )
        )
    first, second = ("first", "second") if several else comparison.names
    numbers = (f"mean {first}", f"mean {second}", "difference", "better", "p (Holm)")
    more = (f"{second} is better in", "prompts", "pictures", "effect", "p")
    return Grid("", (*columns, *numbers, *more), tuple(rows))


def _interval(estimate: Any) -> Interval | None:
    """Return an estimate as an interval; None where it is not known."""
    value = finite(estimate.value)
    return None if value is None else Interval(value, finite(estimate.low), finite(estimate.high))


def _estimate(estimate: Any, percent: bool = False) -> Cell:
    interval = _interval(estimate)
    if interval is None:
        return Cell(shown(None), None)
    if not percent:
        return Cell(str(interval), interval.value)
    text = f"{interval.value:.0%}"
    if interval.low is not None and interval.high is not None:
        text += f" [{interval.low:.0%}, {interval.high:.0%}]"
    return Cell(text, interval.value)


def _strengths(comparison: Comparison) -> tuple[Grid, ...]:
    if len(comparison.names) < 3:
        return ()
    return tuple(_grid(table, metric) for metric, table in comparison.strengths.items())


def _unpaired(comparison: Comparison) -> Grid | None:
    table = comparison.unpaired
    return _grid(table) if table.rows else None


def _difference_charts(comparison: Comparison) -> tuple[IntervalChart, ...]:
    """Draw the differences by category, a drawing per metric and pair of runs."""
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for difference in comparison.differences:
        key = (difference.metric, difference.first, difference.second)
        groups.setdefault(key, []).append(difference)
    charts = []
    for (metric, first, second), differences in groups.items():
        intervals = [
            (difference.category, _interval(difference.difference)) for difference in differences
        ]
        rows = [(label, [] if interval is None else [(None, interval)]) for label, interval in intervals]
        note = f"Right of the line {second} has the larger score, left of it {first}."
        charts.append(interval_chart(f"{metric}: {second} − {first}", note, rows, with_zero=True))
    return tuple(charts)


def _mean_charts(runs: Sequence[Results], metrics: Mapping[str, Any]) -> tuple[IntervalChart, ...]:
    """Draw the means by category, a drawing per metric, the runs below each other."""
    rows: dict[str, dict[str | None, list[tuple[int | None, Interval]]]] = {
        label: {} for label in metrics
    }
    for number, run in enumerate(runs):
        overall = [(None, record) for record in run.summary().records()]
        apart = [(_category(record), record) for record in run.summary(by_category=True).records()]
        for category, record in overall + apart:
            mean = finite(record["mean"])
            if mean is not None:
                of_metric = rows[record["metric"]].setdefault(category, [])
                of_metric.append((number, _around(mean, record)))
    note = "The mean over prompts, with its 95 % interval."
    return tuple(
        interval_chart(metric, note, _categories_apart(of_metric), with_zero=False)
        for metric, of_metric in rows.items()
        if of_metric
    )


_NO_CATEGORY = "(no category)"


def _category(record: Mapping[str, Any]) -> str:
    return _NO_CATEGORY if record["category"] is None else str(record["category"])


def _categories_apart(rows: dict[str | None, Any]) -> list[tuple[str | None, Any]]:
    """Leave out the only category that there is: all samples say the same."""
    return [(None, rows[None])] if set(rows) == {None, _NO_CATEGORY} else list(rows.items())


def _around(mean: float, record: Mapping[str, Any]) -> Interval:
    """Return the 95 % interval of a mean over prompts, by Student's t."""
    from scipy.stats import t

    error, prompts = finite(record["standard error"]), record["prompts"]
    if error is None or prompts < 2:
        return Interval(mean)
    half = float(t.ppf(0.975, prompts - 1)) * error
    return Interval(mean, mean - half, mean + half)


def _histograms(items: Sequence[Item], metrics: Mapping[str, Any]) -> tuple[Histogram, ...]:
    runs = len(items[0].ids) if items else 0
    drawn = []
    for number, metric in enumerate(metrics):
        scores = {run: [item.scores[number][run] for item in items] for run in range(runs)}
        known = {run: [score for score in row if score is not None] for run, row in scores.items()}
        drawn.append(histogram(metric, known))
    return tuple(drawing for drawing in drawn if drawing is not None)


def _reasons(frames: Sequence[Sequence[Mapping[Any, Any]]], names: Sequence[str]) -> Grid | None:
    """Count the rows without a score by run, metric and kind of error."""
    counts = Counter(
        (name, str(row["metric"]), str(row["error_type"]))
        for name, rows in zip(names, frames, strict=True)
        for row in rows
        if finite(row["score"]) is None
    )
    rows = tuple(tuple(map(_cell, (*kind, count))) for kind, count in counts.most_common())
    return Grid("", ("run", "metric", "kind of reason", "scores"), rows) if rows else None


def _failures(runs: Sequence[Results], names: Sequence[str]) -> Grid | None:
    """List samples without a score, as many as a page can take."""
    tables = [run.failures() for run in runs]
    rows = [(name, *row) for name, table in zip(names, tables, strict=True) for row in table.rows]
    if not rows:
        return None
    notes: tuple[str, ...] = ()
    if len(rows) > _FAILURES_SHOWN:
        notes = (f"The first {_FAILURES_SHOWN} of {len(rows):,}; results.failures() has all of them.",)
    cells = tuple(tuple(_cell(value) for value in row) for row in rows[:_FAILURES_SHOWN])
    return Grid("", ("run", *tables[0].columns), cells, notes)


def _provenance(runs: Sequence[Results], names: Sequence[str]) -> tuple[Grid, ...]:
    """List what made the numbers: a table per metric, a column per run."""
    grids = []
    for metric in dict.fromkeys(label for run in runs for label in run.metrics):
        facts = [_flat(run.metrics.get(metric, {})) for run in runs]
        fields = list(dict.fromkeys(field for column in facts for field in column))
        rows = [[field, *(column.get(field) for column in facts)] for field in fields]
        for row in rows:
            row.append("differs" if len(set(row[1:])) > 1 else "")
        cells = tuple(tuple(map(_cell, row)) for row in rows)
        if any(row[-1] for row in rows):
            grids.append(Grid(metric, ("", *names, ""), cells))
        else:
            column = "all runs" if len(runs) > 1 else names[0]
            grids.append(Grid(metric, ("", column), tuple(row[:2] for row in cells)))
    return tuple(grids)


def _flat(provenance: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested facts as lines."""
    lines: dict[str, str] = {}
    for name, value in provenance.items():
        if isinstance(value, Mapping):
            lines.update(_flat(value, f"{prefix}{name}: "))
        elif value not in (None, "", [], ()):
            text = value if isinstance(value, (str, int, float)) else json.dumps(value, default=str)
            lines[f"{prefix}{name}"] = str(text)
    return lines


def _gallery(
    items: Sequence[Item],
    names: Sequence[str],
    metrics: Mapping[str, Mapping[str, Any]],
    folder: Path,
    thumbnail: int,
    size_limit: int,
) -> dict[str, Any]:
    """Return what the page's script works on: items name their pictures by number."""
    scored = [
        picture
        for item in by_importance(items)
        for picture in (*item.sources, *item.pictures)
        if picture is not None
    ]
    pictures = read_pictures(scored, folder, side=thumbnail, size_limit=size_limit)
    numbers = {picture: number for number, picture in enumerate(pictures)}
    prompts = {item.prompt_id: number for number, item in enumerate(items)}

    def entry(item: Item) -> dict[str, Any]:
        return {
            **asdict(item),
            "prompt_id": prompts[item.prompt_id],
            "pictures": [None if one is None else numbers[one] for one in item.pictures],
            "sources": [numbers[one] for one in item.sources],
        }

    return {
        "runs": list(names),
        "metrics": [
            {
                "label": label,
                "higher": bool(_card(provenance).get("higher_is_better", True)),
                "range": str(_card(provenance).get("range", "")),
            }
            for label, provenance in metrics.items()
        ],
        "items": [entry(item) for item in items],
        "pictures": [asdict(picture) for picture in pictures.values()],
    }


def _about_pictures(pictures: Sequence[Mapping[str, Any]]) -> str:
    """Say how many pictures are inside the page, and where the others are."""
    inline = sum(picture["source"].startswith("data:") for picture in pictures)
    unseen = sum(not picture["source"] for picture in pictures)
    linked = len(pictures) - inline - unseen
    text = f"{inline:,} of {len(pictures):,} pictures are inside this file as small copies."
    if linked:
        text += (
            f" {linked:,} are linked: they are seen while this file stays where it is relative to them."
        )
    if unseen:
        text += f" {unseen:,} cannot be shown, for the reasons in their places."
    return text

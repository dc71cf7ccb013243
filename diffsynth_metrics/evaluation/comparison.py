"""Runs over the same prompts: what differs, how sure that is, and what may be claimed.

    comparison = compare("runs/before", "runs/after")
    print(comparison)

Scores are averaged over the seeds of a prompt, and prompts are paired; docs/comparing.md says why.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from diffsynth_metrics.evaluation.likeness import (
    Differing,
    check_allowed,
    different_environments,
    different_prompts,
    different_set_settings,
    different_settings,
    listed,
    refuse,
    same_runs,
    several_of_one_seed,
    shared_scores,
    unknown_weights,
)
from diffsynth_metrics.evaluation.pairing import Pair, RunRows, read_runs
from diffsynth_metrics.evaluation.statistics import (
    Estimate,
    Floats,
    bradley_terry,
    bradley_terry_intervals,
    difference_of_means,
    effect_size,
    estimate_mean,
    estimate_win_rate,
    holm,
    outcomes,
    prompt_means,
    wilcoxon_p,
)
from diffsynth_metrics.evaluation.tables import Table, shown

if TYPE_CHECKING:
    from diffsynth_metrics.evaluation.results import Results

__all__ = ["Comparison", "Difference", "compare"]

Run: TypeAlias = "Results | str | os.PathLike[str]"

_FEW_PROMPTS = 20
"""Of fewer, an interval of 95 % covers the true difference in fewer than 9 of 10 experiments."""
_LARGEST_SCORE = 1e100
_SHORT_NAME = 10
"""Names up to this length head columns, and a table still fits into 100 characters."""
_PAIR_BY = (("prompt_id", "seed"), ("prompt_id",), ("prompt", "seed"), ("prompt",))


@dataclass(frozen=True)
class Difference:
    """How two runs differ on one metric, over the prompts that both have scores of.

    Attributes:
        metric: Label of the metric.
        category: The category of prompts; None: all prompts.
        first: Name of the run that is compared against.
        second: Name of the other.
        mean_first: Mean over prompts of their means over seeds; None without prompts.
        mean_second: Likewise.
        difference: ``mean_second - mean_first`` in units of the metric, with its BCa interval.
        effect: The difference in standard deviations of the differences of prompts; None where they do
            not spread.
        p: Of Wilcoxon's signed-rank test, two-sided; None below two prompts.
        p_holm: Corrected for the number of tests: of all metrics and runs for rows of all prompts, of
            all metrics, runs and categories for rows of a category.
        win_rate: Share of prompts on which `second` is better, in the direction of the metric; a tie is
            half a win.
        better: Name of the better run, None where no difference may be claimed. A run is named where
            `p_holm` is below ``1 - confidence``, the interval leaves out 0, and the run with the better
            mean also wins at least half of the prompts.
    """

    metric: str
    category: str | None
    first: str
    second: str
    mean_first: float | None
    mean_second: float | None
    difference: Estimate
    effect: float | None
    p: float | None
    p_holm: float | None
    win_rate: Estimate
    better: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What :func:`compare` found; it prints as tables and displays in a notebook.

    Attributes:
        runs: The runs, in the order of the call.
        names: Their names, all different.
        differences: Every run against the first, for each metric, over all prompts and by category.
        strengths: For three and more runs, by metric: Bradley-Terry strengths with intervals.
        sets: Numbers of whole sets of pictures, such as FID, side by side; they have no interval.
        unpaired: What does not count, and why.
        verdict: One sentence: what may be claimed.
        notes: What to know before the numbers are used, such as what differs in how they were made.
        confidence: The share that the intervals are made for.
    """

    runs: tuple[Results, ...]
    names: tuple[str, ...]
    differences: tuple[Difference, ...]
    strengths: Mapping[str, Table]
    sets: Table
    unpaired: Table
    verdict: str
    notes: tuple[str, ...]
    confidence: float
    _pairs: tuple[Pair, ...]

    def pairs(self, metric: str, second: str | None = None) -> pd.DataFrame:
        """Return the pictures of two runs side by side, the largest gain first.

        Pictures pair by prompt and seed; where a run names no seeds, in the order of their ids. One pair
        shows what a difference looks like, it is no evidence of one.

        Args:
            metric: Label of the metric.
            second: Name of the run to show next to the first; None: the second of the call.

        Returns:
            Columns ``prompt_id, seed, prompt, category, id_first, image_first, score_first, id_second,
            image_second, score_second, gain``. `gain` is above 0 where `second` is better.

        Raises:
            ValueError: There is no such metric or run.
        """
        second = self.names[1] if second is None else second
        for pair in self._pairs:
            if (pair.metric, pair.first, pair.second) == (metric, self.names[0], second):
                return pair.side_by_side()
        raise ValueError(
            f"choose a metric of {listed(dict.fromkeys(pair.metric for pair in self._pairs))} and a "
            f"run of {listed(self.names[1:])}; got {metric!r} and {second!r}"
        )

    def table(self, by_category: bool = False) -> Table:
        """Return the differences as a table, over all prompts or by category.

        ``change`` is second - first, ``low`` and ``high`` are the ends of its interval, ``p`` is
        corrected for the number of tests, ``wins`` is the share of prompts on which second is better.
        """
        rows = [row for row in self.differences if (row.category is not None) == by_category]
        two = len(self.names) == 2
        short = two and max(map(len, self.names)) <= _SHORT_NAME
        first, second = self.names if short else ("first", "second")
        shown_names = dict(zip(self.names, (first, second), strict=True)) if two else {}
        columns = (
            "metric",
            *(["category"] if by_category else [first, second]),
            *([] if two else ["run"]),
            *("change", "low", "high", "p", "wins", "prompts", "better"),
        )
        cells = tuple(
            (
                row.metric,
                *([row.category] if by_category else [row.mean_first, row.mean_second]),
                *([] if two else [row.second]),
                *map(
                    _rounded, (row.difference.value, row.difference.low, row.difference.high, row.p_holm)
                ),
                _rounded(row.win_rate.value),
                row.difference.prompts,
                shown_names.get(row.better or "", row.better),
            )
            for row in rows
        )
        name = self.names[1] if two else "each run"
        tests = sum(row.p is not None for row in rows)
        note = (
            f"change: {second} - {first}; low to high: its {_percent(self.confidence)} interval; "
            f"p: corrected for {tests} {'test' if tests == 1 else 'tests'};\n"
            f"wins: share of prompts on which {second} is better"
        )
        title = "By category" if by_category else f"{name} (second) against {self.names[0]} (first)"
        return Table(columns, cells, title=title, notes=(note,))

    def __repr__(self) -> str:
        """Show the verdict alone."""
        return f"<Comparison: {self.verdict}>"

    def __str__(self) -> str:
        """Show the verdict, the tables and the notes as text."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(filter(None, [self.verdict, *map(str, self._tables()), notes]))

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return (
            f"<p><strong>{escape(self.verdict)}</strong></p>"
            + "".join(table.html() for table in self._tables())
            + (f"<ul>{notes}</ul>" if notes else "")
        )

    def _tables(self) -> list[Table]:
        tables = [self.table(), self.table(by_category=True), *self.strengths.values()]
        return [table for table in (*tables, self.sets, self.unpaired) if table.rows]


def compare(
    a: Run,
    b: Run,
    *more: Run,
    pair_by: Sequence[str] = ("prompt_id", "seed"),
    metrics: Sequence[str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 9999,
    allow: Sequence[str] = (),
) -> Comparison:
    """Compare runs over the same prompts.

    Scores are averaged over the seeds of each prompt, and prompts are paired. A picture counts for a
    metric if it has a score and its partner in the other run has one; what does not is counted in
    :attr:`Comparison.unpaired`.

    Args:
        a: A run that :func:`score` returned, or its folder. The others are compared against it.
        b: Another run.
        *more: Further runs.
        pair_by: ``("prompt_id", "seed")``: of a prompt whose pictures name their seeds in both runs, the
            seeds that are in both count. ``("prompt_id",)``: all pictures of a prompt count.
            With ``"prompt"`` instead of ``"prompt_id"``, prompts of the same text are one prompt.
        metrics: Labels, one at least; None: all that every run has.
        confidence: Of the intervals and of what may be claimed, between 0 and 1.
        seed: Of the resampling. The same runs and seed give the same numbers.
        resamples: How often prompts are drawn anew for an interval.
        allow: What may differ in how the scores were made, such as ``("weights", "dtype")``. The result
            says what did.

    Raises:
        ValueError: The scores were made in different ways, with the difference of each field; the runs
            have no metric or no prompt in common; scores are too large to compute with; or an argument
            is out of its range.
        TypeError: A run is neither a result nor a path.
        FileNotFoundError: There is no such run.
    """
    allow, pair_by = _as_names(allow), _as_names(pair_by)
    resampling = _Resampling(confidence, seed, resamples)
    if pair_by not in _PAIR_BY:
        raise ValueError(f"pair by one of {', '.join(map(str, _PAIR_BY))}, got {pair_by!r}")
    runs = read_runs(
        [_open(run) for run in (a, b, *more)], by_text="prompt" in pair_by, by_seed="seed" in pair_by
    )
    wanted = None if metrics is None else _as_names(metrics)
    labels = _choose_metrics(runs, wanted)
    _check_sizes(labels, runs)
    check_allowed(allow, labels, runs)
    sets, differing = _compare_sets(runs, wanted)
    differing = [*different_settings(labels, runs), *different_prompts(runs), *differing]
    refuse(differing, allow)

    pairs = _make_pairs(labels, runs)
    against_first = [pair for pair in pairs if pair.first == runs[0].name]
    if pairs and not any(len(pair.counting()[0]) for pair in against_first):
        raise ValueError(_nothing_in_common(against_first))
    overall = _differences(against_first, [None], resampling)
    rows = (*overall, *_differences(against_first, _shared_categories(runs), resampling))
    return Comparison(
        runs=tuple(run.results for run in runs),
        names=tuple(run.name for run in runs),
        differences=rows,
        strengths={label: _strengths(label, runs, pairs, resampling) for label in labels if more},
        sets=sets,
        unpaired=_unpaired(against_first),
        verdict=_verdict(overall, differing, confidence),
        notes=tuple(_notes(runs, labels, against_first, overall, differing)),
        confidence=confidence,
        _pairs=tuple(against_first),
    )


@dataclass(frozen=True)
class _Resampling:
    """How intervals are made, the same for all of them."""

    confidence: float
    seed: int
    resamples: int

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is between 0 and 1, such as 0.95, got {self.confidence!r}")
        if self.resamples < 100:
            raise ValueError(f"resamples is at least 100, and 9999 for a paper, got {self.resamples!r}")

    @property
    def options(self) -> dict[str, Any]:
        """As the formulas take it."""
        return {"confidence": self.confidence, "seed": self.seed, "resamples": self.resamples}


# What is compared.


def _open(run: Run) -> Results:
    if isinstance(run, (str, os.PathLike)):
        from diffsynth_metrics.evaluation.results import Results

        return Results.open(run)
    if not hasattr(run, "to_pandas"):
        raise TypeError(f"compare what score() returned, or its folder; got {type(run).__name__}")
    return run


def _choose_metrics(runs: Sequence[RunRows], wanted: Sequence[str] | None) -> list[str]:
    """Return the labels that every run has rows of, or those of them that are wanted.

    Metrics of whole sets have no rows; they may be wanted if every run has their numbers.
    """
    shared = [label for label in runs[0].results.metrics if all(len(run.of(label)) for run in runs)]
    if wanted is not None and not wanted:
        raise ValueError(f"metrics is empty: name some of {listed(shared)}, or pass None for all")
    if wanted is None and not shared and not all(run.results.sets for run in runs):
        have = "; ".join(f"{run.name!r} has {listed(run.results.metrics)}" for run in runs)
        raise ValueError(f"score the runs with the same metrics; they have none in common: {have}")
    names_of_sets = [{entry["metric"] for entry in run.results.sets} for run in runs]
    of_sets = sorted(set.intersection(*names_of_sets) - set(shared))
    for label in wanted or ():
        if label not in (*shared, *of_sets):
            raise ValueError(
                f"choose metrics of {listed([*shared, *of_sets])}: not every run has scores of {label!r}"
            )
    return shared if wanted is None else [name for name in dict.fromkeys(wanted) if name in shared]


def _check_sizes(labels: Sequence[str], runs: Sequence[RunRows]) -> None:
    """Refuse scores whose squares and cubes, which the formulas need, have no finite number."""
    for label in labels:
        for run in runs:
            rows = run.scored(label)
            too_large = rows[rows["score"].abs() > _LARGEST_SCORE]
            if len(too_large):
                row = too_large.iloc[0]
                raise ValueError(
                    f"compare other metrics, with metrics=: the score {row['score']:g} of {label} for "
                    f"{row['id']!r} in {run.name!r} is too large to compute with"
                )


def _make_pairs(labels: Sequence[str], runs: Sequence[RunRows]) -> list[Pair]:
    return [
        Pair(label, first.name, second.name, direction, first.of(label), second.of(label))
        for label in labels
        for direction in [_higher_is_better(label, runs)]
        for first, second in combinations(runs, 2)
    ]


def _higher_is_better(label: str, runs: Sequence[RunRows]) -> bool:
    directions = {}
    for run in runs:
        try:
            directions[run.name] = bool(run.results.metrics[label]["card"]["higher_is_better"])
        except (KeyError, TypeError):
            raise ValueError(
                f"score {run.name!r} anew: it does not record whether a higher {label} is better"
            ) from None
    if len(set(directions.values())) > 1:
        raise ValueError(f"score the runs alike: higher_is_better of {label} is {directions}")
    return directions[runs[0].name]


def _shared_categories(runs: Sequence[RunRows]) -> list[str]:
    """Return the categories that every run has; none if there is only one, which is the whole."""
    shared = set.intersection(*map(_categories, runs))
    return sorted(shared) if len(shared) > 1 else []


def _categories(run: RunRows) -> set[str]:
    return set(run.rows["category"].dropna())


def _categories_left_out(runs: Sequence[RunRows]) -> Iterator[str]:
    """Yield a note on the categories of each run that are not in all of them."""
    shared = set.intersection(*map(_categories, runs))
    what = "compared by category are those of all runs" if len(shared) > 1 else "no table by category"
    for run in runs:
        if own := sorted(_categories(run) - shared):
            more = f" and {len(own) - 5} more" if len(own) > 5 else ""
            yield f"{what}: not every run has {listed(own[:5])}{more} of {run.name}"


def _nothing_in_common(pairs: Sequence[Pair]) -> str:
    for pair in pairs:
        if pair.rows_first["prompt_id"].isin(pair.rows_second["prompt_id"]).any():
            why = "; ".join(f"{name!r}: {count} x {why}" for _, name, why, count, *_ in pair.left_out())
            return (
                f"look at failures() of the runs, or pass pair_by=('prompt_id',): nothing pairs: {why}"
            )
    for pair in pairs:
        if pair.prompts_with_two_ids():
            return _pair_by_text(pair)
    some = "; ".join(
        f"{name!r} has {listed(rows['prompt_id'].unique()[:3])}, ..."
        for name, rows in (
            (pairs[0].first, pairs[0].rows_first),
            (pairs[0].second, pairs[0].rows_second),
        )
    )
    return f"compare runs over the same prompts, or give samples a prompt_id; none is in both: {some}"


def _pair_by_text(pair: Pair) -> str:
    """Say that prompts would pair by their texts."""
    found = pair.prompts_with_two_ids()
    first, second, text = found[0]
    return (
        f"pass pair_by=('prompt', 'seed') to pair by text: {len(found)} prompt{_s(len(found))} of the "
        f"same text differ in their prompt ids, such as {text[:60]!r}, which is {first!r} in "
        f"{pair.first} and {second!r} in {pair.second}"
    )


def _compare_sets(
    runs: Sequence[RunRows], wanted: Sequence[str] | None
) -> tuple[Table, list[Differing]]:
    """Put the numbers of whole sets side by side, and find what differs in how they were made."""
    first, *others = runs
    rows: list[tuple[Any, ...]] = []
    differing: list[Differing] = []
    for own in first.results.sets:
        metric = own["metric"]
        if wanted is not None and metric not in wanted:
            continue
        found = [own]
        for run in others:
            candidates = [entry for entry in run.results.sets if entry["metric"] == metric]
            if not candidates:
                break
            how = [list(different_set_settings(first, own, run, entry)) for entry in candidates]
            nearest = min(range(len(how)), key=lambda index: len(how[index]))
            found.append(candidates[nearest])
            differing.extend(how[nearest])
        else:
            rows.append((metric, str(own.get("reference")), *(entry["score"] for entry in found)))
            rows.append(("", "pictures", *(entry.get("count") for entry in found)))
    columns = ("metric", "reference", *(run.name for run in runs))
    title = "Numbers of whole sets: no interval, so no claim"
    return Table(columns, tuple(rows), title=title), differing


# What the scores say.


def _differences(
    pairs: Sequence[Pair], categories: Sequence[str | None], resampling: _Resampling
) -> list[Difference]:
    """Estimate the differences of one family of tests, and name the better runs."""
    cases = [(pair, category) for pair in pairs for category in categories]
    rows = [_difference(pair, category, resampling) for pair, category in cases]
    corrected = holm([row.p for row in rows])
    rows = [replace(row, p_holm=p_holm) for row, p_holm in zip(rows, corrected, strict=True)]
    return [
        replace(row, better=_better(row, pair.higher_is_better, resampling.confidence))
        for row, (pair, _) in zip(rows, cases, strict=True)
    ]


def _difference(pair: Pair, category: str | None, resampling: _Resampling) -> Difference:
    """Estimate one difference; what may be claimed is not known before all of its family are."""
    first, second = pair.counting(category)
    _, means_first, means_second, change = _means(first, second)
    options = {**resampling.options, "images": min(len(first), len(second))}
    return Difference(
        metric=pair.metric,
        category=category,
        first=pair.first,
        second=pair.second,
        mean_first=float(np.mean(means_first)) if len(means_first) else None,
        mean_second=float(np.mean(means_second)) if len(means_second) else None,
        difference=estimate_mean(change, **options),
        effect=effect_size(change),
        p=wilcoxon_p(change),
        p_holm=None,
        win_rate=estimate_win_rate(change if pair.higher_is_better else -change, **options),
        better=None,
    )


def _means(first: pd.DataFrame, second: pd.DataFrame) -> tuple[list[str], Floats, Floats, Floats]:
    """Return the prompts, sorted, the means of each in both runs, and their differences."""
    prompts, means_first = prompt_means(first["prompt_id"], first["score"])
    _, means_second = prompt_means(second["prompt_id"], second["score"])
    return prompts, means_first, means_second, difference_of_means(means_first, means_second)


def _better(row: Difference, higher_is_better: bool, confidence: float) -> str | None:
    change, wins = row.difference, row.win_rate.value
    if row.p_holm is None or change.value is None or change.low is None or change.high is None:
        return None
    if row.p_holm >= 1 - confidence or change.low <= 0 <= change.high or wins is None:
        return None
    second_is_better = (change.value > 0) == higher_is_better
    if second_is_better:
        return row.second if wins >= 0.5 else None
    return row.first if wins <= 0.5 else None


def _strengths(
    label: str, runs: Sequence[RunRows], pairs: Sequence[Pair], resampling: _Resampling
) -> Table:
    """Fit Bradley-Terry strengths to the prompts that runs win against each other."""
    names = [run.name for run in runs]
    wins_of: dict[str, Floats] = {}
    for pair in (pair for pair in pairs if pair.metric == label):
        i, j = names.index(pair.first), names.index(pair.second)
        prompts, *_, change = _means(*pair.counting())
        won = outcomes(change if pair.higher_is_better else -change)
        for prompt, share in zip(prompts, won, strict=True):
            wins = wins_of.setdefault(prompt, np.zeros((len(names), len(names))))
            wins[j, i], wins[i, j] = share, 1 - share
    by_prompt = np.array([wins_of[prompt] for prompt in sorted(wins_of)]).reshape(
        -1, len(names), len(names)
    )
    total = by_prompt.sum(axis=0)
    logs = bradley_terry(total)
    intervals = bradley_terry_intervals(by_prompt, **resampling.options)
    games_of_pairs = total + total.T
    games = games_of_pairs.sum(axis=1)
    rates = np.divide(total.sum(axis=1), games, out=np.full(len(names), np.nan), where=games > 0)
    rows = [
        (names[run], *map(_rounded, (logs[run], *intervals[run], rates[run])), len(by_prompt))
        for run in np.argsort(-rates, kind="stable")
    ]
    note = (
        "strength: natural logarithm, on average 0; a run with 1 more wins 73 % of the prompts;\n"
        f"low to high: its {_percent(resampling.confidence)} interval; wins: share of prompts won"
    )
    if np.isnan(logs).any():
        note = f"no strengths: {_why_no_strengths(names, games_of_pairs)}"
    columns = ("run", "strength", "low", "high", "wins", "prompts")
    return Table(columns, tuple(rows), title=f"Bradley-Terry strengths on {label}", notes=(note,))


def _why_no_strengths(names: Sequence[str], games: Floats) -> str:
    count, group_of = connected_components(games > 0, directed=False)
    if count == 1:
        return "some runs won, or lost, every prompt against the others"
    groups = [
        _and([name for name, group in zip(names, group_of, strict=True) if group == wanted])
        for wanted in range(count)
    ]
    return f"no prompt that both have scores of links {', or '.join(groups)}"


# How it is told.


def _unpaired(pairs: Sequence[Pair]) -> Table:
    """Count what does not count, and say why."""
    rows = tuple(dict.fromkeys(row for pair in pairs for row in pair.left_out()))
    return Table(("metric", "run", "why", "images", "prompts", "such as"), rows, title="Left out")


def _verdict(rows: Sequence[Difference], differing: Sequence[Differing], confidence: float) -> str:
    """Say in one sentence what may be claimed."""
    clauses = [] if rows else ["nothing can be claimed: numbers of whole sets have no interval"]
    for second in dict.fromkeys(row.second for row in rows):
        clauses.append(_verdict_on([row for row in rows if row.second == second], confidence))
    fields = list(dict.fromkeys(found.field for found in differing))
    return "; ".join(clauses) + (f" (with different {_and(fields)})" if fields else "") + "."


def _verdict_on(rows: Sequence[Difference], confidence: float) -> str:
    """Say on which metrics a run is better than the first, worse, or neither."""
    first, second = rows[0].first, rows[0].second
    better = [_evidence(row, confidence) for row in rows if row.better == second]
    worse = [_evidence(row, confidence) for row in rows if row.better == first]
    unclear = [_evidence(row, confidence) for row in rows if row.better is None]
    parts = []
    if better:
        parts.append(f"{second} is better than {first} on {_and(better)}")
    if worse:
        parts.append(
            f"worse on {_and(worse)}" if better else f"{second} is worse than {first} on {_and(worse)}"
        )
    claimed = " and ".join(parts)
    if not unclear:
        return claimed
    if claimed:
        return f"{claimed}, and no difference can be claimed on {_and(unclear)}"
    return f"no difference between {first} and {second} can be claimed on {_and(unclear)}"


def _evidence(row: Difference, confidence: float) -> str:
    change = row.difference
    prompts = f"{change.prompts} prompt{_s(change.prompts)}"
    if change.value is None:
        return f"{row.metric} (no scores of the same prompts)"
    if change.prompts < _fewest_prompts(confidence):
        return f"{row.metric} ({prompts}, too few to tell)"
    interval = ""
    if change.low is not None and change.high is not None:
        ends = f"{shown(_rounded(change.low))} to {shown(_rounded(change.high))}"
        interval = f"{_percent(confidence)} interval {ends}, "
    return f"{row.metric} ({_signed(change.value)}, {interval}{prompts})"


def _fewest_prompts(confidence: float) -> int:
    """Return the fewest prompts of which Wilcoxon's test, all won, can show a difference."""
    return math.floor(1 - math.log2(1 - confidence)) + 1


def _notes(
    runs: Sequence[RunRows],
    labels: Sequence[str],
    pairs: Sequence[Pair],
    rows: Sequence[Difference],
    differing: Sequence[Differing],
) -> Iterator[str]:
    """Yield what a reader should know before the numbers are used."""
    same = {name: earlier for earlier, name in same_runs(runs)}
    yield from (f"{name} is the same run as {earlier}" for name, earlier in same.items())
    yield from (f"allowed to differ: {found.message}" for found in differing)
    yield from different_environments(runs)
    yield from unknown_weights(labels, runs)
    yield from _categories_left_out(runs)
    yield from shared_scores(labels, runs)
    yield from several_of_one_seed(runs)
    yield from dict.fromkeys(_pair_by_text(pair) for pair in pairs if pair.prompts_with_two_ids())
    first, *others = [(run.name, set(run.rows["image_sha256"].dropna())) for run in runs]
    for name, pictures in others:
        if pictures and pictures == first[1] and same.get(name) != first[0]:
            yield f"{first[0]} and {name} hold the very same pictures"
    for run in runs:
        more = [label for label in run.results.metrics if label not in labels and len(run.of(label))]
        if more:
            yield f"not compared, but scored in {run.name}: {', '.join(more)}"
    for row in rows:
        change = row.difference
        if 1 < change.prompts < _FEW_PROMPTS:
            yield f"{row.metric}: intervals of fewer than {_FEW_PROMPTS} prompts are too narrow"
        if change.prompts > 1 and change.value is not None and change.low == change.high:
            amount = f"differ by the same {shown(change.value)}" if change.value else "are equal"
            yield f"{row.metric}: all {change.prompts} prompts {amount}, so the interval has no width"


def _rounded(value: float | None) -> float | None:
    """Return three significant digits, which is more than an interval of prompts supports."""
    return None if value is None else float(f"{value:.3g}")


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _and(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def _as_names(names: Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)

"""The formulas of a comparison, on plain arrays: means over prompts, intervals, p-values, strengths.

Pictures of one prompt are alike, so they are no independent observations: scores are first averaged per
prompt (:func:`prompt_means`), and every formula below takes one value per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = [
    "Estimate",
    "bradley_terry",
    "bradley_terry_intervals",
    "difference_of_means",
    "effect_size",
    "estimate_mean",
    "estimate_win_rate",
    "holm",
    "outcomes",
    "prompt_means",
    "standard_error",
    "wilcoxon_p",
]

Floats: TypeAlias = npt.NDArray[np.float64]

_ROUNDING = 1e-12
"""Means of the same scores in another order differ by less than this, relative to their size."""

_CONVERGED = 1e-10
"""Strengths that move by less in a step are found."""

_RESAMPLED_AT_ONCE = 4_000_000
"""Values in memory at once while resampling: 32 MB."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. None is "not known", never a number that stands for it.

    Attributes:
        value: The estimate; None without a prompt.
        low: Lower end of the interval; None below two prompts, and where there is no interval.
        high: Upper end, likewise.
        prompts: On how many prompts it stands.
        images: On how many images of each run it stands; of the run with fewer, where that differs.
    """

    value: float | None
    low: float | None
    high: float | None
    prompts: int
    images: int


def prompt_means(prompts: Sequence[str], scores: Sequence[float]) -> tuple[list[str], Floats]:
    """Average the scores of each prompt.

    Args:
        prompts: N identifiers.
        scores: N finite scores.

    Returns:
        The P different identifiers, sorted, and their means ``[P]``. The order of the input does not
        matter, not even for the last bit.
    """
    values = np.asarray(scores, dtype=np.float64)
    known, index = np.unique(np.asarray(prompts, dtype=np.str_), return_inverse=True)
    ends = np.cumsum(np.bincount(index, minlength=len(known)))[:-1]
    groups = np.split(values[np.argsort(index, kind="stable")], ends) if len(known) else []
    # Of scores that nearly cancel out, a plain sum leaves little but rounding.
    return known.tolist(), np.array([math.fsum(group) / len(group) for group in groups])


def difference_of_means(first: Floats, second: Floats) -> Floats:
    """Return ``second - first`` per prompt; what only rounding tells apart is 0, a tie."""
    same = np.isclose(first, second, rtol=_ROUNDING, atol=0)
    return np.where(same, 0.0, second - first)


def standard_error(values: Floats) -> float | None:
    """Return the standard error of the mean of one value per prompt; None below two.

    With equally many images per prompt it is the clustered standard error of the images' mean, clusters
    being prompts.
    """
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def effect_size(differences: Floats) -> float | None:
    """Return the mean of the differences in their standard deviations (Cohen's d of pairs).

    None below two prompts, and where the differences do not spread.
    """
    if len(differences) < 2 or _is_constant(differences):
        return None
    return float(np.mean(differences) / np.std(differences, ddof=1))


def estimate_mean(
    values: Floats, *, confidence: float, seed: int, resamples: int, images: int
) -> Estimate:
    """Estimate a mean over prompts, with its bootstrap interval (BCa, Efron 1987).

    Values that are all equal have an interval without width, which says nothing about other prompts.

    Args:
        values: One per prompt.
        confidence: Share of intervals that cover the true mean, in repeated experiments.
        seed: Of the resampling; prompts resampled with one seed are the same for all metrics.
        resamples: How often the prompts are drawn anew.
        images: Recorded in the estimate.
    """
    if not len(values):
        return Estimate(None, None, None, 0, images)
    value = float(np.mean(values))
    if len(values) < 2:
        return Estimate(value, None, None, len(values), images)
    if _is_constant(values):
        value = float(values[0])
        return Estimate(value, value, value, len(values), images)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=_batch(len(values)),
        confidence_level=confidence,
        method="BCa",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, _finite(interval.low), _finite(interval.high), len(values), images)


def outcomes(gains: Floats) -> Floats:
    """Return 1 per prompt that is won, 0.5 per tie and 0 per prompt that is lost.

    Args:
        gains: One per prompt, above 0 where it is won.
    """
    return (np.sign(gains) + 1) / 2


def estimate_win_rate(
    gains: Floats, *, confidence: float, seed: int, resamples: int, images: int
) -> Estimate:
    """Estimate the share of prompts that are won, ties counting half, with its bootstrap interval.

    Where every prompt is won, or every prompt lost, resampling shows no spread however few prompts there
    are; the interval is the exact binomial one then (Clopper and Pearson 1934).

    Args:
        gains: One per prompt, above 0 where it is won.
        confidence: See :func:`estimate_mean`, as the rest.
        seed: See there.
        resamples: See there.
        images: See there.
    """
    won = outcomes(gains)
    rate = estimate_mean(won, confidence=confidence, seed=seed, resamples=resamples, images=images)
    if len(won) < 2 or rate.value not in (0.0, 1.0):
        return rate
    exact = stats.binomtest(int(won.sum()), len(won)).proportion_ci(confidence)
    return Estimate(rate.value, float(exact.low), float(exact.high), len(won), images)


def wilcoxon_p(differences: Floats) -> float | None:
    """Return the two-sided p-value of Wilcoxon's signed-rank test.

    Prompts without a difference say nothing and are left out; if none differs, p is 1. The distribution
    is exact up to 50 prompts, or up to 13 where sizes of differences are tied, and normal above that.

    Args:
        differences: One per prompt.

    Returns:
        The p-value; None below two prompts.
    """
    if len(differences) < 2:
        return None
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    ranks = stats.rankdata(np.abs(moved))
    # scipy is exact where nothing is tied; with ties, as scores of judges have, older versions are not.
    if len(moved) <= 13 and len(np.unique(ranks)) < len(ranks):
        return _sign_flip_p(np.sign(moved), ranks)
    return float(stats.wilcoxon(moved).pvalue)


def _sign_flip_p(signs: Floats, ranks: Floats) -> float:
    """Return the exact p-value of the signed-rank sum, over all 2^n signs."""
    flips = 1 - 2.0 * ((np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks))) & 1)
    return float(np.mean(np.abs(flips @ ranks) >= abs(signs @ ranks)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for their number, so that the chance of any false alarm stays bounded (Holm 1979).

    Args:
        p_values: Those of one family; None, where nothing was tested, stays None and does not count.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[index] = largest
    return adjusted


def bradley_terry(wins: npt.NDArray[Any]) -> Floats:
    """Fit the strengths of K runs to how often each beat each other (Bradley and Terry 1952).

    The chance that a run beats another is ``1 / (1 + exp(other - own))``. The order of games does not
    matter, unlike in Elo's updates.

    Args:
        wins: ``[..., K, K]``: how often the run of the row beat that of the column; a tie is half a win
            for both. The diagonal is not read.

    Returns:
        ``[..., K]`` natural logarithms of the strengths, with mean 0. NaN where a group of runs never
        lost, or never won, against the others: their distance has no bound then.
    """
    wins = np.asarray(wins, dtype=np.float64) * (1 - np.eye(wins.shape[-1]))
    solvable = _is_strongly_connected(wins)
    wins = np.where(solvable[..., None, None], wins, 1 - np.eye(wins.shape[-1]))
    games = wins + np.swapaxes(wins, -1, -2)
    won = wins.sum(axis=-1)
    logs = np.zeros(won.shape)
    # Hunter 2004: each step makes the games more likely, so it arrives from anywhere.
    for _ in range(10_000):
        strengths = np.exp(logs)
        expected = (games / (strengths[..., :, None] + strengths[..., None, :])).sum(axis=-1)
        new = np.log(won / expected)
        new -= new.mean(axis=-1, keepdims=True)
        moved = float(np.max(np.abs(new - logs), initial=0))
        logs = new
        if moved < _CONVERGED:
            break
    # What is left of a strength of 0 is rounding.
    logs = np.where(np.abs(logs) < 10 * _CONVERGED, 0.0, logs)
    return np.where(solvable[..., None], logs, np.nan)


def bradley_terry_intervals(
    wins: npt.NDArray[Any], *, confidence: float, seed: int, resamples: int
) -> Floats:
    """Return percentile bootstrap intervals of the strengths, resampling prompts.

    Args:
        wins: ``[P, K, K]``: the wins of each prompt, see :func:`bradley_terry`.
        confidence: See :func:`estimate_mean`.
        seed: See there.
        resamples: See there.

    Returns:
        ``[K, 2]``. NaN below two prompts, and where more than ``(1 - confidence) / 2`` of the resamples
        have no strengths.
    """
    prompts, runs = wins.shape[0], wins.shape[-1]
    if prompts < 2:
        return np.full((runs, 2), np.nan)
    strengths = np.concatenate(
        [
            bradley_terry((counts @ wins.reshape(prompts, -1)).reshape(-1, runs, runs))
            for counts in _counts_of_resamples(prompts, resamples, seed)
        ]
    )
    solved = strengths[~np.isnan(strengths[:, 0])]
    tail = (1 - confidence) / 2
    if len(strengths) - len(solved) > tail * len(strengths):
        return np.full((runs, 2), np.nan)
    intervals: Floats = np.quantile(solved, [tail, 1 - tail], axis=0).T
    return intervals


def _counts_of_resamples(prompts: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield ``[B, P]``, how often each prompt is drawn, for all resamples in parts."""
    generator = np.random.default_rng(seed)
    batch = _batch(prompts)
    for start in range(0, resamples, batch):
        size = min(batch, resamples - start)
        yield generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=size).astype(np.float64)


def _is_strongly_connected(wins: Floats) -> npt.NDArray[np.bool_]:
    """Whether chains of wins lead from every run to every other, ``[..., K, K]`` to ``[...]``."""
    runs = wins.shape[-1]
    reached = ((wins > 0) | np.eye(runs, dtype=bool)).astype(np.float64)
    for _ in range(runs.bit_length()):
        reached = np.minimum(reached @ reached, 1)
    return np.asarray((reached > 0).all(axis=(-1, -2)))


def _batch(values: int) -> int:
    return max(1, _RESAMPLED_AT_ONCE // values)


def _is_constant(values: Floats) -> bool:
    return bool(np.allclose(values, values[0], rtol=_ROUNDING, atol=0))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

"""How the scores of one metric are made comparable with those of another before they are added."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

from torch import Tensor

from diffsynth_metrics.rewards.scoring import Scored

__all__ = [
    "FixedScale",
    "GroupRelative",
    "Groups",
    "Normalization",
    "Rank",
    "collapsed",
    "find_normalization",
]

Groups: TypeAlias = "Sequence[Sequence[int]]"
"""The numbers of the samples of each group."""


class Normalization(ABC):
    """Maps the scores of a batch to what is weighted and added.

    NaN stays NaN and influences no other sample. A value depends on the scores of the call alone.
    """

    differentiable = True
    within_groups = False
    """Whether a sample's value depends on the other samples of its group."""
    group_size: int | None = None
    """How many samples a group must have; None where nobody said it."""

    @abstractmethod
    def __call__(self, scored: Scored, groups: Groups) -> Tensor:
        """Normalise N scores; gradients flow to the scores, and none through statistics of them.

        Statistics are of the plain numbers: a device is waited for once, and not after each operation.
        Every sample is in one of `groups`.
        """


@dataclass
class FixedScale(Normalization):
    """(score - mean) / std with numbers that never change; by default the score as it is."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean must be finite and std positive, got {self.mean!r} and {self.std!r}")

    def __call__(self, scored: Scored, groups: Groups) -> Tensor:
        """Return (scores - mean) / std."""
        return (scored.values - self.mean) / self.std


@dataclass
class GroupRelative(Normalization):
    """(score - mean of the group) / (std of the group + epsilon), the advantage of GRPO.

    Attributes:
        epsilon: Keeps small spreads small; 1e-4 as in flow_grpo and TRL.
        correction: 0 divides the squares by N, as flow_grpo does; 1 by N - 1, as TRL does.
        group_size: How many samples every group must have; a call with another number is an error.
    """

    epsilon: float = 1e-4
    correction: int = 0
    group_size: int | None = None
    within_groups = True

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_group_size(self.group_size)
        if self.correction not in (0, 1):
            raise ValueError(f"correction must be 0 or 1, got {self.correction!r}")

    def __call__(self, scored: Scored, groups: Groups) -> Tensor:
        """Return advantages; 0 in a group whose scores are all equal."""
        values, numbers = scored.values, scored.numbers
        means, divisors = [0.0] * len(numbers), [1.0] * len(numbers)
        for group in groups:
            mean, divisor = self._mean_and_divisor(_known(numbers, group))
            for index in group:
                means[index], divisors[index] = mean, divisor
        return (values - values.new_tensor(means)) / values.new_tensor(divisors)

    def _mean_and_divisor(self, values: list[float]) -> tuple[float, float]:
        if not values or _all_equal(values):
            return (values or [0.0])[0], math.inf
        mean = fmean(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return mean, math.sqrt(squares / (len(values) - self.correction)) + self.epsilon


@dataclass
class Rank(Normalization):
    """The rank in the group, from 0 (worst) to 1 (best); equal scores share the mean of their ranks.

    A sample that is alone in its group gets 0.5, and so do all of a group whose scores differ by
    rounding only. Ranks have no gradient.

    Attributes:
        group_size: How many samples every group must have; a call with another number is an error.
    """

    group_size: int | None = None
    differentiable = False
    within_groups = True

    def __post_init__(self) -> None:
        """Check the setting."""
        _check_group_size(self.group_size)

    def __call__(self, scored: Scored, groups: Groups) -> Tensor:
        """Return ranks."""
        numbers = scored.numbers
        ranks = [0.0] * len(numbers)
        for group in groups:
            known = sorted(_known(numbers, group))
            if known and _all_equal(known):
                known = known[:1]
            for index in group:
                ranks[index] = _rank(numbers[index], known)
        return scored.values.new_tensor(ranks)


def _check_group_size(group_size: int | None) -> None:
    if group_size is not None and (isinstance(group_size, bool) or group_size < 2):
        raise ValueError(f"group_size must be at least 2, got {group_size!r}")


def _rank(score: float, group: list[float]) -> float:
    """Return the rank of a score among the sorted ones of its group, of which it is one."""
    if math.isnan(score):
        return score
    others = len(group) - 1
    below = bisect_left(group, score)
    equal = bisect_right(group, score) - below - 1
    return (below + equal / 2) / others if others else 0.5


_BY_NAME: dict[str, Callable[[], Normalization]] = {
    "none": FixedScale,
    "group": GroupRelative,
    "rank": Rank,
}


def find_normalization(normalize: str | Normalization) -> Normalization:
    """Return a normalisation of one's own, by its short name or as it is.

    Raises:
        ValueError: It is neither a name nor a normalisation.
    """
    if isinstance(normalize, Normalization):
        return normalize
    if normalize not in _BY_NAME:
        raise ValueError(
            f"normalize must be one of {', '.join(_BY_NAME)}, or a Normalization such as "
            f"FixedScale(mean, std); got {normalize!r}"
        )
    return _BY_NAME[normalize]()


def collapsed(scores: list[float], groups: Groups, *, alone: bool) -> list[int]:
    """Return which groups say nothing: their readable scores are all equal.

    A group of one readable score is among them if `alone` says so.
    """
    fewest = 1 if alone else 2
    known = [_known(scores, group) for group in groups]
    return [i for i, values in enumerate(known) if len(values) >= fewest and _all_equal(values)]


def _known(scores: list[float], group: Sequence[int]) -> list[float]:
    """Return the scores of a group that are not NaN."""
    return [scores[index] for index in group if not math.isnan(scores[index])]


def _all_equal(values: list[float]) -> bool:
    """Tell whether scores are equal up to the noise of float32 arithmetic."""
    return math.isclose(min(values), max(values), rel_tol=1e-6, abs_tol=1e-6)

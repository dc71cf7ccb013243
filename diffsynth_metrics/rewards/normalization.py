"""How the scores of one metric are made comparable with those of another before they are added."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from diffsynth_metrics.rewards.scoring import Scored

__all__ = [
    "FixedScale",
    "GroupRelative",
    "Groups",
    "Moments",
    "Normalization",
    "Rank",
    "Raw",
    "RunningZScore",
    "collapsed",
    "find_normalization",
]

# One for all running statistics: it is held for microseconds, and without a lock of their own they can
# be copied and pickled.
_LOCK = threading.Lock()

Groups: TypeAlias = "Sequence[Sequence[int]]"
"""The numbers of the samples of each group."""


class Normalization(ABC):
    """Maps the scores of a batch to what is weighted and added.

    NaN stays NaN and influences no other sample. An object belongs to one component of one set.
    """

    differentiable = True
    within_groups = False
    """Whether a sample's value depends on the other samples of its call."""

    @property
    def is_ready(self) -> bool:
        """Whether it can normalise scores without learning from them."""
        return True

    @abstractmethod
    def __call__(self, scored: Scored, groups: Groups, *, update: bool) -> Tensor:
        """Normalise scores; gradients flow to the scores, and none through statistics of them.

        Args:
            scored: N scores, NaN where there is none. Statistics are computed from its plain numbers: a
                device is waited for once, and not after each operation on a few numbers.
            groups: The samples of each group; every sample is in one.
            update: Whether running statistics learn from these scores.
        """

    def state_dict(self) -> dict[str, list[float]]:
        """Return the running statistics as plain numbers; most normalisations have none."""
        return {}

    def check_state_dict(self, state: dict[str, list[float]]) -> None:
        """Check that :meth:`load_state_dict` can take a state.

        Raises:
            ValueError: It belongs to another normalisation.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"the state of {type(self).__name__} has {sorted(self.state_dict())}, "
                f"got {sorted(state)}"
            )

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take what :meth:`state_dict` returned, see :meth:`check_state_dict`."""
        self.check_state_dict(state)


class Raw(Normalization):
    """Leaves scores as they are."""

    def __call__(self, scored: Scored, groups: Groups, *, update: bool) -> Tensor:
        """Return the scores."""
        return scored.values


@dataclass
class FixedScale(Normalization):
    """(score - mean) / std with numbers that never change.

    Attributes:
        mean: What becomes 0.
        std: What becomes 1; positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean must be finite and std positive, got {self.mean!r} and {self.std!r}")

    def __call__(self, scored: Scored, groups: Groups, *, update: bool) -> Tensor:
        """Return (scores - mean) / std."""
        return (scored.values - self.mean) / self.std


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations of some scores, in float64.

    Attributes:
        count: How many scores.
        mean: Their mean.
        squares: The sum of their squared distances from the mean.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, scores: Iterable[float]) -> Moments:
        """Return the moments of the scores that are not NaN."""
        values = [score for score in scores if not math.isnan(score)]
        if not values:
            return cls()
        mean = math.fsum(values) / len(values)
        return cls(float(len(values)), mean, math.fsum((value - mean) ** 2 for value in values))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both lots together."""
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        distance = other.mean - self.mean
        return Moments(
            count,
            self.mean + distance * other.count / count,
            self.squares + other.squares + distance**2 * self.count * other.count / count,
        )

    @property
    def std(self) -> float:
        """The standard deviation (of the population)."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def as_list(self) -> list[float]:
        """Return the three numbers."""
        return [self.count, self.mean, self.squares]


class RunningZScore(Normalization):
    """(score - mean) / std over all scores seen so far, those of this call included.

    Statistics are those of this process until :meth:`RewardSet.synchronize` is called; what was
    learned since the last time is kept apart, so that nothing is counted twice.
    """

    def __init__(self) -> None:
        """Start without statistics."""
        self.shared = Moments()
        self._offered = Moments()  # what a synchronisation that has not succeeded yet tells the others
        self._local = Moments()

    @property
    def since_synchronization(self) -> Moments:
        """What this process learned since the last synchronisation."""
        return self._offered.merge(self._local)

    @property
    def moments(self) -> Moments:
        """Everything that this process knows."""
        return self.shared.merge(self.since_synchronization)

    @property
    def is_ready(self) -> bool:
        """Whether a score has been seen."""
        return self.moments.count > 0

    def __call__(self, scored: Scored, groups: Groups, *, update: bool) -> Tensor:
        """Learn if wanted, and return z-scores; 0 while all scores seen are equal, NaN before any."""
        with _LOCK:
            if update:
                self._local = self._local.merge(Moments.of(scored.numbers))
            moments = self.moments
        if not moments.count:
            return scored.values.new_full(scored.values.shape, math.nan)
        if moments.std <= 1e-6 * max(1.0, abs(moments.mean)):
            return (scored.values - moments.mean) * 0
        return (scored.values - moments.mean) / moments.std

    def offer_local(self) -> Moments:
        """Return what was learned since the last synchronisation, to be told to all processes.

        It is kept until :meth:`add_shared`, so that a synchronisation that fails loses nothing.
        """
        with _LOCK:
            self._offered, self._local = self.since_synchronization, Moments()
            return self._offered

    def add_shared(self, others: Sequence[Moments]) -> None:
        """Learn what all processes offered, this one included, in the order of their ranks."""
        with _LOCK:
            self._offered = Moments()
            for moments in others:
                self.shared = self.shared.merge(moments)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the statistics as plain numbers."""
        with _LOCK:
            return {
                "shared": self.shared.as_list(),
                "since_synchronization": self.since_synchronization.as_list(),
            }

    def check_state_dict(self, state: dict[str, list[float]]) -> None:
        """Check that the state has three sound numbers for each of the two moments."""
        super().check_state_dict(state)
        for name, numbers in state.items():
            if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or min(numbers[::2]) < 0:
                raise ValueError(f"{name!r} must be a count, a mean and squares, got {numbers!r}")

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take what :meth:`state_dict` returned, all of it as shared.

        Every rank loads the same file: told to the others again, it would count once per rank.
        """
        super().load_state_dict(state)
        with _LOCK:
            self.shared = Moments(*state["shared"]).merge(Moments(*state["since_synchronization"]))
            self._offered = self._local = Moments()


@dataclass
class GroupRelative(Normalization):
    """(score - mean of the group) / (std of the group + epsilon), the advantage of GRPO.

    Attributes:
        epsilon: Keeps small spreads small; 1e-4 as in flow_grpo and TRL.
        correction: 0 divides the squares by N, as flow_grpo does; 1 by N - 1, as TRL does.
    """

    epsilon: float = 1e-4
    correction: int = 0
    within_groups = True

    def __post_init__(self) -> None:
        """Check the correction."""
        if self.correction not in (0, 1):
            raise ValueError(f"correction must be 0 or 1, got {self.correction!r}")

    def __call__(self, scored: Scored, groups: Groups, *, update: bool) -> Tensor:
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
        moments = Moments.of(values)
        return moments.mean, math.sqrt(moments.squares / (len(values) - self.correction)) + self.epsilon


class Rank(Normalization):
    """The rank in the group, from 0 (worst) to 1 (best); equal scores share the mean of their ranks.

    A sample that is alone in its group gets 0.5. Ranks have no gradient.
    """

    differentiable = False
    within_groups = True

    def __call__(self, scored: Scored, groups: Groups, *, update: bool) -> Tensor:
        """Return ranks."""
        numbers = scored.numbers
        ranks = [0.0] * len(numbers)
        for group in groups:
            known = sorted(_known(numbers, group))
            for index in group:
                ranks[index] = _rank(numbers[index], known)
        return scored.values.new_tensor(ranks)


def _rank(score: float, group: list[float]) -> float:
    """Return the rank of a score among the sorted ones of its group, of which it is one."""
    if math.isnan(score):
        return score
    others = len(group) - 1
    below = bisect_left(group, score)
    equal = bisect_right(group, score) - below - 1
    return (below + equal / 2) / others if others else 0.5


_BY_NAME: dict[str, Callable[[], Normalization]] = {
    "none": Raw,
    "zscore": RunningZScore,
    "group": GroupRelative,
    "rank": Rank,
}


def find_normalization(normalize: str | Normalization) -> Normalization:
    """Return a normalisation of one's own, by its short name or as it is.

    Raises:
        ValueError: The name is unknown.
        TypeError: It is no normalisation.
    """
    if isinstance(normalize, Normalization):
        return normalize
    if not isinstance(normalize, str):
        raise TypeError(f"normalize must be a name or a Normalization, got {normalize!r}")
    if normalize not in _BY_NAME:
        raise ValueError(
            f"normalize must be one of {', '.join(_BY_NAME)}, or FixedScale(mean, std); "
            f"got {normalize!r}"
        )
    return _BY_NAME[normalize]()


def collapsed(scores: list[float], groups: Groups) -> list[int]:
    """Return which groups of two readable samples or more have scores that are all equal."""
    known = [_known(scores, group) for group in groups]
    return [index for index, values in enumerate(known) if len(values) > 1 and _all_equal(values)]


def _known(scores: list[float], group: Sequence[int]) -> list[float]:
    """Return the scores of a group that are not NaN."""
    return [scores[index] for index in group if not math.isnan(scores[index])]


def _all_equal(values: list[float]) -> bool:
    """Tell whether scores are equal up to the noise of float32 arithmetic."""
    return math.isclose(min(values), max(values), rel_tol=1e-6, abs_tol=1e-6)

"""How the scores of one metric are made comparable with those of another before they are added."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FixedScale",
    "GroupRelative",
    "Moments",
    "Normalization",
    "Rank",
    "Raw",
    "RunningZScore",
    "find_normalization",
    "spread",
]


class Normalization(ABC):
    """Maps the scores of a batch to what is weighted and added.

    NaN stays NaN and influences no other sample. An object belongs to one component of one set.
    """

    differentiable = True
    within_groups = False
    """Whether a sample's value depends on the other samples of its call."""

    @abstractmethod
    def __call__(self, scores: Tensor, groups: Tensor, *, update: bool) -> Tensor:
        """Normalise scores.

        Args:
            scores: ``[N]``, NaN where there is none.
            groups: ``[N]`` int64, equal for samples of one group.
            update: Whether running statistics learn from these scores.
        """

    def state_dict(self) -> dict[str, list[float]]:
        """Return the running statistics as plain numbers; most normalisations have none."""
        return {}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take what :meth:`state_dict` returned.

        Raises:
            ValueError: It belongs to another normalisation.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"the state of {type(self).__name__} has {sorted(self.state_dict())}, "
                f"got {sorted(state)}"
            )


class Raw(Normalization):
    """Leaves scores as they are."""

    def __call__(self, scores: Tensor, groups: Tensor, *, update: bool) -> Tensor:
        """Return the scores."""
        return scores


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

    def __call__(self, scores: Tensor, groups: Tensor, *, update: bool) -> Tensor:
        """Return (scores - mean) / std."""
        return (scores - self.mean) / self.std


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
    def of(cls, scores: Tensor) -> Moments:
        """Return the moments of the scores that are not NaN."""
        values = scores.detach().double()
        values = values[~values.isnan()]
        if not len(values):
            return cls()
        mean = values.mean()
        return cls(float(len(values)), float(mean), float((values - mean).square().sum()))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both lots together."""
        count = self.count + other.count
        if not count:
            return self
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
        self._lock = threading.Lock()
        self.shared = Moments()
        self.since_synchronization = Moments()

    @property
    def moments(self) -> Moments:
        """Everything that this process knows."""
        return self.shared.merge(self.since_synchronization)

    def __call__(self, scores: Tensor, groups: Tensor, *, update: bool) -> Tensor:
        """Learn if wanted, and return z-scores; 0 while all scores seen are equal."""
        with self._lock:
            if update:
                self.since_synchronization = self.since_synchronization.merge(Moments.of(scores))
            moments = self.moments
        if moments.std <= 1e-6 * max(1.0, abs(moments.mean)):
            return (scores - moments.mean) * 0
        return (scores - moments.mean) / moments.std

    def take_local(self) -> Moments:
        """Return what was learned since the last synchronisation, and forget it."""
        with self._lock:
            local, self.since_synchronization = self.since_synchronization, Moments()
            return local

    def add_shared(self, others: Sequence[Moments]) -> None:
        """Learn what all processes learned, in the order of their ranks."""
        with self._lock:
            for moments in others:
                self.shared = self.shared.merge(moments)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the statistics as plain numbers."""
        with self._lock:
            return {
                "shared": self.shared.as_list(),
                "since_synchronization": self.since_synchronization.as_list(),
            }

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        with self._lock:
            self.shared = Moments(*state["shared"])
            self.since_synchronization = Moments(*state["since_synchronization"])


@dataclass
class GroupRelative(Normalization):
    """(score - mean of the group) / (std of the group + epsilon), the advantage of GRPO.

    Attributes:
        epsilon: Keeps small spreads small; 1e-4 as in flow_grpo and TRL.
    """

    epsilon: float = 1e-4
    within_groups = True

    def __call__(self, scores: Tensor, groups: Tensor, *, update: bool) -> Tensor:
        """Return advantages; 0 in a group whose scores are all equal."""
        result = torch.full_like(scores, math.nan)
        for members in _members(groups):
            known = members[~scores[members].isnan()]
            values = scores[known]
            if len(known) and not _collapsed(values):
                values = (values - values.mean()) / (values.std(correction=0) + self.epsilon)
            else:
                values = values * 0
            result = result.index_put((known,), values)
        return result


class Rank(Normalization):
    """The rank in the group, from 0 (worst) to 1 (best); equal scores share the mean of their ranks.

    A sample that is alone in its group gets 0.5. Ranks have no gradient.
    """

    differentiable = False
    within_groups = True

    def __call__(self, scores: Tensor, groups: Tensor, *, update: bool) -> Tensor:
        """Return ranks."""
        scores = scores.detach()
        result = torch.full_like(scores, math.nan)
        for members in _members(groups):
            known = members[~scores[members].isnan()]
            values = scores[known]
            below = (values[None] < values[:, None]).sum(dim=1)
            equal = (values[None] == values[:, None]).sum(dim=1) - 1
            ranks = (below + equal / 2) / max(1, len(known) - 1)
            result[known] = ranks.to(scores.dtype) if len(known) > 1 else 0.5
        return result


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


def spread(scores: Tensor, groups: Tensor) -> list[tuple[int, bool]]:
    """Tell for each group of two readable samples or more whether all its scores are equal.

    Returns:
        Pairs of the group's number and whether it has collapsed.
    """
    # In Python, because many small groups would be many small operations on the device.
    ranges: dict[int, tuple[int, float, float]] = {}
    for group, score in zip(groups.tolist(), scores.detach().tolist(), strict=True):
        if not math.isnan(score):
            count, low, high = ranges.get(group, (0, score, score))
            ranges[group] = (count + 1, min(low, score), max(high, score))
    return [
        (group, _equal(low, high)) for group, (count, low, high) in sorted(ranges.items()) if count > 1
    ]


def _members(groups: Tensor) -> list[Tensor]:
    """Return the positions of each group's samples."""
    return [(groups == group).nonzero().squeeze(1) for group in sorted(set(groups.tolist()))]


def _collapsed(values: Tensor) -> bool:
    low, high = values.detach().aminmax()
    return _equal(float(low), float(high))


def _equal(low: float, high: float) -> bool:
    """Tell whether scores are equal up to the noise of float32 arithmetic."""
    return high - low <= 1e-6 * max(1.0, abs(high))

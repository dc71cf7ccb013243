"""How the scores of one metric are made comparable with those of another before they are added."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
    def __call__(
        self, scores: Tensor, groups: Sequence[int], *, update: bool, counted: Tensor | None = None
    ) -> Tensor:
        """Normalise scores; gradients flow to the scores, and none through statistics of them.

        Args:
            scores: ``[N]``, NaN where there is none.
            groups: N numbers, equal for samples of one group.
            update: Whether running statistics learn from these scores.
            counted: ``[N]`` bool, which scores statistics are of; by default all of them. The others
                are normalised with what is known without them.
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

    def __call__(
        self, scores: Tensor, groups: Sequence[int], *, update: bool, counted: Tensor | None = None
    ) -> Tensor:
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

    def __call__(
        self, scores: Tensor, groups: Sequence[int], *, update: bool, counted: Tensor | None = None
    ) -> Tensor:
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
        # In Python, as the other statistics here: a device would be waited for after each operation.
        return cls.of_values([score for score in scores.detach().tolist() if not math.isnan(score)])

    @classmethod
    def of_values(cls, values: list[float]) -> Moments:
        """Return the moments of numbers."""
        if not values:
            return cls()
        mean = math.fsum(values) / len(values)
        return cls(float(len(values)), mean, math.fsum((value - mean) ** 2 for value in values))

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

    def __call__(
        self, scores: Tensor, groups: Sequence[int], *, update: bool, counted: Tensor | None = None
    ) -> Tensor:
        """Learn if wanted, and return z-scores; 0 while all scores seen are equal."""
        with self._lock:
            if update:
                new = Moments.of(scores if counted is None else scores[counted])
                self._local = self._local.merge(new)
            moments = self.moments
        if moments.std <= 1e-6 * max(1.0, abs(moments.mean)):
            return (scores - moments.mean) * 0
        return (scores - moments.mean) / moments.std

    def offer_local(self) -> Moments:
        """Return what was learned since the last synchronisation, to be told to all processes.

        It is kept until :meth:`add_shared`, so that a synchronisation that fails loses nothing.
        """
        with self._lock:
            self._offered, self._local = self.since_synchronization, Moments()
            return self._offered

    def add_shared(self, others: Sequence[Moments]) -> None:
        """Learn what all processes offered, this one included, in the order of their ranks."""
        with self._lock:
            self._offered = Moments()
            for moments in others:
                self.shared = self.shared.merge(moments)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the statistics as plain numbers."""
        with self._lock:
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
        with self._lock:
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

    def __call__(
        self, scores: Tensor, groups: Sequence[int], *, update: bool, counted: Tensor | None = None
    ) -> Tensor:
        """Return advantages; 0 in a group whose scores are all equal."""
        known: dict[int, list[float]] = {group: [] for group in groups}
        counts = [True] * len(groups) if counted is None else counted.tolist()
        for group, score, is_counted in zip(groups, scores.detach().tolist(), counts, strict=True):
            if is_counted and not math.isnan(score):
                known[group].append(score)
        parts = {group: self._mean_and_divisor(values) for group, values in known.items()}
        mean, divisor = scores.new_tensor([parts[group] for group in groups]).T
        advantages: Tensor = (scores - mean) / divisor
        return advantages

    def _mean_and_divisor(self, values: list[float]) -> tuple[float, float]:
        if not values or _equal(min(values), max(values)):
            return (values or [0.0])[0], math.inf
        moments = Moments.of_values(values)
        return moments.mean, math.sqrt(moments.squares / (len(values) - self.correction)) + self.epsilon


class Rank(Normalization):
    """The rank in the group, from 0 (worst) to 1 (best); equal scores share the mean of their ranks.

    A sample that is alone in its group gets 0.5. Ranks have no gradient.
    """

    differentiable = False
    within_groups = True

    def __call__(
        self, scores: Tensor, groups: Sequence[int], *, update: bool, counted: Tensor | None = None
    ) -> Tensor:
        """Return ranks."""
        scores = scores.detach()
        result = torch.full_like(scores, math.nan)
        for members, counting in _members(scores, groups, counted):
            values, known = scores[members, None], scores[None, counting]
            others = members[:, None] != counting[None]
            below = ((known < values) & others).sum(dim=1)
            equal = ((known == values) & others).sum(dim=1)
            count = others.sum(dim=1)
            # In whole numbers as long as possible: a quotient of them has the caller's default dtype.
            ranks = (2 * below + equal).to(scores.dtype) / (2 * count.clamp_min(1))
            result[members] = torch.where(count > 0, ranks, 0.5)
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


def spread(scores: Tensor, groups: Sequence[int]) -> list[tuple[int, bool]]:
    """Tell for each group of two readable samples or more whether all its scores are equal.

    Returns:
        Pairs of the group's number and whether it has collapsed.
    """
    if len(set(groups)) == len(groups):
        return []
    # In Python, because many small groups would be many small operations on the device.
    ranges: dict[int, tuple[int, float, float]] = {}
    for group, score in zip(groups, scores.detach().tolist(), strict=True):
        if not math.isnan(score):
            count, low, high = ranges.get(group, (0, score, score))
            ranges[group] = (count + 1, min(low, score), max(high, score))
    return [
        (group, _equal(low, high)) for group, (count, low, high) in sorted(ranges.items()) if count > 1
    ]


def _members(
    scores: Tensor, groups: Sequence[int], counted: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the positions of each group's scores, and of those that its statistics are of."""
    given = ~scores.isnan()
    numbers = torch.tensor(groups, device=scores.device)
    for group in sorted(set(groups)):
        members = (given & (numbers == group)).nonzero().squeeze(1)
        yield members, members if counted is None else members[counted[members]]


def _equal(low: float, high: float) -> bool:
    """Tell whether scores are equal up to the noise of float32 arithmetic."""
    return high - low <= 1e-6 * max(1.0, abs(high))

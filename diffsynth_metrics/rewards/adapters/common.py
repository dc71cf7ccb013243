"""What the adapters share: what they accept, and how they look to a framework."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.rewards.batches import Batch, Frames, as_batch, check_frames
from diffsynth_metrics.rewards.reward_set import RewardSet
from diffsynth_metrics.rewards.scales import ScaleInput
from diffsynth_metrics.rewards.scoring import (
    FailurePolicy,
    MetricScorer,
    Scored,
    apply_failure_policy,
    check_policy,
)

RewardSource: TypeAlias = "BaseMetric | RewardSet | Callable[..., Any]"
"""What becomes a reward: a metric, a :class:`RewardSet`, or a callable of (prompts, images)."""

_Class = TypeVar("_Class", bound=type)


class Function:
    """A callable that pickles, and that frameworks and ``inspect`` take for a function of its name."""

    __defaults__ = None
    __kwdefaults__ = None

    def __init__(self, name: str) -> None:
        """Take the name."""
        self.__name__ = self.__qualname__ = name
        self.__signature__ = inspect.signature(self.__call__)  # type: ignore[operator]

    @property
    def __code__(self) -> CodeType:
        """The code of ``__call__``, which may be a coroutine's or have an argument ``device``."""
        code: CodeType = type(self).__call__.__code__
        return code


class Reward(Function):
    """A source as what a framework calls; `scorer` is what scores."""

    framework: ClassVar[str | None] = None
    """Whose scale is the default."""
    failures_get: ClassVar[FailurePolicy] = "raise"
    """The default of `on_failure`."""
    parts_of_groups: ClassVar[str] = ""
    """Why a call does not have the whole groups of its samples; empty where it may have them."""

    def __init__(
        self,
        source: RewardSource,
        *,
        scale: ScaleInput = "framework",
        on_failure: FailurePolicy | None = None,
        frames: Frames | None = None,
        name: str | None = None,
    ) -> None:
        """Take a metric, a :class:`RewardSet`, or a callable, with the settings that all adapters have.

        Args:
            source: What becomes a reward. A set that normalises within groups is a ValueError where a
                call has no whole groups, or where it has no `group_size` that makes sure of them.
            scale: The scale of a metric's score: the framework's, another's name, a factor, a ``Scale``,
                or None for the score that ``compute`` returns. The components of a set have their own.
            on_failure: What a sample gets that has no score, see ``FailurePolicy``; by default
                ``"raise"``, or ``"nan"`` where the framework leaves such samples out.
            frames: What becomes of the frames of a video, see :meth:`RewardSet.score`.
            name: ``__name__``; by default the metric's, as flow_grpo spells it.
        """
        scale = self.framework if scale == "framework" else scale
        self.scorer = source if isinstance(source, RewardSet) else MetricScorer(source, scale, name)
        if isinstance(source, RewardSet) and source.group_sizes and self.parts_of_groups:
            raise ValueError(f"leave 'group' and 'rank' to the trainer: {self.parts_of_groups}")
        if isinstance(source, RewardSet) and None in source.group_sizes:
            raise ValueError(
                "say how large groups are, as in normalize=GroupRelative(group_size=8): a call that has "
                "parts of groups is then an error"
            )
        self.on_failure = check_policy(self.failures_get if on_failure is None else on_failure)
        self.frames = check_frames(frames)
        super().__init__(name or self.scorer.name)

    def batch(self, prompts: Sequence[str], images: Any, sources: Any = None) -> Batch:
        """Return the samples of a call, floats rounded to bytes."""
        return as_batch(prompts, images, sources, self.frames).as_bytes()

    def score(self, batch: Batch) -> tuple[Tensor, Scored]:
        """Return rewards ``[N]``, of failures what they get, and what the metric said."""
        with torch.no_grad():
            scored = self.scorer.scored(batch)
            return apply_failure_policy(scored, self.on_failure, self.scorer.name), scored


def as_member(made: _Class, name: str, asked_by: Any) -> _Class:
    """Let a class pickle as a member of the module whose frame asked for it, as with ``namedtuple``."""
    made.__name__ = made.__qualname__ = name
    made.__module__ = asked_by.f_back.f_globals.get("__name__", "__main__")
    return made

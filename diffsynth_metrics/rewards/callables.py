"""What the adapters share: what they accept, and the plain functions they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.inputs import as_images, rounded
from diffsynth_metrics.rewards.reward_set import RewardSet
from diffsynth_metrics.rewards.scales import Scale
from diffsynth_metrics.rewards.scoring import (
    FailurePolicy,
    MetricScorer,
    Scored,
    Scorer,
    Update,
    apply_failure_policy,
    check_policy,
    learns,
)

__all__ = ["RewardSource", "as_bytes", "floats_by_policy", "named", "refuse_groups", "scorer_of"]

RewardSource: TypeAlias = "BaseMetric | RewardSet | Callable[[list[str], Any], Any]"
"""What becomes a reward: a metric, a :class:`RewardSet`, or a callable of (prompts, images)."""

ScaleInput: TypeAlias = "str | float | Scale | None"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def scorer_of(source: RewardSource, scale: ScaleInput, name: str | None = None) -> Scorer:
    """Return the scorer of a source; the components of a set have their own scales."""
    return source if isinstance(source, RewardSet) else MetricScorer(source, scale, name)


def refuse_groups(source: RewardSource, why: str) -> None:
    """Refuse a set that normalises over groups where a call has no whole groups.

    Raises:
        ValueError: It does; the message gives `why`.
    """
    if isinstance(source, RewardSet) and source.within_groups:
        raise ValueError(
            f"a RewardSet with 'group' or 'rank' needs whole groups, and {why}; "
            "normalise its rewards afterwards"
        )


def named(function: _Function, name: str) -> _Function:
    """Give a function the name that trainers log."""
    function.__name__ = function.__qualname__ = name
    return function


def floats_by_policy(
    scorer: Scorer, prompts: Sequence[str], images: Any, policy: FailurePolicy, update: Update
) -> tuple[list[float], Scored]:
    """Score without gradients, and give failed samples what the policy says."""
    check_policy(policy)
    with torch.no_grad():
        scored = scorer.scored(prompts, images, update=learns(update))
        values: list[float] = apply_failure_policy(scored, policy, scorer.name).tolist()
    return values, scored


def as_bytes(images: Any) -> Any:
    """Round float pictures to the bytes that are saved.

    flow_grpo's scorers do the same in the precision of the images: of half-precision ones, some bytes
    differ from these by 1.

    A tensor stays on its device. Anything that is not a float picture is returned as it is, and the
    metric says what is wrong with it; the other pictures of its batch are rounded all the same.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.ndim in (3, 4):
        images = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3)
    if isinstance(images, Tensor) and images.is_floating_point():
        try:
            as_images(images)
        except ValueError:
            return [as_bytes(image) for image in images] if images.ndim == 4 else images
        result = torch.empty_like(images, dtype=torch.uint8)
        # One by one, so that what is between stays in a processor's caches.
        for place, image in zip(result, images, strict=True):
            place.copy_(rounded(image))
        return result
    if isinstance(images, (list, tuple)):
        return [as_bytes(image) for image in images]
    return images

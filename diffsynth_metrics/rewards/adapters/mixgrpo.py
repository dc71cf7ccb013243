"""Rewards for MixGRPO, which looks at the name of a reward's class."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from diffsynth_metrics.rewards.adapters.common import Reward, RewardSource
from diffsynth_metrics.rewards.scoring import FailurePolicy

logger = logging.getLogger(__name__)


class _MixGRPOReward(Reward):
    """An entry of MixGRPO's list ``reward_models``, ``(images, prompts) -> N floats``.

    MixGRPO makes every exception the reward 0 and trains on; so none is raised here.
    """

    framework = "mixgrpo"
    failures_get: ClassVar[FailurePolicy] = "nan"
    parts_of_groups = "MixGRPO scores one image per call, and normalises the gathered rewards itself"

    def __init__(self, source: RewardSource, **options: Any) -> None:
        """Take a source, see :class:`Reward`."""
        super().__init__(source, **options)
        if self.on_failure == "raise":
            raise ValueError("on_failure must not be 'raise': MixGRPO would make it the reward 0")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        try:
            return self.score(self.batch(prompts, images))[0].tolist()
        except Exception:
            logger.exception("%s: the call has no rewards", self.scorer.name)
            return [math.nan] * len(images)


# MixGRPO's own names. It calls each class as it is called there, and finds its weight by the name.
class HPSClipRewardModel(_MixGRPOReward):
    """HPSv2."""


class ImageRewardModel(_MixGRPOReward):
    """ImageReward."""


class PickScoreRewardModel(_MixGRPOReward):
    """PickScore."""


class CLIPScoreRewardModel(_MixGRPOReward):
    """CLIP, whose prompts come first."""

    def __call__(self, prompts: Sequence[Any], images: Sequence[Any]) -> Any:  # type: ignore[override]
        """Return rewards."""
        return super().__call__(images, prompts)


class UnifiedRewardModel(_MixGRPOReward):
    """UnifiedReward, which also says which rewards there are: MixGRPO would make the others 0."""

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        """Return rewards, and that there are all of them."""
        return super().__call__(images, prompts), [True] * len(images)


_CLASSES = {
    "CLIPMetric": CLIPScoreRewardModel,
    "HPSv2Metric": HPSClipRewardModel,
    "ImageRewardMetric": ImageRewardModel,
    "PickScoreMetric": PickScoreRewardModel,
    "UnifiedReward2Metric": UnifiedRewardModel,
}


def to_mixgrpo(source: RewardSource, *, stands_for: str | None = None, **options: Any) -> _MixGRPOReward:
    """Make an entry of MixGRPO's list ``reward_models``.

    Args:
        source: A metric, a :class:`RewardSet` without normalisation within groups, or a callable.
        stands_for: The metric of MixGRPO whose name and weight it has, such as ``"HPSv2Metric"``; by
            default its own class. One that MixGRPO does not have is a ValueError.
        **options: What :class:`Reward` takes; `on_failure` is ``"nan"`` by default, which ends a
            training that nobody looks after, and must not be ``"raise"``.
    """
    stands_for = stands_for or type(source).__name__
    if stands_for not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise ValueError(f"pass stands_for= as one of {known}: MixGRPO knows no {stands_for}")
    return _CLASSES[stands_for](source, **options)

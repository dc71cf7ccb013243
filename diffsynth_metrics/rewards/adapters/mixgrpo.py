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
        super().__init__(source, **options)
        if self.on_failure == "raise":
            raise ValueError("on_failure must not be 'raise': MixGRPO would make it the reward 0")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        try:
            return self.score(self.batch(prompts, images))[0].tolist()
        except Exception:
            logger.exception("%s: the call has no rewards", self.scorer.name)
            return [math.nan] * len(images)


class _CLIPReward(_MixGRPOReward):
    def __call__(self, prompts: Any, images: Any) -> Any:  # type: ignore[override]
        return super().__call__(images, prompts)


class _UnifiedReward(_MixGRPOReward):
    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        # It says that all rewards are there: MixGRPO would make the others 0.
        return super().__call__(images, prompts), [True] * len(images)


def _named(name: str, base: type[_MixGRPOReward]) -> type[_MixGRPOReward]:
    return type(name, (base,), {"__module__": __name__})


# By MixGRPO's own names, which say how it calls them and what their weights are.
HPSClipRewardModel = _named("HPSClipRewardModel", _MixGRPOReward)
ImageRewardModel = _named("ImageRewardModel", _MixGRPOReward)
PickScoreRewardModel = _named("PickScoreRewardModel", _MixGRPOReward)
CLIPScoreRewardModel = _named("CLIPScoreRewardModel", _CLIPReward)
UnifiedRewardModel = _named("UnifiedRewardModel", _UnifiedReward)
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
        stands_for: The metric whose name and weight it has in MixGRPO, such as ``"HPSv2Metric"``; by
            default its own class.
        **options: What :class:`Reward` takes; `on_failure` is ``"nan"`` by default, and not ``"raise"``.
    """
    stands_for = stands_for or type(source).__name__
    if stands_for not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise ValueError(f"pass stands_for= as one of {known}: MixGRPO knows no {stands_for}")
    return _CLASSES[stands_for](source, **options)

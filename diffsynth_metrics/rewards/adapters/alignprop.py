"""Rewards for the AlignPropTrainer that TRL had until 0.23, and for its forks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffsynth_metrics.rewards.losses import Loss


class _AlignPropReward(Loss):
    """A ``reward_fn(images, prompts, metadata) -> (reward, {})``, with a graph to the images."""

    def __init__(self, source: Any, *, name: str | None = None, **options: Any) -> None:
        super().__init__(source, name=name, **options)
        self.__name__ = name or self.scorer.name

    def __call__(self, images: Tensor, prompts: Any = None, metadata: Any = None) -> Any:
        return super().__call__(images, prompts)[1], {}


to_alignprop = _AlignPropReward

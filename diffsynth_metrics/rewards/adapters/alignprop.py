"""Rewards for the AlignPropTrainer that TRL had until 0.23, and for its forks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffsynth_metrics.rewards.adapters.common import Function, RewardSource
from diffsynth_metrics.rewards.losses import Loss


class _AlignPropReward(Function):
    """A ``reward_fn(images, prompts, metadata) -> (reward, {})``, with a graph to the images."""

    def __init__(self, source: RewardSource, *, name: str | None = None, **options: Any) -> None:
        """Take what :func:`as_loss` takes."""
        self.loss = Loss(source, name=name, **options)
        super().__init__(name or self.loss.scorer.name)

    def __call__(
        self, images: Tensor, prompts: str | Sequence[str] | None = None, metadata: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        return self.loss(images, prompts)[1], {}


to_alignprop = _AlignPropReward

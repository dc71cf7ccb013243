"""Rewards for flow_grpo, DiffusionNFT, Edit-R1 and their relatives.

They call ``reward_fn(images, prompts, metadata)`` in a thread of a pool and take ``(scores, {})``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.rewards.adapters.common import Function, Reward, RewardSource
from diffsynth_metrics.rewards.reward_set import Component, RewardSet
from diffsynth_metrics.rewards.scales import ScaleInput
from diffsynth_metrics.rewards.scoring import Scored, apply_failure_policy, stand_in


class FlowGRPOReward(Reward):
    """A reward function of flow_grpo.

    A metric or a callable gives ``(list of N floats, {})``; a :class:`RewardSet` the form of
    ``multi_score``: ``({name: N floats, ..., "avg": N floats}, {})``. Images are float tensors
    ``[N, 3, H, W]`` in 0..1, uint8 arrays ``[N, H, W, 3]``, or videos ``[N, T, 3, H, W]``. Floats are
    rounded to bytes in float32; flow_grpo does it in the precision of the images, and up to 8 % of the
    bytes of half-precision ones differ by 1. Edits have their sources in ``ref_images``.
    """

    framework = "flow_grpo"
    parts_of_groups = (
        "flow_grpo deals the samples of a prompt out to its processes at random, gathers their rewards "
        "and normalises them itself (per_prompt_stat_tracking)"
    )

    def __call__(
        self,
        images: Any,
        prompts: Sequence[str],
        metadata: Any = None,
        ref_images: Any = None,
        **ignored: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Return rewards, see the class."""
        batch = self.batch(prompts, images, ref_images)
        if not isinstance(self.scorer, RewardSet):
            return self.score(batch)[0].tolist(), {}
        with torch.no_grad():
            result = self.scorer.result(batch)
            scored = Scored(result.reward, result.errors)
            total = apply_failure_policy(scored, self.on_failure, self.scorer.name)
        columns = {name: stand_in(one, self.on_failure).tolist() for name, one in result.raw.items()}
        return {**columns, "avg": total.tolist()}, {}


class FlowGRPOFactory(Function):
    """A scorer factory of flow_grpo: ``factory(device)(images, prompts, metadata)``."""

    makes: ClassVar[type[FlowGRPOReward]] = FlowGRPOReward

    def __init__(self, source: RewardSource, **options: Any) -> None:
        """Take what :class:`Reward` takes."""
        if isinstance(source, RewardSet) and "avg" in source.components:
            raise ValueError("'avg' is flow_grpo's name of the sum; give the component another one")
        self.reward = self.makes(source, **options)
        super().__init__(f"{self.reward.__name__}_score")

    def __call__(self, device: str | torch.device | None = None) -> FlowGRPOReward:
        """Return the reward function, after moving the metric to a device."""
        if device is not None:
            self.reward.scorer.to(device)
        return self.reward


class _MultiScore(Function):
    """A replacement for flow_grpo's ``multi_score``: ``multi_score(device, {name: weight})``."""

    def __init__(
        self,
        metrics: Mapping[str, BaseMetric | Component],
        *,
        scale: ScaleInput = "flow_grpo",
        **options: Any,
    ) -> None:
        """Take metrics by the names of the configuration's ``reward_fn``.

        Args:
            metrics: Name to metric, or to a :class:`Component`.
            scale: The scale of what has none of its own.
            **options: What :class:`Reward` takes; `on_failure` holds for every column.
        """
        self.options = options
        self.components = {}
        for name, metric in metrics.items():
            one = metric if isinstance(metric, Component) else Component(metric)
            self.components[name] = replace(one, scale=scale if one.scale is None else one.scale)
        super().__init__("multi_score")

    def __call__(self, device: str | torch.device, score_dict: Mapping[str, float]) -> FlowGRPOReward:
        if unknown := sorted({*score_dict} - {*self.components}):
            known = ", ".join(self.components)
            raise ValueError(f"there is no reward {unknown[0]!r}; there are {known}")
        weighted = {name: replace(self.components[name], weight=w) for name, w in score_dict.items()}
        return FlowGRPOFactory(RewardSet(weighted), **{"name": "multi_score", **self.options})(device)


to_flow_grpo, to_multi_score = FlowGRPOFactory, _MultiScore

"""Rewards for Flow-Factory, which names a class in its YAML file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffsynth_metrics.rewards.adapters.common import Reward, RewardSource, as_member


class _FlowFactoryReward(Reward):
    """What a reward model of Flow-Factory scores with."""

    framework = "flow_factory"
    parts_of_groups = (
        "Flow-Factory calls pointwise rewards with parts of groups, and normalises whole ones itself"
    )

    def __call__(self, prompts: Sequence[str], media: Any, sources: Any) -> dict[str, Any]:
        rewards, scored = self.score(self.batch(prompts, media, sources))
        failures = {i: reason for i, reason in enumerate(scored.reasons) if reason is not None}
        return {"rewards": rewards.tolist(), "extra_info": {"failures": failures}}


def to_flow_factory(
    load: Callable[..., RewardSource], base: type, output: Callable[..., Any], **options: Any
) -> type:
    """Make a reward model class for Flow-Factory.

    Args:
        load: Called with the ``device=`` and ``torch_dtype=`` of the YAML file when the framework makes
            its reward model; for instance ``PickScoreMetric.from_pretrained``.
        base: Flow-Factory's ``PointwiseRewardModel``.
        output: Flow-Factory's ``RewardModelOutput``.
        **options: What :class:`Reward` takes; `name` is that of the class, ``MetricReward`` by default.

    Returns:
        A subclass of `base`, called with ``prompt``, ``image`` or ``video``, and ``condition_images``
        (the sources of edits). It tells failures as ``extra_info={"failures": {sample: reason}}``.
    """

    class MetricReward(base):  # type: ignore[misc]
        required_fields = ("prompt", "video" if options.get("frames") else "image")
        use_tensor_inputs = False

        def __init__(self, config: Any, accelerator: Any) -> None:
            super().__init__(config, accelerator)
            source = load(device=self.device, torch_dtype=self.dtype)
            self.reward = _FlowFactoryReward(source, **options)

        # What has a parameter here is moved to the device, and everything for **kwargs.
        def __call__(
            self, prompt: Any, image: Any = None, video: Any = None, condition_images: Any = None
        ) -> Any:
            media = image if video is None else video
            if media is None:
                raise ValueError("this reward scores images or videos, and Flow-Factory passed neither")
            return output(**self.reward(prompt, media, condition_images))

        def to(self, device: str | torch.device) -> Any:
            self.reward.scorer.to(device)
            self.device: Any = device
            return self

    return as_member(MetricReward, options.get("name") or "MetricReward", inspect.currentframe())

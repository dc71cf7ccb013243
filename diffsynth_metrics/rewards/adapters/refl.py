"""The reward of ReFL, which is ImageReward's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffsynth_metrics.modes import plain_modes, wants_gradients
from diffsynth_metrics.rewards.adapters.common import Function

if TYPE_CHECKING:  # it imports transformers, which most rewards do without
    from diffsynth_metrics.metrics.image_reward import ImageRewardMetric


class _ReFLReward(Function):
    """ReFL's ``score_gard(prompt_ids, prompt_attention_mask, image)``, with a graph to the pixels.

    It takes token ids and mask ``[N, 35]`` and normalised pixels ``[N, 3, 224, 224]``, as ReFL prepares
    them, and returns rewards ``[N, 1]``. From raw pixels and prompts, :func:`as_loss` with
    ``loss="relu_margin", margin=2`` gives the same.
    """

    def __init__(self, metric: ImageRewardMetric) -> None:
        """Take ImageReward; anything else is a TypeError."""
        from diffsynth_metrics.metrics.image_reward import ImageRewardMetric, standardize

        if not isinstance(metric, ImageRewardMetric):
            raise TypeError(f"score_gard is ImageReward's, got {type(metric).__name__}")
        self.metric, self.standardize = metric, standardize
        super().__init__("score_gard")

    def __call__(self, prompt_ids: Tensor, prompt_attention_mask: Tensor, image: Tensor) -> Tensor:
        metric = self.metric
        with plain_modes(metric.device.type, gradients=wants_gradients(image)):
            tokens = metric.model.encode_image(image.to(metric.device, metric.dtype))
            ids, mask = prompt_ids.to(metric.device), prompt_attention_mask.to(metric.device)
            return self.standardize(metric.model.read(ids, mask, tokens))[:, None]


to_refl = _ReFLReward

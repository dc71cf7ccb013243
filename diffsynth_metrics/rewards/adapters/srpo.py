"""The reward model of SRPO, which compares with a wanted and an unwanted prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from diffsynth_metrics.dual_encoder import DualEncoderMetric, paired_cosine
from diffsynth_metrics.rewards.losses import in_float32
from diffsynth_metrics.rewards.scales import ScaleInput, find_scale


class _SRPOReward:
    """SRPO's ``reward_model``, with the methods of a Module that it calls."""

    def __init__(self, metric: DualEncoderMetric, *, scale: ScaleInput = "srpo") -> None:
        """Take CLIP, PickScore or HPSv2, whose scores are linear in the cosine.

        PickScore is divided by 20 in SRPO. Other metrics are a TypeError, other scales a ValueError.
        """
        if not isinstance(metric, DualEncoderMetric):
            raise TypeError(f"SRPO needs separate features, and {type(metric).__name__} has none")
        self.metric, self.scale = metric, find_scale(metric, scale)
        if self.scale.prefix or self.scale.at_least is not None or self.scale.subtract:
            raise ValueError(f"SRPO needs a scale that is linear in the cosine, and {scale!r} is not")

    def SRP_cfg(
        self, prompt: str | Sequence[str], neg_prompt: str | Sequence[str], images: Tensor, k: float
    ) -> Tensor:
        """Score N prompts (or one) and pixels ``[N, 3, H, W]`` in 0..1, with a graph to the pixels.

        The features of the text are (1 + k) · text - negative text.
        """
        metric = self.metric
        with in_float32(metric.device):
            text = (1 + k) * metric.encode_text(prompt) - metric.encode_text(neg_prompt)
            features = metric.encode_image(images)
            if self.scale.component == "cosine":
                return self.scale.apply(paired_cosine(text, features))
            return self.scale.apply(metric.score_from_features(text, features))

    def to(self, device: str | torch.device) -> Self:
        """Move the metric."""
        self.metric.to(device)
        return self

    def eval(self) -> Self:
        """Do nothing: a metric always evaluates."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Do nothing for False: weights never receive a gradient, and True is a ValueError."""
        if requires_grad:
            raise ValueError("the weights of a metric receive no gradient: requires_grad_(False)")
        return self

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the weights, of which none requires a gradient."""
        parameters: Iterator[torch.nn.Parameter] = self.metric.model.parameters()
        return parameters


to_srpo = _SRPOReward

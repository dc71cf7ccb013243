"""A reward as a loss whose gradient reaches the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import relu

from diffsynth_metrics.base import BaseMetric, ImageMetric, PromptMetric, ReferenceMetric
from diffsynth_metrics.inputs import extremes
from diffsynth_metrics.modes import plain_modes
from diffsynth_metrics.rewards.adapters.common import Reward, RewardSource
from diffsynth_metrics.rewards.batches import as_batch
from diffsynth_metrics.rewards.scales import ScaleInput
from diffsynth_metrics.rewards.scoring import apply_failure_policy

__all__ = ["as_loss", "in_float32"]

Kind = Literal["one_minus", "relu_margin", "neg"]


class Loss(Reward):
    """A loss function ``(pixels, prompts, sources) -> (loss, reward)``.

    It takes pixels ``[N, 3, H, W]`` (float of any precision); N prompts or one, without which metrics of
    images alone may be called; and for metrics of edits N source images of any kind. It returns loss and
    reward, both float32 ``[N]`` (float64 for metrics in float64) with a graph to the pixels where these
    require a gradient and the caller has gradients enabled. The caller's autocast is left for the call;
    ``backward()`` belongs outside of it. A sample without a reward is a RewardError.
    """

    def __init__(
        self,
        source: RewardSource,
        *,
        input_range: tuple[float, float] = (0, 1),
        loss: Kind = "neg",
        margin: float | None = None,
        grad_scale: float = 1.0,
        scale: ScaleInput = None,
        name: str | None = None,
    ) -> None:
        """Take a source.

        Args:
            source: A metric with gradients, or a set of such; a judge is a TypeError.
            input_range: The range of the pixels: ``(0, 1)``, or ``(-1, 1)`` as a VAE decodes them. What
                leaves the range is clamped, and gets no gradient; what is farther out than half of its
                width is of another range, and an error.
            loss: ``"one_minus"`` is 1 - reward (AlignProp with HPS), ``"relu_margin"`` is
                max(margin - reward, 0) (ReFL: 2, SRPO: 0.7), ``"neg"`` is -reward.
            margin: Of ``"relu_margin"``.
            grad_scale: What the loss is multiplied with.
            scale: The scale of the reward.
            name: ``__name__``; by default that of the metric with ``_loss``.
        """
        if tuple(input_range) not in ((0, 1), (-1, 1)):
            raise ValueError(f"input_range must be (0, 1) or (-1, 1), got {input_range!r}")
        if loss not in get_args(Kind):
            raise ValueError(f"loss must be one of {', '.join(get_args(Kind))}, got {loss!r}")
        if (margin is None) == (loss == "relu_margin"):
            raise ValueError("margin belongs to loss='relu_margin', which needs one")
        differentiable = (PromptMetric, ImageMetric, ReferenceMetric)
        if isinstance(source, BaseMetric) and not isinstance(source, differentiable):
            raise TypeError(f"a loss needs gradients, and {type(source).__name__} has none")
        super().__init__(source, scale=scale, name=name)
        self.input_range, self.kind, self.margin = input_range, loss, margin
        self.grad_scale = grad_scale
        self.__name__ = name or f"{self.scorer.name}_loss"

    def __call__(
        self, pixels: Tensor, prompts: str | Sequence[str] | None = None, sources: Any = None
    ) -> tuple[Tensor, Tensor]:
        _check_pixels(pixels)
        if prompts is None and self.scorer.needs_prompts:
            raise ValueError(
                f"{self.scorer.name} needs prompts, one for each of the {len(pixels)} images"
            )
        prompts = "" if prompts is None else prompts
        texts = [prompts] * len(pixels) if isinstance(prompts, str) else prompts
        with in_float32(pixels.device):
            batch = as_batch(texts, _unit_range(pixels, self.input_range), sources)
            reward = apply_failure_policy(self.scorer.scored(batch), "raise", self.scorer.name)
            if self.kind == "one_minus":
                loss = 1 - reward
            else:
                loss = -reward if self.margin is None else relu(self.margin - reward)
            return loss * self.grad_scale, reward


as_loss = Loss


def in_float32(device: torch.device) -> AbstractContextManager[None]:
    """Leave the caller's autocast and inference mode, and keep its grad mode."""
    # Asked before: leaving the inference mode switches it on.
    return plain_modes(device.type, gradients=torch.is_grad_enabled())


def _check_pixels(pixels: Tensor) -> None:
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        raise TypeError("a loss needs pixels as a float tensor [N, 3, H, W]")
    if pixels.ndim != 4:
        raise ValueError(
            f"a loss needs pixels as a batch [N, 3, H, W], got shape {list(pixels.shape)}; "
            "a single picture is pixels[None]"
        )


def _unit_range(pixels: Tensor, input_range: tuple[float, float]) -> Tensor:
    wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    low, high = (float(value) for value in extremes(wide))
    margin = (input_range[1] - input_range[0]) / 2
    if low < input_range[0] - margin or high > input_range[1] + margin:
        raise ValueError(
            f"the pixels reach from {low:.3g} to {high:.3g}, which is not input_range={input_range}; "
            "a VAE decodes pixels in (-1, 1), and metrics take (0, 1)"
        )
    if tuple(input_range) == (-1, 1):
        wide = wide / 2 + 0.5
    return wide.clamp(0, 1)

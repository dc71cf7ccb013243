"""Rewards as losses whose gradient reaches the pixels: AlignProp, DRaFT, ReFL and SRPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from diffsynth_metrics.base import BaseMetric, ImageMetric, PromptMetric
from diffsynth_metrics.dual_encoder import DualEncoderMetric, paired_cosine
from diffsynth_metrics.inputs import extremes
from diffsynth_metrics.metrics.image_reward import ImageRewardMetric, standardize
from diffsynth_metrics.modes import plain_modes, wants_gradients
from diffsynth_metrics.rewards.callables import RewardSource, ScaleInput, named, scorer_of
from diffsynth_metrics.rewards.scales import find_scale
from diffsynth_metrics.rewards.scoring import Update, apply_failure_policy, learns

__all__ = ["as_loss", "to_alignprop", "to_refl", "to_srpo"]

_KINDS = ("one_minus", "relu_margin", "neg")


def as_loss(
    source: RewardSource,
    *,
    input_range: tuple[float, float] = (0, 1),
    loss: Literal["one_minus", "relu_margin", "neg"] = "neg",
    margin: float | None = None,
    grad_scale: float = 1.0,
    scale: ScaleInput = None,
    name: str | None = None,
    update: Update = True,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make a loss function ``(pixels, prompts) -> (loss, reward)``.

    Args:
        source: A metric with gradients, or a :class:`RewardSet` of such.
        input_range: The range of the pixels: ``(0, 1)``, or ``(-1, 1)`` as a VAE decodes them. What
            leaves the range is clamped, and gets no gradient; what is farther out than half of its
            width is of another range, and an error.
        loss: ``"one_minus"`` is 1 - reward (AlignProp with HPS), ``"relu_margin"`` is
            max(margin - reward, 0) (ReFL: 2, SRPO: 0.7), ``"neg"`` is -reward.
        margin: Of ``"relu_margin"``.
        grad_scale: What the loss is multiplied with.
        scale: The scale of the reward.
        name: ``__name__``; by default that of the metric with ``_loss``.
        update: Whether the running statistics of a :class:`RewardSet` learn from a call, or a function
            that tells; ``update=False`` makes a reward for evaluation.

    Returns:
        A function of pixels ``[N, 3, H, W]`` (float of any precision) and N prompts or one, without
        which metrics of images alone may be called. It returns loss and reward, both float32 ``[N]``
        (float64 for metrics in float64) with a graph to the pixels where these require a gradient and
        the caller has gradients enabled. The caller's autocast is left for the call; ``backward()``
        belongs outside of it, as torch says, for it rounds gradients to its dtype.

    Raises:
        TypeError: The source is a judge, which has no gradients.
        ValueError: A setting is unknown, or there is a margin too many or too few. When called: the
            pixels are not a batch or of another range, or prompts are missing.
        RewardError: (when called) A sample has no reward.
    """
    if tuple(input_range) not in ((0, 1), (-1, 1)):
        raise ValueError(f"input_range must be (0, 1) or (-1, 1), got {input_range!r}")
    if loss not in _KINDS:
        raise ValueError(f"loss must be one of {', '.join(_KINDS)}, got {loss!r}")
    if (margin is None) == (loss == "relu_margin"):
        raise ValueError("margin belongs to loss='relu_margin', which needs one")
    scorer = scorer_of(source, scale, name)
    if isinstance(source, BaseMetric) and not isinstance(source, (PromptMetric, ImageMetric)):
        raise TypeError(f"a loss needs gradients, and {type(source).__name__} has none")

    def loss_function(
        pixels: Tensor, prompts: str | Sequence[str] | None = None, *ignored: Any
    ) -> tuple[Tensor, Tensor]:
        _check_pixels(pixels)
        if prompts is None and scorer.needs_prompts:
            raise ValueError(f"{scorer.name} needs prompts, one for each of the {len(pixels)} images")
        texts = _one_per_image(prompts, len(pixels))
        with _in_float32(pixels.device):
            scored = scorer.scored(texts, _unit_range(pixels, input_range), update=learns(update))
            reward = apply_failure_policy(scored, "raise", scorer.name)
            if loss == "one_minus":
                values = 1 - reward
            elif loss == "relu_margin":
                assert margin is not None
                values = relu(margin - reward)
            else:
                values = -reward
            return values * grad_scale, reward

    return named(loss_function, name or f"{scorer.name}_loss")


def to_alignprop(
    source: RewardSource,
    *,
    input_range: tuple[float, float] = (0, 1),
    scale: ScaleInput = None,
    name: str | None = None,
    update: Update = True,
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Make the ``reward_fn(images, prompts, metadata) -> (reward, {})`` of TRL's AlignPropTrainer.

    TRL had it until 0.23, and forks keep it. The reward has a graph to the images.
    """
    loss = as_loss(source, input_range=input_range, scale=scale, name=name, update=update)

    def reward_function(
        images: Tensor, prompts: str | Sequence[str] | None = None, metadata: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        return loss(images, prompts)[1], {}

    return named(reward_function, name or scorer_of(source, scale).name)


def to_srpo(metric: DualEncoderMetric, *, scale: ScaleInput = "srpo") -> Callable[..., Tensor]:
    """Make SRPO's ``SRP_cfg(prompt, neg_prompt, images, k)``.

    Args:
        metric: CLIP, PickScore or HPSv2: a metric whose score is linear in the cosine.
        scale: The scale of the score; PickScore is divided by 20 in SRPO.

    Returns:
        A function that scores images ``[N, 3, H, W]`` in 0..1 with the features
        (1 + k) · text - negative text, N prompts each (or one), as a tensor ``[N]`` with a graph.

    Raises:
        TypeError: The metric is no dual encoder.
        ValueError: The scale is not linear.
    """
    if not isinstance(metric, DualEncoderMetric):
        raise TypeError(f"SRPO needs separate features, and {type(metric).__name__} has none")
    found = find_scale(metric, scale)
    if found.prefix or found.at_least is not None or found.subtract:
        raise ValueError(f"SRPO needs a scale that is linear in the cosine, and {scale!r} is not")

    def srp_cfg(
        prompt: str | Sequence[str], neg_prompt: str | Sequence[str], images: Tensor, k: float
    ) -> Tensor:
        with _in_float32(metric.device):
            text = (1 + k) * metric.encode_text(prompt) - metric.encode_text(neg_prompt)
            features = metric.encode_image(images)
            if found.component == "cosine":
                return found.apply(paired_cosine(text, features))
            return found.apply(metric.score_from_features(text, features))

    return named(srp_cfg, "SRP_cfg")


def to_refl(metric: ImageRewardMetric) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Make ReFL's ``score_gard(prompt_ids, prompt_attention_mask, image)``.

    Returns:
        A function of token ids and mask ``[N, 35]`` and of normalised pixels ``[N, 3, 224, 224]``, as
        ReFL prepares them, that returns rewards ``[N, 1]``, with a graph to the pixels. From raw pixels
        and prompts, :func:`as_loss` with ``loss="relu_margin", margin=2`` gives the same loss.

    Raises:
        TypeError: The metric is not ImageReward.
    """
    if not isinstance(metric, ImageRewardMetric):
        raise TypeError(f"score_gard is ImageReward's, got {type(metric).__name__}")

    def score_gard(prompt_ids: Tensor, prompt_attention_mask: Tensor, image: Tensor) -> Tensor:
        with plain_modes(metric.device.type, gradients=wants_gradients(image)):
            tokens = metric.model.encode_image(image.to(metric.device, metric.dtype))
            ids, mask = prompt_ids.to(metric.device), prompt_attention_mask.to(metric.device)
            return standardize(metric.model.read(ids, mask, tokens))[:, None]

    return named(score_gard, "score_gard")


def _in_float32(device: torch.device) -> AbstractContextManager[None]:
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


def _one_per_image(prompts: str | Sequence[str] | None, count: int) -> list[str]:
    if prompts is None:
        return [""] * count
    return [prompts] * count if isinstance(prompts, str) else list(prompts)

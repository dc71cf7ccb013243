"""Rewards for DanceGRPO and Pref-GRPO, which save every image and pass its path."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth_metrics.rewards.callables import (
    RewardSource,
    ScaleInput,
    as_bytes,
    named,
    refuse_groups,
    scorer_of,
)
from diffsynth_metrics.rewards.scoring import (
    FailurePolicy,
    Update,
    apply_failure_policy,
    check_policy,
    learns,
)

__all__ = ["to_dance_grpo", "to_pref_grpo"]


def to_dance_grpo(
    source: RewardSource,
    *,
    scale: ScaleInput = "dance_grpo",
    on_failure: FailurePolicy = "raise",
    name: str | None = None,
    update: Update = True,
) -> Callable[[Any, str | Sequence[str]], Tensor]:
    """Make a function ``(image_paths, prompts) -> rewards`` for DanceGRPO's inline reward code.

    Args:
        source: A metric, a :class:`RewardSet` without normalisation over groups (DanceGRPO passes one
            image per call), or a callable of (prompts, images).
        scale: The scale of a metric's score; DanceGRPO takes PickScore's cosine.
        on_failure: What a sample gets that has no score, see ``FailurePolicy``.
        name: ``__name__``; by default the metric's.
        update: Whether the running statistics of a :class:`RewardSet` learn from a call, or a function
            that tells; ``update=False`` makes a reward for evaluation.

    Returns:
        A function of one path (or image) and one prompt, or of lists, that returns a float32 tensor
        ``[N]`` on the metric's device, without a graph.
    """
    refuse_groups(source, "DanceGRPO passes one image per call")
    return _reward_of_paths(source, scale, on_failure, name, update)


def to_pref_grpo(
    source: RewardSource,
    *,
    sample: Callable[[Mapping[str, Any]], tuple[str, Any]] | None = None,
    scale: ScaleInput = "pref_grpo",
    on_failure: FailurePolicy = "raise",
    name: str | None = None,
    update: Update = True,
) -> Callable[[Sequence[Mapping[str, Any]]], tuple[Tensor, dict[str, list[float]]]]:
    """Make a reward of Pref-GRPO's dispatcher.

    Args:
        source: A metric, a :class:`RewardSet` (with normalisation over groups, if every call has whole
            groups), or a callable of (prompts, images).
        sample: Returns prompt and image of an item; by default its ``"prompt"`` and ``"path"``. A judge
            of edits takes ``lambda item: (item["instruction"], [item["source_path"],
            item["edited_path"]])``.
        scale: The scale of a metric's score; Pref-GRPO takes PickScore's cosine.
        on_failure: What a sample gets that has no score, see ``FailurePolicy``.
        name: ``__name__``; by default the metric's.
        update: Whether the running statistics of a :class:`RewardSet` learn from a call, or a function
            that tells; ``update=False`` makes a reward for evaluation.

    Returns:
        A function of N items that returns ``(rewards [N] float32, {name: N floats})``.
    """
    reward = _reward_of_paths(source, scale, on_failure, name, update)

    def reward_function(
        items: Sequence[Mapping[str, Any]],
    ) -> tuple[Tensor, dict[str, list[float]]]:
        pairs = [sample(item) if sample else (item["prompt"], item["path"]) for item in items]
        rewards = reward([image for _, image in pairs], [prompt for prompt, _ in pairs])
        return rewards, {reward.__name__: rewards.tolist()}

    return named(reward_function, reward.__name__)


def _reward_of_paths(
    source: RewardSource,
    scale: ScaleInput,
    on_failure: FailurePolicy,
    name: str | None,
    update: Update,
) -> Callable[[Any, str | Sequence[str]], Tensor]:
    scorer = scorer_of(source, scale, name)
    check_policy(on_failure)

    def reward_function(images: Any, prompts: str | Sequence[str]) -> Tensor:
        one = isinstance(images, (str, os.PathLike)) or not hasattr(images, "__len__")
        if one or getattr(images, "ndim", 4) == 3:
            images = [images]
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        with torch.no_grad():
            scored = scorer.scored(prompts, as_bytes(images), update=learns(update))
            return apply_failure_policy(scored, on_failure, scorer.name).float()

    return named(reward_function, name or scorer.name)

"""Rewards for ddpo-pytorch, flow_grpo, DiffusionNFT, Edit-R1 and their relatives.

They call ``reward_fn(images, prompts, metadata)`` in a thread of a pool and take ``(scores, {})``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.rewards.callables import (
    RewardSource,
    ScaleInput,
    as_bytes,
    named,
    scorer_of,
    settled_floats,
)
from diffsynth_metrics.rewards.reward_set import Component, RewardSet
from diffsynth_metrics.rewards.scoring import FailurePolicy, check_policy, settle

__all__ = ["to_ddpo", "to_flow_grpo", "to_multi_score"]

RewardFunction = Callable[..., tuple[Any, dict[str, Any]]]


def to_flow_grpo(
    source: RewardSource,
    *,
    scale: ScaleInput = "flow_grpo",
    on_failure: FailurePolicy = "raise",
    name: str | None = None,
) -> Callable[..., RewardFunction]:
    """Make a scorer factory as in ``flow_grpo/rewards.py``.

    It is used as ``factory(device)(images, prompts, metadata)``.

    Images are float tensors ``[N, 3, H, W]`` in 0..1 of any precision, or uint8 arrays
    ``[N, H, W, 3]``; floats are rounded to bytes first, as flow_grpo does.

    Args:
        source: A metric or a callable gives ``(list of N floats, {})``. A :class:`RewardSet` gives the
            form of ``multi_score``: ``({name: N floats, ..., "avg": N floats}, {})``.
        scale: The scale of a metric's score; those of a set have their own.
        on_failure: What a sample gets that has no score, see ``FailurePolicy``.
        name: ``__name__`` of the function; by default as flow_grpo spells the metric.

    Returns:
        The factory. Called with a device it moves the metric there; its function accepts the keyword
        arguments that the framework and its forks pass, and ignores them.
    """
    scorer = scorer_of(source, scale, name)
    check_policy(on_failure)

    def factory(device: str | torch.device | None = None) -> RewardFunction:
        if device is not None:
            scorer.to(device)

        def reward_function(
            images: Any,
            prompts: Sequence[str],
            metadata: Any = None,
            ref_images: Any = None,
            only_strict: bool = True,
            **ignored: Any,
        ) -> tuple[Any, dict[str, Any]]:
            images = as_bytes(images)
            if isinstance(scorer, RewardSet):
                return _details(scorer, prompts, images, on_failure), {}
            return settled_floats(scorer, prompts, images, on_failure)[0], {}

        return named(reward_function, name or scorer.name)

    return named(factory, f"{name or scorer.name}_score")


def to_ddpo(
    source: RewardSource,
    *,
    scale: ScaleInput = "ddpo",
    on_failure: FailurePolicy = "raise",
    name: str | None = None,
) -> Callable[..., RewardFunction]:
    """Make a scorer factory as in ``ddpo_pytorch/rewards.py``: ``factory()(images, prompts, metadata)``.

    Like :func:`to_flow_grpo`, on the scales of ddpo-pytorch, which are the official ones.
    """
    return to_flow_grpo(source, scale=scale, on_failure=on_failure, name=name)


def to_multi_score(
    metrics: Mapping[str, BaseMetric | Component],
    *,
    scale: ScaleInput = "flow_grpo",
    on_failure: FailurePolicy = "raise",
) -> Callable[..., RewardFunction]:
    """Make a replacement for flow_grpo's ``multi_score``.

    Args:
        metrics: Name to metric, the names as in the configuration's ``reward_fn``.
        scale: The scale of every metric that is not a :class:`Component` with its own.
        on_failure: What a sample gets from a metric that fails; of a component its own policy.

    Returns:
        ``multi_score(device, score_dict)``, where ``score_dict`` maps names to weights, as flow_grpo
        calls it; it returns the reward function.
    """
    check_policy(on_failure)

    def multi_score(device: str | torch.device, score_dict: Mapping[str, float]) -> RewardFunction:
        if unknown := sorted({*score_dict} - {*metrics}):
            raise ValueError(f"there is no reward {unknown[0]!r}; there are {', '.join(metrics)}")
        components = {
            name: _weighted(metrics[name], weight, scale, on_failure)
            for name, weight in score_dict.items()
        }
        return to_flow_grpo(RewardSet(components), name="multi_score")(device)

    return multi_score


def _weighted(
    metric: BaseMetric | Component, weight: float, scale: ScaleInput, on_failure: FailurePolicy
) -> Component:
    if isinstance(metric, Component):
        return Component(metric.metric, weight, metric.normalize, metric.scale, metric.on_failure)
    return Component(metric, weight, scale=scale, on_failure=on_failure)


def _details(
    rewards: RewardSet, prompts: Sequence[str], images: Any, policy: FailurePolicy
) -> dict[str, list[float]]:
    """Score with a set, in the form of multi_score."""
    with torch.no_grad():
        result = rewards.score(list(prompts), images)
        total: Tensor = settle(rewards.settled(result), policy, rewards.name)
    details: dict[str, list[float]] = {name: values.tolist() for name, values in result.raw.items()}
    return {**details, "avg": total.tolist()}

"""Rewards for ddpo-pytorch, flow_grpo, DiffusionNFT, Edit-R1 and their relatives.

They call ``reward_fn(images, prompts, metadata)`` in a thread of a pool and take ``(scores, {})``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.rewards.callables import (
    RewardSource,
    ScaleInput,
    as_bytes,
    floats_by_policy,
    named,
    scorer_of,
)
from diffsynth_metrics.rewards.normalization import find_normalization
from diffsynth_metrics.rewards.reward_set import Component, RewardSet
from diffsynth_metrics.rewards.scoring import (
    FailurePolicy,
    Scored,
    Update,
    apply_failure_policy,
    check_policy,
    learns,
    stand_in,
)

__all__ = ["to_ddpo", "to_flow_grpo", "to_multi_score"]

RewardFunction = Callable[..., tuple[Any, dict[str, Any]]]


def to_flow_grpo(
    source: RewardSource,
    *,
    scale: ScaleInput = "flow_grpo",
    on_failure: FailurePolicy = "raise",
    name: str | None = None,
    update: Update = True,
) -> Callable[..., RewardFunction]:
    """Make a scorer factory as in ``flow_grpo/rewards.py``.

    It is used as ``factory(device)(images, prompts, metadata)``.

    Images are float tensors ``[N, 3, H, W]`` in 0..1 of any precision, or uint8 arrays
    ``[N, H, W, 3]``; floats are rounded to bytes first, in float32. flow_grpo rounds half-precision
    images in half precision, where up to 8 % of the bytes differ by 1.

    Args:
        source: A metric or a callable gives ``(list of N floats, {})``. A :class:`RewardSet` gives the
            form of ``multi_score``: ``({name: N floats, ..., "avg": N floats}, {})``.
        scale: The scale of a metric's score; those of a set have their own.
        on_failure: What a sample gets that has no score, see ``FailurePolicy``.
        name: ``__name__`` of the function; by default as flow_grpo spells the metric.
        update: Whether the running statistics of a :class:`RewardSet` learn from a call, or a function
            that tells. They never do in flow_grpo's evaluation, which passes ``only_strict=False``.

    Returns:
        The factory. Called with a device it moves the metric there; its function accepts the keyword
        arguments that the framework and its forks pass, and ignores them.
    """
    scorer = scorer_of(source, scale, name)
    check_policy(on_failure)
    if isinstance(scorer, RewardSet) and "avg" in scorer.components:
        raise ValueError("'avg' is flow_grpo's name of the sum; give the component another one")

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
            images, learn = as_bytes(images), only_strict and learns(update)
            if isinstance(scorer, RewardSet):
                return _details(scorer, prompts, images, on_failure, learn), {}
            return floats_by_policy(scorer, prompts, images, on_failure, learn)[0], {}

        return named(reward_function, name or scorer.name)

    return named(factory, f"{name or scorer.name}_score")


def to_ddpo(
    source: RewardSource,
    *,
    scale: ScaleInput = "ddpo",
    on_failure: FailurePolicy = "raise",
    name: str | None = None,
    update: Update = True,
) -> Callable[..., RewardFunction]:
    """Make a scorer factory as in ``ddpo_pytorch/rewards.py``: ``factory()(images, prompts, metadata)``.

    Like :func:`to_flow_grpo`, on the scales of ddpo-pytorch, which are the official ones.
    """
    return to_flow_grpo(source, scale=scale, on_failure=on_failure, name=name, update=update)


def to_multi_score(
    metrics: Mapping[str, BaseMetric | Component],
    *,
    scale: ScaleInput = "flow_grpo",
    on_failure: FailurePolicy = "raise",
    update: Update = True,
) -> Callable[..., RewardFunction]:
    """Make a replacement for flow_grpo's ``multi_score``.

    Args:
        metrics: Name to metric, the names as in the configuration's ``reward_fn``. Running statistics
            of a name are one for all reward functions that are made, as flow_grpo makes one for
            training and one for evaluation; to save them, build a :class:`RewardSet` and pass it to
            :func:`to_flow_grpo`.
        scale: The scale of every metric that is not a :class:`Component` with a scale of its own.
        on_failure: What a sample gets in the column of a metric that fails, and in ``"avg"``.
        update: As in :func:`to_flow_grpo`.

    Returns:
        ``multi_score(device, score_dict)``, where ``score_dict`` maps names to weights, as flow_grpo
        calls it; it returns the reward function.
    """
    check_policy(on_failure)
    own = {name: _component(metric, scale) for name, metric in metrics.items()}

    def multi_score(device: str | torch.device, score_dict: Mapping[str, float]) -> RewardFunction:
        if unknown := sorted({*score_dict} - {*own}):
            raise ValueError(f"there is no reward {unknown[0]!r}; there are {', '.join(own)}")
        rewards = RewardSet(
            {name: replace(own[name], weight=weight) for name, weight in score_dict.items()}
        )
        return to_flow_grpo(rewards, on_failure=on_failure, name="multi_score", update=update)(device)

    return multi_score


def _component(metric: BaseMetric | Component, scale: ScaleInput) -> Component:
    """Return a component whose statistics every set that it goes into shares."""
    metric = metric if isinstance(metric, Component) else Component(metric)
    return replace(
        metric,
        scale=scale if metric.scale is None else metric.scale,
        normalize=find_normalization(metric.normalize),
    )


def _details(
    rewards: RewardSet, prompts: Sequence[str], images: Any, policy: FailurePolicy, update: bool
) -> dict[str, list[float]]:
    """Score with a set, in the form of multi_score; the policy holds for every column."""
    with torch.no_grad():
        result = rewards.result(prompts, images, update=update)
        total = apply_failure_policy(Scored(result.reward, result.errors), policy, rewards.name)
    columns = {name: stand_in(values, policy).tolist() for name, values in result.raw.items()}
    return {**columns, "avg": total.tolist()}

"""Rewards for verl and verl-omni, which ask for one sample per call and await the answer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from diffsynth_metrics.rewards.batcher import DynamicBatcher
from diffsynth_metrics.rewards.callables import (
    RewardSource,
    ScaleInput,
    as_bytes,
    named,
    refuse_groups,
    scorer_of,
)
from diffsynth_metrics.rewards.scoring import FailurePolicy, Update, check_policy

__all__ = ["to_verl", "to_verl_omni"]

ComputeScore = Callable[..., Awaitable[dict[str, Any]]]


def to_verl_omni(
    source: RewardSource,
    *,
    scale: ScaleInput = "verl_omni",
    on_failure: FailurePolicy = "raise",
    name: str | None = None,
    max_batch: int = 16,
    max_wait_ms: float = 5.0,
    update: Update = True,
) -> ComputeScore:
    """Make a ``compute_score`` for verl-omni's image rewards.

    It is called by keyword with ``solution_image`` (uint8 ``[3, H, W]``) and the prompt as
    ``ground_truth``. Calls that are awaited at the same time are scored together.

    Args:
        source: A metric, a :class:`RewardSet` without normalisation over groups, or a callable.
        scale: The scale of a metric's score.
        on_failure: With ``"raise"`` the metric's error is raised; verl-omni makes that 0.0 unless the
            reward has ``required: true``. With ``"nan"`` or a number, the result tells why in
            ``"error"``. ``"mean"`` makes no sense for one sample.
        name: ``__name__``; by default ``compute_score_<metric>``.
        max_batch: The largest batch.
        max_wait_ms: How long a sample waits for company, in milliseconds, at most a minute.
        update: Whether the running statistics of a :class:`RewardSet` learn from a call, or a function
            that tells; ``update=False`` makes a reward for evaluation.

    Returns:
        A coroutine function that returns ``{"score": float}``, and ``"error"`` (empty, or the reason)
        unless failures are raised.
    """
    score = _one_at_a_time(source, scale, on_failure, max_batch, max_wait_ms, update)

    async def compute_score(
        data_source: str,
        solution_image: Any,
        ground_truth: str,
        extra_info: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        return await score(ground_truth, solution_image)

    return named(compute_score, name or f"compute_score_{scorer_of(source, scale).name}")


def to_verl(
    source: RewardSource,
    image: Callable[..., Any],
    *,
    scale: ScaleInput = None,
    on_failure: FailurePolicy = "raise",
    name: str = "compute_score",
    max_batch: int = 16,
    max_wait_ms: float = 5.0,
    update: Update = True,
) -> ComputeScore:
    """Make a ``compute_score`` for verl's ``reward.custom_reward_function``.

    Args:
        source: A metric, a :class:`RewardSet` without normalisation over groups, or a callable.
        image: ``image(solution_str, extra_info)`` returns the image of a solution; what it raises is
            a failure of the sample. It runs in the event loop.
        scale: The scale of a metric's score.
        on_failure: As in :func:`to_verl_omni`.
        name: ``__name__``, which verl's configuration asks for.
        max_batch: The largest batch.
        max_wait_ms: How long a sample waits for company, in milliseconds, at most a minute.
        update: Whether the running statistics of a :class:`RewardSet` learn from a call, or a function
            that tells; ``update=False`` makes a reward for evaluation.

    Returns:
        A coroutine function ``(data_source, solution_str, ground_truth, extra_info=None)``; the prompt
        is ``ground_truth``.
    """
    score = _one_at_a_time(source, scale, on_failure, max_batch, max_wait_ms, update)

    async def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: str,
        extra_info: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        return await score(ground_truth, lambda: image(solution_str, extra_info))

    return named(compute_score, name)


def _one_at_a_time(
    source: RewardSource,
    scale: ScaleInput,
    on_failure: FailurePolicy,
    max_batch: int,
    max_wait_ms: float,
    update: Update,
) -> Callable[[str, Any], Awaitable[dict[str, Any]]]:
    check_policy(on_failure)
    if on_failure == "mean":
        raise ValueError("on_failure='mean' needs a batch, and verl asks for one sample per call")
    refuse_groups(source, "verl asks for one sample per call")
    scorer = scorer_of(source, scale)
    batcher = DynamicBatcher(scorer, max_batch=max_batch, max_wait_ms=max_wait_ms, update=update)
    substitute = math.nan if isinstance(on_failure, str) else float(on_failure)

    async def score(prompt: str, image: Any) -> dict[str, Any]:
        try:
            made = as_bytes(image() if callable(image) else image)
            value = await asyncio.wrap_future(batcher.submit(prompt, made))
        except Exception as error:
            if on_failure == "raise":
                raise
            return {"score": substitute, "error": f"{type(error).__name__}: {error}"}
        return {"score": value} if on_failure == "raise" else {"score": value, "error": ""}

    return score

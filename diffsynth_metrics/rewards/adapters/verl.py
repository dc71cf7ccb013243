"""Rewards for verl, which asks for one sample per call and awaits the answer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from diffsynth_metrics.batcher import Batcher
from diffsynth_metrics.rewards.adapters.common import Reward, RewardSource
from diffsynth_metrics.rewards.batches import as_batch, as_bytes
from diffsynth_metrics.rewards.scoring import ERRORS_OF_A_SAMPLE

ExtraImage: TypeAlias = "str | Callable[[Mapping[str, Any]], Any] | None"
"""Where a sample's source image comes from: a key of ``extra_info``, or a function of it."""

_Sample: TypeAlias = tuple[str, Any, Any]
"""Its prompt, its image, its source images."""


class SingleReward(Reward):
    """A coroutine function of one sample; calls that are awaited at the same time are scored together.

    It returns ``{"score": float}``. With ``on_failure="raise"`` the metric's error is raised; with
    ``"nan"`` or a number, the result tells why in ``"error"``. ``"mean"`` makes no sense for one sample.
    """

    parts_of_groups = "verl asks for one sample per call, and normalises over groups itself"

    def __init__(
        self,
        source: RewardSource,
        *,
        source_image: ExtraImage = None,
        max_batch: int = 16,
        max_wait_ms: float = 5.0,
        **options: Any,
    ) -> None:
        """Take a source.

        Args:
            source: A metric, a :class:`RewardSet` or a callable.
            source_image: What was edited: a key of ``extra_info``, or a function of it.
            max_batch: The largest batch, in samples.
            max_wait_ms: How long a sample waits for others, in milliseconds, at most a minute.
            **options: What :class:`Reward` takes.
        """
        super().__init__(source, **options)
        if self.on_failure == "mean":
            raise ValueError("on_failure='mean' needs a batch, and verl asks for one sample per call")
        self.source_image = source_image
        self.batcher: Batcher[_Sample, float] = Batcher(
            self._scores, max_batch=max_batch, max_wait_ms=max_wait_ms
        )

    async def one(self, prompt: str, image: Any, extra_info: Mapping[str, Any] | None) -> dict[str, Any]:
        """Score a sample; whatever fails in making or scoring its image fails the sample."""
        try:
            made = as_bytes(image() if callable(image) else image)
            sources = self.source_image
            if sources is not None:
                known = extra_info or {}
                sources = as_bytes(sources(known) if callable(sources) else known[sources])
            value = await asyncio.wrap_future(self.batcher.submit((prompt, made, sources)))
        except Exception as error:
            if self.on_failure == "raise":
                raise
            substitute = math.nan if self.on_failure == "nan" else float(self.on_failure)
            return {"score": substitute, "error": f"{type(error).__name__}: {error}"}
        return {"score": value} if self.on_failure == "raise" else {"score": value, "error": ""}

    def _scores(self, samples: list[_Sample]) -> list[float | BaseException]:
        prompts, images, sources = zip(*samples, strict=True)
        try:
            with torch.no_grad():
                batch = as_batch(prompts, list(images), list(sources), self.frames)
                scored = self.scorer.scored(batch)
            outcomes = zip(scored.values.tolist(), scored.errors, strict=True)
            return [value if error is None else error for value, error in outcomes]
        except ERRORS_OF_A_SAMPLE as error:  # the fault of one, such as a prompt that is no text
            if len(samples) == 1:
                return [error]
            return [self._scores([sample])[0] for sample in samples]


class _VerlReward(SingleReward):
    """A ``compute_score`` for verl's ``custom_reward_function``; the prompt is ``ground_truth``."""

    def __init__(self, source: RewardSource, image: Callable[..., Any], **options: Any) -> None:
        """Take a source, and ``image(solution_str, extra_info)``, which returns the image of a solution.

        What that raises is a failure of the sample. It runs in the event loop.
        """
        super().__init__(source, **{"name": "compute_score", **options})
        self.image = image

    async def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: str,
        extra_info: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        return await self.one(ground_truth, lambda: self.image(solution_str, extra_info), extra_info)


to_verl = _VerlReward

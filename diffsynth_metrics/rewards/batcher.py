"""One sample per call from many callers, scored together."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, TypeAlias

import torch

from diffsynth_metrics.batcher import Batcher
from diffsynth_metrics.rewards.batches import Frames, as_batch, check_frames
from diffsynth_metrics.rewards.reward_set import RewardSet
from diffsynth_metrics.rewards.scoring import ERRORS_OF_A_SAMPLE, MetricScorer, Update, learns

__all__ = ["DynamicBatcher"]

_Sample: TypeAlias = tuple[str, Any, Any]
"""Its prompt, its image, its source images."""


class DynamicBatcher:
    """Scores samples of many callers together, see :class:`~diffsynth_metrics.batcher.Batcher`."""

    def __init__(
        self,
        scorer: MetricScorer | RewardSet,
        *,
        max_batch: int = 16,
        max_wait_ms: float = 5.0,
        frames: Frames | None = None,
        update: Update = True,
    ) -> None:
        """Serve a scorer.

        Args:
            scorer: What scores a batch.
            max_batch: The largest batch.
            max_wait_ms: How long a sample waits for others, in milliseconds, at most a minute.
            frames: What becomes of the frames of a video, see :meth:`RewardSet.score`.
            update: Whether running statistics of a set learn from a batch.
        """
        self.scorer = scorer
        self.max_batch = max_batch
        self.frames = check_frames(frames)
        self.update = update
        self._batcher: Batcher[_Sample, float] = Batcher(
            self._scores, max_batch=max_batch, max_wait_ms=max_wait_ms
        )

    def submit(self, prompt: str, image: Any, sources: Any = None) -> Future[float]:
        """Queue a sample, with the images that it was made from.

        Returns:
            Its score in the future, or its own error; another sample's error is not among them. In a
            coroutine, await ``asyncio.wrap_future(...)``.
        """
        return self._batcher.submit((prompt, image, sources))

    def _scores(self, samples: list[_Sample]) -> list[float | BaseException]:
        prompts, images, sources = zip(*samples, strict=True)
        try:
            with torch.no_grad():
                batch = as_batch(prompts, list(images), list(sources), self.frames)
                scored = self.scorer.scored(batch, update=learns(self.update))
            outcomes = zip(scored.values.tolist(), scored.errors, strict=True)
            return [value if error is None else error for value, error in outcomes]
        except ERRORS_OF_A_SAMPLE as error:  # the fault of one, such as a prompt that is no text
            if len(samples) == 1:
                return [error]
            return [self._scores([sample])[0] for sample in samples]

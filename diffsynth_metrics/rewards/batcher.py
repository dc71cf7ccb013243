"""One sample per call from many callers, scored together."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from diffsynth_metrics.rewards.scoring import Scorer

__all__ = ["DynamicBatcher"]


class DynamicBatcher:
    """Collects samples from threads and event loops, and scores what has come together.

    A batch is scored when it is full, or when its first sample has waited long enough. Samples that
    arrive while the network works make the next batch. There is one batch in the network at a time.
    """

    def __init__(self, scorer: Scorer, *, max_batch: int = 16, max_wait_ms: float = 5.0) -> None:
        """Serve a scorer.

        Args:
            scorer: What scores a batch.
            max_batch: The largest batch.
            max_wait_ms: How long a sample waits for company, in milliseconds.

        Raises:
            ValueError: A number is out of range.
        """
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch must be a positive int, got {max_batch!r}")
        if not max_wait_ms >= 0:
            raise ValueError(f"max_wait_ms must not be negative, got {max_wait_ms!r}")
        self.scorer = scorer
        self.max_batch = max_batch
        self.max_wait_ms = max_wait_ms
        self._waiting: deque[tuple[float, str, Any, Future[float]]] = deque()
        self._changed = threading.Condition()
        self._thread = ThreadPoolExecutor(1, "diffsynth_metrics_batcher")
        self._busy = False

    def submit(self, prompt: str, image: Any) -> Future[float]:
        """Queue a sample.

        Returns:
            Its score in the future, or its own error; another sample's error is not among them. In a
            coroutine, await ``asyncio.wrap_future(...)``.
        """
        future: Future[float] = Future()
        with self._changed:
            self._waiting.append((time.monotonic(), prompt, image, future))
            self._changed.notify()
            if not self._busy:
                self._busy = True
                self._thread.submit(self._work)
        return future

    def _work(self) -> None:
        """Score batches until nobody waits."""
        while batch := self._next_batch():
            batch = [sample for sample in batch if sample[3].set_running_or_notify_cancel()]
            if batch:
                self._score(batch)

    def _next_batch(self) -> list[tuple[float, str, Any, Future[float]]]:
        with self._changed:
            if not self._waiting:
                self._busy = False
                return []
            deadline = self._waiting[0][0] + self.max_wait_ms / 1000
            while len(self._waiting) < self.max_batch and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return [self._waiting.popleft() for _ in range(min(self.max_batch, len(self._waiting)))]

    def _score(self, batch: list[tuple[float, str, Any, Future[float]]]) -> None:
        futures = [future for *_, future in batch]
        try:
            with torch.no_grad():
                scored = self.scorer.scored([prompt for _, prompt, *_ in batch], [b[2] for b in batch])
            values: list[float] = scored.values.tolist()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            for future in futures:
                future.set_exception(error)
            return
        for future, value, problem in zip(futures, values, scored.errors, strict=True):
            if problem is None:
                future.set_result(value)
            else:
                future.set_exception(problem)

"""One sample per call from many callers, scored together."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeAlias

import torch

from diffsynth_metrics.rewards.scoring import ERRORS_OF_A_SAMPLE, Scorer, Update, learns

__all__ = ["DynamicBatcher"]

_LONGEST_WAIT_MS = 60_000

_Sample: TypeAlias = "tuple[float, str, Any, Future[float]]"
"""When it came, its prompt, its image, and its score in the future."""


class DynamicBatcher:
    """Collects samples from threads and event loops, and scores what has come together.

    A batch is scored when it is full, or when its first sample has waited long enough. Samples that
    arrive while the network works make the next batch. There is one batch in the network at a time.
    """

    def __init__(
        self, scorer: Scorer, *, max_batch: int = 16, max_wait_ms: float = 5.0, update: Update = True
    ) -> None:
        """Serve a scorer.

        Args:
            scorer: What scores a batch.
            max_batch: The largest batch.
            max_wait_ms: How long a sample waits for company, in milliseconds, at most a minute.
            update: Whether running statistics of a set learn from a batch.

        Raises:
            ValueError: A number is out of range.
        """
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch must be a positive int, got {max_batch!r}")
        if not 0 <= max_wait_ms <= _LONGEST_WAIT_MS:
            raise ValueError(
                f"max_wait_ms must be between 0 and {_LONGEST_WAIT_MS} milliseconds, got {max_wait_ms!r}"
            )
        self.scorer = scorer
        self.max_batch = max_batch
        self.max_wait_ms = max_wait_ms
        self.update = update
        self._waiting: deque[_Sample] = deque()
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None  # as long as there are samples

    def submit(self, prompt: str, image: Any) -> Future[float]:
        """Queue a sample.

        Returns:
            Its score in the future, or its own error; another sample's error is not among them. In a
            coroutine, await ``asyncio.wrap_future(...)``.
        """
        future: Future[float] = Future()
        with self._changed:
            # In a process that was forked while samples were scored, the worker is dead.
            if self._worker is None or not self._worker.is_alive():
                worker = threading.Thread(target=self._work, name="diffsynth_rewards")
                worker.start()  # it waits for the lock; if it cannot start, nobody waits for it
                self._worker = worker
            self._waiting.append((time.monotonic(), prompt, image, future))
            self._changed.notify()
        return future

    def _work(self) -> None:
        """Score batches until nobody waits."""
        batch: list[_Sample] = []
        try:
            while batch := self._next_batch():
                if running := [sample for sample in batch if sample[3].set_running_or_notify_cancel()]:
                    self._score(running)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            with self._changed:
                batch += self._waiting
                self._waiting.clear()
                self._worker = None
            _fail([sample for sample in batch if not sample[3].done()], error)

    def _next_batch(self) -> list[_Sample]:
        with self._changed:
            if not self._waiting:
                self._worker = None
                return []
            deadline = self._waiting[0][0] + self.max_wait_ms / 1000
            while len(self._waiting) < self.max_batch and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return [self._waiting.popleft() for _ in range(min(self.max_batch, len(self._waiting)))]

    def _score(self, batch: list[_Sample]) -> None:
        prompts, images = [sample[1] for sample in batch], [sample[2] for sample in batch]
        try:
            with torch.no_grad():
                scored = self.scorer.scored(prompts, images, update=learns(self.update))
            outcomes = list(zip(batch, scored.values.tolist(), scored.errors, strict=True))
        except BaseException as error:
            if isinstance(error, ERRORS_OF_A_SAMPLE) and len(batch) > 1:
                for sample in batch:  # the fault of one, such as a prompt that is no text
                    self._score([sample])
            else:
                _fail(batch, error)
            return
        for sample, value, problem in outcomes:
            if problem is None:
                sample[3].set_result(value)
            else:
                _fail([sample], problem)


def _fail(batch: list[_Sample], error: BaseException) -> None:
    """Give samples an error."""
    if isinstance(error, StopIteration):
        # A coroutine that awaits this one would wait for ever: asyncio cannot raise it there.
        error = RuntimeError(f"the reward raised {error!r}").with_traceback(error.__traceback__)
    for *_, future in batch:
        with suppress(InvalidStateError):  # cancelled in the meantime
            future.set_exception(error)

"""One sample per call from many callers, computed together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Generic, TypeVar

__all__ = ["Batcher"]

_LONGEST_WAIT_MS = 60_000

_Sample = TypeVar("_Sample")
_Result = TypeVar("_Result")


class Batcher(Generic[_Sample, _Result]):
    """Collects samples from threads and event loops, and computes what has come together.

    A batch is computed when it is full, or when its first sample has waited long enough. Samples that
    arrive meanwhile make the next batch. One batch is computed at a time.
    """

    def __init__(
        self,
        compute: Callable[[list[_Sample]], Sequence[_Result | BaseException]],
        *,
        max_batch: int = 16,
        max_wait_ms: float = 5.0,
    ) -> None:
        """Serve a function.

        Args:
            compute: Maps a batch to one result per sample, or the error of that sample. What it raises
                is the error of every sample.
            max_batch: The largest batch.
            max_wait_ms: How long a sample waits for company, in milliseconds, at most a minute.

        Raises:
            ValueError: A number is out of range.
        """
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch must be a positive int, got {max_batch!r}")
        if not 0 <= max_wait_ms <= _LONGEST_WAIT_MS:
            raise ValueError(
                f"max_wait_ms must be between 0 and {_LONGEST_WAIT_MS} milliseconds, got {max_wait_ms!r}"
            )
        self.compute = compute
        self.max_batch = max_batch
        self.max_wait_ms = max_wait_ms
        self._waiting: deque[tuple[float, _Sample, Future[_Result]]] = deque()
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None  # as long as there are samples

    def __len__(self) -> int:
        """Return how many samples wait for a batch."""
        return len(self._waiting)

    def submit(self, sample: _Sample) -> Future[_Result]:
        """Queue a sample.

        Returns:
            Its result in the future, or its own error; another sample's error is not among them. In a
            coroutine, await ``asyncio.wrap_future(...)``.
        """
        future: Future[_Result] = Future()
        with self._changed:
            # In a process that was forked while samples were computed, the worker is dead.
            if self._worker is None or not self._worker.is_alive():
                worker = threading.Thread(target=self._work, name="diffsynth_metrics_batcher")
                worker.start()  # it waits for the lock; if it cannot start, nobody waits for it
                self._worker = worker
            self._waiting.append((time.monotonic(), sample, future))
            self._changed.notify()
        return future

    def _work(self) -> None:
        """Compute batches until nobody waits."""
        while batch := self._next_batch():
            running = [item for item in batch if item[2].set_running_or_notify_cancel()]
            if running:
                self._compute([item[1] for item in running], [item[2] for item in running])

    def _compute(self, samples: list[_Sample], futures: list[Future[_Result]]) -> None:
        results: Sequence[_Result | BaseException]
        try:
            results = self.compute(samples)
            if len(results) != len(samples):
                raise RuntimeError(f"got {len(results)} results for {len(samples)} samples")
        except BaseException as error:  # whatever it is, nobody may wait for ever
            results = [error] * len(samples)
        for future, result in zip(futures, results, strict=True):
            with suppress(InvalidStateError):  # cancelled in the meantime
                if isinstance(result, StopIteration):
                    # A coroutine that awaits this would wait for ever: asyncio cannot raise it there.
                    future.set_exception(RuntimeError(f"{result!r} was raised"))
                elif isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _next_batch(self) -> list[tuple[float, _Sample, Future[_Result]]]:
        with self._changed:
            if not self._waiting:
                self._worker = None
                return []
            deadline = self._waiting[0][0] + self.max_wait_ms / 1000
            while len(self._waiting) < self.max_batch and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return [self._waiting.popleft() for _ in range(min(self.max_batch, len(self._waiting)))]

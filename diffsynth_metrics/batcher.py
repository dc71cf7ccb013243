"""One sample per call from many callers, computed together."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from threading import Condition
from typing import Any, Generic, TypeAlias, TypeVar

__all__ = ["Batcher"]

_LONGEST_WAIT_MS = 60_000

_Sample = TypeVar("_Sample")
_Result = TypeVar("_Result")
_Waiting: TypeAlias = "deque[tuple[float, Any, Future[Any]]]"
"""When a sample came, the sample, and its result in the future."""


class _Queue:
    """The samples that wait in one process, and the thread that computes them."""

    def __init__(self) -> None:
        self.waiting: _Waiting = deque()
        self.arrived = Condition()
        self.thread = ThreadPoolExecutor(1, "diffsynth_batcher")


class Batcher(Generic[_Sample, _Result]):
    """Collects samples from threads and event loops, and computes what has come together.

    A batch is computed when it is full, or when its first sample has waited long enough. Samples that
    arrive meanwhile make the next batch. One batch is computed at a time. A forked or a pickled copy has
    samples and a thread of its own.
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
            max_wait_ms: How long a sample waits for others, in milliseconds, at most a minute.

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
        self._queues: dict[int, _Queue] = {}  # by process: a forked child has no threads of its parent

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings alone."""
        return {**vars(self), "_queues": {}}

    def __len__(self) -> int:
        """Return how many samples wait for a batch."""
        return len(self._queue.waiting)

    @property
    def _queue(self) -> _Queue:
        return self._queues.setdefault(os.getpid(), _Queue())

    def submit(self, sample: _Sample) -> Future[_Result]:
        """Queue a sample.

        Returns:
            Its result in the future, or its own error; another sample's error is not among them. In a
            coroutine, await ``asyncio.wrap_future(...)``.
        """
        future: Future[_Result] = Future()
        queue = self._queue
        with queue.arrived:
            queue.waiting.append((time.monotonic(), sample, future))
            queue.arrived.notify()
            queue.thread.submit(self._work, queue)  # per sample: who finds none has nothing to do
        return future

    def _work(self, queue: _Queue) -> None:
        batch = self._next_batch(queue)
        running = [item for item in batch if item[2].set_running_or_notify_cancel()]
        if not running:
            return
        results: Sequence[_Result | BaseException]
        try:
            results = self.compute([sample for _, sample, _ in running])
            if len(results) != len(running):
                raise RuntimeError(f"got {len(results)} results for {len(running)} samples")
        except BaseException as error:  # whatever it is, nobody may wait for ever
            results = [error] * len(running)
        for (_, _, future), result in zip(running, results, strict=True):
            _deliver(future, result)

    def _next_batch(self, queue: _Queue) -> list[tuple[float, _Sample, Future[_Result]]]:
        waiting = queue.waiting
        with queue.arrived:
            if not waiting:
                return []
            deadline = waiting[0][0] + self.max_wait_ms / 1000
            while len(waiting) < self.max_batch and (left := deadline - time.monotonic()) > 0:
                queue.arrived.wait(left)
            return [waiting.popleft() for _ in range(min(self.max_batch, len(waiting)))]


def _deliver(future: Future[Any], result: Any) -> None:
    """Give a sample its result or error."""
    if isinstance(result, StopIteration):
        # A coroutine that awaits this one would wait for ever: asyncio cannot raise it there.
        result = RuntimeError(f"{result!r} was raised").with_traceback(result.__traceback__)
    with suppress(InvalidStateError):  # cancelled in the meantime
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

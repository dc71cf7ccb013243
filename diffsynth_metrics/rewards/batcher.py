"""One sample per call from many callers, scored together."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Condition
from typing import Any, TypeAlias

import torch

from diffsynth_metrics.rewards.batches import Frames, as_batch, check_frames
from diffsynth_metrics.rewards.reward_set import RewardSet
from diffsynth_metrics.rewards.scoring import ERRORS_OF_A_SAMPLE, MetricScorer, Update, learns

__all__ = ["DynamicBatcher"]

_LONGEST_WAIT_MS = 60_000

_Sample: TypeAlias = "tuple[float, str, Any, Any, Future[float]]"
"""When it came, its prompt, its image, its source images, and its score in the future."""


class _Queue:
    """The samples that wait in one process, and the thread that scores them."""

    def __init__(self) -> None:
        self.samples: deque[_Sample] = deque()
        self.arrived = Condition()
        self.thread = ThreadPoolExecutor(1, "diffsynth_rewards")


class DynamicBatcher:
    """Collects samples from threads and event loops, and scores what has come together.

    A batch is scored when it is full, or when its first sample has waited long enough. Samples that
    arrive while the network works make the next batch. There is one batch in the network at a time.
    A forked or a pickled copy has samples and a thread of its own.
    """

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
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch must be a positive int, got {max_batch!r}")
        if not 0 <= max_wait_ms <= _LONGEST_WAIT_MS:
            raise ValueError(
                f"max_wait_ms must be between 0 and {_LONGEST_WAIT_MS} milliseconds, got {max_wait_ms!r}"
            )
        self.scorer = scorer
        self.max_batch = max_batch
        self.max_wait_ms = max_wait_ms
        self.frames = check_frames(frames)
        self.update = update
        self._queues: dict[int, _Queue] = {}  # by process: a forked child has no threads of its parent

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings alone."""
        names = ("max_batch", "max_wait_ms", "frames", "update")
        return partial(type(self), **{name: getattr(self, name) for name in names}), (self.scorer,)

    def submit(self, prompt: str, image: Any, sources: Any = None) -> Future[float]:
        """Queue a sample, with the images that it was made from.

        Returns:
            Its score in the future, or its own error; another sample's error is not among them. In a
            coroutine, await ``asyncio.wrap_future(...)``.
        """
        future: Future[float] = Future()
        queue = self._queues.setdefault(os.getpid(), _Queue())
        with queue.arrived:
            queue.samples.append((time.monotonic(), prompt, image, sources, future))
            queue.arrived.notify()
            queue.thread.submit(self._work, queue)  # per sample: who finds none has nothing to do
        return future

    def _work(self, queue: _Queue) -> None:
        batch = self._next_batch(queue)
        if running := [sample for sample in batch if sample[-1].set_running_or_notify_cancel()]:
            self._score(running)

    def _next_batch(self, queue: _Queue) -> list[_Sample]:
        waiting = queue.samples
        with queue.arrived:
            if not waiting:
                return []
            deadline = waiting[0][0] + self.max_wait_ms / 1000
            while len(waiting) < self.max_batch and (left := deadline - time.monotonic()) > 0:
                queue.arrived.wait(left)
            return [waiting.popleft() for _ in range(min(self.max_batch, len(waiting)))]

    def _score(self, batch: list[_Sample]) -> None:
        try:
            _, prompts, images, sources, _ = zip(*batch, strict=True)
            with torch.no_grad():
                samples = as_batch(prompts, list(images), list(sources), self.frames)
                scored = self.scorer.scored(samples, update=learns(self.update))
            outcomes = list(zip(batch, scored.values.tolist(), scored.errors, strict=True))
        except BaseException as error:  # whatever it is, nobody may wait for ever
            if isinstance(error, ERRORS_OF_A_SAMPLE) and len(batch) > 1:
                for sample in batch:  # the fault of one, such as a prompt that is no text
                    self._score([sample])
            else:
                for sample in batch:
                    _fail(sample, error)
            return
        for sample, value, problem in outcomes:
            if problem is None:
                sample[-1].set_result(value)
            else:
                _fail(sample, problem)


def _fail(sample: _Sample, error: BaseException) -> None:
    """Give a sample an error."""
    if isinstance(error, StopIteration):
        # A coroutine that awaits this one would wait for ever: asyncio cannot raise it there.
        error = RuntimeError(f"the reward raised {error!r}").with_traceback(error.__traceback__)
    with suppress(InvalidStateError):  # cancelled in the meantime
        sample[-1].set_exception(error)

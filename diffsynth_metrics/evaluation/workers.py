"""Who scores: this process, or workers that each have the metric loaded.

The process that owns the run hands out tasks and is the only one that writes. A worker keeps nothing, so
that one that dies costs its task, which another does again. Workers are processes of this machine here,
and actors of a Ray cluster in ray.py; both take a task and give a future.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

import torch

from diffsynth_metrics.base import BaseMetric, SetMetric
from diffsynth_metrics.evaluation.sample_scoring import Facts, OnError, SampleScorer, Task
from diffsynth_metrics.evaluation.set_scoring import SetScorer
from diffsynth_metrics.pixels.resizing import cpu_count

__all__ = ["Alone", "Job", "ProcessWorker", "Worker", "Workers", "begin", "local_device", "work"]

logger = logging.getLogger(__name__)

_TRIES = 3  # of a task whose worker died
_PATIENCE = 60.0  # seconds without a worker that has begun, after which the log says so


class Loadable(Protocol):
    """A metric that is loaded where it is needed."""

    def load(self, options: Mapping[str, Any]) -> BaseMetric:
        """Load it with options of ``from_pretrained``."""


@dataclass(frozen=True)
class Job:
    """Everything that makes a scorer, here or in a worker.

    Attributes:
        label: How rows call the metric.
        metric: The metric.
        options: Of ``from_pretrained``.
        run_id: Name of the call.
        on_error: See ``score``.
        folder: The run folder, where judges keep answers; None: they keep none.
        progress: Whether a metric of sets shows its own progress bars.
    """

    label: str
    metric: Loadable
    options: Mapping[str, Any]
    run_id: str
    on_error: OnError
    folder: Path | None
    progress: bool = False

    def open(self, device: str | None = None, threads: int | None = None) -> SampleScorer | SetScorer:
        """Load the metric.

        Args:
            device: Where to, unless the caller said it.
            threads: How many a metric may take to decode pictures, unless it was told.
        """
        options = dict(self.options)
        if options.get("device") is None:
            options["device"] = device
        metric = self.metric.load(options)
        if threads is not None and getattr(metric, "num_workers", 0) is None:
            metric.num_workers = threads  # type: ignore[attr-defined]
        if isinstance(metric, SetMetric):
            return SetScorer(metric, on_error=self.on_error, progress=self.progress)
        # A worker on another machine may not see the run folder, and makes none.
        folder = self.folder if self.folder is not None and self.folder.is_dir() else None
        return SampleScorer(
            self.label,
            metric,
            run_id=self.run_id,
            on_error=self.on_error,
            answers=folder / "answers" / self.label if folder else None,
        )


class Alone:
    """This process, which does every task itself."""

    count = None

    def __init__(self, job: Job, device: str | None = None) -> None:
        """Load the metric."""
        self.scorer: Any = job.open(device)

    @property
    def facts(self) -> Facts:
        """The facts of the metric."""
        facts: Facts = self.scorer.facts
        return facts

    def each(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Any]]:
        """Do the tasks in order."""
        for task in tasks:
            yield task, getattr(self.scorer, task.method)(*task.arguments)


class Worker(Protocol):
    """A process with a metric."""

    @property
    def died(self) -> tuple[type[BaseException], ...]:
        """What a future raises whose worker is no more."""

    def submit(self, task: bytes) -> Future[bytes]:
        """Let the worker call :func:`work`."""

    def close(self) -> None:
        """End the worker, in the middle of a task too."""


class Workers:
    """Several workers; one that dies is replaced, and its task is done again.

    Attributes:
        count: How many there are.
    """

    def __init__(self, start: Callable[[int], Worker], count: int) -> None:
        """Start workers, which load the metric.

        Args:
            start: Starts one, by its number.
            count: How many.

        Raises:
            RuntimeError: They died before they had loaded it.
            Exception: What loading it raises.
        """
        self.count = count
        self._start = start
        self._workers: dict[int, Worker] = {}
        self._loading: dict[Future[bytes], int] = {}
        self._idle: list[int] = []
        self._deaths_at_start = 0
        self._known: Facts | None = None
        try:
            for number in range(count):
                self._begin(number)
            while self._known is None:
                self._look(self._loading)
        except BaseException:
            self.close()
            raise

    @property
    def facts(self) -> Facts:
        """The facts of the metric."""
        assert self._known is not None
        return self._known

    def each(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Any]]:
        """Let workers do the tasks, and yield each when it is done.

        Raises:
            RuntimeError: A task has ended several workers.
            Exception: What a task raised.
        """
        again: list[Task] = []  # of workers that died
        tries: Counter[int] = Counter()
        running: dict[Future[bytes], tuple[int, Task]] = {}

        def following() -> Task | None:
            return again.pop() if again else next(tasks, None)

        while True:
            while self._idle and (task := following()) is not None:
                number = self._idle.pop()
                running[self._workers[number].submit(_packed(task))] = number, task
            if not running:
                if self._idle or (task := following()) is None:
                    return
                again.append(task)  # all workers are new and still load the metric
            for future in self._look({**running, **self._loading}):
                number, task = running.pop(future)
                try:
                    contents = future.result()
                except self._workers[number].died as error:
                    tries[id(task)] += 1
                    self._replace(number, task, tries[id(task)], error)
                    again.append(task)
                    continue
                tries.pop(id(task), None)
                self._idle.append(number)
                yield task, _unpacked(contents)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers.values():
            worker.close()

    def _begin(self, number: int) -> None:
        self._workers[number] = worker = self._start(number)
        self._loading[worker.submit(_packed(Task("facts", (), "")))] = number

    def _replace(self, number: int, task: Task, tries: int, error: BaseException) -> None:
        reason = " ".join(str(error).split())
        if tries == _TRIES:
            raise RuntimeError(
                "choose fewer workers or a smaller batch_size if memory is short, or look at these "
                f"pictures: {task.name} ended {tries} workers. The last: {reason}"
            ) from error
        logger.warning("a worker died; %s is done again by another (%s)", task.name, reason)
        self._workers[number].close()
        self._begin(number)

    def _look(self, futures: Mapping[Future[bytes], Any]) -> list[Future[bytes]]:
        """Return those that are done, without the workers that have loaded the metric."""
        done, _ = wait(futures, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
        if not done and len(self._loading) == self.count:
            logger.warning(
                "no worker has begun yet: are there free CPUs and GPUs for one, or does it still load?"
            )
        for future in [*self._loading]:
            if future in done:
                done.discard(future)
                self._admit(self._loading.pop(future), future)
        return list(done)

    def _admit(self, number: int, future: Future[bytes]) -> None:
        """Let a worker that has loaded the metric work."""
        try:
            facts: Facts = _unpacked(future.result())
        except self._workers[number].died as error:
            self._deaths_at_start += 1
            if self._deaths_at_start == _TRIES:
                raise RuntimeError(
                    "choose fewer workers if memory is short, and call score() of a script under "
                    f"if __name__ == '__main__': {_TRIES} workers died before they had loaded the "
                    f"metric. The last: {' '.join(str(error).split())}"
                ) from error
            self._workers[number].close()
            self._begin(number)
            return
        self._deaths_at_start = 0
        if self._known is None:
            self._known = facts
        _check_same(self._known.made, facts.made)
        self._idle.append(number)


def _check_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Check that two workers have the same metric.

    Raises:
        RuntimeError: They would give different scores.
    """
    if one["fingerprint"] == other["fingerprint"]:
        return
    different = [name for name in one if one[name] != other.get(name) and name != "fingerprint"]
    raise RuntimeError(
        "put the same weights and packages on every machine: two workers would give different scores, "
        f"they differ in {', '.join(different) or 'the definition of the metric'}"
    )


# In the worker


_job: bytes = b""
_place: tuple[str | None, int | None] = (None, None)
_scorer: Any = None


def begin(job: bytes, place: tuple[str | None, int | None]) -> None:
    """Remember in a worker process what its metric is; the first task loads it.

    Args:
        job: A pickled :class:`Job`.
        place: Device and number of threads, see :meth:`Job.open`.
    """
    global _job, _place, _scorer
    _job, _place, _scorer = job, place, None


def work(contents: bytes) -> bytes:
    """Do a task in a worker process: return what it gave or raised, and what was logged meanwhile."""
    global _scorer
    task: Task = pickle.loads(contents)
    records: list[tuple[str, int, str]] = []
    handler = _Keeping(records)
    root = logging.getLogger("diffsynth_metrics")
    root.addHandler(handler)
    try:
        if _scorer is None:
            _scorer = _opened(_job).open(*_place)
        asked = getattr(_scorer, task.method)
        result, error = (asked(*task.arguments) if callable(asked) else asked), None
    except Exception as raised:
        result, error = None, raised
        told = traceback.format_exc()
    finally:
        root.removeHandler(handler)
    if error is None:
        return pickle.dumps((result, None, "", records))
    try:
        packed = pickle.dumps((None, error, told, records))
        pickle.loads(packed)  # some exceptions cannot be made again
        return packed
    except Exception:
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), told, records))


def _opened(job: bytes) -> Job:
    """Return the job of this worker.

    Raises:
        TypeError: The metric's class cannot be imported here.
    """
    try:
        opened: Job = pickle.loads(job)
    except (ImportError, AttributeError) as error:
        raise TypeError(
            "pass a metric by its name, or put its class into a module that every worker can import: "
            f"{error}"
        ) from error
    return opened


class _Keeping(logging.Handler):
    """Keeps what is logged, for the process that owns the run to log it."""

    def __init__(self, records: list[tuple[str, int, str]]) -> None:
        super().__init__(logging.INFO)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.name, record.levelno, record.getMessage()))


def _packed(task: Task) -> bytes:
    """Return a task for a worker.

    Raises:
        TypeError: A sample cannot be pickled, such as one with an open file.
    """
    try:
        return pickle.dumps(Task(task.method, task.arguments, task.name))
    except Exception as error:
        raise TypeError(
            f"pass pictures as paths, bytes, arrays or PIL images: {task.name} cannot be sent to a "
            f"worker ({error})"
        ) from error


def _unpacked(contents: bytes) -> Any:
    """Return what :func:`work` gave, or raise what it raised."""
    result, error, told, records = pickle.loads(contents)
    for name, level, message in records:
        logging.getLogger(name).log(level, message)
    if error is not None:
        raise error from RuntimeError(f"in a worker:\n{told}")
    return result


# Processes of this machine


class ProcessWorker:
    """A process of this machine, with its share of the threads and its own device."""

    died = (BrokenProcessPool,)

    def __init__(self, number: int, job: bytes, count: int) -> None:
        """Start it.

        Args:
            number: Which one.
            job: A pickled :class:`Job`.
            count: How many there are.
        """
        # A pool of one, because a pool of many is broken as a whole by the death of one.
        self._pool = ProcessPoolExecutor(
            1,
            mp_context=get_context("spawn"),
            initializer=_begin_process,
            initargs=(job, number, max(1, cpu_count() // count)),
        )
        self._pid = self._pool.submit(os.getpid)

    def submit(self, task: bytes) -> Future[bytes]:
        """Let it call :func:`work`."""
        try:
            return self._pool.submit(work, task)
        except BrokenProcessPool as error:  # it died while it had nothing to do
            broken: Future[bytes] = Future()
            broken.set_exception(error)
            return broken

    def close(self) -> None:
        """End it."""
        with suppress(Exception):  # it may be dead, or not have begun
            os.kill(self._pid.result(timeout=0), signal.SIGTERM)
        self._pool.shutdown(wait=False, cancel_futures=True)


def _begin_process(job: bytes, number: int, threads: int) -> None:
    """Prepare a worker process of this machine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that owns the run ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    begin(job, (local_device(number), threads))


def _end_with_parent() -> None:
    """End this process when the one that owns the run is gone: nobody reads what it would do."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def local_device(number: int) -> str | None:
    """Return the accelerator of the worker of a number, or None where there is no choice."""
    if not torch.accelerator.is_available() or torch.accelerator.device_count() < 2:
        return None
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return f"{accelerator.type}:{number % torch.accelerator.device_count()}"

"""Workers that are actors of a Ray cluster; see workers.py for what they do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from diffsynth_metrics.evaluation.samples import Sample, SampleSet
from diffsynth_metrics.evaluation.workers import begin, work

try:
    import ray
    from ray import exceptions
except ImportError as error:
    raise ImportError('pip install "diffsynth-metrics[ray]": ray is not installed') from error

__all__ = ["RayWorker", "actor_starter", "joined", "pack", "read_dataset"]

logger = logging.getLogger(__name__)

_NO_STATISTICS = "RAY_USAGE_STATS_ENABLED"


def pack(job: Any) -> bytes:
    """Pickle something for actors, a class of a notebook too."""
    contents: bytes = ray.cloudpickle.dumps(job)
    return contents


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Join a cluster, unless this process has joined one already, and leave it again.

    Args:
        address: Where it is; None: what ``RAY_ADDRESS`` says, else one of this machine, which ends with
            the context. That one has no dashboard and sends no usage statistics.

    Raises:
        ConnectionError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    own = address is None and not os.environ.get("RAY_ADDRESS")
    before = os.environ.get(_NO_STATISTICS)
    if own and before is None:
        os.environ[_NO_STATISTICS] = "0"  # read when a cluster begins
    try:
        options: dict[str, Any] = (
            {"address": "local", "include_dashboard": False} if own else {"address": address or "auto"}
        )
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
    finally:
        if own and before is None:
            os.environ.pop(_NO_STATISTICS, None)
    try:
        yield
    finally:
        ray.shutdown()


def read_dataset(dataset: ray.data.Dataset) -> SampleSet:
    """Return the rows of a dataset as samples.

    Args:
        dataset: Its columns are those of a manifest: image (a path, the bytes of a file, a dict with
            ``"bytes"`` as Hugging Face writes them, or an array ``[H, W, 3]``) and, as far as there are,
            prompt, id, prompt_id, seed and category. Without id it is the number of the row.

    Raises:
        ValueError: There is no column of images.
    """
    columns = dataset.columns() or []
    if "image" not in columns:
        raise ValueError(
            "name the column of pictures 'image', such as by dataset.rename_columns: there are "
            f"{', '.join(columns)}"
        )
    samples = [
        Sample(
            id=str(row.get("id", number)),
            prompt=row.get("prompt"),
            image=_picture_of(row["image"]),
            **{name: row.get(name) for name in ("prompt_id", "seed", "category")},
        )
        for number, row in enumerate(dataset.iter_rows())
    ]
    return SampleSet(samples, layout="ray", reason="a dataset of Ray")


def _picture_of(cell: Any) -> Any:
    """Return the picture of a cell; a dict is that of Hugging Face."""
    return (cell.get("bytes") or cell["path"]) if isinstance(cell, dict) else cell


def actor_starter(job: bytes, count: int, gpus: float | None) -> Callable[[int], RayWorker]:
    """Return what starts an actor.

    Each reserves its share of the CPUs of the cluster, and has as many threads.

    Args:
        job: What :func:`pack` returned.
        count: How many actors there will be.
        gpus: How many GPUs each reserves.
    """
    there = ray.cluster_resources()
    cpus = max(1, int(there.get("CPU", 1)) // count)
    for kind, each in (("CPU", cpus), ("GPU", gpus or 0)):
        if each * count > there.get(kind, 0):
            logger.warning(
                "the cluster has %g %ss, and %d workers reserve %g: some begin when it grows",
                there.get(kind, 0),
                kind,
                count,
                each * count,
            )
    return lambda number: RayWorker(job, cpus, gpus)


class RayWorker:
    """An actor."""

    died = (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.WorkerCrashedError)

    def __init__(self, job: bytes, cpus: int, gpus: float | None) -> None:
        """Ask Ray for it, which starts it where there is room."""
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus or 0)(_Actor).remote(job, cpus)

    def submit(self, task: bytes) -> Future[bytes]:
        """Let it call ``work``."""
        future: Future[bytes] = self._actor.work.remote(task).future()
        return future

    def close(self) -> None:
        """End it, in the middle of a task too."""
        ray.kill(self._actor)


class _Actor:
    """What runs in the cluster."""

    def __init__(self, job: bytes, threads: int) -> None:
        torch.set_num_threads(threads)  # of this process, which is the actor's own
        begin(job, (None, threads))

    def work(self, task: bytes) -> bytes:
        return work(task)

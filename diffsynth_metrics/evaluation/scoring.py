"""Samples and metrics become results: checked first, then scored by one metric after the other."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import pyarrow as pa
import torch

from diffsynth_metrics.base import BaseMetric, SetMetric, check_batch_size
from diffsynth_metrics.catalog import find_class, load_metric, name_of
from diffsynth_metrics.evaluation.reading import SampleReader
from diffsynth_metrics.evaluation.results import Results
from diffsynth_metrics.evaluation.run_folder import RunFolder, Share
from diffsynth_metrics.evaluation.sample_scoring import (
    Crew,
    OnError,
    RowsOfId,
    Run,
    score_samples,
)
from diffsynth_metrics.evaluation.samples import Sample
from diffsynth_metrics.evaluation.set_scoring import Reference, check_reference, score_set
from diffsynth_metrics.evaluation.workers import (
    Alone,
    Job,
    ProcessWorker,
    Worker,
    Workers,
    local_device,
)

if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)

__all__ = ["EngineName", "MetricInput", "OnError", "score"]

MetricInput: TypeAlias = "str | type[BaseMetric] | BaseMetric"
"""A name such as ``"pickscore"`` or ``"pickscore=folder"``, a class, or a loaded metric."""

EngineName = Literal["processes", "ray"]


def score(
    samples: Sequence[Sample] | ray.data.Dataset,
    metrics: MetricInput | Sequence[MetricInput] | Mapping[str, MetricInput],
    *,
    out: str | os.PathLike[str] | None = None,
    on_error: OnError = "record",
    resume: bool = True,
    progress: bool = True,
    batch_size: int | None = None,
    limit: int | None = None,
    reference: Reference | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    workers: int | Literal["ranks"] | None = None,
    engine: EngineName = "processes",
    gpus_per_worker: float | None = None,
    address: str | None = None,
) -> Results:
    """Score samples with metrics, one metric after the other.

    With `out`, rows are written as they are made. Stopped at any moment and called again with the same
    arguments, it goes on; what it has scored is known by content, so that a changed picture, prompt or
    metric is scored anew, and a data set that has grown or was shuffled only where it is new.

    Example:
        >>> results = score(read_samples("data.csv"), ["pickscore", "clip"], out="runs/a")
        >>> print(results.summary())

    Args:
        samples: What ``read_samples`` returned, or a list of samples of different ids; or a
            ``ray.data.Dataset``, see docs/scale.md.
        metrics: Names, classes or loaded metrics; or label to one of these, for two of one kind. What
            is loaded here is freed before the next is loaded; a loaded metric is left as it is.
        out: The run folder; None keeps the rows in memory.
        on_error: ``"record"``: a sample that cannot be scored gets a row with the reason, named in the
            log. ``"raise"`` stops at the first. What is no sample's fault, such as too little memory,
            is raised in any case; the rows before it are kept.
        resume: Whether rows that are in `out` are used; False scores everything anew.
        progress: Whether a terminal shows a progress bar per metric.
        batch_size: For metrics that are loaded here, see ``from_pretrained``.
        limit: Score the first samples only.
        reference: The real pictures of FID and other metrics of sets: a folder, samples, or an ``.npz``
            file of statistics.
        device: For metrics that are loaded here, see ``from_pretrained``.
        dtype: For metrics that are loaded here, ``torch_dtype`` of ``from_pretrained``.
        workers: How many workers score; each loads the metric, and this process hands out samples and
            writes rows. None: this process scores. ``"ranks"``: this process is one of several that
            ``torchrun`` or ``srun`` started and scores its share, see docs/scale.md.
        engine: What workers are: ``"processes"`` of this machine, or actors of a ``"ray"`` cluster.
        gpus_per_worker: For Ray, the GPUs that an actor reserves, such as 1 or 0.5; none by default.
        address: For Ray, where the cluster is; by default the one that the environment names or that
            this process has joined, else one on this machine for the time of the call.

    Returns:
        The rows of these samples by the metrics of the run folder, those of earlier calls included.

    Raises:
        ValueError: There are no samples, two have one id, a metric is not known (the message suggests
            one) or two have one label, a metric of sets has no reference, `out` is empty, or an option
            of workers goes with another engine.
        TypeError: Something is no sample or no metric, a sample's field is of the wrong type, a metric
            does not return one dict with a number as ``"score"`` per sample, or something cannot be
            sent to workers.
        FileNotFoundError: The reference does not exist.
        BlockingIOError: Another process is writing to `out`.
        OSError: `out` cannot be written to, or the disk is full.
        RuntimeError: Workers die again and again, do not see the pictures, or would give different
            scores.
        Exception: What loading a metric raises.
    """
    samples = _checked_samples(_read_if_dataset(samples, limit), limit)
    wanted = _wanted(metrics)
    if out is not None:
        RunFolder(out)  # checks the name
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be 'record' or 'raise', got {on_error!r}")
    if batch_size is not None:
        check_batch_size(batch_size)
    _check_sets(reference, wanted)
    _check_workers(workers, engine, gpus_per_worker, address, out)
    share = _share() if workers == "ranks" else None
    staff = _Staff(workers if isinstance(workers, int) else None, engine, gpus_per_worker)

    def run_in(folder: str | os.PathLike[str]) -> Results:
        run_folder = RunFolder(folder, share)
        with run_folder.locked(), _joined(address) if engine == "ray" else nullcontext():
            run = _begin(
                run_folder,
                samples,
                on_error=on_error,
                resume=resume,
                progress=progress and (share is None or share.rank == 0),
                keeps=out is not None,
            )
            options = {"batch_size": batch_size, "device": device, "torch_dtype": dtype}
            _score_all(run, wanted, reference, staff, options)
            del run  # which has every sample and row in memory
        return Results.open(folder)

    if out is not None:
        source = getattr(samples, "source", "")
        if source and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(out):
            raise ValueError(f"choose another out=: {os.fspath(out)!r} is the folder of the pictures")
        return run_in(out)
    with tempfile.TemporaryDirectory() as folder:
        results = run_in(folder)
    results.path = None
    results.name = Path(getattr(samples, "source", "")).stem or "run"
    return results


def _read_if_dataset(samples: Any, limit: int | None) -> Any:
    """Return the samples of a dataset of Ray, and others as they are."""
    if not type(samples).__module__.startswith("ray.data."):
        return samples
    from diffsynth_metrics.evaluation.ray import read_dataset

    return read_dataset(samples if limit is None else samples.limit(limit))


def _checked_samples(samples: Sequence[Sample], limit: int | None) -> Sequence[Sample]:
    if isinstance(samples, (str, os.PathLike)):
        raise TypeError(f"pass read_samples({os.fspath(samples)!r}): samples are a sequence of Sample")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a positive int, got {limit!r}")
    if not isinstance(samples, Sequence):
        raise TypeError(f"pass list(samples): samples are a sequence, got {type(samples).__name__}")
    samples = samples[:limit]
    if not len(samples):
        raise ValueError("there are no samples to score")
    for index, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise TypeError(f"item {index} of samples must be a Sample, got {type(sample).__name__}")
        _check_fields(index, sample)
    id, count = Counter(sample.id for sample in samples).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"give every sample an id of its own: {count} samples are called {id!r}, and rows are found "
            "by the id"
        )
    return samples


def _check_fields(index: int, sample: Sample) -> None:
    """Check the texts of a sample, which tables of others often hold as numbers or NaN."""
    numbers_too = (str, type(None), Integral)  # most are the first
    for name, kinds, wanted in (
        ("id", str, "a str"),
        ("prompt", (str, type(None)), "a str or None"),
        ("sources", (list, tuple), "a tuple of images"),
        ("prompt_id", numbers_too, "a str or None"),
        ("seed", numbers_too, "a str or None"),
        ("category", numbers_too, "a str or None"),
    ):
        value = getattr(sample, name)
        if not isinstance(value, kinds):
            raise TypeError(f"{name} of sample {index} must be {wanted}, got {value!r:.100}")


@dataclass(frozen=True)
class _Wanted:
    """A metric that is to score, not loaded yet unless the caller loaded it."""

    metric: MetricInput

    @property
    def kind(self) -> type[BaseMetric]:
        """The class.

        Raises:
            ValueError: There is no metric of this name; the message suggests one.
            TypeError: It is no metric.
        """
        if isinstance(self.metric, str):
            return find_class(self.metric.partition("=")[0])
        if isinstance(self.metric, BaseMetric):
            return type(self.metric)
        if isinstance(self.metric, type) and issubclass(self.metric, BaseMetric):
            if not hasattr(self.metric, "default_model") and _inherits_loading(self.metric):
                name = self.metric.__name__
                raise TypeError(
                    f"pass a loaded {name}: its class has no default_model, so that nothing says where "
                    "the weights are"
                )
            return self.metric
        raise TypeError(f"a metric is a name, a class or a loaded metric, got {self.metric!r}")

    @property
    def label(self) -> str:
        """How rows call the metric."""
        kind = self.kind
        if isinstance(self.metric, str):
            name = self.metric.partition("=")[0].strip().lower()
            return "shapes" if name == "shapes" else name_of(kind)
        return name_of(kind)

    def with_absolute_path(self) -> _Wanted:
        """Return it for another process, which may be in another folder."""
        if isinstance(self.metric, str):
            name, _, path = self.metric.partition("=")
            path = os.path.expanduser(path)
            if path and os.path.exists(path):
                return _Wanted(f"{name}={os.path.abspath(path)}")
        return self

    def load(self, options: Mapping[str, Any]) -> BaseMetric:
        """Load the metric, or return the caller's."""
        if isinstance(self.metric, BaseMetric):
            return self.metric
        if isinstance(self.metric, str):
            return load_metric(self.metric, **options)
        return self.metric.from_pretrained(**options)


def _inherits_loading(cls: type[BaseMetric]) -> bool:
    """Tell whether a class is loaded as all are, and not in a way of its own."""
    defining = next(one for one in cls.__mro__ if "from_pretrained" in vars(one))
    return defining is BaseMetric


def _wanted(
    metrics: MetricInput | Sequence[MetricInput] | Mapping[str, MetricInput],
) -> dict[str, _Wanted]:
    """Check what is to score, before anything is loaded."""
    if isinstance(metrics, Mapping):
        wanted = {str(label): _Wanted(metric) for label, metric in metrics.items()}
        for one in wanted.values():
            _ = one.kind
    else:
        listed = [metrics] if isinstance(metrics, (str, type, BaseMetric)) else list(metrics)
        wanted = {}
        for one in map(_Wanted, listed):
            if one.label in wanted:
                raise ValueError(
                    f"name them apart by a mapping, such as {{'{one.label}_a': ..., "
                    f"'{one.label}_b': ...}}: two metrics are called {one.label!r}"
                )
            wanted[one.label] = one
    if not wanted:
        raise ValueError("there are no metrics to score with")
    for label in wanted:
        named = label.isprintable() and label == os.path.basename(label)
        if not label or not named or label.startswith("."):
            raise ValueError(f"a label names a folder, and {label!r} cannot")
    return wanted


def _check_sets(reference: Reference | None, wanted: Mapping[str, _Wanted]) -> None:
    of_sets = [label for label, one in wanted.items() if issubclass(one.kind, SetMetric)]
    if of_sets and reference is None:
        raise ValueError(
            "pass reference=, the real pictures (a folder, samples, or an .npz file of statistics): "
            f"{of_sets[0]} compares two sets of pictures"
        )
    if reference is not None and not of_sets:
        raise ValueError(
            f"reference= is for metrics of sets such as fid, and there is none among {', '.join(wanted)}"
        )
    if reference is not None:
        check_reference(reference)


def _begin(folder: RunFolder, samples: Sequence[Sample], *, resume: bool, **settings: Any) -> Run:
    """Find out what a folder has already; it is locked."""
    metrics: dict[str, dict[str, Any]] = {}
    sets: list[dict[str, Any]] = []
    known: dict[str, dict[str, RowsOfId]] = {}
    if folder.is_described():
        description = folder.read_description()
        metrics, sets = description["metrics"], description["sets"]
    for part in folder.parts(repair=True):
        columns = [part.column(name).to_pylist() for name in ("metric", "id", "key", "error")]
        for label, id, key, error in zip(*columns, strict=True):
            if resume:
                of_label = known.setdefault(label, {})
                of_label[id] = (*of_label.get(id, ()), (key, error))
    return Run(
        folder=folder,
        reader=SampleReader(samples),
        resume=resume,
        known=known,
        metrics=metrics,
        sets=sets,
        **settings,
    )


def _score_all(
    run: Run,
    wanted: Mapping[str, _Wanted],
    reference: Reference | None,
    staff: _Staff,
    options: Mapping[str, Any],
) -> None:
    """Score with one metric after the other."""
    share = run.folder.share
    begins = share is None or not run.folder.is_described()
    _look_at_last_call(run, warns=begins)
    if begins:
        run.folder.write_samples(run.reader.table())
        run.folder.write_description(run.metrics, run.sets)
    try:
        for label, one in wanted.items():
            with staff.crew(run, label, one, options) as crew:
                if issubclass(one.kind, SetMetric):
                    assert reference is not None
                    score_set(run, label, crew, reference)
                else:
                    score_samples(run, label, crew)
                device = crew.facts.device
            del crew
            _collect_garbage()
            _empty_cache(torch.device(device))
    finally:
        if share is None:  # else this process knows the content of its share only
            run.folder.write_samples(run.reader.table())
    if share is not None:
        logger.info(
            "results are of the samples as the last call by one process has seen them: the same call "
            "without workers='ranks' completes them"
        )


@dataclass(frozen=True)
class _Staff:
    """Who scores.

    Attributes:
        workers: How many workers; None: this process.
        engine: What workers are.
        gpus: How many GPUs an actor of Ray reserves.
    """

    workers: int | None
    engine: EngineName
    gpus: float | None

    @contextmanager
    def crew(self, run: Run, label: str, one: _Wanted, options: Mapping[str, Any]) -> Iterator[Crew]:
        """Load a metric where it is to score, and free it afterwards."""
        job = Job(
            label,
            one if self.workers is None else one.with_absolute_path(),
            options,
            run_id=run.id,
            on_error=run.on_error,
            folder=run.folder.path.absolute() if run.keeps else None,
            progress=run.progress and self.workers is None,
        )
        if self.workers is None:
            yield Alone(job, local_device(_local_rank()) if run.folder.share else None)
            return
        count = self.workers
        start: Callable[[int], Worker]
        if self.engine == "ray":
            from diffsynth_metrics.evaluation.ray import actor_starter, pack

            contents = _packed(job, pack)
            start = actor_starter(contents, count, self.gpus)
        else:
            contents = _packed(job, pickle.dumps)

            def start(number: int) -> ProcessWorker:
                return ProcessWorker(number, contents, count)

        workers = Workers(start, count)
        try:
            yield workers
        finally:
            workers.close()


def _packed(job: Job, pack: Callable[[Job], bytes]) -> bytes:
    try:
        return pack(job)
    except Exception as error:
        raise TypeError(
            f"pass a name, or a class or metric that can be pickled: {job.label!r} cannot be sent to "
            f"workers ({error})"
        ) from error


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    from diffsynth_metrics.evaluation.ray import joined

    with joined(address):
        yield


def _check_workers(workers: Any, engine: str, gpus: float | None, address: str | None, out: Any) -> None:
    if engine not in get_args(EngineName):
        raise ValueError(f"engine must be 'processes' or 'ray', got {engine!r}")
    is_number = isinstance(workers, int) and not isinstance(workers, bool) and workers > 0
    if workers is not None and workers != "ranks" and not is_number:
        raise ValueError(f"workers must be a positive int or 'ranks', got {workers!r}")
    if engine == "ray" and not is_number:
        raise ValueError(f"say how many actors score, such as workers=4, got workers={workers!r}")
    if engine != "ray" and (gpus is not None or address is not None):
        raise ValueError("gpus_per_worker and address go with engine='ray'")
    if gpus is not None and not gpus >= 0:
        raise ValueError(f"gpus_per_worker must be at least 0, got {gpus!r}")
    if workers == "ranks" and out is None:
        raise ValueError("pass out=, the folder that the processes share")


_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def _share() -> Share:
    """Return the share of this process, as torchrun or srun say it.

    Raises:
        ValueError: Neither started it, or what they say is no share.
    """
    for rank, world in _RANKS:
        if rank in os.environ and world in os.environ:
            numbers = os.environ[rank], os.environ[world]
            if not all(map(str.isdecimal, numbers)) or int(numbers[0]) >= int(numbers[1]):
                raise ValueError(
                    f"{rank} must be a number from 0 to {world} - 1, got {rank}={numbers[0]} and "
                    f"{world}={numbers[1]}"
                )
            share = Share(int(numbers[0]), int(numbers[1]))
            logger.info("process %d of %d scores its share of the samples", share.rank, share.world)
            return share
    raise ValueError(
        "start the processes with torchrun or srun, or say how many workers= there are: neither RANK "
        "and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS are in the environment"
    )


def _local_rank() -> int:
    """Return which of the processes of this machine this one is."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def _look_at_last_call(run: Run, *, warns: bool) -> None:
    """Take over what the last call knew of the samples, if there was one."""
    try:
        before = run.folder.read_samples()
    except (OSError, ValueError):
        return  # there are none, or they are damaged and are written anew
    if run.resume:
        run.reader.recall(before)
    if warns:
        _tell_of_other_samples(run, before)


def _tell_of_other_samples(run: Run, before: pa.Table) -> None:
    """Warn where a folder has shown other samples: a run that is named after them would show these."""
    new = run.reader.described
    now = set(zip(new["id"].to_pylist(), new["image"].to_pylist(), strict=True))
    others = [
        id
        for id, image in zip(before["id"].to_pylist(), before["image"].to_pylist(), strict=True)
        if (id, image) not in now
    ]
    if others:
        logger.warning(
            "%s was a run of other samples too: %d of %d, such as %r, are not among those of this call "
            "(or have another file) and no longer shown; take another out= to keep both",
            run.folder.path,
            len(others),
            len(before),
            others[0],
        )


def _collect_garbage() -> None:
    """Free what was loaded, which nobody holds now, also where it refers to itself.

    In a thread: an interruption during a collection would be raised in some object's callback, where
    Python ignores it; the caller, who waits here, gets it.
    """
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join()


def _empty_cache(device: torch.device) -> None:
    """Give memory back that torch keeps for tensors to come."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()

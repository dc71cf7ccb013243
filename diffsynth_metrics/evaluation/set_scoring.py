"""One metric of sets, such as FID, over all samples; what it made is found again by content.

A set is cut into blocks of samples. The statistics of each block are kept as soon as they are there, so
that a killed run goes on and several processes share the work, and are merged at the end.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from diffsynth_metrics.base import SetMetric
from diffsynth_metrics.each_sample import OF_SAMPLES
from diffsynth_metrics.evaluation.reading import Content, SampleReader
from diffsynth_metrics.evaluation.results import digest_of_images
from diffsynth_metrics.evaluation.run_folder import explained
from diffsynth_metrics.evaluation.sample_scoring import (
    Crew,
    OnError,
    Run,
    Task,
    facts_of,
    plain,
    with_absolute_paths,
)
from diffsynth_metrics.evaluation.samples import Sample
from diffsynth_metrics.fid.features import FeatureSet
from diffsynth_metrics.fid.statistics import FIDStatistics
from diffsynth_metrics.folders import image_files
from diffsynth_metrics.inputs import open_image
from diffsynth_metrics.weights.files import sha256_of

__all__ = ["Reference", "SetScorer", "check_reference", "score_set"]

logger = logging.getLogger(__name__)

Reference: TypeAlias = "str | os.PathLike[str] | Sequence[Sample]"
"""A folder of pictures, an ``.npz`` file of statistics, or samples."""

Statistics: TypeAlias = "FIDStatistics | FeatureSet"

_BLOCK = 5_000  # samples; statistics of Inception are 34 MB whatever the number
_READ_AT_ONCE = 500


def check_reference(reference: Reference) -> None:
    """Check what FID compares with, before anything is loaded.

    Raises:
        FileNotFoundError: There is no such folder or file.
        TypeError, ValueError: It is no reference.
    """
    if isinstance(reference, (str, os.PathLike)):
        path = Path(reference).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"there is no reference {os.fspath(reference)!r}")
        if not path.is_dir() and path.suffix != ".npz":
            raise ValueError(f"a reference is a folder, samples, or an .npz file, got {str(path)!r}")
    elif not isinstance(reference, Sequence) or not all(isinstance(one, Sample) for one in reference):
        raise TypeError(f"a reference is a folder, samples, or an .npz file, got {reference!r:.100}")


class SetScorer:
    """One metric of sets in one process.

    Attributes:
        facts: What the process that owns the run needs to know of the metric.
    """

    def __init__(self, metric: SetMetric, *, on_error: OnError, progress: bool) -> None:
        """Keep how pictures are read.

        Args:
            metric: The loaded metric.
            on_error: See ``score``.
            progress: Whether the metric shows its own progress bars.
        """
        self.facts = facts_of(metric)
        self._metric: Any = metric
        self._on_error = on_error
        self._progress = progress

    def read(self, samples: Sequence[Sample]) -> tuple[list[Content], list[str]]:
        """Read samples; return what their contents are and why some cannot be read.

        Raises:
            Exception: One cannot be read, and the caller asked for an error.
        """
        reader = SampleReader(samples)
        problems = []
        for index in range(len(samples)):
            problem = reader.read(index).problem
            if problem is not None and self._on_error == "raise":
                raise problem
            if problem is not None:
                problems.append(str(problem))
        return [reader.content(index) for index in range(len(samples))], problems

    def statistics(self, samples: Sequence[Sample]) -> Statistics | None:
        """Return the statistics of some pictures, or None where not one of them can be decoded."""
        # Not as bytes: a file has a name that errors can say.
        images = [sample.image for sample in samples]
        on_error = "skip" if self._on_error == "record" else "raise"
        try:
            made: Statistics = self._metric.statistics(
                images, on_error=on_error, progress=self._progress
            )
        except ValueError:
            if on_error == "raise" or any(map(_can_be_opened, images)):
                raise
            return None
        return made

    def compare(self, real: Any, generated: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the result of two sides, and what is doubtful about it."""
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always")
            sides = [
                [sample.image for sample in side] if isinstance(side, list) else side
                for side in (real, generated)
            ]
            result = plain(self._metric.evaluate(*sides))
        return result, [str(one.message) for one in doubts if issubclass(one.category, UserWarning)]


def _can_be_opened(image: Any) -> bool:
    try:
        open_image(image, "image 0")
    except OF_SAMPLES:
        return False
    return True


def score_set(run: Run, label: str, crew: Crew, reference: Reference) -> None:
    """Compare all samples with the reference, unless that was done with the same pictures."""
    made = run.describe(label, crew.facts.made, scores_sets=True)
    fingerprint = made["fingerprint"]
    real = _Side(run, crew, reference)
    generated = _Side(run, crew, run.reader)
    if run.folder.share:
        for side in (real, generated):
            side.make_own_blocks(label, fingerprint)
        logger.info("the same call by one process, without workers='ranks', merges what %s made", label)
        return
    of_images = {"metric": label, "fingerprint": fingerprint, "images": generated.digest(label)}
    found_by = of_images | {"reference_sha256": real.digest(label)}
    known = [one for one in run.sets if found_by.items() <= one.items()]
    if known and run.resume:
        return
    sides = tuple(side.statistics(label, fingerprint) for side in (real, generated))
    result, doubts = _only(crew, Task("compare", sides, f"the comparison of {label}"))
    for doubt in doubts:
        logger.warning("%s: %s", label, doubt)
    # A reference of this name had another content before, which no longer counts.
    outdated = of_images | {"reference": real.name}
    run.sets[:] = [one for one in run.sets if one not in known and not outdated.items() <= one.items()]
    run.sets.append(
        {
            **result,
            **found_by,
            "reference": real.name,
            "count": result.get("generated_count", generated.readable),
            "skipped": sum(
                (generated.unreadable, generated.undecodable, result.get("generated_skipped", 0))
            ),
            "warnings": doubts,
            "run_id": run.id,
        }
    )
    run.folder.write_description(run.metrics, run.sets)


def _only(crew: Crew, task: Task) -> Any:
    """Return what one task returns."""
    ((_, result),) = crew.each(iter([task]))
    return result


class _Side:
    """One of the two sets: the run's samples, or the reference.

    Attributes:
        name: What tables call it.
        undecodable: How many pictures its statistics do not count and do not know of.
    """

    def __init__(self, run: Run, crew: Crew, source: Reference | SampleReader) -> None:
        self._run = run
        self._crew = crew
        self._file: Path | None = None
        self.undecodable = 0
        self.name = getattr(source, "source", "")
        if isinstance(source, SampleReader):
            self._reader = source
        elif not isinstance(source, (str, os.PathLike)):
            self._reader = SampleReader(source)
            self.name = self.name or f"{len(source)} samples"
        else:
            path = Path(source).expanduser()
            self.name = str(source)
            self._file = None if path.is_dir() else path
            files = image_files(path) if path.is_dir() else []
            self._reader = SampleReader([Sample(str(file), None, file) for file in files])

    @property
    def readable(self) -> int:
        """How many files could be read."""
        return sum(map(bool, self._reader.images_sha256))

    @property
    def unreadable(self) -> int:
        """How many files could not be read."""
        return self._reader.images_sha256.count("")

    def digest(self, label: str) -> str:
        """Read what was not read yet, and return a digest of the content."""
        if self._file is not None:
            return sha256_of([self._file])
        self._read(label, range(len(self._reader.samples)))
        digest = digest_of_images(self._reader.images_sha256)
        assert digest is not None  # all were read
        return digest

    def statistics(self, label: str, fingerprint: str) -> Any:
        """Return the statistics of all, or the samples for a metric that has none; all were read."""
        if self._file is not None:
            return _load(self._file)
        if not self._crew.facts.has_statistics:
            return self._samples(self._readable_of(self._reader_range()))
        whole = self._name_of(fingerprint, self._readable_of(self._reader_range()))
        if (kept := self._kept(whole)) is not None:
            return kept
        blocks = _blocks(len(self._reader.samples))
        total: Any = None
        for made in self._made(label, fingerprint, blocks):
            total = made if total is None else total.merge(made)
        if total is None:
            raise ValueError(f"there is no picture of {self.name or 'the samples'} that can be read")
        if len(blocks) > 1 and self._run.keeps:
            self._keep(whole, total)
            for block in blocks:
                self._name_of(fingerprint, self._readable_of(block)).unlink(missing_ok=True)
        return total

    def make_own_blocks(self, label: str, fingerprint: str) -> None:
        """Make and keep the statistics of this process's share of the blocks."""
        share = self._run.folder.share
        assert share is not None
        if self._file is not None or not self._crew.facts.has_statistics:
            return
        blocks = _blocks(len(self._reader.samples))[share.rank :: share.world]
        self._read(label, [index for block in blocks for index in block])
        for _ in self._made(label, fingerprint, blocks):
            pass

    def _samples(self, indices: Sequence[int]) -> list[Sample]:
        samples = [self._reader.samples[index] for index in indices]
        return samples if self._crew.count is None else [with_absolute_paths(one) for one in samples]

    def _reader_range(self) -> range:
        return range(len(self._reader.samples))

    def _readable_of(self, indices: Sequence[int]) -> list[int]:
        return [index for index in indices if self._reader.images_sha256[index]]

    def _read(self, label: str, indices: Sequence[int]) -> None:
        """Learn the content of samples."""
        raises = self._run.on_error == "raise"
        unknown = [
            index
            for index in indices
            if (content := self._reader.images_sha256[index]) is None or (raises and not content)
        ]

        def tasks() -> Iterator[Task]:
            for start in range(0, len(unknown), _READ_AT_ONCE):
                part = unknown[start : start + _READ_AT_ONCE]
                yield Task("read", (self._samples(part),), f"the files of {label}", about=part)

        for task, (contents, problems) in self._crew.each(tasks()):
            for index, content in zip(task.about, contents, strict=True):
                self._reader.learn(index, content)
            for problem in problems:
                self._run.name_once(problem)

    def _made(self, label: str, fingerprint: str, blocks: Sequence[range]) -> Iterator[Statistics]:
        """Yield the statistics of blocks, from earlier calls or new; those of one that has none, not."""
        missing: list[tuple[list[int], Path]] = []
        for block in blocks:
            readable = self._readable_of(block)
            file = self._name_of(fingerprint, readable)
            if (kept := self._kept(file)) is not None:
                yield kept
            elif readable:
                missing.append((readable, file))

        def tasks() -> Iterator[Task]:
            for readable, file in missing:
                samples = self._samples(readable)
                yield Task("statistics", (samples,), f"{len(samples)} pictures of {label}", about=file)

        total = sum(len(readable) for readable, _ in missing)
        with self._run.bar(label, total, hidden=self._crew.count is None) as bar:
            for task, made in self._crew.each(tasks()):
                bar.update(len(task.arguments[0]))
                if made is None:
                    self.undecodable += len(task.arguments[0])
                    continue
                if self._run.keeps:
                    self._keep(task.about, made)
                yield made

    def _name_of(self, fingerprint: str, readable: Sequence[int]) -> Path:
        """Return the file of the statistics of pictures, by their content."""
        digest = digest_of_images([self._reader.images_sha256[index] for index in readable])
        name = hashlib.sha256(f"{fingerprint} {digest}".encode()).hexdigest()
        return self._run.folder.path / "statistics" / f"{name}.npz"

    def _kept(self, file: Path) -> Statistics | None:
        if not (self._run.resume and file.is_file()):
            return None
        try:
            return _load(file)
        except ValueError as error:
            logger.warning("made again: %s", error)
            return None

    def _keep(self, file: Path, statistics: Statistics) -> None:
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_name(f"{file.stem}.{secrets.token_hex(4)}.tmp.npz")
        with explained(self._run.folder.path):
            try:
                statistics.save(unfinished)
                os.replace(unfinished, file)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise


def _blocks(count: int) -> list[range]:
    """Cut positions into blocks, which are the same whoever works and grow at the end only."""
    return [range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]


def _load(path: Path) -> Statistics:
    """Read a file of statistics, or of features for a metric that compares these.

    Raises:
        ValueError: It is neither.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            kind = FeatureSet if "features" in file.files else FIDStatistics
    except Exception:  # np.load raises whatever zip, zlib and pickle raise
        kind = FIDStatistics
    return kind.load(path)

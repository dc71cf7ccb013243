"""One metric of sets, such as FID, over all samples; what it made is found again by content."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from diffsynth_metrics.base import SetMetric
from diffsynth_metrics.evaluation.reading import SampleReader
from diffsynth_metrics.evaluation.results import digest_of_images
from diffsynth_metrics.evaluation.sample_scoring import Run, plain
from diffsynth_metrics.evaluation.samples import Sample
from diffsynth_metrics.fid.statistics import FIDStatistics
from diffsynth_metrics.folders import image_files
from diffsynth_metrics.weights.files import sha256_of

__all__ = ["Reference", "check_reference", "score_set"]

logger = logging.getLogger(__name__)

Reference: TypeAlias = "str | os.PathLike[str] | Sequence[Sample]"
"""A folder of pictures, an ``.npz`` file of statistics, or samples."""


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


@dataclass(frozen=True)
class _Side:
    """One of the two sets.

    Attributes:
        name: What tables call it.
        digest: Of its content.
        images: A source as FID takes it.
    """

    name: str
    digest: str
    images: Any


def score_set(run: Run, label: str, metric: SetMetric, reference: Reference) -> None:
    """Compare all samples with the reference, unless that was done with the same pictures."""
    made = run.describe(label, metric, scores_sets=True)
    unreadable = _read_all(run, run.reader)
    generated = _side_of_samples(run.reader)
    real = _reference_side(run, reference)
    found_by = {
        "metric": label,
        "fingerprint": made["fingerprint"],
        "images": generated.digest,
        "reference_sha256": real.digest,
    }
    known = [one for one in run.sets if found_by.items() <= one.items()]
    if known and run.resume:
        return
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        sides = [_features(run, metric, made["fingerprint"], side) for side in (real, generated)]
        result = plain(metric.evaluate(*sides))
    messages = [str(doubt.message) for doubt in doubts if issubclass(doubt.category, UserWarning)]
    for message in messages:
        logger.warning("%s: %s", label, message)
    scored = sum(bool(image) for image in run.reader.images_sha256)
    run.sets[:] = [one for one in run.sets if one not in known]
    run.sets.append(
        {
            **result,
            **found_by,
            "reference": real.name,
            "count": result.get("generated_count", scored),
            "skipped": unreadable + result.get("generated_skipped", 0),
            "warnings": messages,
            "run_id": run.id,
        }
    )
    run.folder.write_description(run.metrics, run.sets)


def _read_all(run: Run, reader: SampleReader) -> int:
    """Learn the content of every sample, and return how many cannot be read."""
    for index, known in enumerate(reader.images_sha256):
        if known or (known is not None and run.on_error == "record"):
            continue
        problem = reader.read(index).problem
        if problem is not None and run.on_error == "raise":
            raise problem
        if problem is not None:
            run.name_once(str(problem))
    return reader.images_sha256.count("")


def _side_of_samples(reader: SampleReader, name: str = "") -> _Side:
    digest = digest_of_images(reader.images_sha256)
    assert digest is not None  # all were read
    return _Side(name, digest, _images_of(reader))


def _images_of(reader: SampleReader) -> Iterator[Any]:
    """Yield what can be read, not as bytes: a file has a name that errors can say."""
    for sample, known in zip(reader.samples, reader.images_sha256, strict=True):
        if known:
            yield sample.image


def _reference_side(run: Run, reference: Reference) -> _Side:
    if not isinstance(reference, (str, os.PathLike)):
        reader = SampleReader(reference)
        _read_all(run, reader)
        return _side_of_samples(reader, getattr(reference, "source", "") or f"{len(reference)} samples")
    path = Path(reference).expanduser()
    if not path.is_dir():
        return _Side(str(reference), sha256_of([path]), FIDStatistics.load(path))
    files = image_files(path)
    digest = digest_of_images([sha256_of([file]) for file in files])
    assert digest is not None
    return _Side(str(reference), digest, files)


def _features(run: Run, metric: Any, fingerprint: str, side: _Side) -> Any:
    """Return the statistics of a side, as far as a metric has any, from an earlier call if there are."""
    if isinstance(side.images, FIDStatistics):
        return side.images
    if not hasattr(metric, "statistics"):
        return list(side.images)
    name = hashlib.sha256(f"{fingerprint} {side.digest}".encode()).hexdigest()
    file = run.folder.path / "statistics" / f"{name}.npz"
    if run.resume and file.is_file():
        try:
            return FIDStatistics.load(file)
        except ValueError as error:
            logger.warning("made again: %s", error)
    on_error = "skip" if run.on_error == "record" else "raise"
    statistics = metric.statistics(side.images, on_error=on_error, progress=run.progress)
    if run.keeps:
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_name("unfinished.npz")
        statistics.save(unfinished)
        os.replace(unfinished, file)
    return statistics

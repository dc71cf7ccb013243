"""One metric over all samples, read ahead and scored in chunks; a bad sample costs its own row only."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffsynth_metrics import __version__
from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.errors import AnswerError, CheckpointError, DownloadError, ImageError
from diffsynth_metrics.evaluation.fingerprint import fingerprint_of, readable, row_key, storable
from diffsynth_metrics.evaluation.reading import (
    OF_SAMPLES,
    Item,
    SampleReader,
    image_name,
    reference_of,
    sample_row,
)
from diffsynth_metrics.evaluation.run_folder import RowWriter, RunFolder
from diffsynth_metrics.inputs import open_image
from diffsynth_metrics.judges.engine import Engine

__all__ = ["Run", "plain", "score_samples"]

logger = logging.getLogger(__name__)

_LARGEST_CHUNK = 256
_CHUNK_BYTES = 64_000_000
_LOOKED_AT = 1024  # the most samples that have their row already in one chunk: the progress bar moves
_CHUNK_SECONDS = (1.0, 8.0)  # long enough to keep the network busy, short enough to lose little
_PART_SECONDS = 30.0
_PART_SECONDS_OF_JUDGES = 2.0  # their rows are dear


@dataclass
class Run:
    """What the metrics of one call share.

    Attributes:
        folder: Where rows go.
        reader: Reads the samples, and knows what their contents were.
        on_error: See ``score``.
        progress: Whether a terminal shows progress bars.
        keeps: Whether the folder stays, so that answers and statistics are worth keeping.
        resume: Whether what is in the folder is used.
        known: Label of a metric to the keys of its rows that are there already, and why they have no
            score; None where they have one.
        metrics: Label to what made the scores, as run.json has it.
        sets: Results of metrics of sets, as run.json has them.
        id: Name of this call.
    """

    folder: RunFolder
    reader: SampleReader
    on_error: Literal["record", "raise"]
    progress: bool
    keeps: bool
    resume: bool
    known: dict[str, dict[str, str | None]]
    metrics: dict[str, dict[str, Any]]
    sets: list[dict[str, Any]]
    id: str = field(default_factory=lambda: uuid4().hex[:12])
    _named: set[str] = field(default_factory=set)

    def bar(self, label: str) -> Any:
        """Return a progress bar over the samples."""
        hidden = None if self.progress else True  # None: hidden where there is no terminal
        return tqdm(total=len(self.reader.samples), desc=label, unit="image", disable=hidden)

    def describe(self, label: str, metric: BaseMetric, **more: Any) -> dict[str, Any]:
        """Note in run.json what makes the scores of a label, and return it."""
        if not hasattr(metric, "options"):  # a judge on an engine of the caller's
            metric.options = {}
        provenance = metric.provenance
        made = {
            **provenance,
            "fingerprint": fingerprint_of(metric, provenance),
            "needs": list(metric.needs),
            "card": asdict(metric.card),
            **more,
        }
        self.metrics[label] = json.loads(json.dumps(made, default=str))
        self.folder.write_description(self.metrics, self.sets)
        return self.metrics[label]

    def name_once(self, message: str) -> None:
        """Log what is wrong with a sample, once for all metrics."""
        if message not in self._named:
            self._named.add(message)
            logger.warning("no score: %s", message)


def score_samples(run: Run, label: str, metric: BaseMetric) -> None:
    """Score every sample that has no row yet."""
    made = run.describe(label, metric)
    judge = isinstance(getattr(metric, "engine", None), Engine)
    chunks = _Chunks(run, metric, made["fingerprint"], run.known.get(label, {}), retry=judge)
    rows = _Rows(run, label, metric, made)
    writer = RowWriter(run.folder, longest=_PART_SECONDS_OF_JUDGES if judge else _PART_SECONDS)
    answers = run.folder.path / "answers" / label
    smallest = size = min(getattr(metric, "batch_size", 16), _LARGEST_CHUNK)
    with (
        run.bar(label) as bar,
        _keeping_answers(metric, answers if run.keeps else None),
        ThreadPoolExecutor(1, "diffsynth_metrics") as reading,
    ):
        try:
            ahead = reading.submit(chunks.take, size)
            while (chunk := ahead.result()).looked_at:
                ahead = reading.submit(chunks.take, size)
                begun = time.monotonic()
                outcomes = _outcomes(metric, [item for item, _ in chunk.items])
                seconds = time.monotonic() - begun
                writer.add(rows.of(chunk, outcomes, seconds))
                bar.update(chunk.looked_at)
                if chunk.items:
                    size = _next_size(size, seconds / len(chunk.items), smallest)
        finally:
            writer.close()
    if None not in run.known.get(label, {}).values():
        rows.warn_if_none()


def _next_size(size: int, seconds: float, smallest: int) -> int:
    """Return how many samples the next chunk has, where one takes some seconds."""
    shortest, longest = _CHUNK_SECONDS
    if 2 * size * seconds <= shortest:
        return min(2 * size, _LARGEST_CHUNK)
    return max(size // 2, smallest) if size * seconds > longest else size


@dataclass(frozen=True)
class _Chunk:
    """What is scored at once.

    Attributes:
        looked_at: How many samples were looked at, those included that have their row; 0 at the end.
        items: The samples to score, with the key of their rows.
    """

    looked_at: int
    items: list[tuple[Item, str]]


class _Chunks:
    """The samples that have no row yet, a chunk at a time; memory is bounded by number and by bytes."""

    def __init__(
        self,
        run: Run,
        metric: BaseMetric,
        fingerprint: str,
        known: Mapping[str, str | None],
        *,
        retry: bool,
    ) -> None:
        self._reader = run.reader
        self._metric = metric
        self._fingerprint = fingerprint
        self._known = known
        self._retry = retry or run.on_error == "raise"
        self._needs_prompt = "prompt" in metric.needs
        self._needs_sources = "source" in metric.needs
        self._next = 0

    def take(self, count: int) -> _Chunk:
        """Read up to `count` samples that are to be scored."""
        items: list[tuple[Item, str]] = []
        first, size = self._next, 0
        while (
            self._next < len(self._reader.samples)
            and len(items) < count
            and size < _CHUNK_BYTES
            and self._next - first < _LOOKED_AT
        ):
            index = self._next
            self._next += 1
            if self._has_score(self._key(index)):
                continue
            item = self._checked(self._reader.read(index, sources=self._needs_sources))
            key = self._key(index)
            assert key is not None
            if not self._has_row(key, item.problem):
                items.append((item, key))
                size += item.size
        return _Chunk(self._next - first, items)

    def _has_score(self, key: str | None) -> bool:
        return key is not None and key in self._known and self._known[key] is None

    def _has_row(self, key: str, problem: Exception | None) -> bool:
        """Tell whether a row need not be made: one without a score is made again where it may change.

        Args:
            key: The row's.
            problem: Why the sample cannot be scored now, as far as its files say it. All files that
                cannot be read have one key, so the reason may be another than the row's.
        """
        if key not in self._known:
            return False
        reason = self._known[key]
        if reason is None:
            return True
        return not self._retry and (problem is None or readable(str(problem)) == reason)

    def _key(self, index: int) -> str | None:
        """Return the key of a sample's row, or None where its content is not known yet."""
        sample, image = self._reader.samples[index], self._reader.images_sha256[index]
        sources = self._reader.sources_sha256[index] if self._needs_sources else ()
        if image is None or sources is None:
            return None
        prompt = None if sample.prompt is None else storable(sample.prompt)
        return row_key(storable(sample.id), image, prompt, sources, self._fingerprint)

    def _checked(self, item: Item) -> Item:
        if item.problem is None and self._needs_prompt and item.sample.prompt is None:
            name = image_name(item.sample)
            return replace(item, problem=ValueError(f"{name} has no prompt, which the metric needs"))
        return item


def _outcomes(metric: BaseMetric, items: Sequence[Item]) -> list[dict[str, Any] | Exception]:
    """Return what the metric says of each item, or why it has no score."""
    scored = iter(_evaluated(metric, [item for item in items if item.problem is None]))
    return [item.problem or next(scored) for item in items]


def _evaluated(metric: BaseMetric, items: Sequence[Item]) -> list[dict[str, Any] | Exception]:
    """Score items together, and where that fails in halves: a bad one costs its own score only."""
    if not items:
        return []
    try:
        arguments = metric.arguments(
            [item.sample.prompt or "" for item in items],
            [item.images[0] for item in items],
            [item.images[1:] for item in items],
        )
        rows: list[dict[str, Any]] = metric.evaluate(*arguments)  # type: ignore[attr-defined]
    except (CheckpointError, DownloadError):  # no sample's fault
        raise
    except OF_SAMPLES as error:
        if len(items) == 1:
            return [_with_file_name(error, items[0])]
        middle = len(items) // 2
        return _evaluated(metric, items[:middle]) + _evaluated(metric, items[middle:])
    _check_rows(type(metric).__name__, rows, len(items))
    return list(rows)


def _check_rows(name: str, rows: Any, count: int) -> None:
    """Check what a metric gave; what is wrong with it is no sample's fault.

    Raises:
        TypeError: It is no list of dicts with a number or None as ``"score"``.
        RuntimeError: It is not one row per sample.
    """
    wanted = (
        f"{name}.evaluate must return a list of dicts with a 'score', a number or None, one per sample"
    )
    if not isinstance(rows, (list, tuple)):
        raise TypeError(f"{wanted}; it returned {type(rows).__name__}")
    if len(rows) != count:
        raise RuntimeError(f"{wanted}; it gave {len(rows)} rows to {count} samples")
    for row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(f"{wanted}; it returned a list of {type(row).__name__}")
        if "score" not in row:
            raise TypeError(
                f"{wanted}; it returned {', '.join(map(str, row)) or 'nothing'} and no 'score'"
            )
        score = row["score"]
        if score is not None and not isinstance(score, Real):
            raise TypeError(f"{wanted}; it returned the score {score!r:.100}")
        try:
            float(score or 0)
        except OverflowError:
            raise TypeError(f"{wanted}; it returned an int that is too large for a float") from None


def _with_file_name(error: Exception, item: Item) -> Exception:
    """Return the error about a sample with the name of the file that is at fault."""
    names = [image_name(item.sample), *map(reference_of, item.sample.sources)]
    if isinstance(error, AnswerError):
        return AnswerError(f"{names[0]}: {error}", error.text)
    for name, image in zip(names, item.images, strict=False):
        if not isinstance(image, Tensor):
            try:
                open_image(image, name)
            except ImageError as found:
                return found
    text = str(error).replace("sample 0", f"sample {item.sample.id!r}", 1)
    alone = len(item.images) == 1 and text.startswith("image 0")
    message = text.replace("image 0", names[0], 1) if alone else f"{names[0]}: {text}"
    kind = type(error) if type(error) in (ImageError, OSError, TypeError) else ValueError
    return kind(message)


class _Rows:
    """Makes rows of what a metric says."""

    def __init__(self, run: Run, label: str, metric: BaseMetric, made: Mapping[str, Any]) -> None:
        self._run = run
        self._label = label
        self._scored = 0
        self._first_reason = ""
        config = {name: made.get(name) for name in ("dtype", "preprocessing", "options")}
        self._common = {
            "metric": label,
            "metric_version": made.get("version", __version__),
            "weights": made.get("weights"),
            "config": json.dumps(config),
            "fingerprint": made["fingerprint"],
            "device": str(metric.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "run_id": run.id,
        }

    def of(
        self, chunk: _Chunk, outcomes: Sequence[dict[str, Any] | Exception], seconds: float
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of a chunk.

        Args:
            chunk: The samples.
            outcomes: What the metric said of each.
            seconds: How long that took.

        Raises:
            Exception: A sample has no score, and the caller asked for an error.
        """
        for (item, key), outcome in zip(chunk.items, outcomes, strict=True):
            score, components, problem = _reading(outcome)
            if problem is None:
                self._scored += 1
            else:
                self._name(problem, item)
            yield {
                **sample_row(item.sample),
                **self._common,
                "image_sha256": item.image_sha256,
                "score": score,
                "components": components,
                "error_type": None if problem is None else type(problem).__name__,
                "error": None if problem is None else readable(str(problem)),
                "key": key,
                "seconds": seconds / len(chunk.items),
            }

    def warn_if_none(self) -> None:
        """Log a warning where not one sample has a score, which no sample's fault can explain."""
        if self._first_reason and not self._scored:
            logger.warning("%s gave no score at all; the first: %s", self._label, self._first_reason)

    def _name(self, problem: Exception, item: Item) -> None:
        name, reason = image_name(item.sample), str(problem)
        message = reason if name in reason else f"{name}: {self._label}: {reason}"
        if self._run.on_error == "raise":
            raise type(problem)(message) from problem
        self._first_reason = self._first_reason or message
        self._run.name_once(message)


def _reading(outcome: dict[str, Any] | Exception) -> tuple[float, str | None, Exception | None]:
    """Return the score, the whole row as JSON, and why there is no score."""
    if isinstance(outcome, Exception):
        text = outcome.text if isinstance(outcome, AnswerError) else ""
        return math.nan, json.dumps({"raw_text": text}) if text else None, outcome
    components = readable(json.dumps(plain(outcome), ensure_ascii=False, default=str))
    score, reason = outcome["score"], outcome.get("error")
    if score is not None and math.isfinite(score):
        return float(score), components, None
    if reason is not None:
        return math.nan, components, AnswerError(str(reason))
    return math.nan, components, ArithmeticError("the score is not a finite number")


def plain(value: Any) -> Any:
    """Return a value as JSON can say it: what is not a finite number is None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(of_name) for name, of_name in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def _keeping_answers(metric: Any, folder: Path | None) -> Iterator[None]:
    """Let a judge's engine keep its answers in a folder, which a newer reader can read again."""
    engine = getattr(metric, "engine", None)
    if folder is None or not isinstance(engine, Engine):
        yield
        return
    from diffsynth_metrics.judges.cached import CachedEngine

    try:
        cached = CachedEngine(engine, folder)
        unknown = [name for name, value in cached.identity.items() if value is None]
    except TypeError as error:
        unknown = [str(error)]
    if unknown:
        logger.info("answers are not kept: %s", ", ".join(unknown))
        yield
        return
    metric.engine = cached
    try:
        yield
    finally:
        metric.engine = engine

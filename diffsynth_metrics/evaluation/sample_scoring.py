"""One metric over all samples, read ahead and scored in chunks; a bad sample costs its own row only.

:class:`SampleScorer` is one metric in one process, the caller's or a worker's, and makes rows.
:func:`score_samples` is the process that owns the run: it decides what is to score and writes rows.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from diffsynth_metrics import __version__
from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.each_sample import evaluate_each
from diffsynth_metrics.errors import AnswerError, ImageError, ServerError
from diffsynth_metrics.evaluation.fingerprint import fingerprint_of, readable, row_key, storable
from diffsynth_metrics.evaluation.reading import (
    Content,
    Item,
    SampleReader,
    image_name,
    reference_of,
    sample_row,
)
from diffsynth_metrics.evaluation.run_folder import ROWS, RowWriter, RunFolder, table_of
from diffsynth_metrics.evaluation.samples import PackedImage, Sample
from diffsynth_metrics.inputs import open_image
from diffsynth_metrics.judges.engine import Engine

__all__ = [
    "Crew",
    "Facts",
    "OnError",
    "Run",
    "SampleScorer",
    "Scored",
    "Task",
    "facts_of",
    "plain",
    "score_samples",
    "with_absolute_paths",
]

logger = logging.getLogger(__name__)

OnError = Literal["record", "raise"]

RowsOfId: TypeAlias = "tuple[tuple[str, str | None], ...]"
"""The rows that a sample's id has already: their keys, and why they have no score (None: they have)."""

_LARGEST_CHUNK = 256
_CHUNK_BYTES = 64_000_000
_LOOKED_AT = 1024  # the most samples that have their row already in one chunk: the progress bar moves
_CHUNK_SECONDS = (1.0, 8.0)  # long enough to keep the network busy, short enough to lose little
_LARGEST_BATCH = 2048  # what a worker gets at once; it reads ahead within
_BATCH_SECONDS = (4.0, 16.0)  # what the death of a worker costs
_PART_SECONDS = 30.0
_NAMED = 20  # a data set without prompts would fill the screen
_SILENT_CHUNKS = 3  # without any answer of a server, after which nothing more is asked
_PART_SECONDS_OF_JUDGES = 2.0  # their rows are dear


@dataclass(frozen=True)
class Facts:
    """What the process that owns a run needs to know of a loaded metric.

    Attributes:
        made: What run.json says of it, with its fingerprint.
        device: Where it runs.
        batch_size: The fewest samples that keep it busy.
        is_judge: Whether it asks an engine, which may answer the next time what it did not.
        has_statistics: Whether a metric of sets has statistics, which merge.
    """

    made: dict[str, Any]
    device: str
    batch_size: int
    is_judge: bool
    has_statistics: bool


def facts_of(metric: BaseMetric) -> Facts:
    """Return the facts of a loaded metric, which takes a while to compute for large weights."""
    if not hasattr(metric, "options"):  # a judge on an engine of the caller's
        metric.options = {}
    provenance = metric.provenance
    made = {
        **provenance,
        "fingerprint": fingerprint_of(metric, provenance),
        "needs": list(metric.needs),
        "card": asdict(metric.card),
    }
    return Facts(
        made=json.loads(json.dumps(made, default=str)),
        device=str(metric.device),
        batch_size=min(getattr(metric, "batch_size", 16), _LARGEST_CHUNK),
        is_judge=isinstance(getattr(metric, "engine", None), Engine),
        has_statistics=hasattr(metric, "statistics"),
    )


@dataclass(frozen=True)
class Task:
    """Something to do for whoever has the metric.

    Attributes:
        method: Name of a method of its scorer.
        arguments: Its arguments, which can be pickled.
        name: What messages call it.
        about: What whoever made the task wants to know of it when it is done.
    """

    method: str
    arguments: tuple[Any, ...]
    name: str
    about: Any = None


class Crew(Protocol):
    """Those who have a metric loaded: this process alone, or workers."""

    @property
    def facts(self) -> Facts:
        """The facts of the metric."""

    @property
    def count(self) -> int | None:
        """How many workers there are; None: this process does everything."""

    def each(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield every task with what its method returned, in any order."""


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
        known: Label of a metric to the rows that are there already, by the id of their sample.
        metrics: Label to what made the scores, as run.json has it.
        sets: Results of metrics of sets, as run.json has them.
        id: Name of this call.
    """

    folder: RunFolder
    reader: SampleReader
    on_error: OnError
    progress: bool
    keeps: bool
    resume: bool
    known: dict[str, dict[str, RowsOfId]]
    metrics: dict[str, dict[str, Any]]
    sets: list[dict[str, Any]]
    id: str = field(default_factory=lambda: uuid4().hex[:12])
    _named: set[str] = field(default_factory=set)

    @property
    def indices(self) -> range:
        """The positions of the samples that this process scores."""
        share = self.folder.share
        start, step = (share.rank, share.world) if share else (0, 1)
        return range(start, len(self.reader.samples), step)

    def bar(self, label: str, total: int, *, hidden: bool = False) -> Any:
        """Return a progress bar over samples."""
        disable = None if self.progress and not hidden else True  # None: hidden without a terminal
        return tqdm(total=total, desc=label, unit="image", disable=disable)

    def describe(self, label: str, made: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Note in run.json what makes the scores of a label, and return it."""
        described = {**made, **more}
        if self.folder.share and self.folder.is_described():  # others write to it too
            now = self.folder.read_description()
            self.metrics, self.sets = now["metrics"], now["sets"]
            if self.metrics.get(label, {}).get("fingerprint") == made["fingerprint"]:
                return described
        self.metrics[label] = described
        self.folder.write_description(self.metrics, self.sets)
        return described

    def name_once(self, message: str) -> None:
        """Log what is wrong with a sample, once for all metrics, as long as there are not too many."""
        if message in self._named or len(self._named) > _NAMED:
            return
        self._named.add(message)
        if len(self._named) > _NAMED:
            logger.warning("no score for others too; Results.failures() lists them all")
        else:
            logger.warning("no score: %s", message)


@dataclass(frozen=True)
class Scored:
    """What was made of some samples.

    Attributes:
        looked_at: How many samples were looked at, those included that have their row already.
        rows: The rows of the others.
        messages: Why some have no score.
        contents: What the files of all were, where the process that owns the run has not read them.
        problem: What is to be raised after the rows are written, where the caller asked for that.
    """

    looked_at: int
    rows: pa.Table
    messages: tuple[str, ...]
    contents: tuple[Content, ...] = ()
    problem: Exception | None = None


def score_samples(run: Run, label: str, crew: Crew) -> None:
    """Score every sample of this process that has no row yet."""
    made = run.describe(label, crew.facts.made)
    known = run.known.get(label, {})
    rows = _KnownRows(run.reader, made, known, retry=_retries(run.on_error, crew.facts))
    writer = RowWriter(
        run.folder, longest=_PART_SECONDS_OF_JUDGES if crew.facts.is_judge else _PART_SECONDS
    )
    source = _in_this_process(run, crew, rows) if crew.count is None else _by_workers(run, crew, rows)
    reasons: list[str] = []
    scores = 0
    with run.bar(label, len(run.indices)) as bar, closing(source):
        try:
            for scored in source:
                writer.add(scored.rows)
                bar.update(scored.looked_at)
                for message in scored.messages:
                    run.name_once(message)
                scores += scored.rows.column("error_type").null_count
                reasons += scored.messages[: 1 - len(reasons)]
                if scored.problem is not None:
                    raise scored.problem
        finally:
            writer.close()
    has_scores = scores or any(error is None for pairs in known.values() for _, error in pairs)
    if reasons and not has_scores:  # which no sample's fault can explain
        logger.warning("%s gave no score at all; the first: %s", label, reasons[0])


def _retries(on_error: OnError, facts: Facts) -> bool:
    """Tell whether what has no score is tried again."""
    return facts.is_judge or on_error == "raise"


def _in_this_process(run: Run, crew: Any, rows: _KnownRows) -> Generator[Scored, None, None]:
    scorer: SampleScorer = crew.scorer
    return scorer.chunks(run.reader, run.indices, rows)


def _by_workers(run: Run, crew: Crew, rows: _KnownRows) -> Generator[Scored, None, None]:
    """Hand out batches of samples, of which a worker reads, hashes and scores each."""
    count = crew.count or 1
    smallest = size = crew.facts.batch_size
    pending = run.indices
    position = 0

    def tasks() -> Iterator[Task]:
        nonlocal position
        while position < len(pending):
            left = math.ceil((len(pending) - position) / (2 * count))  # all end at the same time
            batch: list[int] = []
            for index in pending[position:]:
                if len(batch) >= max(smallest, min(size, left)):
                    break
                position += 1
                if not rows.has_score(rows.key(index)):
                    batch.append(index)
                if _is_in_memory(run.reader.samples[index]) and len(batch) >= smallest:
                    break
            if batch:
                yield _batch(run.reader.samples, batch, rows)

    scored_here = 0
    for task, (scored, seconds) in crew.each(tasks()):
        _check_sees_files(run, task, scored)
        for index, content in zip(task.about, scored.contents, strict=True):
            run.reader.learn(index, content)
        size = _next_size(size, seconds / len(task.about), smallest, _BATCH_SECONDS, _LARGEST_BATCH)
        yield scored
        scored_here += len(task.about)
    yield Scored(len(pending) - scored_here, table_of([], ROWS), ())


def _batch(samples: Sequence[Sample], indices: list[int], rows: _KnownRows) -> Task:
    batch = [with_absolute_paths(samples[index]) for index in indices]
    known = {id: pairs for sample in batch if (pairs := rows.of(id := storable(sample.id)))}
    name = f"samples {batch[0].id!r} to {batch[-1].id!r}"
    return Task("score", (batch, known), name, about=indices)


def with_absolute_paths(sample: Sample) -> Sample:
    """Return a sample for another process, which may be in another folder."""
    images = (sample.image, *sample.sources)
    absolute = tuple(map(_with_absolute_path, images))
    if all(one is other for one, other in zip(absolute, images, strict=True)):
        return sample
    return replace(sample, image=absolute[0], sources=absolute[1:])


def _with_absolute_path(image: Any) -> Any:
    if isinstance(image, PackedImage):
        file = _with_absolute_path(image.file)
        return image if file is image.file else replace(image, file=file)
    if not isinstance(image, (str, os.PathLike)) or os.path.isabs(image):
        return image
    absolute = os.path.abspath(os.path.expanduser(image))
    return Path(absolute) if isinstance(image, Path) else absolute


def _is_in_memory(sample: Sample) -> bool:
    return any(
        not isinstance(image, (str, os.PathLike, PackedImage))
        for image in (sample.image, *sample.sources)
    )


def _check_sees_files(run: Run, task: Task, scored: Scored) -> None:
    """Refuse the rows of a worker that sees no file at all, which are here.

    A machine without the pictures fails at once and would take nearly all samples.

    Raises:
        RuntimeError: It is so.
    """
    missing = scored.rows.filter(pc.equal(scored.rows.column("error_type"), "FileNotFoundError"))
    if not missing.num_rows or missing.num_rows < len(task.about):
        return
    for image in missing.column("image").to_pylist():
        if os.path.exists(image):
            raise RuntimeError(
                f"mount the pictures on every machine that has a worker: one found no file of "
                f"{task.name}, and {image} is there on this machine"
            )


def _next_size(
    size: int,
    seconds: float,
    smallest: int,
    wanted: tuple[float, float] | None = None,
    largest: int | None = None,
) -> int:
    """Return how many samples the next chunk has, where one takes some seconds."""
    shortest, longest = wanted or _CHUNK_SECONDS
    if 2 * size * seconds <= shortest:
        return min(2 * size, largest or _LARGEST_CHUNK)
    return max(size // 2, smallest) if size * seconds > longest else size


class SampleScorer:
    """One metric in one process, which reads samples and makes their rows.

    Attributes:
        facts: What the process that owns the run needs to know of the metric.
    """

    def __init__(
        self, label: str, metric: BaseMetric, *, run_id: str, on_error: OnError, answers: Path | None
    ) -> None:
        """Keep what rows say.

        Args:
            label: How rows call the metric.
            metric: The loaded metric.
            run_id: Name of the call.
            on_error: See ``score``.
            answers: Where a judge's answers are kept, if they are.
        """
        self.facts = facts_of(metric)
        self._label = label
        self._metric = metric
        self._on_error = on_error
        self._answers = answers
        self._size = self.facts.batch_size
        self._silent_chunks = 0
        made = self.facts.made
        config = {name: made.get(name) for name in ("dtype", "preprocessing", "options")}
        self._common = {
            "metric": label,
            "metric_version": made.get("version", __version__),
            "weights": made.get("weights"),
            "config": json.dumps(config),
            "fingerprint": made["fingerprint"],
            "device": self.facts.device,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "run_id": run_id,
        }

    def score(self, samples: Sequence[Sample], known: Mapping[str, RowsOfId]) -> tuple[Scored, float]:
        """Score a batch.

        Args:
            samples: The samples.
            known: Id of a sample to the rows that it has.

        Returns:
            What was made of them, and how many seconds that took.
        """
        begun = time.monotonic()
        reader = SampleReader(samples)
        rows = _KnownRows(reader, self.facts.made, known, retry=_retries(self._on_error, self.facts))
        chunks = list(self.chunks(reader, range(len(samples)), rows))
        whole = Scored(
            looked_at=len(samples),
            rows=pa.concat_tables(
                [table_of([], ROWS), *(chunk.rows for chunk in chunks)]
            ).unify_dictionaries(),
            messages=tuple(message for chunk in chunks for message in chunk.messages),
            contents=tuple(reader.content(index) for index in range(len(samples))),
            problem=chunks[-1].problem if chunks else None,
        )
        return whole, time.monotonic() - begun

    def chunks(
        self, reader: SampleReader, indices: Sequence[int], rows: _KnownRows
    ) -> Generator[Scored, None, None]:
        """Read samples ahead, score those that have no row, and yield what was made, chunk by chunk."""
        chunks = _Chunks(self._metric, reader, indices, rows)
        with (
            _keeping_answers(self._metric, self._answers),
            ThreadPoolExecutor(1, "diffsynth_metrics") as reading,
        ):
            ahead = reading.submit(chunks.take, self._size)
            while (chunk := ahead.result()).looked_at:
                ahead = reading.submit(chunks.take, self._size)
                begun = time.monotonic()
                outcomes = _outcomes(self._metric, [item for item, _ in chunk.items])
                self._check_server(outcomes)
                seconds = time.monotonic() - begun
                scored = self._scored(chunk, outcomes, seconds)
                yield scored
                if scored.problem is not None:
                    return
                if chunk.items:
                    self._size = _next_size(
                        self._size, seconds / len(chunk.items), self.facts.batch_size
                    )

    def _check_server(self, outcomes: Sequence[dict[str, Any] | Exception]) -> None:
        """Stop where a server has answered nothing for several chunks.

        Raises:
            ServerError: It is so.
        """
        if not outcomes:
            return
        silent = all(isinstance(one, ServerError) for one in outcomes)
        self._silent_chunks = self._silent_chunks + 1 if silent else 0
        if self._silent_chunks == _SILENT_CHUNKS:
            raise next(one for one in outcomes if isinstance(one, ServerError))

    def _scored(
        self, chunk: _Chunk, outcomes: Sequence[dict[str, Any] | Exception], seconds: float
    ) -> Scored:
        """Return the rows of a chunk, those before a problem that is to be raised."""
        rows: list[dict[str, Any]] = []
        messages: list[str] = []
        raised: Exception | None = None
        for (item, key), outcome in zip(chunk.items, outcomes, strict=True):
            score, components, problem = _reading(outcome)
            if problem is not None:
                name, reason = image_name(item.sample), str(problem)
                message = reason if name in reason else f"{name}: {self._label}: {reason}"
                if self._on_error == "raise":
                    raised = type(problem)(message)
                    raised.__cause__ = problem
                    break
                messages.append(message)
            rows.append(
                {
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
            )
        return Scored(chunk.looked_at, table_of(rows, ROWS), tuple(messages), problem=raised)


class _KnownRows:
    """Tells which samples have their row already."""

    def __init__(
        self,
        reader: SampleReader,
        made: Mapping[str, Any],
        known: Mapping[str, RowsOfId],
        *,
        retry: bool,
    ) -> None:
        self._reader = reader
        self._fingerprint = made["fingerprint"]
        self._needs_sources = "source" in made["needs"]
        self._known = known
        self._retry = retry

    def of(self, id: str) -> RowsOfId:
        """Return the rows of a sample's id, whatever the content was."""
        return self._known.get(id, ())

    def key(self, index: int) -> tuple[str, str] | None:
        """Return id and key of a sample's row, or None where its content is not known yet."""
        sample, image = self._reader.samples[index], self._reader.images_sha256[index]
        sources = self._reader.sources_sha256[index] if self._needs_sources else ()
        if image is None or sources is None:
            return None
        prompt = None if sample.prompt is None else storable(sample.prompt)
        id = storable(sample.id)
        return id, row_key(id, image, prompt, sources, self._fingerprint)

    def has_score(self, key: tuple[str, str] | None) -> bool:
        """Tell whether there is a score, so that the sample need not even be read."""
        return key is not None and dict(self.of(key[0])).get(key[1], "") is None  # the last one counts

    def has_row(self, key: tuple[str, str], problem: Exception | None) -> bool:
        """Tell whether a row need not be made: one without a score is made again where it may change.

        Args:
            key: The row's id and key.
            problem: Why the sample cannot be scored now, as far as its files say it. All files that
                cannot be read have one key, so the reason may be another than the row's.
        """
        rows = dict(self.of(key[0]))
        if key[1] not in rows:
            return False
        reason = rows[key[1]]
        if reason is None:
            return True
        return not self._retry and (problem is None or readable(str(problem)) == reason)


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
        self, metric: BaseMetric, reader: SampleReader, indices: Sequence[int], rows: _KnownRows
    ) -> None:
        self._reader = reader
        self._indices = indices
        self._rows = rows
        self._needs_prompt = "prompt" in metric.needs
        self._needs_sources = "source" in metric.needs
        self._next = 0

    def take(self, count: int) -> _Chunk:
        """Read up to `count` samples that are to be scored."""
        items: list[tuple[Item, str]] = []
        first, size = self._next, 0
        while (
            self._next < len(self._indices)
            and len(items) < count
            and size < _CHUNK_BYTES
            and self._next - first < _LOOKED_AT
        ):
            index = self._indices[self._next]
            self._next += 1
            if self._rows.has_score(self._rows.key(index)):
                continue
            item = self._checked(self._reader.read(index, sources=self._needs_sources))
            key = self._rows.key(index)
            assert key is not None
            if not self._rows.has_row(key, item.problem):
                items.append((item, key[1]))
                size += item.size
        return _Chunk(self._next - first, items)

    def _checked(self, item: Item) -> Item:
        if item.problem is None and self._needs_prompt and item.sample.prompt is None:
            name = image_name(item.sample)
            return replace(item, problem=ValueError(f"{name} has no prompt, which the metric needs"))
        return item


def _outcomes(metric: BaseMetric, items: Sequence[Item]) -> list[dict[str, Any] | Exception]:
    """Return what the metric says of each item, or why it has no score."""
    readable_items = [item for item in items if item.problem is None]
    rows = evaluate_each(
        metric,
        [item.sample.prompt or "" for item in readable_items],
        [item.images[0] for item in readable_items],
        [item.images[1:] for item in readable_items],
    )
    scored = iter(
        _with_file_name(row, item) if isinstance(row, Exception) else row
        for row, item in zip(rows, readable_items, strict=True)
    )
    return [item.problem or next(scored) for item in items]


def _with_file_name(error: Exception, item: Item) -> Exception:
    """Return the error about a sample with the name of the file that is at fault."""
    if isinstance(error, ServerError):
        return error
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

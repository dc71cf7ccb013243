"""The scores of a run: as a DataFrame, as a summary with standard errors and coverage, as a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffsynth_metrics.evaluation.fingerprint import row_key
from diffsynth_metrics.evaluation.reading import prompt_id, sample_row
from diffsynth_metrics.evaluation.run_folder import ROWS, SAMPLES, RunFolder, table_of
from diffsynth_metrics.evaluation.samples import Sample
from diffsynth_metrics.evaluation.tables import Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Results", "digest_of_images"]

_SHOWN_FAILURES = 10

_OF_SAMPLES = ("prompt_id", "seed", "category", "prompt", "image", "sources")
"""Columns that a row takes from its sample as it is now: they may change without changing a score."""


class Results:
    """The scores of samples by metrics.

    A sample without a score is NaN with its reason, and never left out in silence: coverage stands
    beside every mean.

    Example:
        >>> results = Results.open("runs/a")
        >>> print(results.summary())
        >>> results.to_pandas().query("metric == 'pickscore'")["score"]

    Attributes:
        name: What tables call the run.
        path: The run folder, or None for results in memory.
        metrics: Label of a metric to what made its scores: its provenance, its ``"fingerprint"`` and its
            ``"card"``.
        sets: Results of metrics of whole sets, such as FID: ``"metric"``, ``"score"``, ``"reference"``,
            ``"count"`` and what the metric says besides.
    """

    def __init__(
        self,
        name: str,
        *,
        metrics: Mapping[str, dict[str, Any]],
        sets: Sequence[dict[str, Any]],
        samples: pa.Table,
        rows: pa.Table,
        path: Path | None = None,
    ) -> None:
        """Hold tables; users call :func:`score`, :meth:`open` or :meth:`from_rows`."""
        self.name = name
        self.path = path
        self.metrics = dict(metrics)
        self.sets = list(sets)
        self._samples = samples
        self._rows = rows

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Results:
        """Read a run folder, also one that is still being written.

        The rows are those of the samples of the last call, made by the metrics as they were in their
        last call. A damaged part is left out with a warning in the log; its rows count as missing until
        the same call is run again.

        Raises:
            FileNotFoundError: There is no such folder, or it is no run folder.
            ValueError: A file that describes the run, or the folder of the rows, is not there or cannot
                be read; the message says what to do.
        """
        folder = RunFolder(path)
        description = folder.read_description()
        samples, metrics = folder.read_samples(), description["metrics"]
        if not all(made.get("scores_sets") for made in metrics.values()):
            folder.check_parts()
        sets = description["sets"]
        images = digest_of_images(samples.column("image_sha256").to_pylist()) if sets else None
        return cls(
            folder.path.resolve().name,
            metrics=metrics,
            sets=[
                one
                for one in sets
                if one["fingerprint"] == metrics.get(one["metric"], {}).get("fingerprint")
                and images in (None, one["images"])
            ],
            samples=samples,
            rows=_current(list(folder.parts()), samples, metrics),
            path=folder.path,
        )

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        name: str = "run",
        metrics: Mapping[str, dict[str, Any]] | None = None,
        samples: Sequence[Sample] | None = None,
    ) -> Results:
        """Make results of rows in memory.

        Args:
            rows: Dicts with at least ``"id"``, ``"metric"`` and ``"score"``; other columns may be left
                out.
            name: What tables call the run.
            metrics: Label to provenance, see the class; by default empty ones.
            samples: The samples that should have rows; by default those that have.

        Raises:
            ValueError: A row has an unknown column, or two samples have one id.
        """
        rows = [_completed(row) for row in rows]
        if metrics is None:
            metrics = {row["metric"]: {} for row in rows}
        if samples is None:
            of_samples = list({row["id"]: row for row in rows}.values())
        else:
            of_samples = [sample_row(sample) for sample in samples]
            if len({row["id"] for row in of_samples}) < len(of_samples):
                raise ValueError("give every sample an id of its own: rows are found by the id")
        table = table_of(of_samples, SAMPLES)
        known = {row["id"] for row in of_samples}
        kept = table_of([row for row in rows if row["id"] in known], ROWS)
        return cls(
            name, metrics=metrics, sets=(), samples=table, rows=_in_order(kept, table, list(metrics))
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per sample and metric, in the order of the samples, then of the metrics.

        A sample that a metric has not got to has no row. ``score`` is NaN where there is none, and
        ``error_type`` and ``error`` say why; they are None elsewhere. docs/scoring.md has the columns.
        """
        import pandas as pd

        # Texts as Python objects, because pandas 3 has another dtype for them than pandas 2.
        return pd.DataFrame(
            {
                field.name: self._rows.column(field.name).to_numpy()
                if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
                else pd.Series(_plain(self._rows.column(field.name)).to_pylist(), dtype=object)
                for field in ROWS
            }
        )

    def summary(self, by_category: bool = False) -> Table:
        """Return the mean of every metric, how sure it is, and how many samples it stands for.

        The pictures of one prompt are averaged first, because they are not independent: the mean and its
        standard error are those of prompt means. The standard error is None below two prompts.

        Args:
            by_category: One row per metric and category instead of one per metric.

        Returns:
            Columns: metric, category (if asked), mean, standard error, prompts, scored, failed, missing.
            Missing are samples that the metric has not got to.
        """
        keys = ["category"] if by_category else []
        frame = self.to_pandas()[["metric", "category", "prompt_id", "score"]]
        expected = self._expected(by_category)
        rows = []
        for label in self._labels():
            of_metric = frame[frame["metric"] == label]
            for category, count in expected.items():
                part = of_metric[_same(of_metric["category"], category)] if by_category else of_metric
                scored = part.dropna(subset=["score"])
                means = scored.groupby("prompt_id", sort=False)["score"].mean()
                with np.errstate(over="ignore", invalid="ignore"):  # of scores near a float's limit
                    mean = float(means.mean()) if len(means) else None
                    error = float(means.sem()) if len(means) > 1 else None
                rows.append(
                    (
                        label,
                        *([category] if by_category else []),
                        mean,
                        error,
                        len(means),
                        len(scored),
                        len(part) - len(scored),
                        count - len(part),
                    )
                )
        return Table(
            ("metric", *keys, "mean", "standard error", "prompts", "scored", "failed", "missing"),
            tuple(rows),
            title=f"{self.name}: {self._samples.num_rows:,} samples",
            notes=self._notes(),
        )

    def failures(self) -> Table:
        """Return the samples without a score: id, metric, image and the reason.

        For a metric of sets such as FID these are the pictures that do not exist or whose files could
        not be read; a note says how many it left out in all.
        """
        failed = self._rows.filter(pc.is_valid(self._rows.column("error_type")))
        columns = [
            _plain(failed.column(name)).to_pylist() for name in ("id", "metric", "image", "error")
        ]
        rows = list(zip(*columns, strict=True))
        unread = self._samples.filter(pc.equal(self._samples.column("image_sha256"), ""))
        of_sets = [one for one in self.sets if one.get("skipped")]
        for one in of_sets:
            for id, image in zip(
                *(unread.column(name).to_pylist() for name in ("id", "image")), strict=True
            ):
                rows.append((id, one["metric"], image, "the file could not be read"))
        notes = [
            f"{one['metric']} left out {one['skipped']:,} pictures, which the log names"
            for one in of_sets
        ]
        return Table(("id", "metric", "image", "reason"), tuple(rows), notes=tuple(notes))

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write what :meth:`to_pandas` returns as a CSV file; sources are a JSON list."""
        frame = self.to_pandas()
        frame["sources"] = frame["sources"].map(json.dumps)
        frame.to_csv(Path(path).expanduser(), index=False)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._rows.num_rows)

    def __str__(self) -> str:
        return self.summary().text()

    def __repr__(self) -> str:
        """Show the name, how many samples there are and the metrics."""
        return f"Results({self.name!r}, {self._samples.num_rows} samples, {', '.join(self.metrics)})"

    def _repr_html_(self) -> str:
        failures = self.failures()
        if not failures.rows:
            return self.summary().html()
        shown = Table(failures.columns, failures.rows[:_SHOWN_FAILURES])
        head = f"{len(failures.rows):,} scores are missing" + (
            f"; the first {_SHOWN_FAILURES}" if len(failures.rows) > _SHOWN_FAILURES else ""
        )
        return (
            f"{self.summary().html()}<details><summary>{escape(head)}</summary>{shown.html()}</details>"
        )

    def _expected(self, by_category: bool) -> dict[str | None, int]:
        """Return how many samples each category has; without categories, all of them under None."""
        if not by_category:
            return {None: self._samples.num_rows}
        counts: dict[str | None, int] = {}
        for category in self._samples.column("category").to_pylist():
            counts[category] = counts.get(category, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (item[0] is None, item[0])))

    def _labels(self) -> list[str]:
        """Return the metrics that score single samples."""
        return [label for label, made in self.metrics.items() if not made.get("scores_sets")]

    def _notes(self) -> tuple[str, ...]:
        notes = [
            f"{one['metric']}: {one['score']:.4g}, {one['count']:,} pictures against {one['reference']}"
            for one in self.sets
        ]
        failed = self._rows.num_rows - self._rows.column("error_type").null_count
        if not self._rows.num_rows and self._labels():
            notes.append("there are no rows: nothing was scored yet, or the parts were deleted")
        if failed:
            notes.append(f"{failed:,} of {self._rows.num_rows:,} rows have no score")
        return tuple(notes)


def digest_of_images(images: Sequence[str | None]) -> str | None:
    """Return a sha256 of a set of pictures, whatever their order; None where one is not known."""
    known = sorted(image for image in images if image is not None)
    if len(known) < len(images):
        return None
    return hashlib.sha256(" ".join(known).encode()).hexdigest()


def _completed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with what its other columns say of it."""
    if unknown := sorted(row.keys() - set(ROWS.names)):
        raise ValueError(f"a row has no column {unknown[0]!r}; there are {', '.join(ROWS.names)}")
    score = float(row["score"]) if row.get("score") is not None else math.nan
    if not math.isfinite(score):
        score = math.nan
    completed = {
        "image": "",
        "sources": [],
        **row,
        "score": score,
        "prompt_id": prompt_id(row.get("prompt_id"), row.get("prompt"), row["id"]),
    }
    if math.isnan(score) and row.get("error_type") is None:
        completed["error_type"], completed["error"] = (
            "ArithmeticError",
            "the score is not a finite number",
        )
    return completed


def _current(
    parts: Sequence[pa.Table], samples: pa.Table, metrics: Mapping[str, dict[str, Any]]
) -> pa.Table:
    """Choose the rows that are of these samples and metrics as they are now.

    A row is found by its key. Of a sample that the last call did not come to, because it was killed, the
    last row with the same prompt counts.
    """
    rows = pa.concat_tables(parts).unify_dictionaries() if parts else table_of([], ROWS)
    chosen = np.full((len(metrics), samples.num_rows), -1)
    for of_label, (label, made) in zip(chosen, metrics.items(), strict=True):
        of_metric = pc.and_(
            pc.equal(rows.column("metric"), label),
            pc.equal(rows.column("fingerprint"), made["fingerprint"]),
        )
        found = rows.select(["id", "key", "prompt"]).filter(of_metric)
        place = pc.index_in(found.column("id"), value_set=samples.column("id"))
        key = pa.array(_keys(samples, made), pa.string()).take(place)
        prompt = samples.column("prompt").take(place)
        is_current = pc.if_else(
            pc.is_valid(key),
            pc.fill_null(pc.equal(found.column("key"), key), False),
            pc.and_(pc.is_valid(place), _equal(found.column("prompt"), prompt)),
        ).to_numpy()
        # Of several rows the last: the same position is assigned to in their order.
        of_label[place.to_numpy()[is_current].astype(int)] = np.flatnonzero(of_metric)[is_current]
    return _in_order(rows.take(pa.array(chosen[chosen >= 0])), samples, list(metrics))


def _equal(first: pa.ChunkedArray, second: pa.ChunkedArray) -> pa.ChunkedArray:
    """Compare texts, of which None equals None."""
    both_none = pc.and_(pc.is_null(first), pc.is_null(second))
    return pc.or_(both_none, pc.fill_null(pc.equal(first, second), False))


def _keys(samples: pa.Table, made: Mapping[str, Any]) -> list[str | None]:
    """Return the key of each sample's row; None where its content is not known."""
    columns = [samples.column(name).to_pylist() for name in ("id", "image_sha256", "prompt")]
    needs_sources = "source" in made["needs"]
    keys: list[str | None] = []
    sources = samples.column("sources_sha256").to_pylist()
    for (id, image, prompt), of_sample in zip(zip(*columns, strict=True), sources, strict=True):
        if image is None or (needs_sources and of_sample is None):
            keys.append(None)
        else:
            used = of_sample if needs_sources else ()
            keys.append(row_key(id, image, prompt, used, made["fingerprint"]))
    return keys


def _in_order(rows: pa.Table, samples: pa.Table, labels: Sequence[str]) -> pa.Table:
    """Sort rows by sample and metric, and let them say of their samples what is so now."""
    positions = _positions(rows.column("id"), samples.column("id"))
    order = np.lexsort(
        (_positions(_plain(rows.column("metric")), pa.array(labels, pa.string())), positions)
    )
    rows = rows.take(order)
    of_rows = samples.take(positions[order])
    for name in _OF_SAMPLES:
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, ROWS.field(name), of_rows.column(name).cast(ROWS.field(name).type))
    return rows


def _positions(texts: pa.ChunkedArray, among: pa.ChunkedArray | pa.Array) -> Any:
    """Return where each of the texts is, or the number of all where it is not."""
    return pc.fill_null(pc.index_in(texts, value_set=among), len(among)).to_numpy()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column with its values instead of a dictionary."""
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column


def _same(categories: Any, category: str | None) -> Any:
    return categories.isna() if category is None else categories == category

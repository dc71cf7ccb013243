"""Rows of two runs, side by side: which pictures have a partner, and why the others do not count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from diffsynth_metrics.evaluation.reading import prompt_id

if TYPE_CHECKING:
    from diffsynth_metrics.evaluation.results import Results

__all__ = ["Pair", "RunRows", "read_runs"]

_COLUMNS = (
    *("id", "prompt_id", "seed", "category", "prompt", "image", "image_sha256", "metric", "score"),
    *(
        "error_type",
        "metric_version",
        "weights",
        "config",
        "fingerprint",
        "device",
        "torch",
        "sources",
        "key",
    ),
)


@dataclass(frozen=True)
class RunRows:
    """A run under the name that the comparison gives it.

    Attributes:
        name: No other run of the comparison has it.
        results: The run.
        rows: One per picture and metric, sorted by prompt, seed and id; None for what is not known.
            ``score`` is the one that counts, ``own_score`` the one that the run has, see
            :func:`read_runs`.
    """

    name: str
    results: Results
    rows: pd.DataFrame

    def of(self, metric: str) -> pd.DataFrame:
        """Return the rows of a metric."""
        return self.rows[self.rows["metric"] == metric]

    def scored(self, metric: str) -> pd.DataFrame:
        """Return the rows of a metric that have a score."""
        return self.rows[(self.rows["metric"] == metric) & np.isfinite(self.rows["score"])]


def read_runs(runs: Sequence[Results], *, by_text: bool, by_seed: bool) -> tuple[RunRows, ...]:
    """Read the rows of runs.

    The same picture with the same prompt, scored by the same metric, has one score: that of the first
    run that has it. Batches of other sizes move the last digits, and a test of ranks would count that.

    Args:
        runs: The runs; runs of one name are called after their parent folders, or numbered.
        by_text: Whether the text of a prompt identifies it, instead of its ``prompt_id``.
        by_seed: Whether seeds are looked at.
    """
    frames = _share_scores([_read_rows(run, by_text, by_seed) for run in runs])
    return tuple(
        RunRows(name, run, frame)
        for name, run, frame in zip(_unique_names(runs), runs, frames, strict=True)
    )


def _unique_names(runs: Sequence[Results]) -> list[str]:
    shared = Counter(run.name for run in runs)
    seen: Counter[str] = Counter()
    names = []
    for run in runs:
        name = run.name
        if shared[name] > 1 and run.path is not None:
            name = f"{Path(run.path).absolute().parent.name}/{name}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _read_rows(run: Results, by_text: bool, by_seed: bool) -> pd.DataFrame:
    frame = run.to_pandas().reindex(columns=list(_COLUMNS))
    scores = pd.to_numeric(frame.pop("score")).astype(float)
    frame = frame.astype(object).where(frame.notna(), None)
    frame["score"] = scores
    frame["own_score"] = scores
    frame["content"] = _contents(run, frame)
    frame["seed"] = frame["seed"].map(str, na_action="ignore") if by_seed else None
    if by_text:
        texts = zip(frame["prompt_id"], frame["prompt"], strict=True)
        frame["prompt_id"] = [own if text is None else prompt_id(None, text, own) for own, text in texts]
    return frame.sort_values(["prompt_id", "seed", "id"], ignore_index=True)


def _contents(run: Results, frame: pd.DataFrame) -> list[tuple[Any, ...] | None]:
    """Return what each score was made of and by: equal where it must be the same; None if not known."""
    uses_sources = {
        label: "source" in made.get("needs", ("source",)) for label, made in run.metrics.items()
    }
    contents: list[tuple[Any, ...] | None] = []
    names = ("metric", "image_sha256", "prompt", "fingerprint", "sources", "key")
    for metric, image, prompt, fingerprint, sources, key in zip(
        *(frame[name] for name in names), strict=True
    ):
        used = sources is not None and len(sources) > 0 and uses_sources.get(metric, True)
        if not image or not fingerprint or (used and not key):
            contents.append(None)
        else:
            # A row has the names of its sources only; what is in them is in its key.
            contents.append((metric, image, prompt, fingerprint, key if used else ""))
    return contents


def _share_scores(frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Give rows of one content the first score among them."""
    first: dict[tuple[Any, ...], float] = {}
    shared = []
    for frame in frames:
        scores = [
            score if content is None or not np.isfinite(score) else first.setdefault(content, score)
            for content, score in zip(frame["content"], frame["score"], strict=True)
        ]
        shared.append(frame.drop(columns="content").assign(score=np.array(scores, dtype=np.float64)))
    return shared


@dataclass(frozen=True)
class Pair:
    """All rows of one metric in two runs.

    Attributes:
        metric: Label of the metric.
        first: Name of the run that is compared against.
        second: Name of the other.
        higher_is_better: Direction of the metric.
        rows_first: Rows of the metric in the first run, whether they have a score or not.
        rows_second: Likewise.
    """

    metric: str
    first: str
    second: str
    higher_is_better: bool
    rows_first: pd.DataFrame
    rows_second: pd.DataFrame

    @cached_property
    def reasons(self) -> tuple[pd.Series[Any], pd.Series[Any]]:
        """Why each row of the first and of the second run does not count, or None where it does."""
        return self._reasons_among(self.rows_first, self.rows_second)

    def counting(self, category: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the rows of both runs that count, of all prompts or of a category.

        Both have the same prompts and, where all pictures of a prompt name their seeds, the same seeds.
        """
        first, second, reasons = self.rows_first, self.rows_second, self.reasons
        if category is not None:
            first, second = first[first["category"] == category], second[second["category"] == category]
            reasons = self._reasons_among(first, second)
        return first[reasons[0].isna()], second[reasons[1].isna()]

    def _reasons_among(
        self, first: pd.DataFrame, second: pd.DataFrame
    ) -> tuple[pd.Series[Any], pd.Series[Any]]:
        return _reasons(first, second, self.second), _reasons(second, first, self.first)

    def left_out(self) -> list[tuple[str, str, str, int, int, str]]:
        """Return what does not count: metric, run, reason, number of images, of prompts, an id."""
        found = []
        for name, rows, reasons in zip(
            (self.first, self.second), (self.rows_first, self.rows_second), self.reasons, strict=True
        ):
            for reason, left_out in rows.groupby(reasons, sort=True):
                prompts, example = left_out["prompt_id"].nunique(), str(left_out["id"].iloc[0])
                found.append((self.metric, name, str(reason), len(left_out), prompts, example))
        return found

    def prompts_with_two_ids(self) -> list[tuple[str, str, str]]:
        """Return prompts of one text that do not pair: their id in the first and second run, the text.

        Edits are not among them: the same words for another picture are another prompt.
        """
        columns = ["prompt_id", "prompt"]
        first, second = (
            rows.loc[~rows["prompt_id"].isin(other["prompt_id"]) & ~_has_sources(rows), columns]
            .dropna()
            .drop_duplicates("prompt")
            for rows, other in (
                (self.rows_first, self.rows_second),
                (self.rows_second, self.rows_first),
            )
        )
        both = first.merge(second, on="prompt", suffixes=("_first", "_second"))
        return list(zip(both["prompt_id_first"], both["prompt_id_second"], both["prompt"], strict=True))

    def side_by_side(self) -> pd.DataFrame:
        """Return the pictures that count next to their partners, the largest gain first."""
        first, second = self.counting()
        sides = []
        for rows, other in ((first, second), (second, first)):
            rows = rows.assign(key=np.where(_names_seeds(rows, other), rows["seed"], ""))
            sides.append(rows.assign(number=rows.groupby(["prompt_id", "key"]).cumcount()))
        table = sides[0].merge(
            sides[1], on=["prompt_id", "key", "number"], suffixes=("_first", "_second")
        )
        change = table["score_second"] - table["score_first"]
        table["gain"] = change if self.higher_is_better else -change
        shared = ("seed", "prompt", "category")
        table = table.rename(columns={f"{name}_first": name for name in shared})
        columns = [f"{name}_{run}" for run in ("first", "second") for name in ("id", "image", "score")]
        table = table[["prompt_id", *shared, *columns, "gain"]]
        return table.sort_values("gain", ascending=False, kind="stable", ignore_index=True)


def _has_sources(rows: pd.DataFrame) -> pd.Series[bool]:
    return rows["sources"].map(lambda names: names is not None and len(names) > 0).astype(bool)


def _reasons(rows: pd.DataFrame, other: pd.DataFrame, name: str) -> pd.Series[Any]:
    """Return why each row does not count, or None where it does.

    Args:
        rows: Rows of a metric in one run.
        other: Rows of it in the other run.
        name: Name of the other run.
    """
    keys, other_keys = _keys(rows), _keys(other)
    other_is_scored = np.isfinite(other["score"].to_numpy())
    by_seed = _names_seeds(rows, other)
    has_seed = ~by_seed | keys.isin(other_keys)
    has_score = np.where(
        by_seed,
        keys.isin(other_keys[other_is_scored]),
        rows["prompt_id"].isin(other.loc[other_is_scored, "prompt_id"]),
    )
    unscored = ~np.isfinite(rows["score"])
    reasons = pd.Series(None, index=rows.index, dtype=object)
    # Where several hold, the last is told.
    reasons[~has_score] = f"no score in {name}"
    reasons[~has_seed] = f"its seed is not in {name}"
    reasons[~rows["prompt_id"].isin(other["prompt_id"])] = f"its prompt is not in {name}"
    reasons[unscored] = "no score: " + rows.loc[unscored, "error_type"].fillna("no finite number")
    return reasons


def _names_seeds(rows: pd.DataFrame, other: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Whether all pictures of a row's prompt name their seeds, in both runs."""
    unnamed = {
        prompt for frame in (rows, other) for prompt in frame.loc[frame["seed"].isna(), "prompt_id"]
    }
    named: npt.NDArray[np.bool_] = ~rows["prompt_id"].isin(unnamed).to_numpy()
    return named


def _keys(rows: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_arrays([rows["prompt_id"], rows["seed"]])

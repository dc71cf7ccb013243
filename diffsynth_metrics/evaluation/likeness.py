"""Whether scores of runs were made alike; what differs is spelled out, and refused unless allowed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffsynth_metrics.evaluation.fingerprint import CHANGES_SCORES, INERT, INERT_OPTIONS
from diffsynth_metrics.evaluation.pairing import RunRows

__all__ = [
    "Differing",
    "check_allowed",
    "different_environments",
    "different_prompts",
    "different_set_settings",
    "different_settings",
    "listed",
    "refuse",
    "same_runs",
    "several_of_one_seed",
    "shared_scores",
    "unknown_weights",
]

_NOTED = {"metric_version": "version of this package", "torch": "version of torch", "device": "device"}
"""Columns whose difference is told and not refused: they move scores by rounding, if at all."""

_SET_SETTINGS = ("preprocessing", "weights", "dtype", "options", "fingerprint")
"""What two numbers of whole sets of pictures, such as FID, must have in common besides the reference."""

_DESCRIBING = ("card", "needs", "scores_sets")
"""Fields of ``Results.metrics`` that follow from the metric and are no settings."""


@dataclass(frozen=True)
class Differing:
    """One thing in which two runs were made differently.

    Attributes:
        field: What ``allow`` calls it.
        message: Where, and its values in both runs.
    """

    field: str
    message: str

    def is_allowed(self, allow: Sequence[str]) -> bool:
        """Whether it is allowed; ``"options"`` allows all options, ``"options.x"`` a single one."""
        return self.field in allow or self.field.partition(".")[0] in allow


def refuse(differing: Sequence[Differing], allow: Sequence[str]) -> None:
    """Raise a ValueError that spells out the differences that are not allowed."""
    refused = [found for found in differing if not found.is_allowed(allow)]
    if refused:
        names = tuple(dict.fromkeys([*allow, *(found.field for found in refused)]))
        raise ValueError(
            f"Make the runs alike, or pass allow={names!r} if that is what you want to compare:\n"
            + "\n".join(f"  {found.message}" for found in refused)
        )


def check_allowed(allow: Sequence[str], metrics: Sequence[str], runs: Sequence[RunRows]) -> None:
    """Raise a ValueError for a name that is no setting of these runs, nor of any metric."""
    fields = (name for metric in metrics for run in runs for name in _settings(metric, run))
    known = {name.partition(".")[0] for name in fields}
    known |= {*CHANGES_SCORES, *_SET_SETTINGS, "prompt", "reference"}
    for name in allow:
        if name.partition(".")[0] not in known:
            raise ValueError(f"allow names what may differ, of {listed(sorted(known))}; got {name!r}")


def different_settings(metrics: Sequence[str], runs: Sequence[RunRows]) -> Iterator[Differing]:
    """Yield what made scores of a metric differently than in the first run.

    Raises:
        ValueError: The scores of one run were made in several ways.
    """
    first, *others = runs
    for metric in metrics:
        own = _settings(metric, first)
        for run in others:
            theirs = _settings(metric, run)
            if own and theirs:
                yield from _compare(metric, first.name, own, run.name, theirs)


def _compare(
    metric: str, first: str, own: Mapping[str, Any], second: str, theirs: Mapping[str, Any]
) -> Iterator[Differing]:
    differ = [name for name in dict.fromkeys([*own, *theirs]) if own.get(name) != theirs.get(name)]
    # A difference that no field explains is still one.
    fields = [name for name in differ if name != "fingerprint"] or differ
    yield from _spelled_out(metric, fields, first, own, second, theirs)


def different_set_settings(
    first: RunRows, own: Mapping[str, Any], second: RunRows, theirs: Mapping[str, Any]
) -> Iterator[Differing]:
    """Yield what made two numbers of whole sets, entries of ``Results.sets``, differently."""
    metric = own["metric"]
    ours, others = _set_settings(first, own), _set_settings(second, theirs)
    yield from _compare(metric, first.name, ours, second.name, others)
    if _reference(own) != _reference(theirs):
        # Another folder of the same name is another reference.
        names = [" ".join(filter(None, _named_reference(entry))) for entry in (own, theirs)]
        values = f"{names[0]} in {first.name!r}, {names[1]} in {second.name!r}"
        yield Differing("reference", f"{metric}: reference is {values}")


def _set_settings(run: RunRows, entry: Mapping[str, Any]) -> dict[str, Any]:
    made = {**run.results.metrics.get(entry["metric"], {}), **entry}
    return _flat({name: made.get(name) for name in _SET_SETTINGS})


def _reference(entry: Mapping[str, Any]) -> Any:
    return entry.get("reference_sha256") or entry.get("reference")


def _named_reference(entry: Mapping[str, Any]) -> tuple[str, str]:
    digest = entry.get("reference_sha256")
    return str(entry.get("reference")), f"(sha256 {digest[:12]})" if digest else ""


def _spelled_out(
    metric: str,
    fields: Iterable[str],
    first: str,
    own: Mapping[str, Any],
    second: str,
    theirs: Mapping[str, Any],
) -> Iterator[Differing]:
    for name in fields:
        values = f"{_brief(own.get(name))} in {first!r}, {_brief(theirs.get(name))} in {second!r}"
        yield Differing(name, f"{metric}: {name} is {values}")


def _settings(metric: str, run: RunRows) -> dict[str, Any]:
    """Return what made a run's scores of a metric; nothing where there is no score."""
    made = run.scored(metric).drop_duplicates("fingerprint")
    ways = [_row_settings(row) for row in made.to_dict("records")]
    if len(ways) > 1:
        fields = [name for name in ways[0] if len({_brief(way.get(name)) for way in ways}) > 1]
        raise ValueError(
            f"Score {run.name!r} anew into an empty folder: its scores of {metric} were made in "
            f"{len(ways)} ways:\n"
            + "\n".join(
                f"  {name}: {', '.join(_brief(way.get(name)) for way in ways)}" for name in fields
            )
        )
    return {**_flat(run.results.metrics[metric]), **ways[0]} if ways else {}


def _row_settings(row: Mapping[Any, Any]) -> dict[str, Any]:
    return _flat(
        {name: row[name] for name in ("weights", "fingerprint")} | json.loads(row["config"] or "{}")
    )


def _flat(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes scores, with the options and the like as ``"options.NAME"``."""
    settings: dict[str, Any] = {}
    for name, value in made.items():
        if isinstance(value, dict):
            settings.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            settings[name] = value
    inert = {*INERT, *(f"options.{name}" for name in INERT_OPTIONS)}
    return {
        name: value
        for name, value in settings.items()
        if name not in inert and name.partition(".")[0] not in _DESCRIBING
    }


def different_prompts(runs: Sequence[RunRows]) -> Iterator[Differing]:
    """Yield a few prompts that have several texts under one ``prompt_id``, in one run or in several."""
    columns = ["prompt_id", "prompt"]
    texts = pd.concat([run.rows[columns].dropna().assign(run=run.name) for run in runs])
    texts = texts.drop_duplicates(columns)
    several = list(texts[texts["prompt_id"].duplicated(keep=False)].groupby("prompt_id", sort=True))
    for prompt_id, group in several[:3]:
        which = ", ".join(f"{_brief(row.prompt)!r} in {row.run!r}" for row in group.itertuples())
        yield Differing("prompt", f"prompt of {prompt_id} is {which}")
    if len(several) > 3:
        yield Differing("prompt", f"prompt of {len(several) - 3} more")


def different_environments(runs: Sequence[RunRows]) -> Iterator[str]:
    """Yield notes on what moves scores by rounding, if at all."""
    for column, what in _NOTED.items():
        values = [", ".join(sorted(map(str, run.rows[column].dropna().unique()))) for run in runs]
        if len(set(values)) > 1:
            which = "; ".join(
                f"{value} in {run.name!r}" for value, run in zip(values, runs, strict=True)
            )
            yield f"another {what}: {which}"


def unknown_weights(metrics: Sequence[str], runs: Sequence[RunRows]) -> Iterator[str]:
    """Yield notes on metrics of which nothing tells the weights, such as judges behind a server."""
    for metric in metrics:
        for run in runs:
            rows = run.scored(metric)
            # Without a file, the fingerprint tells the weights of a network that is in memory here.
            elsewhere = "engine" in run.results.metrics[metric] or rows["fingerprint"].isna().any()
            if elsewhere and rows["weights"].isna().any():
                yield f"{metric}: its weights are not known, so nothing shows that they are the same"
                break


def same_runs(runs: Sequence[RunRows]) -> Iterator[tuple[str, str]]:
    """Yield the names of each run that is an earlier one once more, the earlier one first."""
    for position, run in enumerate(runs):
        for earlier in runs[:position]:
            if run.results is earlier.results or _same_folder(run, earlier):
                yield earlier.name, run.name
                break


def _same_folder(run: RunRows, other: RunRows) -> bool:
    paths = [each.results.path for each in (run, other)]
    return None not in paths and len({Path(path).resolve() for path in paths if path is not None}) == 1


def shared_scores(metrics: Sequence[str], runs: Sequence[RunRows]) -> Iterator[str]:
    """Yield notes on scores that another score of the same picture replaces."""
    for metric in metrics:
        for run in runs:
            rows = run.scored(metric)
            change = (rows["score"] - rows["own_score"]).abs()
            if count := int((change > 0).sum()):
                yield (
                    f"{metric}: {count} score{'s' if count > 1 else ''} of {run.name} count as the "
                    f"first score of the same picture, prompt and metric, which differs by up to "
                    f"{change.max():.1g}"
                )


def several_of_one_seed(runs: Sequence[RunRows]) -> Iterator[str]:
    """Yield notes on prompts that have several pictures of one seed."""
    for run in runs:
        pictures = run.rows[["prompt_id", "seed", "id"]].dropna().drop_duplicates()
        several = pictures[pictures.duplicated(["prompt_id", "seed"])]
        if len(several):
            prompts, such = several["prompt_id"].nunique(), several.iloc[0]
            yield (
                f"{run.name}: {prompts} prompt{'s have' if prompts > 1 else ' has'} several pictures of "
                f"one seed, which are averaged, such as seed {such['seed']} of {such['prompt_id']!r}"
            )


def listed(texts: Iterable[str]) -> str:
    """Return names for a message, in quotes."""
    return ", ".join(map(repr, texts)) or "none"


def _brief(value: Any) -> str:
    """Return a value for a message, which tells a long one by its beginning."""
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

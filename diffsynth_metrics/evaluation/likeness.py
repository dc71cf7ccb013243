"""Whether scores of runs were made alike; what differs is spelled out, and refused unless allowed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from diffsynth_metrics.evaluation.pairing import RunRows

__all__ = [
    "Differing",
    "different_environments",
    "different_prompts",
    "different_set_settings",
    "different_settings",
    "listed",
    "refuse",
]

_NOTED = {"metric_version": "version of this package", "torch": "version of torch", "device": "device"}
"""Columns whose difference is told and not refused: they move scores by rounding, if at all."""

_SET_SETTINGS = ("reference", "preprocessing", "weights", "dtype", "options")
"""What two numbers of whole sets of pictures, such as FID, must have in common."""


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
    named = [name for name in differ if name not in ("fingerprint", "metric_version")]
    # Another version makes another fingerprint, and is noted only; one that nothing explains is refused.
    fields = named or (["fingerprint"] if differ == ["fingerprint"] else [])
    yield from _spelled_out(metric, fields, first, own, second, theirs)


def different_set_settings(
    metric: str, first: str, own: Mapping[str, Any], second: str, theirs: Mapping[str, Any]
) -> Iterator[Differing]:
    """Yield what made two numbers of whole sets differently; the arguments are names and results."""
    fields = [name for name in _SET_SETTINGS if own.get(name) != theirs.get(name)]
    yield from _spelled_out(metric, fields, first, own, second, theirs)


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
    ways = [_flat_settings(row) for row in made.to_dict("records")]
    if len(ways) > 1:
        fields = [name for name in ways[0] if len({_brief(way.get(name)) for way in ways}) > 1]
        raise ValueError(
            f"Score {run.name!r} anew into an empty folder: its scores of {metric} were made in "
            f"{len(ways)} ways:\n"
            + "\n".join(
                f"  {name}: {', '.join(_brief(way.get(name)) for way in ways)}" for name in fields
            )
        )
    return ways[0] if ways else {}


def _flat_settings(row: Mapping[Any, Any]) -> dict[str, Any]:
    settings = {name: row[name] for name in ("weights", "metric_version", "fingerprint")}
    for name, value in json.loads(row["config"] or "{}").items():
        if isinstance(value, dict):
            settings.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            settings[name] = value
    return settings


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


def listed(texts: Iterable[str]) -> str:
    """Return names for a message, in quotes."""
    return ", ".join(map(repr, texts)) or "none"


def _brief(value: Any) -> str:
    """Return a value for a message, which tells a long one by its beginning."""
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Rows become the items of a report's gallery: pictures of one prompt and seed, with their scores."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote

import PIL.Image
from tqdm import tqdm

from diffsynth_metrics.evaluation.reading import read_image
from diffsynth_metrics.evaluation.samples import open_reference
from diffsynth_metrics.inputs import as_rgb, open_image

__all__ = [
    "Item",
    "Picture",
    "ScoredPicture",
    "by_importance",
    "finite",
    "gather_items",
    "read_pictures",
    "text_of",
]

Row: TypeAlias = "Mapping[str, Any]"
"""A row of ``Results.to_pandas``."""

_WEBP_QUALITY = 75
_SECONDS_WITHOUT_PROGRESS = 3


class ScoredPicture(NamedTuple):
    """A picture as rows have it: under one name, two runs may have scored different contents.

    Attributes:
        name: The file, or the member of a shard.
        sha256: Of what was scored; None where that is not known, as of sources.
    """

    name: str
    sha256: str | None


@dataclass
class Item:
    """What the gallery shows side by side. Lists have one entry per run.

    Attributes:
        prompt: The text; None where there is none.
        prompt_id: What items of one prompt have in common.
        seed: Which picture of its prompt it is.
        category: The group it belongs to.
        ids: Names of the samples; None where a run has none.
        pictures: The pictures; None where a run has none.
        sources: The pictures that they were made from.
        scores: Per metric one score per run; None where there is none.
        errors: Per metric one reason per run; None where there is a score, or no row.
    """

    prompt: str | None
    prompt_id: str | None
    seed: str | None
    category: str | None
    ids: list[str | None]
    pictures: list[ScoredPicture | None]
    sources: list[ScoredPicture]
    scores: list[list[float | None]]
    errors: list[list[str | None]]


@dataclass(frozen=True)
class Picture:
    """How the page shows a picture.

    Attributes:
        source: A ``data:`` address with a small copy, or a relative address of the file; may be empty.
        link: The file's address relative to the report; empty for a picture inside another file.
        name: The file, as the rows have it.
        problem: Why there is nothing to show; empty where there is.
    """

    source: str
    link: str
    name: str
    problem: str = ""


def gather_items(rows_by_run: Sequence[Iterable[Row]], metrics: Sequence[str]) -> list[Item]:
    """Put the samples of several runs next to each other, in the order of the rows.

    Samples of one prompt and seed belong together. Where seeds do not tell, those of one id do, and
    where runs call their samples differently, the first of a prompt goes with the first, and so on.

    Args:
        rows_by_run: The rows of each run, see ``Results.to_pandas``.
        metrics: The metrics, in the order of `Item.scores`.
    """
    samples = [_samples(rows) for rows in rows_by_run]
    partners = _partners(samples)
    numbers = {metric: number for number, metric in enumerate(metrics)}
    items: dict[tuple[str, str | int], Item] = {}
    for run, by_id in enumerate(samples):
        for name, rows in by_id.items():
            key = partners[run, name]
            if key not in items:
                items[key] = _empty_item(rows[0], len(samples), len(metrics))
            item = items[key]
            item.ids[run] = name
            digest = text_of(rows[0].get("image_sha256")) or None
            item.pictures[run] = ScoredPicture(text_of(rows[0].get("image")) or "", digest)
            for row in rows:
                number = numbers[row["metric"]]
                item.scores[number][run] = finite(row.get("score"))
                item.errors[number][run] = _reason(row)
    return list(items.values())


def _samples(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of every sample."""
    by_id: dict[str, list[Row]] = {}
    for row in rows:
        by_id.setdefault(str(row["id"]), []).append(row)
    return by_id


def _partners(
    samples: Sequence[Mapping[str, list[Row]]],
) -> dict[tuple[int, str], tuple[str, str | int]]:
    """Return for each sample, by run and id, what it has in common with its partners alone."""
    prompts: dict[str, list[list[Row]]] = {}
    for run, by_id in enumerate(samples):
        for rows in by_id.values():
            prompt = str(rows[0]["prompt_id"])
            prompts.setdefault(prompt, [[] for _ in samples])[run].append(rows[0])
    return {
        (run, str(row["id"])): (prompt, name)
        for prompt, runs in prompts.items()
        for run, named in enumerate(_names(runs))
        for row, name in named
    }


def _names(runs: Sequence[list[Row]]) -> list[list[tuple[Row, str | int]]]:
    """Call the samples of one prompt so that partners have one name."""
    for column in ("seed", "id"):
        names = [[text_of(row.get(column)) for row in rows] for rows in runs]
        known = all(name is not None for row in names for name in row)
        different = all(len(set(row)) == len(row) for row in names)
        shared = len({name for row in names for name in row}) < sum(map(len, names))
        if known and different and shared:
            return [
                [(row, str(name)) for row, name in zip(rows, run, strict=True)]
                for rows, run in zip(runs, names, strict=True)
            ]
    by_id = [sorted(rows, key=lambda row: str(row["id"])) for rows in runs]
    return [[(row, number) for number, row in enumerate(rows)] for rows in by_id]


def _empty_item(row: Row, runs: int, metrics: int) -> Item:
    sources = row.get("sources")
    if sources is None or isinstance(sources, float):
        sources = []
    return Item(
        prompt=text_of(row.get("prompt")),
        prompt_id=text_of(row.get("prompt_id")),
        seed=text_of(row.get("seed")),
        category=text_of(row.get("category")),
        ids=[None] * runs,
        pictures=[None] * runs,
        sources=[ScoredPicture(str(source), None) for source in sources],
        scores=[[None] * runs for _ in range(metrics)],
        errors=[[None] * runs for _ in range(metrics)],
    )


def _reason(row: Row) -> str | None:
    """Return why there is no score."""
    reason = text_of(row.get("error"))
    if reason is None and finite(row.get("score")) is None:
        return f"the score is {row.get('score')}"
    return reason


def text_of(value: object) -> str | None:
    """Return a value of a row as text; None for pandas' ways to say that there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or str(value) == "<NA>":
        return None
    return str(value)


def finite(value: Any) -> float | None:
    """Return a score as a float; None for what is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def by_importance(items: Sequence[Item]) -> list[Item]:
    """Return the items in the order in which their pictures get room in the page.

    First those without a score, then both ends of every metric's order in turn: the largest and the
    smallest changes from the first run to the second or, in one run, the largest and smallest scores.
    """
    ranks = {id(item): math.inf for item in items}
    for metric in range(len(items[0].scores) if items else 0):
        changes = [(_change(item.scores[metric]), order, item) for order, item in enumerate(items)]
        known = sorted((change, order, item) for change, order, item in changes if change is not None)
        for rank, (_, _, item) in enumerate(known):
            ranks[id(item)] = min(ranks[id(item)], rank, len(known) - 1 - rank)
    for item in items:
        if any(reason for reasons in item.errors for reason in reasons):
            ranks[id(item)] = -1
    return sorted(items, key=lambda item: ranks[id(item)])


def _change(scores: Sequence[float | None]) -> float | None:
    """Return how the second run differs from the first; of one run, its score."""
    if len(scores) == 1:
        return scores[0]
    first, second = scores[:2]
    return None if first is None or second is None else second - first


def read_pictures(
    scored: Iterable[ScoredPicture], folder: Path, *, side: int, size_limit: int
) -> dict[ScoredPicture, Picture]:
    """Return how the page shows each picture.

    Args:
        scored: The pictures as rows have them, the most important first.
        folder: Where the report is written; addresses are relative to it.
        side: Longest side of a small copy, in pixels.
        size_limit: How many bytes small copies may take in the page.
    """
    pictures: dict[ScoredPicture, Picture] = {}
    left = size_limit
    different = list(dict.fromkeys(scored))
    for one in tqdm(different, "small pictures", delay=_SECONDS_WITHOUT_PROGRESS):
        picture = _small_copy(one, folder, side) if left > 0 else None
        if picture is None or len(picture.source) > left:
            left = 0
            picture = _linked(one.name, folder, size_limit)
        left -= len(picture.source) if picture.source.startswith("data:") else 0
        pictures[one] = picture
    return pictures


def _small_copy(scored: ScoredPicture, folder: Path, side: int) -> Picture:
    reference = scored.name
    if not reference:
        return Picture("", "", "", "the run does not know a file of this picture")
    try:
        image = open_reference(reference)
        encoded = image.read_bytes() if isinstance(image, Path) else image.read()
        if scored.sha256 and not _is_what_was_scored(encoded, scored.sha256):
            return Picture("", "", reference, f"{reference} has changed since it was scored")
        small = as_rgb(open_image(encoded, reference)).copy()
        small.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    except Exception as error:  # one damaged shard must not cost the whole report
        return Picture("", "", reference, str(error) or repr(error))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_WEBP_QUALITY)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(source, _address(image, folder), reference)


def _is_what_was_scored(encoded: bytes, sha256: str) -> bool:
    if hashlib.sha256(encoded).hexdigest() == sha256:
        return True
    # A picture that was opened by the caller was scored, and hashed, as pixels.
    with PIL.Image.open(io.BytesIO(encoded)) as opened:
        return read_image(opened, "the picture")[1] == sha256


def _linked(reference: str, folder: Path, size_limit: int) -> Picture:
    """Return the file itself instead of a small copy of it."""
    try:
        image = open_reference(reference)
    except Exception as error:
        return Picture("", "", reference, str(error) or repr(error))
    if not isinstance(image, Path):
        limit = f"size_limit={size_limit}"
        return Picture("", "", reference, f"no room for it in the page ({limit}): it is in {reference}")
    if not image.is_file():
        return Picture("", "", reference, f"there is no file {str(image)!r}")
    address = _address(image, folder)
    return Picture(address, address, reference)


def _address(image: Any, folder: Path) -> str:
    """Return the address of a file, as the report names it; empty for a picture inside another file."""
    if not isinstance(image, Path):
        return ""
    file = image.expanduser().absolute()
    try:
        # Quoting leaves no colon, so a file name cannot become another scheme.
        return quote(Path(os.path.relpath(file, folder.absolute())).as_posix())
    except ValueError:  # another drive on Windows
        return file.as_uri()

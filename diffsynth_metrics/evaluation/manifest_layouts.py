"""Layouts that are tables: manifests, Hugging Face's imagefolder, parquet files with pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffsynth_metrics.evaluation.manifests import (
    MANIFESTS,
    PICTURES,
    ROLES,
    Columns,
    Manifest,
    PicturePaths,
    Row,
    as_label,
    as_prompt,
    find_columns,
    open_manifest,
)
from diffsynth_metrics.evaluation.samples import PackedImage, Sample
from diffsynth_metrics.evaluation.sources import (
    Reading,
    Source,
    existing,
    relative_name,
    stem_of,
    suffix_of,
)

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def find_manifest(source: Source) -> str | None:
    """Look for one table of pictures: the source itself, or directly in the folder."""
    if not source.is_folder:
        return f"{source.path.name} is a manifest" if _is_manifest(source.path) else None
    found = _manifests_of_folder(source)
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise ValueError(f"pass one manifest instead of {source.path}, which holds {names}")
    return f"{found[0].name} names pictures" if found else None


def read_manifest(source: Source) -> Reading:
    """Read the table."""
    files = _manifests_of_folder(source) if source.is_folder else [source.path]
    if len(files) != 1:
        raise ValueError(f"pass the manifest itself; there are {len(files)} in {source.path}")
    return _read_manifests(source, files)


def _manifests_of_folder(source: Source) -> list[Path]:
    """Return the tables directly in a folder that have a column of file names."""
    names = [name for name in source.files if "/" not in name and suffix_of(name) in MANIFESTS]
    metadata = _metadata_files(source)
    files = [source.path / name for name in names if source.path / name not in metadata]
    return [file for file in files if _names_pictures(file, source.columns)]


def _is_manifest(file: Path) -> bool:
    return file.suffix.lower() in MANIFESTS and not _holds_pictures(file)


def _holds_pictures(file: Path) -> bool:
    """Tell whether a file is a parquet file with pictures."""
    return file.suffix.lower() == ".parquet" and bool(open_manifest(file).embedded)


def _names_pictures(file: Path, given: Mapping[str, str]) -> bool:
    """Tell whether a table has a column of file names; a log that is still empty has none."""
    if file.stat().st_size == 0:
        return False
    try:
        manifest = open_manifest(file)
    except ValueError:
        if file.suffix.lower() == ".json":  # which may be anything
            return False
        raise
    usual = [name for name in manifest.columns if name.lower() in ROLES["image"]]
    names = [name for name in (given.get("image"), *usual) if name in manifest.columns]
    return not manifest.embedded and any(
        _looks_like_picture(row.values.get(name)) for row in manifest.read(names) for name in names
    )


def _looks_like_picture(value: Any) -> bool:
    if isinstance(value, list):
        return any(_looks_like_picture(item) for item in value)
    return isinstance(value, PackedImage) or (isinstance(value, str) and suffix_of(value) in PICTURES)


def _metadata_files(source: Source) -> list[Path]:
    """Return the files metadata.* that name pictures; GenEval's hold a prompt only."""
    files = [source.path / name for name in source.files if name.split("/")[-1] in _METADATA]
    return [file for file in files if any(_is_file_name(name) for name in open_manifest(file).columns)]


def _is_file_name(column: str) -> bool:
    return column == "file_name" or column.endswith("_file_name")


def find_imagefolder(source: Source) -> str | None:
    """Look for metadata files, in the folder and below it."""
    found = _metadata_files(source)
    return f"{found[0].relative_to(source.path)} has a column of file names" if found else None


def read_imagefolder(source: Source) -> Reading:
    """Read all metadata files; names are relative to the folder of each."""
    files = _metadata_files(source)
    if not files:
        raise ValueError(f"there is no metadata.csv, .jsonl or .parquet with file_name in {source.path}")
    has_plain = "file_name" in open_manifest(files[0]).columns
    columns = {"image": "file_name", **source.columns} if has_plain else source.columns
    return _read_manifests(replace(source, columns=columns), files)


def _parquet_shards(source: Source) -> list[Path]:
    if not source.is_folder:
        return [source.path] if _holds_pictures(source.path) else []
    names = [name for name in source.files if suffix_of(name) == ".parquet"]
    return [source.path / name for name in names if _holds_pictures(source.path / name)]


def find_parquet(source: Source) -> str | None:
    """Look for parquet files with a column of encoded pictures."""
    files = _parquet_shards(source)
    return f"{files[0].name} holds pictures" if files else None


def read_parquet(source: Source) -> Reading:
    """Read all such files, and leave the pictures in them."""
    files = _parquet_shards(source)
    if not files:
        raise ValueError(f"there is no parquet file with a column of pictures in {source.path}")
    return _read_manifests(source, files)


def _read_manifests(source: Source, files: list[Path]) -> Reading:
    reading = Reading()
    for file in files:
        manifest = open_manifest(file)
        columns = find_columns(manifest, source.columns)
        if columns.image is None:
            raise ValueError(
                f"say which column of {file} names the pictures, columns={{'image': ...}}; it has "
                f"{', '.join(map(repr, manifest.columns))}"
            )
        rows = manifest.read(columns.names())
        # A column "source" may as well say which data set a prompt is from.
        pictured = [name for name in columns.sources if _names_any_picture(rows, name)]
        columns = replace(columns, sources=tuple(pictured))
        if columns.prompt is None:
            reading.without_prompts(file, "no column is called prompt, caption, text or instruction")
        _read_rows(reading, source, manifest, columns, rows)
        unread = [name for name in manifest.columns if name and name not in columns.names()]
        details = f"{columns}" + (f"; not read: {', '.join(map(repr, unread))}" if unread else "")
        if details not in reading.details:
            reading.details.append(details)
    if not source.is_folder:
        _report_neighbours(reading, source.path)
    return reading


def _names_any_picture(rows: list[Row], column: str) -> bool:
    return any(_looks_like_picture(row.values.get(column)) for row in rows)


def _read_rows(
    reading: Reading, source: Source, manifest: Manifest, columns: Columns, rows: list[Row]
) -> None:
    root = source.path if source.is_folder else source.path.parent
    paths = PicturePaths(manifest.file.parent, allow_outside=source.allow_outside)
    reading.used.add(relative_name(manifest.file, root))
    ids_are_of_prompts = _ids_repeat(reading, columns, rows)
    for number, row in enumerate(rows, 1):
        sample = _sample_of_row(row, columns, paths, root, number, reading)
        label = _value(row, columns.id)
        if ids_are_of_prompts:
            sample = replace(sample, prompt_id=sample.prompt_id or label)
        elif label is not None:
            sample = replace(sample, id=label)
        images = (sample.image, *sample.sources)
        used = [relative_name(image, root) for image in images if isinstance(image, Path)]
        reading.add(sample, *used, where=row.where, why=f"its {columns.prompt!r} is empty")


def _value(row: Row, column: str | None) -> str | None:
    return None if column is None else as_label(row.values.get(column), row.where)


def _ids_repeat(reading: Reading, columns: Columns, rows: list[Row]) -> bool:
    """Tell whether the ids are those of prompts: they repeat, and always with the same prompt.

    Raises:
        ValueError: An id occurs with two prompts.
    """
    first: dict[str, Row] = {}
    repeated: tuple[Row, Row] | None = None
    for row in rows:
        label = _value(row, columns.id)
        if label is None or (before := first.setdefault(label, row)) is row:
            continue
        if columns.prompt is None or row.values.get(columns.prompt) != before.values.get(columns.prompt):
            raise ValueError(f"{row.where}: the id {label!r} is also that of {before.where}")
        repeated = repeated or (before, row)
    if repeated is None:
        return False
    reading.problem(
        "duplicate",
        repeated[1].where,
        f"it has the id and the prompt of {repeated[0].where}: {columns.id!r} is taken for the id of "
        "the prompt, and samples are called as their pictures",
    )
    return True


def _sample_of_row(
    row: Row, columns: Columns, paths: PicturePaths, root: Path, number: int, reading: Reading
) -> Sample:
    """Return the sample of a row; its id is the name of its picture."""
    assert columns.image is not None
    image = row.values.get(columns.image)
    if image is None or image == "":
        reading.problem("missing", row.where, f"its {columns.image!r} is empty")
        image = paths.folder / f"no picture in row {number}"
    elif not isinstance(image, PackedImage):
        image = existing(paths.find(image, row.where), row.where, reading)
    sources: list[Path | PackedImage] = []
    for name in columns.sources:
        value = row.values.get(name)
        for one in value if isinstance(value, list) else [value] if value else []:
            if not isinstance(one, PackedImage):
                one = existing(paths.find(one, row.where), row.where, reading)
            sources.append(one)
    prompt = None
    if columns.prompt is not None:
        prompt = as_prompt(row.values.get(columns.prompt), row.where)
    file, number_there = (
        (image.file, f"-{number - 1}") if isinstance(image, PackedImage) else (image, "")
    )
    return Sample(
        id=stem_of(relative_name(file, root)) + number_there,
        prompt=prompt,
        image=image,
        sources=tuple(sources),
        prompt_id=_value(row, columns.prompt_id) or _id_of_edit(prompt, sources, root),
        seed=_value(row, columns.seed),
        category=_value(row, columns.category),
    )


def _id_of_edit(prompt: str | None, sources: list[Path | PackedImage], root: Path) -> str | None:
    """Return an id of a prompt with its sources: the same words for another picture are another task."""
    if not sources:
        return None
    names = [one.member if isinstance(one, PackedImage) else relative_name(one, root) for one in sources]
    return "e-" + hashlib.sha256("\n".join([prompt or "", *names]).encode()).hexdigest()[:12]


def _report_neighbours(reading: Reading, manifest: Path) -> None:
    """Report pictures in the folders of a manifest's pictures that it does not name."""
    root = str(manifest.parent)
    used = {os.path.join(root, name) for name in reading.used}
    folders = {os.path.dirname(name) for name in used if suffix_of(name) in PICTURES}
    for folder in sorted(folder for folder in folders if os.path.isdir(folder)):
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if suffix_of(name) in PICTURES and not name.startswith(".") and path not in used:
                reading.problem("unused", Path(path), f"{manifest.name} does not name it")

"""Tables of pictures and prompts: their rows, what their columns mean, and which files they may name."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_metrics.evaluation.samples import PackedImage
from diffsynth_metrics.evaluation.shards import open_parquet
from diffsynth_metrics.folders import IMAGE_EXTENSIONS

__all__ = [
    "MANIFESTS",
    "PICTURES",
    "ROLES",
    "Columns",
    "Manifest",
    "PicturePaths",
    "Row",
    "as_label",
    "as_prompt",
    "find_columns",
    "find_prompt",
    "first_label",
    "open_manifest",
    "parse_json",
    "read_json",
    "read_text",
]

PICTURES = tuple(sorted((*IMAGE_EXTENSIONS, ".avif", ".gif", ".jfif")))
"""What the names of pictures end with, in any case."""

MANIFESTS = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
"""What the names of manifests end with, in any case."""

ROLES = {
    "image": (
        *("image", "image_path", "image_file", "image_file_name", "img", "img_path"),
        *("file_name", "filename", "file_path", "path"),
        *("edited_image", "edited_image_path", "edited_path", "edited_file_name"),
        *("output_image", "output_image_path", "output_path", "output_file_name"),
    ),
    "prompt": ("prompt", "prompts", "caption", "text", "instruction", "edit_instruction"),
    "id": ("id", "item_id", "sample_id", "uid", "key"),
    "prompt_id": ("prompt_id",),
    "seed": ("seed",),
    "category": ("category", "style", "tag", "tags", "edit_type", "task_type"),
}
"""The usual names of columns, in any case; for a category, the first one that is there is taken."""

SOURCES = (
    *("source", "source_image", "source_image_path", "source_path", "src", "src_image"),
    *("reference", "reference_image", "reference_image_path", "reference_path", "ref_image"),
    *("input", "input_image", "input_image_path", "input_path", "original_image"),
)
"""Columns of sources, if they name pictures; so are all others that end with _file_name(s)."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


@dataclass(frozen=True)
class Row:
    """A row of a manifest.

    Attributes:
        where: Its file and line, as error messages call it.
        values: The value of each column; a picture inside the file is a :class:`PackedImage`.
    """

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """A table whose columns are known and whose rows can be read.

    Attributes:
        file: Where it is.
        columns: The names of its columns.
        embedded: The columns that hold pictures themselves.
        read: Returns the rows, with the columns that it is given.
    """

    file: Path
    columns: tuple[str, ...]
    embedded: tuple[str, ...]
    read: Callable[[Iterable[str]], list[Row]]


@dataclass(frozen=True)
class Columns:
    """What the columns of a manifest mean: their names, or None where there is none."""

    image: str | None
    prompt: str | None
    id: str | None
    prompt_id: str | None
    seed: str | None
    category: str | None
    sources: tuple[str, ...]

    def names(self) -> list[str]:
        """Return the columns that are read."""
        single = (self.image, self.prompt, self.id, self.prompt_id, self.seed, self.category)
        return [name for name in single if name is not None] + list(self.sources)

    def __str__(self) -> str:
        """Say it in words; what is called by its own name is shortened."""
        roles = {
            **{role: getattr(self, role) for role in ROLES},
            "sources": ", ".join(self.sources) or None,
        }
        return "columns " + ", ".join(
            role if role == name else f"{role}={name!r}" for role, name in roles.items() if name
        )


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, with or without byte order mark.

    Raises:
        ValueError: It is not UTF-8; the message names the line.
    """
    contents = file.read_bytes()
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"save {file} as UTF-8: byte 0x{contents[error.start]:02x} in line {line} is none"
        ) from error


def open_manifest(file: Path) -> Manifest:
    """Open a manifest by its suffix.

    Raises:
        ValueError: The file is empty, damaged or not a table; the message names the line.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _open_parquet(file)
    if suffix in (".csv", ".tsv"):
        columns, rows = _csv_rows(file, "\t" if suffix == ".tsv" else ",")
    else:
        rows = _jsonl_rows(file) if suffix == ".jsonl" else _json_rows(file)
        columns = tuple(dict.fromkeys(name for row in rows for name in row.values))
    if not rows:
        raise ValueError(f"{file} has no rows")
    return Manifest(file, columns, (), lambda names: rows)


def _csv_rows(file: Path, delimiter: str) -> tuple[tuple[str, ...], list[Row]]:
    text = read_text(file)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        # Where the names have spaces before them, so have the values; elsewhere they belong to a value.
        skipinitialspace=f"{delimiter} " in text.partition("\n")[0],
        strict=True,  # a quote that is never closed would swallow the rows behind it
    )
    rows: list[Row] = []
    before = 0
    try:
        columns = tuple(name.strip() for name in next(reader, []))
        if not any(columns):
            raise ValueError(f"{file} has no first line with the names of the columns")
        if len(columns) == 1 and delimiter == "," and len(columns[0].split(";")) > 1:
            raise ValueError(f"save {file} with commas between its columns; it has semicolons")
        named = [name for name in columns if name]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"{file} has two columns that are called {twice[0]!r}")
        before = reader.line_num
        for fields in reader:
            where, before = f"{file}, line {before + 1}", reader.line_num
            if fields and len(fields) != len(columns):
                raise ValueError(
                    f"{where}: it has {len(fields)} values, and the first line names {len(columns)} "
                    "columns; values with commas, quotes or line ends stand in double quotes"
                )
            if fields:
                values = dict(zip(columns, fields, strict=True))
                rows.append(Row(where, {name: value or None for name, value in values.items()}))
    except csv.Error as error:
        if "field limit" in str(error):
            raise ValueError(
                f"{file}, line {before + 1}: a value is longer than {csv.field_size_limit():,} "
                "characters, which tables of text do not hold; save it as .jsonl or .parquet"
            ) from error
        raise ValueError(f"{file}, line {reader.line_num}: it is no table: {error}") from error
    return columns, rows


def _jsonl_rows(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: it is no JSON: {error}") from error
        rows.append(_json_row(where, values))
    return rows


def _json_rows(file: Path) -> list[Row]:
    items = read_json(file)
    if not isinstance(items, list):
        raise ValueError(
            f"{file} must be a list of objects, one for each picture, and is {_kind(items)}; prompts by "
            "name, {name: prompt}, are passed as prompts=, with the folder of the pictures as the source"
        )
    return [_json_row(f"{file}, item {number}", item) for number, item in enumerate(items, 1)]


def read_json(file: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: It is no JSON; the message says where.
    """
    text = read_text(file)
    if not text.strip():
        raise ValueError(f"{file} is empty")
    try:
        return parse_json(text)
    except ValueError as error:
        lines = "; if each line is one object, call it .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{file} is no JSON: {error}{lines}") from error


def parse_json(text: str) -> Any:
    """Return what a text of JSON holds.

    Raises:
        ValueError: It is no JSON, has one name twice in an object, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; json.loads itself would keep the last of two values with one name."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice!r} occurs twice in one object")
    return values


def _json_row(where: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}: it must be an object such as {{'image': ...}}, and is {_kind(values)}"
        )
    return Row(where, values)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _open_parquet(file: Path) -> Manifest:
    with open_parquet(file) as opened:
        columns = tuple(opened.schema_arrow.names)
        embedded = tuple(field.name for field in opened.schema_arrow if _holds_pictures(field.type))
        if opened.metadata.num_rows == 0:
            raise ValueError(f"{file} has no rows")
    return Manifest(file, columns, embedded, lambda names: _parquet_rows(file, names, embedded))


def _holds_pictures(kind: Any) -> bool:
    """Tell whether an Arrow type is that of encoded pictures: binary, or a struct with ``bytes``."""
    import pyarrow.types  # type: ignore[import-untyped, unused-ignore]

    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_pictures(kind.field(index).type)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _parquet_rows(file: Path, names: Iterable[str], embedded: Sequence[str]) -> list[Row]:
    """Read the columns, but of pictures only where there is one, and the path that goes with it."""
    with open_parquet(file) as opened:
        values: dict[str, list[Any]] = {}
        for name in names:
            if name not in embedded:
                values[name] = opened.read(columns=[name]).column(name).to_pylist()
                continue
            field = opened.schema_arrow.field(name).type
            has_path = hasattr(field, "get_field_index") and field.get_field_index("path") >= 0
            empty = _empty_cells(opened, name)
            paths: list[Any] = [None] * opened.metadata.num_rows
            if empty and has_path:
                column = opened.read(columns=[f"{name}.path"]).column(name).to_pylist()
                paths = [cell and cell["path"] for cell in column]
            values[name] = [
                path if row in empty else PackedImage(file, f"{name}[{row}]")
                for row, path in enumerate(paths)
            ]
        count = opened.metadata.num_rows
    return [
        Row(f"{file}, row {row + 1}", {name: column[row] for name, column in values.items()})
        for row in range(count)
    ]


def _empty_cells(opened: Any, name: str) -> set[int]:
    """Return the rows without picture bytes; what the file's statistics say needs no reading."""
    empty: set[int] = set()
    start = 0
    for index in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(index)
        chunks = [group.column(number) for number in range(group.num_columns)]
        chunk = next(one for one in chunks if one.path_in_schema in (name, f"{name}.bytes"))
        known = chunk.is_stats_set and chunk.statistics.has_null_count
        nulls = chunk.statistics.null_count if known else None
        if nulls != 0:
            column = opened.read_row_group(index, columns=[chunk.path_in_schema]).column(name)
            cells = column.combine_chunks()
            cells = cells if chunk.path_in_schema == name else cells.flatten()[0]
            empty.update(
                start + row for row, is_null in enumerate(cells.is_null().to_pylist()) if is_null
            )
        start += group.num_rows
    return empty


def find_columns(manifest: Manifest, given: Mapping[str, str]) -> Columns:
    """Find out what the columns of a manifest mean.

    Args:
        manifest: The manifest.
        given: What the caller says, see :func:`read_samples`.

    Raises:
        ValueError: There is no such column, or a role has several candidates.
    """
    for role, name in given.items():
        if role not in (*ROLES, "source"):
            raise ValueError(f"columns has the keys {', '.join(ROLES)} and source, not {role!r}")
        if name not in manifest.columns:
            raise ValueError(f"there is no column {name!r} in {manifest.file}; {_list(manifest)}")
    lower = {name.lower(): name for name in manifest.columns}
    found: dict[str, str | None] = {}
    for role, usual in ROLES.items():
        present = [lower[name] for name in usual if name in lower and lower[name] not in given.values()]
        if role == "image" and (embedded := [name for name in present if name in manifest.embedded]):
            present = embedded
        if role == "image" and not present and len(manifest.embedded) == 1:
            present = list(manifest.embedded)
        found[role] = given.get(role) or (present[0] if present else None)
        if role not in given and role != "category" and len(present) > 1:
            raise ValueError(
                f"say which column of {manifest.file} is the {role}, {' or '.join(map(repr, present))}: "
                f"columns={{{role!r}: {present[0]!r}}}"
            )
    taken = {*found.values(), *given.values()}
    sources = [name for name in manifest.columns if name not in taken and _is_source(name)]
    if "source" in given:
        sources = [given["source"]]
    return Columns(**found, sources=tuple(sources))


def _is_source(name: str) -> bool:
    return name.lower() in SOURCES or name.lower().endswith(("_file_name", "_file_names"))


def _list(manifest: Manifest) -> str:
    return f"it has {', '.join(map(repr, manifest.columns))}"


def as_prompt(value: Any, where: str) -> str | None:
    """Return a prompt as it is written; None where there is none.

    Raises:
        ValueError: It is no text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: a prompt must be a text, and is {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the prompt is not valid Unicode: {error}") from error
    return value if value.strip() else None


def as_label(value: Any, where: str) -> str | None:
    """Return an id, a seed or a category as text; None where there is none."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: an id, seed or category must be a text or a number, got {value!r}")
    # A column of whole numbers with gaps is stored as floats by pandas.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def find_prompt(values: Mapping[str, Any], where: str) -> str | None:
    """Return the prompt of an object that stands beside a picture, under one of the usual names.

    Raises:
        ValueError: There are two that differ.
    """
    found = {name: as_prompt(values.get(name), where) for name in ROLES["prompt"]}
    different = {name: text for name, text in found.items() if text is not None}
    if len(set(different.values())) > 1:
        raise ValueError(f"{where}: it holds different prompts, {' and '.join(map(repr, different))}")
    return next(iter(different.values()), None)


def first_label(values: Mapping[str, Any], role: str, where: str) -> str | None:
    """Return the label of an object that stands beside a picture, under the first usual name."""
    labels = (as_label(values.get(name), where) for name in ROLES[role])
    return next((label for label in labels if label is not None), None)


class PicturePaths:
    """Finds the files that a manifest names, and keeps them inside its folder."""

    def __init__(self, folder: Path, *, allow_outside: bool) -> None:
        """Take the folder that names are relative to."""
        self.folder = folder
        self._real_folder = os.path.realpath(folder)
        self._allow_outside = allow_outside
        self._real_parents: dict[str, str] = {}

    def find(self, name: Any, where: str) -> Path:
        """Return the path of a file, which may not exist.

        Raises:
            ValueError: It is no name of a file, or lies outside the folder.
        """
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise ValueError(f"{where}: {name!r} is no name of a picture file")
        if _URL.match(name):
            raise ValueError(f"{where}: download {name[:80]!r} first, and name the file")
        path = self.folder / name
        if self._allow_outside:
            return path
        if "\\" in name:
            raise ValueError(f"{where}: write {name!r} with / between its folders")
        absolute = name.startswith("/") or re.match(r"[A-Za-z]:", name)
        if absolute or ".." in name.split("/") or not self._is_inside(path):
            raise ValueError(
                f"{where}: {name!r} is outside {self.folder}; name files in that folder or below it, or "
                "pass allow_outside=True if you trust the manifest"
            )
        return path

    def _is_inside(self, path: Path) -> bool:
        """Follow links, of each folder once."""
        parent = os.path.dirname(path)
        if parent not in self._real_parents:
            self._real_parents[parent] = os.path.realpath(parent)
        real = os.path.join(self._real_parents[parent], path.name)
        if os.path.islink(path):
            real = os.path.realpath(path)
        return real.startswith(os.path.join(self._real_folder, ""))

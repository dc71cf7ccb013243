"""Pictures inside tar shards and parquet files: where each lies, and how one is read alone."""

from __future__ import annotations

import os
import re
import tarfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["file_stamp", "import_parquet", "open_parquet", "read_packed", "tar_members"]

# Threads that decode ahead ask for neighbours in the same row group, which is then read once.
_PARQUET_LOCK = threading.Lock()


def _open_parquet_lock() -> None:
    """Forget who holds it: a forked child has no other threads, and would wait for ever."""
    global _PARQUET_LOCK
    _PARQUET_LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_parquet_lock)


def read_packed(file: Path, member: str) -> bytes:
    """Return a picture of a shard, see :meth:`PackedImage.read`."""
    if file.suffix.lower() == ".parquet":
        return _read_cell(file, member)
    return read_member(file, member)


def tar_members(file: Path) -> dict[str, tuple[int, int]]:
    """Return where the files of a tar shard lie: name to offset and size, in their order.

    Raises:
        ValueError: The shard is damaged or compressed, or two of its files have one name.
    """
    file = file.absolute()
    return _tar_members(file, file_stamp(file))


def read_member(file: Path, member: str) -> bytes:
    """Return the bytes of a file in a tar shard."""
    members = tar_members(file)
    if member not in members:
        raise FileNotFoundError(f"there is no {member!r} in {file}")
    offset, size = members[member]
    with open(file, "rb") as shard:
        shard.seek(offset)
        return shard.read(size)


def import_parquet() -> Any:
    """Return ``pyarrow.parquet``.

    Raises:
        ImportError: pyarrow is not installed; the message says how it is.
    """
    try:
        import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError('parquet files need pip install "diffsynth-metrics[eval]"') from error
    return pyarrow.parquet


def open_parquet(file: Path) -> Any:
    """Return an open ``pyarrow.parquet.ParquetFile``.

    Raises:
        ValueError: The file is damaged, or is no parquet file.
    """
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


def file_stamp(file: str | os.PathLike[str]) -> tuple[int, int, int, int]:
    """Return size, times of change and number of a file: one that is written to gets another stamp."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@lru_cache(maxsize=64)
def _tar_members(file: Path, stamp: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(file, "r:") as shard:
            for info in shard:
                if not info.isfile():
                    continue
                if info.name in members:
                    raise ValueError(f"{file} holds two files that are called {info.name!r}")
                members[info.name] = (info.offset_data, info.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} cannot be read as a tar file: {error}; shards may not be compressed, and "
            "one that was cut off while it was written or copied has to be made again"
        ) from error
    if members and (end := max(offset + size for offset, size in members.values())) > stamp[0]:
        raise ValueError(f"{file} is cut off: it has {stamp[0]} bytes and its files end at {end}")
    return members


def _read_cell(file: Path, member: str) -> bytes:
    cell = re.fullmatch(r"(.+)\[(\d+)\]", member, re.DOTALL)
    if cell is None:
        raise FileNotFoundError(f"{member!r} names no cell of {file}; cells are called 'image[17]'")
    column, row = cell[1], int(cell[2])
    with _PARQUET_LOCK:
        file = file.absolute()
        stamp = file_stamp(file)
        for group, start, count in _row_groups(file, stamp):
            if start <= row < start + count:
                value = _row_group(file, stamp, group, column)[row - start].as_py()
                break
        else:
            raise FileNotFoundError(f"there is no row {row} in {file}")
    contents = value.get("bytes") if isinstance(value, dict) else value
    if contents is None:
        raise FileNotFoundError(f"there is no picture in {member} of {file}")
    return bytes(contents)


@lru_cache(maxsize=64)
def _row_groups(file: Path, stamp: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return number, first row and number of rows of each row group."""
    groups, start = [], 0
    with open_parquet(file) as opened:
        for group in range(opened.metadata.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            groups.append((group, start, count))
            start += count
    return groups


@lru_cache(maxsize=2)  # the pictures of a row group, and their sources
def _row_group(file: Path, stamp: tuple[int, ...], group: int, column: str) -> Any:
    with open_parquet(file) as opened:
        if column not in opened.schema_arrow.names:
            raise FileNotFoundError(f"there is no column {column!r} in {file}")
        return opened.read_row_group(group, columns=[column]).column(column)

"""What a run leaves on disk: rows in parts, the samples of the last call, and what made the scores.

    OUT/run.json           the metrics by label: provenance, fingerprint, card; results of set metrics
    OUT/samples.parquet    the samples of the last call, with the sha256 of what was read
    OUT/parts/*.parquet    rows, never changed once they are written
    OUT/statistics/*.npz   FID's statistics, by content
    OUT/answers/LABEL/     judges' answers, by content
    OUT/lock               held by the process that writes
    OUT/lock.RANK          held by one of several processes that share a run, see :class:`Share`

Every file is written under a temporary name, brought to the disk and renamed, so a reader finds all of
it or nothing, whenever the writer is killed. No name depends on the time of day.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError('pip install "diffsynth-metrics[eval]": pyarrow is not installed') from error

__all__ = ["ROWS", "SAMPLES", "RowWriter", "RunFolder", "Share", "explained", "table_of"]

logger = logging.getLogger(__name__)

FORMAT = 1

_ROWS_OF_PART = 20_000  # which bounds the memory of rows that are not written yet
_LOCK_SECONDS = 10.0  # how long the look of another process at a lock may take

_REPEATED = pa.dictionary(pa.int32(), pa.string())

ROWS = pa.schema(
    {
        "id": pa.string(),
        "prompt_id": pa.string(),
        "seed": pa.string(),
        "category": _REPEATED,
        "prompt": pa.string(),
        "image": pa.string(),
        "sources": pa.list_(pa.string()),
        "image_sha256": pa.string(),
        "metric": _REPEATED,
        "score": pa.float64(),
        "components": pa.string(),
        "error_type": _REPEATED,
        "error": pa.string(),
        "metric_version": _REPEATED,
        "weights": _REPEATED,
        "config": _REPEATED,
        "fingerprint": _REPEATED,
        "key": pa.string(),
        "device": _REPEATED,
        "torch": _REPEATED,
        "threads": pa.int32(),
        "seconds": pa.float64(),
        "run_id": _REPEATED,
    }
)
"""The columns of a row. Columns whose values repeat are dictionaries, which take little memory."""

SAMPLES = pa.schema(
    {
        "id": pa.string(),
        "prompt_id": pa.string(),
        "seed": pa.string(),
        "category": pa.string(),
        "prompt": pa.string(),
        "image": pa.string(),
        "sources": pa.list_(pa.string()),
        "image_sha256": pa.string(),
        "sources_sha256": pa.list_(pa.string()),
        "stamps": pa.list_(pa.string()),
    }
)
"""The columns of a sample. A sha256 is null where the file was not read, empty where that failed. Stamps
are what the file system said of the picture and of each source when they were read."""


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return rows as a table; a column that a row lacks is null there."""
    columns = {field.name: [row.get(field.name) for row in rows] for field in schema}
    return pa.table(columns, schema=schema)


@dataclass(frozen=True)
class Share:
    """The share of one of several processes that write to one folder and never speak to each other.

    A process has the samples whose position divided by `world` leaves `rank`. The share is a matter of
    one start: the next may have another `world`, because what is done is known by the samples.

    Attributes:
        rank: Which of the processes, from 0.
        world: How many there are.
    """

    rank: int
    world: int


class RunFolder:
    """A run folder. Whoever writes holds :meth:`locked`; anybody may read at any time.

    Attributes:
        path: The folder.
        share: The share of this process, or None where it writes alone.
    """

    def __init__(self, path: str | os.PathLike[str], share: Share | None = None) -> None:
        """Name a folder, which need not exist.

        Raises:
            ValueError: The name is empty.
        """
        if not os.fspath(path):
            raise ValueError("name the run folder, such as 'runs/a': the name is empty")
        self.path = Path(path).expanduser()
        self.share = share
        self._number = 0  # of the last part

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and be the only one that writes to it, or the only one of its rank.

        Raises:
            BlockingIOError: Another process is writing.
            OSError: The folder cannot be written to.
        """
        with ExitStack() as held:
            with explained(self.path):
                (self.path / "parts").mkdir(parents=True, exist_ok=True)
                if self.share is None:
                    held.enter_context(self._lock("lock"))
                    for file in self.path.glob("lock.*"):
                        with self._lock(file.name):
                            pass  # no process of a shared run is at work
                else:
                    held.enter_context(self._lock(f"lock.{self.share.rank}"))
                    with self._lock("lock", timeout=_LOCK_SECONDS):
                        pass  # others of the shared run look at it too
            if self.share is None:
                for pattern in ("*.tmp", "*/*.tmp", "*/*.tmp.npz"):
                    for file in self.path.glob(pattern):
                        file.unlink()  # of a process that was killed
            yield

    @contextmanager
    def _lock(self, name: str, timeout: float = 0) -> Iterator[None]:
        lock = FileLock(self.path / name)
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise BlockingIOError(
                f"another process is writing to {self.path}: let it end, or choose another out= "
                '(processes that torchrun or srun started share a folder with workers="ranks")'
            ) from None
        try:
            yield
        finally:
            lock.release()

    def is_described(self) -> bool:
        """Tell whether there is a run.json."""
        return (self.path / "run.json").exists()

    def read_description(self) -> dict[str, Any]:
        """Return what run.json says: ``"metrics"`` by label and ``"sets"``.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It cannot be read, or a newer version wrote it.
        """
        file = self.path / "run.json"
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no run folder {str(self.path)!r}")
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(self.path)!r} is no run folder: it has no run.json, which score() writes"
            )
        try:
            description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            written = description["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"delete {file} and score again, which keeps all rows: it cannot be read ({error!r})"
            ) from error
        if written != FORMAT:
            raise ValueError(
                f"update diffsynth-metrics: {file} has format {written!r}, this version reads {FORMAT}"
            )
        return description

    def write_description(self, metrics: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> None:
        """Write run.json."""
        description = {"format": FORMAT, "metrics": metrics, "sets": sets}
        text = json.dumps(description, indent=1, default=str)
        self._write(self.path / "run.json", text.encode())

    def read_samples(self) -> pa.Table:
        """Return the samples of the last call.

        Raises:
            ValueError: The file is damaged or not there.
        """
        file = self.path / "samples.parquet"
        if not file.is_file():  # it is written before run.json
            raise ValueError(f"score again, which keeps all rows: somebody deleted {file}")
        try:
            return pq.read_table(file, schema=SAMPLES, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"delete {file} and score again, which keeps all rows: it cannot be read ({error})"
            ) from error

    def write_samples(self, samples: pa.Table) -> None:
        """Replace the samples of the last call."""
        self._write(self.path / "samples.parquet", _encoded(samples))

    def check_parts(self) -> None:
        """Check that the rows are there.

        Raises:
            ValueError: Their folder is not.
        """
        if not (self.path / "parts").is_dir():
            raise ValueError(f"score again: somebody deleted {self.path / 'parts'}, which had the rows")

    def append(self, rows: pa.Table) -> None:
        """Write a part.

        Raises:
            OSError: It cannot be written, such as on a full disk; the parts before it are whole.
        """
        if not self._number:
            files = (self.path / "parts").glob("[0-9]*")
            self._number = max((int(file.name.split(".")[0]) for file in files), default=0)
        self._number += 1
        # A random word where others write too: nobody writes to a name of another process.
        word = f".{self.share.rank}-{secrets.token_hex(4)}" if self.share else ""
        self._write(self.path / "parts" / f"{self._number:06d}{word}.parquet", _encoded(rows))

    def parts(self, *, repair: bool = False) -> Iterator[pa.Table]:
        """Yield the rows part by part, in the order of writing, without the parts that are damaged.

        Args:
            repair: Move a damaged part aside, for its rows to be scored again; else it is left out.
        """
        for file in sorted((self.path / "parts").glob("[0-9]*.parquet")):
            try:
                # Flipped bits are found as well, by the checksum of each page.
                table = pq.read_table(file, schema=ROWS, page_checksum_verification=True)
            except (OSError, pa.ArrowException) as error:
                if getattr(error, "errno", None):  # the file system's, such as no permission
                    raise
                if not repair:
                    logger.warning("left out the rows of %s, which is damaged: %s", file, error)
                    continue
                aside = file.with_name(f"{file.name}.damaged")
                with suppress(FileNotFoundError):  # another process of a shared run was quicker
                    os.replace(file, aside)
                logger.warning("%s is damaged (%s) and now called %s", file, error, aside.name)
                continue
            yield table

    def _write(self, file: Path, contents: bytes | pa.Buffer) -> None:
        """Write a file so that it is there as a whole or not at all."""
        temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
        with explained(self.path):
            try:
                with temporary.open("wb") as opened:
                    opened.write(contents)
                    opened.flush()
                    os.fsync(opened.fileno())
                os.replace(temporary, file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


class RowWriter:
    """Collects rows and writes a part when some time has gone by, and at the end, however it comes.

    A part is closed after a tenth of the time since the beginning: soon at first, so that little is lost
    when a run that has just begun is killed, and later seldom, so that parts stay few.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        shortest: float = 2.0,
        longest: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write to a folder.

        Args:
            folder: Where the rows go.
            shortest: The fewest seconds of a part.
            longest: The most seconds of a part, as far as rows come often enough.
            clock: Tells the seconds.
        """
        self._folder = folder
        self._shortest = shortest
        self._longest = longest
        self._clock = clock
        self._begun = self._closed = clock()
        self._tables: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        """Take rows that were made together, and write a part where one is due."""
        if rows.num_rows:
            self._tables.append(rows)
        now = self._clock()
        wait = max(self._shortest, min(self._longest, (now - self._begun) / 10))
        count = sum(table.num_rows for table in self._tables)
        if now - self._closed >= wait or count >= _ROWS_OF_PART:
            self.close()

    def close(self) -> None:
        """Write the rows that are not written yet."""
        if self._tables:
            self._folder.append(pa.concat_tables(self._tables).unify_dictionaries())
        self._tables = []
        self._closed = self._clock()


def _encoded(table: pa.Table) -> pa.Buffer:
    """Return the contents of a parquet file, for Python to write, whose errors say what the cause is."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say what to do about a folder that cannot be written to."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        reason = error.strerror or error
        message = f"choose another out=: {folder} cannot be written to ({reason})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"make space, or choose another out=: {folder} cannot be written to ({reason}). What "
                "was written before is whole, and the same call goes on"
            )
        elif isinstance(error, (FileExistsError, NotADirectoryError)):
            message = f"choose another out=: {folder} is not a folder, or is inside of a file ({reason})"
        explained = type(error)(message)
        explained.errno = error.errno
        raise explained from error

"""Repositories on ModelScope and Hugging Face, and the local folders that their files go to.

The downloads themselves (resuming, checking what arrived) are the work of the hubs' own clients. What is
decided here is whether a download is needed, and whether what is there afterwards is all of it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from diffsynth_metrics.errors import DownloadError

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["LocalFiles", "Repository", "causes_of", "missing_shards"]

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
# What the clients leave beside the files while they download: "x.incomplete", "x.parallel_tmp", and
# "x.safetensors_0_167772159" for a part of a large file. Their other leftovers are hidden.
_LEFTOVER = re.compile(r".*(\.incomplete|\.parallel_tmp|\.lock|\.\w+_\d+_\d+)")
# What Python, requests, httpx and ModelScope call a hub that cannot be reached. Names, because
# importing all these libraries to have the classes would take seconds.
_OFFLINE = {
    *("ConnectionError", "NetworkError", "RequestTimeoutError"),
    *("Timeout", "TimeoutError", "TimeoutException"),
}
_SECONDS_TO_ANSWER = 10


@dataclass(frozen=True)
class Repository:
    """A repository on a hub, with its local folder below `base`.

    Attributes:
        source: ``"modelscope"`` or ``"huggingface"``.
        model_id: Such as ``"DiffSynth-Studio/ImageMetrics"``.
        revision: A branch, tag or commit; None means the hub's default.
        base: The folder of all repositories.
    """

    source: str
    model_id: str
    revision: str | None
    base: Path

    def __str__(self) -> str:
        """Name the repository in a message."""
        return f"{self.model_id}@{self.revision}" if self.revision else self.model_id

    @property
    def folder(self) -> Path:
        """The local folder; each revision has its own."""
        revision = "@" + self.revision.replace("/", "--") if self.revision else ""
        return self.base / f"{self.model_id}{revision}"

    def fetch(self, pattern: str, *, download: bool, sufficient: Sequence[str]) -> list[str]:
        """Return the names of the local files that match a pattern, after downloading what is missing.

        Args:
            pattern: A file, a glob, a folder with a trailing slash, or ``""`` for everything.
            download: Whether the hub may be asked.
            sufficient: File names any of which makes a folder that was copied by hand complete.

        Raises:
            DownloadError: The files could not be had, or not all of them.
        """
        files = LocalFiles(self.folder, pattern)
        if not download:
            self._check_without_download(files)
        elif not files.are_complete(sufficient):
            self._download(files, sufficient)
        return files.names()

    def error(self, hint: str, problem: str) -> DownloadError:
        """Return the error that says first what to do, then what is wrong, where, and for what."""
        return DownloadError(
            f"{hint}\n  {problem}\n  repository {self} on {self.source}, local folder {self.folder}"
        )

    def _check_without_download(self, files: LocalFiles) -> None:
        hint = (
            "Allow downloads, which are off (skip_download, DIFFSYNTH_SKIP_DOWNLOAD), or set "
            "DIFFSYNTH_MODEL_BASE_PATH to the folder that holds the models."
        )
        if not files.names():
            raise self.error(hint, f"no local file matches {files}")
        if files.interrupted:
            hint += f" If you have completed the files yourself, delete {files.begun}."
            raise self.error(hint, f"the download of {files} was interrupted")
        if damaged := files.damaged():
            raise self.error(hint, f"missing or damaged since the download: {', '.join(damaged)}")

    def _download(self, files: LocalFiles, sufficient: Sequence[str]) -> None:
        """Let the hub's client complete the files, or raise `DownloadError`."""
        logger.warning(f"downloading {files} of {self} from {self.source} to {self.folder}")
        try:
            # Both clients have locks, but ModelScope's gives up after ten minutes, less than a
            # large file takes. With this one a second process waits and finds the files there.
            with files.locked():
                if not files.are_complete(sufficient):
                    self._run_client(files)
        except Exception as error:
            logger.debug("the client's error", exc_info=True)
            causes = list(causes_of(error))
            offline = any(c.__name__ in _OFFLINE for cause in causes for c in type(cause).__mro__)
            absent = files.damaged() or missing_shards(files.names())
            if offline and files.names() and not files.interrupted and not absent:
                logger.warning(
                    f"{self.source} could not be reached ({_first_line(error)}); using the files of "
                    f"{self} that match {files} in {self.folder}"
                )
                return
            # Of a connection that failed, the innermost cause says it shortest.
            told = causes[-1] if offline else error
            problem = f"could not download {files}: {type(told).__name__}: {told}"
            problem += f"; missing here: {', '.join(absent)}" if absent else ""
            # The clients' errors come in chains of three to six tracebacks, which say no more.
            raise self.error(_hint(causes, offline), problem) from None
        if not files.names():
            raise self.error(_hint([], False), f"no file of the repository matches {files}")

    def _run_client(self, files: LocalFiles) -> None:
        """Run the hub's client, and keep the notes about it."""
        before, interrupted = files.names(), files.interrupted
        files.note_begin()
        try:
            if self.source == "huggingface":
                self._from_huggingface(files)
            else:
                self._from_modelscope(files)
        except Exception:
            if files.names() == before and not interrupted:
                files.begun.unlink(missing_ok=True)  # nothing arrived: the files are what they were
            raise
        files.note_end()

    def _from_modelscope(self, files: LocalFiles) -> None:
        from modelscope import snapshot_download

        take, leave = files.client_patterns()
        take = take.replace(",", "?")  # to this client a comma separates patterns
        snapshot_download(
            self.model_id,
            revision=self.revision,
            local_dir=str(self.folder),
            allow_file_pattern=take,
            ignore_file_pattern=leave,
            # On its own the client reads the variable only once in the life of a process.
            endpoint=os.environ.get("MODELSCOPE_ENDPOINT") or None,
        )

    def _from_huggingface(self, files: LocalFiles) -> None:
        from huggingface_hub import HfApi, snapshot_download

        take, leave = files.client_patterns()
        # When the hub cannot be reached, `snapshot_download` returns the folder as it is. This request
        # raises instead, and tells what must be there afterwards.
        info = HfApi().model_info(self.model_id, revision=self.revision, timeout=_SECONDS_TO_ANSWER)
        listed = [file.rfilename for file in info.siblings or []]
        wanted = [name for name in listed if fnmatch(name, take) and not fnmatch(name, leave)]
        if not wanted:
            return
        patterns = [glob.escape(name) for name in wanted]
        snapshot_download(
            self.model_id, revision=info.sha, local_dir=self.folder, allow_patterns=patterns
        )
        if absent := [name for name in wanted if not (self.folder / name).is_file()]:
            raise ConnectionError(f"the client stopped before {', '.join(absent)}")


@dataclass(frozen=True)
class LocalFiles:
    """The files of one pattern in one local folder, and the notes about their download.

    The notes are for patterns of several files: one says that a client has begun and not finished,
    the other has the names and sizes of what it brought. A single file needs none, because the
    clients give it its name when it is whole.
    """

    folder: Path
    pattern: str

    def __str__(self) -> str:
        """Name the files in a message."""
        return repr(self.pattern) if self.pattern else "everything"

    @property
    def one_file(self) -> bool:
        """Whether the pattern is the name of one file."""
        return bool(self.pattern) and not re.search(r"[*?[]|/$", self.pattern)

    @property
    def note(self) -> Path:
        """The file with the names and sizes of a finished download of this pattern."""
        digest = hashlib.sha1(self.pattern.encode(), usedforsecurity=False).hexdigest()
        return self.folder / ".diffsynth_metrics" / f"{digest}.json"

    @property
    def begun(self) -> Path:
        """The file that is there while a download of this pattern is not finished."""
        return self.note.with_suffix(".begun")

    @property
    def interrupted(self) -> bool:
        """Whether a download of this pattern was begun and not finished."""
        return self.begun.is_file()

    def names(self) -> list[str]:
        """Return the names, relative to the folder, of the files that are there."""
        if self.one_file:
            return [self.pattern] if (self.folder / self.pattern).is_file() else []
        whole_folder = not self.pattern or self.pattern.endswith("/")
        pattern = self.pattern + "**" if whole_folder else self.pattern
        # `glob` leaves out hidden files and folders, which is where the clients keep their own.
        found = glob.glob(pattern, root_dir=self.folder, recursive=whole_folder)
        whole = {name for name in found if not _LEFTOVER.fullmatch(name)}
        return sorted(name for name in whole if (self.folder / name).is_file())

    def damaged(self) -> list[str]:
        """Return the files that a finished download brought and that are not as it left them."""
        sizes = self._noted_sizes()
        return [name for name, size in sizes.items() if not _is_whole(self.folder / name, size)]

    def are_complete(self, sufficient: Sequence[str]) -> bool:
        """Return whether the files can be used without asking the hub."""
        names = self.names()
        if not names or self.one_file:
            return bool(names)
        if self.interrupted or self._noted_sizes():
            return not self.interrupted and not self.damaged()
        # A pattern such as "model*.safetensors" asks for one set of shards and nothing else.
        suffix = PurePosixPath(self.pattern).suffix
        if suffix and all(_SHARD.fullmatch(name) and name.endswith(suffix) for name in names):
            return not missing_shards(names)
        return any(PurePosixPath(name).name in sufficient for name in names)

    def locked(self) -> BaseFileLock:
        """Return the lock, to be used in a ``with``, that one process at a time holds to download."""
        from filelock import FileLock

        self.note.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.note.parent / "download.lock")

    def client_patterns(self) -> tuple[str, str]:
        """Return what the clients shall take and leave out; their ``*`` matches slashes too."""
        if not self.pattern or self.pattern.endswith("/"):
            return self.pattern + "*", ""
        return self.pattern, "*/" * (self.pattern.count("/") + 1) + "*"

    def note_begin(self) -> None:
        """Note that a download begins."""
        if not self.one_file:
            self.begun.touch()

    def note_end(self) -> None:
        """Note what a download brought."""
        if self.one_file:
            return
        sizes = {name: (self.folder / name).stat().st_size for name in self.names()}
        partial = self.note.with_suffix(".tmp")
        partial.write_text(json.dumps({"pattern": self.pattern, "files": sizes}, indent=1), "utf-8")
        os.replace(partial, self.note)
        self.begun.unlink(missing_ok=True)

    def _noted_sizes(self) -> dict[str, int]:
        """Return the sizes by file name that a finished download noted; none where there is no note."""
        try:
            sizes = json.loads(self.note.read_bytes())["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return sizes if isinstance(sizes, dict) else {}


def missing_shards(names: Iterable[str]) -> list[str]:
    """Return the names that are absent from sets such as ``model-00001-of-00003.safetensors``."""
    present, wanted = set(names), set()
    for shard in filter(None, map(_SHARD.fullmatch, present)):
        stem, count, suffix = shard.groups()
        wanted |= {f"{stem}-{i + 1:05d}-of-{count}{suffix}" for i in range(int(count))}
    return sorted(wanted - present)


def _is_whole(file: Path, size: int) -> bool:
    """Return whether a file is there as it was downloaded, or as JSON that somebody edited since."""
    if not file.is_file() or file.stat().st_size == size:
        return file.is_file()
    if file.suffix != ".json":
        return False
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield once each: an error, its causes, and those of the files that ModelScope's error carries."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += getattr(current, "failed_files", {}).values()
        waiting += filter(None, [current.__cause__ or current.__context__])


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _hint(causes: Sequence[BaseException], offline: bool) -> str:
    """Return what the user can do about a failed download."""
    if offline:
        return (
            "Check the network, set MODELSCOPE_ENDPOINT, HF_ENDPOINT or DIFFSYNTH_DOWNLOAD_SOURCE to a "
            "hub that can be reached, or use files that you have: ModelConfig(path=...), or a copy in "
            "the local folder and DIFFSYNTH_SKIP_DOWNLOAD=true."
        )
    codes = {getattr(cause, "errno", None) for cause in causes}
    if codes & {errno.EACCES, errno.EROFS}:
        return (
            "Set DIFFSYNTH_MODEL_BASE_PATH to a folder that can be written, or "
            "DIFFSYNTH_SKIP_DOWNLOAD=true to use only what is there."
        )
    if errno.ENOSPC in codes:
        return "Make room on the disk, or set DIFFSYNTH_MODEL_BASE_PATH to a folder on another one."
    statuses = {getattr(getattr(cause, "response", None), "status_code", 0) for cause in causes}
    if any(status == 429 or status >= 500 for status in statuses):
        return "Try again later, or set DIFFSYNTH_DOWNLOAD_SOURCE to the other hub."
    return (
        "Check model_id and origin_file_pattern (a folder ends with a slash); if the repository is "
        "on the other hub, set DIFFSYNTH_DOWNLOAD_SOURCE to huggingface or modelscope."
    )

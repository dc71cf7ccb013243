"""Repositories on ModelScope and Hugging Face, and the local folders that their files go to.

The downloads themselves (resuming, several at once) are the work of the hubs' own clients. What is
decided here is which files are needed, and whether what is there afterwards is what the hub has listed.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from diffsynth_metrics.errors import DownloadError
from diffsynth_metrics.weights.listing import NOTES, HubFile, list_huggingface, list_modelscope

__all__ = ["LocalFiles", "Repository", "causes_of", "missing_shards"]

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
# What the clients leave beside the files while they download: "x.incomplete", "x.parallel_tmp", and
# "x.safetensors_0_167772159" for a part of a large file, in bytes. Their other leftovers are hidden.
_LEFTOVER = re.compile(r".*(\.incomplete|\.parallel_tmp|\.lock|\.\w+_(0|\d{7,})_\d{7,})")
# What Python, requests, httpx and ModelScope call a hub that cannot be reached. Names, because
# importing all these libraries to have the classes would take seconds.
_OFFLINE = {
    *("ConnectionError", "NetworkError", "RequestTimeoutError"),
    *("Timeout", "TimeoutError", "TimeoutException"),
}
_WRONG_BYTES = (
    "Try again, or set DIFFSYNTH_DOWNLOAD_SOURCE to the other hub: the hub or something between it and "
    "this machine changes the files."
)
_SECONDS_OF_SILENCE = 5
"""How long a process waits for another one's download before it says so."""


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

    def fetch(
        self, pattern: str, *, download: bool, sufficient: Sequence[str], verify: bool = False
    ) -> list[str]:
        """Return the names of the local files that match a pattern, after downloading what is missing.

        Args:
            pattern: A file, a glob, a folder with a trailing slash, or ``""`` for everything.
            download: Whether the hub may be asked.
            sufficient: File names any of which makes a folder that was copied by hand complete.
            verify: Whether digests are compared too, and not only sizes.

        Raises:
            DownloadError: The files could not be had, or not all of them.
        """
        files = LocalFiles(self.folder, pattern)
        if not download:
            self._check_without_download(files)
        elif not files.are_complete(sufficient) or (verify and files.unverified()):
            self._download(files, sufficient, verify)
        if verify and (unverified := files.unverified()):
            hint = f"Delete {self.folder / unverified[0]} and let it be downloaded again."
            if not download:
                hint = f"Allow downloads, so that the hub is asked. {hint}"
            problem = f"not known to be what {self.source} has: {', '.join(unverified)}"
            raise self.error(hint, problem)
        return files.names()

    def list_files(self, files: LocalFiles) -> tuple[str | None, list[HubFile]]:
        """Ask the hub for the revision and the files that match a pattern.

        Raises:
            DownloadError: The listing has a name that leads out of the folder, or no size or digest.
            Exception: Whatever the hub's client raises.
        """
        ask = list_huggingface if self.source == "huggingface" else list_modelscope
        revision, listed = ask(self.model_id, self.revision)
        found: dict[str, HubFile] = {}
        try:
            for fields in listed:
                if not isinstance(fields["name"], str) or files.matches(fields["name"]):
                    file = HubFile(**fields)
                    if found.setdefault(file.name, file) != file:
                        raise ValueError(f"{file.name!r} is there twice and not the same")
            folders = {str(folder) for name in found for folder in PurePosixPath(name).parents}
            if both := sorted(folders & found.keys()):
                raise ValueError(f"{both[0]!r} is there as a file and as a folder")
        except ValueError as error:
            hint = "Do not use this repository, or choose the other hub: its listing cannot be trusted."
            raise self.error(hint, f"the listing is refused: {error}") from None
        return revision, list(found.values())

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
        if damaged := files.damaged():
            raise self.error(hint, f"missing or damaged since the download: {', '.join(damaged)}")
        if not files.names():
            raise self.error(hint, f"no local file matches {files}")
        if files.interrupted:
            hint += f" If you have completed the files yourself, delete {files.begun}."
            raise self.error(hint, f"the download of {files} was interrupted")

    def _download(self, files: LocalFiles, sufficient: Sequence[str], verify: bool) -> None:
        """Let the hub's client complete the files, or raise `DownloadError`."""
        logger.warning(f"downloading {files} of {self} from {self.source} to {self.folder}")
        try:
            # Both clients have locks, but ModelScope's gives up after ten minutes, less than a
            # large file takes. With this one a second process waits and finds the files there.
            with files.locked():
                if not files.are_complete(sufficient) or (verify and files.unverified()):
                    self._run_client(files)
        except DownloadError:
            raise
        except Exception as error:
            logger.debug("the client's error", exc_info=True)
            causes = list(causes_of(error))
            offline = any(c.__name__ in _OFFLINE for cause in causes for c in type(cause).__mro__)
            absent = files.damaged() or missing_shards(files.names())
            usable = not (verify or files.interrupted or absent)
            if offline and usable and files.names():
                logger.warning(
                    f"{self.source} could not be reached ({_first_line(error)}); using the files of "
                    f"{self} that match {files} in {self.folder}"
                )
                return
            # Of a connection that failed, the innermost cause says it shortest; what the hub answered
            # says more than what the client makes of it.
            answers = [cause for cause in causes if getattr(cause, "response", None) is not None]
            told = causes[-1] if offline else (answers or [error])[0]
            problem = f"could not download {files}: {type(told).__name__}: {told}"
            problem += f"; missing here: {', '.join(absent)}" if absent else ""
            # The clients' errors come in chains of three to six tracebacks, which say no more.
            raise self.error(_hint(causes, offline), problem) from None
        if not files.names():
            raise self.error(_hint([], False), f"no file of the repository matches {files}")

    def _run_client(self, files: LocalFiles) -> None:
        """Let the hub's client fetch what is missing or another, check it, and keep the notes."""
        revision, listed = self.list_files(files)
        needed = [
            file
            for file in listed
            if not file.equals(self.folder / file.name) and not files.is_edited(file.name)
        ]
        for file in needed:
            _check_way(self.folder / file.name)
        before, interrupted = files.names(), files.interrupted
        files.note_begin()
        try:
            if needed:
                self._fetch_files([file.name for file in needed], revision)
            self._check_what_arrived(needed)
        except Exception:
            if files.names() == before and not interrupted:
                files.begun.unlink(missing_ok=True)  # nothing arrived: the files are what they were
            raise
        files.note_end(listed)

    def _fetch_files(self, names: Sequence[str], revision: str | None) -> None:
        # Names that were checked, and no pattern: the client lists the repository again for itself.
        patterns = [glob.escape(name) for name in names]
        # On their own the clients read these variables only once in the life of a process.
        if self.source == "huggingface":
            from huggingface_hub import snapshot_download

            snapshot_download(
                self.model_id,
                revision=revision,
                local_dir=self.folder,
                allow_patterns=patterns,
                # The client believes its own notes about a file that is there.
                force_download=any((self.folder / name).exists() for name in names),
                endpoint=os.environ.get("HF_ENDPOINT") or None,
            )
            return
        from modelscope import snapshot_download as from_modelscope

        from_modelscope(
            self.model_id,
            revision=revision,
            local_dir=str(self.folder),
            # To this client a comma separates patterns: "[+--]" is what lies between + and -.
            allow_patterns=[pattern.replace(",", "[+--]") for pattern in patterns],
            endpoint=os.environ.get("MODELSCOPE_ENDPOINT") or None,
        )

    def _check_what_arrived(self, fetched: Sequence[HubFile]) -> None:
        """Compare the files with the listing; one that differs is deleted, so that nobody uses it."""
        if absent := [file.name for file in fetched if not (self.folder / file.name).is_file()]:
            raise ConnectionError(f"the client stopped before {', '.join(absent)}")
        wrong = [file.name for file in fetched if not file.equals(self.folder / file.name)]
        for name in wrong:
            (self.folder / name).unlink()
        if wrong:
            problem = f"what arrived is not what the hub lists, and was deleted: {', '.join(wrong)}"
            raise self.error(_WRONG_BYTES, problem)


@dataclass(frozen=True)
class LocalFiles:
    """The files of one pattern in one local folder, and the notes about their download.

    One note says that a client has begun and not finished, the other has the names, sizes and digests
    of what it brought. Files that were copied by hand have no note.
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
        """The file with the names, sizes and digests of a finished download of this pattern."""
        digest = hashlib.sha1(self.pattern.encode(), usedforsecurity=False).hexdigest()
        return self.folder / NOTES / f"{digest}.json"

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

    def matches(self, name: str) -> bool:
        """Tell whether a file of the repository is one of the pattern's."""
        if not self.pattern or self.pattern.endswith("/"):
            return name.startswith(self.pattern)
        return fnmatch(name, self.pattern) and name.count("/") == self.pattern.count("/")

    def damaged(self) -> list[str]:
        """Return the files that a finished download brought and that are not as it left them."""
        return [
            name
            for name, file in self._noted().items()
            if not file.has_size_of(self.folder / name) and not self.is_edited(name)
        ]

    def unverified(self) -> list[str]:
        """Return the files that have not the digest that was noted, or of which none was noted."""
        noted = self._noted()
        return [
            name
            for name in self.names()
            if name not in noted
            or not (noted[name].sha256 or noted[name].git_sha1)
            or not noted[name].equals(self.folder / name)
        ]

    def is_edited(self, name: str) -> bool:
        """Tell whether a file is JSON that somebody changed after its download."""
        file, noted = self.folder / name, self._noted()
        if file.suffix != ".json" or name not in noted or not file.is_file():
            return False
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            return False
        return not noted[name].equals(file)

    def are_complete(self, sufficient: Sequence[str]) -> bool:
        """Return whether the files can be used without asking the hub."""
        names = self.names()
        if not names or self.interrupted or self.damaged():
            return False
        if self.one_file or _read_note(self.note):
            return True
        # A pattern such as "model*.safetensors" asks for one set of shards and nothing else.
        suffix = PurePosixPath(self.pattern).suffix
        if suffix and all(_SHARD.fullmatch(name) and name.endswith(suffix) for name in names):
            return not missing_shards(names)
        return any(PurePosixPath(name).name in sufficient for name in names)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that one process at a time has to download, and say who holds it."""
        from filelock import FileLock, Timeout

        self.note.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.note.parent / "download.lock")
        holder = self.note.parent / "download.holder"
        try:
            lock.acquire(timeout=_SECONDS_OF_SILENCE)
        except Timeout:
            logger.warning(
                f"waiting for another download to {self.folder} to end: {_read_text(holder)}. If that "
                "process hangs, end it; this one goes on by itself"
            )
            lock.acquire()
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}", "utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def note_begin(self) -> None:
        """Note that a download begins."""
        self.begun.touch()

    def note_end(self, files: Sequence[HubFile]) -> None:
        """Note what a download brought, as the hub lists it."""
        if files:
            content = {"pattern": self.pattern, "files": [asdict(file) for file in files]}
            partial = self.note.with_suffix(".tmp")
            partial.write_text(json.dumps(content, indent=1), "utf-8")
            os.replace(partial, self.note)
        self.begun.unlink(missing_ok=True)

    def _noted(self) -> dict[str, HubFile]:
        """Return what finished downloads noted: all of this pattern's, of others' what is there."""
        files = {file.name: file for file in _read_note(self.note)}
        for note in self.note.parent.glob("*.json"):
            for file in _read_note(note):
                if file.name not in files and self.matches(file.name):
                    if (self.folder / file.name).is_file():
                        files[file.name] = file
        return files


def _read_note(note: Path) -> list[HubFile]:
    """Return the files of a note; a note that is damaged, or of an older version, says nothing."""
    try:
        return [HubFile(**fields) for fields in json.loads(note.read_bytes())["files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError):
        return "unknown"


def missing_shards(names: Iterable[str]) -> list[str]:
    """Return the names that are absent from sets such as ``model-00001-of-00003.safetensors``."""
    present, wanted = set(names), set()
    for shard in filter(None, map(_SHARD.fullmatch, present)):
        stem, count, suffix = shard.groups()
        wanted |= {f"{stem}-{i + 1:05d}-of-{count}{suffix}" for i in range(int(count))}
    return sorted(wanted - present)


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


def _check_way(file: Path) -> None:
    """Check that nothing stands where a file is to be written; the clients would try it again."""
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if in_the_way := next((folder for folder in file.parents if folder.is_file()), None):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(in_the_way))


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
    if errno.ENAMETOOLONG in codes:
        return "Set DIFFSYNTH_MODEL_BASE_PATH to a folder with a shorter path."
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in {errno.EISDIR, errno.EEXIST, errno.ENOTDIR}:
            if path := cause.filename2 or cause.filename:
                return f"Move or delete {path}, which is where a file or folder is to be written."
    if any(type(cause).__name__ == "FileIntegrityError" for cause in causes):  # ModelScope's
        return _WRONG_BYTES
    statuses = {getattr(getattr(cause, "response", None), "status_code", 0) for cause in causes}
    if any(status == 429 or status >= 500 for status in statuses):
        return "Try again later, or set DIFFSYNTH_DOWNLOAD_SOURCE to the other hub."
    return (
        "Check model_id and origin_file_pattern (a folder ends with a slash); if the repository is "
        "on the other hub, set DIFFSYNTH_DOWNLOAD_SOURCE to huggingface or modelscope."
    )

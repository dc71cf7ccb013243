"""Where a model's files come from: a `ModelConfig` in, local paths out.

The downloads themselves (resuming, checking hashes) are the work of the hubs' own clients. What is
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
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from diffsynth_metrics.errors import CheckpointError, DownloadError

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["ModelConfig"]

logger = logging.getLogger(__name__)

_EMBEDDED = Path(__file__).parents[1] / "embedded"
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


@dataclass(frozen=True, repr=False)
class ModelConfig:
    """Files of a model: given by path, or by repository and pattern.

    The value never changes. `resolve` reads the environment, downloads what is missing, and
    returns local paths.

    Args:
        path: A file, a list of files, or a folder (its files, without subfolders).
        model_id: A repository, such as ``"DiffSynth-Studio/ImageMetrics"``, instead of a path.
        origin_file_pattern: What to take from the repository: a file, a glob (``*`` stays within
            one folder), a folder with a trailing slash, a list of these, or None for everything.
        download_source: ``"modelscope"`` or ``"huggingface"``; None means the environment's
            ``DIFFSYNTH_DOWNLOAD_SOURCE``, otherwise ModelScope.
        local_model_path: The folder of downloads, ``./models`` when None. The environment's
            ``DIFFSYNTH_MODEL_BASE_PATH`` goes before both, as in ``diffsynth``.
        skip_download: True uses only what is there; None means the environment's
            ``DIFFSYNTH_SKIP_DOWNLOAD``, otherwise False.
        revision: A branch, tag or commit. Each revision has a folder of its own.
    """

    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
    model_id: str | None = None
    origin_file_pattern: str | Sequence[str] | None = None
    download_source: str | None = None
    local_model_path: str | os.PathLike[str] | None = None
    skip_download: bool | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Check the values, and keep them in a form that can be compared and hashed."""
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))
        if bool(self.path) == bool(self.model_id):
            raise ValueError(
                "ModelConfig takes either path=... or model_id=... with origin_file_pattern=..., "
                f"and got {'both' if self.path else 'neither'}"
            )
        if self.path and self.origin_file_pattern is not None:
            raise ValueError("origin_file_pattern belongs to model_id, and path was given")
        for name in ("model_id", "origin_file_pattern", "revision"):
            for value in _as_tuple(getattr(self, name)):
                if os.path.isabs(value) or ".." in re.split(r"[/\\]", value):
                    raise ValueError(f"{name} must stay inside its folder, and {value!r} does not")
        if self.download_source is not None:
            _check_source("download_source", self.download_source)

    def __repr__(self) -> str:
        """Show only what was given."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        given = ", ".join(f"{name}={value!r}" for name, value in values if value is not None)
        return f"{type(self).__name__}({given})"

    @classmethod
    def embedded(cls, name: str) -> ModelConfig:
        """Return the config of a small model that ships inside the package."""
        names = sorted(file.parent.name for file in _EMBEDDED.glob("*/model.safetensors"))
        if name not in names:
            raise ValueError(f"no embedded model is called {name!r}; there are {names}")
        return cls(path=_EMBEDDED / name)

    def resolve(self, *, sufficient: Sequence[str] = ()) -> list[str]:
        """Return the sorted absolute paths of the files, after downloading what is missing.

        Args:
            sufficient: File names any of which makes a folder that was copied by hand count as
                complete, so that nothing is asked of the hub.

        Raises:
            FileNotFoundError: A path does not exist, or a folder is empty.
            DownloadError: Files of a repository could not be had, or not all of them.
            CheckpointError: Shards are missing from a set that was given by path.
        """
        if self.path:
            return _given_files(self.path)
        base = os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or self.local_model_path or "./models"
        revision = "@" + self.revision.replace("/", "--") if self.revision else ""
        folder = _absolute(base) / f"{self.model_id}{revision}"
        source, skip = self._source(), self._skip()
        found: set[str] = set()
        for pattern in _as_tuple(self.origin_file_pattern) or ("",):
            files = _LocalFiles(folder, re.sub(r"^(\./+)+|^\.$", "", pattern))
            if skip:
                self._check_without_download(files)
            elif not files.are_complete(sufficient):
                self._download(files, source, sufficient)
            found.update(files.names())
        if missing := _missing_shards(found):
            hint = "Allow downloads (skip_download, DIFFSYNTH_SKIP_DOWNLOAD)." if skip else ""
            raise self._error(f"shards are missing: {', '.join(missing)}", folder, hint)
        return sorted(str(folder / name) for name in found)

    def _check_without_download(self, files: _LocalFiles) -> None:
        """Raise unless files are there that no interrupted download left incomplete."""
        hint = (
            "Downloads are off (skip_download, DIFFSYNTH_SKIP_DOWNLOAD): allow them, or set "
            "DIFFSYNTH_MODEL_BASE_PATH to the folder that holds the models."
        )
        if not files.names():
            raise self._error(f"no local file matches {files}", files.folder, hint)
        if files.interrupted:
            hint += f" If you have completed the files yourself, delete {files.note}."
            problem = f"the download of {files} was interrupted"
            raise self._error(problem, files.folder, hint)

    def _download(self, files: _LocalFiles, source: str, sufficient: Sequence[str]) -> None:
        """Let the hub's client complete the files, or raise `DownloadError`."""
        client = _from_huggingface if source == "huggingface" else _from_modelscope
        try:
            # Both clients have locks, but ModelScope's gives up after ten minutes, less than a
            # large file takes. With this one a second process waits and finds the files there.
            with files.lock():
                if not files.are_complete(sufficient):
                    files.complete_with(client, self.model_id or "", self.revision)
        except Exception as error:
            causes = list(_causes(error))
            offline = any(c.__name__ in _OFFLINE for cause in causes for c in type(cause).__mro__)
            missing = _missing_shards(files.names())
            if offline and files.names() and not files.interrupted and not missing:
                logger.warning(
                    f"{source} could not be reached ({error}); using the files of {self.model_id} "
                    f"that match {files} in {files.folder}"
                )
                return
            problem = f"could not download {files}: {type(error).__name__}: {error}"
            problem += f"; missing here: {', '.join(missing)}" if missing else ""
            raise self._error(problem, files.folder, _hint(causes, offline)) from error
        if not files.names():
            problem = f"no file of the repository matches {files}"
            raise self._error(problem, files.folder, _hint([], offline=False))

    def _error(self, problem: str, folder: Path, hint: str) -> DownloadError:
        """Return the error that says what is missing, from where, to where."""
        revision = f"@{self.revision}" if self.revision else ""
        return DownloadError(
            f"{problem}\n  repository {self.model_id}{revision} on {self._source()}, "
            f"origin_file_pattern={self.origin_file_pattern!r}, local folder {folder}\n  {hint}"
        )

    def _source(self) -> str:
        """Return the hub to download from."""
        value = os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE") or "modelscope"
        if self.download_source is not None:
            value = self.download_source
        return _check_source("DIFFSYNTH_DOWNLOAD_SOURCE", value)

    def _skip(self) -> bool:
        """Return whether downloads are off."""
        if self.skip_download is not None:
            return self.skip_download
        value = os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD") or "false"
        if value.lower() not in ("true", "1", "false", "0"):
            raise ValueError(f"DIFFSYNTH_SKIP_DOWNLOAD must be true or false, not {value!r}")
        return value.lower() in ("true", "1")


@dataclass(frozen=True)
class _LocalFiles:
    """The files of one pattern in one local folder, and the note about their download.

    The note is for patterns of several files: it is written before the client starts, and completed
    with names and sizes when the client has finished. A single file needs none, because the clients
    give it its name when it is whole.
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
        """The file that tells how far the download of this pattern came."""
        digest = hashlib.sha1(self.pattern.encode(), usedforsecurity=False).hexdigest()
        return self.folder / ".diffsynth_metrics" / f"{digest}.json"

    @property
    def interrupted(self) -> bool:
        """Whether a download of this pattern was begun and not finished."""
        return self.note.is_file() and self._noted_sizes() is None

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

    def are_complete(self, sufficient: Sequence[str]) -> bool:
        """Return whether the files can be used without asking the hub."""
        names = self.names()
        if not names or self.one_file:
            return bool(names)
        if sizes := self._noted_sizes():
            return all(_is_whole(self.folder / name, size) for name, size in sizes.items())
        if self.interrupted:
            return False
        # A pattern such as "model*.safetensors" asks for one set of shards and nothing else.
        suffix = PurePosixPath(self.pattern).suffix
        if suffix and all(_SHARD.fullmatch(name) and name.endswith(suffix) for name in names):
            return not _missing_shards(names)
        return any(PurePosixPath(name).name in sufficient for name in names)

    def lock(self) -> BaseFileLock:
        """Return the lock that lets one process at a time download into the folder."""
        from filelock import FileLock

        self.note.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.note.parent / "download.lock")

    def complete_with(self, client: Any, model_id: str, revision: str | None) -> None:
        """Run a client, and keep the note about it."""
        before, interrupted = self.names(), self.interrupted
        self._write_note(finished=False)
        try:
            client(self, model_id, revision)
        except Exception:
            if self.names() == before and not interrupted:
                self.note.unlink(missing_ok=True)  # nothing arrived: the files are what they were
            raise
        self._write_note(finished=True)

    def client_patterns(self) -> tuple[str, str]:
        """Return what the clients shall take and leave out; their ``*`` matches slashes too."""
        if not self.pattern or self.pattern.endswith("/"):
            return self.pattern + "*", ""
        return self.pattern, "*/" * (self.pattern.count("/") + 1) + "*"

    def _write_note(self, *, finished: bool) -> None:
        """Note that the download begins, or what it brought."""
        sizes = {name: (self.folder / name).stat().st_size for name in self.names()}
        if self.one_file or (finished and not sizes):
            self.note.unlink(missing_ok=True)
            return
        note = {"pattern": self.pattern, "files": sizes if finished else None}
        partial = self.note.with_suffix(".tmp")
        partial.write_text(json.dumps(note, indent=1), encoding="utf-8")
        os.replace(partial, self.note)

    def _noted_sizes(self) -> dict[str, int] | None:
        """Return the sizes by file name that a finished download noted."""
        try:
            sizes: dict[str, int] | None = json.loads(self.note.read_bytes())["files"]
        except (OSError, ValueError, KeyError):
            return None
        return sizes


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


def _from_modelscope(files: _LocalFiles, model_id: str, revision: str | None) -> None:
    """Download the files with ModelScope's client."""
    from modelscope import snapshot_download

    take, leave = files.client_patterns()
    take = take.replace(",", "?")  # to this client a comma separates patterns
    snapshot_download(
        model_id,
        revision=revision,
        local_dir=str(files.folder),
        allow_file_pattern=take,
        ignore_file_pattern=leave,
        # On its own the client reads the variable only once in the life of a process.
        endpoint=os.environ.get("MODELSCOPE_ENDPOINT") or None,
    )


def _from_huggingface(files: _LocalFiles, model_id: str, revision: str | None) -> None:
    """Download the files with Hugging Face's client."""
    from huggingface_hub import HfApi, snapshot_download

    take, leave = files.client_patterns()
    # When the hub cannot be reached, `snapshot_download` returns the folder as it is. This request
    # raises instead, and tells what must be there afterwards.
    info = HfApi().model_info(model_id, revision=revision)
    listed = [file.rfilename for file in info.siblings or []]
    wanted = [name for name in listed if fnmatch(name, take) and not fnmatch(name, leave)]
    if not wanted:
        return
    patterns = [glob.escape(name) for name in wanted]
    snapshot_download(model_id, revision=info.sha, local_dir=files.folder, allow_patterns=patterns)
    if absent := [name for name in wanted if not (files.folder / name).is_file()]:
        raise ConnectionError(f"the client stopped before {', '.join(absent)}")


def _given_files(path: Any) -> list[str]:
    """Return the absolute paths of a file, of several files, or of the files of a folder."""
    given = [_absolute(item) for item in _as_tuple(path)]
    if not isinstance(path, tuple) and given[0].is_dir():
        folder = given[0]
        given = [folder / name for name in _LocalFiles(folder, "*").names()]
        if not given:
            raise FileNotFoundError(f"the folder {folder} has no files")
    for file in given:
        if not file.is_file():
            problem = "is a folder, and a list takes files" if file.is_dir() else "does not exist"
            raise FileNotFoundError(f"{file} {problem}")
    if missing := _missing_shards(map(str, given)):
        raise CheckpointError(f"shards are missing: {', '.join(missing)}")
    return sorted({str(file) for file in given})


def _missing_shards(names: Iterable[str]) -> list[str]:
    """Return the names that are absent from sets such as ``model-00001-of-00003.safetensors``."""
    present, wanted = set(names), set()
    for shard in filter(None, map(_SHARD.fullmatch, present)):
        stem, count, suffix = shard.groups()
        wanted |= {f"{stem}-{i + 1:05d}-of-{count}{suffix}" for i in range(int(count))}
    return sorted(wanted - present)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what caused it, and the errors of single files that ModelScope's carry."""
    yield error
    for cause in (error.__cause__ or error.__context__, *getattr(error, "failed_files", {}).values()):
        if cause is not None:
            yield from _causes(cause)


def _hint(causes: Sequence[BaseException], offline: bool) -> str:
    """Return what the user can do about a failed download."""
    if offline:
        return (
            "The hub could not be reached: set MODELSCOPE_ENDPOINT or DIFFSYNTH_DOWNLOAD_SOURCE to "
            "one that can, or copy the files into the folder and set DIFFSYNTH_SKIP_DOWNLOAD=true."
        )
    if any(getattr(cause, "errno", None) in (errno.EACCES, errno.EROFS) for cause in causes):
        return (
            "The folder cannot be written: set DIFFSYNTH_MODEL_BASE_PATH to one that can, or "
            "DIFFSYNTH_SKIP_DOWNLOAD=true to use only what is there."
        )
    return (
        "Check model_id and origin_file_pattern (a folder ends with a slash); if the repository is "
        "on the other hub, set DIFFSYNTH_DOWNLOAD_SOURCE to huggingface or modelscope."
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Return nothing, one value or several as a tuple."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _absolute(path: Any) -> Path:
    """Return the absolute path, with ``~`` replaced and links kept."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _checked(name: str, value: Any) -> Any:
    """Return the value of a field with paths as text and lists as tuples."""
    if name in ("path", "origin_file_pattern") and isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} is an empty list")
        return tuple(_checked(f"{name}[{index}]", item) for index, item in enumerate(value))
    is_item = name.endswith("]")
    types: tuple[type, ...] = (bool,) if name == "skip_download" else (str,)
    if name.startswith(("path", "local_model_path")):
        types = (str, os.PathLike)
    if not isinstance(value, types) and (is_item or value is not None):
        names = " or ".join(cls.__name__ for cls in types)
        raise TypeError(f"{name} must be {names}, not {type(value).__name__}")
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_source(name: str, value: str) -> str:
    """Return the name of a hub in lower case."""
    if value.lower() not in ("huggingface", "modelscope"):
        raise ValueError(f"{name} must be huggingface or modelscope, not {value!r}")
    return value.lower()

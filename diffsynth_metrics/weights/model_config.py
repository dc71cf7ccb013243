"""`ModelConfig`, the value that says where a model's files are: a config in, local paths out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.weights.hub import LocalFiles, Repository, missing_shards

__all__ = ["ModelConfig"]

_EMBEDDED = Path(__file__).parents[1] / "embedded"


def _unused(default: Any = None) -> Any:
    """Declare a field of diffsynth's ModelConfig that is accepted at its default and means nothing."""
    return field(default=default, repr=False, compare=False)


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

    The other fields are those of ``diffsynth``'s ModelConfig. They are accepted at their defaults, for
    code written for it; any other value is a ValueError.
    """

    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
    model_id: str | None = None
    origin_file_pattern: str | Sequence[str] | None = None
    download_source: str | None = None
    local_model_path: str | os.PathLike[str] | None = None
    skip_download: bool | None = None
    offload_device: None = _unused()
    offload_dtype: None = _unused()
    onload_device: None = _unused()
    onload_dtype: None = _unused()
    preparing_device: None = _unused()
    preparing_dtype: None = _unused()
    computation_device: None = _unused()
    computation_dtype: None = _unused()
    clear_parameters: bool = _unused(False)
    state_dict: None = _unused()
    quantize: None = _unused()
    revision: str | None = None

    def __post_init__(self) -> None:
        """Check the values, and keep them in a form that can be compared and hashed."""
        for given in fields(self):
            value = getattr(self, given.name)
            if given.compare:
                object.__setattr__(self, given.name, _checked(given.name, value))
            elif value is not given.default:
                raise ValueError(
                    "Use the arguments device, torch_dtype and device_map of from_pretrained instead: "
                    f"ModelConfig does not support {given.name}, and got {value!r}"
                )
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
        values = ((given.name, getattr(self, given.name)) for given in fields(self) if given.repr)
        shown = ", ".join(f"{name}={value!r}" for name, value in values if value is not None)
        return f"{type(self).__name__}({shown})"

    @classmethod
    def embedded(cls, name: str) -> ModelConfig:
        """Return the config of a small model that ships inside the package."""
        names = sorted(file.parent.name for file in _EMBEDDED.glob("*/model.safetensors"))
        if name not in names:
            raise ValueError(f"no embedded model is called {name!r}; there are {names}")
        return cls(path=_EMBEDDED / name)

    def resolve(self, *, sufficient: Sequence[str] = (), verify: bool = False) -> list[str]:
        """Return the sorted absolute paths of the files, after downloading what is missing.

        Args:
            sufficient: File names any of which makes a folder that was copied by hand count as
                complete, so that nothing is asked of the hub.
            verify: Compare the digest of every file with the one that the hub gave, and not only the
                size. It reads all files. What differs is downloaded again; files that nobody noted a
                digest of, such as copies made by hand, are compared with the hub's listing.

        Raises:
            ValueError: `verify` is for files of a repository, and a path was given.
            FileNotFoundError: A path does not exist, or a folder is empty.
            DownloadError: Files of a repository could not be had, or not all of them.
            CheckpointError: Shards are missing from a set that was given by path.
        """
        if self.path:
            if verify:
                raise ValueError("verify needs model_id: no hub says what a file given by path holds")
            return _given_files(self.path)
        base = os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or self.local_model_path or "./models"
        repository = Repository(self._source(), self.model_id or "", self.revision, _absolute(base))
        skip = self._skip()
        names: set[str] = set()
        for pattern in _as_tuple(self.origin_file_pattern) or ("",):
            pattern = re.sub(r"^(\./+)+|^\.$", "", pattern)
            names.update(
                repository.fetch(pattern, download=not skip, sufficient=sufficient, verify=verify)
            )
        if missing := missing_shards(names):
            raise repository.error(
                "Allow downloads (skip_download, DIFFSYNTH_SKIP_DOWNLOAD)."
                if skip
                else "Check that the repository has them, and that origin_file_pattern matches them.",
                f"shards are missing: {', '.join(missing)}",
            )
        return sorted(str(repository.folder / name) for name in names)

    def download_if_necessary(self) -> list[str]:
        """Do the same as :meth:`resolve`; the name in ``diffsynth``.

        There it sets ``path``; here the value never changes, and the paths are returned.
        """
        return self.resolve()

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


def _given_files(path: Any) -> list[str]:
    """Return the absolute paths of a file, of several files, or of the files of a folder."""
    given = [_absolute(item) for item in _as_tuple(path)]
    if not isinstance(path, tuple) and given[0].is_dir():
        folder = given[0]
        given = [folder / name for name in LocalFiles(folder, "*").names()]
        if not given:
            raise FileNotFoundError(f"the folder {folder} has no files")
    for file in given:
        if not file.is_file():
            problem = "is a folder, and a list takes files" if file.is_dir() else "does not exist"
            raise FileNotFoundError(f"{file} {problem}")
    if missing := missing_shards(map(str, given)):
        raise CheckpointError(f"Add the other shards to path: shards are missing: {', '.join(missing)}")
    return sorted({str(file) for file in given})


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

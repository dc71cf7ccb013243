"""What a hub lists of a repository: names that stay inside the folder, sizes and digests.

A listing is input like any other. A name is checked before anything is written, and a file that arrived
is compared with the digest that the hub gave, whatever the hub's client has checked.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["NOTES", "HubFile", "list_huggingface", "list_modelscope", "sha256_of"]

# Names that mean a device on Windows, with any suffix and in any folder.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_SECONDS_TO_ANSWER = 10
NOTES = ".diffsynth_metrics"
"""The folder, in that of the repository, of the notes about downloads."""


@dataclass(frozen=True)
class HubFile:
    """A file as a hub lists it.

    Attributes:
        name: Its path in the repository, with forward slashes.
        size: In bytes.
        sha256: Of its content; None where the hub does not say it.
        git_sha1: The name that git gives to its content, which Hugging Face lists for small files.

    Raises:
        ValueError: The name leads out of the repository's folder or is none on some system, or the
            values are no size and no digests. The message has the name.
    """

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def __post_init__(self) -> None:
        """Check all values."""
        parts = self.name.split("/") if isinstance(self.name, str) else [""]
        inside = all(part.strip(" .") and not _DEVICE.fullmatch(part) for part in parts)
        # Spaces around a name are cut by ModelScope's client; nobody but this package writes its notes.
        inside = inside and all(part == part.strip() for part in parts) and parts[0] != NOTES
        if not inside or not self.name.isprintable() or re.search(r"[\\:]", self.name):
            raise ValueError(f"{self.name!r} is not the name of a file inside the repository's folder")
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 0:
            raise ValueError(f"{self.name!r} has the size {self.size!r}")
        for digest, length in ((self.sha256, 64), (self.git_sha1, 40)):
            known = isinstance(digest, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", digest)
            if digest is not None and not known:
                raise ValueError(f"{self.name!r} has the digest {digest!r}")

    def has_size_of(self, file: Path) -> bool:
        """Tell whether a local file is there and has the listed size."""
        return file.is_file() and file.stat().st_size == self.size

    def equals(self, file: Path) -> bool:
        """Tell whether a local file has the listed size and, where one is listed, the digest."""
        if not self.has_size_of(file):
            return False
        if self.sha256 is not None:
            return sha256_of([file]) == self.sha256
        return self.git_sha1 is None or _git_sha1_of(file) == self.git_sha1


def list_modelscope(model_id: str, revision: str | None) -> tuple[str | None, list[dict[str, Any]]]:
    """Ask ModelScope for the files of a repository; returns the revision and fields of `HubFile`."""
    from modelscope_hub import HubApi

    api = HubApi(endpoint=os.environ.get("MODELSCOPE_ENDPOINT") or None)
    files = api.list_repo_files(model_id, "model", revision=revision)
    return revision, [
        {"name": file.path, "size": file.size, "sha256": file.sha256.lower() if file.sha256 else None}
        for file in files
        if not file.is_dir
    ]


def list_huggingface(model_id: str, revision: str | None) -> tuple[str | None, list[dict[str, Any]]]:
    """Ask Hugging Face for the files of a repository; returns the commit and fields of `HubFile`."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    # Where the hub cannot be reached, the client's download returns the folder as it is; this raises.
    info = api.model_info(model_id, revision=revision, timeout=_SECONDS_TO_ANSWER, files_metadata=True)
    return info.sha, [
        {
            "name": file.rfilename,
            "size": file.size,
            "sha256": file.lfs.sha256 if file.lfs else None,
            "git_sha1": None if file.lfs else file.blob_id,
        }
        for file in info.siblings or []
    ]


def sha256_of(files: Sequence[Path]) -> str:
    """Return the sha256 of the contents of files, one behind the other.

    Files of tens of gigabytes take minutes, so it is kept as long as no size or time of change differs.
    """
    states = [(file, file.stat()) for file in files]
    return _sha256(tuple((file, state.st_size, state.st_mtime_ns) for file, state in states))


@lru_cache(maxsize=256)
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, _, _ in files:
        _read_into(digest.update, file)
    return digest.hexdigest()


def _git_sha1_of(file: Path) -> str:
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    _read_into(digest.update, file)
    return digest.hexdigest()


def _read_into(update: Callable[[bytes], object], file: Path) -> None:
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            update(block)

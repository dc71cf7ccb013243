"""The pictures in a folder: which files count, and how two folders pair."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

__all__ = ["IMAGE_EXTENSIONS", "image_files", "pair_folders"]

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The files of a folder that are read, in any case."""

_OTHER_PICTURES = frozenset(
    ".apng .avif .gif .heic .heif .ico .jfif .jp2 .jpe .jxl .npy .pbm .pnm .psd .svg .tga".split()
)
"""Files of pictures that are left out, as pytorch-fid, clean-fid and torch-fidelity leave them out."""

logger = logging.getLogger(__name__)


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the image files in a folder and below it, sorted.

    Names that begin with a dot are left out. Links are followed, and every folder is read once even if
    links lead to it again. A warning is logged of pictures in formats that FID's packages do not read.

    Raises:
        ValueError: There are no images.
        OSError: A folder cannot be listed; the message names it.
    """
    files: list[Path] = []
    others: Counter[str] = Counter()
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_stop):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_EXTENSIONS:
                files.append(Path(root, name))
            elif suffix in _OTHER_PICTURES:
                others[suffix] += 1
    left_out = " and ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    if not files:
        raise ValueError(
            f"there are no images in {str(folder)!r} or below it; looked for "
            f"{', '.join(extension[1:] for extension in IMAGE_EXTENSIONS)}"
            + (f"; left out {left_out} files" if left_out else "")
        )
    if left_out:
        logger.warning("left out %s files in %s: FID's packages do not read them", left_out, folder)
    return sorted(files)


def _stop(error: OSError) -> None:
    # os.walk would leave the folder out, and a part of the images would give another FID.
    raise error


def pair_folders(
    first: str | os.PathLike[str], second: str | os.PathLike[str]
) -> tuple[list[Path], list[Path]]:
    """Pair the image files of two folders, and below them, by their names without suffix.

    Returns:
        The files of both, in the same order, sorted by name.

    Raises:
        ValueError: A folder has no images, a file has no partner, or several files of a folder have one
            name.
    """
    ours, theirs = _by_stem(first), _by_stem(second)
    for here, there, folder in ((ours, theirs, second), (theirs, ours, first)):
        if alone := sorted(set(here).difference(there)):
            raise ValueError(
                f"{len(alone)} of {len(here)} image files have no partner in {str(folder)!r}, the "
                f"first is {str(here[alone[0]])!r}"
            )
    return [ours[stem] for stem in sorted(ours)], [theirs[stem] for stem in sorted(ours)]


def _by_stem(folder: str | os.PathLike[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in image_files(folder):
        stem = str(file.relative_to(folder).with_suffix(""))
        if stem in files:
            raise ValueError(f"several files are called {stem!r} in {str(folder)!r}")
        files[stem] = file
    return files

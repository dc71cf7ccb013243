"""The layouts: for each, why a source is taken for it, and how it becomes samples.

``find`` looks at names, columns and the beginning of files and returns a reason, or None; ``read``
returns everything that is there, used or not.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from diffsynth_metrics.evaluation import folder_layouts, manifest_layouts, webdataset
from diffsynth_metrics.evaluation.manifests import MANIFESTS, PICTURES
from diffsynth_metrics.evaluation.sources import Reading, Source, suffix_of

__all__ = ["LAYOUTS", "NAMES", "Layout", "choose_layout", "open_source"]


@dataclass(frozen=True)
class Layout:
    """A way in which pictures and prompts lie on disk.

    Attributes:
        name: Its name.
        find: Returns why a source has this layout, or None.
        read: Reads it; an error says what does not fit.
        takes_prompts: Whether it uses the argument ``prompts``.
    """

    name: str
    find: Callable[[Source], str | None]
    read: Callable[[Source], Reading]
    takes_prompts: bool = False


LAYOUTS = (
    Layout("manifest", manifest_layouts.find_manifest, manifest_layouts.read_manifest),
    Layout("imagefolder", manifest_layouts.find_imagefolder, manifest_layouts.read_imagefolder),
    Layout("parquet", manifest_layouts.find_parquet, manifest_layouts.read_parquet),
    Layout("webdataset", webdataset.find_webdataset, webdataset.read_webdataset),
    Layout("sidecar", folder_layouts.find_sidecar, folder_layouts.read_sidecar),
    Layout("png_text", folder_layouts.find_png_text, folder_layouts.read_png_text),
    Layout("geneval", folder_layouts.find_geneval, folder_layouts.read_geneval),
    Layout("hpdv2", folder_layouts.find_hpdv2, folder_layouts.read_hpdv2, True),
    Layout("t2i_compbench", folder_layouts.find_t2i_compbench, folder_layouts.read_t2i_compbench),
    Layout("image_reward", folder_layouts.find_image_reward, folder_layouts.read_with_prompts, True),
    Layout("edits", folder_layouts.find_edits, folder_layouts.read_edits, True),
    Layout("prompts", folder_layouts.find_prompts, folder_layouts.read_with_prompts, True),
    Layout("images", folder_layouts.find_images, folder_layouts.read_images),
)
"""All layouts. Exactly one must be found, where ``images`` counts only if no other is."""

NAMES = tuple(layout.name for layout in LAYOUTS)
"""What ``layout=`` may be."""


def open_source(
    path: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | None,
    columns: Mapping[str, str] | None,
    allow_outside: bool,
) -> Source:
    """Check what :func:`read_samples` was given.

    Raises:
        FileNotFoundError: The source or the prompts do not exist.
        ValueError: One of them is a file of another kind.
        TypeError: The columns are no dict.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise TypeError(
            f"columns must be a dict such as {{'image': 'picture'}}, got {type(columns).__name__}"
        )
    source = Path(path).expanduser()
    prompts_path = None if prompts is None else Path(prompts).expanduser()
    for given in (source, prompts_path):
        if given is not None:
            _check_exists(given)
    if source.is_file():
        _check_file(source, prompts_path)
    return Source(source, prompts_path, dict(columns or {}), allow_outside)


def _check_exists(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}") from None
    except PermissionError:
        raise
    except (OSError, ValueError) as error:  # a name that is too long, a link to itself, a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}: {reason}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"pass a file or a folder: {str(path)!r} is a device, a pipe or a socket")


def _check_file(file: Path, prompts: Path | None) -> None:
    suffix = file.suffix.lower()
    if suffix in PICTURES:
        raise ValueError(
            f"pass the folder of the pictures, not {str(file)!r}; one picture is scored with "
            "metric.compute(prompt, path)"
        )
    if suffix == ".txt":
        raise ValueError(f"pass the folder of the pictures, and prompts={str(file)!r}")
    if suffix not in (*MANIFESTS, ".tar"):
        hint = "; unpack or decompress it first" if suffix in (".gz", ".zip", ".tgz", ".zst") else ""
        raise ValueError(
            f"a source is a folder, a .tar shard, or a manifest ({', '.join(MANIFESTS)}), not "
            f"{str(file)!r}{hint}"
        )
    if prompts is not None:
        raise ValueError(f"prompts= goes with a folder of pictures; {str(file)!r} holds prompts itself")


def choose_layout(source: Source, name: str | None) -> tuple[Layout, str]:
    """Return the layout of a source, and why it is that one.

    Raises:
        ValueError: There is no such layout, none fits, or several do.
    """
    if name is not None:
        return _named(name, source), "it was asked for"
    layouts = [one for one in LAYOUTS if one.takes_prompts or source.prompts_path is None]
    found = [(layout, reason) for layout in layouts if (reason := layout.find(source))]
    # Pictures alone are a layout only where nothing else is there.
    found = [one for one in found if one[0].name != "images"] or found
    if len(found) == 1:
        return found[0]
    if found:
        candidates = ", or ".join(f"layout={layout.name!r} ({reason})" for layout, reason in found)
        raise ValueError(f"say what {source.path} is: pass {candidates}")
    if source.prompts_path is not None and source.pictures:
        raise ValueError(
            f"the prompts in {source.prompts_path} go with no picture in {source.path}, such as "
            f"{source.pictures[0]!r}; see docs/data.md for how they are matched"
        )
    raise ValueError(_nothing_found(source))


def _named(name: str, source: Source) -> Layout:
    wanted = name.lower().replace("-", "_")
    if wanted in ("dpg", "dpg_bench"):
        raise ValueError(
            "DPG-Bench's grids are not read: cut each grid into its four pictures, KEY_0.png to "
            "KEY_3.png, and pass their folder, and prompts=FOLDER with the KEY.txt files"
        )
    for layout in LAYOUTS:
        if layout.name == wanted and source.prompts_path is not None and not layout.takes_prompts:
            raise ValueError(f"the layout {wanted!r} holds its prompts itself: leave prompts= out")
        if layout.name == wanted:
            return layout
    near = get_close_matches(wanted, NAMES, n=1)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no layout {name!r}; {suggestion}There are {', '.join(NAMES)}")


def _nothing_found(source: Source) -> str:
    if not source.is_folder:
        return f"{source.path} has no column of pictures"
    endings = Counter(suffix_of(name) or "no suffix" for name in source.files).most_common(5)
    there = ", ".join(f"{count} {ending}" for ending, count in endings) or "nothing"
    top = [name for name in source.files if "/" not in name]
    tables = [name for name in top if suffix_of(name) in MANIFESTS and suffix_of(name) != ".json"]
    hint = f"; pass the manifest itself, such as {source.path / tables[0]}" if tables else ""
    return f"there are no pictures in {source.path} or below it; there is {there}{hint}"

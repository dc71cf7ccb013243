"""What the settings of an image processor beside the weights say, compared with what a metric does.

transformers 4 saves them as ``preprocessor_config.json``, transformers 5 inside of
``processor_config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.weights.checkpoint import read_config

__all__ = ["check_patches", "check_preprocessor"]

_Channels = tuple[float, float, float]
_FILES = ("preprocessor_config.json", "processor_config.json")


def check_preprocessor(folder: Path, transform: ShortestEdgeCrop) -> None:
    """Refuse a processor that prepares pictures in another way than this metric does."""
    square = {"height": transform.size, "width": transform.size}
    accepted: dict[str, list[Any]] = {
        "size": [transform.size, {"shortest_edge": transform.size}, square],
        "crop_size": [transform.size, square],
        "do_resize": [True],
        "do_center_crop": [True],
    }
    accepted |= _pixels(transform.mean, transform.std)
    for file, settings in _read_settings(folder).items():
        _check(settings, accepted, file)


def check_patches(
    folder: Path, vision_config: Any, mean: _Channels, std: _Channels, loaded: Any = None
) -> None:
    """Refuse a processor of Qwen's that makes other patches or pixels than a network was trained with.

    Args:
        folder: Where the processor lies.
        vision_config: The architecture of the network's image tower.
        mean: The published mean of each channel.
        std: The published deviation of each channel.
        loaded: The image processor of transformers, if one is used: a field that the file lacks has its
            default, which is another model's.

    Raises:
        CheckpointError: It does; the message has the file and the field.
    """
    accepted = _pixels(mean, std) | {
        "patch_size": [vision_config.patch_size],
        "temporal_patch_size": [vision_config.temporal_patch_size],
        "merge_size": [vision_config.spatial_merge_size],
    }
    files = _read_settings(folder)
    for file, settings in files.items():
        _check(settings, accepted, file)
    if loaded is not None:
        file = next(iter(files), folder / _FILES[0])
        _check({name: getattr(loaded, name, None) for name in accepted}, accepted, file)


def _pixels(mean: _Channels, std: _Channels) -> dict[str, list[Any]]:
    return {
        "image_mean": [list(mean)],
        "image_std": [list(std)],
        "resample": [3],
        "rescale_factor": [1 / 255],
        "do_normalize": [True],
        "do_rescale": [True],
    }


def _read_settings(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the settings of the image processor in each file that has some."""
    found = {}
    for name in _FILES:
        settings = read_config([folder / name], name)
        if settings is not None and name == "processor_config.json":
            settings = settings.get("image_processor")
            if settings is not None and not isinstance(settings, dict):
                raise CheckpointError(f"{folder / name} has an image_processor that is no object")
        if settings is not None:
            found[folder / name] = settings
    return found


def _check(settings: Mapping[str, Any], accepted: Mapping[str, list[Any]], file: Path) -> None:
    for name, values in accepted.items():
        if name in settings and not any(_equals(settings[name], value) for value in values):
            raise CheckpointError(
                f"{file} belongs to another model: it has {name} = {settings[name]!r}, and this "
                f"metric's pictures are prepared with {values[0]!r}"
            )


def _equals(found: Any, expected: Any) -> bool:
    # Some files have the factor with fewer digits, and some versions of transformers make tuples.
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-6)
    return bool((list(found) if isinstance(found, tuple) else found) == expected)

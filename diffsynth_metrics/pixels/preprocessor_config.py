"""What a ``preprocessor_config.json`` beside the weights says, compared with what a metric does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.weights.checkpoint import read_config

__all__ = ["check_preprocessor"]


def check_preprocessor(folder: Path, transform: ShortestEdgeCrop) -> None:
    """Refuse a processor that prepares pictures in another way than this metric does."""
    config = read_config([folder / "preprocessor_config.json"], "preprocessor_config.json") or {}
    square = {"height": transform.size, "width": transform.size}
    accepted: dict[str, list[Any]] = {
        "image_mean": [list(transform.mean)],
        "image_std": [list(transform.std)],
        "size": [transform.size, {"shortest_edge": transform.size}, square],
        "crop_size": [transform.size, square],
        "resample": [3],
        **{step: [True] for step in ("do_resize", "do_center_crop", "do_normalize", "do_rescale")},
    }
    for name, values in accepted.items():
        if name in config and config[name] not in values:
            raise CheckpointError(
                f"{folder / 'preprocessor_config.json'} belongs to another model: it has {name} = "
                f"{config[name]!r}, and this metric's pictures are prepared with {values[0]!r}"
            )

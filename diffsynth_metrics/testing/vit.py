"""Tiny checkpoints of timm's image transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from diffsynth_metrics.testing.random_weights import randomize

__all__ = ["write_clip_336", "write_clip_vit", "write_dino", "write_dinov2", "write_dinov2_l"]

_TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def write_clip_vit(folder: Path, seed: int) -> None:
    """Write a two-layer image tower of CLIP with its projection."""
    _write(folder, seed, {"architecture": "vit_base_patch32_clip_quickgelu_224", "num_classes": 24})


def write_dino(folder: Path, seed: int) -> None:
    """Write a two-layer DINO."""
    _write(folder, seed, {"architecture": "vit_small_patch16_224", "num_classes": 0})


def write_dinov2(folder: Path, seed: int) -> None:
    """Write a two-layer DINOv2, whose positions are those of pictures of 518 pixels."""
    _write(folder, seed, {"architecture": "vit_small_patch14_dinov2", "num_classes": 0})


def write_dinov2_l(folder: Path, seed: int) -> None:
    """Write a two-layer DINOv2 under the name of its ViT-L/14."""
    _write(folder, seed, {"architecture": "vit_large_patch14_dinov2", "num_classes": 0})


def write_clip_336(folder: Path, seed: int) -> None:
    """Write a two-layer image tower of CLIP for pictures of 336 pixels."""
    _write(folder, seed, {"architecture": "vit_large_patch14_clip_quickgelu_336", "num_classes": 24})


def _write(folder: Path, seed: int, config: dict[str, Any]) -> None:
    import timm

    model = timm.create_model(
        config["architecture"], pretrained=False, num_classes=config["num_classes"], **_TINY
    )
    randomize(model, seed)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config | {"model_args": _TINY}, indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")

"""timm's image transformers of CLIP, DINO and DINOv2, in the layout of timm's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.weights.checkpoint import read_layout
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["build_vit", "family_of", "resample_positions", "timm_weights"]

_FAMILIES = {"clip": "CLIP", "dinov2": "DINOv2", "dino": "DINO"}


def timm_weights(repository: str) -> ModelConfig:
    """Return where the weights of one of timm's repositories are, which are on Hugging Face."""
    return ModelConfig(
        model_id=repository,
        origin_file_pattern="model.safetensors",
        download_source="huggingface",
    )


def family_of(files: Sequence[Path]) -> str:
    """Tell by its tensors whose image tower a checkpoint is: ``"clip"``, ``"dinov2"`` or ``"dino"``."""
    layout = read_layout(files)
    if "norm_pre.weight" in layout:
        return "clip"
    return "dinov2" if "blocks.0.ls1.gamma" in layout else "dino"


def build_vit(family: str, config: dict[str, Any] | None, published: dict[str, Any]) -> nn.Module:
    """Build the network with its parameters on the meta device; its forward gives embeddings ``[B, D]``.

    That is the class token after the last norm, and for CLIP its projection.

    Args:
        family: ``"clip"``, ``"dinov2"`` or ``"dino"``.
        config: A parsed ``config.json`` of timm: ``"architecture"``, and ``"num_classes"`` and
            ``"model_args"`` where they differ from the architecture's.
        published: What counts where there is no config, in the same form.

    Raises:
        CheckpointError: The config describes another kind of network.
    """
    config = published if config is None else config
    architecture = str(config.get("architecture"))
    marks = [mark for mark in ("clip", "dinov2") if f"_{mark}" in architecture]
    if not architecture.startswith("vit_") or marks != ([] if family == "dino" else [family]):
        raise CheckpointError(
            f"the config.json next to the weights describes {architecture!r}, and the weights are a "
            f"{_FAMILIES[family]} of timm"
        )
    arguments = dict(config.get("model_args") or {})
    if family == "clip":
        # OpenAI's networks have this activation; the configs of their files name the exact one.
        arguments["act_layer"] = "quick_gelu"
    with torch.device("meta"):
        model: nn.Module = timm.create_model(
            architecture, pretrained=False, num_classes=int(config.get("num_classes", 0)), **arguments
        )
    return model


@torch.no_grad()
def resample_positions(model: Any, size: int, *, offset: float = 0.0) -> None:
    """Let a network take pictures of `size`, where it was trained with another one; once.

    Its position embeddings are interpolated (bicubic, not antialiased) as the authors of DINOv2 do.

    Args:
        model: The network.
        size: Side of the pictures.
        offset: Added to the new number of patches, for the scale. It is 0.1 in the authors' code and
            0 in transformers.
    """
    patches = model.patch_embed
    if patches.img_size == (size, size):
        return
    old, new = patches.grid_size[0], size // patches.patch_size[0]
    positions: Tensor = model.pos_embed
    grid = positions[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if offset:
        scale = (new + offset) / old
        grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    else:
        grid = interpolate(grid, size=(new, new), mode="bicubic")
    flat = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(positions.dtype)
    model.pos_embed = nn.Parameter(torch.cat([positions[:, :1], flat], dim=1), requires_grad=False)
    patches.set_input_size(img_size=(size, size))

"""transformers' CLIP in its published and its configured architectures, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.tokens import check_canaries

__all__ = [
    "build_clip",
    "build_vision_tower",
    "check_clip_tokenizer",
    "clip_config",
    "vision_config",
    "vit_h_14_config",
    "vit_l_14_config",
]


def vit_h_14_config() -> CLIPConfig:
    """Return the published architecture of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    The activation is the exact gelu. ``diffsynth.metrics`` computes this network with quick_gelu,
    which is OpenAI's ViT-L/14 and not this one.
    """
    shared = {"hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 1024}
    return CLIPConfig(
        projection_dim=1024,
        text_config=shared | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        vision_config=shared
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "patch_size": 14,
        },
    )


def clip_config(config: dict[str, Any] | None) -> CLIPConfig:
    """Return the architecture of a parsed ``config.json``, or the published one for None.

    Raises:
        CheckpointError: It describes another kind of network.
    """
    if config is None:
        return vit_h_14_config()
    if config.get("model_type") != "clip":
        raise CheckpointError(
            f"the config.json next to the weights describes a {config.get('model_type')!r} model, "
            "not 'clip'"
        )
    return CLIPConfig.from_dict(config)


def build_clip(config: CLIPConfig) -> CLIPModel:
    """Build the network with its parameters on the meta device and its position ids in memory."""
    with torch.device("meta"):
        model = CLIPModel(config)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    return model


def vit_l_14_config() -> CLIPVisionConfig:
    """Return the image tower of OpenAI's CLIP ViT-L/14, which was trained with quick_gelu."""
    return CLIPVisionConfig(
        hidden_act="quick_gelu",
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        patch_size=14,
        projection_dim=768,
    )


def vision_config(config: dict[str, Any] | None) -> CLIPVisionConfig:
    """Return the image tower of a parsed ``config.json``, or for None :func:`vit_l_14_config`.

    Raises:
        CheckpointError: It describes another kind of network.
    """
    if config is None:
        return vit_l_14_config()
    # Both the predictor's own config and a whole CLIP's say what the image tower is.
    config = config.get("vision_config", config)
    known = config.get("model_type", "clip_vision_model") in ("clip", "clip_vision_model")
    if "hidden_size" not in config or not known:
        raise CheckpointError("the config.json next to the weights describes no CLIP image tower")
    return CLIPVisionConfig.from_dict(config)


def build_vision_tower(config: CLIPVisionConfig) -> CLIPVisionModelWithProjection:
    """Build the image tower with its parameters on the meta device and its position ids in memory."""
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    embeddings = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    return model


def check_clip_tokenizer(tokenizer: CLIPTokenizer, config: CLIPTextConfig, folder: Path) -> None:
    """Refuse another model's tokenizer, whose tokens would mean something else to the network."""
    size = config.vocab_size
    # transformers takes an id of 2, which old configs have, for "the largest id of the prompt".
    end = size - 1 if config.eos_token_id == 2 else config.eos_token_id
    if len(tokenizer) > size or tokenizer.eos_token_id != end:
        raise CheckpointError(
            f"the tokenizer in {folder} belongs to another model: it has {len(tokenizer)} tokens and "
            f"ends texts with {tokenizer.eos_token_id}, the network has {size} and reads texts at {end}"
        )
    check_canaries(tokenizer, folder, size)

"""open_clip's CLIP, on the meta device, and its projections apart from the towers."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import nn

from diffsynth_metrics.errors import CheckpointError

__all__ = ["build_open_clip", "detach_heads"]


def build_open_clip(config: dict[str, Any] | None, published: str = "ViT-H-14") -> open_clip.CLIP:
    """Build the network: parameters on the meta device, its causal mask in memory.

    Args:
        config: A parsed ``open_clip_config.json``, or None for the published architecture.
        published: open_clip's name of that.

    Raises:
        CheckpointError: The config has no ``"model_cfg"``.
    """
    model_config = open_clip.get_model_config(published) if config is None else config.get("model_cfg")
    if not isinstance(model_config, dict):
        raise CheckpointError("the open_clip_config.json next to the weights has no 'model_cfg'")
    with torch.device("meta"):
        model = open_clip.CLIP(**model_config)
    model.attn_mask = torch.full((model.context_length,) * 2, float("-inf")).triu(1)
    return model


def detach_heads(model: Any) -> None:
    """Take the projections out of the towers, which would run them in the towers' dtype.

    They become ``model.heads["visual"]`` and ``["text"]``; ``encode_image`` and ``encode_text`` then end
    with the pooled features.
    """
    if model.visual.proj is not None:
        heads = {"visual": model.visual.proj, "text": model.text_projection}
        model.visual.proj = model.text_projection = None
        model.heads = nn.ParameterDict(heads)
        for name, head in heads.items():
            if model.heads[name] is not head:  # accelerate's init_empty_weights() has emptied it
                torch.utils.swap_tensors(model.heads[name], head)  # type: ignore[no-untyped-call]

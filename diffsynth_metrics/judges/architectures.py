"""The networks of the judges, built on the meta device in transformers' own layout.

Qwen3-VL is a decoder with full attention; Qwen3.5 (Qwen3.6 has the same architecture) has three layers
of gated delta net to each layer of full attention.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from diffsynth_metrics.errors import CheckpointError

__all__ = [
    "build_judge",
    "judge_config",
    "qwen3_5_config",
    "qwen3_vl_config",
    "without_kernel_hints",
]

_CLASSES = {
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_VISION_THETA = 10000.0
# What says that an optional kernel of Qwen3.5 is missing: in transformers 5.24, and in 5.8.
_HINTING = ("transformers.integrations.hub_kernels", "transformers.models.qwen3_5.modeling_qwen3_5")


def qwen3_5_config(
    *, hidden_size: int, layers: int, heads: int, intermediate_size: int, linear_value_heads: int
) -> Qwen3_5Config:
    """Return the published Qwen3.5 architecture at one of its sizes."""
    rope = {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    }
    text = {
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": linear_value_heads,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "vocab_size": 248320,
    }
    return Qwen3_5Config(
        text_config=text,
        vision_config={**_VISION, "out_hidden_size": hidden_size},
        image_token_id=248056,
        video_token_id=248057,
        vision_start_token_id=248053,
        vision_end_token_id=248054,
        tie_word_embeddings=False,
    )


def qwen3_vl_config() -> Qwen3VLConfig:
    """Return the published architecture of Qwen3-VL-8B."""
    rope = {
        "rope_type": "default",
        "rope_theta": 5000000,
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
    }
    text = {
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "vocab_size": 151936,
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config={**_VISION, "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
    )


def judge_config(config: dict[str, Any] | None, published: PreTrainedConfig) -> PreTrainedConfig:
    """Return what a ``config.json`` describes, or the published architecture where there is none.

    Raises:
        CheckpointError: It describes another kind of network than the published one.
    """
    if config is None:
        return published
    if config.get("model_type") != published.model_type:
        raise CheckpointError(
            f"the config.json next to the weights describes a {config.get('model_type')!r} network, and "
            f"this judge is a {published.model_type!r}"
        )
    return type(published).from_dict(config)


def build_judge(config: PreTrainedConfig) -> nn.Module:
    """Build the network on the meta device, with its rotary frequencies in memory, in float32.

    They are computed and not read, and whatever dtype the network runs in they stay float32: rounded to
    bfloat16, the angle at position 1000 is wrong by up to a radian.

    Raises:
        CheckpointError: The config asks for frequencies that are stretched for longer texts.
    """
    rope = config.text_config.rope_parameters
    if (kind := rope.get("rope_type", "default")) != "default":
        raise CheckpointError(
            f"the config.json next to the weights has the rope_type {kind!r}; the judges were trained "
            "with 'default', and no other is computed here"
        )
    _, network = _CLASSES[config.model_type]
    with torch.device("meta"), without_kernel_hints():
        model: Any = network(config)
    _set_frequencies(model.model.language_model.rotary_emb, rope["rope_theta"])
    _set_frequencies(model.model.visual.rotary_pos_emb, _VISION_THETA)
    return model  # type: ignore[no-any-return]


def _set_frequencies(rotary: nn.Module, theta: float) -> None:
    for name, buffer in dict(rotary.named_buffers()).items():
        count = 2 * buffer.numel()
        exponents = torch.arange(0, count, 2, dtype=torch.float32) / count
        rotary.register_buffer(name, 1 / theta**exponents, persistent=False)


@contextmanager
def without_kernel_hints() -> Iterator[None]:
    """Drop transformers' hints about optional kernels, of which the engine makes one line."""

    def is_no_hint(record: logging.LogRecord) -> bool:
        return "is not installed" not in record.getMessage()

    loggers = [logging.getLogger(name) for name in _HINTING]
    for logger in loggers:
        logger.addFilter(is_no_hint)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_no_hint)

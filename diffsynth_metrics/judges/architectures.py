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
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.judges.prompts import load_prompts

__all__ = ["build_judge", "without_kernel_hints"]

_CLASSES = {
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
_VISION_THETA = 10000.0
# What says that an optional kernel of Qwen3.5 is missing: in transformers 5.24, and in 5.8.
_HINTING = ("transformers.integrations.hub_kernels", "transformers.models.qwen3_5.modeling_qwen3_5")


def build_judge(config: dict[str, Any] | None, judge: str) -> nn.Module:
    """Build the network on the meta device, with its rotary frequencies in memory, in float32.

    They are computed and not read, and whatever dtype the network runs in they stay float32: rounded to
    bfloat16, the angle at position 1000 is wrong by up to a radian.

    Args:
        config: The parsed ``config.json`` next to the weights; None: the published architecture.
        judge: A name in ``prompts/architectures.json``.

    Raises:
        CheckpointError: The config describes another kind of network than the published one, or asks
            for frequencies that are stretched for longer texts.
    """
    published = load_prompts("architectures")[judge]
    config = published if config is None else config
    if config.get("model_type") != published["model_type"]:
        raise CheckpointError(
            f"the config.json next to the weights describes a {config.get('model_type')!r} network, and "
            f"this judge is a {published['model_type']!r}"
        )
    described, network = _CLASSES[published["model_type"]]
    architecture = described.from_dict(config)
    rope = architecture.text_config.rope_parameters
    if (kind := rope.get("rope_type", "default")) != "default":
        raise CheckpointError(
            f"the config.json next to the weights has the rope_type {kind!r}; the judges were trained "
            "with 'default', and no other is computed here"
        )
    with torch.device("meta"), without_kernel_hints():
        model: Any = network(architecture)
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

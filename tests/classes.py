"""Metric classes by the names of their tiny checkpoints, each imported when it is asked for."""

from __future__ import annotations

from typing import Any

from diffsynth_metrics.catalog import NAMES, find_class

WITHOUT_WEIGHTS = ("psnr", "ssim")
LOADED = tuple(name for name in NAMES if name not in (*WITHOUT_WEIGHTS, "shapes", "text_rendering"))
"""The metrics that a tiny checkpoint stands for."""

DIFFERENTIABLE = ("aesthetic", "bioclip", "clip", "hpsv2", "hpsv3", "image_reward", "pickscore")
JUDGES = ("qwen_image_bench", "unified_reward_2", "unified_reward_edit")


def metric_class(name: str) -> Any:
    """Return the class of the metric whose tiny checkpoint has this name."""
    return find_class(name)

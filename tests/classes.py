"""Metric classes by the names of their tiny checkpoints."""

from __future__ import annotations

from typing import Any

from diffsynth_metrics import (
    AestheticMetric,
    CLIPMetric,
    HPSv2Metric,
    HPSv3Metric,
    ImageRewardMetric,
    PickScoreMetric,
)

DIFFERENTIABLE: dict[str, Any] = {
    "aesthetic": AestheticMetric,
    "clip": CLIPMetric,
    "hpsv2": HPSv2Metric,
    "hpsv3": HPSv3Metric,
    "image_reward": ImageRewardMetric,
    "pickscore": PickScoreMetric,
}

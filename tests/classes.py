"""Metric classes by the names of their tiny checkpoints."""

from __future__ import annotations

from typing import Any

from diffsynth_metrics import (
    AestheticMetric,
    CLIPMetric,
    FIDMetric,
    HPSv2Metric,
    HPSv3Metric,
    ImageRewardMetric,
    PickScoreMetric,
    QwenImageBenchMetric,
    UnifiedReward2Metric,
    UnifiedRewardEditMetric,
)

DIFFERENTIABLE: dict[str, Any] = {
    "aesthetic": AestheticMetric,
    "clip": CLIPMetric,
    "hpsv2": HPSv2Metric,
    "hpsv3": HPSv3Metric,
    "image_reward": ImageRewardMetric,
    "pickscore": PickScoreMetric,
}

JUDGES: dict[str, Any] = {
    "qwen_image_bench": QwenImageBenchMetric,
    "unified_reward_2": UnifiedReward2Metric,
    "unified_reward_edit": UnifiedRewardEditMetric,
}

ALL: dict[str, Any] = {**DIFFERENTIABLE, **JUDGES, "fid": FIDMetric}

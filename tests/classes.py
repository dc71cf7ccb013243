"""Metric classes by the names of their tiny checkpoints, each imported when it is asked for."""

from __future__ import annotations

from typing import Any

import diffsynth_metrics

_CLASSES = {
    "aesthetic": "AestheticMetric",
    "bioclip": "BioCLIPMetric",
    "clip": "CLIPMetric",
    "cmmd": "CMMDMetric",
    "fd_dinov2": "FDDINOv2Metric",
    "fid": "FIDMetric",
    "hpsv2": "HPSv2Metric",
    "hpsv3": "HPSv3Metric",
    "image_reward": "ImageRewardMetric",
    "image_similarity": "ImageSimilarityMetric",
    "lpips": "LPIPSMetric",
    "pickscore": "PickScoreMetric",
    "qwen_image_bench": "QwenImageBenchMetric",
    "unified_reward_2": "UnifiedReward2Metric",
    "unified_reward_edit": "UnifiedRewardEditMetric",
}

DIFFERENTIABLE = ("aesthetic", "bioclip", "clip", "hpsv2", "hpsv3", "image_reward", "pickscore")
JUDGES = ("qwen_image_bench", "unified_reward_2", "unified_reward_edit")


def metric_class(name: str) -> Any:
    """Return the class of the metric whose tiny checkpoint has this name."""
    return getattr(diffsynth_metrics, _CLASSES[name])

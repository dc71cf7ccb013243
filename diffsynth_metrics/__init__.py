"""Metrics for generated images, each equal to its authors' implementation.

Every public name is imported on first use (PEP 562), so that ``import diffsynth_metrics`` is instant
and loads neither torch nor transformers nor modelscope.
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_metrics.base import BaseMetric, Metric, MetricCard
    from diffsynth_metrics.errors import (
        AnswerError,
        CheckpointError,
        DiffSynthMetricsError,
        DownloadError,
        ImageError,
        RewardError,
    )
    from diffsynth_metrics.fid.statistics import FIDStatistics
    from diffsynth_metrics.metrics.aesthetic import AestheticMetric
    from diffsynth_metrics.metrics.clip import CLIPMetric
    from diffsynth_metrics.metrics.fid import FIDMetric
    from diffsynth_metrics.metrics.hpsv2 import HPSv2Metric
    from diffsynth_metrics.metrics.hpsv3 import HPSv3Metric
    from diffsynth_metrics.metrics.image_reward import ImageRewardMetric
    from diffsynth_metrics.metrics.pickscore import PickScoreMetric
    from diffsynth_metrics.metrics.qwen_image_bench import QwenImageBenchMetric
    from diffsynth_metrics.metrics.unified_reward_2 import UnifiedReward2Metric
    from diffsynth_metrics.metrics.unified_reward_edit import UnifiedRewardEditMetric
    from diffsynth_metrics.weights.model_config import ModelConfig

__version__ = "0.1.0"

_HOME = {
    "AestheticMetric": "metrics.aesthetic",
    "AnswerError": "errors",
    "BaseMetric": "base",
    "CLIPMetric": "metrics.clip",
    "CheckpointError": "errors",
    "DiffSynthMetricsError": "errors",
    "DownloadError": "errors",
    "FIDMetric": "metrics.fid",
    "FIDStatistics": "fid.statistics",
    "HPSv2Metric": "metrics.hpsv2",
    "HPSv3Metric": "metrics.hpsv3",
    "ImageError": "errors",
    "ImageRewardMetric": "metrics.image_reward",
    "Metric": "base",
    "MetricCard": "base",
    "ModelConfig": "weights.model_config",
    "PickScoreMetric": "metrics.pickscore",
    "QwenImageBenchMetric": "metrics.qwen_image_bench",
    "RewardError": "errors",
    "UnifiedReward2Metric": "metrics.unified_reward_2",
    "UnifiedRewardEditMetric": "metrics.unified_reward_edit",
}

__all__ = [
    "AestheticMetric",
    "AnswerError",
    "BaseMetric",
    "CLIPMetric",
    "CheckpointError",
    "DiffSynthMetricsError",
    "DownloadError",
    "FIDMetric",
    "FIDStatistics",
    "HPSv2Metric",
    "HPSv3Metric",
    "ImageError",
    "ImageRewardMetric",
    "Metric",
    "MetricCard",
    "ModelConfig",
    "PickScoreMetric",
    "QwenImageBenchMetric",
    "RewardError",
    "UnifiedReward2Metric",
    "UnifiedRewardEditMetric",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it, and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The modules of torch and transformers are hundreds of thousands of objects that all stay. To look
    # for garbage among them, again and again while they come, is a tenth of the time that this takes.
    collects = gc.isenabled()
    gc.disable()
    try:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    finally:
        if collects:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, including those that are not imported yet."""
    return sorted({*globals(), *__all__})

"""One file per metric: its card, how it is loaded, its formula.

The metrics are public names of :mod:`diffsynth_metrics`; they can be imported from here as well, with
``Metric`` and ``ModelConfig``, so that an import from ``diffsynth.metrics`` needs only the package's
name replaced. Each is imported on first use, because one metric should not pay for the libraries of the
others.
"""

from typing import TYPE_CHECKING, Any

import diffsynth_metrics

if TYPE_CHECKING:
    from diffsynth_metrics.base import Metric
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

__all__ = [
    "AestheticMetric",
    "CLIPMetric",
    "FIDMetric",
    "HPSv2Metric",
    "HPSv3Metric",
    "ImageRewardMetric",
    "Metric",
    "ModelConfig",
    "PickScoreMetric",
    "QwenImageBenchMetric",
    "UnifiedReward2Metric",
    "UnifiedRewardEditMetric",
]


def __getattr__(name: str) -> Any:
    """Import a metric on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(diffsynth_metrics, name)

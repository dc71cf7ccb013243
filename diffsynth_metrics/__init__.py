"""Metrics for generated images, each equal to its authors' implementation.

    from diffsynth_metrics import PickScoreMetric
    metric = PickScoreMetric.from_pretrained()
    print(metric.compute("a cat on a sofa", "cat.png"))

Every public name is imported on first use (PEP 562), so that ``import diffsynth_metrics`` is instant
and loads neither torch nor transformers nor modelscope.
"""

import sys
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
        ServerError,
    )
    from diffsynth_metrics.fid.features import FeatureSet
    from diffsynth_metrics.fid.statistics import FIDStatistics
    from diffsynth_metrics.metrics.aesthetic import AestheticMetric
    from diffsynth_metrics.metrics.bioclip import BioCLIPMetric
    from diffsynth_metrics.metrics.clip import CLIPMetric
    from diffsynth_metrics.metrics.cmmd import CMMDMetric
    from diffsynth_metrics.metrics.fd_dinov2 import FDDINOv2Metric
    from diffsynth_metrics.metrics.fid import FIDMetric
    from diffsynth_metrics.metrics.hpsv2 import HPSv2Metric
    from diffsynth_metrics.metrics.hpsv3 import HPSv3Metric
    from diffsynth_metrics.metrics.image_reward import ImageRewardMetric
    from diffsynth_metrics.metrics.image_similarity import ImageSimilarityMetric
    from diffsynth_metrics.metrics.lpips import LPIPSMetric
    from diffsynth_metrics.metrics.pickscore import PickScoreMetric
    from diffsynth_metrics.metrics.psnr import PSNRMetric
    from diffsynth_metrics.metrics.qwen_image_bench import QwenImageBenchMetric
    from diffsynth_metrics.metrics.ssim import SSIMMetric
    from diffsynth_metrics.metrics.text_rendering import TextRenderingMetric
    from diffsynth_metrics.metrics.unified_reward_2 import UnifiedReward2Metric
    from diffsynth_metrics.metrics.unified_reward_edit import UnifiedRewardEditMetric
    from diffsynth_metrics.weights.model_config import ModelConfig

__version__ = "0.1.0"

_HOME = {
    "AestheticMetric": "metrics.aesthetic",
    "AnswerError": "errors",
    "BaseMetric": "base",
    "BioCLIPMetric": "metrics.bioclip",
    "CLIPMetric": "metrics.clip",
    "CMMDMetric": "metrics.cmmd",
    "CheckpointError": "errors",
    "DiffSynthMetricsError": "errors",
    "DownloadError": "errors",
    "FDDINOv2Metric": "metrics.fd_dinov2",
    "FIDMetric": "metrics.fid",
    "FIDStatistics": "fid.statistics",
    "FeatureSet": "fid.features",
    "HPSv2Metric": "metrics.hpsv2",
    "HPSv3Metric": "metrics.hpsv3",
    "ImageError": "errors",
    "ImageRewardMetric": "metrics.image_reward",
    "ImageSimilarityMetric": "metrics.image_similarity",
    "LPIPSMetric": "metrics.lpips",
    "Metric": "base",
    "MetricCard": "base",
    "ModelConfig": "weights.model_config",
    "PSNRMetric": "metrics.psnr",
    "PickScoreMetric": "metrics.pickscore",
    "QwenImageBenchMetric": "metrics.qwen_image_bench",
    "RewardError": "errors",
    "SSIMMetric": "metrics.ssim",
    "ServerError": "errors",
    "TextRenderingMetric": "metrics.text_rendering",
    "UnifiedReward2Metric": "metrics.unified_reward_2",
    "UnifiedRewardEditMetric": "metrics.unified_reward_edit",
}
"""Public name to the module that defines it."""

__all__ = [
    "AestheticMetric",
    "AnswerError",
    "BaseMetric",
    "BioCLIPMetric",
    "CLIPMetric",
    "CMMDMetric",
    "CheckpointError",
    "DiffSynthMetricsError",
    "DownloadError",
    "FDDINOv2Metric",
    "FIDMetric",
    "FIDStatistics",
    "FeatureSet",
    "HPSv2Metric",
    "HPSv3Metric",
    "ImageError",
    "ImageRewardMetric",
    "ImageSimilarityMetric",
    "LPIPSMetric",
    "Metric",
    "MetricCard",
    "ModelConfig",
    "PSNRMetric",
    "PickScoreMetric",
    "QwenImageBenchMetric",
    "RewardError",
    "SSIMMetric",
    "ServerError",
    "TextRenderingMetric",
    "UnifiedReward2Metric",
    "UnifiedRewardEditMetric",
]


def __dir__() -> list[str]:
    """List the public names, including those that are not imported yet."""
    return __all__


# Type checkers take a module with __getattr__ to have every name, and would pass over a misspelt one.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name from the module that defines it, and keep it."""
        if name not in _HOME:
            raise _unknown(name, imported=sys._getframe(1).f_code.co_name == "_handle_fromlist")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def _unknown(name: str, *, imported: bool) -> Exception:
    """Return the error about a name that is not public; it suggests the one that may be meant.

    Args:
        name: What was asked for.
        imported: Whether that was by ``from diffsynth_metrics import name``. Python replaces the message
            of an AttributeError there, so a suggestion needs an ImportError. Modules of this package,
            which Python looks for next, have names in lower case.
    """
    from difflib import get_close_matches

    by_lower = {public.lower(): public for public in __all__}
    near = get_close_matches(name.lower(), by_lower, n=1)
    suggestion = f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
    if imported and near and (name.lower() in by_lower or not name.islower()):
        return ImportError(f"cannot import name {name!r} from {__name__!r}{suggestion}", name=__name__)
    return AttributeError(f"module {__name__!r} has no attribute {name!r}{suggestion}")

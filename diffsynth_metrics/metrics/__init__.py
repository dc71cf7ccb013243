"""One file per metric: its card, how it is loaded, its formula.

The metrics are public names of :mod:`diffsynth_metrics`; this package re-exports them so that
``from diffsynth.metrics import PickScoreMetric`` becomes
``from diffsynth_metrics.metrics import PickScoreMetric``.
"""

from diffsynth_metrics.metrics.aesthetic import AestheticMetric
from diffsynth_metrics.metrics.clip import CLIPMetric
from diffsynth_metrics.metrics.hpsv2 import HPSv2Metric
from diffsynth_metrics.metrics.image_reward import ImageRewardMetric
from diffsynth_metrics.metrics.pickscore import PickScoreMetric

__all__ = ["AestheticMetric", "CLIPMetric", "HPSv2Metric", "ImageRewardMetric", "PickScoreMetric"]

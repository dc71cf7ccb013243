"""One file per metric: its card, how it is loaded, its formula.

The metrics are public names of :mod:`diffsynth_metrics`; this package re-exports them so that
``from diffsynth.metrics import PickScoreMetric`` becomes
``from diffsynth_metrics.metrics import PickScoreMetric``.
"""

from diffsynth_metrics.metrics.clip import CLIPMetric
from diffsynth_metrics.metrics.pickscore import PickScoreMetric

__all__ = ["CLIPMetric", "PickScoreMetric"]

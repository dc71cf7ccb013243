"""The metrics by their names, as the command line, data sets and servers call them."""

from __future__ import annotations

import os
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_metrics.base import BaseMetric

__all__ = ["NAMES", "find_class", "load_metric", "name_of"]

_CLASSES = {
    "aesthetic": "AestheticMetric",
    "clip": "CLIPMetric",
    "cmmd": "CMMDMetric",
    "fd_dinov2": "FDDINOv2Metric",
    "fid": "FIDMetric",
    "hpsv2": "HPSv2Metric",
    "hpsv3": "HPSv3Metric",
    "image_reward": "ImageRewardMetric",
    "image_similarity": "ImageSimilarityMetric",
    "pickscore": "PickScoreMetric",
    "qwen_image_bench": "QwenImageBenchMetric",
    "shapes": "CLIPMetric",
    "text_rendering": "TextRenderingMetric",
    "unified_reward_2": "UnifiedReward2Metric",
    "unified_reward_edit": "UnifiedRewardEditMetric",
}

NAMES = tuple(_CLASSES)
"""The names, sorted; ``"shapes"`` is the small model that the package ships for trying things out."""


def find_class(name: str) -> type[BaseMetric]:
    """Return the class of a metric.

    Args:
        name: One of :data:`NAMES`; capitals, ``-`` and ``_`` do not matter.

    Raises:
        ValueError: There is no such metric; the message suggests one.
    """
    import diffsynth_metrics

    metric: type[BaseMetric] = getattr(diffsynth_metrics, _CLASSES[_known(name)])
    return metric


def load_metric(metric: str, **options: Any) -> BaseMetric:
    """Load a metric by its name.

    Args:
        metric: ``"pickscore"`` loads the published weights; ``"pickscore=models/mine"`` those of a
            file or folder.
        **options: Passed on to ``from_pretrained``.

    Raises:
        ValueError: There is no such metric; the message suggests one.
        Exception: What ``from_pretrained`` raises.
    """
    from diffsynth_metrics.weights.model_config import ModelConfig

    name, _, path = metric.partition("=")
    name = _known(name)
    if path:
        options["model_config"] = ModelConfig(path=os.path.expanduser(path))
    elif name == "shapes":
        options["model_config"] = ModelConfig.embedded("shapes")
    return find_class(name).from_pretrained(**options)


def name_of(metric: BaseMetric | type[BaseMetric]) -> str:
    """Return the name of a metric; of one that is not the package's own, the name of its class."""
    cls = metric if isinstance(metric, type) else type(metric)
    names = {class_name: name for name, class_name in reversed(_CLASSES.items()) if name != "shapes"}
    return names.get(cls.__name__, cls.__name__)


def _known(name: str) -> str:
    plain = {known.replace("_", ""): known for known in NAMES}
    wanted = name.strip().lower().replace("_", "").replace("-", "")
    wanted = wanted.removesuffix("metric")
    if wanted in plain:
        return plain[wanted]
    near = get_close_matches(wanted, plain, n=1)
    suggestion = f"did you mean {plain[near[0]]!r}? " if near else ""
    raise ValueError(f"there is no metric {name!r}; {suggestion}There are {', '.join(NAMES)}")

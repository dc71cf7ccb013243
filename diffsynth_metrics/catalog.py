"""The metrics by their names, as the command line, data sets and servers call them."""

from __future__ import annotations

import os
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from diffsynth_metrics.embedded import SHAPES_CARD

if TYPE_CHECKING:
    from diffsynth_metrics.base import BaseMetric, MetricCard

__all__ = ["NAMES", "find_card", "find_class", "find_name", "load_metric", "name_of"]

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
    "psnr": "PSNRMetric",
    "qwen_image_bench": "QwenImageBenchMetric",
    "shapes": "CLIPMetric",
    "ssim": "SSIMMetric",
    "text_rendering": "TextRenderingMetric",
    "unified_reward_2": "UnifiedReward2Metric",
    "unified_reward_edit": "UnifiedRewardEditMetric",
}

_OF_THIS_PROCESS = ("batch_size", "device", "torch_dtype")

NAMES = tuple(_CLASSES)
"""The names, sorted; ``"shapes"`` is the small model that the package ships for trying things out."""


def find_name(name: str) -> str:
    """Return the name of a metric as :data:`NAMES` has it; imports nothing.

    Args:
        name: One of :data:`NAMES`; capitals, ``-`` and ``_`` do not matter.

    Raises:
        ValueError: There is no such metric; the message suggests one.
    """
    plain = {known.replace("_", ""): known for known in NAMES}
    wanted = name.strip().lower().replace("_", "").replace("-", "")
    wanted = wanted.removesuffix("metric")
    if wanted in plain:
        return plain[wanted]
    near = get_close_matches(wanted, plain, n=1)
    suggestion = f"did you mean {plain[near[0]]!r}? " if near else ""
    raise ValueError(f"there is no metric {name!r}; {suggestion}There are {', '.join(NAMES)}")


def find_class(name: str) -> type[BaseMetric]:
    """Return the class of a metric.

    Args:
        name: See :func:`find_name`.

    Raises:
        ValueError: There is no such metric; the message suggests one.
    """
    import diffsynth_metrics

    metric: type[BaseMetric] = getattr(diffsynth_metrics, _CLASSES[find_name(name)])
    return metric


def find_card(name: str) -> MetricCard:
    """Return what a score of a metric means, without loading it.

    Args:
        name: See :func:`find_name`.

    Raises:
        ValueError: There is no such metric; the message suggests one.
    """
    card = find_class(name).card
    if find_name(name) != "shapes":
        return card
    return replace(card, **SHAPES_CARD)


def load_metric(metric: str, **options: Any) -> BaseMetric:
    """Load a metric by its name.

    Args:
        metric: ``"pickscore"`` loads the published weights; ``"pickscore=models/mine"`` those of a
            file or folder; ``"unified_reward_2=http://host:8000/v1"`` asks a server that runs them.
        **options: Passed on to ``from_pretrained``, or to ``from_server``; what is about a network in
            this process (``device``, ``torch_dtype``, ``batch_size``) does not concern a server.

    Raises:
        ValueError: There is no such metric; the message suggests one. Or it cannot ask a server.
        Exception: What ``from_pretrained`` or ``from_server`` raises.
    """
    from diffsynth_metrics.weights.model_config import ModelConfig

    name, _, path = metric.partition("=")
    name = find_name(name)
    if path.startswith(("http://", "https://")):
        return _ask_server(name, path, options)
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


def _ask_server(name: str, url: str, options: dict[str, Any]) -> BaseMetric:
    cls = find_class(name)
    if not hasattr(cls, "from_server"):
        raise ValueError(
            f"Name a file or folder, {name}=PATH: {cls.__name__} runs in this process and cannot ask "
            f"the server {url}"
        )
    options = {key: value for key, value in options.items() if key not in _OF_THIS_PROCESS}
    metric: BaseMetric = cls.from_server(url, **options)
    return metric

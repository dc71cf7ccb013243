"""The scales on which papers and frameworks print the same score, in one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["FRAMEWORKS", "SCALES", "Scale", "ScaleInput", "find_scale"]


@dataclass(frozen=True)
class Scale:
    """A dialect of a score: max((component - subtract) * multiply / divide, at_least).

    `component` is a number that the metric's ``evaluate`` gives for a sample; `prefix` is put in front
    of every prompt.
    """

    component: str = "score"
    subtract: float = 0.0
    multiply: float = 1.0
    divide: float = 1.0
    at_least: float | None = None
    prefix: str = ""

    def apply(self, values: Tensor) -> Tensor:
        """Map values of the component to this scale, with gradients."""
        values = (values - self.subtract) * self.multiply / self.divide
        return values if self.at_least is None else values.clamp_min(self.at_least)


ScaleInput: TypeAlias = "str | float | Scale | None"
"""A name of :data:`SCALES` or :data:`FRAMEWORKS`, a factor, a scale, or None for the score itself."""

FRAMEWORKS = (
    "cosmos_rl",
    "dance_grpo",
    "ddpo",
    "diffusion_nft",
    "flow_factory",
    "flow_grpo",
    "mixgrpo",
    "pref_grpo",
    "srpo",
    "unirl",
    "verl_omni",
)
"""Scales that are named after a framework."""

_BY_26 = dict.fromkeys(
    ("cosmos_rl", "diffusion_nft", "flow_factory", "flow_grpo", "unirl", "verl_omni"), Scale(divide=26)
)
_COSINE = Scale(component="cosine")

SCALES: dict[str, dict[str, Scale]] = {
    "CLIPMetric": {
        "diffsynth": Scale(),
        "diffusion_nft": Scale(divide=100),
        "flow_grpo": Scale(divide=100),
        "mixgrpo": _COSINE,
        "pyiqa": Scale(component="cosine", multiply=2.5, at_least=0.0, prefix="A photo depicts "),
        "torchmetrics": Scale(component="cosine", multiply=100, at_least=0.0),
    },
    "HPSv2Metric": {
        "official": _COSINE,
        "paper": Scale(component="cosine", multiply=100),
        **dict.fromkeys(FRAMEWORKS, _COSINE),
    },
    "PickScoreMetric": {
        **_BY_26,
        "dance_grpo": _COSINE,
        "diffsynth": Scale(),
        "mixgrpo": Scale(subtract=18, divide=8),
        "pref_grpo": _COSINE,
        "srpo": Scale(divide=20),
    },
    "TextRenderingMetric": {
        "official": Scale(component="character_accuracy"),
        "flow_grpo": Scale(component="flow_grpo"),
    },
    "UnifiedReward2Metric": {
        "flow_grpo": Scale(divide=5),
        "verl_omni": Scale(subtract=1, divide=4),
    },
}
"""Class of a metric to its scales by name. ``"official"``, ``"paper"`` and the frameworks are names for
every metric, and mean the score as its authors define it where the table says nothing else."""


def find_scale(metric: Any, scale: ScaleInput) -> Scale:
    """Return how the score of a metric is scaled; a ValueError or TypeError if it has no such scale."""
    if scale is None or isinstance(scale, Scale):
        return scale or Scale()
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale}")
        return Scale(multiply=float(scale))
    if not isinstance(scale, str):
        raise TypeError(f"scale must be a name, a number, a Scale or None, got {scale!r}")
    # A metric on a server says what it is there.
    names = [*(base.__name__ for base in type(metric).__mro__), getattr(metric, "served", "")]
    named = (SCALES[name] for name in names if name in SCALES)
    own: dict[str, Scale] = next(named, {})
    if scale in own or scale in ("official", "paper", *FRAMEWORKS):
        return own.get(scale, own.get("official", Scale()))
    raise ValueError(
        f"{type(metric).__name__} has no scale {scale!r}; it has "
        f"{', '.join(sorted({'official', 'paper', *own, *FRAMEWORKS}))}, or pass a factor"
    )

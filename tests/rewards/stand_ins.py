"""Metrics that fail on demand, and a judge without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_metrics import PickScoreMetric
from diffsynth_metrics.base import BaseMetric, ImageMetric, ReferenceMetric
from diffsynth_metrics.inputs import as_images, pair_references
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop


class Brightness(ImageMetric):
    """The mean of the prepared pixels; it counts its calls and can be told to fail."""

    card = replace(PickScoreMetric.card, inputs="image")
    transform = ShortestEdgeCrop(32)

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), batch_size=16)
        self.calls = 0
        self.raises: Exception | None = None
        self.value: float | None = None

    def components(self, images: Any) -> dict[str, Tensor]:
        self.calls += 1
        if self.raises is not None:
            raise self.raises
        batches = self.pixel_batches(as_images(images))
        score = torch.cat([batch.mean(dim=(1, 2, 3)) for batch in batches])
        return {"score": score if self.value is None else score * 0 + self.value}


class Likeness(ReferenceMetric):
    """How alike the brightness of two images is: 0 is the best."""

    card = PickScoreMetric.card
    transform = ShortestEdgeCrop(32)

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), batch_size=16)

    def components(self, reference: Any, images: Any) -> dict[str, Tensor]:
        sides = pair_references(reference, images)
        first, second = (
            torch.cat([batch.mean(dim=(1, 2, 3)) for batch in self.pixel_batches(side)])
            for side in sides
        )
        return {"score": -(first - second).abs()}


class Judge(BaseMetric):
    """Answers 1 to 5 from a prompt such as "4", and cannot be read otherwise."""

    card = PickScoreMetric.card
    needs = ("prompt",)

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), batch_size=16)

    def arguments(self, prompts: Any, images: Any, sources: Any = ()) -> tuple[Any, ...]:
        return prompts, images

    def evaluate(self, prompt: Sequence[str], images: Any) -> list[dict[str, Any]]:
        assert len(prompt) == len(images)
        return [
            {"score": float(text), "error": None}
            if text.isdigit()
            else {"score": None, "error": f"no number in {text!r}"}
            for text in prompt
        ]

    def reward(self, prompt: Sequence[str], images: Any) -> Tensor:
        rows = self.evaluate(prompt, images)
        return torch.tensor([math.nan if row["score"] is None else row["score"] for row in rows])

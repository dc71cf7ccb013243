"""Metrics that are quick and count what they are asked, for tests of the bookkeeping around metrics."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from diffsynth_metrics.base import ImageMetric, MetricCard, PromptMetric, ReferenceMetric
from diffsynth_metrics.evaluation import Sample
from diffsynth_metrics.inputs import as_images, open_image, pair, pair_references


def card(name: str) -> MetricCard:
    return MetricCard(
        name=name,
        inputs="image",
        range="0 to 255",
        higher_is_better=True,
        definition="mean of the pixels",
        paper="",
        repository="",
        code_license="",
        weights_license="",
    )


def brightness(images: Any) -> Tensor:
    """Return the mean of the pixels of each image, decoded one after the other."""
    opened = [
        image.float() * 255 if isinstance(image, Tensor) else open_image(image, f"image {index}")
        for index, image in enumerate(as_images(images))
    ]
    return torch.tensor([float(np.asarray(image).mean()) for image in opened])


class Counting:
    """What both metrics count.

    Attributes:
        asked: How many images they were asked about.
        chunks: How many at once.
        stop: Raise this after so many images: (count, exception).
    """

    def __init__(self, weight: float = 1.0) -> None:
        network = nn.Linear(1, 1)
        nn.init.constant_(network.weight, weight)
        nn.init.zeros_(network.bias)
        super().__init__(network)
        self.asked = 0
        self.chunks: list[int] = []
        self.stop: tuple[int, BaseException] | None = None

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        return cls()

    def count(self, images: Sequence[Any]) -> None:
        if self.stop is not None and self.asked >= self.stop[0]:
            raise self.stop[1]
        self.asked += len(images)
        self.chunks.append(len(images))


class Brightness(Counting, ImageMetric):
    card = card("brightness")
    transform = None

    def components(self, images: Any) -> dict[str, Tensor]:
        self.count(images)
        return {"score": brightness(images) * float(self.model.weight)}


class Deadly(Brightness):
    """Brightness, by a process that is killed once, when it has scored so many pictures.

    Attributes:
        marker: A file that says that it was.
        after: How many pictures it scores before.
    """

    def __init__(self, marker: Path, after: int) -> None:
        super().__init__()
        self.marker = marker
        self.after = after

    def count(self, images: Sequence[Any]) -> None:
        super().count(images)
        if self.asked >= self.after and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Wordiness(Counting, PromptMetric):
    """Brightness and the length of the prompt; NaN for the prompt "nothing"."""

    card = card("wordiness")
    transform = None

    def components(self, prompt: Any, images: Any) -> dict[str, Tensor]:
        prompts, checked, _ = pair(prompt, images)
        self.count(prompts)
        lengths = [math.nan if text == "nothing" else len(text) for text in prompts]
        return {"score": brightness(checked) + torch.tensor(lengths), "length": torch.tensor(lengths)}


class Difference(Counting, ReferenceMetric):
    """How much brighter a picture is than its source."""

    card = card("difference")
    transform = None

    def components(self, reference: Any, images: Any) -> dict[str, Tensor]:
        references, checked = pair_references(reference, images)
        self.count(checked)
        return {"score": brightness(checked) - brightness(references)}


def gray_files(folder: Path, count: int, *, start: int = 0) -> list[Sample]:
    """Write pictures of different brightness, and return their samples."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for index in range(start, start + count):
        file = folder / f"{index:04d}.png"
        gray(file, index % 256)
        samples.append(Sample(f"s{index}", f"prompt {index // 2}", file, seed=str(index % 2)))
    return samples


def gray(file: Path, value: int) -> None:
    PIL.Image.new("RGB", (8, 8), (value,) * 3).save(file)

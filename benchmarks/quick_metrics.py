"""Metrics of pixels that need no network, for scale_kills.py."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from torch import nn

from diffsynth_metrics.base import ImageMetric, MetricCard, SetMetric
from diffsynth_metrics.fid.statistics import FIDStatistics, compare_statistics
from diffsynth_metrics.inputs import as_images, open_image


def _no_network() -> nn.Linear:
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    return network


class Brightness(ImageMetric):
    """The mean of the pixels, at a rate that leaves time to kill somebody, on a busy machine too."""

    card = MetricCard("brightness", "image", "", True, "", "", "", "", "")
    transform: Any = None

    def __init__(self, seconds: float) -> None:
        """Take some seconds for each picture."""
        super().__init__(_no_network(), batch_size=16)
        self.seconds = seconds

    def components(self, images: Any) -> Any:
        """Not used: there are no tensors."""
        raise NotImplementedError

    def evaluate(self, images: Any) -> list[dict[str, Any]]:
        """Return the scores."""
        time.sleep(self.seconds * len(images))
        opened = [open_image(image, f"image {n}") for n, image in enumerate(as_images(images))]
        return [{"score": float(np.asarray(image).mean())} for image in opened]


class PixelFID(SetMetric):
    """The distance between two sets of pictures of 8 x 8 gray pixels."""

    card = MetricCard("pixels", "two sets of images", "", False, "", "", "", "", "")

    def __init__(self) -> None:
        """Make it; it has no network."""
        super().__init__(_no_network())

    def statistics(self, images: Any, **options: Any) -> FIDStatistics:
        """Return the statistics of pictures."""
        statistics = FIDStatistics(extractor="pixels")
        for index, image in enumerate(as_images(images)):
            picture = open_image(image, f"image {index}").convert("L").resize((8, 8))
            statistics.update(np.asarray(picture, dtype=np.float64).reshape(1, -1))
        return statistics

    def evaluate(self, reference_images: Any, generated_images: Any, **options: Any) -> dict[str, Any]:
        """Compare statistics; the norms of one side say how well it was merged."""
        terms = compare_statistics(reference_images, generated_images)
        return {
            "score": sum(terms),
            "generated_count": generated_images.count,
            "mean_norm": float(np.linalg.norm(generated_images.mean)),
            "covariance_norm": float(np.linalg.norm(generated_images.covariance)),
        }

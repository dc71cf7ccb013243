"""FID of pixels instead of features: a metric of sets that is quick, for scale_kills.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from diffsynth_metrics.base import MetricCard, SetMetric
from diffsynth_metrics.fid.statistics import FIDStatistics, compare_statistics
from diffsynth_metrics.inputs import as_images, open_image


class PixelFID(SetMetric):
    """The distance between two sets of pictures of 8 x 8 gray pixels."""

    card = MetricCard("pixels", "two sets of images", "", False, "", "", "", "", "")

    def __init__(self) -> None:
        """Make it; it has no network."""
        network = nn.Linear(1, 1)
        nn.init.zeros_(network.weight)
        nn.init.zeros_(network.bias)
        super().__init__(network)

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

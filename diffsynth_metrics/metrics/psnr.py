"""PSNR: the mean squared difference of the pixels of two pictures, in decibels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.inputs import ImagesInput
from diffsynth_metrics.pixel_formula import PixelFormulaMetric

__all__ = ["PSNRMetric", "psnr"]


def psnr(mse: Tensor) -> Tensor:
    """Return -10 log10(MSE) of pixels in 0..1: infinity, with the gradient 0, where it is 0."""
    differs = mse > 0
    return torch.where(differs, -10 * torch.log10(torch.where(differs, mse, 1)), torch.inf)


class PSNRMetric(PixelFormulaMetric):
    """Peak signal-to-noise ratio in decibels: higher is more similar, infinity for equal pictures.

    Example:
        >>> metric = PSNRMetric.from_pretrained()
        >>> metric.compute("original.png", "decoded.png")[0]

    It compares all pixels of the three channels as they are in the file, in RGB. The two pictures of a
    pair must have one size. See ``PSNRMetric.card``.
    """

    card = MetricCard(
        name="PSNR",
        inputs="reference image and image",
        range="0 to infinity (equal pictures); about 20 to 50 dB",
        higher_is_better=True,
        definition="10 log10(255^2 / MSE) over all pixels and the channels R, G and B",
        paper="https://doi.org/10.1049/el:20080522",
        repository="https://github.com/scikit-image/scikit-image",
        code_license="BSD-3-Clause (scikit-image; the formula is everybody's)",
        weights_license="no weights",
        notes=(
            "Papers on super-resolution often compute it of the luma channel, without a border: those "
            "numbers are others."
        ),
        good_for="how exactly pixels are reproduced; people judge otherwise",
        download="none",
        memory="none",
    )

    @staticmethod
    def formula(first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Compute ``"score"`` in decibels and ``"mse"``, of pixels ``[B, 3, H, W]`` in 0..1."""
        mse = (first - second).square().mean(dim=(1, 2, 3))
        return {"score": psnr(mse), "mse": mse}

    def evaluate(self, reference: ImagesInput, images: ImagesInput) -> list[dict[str, Any]]:
        """See :meth:`ReferenceMetric.evaluate`; ``"error"`` says so where two pictures are equal."""
        equal = "the pictures are equal, of which PSNR is infinite"
        rows = super().evaluate(reference, images)
        return [{**row, "error": equal if row["mse"] == 0 else None} for row in rows]

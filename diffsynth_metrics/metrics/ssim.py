"""SSIM: how much of the structure of a picture another one keeps, in windows of 11 pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.pixel_formula import PixelFormulaMetric

__all__ = ["SSIMMetric", "ssim"]

_WINDOW, _SIGMA = 11, 1.5
_BELL = [math.exp(-((position - _WINDOW // 2) ** 2) / (2 * _SIGMA**2)) for position in range(_WINDOW)]
_WEIGHTS = [height / sum(_BELL) for height in _BELL]
_C1, _C2 = 0.01**2, 0.03**2


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004): ``[B, C, H, W]`` in 0..1 to ``[B]``.

    The means, variances and the covariance at each position are those of a Gaussian window of 11 x 11
    pixels, sigma 1.5; only windows inside the picture count, and the channels count equally.
    """
    # Variances do not change with the level, and are more exact around 0.
    level = first.mean(dim=(2, 3), keepdim=True)
    one, other = first - level, second - level
    mean1, mean2 = _smoothed(one), _smoothed(other)
    variance1 = _smoothed(one * one) - mean1 * mean1
    variance2 = _smoothed(other * other) - mean2 * mean2
    covariance = _smoothed(one * other) - mean1 * mean2
    level1, level2 = mean1 + level, mean2 + level
    luminance = (2 * level1 * level2 + _C1) / (level1 * level1 + level2 * level2 + _C1)
    contrast_and_structure = (2 * covariance + _C2) / (variance1 + variance2 + _C2)
    return (luminance * contrast_and_structure).mean(dim=(1, 2, 3))


def _smoothed(values: Tensor) -> Tensor:
    """Return Gaussian means around positions whose window is inside: ``[B, C, H - 10, W - 10]``."""
    # No convolution: CUDA's rounds its inputs to ten bits by default, and variances would drown in that.
    for side in (2, 3):
        length = values.shape[side] - _WINDOW + 1
        total = torch.zeros_like(values.narrow(side, 0, length))
        for start, weight in enumerate(_WEIGHTS):
            total = total.add(values.narrow(side, start, length), alpha=weight)
        values = total
    return values


class SSIMMetric(PixelFormulaMetric):
    """Structural similarity: higher is more similar, 1 for equal pictures.

    Example:
        >>> metric = SSIMMetric.from_pretrained()
        >>> metric.compute("original.png", "decoded.png")[0]

    The two pictures of a pair must have one size, of at least 11 pixels on each side. See
    ``SSIMMetric.card``.
    """

    card = MetricCard(
        name="SSIM",
        inputs="reference image and image",
        range="-1 to 1 (equal pictures); about 0.3 to 1",
        higher_is_better=True,
        definition=(
            "mean of (2 m1 m2 + C1) (2 s12 + C2) / ((m1^2 + m2^2 + C1) (s1^2 + s2^2 + C2)) over "
            "Gaussian windows and the channels R, G and B"
        ),
        paper="https://doi.org/10.1109/TIP.2003.819861",
        repository="https://github.com/scikit-image/scikit-image",
        code_license="BSD-3-Clause (scikit-image; the formula is everybody's)",
        weights_license="no weights",
        notes=(
            "Window, sigma and constants are the paper's. Numbers of the luma channel, of uniform "
            "windows, or after shrinking the pictures are others."
        ),
        good_for="how well structure is kept where pictures lie on top of each other",
        download="none",
        memory="none",
    )
    smallest_side = _WINDOW

    @staticmethod
    def formula(first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Compute ``"score"`` of pixels ``[B, 3, H, W]`` in 0..1."""
        return {"score": ssim(first, second)}

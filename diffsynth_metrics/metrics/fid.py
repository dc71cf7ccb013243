"""FID: how far the distribution of generated images is from that of reference images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models.inception import Inception3

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.fid.frechet import FrechetMetric
from diffsynth_metrics.fid.preprocessing import PREPROCESSINGS
from diffsynth_metrics.networks.inception import FEATURES, build_inception
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["FIDMetric"]


class FIDMetric(FrechetMetric):
    """FID with the Inception of 2015-12-05: lower is better.

    Example:
        >>> metric = FIDMetric.from_pretrained()
        >>> metric.compute("real/", "generated/")

    Option ``preprocessing``: ``"clean"`` (default), ``"pytorch-fid"``, ``"torch-fidelity"``,
    ``"torchmetrics"`` or ``"diffsynth"``. The name belongs to the number: see docs/fid.md for the table
    and for why the default is ``"clean"``. See ``FIDMetric.card``.
    """

    card = MetricCard(
        name="FID",
        inputs="two sets of images",
        range="0 for equal sets; about 2 to 60 on 10,000 images and more",
        higher_is_better=False,
        definition="|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) of Inception pool3 features",
        paper="https://arxiv.org/abs/1706.08500",
        repository="https://github.com/bioinf-jku/TTUR",
        code_license="Apache-2.0",
        weights_license="Apache-2.0 (TensorFlow's Inception of 2015-12-05)",
        notes=(
            "Compare numbers of the same preprocessing, reference set and number of images only; below "
            "2,048 images it is strongly biased upwards."
        ),
        good_for="how close a set of pictures is to a reference set",
        download="96 MB",
        memory="87 MB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="FID/model.safetensors"
    )
    config_file = None
    label = "FID"
    extractor = "inception"
    preprocessings = PREPROCESSINGS
    model: Inception3

    @property
    def dimensions(self) -> int:
        """Number of features that the network makes of an image."""
        return FEATURES

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> Inception3:
        """Build the Inception, which has one architecture."""
        return build_inception()

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Leave the classifier out, and bring the statistics of batch norms to the dtype as well."""
        model.fc = nn.Identity()
        return model.to(dtype)

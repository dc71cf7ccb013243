"""FD-DINOv2: the Fréchet distance of FID with the features of DINOv2 ViT-L/14."""

from __future__ import annotations

from typing import Any, ClassVar

import PIL.Image
import torch
from torch import nn

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.fid.frechet import FrechetMetric
from diffsynth_metrics.fid.preprocessing import Normalized, Prepare
from diffsynth_metrics.networks.vit import build_vit, resample_positions, timm_weights
from diffsynth_metrics.pixels.transforms import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["FDDINOv2Metric"]

_SIZE = 224
_PUBLISHED = {"architecture": "vit_large_patch14_dinov2"}


def _squeeze(image: PIL.Image.Image) -> PIL.Image.Image:
    """Resize to a square, whatever the shape."""
    return image.resize((_SIZE, _SIZE), PIL.Image.Resampling.BICUBIC)


class FDDINOv2Metric(FrechetMetric):
    """FD-DINOv2, as dgm-eval computes it: lower is better.

    Example:
        >>> metric = FDDINOv2Metric.from_pretrained()
        >>> metric.compute("real/", "generated/")

    Sources, statistics, files, and the further measures of ``evaluate`` are those of
    :class:`FIDMetric`; statistics say which network made them, and the two do not mix. Numbers are not
    on FID's scale. Weights are in timm's layout. See ``FDDINOv2Metric.card`` and docs/fid.md.
    """

    card = MetricCard(
        name="FD-DINOv2",
        inputs="two sets of images",
        range="0 for equal sets; about 50 to 1,000 on 50,000 images",
        higher_is_better=False,
        definition="|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) of DINOv2 ViT-L/14 class tokens",
        paper="https://arxiv.org/abs/2306.04675",
        repository="https://github.com/layer6ai-labs/dgm-eval",
        code_license="MIT",
        weights_license="Apache-2.0",
        notes=(
            "Compare numbers of the same reference set and number of images only; it agrees with people "
            "better than FID where pictures are not of ImageNet's classes."
        ),
        good_for="how close a set of pictures is to a reference set, nearer to people than FID",
        download="1.2 GB",
        memory="1.2 GB",
    )
    default_model = timm_weights("timm/vit_large_patch14_dinov2.lvd142m")
    label = "FD-DINOv2"
    extractor = "dinov2-vitl14"
    preprocessings: ClassVar[dict[str, Prepare]] = {
        "dgm-eval": Normalized("dgm-eval", _squeeze, IMAGENET_MEAN, IMAGENET_STD)
    }

    @property
    def dimensions(self) -> int:
        """Number of features that the network makes of an image."""
        return int(self.model.num_features)

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Build timm's network, see :meth:`BaseMetric.build`."""
        return build_vit("dinov2", config, _PUBLISHED)

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Let the network, which was trained with 518 pixels, take 224 as the authors' code does."""
        resample_positions(model, _SIZE, offset=0.1)
        return model

"""FD-DINOv2: the Fréchet distance of FID with the features of DINOv2 ViT-L/14."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import nn
from typing_extensions import Self

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.fid.preprocessing import Normalized, Prepare
from diffsynth_metrics.metrics.fid import FIDMetric
from diffsynth_metrics.networks.vit import build_vit, family_of, resample_positions
from diffsynth_metrics.pixels.transforms import IMAGENET_MEAN, IMAGENET_STD
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["FDDINOv2Metric"]

_SIZE = 224
_PUBLISHED = {"architecture": "vit_large_patch14_dinov2"}


def _squeeze(image: PIL.Image.Image) -> PIL.Image.Image:
    """Resize to a square, whatever the shape."""
    return image.resize((_SIZE, _SIZE), PIL.Image.Resampling.BICUBIC)


class FDDINOv2Metric(FIDMetric):
    """FD-DINOv2, as dgm-eval computes it: lower is better.

    Example:
        >>> metric = FDDINOv2Metric.from_pretrained()
        >>> metric.compute("real/", "generated/")

    Sources, statistics, files, and the further measures of ``evaluate`` are those of
    :class:`FIDMetric`; statistics say which network made them, and the two do not mix. Numbers are not
    on FID's scale. See ``FDDINOv2Metric.card`` and docs/fid.md.
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
    default_model = ModelConfig(
        model_id="timm/vit_large_patch14_dinov2.lvd142m",
        origin_file_pattern="model.safetensors",
        download_source="huggingface",
    )
    config_file = "config.json"
    label = "FD-DINOv2"
    extractor = "dinov2-vitl14"
    preprocessings: ClassVar[Mapping[str, Prepare]] = {
        "dgm-eval": Normalized("dgm-eval", _squeeze, IMAGENET_MEAN, IMAGENET_STD)
    }

    def __init__(
        self,
        model: nn.Module,
        processor: None = None,
        *,
        preprocessing: str = "dgm-eval",
        num_workers: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        super().__init__(
            model,
            processor,
            preprocessing=preprocessing,
            num_workers=num_workers,
            batch_size=batch_size,
        )
        self.dimensions = int(model.num_features)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model_config: ModelConfig | None = None,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load the metric.

        Args:
            model_config: Where the weights are, in timm's layout; the published ones by default, from
                Hugging Face.
            device: See :meth:`FIDMetric.from_pretrained`.
            batch_size: See :meth:`FIDMetric.from_pretrained`.
            num_workers: See :meth:`FIDMetric.from_pretrained`.
            torch_dtype: Dtype of the network; float32 by default, as the authors compute it.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            Exception: What :meth:`FIDMetric.from_pretrained` raises.
        """
        return super().from_pretrained(
            model_config,
            device,
            batch_size,
            num_workers,
            preprocessing="dgm-eval",
            torch_dtype=torch_dtype,
        )

    @classmethod
    def read_config(
        cls, model_config: ModelConfig | None, files: Sequence[Path]
    ) -> dict[str, Any] | None:
        """Return timm's config next to the files.

        Raises:
            CheckpointError: The files hold another kind of network.
        """
        if family_of(files) != "dinov2":
            raise CheckpointError(
                f"{files[0]} is no DINOv2 in timm's layout, which {cls.__name__} takes"
            )
        return super().read_config(model_config, files)

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Build timm's network, see :meth:`BaseMetric.build`."""
        return build_vit("dinov2", config, _PUBLISHED)

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Let the network, which was trained with 518 pixels, take 224 as the authors' code does."""
        resample_positions(model, _SIZE, offset=0.1)
        return model

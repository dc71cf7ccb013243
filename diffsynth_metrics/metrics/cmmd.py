"""CMMD: the maximum mean discrepancy between CLIP embeddings of two sets of images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import nn
from torch.nn.functional import normalize as l2_normalize

from diffsynth_metrics.base import MetricCard, SetMetric, check_batch_size
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.fid.distances import gaussian_mmd
from diffsynth_metrics.fid.features import FeatureSet
from diffsynth_metrics.fid.preprocessing import Normalized
from diffsynth_metrics.fid.sources import ImageReader, ImageSource, OnError, choose_workers
from diffsynth_metrics.modes import plain_modes
from diffsynth_metrics.networks.vit import build_vit, family_of
from diffsynth_metrics.pixels.transforms import CLIP_MEAN, CLIP_STD
from diffsynth_metrics.weights.files import sha256_of
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["CMMDMetric", "CMMDSource"]

CMMDSource: TypeAlias = "ImageSource | FeatureSet"
"""A folder, images, an iterable of images or batches, features, or an ``.npz`` file of features."""

_SIZE = 336
_SCALE = 1000
_EXTRACTOR = "clip-vitl14-336"
_PUBLISHED = {"architecture": "vit_large_patch14_clip_quickgelu_336", "num_classes": 768}


def _centre(image: PIL.Image.Image) -> PIL.Image.Image:
    """Cut out the largest centred square, then resize it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((_SIZE, _SIZE), PIL.Image.Resampling.BICUBIC)


class CMMDMetric(SetMetric):
    """CMMD, as its authors compute it: lower is better, 0 for equal sets.

    Example:
        >>> metric = CMMDMetric.from_pretrained()
        >>> metric.compute("real/", "generated/")

    1,000 times the squared MMD (biased estimator, Gaussian kernel, sigma 10) between L2-normalised CLIP
    ViT-L/14 embeddings of pictures of 336 pixels. It assumes no normal distribution and needs fewer
    images than FID. See ``CMMDMetric.card`` and docs/fid.md.
    """

    card = MetricCard(
        name="CMMD",
        inputs="two sets of images",
        range="0 for equal sets; about 0.1 to 5",
        higher_is_better=False,
        definition="1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)), k = exp(-|x - y|^2 / 200), of CLIP",
        paper="https://arxiv.org/abs/2401.09603",
        repository="https://github.com/google-research/google-research/tree/master/cmmd",
        code_license="Apache-2.0",
        weights_license="MIT",
        notes="The authors drop the last incomplete batch of images; here every image counts.",
        good_for="how close a set of pictures is to a reference set, with fewer pictures than FID",
        download="1.2 GB",
        memory="1.2 GB",
    )
    default_model = ModelConfig(
        model_id="timm/vit_large_patch14_clip_336.openai",
        origin_file_pattern="model.safetensors",
        download_source="huggingface",
    )
    preprocessing = Normalized("cmmd", _centre, CLIP_MEAN, CLIP_STD)

    def __init__(
        self,
        model: nn.Module,
        processor: None = None,
        *,
        num_workers: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`.

        Args:
            model: The network.
            processor: None.
            num_workers: Threads that decode and resize, as :class:`FIDMetric` has them.
            batch_size: The largest number of images in the network at once.
        """
        self.check_options(num_workers=num_workers)
        super().__init__(model, processor, batch_size=batch_size)
        self.num_workers = num_workers
        self.weights: str | None = None  # sha256 of the weight file

    @classmethod
    def check_options(cls, *, num_workers: int | None = None) -> None:  # type: ignore[override]
        """Check the metric's own options before files are fetched."""
        choose_workers(num_workers)

    @classmethod
    def read_config(
        cls, model_config: ModelConfig | None, files: Sequence[Path]
    ) -> dict[str, Any] | None:
        """Return timm's config next to the files.

        Raises:
            CheckpointError: The files hold another kind of network.
        """
        if family_of(files) != "clip":
            raise CheckpointError(f"{files[0]} is no CLIP in timm's layout, which {cls.__name__} takes")
        return super().read_config(model_config, files)

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Build timm's network, see :meth:`BaseMetric.build`."""
        return build_vit("clip", config, _PUBLISHED)

    def describe(self) -> None:
        """Note the sha256 of the weights, which features carry."""
        super().describe()
        self.weights = sha256_of(self.weight_files)

    def evaluate(
        self, reference_images: CMMDSource, generated_images: CMMDSource, **options: Any
    ) -> dict[str, Any]:
        """Compute CMMD with what belongs to the number.

        Args:
            reference_images: Real images: a folder (read recursively), images as every metric takes
                them, an iterable of images or batches, a :class:`FeatureSet`, or its ``.npz`` file.
            generated_images: The images to judge, in the same forms.
            **options: ``batch_size``, ``num_workers``, ``on_error`` and ``progress`` as in
                :meth:`statistics`.

        Returns:
            A dict of ``"score"``, ``"reference_count"``, ``"generated_count"``, ``"reference_skipped"``,
            ``"generated_skipped"``, ``"preprocessing"``, ``"extractor"`` and ``"weights"``.

        Raises:
            TypeError: An argument is no source of images, or there is no such option.
            ValueError: A side has fewer than two images, or features of another network.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.

        Warns:
            UserWarning: The sides' features were made with different weights or dtypes.
        """
        opened = [
            self._open(side, images, **options)
            for side, images in (("reference", reference_images), ("generated", generated_images))
        ]
        reference, generated = (self._extract(source) for source in opened)
        for side, features in (("reference", reference), ("generated", generated)):
            if features.count < 2:
                raise ValueError(f"CMMD needs at least 2 {side} images, got {features.count}")
        for name in ("weights", "dtype"):
            sides = getattr(reference, name), getattr(generated, name)
            if None not in sides and sides[0] != sides[1]:
                doubt = (
                    f"the two sides' features were made with different {name}, {sides[0]} and {sides[1]}"
                )
                warnings.warn(doubt, UserWarning, stacklevel=2)
        return {
            "score": _SCALE * gaussian_mmd(reference.features, generated.features),
            "reference_count": reference.count,
            "generated_count": generated.count,
            "reference_skipped": reference.skipped,
            "generated_skipped": generated.skipped,
            "preprocessing": generated.preprocessing,
            "extractor": generated.extractor,
            "weights": generated.weights,
        }

    def statistics(self, images: CMMDSource, **options: Any) -> FeatureSet:
        """Compute the features of one set of images, to keep, to merge or to compare with later.

        Args:
            images: See :meth:`evaluate`; features come back as they are.
            **options: ``batch_size`` and ``num_workers``, others than the metric's for this call;
                ``on_error``, ``"raise"`` (default) or ``"skip"``; ``progress``, whether a terminal shows
                a progress bar.
        """
        return self._extract(self._open("given", images, **options))

    @property
    def provenance(self) -> dict[str, Any]:
        """What made a number, see :attr:`BaseMetric.provenance`; with the name of the preprocessing."""
        return {**super().provenance, "preprocessing": self.preprocessing.name}

    def _open(
        self,
        side: str,
        images: CMMDSource,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> FeatureSet | ImageReader:
        """Check a side; nothing goes through the network yet."""
        if isinstance(images, (str, os.PathLike)) and Path(images).suffix == ".npz":
            images = FeatureSet.load(images)
        if not isinstance(images, FeatureSet):
            return ImageReader(
                images,
                self.preprocessing,
                batch_size=check_batch_size(self.batch_size if batch_size is None else batch_size),
                num_workers=choose_workers(self.num_workers if num_workers is None else num_workers),
                on_error=on_error,
                progress=f"CMMD, {side} images" if progress else None,
            )
        made_by = images.extractor, images.preprocessing or self.preprocessing.name
        if made_by != (_EXTRACTOR, self.preprocessing.name):
            raise ValueError(
                f"the {side} features are of {made_by[0]!r} (preprocessing {made_by[1]!r}), and CMMD "
                f"compares those of {_EXTRACTOR!r} (preprocessing {self.preprocessing.name!r})"
            )
        return images

    def _extract(self, source: FeatureSet | ImageReader) -> FeatureSet:
        if isinstance(source, FeatureSet):
            return source
        batches = [self._features(batch) for batch in source]
        if not batches:
            raise ValueError("there is no image that can be read")
        return FeatureSet(
            np.concatenate(batches),
            _EXTRACTOR,
            preprocessing=self.preprocessing.name,
            weights=self.weights,
            dtype=str(self.dtype).removeprefix("torch."),
            skipped=source.skipped,
        )

    def _features(self, batch: np.ndarray) -> np.ndarray:
        """Map network inputs ``[B, S, S, 3]`` to embeddings ``[B, D]`` of L2 norm 1, both float32."""
        with plain_modes(self.device.type, gradients=False):
            pixel_values = torch.from_numpy(batch).to(self.device, self.dtype).permute(0, 3, 1, 2)
            embeddings = l2_normalize(self.model(pixel_values).float(), dim=-1)
            features: np.ndarray = embeddings.cpu().numpy()
        if not np.isfinite(features).all():
            self.check_weights()
        return features

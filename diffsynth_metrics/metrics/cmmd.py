"""CMMD: the maximum mean discrepancy between CLIP embeddings of two sets of images."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, TypeAlias

import numpy as np
import PIL.Image
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.fid.distances import gaussian_mmd
from diffsynth_metrics.fid.features import FeatureSet
from diffsynth_metrics.fid.metric import FeatureMetric, check_count, counts_of
from diffsynth_metrics.fid.preprocessing import Normalized, Prepare
from diffsynth_metrics.fid.sources import ImageReader, ImageSource
from diffsynth_metrics.fid.statistics import differences_of_networks
from diffsynth_metrics.networks.vit import build_vit, timm_weights
from diffsynth_metrics.pixels.transforms import CLIP_MEAN, CLIP_STD

__all__ = ["CMMDMetric", "CMMDSource"]

CMMDSource: TypeAlias = "ImageSource | FeatureSet"
"""A folder, images, an iterable of images or batches, features, or an ``.npz`` file of features."""

_SIZE = 336
_SCALE = 1000
_PUBLISHED = {"architecture": "vit_large_patch14_clip_quickgelu_336", "num_classes": 768}


def _centre(image: PIL.Image.Image) -> PIL.Image.Image:
    """Cut out the largest centred square, then resize it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((_SIZE, _SIZE), PIL.Image.Resampling.BICUBIC)


class CMMDMetric(FeatureMetric):
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
    default_model = timm_weights("timm/vit_large_patch14_clip_336.openai")
    label = "CMMD"
    extractor = "clip-vitl14-336"
    preprocessings: ClassVar[dict[str, Prepare]] = {
        "cmmd": Normalized("cmmd", _centre, CLIP_MEAN, CLIP_STD)
    }
    statistics_type = FeatureSet

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Build timm's network, see :meth:`BaseMetric.build`."""
        return build_vit("clip", config, _PUBLISHED)

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Map network inputs to embeddings of L2 norm 1, see :meth:`FeatureMetric.embed_image`."""
        return l2_normalize(super().embed_image(pixel_values), dim=-1)

    def evaluate(
        self, reference_images: CMMDSource, generated_images: CMMDSource, **options: Any
    ) -> dict[str, Any]:
        """Compute CMMD with what belongs to the number.

        Args:
            reference_images: Real images: a folder (read recursively), images as every metric takes
                them, an iterable of images or batches, a :class:`FeatureSet`, or its ``.npz`` file.
            generated_images: The images to judge, in the same forms.
            **options: See :meth:`statistics`.

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
        given = {"reference": reference_images, "generated": generated_images}
        sources = {side: self.open_side(side, images, **options) for side, images in given.items()}
        for side, source in sources.items():
            check_count(side, source, {self.label: 2})
        features = {side: self._extract(side, source) for side, source in sources.items()}
        for (
            side,
            found,
        ) in features.items():  # now that generators have ended, and without what was skipped
            check_count(side, found, {self.label: 2})
        reference, generated = features.values()
        for doubt in differences_of_networks(reference, generated, self.label):
            warnings.warn(doubt, UserWarning, stacklevel=2)
        return {
            "score": _SCALE * gaussian_mmd(reference.features, generated.features),
            **counts_of(reference, generated),
            "extractor": generated.extractor,
        }

    def statistics(self, images: CMMDSource, **options: Any) -> FeatureSet:
        """Compute the features of one set of images, to keep, to merge or to compare with later.

        Args:
            images: See :meth:`evaluate`; features come back as they are.
            **options: ``batch_size`` and ``num_workers``, others than the metric's for this call;
                ``on_error``, ``"raise"`` (default) or ``"skip"``; ``progress``, whether a terminal shows
                a progress bar.
        """
        return self._extract("", self.open_side("", images, **options))

    def _extract(self, side: str, source: FeatureSet | ImageReader) -> FeatureSet:
        if isinstance(source, FeatureSet):
            return source
        features = np.concatenate(list(self.features_of(side, source)))
        return FeatureSet(features, **self.made_by(source), skipped=source.skipped)

"""Image similarity: the cosine of two pictures' embeddings, by the protocols CLIP-I, DINO and DINOv2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffsynth_metrics.base import MetricCard, ReferenceMetric
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.image_encoder import EncodesImages
from diffsynth_metrics.inputs import (
    CheckedImages,
    ImageInput,
    ImagesInput,
    ReferencesInput,
    group_references,
)
from diffsynth_metrics.networks.vit import build_vit, family_of, resample_positions, timm_weights
from diffsynth_metrics.pixels.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ResizedCrop,
    ShortestEdgeCrop,
    Transform,
)
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["ImageSimilarityMetric", "mean_cosine"]

_SIZE = 224


class _Protocol(NamedTuple):
    title: str
    family: str
    repository: str
    published: dict[str, Any]
    transform: Transform


_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_PROTOCOLS = {
    "clip-i": _Protocol(
        "CLIP-I",
        "clip",
        "timm/vit_base_patch32_clip_224.openai",
        {"architecture": "vit_base_patch32_clip_quickgelu_224", "num_classes": 512},
        ShortestEdgeCrop(_SIZE),
    ),
    "dino": _Protocol(
        "DINO",
        "dino",
        "timm/vit_small_patch16_224.dino",
        {"architecture": "vit_small_patch16_224"},
        ResizedCrop(_SIZE, crop_rounding="half_even", **_IMAGENET),
    ),
    "dinov2": _Protocol(
        "DINOv2",
        "dinov2",
        "timm/vit_small_patch14_dinov2.lvd142m",
        {"architecture": "vit_small_patch14_dinov2"},
        ResizedCrop(_SIZE, **_IMAGENET),
    ),
}


def mean_cosine(references: Tensor, image: Tensor) -> Tensor:
    """Return the mean cosine of normalised features: ``[R, D]`` with ``[D]`` to a scalar."""
    return (references @ image).mean()


class ImageSimilarityMetric(EncodesImages, ReferenceMetric):
    """Cosine of two pictures' embeddings, -1 to 1: does the subject of the references come back?

    Example:
        >>> metric = ImageSimilarityMetric.from_pretrained(protocol="dino")
        >>> metric.compute("dog.jpg", ["dog_on_beach.png", "dog_in_snow.png"])
        >>> metric.compute([["dog_1.jpg", "dog_2.jpg"]], ["dog_on_beach.png", "dog_in_snow.png"])

    Option ``protocol``: ``"clip-i"`` (default; OpenAI's CLIP ViT-B/32) and ``"dino"`` (DINO ViT-S/16)
    are DreamBooth's, ``"dinov2"`` (DINOv2 ViT-S/14) is DreamBench++'s. Scores of different protocols are
    not comparable. Several references for an image count by their mean. Weights are in timm's layout.
    See ``ImageSimilarityMetric.card``.
    """

    card = MetricCard(
        name="Image similarity (CLIP-I)",
        inputs="reference image or images, and image",
        range="-1 to 1; about 0.5 to 0.9 for CLIP-I, 0.2 to 0.8 for DINO and DINOv2",
        higher_is_better=True,
        definition="mean over the references of cos(embedding of reference, embedding of image)",
        paper="https://arxiv.org/abs/2208.12242",
        repository="https://github.com/google/dreambooth",
        code_license="MIT (CLIP), Apache-2.0 (DINO, DINOv2)",
        weights_license="MIT (CLIP), Apache-2.0 (DINO, DINOv2)",
        notes="It also rises with equal backgrounds and poses; a copy of the reference scores 1.",
        good_for="whether the subject of reference pictures comes back",
        download="351 MB",
        memory="351 MB",
    )
    variant = "protocol"
    variants: ClassVar[dict[str, ModelConfig]] = {
        name: timm_weights(protocol.repository) for name, protocol in _PROTOCOLS.items()
    }
    default_model = variants["clip-i"]

    def __init__(
        self, model: nn.Module, processor: None = None, *, protocol: str = "clip-i", **base: Any
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        self.check_options(protocol=protocol)
        super().__init__(model, processor, **base)
        self.protocol = protocol
        self.transform = _PROTOCOLS[protocol].transform

    @classmethod
    def variant_of(cls, files: Sequence[Path]) -> str:
        """Tell the protocol by the kind of network."""
        family = family_of(files)
        return next(name for name, protocol in _PROTOCOLS.items() if protocol.family == family)

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Build timm's network, see :meth:`BaseMetric.build`."""
        config = dict(config or {})
        protocol = _PROTOCOLS[config.pop("protocol", "clip-i")]
        return build_vit(protocol.family, config or None, protocol.published)

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Let DINOv2, which was trained with 518 pixels, take 224, as transformers does."""
        resample_positions(model, _SIZE)
        return model

    def arguments(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageInput] | Tensor,
        sources: Sequence[Sequence[ImageInput]] = (),
    ) -> tuple[Any, ...]:
        """Return what the verbs take; each sample may have several sources, see the base.

        Raises:
            ValueError: A sample has no source image; the message names it.
        """
        for index, of_sample in enumerate(sources or [()] * len(images)):
            if not len(of_sample):
                raise ValueError(
                    f"{type(self).__name__} needs a source image per sample, and sample {index} has none"
                )
        return ([list(of_sample) for of_sample in sources], images)

    def components(self, reference: ReferencesInput, images: ImagesInput) -> dict[str, Tensor]:
        """Compute ``"score"`` and the number of ``"references"`` of each image.

        Args:
            reference: One reference for all images, or a list of as many as images; or a list of lists:
                the references of each image, ``[[a, b, c]]`` for the same ones with all images.
            images: One image or several; or a folder, where `reference` is one.

        Returns:
            See :meth:`PromptMetric.components`; gradients flow to both sides.
        """
        references, sizes, checked = group_references(reference, images)
        try:
            reference_features = self.image_features(references)
        except ImageError as error:
            raise ImageError(f"reference {str(error).removeprefix('reference ')}") from error
        of_each = list(torch.split(reference_features, sizes))
        of_each *= len(checked) // len(of_each)
        features = self.image_features(checked)
        cosines = [mean_cosine(*pair) for pair in zip(of_each, features, strict=True)]
        counts = [len(group) for group in of_each]
        return {
            "score": torch.stack(cosines),
            "references": torch.tensor(counts, device=features.device),
        }

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Embed images with the tower."""
        embeddings: Tensor = self.model(pixel_values.to(self.dtype))
        return embeddings.to(torch.promote_types(self.dtype, torch.float32))

    def describe(self) -> None:
        """Name the protocol in the card."""
        title = _PROTOCOLS[self.protocol].title
        self.card = replace(self.card, name=f"Image similarity ({title})")
        super().describe()

    def image_features(self, images: CheckedImages) -> Tensor:
        """See :class:`EncodesImages`; a picture that comes up several times is embedded once."""
        if not isinstance(images, list):
            return super().image_features(images)
        keys = [image if isinstance(image, Path) else id(image) for image in images]
        different = dict(zip(keys, images, strict=True))
        rows = {key: row for row, key in enumerate(different)}
        features = super().image_features(list(different.values()))
        return features[[rows[key] for key in keys]]

"""Image similarity: the cosine of two pictures' embeddings, by the protocols CLIP-I, DINO and DINOv2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize
from typing_extensions import Self

from diffsynth_metrics.base import MetricCard, ReferenceMetric
from diffsynth_metrics.errors import CheckpointError, ImageError
from diffsynth_metrics.inputs import (
    CheckedImages,
    ImageInput,
    ImagesInput,
    ReferencesInput,
    as_images,
    group_references,
)
from diffsynth_metrics.modes import plain_modes, wants_gradients
from diffsynth_metrics.networks.vit import build_vit, family_of, resample_positions
from diffsynth_metrics.pixels.batches import joined
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
    family: str
    repository: str
    published: dict[str, Any]
    transform: Transform


_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_PROTOCOLS = {
    "clip-i": _Protocol(
        "clip",
        "timm/vit_base_patch32_clip_224.openai",
        {"architecture": "vit_base_patch32_clip_quickgelu_224", "num_classes": 512},
        ShortestEdgeCrop(_SIZE),
    ),
    "dino": _Protocol(
        "dino",
        "timm/vit_small_patch16_224.dino",
        {"architecture": "vit_small_patch16_224"},
        ResizedCrop(_SIZE, crop_rounding="half_even", **_IMAGENET),
    ),
    "dinov2": _Protocol(
        "dinov2",
        "timm/vit_small_patch14_dinov2.lvd142m",
        {"architecture": "vit_small_patch14_dinov2"},
        ResizedCrop(_SIZE, **_IMAGENET),
    ),
}
_OF_FAMILY = {protocol.family: name for name, protocol in _PROTOCOLS.items()}


def mean_cosine(references: Tensor, image: Tensor) -> Tensor:
    """Return the mean cosine of normalised features: ``[R, D]`` with ``[D]`` to a scalar."""
    return (references @ image).mean()


class ImageSimilarityMetric(ReferenceMetric):
    """Cosine of two pictures' embeddings, -1 to 1: does the subject of the references come back?

    Example:
        >>> metric = ImageSimilarityMetric.from_pretrained(protocol="dino")
        >>> metric.compute("dog.jpg", ["dog_on_beach.png", "dog_in_snow.png"])
        >>> metric.compute([["dog_1.jpg", "dog_2.jpg"]], ["dog_on_beach.png", "dog_in_snow.png"])

    Option ``protocol``: ``"clip-i"`` (default; OpenAI's CLIP ViT-B/32) and ``"dino"`` (DINO ViT-S/16)
    are DreamBooth's, ``"dinov2"`` (DINOv2 ViT-S/14) is DreamBench++'s. Scores of different protocols are
    not comparable. Several references for an image count by their mean. See
    ``ImageSimilarityMetric.card``.
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
    default_model = ModelConfig(
        model_id=_PROTOCOLS["clip-i"].repository,
        origin_file_pattern="model.safetensors",
        download_source="huggingface",
    )

    def __init__(
        self, model: nn.Module, processor: None = None, *, protocol: str = "clip-i", **base: Any
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        self.check_options(protocol=protocol)
        super().__init__(model, processor, **base)
        self.protocol = protocol
        self.transform = _PROTOCOLS[protocol].transform

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        *positional: Any,
        protocol: Literal["clip-i", "dino", "dinov2"] = "clip-i",
        **base: Any,
    ) -> Self:
        """Load the metric.

        Args:
            model_config: Where the weights are, in timm's layout; the published ones of the protocol by
                default, from Hugging Face.
            *positional: See :meth:`BaseMetric.from_pretrained`.
            protocol: See the class.
            **base: See :meth:`BaseMetric.from_pretrained`.

        Raises:
            ValueError: There is no such protocol.
            CheckpointError: The files hold another protocol's weights, or another metric's.
            Exception: What :meth:`BaseMetric.from_pretrained` raises.
        """
        cls.check_options(protocol=protocol)
        if model_config is None:
            model_config = ModelConfig(
                model_id=_PROTOCOLS[protocol].repository,
                origin_file_pattern="model.safetensors",
                download_source="huggingface",
            )
        return super().from_pretrained(model_config, *positional, protocol=protocol, **base)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check ``protocol``."""
        protocol = options.get("protocol", "clip-i")
        if protocol not in _PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(_PROTOCOLS)}; got {protocol!r}")

    @classmethod
    def read_config(cls, model_config: ModelConfig | None, files: Sequence[Path]) -> dict[str, Any]:
        """Return the family of the files and the config next to them."""
        return {"family": family_of(files), "config": super().read_config(model_config, files)}

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Build timm's network, see :meth:`BaseMetric.build`."""
        known = config or {"family": "clip", "config": None}
        published = _PROTOCOLS[_OF_FAMILY[known["family"]]].published
        model = build_vit(known["family"], known["config"], published)
        model.family = known["family"]
        return model

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Let DINOv2, which was trained with 518 pixels, take 224, as transformers does."""
        resample_positions(model, _SIZE)
        return model

    @classmethod
    def assemble(cls, model: Any, processor: Any, *, batch_size: int | None, **options: Any) -> Self:
        """Make the metric of its loaded parts."""
        if model.family != _PROTOCOLS[options["protocol"]].family:
            raise CheckpointError(
                f"Pass protocol={_OF_FAMILY[model.family]!r}: the weights are not those of "
                f"protocol={options['protocol']!r}"
            )
        return super().assemble(model, processor, batch_size=batch_size, **options)

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
            reference_features = self._features(references)
        except ImageError as error:
            raise ImageError(f"reference {str(error).removeprefix('reference ')}") from error
        of_each = list(torch.split(reference_features, sizes))
        of_each *= len(checked) // len(of_each)
        features = self._features(checked)
        cosines = [mean_cosine(*pair) for pair in zip(of_each, features, strict=True)]
        counts = [len(group) for group in of_each]
        return {
            "score": torch.stack(cosines),
            "references": torch.tensor(counts, device=features.device),
        }

    def encode_image(self, images: ImagesInput) -> Tensor:
        """Compute embeddings.

        Returns:
            float32 ``[N, D]`` on the metric's device, each row of L2 norm 1. Gradients flow as in
            :meth:`reward`.
        """
        with plain_modes(self.device.type, gradients=wants_gradients(images)):
            return self._features(as_images(images))

    def describe(self) -> None:
        """Name the protocol in the card."""
        name = {"clip-i": "CLIP-I", "dino": "DINO", "dinov2": "DINOv2"}[self.protocol]
        self.card = replace(self.card, name=f"Image similarity ({name})")
        super().describe()

    def _features(self, images: CheckedImages) -> Tensor:
        """Embed images; one that comes up several times is embedded once."""
        if not isinstance(images, list):
            return self._embed(images)
        keys = [image if isinstance(image, Path) else id(image) for image in images]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        different = sorted(first.values())
        features = self._embed([images[index] for index in different])
        places = {index: place for place, index in enumerate(different)}
        return features[[places[first[key]] for key in keys]]

    def _embed(self, images: CheckedImages) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        batches = [self.model(batch.to(self.dtype)).to(wide) for batch in self.pixel_batches(images)]
        return l2_normalize(joined(batches), dim=-1)

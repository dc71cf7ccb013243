"""LAION Aesthetic v2: how much people would like a picture, about 1 to 10, from the image alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from typing_extensions import Self

from diffsynth_metrics.base import ImageMetric, MetricCard, check_loading, wants_gradients
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.inputs import ImagesInput, as_images
from diffsynth_metrics.networks.class_token import class_token_of_clip
from diffsynth_metrics.networks.gradient_checkpointing import checkpoint_blocks
from diffsynth_metrics.networks.score_head import score_head
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.weights.checkpoint import load_weights
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["AestheticMetric", "aesthetic_score", "build_aesthetic", "vit_l_14_config"]


def aesthetic_score(image_embeddings: Tensor, head: nn.Module) -> Tensor:
    """Return the head's value of L2-normalised embeddings: ``[N, D]`` to ``[N]``."""
    score: Tensor = head(l2_normalize(image_embeddings, dim=-1)).squeeze(-1)
    return score


def vit_l_14_config() -> CLIPVisionConfig:
    """Return the image tower of OpenAI's CLIP ViT-L/14, which was trained with quick_gelu."""
    return CLIPVisionConfig(
        hidden_act="quick_gelu",
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        patch_size=14,
        projection_dim=768,
    )


def build_aesthetic(config: CLIPVisionConfig) -> CLIPVisionModelWithProjection:
    """Build the tower and its head (``model.layers``) on the meta device, position ids in memory."""
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
        model.layers = score_head(config.projection_dim)
    embeddings = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    return model


class AestheticMetric(ImageMetric):
    """LAION Aesthetic predictor v2 (sac+logos+ava1, linear): an affine map of CLIP L/14 features.

    It takes images only: ``metric.compute(images)``. See ``AestheticMetric.card``.
    """

    card: ClassVar[MetricCard] = MetricCard(
        name="LAION Aesthetic v2",
        inputs="image",
        range="about 3 to 7.5; raters used 1 to 10",
        higher_is_better=True,
        definition="MLP(L2-normalised CLIP ViT-L/14 image embedding), without activations",
        paper="https://laion.ai/blog/laion-aesthetics/",
        repository="https://github.com/christophschuhmann/improved-aesthetic-predictor",
        code_license="Apache-2.0",
        weights_license="Apache-2.0 (head), MIT (OpenAI CLIP)",
        notes="It never sees the prompt.",
    )
    default_model: ClassVar[ModelConfig] = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="Aesthetic/model.safetensors"
    )
    model: CLIPVisionModelWithProjection

    def __init__(self, model: CLIPVisionModelWithProjection, *, batch_size: int) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        super().__init__(model, batch_size=batch_size)
        self.transform = ShortestEdgeCrop(
            model.config.image_size, crop_rounding="half_even", convert="after"
        )

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        processor_config: ModelConfig | None = None,
        *,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        batch_size: int = 16,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Load the metric.

        Args:
            model_config: Where the weights are; the published ones by default. A ``config.json`` next
                to them gives the architecture, otherwise it is OpenAI's ViT-L/14.
            processor_config: Accepted as in ``diffsynth.metrics`` and not needed.
            device: Any torch device; the best that torch reports by default.
            torch_dtype: Dtype of the tower; float32 by default. Projection, norm and head are float32
                in any case.
            batch_size: The largest number of images in the network at once. It bounds memory and does
                not change scores.
            gradient_checkpointing: Whether :meth:`reward` computes the towers' blocks again on the way
                back, which takes less memory and more time. Scores and gradients are the same.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
        """
        place, dtype = check_loading(
            model_config, processor_config, device=device, torch_dtype=torch_dtype, batch_size=batch_size
        )
        files = cls._weights(model_config)
        model = build_aesthetic(_vision_config(cls._architecture(model_config, files)))
        load_weights(
            model,
            files,
            metric=cls.__name__,
            device=place,
            dtype=dtype,
            float32=("visual_projection", "layers"),
        )
        if gradient_checkpointing:
            checkpoint_blocks(model)
        return cls(model, batch_size=batch_size)

    def encode_image(self, images: ImagesInput) -> Tensor:
        """Compute the L2-normalised CLIP features that the head reads.

        Returns:
            float32 ``[N, D]`` on the metric's device. Gradients flow as in :meth:`reward`.
        """
        with self._scoring(gradients=wants_gradients(images)):
            return l2_normalize(self._embeddings(images), dim=-1)

    def _components(self, images: ImagesInput) -> dict[str, Tensor]:
        return {"score": aesthetic_score(self._embeddings(images), self.model.layers)}

    def _embeddings(self, images: ImagesInput) -> Tensor:
        model = self.model
        rows = []
        for pixel_values in self._pixel_batches(as_images(images), self.transform):
            pooled = class_token_of_clip(model.vision_model, pixel_values)
            rows.append(model.visual_projection(pooled.to(model.visual_projection.weight.dtype)))
        return torch.cat(rows)


def _vision_config(config: dict[str, Any] | None) -> CLIPVisionConfig:
    if config is None:
        return vit_l_14_config()
    # Both the predictor's own config and a whole CLIP's say what the image tower is.
    config = config.get("vision_config", config)
    known = config.get("model_type", "clip_vision_model") in ("clip", "clip_vision_model")
    if "hidden_size" not in config or not known:
        raise CheckpointError("the config.json next to the weights describes no CLIP image tower")
    return CLIPVisionConfig.from_dict(config)

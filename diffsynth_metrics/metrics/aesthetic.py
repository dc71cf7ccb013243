"""LAION Aesthetic v2: how much people would like a picture, about 1 to 10, from the image alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize
from transformers import CLIPVisionModelWithProjection

from diffsynth_metrics.base import ImageMetric, MetricCard
from diffsynth_metrics.image_encoder import EncodesImages
from diffsynth_metrics.inputs import ImagesInput, as_images
from diffsynth_metrics.networks.clip import build_vision_tower, vision_config
from diffsynth_metrics.networks.score_head import score_head
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["AestheticMetric", "aesthetic_score"]


def aesthetic_score(image_embeddings: Tensor, head: nn.Module) -> Tensor:
    """Return the head's value of L2-normalised embeddings: ``[N, D]`` to ``[N]``."""
    score: Tensor = head(l2_normalize(image_embeddings, dim=-1)).squeeze(-1)
    return score


class AestheticMetric(EncodesImages, ImageMetric):
    """LAION Aesthetic predictor v2 (sac+logos+ava1, linear): an affine map of CLIP L/14 features.

    It takes images only: ``metric.compute(images)``. See ``AestheticMetric.card``.
    """

    card = MetricCard(
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
        good_for="how pleasing a picture looks, whatever it shows",
        download="1.2 GB",
        memory="1.2 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="Aesthetic/model.safetensors"
    )
    float32_parts = ("visual_projection", "layers")
    model: CLIPVisionModelWithProjection

    def __init__(
        self, model: CLIPVisionModelWithProjection, processor: None = None, **base: Any
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        super().__init__(model, processor, **base)
        self.transform = ShortestEdgeCrop(
            model.config.image_size, crop_rounding="half_even", convert="after"
        )

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> CLIPVisionModelWithProjection:
        """Build transformers' image tower with the head as ``layers``, see :meth:`BaseMetric.build`."""
        model = build_vision_tower(vision_config(config))
        with torch.device("meta"):
            model.layers = score_head(model.config.projection_dim)
        return model

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Embed images with the tower; L2-normalised, these are the features that the head reads."""
        projection = self.model.visual_projection
        pooled = self.model.vision_model(pixel_values).pooler_output
        embeddings: Tensor = projection(pooled.to(projection.weight.dtype))
        return embeddings

    def components(self, images: ImagesInput) -> dict[str, Tensor]:
        """Compute ``"score"``, see :meth:`ImageMetric.components`."""
        return {"score": aesthetic_score(self.image_embeddings(as_images(images)), self.model.layers)}

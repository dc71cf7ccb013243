"""CLIP score of OpenCLIP ViT-H/14: how well an image fits a text, exp(logit_scale) * cosine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.dual_encoder import DualEncoderMetric
from diffsynth_metrics.networks.clip import build_clip, check_clip_tokenizer, clip_config
from diffsynth_metrics.pixels.preprocessor_config import check_preprocessor
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.tokens import TokenizedPrompts, cut_prompts, padded
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["CLIPMetric", "clip_score"]


def clip_score(cosine: Tensor, logit_scale: Tensor) -> Tensor:
    """Return exp(logit_scale) * cosine, the logit that CLIP was trained with.

    Args:
        cosine: Cosines of text and image features, any shape.
        logit_scale: Scalar, the logarithm of the scale; about ln(100) in trained models.
    """
    return logit_scale.to(cosine.dtype).exp() * cosine


class CLIPMetric(DualEncoderMetric):
    """CLIP score: exp(logit_scale) * cos(text, image), unclamped, without a prompt prefix.

    Example:
        >>> metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"))
        >>> metric.compute("a red circle", [first_image, second_image])

    Option ``max_length`` (default 77): prompts are cut to this number of tokens, begin and end included;
    at least 3, at most the network's. Option ``cache_text``: see :class:`DualEncoderMetric`. See
    ``CLIPMetric.card`` for range, paper and licences.
    """

    card = MetricCard(
        name="CLIP score (ViT-H/14, LAION-2B)",
        inputs="prompt and image",
        range="about 10 to 40 for real pictures; at most exp(logit_scale), about 100",
        higher_is_better=True,
        definition="exp(logit_scale) * cos(text, image)",
        paper="https://arxiv.org/abs/2212.07143",
        repository="https://github.com/mlfoundations/open_clip",
        code_license="MIT",
        weights_license="MIT",
        notes="Not the CLIPScore of Hessel et al., which is 2.5 * max(cos, 0) with ViT-B/32.",
        good_for="whether a picture shows what the prompt says",
        download="3.9 GB",
        memory="3.9 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="CLIP-ViT-H-14-laion2B-s32B-b79K/model.safetensors",
    )
    default_processor = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="CLIP-ViT-H-14-laion2B-s32B-b79K/*.[jt]*",
    )
    processor_files = ("tokenizer.json", "vocab.json")
    float32_parts = ("logit_scale", "text_projection", "visual_projection")
    positional = ("max_length", "processor_kwargs", "vram_limit")
    model: CLIPModel

    def __init__(
        self, model: CLIPModel, processor: CLIPTokenizer, *, max_length: int = 77, **base: Any
    ) -> None:
        """Wrap a loaded network and its tokenizer; users call :meth:`from_pretrained`."""
        self.check_options(max_length=max_length)
        super().__init__(model, processor, **base)
        self.transform = ShortestEdgeCrop(model.config.vision_config.image_size)
        self.tokenizer = processor
        self.max_length = min(max_length, model.config.text_config.max_position_embeddings)

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> CLIPModel:
        """Build transformers' CLIP, see :meth:`BaseMetric.build`."""
        return build_clip(clip_config(config))

    @classmethod
    def load_processor(cls, folder: Path, model: Any, **processor_kwargs: Any) -> CLIPTokenizer:
        """Load the tokenizer, and refuse another model's tokenizer or preprocessing."""
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **processor_kwargs)
        check_clip_tokenizer(tokenizer, model.config.text_config, folder)
        check_preprocessor(folder, ShortestEdgeCrop(model.config.vision_config.image_size))
        return tokenizer

    def tokenize(self, prompts: list[str]) -> TokenizedPrompts:
        """Tokenize as CLIP does; whole at first, so that a cut prompt is noticed."""
        ids = self.tokenizer(prompts, verbose=False)["input_ids"]
        return cut_prompts(ids, self.max_length, self.tokenizer.truncation_side)

    def embed_text(self, ids: list[list[int]]) -> Tensor:
        """Embed texts. Attention is causal and ends at the first end token: padding is never seen."""
        model, rows = self.model, padded(ids, self.tokenizer.pad_token_id)
        pooled = model.text_model(input_ids=rows.to(self.device)).pooler_output
        projection: Tensor = model.text_projection(pooled.to(model.text_projection.weight.dtype))
        return projection

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Embed images with the image tower."""
        model = self.model
        pooled = model.vision_model(pixel_values=pixel_values).pooler_output
        projection: Tensor = model.visual_projection(pooled.to(model.visual_projection.weight.dtype))
        return projection

    def score_of_cosine(self, cosine: Tensor) -> Tensor:
        """Return :func:`clip_score`."""
        return clip_score(cosine, self.model.logit_scale)

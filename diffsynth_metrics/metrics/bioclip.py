"""BioCLIP 2: how well a picture of an organism fits its name, exp(logit_scale) * cosine."""

from __future__ import annotations

from typing import Any

import open_clip
from torch import Tensor

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.metrics.clip import clip_score
from diffsynth_metrics.networks.open_clip import build_open_clip
from diffsynth_metrics.open_clip_encoder import OpenCLIPMetric
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["BioCLIPMetric"]


class BioCLIPMetric(OpenCLIPMetric):
    """BioCLIP 2: exp(logit_scale) * cos(text, image), for pictures of animals, plants and fungi.

    Example:
        >>> metric = BioCLIPMetric.from_pretrained()
        >>> metric.compute("a photo of Danaus plexippus.", "butterfly.jpg")

    Option ``max_length`` (default 77): prompts are cut to this number of tokens, begin and end included.
    Option ``cache_text``: see :class:`DualEncoderMetric`. See ``BioCLIPMetric.card``.
    """

    card = MetricCard(
        name="BioCLIP 2",
        inputs="prompt and image",
        range="at most exp(logit_scale), about 100",
        higher_is_better=True,
        definition="exp(logit_scale) * cos(text, image)",
        paper="https://arxiv.org/abs/2505.23883",
        repository="https://github.com/Imageomics/bioclip-2",
        code_license="MIT",
        weights_license="MIT",
        notes="Trained with taxonomic, scientific and common names; other texts are far from that.",
        good_for="whether a picture shows the species of the prompt",
        download="1.7 GB",
        memory="1.7 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="BioCLIPv2/open_clip_model.safetensors",
    )
    positional = ("max_length", "vram_limit")

    def __init__(
        self, model: open_clip.CLIP, processor: None = None, *, max_length: int = 77, **base: Any
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        self.check_options(max_length=max_length)
        super().__init__(model, processor, **base)
        self.transform = ShortestEdgeCrop(
            model.visual.image_size[0], crop_rounding="half_even", convert="after"
        )
        self.max_length = min(max_length, model.context_length)

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> open_clip.CLIP:
        """Build open_clip's ViT-L/14, see :meth:`BaseMetric.build`."""
        return build_open_clip(config, "ViT-L-14")

    def score_of_cosine(self, cosine: Tensor) -> Tensor:
        """Return :func:`diffsynth_metrics.metrics.clip.clip_score`."""
        return clip_score(cosine, self.model.logit_scale)

"""PickScore: how much people would prefer an image for a prompt, exp(logit_scale) * cosine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.inputs import ImagesInput
from diffsynth_metrics.metrics.clip import CLIPMetric
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["PickScoreMetric", "pick_probabilities"]


def pick_probabilities(scores: Tensor) -> Tensor:
    """Return the softmax over the images of one prompt: ``[N]`` scores to ``[N]`` in 0..1."""
    return torch.softmax(scores, dim=-1)


class PickScoreMetric(CLIPMetric):
    """PickScore v1: CLIP ViT-H/14 fine-tuned on human choices, with CLIP's own formula.

    Network, preprocessing and score are those of :class:`CLIPMetric`; the weights differ, and
    :meth:`probabilities` is what the model was trained for. See ``PickScoreMetric.card``.
    """

    card = MetricCard(
        name="PickScore v1",
        inputs="prompt and image",
        range="about 16 to 26 for generated pictures",
        higher_is_better=True,
        definition="exp(logit_scale) * cos(text, image)",
        paper="https://arxiv.org/abs/2305.01569",
        repository="https://github.com/yuvalkirstain/PickScore",
        code_license="MIT",
        weights_license="not declared by the authors",
        notes="Compare images of the same prompt; the level of a score depends on its prompt.",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="PickScore/model.safetensors",
    )
    default_processor = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="PickScore/*.[jt]*"
    )

    def probabilities(self, prompt: str | Sequence[str], images: ImagesInput) -> list[float]:
        """Compute how probably people pick each of several images for one prompt.

        Args:
            prompt: The prompt that all images were made for. (Code written for ``diffsynth.metrics`` may
                pass one prompt per image; the softmax is over all pairs then, as it is there.)
            images: The images to choose from, see :meth:`compute`.

        Returns:
            One probability per image; they sum to 1.
        """
        with torch.no_grad():
            return pick_probabilities(self.components(prompt, images)["score"]).tolist()

    def calc_probs(self, prompt: str | Sequence[str], images: ImagesInput) -> list[float]:
        """Do the same as :meth:`probabilities`; the name in the authors' code."""
        return self.probabilities(prompt, images)

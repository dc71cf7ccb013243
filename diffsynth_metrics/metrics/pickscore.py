"""PickScore: how much people would prefer an image for a prompt, exp(logit_scale) * cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        good_for="which picture of a prompt people pick",
        download="3.9 GB",
        memory="3.9 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="PickScore/model.safetensors",
    )
    default_processor = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="PickScore/*.[jt]*"
    )

    def probabilities(self, prompt: str | Sequence[str], images: ImagesInput) -> list[Any]:
        """Compute how probably people pick each of several images for a prompt.

        Args:
            prompt: The prompt that all images were made for, or several prompts.
            images: The images to choose from, see :meth:`compute`.

        Returns:
            One probability per image, which sum to 1; for a list of prompts one such list per prompt, as
            in ``diffsynth.metrics``.
        """
        matrix = torch.tensor(self.similarity_matrix(prompt, images), dtype=torch.float64, device="cpu")
        probabilities: list[Any] = pick_probabilities(matrix).tolist()
        return probabilities[0] if isinstance(prompt, str) else probabilities

    def calc_probs(self, prompt: str | Sequence[str], images: ImagesInput) -> list[Any]:
        """Do the same as :meth:`probabilities`; the name in the authors' code."""
        return self.probabilities(prompt, images)

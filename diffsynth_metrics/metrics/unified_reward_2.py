"""UnifiedReward 2.0: a judge of alignment, coherence and style of a generated image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.inputs import ImagesInput
from diffsynth_metrics.judges.answers import read_labelled_scores
from diffsynth_metrics.judges.engine import Answer, Question
from diffsynth_metrics.judges.metric import JudgeMetric, mean, pairs
from diffsynth_metrics.judges.prompts import load_prompts
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["UnifiedReward2Metric"]

_LABELS = {
    "alignment": "Alignment Score",
    "coherence": "Coherence Score",
    "style": "Style Score",
}


class UnifiedReward2Metric(JudgeMetric):
    """UnifiedReward 2.0: alignment, coherence and style, each from 1 to 5, and their mean.

    The texts are greedy, so that scores can be repeated; the authors' own client samples. See
    ``UnifiedReward2Metric.card``.
    """

    card = MetricCard(
        name="UnifiedReward 2.0",
        inputs="prompt and image",
        range="1 to 5",
        higher_is_better=True,
        definition="mean of the alignment, coherence and style that Qwen3.5-9B writes",
        paper="https://arxiv.org/abs/2503.05236",
        repository="https://github.com/CodeGoat24/UnifiedReward",
        code_license="MIT",
        weights_license="MIT (base Qwen3.5-9B: Apache-2.0)",
        notes="The mean is a convention; the authors give three rewards and let the user weigh them.",
        good_for="alignment, coherence and style apart, with reasons",
        download="18.8 GB",
        memory="18.8 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="UnifiedReward-2.0-qwen35-9b/model-*.safetensors",
    )
    default_processor = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="UnifiedReward-2.0-qwen35-9b/*.[jt]*",
    )
    architecture = "unified_reward_2"
    numbers = ("score", *_LABELS)

    def evaluate(self, prompt: str | Sequence[str] | None, images: ImagesInput) -> list[dict[str, Any]]:
        """Ask about pairs of prompts and images.

        Args:
            prompt: One prompt for all images, or as many prompts as images; None is the empty prompt.
            images: One image or several: PIL images, paths, uint8 arrays ``[H, W, 3]``, tensors
                ``[3, H, W]`` or ``[N, 3, H, W]`` (uint8 in 0..255 or float in 0..1).

        Returns:
            One dict per pair: ``"alignment"``, ``"coherence"``, ``"style"`` (1 to 5, None where the
            answer does not say it), ``"score"`` (their mean, None where one is missing), ``"error"``
            (why one is missing, or None), ``"raw_text"``, ``"finish"`` (``"stop"``, ``"length"`` where
            ``max_new_tokens`` cut the answer off, ``"error"`` where there is none) and ``"usage"``
            (tokens and seconds, as far as the engine knows them).

        Raises:
            TypeError: An argument is not a prompt or an image.
            ValueError: The numbers of prompts and images differ, or there are none.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.
            AnswerError: An answer cannot be read, with ``on_parse_error="raise"``.
        """
        prompts, samples = pairs(prompt, images)
        text = load_prompts("unified_reward_2")["user"]

        def questions(index: int, pictures: list[PIL.Image.Image]) -> list[Question]:
            asked = text.replace("{prompt}", prompts[index])
            return [Question(content=(*pictures, asked), thinking=False)]

        def row(index: int, answers: list[Answer]) -> dict[str, Any]:
            (answer,) = answers
            reading = read_labelled_scores(answer, _LABELS, low=1, high=5)
            self._report(index, answers, reading.problem)
            return {
                **reading.values,
                "score": mean([reading.values[name] for name in _LABELS]),
                "error": reading.problem,
                "raw_text": answer.text,
                "finish": answer.finish,
                "usage": dict(answer.usage),
            }

        return self._rows(samples, questions, row)

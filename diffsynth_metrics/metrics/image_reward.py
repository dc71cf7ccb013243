"""ImageReward v1.0: a reward for text-to-image, standardised over its training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer

from diffsynth_metrics.base import MetricCard, PromptMetric, rows_of_pairs
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.inputs import ImagesInput, as_prompts, pair
from diffsynth_metrics.networks.image_reward import ImageRewardNetwork, build_image_reward
from diffsynth_metrics.pixels.preprocessor_config import check_preprocessor
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.tokens import CutsPrompts, TokenizedPrompts, check_canaries, cut_prompts, padded
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["ImageRewardMetric", "standardize"]

_MEAN = 0.16717362830052426
_STD = 1.0333394966054072
_MAX_LENGTH = 35


def standardize(raw_reward: Tensor) -> Tensor:
    """Return (raw reward - mean) / std with the published constants; any shape."""
    return (raw_reward - _MEAN) / _STD


class ImageRewardMetric(CutsPrompts, PromptMetric):
    """ImageReward v1.0: (MLP(h_CLS) - mean) / std of BLIP reading the prompt and the image.

    Roughly standard normal over prompts, about -2.3 to 2; a negative score is no error. Prompts are
    cut to 35 tokens, or to the option ``max_length``. See ``ImageRewardMetric.card``.
    """

    card = MetricCard(
        name="ImageReward v1.0",
        inputs="prompt and image",
        range="about -2.3 to 2, roughly standard normal",
        higher_is_better=True,
        definition="(MLP(h_CLS) - 0.16717362830052426) / 1.0333394966054072",
        paper="https://arxiv.org/abs/2304.05977",
        repository="https://github.com/zai-org/ImageReward",
        code_license="Apache-2.0",
        weights_license="Apache-2.0 (of the repository)",
        notes="Compare images of one prompt; words beyond 35 tokens are not read.",
        good_for="whether people like a picture for its prompt",
        download="1.8 GB",
        memory="1.8 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="ImageReward/model.safetensors"
    )
    default_processor = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="ImageReward/*.[jt]*"
    )
    build = staticmethod(build_image_reward)
    processor_files = ("tokenizer.json", "vocab.txt")
    float32_parts = ("mlp",)
    positional = ("max_length", "processor_kwargs", "vram_limit")
    model: ImageRewardNetwork

    def __init__(
        self,
        model: ImageRewardNetwork,
        processor: BertTokenizer,
        *,
        max_length: int = _MAX_LENGTH,
        **base: Any,
    ) -> None:
        """Wrap a loaded network and its tokenizer; users call :meth:`from_pretrained`."""
        self.check_options(max_length=max_length)
        super().__init__(model, processor, **base)
        self.transform = ShortestEdgeCrop(model.image_size, crop_rounding="half_even", convert="after")
        self.tokenizer = processor
        self.max_length = min(max_length, model.blip.text_encoder.config.max_position_embeddings)

    @classmethod
    def load_processor(cls, folder: Path, model: Any, **processor_kwargs: Any) -> BertTokenizer:
        """Load BERT's tokenizer with the two tokens that the authors add."""
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True, **processor_kwargs)
        # As the authors do; BERT's own files lack them, and a prompt may spell them out.
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        vocabulary = model.blip.text_encoder.config.vocab_size
        if len(tokenizer) != vocabulary:
            raise CheckpointError(
                f"the tokenizer in {folder} belongs to another model: it has {len(tokenizer)} tokens, "
                f"and the network {vocabulary}"
            )
        check_canaries(tokenizer, folder, vocabulary)
        check_preprocessor(folder, ShortestEdgeCrop(model.image_size))
        return tokenizer

    def evaluate(self, prompt: str | Sequence[str], images: ImagesInput) -> list[dict[str, Any]]:
        """Score like :meth:`compute`, and rank the images of each prompt.

        Returns:
            One dict per pair: the :meth:`components`, and ``"rank"`` among the pairs with the same
            prompt in this call (1 is the best), as the authors' ``inference_rank`` returns it.
        """
        rows = super().evaluate(prompt, images)
        prompts = as_prompts(prompt)
        prompts = prompts if len(prompts) == len(rows) else prompts * len(rows)
        ranks: dict[str, int] = {}
        for index in sorted(range(len(rows)), key=lambda index: -rows[index]["score"]):
            ranks[prompts[index]] = ranks.get(prompts[index], 0) + 1
            rows[index]["rank"] = ranks[prompts[index]]
        return rows

    def components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        """Compute ``"score"``, ``"prompt_tokens"`` and whether the prompt was ``"truncated"``."""
        prompts, checked, count = pair(prompt, images)
        tokens = self.tokens_of(prompts)
        ids = padded(tokens.ids, self.tokenizer.pad_token_id, self.max_length)
        lengths = torch.tensor([[len(row)] for row in tokens.ids], device="cpu")
        mask = torch.arange(self.max_length, device="cpu") < lengths
        ids, mask = (rows.to(self.device).expand(count, -1) for rows in (ids, mask.long()))
        encoded = (
            self.model.encode_image(pixel_values.to(self.dtype))
            for pixel_values in self.pixel_batches(checked)
        )
        raw = [
            self.model.read(ids[rows], mask[rows], image_tokens.expand(len(ids[rows]), -1, -1))
            for image_tokens, rows in rows_of_pairs(encoded, len(checked), count, self.batch_size)
        ]
        return {"score": standardize(torch.cat(raw)), **tokens.components(count)}

    def tokenize(self, prompts: list[str]) -> TokenizedPrompts:
        """Tokenize as BERT does; whole at first, so that a cut prompt is noticed."""
        ids = self.tokenizer(prompts, verbose=False)["input_ids"]
        return cut_prompts(ids, self.max_length, self.tokenizer.truncation_side)

"""ImageReward v1.0: a reward for text-to-image, standardised over its training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig
from typing_extensions import Self

from diffsynth_metrics.base import MetricCard, PromptMetric, check_loading, check_max_length
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.inputs import ImagesInput, as_prompts, pair
from diffsynth_metrics.locks import Lock
from diffsynth_metrics.networks.gradient_checkpointing import checkpoint_blocks
from diffsynth_metrics.networks.image_reward import (
    ImageRewardNetwork,
    blip_vit_l_16_config,
    build_image_reward,
)
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.weights.checkpoint import load_weights
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["ImageRewardMetric", "standardize"]

_MEAN = 0.16717362830052426
_STD = 1.0333394966054072
_MAX_LENGTH = 35


def standardize(raw_reward: Tensor) -> Tensor:
    """Return (raw reward - mean) / std with the published constants; any shape."""
    return (raw_reward - _MEAN) / _STD


class ImageRewardMetric(PromptMetric):
    """ImageReward v1.0: (MLP(h_CLS) - mean) / std of BLIP reading the prompt and the image.

    Roughly standard normal over prompts, about -2.3 to 2; a negative score is no error. Prompts are
    cut to 35 tokens. See ``ImageRewardMetric.card``.
    """

    card: ClassVar[MetricCard] = MetricCard(
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
    )
    default_model: ClassVar[ModelConfig] = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="ImageReward/model.safetensors",
    )
    default_processor: ClassVar[ModelConfig] = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="ImageReward/*.[jt]*"
    )
    processor_files: ClassVar[tuple[str, ...]] = ("tokenizer.json", "vocab.txt")
    model: ImageRewardNetwork

    def __init__(
        self, model: ImageRewardNetwork, tokenizer: BertTokenizer, *, max_length: int, batch_size: int
    ) -> None:
        """Wrap a loaded network and tokenizer; users call :meth:`from_pretrained`."""
        super().__init__(model, batch_size=batch_size)
        self.transform = ShortestEdgeCrop(model.image_size, crop_rounding="half_even", convert="after")
        self.tokenizer = tokenizer
        self.max_length = max_length
        # A fast tokenizer keeps its padding in shared state, and refuses concurrent calls.
        self._tokenizer_lock = Lock()

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        tokenizer_config: ModelConfig | None = None,
        *,
        processor_config: ModelConfig | None = None,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        batch_size: int = 16,
        max_length: int = _MAX_LENGTH,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Load the metric.

        Args:
            model_config: Where the weights are; the published ones by default. A BLIP ``config.json``
                next to them gives the architecture, otherwise it is the published one.
            tokenizer_config: Where the tokenizer is; by default next to local weights, else the
                published one.
            processor_config: Another name of `tokenizer_config`.
            device: Any torch device; the best that torch reports by default.
            torch_dtype: Dtype of the towers; float32 by default. The reward head is float32 in any
                case.
            batch_size: The largest number of pairs in the network at once. It bounds memory and does
                not change scores.
            max_length: Prompts are cut and padded to this number of tokens, at least 3 and at most the
                network's 512.
            gradient_checkpointing: Whether :meth:`reward` computes the towers' blocks again on the way
                back, which takes less memory and more time. Scores and gradients are the same.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
        """
        check_max_length(max_length)
        place, dtype = check_loading(
            model_config,
            tokenizer_config,
            processor_config,
            device=device,
            torch_dtype=torch_dtype,
            batch_size=batch_size,
        )
        if tokenizer_config is not None and processor_config is not None:
            raise ValueError("tokenizer_config and processor_config name the same files: pass one")
        files, processor = cls._resolve(model_config, tokenizer_config or processor_config)
        model = build_image_reward(_blip_config(cls._architecture(model_config, files)))
        load_weights(
            model,
            files,
            metric=cls.__name__,
            device=place,
            dtype=dtype,
            float32=("mlp",),
        )
        if gradient_checkpointing:
            checkpoint_blocks(model)
        tokenizer = BertTokenizer.from_pretrained(
            cls._processor_folder(processor), local_files_only=True
        )
        # As the authors do; BERT's own files lack them, and a prompt may spell them out.
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        vocabulary = model.blip.text_encoder.config.vocab_size
        if len(tokenizer) != vocabulary:
            raise CheckpointError(
                f"the tokenizer belongs to another model: it has {len(tokenizer)} tokens, and the "
                f"network {vocabulary}"
            )
        max_length = min(max_length, model.blip.text_encoder.config.max_position_embeddings)
        return cls(model, tokenizer, max_length=max_length, batch_size=batch_size)

    def evaluate(self, prompt: str | Sequence[str], images: ImagesInput) -> list[dict[str, float]]:
        """Score like :meth:`compute`, and rank the images of each prompt.

        Returns:
            One dict per pair: ``"score"``, and ``"rank"`` among the pairs with the same prompt in
            this call (1 is the best), as the authors' ``inference_rank`` returns it.
        """
        rows = super().evaluate(prompt, images)
        prompts = as_prompts(prompt)
        prompts = prompts if len(prompts) == len(rows) else prompts * len(rows)
        places: dict[str, int] = {}
        for index in sorted(range(len(rows)), key=lambda index: -rows[index]["score"]):
            places[prompts[index]] = places.get(prompts[index], 0) + 1
            rows[index]["rank"] = places[prompts[index]]
        return rows

    def _components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        prompts, checked, count = pair(prompt, images)
        ids, mask = self._tokenize(prompts)
        raw: list[Tensor] = []
        done = 0
        # One image for many prompts is encoded once; otherwise each batch of images has its prompts.
        for pixel_values in self._pixel_batches(checked, self.transform):
            tokens = self.model.encode_image(pixel_values.to(self.dtype))
            pairs = count if len(checked) == 1 else len(tokens)
            for start in range(done, done + pairs, self.batch_size):
                stop = min(start + self.batch_size, done + pairs)
                raw.append(
                    self.model.read(
                        _rows(ids, start, stop), _rows(mask, start, stop), _rows(tokens, 0, stop - start)
                    )
                )
            done += pairs
        return {"score": standardize(torch.cat(raw))}

    def _tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        with self._tokenizer_lock:
            tokens = self.tokenizer(
                prompts,
                padding="max_length",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        return tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)


def _rows(values: Tensor, start: int, stop: int) -> Tensor:
    """Return rows start to stop; a single row stands for all of them."""
    return values[start:stop] if len(values) > 1 else values.expand(stop - start, *values.shape[1:])


def _blip_config(config: dict[str, Any] | None) -> BlipConfig:
    # A tokenizer's folder may carry BERT's config.json, which does not describe this network.
    if config is None or config.get("model_type") != "blip":
        return blip_vit_l_16_config()
    return BlipConfig.from_dict(config)

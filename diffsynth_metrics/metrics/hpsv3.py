"""HPSv3: the score that people would give an image of a prompt, with the model's uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from diffsynth_metrics.base import MetricCard, PromptMetric, rows_of_pairs
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.inputs import ImagesInput, pair
from diffsynth_metrics.judges.plain_text import without_added_tokens
from diffsynth_metrics.judges.prompts import load_prompts
from diffsynth_metrics.networks.hpsv3 import (
    HPSv3Network,
    build_hpsv3,
    qwen2_vl_config,
    set_frequencies,
)
from diffsynth_metrics.pixels.batches import pixel_lists
from diffsynth_metrics.pixels.preprocessor_config import check_patches
from diffsynth_metrics.pixels.transforms import SmartResize
from diffsynth_metrics.tokens import check_canaries, padded
from diffsynth_metrics.weights.checkpoint import read_layout
from diffsynth_metrics.weights.model_config import ModelConfig
from diffsynth_metrics.weights.placement import execution_device

__all__ = ["HPSv3Metric", "preference_probability"]

Positions = Literal["official", "diffsynth"]

_PIXELS = 256 * 28 * 28


def preference_probability(mu_a: Tensor, sigma_a: Tensor, mu_b: Tensor, sigma_b: Tensor) -> Tensor:
    """Return the probability that a is preferred to b, in float64 ``[N]``.

    The model says that a score is normal around mu with deviation sigma, and was trained with the
    Bradley-Terry likelihood of two such scores. So this is the expectation of ``sigmoid(z)`` for z
    normal around ``mu_a - mu_b`` with variance ``sigma_a ** 2 + sigma_b ** 2``. Training estimates its
    integral from 1,000 samples; here it is a sum of 2,001 terms that is exact to 1e-12.
    """
    mean = (mu_a.double() - mu_b.double()).unsqueeze(-1)
    deviation = torch.hypot(sigma_a.double(), sigma_b.double()).unsqueeze(-1)
    # A sigmoid is the distribution function of a logistic variable, so the same number is
    # P(logistic < mean + deviation * normal). Either variable can be the one that is summed over; the
    # sum converges exponentially where the other one varies slowly.
    grid = torch.linspace(-1, 1, 2001, dtype=torch.float64, device=mean.device)
    normal, logistic = 10 * grid, 40 * grid
    narrow = torch.softmax(-(normal**2) / 2, -1) * torch.sigmoid(mean + deviation.clamp(max=1) * normal)
    density = torch.sigmoid(logistic) * torch.sigmoid(-logistic)
    wide = density / density.sum() * torch.special.ndtr((mean - logistic) / deviation.clamp(min=1))
    return torch.where(deviation > 1, wide, narrow).sum(dim=-1)


class HPSv3Metric(PromptMetric):
    """HPSv3: the mean of the score that Qwen2-VL with a reward head predicts for a prompt and an image.

    Open scale: models average about -0.2 to 10.6; single images reach 15. :meth:`evaluate` adds the
    model's own uncertainty, and :meth:`preference` compares two images with it. See
    ``HPSv3Metric.card``.

    Options: ``max_pixels`` and ``min_pixels`` of a resized image, by default both the published 256 * 28
    * 28; ``positions``, ``"official"`` (default) numbers all tokens in sequence, as the authors trained
    the model, ``"diffsynth"`` gives image tokens Qwen2-VL's rows and columns, as ``diffsynth.metrics``
    does.
    """

    card = MetricCard(
        name="HPSv3",
        inputs="prompt and image",
        range="open; averages of models are about -0.2 to 10.6",
        higher_is_better=True,
        definition="mu of [mu, log sigma] = MLP(h_<|Reward|>), h from Qwen2-VL-7B",
        paper="https://arxiv.org/abs/2508.03789",
        repository="https://github.com/MizzenAI/HPSv3",
        code_license="MIT",
        weights_license="MIT (HPSv3), Apache-2.0 (Qwen2-VL-7B)",
        notes="The 0 to 10 in the model's instruction is wording, not the range of the score.",
        good_for="which picture of a prompt people prefer, with an uncertainty",
        download="16.6 GB",
        memory="15.5 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="HPSv3/model.safetensors"
    )
    default_processor = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="HPSv3/*.[jt]*"
    )
    processor_files = ("tokenizer.json", "vocab.json")
    official_dtype = torch.bfloat16
    float32_parts = ("rm_head",)
    unused_weights = ("lm_head.weight",)
    default_batch_size = 8
    supports_device_map = True
    positional = (
        "score_index",
        "use_special_tokens",
        "max_pixels",
        "min_pixels",
        "processor_kwargs",
        "vram_limit",
    )
    neutral: ClassVar = {"score_index": 0, "use_special_tokens": True, "vram_limit": None}
    model: HPSv3Network
    transform: SmartResize

    def __init__(
        self,
        model: HPSv3Network,
        processor: PreTrainedTokenizerFast,
        *,
        max_pixels: int = _PIXELS,
        min_pixels: int = _PIXELS,
        positions: Positions = "official",
        **base: Any,
    ) -> None:
        """Wrap a loaded network and its tokenizer; users call :meth:`from_pretrained`."""
        self.check_options(max_pixels=max_pixels, min_pixels=min_pixels, positions=positions)
        super().__init__(model, processor, **base)
        self.transform = SmartResize(min_pixels=min_pixels, max_pixels=max_pixels)
        self.positions = positions
        self.tokenizer = processor
        self._frame = _Frame(processor, model.config.text_config.vocab_size)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check ``positions``, ``min_pixels`` and ``max_pixels``."""
        positions = options.get("positions", "official")
        if positions not in ("official", "diffsynth"):
            raise ValueError(f"positions must be 'official' or 'diffsynth', got {positions!r}")
        pixels = {name: options.get(name, _PIXELS) for name in ("min_pixels", "max_pixels")}
        SmartResize(**pixels)

    @classmethod
    def read_config(cls, model_config: ModelConfig, files: Sequence[Path]) -> dict[str, Any] | None:
        """Return the architecture, with the number of tokens that the weights have.

        The authors resize Qwen2-VL's padded embedding to the tokenizer and leave its config as it was.
        """
        config = super().read_config(model_config, files)
        embedding = read_layout(files).get("model.embed_tokens.weight")
        if config is None or embedding is None:
            return config
        vocabulary = {"vocab_size": embedding[0]}
        if "text_config" in config:
            return {**config, "text_config": {**config["text_config"], **vocabulary}}
        return {**config, **vocabulary}

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> HPSv3Network:
        """Build the network, see :meth:`BaseMetric.build`."""
        return build_hpsv3(qwen2_vl_config(config))

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Round the rotary frequencies as the authors' code does."""
        assert isinstance(model, HPSv3Network)
        set_frequencies(model, dtype)
        return model

    @classmethod
    def load_processor(
        cls, folder: Path, model: Any, **processor_kwargs: Any
    ) -> PreTrainedTokenizerFast:
        """Load Qwen2-VL's tokenizer, and refuse another model's tokenizer or preprocessing."""
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **processor_kwargs)
        check_canaries(tokenizer, folder, model.config.text_config.vocab_size)
        check_patches(folder, model.config.vision_config, SmartResize.mean, SmartResize.std)
        return tokenizer

    @property
    def device(self) -> torch.device:
        """The device that takes the inputs of the network, and gives its scores."""
        return execution_device(self.model)

    def preference(
        self, prompt: str | Sequence[str], image_a: ImagesInput, image_b: ImagesInput
    ) -> list[float]:
        """Compute the model's probability that image a is preferred to image b.

        Args:
            prompt: One prompt for all pairs of images, or as many prompts as pairs.
            image_a: One image or several, as :meth:`compute` takes them.
            image_b: As many as `image_a`; one image (not in a list) stands against all of the others.

        Returns:
            One probability per pair. It uses both means and both deviations, see
            :func:`preference_probability`, and the two orders of a pair sum to 1.

        Raises:
            ValueError: The numbers of images or prompts do not pair.
        """
        count_a, count_b = (pair(prompt, images)[2] for images in (image_a, image_b))
        if count_a != count_b and 1 not in (count_a, count_b):
            raise ValueError(f"got {count_a} images a and {count_b} images b; pass as many of each")
        with torch.no_grad():
            a, b = (self.components(prompt, images) for images in (image_a, image_b))
            probabilities = preference_probability(a["mu"], a["sigma"], b["mu"], b["sigma"])
        return [float(value) for value in probabilities.tolist()]

    def components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        """Compute ``"score"`` and ``"mu"`` (the same number), and ``"sigma"``, the model's uncertainty.

        ``"sigma"`` is the standard deviation that the model gives a score, in the units of the score.
        See :meth:`PromptMetric.components`.
        """
        prompts, checked, count = pair(prompt, images)
        texts = [self._frame.encode(text, index) for index, text in enumerate(prompts)]
        factor, read = self.transform.factor, []
        encoded = (
            [
                (tokens, (image.shape[-2] // factor, image.shape[-1] // factor))
                for tokens, image in zip(self._encode(pixels), pixels, strict=True)
            ]
            for pixels in pixel_lists(
                checked, self.transform, batch_size=self.batch_size, device=self.device
            )
        )
        for pictures, rows in rows_of_pairs(encoded, len(checked), count, self.batch_size):
            size = rows.stop - rows.start
            pictures = pictures if len(pictures) == size else pictures * size
            read.append(self._read(texts[rows] if len(texts) > 1 else texts * size, pictures))
        mu, log_sigma = torch.cat(read).unbind(dim=-1)
        return {"score": mu, "mu": mu, "sigma": log_sigma.exp()}

    def _encode(self, pixels: list[Tensor]) -> list[Tensor]:
        return self.model.encode_images([image.to(self.dtype) for image in pixels])

    def _read(self, texts: list[list[int]], pictures: list[tuple[Tensor, tuple[int, int]]]) -> Tensor:
        """Return the reward head's output ``[B, 2]`` for token ids and the image of each row."""
        grids = [grid for _, grid in pictures]
        frame = self._frame
        rows = [
            [*frame.before, *[frame.image_id] * math.prod(grid), *text]
            for grid, text in zip(grids, texts, strict=True)
        ]
        length = max(map(len, rows))
        ids = padded(rows, frame.reward_id)
        positions = torch.arange(length, device="cpu").expand(3, len(rows), length)
        if self.positions == "diffsynth":
            positions = torch.stack([_positions(len(frame.before), *g, length) for g in grids], dim=1)
        last = torch.tensor([len(row) - 1 for row in rows], device="cpu")
        inputs = (ids, ids == frame.image_id, last, positions)
        read: Tensor = self.model(
            *(value.to(self.device) for value in inputs), torch.cat([tokens for tokens, _ in pictures])
        )
        return read


class _Frame:
    """The model's instruction around a prompt, as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
        texts = load_prompts("hpsv3")
        self._texts = texts
        # Everything that a user writes is text: this tokenizer knows no special tokens.
        self._plain = without_added_tokens(tokenizer.backend_tokenizer)
        vocabulary = tokenizer.get_vocab()
        # The published tokenizer is Qwen2-VL's; the authors append their token to it.
        self.reward_id: int = vocabulary.get(texts["reward_token"], len(tokenizer))
        needed = {"<|im_start|>", "<|im_end|>", "<|vision_start|>", texts["image_token"]}
        if missing := sorted((needed | {texts["after_image"]}) - vocabulary.keys()):
            raise CheckpointError(
                f"the tokenizer is not Qwen2-VL's: it has no {', '.join(missing)} "
                f"(in {tokenizer.name_or_path})"
            )
        if max(self.reward_id + 1, len(tokenizer)) != vocab_size:
            raise CheckpointError(
                f"the tokenizer does not belong to these weights: with {texts['reward_token']} it has "
                f"{max(self.reward_id + 1, len(tokenizer))} tokens, and the network has {vocab_size} "
                f"(in {tokenizer.name_or_path})"
            )
        self.image_id: int = vocabulary[texts["image_token"]]
        self.before: list[int] = tokenizer.encode(texts["before_image"], add_special_tokens=False)
        self._after: list[int] = [vocabulary[texts["after_image"]]]

    def encode(self, prompt: str, index: int) -> list[int]:
        """Return the ids from the image's end to ``<|Reward|>``; what follows it is never read."""
        texts = self._texts
        suffix, _, _ = texts["suffix"].partition(texts["reward_token"])
        text = texts["instruction"].replace("{text_prompt}", prompt) + suffix
        try:
            plain: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        except Exception as error:  # a lone surrogate is no Unicode text, and Rust refuses it
            raise ValueError(f"prompt {index} cannot be tokenized: {error}") from error
        return [*self._after, *plain, self.reward_id]


def _positions(before: int, height: int, width: int, length: int) -> Tensor:
    """Return Qwen2-VL's own positions ``[3, length]``: time, row and column of image tokens."""
    after = length - before - height * width
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1) + before
    start = before + max(height, width)
    return torch.cat(
        [torch.arange(before).expand(3, -1), image, torch.arange(start, start + after).expand(3, -1)],
        dim=1,
    )

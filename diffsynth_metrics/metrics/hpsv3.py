"""HPSv3: the score that people would give an image of a prompt, with the model's uncertainty."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2VLConfig
from typing_extensions import Self

from diffsynth_metrics.base import MetricCard, PromptMetric, check_loading
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.inputs import ImagesInput, pair
from diffsynth_metrics.judges.plain_text import without_added_tokens
from diffsynth_metrics.networks.gradient_checkpointing import checkpoint_blocks
from diffsynth_metrics.networks.hpsv3 import HPSv3Network, build_hpsv3, qwen2_vl_7b_config
from diffsynth_metrics.pixels.batches import pixel_lists
from diffsynth_metrics.pixels.transforms import SmartResize
from diffsynth_metrics.weights.checkpoint import load_weights, read_layout
from diffsynth_metrics.weights.model_config import ModelConfig
from diffsynth_metrics.weights.placement import DeviceMap, check_device_map, execution_device, place

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
    """

    card: ClassVar[MetricCard] = MetricCard(
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
    )
    default_model: ClassVar[ModelConfig] = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="HPSv3/model.safetensors"
    )
    default_processor: ClassVar[ModelConfig] = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="HPSv3/*.[jt]*"
    )
    processor_files: ClassVar[tuple[str, ...]] = ("tokenizer.json", "vocab.json")
    model: HPSv3Network

    def __init__(
        self,
        model: HPSv3Network,
        tokenizer: PreTrainedTokenizerFast,
        *,
        transform: SmartResize,
        positions: Positions,
        batch_size: int,
    ) -> None:
        """Wrap a loaded network and tokenizer; users call :meth:`from_pretrained`."""
        _check_options(positions, None)
        super().__init__(model, batch_size=batch_size)
        self.transform = transform
        self.positions = positions
        self.tokenizer = tokenizer
        self._frame = _Frame(tokenizer, model.config.text_config.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        processor_config: ModelConfig | None = None,
        *,
        device: str | torch.device | None = None,
        device_map: DeviceMap | None = None,
        torch_dtype: torch.dtype | None = None,
        batch_size: int = 8,
        max_pixels: int = _PIXELS,
        min_pixels: int = _PIXELS,
        positions: Positions = "official",
        processor_kwargs: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Load the metric.

        Args:
            model_config: Where the weights are; the published ones by default. A ``config.json`` next
                to them gives the architecture, otherwise it is Qwen2-VL-7B.
            processor_config: Where the tokenizer is; next to the weights or published by default.
            device: Any torch device; the best that torch reports by default.
            device_map: Instead of `device`, several: ``"auto"``, ``"balanced"``, ``"sequential"``, or
                names of modules to devices such as ``{"visual": 0, "model": 1, "rm_head": 1}``.
            torch_dtype: Dtype of the towers; bfloat16 by default, as the authors run it. The reward
                head keeps the file's values and runs in float32 in any case.
            batch_size: The largest number of pairs in the network at once. It bounds memory and does
                not change scores.
            max_pixels: The most pixels of a resized image; the published value by default.
            min_pixels: The fewest pixels of a resized image; the published value by default.
            positions: ``"official"`` numbers all tokens in sequence, as the authors trained the model.
                ``"diffsynth"`` gives image tokens the rows and columns that Qwen2-VL has, which is what
                ``diffsynth.metrics`` computes.
            processor_kwargs: Goes to the tokenizer's ``from_pretrained``; without ``local_files_only``,
                which is always True.
            gradient_checkpointing: Whether :meth:`reward` computes the towers' blocks again on the way
                back, which takes less memory and more time. Scores and gradients are the same.

        Raises:
            CheckpointError: The files do not hold this metric's weights or tokenizer.
            DownloadError: The files could not be had.
            ValueError: An argument is out of its range, or `device` and `device_map` are both given.
        """
        if device is not None and device_map is not None:
            raise ValueError("pass either device or device_map")
        _check_options(positions, processor_kwargs)
        check_device_map(device_map)
        first, dtype = check_loading(
            model_config,
            processor_config,
            device=device,
            torch_dtype=torch_dtype,
            batch_size=batch_size,
            official=torch.bfloat16,
        )
        transform = SmartResize(min_pixels=min_pixels, max_pixels=max_pixels)
        files, processor = cls._resolve(model_config, processor_config)
        model: Any = build_hpsv3(_qwen2_vl_config(cls._architecture(model_config, files), files), dtype)
        load_weights(
            model,
            files,
            metric=cls.__name__,
            # Mapped from the files on the CPU, where they are not copied, before they are spread.
            device=first if device_map is None else torch.device("cpu"),
            dtype=dtype,
            float32=("rm_head",),
            unused=("lm_head.weight",),
        )
        if gradient_checkpointing:
            checkpoint_blocks(model)
        if device_map is not None:
            model = place(model, device_map, dtype)
        tokenizer = AutoTokenizer.from_pretrained(
            cls._processor_folder(processor), local_files_only=True, **(processor_kwargs or {})
        )
        return cls(model, tokenizer, transform=transform, positions=positions, batch_size=batch_size)

    @property
    def device(self) -> torch.device:
        """The device that takes the inputs of the network, and gives its scores."""
        return execution_device(self.model)

    def evaluate(self, prompt: str | Sequence[str], images: ImagesInput) -> list[dict[str, float]]:
        """Score like :meth:`compute`, with the model's uncertainty.

        Returns:
            One dict per pair: ``"score"`` and ``"mu"`` (the same number), and ``"sigma"``, the standard
            deviation that the model gives it, in the units of the score.
        """
        return super().evaluate(prompt, images)

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
        with self._scoring(gradients=False):
            a, b = (self._components(prompt, images) for images in (image_a, image_b))
            probabilities = preference_probability(a["mu"], a["sigma"], b["mu"], b["sigma"])
        return [float(value) for value in probabilities.tolist()]

    def _components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        prompts, checked, count = pair(prompt, images)
        texts = [self._frame.encode(text, index) for index, text in enumerate(prompts)]
        read: list[Tensor] = []
        done = 0
        # One image for many prompts is encoded once; otherwise each batch of images has its prompts.
        for pixels in pixel_lists(
            checked, self.transform, batch_size=self.batch_size, device=self.device
        ):
            tokens = self.model.encode_images([image.to(self.dtype) for image in pixels])
            factor = self.transform.factor
            grids = [(image.shape[-2] // factor, image.shape[-1] // factor) for image in pixels]
            pairs = count if len(checked) == 1 else len(pixels)
            for start in range(done, done + pairs, self.batch_size):
                stop = min(start + self.batch_size, done + pairs)
                read.append(
                    self._read(
                        _rows(texts, start, stop),
                        _rows(grids, 0, stop - start),
                        _rows(tokens, 0, stop - start),
                    )
                )
            done += pairs
        mu, log_sigma = torch.cat(read).unbind(dim=-1)
        return {"score": mu, "mu": mu, "sigma": log_sigma.exp()}

    def _read(
        self, texts: list[list[int]], grids: list[tuple[int, int]], tokens: list[Tensor]
    ) -> Tensor:
        """Return the reward head's output ``[B, 2]`` for token ids and the image of each row."""
        frame = self._frame
        rows = [
            [*frame.before, *[frame.image_id] * math.prod(grid), *text]
            for grid, text in zip(grids, texts, strict=True)
        ]
        length = max(map(len, rows))
        ids = torch.tensor([row + [frame.reward_id] * (length - len(row)) for row in rows])
        positions = torch.arange(length).expand(3, len(rows), length)
        if self.positions == "diffsynth":
            positions = torch.stack([_positions(len(frame.before), *g, length) for g in grids], dim=1)
        last = torch.tensor([len(row) - 1 for row in rows])
        inputs = (ids, ids == frame.image_id, last, positions)
        read: Tensor = self.model(*(value.to(self.device) for value in inputs), torch.cat(tokens))
        return read


def _check_options(positions: object, processor_kwargs: Mapping[str, Any] | None) -> None:
    """Check what is HPSv3's own and needs no files, so that a mistake does not cost loading 16 GB."""
    if positions not in ("official", "diffsynth"):
        raise ValueError(f"positions must be 'official' or 'diffsynth', got {positions!r}")
    if not isinstance(processor_kwargs, (Mapping, type(None))):
        raise TypeError(f"processor_kwargs must be a mapping, got {type(processor_kwargs).__name__}")
    if "local_files_only" in (processor_kwargs or {}):
        raise TypeError("processor_kwargs may not have local_files_only, which is always True")


class _Frame:
    """The model's instruction around a prompt, as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
        texts = _texts()
        self._texts = texts
        # Everything that a user writes is text: this tokenizer knows no special tokens.
        self._plain = without_added_tokens(tokenizer.backend_tokenizer)
        vocabulary = tokenizer.get_vocab()
        # The published tokenizer is Qwen2-VL's; the authors append their token to it.
        self.reward_id: int = vocabulary.get(texts["reward_token"], len(tokenizer))
        needed = {"<|im_start|>", "<|im_end|>", "<|vision_start|>", texts["image_token"]}
        if missing := sorted((needed | {texts["after_image"]}) - vocabulary.keys()):
            raise CheckpointError(f"the tokenizer is not Qwen2-VL's: it has no {', '.join(missing)}")
        if max(self.reward_id + 1, len(tokenizer)) != vocab_size:
            raise CheckpointError(
                f"the tokenizer does not belong to these weights: with {texts['reward_token']} it has "
                f"{max(self.reward_id + 1, len(tokenizer))} tokens, and the network has {vocab_size}"
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


@cache
def _texts() -> dict[str, str]:
    path = Path(__file__).parents[1] / "judges" / "prompts" / "hpsv3.json"
    texts: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return texts


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


def _rows(values: list[Any], start: int, stop: int) -> list[Any]:
    """Return items start to stop; a single item stands for all of them."""
    return values[start:stop] if len(values) > 1 else values * (stop - start)


def _qwen2_vl_config(config: dict[str, Any] | None, files: Sequence[Path]) -> Qwen2VLConfig:
    if config is None:
        return qwen2_vl_7b_config()
    if config.get("model_type") != "qwen2_vl":
        raise CheckpointError(
            f"the config.json next to the weights describes a {config.get('model_type')!r} network, and "
            "HPSv3 is a 'qwen2_vl'"
        )
    qwen = Qwen2VLConfig.from_dict(config)
    # The authors resize Qwen2-VL's padded embedding to the tokenizer and leave its config as it was.
    embedding = read_layout(files).get("model.embed_tokens.weight")
    if embedding is not None:
        qwen.text_config.vocab_size = embedding[0]
    return qwen

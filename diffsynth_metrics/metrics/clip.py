"""CLIP score of OpenCLIP ViT-H/14: how well an image fits a text, exp(logit_scale) * cosine."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer
from typing_extensions import Self

from diffsynth_metrics.base import MetricCard, check_loading, check_max_length
from diffsynth_metrics.dual_encoder import DualEncoderMetric
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.locks import Lock
from diffsynth_metrics.networks.class_token import class_token_of_clip
from diffsynth_metrics.networks.gradient_checkpointing import checkpoint_blocks
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.weights.checkpoint import load_weights, read_config
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["CLIPMetric", "build_clip", "clip_score", "vit_h_14_config"]


def clip_score(cosine: Tensor, logit_scale: Tensor) -> Tensor:
    """Return exp(logit_scale) * cosine, the logit that CLIP was trained with.

    Args:
        cosine: Cosines of text and image features, any shape.
        logit_scale: Scalar, the logarithm of the scale; about ln(100) in trained models.
    """
    return logit_scale.to(cosine.dtype).exp() * cosine


def vit_h_14_config() -> CLIPConfig:
    """Return the published architecture of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    The activation is the exact gelu. ``diffsynth.metrics`` computes this network with quick_gelu,
    which is OpenAI's ViT-L/14 and not this one.
    """
    shared = {"hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 1024}
    return CLIPConfig(
        projection_dim=1024,
        text_config=shared | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        vision_config=shared
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "patch_size": 14,
        },
    )


def build_clip(config: CLIPConfig) -> CLIPModel:
    """Build the network with its parameters on the meta device and its position ids in memory."""
    with torch.device("meta"):
        model = CLIPModel(config)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    return model


class CLIPMetric(DualEncoderMetric):
    """CLIP score: exp(logit_scale) * cos(text, image), unclamped, without a prompt prefix.

    Prompts are cut to 77 tokens. See ``CLIPMetric.card`` for range, paper and licences.
    """

    card: ClassVar[MetricCard] = MetricCard(
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
    )
    default_model: ClassVar[ModelConfig] = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="CLIP-ViT-H-14-laion2B-s32B-b79K/model.safetensors",
    )
    default_processor: ClassVar[ModelConfig] = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="CLIP-ViT-H-14-laion2B-s32B-b79K/*.[jt]*",
    )
    processor_files: ClassVar[tuple[str, ...]] = ("tokenizer.json", "vocab.json")
    model: CLIPModel
    _network: CLIPModel
    transform: ShortestEdgeCrop

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, *, max_length: int, batch_size: int
    ) -> None:
        """Wrap a loaded network and tokenizer; users call :meth:`from_pretrained`."""
        transform = ShortestEdgeCrop(model.config.vision_config.image_size)
        super().__init__(model, transform=transform, batch_size=batch_size)
        self.tokenizer = tokenizer
        self.max_length = max_length
        # A fast tokenizer keeps its padding in shared state, and refuses concurrent calls.
        self._tokenizer_lock = Lock()

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        processor_config: ModelConfig | None = None,
        *,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        batch_size: int = 16,
        max_length: int = 77,
        processor_kwargs: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Load the metric.

        Args:
            model_config: Where the weights are; the published ones by default. A ``config.json`` next
                to them gives the architecture, otherwise it is ViT-H/14.
            processor_config: Where the tokenizer is; by default next to local weights, else the
                published one.
            device: Any torch device; the best that torch reports by default.
            torch_dtype: Dtype of the towers; float32 by default. Projections and scores are float32
                in any case.
            batch_size: The largest number of images or prompts in the network at once. It bounds
                memory and does not change scores.
            max_length: Prompts are cut to this number of tokens, begin and end included: at least 3,
                at most the network's 77.
            processor_kwargs: Passed to the tokenizer's ``from_pretrained``.
            gradient_checkpointing: Whether :meth:`reward` computes the towers' blocks again on the way
                back, which takes less memory and more time. Scores and gradients are the same.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
            ValueError: `batch_size` or `max_length` is out of its range.
        """
        check_max_length(max_length)
        place, dtype = check_loading(
            model_config, processor_config, device=device, torch_dtype=torch_dtype, batch_size=batch_size
        )
        files, processor = cls._resolve(model_config, processor_config)
        config = _clip_config(cls._architecture(model_config, files))
        model = build_clip(config)
        load_weights(
            model,
            files,
            metric=cls.__name__,
            device=place,
            dtype=dtype,
            float32=("logit_scale", "text_projection", "visual_projection"),
        )
        if gradient_checkpointing:
            checkpoint_blocks(model)
        folder = cls._processor_folder(processor)
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, local_files_only=True, **(processor_kwargs or {})
        )
        _check_tokenizer(tokenizer, config.text_config, folder)
        max_length = min(max_length, config.text_config.max_position_embeddings)
        metric = cls(model, tokenizer, max_length=max_length, batch_size=batch_size)
        metric.remembers_prompts = True
        _check_preprocessor(folder, metric.transform)
        return metric

    def _embed_images(self, pixel_values: Tensor) -> Tensor:
        model = self._network
        pooled = class_token_of_clip(model.vision_model, pixel_values)
        projection: Tensor = model.visual_projection(pooled.to(model.visual_projection.weight.dtype))
        return projection

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        model = self._network
        with self._tokenizer_lock:
            tokens = self.tokenizer(
                prompts,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        # Attention is causal and pooling happens at the first end-of-text token, so the padding
        # behind it is never seen and needs no mask.
        pooled = model.text_model(input_ids=tokens["input_ids"].to(self.device)).pooler_output
        projection: Tensor = model.text_projection(pooled.to(model.text_projection.weight.dtype))
        return projection

    def _text_settings(self) -> Hashable:
        return self.max_length

    def _score(self, cosine: Tensor) -> Tensor:
        return clip_score(cosine, self._network.logit_scale)


def _check_tokenizer(tokenizer: CLIPTokenizer, config: CLIPTextConfig, folder: Path) -> None:
    """Refuse another model's tokenizer, whose tokens would mean something else to the network."""
    size = config.vocab_size
    # transformers takes an id of 2, which old configs have, for "the largest id of the prompt".
    end = size - 1 if config.eos_token_id == 2 else config.eos_token_id
    if len(tokenizer) > size or tokenizer.eos_token_id != end:
        raise CheckpointError(
            f"the tokenizer in {folder} belongs to another model: it has {len(tokenizer)} tokens and "
            f"ends texts with {tokenizer.eos_token_id}, the network has {size} and reads texts at {end}"
        )


def _check_preprocessor(folder: Path, transform: ShortestEdgeCrop) -> None:
    """Refuse a processor that prepares pictures in another way than this metric does."""
    config = read_config([folder / "preprocessor_config.json"], "preprocessor_config.json") or {}
    square = {"height": transform.size, "width": transform.size}
    accepted: dict[str, list[Any]] = {
        "image_mean": [list(transform.mean)],
        "image_std": [list(transform.std)],
        "size": [transform.size, {"shortest_edge": transform.size}, square],
        "crop_size": [transform.size, square],
        "resample": [3],
        **{step: [True] for step in ("do_resize", "do_center_crop", "do_normalize", "do_rescale")},
    }
    for name, values in accepted.items():
        if name in config and config[name] not in values:
            raise CheckpointError(
                f"{folder / 'preprocessor_config.json'} belongs to another model: it has {name} = "
                f"{config[name]!r}, and this metric's pictures are prepared with {values[0]!r}"
            )


def _clip_config(config: dict[str, Any] | None) -> CLIPConfig:
    if config is None:
        return vit_h_14_config()
    if config.get("model_type") != "clip":
        raise CheckpointError(
            f"the config.json next to the weights describes a {config.get('model_type')!r} model, "
            "not 'clip'"
        )
    return CLIPConfig.from_dict(config)

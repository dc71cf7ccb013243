"""HPSv2: human preference score, the cosine of OpenCLIP ViT-H/14 fine-tuned on HPD v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import open_clip
import torch
from torch import Tensor, nn
from typing_extensions import Self

from diffsynth_metrics.base import MetricCard, check_loading
from diffsynth_metrics.dual_encoder import DualEncoderMetric
from diffsynth_metrics.errors import CheckpointError
from diffsynth_metrics.inputs import ImagesInput
from diffsynth_metrics.networks.class_token import class_token_of_open_clip
from diffsynth_metrics.networks.gradient_checkpointing import checkpoint_blocks
from diffsynth_metrics.pixels.transforms import Letterbox
from diffsynth_metrics.weights.checkpoint import load_weights
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["HPSv2Metric", "build_open_clip", "hps_v2"]


def hps_v2(cosine: Tensor, logit_scale: Tensor, scale: Literal["official", "diffsynth"]) -> Tensor:
    """Return HPSv2: the cosine itself, or exp(logit_scale) * cosine as ``diffsynth.metrics`` does.

    Args:
        cosine: Cosines of text and image features, any shape.
        logit_scale: Scalar, the logarithm of the scale; used with ``"diffsynth"`` only.
        scale: Whose number to return.
    """
    return cosine if scale == "official" else logit_scale.to(cosine.dtype).exp() * cosine


def build_open_clip(config: dict[str, Any]) -> open_clip.CLIP:
    """Build open_clip's CLIP with its parameters on the meta device and its causal mask in memory."""
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    model.attn_mask = torch.full((model.context_length,) * 2, float("-inf")).triu(1)
    return model


class HPSv2Metric(DualEncoderMetric):
    """HPSv2: cos(text, image), about 0.2 to 0.35; papers print it times 100.

    Images are letterboxed, not cropped, and prompts go through open_clip's tokenizer (ftfy, HTML
    entities, lower case, 77 tokens). The network stands for v2.0 and v2.1 alike; which of the two a
    file is cannot be told from its layout. See ``HPSv2Metric.card``.
    """

    card: ClassVar[MetricCard] = MetricCard(
        name="HPSv2",
        inputs="prompt and image",
        range="about 0.2 to 0.35; evaluate() adds the percent that papers print",
        higher_is_better=True,
        definition="cos(text, image)",
        paper="https://arxiv.org/abs/2306.09341",
        repository="https://github.com/tgxs002/HPSv2",
        code_license="Apache-2.0",
        weights_license="Apache-2.0 (of the repository; the weights' card was not verified)",
        notes="Scores of v2.0 and v2.1 weights are not comparable; compare images of one prompt.",
    )
    default_model: ClassVar[ModelConfig] = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="HPSv2/model.safetensors"
    )
    model: open_clip.CLIP
    _network: open_clip.CLIP

    def __init__(
        self,
        model: open_clip.CLIP,
        *,
        scale: Literal["official", "diffsynth"],
        antialias: bool,
        batch_size: int,
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        size = model.visual.image_size
        transform = Letterbox(size[0] if isinstance(size, tuple) else size, antialias=antialias)
        super().__init__(model, transform=transform, batch_size=batch_size)
        self.scale = scale
        self.tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        processor_config: ModelConfig | None = None,
        *,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        batch_size: int = 16,
        scale: Literal["official", "diffsynth"] = "official",
        antialias: bool = True,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Load the metric.

        Args:
            model_config: Where the weights are; the published ones by default. An
                ``open_clip_config.json`` next to them gives the architecture, otherwise it is
                ViT-H/14.
            processor_config: Accepted as in ``diffsynth.metrics`` and not needed: the tokenizer is
                open_clip's, which carries its vocabulary.
            device: Any torch device; the best that torch reports by default.
            torch_dtype: Dtype of the towers; float32 by default. Projections and scores are float32
                in any case. (The authors run under fp16 autocast on CUDA.)
            batch_size: The largest number of images or prompts in the network at once. It bounds
                memory and does not change scores.
            scale: ``"official"`` for the cosine, ``"diffsynth"`` for exp(logit_scale) * cosine.
            gradient_checkpointing: Whether :meth:`reward` computes the towers' blocks again on the way
                back, which takes less memory and more time. Scores and gradients are the same.
            antialias: Whether shrinking filters the image. True is what the authors' code does under
                torchvision 0.17 and later; False is what it did before, when v2.0 was published.

        Raises:
            ValueError: `scale` is unknown.
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
        """
        if scale not in ("official", "diffsynth"):
            raise ValueError(f"scale must be 'official' or 'diffsynth', got {scale!r}")
        place, dtype = check_loading(
            model_config, processor_config, device=device, torch_dtype=torch_dtype, batch_size=batch_size
        )
        files = cls._weights(model_config)
        model = build_open_clip(
            _open_clip_config(cls._architecture(model_config, files, "open_clip_config.json"))
        )
        load_weights(
            model,
            files,
            metric=cls.__name__,
            device=place,
            dtype=dtype,
            float32=("logit_scale", "text_projection", "visual.proj"),
        )
        _detach_heads(model)
        if gradient_checkpointing:
            checkpoint_blocks(model)
        metric = cls(model, scale=scale, antialias=antialias, batch_size=batch_size)
        metric.remembers_prompts = True
        return metric

    def _components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        components = super()._components(prompt, images)
        return {**components, "percent": 100 * components["cosine"]}

    def _embed_images(self, pixel_values: Tensor) -> Tensor:
        pooled = class_token_of_open_clip(self._network.visual, pixel_values.to(self.dtype))
        head: Tensor = self._network.heads["visual"]
        return pooled.to(head.dtype) @ head

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        pooled: Tensor = self._network.encode_text(self.tokenizer(prompts).to(self.device))
        head: Tensor = self._network.heads["text"]
        return pooled.to(head.dtype) @ head

    def _score(self, cosine: Tensor) -> Tensor:
        return hps_v2(cosine, self._network.logit_scale, self.scale)


def _detach_heads(model: open_clip.CLIP) -> None:
    """Take the projections out of the towers, which then end with the pooled features."""
    model.heads = nn.ParameterDict({"visual": model.visual.proj, "text": model.text_projection})
    model.visual.proj = None
    model.text_projection = None


def _open_clip_config(config: dict[str, Any] | None) -> dict[str, Any]:
    model_config = open_clip.get_model_config("ViT-H-14") if config is None else config.get("model_cfg")
    if not isinstance(model_config, dict):
        raise CheckpointError("the open_clip_config.json next to the weights has no 'model_cfg'")
    return model_config

"""HPSv2: human preference score, the cosine of OpenCLIP ViT-H/14 fine-tuned on HPD v2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import open_clip
from torch import Tensor

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.inputs import ImagesInput
from diffsynth_metrics.networks.open_clip import build_open_clip
from diffsynth_metrics.open_clip_encoder import OpenCLIPMetric
from diffsynth_metrics.pixels.transforms import Letterbox
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["HPSv2Metric", "hps_v2"]


def hps_v2(cosine: Tensor, logit_scale: Tensor, scale: Literal["official", "diffsynth"]) -> Tensor:
    """Return HPSv2: the cosine itself, or exp(logit_scale) * cosine as ``diffsynth.metrics`` does.

    Cosines have any shape; `logit_scale`, the logarithm of the scale, matters with ``"diffsynth"`` only.
    """
    return cosine if scale == "official" else logit_scale.to(cosine.dtype).exp() * cosine


class HPSv2Metric(OpenCLIPMetric):
    """HPSv2: cos(text, image), about 0.2 to 0.35; papers print it times 100.

    Images are letterboxed, not cropped, and prompts go through open_clip's tokenizer (ftfy, HTML
    entities, lower case, 77 tokens). The network stands for v2.0 and v2.1 alike, and their scores are
    not comparable: ``version`` is what the names of file and folder say, or "unknown". See
    ``HPSv2Metric.card``.

    Options: ``scale``, ``"official"`` (default) for the cosine or ``"diffsynth"`` for exp(logit_scale) *
    cosine; ``antialias``, whether shrinking filters the image: True (default) is what the authors' code
    does under torchvision 0.17 and later, False what it did before, when v2.0 was published;
    ``cache_text``, see :class:`DualEncoderMetric`. The authors run under fp16 autocast on CUDA, here it
    is float32.
    """

    card = MetricCard(
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
        good_for="which picture of a prompt people prefer, at little cost",
        download="3.9 GB",
        memory="3.9 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern="HPSv2/model.safetensors"
    )
    build = staticmethod(build_open_clip)
    version = "unknown"

    def __init__(
        self,
        model: open_clip.CLIP,
        processor: None = None,
        *,
        scale: Literal["official", "diffsynth"] = "official",
        antialias: bool = True,
        **base: Any,
    ) -> None:
        """Wrap a loaded network; users call :meth:`from_pretrained`."""
        self.check_options(scale=scale)
        super().__init__(model, processor, **base)
        self.transform = Letterbox(model.visual.image_size[0], antialias=antialias)
        self.scale = scale

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check ``scale``."""
        if options.get("scale", "official") not in ("official", "diffsynth"):
            raise ValueError(f"scale must be 'official' or 'diffsynth', got {options['scale']!r}")

    def describe(self) -> None:
        """Say in the card which HPSv2 it is, where the names of the files tell."""
        names = "\n".join(part for file in self.weight_files for part in reversed(file.parts[-3:]))
        if found := re.search(r"hps[-_ ]?v?2[._]([01])(?!\d)", names, re.IGNORECASE):
            self.version = f"2.{found[1]}"
        self.card = replace(self.card, name=f"HPSv2 (version {self.version})")
        super().describe()

    def components(self, prompt: str | Sequence[str], images: ImagesInput) -> dict[str, Tensor]:
        """Compute what :meth:`DualEncoderMetric.components` does, and ``"percent"``, 100 * cosine."""
        components = super().components(prompt, images)
        return {**components, "percent": 100 * components["cosine"]}

    def score_of_cosine(self, cosine: Tensor) -> Tensor:
        """Return :func:`hps_v2`."""
        return hps_v2(cosine, self.model.logit_scale, self.scale)

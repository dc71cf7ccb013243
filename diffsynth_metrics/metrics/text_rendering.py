"""Text rendering: does the picture say what the prompt puts in quotation marks?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffsynth_metrics.base import MetricCard, RowMetric
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import (
    CheckedImage,
    ImagesInput,
    as_pil,
    as_rgb,
    image_name,
    open_image,
    pair,
)
from diffsynth_metrics.networks.ocr import Line, TextReader
from diffsynth_metrics.text_matching import character_accuracy, flow_grpo_reward, match, quoted_texts
from diffsynth_metrics.weights.files import sha256_of

__all__ = ["TextRenderingMetric"]

_SCALES = ("character_accuracy", "flow_grpo")


class TextRenderingMetric(RowMetric):
    """The share of characters in quotation marks that OCR reads in the picture, 0 to 1.

    It reads with rapidocr's PP-OCRv6, Chinese and English, on the CPU; ``pip install
    'diffsynth-metrics[ocr]'`` installs it with its networks, and nothing is downloaded.

    Example:
        >>> metric = TextRenderingMetric.from_pretrained()
        >>> metric.compute('a sign that says "GRAND OPENING"', "sign.png")

    Option ``scale``: ``"character_accuracy"`` (default), or ``"flow_grpo"``, the reward of that
    framework. A prompt without text in quotation marks has no score: NaN, and the reason in
    :meth:`evaluate`. It loads no weights, so there is no ``model_config``. Pictures are read one by one,
    without gradients. See ``TextRenderingMetric.card`` and docs/metrics.md.
    """

    card = MetricCard(
        name="Text rendering (PP-OCRv6)",
        inputs="prompt with text in quotation marks, and image",
        range="0 (nothing of it is there) to 1 (all of it)",
        higher_is_better=True,
        definition="mean of 1 - edit distance / length over the quoted texts, weighted by their lengths",
        paper="https://arxiv.org/abs/2505.05470",
        repository="https://github.com/RapidAI/RapidOCR",
        code_license="Apache-2.0",
        weights_license="Apache-2.0",
        notes="What OCR cannot read counts as wrong: ornate, tiny or steeply rotated letters.",
        good_for="whether a picture says what the prompt quotes",
        download="none",
        memory="0.8 GB",
    )
    default_model = None
    config_file = None
    default_batch_size = 1
    numbers = ("score", *_SCALES)
    model: TextReader

    def __init__(
        self,
        model: TextReader,
        processor: None = None,
        *,
        scale: str = "character_accuracy",
        **base: Any,
    ) -> None:
        """Wrap a reader; users call :meth:`from_pretrained`."""
        self.check_options(scale=scale)
        super().__init__(model, processor, **base)
        self.scale = scale

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> TextReader:
        """Load the networks of the installed rapidocr.

        Raises:
            ImportError: It is not installed; the message has the command.
        """
        return TextReader()

    def describe(self) -> None:
        """Note which networks read."""
        self.weight_files = self.model.files

    @classmethod
    def check_options(cls, *, scale: str = "character_accuracy") -> None:  # type: ignore[override]
        """Check ``scale``."""
        if scale not in _SCALES:
            raise ValueError(f"scale must be one of {', '.join(_SCALES)}; got {scale!r}")

    def evaluate(self, prompt: str | Sequence[str], images: ImagesInput) -> list[dict[str, Any]]:
        """Read pictures and compare them with prompts, which pair as in every metric.

        Args:
            prompt: One prompt for all images, or as many prompts as images.
            images: One image or several, as :meth:`PromptMetric.compute` takes them.

        Returns:
            One dict per pair: ``"score"``, the number of the scale, or None with the reason in
            ``"error"``; ``"character_accuracy"`` and ``"flow_grpo"`` (or None); ``"expected"``, the
            quoted texts, with ``"found"`` and ``"accuracies"``, what came nearest to each; and
            ``"read"``, every line with its ``"confidence"`` and ``"box"`` of four corners (x, y).

        Raises:
            TypeError: An argument is not a prompt or an image.
            ValueError: The numbers of prompts and images differ, or there are none.
            ImageError: An image cannot be read, or one side is more than 20 times the other.
            FileNotFoundError: A path does not exist.
        """
        prompts, checked, count = pair(prompt, images)
        read = [self._read(image, f"image {index}") for index, image in enumerate(checked)]
        prompts = prompts * count if len(prompts) == 1 else prompts
        read = read * count if len(read) == 1 else read
        return [self._row(text, lines) for text, lines in zip(prompts, read, strict=True)]

    @property
    def provenance(self) -> dict[str, Any]:
        """See :attr:`BaseMetric.provenance`; with the packages that read and their networks' sha256."""
        networks = {file.name: sha256_of([file]) for file in self.weight_files}
        made_with = self.model.made_with
        preprocessing = f"rapidocr {made_with['rapidocr']}"
        return {
            **super().provenance,
            "preprocessing": preprocessing,
            "options": {"scale": self.scale},
            "ocr": made_with,
            "networks": networks,
        }

    def _read(self, image: CheckedImage, name: str) -> list[Line]:
        picture = as_pil(image) if isinstance(image, Tensor) else as_rgb(open_image(image, name))
        try:
            lines: list[Line] = self.model(picture)
        except ImageError as error:
            raise ImageError(f"{image_name(name, image)}: {error}") from None
        return lines

    def _row(self, prompt: str, read: list[Line]) -> dict[str, Any]:
        lines = [line["text"] for line in read]
        matches = match(quoted_texts(prompt), lines)
        numbers = {
            "character_accuracy": character_accuracy(matches) if matches else None,
            "flow_grpo": flow_grpo_reward(prompt, lines),
        }
        score = numbers[self.scale]
        straight = " straight" if self.scale == "flow_grpo" else ""
        missing = f"the prompt has no text in{straight} quotation marks: {prompt!r}"
        return {
            "score": score,
            "error": missing if score is None else None,
            **numbers,
            "expected": [one.expected for one in matches],
            "found": [one.found for one in matches],
            "accuracies": [one.accuracy for one in matches],
            "read": read,
        }

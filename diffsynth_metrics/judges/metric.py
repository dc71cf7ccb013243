"""What the judge metrics share: pictures, verbs, and what becomes of an unreadable answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import Tensor, nn
from transformers import AutoProcessor
from typing_extensions import Self

from diffsynth_metrics.base import RowMetric, check_batch_size
from diffsynth_metrics.errors import AnswerError, ImageError
from diffsynth_metrics.inputs import (
    CheckedImage,
    ImagesInput,
    as_pil,
    as_rgb,
    image_name,
    image_size,
    open_image,
    pair,
)
from diffsynth_metrics.judges.answers import READER
from diffsynth_metrics.judges.architectures import build_judge
from diffsynth_metrics.judges.engine import Answer, Engine, Question, checked_count
from diffsynth_metrics.judges.local import LocalEngine, check_max_new_tokens
from diffsynth_metrics.modes import plain_modes
from diffsynth_metrics.pixels.preprocessor_config import check_patches
from diffsynth_metrics.tokens import check_canaries

__all__ = ["JudgeMetric", "mean", "pairs"]

_POLICIES = ("nan", "raise")
_MAX_NEW_TOKENS = 4096
_MAX_RATIO = 200
# Pictures of 537 MB in Pillow's four bytes per pixel: 128 of 1024x1024, which fill many batches.
_PIXELS_AT_ONCE = 2**27


class JudgeMetric(RowMetric):
    """A metric that asks a generative model and reads its answer.

    It only knows an :class:`~diffsynth_metrics.judges.engine.Engine`; ``Metric(engine)`` takes any.
    ``from_pretrained`` loads the network into a :class:`~diffsynth_metrics.judges.local.LocalEngine`.
    Besides what all metrics take it has these options:

    - ``max_new_tokens``: Answers are cut off there, and then say so; 4096 by default, as the authors of
      all three judges have it.
    - ``on_parse_error``: What becomes of an answer that cannot be read. ``"nan"`` (default) is NaN in
      :meth:`compute` and None with the reason in :meth:`evaluate`, ``"raise"`` is an
      :class:`~diffsynth_metrics.AnswerError` in both.

    ``batch_size`` is the largest number of answers that are written at once.
    """

    architecture: ClassVar[str]
    """Name of the published architecture in ``prompts/architectures.json``."""
    image_name: ClassVar[str] = "image {sample}"
    """How an error calls image `image` of sample `sample`."""
    processor_files = ("tokenizer.json", "vocab.json")
    official_dtype = torch.bfloat16
    default_batch_size = 20
    supports_device_map = True
    positional: ClassVar[tuple[str, ...]] = ("max_new_tokens", "processor_kwargs", "vram_limit")

    def __init__(self, engine: Engine, *, on_parse_error: str = "nan") -> None:
        """Ask an engine; :meth:`from_pretrained` loads one.

        Args:
            engine: What answers the questions.
            on_parse_error: See the class.
        """
        if not isinstance(engine, Engine):
            raise TypeError(
                f"a judge asks an Engine, got {type(engine).__name__}; {type(self).__name__}."
                "from_pretrained() loads one"
            )
        self.engine = engine
        self.on_parse_error = _checked_policy(on_parse_error)
        self.weight_files = ()
        self.options = {}

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Build the network, see :meth:`BaseMetric.build`."""
        return build_judge(config, cls.architecture)

    @classmethod
    def load_processor(cls, folder: Path, model: Any, **processor_kwargs: Any) -> Any:
        """Load the processor of images and chat template, and refuse another model's."""
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, **processor_kwargs)
        check_canaries(processor.tokenizer, folder, model.config.text_config.vocab_size)
        vision, half = model.config.vision_config, (0.5, 0.5, 0.5)
        check_patches(folder, vision, half, half, processor.image_processor)
        return processor

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check ``max_new_tokens`` and ``on_parse_error``."""
        check_max_new_tokens(options.get("max_new_tokens", _MAX_NEW_TOKENS))
        _checked_policy(options.get("on_parse_error", "nan"))

    @classmethod
    def assemble(
        cls,
        model: nn.Module,
        processor: Any,
        *,
        batch_size: int | None,
        max_new_tokens: int = _MAX_NEW_TOKENS,
        **options: Any,
    ) -> Self:
        """Make the metric of an engine that runs the network."""
        batch_size = cls.default_batch_size if batch_size is None else batch_size
        engine = LocalEngine(model, processor, batch_size=batch_size, max_new_tokens=max_new_tokens)
        return cls(engine, **options)

    @classmethod
    def from_server(cls, base_url: str, model: str | None = None, **options: Any) -> Self:
        """Ask a server that runs the judge's checkpoint: vLLM, SGLang or ``transformers serve``.

        Args:
            base_url: Such as ``"http://host:8000/v1"``.
            model: The name under which the server has the judge; None: the only one that it has.
            **options: What :class:`~diffsynth_metrics.judges.server.ServerEngine` takes besides
                (``api_key``, ``dialect``, ``concurrency``, ``timeout``, ``retries``, ``max_new_tokens``,
                ``extra_body``), and the metric's own options, see its class.
        """
        from diffsynth_metrics.judges.server import ServerEngine

        of_engine = inspect.signature(ServerEngine).parameters.keys() & options.keys()
        engine = ServerEngine(base_url, model, **{name: options.pop(name) for name in of_engine})
        return cls(engine, **options)

    def describe(self) -> None:
        """See :meth:`BaseMetric.describe`; the engine learns what it runs."""
        super().describe()
        self.engine.weight_files = self.weight_files  # type: ignore[attr-defined]

    @property
    def model(self) -> Any:
        """The network of the engine; an engine that has none in memory is an AttributeError."""
        return self.engine.model  # type: ignore[attr-defined]

    @model.setter
    def model(self, network: nn.Module) -> None:
        self.engine.model = network  # type: ignore[attr-defined]

    @property
    def batch_size(self) -> int:
        """The number of questions that the engine is best asked at once."""
        return self.engine.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int | None) -> None:
        size = self.default_batch_size if batch_size is None else check_batch_size(batch_size)
        self.engine.batch_size = size

    @property
    def device(self) -> torch.device:
        """Where rewards are; for an engine in memory, where the network takes its inputs."""
        return self.engine.device

    def to(
        self,
        device: str | int | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> Self:
        """Move the network and return the metric; an engine may have none to move."""
        if isinstance(getattr(self.engine, "model", None), nn.Module):
            super().to(device, dtype, non_blocking)
        return self

    @property
    def provenance(self) -> dict[str, Any]:
        """See :attr:`BaseMetric.provenance`; with the engine, which may have no network.

        ``"identity"`` is what its answers depend on, ``"reader"`` the version of what reads them.
        """
        if isinstance(getattr(self.engine, "model", None), nn.Module):
            known = super().provenance
        else:
            known = {"metric": type(self).__name__, "name": self.card.name, "weights": None}
        engine = {"engine": type(self.engine).__name__, "identity": self.engine.identity}
        return {**known, **engine, "reader": READER}

    def __repr__(self) -> str:
        """Show which metric it is and its engine."""
        engine = type(self.engine).__name__
        return f"{type(self).__name__}({self.card.name!r}, {engine}, device={str(self.device)!r})"

    def _rows(
        self,
        samples: Sequence[Sequence[CheckedImage]],
        questions: Callable[[int, list[PIL.Image.Image]], list[Question]],
        row: Callable[[int, list[Answer]], dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """Ask about samples in parts, so that the pictures of one part only are in memory.

        Args:
            samples: The images of each sample.
            questions: Makes the questions about a sample of its number and its pictures in RGB.
            row: Makes what :meth:`evaluate` returns of a sample of its number and its answers.
        """
        rows = []
        for part in self._parts(samples):
            # A picture that several samples share is one object, which the engine prepares once.
            pictures: dict[int, PIL.Image.Image] = {}
            asked = []
            for index in part:
                for position, image in enumerate(samples[index]):
                    if id(image) not in pictures:
                        pictures[id(image)] = self._prepared(_rgb(image, self._name(index, position)))
                asked.append(questions(index, [pictures[id(image)] for image in samples[index]]))
            together = [question for group in asked for question in group]
            with plain_modes(self.device.type, gradients=False):
                answers = iter(checked_count(self.engine, self.engine.ask(together), together))
            rows += [
                row(index, list(islice(answers, len(group))))
                for index, group in zip(part, asked, strict=True)
            ]
        return rows

    def _parts(self, samples: Sequence[Sequence[CheckedImage]]) -> list[list[int]]:
        """Divide samples into parts of limited pixels, after checking the size of every image."""
        parts: list[list[int]] = [[]]
        held: set[int] = set()
        pixels = 0
        for index, sample in enumerate(samples):
            sizes = {}
            for position, image in enumerate(sample):
                name = self._name(index, position)
                width, height = image_size(image, name)
                self._check_size((width, height), image_name(name, image))
                sizes[id(image)] = width * height
            more = sum(size for key, size in sizes.items() if key not in held)
            if parts[-1] and pixels + more > _PIXELS_AT_ONCE:
                parts.append([])
                held, pixels, more = set(), 0, sum(sizes.values())
            parts[-1].append(index)
            held |= sizes.keys()
            pixels += more
        return parts

    def _name(self, sample: int, image: int) -> str:
        return self.image_name.format(sample=sample, image=image)

    def _check_size(self, size: tuple[int, int], name: str) -> None:
        """Check that the processors of the judges accept a picture.

        Raises:
            ImageError: One side is more than 200 times the other.
        """
        if max(size) > _MAX_RATIO * min(size):
            raise ImageError(
                f"{name}: one side may be at most {_MAX_RATIO} times the other, got {size[0]}x{size[1]}"
            )

    def _prepared(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        """Return a picture as the model is shown it."""
        return picture

    def _report(self, row: int, answers: Sequence[Answer], problem: str | None) -> None:
        """Raise where the caller asked for it."""
        if problem is not None and self.on_parse_error == "raise":
            text = "\n".join(answer.text for answer in answers)
            raise AnswerError(f"the answer to pair {row} cannot be read: {problem}", text)


def _checked_policy(on_parse_error: Any) -> str:
    if on_parse_error not in _POLICIES:
        raise ValueError(f"on_parse_error must be one of {_POLICIES}, got {on_parse_error!r}")
    return str(on_parse_error)


def pairs(
    prompt: str | Sequence[str] | None, images: ImagesInput
) -> tuple[list[str], list[list[CheckedImage]]]:
    """Align prompts with images: N prompts, and N samples of one image each.

    None is the empty prompt, as in ``diffsynth.metrics``.
    """
    prompts, checked, count = pair("" if prompt is None else prompt, images)
    alone = list(checked)
    return (
        prompts * count if len(prompts) == 1 else prompts,
        [[image] for image in (alone * count if len(alone) == 1 else alone)],
    )


def _rgb(image: CheckedImage, name: str) -> PIL.Image.Image:
    """Return an image as RGB bytes, as a judge is given them; floats are rounded to 0..255."""
    return as_pil(image) if isinstance(image, Tensor) else as_rgb(open_image(image, name))


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where a value is None or there is none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None

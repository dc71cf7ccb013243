"""What the judge metrics share: pictures, verbs, and what becomes of an unreadable answer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedConfig
from typing_extensions import Self

from diffsynth_metrics.base import BaseMetric, check_batch_size
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
from diffsynth_metrics.judges.architectures import build_judge, judge_config
from diffsynth_metrics.judges.engine import Answer, Engine, Question, checked_count
from diffsynth_metrics.judges.local import LocalEngine, check_max_new_tokens
from diffsynth_metrics.modes import plain_modes
from diffsynth_metrics.tokens import check_canaries

__all__ = ["JudgeMetric", "mean", "pairs"]

_POLICIES = ("nan", "raise")
_MAX_NEW_TOKENS = 4096
_MAX_RATIO = 200
# Pictures of 537 MB in Pillow's four bytes per pixel: 128 of 1024x1024, which fill many batches.
_PIXELS_AT_ONCE = 2**27


class JudgeMetric(BaseMetric):
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

    published: ClassVar[Callable[[], PreTrainedConfig]]
    """Returns the architecture of the published checkpoint."""
    image_name: ClassVar[str] = "image {sample}"
    """How an error calls image `image` of sample `sample`."""
    processor_files = ("tokenizer.json", "vocab.json")
    official_dtype = torch.bfloat16
    default_batch_size = 20
    supports_device_map = True
    needs: ClassVar[tuple[str, ...]] = ("prompt",)
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
        return build_judge(judge_config(config, cls.published()))

    @classmethod
    def load_processor(cls, folder: Path, model: Any, **processor_kwargs: Any) -> Any:
        """Load the processor of images and chat template."""
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, **processor_kwargs)
        check_canaries(processor.tokenizer, folder, model.config.text_config.vocab_size)
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
    def from_server(
        cls,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        dialect: str = "auto",
        concurrency: int = 16,
        timeout: float = 300,
        retries: int = 4,
        max_new_tokens: int = _MAX_NEW_TOKENS,
        extra_body: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Ask a server that runs the judge's checkpoint: vLLM, SGLang or ``transformers serve``.

        Args:
            base_url: Such as ``"http://host:8000/v1"``.
            model: See :class:`~diffsynth_metrics.judges.server.ServerEngine`, as for what follows.
            api_key: Its key, if it wants one.
            dialect: Which server it is.
            concurrency: How many requests are under way at once.
            timeout: Seconds that a reply may take.
            retries: How often a request is sent again.
            max_new_tokens: Answers are cut off there, and then say so.
            extra_body: Further fields of every request.
            **options: The metric's own options, see its class.
        """
        from diffsynth_metrics.judges.server import ServerEngine

        engine = ServerEngine(
            base_url,
            model,
            api_key=api_key,
            dialect=dialect,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            max_new_tokens=max_new_tokens,
            extra_body=extra_body,
        )
        return cls(engine, **options)

    def describe(self) -> None:
        """See :meth:`BaseMetric.describe`; the engine learns what it runs."""
        super().describe()
        self.engine.weight_files = self.weight_files  # type: ignore[attr-defined]

    @abstractmethod
    def evaluate(
        self, prompt: str | Sequence[str] | None, images: Any, *asked: Any, **options: Any
    ) -> list[dict[str, Any]]:
        """Ask, and return what was answered, with the raw texts."""

    @abstractmethod
    def _numbers(self, row: dict[str, Any]) -> dict[str, float | None]:
        """Return what :meth:`components` has of a row of :meth:`evaluate`; None is unreadable."""

    def components(
        self, prompt: str | Sequence[str] | None, images: Any, *asked: Any, **options: Any
    ) -> dict[str, Tensor]:
        """Ask like :meth:`evaluate`, which takes the same arguments, and return the numbers.

        Returns:
            Name to float32 ``[N]`` on the metric's device, without gradients, NaN where the answer does
            not say it: ``"score"`` where it is one number per sample, and what the metric has besides.
        """
        rows = [self._numbers(row) for row in self.evaluate(prompt, images, *asked, **options)]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [_or_nan(row.get(name)) for row in rows] for name in names}
        return {
            name: torch.tensor(column, dtype=torch.float32, device=self.device)
            for name, column in columns.items()
        }

    def compute(
        self, prompt: str | Sequence[str] | None, images: Any, *asked: Any, **options: Any
    ) -> list[Any]:
        """Ask like :meth:`evaluate`, which takes the same arguments.

        Returns:
            The ``"score"`` of each row; NaN where the answer does not say it.
        """
        rows = self.evaluate(prompt, images, *asked, **options)
        return [_or_nan(row["score"]) for row in rows]

    def reward(
        self, prompt: str | Sequence[str] | None, images: Any, *asked: Any, **options: Any
    ) -> Tensor:
        """Score like :meth:`compute`, as float32 ``[N]`` on the metric's device, without gradients.

        Raises:
            ValueError: The score of a sample is not one number.
        """
        numbers = self.components(prompt, images, *asked, **options)
        if "score" not in numbers:
            raise ValueError(
                "a reward is one number per sample, and the score is several here; "
                f"components() gives {', '.join(numbers)}"
            )
        return numbers["score"]

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

    def check_weights(self) -> None:
        """Do nothing: an answer that cannot be read is no sign of broken weights."""

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
            answers = iter(self._ask([question for group in asked for question in group]))
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
            sizes = {
                id(image): self._checked_pixels(image, self._name(index, position))
                for position, image in enumerate(sample)
            }
            more = sum(size for key, size in sizes.items() if key not in held)
            if parts[-1] and pixels + more > _PIXELS_AT_ONCE:
                parts.append([])
                held, pixels, more = set(), 0, sum(sizes.values())
            parts[-1].append(index)
            held |= sizes.keys()
            pixels += more
        return parts

    def _checked_pixels(self, image: CheckedImage, name: str) -> int:
        width, height = image_size(image, name)
        self._check_size((width, height), image_name(name, image))
        return width * height

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

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        with plain_modes(self.device.type, gradients=False):
            return checked_count(self.engine, self.engine.ask(questions), questions)

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


def _or_nan(score: Any) -> Any:
    """Return a score, NaN where it is None; of a list, each of its numbers."""
    if isinstance(score, list):
        return [_or_nan(number) for number in score]
    return math.nan if score is None else score


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where a value is None or there is none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None

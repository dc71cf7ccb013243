"""What the judge metrics share: loading, pictures, and what becomes of an unreadable answer."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import PIL.Image
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from typing_extensions import Self, TypedDict, Unpack

from diffsynth_metrics.base import BaseMetric, check_loading
from diffsynth_metrics.errors import AnswerError, ImageError
from diffsynth_metrics.inputs import ImagesInput, as_pil, as_rgb, open_image, pair
from diffsynth_metrics.judges.architectures import judge_config
from diffsynth_metrics.judges.engine import Answer, Engine, Question
from diffsynth_metrics.judges.local import LocalEngine, check_limits
from diffsynth_metrics.weights.model_config import ModelConfig
from diffsynth_metrics.weights.placement import DeviceMap, check_device_map

__all__ = [
    "CheckedImage",
    "JudgeMetric",
    "Loading",
    "load_prompts",
    "mean",
    "pairs",
]

CheckedImage: TypeAlias = "PIL.Image.Image | Path | Tensor"
"""One image after checking."""

_POLICIES = ("nan", "raise")
_BATCH_SIZE, _MAX_NEW_TOKENS = 20, 4096
_MAX_RATIO = 200
# Pictures of 537 MB in Pillow's four bytes per pixel: 128 of 1024x1024, which fill many batches.
_PIXELS_AT_ONCE = 2**27


class Loading(TypedDict, total=False):
    """What every judge's ``from_pretrained`` takes besides the two configs.

    Attributes:
        device: Any torch device; the best that torch reports by default.
        device_map: Instead of `device`: ``"auto"``, or parts of the network to devices, as in
            transformers.
        torch_dtype: Dtype of the network; bfloat16 by default. Rotary frequencies are float32.
        batch_size: The largest number of answers that are written at once, 20 by default. It bounds
            memory.
        max_new_tokens: Answers are cut off there, and then say so; 4096 by default, as the authors of
            all three judges have it.
        processor_kwargs: What transformers' ``AutoProcessor.from_pretrained`` takes besides, except
            ``local_files_only``, which is always True.
        on_parse_error: ``"nan"`` (default) or ``"raise"``, see :class:`JudgeMetric`.
    """

    device: str | torch.device | None
    device_map: DeviceMap | None
    torch_dtype: torch.dtype | None
    batch_size: int
    max_new_tokens: int
    processor_kwargs: Mapping[str, Any] | None
    on_parse_error: str


class JudgeMetric(BaseMetric):
    """A metric that asks a generative model and reads its answer.

    It only knows an :class:`~diffsynth_metrics.judges.engine.Engine`; ``Metric(engine)`` takes any.
    """

    published: ClassVar[Callable[[], PreTrainedConfig]]
    """Returns the architecture of the published checkpoint."""
    processor_files: ClassVar[tuple[str, ...]] = ("tokenizer.json", "vocab.json")
    image_name: ClassVar[str] = "image {sample}"
    """How an error calls image `image` of sample `sample`."""

    def __init__(self, engine: Engine, *, on_parse_error: str = "nan") -> None:
        """Ask an engine; :meth:`from_pretrained` loads one.

        Args:
            engine: What answers the questions.
            on_parse_error: What becomes of an answer that cannot be read: ``"nan"`` is NaN in
                :meth:`compute` and None with the reason in :meth:`evaluate`, ``"raise"`` is an
                :class:`~diffsynth_metrics.AnswerError` in both.
        """
        self.engine = engine
        self.on_parse_error = _checked_policy(on_parse_error)

    @classmethod
    def from_pretrained(
        cls,
        model_config: ModelConfig | None = None,
        processor_config: ModelConfig | None = None,
        **loading: Unpack[Loading],
    ) -> Self:
        """Load the judge.

        Args:
            model_config: Where the weights are; the published ones by default. A ``config.json`` next
                to them gives the architecture, otherwise it is the published one.
            processor_config: Where tokenizer, chat template and image settings are; by default next to
                local weights, else the published ones.
            **loading: See :class:`Loading`; everything has a working default.

        Raises:
            CheckpointError: The files do not hold this metric's weights.
            DownloadError: The files could not be had.
            TypeError: There is no such argument.
            ValueError: An argument is out of its range, or `device` and `device_map` are both given.
        """
        if unknown := sorted(loading.keys() - Loading.__annotations__.keys()):
            raise TypeError(f"from_pretrained got an unexpected argument {unknown[0]!r}")
        device, device_map = loading.get("device"), loading.get("device_map")
        if device is not None and device_map is not None:
            raise ValueError("pass either device or device_map")
        # The files may have 55 GB, so everything is checked before they are looked for.
        batch_size = loading.get("batch_size", _BATCH_SIZE)
        max_new_tokens = loading.get("max_new_tokens", _MAX_NEW_TOKENS)
        check_limits(batch_size, max_new_tokens)
        first, dtype = check_loading(
            model_config,
            processor_config,
            device=device,
            torch_dtype=loading.get("torch_dtype"),
            batch_size=batch_size,
            official=torch.bfloat16,
        )
        check_device_map(device_map)
        on_parse_error = _checked_policy(loading.get("on_parse_error", "nan"))
        processor_kwargs = _checked_kwargs(loading.get("processor_kwargs"))
        files, processor = cls._resolve(model_config, processor_config)
        engine = LocalEngine.load(
            judge_config(cls._architecture(model_config, files), cls.published()),
            files,
            cls._processor_folder(processor),
            metric=cls.__name__,
            device=first,
            device_map=device_map,
            dtype=dtype,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            processor_kwargs=processor_kwargs,
        )
        return cls(engine, on_parse_error=on_parse_error)

    @abstractmethod
    def evaluate(
        self, prompt: str | Sequence[str], images: Any, *args: Any, **options: Any
    ) -> list[dict[str, Any]]:
        """Ask, and return what was answered, with the raw texts."""

    def compute(self, prompt: str | Sequence[str], images: Any, **options: Any) -> list[Any]:
        """Score like :meth:`evaluate`, which takes the same arguments.

        Returns:
            One float per dict of :meth:`evaluate`, its ``"score"`` unless the metric says otherwise;
            NaN where the answer cannot be read.
        """
        return [_or_nan(row["score"]) for row in self.evaluate(prompt, images, **options)]

    def reward(self, prompt: str | Sequence[str], images: Any, **options: Any) -> Tensor:
        """Score like :meth:`compute`, as float32 ``[N]`` on the metric's device, without gradients."""
        scores = self.compute(prompt, images, **options)
        return torch.tensor(scores, dtype=torch.float32, device=self.device)

    def score(self, prompt: str | Sequence[str], images: Any, **options: Any) -> list[Any]:
        """Do the same as :meth:`compute`; the name that ``diffsynth.metrics`` uses."""
        return self.compute(prompt, images, **options)

    def __call__(self, prompt: str | Sequence[str], images: Any, **options: Any) -> list[Any]:
        """Do the same as :meth:`compute`."""
        return self.compute(prompt, images, **options)

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
        width, height = _size(image, name)
        self._check_size((width, height), name)
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
        with self._scoring(gradients=False):
            answers = self.engine.ask(questions)
        if len(answers) != len(questions):
            raise RuntimeError(
                f"{type(self.engine).__name__} gave {len(answers)} answers to {len(questions)} questions"
            )
        return answers

    @property
    def _network(self) -> nn.Module:
        """The network; an engine that has none in memory is an AttributeError."""
        model: nn.Module = self.engine.model  # type: ignore[attr-defined]
        return model

    @_network.setter
    def _network(self, network: nn.Module) -> None:
        self.engine.model = network  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """Where rewards are; for an engine in memory, where the network takes its inputs."""
        return self.engine.device

    def to(self, device: str | torch.device) -> Self:
        """Move the network to a device and return the metric; an engine may have none to move."""
        if isinstance(model := getattr(self.engine, "model", None), nn.Module):
            model.to(torch.device(device))
        return self

    def __repr__(self) -> str:
        """Show the class and its engine."""
        return f"{type(self).__name__}({type(self.engine).__name__}, device={str(self.device)!r})"

    def _report(self, row: int, answers: Sequence[Answer], problem: str | None) -> None:
        """Raise where the caller asked for it."""
        if problem is not None and self.on_parse_error == "raise":
            text = "\n".join(answer.text for answer in answers)
            raise AnswerError(f"the answer to pair {row} cannot be read: {problem}", text)


def _checked_policy(on_parse_error: Any) -> str:
    if on_parse_error not in _POLICIES:
        raise ValueError(f"on_parse_error must be one of {_POLICIES}, got {on_parse_error!r}")
    return str(on_parse_error)


def _checked_kwargs(processor_kwargs: Any) -> Mapping[str, Any]:
    if processor_kwargs is None:
        return {}
    if not isinstance(processor_kwargs, Mapping):
        raise TypeError(f"processor_kwargs must be a mapping, got {type(processor_kwargs).__name__}")
    if "local_files_only" in processor_kwargs:
        raise TypeError(
            "processor_kwargs may not have local_files_only: the processor's files are always local by "
            "then; ModelConfig(skip_download=True) is what forbids downloads"
        )
    return processor_kwargs


@cache
def load_prompts(name: str) -> dict[str, Any]:
    """Return the texts of ``judges/prompts/<name>.json``; do not change them."""
    file = resources.files("diffsynth_metrics") / "judges" / "prompts" / f"{name}.json"
    prompts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return prompts


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


def _size(image: CheckedImage, name: str) -> tuple[int, int]:
    """Return width and height, of a file by its header."""
    if isinstance(image, Tensor):
        return image.shape[-1], image.shape[-2]
    if isinstance(image, PIL.Image.Image):
        return image.size
    try:
        with PIL.Image.open(image) as opened:
            return opened.size
    except Exception:
        return open_image(image, name).size  # which says why it cannot be read


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

"""UnifiedReward-Edit: a judge of edited images, one by one or two against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
from torch import Tensor

from diffsynth_metrics.base import MetricCard, one_source
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import CheckedImage, ImageInput, as_images, as_prompts
from diffsynth_metrics.judges.answers import Reading, read_pair_scores, read_score_list, read_winner
from diffsynth_metrics.judges.engine import Answer, Engine, Question
from diffsynth_metrics.judges.metric import JudgeMetric, mean
from diffsynth_metrics.judges.prompts import load_prompts
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["UnifiedRewardEditMetric"]


@dataclass(frozen=True)
class _Task:
    """What a task asks about, and what its answers say.

    Attributes:
        images: What each image of a sample is, in order.
        values: Names of what the answer says.
        read: Finds them in an answer.
        score: What the values are worth together.
    """

    images: tuple[str, ...]
    values: tuple[str, ...]
    read: Callable[[Answer], Reading]
    score: Callable[[list[Any]], Any]


def _pointwise(images: tuple[str, ...], values: tuple[str, ...]) -> _Task:
    return _Task(images, values, lambda answer: read_score_list(answer, values, low=0, high=25), mean)


_PAIR = ("source", "edited 1", "edited 2")
_TASKS = {
    "edit_pointwise_score": _pointwise(("source", "edited"), ("editing_success", "overediting")),
    "edit_pointwise_quality": _pointwise(("image",), ("naturalness", "artifacts")),
    "edit_pairwise_rank": _Task(_PAIR, ("winner",), read_winner, lambda values: values[0]),
    "edit_pairwise_score": _Task(_PAIR, ("image_1_score", "image_2_score"), read_pair_scores, list),
}
_DEFAULT_TASK = "edit_pointwise_score"


class UnifiedRewardEditMetric(JudgeMetric):
    """UnifiedReward-Edit: how well an instruction was carried out on a picture.

    ==========================  ===========================  =====================================
    task                        images of a sample           answer
    ==========================  ===========================  =====================================
    ``edit_pointwise_score``    source, edited               ``editing_success``, ``overediting``
                                                             (0 to 25), ``score``: their mean
    ``edit_pairwise_rank``      source, edited 1, edited 2   ``winner``: 1, 2, or 0 for a tie;
                                                             ``score``: the same
    ``edit_pairwise_score``     source, edited 1, edited 2   ``image_1_score``, ``image_2_score``,
                                                             ``score``: the list of both
    ``edit_pointwise_quality``  one image                    ``naturalness``, ``artifacts``
                                                             (0 to 25), ``score``: their mean
    ==========================  ===========================  =====================================

    ``UnifiedRewardEditMetric.from_pretrained`` takes what :class:`JudgeMetric` lists and ``task``, which
    calls then ask by default. ``winner`` is a number where ``diffsynth.metrics`` gives a text; ``score``
    is the same in both. See ``UnifiedRewardEditMetric.card``.
    """

    card = MetricCard(
        name="UnifiedReward-Edit",
        inputs="instruction, source image and edited images",
        range="0 to 25 pointwise; 0, 1 or 2 for a ranking; any real number for pairwise scores",
        higher_is_better=True,
        definition="what Qwen3-VL-8B writes about one or two edits",
        paper="https://arxiv.org/abs/2503.05236",
        repository="https://github.com/CodeGoat24/UnifiedReward",
        code_license="MIT",
        weights_license="MIT (base Qwen3-VL-8B: Apache-2.0)",
        notes="A high overediting score is good: nothing else was changed.",
        good_for="whether an edit was made, and nothing else changed",
        download="17.5 GB",
        memory="17.5 GB",
    )
    default_model = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="UnifiedReward-Edit-qwen3vl-8b/model-*.safetensors",
    )
    default_processor = ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="UnifiedReward-Edit-qwen3vl-8b/*.[jt]*",
    )
    architecture = "unified_reward_edit"
    positional = ("task", "max_new_tokens", "processor_kwargs", "vram_limit")
    image_name = "sample {sample}: image {image}"
    needs = ("prompt", "source")

    def __init__(self, engine: Engine, *, task: str = _DEFAULT_TASK, **judge: Any) -> None:
        """Ask an engine; :meth:`from_pretrained` loads one.

        Args:
            engine: What answers the questions.
            task: What is asked where a call does not say it.
            **judge: See :class:`JudgeMetric`.
        """
        super().__init__(engine, **judge)
        self.task = _checked_task(task)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check ``task`` and what every judge takes."""
        super().check_options(**options)
        _checked_task(options.get("task", _DEFAULT_TASK))

    def arguments(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageInput] | Tensor,
        sources: Sequence[Sequence[ImageInput]] = (),
    ) -> tuple[Any, ...]:
        """Return what the verbs take, see :meth:`BaseMetric.arguments`.

        Raises:
            ValueError: A sample has no source image or several, or the task compares two edits.
        """
        wanted = _TASKS[self.task].images
        if wanted == _PAIR:
            raise ValueError(f"the task {self.task} compares two edits, and a sample has one")
        if len(wanted) == 1:
            return prompts, images
        edits = zip(one_source(self, sources, len(images)), images, strict=True)
        return prompts, [[source, image] for source, image in edits]

    def evaluate(
        self,
        prompt: str | Sequence[str] | None,
        images: Sequence[ImageInput] | Sequence[Sequence[ImageInput]],
        task: str | None = None,
        *,
        both_orders: bool = False,
    ) -> list[dict[str, Any]]:
        """Ask about edits.

        Args:
            prompt: The instruction: one for all samples, or as many as samples; None is the empty one.
            images: One sample, such as ``[source, edited]``, or a list of samples; for a task of one
                image each, a flat list or a batch is as many samples. Images are what
                other metrics take too: PIL, paths, arrays, tensors.
            task: See the class; by default the metric's own.
            both_orders: For pairwise tasks: ask a second time with the edited images swapped. Where the
                winners differ, the ranking is a tie: a judge that prefers a position prefers no image.

        Returns:
            One dict per sample: the values of the task and its ``"score"`` (None where the answer does
            not say them), ``"reasoning"`` where the task has it, ``"error"`` (why a value is None),
            ``"raw_text"``, ``"finish"`` (``"stop"``, ``"length"`` where ``max_new_tokens`` cut the
            answer off, ``"error"`` where there is none) and ``"usage"`` (tokens and seconds, as far as
            the engine knows them).

            With `both_orders` also ``"first"`` and ``"swapped"``, what each answer says, with the images
            numbered as you passed them, and ``"agreement"``: whether both say the same (the same winner,
            or the same order of scores), None where one cannot be read. The row itself has the first
            answer's scores; in a ranking, the winner of both: 0 where they differ, None with the reason
            where one cannot be read.

        Raises:
            ValueError: The task is unknown, a sample has the wrong number of images, or prompts and
                samples differ in number.
            TypeError, ImageError, FileNotFoundError: An image is none, or cannot be read; the message
                gives the sample.
            AnswerError: An answer cannot be read, with ``on_parse_error="raise"``.
        """
        name = _checked_task(self.task if task is None else task)
        asked = _TASKS[name]
        if both_orders and asked.images != _PAIR:
            raise ValueError(f"both_orders belongs to the pairwise tasks, and the task is {name}")
        prompts = as_prompts("" if prompt is None else prompt)
        samples = [_sample(sample, index, name) for index, sample in enumerate(_samples(images, asked))]
        if len(prompts) != len(samples) and not (prompt is None or isinstance(prompt, str)):
            raise ValueError(
                f"got {len(prompts)} prompts and {len(samples)} samples; pass one prompt (a str) for "
                "all samples, or as many prompts as samples"
            )
        prompts = prompts * len(samples) if len(prompts) == 1 else prompts

        def questions(index: int, pictures: list[PIL.Image.Image]) -> list[Question]:
            orders = [pictures, [pictures[0], *reversed(pictures[1:])]] if both_orders else [pictures]
            return [_question(name, prompts[index], order) for order in orders]

        def row(index: int, answers: list[Answer]) -> dict[str, Any]:
            first, *second = [self._row(asked, index, answer) for answer in answers]
            return _of_both(first, _numbered_as_passed(second[0], asked)) if second else first

        return self._rows(samples, questions, row)

    def reward(
        self, prompt: str | Sequence[str] | None, images: Any, *asked: Any, **options: Any
    ) -> Tensor:
        """Score like :meth:`compute`, see :meth:`JudgeMetric.reward`.

        Raises:
            ValueError: The task compares two edits: which one is better is no reward of either.
        """
        task = _checked_task(options.get("task") or (asked[0] if asked and asked[0] else self.task))
        if _TASKS[task].images == _PAIR:
            raise ValueError(
                f"the task {task} compares two edits, and its answer is no reward of either; use a "
                "pointwise task"
            )
        return super().reward(prompt, images, *asked, **options)

    def _numbers(self, row: dict[str, Any]) -> dict[str, float | None]:
        """Return the values of the task, and its score where it is one number."""
        names = {"score", *(name for task in _TASKS.values() for name in task.values)}
        return {
            name: value for name, value in row.items() if name in names and not isinstance(value, list)
        }

    def _row(self, task: _Task, sample: int, answer: Answer) -> dict[str, Any]:
        reading = task.read(answer)
        self._report(sample, [answer], reading.problem)
        return {
            **reading.values,
            "score": task.score([reading.values[name] for name in task.values]),
            "error": reading.problem,
            "raw_text": answer.text,
            "finish": answer.finish,
            "usage": dict(answer.usage),
        }


def _checked_task(task: str) -> str:
    if task not in _TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(_TASKS)}")
    return task


def _samples(images: Any, task: _Task) -> list[Any]:
    """Return samples: `images` holds samples where its first element holds images.

    Where a sample is a single image, a flat list and a batch are as many samples.
    """
    if _is_list(images) and len(images) and (_is_list(images[0]) or getattr(images[0], "ndim", 3) == 4):
        return list(images)
    if len(task.images) == 1 and (_is_list(images) or getattr(images, "ndim", 3) == 4):
        return [[image] for image in images]
    return [images]


def _is_list(images: Any) -> bool:
    return isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray))


def _sample(images: Any, index: int, task: str) -> list[CheckedImage]:
    """Check the images of a sample; every error says which sample it is."""
    wanted = _TASKS[task].images
    try:
        checked = list(as_images(images))
    except (ImageError, FileNotFoundError, TypeError, ValueError) as error:
        raise type(error)(f"sample {index}: {error}") from error
    if len(checked) != len(wanted):
        raise ValueError(
            f"{task} takes samples of {len(wanted)} images ({', '.join(wanted)}), and sample {index} "
            f"has {len(checked)}"
        )
    return checked


def _question(task: str, instruction: str, pictures: list[PIL.Image.Image]) -> Question:
    prompts = load_prompts("unified_reward_edit")
    text = prompts[task]["user"] if task not in prompts["user"] else prompts["user"][task]
    return Question(content=(*pictures, text.replace("{instruction}", instruction)))


def _numbered_as_passed(row: dict[str, Any], task: _Task) -> dict[str, Any]:
    """Return a row about swapped images with the numbers of the caller's order."""
    if "winner" in row:
        values = [{1: 2, 2: 1}.get(row["winner"], row["winner"])]
    else:
        values = [row["image_2_score"], row["image_1_score"]]
    return {**row, **dict(zip(task.values, values, strict=True)), "score": task.score(values)}


def _of_both(first: dict[str, Any], swapped: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a sample that was asked in both orders."""
    preferred, again = _preferred(first), _preferred(swapped)
    agreement = None if preferred is None or again is None else preferred == again
    row = {**first, "first": first, "swapped": swapped, "agreement": agreement}
    if "winner" in first:
        winner = first["winner"] if agreement else None if agreement is None else 0
        unread = "with the images swapped: "
        error = first["error"] or (swapped["error"] and unread + swapped["error"])
        row |= {"winner": winner, "score": winner, "error": error}
    return row


def _preferred(row: dict[str, Any]) -> int | None:
    """Return which image a row prefers, 1, 2 or 0 for neither; None where it does not say it."""
    if row["error"] is not None:
        return None
    if "winner" in row:
        winner: int = row["winner"]
        return winner
    difference = row["image_1_score"] - row["image_2_score"]
    return 0 if difference == 0 else 1 if difference > 0 else 2

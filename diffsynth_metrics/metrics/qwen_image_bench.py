"""Qwen-Image-Bench: a judge that goes through checklists of up to five dimensions per image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import PIL.Image

from diffsynth_metrics.base import MetricCard
from diffsynth_metrics.inputs import ImagesInput
from diffsynth_metrics.judges.answers import Reading, read_checklist
from diffsynth_metrics.judges.engine import Answer, Engine, Question
from diffsynth_metrics.judges.metric import JudgeMetric, mean, pairs
from diffsynth_metrics.judges.prompts import load_prompts
from diffsynth_metrics.weights.model_config import ModelConfig

__all__ = ["QwenImageBenchMetric"]

Dimensions: TypeAlias = "str | Iterable[str] | Mapping[str, Any] | None"

_REPETITION_PENALTY = 1.05
_LONG_EDGE = 1024
# The network sees squares of 32 pixels; a picture that is smaller says nothing.
_SMALLEST_SIDE = 32


class QwenImageBenchMetric(JudgeMetric):
    """Qwen-Image-Bench: facets scored 0, 1 or 2 by a judge that thinks first, worth 0, 60 or 100.

    A level-2 score is the mean of its facets, a dimension the mean of its level-2 scores, the total the
    mean of the dimensions; what does not apply (N/A) is left out. See ``QwenImageBenchMetric.card``.

    ``QwenImageBenchMetric.from_pretrained`` takes what :class:`JudgeMetric` lists and, under upstream's
    name, ``resize_long_edge``: an image with a longer side is made a **square** of this side, whatever
    its shape, as the benchmark does it; 1024 by default, at least 32, or 0 for no resizing.
    """

    card = MetricCard(
        name="Qwen-Image-Bench",
        inputs="prompt and image",
        range="0 to 100; published models have about 50 to 65",
        higher_is_better=True,
        definition="mean over dimensions, their level-2 groups and facets of 0, 60 or 100",
        paper="https://arxiv.org/abs/2605.28091",
        repository="https://github.com/QwenLM/Qwen-Image-Bench",
        code_license="Apache-2.0",
        weights_license="Apache-2.0",
        notes="The benchmark asks only the dimensions that its metadata lists: pass dims_en.",
        good_for="an itemised judgement by 56 facets",
        download="54.7 GB",
        memory="54.7 GB",
    )
    default_model = ModelConfig(
        model_id="Qwen/Qwen-Image-Bench", origin_file_pattern="model-*.safetensors"
    )
    default_processor = ModelConfig(model_id="Qwen/Qwen-Image-Bench", origin_file_pattern="*.[jt]*")
    architecture = "qwen_image_bench"
    dimensions = (
        "Quality",
        "Aesthetics",
        "Alignment",
        "Real-world Fidelity",
        "Creative Generation",
    )
    """The five dimensions that can be asked about, by their official names."""
    positional = ("max_new_tokens", "resize_long_edge", "processor_kwargs", "vram_limit")

    def __init__(self, engine: Engine, *, resize_long_edge: int = _LONG_EDGE, **judge: Any) -> None:
        """Ask an engine; :meth:`from_pretrained` loads one.

        Args:
            engine: What answers the questions.
            resize_long_edge: See the class.
            **judge: See :class:`JudgeMetric`.
        """
        super().__init__(engine, **judge)
        self.resize_long_edge = _checked_side(resize_long_edge)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check ``resize_long_edge`` and what every judge takes."""
        super().check_options(**options)
        _checked_side(options.get("resize_long_edge", _LONG_EDGE))

    def evaluate(
        self,
        prompt: str | Sequence[str] | None,
        images: ImagesInput,
        dimensions: Dimensions | Sequence[Dimensions] = None,
    ) -> list[dict[str, Any]]:
        """Ask about pairs of prompts and images, one question per dimension.

        Args:
            prompt: One prompt for all images, or as many prompts as images; None is the empty prompt.
            images: One image or several: PIL images, paths, uint8 arrays ``[H, W, 3]``, tensors
                ``[3, H, W]`` or ``[N, 3, H, W]`` (uint8 in 0..255 or float in 0..1).
            dimensions: What all pairs are asked: None for all five, a name, names separated by commas, a
                list of names, or the benchmark's ``dims_en`` string, of which the dimensions count. Or
                what each pair is asked: a list with one entry per pair, each of them None, a list of
                names, names separated by commas, or a ``dims_en`` string. A list of plain names is
                always one set for all pairs; the only dimension of one pair is ``["Quality"]``.

        Returns:
            One dict per pair: ``"score"`` and ``"total_score"`` (the same number; None where the answer
            about a dimension cannot be read, or nothing applies), ``"level1_scores"``,
            ``"level2_scores"``, ``"level3_scores"`` (by dimension; None where it cannot be read or does
            not apply), ``"raw_scores"`` (0, 1, 2
            or None), ``"missing"`` (facets that the answer leaves out; None where it cannot be read),
            ``"raw_outputs"``, ``"finish"`` (by dimension: ``"stop"``, ``"length"`` where
            ``max_new_tokens`` cut the answer off, or ``"error"``), ``"usage"`` (by dimension: tokens and
            seconds, as far as the engine knows them), ``"parse_failures"`` (dimensions), ``"errors"``
            (dimension to reason), ``"error"`` (all reasons or None) and ``"dimensions"`` (those asked).

        Raises:
            TypeError: An argument is not a prompt or an image.
            ValueError: A dimension is unknown, a list mixes plain names with sets of single pairs, the
                numbers of prompts and images differ, or there are none.
            ImageError: An image cannot be read, or its values or channels are wrong.
            FileNotFoundError: A path does not exist.
            AnswerError: An answer cannot be read, with ``on_parse_error="raise"``.
        """
        prompts, samples = pairs(prompt, images)
        asked = _dimensions_of_pairs(dimensions, len(samples))

        def questions(index: int, pictures: list[PIL.Image.Image]) -> list[Question]:
            return [_question(prompts[index], pictures[0], dimension) for dimension in asked[index]]

        def row(index: int, answers: list[Answer]) -> dict[str, Any]:
            return self._row(index, dict(zip(asked[index], answers, strict=True)))

        return self._rows(samples, questions, row)

    def _numbers(self, row: dict[str, Any]) -> dict[str, float | None]:
        """Return the total as the score, and the score of each dimension that was asked about."""
        return {"score": row["score"], **row["level1_scores"]}

    def _is_made_square(self, size: tuple[int, int]) -> bool:
        return 0 < self.resize_long_edge < max(size)

    def _check_size(self, size: tuple[int, int], name: str) -> None:
        if not self._is_made_square(size):
            super()._check_size(size, name)

    def _prepared(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        if self._is_made_square(picture.size):
            side = self.resize_long_edge
            return picture.resize((side, side), PIL.Image.Resampling.LANCZOS)
        return picture

    def _row(self, index: int, answers: dict[str, Answer]) -> dict[str, Any]:
        readings = {dimension: _read(answer, dimension) for dimension, answer in answers.items()}
        errors = {d: reading.problem for d, reading in readings.items() if reading.problem is not None}
        error = "; ".join(f"{dimension}: {problem}" for dimension, problem in errors.items()) or None
        self._report(index, list(answers.values()), error)
        level3 = {dimension: reading.values["scores"] for dimension, reading in readings.items()}
        level2 = {
            dimension: groups
            and {name: _mean_of_known(facets.values()) for name, facets in groups.items()}
            for dimension, groups in level3.items()
        }
        level1: dict[str, float | None] = {
            dimension: _mean_of_known(groups.values()) if groups else None
            for dimension, groups in level2.items()
        }
        total = None if errors else _mean_of_known(level1.values())
        return {
            "score": total,
            "total_score": total,
            "level1_scores": level1,
            "level2_scores": level2,
            "level3_scores": level3,
            "raw_scores": {dimension: reading.values["raw"] for dimension, reading in readings.items()},
            "missing": {d: _missing(d, reading.values["raw"]) for d, reading in readings.items()},
            "raw_outputs": {dimension: answer.text for dimension, answer in answers.items()},
            "finish": {dimension: answer.finish for dimension, answer in answers.items()},
            "usage": {dimension: dict(answer.usage) for dimension, answer in answers.items()},
            "parse_failures": list(errors),
            "errors": errors,
            "error": error,
            "dimensions": list(answers),
        }


def _checked_side(resize_long_edge: Any) -> int:
    side = resize_long_edge
    is_int = isinstance(side, int) and not isinstance(side, bool)
    if not is_int or (side != 0 and side < _SMALLEST_SIDE):
        raise ValueError(
            f"resize_long_edge must be an int of at least {_SMALLEST_SIDE}, or 0 for no resizing, got "
            f"{resize_long_edge!r}"
        )
    return int(side)


def _question(prompt: str, picture: PIL.Image.Image, dimension: str) -> Question:
    texts = load_prompts("qwen_image_bench")
    header = texts["user_header"].format(prompt=prompt)
    body = texts["user_body"].format(
        level1_dim=dimension, format_checklist=texts["checklists"][dimension]
    )
    return Question(
        content=(header, picture, body),
        system=texts["system"],
        thinking=texts["enable_thinking"],
        repetition_penalty=_REPETITION_PENALTY,
    )


def _read(answer: Answer, dimension: str) -> Reading:
    texts = load_prompts("qwen_image_bench")
    return read_checklist(
        answer,
        level2_of=texts["level3_to_level2"][dimension],
        rename=texts["level3_rename"].get(dimension, {}),
        score_map={int(score): worth for score, worth in texts["score_map"].items()},
    )


def _missing(dimension: str, raw: Mapping[str, Mapping[str, Any]] | None) -> list[str] | None:
    """Return the facets of a dimension that an answer leaves out; None where it cannot be read."""
    if raw is None:
        return None
    facets: Mapping[str, str] = load_prompts("qwen_image_bench")["level3_to_level2"][dimension]
    return [name for name, level2 in facets.items() if name not in raw.get(level2, {})]


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of what applies, or None where nothing does."""
    return mean([value for value in values if value is not None])


def _dimensions_of_pairs(dimensions: Dimensions | Sequence[Dimensions], count: int) -> list[list[str]]:
    """Return the dimensions to ask for each pair.

    A list without plain names has a set for each pair, any other is one set for all pairs.
    """
    plain = (
        [_is_plain_name(entry) for entry in dimensions] if isinstance(dimensions, (list, tuple)) else []
    )
    if all(plain):
        return [_names(dimensions)] * count
    if any(plain):
        raise ValueError(
            "dimensions mixes plain names, of which a list is one set for all pairs, with sets of "
            "single pairs; write the only dimension of a pair as a list, such as ['Quality']"
        )
    if len(plain) != count:
        raise ValueError(f"got {len(plain)} sets of dimensions for {count} pairs")
    return [_names(entry) for entry in cast("Sequence[Any]", dimensions)]


def _is_plain_name(entry: Any) -> bool:
    return isinstance(entry, str) and not any(sign in entry for sign in "/;,")


def _names(dimensions: Any) -> list[str]:
    """Return the dimensions that one pair is asked about, each once, by their official names."""
    known = {name.casefold(): name for name in load_prompts("qwen_image_bench")["checklists"]}
    if dimensions is None:
        return list(known.values())
    if isinstance(dimensions, str):
        separator = ";" if "/" in dimensions or ";" in dimensions else ","
        parts = [part.partition("/") for part in dimensions.split(separator)]
        for _, _, below in parts:  # whose names may have commas
            for name in re.findall(r",([^,/]*)/", below):
                if name.strip().casefold() in known:
                    raise ValueError(
                        f"dimensions {dimensions!r} has a comma before {name.strip()!r}: write ;"
                    )
        dimensions = [name.strip() for name, _, _ in parts if name.strip()]
    if not isinstance(dimensions, Iterable):
        raise TypeError(f"dimensions must be names of dimensions, got {type(dimensions).__name__}")
    names = list(dimensions)
    if not names:
        return list(known.values())
    for name in names:
        if not isinstance(name, str) or name.casefold() not in known:
            raise ValueError(f"there is no dimension {name!r}; there are {', '.join(known.values())}")
    return list(dict.fromkeys(known[name.casefold()] for name in names))

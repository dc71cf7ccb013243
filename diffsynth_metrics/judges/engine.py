"""What a metric asks and what it gets back, whatever produces the texts.

An engine may run the network here (:class:`~diffsynth_metrics.judges.local.LocalEngine`), ask a server
(:class:`~diffsynth_metrics.judges.server.ServerEngine`), keep what another one answered
(:class:`~diffsynth_metrics.judges.cached.CachedEngine`), or return scripted answers in a test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import PIL.Image
import torch

__all__ = ["Answer", "Engine", "Question"]


@dataclass(frozen=True, eq=False)
class Question:
    """One user turn, answered greedily.

    Attributes:
        content: Texts and RGB images in the order of the model's training. A text is plain text: what
            looks like a special token in it is not one.
        system: The system prompt, or None for the model's own default.
        thinking: Switch of the chat template: True or False as the authors run their model, None
            where the template has none.
        repetition_penalty: As the authors run their model; 1 is none.
    """

    content: tuple[str | PIL.Image.Image, ...]
    system: str | None = None
    thinking: bool | None = None
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What the model wrote, or why it wrote nothing.

    Attributes:
        text: The answer without special tokens; thinking, where the model thinks, is part of it.
        finish: ``"stop"`` where the model ended it, ``"length"`` where the limit of tokens did,
            ``"error"`` where there is no answer.
        error: Why there is no answer; its text is empty then.
        usage: What the answer took, as far as the engine knows: ``"prompt_tokens"``,
            ``"answer_tokens"``, ``"seconds"``. Answers that differ in nothing else are equal.
    """

    text: str
    finish: Literal["stop", "length", "error"] = "stop"
    error: str | None = None
    usage: Mapping[str, float] = field(default_factory=dict, compare=False)


class Engine(ABC):
    """Answers questions. An engine is shared by threads."""

    batch_size: int = 16
    """How many questions it is best asked at once."""

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer per question, in order."""

    def ask_each(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yield the index of a question and its answer, as soon as it is known.

        This asks a batch after the other; an engine that knows single answers earlier overrides it.
        """
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            yield from enumerate(checked_count(self, self.ask(batch), batch), start=start)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything besides the question that an answer depends on, as plain values.

        The provenance of a metric has it, and kept answers are found by it. A value that is not known
        is None; answers are not kept then, nor are those of an engine without this property.
        """
        return {"engine": type(self).__name__}

    @property
    def device(self) -> torch.device:
        """Where a metric puts the rewards that it makes of answers."""
        return torch.device("cpu")


def checked_count(engine: Engine, answers: list[Answer], questions: Sequence[Question]) -> list[Answer]:
    """Return the answers.

    Raises:
        RuntimeError: There are not as many as questions.
    """
    if len(answers) != len(questions):
        raise RuntimeError(
            f"{type(engine).__name__} gave {len(answers)} answers to {len(questions)} questions"
        )
    return answers

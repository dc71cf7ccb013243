"""A judge's engine for tests: it answers from a script and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from diffsynth_metrics.judges.engine import Answer, Engine, Question

__all__ = ["ScriptedEngine"]

Line: TypeAlias = "str | Answer | Callable[[Question], str | Answer]"


class ScriptedEngine(Engine):
    """Answers with given texts, without a network.

    Example:
        >>> engine = ScriptedEngine('{"reasoning": "Good.", "score": [20, 18]}')
        >>> UnifiedRewardEditMetric(engine).compute("make it grey", [source, edited])
        [19.0]
        >>> len(engine.questions)
        1

    Attributes:
        questions: What was asked so far, in order.
    """

    def __init__(self, *answers: Line) -> None:
        """Answer with these, one per question.

        Args:
            *answers: Each a text, an :class:`~diffsynth_metrics.judges.engine.Answer`, or a function
                that makes one of them of the question. After the last one they begin again; without
                any, every answer is empty.
        """
        self.answers: tuple[Line, ...] = answers or ("",)
        self.questions: list[Question] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer, and remember the questions."""
        first = len(self.questions)
        self.questions += questions
        return [self._answer(index, question) for index, question in enumerate(questions, start=first)]

    @property
    def identity(self) -> dict[str, Any]:
        """The script: its texts, and the names of its functions."""
        script = [
            f"{line.__module__}.{line.__qualname__}" if callable(line) else str(line)
            for line in self.answers
        ]
        return {"engine": type(self).__name__, "answers": script}

    def _answer(self, index: int, question: Question) -> Answer:
        line = self.answers[index % len(self.answers)]
        answer = line(question) if callable(line) else line
        return answer if isinstance(answer, Answer) else Answer(answer)

"""What a metric asks and what it gets back, whatever produces the texts.

An engine may run the network here (:class:`~diffsynth_metrics.judges.local.LocalEngine`), talk to a
server, or return scripted answers in a test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    """What the model wrote.

    Attributes:
        text: The answer without special tokens; thinking, where the model thinks, is part of it.
        finish: ``"stop"`` where the model ended it, ``"length"`` where the limit of tokens did.
    """

    text: str
    finish: Literal["stop", "length"] = "stop"


class Engine(ABC):
    """Answers questions. An engine is shared by threads."""

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer per question, in order."""

    @property
    def device(self) -> torch.device:
        """Where a metric puts the rewards that it makes of answers."""
        return torch.device("cpu")

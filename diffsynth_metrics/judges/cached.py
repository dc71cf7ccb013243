"""The engine that keeps the answers of another one, one file per answer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from diffsynth_metrics.judges.engine import Answer, Engine, Question

__all__ = ["CachedEngine"]

logger = logging.getLogger(__name__)

# Part of every key; raised when keys or files change.
_FORMAT = 1


def _of_engine(name: str) -> Any:
    """Return a property that reads and sets that of the engine that is asked."""
    return property(
        lambda cached: getattr(cached.engine, name),
        lambda cached, value: setattr(cached.engine, name, value),
    )


class CachedEngine(Engine):
    """Keeps what another engine answers, and asks it only what is not known yet.

    Answers are found by content: the texts and the pixels of the question, its settings, and the
    :attr:`~diffsynth_metrics.judges.engine.Engine.identity` of the engine, such as its weights and its
    limit of tokens. Each answer is stored as soon as it is there; a failure never is. Threads and
    processes may share a folder, also one on a network, and may be killed.

    Example:
        >>> metric = UnifiedReward2Metric.from_pretrained()
        >>> metric.engine = CachedEngine(metric.engine, "answers")

    Attributes:
        engine: The engine that is asked.
        folder: Where the answers are. It may be deleted at any time.
    """

    batch_size = _of_engine("batch_size")
    device = _of_engine("device")
    identity = _of_engine("identity")
    model = _of_engine("model")

    def __init__(self, engine: Engine, folder: str | os.PathLike[str]) -> None:
        """Keep the answers of an engine in a folder, which is made if needed.

        Raises:
            TypeError: The engine is none, or does not say what its answers depend on.
            FileExistsError: The folder is a file.
        """
        if not isinstance(engine, Engine):
            raise TypeError(f"pass the engine whose answers are kept, got {type(engine).__name__}")
        if type(engine).identity is Engine.identity:
            raise TypeError(
                f"give {type(engine).__name__} a property `identity`, a dict of what its answers depend "
                "on, such as the model's name: answers are found by it"
            )
        self.engine = engine
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer per question, in order; questions that are equal are asked once."""
        answers = dict(self.ask_each(questions))
        return [answers[index] for index in range(len(questions))]

    def ask_each(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yield the index of a question and its answer: first what is known.

        Raises:
            ValueError: The engine does not know what made its answers, such as a network that was built
                in memory.
        """
        identity = self._known_identity()
        digests: dict[int, str] = {}
        missing: dict[Path, list[int]] = {}
        for index, question in enumerate(questions):
            file = self._file(_key(question, identity, digests))
            answer = _read(file)
            if answer is None:
                missing.setdefault(file, []).append(index)
            else:
                yield index, answer
        asked = list(missing.items())
        for position, answer in self.engine.ask_each([questions[first] for _, (first, *_) in asked]):
            file, indices = asked[position]
            if answer.error is None:
                _write(file, answer)
            yield from ((index, answer) for index in indices)

    def _known_identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = self.identity
        if unknown := [name for name, value in identity.items() if value is None]:
            raise ValueError(
                f"load the judge from files, or use it without a cache: the {unknown[0]} of its "
                f"{identity.get('engine')} are not known, and answers are found by them"
            )
        return identity

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.json"


def _key(question: Question, identity: dict[str, Any], digests: dict[int, str]) -> str:
    """Return a name for everything that an answer depends on.

    `digests` has those of pictures by ``id``: a picture that questions share is read once.
    """
    content = [
        {"text": part} if isinstance(part, str) else {"image": _digest(part, digests)}
        for part in question.content
    ]
    everything = {
        "format": _FORMAT,
        "identity": identity,
        "content": content,
        "system": question.system,
        "thinking": question.thinking,
        "repetition_penalty": float(question.repetition_penalty),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _digest(picture: PIL.Image.Image, digests: dict[int, str]) -> str:
    if id(picture) not in digests:
        form = f"{picture.mode} {picture.width} {picture.height} ".encode()
        digests[id(picture)] = hashlib.sha256(form + picture.tobytes()).hexdigest()
    return digests[id(picture)]


def _read(file: Path) -> Answer | None:
    """Return a kept answer, or None where there is none that is whole."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Answer(kept["text"], kept["finish"], usage=kept["usage"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):  # such as after a power failure
        logger.warning("The kept answer in %s cannot be read; it is asked for again", file)
        return None


def _write(file: Path, answer: Answer) -> None:
    """Store an answer; whoever reads meanwhile finds all of it or nothing."""
    kept = {"text": answer.text, "finish": answer.finish, "usage": dict(answer.usage)}
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(f"{secrets.token_hex(8)}.tmp")
    temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    os.replace(temporary, file)

"""Rewards for TRL's GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

from diffsynth_metrics.errors import RewardError
from diffsynth_metrics.rewards.adapters.common import Reward, RewardSource
from diffsynth_metrics.rewards.scoring import FailurePolicy, without_frames

Column: TypeAlias = "str | Callable[..., Any]"
"""A column of the data set, or a function of the sample's completion (or prompt) and columns."""


class ColumnReward(Reward):
    """A reward of completions, whose images are in columns of the data set or are made from them.

    A completion without a score gets None, which leaves this function out for it. One process may get
    a part of a group, so a :class:`RewardSet` normalises within groups only with a `group_size`.
    """

    failures_get: ClassVar[FailurePolicy] = "nan"

    def __init__(
        self,
        source: RewardSource,
        image: Column,
        *,
        prompt: Column | None = None,
        source_image: Column | None = None,
        **options: Any,
    ) -> None:
        """Take a source.

        Args:
            source: A metric, a :class:`RewardSet` or a callable.
            image: Where the image of a completion comes from: a column, or a function
                ``image(completion, **row)``. None, a ValueError or an OSError says that there is none.
            prompt: Where its prompt comes from: a column, or a function ``prompt(prompt, **row)``; by
                default the prompt itself, a text or a conversation that ends with it.
            source_image: Where the image comes from that was edited, as `image`.
            **options: What :class:`Reward` takes.
        """
        super().__init__(source, **options)
        self.image, self.prompt, self.source_image = image, prompt, source_image

    def rewards(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> list[float | None]:
        """Return the reward of each completion; None where there is none."""
        rows = _rows(columns, len(completions))
        for column in (self.image, self.prompt, self.source_image):
            if isinstance(column, str) and rows and column not in rows[0]:
                known = ", ".join(rows[0])
                raise ValueError(f"the data set has no column {column!r}; it has {known}")
        samples = [self._sample(*one) for one in zip(prompts, completions, rows, strict=True)]
        texts, images, sources = zip(*samples, strict=True)
        values, scored = self.score(self.batch(texts, list(images), list(sources)))
        if log_extra := columns.get("log_extra"):
            log_extra(f"{self.__name__}_error", [reason or "" for reason in scored.reasons])
        return [None if math.isnan(value) else value for value in values.tolist()]

    def _sample(self, prompt: Any, completion: Any, row: dict[str, Any]) -> tuple[str, Any, Any]:
        """Return prompt, image and source image of a completion; as image, the error if it has none."""
        try:
            image = _pictures(_made(self.image, completion, row))
            if image is None:
                raise RewardError("there is no image")
            text = prompt if self.prompt is None else _made(self.prompt, prompt, row)
            source = None if self.source_image is None else _made(self.source_image, completion, row)
            return _text(text), image, _pictures(source)
        except (OSError, ValueError, RewardError) as error:
            return "", without_frames(error), None


class _TRLReward(ColumnReward):
    """A reward function for ``GRPOTrainer(reward_funcs=...)``, and no Module: TRL takes it for a model.

    It tells why a completion failed in the column ``<name>_error`` of TRL's table of completions.
    """

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return self.rewards(prompts, completions, columns)


class _AsyncTRLReward(ColumnReward):
    """The coroutine form of :func:`to_trl`, which TRL runs along with its other ones."""

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return await asyncio.to_thread(self.rewards, prompts, completions, columns)


to_trl, to_trl_async = _TRLReward, _AsyncTRLReward


def _rows(columns: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Turn the columns among the trainer's keyword arguments into one dict per completion."""
    lists = {n: v for n, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == count}
    return [{name: values[index] for name, values in lists.items()} for index in range(count)]


def _made(column: Column, given: Any, row: dict[str, Any]) -> Any:
    """Return what a row has in a column, or what a function makes of it."""
    return row[column] if isinstance(column, str) else column(given, **row)


def _text(prompt: Any) -> str:
    """Return the text of a prompt, or of the last message of a conversation."""
    made = prompt
    if isinstance(made, list) and made and isinstance(made[-1], dict):
        made = made[-1].get("content")
    if isinstance(made, list) and made:
        made = " ".join(part["text"] for part in made if part.get("type") == "text")
    if not isinstance(made, str):
        raise RewardError(f"there is no prompt: {made!r} is not a text")
    return made


def _pictures(made: Any) -> Any:
    """Return pictures as metrics take them; data sets also keep them as dicts and in lists of one."""
    if isinstance(made, dict):
        return made.get("bytes") or made.get("path")
    if isinstance(made, list):
        return _pictures(made[0]) if len(made) == 1 else [_pictures(one) for one in made] or None
    return made

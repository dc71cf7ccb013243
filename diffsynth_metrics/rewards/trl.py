"""Rewards for TRL's GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import torch

from diffsynth_metrics.errors import RewardError
from diffsynth_metrics.rewards.callables import (
    RewardSource,
    ScaleInput,
    as_bytes,
    named,
    scorer_of,
)
from diffsynth_metrics.rewards.scoring import (
    FailurePolicy,
    Scored,
    Scorer,
    Update,
    apply_failure_policy,
    check_policy,
    learns,
    without_frames,
)

__all__ = ["to_trl", "to_trl_async"]

Column: TypeAlias = "str | Callable[..., Any]"
"""A column of the data set, or a function of the sample's completion (or prompt) and columns."""


def to_trl(
    source: RewardSource,
    image: Column,
    *,
    prompt: Column | None = None,
    scale: ScaleInput = None,
    on_failure: FailurePolicy = "nan",
    name: str | None = None,
    update: Update = True,
) -> Callable[..., list[float | None]]:
    """Make a reward function for ``GRPOTrainer(reward_funcs=...)``.

    Args:
        source: A metric, a :class:`RewardSet`, or a callable of (prompts, images).
        image: Where the image of a completion comes from: a column, or a function
            ``image(completion, **row)``. None, or a function that raises ValueError or OSError, says
            that this completion has no image.
        prompt: Where its prompt comes from: a column, or a function ``prompt(prompt, **row)``; by
            default the prompt itself. It is a text, or a conversation, of which the last message is
            taken; anything else says that this completion has no prompt.
        scale: The scale of a metric's score.
        on_failure: What a completion without an image or a score gets; with ``"nan"`` it is None,
            which excludes this function for this completion.
        name: ``__name__``, under which TRL logs; by default the metric's.
        update: Whether the running statistics of a :class:`RewardSet` learn from a call, or a function
            that tells. TRL calls it for evaluation too: pass ``lambda: model.training``.

    Returns:
        A plain function (TRL takes a Module for a reward model). It tells why a completion failed in
        the column ``<name>_error`` of TRL's table of completions.
    """
    scorer = scorer_of(source, scale, name)
    check_policy(on_failure)

    def reward_function(
        prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float | None]:
        rows = _rows(kwargs, len(completions))
        texts = [_prompt_of(prompt, text, row) for text, row in zip(prompts, rows, strict=True)]
        images = [_image_of(image, one, row) for one, row in zip(completions, rows, strict=True)]
        with torch.no_grad():
            scored = _score_present(scorer, texts, images, learns(update))
            values: list[float] = apply_failure_policy(scored, on_failure, scorer.name).tolist()
        if log_extra := kwargs.get("log_extra"):
            log_extra(f"{reward_function.__name__}_error", [reason or "" for reason in scored.reasons])
        return [None if math.isnan(value) else value for value in values]

    return named(reward_function, name or scorer.name)


def to_trl_async(
    source: RewardSource, image: Column, **options: Any
) -> Callable[..., Awaitable[list[float | None]]]:
    """Make the coroutine function of :func:`to_trl`, which TRL runs along with its other ones."""
    function = to_trl(source, image, **options)

    async def reward_function(**kwargs: Any) -> list[float | None]:
        return await asyncio.to_thread(function, **kwargs)

    return named(reward_function, function.__name__)


def _rows(kwargs: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Turn the columns among TRL's keyword arguments into one dict per completion."""
    columns = {
        name: values
        for name, values in kwargs.items()
        if isinstance(values, (list, tuple)) and len(values) == count
    }
    return [{name: values[index] for name, values in columns.items()} for index in range(count)]


def _prompt_of(prompt: Column | None, text: Any, row: dict[str, Any]) -> str | Exception:
    """Return the prompt of a completion, or the error that says why there is none."""
    made = text if prompt is None else _made(prompt, text, row)
    if isinstance(made, list) and made and isinstance(made[-1], dict):
        made = made[-1].get("content")
    if isinstance(made, list) and made:
        return " ".join(part["text"] for part in made if part.get("type") == "text")
    if isinstance(made, (str, Exception)):
        return made
    return RewardError(f"there is no prompt: {made!r} is not a text")


def _image_of(image: Column, completion: Any, row: dict[str, Any]) -> Any:
    """Return the image of a completion, or the error that says why there is none."""
    made = _made(image, completion, row)
    return RewardError("there is no image") if made is None else as_bytes(made)


def _made(column: Column, given: Any, row: dict[str, Any]) -> Any:
    """Return what a row has in a column or a function makes of it, or the function's error."""
    if isinstance(column, str):
        if column not in row:
            raise ValueError(f"the data set has no column {column!r}; it has {', '.join(row)}")
        return row[column]
    try:
        return column(given, **row)
    except (OSError, ValueError) as error:
        return without_frames(error)


def _score_present(scorer: Scorer, prompts: list[Any], images: list[Any], update: bool) -> Scored:
    """Score the completions that have an image and a prompt, in one batch."""
    errors: list[Exception | None] = [
        next((made for made in both if isinstance(made, Exception)), None)
        for both in zip(images, prompts, strict=True)
    ]
    present = [index for index, error in enumerate(errors) if error is None]
    if not present:
        return Scored(torch.full((len(images),), math.nan, dtype=torch.float32), errors)
    scored = scorer.scored([prompts[i] for i in present], [images[i] for i in present], update=update)
    values = scored.values.new_full((len(images),), math.nan)
    values[present] = scored.values
    for index, error in zip(present, scored.errors, strict=True):
        errors[index] = error
    return Scored(values, errors)

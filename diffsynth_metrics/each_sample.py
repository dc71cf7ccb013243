"""Rows of many samples, of which a bad one costs its own row only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.errors import CheckpointError, DownloadError, ServerError
from diffsynth_metrics.inputs import ImageInput

__all__ = ["OF_SAMPLES", "evaluate_each"]

OF_SAMPLES = (OSError, TypeError, ValueError)
"""What a bad sample raises."""


def evaluate_each(
    metric: BaseMetric,
    prompts: Sequence[str],
    images: Sequence[ImageInput],
    sources: Sequence[Sequence[ImageInput]],
) -> list[dict[str, Any] | Exception]:
    """Evaluate samples together and, where that fails, in halves.

    Args:
        metric: A metric that scores single samples.
        prompts: One per sample; ``""`` where there is none.
        images: One per sample.
        sources: The pictures that each was made from; empty where there are none.

    Returns:
        Per sample its row of ``metric.evaluate``, or why it has none. If a server answers nothing, all
        have its :class:`ServerError`.

    Raises:
        CheckpointError, DownloadError, RuntimeError: No sample is at fault.
        TypeError: Rows are not a list of dicts with a number or None as ``"score"``.
    """
    if not images:
        return []
    try:
        arguments = metric.arguments(prompts, images, sources)
        rows = metric.evaluate(*arguments)  # type: ignore[attr-defined]
    except (CheckpointError, DownloadError):
        raise
    except ServerError as error:  # it was asked for each of them, and waited for
        return [error] * len(images)
    except OF_SAMPLES as error:
        if len(images) == 1:
            return [error]
        middle = len(images) // 2
        halves = (slice(middle), slice(middle, None))
        return [
            row
            for half in halves
            for row in evaluate_each(metric, prompts[half], images[half], sources[half])
        ]
    _check_rows(type(metric).__name__, rows, len(images))
    return list(rows)


def _check_rows(name: str, rows: Any, count: int) -> None:
    """Check what a metric gave; what is wrong with it is no sample's fault.

    Raises:
        TypeError: It is no list of dicts with a number or None as ``"score"``.
        RuntimeError: It is not one row per sample.
    """
    wanted = (
        f"{name}.evaluate must return a list of dicts with a 'score', a number or None, one per sample"
    )
    if not isinstance(rows, (list, tuple)):
        raise TypeError(f"{wanted}; it returned {type(rows).__name__}")
    if len(rows) != count:
        raise RuntimeError(f"{wanted}; it gave {len(rows)} rows to {count} samples")
    for row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(f"{wanted}; it returned a list of {type(row).__name__}")
        if "score" not in row:
            raise TypeError(
                f"{wanted}; it returned {', '.join(map(str, row)) or 'nothing'} and no 'score'"
            )
        score = row["score"]
        if score is not None and not isinstance(score, Real):
            raise TypeError(f"{wanted}; it returned the score {score!r:.100}")
        try:
            float(score or 0)
        except OverflowError:
            raise TypeError(f"{wanted}; it returned an int that is too large for a float") from None

"""The rewards of a batch, with the failures of single samples kept apart from the rest."""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from traceback import format_tb
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffsynth_metrics.base import BaseMetric, ImageMetric, PromptMetric, ReferenceMetric
from diffsynth_metrics.errors import RewardError
from diffsynth_metrics.rewards.batches import Batch
from diffsynth_metrics.rewards.scales import ScaleInput, find_scale

__all__ = [
    "ERRORS_OF_A_SAMPLE",
    "FailurePolicy",
    "MetricScorer",
    "Scored",
    "apply_failure_policy",
    "check_policy",
    "stand_in",
    "without_frames",
]

logger = logging.getLogger(__name__)

_RAISED = "It was raised here:\n"

FailurePolicy: TypeAlias = "Literal['raise', 'nan', 'mean'] | float"
"""What a sample gets that has no score, because the metric raised, its image cannot be read, or the
score is not finite: ``"raise"`` is an error, ``"nan"`` is NaN, ``"mean"`` is the mean of the readable
samples of the call (NaN where there is none), and a number is that number."""

ERRORS_OF_A_SAMPLE = (OSError, TypeError, ValueError)
"""What a single bad sample causes; anything else, such as a lack of memory, concerns the whole call."""


@dataclass(frozen=True)
class Scored:
    """Scores of a batch.

    Attributes:
        values: ``[N]``, float32 or wider; NaN where a sample has no score.
        errors: N entries, why a sample has no score; None where it has one.
    """

    values: Tensor
    errors: list[Exception | None]

    @cached_property
    def numbers(self) -> list[float]:
        """The values as plain numbers, read once: a device is waited for."""
        numbers: list[float] = self.values.tolist()
        return numbers

    @property
    def reasons(self) -> list[str | None]:
        """N entries: the errors as text."""
        return [None if error is None else _reason(error) for error in self.errors]


class MetricScorer:
    """A metric on a scale. It may be called from several threads."""

    def __init__(
        self, metric: BaseMetric | Callable[..., Any], scale: ScaleInput = None, name: str | None = None
    ) -> None:
        """Take a metric, or a callable of (prompts, images) that returns one number per sample.

        A callable with a parameter ``sources`` gets there, for each sample, the images that it was made
        from. What gives no score of a single sample is a TypeError or ValueError, and so is a scale
        that it does not have.
        """
        _check_source(metric)
        self.metric = metric
        self.scale = find_scale(metric, scale)
        if self.scale.component != "score" and not isinstance(metric, BaseMetric):
            raise ValueError(
                f"a callable gives one number per sample and has no component {self.scale.component!r}"
            )
        self.name = name or _name(metric)
        self._takes_sources = not isinstance(metric, BaseMetric) and _has_parameter(metric, "sources")

    @property
    def needs_prompts(self) -> bool:
        """Whether a score depends on the prompt."""
        return not isinstance(self.metric, BaseMetric) or "prompt" in self.metric.needs

    @property
    def device(self) -> torch.device:
        """The metric's device."""
        return self.metric.device if isinstance(self.metric, BaseMetric) else torch.device("cpu")

    def to(self, device: str | torch.device) -> MetricScorer:
        """Move the metric to a device; a plain callable is left alone."""
        if isinstance(self.metric, BaseMetric):
            self.metric.to(device)
        return self

    def scored(self, batch: Batch) -> Scored:
        """Score samples; gradients flow as in the metric's ``reward``, and errors are in the result."""
        flat = batch.of_frames()
        images = flat.images if isinstance(flat.images, list) else []
        absent = [image if isinstance(image, Exception) else None for image in images]
        if any(absent):
            kept = [index for index, error in enumerate(absent) if error is None]
            scored = self._spread(absent, kept, self._score_each, flat)
        else:
            scored = self._score_each(flat)
        if batch.frames is None:
            return scored
        # A video with a frame that has no score has none.
        videos = torch.split(scored.values, batch.frames)
        values = torch.stack([one.min() if batch.lowest else one.mean() for one in videos])
        errors = iter(scored.errors)
        of_videos = [[next(errors) for _ in range(count)] for count in batch.frames]
        return Scored(values, [next(filter(None, one), None) for one in of_videos])

    def _score_each(self, batch: Batch) -> Scored:
        """Score samples together, or one by one where one of them makes all fail."""
        try:
            return self._score(batch)
        except ERRORS_OF_A_SAMPLE as error:
            if len(batch) == 1:
                return self._failed([without_frames(error)])
        except Exception as error:
            return self._failed([without_frames(error)] * len(batch))
        alone = [self._score_each(batch.select([index])) for index in range(len(batch))]
        errors = [error for one in alone for error in one.errors]
        # What is missing lies where a callable's numbers lie, which may be no metric's device.
        device = alone[next((i for i, error in enumerate(errors) if error is None), 0)].values.device
        return Scored(torch.cat([one.values.to(device) for one in alone]), errors)

    def _score(self, batch: Batch) -> Scored:
        own = Scored(*self._values(batch))
        finite = list(map(math.isfinite, own.numbers))
        if all(finite):
            scaled = self.scale.apply(own.values)
            return own if scaled is own.values else Scored(scaled, own.errors)
        errors = list(own.errors)
        for index, is_finite in enumerate(finite):
            if not is_finite and errors[index] is None:
                errors[index] = RewardError("the score is not a finite number")
        if own.values.requires_grad:
            # The others are scored again without these, whose gradient is NaN even times 0.
            kept = [index for index, is_finite in enumerate(finite) if is_finite]
            return self._spread(errors, kept, self._score, batch)
        readable = torch.tensor(finite, device=own.values.device)
        return Scored(torch.where(readable, self.scale.apply(own.values), math.nan), errors)

    def _spread(
        self,
        errors: Sequence[Exception | None],
        kept: list[int],
        score: Callable[[Batch], Scored],
        batch: Batch,
    ) -> Scored:
        """Score some of the samples of a batch, and return all of them."""
        if not kept:
            return self._failed(errors)
        scored, all_errors = score(batch.select(kept)), list(errors)
        for index, error in zip(kept, scored.errors, strict=True):
            all_errors[index] = error
        indices = torch.tensor(kept, device=scored.values.device)
        values = scored.values.new_full((len(errors),), math.nan)
        return Scored(values.index_put((indices,), scored.values), all_errors)

    def _values(self, batch: Batch) -> tuple[Tensor, list[Exception | None]]:
        """Return what the metric says before it is scaled, and what is wrong with single samples."""
        metric, prefix, images = self.metric, self.scale.prefix, batch.images
        prompts = [prefix + prompt for prompt in batch.prompts] if prefix else batch.prompts
        errors: list[Exception | None] = [None] * len(prompts)
        if isinstance(metric, BaseMetric):
            arguments = metric.arguments(prompts, images, batch.sources)
            if isinstance(metric, (PromptMetric, ImageMetric, ReferenceMetric)):
                components = metric.components(*arguments)
                numbers = {name: one for name, one in components.items() if one.is_floating_point()}
                values = numbers.get(self.scale.component)
                if values is None:
                    raise self._no_component(numbers)
            else:
                values, errors = self._judged(metric, arguments)
        elif self._takes_sources:
            values = _numbers(metric(prompts, images, sources=batch.sources or [[] for _ in prompts]))
        else:
            values = _numbers(metric(prompts, images))
        if isinstance(metric, BaseMetric) and self.scale.component == "score":
            values = values if metric.card.higher_is_better else -values
        if values.shape != (len(prompts),):
            raise RewardError(
                f"{self.name} gave scores of shape {list(values.shape)} for {len(prompts)} samples"
            )
        return values, errors

    def _judged(self, metric: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, list[Exception | None]]:
        """Ask a judge, whose rows say why a score is missing."""
        component, scores = self.scale.component, []
        errors: list[Exception | None] = []
        for row in metric.evaluate(*arguments):
            score = row.get(component, "")
            if not isinstance(score, (int, float, type(None))):
                raise self._no_component(n for n, v in row.items() if isinstance(v, (int, float)))
            scores.append(math.nan if score is None else float(score))
            reason = str(row.get("error") or "the judge gave no number")
            errors.append(RewardError(reason) if score is None else None)
        return torch.tensor(scores, dtype=torch.float32, device=metric.device), errors

    def _no_component(self, existing: Iterable[str]) -> RewardError:
        return RewardError(
            f"{_name(self.metric)} gives no number {self.scale.component!r} per sample with these "
            f"settings; it gives {', '.join(existing) or 'none'}"
        )

    def _failed(self, errors: Sequence[Exception | None]) -> Scored:
        # In float32, whatever the default dtype of the caller: it decides how the others are rounded.
        values = torch.full((len(errors),), math.nan, dtype=torch.float32, device=self.device)
        return Scored(values, list(errors))


def check_policy(policy: FailurePolicy) -> FailurePolicy:
    """Return a failure policy; what is none is a ValueError."""
    number = isinstance(policy, (int, float)) and not isinstance(policy, bool)
    if not number and policy not in ("raise", "nan", "mean"):
        raise ValueError(f"on_failure must be 'raise', 'nan', 'mean' or a number, got {policy!r}")
    return policy


def apply_failure_policy(scored: Scored, policy: FailurePolicy, name: str) -> Tensor:
    """Give the failed samples what the policy says, and tell of them; ``"raise"`` is a RewardError."""
    failed = [index for index, error in enumerate(scored.errors) if error is not None]
    if not failed:
        return scored.values
    first, count = failed[0], len(scored.errors)
    error, reason = scored.errors[first], scored.reasons[first]
    if policy == "raise":
        raise RewardError(f"{name}: sample {first} of {count} has no reward: {reason}") from error
    message = "%s: %d of %d samples have no reward; sample %d: %s"
    logger.warning(message, name, len(failed), count, first, reason)
    return stand_in(scored.values, policy)


def stand_in(values: Tensor, policy: FailurePolicy) -> Tensor:
    """Give NaN what the policy says; ``"raise"`` is left to others."""
    if policy in ("raise", "nan"):
        return values
    substitute = values.detach().nanmean() if policy == "mean" else float(policy)
    return torch.where(values.isnan(), substitute, values)


def without_frames(error: Exception) -> Exception:
    """Keep where an error was raised as a note, so that it can be kept.

    The frames of a traceback hold their variables, here the batch and its graph, until Python looks for
    cycles, which a lack of memory on a device does not make it do.
    """
    linked: list[BaseException | None] = [error]
    for one in linked:
        if one is not None and one.__traceback__ is not None:
            linked += [one.__cause__, one.__context__]
            notes = [note for note in getattr(one, "__notes__", []) if not note.startswith(_RAISED)]
            vars(one)["__notes__"] = [*notes, _RAISED + "".join(format_tb(one.__traceback__))]
            one.__traceback__ = None
    return error


def _check_source(source: Any) -> None:
    """Check that a source gives a score of a single sample."""
    expected = "a reward must be a loaded metric that scores images one by one, or a function"
    if isinstance(source, type):
        raise TypeError(f"{expected}; got the class {source.__name__}: load it with from_pretrained")
    if not isinstance(source, BaseMetric):
        if not callable(source):
            raise TypeError(f"{expected}; got {type(source).__name__}")
        return
    try:
        source.arguments([""], [None], [[None]])  # type: ignore[list-item]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{expected}: {error}") from error


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of what is written in C
        return False


def _numbers(scores: Any) -> Tensor:
    """Read what a callable returned: a tensor, an array, or numbers and None."""
    if isinstance(scores, (str, Mapping, Set)):
        raise RewardError(f"a reward must return a list or tensor of numbers, got {scores!r:.100}")
    if isinstance(scores, Tensor):
        return scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = [math.nan if score is None else score for score in scores]
    tensors = [score for score in scores if isinstance(score, Tensor)]
    if not tensors:
        return torch.tensor([float(score) for score in scores], dtype=torch.float32)
    # With their gradients, which float() would cut off.
    like = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32))
    return torch.stack([torch.as_tensor(score).to(like).reshape(()) for score in scores])


def _reason(error: Exception) -> str:
    # A sample was scored alone, and who reads its reason knows its number.
    text = re.sub(r"(^image|\bsample) 0\b", r"the \1", str(error))
    return text if isinstance(error, RewardError) and text else f"{type(error).__name__}: {text}"


def _name(metric: Any) -> str:
    """Return the name as flow_grpo spells it: ``PickScoreMetric`` is ``pickscore``."""
    if isinstance(metric, BaseMetric):
        return type(metric).__name__.removesuffix("Metric").lower()
    return getattr(metric, "__name__", type(metric).__name__)

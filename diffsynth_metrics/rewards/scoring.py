"""The rewards of a batch, with the failures of single samples kept apart from the rest."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from traceback import format_tb
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from diffsynth_metrics.base import BaseMetric, ImageMetric, PromptMetric, ReferenceMetric
from diffsynth_metrics.errors import RewardError
from diffsynth_metrics.rewards.scales import Scale, find_scale

__all__ = [
    "ERRORS_OF_A_SAMPLE",
    "FailurePolicy",
    "MetricScorer",
    "Scored",
    "Scorer",
    "Update",
    "apply_failure_policy",
    "as_batch",
    "check_policy",
    "learns",
    "stand_in",
    "without_frames",
]

logger = logging.getLogger(__name__)

_RAISED = "It was raised here:\n"

FailurePolicy: TypeAlias = "Literal['raise', 'nan', 'mean'] | float"
"""What a sample gets that has no score, because the metric raised, its image cannot be read, or the
score is not finite: ``"raise"`` is an error, ``"nan"`` is NaN, ``"mean"`` is the mean of the readable
samples of the call (NaN where there is none), and a number is that number."""

Update: TypeAlias = "bool | Callable[[], bool]"
"""Whether the running statistics of a ``RewardSet`` learn from a call; a function is asked each time."""

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


class Scorer(Protocol):
    """What an adapter needs of a metric or of a set of them."""

    @property
    def name(self) -> str:
        """A short name."""

    @property
    def needs_prompts(self) -> bool:
        """Whether a score depends on the prompt."""

    def scored(self, prompts: Sequence[str], images: Any, *, update: bool = True) -> Scored:
        """Score N prompts with N images; errors of samples are in the result, not raised.

        Running statistics learn from the call if `update` says so.
        """

    def to(self, device: str | torch.device) -> Any:
        """Move what can be moved."""


class MetricScorer:
    """A metric on a scale. It may be called from several threads."""

    def __init__(
        self,
        metric: BaseMetric | Callable[[list[str], Any], Any],
        scale: str | float | Scale | None = None,
        name: str | None = None,
    ) -> None:
        """Take a metric, or a callable of (prompts, images) that returns one number per sample.

        Raises:
            TypeError: It is neither.
            ValueError: The metric has no such scale, or the callable has no components.
        """
        if isinstance(metric, type):
            raise TypeError(
                "a reward must be a loaded metric or a function, got the class "
                f"{metric.__name__}; load it with from_pretrained"
            )
        rewards = hasattr(metric, "reward") if isinstance(metric, BaseMetric) else callable(metric)
        if not rewards or isinstance(metric, ReferenceMetric):
            raise TypeError(
                "a reward must be a metric that scores images one by one and without references, or a "
                f"callable; got {type(metric).__name__}"
            )
        self.metric = metric
        self.scale = find_scale(metric, scale)
        if self.scale.component != "score" and not isinstance(metric, BaseMetric):
            raise ValueError(
                f"a callable gives one number per sample and has no component {self.scale.component!r}"
            )
        self.name = name or _name(metric)

    @property
    def needs_prompts(self) -> bool:
        """Whether a score depends on the prompt."""
        return not isinstance(self.metric, ImageMetric)

    def to(self, device: str | torch.device) -> MetricScorer:
        """Move the metric to a device; a plain callable is left alone."""
        if isinstance(self.metric, BaseMetric):
            self.metric.to(device)
        return self

    def scored(self, prompts: Sequence[str], images: Any, *, update: bool = True) -> Scored:
        """Score pairs; gradients flow as in the metric's ``reward``. There is nothing to update."""
        prompts = as_batch(prompts, images)
        try:
            return self._score(prompts, images)
        except ERRORS_OF_A_SAMPLE as error:
            if len(prompts) == 1:
                return _failed(1, error, self._device())
        except Exception as error:
            return _failed(len(prompts), error, self._device())
        alone = [self.scored(prompts[i : i + 1], images[i : i + 1]) for i in range(len(prompts))]
        errors = [error for one in alone for error in one.errors]
        # What is missing lies where a callable's numbers lie, which may be no metric's device.
        device = alone[next((i for i, error in enumerate(errors) if error is None), 0)].values.device
        return Scored(torch.cat([one.values.to(device) for one in alone]), errors)

    def _score(self, prompts: list[str], images: Any) -> Scored:
        prefix = self.scale.prefix
        texts = [prefix + prompt for prompt in prompts] if prefix else prompts
        own = Scored(*self._values(texts, images))
        values, errors = own.values, own.errors
        finite = list(map(math.isfinite, own.numbers))
        if all(finite):
            scaled = self.scale.apply(values)
            return own if scaled is values else Scored(scaled, errors)
        for index, is_finite in enumerate(finite):
            if not is_finite and errors[index] is None:
                errors[index] = RewardError("the score is not a finite number")
        if values.requires_grad:
            return self._score_finite(prompts, images, finite, errors)
        readable = torch.tensor(finite, device=values.device)
        return Scored(torch.where(readable, self.scale.apply(values), math.nan), errors)

    def _score_finite(
        self, prompts: list[str], images: Any, finite: list[bool], errors: list[Exception | None]
    ) -> Scored:
        """Score the finite samples without the others, whose gradient is NaN even times 0."""
        kept = [index for index, is_finite in enumerate(finite) if is_finite]
        if not kept:
            return Scored(_missing(len(prompts), self._device()), errors)
        pictures = images[kept] if isinstance(images, Tensor) else [images[index] for index in kept]
        alone = self._score([prompts[index] for index in kept], pictures)
        for index, error in zip(kept, alone.errors, strict=True):
            errors[index] = error
        places = torch.tensor(kept, device=alone.values.device)
        values = alone.values.new_full((len(prompts),), math.nan).index_put((places,), alone.values)
        return Scored(values, errors)

    def _values(self, prompts: list[str], images: Any) -> tuple[Tensor, list[Exception | None]]:
        """Return what the metric says before it is scaled, and what is wrong with single samples."""
        metric = self.metric
        errors: list[Exception | None] = [None] * len(prompts)
        if isinstance(metric, (PromptMetric, ImageMetric)):
            values = self._component(metric, prompts, images)
        elif isinstance(metric, BaseMetric):
            values, errors = _judged(metric, prompts, images, self.scale.component)
        else:
            values = _numbers(metric(prompts, images))
        if values.shape != (len(prompts),):
            raise RewardError(
                f"{self.name} gave scores of shape {list(values.shape)} for {len(prompts)} samples"
            )
        return values, errors

    def _component(self, metric: PromptMetric | ImageMetric, prompts: list[str], images: Any) -> Tensor:
        name = self.scale.component
        if isinstance(metric, ImageMetric):
            components = metric.components(images)
        else:
            components = metric.components(prompts, images)
        numbers = {key: values for key, values in components.items() if values.is_floating_point()}
        if name not in numbers:
            raise _no_component(metric, name, numbers)
        return numbers[name]

    def _device(self) -> torch.device:
        return self.metric.device if isinstance(self.metric, BaseMetric) else torch.device("cpu")


def as_batch(prompts: Sequence[str], images: Any) -> list[str]:
    """Return the prompts of N samples as a list.

    Raises:
        TypeError: The prompts are a single one, whose letters would be taken for prompts.
        ValueError: There is a single picture, whose rows would be taken for pictures; or the numbers
            differ, or are 0.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list, one per image, got the str {prompts!r}")
    if getattr(images, "ndim", 4) == 3:
        raise ValueError(
            "images must be a batch [N, 3, H, W], an array [N, H, W, 3] or a list, "
            f"got a single one of shape {list(images.shape)}"
        )
    prompts = list(prompts)
    counts = hasattr(images, "__len__") and not isinstance(images, (str, bytes))
    if not counts or len(images) != len(prompts):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(images) if counts else type(images).__name__} images"
        )
    if not prompts:
        raise ValueError("there are no prompts and no images; pass at least one pair")
    return prompts


def learns(update: Update) -> bool:
    """Decide whether running statistics learn from this call."""
    return update() if callable(update) else update


def check_policy(policy: FailurePolicy) -> FailurePolicy:
    """Return a failure policy.

    Raises:
        ValueError: It is none.
    """
    number = isinstance(policy, (int, float)) and not isinstance(policy, bool)
    if not number and policy not in ("raise", "nan", "mean"):
        raise ValueError(f"on_failure must be 'raise', 'nan', 'mean' or a number, got {policy!r}")
    return policy


def apply_failure_policy(scored: Scored, policy: FailurePolicy, name: str) -> Tensor:
    """Give the failed samples what the policy says.

    Raises:
        Exception: With ``"raise"``: the metric's own error, or a :class:`RewardError`, which names
            the metric and the sample.
    """
    failed = [index for index, error in enumerate(scored.errors) if error is not None]
    if not failed:
        return scored.values
    first, count = failed[0], len(scored.errors)
    reason = scored.reasons[first]
    if policy == "raise":
        raise RewardError(f"{name}: sample {first} of {count} has no reward: {reason}") from (
            scored.errors[first]
        )
    logger.warning(
        "%s: %d of %d samples have no reward; sample %d: %s", name, len(failed), count, first, reason
    )
    return stand_in(scored.values, policy)


def stand_in(values: Tensor, policy: FailurePolicy) -> Tensor:
    """Put what the policy says in the place of NaN; ``"raise"`` leaves it to others."""
    if policy in ("raise", "nan"):
        return values
    substitute = values.detach().nanmean() if policy == "mean" else float(policy)
    return torch.where(values.isnan(), substitute, values)


def _judged(
    metric: BaseMetric, prompts: list[str], images: Any, component: str
) -> tuple[Tensor, list[Exception | None]]:
    """Ask a judge, whose rows say why a score is missing."""
    rows = metric.evaluate(prompts, images)  # type: ignore[attr-defined]
    for row in rows:
        if not isinstance(row.get(component, ""), (int, float, type(None))):
            numbers = [name for name, value in row.items() if isinstance(value, (int, float))]
            raise _no_component(metric, component, numbers)
    scores = [math.nan if row[component] is None else float(row[component]) for row in rows]
    errors: list[Exception | None] = [
        RewardError(str(row.get("error") or "the judge gave no number"))
        if row[component] is None
        else None
        for row in rows
    ]
    return torch.tensor(scores, dtype=torch.float32, device=metric.device), errors


def _no_component(metric: BaseMetric, component: str, existing: Iterable[str]) -> RewardError:
    return RewardError(
        f"{_name(metric)} gives no number {component!r} per sample with these settings; "
        f"it gives {', '.join(existing) or 'none'}"
    )


def _numbers(scores: Any) -> Tensor:
    """Read what a callable returned: a tensor, an array, or numbers and None."""
    if isinstance(scores, Tensor):
        return scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = [math.nan if score is None else score for score in scores]
    tensors = [score for score in scores if isinstance(score, Tensor)]
    if not tensors:
        return torch.tensor([float(score) for score in scores], dtype=torch.float32)
    # With their gradients, which float() would cut off.
    like = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32))
    return torch.stack([torch.as_tensor(score).to(like).reshape(()) for score in scores])


def _failed(count: int, error: Exception, device: torch.device) -> Scored:
    return Scored(_missing(count, device), [without_frames(error)] * count)


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


def _missing(count: int, device: torch.device) -> Tensor:
    # In float32, whatever the default dtype of the caller: it decides what the others are rounded to.
    return torch.full((count,), math.nan, dtype=torch.float32, device=device)


def _reason(error: Exception) -> str:
    # A sample was scored alone, and who reads its reason knows its number.
    text = re.sub(r"^image 0\b", "the image", str(error))
    return text if isinstance(error, RewardError) and text else f"{type(error).__name__}: {text}"


def _name(metric: Any) -> str:
    """Return the name as flow_grpo spells it: ``PickScoreMetric`` is ``pickscore``."""
    if isinstance(metric, BaseMetric):
        return type(metric).__name__.removesuffix("Metric").lower()
    return getattr(metric, "__name__", type(metric).__name__)

"""Several metrics as one reward, weighted and normalised."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from diffsynth_metrics.base import BaseMetric, ImageMetric, PromptMetric, ReferenceMetric
from diffsynth_metrics.errors import RewardError
from diffsynth_metrics.inputs import SharedImages, as_prompts, as_rgb, is_one_image
from diffsynth_metrics.modes import wants_gradients
from diffsynth_metrics.rewards.batches import Batch, Frames, as_batch, check_frames
from diffsynth_metrics.rewards.normalization import Normalization, collapsed, find_normalization
from diffsynth_metrics.rewards.scales import ScaleInput
from diffsynth_metrics.rewards.scoring import (
    ERRORS_OF_A_SAMPLE,
    FailurePolicy,
    MetricScorer,
    Scored,
    apply_failure_policy,
    check_policy,
)

__all__ = ["Component", "RewardResult", "RewardSet"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Component:
    """One metric of a :class:`RewardSet`.

    Attributes:
        metric: A metric, or a callable of (prompts, images) that returns one number per sample; if it
            has a parameter ``sources``, it also gets the source images of each sample.
        weight: What the normalised score is multiplied with; negative where less is wanted.
        normalize: ``"none"``, ``"group"``, ``"rank"``, or an object such as ``FixedScale(mean, std)`` or
            ``GroupRelative(group_size=8)``.
        scale: The scale of the score before it is normalised, see ``rewards.SCALES``.
    """

    metric: BaseMetric | Callable[..., Any]
    weight: float = 1.0
    normalize: str | Normalization = "none"
    scale: ScaleInput = None


@dataclass(frozen=True)
class RewardResult:
    """What a :class:`RewardSet` says about a batch of N samples.

    Attributes:
        reward: ``[N]``, the weighted sum of `normalized`; for a sample of which a component failed what
            the call's `on_failure` says.
        raw: Name of a component or held-out metric to its scores ``[N]``, NaN where it failed.
        normalized: Name of a component to what was weighted, ``[N]``.
        failures: Name to {number of the sample: the reason}; only what failed.
        collapsed: Name of a component, and ``"reward"``, to the groups (as given, or their prompts) from
            which nothing can be learned: their scores are all equal, or there is one score only and it
            is normalised within groups.
        errors: N entries, why a sample has no reward; None where it has one.
    """

    reward: Tensor
    raw: dict[str, Tensor]
    normalized: dict[str, Tensor]
    failures: dict[str, dict[int, str]] = field(default_factory=dict)
    collapsed: dict[str, list[Hashable]] = field(default_factory=dict)
    errors: list[Exception | None] = field(default_factory=list)

    @property
    def means(self) -> dict[str, float]:
        """Name to the mean of its readable scores in `raw`; NaN where there is none."""
        return {name: float(values.detach().nanmean()) for name, values in self.raw.items()}


class RewardSet:
    """A weighted sum of metrics that can be used wherever one metric can.

    Images are checked once, and prepared once for each distinct transform. It may be called from
    several threads, and no call changes what the next one returns.

    Example:
        >>> rewards = RewardSet({"pickscore": Component(pickscore, normalize="group")})
        >>> rewards.score(prompts, images).reward
    """

    def __init__(
        self,
        components: Mapping[str, Component | BaseMetric | Callable[..., Any]],
        *,
        held_out: Mapping[str, BaseMetric | Callable[..., Any]] | None = None,
    ) -> None:
        """Combine metrics.

        Args:
            components: Name to component; a metric alone has weight 1 and is not normalised.
            held_out: Metrics that are computed, and do not count.
        """
        held_out = {} if held_out is None else held_out
        for named in (components, held_out):
            if not isinstance(named, Mapping):
                raise TypeError(
                    'a RewardSet takes a dict of names and metrics, such as {"pickscore": metric}; got '
                    f"{type(named).__name__}"
                )
        if not components:
            raise ValueError("a RewardSet needs at least one component")
        if both := sorted({*components} & {*held_out}) or [n for n in components if n == "reward"]:
            raise ValueError(f"the name {both[0]!r} is used twice; 'reward' is the name of the sum")
        self.components = {
            name: component if isinstance(component, Component) else Component(component)
            for name, component in components.items()
        }
        self.name = "+".join(self.components)
        self._scorers = {
            name: MetricScorer(component.metric, component.scale, name)
            for name, component in self.components.items()
        }
        self._held_out = {name: MetricScorer(metric, None, name) for name, metric in held_out.items()}
        for name, component in self.components.items():
            if not math.isfinite(component.weight):
                raise ValueError(f"the weight of {name!r} must be finite, got {component.weight!r}")
        self._normalizations = {
            name: find_normalization(component.normalize) for name, component in self.components.items()
        }

    def score(
        self,
        prompt: str | Sequence[str],
        images: Any,
        sources: Any = None,
        *,
        groups: Sequence[Hashable] | Tensor | None = None,
        frames: Frames | None = None,
        on_failure: FailurePolicy = "raise",
    ) -> RewardResult:
        """Score N samples with every metric.

        Args:
            prompt: One prompt for all images, or as many prompts as images.
            images: One image or several, see ``PromptMetric.compute``; or a list of videos.
            sources: For each sample the image that it was made from, several, or None.
            groups: What group each sample belongs to, anything hashable or a tensor ``[N]``; by default
                samples of one prompt (and of the same source files or pictures) are a group. All samples
                of a group must be in this call.
            frames: What becomes of the frames of a video: the ``"mean"`` or ``"min"`` of their scores,
                the ``"first"`` or ``"middle"`` frame alone, or ``"all"`` as one list for a function.
            on_failure: What becomes of a sample's reward where a component has no score for it.

        Returns:
            The reward with everything it is made of. Gradients flow to the pixels as in a metric's
            ``reward``; statistics carry none.

        Raises:
            ValueError: The numbers of prompts, images, sources and groups differ; a group does not have
                the `group_size` of a normalisation; or gradients are wanted through ranks.
            RewardError: A sample has no reward, and `on_failure` is ``"raise"``.
        """
        check_policy(on_failure)
        images = [images] if is_one_image(images) else images
        prompts = as_prompts(prompt) * (len(images) if isinstance(prompt, str) else 1)
        batch = as_batch(prompts, images, sources, check_frames(frames))
        result = self.result(batch, groups=groups)
        scored = Scored(result.reward, result.errors)
        return replace(result, reward=apply_failure_policy(scored, on_failure, self.name))

    def reward(
        self, prompt: str | Sequence[str], images: Any, sources: Any = None, **options: Any
    ) -> Tensor:
        """Score like :meth:`score`, which takes the same arguments, and return the reward alone."""
        return self.score(prompt, images, sources, **options).reward

    def scored(self, batch: Batch) -> Scored:
        """Score a batch for an adapter: a sample that fails is NaN with its reason, and not raised."""
        result = self.result(batch)
        return Scored(result.reward, result.errors)

    def result(self, batch: Batch, *, groups: Sequence[Hashable] | Tensor | None = None) -> RewardResult:
        """Score like :meth:`score`; a sample without a score is NaN, and `errors` says why."""
        as_prompts(batch.prompts)
        members = _members(self._groups_of(batch) if groups is None else groups, len(batch))
        self._check(batch, members)
        scores = self._scores(batch)
        normalized: dict[str, Tensor] = {}
        total: Tensor | None = None
        for name, component in self.components.items():
            normalize = self._normalizations[name]
            normalized[name] = normalize(scores[name], [*members.values()])
            part = component.weight * normalized[name]
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        reasons = {name: scored.reasons for name, scored in scores.items() if any(scored.errors)}
        return RewardResult(
            total,
            {name: scored.values for name, scored in scores.items()},
            normalized,
            {name: {i: why for i, why in enumerate(of) if why} for name, of in reasons.items()},
            self._collapsed(scores, Scored(total, []), members),
            _errors(total, {name: scores[name] for name in self.components if name in reasons}),
        )

    def _groups_of(self, batch: Batch) -> list[Hashable]:
        """Return the prompts, and where there are sources their files or what tells their pictures."""
        if not batch.sources:
            return [*batch.prompts]
        # Trainers repeat a source as other objects, which only matters where groups do.
        of_picture: Callable[[Any], Hashable] = _digest if self.group_sizes else id

        def name(source: Any) -> Hashable:
            is_path = isinstance(source, (str, os.PathLike))
            return os.fspath(source) if is_path else of_picture(source)

        return [
            (prompt, *map(name, of)) for prompt, of in zip(batch.prompts, batch.sources, strict=True)
        ]

    def _check(self, batch: Batch, members: Mapping[Hashable, Sequence[int]]) -> None:
        """Check what normalisations need: whole groups, and no gradient through ranks."""
        for name, normalize in self._normalizations.items():
            for key, samples in members.items():
                if normalize.group_size not in (None, len(samples)):
                    raise ValueError(
                        f"pass whole groups: {name!r} is normalised within groups of "
                        f"{normalize.group_size}, and this call has {len(samples)} samples of {key!r}; "
                        "where a trainer gathers groups over several calls or processes, leave the "
                        "normalisation to it"
                    )
            if not normalize.differentiable and wants_gradients(batch.images):
                raise ValueError(
                    f"{name!r} is normalised by ranks, which have no gradient; use another "
                    "normalisation, or call it under torch.no_grad()"
                )

    def _scores(self, batch: Batch) -> dict[str, Scored]:
        """Ask every metric, the held-out ones without gradients."""
        scorers = (*self._scorers.values(), *self._held_out.values())
        shared = _shared(batch, scorers) if len(scorers) > 1 else batch

        def ask(scorer: MetricScorer) -> Scored:
            takes_shared = isinstance(scorer.metric, (PromptMetric, ImageMetric, ReferenceMetric))
            return scorer.scored(shared if takes_shared else batch)

        scores = {name: ask(scorer) for name, scorer in self._scorers.items()}
        with torch.no_grad():
            return scores | {name: ask(scorer) for name, scorer in self._held_out.items()}

    def _collapsed(
        self, scores: Mapping[str, Scored], total: Scored, members: Mapping[Hashable, Sequence[int]]
    ) -> dict[str, list[Hashable]]:
        """Return the groups that say nothing, and tell of those that have a single sample."""
        keys, samples = [*members], [*members.values()]
        found = {}
        for name in self.components:
            within = self._normalizations[name].within_groups
            found[name] = collapsed(scores[name].numbers, samples, alone=within)
        found["reward"] = collapsed(total.numbers, samples, alone=bool(self.group_sizes))
        single = [keys[index] for index in found["reward"] if len(samples[index]) == 1]
        if single:
            logger.warning(
                "%s: %d of %d groups have a single sample in this call, which is compared with nothing, "
                "the first is %r; pass all samples of a group in one call, or leave the normalisation "
                "to the trainer",
                *(self.name, len(single), len(samples), single[0]),
            )
        return {name: [keys[index] for index in flat] for name, flat in found.items() if flat}

    @property
    def needs_prompts(self) -> bool:
        """Whether one of the metrics looks at the prompt."""
        scorers = (*self._scorers.values(), *self._held_out.values())
        return any(scorer.needs_prompts for scorer in scorers)

    @property
    def group_sizes(self) -> list[int | None]:
        """The size that each normalisation within groups wants; empty where there is none."""
        return [one.group_size for one in self._normalizations.values() if one.within_groups]

    @property
    def device(self) -> torch.device:
        """The device of the first metric, where rewards are."""
        return next(iter(self._scorers.values())).device

    def to(self, device: str | torch.device) -> RewardSet:
        """Move every metric to a device and return the set."""
        for scorer in (*self._scorers.values(), *self._held_out.values()):
            scorer.to(device)
        return self


def _shared(batch: Batch, scorers: Sequence[MetricScorer]) -> Batch:
    """Check and share images; where one is wrong they stay as they are, and each metric says which."""
    transforms = [getattr(scorer.metric, "transform", None) for scorer in scorers]
    try:
        return replace(batch, images=SharedImages(batch.images, transforms))
    except (OSError, TypeError, ValueError):
        return batch


def _digest(picture: Any) -> str:
    """Return a short name of the pixels of a picture, or of the object if they cannot be read."""
    try:
        if isinstance(picture, PIL.Image.Image):
            picture = as_rgb(picture)  # bytes of a palette say nothing of colours
        if isinstance(picture, Tensor):
            picture = picture.float().numpy(force=True)
        pixels = np.asarray(picture)
    except ERRORS_OF_A_SAMPLE:
        return f"object {id(picture)}"
    return hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()[:16]


def _members(groups: Any, count: int) -> dict[Hashable, list[int]]:
    """Return the samples of each group, in the order in which the groups appear."""
    entries = groups.tolist() if isinstance(groups, (Tensor, np.ndarray)) else groups
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise TypeError(f"groups must be a sequence with one entry per sample, got {groups!r}")
    if len(entries) != count:
        raise ValueError(f"got {len(entries)} groups for {count} samples")
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(entries):
        members.setdefault(group.item() if isinstance(group, Tensor) else group, []).append(index)
    return members


def _errors(total: Tensor, failed: Mapping[str, Scored]) -> list[Exception | None]:
    """Return for each sample without a reward an error with the reasons of its components."""
    errors: list[Exception | None] = [None] * len(total)
    for index, value in enumerate(total.detach().tolist()):
        if not math.isnan(value):
            continue
        causes = {name: scored for name, scored in failed.items() if scored.errors[index] is not None}
        reasons = [f"{name}: {scored.reasons[index]}" for name, scored in causes.items()]
        error = RewardError("; ".join(reasons) or "the sum is not a number")
        error.__cause__ = next((one.errors[index] for one in causes.values()), None)
        errors[index] = error
    return errors

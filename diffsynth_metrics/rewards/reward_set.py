"""Several metrics as one reward, weighted and normalised."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from diffsynth_metrics.base import BaseMetric, ImageMetric, PromptMetric
from diffsynth_metrics.errors import RewardError
from diffsynth_metrics.inputs import SharedImages, as_prompts
from diffsynth_metrics.modes import wants_gradients
from diffsynth_metrics.rewards.normalization import (
    Moments,
    Normalization,
    RunningZScore,
    collapsed,
    find_normalization,
)
from diffsynth_metrics.rewards.scales import Scale
from diffsynth_metrics.rewards.scoring import (
    FailurePolicy,
    MetricScorer,
    Scored,
    apply_failure_policy,
    as_batch,
    check_policy,
)

__all__ = ["Component", "RewardResult", "RewardSet"]

_NOTHING_LEARNED = (
    "its running statistics have seen no score yet; score with update=True first, or load a state"
)


@dataclass(frozen=True)
class Component:
    """One metric of a :class:`RewardSet`.

    Attributes:
        metric: A metric, or a callable of (prompts, images) that returns one number per sample.
        weight: What the normalised score is multiplied with; negative where less is wanted.
        normalize: ``"none"``, ``"zscore"`` (running), ``"group"``, ``"rank"``, or an object such as
            ``FixedScale(mean, std)``.
        scale: The scale of the score before it is normalised, see ``rewards.SCALES``.
    """

    metric: BaseMetric | Callable[[list[str], Any], Any]
    weight: float = 1.0
    normalize: str | Normalization = "none"
    scale: str | float | Scale | None = None


@dataclass(frozen=True)
class RewardResult:
    """What a :class:`RewardSet` says about a batch of N samples.

    Attributes:
        reward: ``[N]``, the weighted sum of `normalized`. A sample of which a component failed is NaN,
            or what the call's `on_failure` says.
        raw: Name of a component or held-out metric to its scores ``[N]`` on its scale; NaN where it
            failed.
        normalized: Name of a component to what was weighted, ``[N]``.
        failures: Name to {number of the sample: the reason}; only what failed.
        collapsed: Name of a component to the groups (as given, or their prompts) whose scores are all
            equal, from which nothing can be learned. The sum is listed as ``"reward"``.
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
    several threads; running statistics then depend on which call comes first.

    Example:
        >>> rewards = RewardSet({"pickscore": Component(pickscore, normalize="group")})
        >>> rewards.score(prompts, images).reward
    """

    def __init__(
        self,
        components: Mapping[str, Component | BaseMetric],
        *,
        held_out: Mapping[str, BaseMetric] | None = None,
    ) -> None:
        """Combine metrics.

        Args:
            components: Name to component; a metric alone has weight 1 and is not normalised.
            held_out: Metrics that are computed, and do not count.

        Raises:
            ValueError: There is no component, a name is used twice, or a setting is wrong.
            TypeError: Something is no metric.
        """
        if not components:
            raise ValueError("a RewardSet needs at least one component")
        held_out = dict(held_out or {})
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
        self._normalizations: dict[str, Normalization] = {}
        for name, component in self.components.items():
            if not math.isfinite(component.weight):
                raise ValueError(f"the weight of {name!r} must be finite, got {component.weight!r}")
            self._normalizations[name] = find_normalization(component.normalize)
        if len(set(map(id, self._normalizations.values()))) < len(self._normalizations):
            raise ValueError("two components share one normalisation object; give each its own")

    def score(
        self,
        prompt: str | Sequence[str],
        images: Any,
        *,
        groups: Sequence[Hashable] | Tensor | None = None,
        update: bool = True,
        on_failure: FailurePolicy = "raise",
    ) -> RewardResult:
        """Score N samples with every metric.

        Args:
            prompt: One prompt for all images, or as many prompts as images.
            images: One image or several, see ``PromptMetric.compute``.
            groups: What group each sample belongs to, anything hashable or a tensor ``[N]``; by default
                samples of one prompt are a group. All samples of a group must be in this call.
            update: Whether running statistics learn from the readable scores of this call; False for
                evaluation.
            on_failure: What becomes of a sample's reward where a component has no score for it.

        Returns:
            The reward with everything it is made of. Gradients flow to the pixels as in a metric's
            ``reward``; statistics carry none.

        Raises:
            ValueError: The numbers of prompts, images and groups differ; or gradients are wanted
                through ranks, which have none.
            RewardError: A sample has no reward, and `on_failure` is ``"raise"``.
            TypeError: A group is not hashable.
        """
        check_policy(on_failure)
        prompts, images = _aligned(prompt, images)
        result = self.result(prompts, images, groups=groups, update=update)
        scored = Scored(result.reward, result.errors)
        return replace(result, reward=apply_failure_policy(scored, on_failure, self.name))

    def reward(self, prompt: str | Sequence[str], images: Any, **options: Any) -> Tensor:
        """Score like :meth:`score`, and return the reward alone."""
        return self.score(prompt, images, **options).reward

    def scored(self, prompts: Sequence[str], images: Any, *, update: bool = True) -> Scored:
        """Score a batch for an adapter: a sample that fails is NaN with its reason, and not raised."""
        result = self.result(prompts, images, update=update)
        return Scored(result.reward, result.errors)

    def result(
        self,
        prompts: Sequence[str],
        images: Any,
        *,
        groups: Sequence[Hashable] | Tensor | None = None,
        update: bool = True,
    ) -> RewardResult:
        """Score like :meth:`score`; a sample without a score is NaN, and `errors` says why."""
        prompts = as_prompts(as_batch(prompts, images))
        members = _members([*prompts] if groups is None else _keys(groups), len(prompts))
        keys, samples = [*members], [*members.values()]
        self._check_gradients(images)
        scores = self._scores(prompts, images, update=update)
        normalized: dict[str, Tensor] = {}
        total: Tensor | None = None
        for name, component in self.components.items():
            normalized[name] = self._normalizations[name](scores[name], samples, update=update)
            part = component.weight * normalized[name]
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        flat_groups: dict[str, list[Hashable]] = {}
        if len(keys) < len(prompts):
            summed = Scored(total, [])
            for name, scored in {**{n: scores[n] for n in self.components}, "reward": summed}.items():
                if flat := collapsed(scored.numbers, samples):
                    flat_groups[name] = [keys[index] for index in flat]
        failed = {n: scores[n] for n in self.components if any(scores[n].errors)}
        raw = {name: scored.values for name, scored in scores.items()}
        errors = _errors(total, failed)
        return RewardResult(total, raw, normalized, _failures(scores), flat_groups, errors)

    def _scores(self, prompts: list[str], images: Any, *, update: bool) -> dict[str, Scored]:
        """Ask every metric, the held-out ones without gradients."""
        scorers = (*self._scorers.values(), *self._held_out.values())
        shared = _shared(images, scorers) if len(scorers) > 1 else images

        def ask(scorer: MetricScorer) -> Scored:
            takes_shared = isinstance(scorer.metric, (PromptMetric, ImageMetric))
            return scorer.scored(prompts, shared if takes_shared else images)

        scores = {name: ask(scorer) for name, scorer in self._scorers.items()}
        for name, normalize in self._normalizations.items():
            if not (update or normalize.is_ready):
                values, errors = scores[name].values, scores[name].errors
                scores[name] = Scored(values, [e or RewardError(_NOTHING_LEARNED) for e in errors])
        with torch.no_grad():
            return scores | {name: ask(scorer) for name, scorer in self._held_out.items()}

    @property
    def needs_prompts(self) -> bool:
        """Whether one of the metrics looks at the prompt."""
        scorers = (*self._scorers.values(), *self._held_out.values())
        return any(scorer.needs_prompts for scorer in scorers)

    @property
    def within_groups(self) -> bool:
        """Whether a sample's reward depends on the other samples of its call."""
        return any(normalize.within_groups for normalize in self._normalizations.values())

    def to(self, device: str | torch.device) -> RewardSet:
        """Move every metric to a device and return the set."""
        for scorer in (*self._scorers.values(), *self._held_out.values()):
            scorer.to(device)
        return self

    def synchronize(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Merge the running statistics of all processes; a collective call, the only one.

        Every rank must call it; afterwards all of them normalise alike. Without
        ``torch.distributed`` it does nothing.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        running = [n for n in self._normalizations.values() if isinstance(n, RunningZScore)]
        if not running:
            return
        backend = str(torch.distributed.get_backend(group))
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else "cpu"
        world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        # One row per rank, summed over ranks: everybody gets all rows and merges them in one order. What
        # is told is forgotten only afterwards, for the call may fail.
        rows = torch.zeros(world, len(running), 3, dtype=torch.float64, device=device)
        rows[rank] = torch.tensor([n.offer_local().as_list() for n in running], dtype=torch.float64)
        torch.distributed.all_reduce(rows, group=group)
        for index, normalization in enumerate(running):
            normalization.add_shared([Moments(*row) for row in rows[:, index].tolist()])

    def state_dict(self) -> dict[str, Any]:
        """Return the running statistics as plain numbers, for a checkpoint.

        With several processes, call :meth:`synchronize` first and save the state of one rank.
        """
        return {
            "settings": self._settings(),
            "normalization": {name: n.state_dict() for name, n in self._normalizations.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; all of it, or after an error nothing.

        Every rank loads the same state. It counts as shared: the next :meth:`synchronize` merges only
        what is learned from here on.

        Raises:
            ValueError: Something is missing, or it belongs to a set with other components, scales or
                normalisations.
        """
        if missing := [key for key in ("settings", "normalization") if key not in state]:
            raise ValueError(
                f"the state of a RewardSet has {missing[0]!r}, this one has {sorted(state)}"
            )
        theirs, settings = state["normalization"], state["settings"]
        if not theirs.keys() == settings.keys() == self.components.keys():
            raise ValueError(
                f"the state is of the components {sorted(theirs)}, this set has "
                f"{sorted(self.components)}"
            )
        for name, own in self._settings().items():
            for setting, value in own.items():
                if settings[name].get(setting) != value:
                    raise ValueError(
                        f"{name!r} has {setting} = {value}, and in the state "
                        f"{settings[name].get(setting)}"
                    )
        for name, normalization in self._normalizations.items():
            normalization.check_state_dict(theirs[name])
        for name, normalization in self._normalizations.items():
            normalization.load_state_dict(theirs[name])

    def _settings(self) -> dict[str, dict[str, Any]]:
        """Return what the statistics of a component depend on, as plain values."""
        return {
            name: {
                "scale": asdict(self._scorers[name].scale),
                "normalize": {
                    "type": type(normalize).__name__,
                    **(asdict(normalize) if is_dataclass(normalize) else {}),
                },
            }
            for name, normalize in self._normalizations.items()
        }

    def _check_gradients(self, images: Any) -> None:
        ranked = [n for n, normalize in self._normalizations.items() if not normalize.differentiable]
        if ranked and wants_gradients(images):
            raise ValueError(
                f"{ranked[0]!r} is normalised by ranks, which have no gradient; use another "
                "normalisation, or call it under torch.no_grad()"
            )


def _aligned(prompt: str | Sequence[str], images: Any) -> tuple[list[str], Any]:
    """Return N prompts and N images."""
    prompts = as_prompts(prompt)
    if (
        not hasattr(images, "__len__")
        or isinstance(images, (str, bytes))
        or getattr(images, "ndim", 4) == 3
    ):
        images = [images]
    if isinstance(prompt, str):
        prompts = prompts * len(images)
    if not prompts or len(prompts) != len(images):
        raise ValueError(f"got {len(prompts)} prompts and {len(images)} images; they must pair")
    return prompts, images


def _shared(images: Any, scorers: Iterable[MetricScorer]) -> Any:
    """Check and share images; where one is wrong they stay as they are, and each metric says which."""
    try:
        return SharedImages(images, [getattr(scorer.metric, "transform", None) for scorer in scorers])
    except (OSError, TypeError, ValueError):
        return images


def _keys(groups: Sequence[Hashable] | Tensor) -> list[Hashable]:
    """Return groups as values that can be compared; tensors are equal only to themselves."""
    entries: Any = groups.tolist() if isinstance(groups, (Tensor, np.ndarray)) else groups
    if not isinstance(entries, Iterable) or isinstance(entries, str):
        raise TypeError(f"groups must be a sequence with one entry per sample, got {groups!r}")
    keys: list[Any] = [entry.tolist() if isinstance(entry, Tensor) else entry for entry in entries]
    for index, key in enumerate(keys):
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(
                f"group {index} must be hashable, such as a str or int; got {key!r}"
            ) from error
    return keys


def _failures(scores: Mapping[str, Scored]) -> dict[str, dict[int, str]]:
    """Return name to {number of the sample: the reason}; only what failed."""
    return {
        name: {i: reason for i, reason in enumerate(scored.reasons) if reason is not None}
        for name, scored in scores.items()
        if any(scored.errors)
    }


def _errors(total: Tensor, failed: Mapping[str, Scored]) -> list[Exception | None]:
    """Return for each sample without a reward an error with the reasons of its components."""
    errors: list[Exception | None] = [None] * len(total)
    for index, value in enumerate(total.detach().tolist()):
        if not math.isnan(value):
            continue
        causes = {name: scored for name, scored in failed.items() if scored.errors[index] is not None}
        reasons = [f"{name}: {scored.reasons[index]}" for name, scored in causes.items()]
        error = RewardError("; ".join(reasons) or "the sum is not a number")
        error.__cause__ = next((scored.errors[index] for scored in causes.values()), None)
        errors[index] = error
    return errors


def _members(groups: list[Hashable], count: int) -> dict[Hashable, list[int]]:
    """Return the samples of each group, in the order in which the groups appear."""
    if len(groups) != count:
        raise ValueError(f"got {len(groups)} groups for {count} samples")
    members: dict[Hashable, list[int]] = {group: [] for group in groups}
    for index, group in enumerate(groups):
        members[group].append(index)
    return members

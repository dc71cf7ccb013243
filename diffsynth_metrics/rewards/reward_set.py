"""Several metrics as one reward: weighted, normalised, and watched."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from diffsynth_metrics.base import BaseMetric, ImageMetric, PromptMetric, wants_gradients
from diffsynth_metrics.errors import RewardError
from diffsynth_metrics.inputs import SharedImages, as_images, as_prompts
from diffsynth_metrics.rewards.divergence import DivergenceMonitor
from diffsynth_metrics.rewards.normalization import (
    Moments,
    Normalization,
    RunningZScore,
    find_normalization,
    spread,
)
from diffsynth_metrics.rewards.scales import Scale
from diffsynth_metrics.rewards.scoring import FailurePolicy, MetricScorer, Scored, check_policy, settle

__all__ = ["Component", "RewardResult", "RewardSet"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Component:
    """One metric of a :class:`RewardSet`.

    Attributes:
        metric: A metric, or a callable of (prompts, images) that returns one number per sample.
        weight: What the normalised score is multiplied with; negative where less is wanted.
        normalize: ``"none"``, ``"zscore"`` (running), ``"group"``, ``"rank"``, or an object such as
            ``FixedScale(mean, std)``.
        scale: The scale of the score before it is normalised, see ``rewards.SCALES``.
        on_failure: What a sample gets, on that scale, that has no score; see ``FailurePolicy``.
            ``"mean"`` is the mean of the readable samples of its group, or of the call.
    """

    metric: BaseMetric | Callable[[list[str], Any], Any]
    weight: float = 1.0
    normalize: str | Normalization = "none"
    scale: str | float | Scale | None = None
    on_failure: FailurePolicy = "raise"


@dataclass(frozen=True)
class RewardResult:
    """What a :class:`RewardSet` says about a batch of N samples.

    Attributes:
        reward: ``[N]``, the weighted sum of `normalized`; NaN where a component is NaN.
        raw: Name of a component or held-out metric to its scores ``[N]`` on its scale; NaN where
            it failed, whatever the policy put in their place.
        normalized: Name of a component to what was weighted, ``[N]``.
        failures: Name to {number of the sample: the reason}; only what failed.
        collapsed: Name of a component to the groups (as given, or their prompts) whose scores are all
            equal, from which nothing can be learned. The sum is listed as ``"reward"``.
        diverging: Name of a held-out metric that falls to the components that rise meanwhile.
    """

    reward: Tensor
    raw: dict[str, Tensor]
    normalized: dict[str, Tensor]
    failures: dict[str, dict[int, str]] = field(default_factory=dict)
    collapsed: dict[str, list[Hashable]] = field(default_factory=dict)
    diverging: dict[str, list[str]] = field(default_factory=dict)


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
        window: int = 50,
        threshold: float = 3.0,
    ) -> None:
        """Combine metrics.

        Args:
            components: Name to component; a metric alone has weight 1 and is not normalised.
            held_out: Metrics that are computed and watched, and do not count.
            window: How many calls the watch over `held_out` looks at.
            threshold: How clear trends must be for an alarm, see ``divergence.trend``.

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
            check_policy(component.on_failure)
            self._normalizations[name] = find_normalization(component.normalize)
        if len(set(map(id, self._normalizations.values()))) < len(self._normalizations):
            raise ValueError("two components share one normalisation object; give each its own")
        self._monitor = DivergenceMonitor(window=window, threshold=threshold)

    def score(
        self,
        prompt: str | Sequence[str],
        images: Any,
        *,
        groups: Sequence[Hashable] | None = None,
        update: bool = True,
    ) -> RewardResult:
        """Score N samples with every metric.

        Args:
            prompt: One prompt for all images, or as many prompts as images.
            images: One image or several, see ``PromptMetric.compute``.
            groups: What group each sample belongs to; by default samples of one prompt are a group.
            update: Whether running statistics and the watch learn from this call; False for
                evaluation.

        Returns:
            The reward with everything it is made of. Gradients flow to the pixels as in a metric's
            ``reward``; statistics carry none.

        Raises:
            ValueError: The numbers of prompts, images and groups differ; or gradients are wanted
                through ranks, which have none.
            RewardError: A sample has no score, and its component says ``"raise"``.
        """
        prompts, images = _aligned(prompt, images)
        numbers, keys = _numbered(list(groups) if groups is not None else list(prompts), len(prompts))
        self._check_gradients(images)
        shared = _shared(images)
        raw: dict[str, Tensor] = {}
        normalized: dict[str, Tensor] = {}
        failures: dict[str, dict[int, str]] = {}
        collapsed: dict[str, list[Hashable]] = {}

        def run(name: str, scorer: MetricScorer) -> Scored:
            takes_shared = isinstance(scorer.metric, (PromptMetric, ImageMetric))
            scored = scorer.scored(prompts, shared if takes_shared and shared is not None else images)
            raw[name] = scored.values
            if failed := {i: reason for i, reason in enumerate(scored.reasons) if reason is not None}:
                failures[name] = failed
            return scored

        def note_collapse(name: str, values: Tensor, groups: Tensor) -> None:
            if flat := [keys[number] for number, is_flat in spread(values, groups) if is_flat]:
                collapsed[name] = flat

        total: Tensor | None = None
        for name, component in self.components.items():
            scored = run(name, self._scorers[name])
            group_numbers = numbers.to(scored.values.device)
            note_collapse(name, scored.values, group_numbers)
            normalized[name] = self._normalized(name, scored, group_numbers, update)
            part = component.weight * normalized[name]
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        note_collapse("reward", total, numbers.to(total.device))
        with torch.no_grad():
            for name, scorer in self._held_out.items():
                run(name, scorer)
        if update:
            self._monitor.add({name: self._improving_mean(name, values) for name, values in raw.items()})
        diverging = self._monitor.diverging(self._optimized(), list(self._held_out))
        for name, rising in diverging.items():
            logger.warning("%s falls while %s rises: look at the images", name, ", ".join(rising))
        return RewardResult(total, raw, normalized, failures, collapsed, diverging)

    def reward(self, prompt: str | Sequence[str], images: Any) -> Tensor:
        """Score like :meth:`score`, and return the reward alone."""
        return self.score(prompt, images).reward

    def scored(self, prompts: Sequence[str], images: Any) -> Scored:
        """Score like :meth:`score`, for the adapters: a NaN comes with its reason."""
        return self.settled(self.score(prompts, images))

    def settled(self, result: RewardResult) -> Scored:
        """Return the rewards of a result, a NaN with the reasons of its components."""
        errors: list[Exception | None] = [None] * len(result.reward)
        for index, missing in enumerate(result.reward.detach().isnan().tolist()):
            if missing:
                reasons = [
                    f"{name}: {failed[index]}"
                    for name, failed in result.failures.items()
                    if index in failed and name in self.components
                ]
                errors[index] = RewardError("; ".join(reasons) or "the sum is not a number")
        return Scored(result.reward, errors)

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
        # One row per rank, summed over ranks: everybody gets all rows and merges them in one order.
        rows = torch.zeros(world, len(running), 3, dtype=torch.float64, device=device)
        rows[rank] = torch.tensor([n.offer_local().as_list() for n in running], dtype=torch.float64)
        torch.distributed.all_reduce(rows, group=group)
        for index, normalization in enumerate(running):
            normalization.add_shared([Moments(*row) for row in rows[:, index].tolist()])

    def state_dict(self) -> dict[str, Any]:
        """Return the running statistics and the watch's history as plain numbers, for a checkpoint."""
        return {
            "normalization": {name: n.state_dict() for name, n in self._normalizations.items()},
            "history": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned.

        Raises:
            ValueError: It belongs to a set with other components or normalisations.
        """
        theirs = state["normalization"]
        if theirs.keys() != self._normalizations.keys():
            raise ValueError(
                f"the state is of the components {sorted(theirs)}, this set has "
                f"{sorted(self._normalizations)}"
            )
        for name, normalization in self._normalizations.items():
            normalization.load_state_dict(theirs[name])
        self._monitor.load_state_dict(state["history"])

    def _normalized(self, name: str, scored: Scored, groups: Tensor, update: bool) -> Tensor:
        policy = self.components[name].on_failure
        normalize = self._normalizations[name]
        if not any(scored.errors):
            return normalize(scored.values, groups, update=update)
        values = settle(scored, "nan" if policy == "mean" else policy, name)
        if policy == "mean":
            values = _with_group_means(values, groups)
        if isinstance(normalize, RunningZScore):
            # Statistics are of scores, not of what stands in for them.
            if update:
                normalize(scored.values, groups, update=True)
            update = False
        return normalize(values, groups, update=update)

    def _check_gradients(self, images: Any) -> None:
        ranked = [n for n, normalize in self._normalizations.items() if not normalize.differentiable]
        if ranked and wants_gradients(images):
            raise ValueError(
                f"{ranked[0]!r} is normalised by ranks, which have no gradient; use another "
                "normalisation, or call it under torch.no_grad()"
            )

    def _optimized(self) -> list[str]:
        return [name for name, component in self.components.items() if component.weight != 0]

    def _improving_mean(self, name: str, values: Tensor) -> float:
        """Return the mean, negated where training or the metric wants less."""
        mean = float(values.detach().nanmean())
        if name in self.components:
            return mean if self.components[name].weight >= 0 else -mean
        card = getattr(self._held_out[name].metric, "card", None)
        return mean if card is None or card.higher_is_better else -mean


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


def _shared(images: Any) -> SharedImages | None:
    """Check and share the images; None where one of them is wrong, so that each metric says which."""
    try:
        return SharedImages(as_images(images))
    except (OSError, TypeError, ValueError):
        return None


def _numbered(groups: list[Hashable], count: int) -> tuple[Tensor, list[Hashable]]:
    """Number the groups in the order in which they appear."""
    if len(groups) != count:
        raise ValueError(f"got {len(groups)} groups for {count} samples")
    keys = list(dict.fromkeys(groups))
    positions = {key: number for number, key in enumerate(keys)}
    return torch.tensor([positions[group] for group in groups]), keys


def _with_group_means(values: Tensor, groups: Tensor) -> Tensor:
    """Put the mean of the group in the place of NaN, or that of the call where the group has none."""
    filled = values
    for index in values.isnan().nonzero().squeeze(1).tolist():
        mean = values[groups == groups[index]].detach().nanmean()
        mean = values.detach().nanmean() if mean.isnan() else mean
        filled = filled.index_put((torch.tensor([index], device=values.device),), mean)
    return filled

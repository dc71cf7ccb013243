"""Rewards for UniRL, which names a class in its recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from diffsynth_metrics.rewards.adapters.common import Reward, RewardSource, as_member


class _UniRLReward(Reward):
    """What a reward backend of UniRL scores with."""

    framework = "unirl"
    parts_of_groups = "UniRL deals samples out to its workers, and normalises over groups itself"

    def __init__(self, source: RewardSource, **options: Any) -> None:
        super().__init__(source, **options)
        if self.on_failure == "nan":
            raise ValueError("on_failure must not be 'nan': UniRL would train on NaN")

    def __call__(self, prompts: Sequence[str], media: Any, sources: Any) -> list[float]:
        rewards: list[float] = self.score(self.batch(prompts, media, sources))[0].tolist()
        return rewards


def to_unirl(load: Callable[..., RewardSource], base: type, **options: Any) -> type:
    """Make a local reward backend for UniRL, to be named as ``_target_`` in the recipe.

    Args:
        load: Called with ``device=`` when the backend is made, for instance
            ``PickScoreMetric.from_pretrained``.
        base: UniRL's ``LocalRewardBackend``.
        **options: What :class:`Reward` takes; `name` is that of the class, ``MetricBackend`` by default.
            With `frames`, the backend asks for videos.

    Returns:
        A subclass of `base`, whose ``config`` has a ``device`` (``"auto"`` is the recipe's) and a
        ``batch_size``. ``offload`` moves the metric to the CPU, and ``onload`` back.
    """

    class MetricBackend(base):  # type: ignore[misc]
        input_kind = "video" if options.get("frames") else "image"

        def __init__(self, *, config: Any, base_device: str) -> None:
            device = base_device if config.device == "auto" else config.device
            super().__init__(type(self).__name__, device=device, batch_size=config.batch_size)

        def _load_model(self) -> None:
            self.reward = _UniRLReward(
                load(device=None if self.device == "auto" else self.device), **options
            )
            self.device: Any = self.reward.scorer.device

        def _compute_model_rewards(self, request: Any) -> list[float]:
            sources = request.primitives.get("image")
            media = request.images
            if request.is_video:
                media = [video.movedim(1, 0) for video in request.videos]  # they are [3, T, H, W]
            return self.reward(request.prompts, media, None if sources is None else sources.pixels)

        def offload(self) -> None:
            self.reward.scorer.to("cpu")

        def onload(self) -> None:
            self.reward.scorer.to(self.device)

    return as_member(MetricBackend, options.get("name") or "MetricBackend", inspect.currentframe())

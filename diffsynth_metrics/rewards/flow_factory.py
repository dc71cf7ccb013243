"""Rewards for Flow-Factory, which names a class in its YAML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffsynth_metrics.rewards.callables import (
    RewardSource,
    ScaleInput,
    as_bytes,
    floats_by_policy,
    refuse_groups,
    scorer_of,
)
from diffsynth_metrics.rewards.scoring import FailurePolicy, Scorer, Update, check_policy

__all__ = ["to_flow_factory"]


def to_flow_factory(
    load: Callable[..., RewardSource],
    base: type,
    output: Callable[..., Any],
    *,
    scale: ScaleInput = "flow_factory",
    on_failure: FailurePolicy = "raise",
    name: str | None = None,
    update: Update = True,
) -> type:
    """Make a reward model class for Flow-Factory.

    Args:
        load: Called with ``device=`` when the framework makes its reward model; for instance
            ``PickScoreMetric.from_pretrained``. A :class:`RewardSet` must not normalise over groups.
        base: Flow-Factory's ``PointwiseRewardModel``.
        output: Flow-Factory's ``RewardModelOutput``.
        scale: The scale of a metric's score.
        on_failure: What a sample gets that has no score, see ``FailurePolicy``.
        name: Of the class; by default ``MetricReward``.
        update: Whether the running statistics of a :class:`RewardSet` learn from a call, or a function
            that tells; ``update=False`` makes a reward for evaluation.

    Returns:
        A subclass of `base`. Called with ``prompt`` (N strings) and ``image`` (N PIL images or float
        tensors), it returns ``output(rewards=N floats, extra_info={"failures": {sample: reason}})``.
    """
    check_policy(on_failure)

    class MetricReward(base):  # type: ignore[misc]
        """A metric as a reward model of Flow-Factory."""

        required_fields = ("prompt", "image")
        use_tensor_inputs = False

        def __init__(self, config: Any, accelerator: Any) -> None:
            super().__init__(config, accelerator)
            source = load(device=accelerator.device)
            refuse_groups(source, "Flow-Factory's pointwise rewards are called with parts of them")
            # Kept in a tuple, so that a base that is a Module does not take its weights for its own.
            self._scorer: tuple[Scorer] = (scorer_of(source, scale),)

        def __call__(
            self,
            prompt: Sequence[str],
            image: Sequence[Any] | None = None,
            video: Any = None,
            audio: Any = None,
            condition_images: Any = None,
            condition_videos: Any = None,
            **ignored: Any,
        ) -> Any:
            if image is None:
                raise ValueError("this reward scores images, and Flow-Factory passed none")
            rewards, scored = floats_by_policy(
                self._scorer[0], prompt, as_bytes(image), on_failure, update
            )
            failures = {i: reason for i, reason in enumerate(scored.reasons) if reason is not None}
            return output(rewards=rewards, extra_info={"failures": failures})

    MetricReward.__name__ = MetricReward.__qualname__ = name or "MetricReward"
    return MetricReward

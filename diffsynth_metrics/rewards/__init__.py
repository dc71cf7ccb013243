"""A metric as what a training loop calls: one function per framework, and several metrics as one.

Every name is imported on first use, so that a worker pays only for the adapter that it uses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_metrics.rewards.adapters.alignprop import to_alignprop
    from diffsynth_metrics.rewards.adapters.dance_grpo import to_dance_grpo
    from diffsynth_metrics.rewards.adapters.ddpo import to_ddpo
    from diffsynth_metrics.rewards.adapters.flow_factory import to_flow_factory
    from diffsynth_metrics.rewards.adapters.flow_grpo import to_flow_grpo, to_multi_score
    from diffsynth_metrics.rewards.adapters.mixgrpo import to_mixgrpo
    from diffsynth_metrics.rewards.adapters.ms_swift import to_ms_swift, to_ms_swift_async
    from diffsynth_metrics.rewards.adapters.pref_grpo import to_pref_grpo
    from diffsynth_metrics.rewards.adapters.refl import to_refl
    from diffsynth_metrics.rewards.adapters.srpo import to_srpo
    from diffsynth_metrics.rewards.adapters.trl import to_trl, to_trl_async
    from diffsynth_metrics.rewards.adapters.unirl import to_unirl
    from diffsynth_metrics.rewards.adapters.verl import to_verl
    from diffsynth_metrics.rewards.adapters.verl_omni import to_verl_omni
    from diffsynth_metrics.rewards.batcher import DynamicBatcher
    from diffsynth_metrics.rewards.batches import Frames
    from diffsynth_metrics.rewards.losses import as_loss
    from diffsynth_metrics.rewards.normalization import (
        FixedScale,
        GroupRelative,
        Rank,
        Raw,
        RunningZScore,
    )
    from diffsynth_metrics.rewards.reward_set import Component, RewardResult, RewardSet
    from diffsynth_metrics.rewards.scales import Scale
    from diffsynth_metrics.rewards.scoring import FailurePolicy

_HOME = {
    "Component": "reward_set",
    "DynamicBatcher": "batcher",
    "FailurePolicy": "scoring",
    "FixedScale": "normalization",
    "Frames": "batches",
    "GroupRelative": "normalization",
    "Rank": "normalization",
    "Raw": "normalization",
    "RewardResult": "reward_set",
    "RewardSet": "reward_set",
    "RunningZScore": "normalization",
    "Scale": "scales",
    "as_loss": "losses",
    "to_multi_score": "adapters.flow_grpo",
}
"""Where the names are that are not those of their adapter's module."""

__all__ = [
    "Component",
    "DynamicBatcher",
    "FailurePolicy",
    "FixedScale",
    "Frames",
    "GroupRelative",
    "Rank",
    "Raw",
    "RewardResult",
    "RewardSet",
    "RunningZScore",
    "Scale",
    "as_loss",
    "to_alignprop",
    "to_dance_grpo",
    "to_ddpo",
    "to_flow_factory",
    "to_flow_grpo",
    "to_mixgrpo",
    "to_ms_swift",
    "to_ms_swift_async",
    "to_multi_score",
    "to_pref_grpo",
    "to_refl",
    "to_srpo",
    "to_trl",
    "to_trl_async",
    "to_unirl",
    "to_verl",
    "to_verl_omni",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it, and keep it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    adapter = f"adapters.{name.removeprefix('to_').removesuffix('_async')}"
    value = getattr(import_module(f"{__name__}.{_HOME.get(name, adapter)}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, including those that are not imported yet."""
    return sorted(__all__)

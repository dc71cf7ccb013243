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

_MODULES = {
    "adapters.alignprop": ("to_alignprop",),
    "adapters.dance_grpo": ("to_dance_grpo",),
    "adapters.ddpo": ("to_ddpo",),
    "adapters.flow_factory": ("to_flow_factory",),
    "adapters.flow_grpo": ("to_flow_grpo", "to_multi_score"),
    "adapters.mixgrpo": ("to_mixgrpo",),
    "adapters.ms_swift": ("to_ms_swift", "to_ms_swift_async"),
    "adapters.pref_grpo": ("to_pref_grpo",),
    "adapters.refl": ("to_refl",),
    "adapters.srpo": ("to_srpo",),
    "adapters.trl": ("to_trl", "to_trl_async"),
    "adapters.unirl": ("to_unirl",),
    "adapters.verl": ("to_verl",),
    "adapters.verl_omni": ("to_verl_omni",),
    "batcher": ("DynamicBatcher",),
    "batches": ("Frames",),
    "losses": ("as_loss",),
    "normalization": ("FixedScale", "GroupRelative", "Rank", "Raw", "RunningZScore"),
    "reward_set": ("Component", "RewardResult", "RewardSet"),
    "scales": ("Scale",),
    "scoring": ("FailurePolicy",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

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
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, including those that are not imported yet."""
    return sorted(__all__)

"""A metric as what a training loop calls: one function per framework, and several metrics as one.

Every name is imported on first use, so that a worker pays only for the adapter that it uses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_metrics.rewards.batcher import DynamicBatcher
    from diffsynth_metrics.rewards.files_on_disk import to_dance_grpo, to_pref_grpo
    from diffsynth_metrics.rewards.flow_factory import to_flow_factory
    from diffsynth_metrics.rewards.flow_grpo import to_ddpo, to_flow_grpo, to_multi_score
    from diffsynth_metrics.rewards.losses import as_loss, to_alignprop, to_refl, to_srpo
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
    from diffsynth_metrics.rewards.trl import to_trl, to_trl_async
    from diffsynth_metrics.rewards.verl import to_verl, to_verl_omni

_HOME = {
    "Component": "reward_set",
    "DynamicBatcher": "batcher",
    "FailurePolicy": "scoring",
    "FixedScale": "normalization",
    "GroupRelative": "normalization",
    "Rank": "normalization",
    "Raw": "normalization",
    "RewardResult": "reward_set",
    "RewardSet": "reward_set",
    "RunningZScore": "normalization",
    "Scale": "scales",
    "as_loss": "losses",
    "to_alignprop": "losses",
    "to_dance_grpo": "files_on_disk",
    "to_ddpo": "flow_grpo",
    "to_flow_factory": "flow_factory",
    "to_flow_grpo": "flow_grpo",
    "to_multi_score": "flow_grpo",
    "to_pref_grpo": "files_on_disk",
    "to_refl": "losses",
    "to_srpo": "losses",
    "to_trl": "trl",
    "to_trl_async": "trl",
    "to_verl": "verl",
    "to_verl_omni": "verl",
}

__all__ = [
    "Component",
    "DynamicBatcher",
    "FailurePolicy",
    "FixedScale",
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
    "to_multi_score",
    "to_pref_grpo",
    "to_refl",
    "to_srpo",
    "to_trl",
    "to_trl_async",
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

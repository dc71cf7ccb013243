"""A metric as what a training loop calls: one function per framework, and several metrics as one."""

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
from diffsynth_metrics.rewards.batches import Frames
from diffsynth_metrics.rewards.losses import as_loss
from diffsynth_metrics.rewards.normalization import FixedScale, GroupRelative, Rank
from diffsynth_metrics.rewards.reward_set import Component, RewardResult, RewardSet
from diffsynth_metrics.rewards.scales import Scale
from diffsynth_metrics.rewards.scoring import FailurePolicy

__all__ = [
    "Component",
    "FailurePolicy",
    "FixedScale",
    "Frames",
    "GroupRelative",
    "Rank",
    "RewardResult",
    "RewardSet",
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

"""Rewards for ddpo-pytorch."""

from diffsynth_metrics.rewards.adapters.flow_grpo import FlowGRPOFactory, FlowGRPOReward


class _DDPOReward(FlowGRPOReward):
    """A reward function of ddpo-pytorch, on its scales, which are the official ones."""

    framework = "ddpo"


class _DDPOFactory(FlowGRPOFactory):
    """A scorer factory as in ``ddpo_pytorch/rewards.py``: ``factory()(images, prompts, metadata)``."""

    makes = _DDPOReward


to_ddpo = _DDPOFactory

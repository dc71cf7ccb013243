"""What each of two processes does: a module of its own, which is imported in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed

from diffsynth_metrics.rewards import Component, RewardSet


def learn_as_a_rank(rank: int, folder: str) -> None:
    """Score twice with a synchronisation after each, as one of two ranks."""
    batches = iter(
        [[1.0, 2, 3], [4.0, 5, 6], [7.0, 8]] if rank == 0 else [[11.0, 12, 13], [14.0, 15, 16], [7.0, 8]]
    )
    rewards = RewardSet({"mine": Component(lambda prompts, images: next(batches), normalize="zscore")})
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    rewards.score("a", torch.rand(3, 3, 8, 8))
    before = rewards.state_dict()["mine"]["sums"]
    rewards.synchronize()
    rewards.score("a", torch.rand(3, 3, 8, 8))
    rewards.synchronize()
    after = rewards.state_dict()["mine"]["sums"]
    reward = rewards.score("a", torch.rand(2, 3, 8, 8), update=False).reward.tolist()
    torch.distributed.destroy_process_group()
    Path(f"{folder}/{rank}.json").write_text(
        json.dumps({"before": before, "after": after, "reward": reward})
    )

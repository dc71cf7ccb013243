"""No adapter can give a wrong advantage where a framework deals out parts of groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import Brightness

from diffsynth_metrics.rewards import (
    Component,
    FixedScale,
    GroupRelative,
    Rank,
    RewardSet,
    as_loss,
    to_alignprop,
    to_dance_grpo,
    to_ddpo,
    to_flow_factory,
    to_flow_grpo,
    to_mixgrpo,
    to_ms_swift,
    to_ms_swift_async,
    to_multi_score,
    to_pref_grpo,
    to_trl,
    to_trl_async,
    to_unirl,
    to_verl,
    to_verl_omni,
)

RANKS, BATCH, K, PROMPT_COUNT = 8, 9, 24, 50


def sampler(rank: int, seed: int = 0) -> Iterator[list[int]]:
    """Yield the prompts of a rank as flow_grpo ac4c86e8 deals them out (scripts/train_sd3.py:76-118)."""
    total = RANKS * BATCH
    assert total % K == 0
    for epoch in range(3):
        generator = torch.Generator().manual_seed(seed + epoch)
        chosen = torch.randperm(PROMPT_COUNT, generator=generator)[: total // K].tolist()
        repeated = [index for index in chosen for _ in range(K)]
        shuffled = [repeated[i] for i in torch.randperm(len(repeated), generator=generator).tolist()]
        yield shuffled[rank * BATCH : (rank + 1) * BATCH]


def calls() -> list[list[str]]:
    """Return the prompts of the 8 ranks in one step."""
    return [[f"prompt {index}" for index in next(sampler(rank))] for rank in range(RANKS)]


def tracked(prompts: list[str], rewards: np.ndarray) -> np.ndarray:
    """Advantages as flow_grpo's PerPromptStatTracker computes them of what all ranks gathered."""
    advantages = np.zeros_like(rewards)
    names = np.array(prompts)
    for prompt in set(prompts):
        of_prompt = rewards[names == prompt]
        advantages[names == prompt] = (of_prompt - of_prompt.mean()) / (of_prompt.std() + 1e-4)
    return advantages


def grouped(**settings: Any) -> RewardSet:
    return RewardSet(
        {"b": Component(Brightness(), normalize=GroupRelative(**settings)), "c": Brightness()}
    )


def test_the_sampler_gives_a_call_parts_of_groups() -> None:
    counts = [Counter(prompts) for prompts in calls()]
    assert all(len(prompts) == BATCH for prompts in calls())
    assert sum(counts, Counter()).most_common() == [
        (name, K) for name, _ in sum(counts, Counter()).most_common()
    ]
    assert max(max(count.values()) for count in counts) < K


def test_what_flow_grpo_gathers_and_normalises_is_right() -> None:
    levels = torch.rand(RANKS, BATCH, generator=torch.Generator().manual_seed(0))
    images = levels[..., None, None, None].expand(-1, -1, 3, 32, 32)
    reward_fn = to_flow_grpo(RewardSet({"b": Brightness()}))("cpu")
    by_rank = calls()
    gathered = [
        reward_fn(pixels, prompts, [{}] * BATCH)[0]["avg"]
        for pixels, prompts in zip(images, by_rank, strict=True)
    ]
    prompts = [prompt for of_rank in by_rank for prompt in of_rank]
    advantages = tracked(prompts, np.concatenate(gathered))
    whole = grouped(group_size=K).score(prompts, (images.flatten(0, 1) * 255).round().byte())
    assert whole.normalized["b"].tolist() == pytest.approx(advantages.tolist(), abs=1e-3)


def test_a_set_gives_every_rank_and_every_call_the_same_reward() -> None:
    """Ranks that learn a mean of their own shift their rewards, and advantages over ranks are wrong."""

    def make() -> Any:
        scaled = Component(Brightness(), 0.5, FixedScale(mean=0.4, std=0.2))
        return to_flow_grpo(RewardSet({"b": scaled, "c": Component(Brightness(), -0.1)}))("cpu")

    levels = torch.rand(RANKS, BATCH, generator=torch.Generator().manual_seed(3))
    images = levels[..., None, None, None].expand(-1, -1, 3, 32, 32)
    ranks, by_rank = [make() for _ in range(RANKS)], calls()
    prompts = [prompt for of_rank in by_rank for prompt in of_rank]
    expected = make()(images.flatten(0, 1), prompts, [{}] * len(prompts))[0]["avg"]
    for _ in range(2):
        gathered = [
            score
            for reward_fn, pixels, of_rank in zip(ranks, images, by_rank, strict=True)
            for score in reward_fn(pixels, of_rank, [{}] * BATCH)[0]["avg"]
        ]
        assert gathered == pytest.approx(expected, abs=1e-4)
        advantages = tracked(prompts, np.array(gathered))
        assert advantages == pytest.approx(tracked(prompts, np.array(expected)), abs=1e-2)


class Base:
    """What Flow-Factory and UniRL have as base classes, as far as they matter here."""

    def __init__(self, *arguments: Any, device: Any = "cpu", **options: Any) -> None:
        self.device, self.dtype = device, None
        getattr(self, "_load_model", lambda: None)()


SPEC = type("Spec", (), {"device": "cpu", "batch_size": 8})()
NEVER: dict[str, Callable[[Any], Any]] = {
    "flow_grpo": to_flow_grpo,
    "ddpo": to_ddpo,
    "multi_score": lambda one: to_multi_score(one.components)("cpu", {"b": 1.0}),
    "DanceGRPO": to_dance_grpo,
    "MixGRPO": lambda one: to_mixgrpo(one, stands_for="HPSv2Metric"),
    "Flow-Factory": lambda one: to_flow_factory(lambda **options: one, Base, dict)(None, None),
    "UniRL": lambda one: to_unirl(lambda device: one, Base)(config=SPEC, base_device="cpu"),
    "verl": lambda one: to_verl(one, lambda text, info: None),
    "verl-omni": to_verl_omni,
}
WITH_SIZE: dict[str, Callable[[Any], Any]] = {
    "TRL": lambda one: to_trl(one, "image", on_failure="raise"),
    "TRL, async": lambda one: to_trl_async(one, "image"),
    "ms-swift": lambda one: to_ms_swift(one, "image", on_failure="raise"),
    "ms-swift, async": lambda one: to_ms_swift_async(one, "image"),
    "Pref-GRPO": to_pref_grpo,
    "a loss": as_loss,
    "AlignProp": to_alignprop,
}


@pytest.mark.parametrize("name", NEVER)
def test_a_framework_that_has_no_whole_groups_takes_no_normalisation_within_them(name: str) -> None:
    for rewards in (grouped(), grouped(group_size=K)):
        with pytest.raises(
            ValueError, match=r"leave 'group' and 'rank' to the trainer: .*(itself|random)"
        ):
            NEVER[name](rewards)
    ranked = RewardSet({"b": Component(Brightness(), normalize=Rank(group_size=K))})
    with pytest.raises(ValueError, match="leave 'group' and 'rank' to the trainer"):
        NEVER[name](ranked)
    NEVER[name](RewardSet({"b": Brightness()}))


@pytest.mark.parametrize("name", WITH_SIZE)
def test_a_framework_that_may_have_whole_groups_needs_their_size(name: str) -> None:
    with pytest.raises(ValueError, match="say how large groups are, as in normalize=GroupRelative"):
        WITH_SIZE[name](grouped())
    assert WITH_SIZE[name](grouped(group_size=K)) is not None


def test_with_a_size_parts_are_an_error_and_whole_groups_are_right() -> None:
    def ask(name: str, prompts: list[str], images: Any) -> list[float]:
        function = WITH_SIZE[name](grouped(group_size=K))
        if name == "TRL":
            rewards: list[float] = function(prompts=prompts, completions=prompts, image=list(images))
            return rewards
        if name == "ms-swift":
            talks = [
                [{"role": "user", "content": p}, {"role": "assistant", "content": ""}] for p in prompts
            ]
            rewards = function(prompts, messages=talks, image=list(images))
            return rewards
        if name == "Pref-GRPO":
            items = [{"path": i, "prompt": p} for i, p in zip(images, prompts, strict=True)]
            return function(items)[0].tolist()
        return function(images / 255, prompts)[-1].tolist()  # a loss

    levels = torch.rand(2 * K, generator=torch.Generator().manual_seed(1))
    images = (levels[:, None, None, None].expand(-1, 3, 32, 32) * 255).round()
    prompts = ["a cat", "a dog"] * K
    expected = grouped(group_size=K).score(prompts, images.byte()).reward.tolist()
    for name in ("TRL", "ms-swift", "Pref-GRPO", "a loss"):
        given = images if name == "a loss" else images.byte()
        assert ask(name, prompts, given) == pytest.approx(expected, abs=1e-3), name
        for part in calls()[:2]:
            with pytest.raises(
                ValueError, match=r"pass whole groups: 'b' is normalised within groups of 24"
            ):
                ask(name, part, given[:BATCH])

"""What an adapter returns can be sent to another process, plainly and with cloudpickle."""

from __future__ import annotations

import asyncio
import copy
import inspect
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_ins import Brightness
from test_more_frameworks import (
    ACCELERATOR,
    LocalRewardBackend,
    Output,
    PointwiseRewardModel,
    RewardArguments,
    Spec,
    pixels_of,
)

from diffsynth_metrics import CLIPMetric, ModelConfig, PickScoreMetric
from diffsynth_metrics.rewards import (
    Component,
    FixedScale,
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
    to_refl,
    to_srpo,
    to_trl,
    to_trl_async,
    to_unirl,
    to_verl,
    to_verl_omni,
)

PROMPTS = ["a cat", "a dog"]
IMAGES = (pixels_of([0.2, 0.8]) * 255).round().byte()


def load(**options: Any) -> Any:
    return Brightness()


def draw(text: str, extra_info: Any) -> torch.Tensor:
    return IMAGES[int(text)]


# Classes are found by their names in this module, as a class of the user's own is.
FactoryReward = to_flow_factory(load, PointwiseRewardModel, Output, name="FactoryReward")
BackendReward = to_unirl(load, LocalRewardBackend, name="BackendReward")
MESSAGES = [[{"role": "user", "content": p}, {"role": "assistant", "content": ""}] for p in PROMPTS]

BY_FRAMEWORK: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "flow_grpo": (to_flow_grpo, lambda it: it("cpu")(IMAGES, PROMPTS, None)[0]),
    "ddpo": (to_ddpo, lambda it: it()(IMAGES, PROMPTS, None)[0]),
    "multi_score": (
        lambda one: to_multi_score({"b": one}),
        lambda it: it("cpu", {"b": 1.0})(IMAGES, PROMPTS, None)[0]["avg"],
    ),
    "DanceGRPO": (to_dance_grpo, lambda it: it.reward(IMAGES, PROMPTS).tolist()),
    "MixGRPO": (lambda one: to_mixgrpo(one, stands_for="CLIPMetric"), lambda it: it(PROMPTS, [*IMAGES])),
    "Pref-GRPO": (
        to_pref_grpo,
        lambda it: it([{"path": i, "prompt": p} for i, p in zip(IMAGES, PROMPTS, strict=True)])[1],
    ),
    "TRL": (
        lambda one: to_trl(one, "image"),
        lambda it: it(prompts=PROMPTS, completions=PROMPTS, image=[*IMAGES]),
    ),
    "TRL, async": (
        lambda one: to_trl_async(one, "image"),
        lambda it: asyncio.run(it(prompts=PROMPTS, completions=PROMPTS, image=[*IMAGES])),
    ),
    "ms-swift": (
        lambda one: to_ms_swift(one, "image", name="taste"),
        lambda it: (type(it).__name__, it(PROMPTS, messages=MESSAGES, image=[*IMAGES])),
    ),
    "ms-swift, async": (
        lambda one: to_ms_swift_async(one, "image"),
        lambda it: asyncio.run(it(PROMPTS, messages=MESSAGES, image=[*IMAGES])),
    ),
    "verl": (
        lambda one: to_verl(one, draw),
        lambda it: asyncio.run(it(data_source="d", solution_str="1", ground_truth="a cat")),
    ),
    "verl-omni": (
        to_verl_omni,
        lambda it: asyncio.run(it(data_source="d", solution_image=IMAGES[1], ground_truth="a cat")),
    ),
    "Flow-Factory": (
        lambda one: FactoryReward(RewardArguments(torch.device("cpu")), None),
        lambda it: it(PROMPTS, [*IMAGES]).rewards,
    ),
    "UniRL": (
        lambda one: BackendReward(config=Spec(), base_device="cpu"),
        lambda it: it.reward(PROMPTS, IMAGES, None),
    ),
    "a loss": (as_loss, lambda it: it(IMAGES / 255, PROMPTS)[0].tolist()),
    "AlignProp": (to_alignprop, lambda it: it(IMAGES / 255, PROMPTS)[0].tolist()),
}


@pytest.mark.parametrize("kind", ["pickle", "cloudpickle", "copy"])
@pytest.mark.parametrize("framework", BY_FRAMEWORK)
def test_a_reward_can_be_sent_after_it_was_used(framework: str, kind: str) -> None:
    make, call = BY_FRAMEWORK[framework]
    cloudpickle = pytest.importorskip("cloudpickle")
    send = {
        "pickle": lambda it: pickle.loads(pickle.dumps(it)),
        "cloudpickle": lambda it: pickle.loads(cloudpickle.dumps(it)),
        "copy": copy.deepcopy,
    }[kind]
    made = make(Brightness())
    expected = call(made)
    other = send(made)
    assert str(call(other)) == str(expected)
    assert type(other).__name__ == type(made).__name__
    assert getattr(other, "__name__", "") == getattr(made, "__name__", "")
    assert inspect.iscoroutinefunction(other) == inspect.iscoroutinefunction(made)
    assert inspect.iscoroutinefunction(made) == framework.endswith(("async", "verl", "verl-omni"))


def test_rewards_of_real_metrics_can_be_sent(metrics: Callable[[str], Any]) -> None:
    pickscore: PickScoreMetric = metrics("pickscore")
    srpo = to_srpo(pickscore)
    refl = to_refl(metrics("image_reward"))
    rewards = RewardSet(
        {"p": Component(pickscore, normalize=FixedScale(20, 2))}, held_out={"c": metrics("clip")}
    )
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[101, 5, 102]]), torch.ones(1, 3, dtype=torch.long)
    flow_grpo = to_flow_grpo(rewards)
    flow_grpo("cpu")(pixels, ["a cat"], None)
    for dumps in (pickle.dumps, pytest.importorskip("cloudpickle").dumps):
        outputs = pickle.loads(dumps(srpo)).SRP_cfg(["a cat"], ["a dog"], pixels, 0.5)
        torch.testing.assert_close(outputs, srpo.SRP_cfg(["a cat"], ["a dog"], pixels, 0.5))
        squares = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(pickle.loads(dumps(refl))(*tokens, squares), refl(*tokens, squares))
        other = pickle.loads(dumps(flow_grpo))
        for name in ("p", "avg"):
            assert other("cpu")(pixels, ["a cat"], None)[0][name] == pytest.approx(
                flow_grpo("cpu")(pixels, ["a cat"], None)[0][name], rel=1e-4
            )


def test_classes_are_members_of_the_module_that_asked_for_them() -> None:
    for made in (FactoryReward, BackendReward):
        assert made.__module__ == __name__ and made.__qualname__ == made.__name__
        assert pickle.loads(pickle.dumps(made)) is made
    assert FactoryReward(RewardArguments(torch.device("cuda")), ACCELERATOR).device.type == "cpu"


def score_elsewhere(reward_fn: Any) -> list[float]:
    scores: list[float] = reward_fn("cpu")(IMAGES, ["a red circle", "a blue square"], None)[0]
    return scores


def test_a_spawned_process_scores_with_what_it_was_sent() -> None:
    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
    reward_fn = to_flow_grpo(metric)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        scores = pool.apply(score_elsewhere, (reward_fn,))
    assert scores == pytest.approx(score_elsewhere(reward_fn), rel=1e-4)

"""Every differentiable metric: gradients are right at every size, and nothing else receives one."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classes import DIFFERENTIABLE, metric_class
from stand_ins import Brightness

from diffsynth_metrics import AestheticMetric, ModelConfig
from diffsynth_metrics.inputs import SharedImages
from diffsynth_metrics.rewards import Component, RewardSet, as_loss, to_flow_grpo, to_trl
from diffsynth_metrics.rewards.batches import as_batch
from diffsynth_metrics.rewards.scoring import MetricScorer, stand_in

SIZES = [(64, 64), (224, 224), (512, 512), (64, 512), (300, 170), (225, 331), (512, 384)]


# transformers computes parts of HPSv3 in float32 whatever the dtype: tests/test_hpsv3_metric.py has it.
@pytest.fixture(scope="module", params=[name for name in DIFFERENTIABLE if name != "hpsv3"])
def double(request: Any, tiny: Callable[[str], Path]) -> Any:
    return metric_class(request.param).from_pretrained(
        ModelConfig(path=tiny(request.param)), device="cpu", torch_dtype=torch.float64
    )


@pytest.fixture(scope="module", params=DIFFERENTIABLE)
def single(request: Any, tiny: Callable[[str], Path], metrics: Callable[[str], Any]) -> Any:
    if request.param != "hpsv3":
        return metrics(request.param)
    # It enlarges small pictures, and many calls with large ones take long.
    small = {"min_pixels": 56 * 56, "max_pixels": 56 * 56}
    return metric_class("hpsv3").from_pretrained(
        ModelConfig(path=tiny("hpsv3")), device="cpu", torch_dtype=torch.float32, **small
    )


def reward(metric: Any, pixels: torch.Tensor) -> torch.Tensor:
    value: torch.Tensor = (
        metric.reward(pixels)
        if isinstance(metric, AestheticMetric)
        else metric.reward("an astronaut in orange", pixels)
    )
    return value


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_autograd_agrees_with_finite_differences(double: Any, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(size))
    # Away from 0 and 1, where the bicubic filter overshoots and the clamping has a corner.
    pixels = 0.35 + 0.3 * torch.rand(1, 3, *size, generator=generator, dtype=torch.float64)
    leaf = pixels.clone().requires_grad_()
    reward(double, leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    step = 1e-5
    for _ in range(2):
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        difference = reward(double, pixels + step * direction) - reward(
            double, pixels - step * direction
        )
        measured = (difference / (2 * step)).item()
        assert (leaf.grad * direction).sum().item() == pytest.approx(measured, rel=1e-5, abs=1e-7)
    assert all(parameter.grad is None for parameter in double.model.parameters())


def test_no_parameter_ever_receives_a_gradient(single: Any) -> None:
    prompts = ["a cat", "a dog"]
    pixels = torch.rand(2, 3, 90, 120).requires_grad_()
    rewards = RewardSet({"one": Component(single, 0.5)})
    for value in (
        reward(single, pixels),
        as_loss(single)(pixels, prompts)[0],
        rewards.reward(prompts, pixels),
    ):
        assert value.requires_grad
        value.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    for parameter in single.model.parameters():
        assert parameter.grad is None and not parameter.requires_grad


def held() -> tuple[int, int]:
    """Return the number of tensors that are alive, and their bytes."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return len(tensors), sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_metric_that_was_loaded_in_inference_mode_has_gradients(
    name: str, tiny: Callable[[str], Path]
) -> None:
    with torch.inference_mode():
        metric = metric_class(name).from_pretrained(ModelConfig(path=tiny(name)), device="cpu")
    pixels = torch.rand(1, 3, 64, 64, requires_grad=True)
    reward(metric, pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_memory_after_twenty_calls_is_that_after_five(single: Any) -> None:
    rewards = RewardSet({"one": Component(single, 0.5), "two": Component(single, 1.0, "none")})
    reward_fn, loss_fn = to_flow_grpo(rewards)("cpu"), as_loss(single)

    def call() -> None:
        pixels = torch.rand(2, 3, 40, 40)
        reward_fn(pixels, ["a cat", "a dog"], None)
        loss_fn(pixels.requires_grad_(), ["a cat", "a dog"])  # a graph that nobody walks
        rewards.score(["a cat", "a dog"], pixels)

    for _ in range(5):
        call()
    gc.collect()
    after_five = held()
    for _ in range(15):
        call()
    gc.collect()
    assert held() == after_five


@pytest.mark.parametrize("bad", ["nan", "path", "no image"])
def test_a_failed_sample_keeps_nothing_alive(bad: str) -> None:
    """Nothing waits for Python to look for cycles, which it does seldom and not for a device's sake."""
    bright = Brightness()
    rewards = RewardSet({"one": bright, "two": bright})
    flow_grpo = to_flow_grpo(rewards, on_failure="nan")("cpu")
    trl = to_trl(rewards, image=lambda completion: flaw(int(completion)))
    prompts = ["a"] * 3

    def flaw(index: int) -> Any:
        if index == 1 and bad == "no image":
            raise ValueError("it cannot be drawn")
        pixels = torch.rand(3, 40, 40, requires_grad=True)
        if index != 1 or bad == "no image":
            return pixels
        return "gone.png" if bad == "path" else pixels.detach().mul(math.nan)

    def call() -> None:
        assert trl(prompts=prompts, completions=["0", "1", "2"])[1] is None
        if bad != "no image":
            images = [flaw(index) for index in range(3)]
            result = rewards.score(prompts, images, on_failure="nan")
            assert [*result.failures["two"]] == [1]
            assert math.isnan(flow_grpo(images, prompts, None)[0]["avg"][1])

    call()
    gc.collect()
    gc.disable()
    try:
        before = held()
        for _ in range(3):
            call()
        assert held() == before
    finally:
        gc.enable()


def test_a_list_of_tensors_keeps_its_gradients() -> None:
    images = torch.rand(3, 3, 8, 8, requires_grad=True)
    means = MetricScorer(lambda prompts, images: [image.mean() for image in images])
    means.scored(as_batch(["a"] * 3, images)).values.sum().backward()
    assert images.grad is not None and images.grad.allclose(torch.tensor(1 / 192))

    def mixed(prompts: list[str], images: Any) -> list[Any]:
        kinds = {
            "tensor": lambda image: image.mean()[None],
            "number": lambda image: 2,
            "": lambda image: None,
        }
        return [kinds[prompt](image) for prompt, image in zip(prompts, images, strict=True)]

    scored = MetricScorer(mixed).scored(as_batch(["", "tensor", "number"], images))
    assert scored.values.requires_grad and scored.values.isnan().tolist() == [True, False, False]


class Roots(Brightness):
    """The square root of the brightness over a half, which a dark picture has not."""

    def components(self, images: Any) -> dict[str, torch.Tensor]:
        return {"score": (super().components(images)["score"] - 0.5).sqrt()}


class TestBesideAFailure:
    """The square root of a dark picture is no number, nor is its gradient, not even times 0."""

    @pytest.fixture
    def pixels(self) -> torch.Tensor:
        values = torch.tensor([0.9, 0.1, 0.7, 0.8])[:, None, None, None]
        return values.expand(4, 3, 32, 32).clone().requires_grad_()

    @staticmethod
    def root(prompts: list[str], images: Any) -> torch.Tensor:
        return (images.mean(dim=(1, 2, 3)) - 0.5).sqrt()

    @pytest.mark.parametrize("policy", ["nan", "mean", -1.0])
    @pytest.mark.parametrize("normalize", ["none", "group"])
    def test_the_others_have_their_gradient_and_it_has_none(
        self, normalize: str, policy: Any, pixels: torch.Tensor
    ) -> None:
        rewards = RewardSet({"root": Component(self.root, normalize=normalize)})
        result = rewards.score("a", pixels, on_failure=policy)
        assert result.failures == {"root": {1: "the score is not a finite number"}}
        result.reward.nansum().backward()
        assert pixels.grad is not None and pixels.grad.isfinite().all()
        assert (pixels.grad[[0, 2, 3]] > 0).all() and (pixels.grad[1] == 0).all()

    @pytest.mark.parametrize("kind", ["batch", "list", "shared"])
    def test_a_metric_is_asked_again_without_it(self, kind: str, pixels: torch.Tensor) -> None:
        metric = Roots()
        images: Any = pixels if kind == "batch" else list(pixels)
        if kind == "shared":
            images = SharedImages(images)
        scored = MetricScorer(metric).scored(as_batch(["a"] * 4, images))
        assert scored.values.isnan().tolist() == [False, True, False, False]
        expected = metric.reward(pixels.detach()[[0, 2, 3]])
        torch.testing.assert_close(scored.values[[0, 2, 3]].detach(), expected, rtol=1e-4, atol=1e-5)
        assert [error is None for error in scored.errors] == [True, False, True, True]
        stand_in(scored.values, "mean").sum().backward()
        assert pixels.grad is not None and pixels.grad.isfinite().all()
        assert (pixels.grad[[0, 2, 3]] > 0).all() and (pixels.grad[1] == 0).all()

    def test_there_may_be_no_other(self, pixels: torch.Tensor) -> None:
        scored = MetricScorer(self.root).scored(as_batch(["a"], pixels[1:2]))
        assert scored.values.isnan().all() and scored.errors[0] is not None

    def test_without_gradients_it_is_asked_once(self, pixels: torch.Tensor) -> None:
        metric = Roots()
        assert (
            MetricScorer(metric).scored(as_batch(["a"] * 4, pixels.detach())).values.isnan().sum() == 1
        )
        assert metric.calls == 1

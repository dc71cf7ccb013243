"""Every metric on the accelerator that torch reports gives what it gives on the CPU.

Skipped where there is none.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from classes import DIFFERENTIABLE, JUDGES, metric_class

from diffsynth_metrics import AestheticMetric, ImageError, ModelConfig
from diffsynth_metrics.pixels.resizing import resize
from diffsynth_metrics.rewards import Component, RewardSet, as_loss, to_dance_grpo, to_flow_grpo

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")

PROMPTS = ["a cat", "a photograph of an astronaut", "", "ein Bär 🐻 <|endoftext|>"]


def accelerator() -> torch.device:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of CUDA round their inputs to 10 bits unless they are told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# The same images, scored twice by one device, which may add up in another order.
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def load(tiny: Callable[[str], Path]) -> Callable[..., Any]:
    def load(name: str, device: Any = None, **options: Any) -> Any:
        options = {"torch_dtype": torch.float32} | options
        config = ModelConfig(path=tiny(name))
        return metric_class(name).from_pretrained(config, device=device, **options)

    return load


@pytest.fixture(scope="module", params=DIFFERENTIABLE)
def name(request: Any) -> str:
    param: str = request.param
    return param


@pytest.fixture(scope="module")
def both(name: str, load: Callable[..., Any]) -> tuple[Any, Any]:
    """The same metric on the CPU and, by default, on the accelerator."""
    return load(name, "cpu"), load(name)


def call(verb: Callable[..., Any], prompts: Any, images: Any) -> Any:
    return verb(images) if isinstance(verb.__self__, AestheticMetric) else verb(prompts, images)  # type: ignore[attr-defined]


def pixels_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth pictures, floats in 0..1."""
    small = torch.rand(shape[0], 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, shape[-2:], mode="bilinear")
    return large.clamp(0, 1)


def inputs(photographs: dict[str, PIL.Image.Image]) -> Iterator[tuple[Any, Any]]:
    """Yield images for the CPU, and the same for the accelerator."""
    device = accelerator()
    pictures = [photographs[name] for name in ("astronaut", "coffee", "camera", "rocket")]
    yield pictures, pictures
    for size in ((96, 96), (224, 224), (300, 170)):
        floats = pixels_of(4, 3, *size, seed=sum(size))
        yield floats, floats.to(device)
        yield floats, floats
        yield floats.double(), list(floats.double().to(device))
        data = (floats * 255).to(torch.uint8)
        yield data, data.to(device)
        yield data, data.to(device).to(memory_format=torch.channels_last)
    mixed = [pictures[0], pixels_of(1, 3, 80, 120)[0], data[0], pictures[1]]
    yield mixed, [one.to(device) if isinstance(one, torch.Tensor) else one for one in mixed]


def test_scores_are_those_of_the_cpu(
    both: tuple[Any, Any], photographs: dict[str, PIL.Image.Image]
) -> None:
    on_cpu, metric = both
    assert metric.device.type == accelerator().type
    for images, same in inputs(photographs):
        expected = torch.tensor(call(on_cpu.compute, PROMPTS, images), dtype=torch.float64)
        scores = torch.tensor(call(metric.compute, PROMPTS, same), dtype=torch.float64)
        assert expected.std() > 1e-3
        torch.testing.assert_close(scores, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("size", [(128, 128), (512, 512), (300, 170), (90, 700)], ids=str)
def test_bytes_are_resized_as_pillow_does_it(size: tuple[int, int]) -> None:
    data = (pixels_of(2, 3, *size) * 255).to(torch.uint8)
    resized = resize(data.to(accelerator()), 224, 224).cpu()
    # CUDA divides by 255 with an error in the last bit, so bytes are compared.
    assert torch.equal((resized * 255).round(), (resize(data, 224, 224) * 255).round())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(
    name: str, dtype: torch.dtype, load: Callable[..., Any], photographs: dict[str, PIL.Image.Image]
) -> None:
    metric, exact = load(name, torch_dtype=dtype), load(name)
    pictures = list(photographs.values())[:4]
    expected = torch.tensor(call(exact.compute, PROMPTS, pictures))
    scores = torch.tensor(call(metric.compute, PROMPTS, pictures))
    assert metric.dtype == dtype and scores.isfinite().all()
    wide = 0.1 if dtype == torch.bfloat16 else 0.02
    assert (scores - expected).abs().max() < wide * (1 + expected.abs().max())


def test_rewards_stay_on_the_device_with_their_gradients(both: tuple[Any, Any]) -> None:
    on_cpu, metric = both
    device = accelerator()
    pixels = 0.2 + 0.6 * pixels_of(4, 3, 120, 90)
    grads = []
    for one, leaf in (
        (on_cpu, pixels.clone().requires_grad_()),
        (metric, pixels.to(device, copy=True).requires_grad_()),
    ):
        reward = call(one.reward, PROMPTS, leaf)
        assert reward.device.type == leaf.device.type and reward.dtype == torch.float32
        reward.sum().backward()
        assert leaf.grad is not None and leaf.grad.device == leaf.device
        grads.append(leaf.grad.cpu())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * float(grads[0].abs().max()))
    for weight in metric.model.parameters():
        assert weight.grad is None and not weight.requires_grad
    assert not call(metric.reward, PROMPTS, pixels.to(device)).requires_grad


def test_gradient_checkpointing_changes_nothing(name: str, load: Callable[..., Any]) -> None:
    grads = []
    for one in (load(name), load(name, gradient_checkpointing=True)):
        leaf = pixels_of(2, 3, 100, 100).to(accelerator()).requires_grad_()
        call(one.reward, PROMPTS[:2], leaf).sum().backward()
        grads.append(leaf.grad)
    assert grads[0] is not None and grads[1] is not None
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5 * float(grads[0].abs().max()))


def test_the_callers_modes_are_left_alone(both: tuple[Any, Any]) -> None:
    metric, device = both[1], accelerator()
    pixels = pixels_of(4, 3, 64, 64).to(device)
    expected = call(metric.reward, PROMPTS, pixels)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_close(call(metric.reward, PROMPTS, pixels), expected)
        assert torch.is_autocast_enabled(device.type)
    with torch.inference_mode():
        assert_close(call(metric.reward, PROMPTS, pixels), expected)
        assert torch.is_inference_mode_enabled()


def test_a_float_out_of_range_is_an_error(both: tuple[Any, Any]) -> None:
    pixels = pixels_of(4, 3, 64, 64).to(accelerator())
    for wrong in (1.5, -0.5, float("nan")):
        pixels[2, 1, 5, 5] = wrong
        with pytest.raises(ImageError, match="image 2"):
            call(both[1].compute, PROMPTS, pixels)


def test_threads_get_the_results_of_one(both: tuple[Any, Any]) -> None:
    metric = both[1]
    batches = [pixels_of(4, 3, 64, 64, seed=seed).to(accelerator()) for seed in range(8)]
    expected = [call(metric.reward, PROMPTS, batch) for batch in batches]

    def work(index: int) -> None:
        with torch.set_grad_enabled(index % 2 == 0):
            for _ in range(25):
                assert_close(call(metric.reward, PROMPTS, batches[index]), expected[index])
                assert torch.is_grad_enabled() == (index % 2 == 0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the memory of CUDA")
def test_memory_after_a_hundred_calls_is_that_after_five(both: tuple[Any, Any]) -> None:
    metric = both[1]
    rewards = RewardSet({"one": Component(metric, 0.5)})
    loss_fn = as_loss(metric)

    def once() -> None:
        pixels = torch.rand(2, 3, 40, 40, device=accelerator())
        rewards.score(PROMPTS[:2], pixels)
        loss_fn(pixels.requires_grad_(), PROMPTS[:2])

    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for _ in range(5):
        once()
    after_five = held()
    for _ in range(95):
        once()
    assert held() == after_five


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA tells of waiting")
# The others tokenize each time.
@pytest.mark.parametrize("name", ["aesthetic", "clip", "hpsv2", "pickscore"])
def test_a_reward_of_bytes_does_not_wait_for_the_device(name: str, load: Callable[..., Any]) -> None:
    metric = load(name) if name == "aesthetic" else load(name, cache_text=True)
    data = (pixels_of(4, 3, 300, 170) * 255).to(torch.uint8).to(accelerator())
    expected = call(metric.reward, PROMPTS, data)  # features of prompts are kept from here on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        reward = call(metric.reward, PROMPTS, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(reward, expected)


def test_adapters_and_sets(both: tuple[Any, Any]) -> None:
    on_cpu, metric = both
    device = accelerator()
    pixels = (pixels_of(4, 3, 128, 128) * 255).to(torch.uint8)
    expected = call(on_cpu.compute, PROMPTS, pixels)
    for images in (pixels, pixels.to(device)):
        scores = to_dance_grpo(metric, scale=None)(images, PROMPTS)
        assert torch.as_tensor(scores).tolist() == pytest.approx(expected, rel=2e-4, abs=2e-4)
        rewards = RewardSet({"one": Component(metric, 0.5, "group"), "two": Component(metric, 0.5)})
        result = rewards.score(PROMPTS, images, groups=[0, 0, 1, 1])
        assert result.reward.device.type == device.type and not result.failures
        assert result.raw["two"].tolist() == pytest.approx(expected, rel=2e-4, abs=2e-4)
        for form in (images, images / 255):
            values, _ = to_flow_grpo(metric, scale=None)(device)(form, PROMPTS, [{}] * 4)
            assert list(values) == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_a_metric_moves(name: str, both: tuple[Any, Any], load: Callable[..., Any]) -> None:
    on_cpu, moving = both[0], load(name)
    pixels = pixels_of(4, 3, 64, 64)
    expected = call(moving.reward, PROMPTS, pixels)
    assert_close(call(moving.to("cpu").reward, PROMPTS, pixels), call(on_cpu.reward, PROMPTS, pixels))
    assert_close(call(moving.to(accelerator()).reward, PROMPTS, pixels), expected)


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_answers_and_its_network_computes_as_on_the_cpu(
    name: str, load: Callable[..., Any], photographs: dict[str, PIL.Image.Image]
) -> None:
    """Whole answers of random networks are not compared: one rounding may choose another token."""
    metric, pictures = load(name, max_new_tokens=20), list(photographs.values())[:4]
    images: list[Any] = [pictures[:2], pictures[2:]] if name == "unified_reward_edit" else pictures[:2]
    rows = metric.evaluate(PROMPTS[:2], images)
    assert len(rows) == 2 and all(row.get("raw_text") or row.get("raw_outputs") for row in rows)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = load(name, "cpu").model(input_ids=ids).logits
        logits = metric.model(input_ids=ids.to(metric.device)).logits
    spread = float(expected.std())
    assert spread > 0
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3 * spread)


@pytest.mark.filterwarnings("ignore:FID of:UserWarning")
def test_fid_is_that_of_the_cpu(tiny: Callable[[str], Path]) -> None:
    first, second = ((pixels_of(64, 3, 80, 80, seed=seed) * 255).to(torch.uint8) for seed in (0, 1))
    distances = []
    for device in ("cpu", None):
        metric = metric_class("fid").from_pretrained(ModelConfig(path=tiny("fid")), device=device)
        distances.append(metric.compute(first, second))
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)

"""LPIPS: its layouts, how pairs become pixels, its direction as a reward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d

from diffsynth_metrics import (
    CheckpointError,
    ImageError,
    LPIPSMetric,
    ModelConfig,
    PickScoreMetric,
    RewardError,
)
from diffsynth_metrics.networks.lpips import NETS, LPIPSNetwork, unit_normalized
from diffsynth_metrics.rewards import Component, RewardSet
from diffsynth_metrics.testing.encoders import write_lpips_of
from diffsynth_metrics.weights.checkpoint import KNOWN_LAYOUTS, fingerprint

LAYOUTS = Path(__file__).parent / "data" / "layouts"


@pytest.fixture(scope="module")
def metric(metrics: Callable[[str], Any]) -> LPIPSMetric:
    found: LPIPSMetric = metrics("lpips")
    return found


def test_each_network_takes_exactly_the_published_layout() -> None:
    for net in NETS:
        published = json.loads((LAYOUTS / f"lpips_{net}.json").read_text())
        network = LPIPSMetric.build({"net": net})
        assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == published
        assert KNOWN_LAYOUTS[fingerprint(published)] == ("LPIPSMetric",)
        assert all(parameter.is_meta for parameter in network.parameters())


def test_the_distance_is_the_weighted_difference_of_unit_features() -> None:
    features = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(unit_normalized(features).flatten(), torch.tensor([0.6, 0.8]))
    nothing = torch.zeros(1, 2, 1, 1, requires_grad=True)
    unit_normalized(nothing).sum().backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()
    # One layer by hand: of AlexNet everything but the first slice is given no weight.
    network = LPIPSNetwork("alex").eval()
    with torch.no_grad():
        for index in range(1, network.layers):
            network.get_submodule(f"lin{index}.model.1").weight.zero_()
        network.scaling_layer.shift.fill_(0.1)
        network.scaling_layer.scale.fill_(0.5)
        first, second = torch.rand(2, 1, 3, 40, 40) * 2 - 1
        layer = network.get_submodule("net.slice1.0")
        sides = [
            unit_normalized(conv2d((x - 0.1) / 0.5, layer.weight, layer.bias, 4, 2).relu())
            for x in (first, second)
        ]
        weight = network.get_submodule("lin0.model.1").weight.flatten()
        by_hand = ((sides[0] - sides[1]) ** 2 * weight[:, None, None]).sum(dim=1).mean()
        torch.testing.assert_close(network(first, second)[0], by_hand)


def test_equal_pictures_have_no_distance_and_the_reward_is_minus_it(
    metric: LPIPSMetric, photographs: dict[str, PIL.Image.Image]
) -> None:
    cat, cup = photographs["chelsea"], photographs["coffee"].resize((451, 300))
    same, turned, other = metric.compute([cat] * 3, [cat, cat.rotate(5), cup])
    assert same == 0 and 0 < turned and 0 < other
    rewards = metric.reward([cat] * 2, [cat.rotate(5), cup])
    torch.testing.assert_close(rewards.tolist(), [-turned, -other], rtol=1e-4, atol=1e-5)
    assert metric.evaluate(cat, cat) == [{"score": 0.0}]
    assert not metric.card.higher_is_better


def test_a_reward_has_gradients_to_both_sides(metric: LPIPSMetric) -> None:
    reference = torch.rand(2, 3, 64, 64, requires_grad=True)
    pixels = torch.rand(2, 3, 64, 64, requires_grad=True)
    metric.reward(reference, pixels).sum().backward()
    for side in (reference, pixels):
        assert side.grad is not None and side.grad.abs().sum() > 0 and side.grad.isfinite().all()
    # Downhill: a step along the reward makes the pictures more alike.
    step = (pixels + 0.05 * pixels.grad.sign()).clamp(0, 1).detach()
    assert (metric.reward(reference.detach(), step) > metric.reward(reference, pixels)).all()


def test_pictures_of_one_size_are_not_resized_and_others_are(
    metric: LPIPSMetric, photographs: dict[str, PIL.Image.Image]
) -> None:
    cat = photographs["chelsea"].resize((100, 80))
    pixels = torch.from_numpy(np.array(cat)).permute(2, 0, 1)
    small = pixels.float().div(255).sub(0.5).div(0.5)[None]
    with torch.no_grad():
        expected = metric.model(small, small.flip(-1))
    mirrored = cat.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    assert metric.compute(cat, mirrored) == pytest.approx(expected.tolist(), rel=1e-4)
    # Sizes that differ meet at the target size; a copy of another size is then nearly the same.
    metric_64 = LPIPSMetric(metric.model, target_size=64)
    (copy,) = metric_64.compute(cat, cat.resize((200, 160), PIL.Image.Resampling.BICUBIC))
    (other,) = metric_64.compute(cat, mirrored.resize((200, 160), PIL.Image.Resampling.BICUBIC))
    assert 0 < copy < 0.2 * other


def test_batches_and_mixed_inputs_do_not_change_scores(
    metric: LPIPSMetric, photographs: dict[str, PIL.Image.Image]
) -> None:
    cats = [photographs["chelsea"].resize(size) for size in [(90, 90), (90, 90), (120, 70), (90, 90)]]
    cups = [photographs["coffee"].resize(size) for size in [(90, 90), (64, 90), (120, 70), (90, 90)]]
    alone = [metric.compute(*pair)[0] for pair in zip(cats, cups, strict=True)]
    for size in (1, 2, 16):
        batched = LPIPSMetric(metric.model, batch_size=size).compute(cats, cups)
        assert batched == pytest.approx(alone, rel=1e-4)
    tensors = [torch.from_numpy(np.array(cup)).permute(2, 0, 1) for cup in cups]
    assert metric.compute(cats, tensors) == pytest.approx(alone, abs=0.02)


def test_a_picture_that_cannot_be_read_is_named(metric: LPIPSMetric, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    PIL.Image.new("RGB", (64, 64)).save(good)
    bad.write_bytes(good.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"reference 1 .*bad\.png"):
        metric.compute([good, bad], [good, good])
    with pytest.raises(ImageError, match=r"image 1 .*bad\.png"):
        metric.compute([good, good], [good, bad])


def test_a_picture_that_is_too_small_for_the_network_is_named(
    metric: LPIPSMetric, tmp_path: Path
) -> None:
    for side, name in ((30, "small.png"), (31, "large.png")):
        PIL.Image.new("RGB", (side, 40)).save(tmp_path / name)
    with pytest.raises(ImageError, match=r"small\.png.* is 30x40, and each side must have at least 31"):
        metric.compute(tmp_path / "small.png", tmp_path / "small.png")
    large = tmp_path / "large.png"
    assert metric.compute(large, large) == pytest.approx([0], abs=1e-6)


def test_the_network_is_that_of_the_file(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    write_lpips_of("squeeze", tmp_path, 0)
    config = ModelConfig(path=tmp_path)
    assert LPIPSMetric.from_pretrained("squeeze", config, "cpu").model.name == "squeeze"
    with pytest.raises(CheckpointError, match="Pass net='squeeze': the weights are not those of net="):
        LPIPSMetric.from_pretrained(model_config=config, device="cpu")
    with pytest.raises(ValueError, match="net must be one of alex, squeeze, vgg; got 'vgg19'"):
        LPIPSMetric.from_pretrained("vgg19", config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_size must be a positive int"):
        LPIPSMetric.from_pretrained("alex", config, target_size=0)
    with pytest.raises(CheckpointError, match="Use LPIPSMetric for"):
        PickScoreMetric.from_pretrained(config, device="cpu")


def test_in_bfloat16_the_features_are_narrow_and_the_distance_is_not(
    metric: LPIPSMetric, tiny: Callable[[str], Path], photographs: dict[str, PIL.Image.Image]
) -> None:
    narrow = LPIPSMetric.from_pretrained(
        model_config=ModelConfig(path=tiny("lpips")), device="cpu", torch_dtype=torch.bfloat16
    )
    cat, cup = (photographs[name].resize((96, 96)) for name in ("chelsea", "coffee"))
    assert narrow.compute(cat, cup) == pytest.approx(metric.compute(cat, cup), rel=0.05)
    assert narrow.components(cat, cup)["score"].dtype == torch.float32


def test_broken_weights_are_said(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(tiny("lpips") / "model.safetensors")
    tensors["net.slice1.0.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    metric = LPIPSMetric.from_pretrained(
        model_config=ModelConfig(path=tmp_path), device="cpu", check_finite=False
    )
    image = PIL.Image.new("RGB", (64, 64), "red")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in net\.slice1\.0\.weight"):
        metric.compute(image, image)


def test_it_is_a_reward_that_rises_as_pictures_become_alike(metric: LPIPSMetric) -> None:
    images = torch.rand(3, 3, 48, 48)
    sources = [[image.roll(1, -1)] for image in images]
    result = RewardSet({"lpips": Component(metric)}).score(["", "", ""], images, sources=sources)
    distances = metric.compute([source for (source,) in sources], list(images))
    assert min(distances) > 0
    assert result.reward.tolist() == pytest.approx([-distance for distance in distances], rel=1e-3)
    with pytest.raises(RewardError, match="LPIPSMetric needs one source image per sample"):
        RewardSet({"lpips": Component(metric)}).score([""], images[:1])

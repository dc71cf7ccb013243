"""PSNR and SSIM: equal to scikit-image, gradients, and how a metric without weights is loaded."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diffsynth_metrics import ImageError, ModelConfig, PSNRMetric, SSIMMetric
from diffsynth_metrics.base import ReferenceMetric
from diffsynth_metrics.catalog import load_metric
from diffsynth_metrics.metrics.psnr import psnr
from diffsynth_metrics.metrics.ssim import ssim
from diffsynth_metrics.pixels.pairs import pair_batches
from diffsynth_metrics.pixels.transforms import Unresized

Photographs = dict[str, PIL.Image.Image]


@pytest.fixture(scope="module")
def psnr_metric() -> PSNRMetric:
    return PSNRMetric.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def ssim_metric() -> SSIMMetric:
    return SSIMMetric.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def pairs(photographs: Photographs) -> list[tuple[PIL.Image.Image, PIL.Image.Image]]:
    """Photographs of two sizes with worse copies of them, and one pair with nothing in common."""
    generator = np.random.default_rng(0)
    found = []
    for index, picture in enumerate(photographs.values()):
        picture = picture.resize((150, 90) if index % 2 else (64, 111))
        noise = generator.normal(0, 4 * index + 1, np.asarray(picture).shape)
        noisy = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        found += [(picture, PIL.Image.fromarray(noisy)), (picture, picture.rotate(2 * index + 1))]
    flat = PIL.Image.new("RGB", (64, 111), (250, 250, 250))
    return [*found, (flat, PIL.Image.new("RGB", (64, 111), (249, 250, 251))), (flat, found[0][0])]


def test_psnr_is_the_mean_squared_error_in_decibels() -> None:
    mse = torch.tensor([1.0, 0.01, 1e-4, 0.0], requires_grad=True)
    decibels = psnr(mse)
    assert decibels.tolist() == pytest.approx([0, 20, 40, math.inf])
    decibels.sum().backward()
    assert mse.grad is not None
    assert mse.grad.tolist() == pytest.approx([-10 / math.log(10) / x for x in (1, 0.01, 1e-4)] + [0])


def test_ssim_of_one_window_is_the_formula_written_out() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.random((2, 11, 11))
    weights = np.array(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    )
    weights /= weights.sum()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    variance_x = (weights * (x - mean_x) ** 2).sum()
    variance_y = (weights * (y - mean_y) ** 2).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    expected /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    (found,) = ssim(*(torch.from_numpy(side)[None, None] for side in (x, y)))
    assert found.item() == pytest.approx(expected, rel=1e-9)
    # Of flat pictures the levels alone are left.
    flat = [torch.full((1, 3, 16, 20), level, dtype=torch.float64) for level in (0.2, 0.6)]
    assert ssim(*flat).item() == pytest.approx((0.24 + c1) / (0.04 + 0.36 + c1), rel=1e-9)


def test_they_equal_scikit_image(
    psnr_metric: PSNRMetric, ssim_metric: SSIMMetric, pairs: list[Any]
) -> None:
    references, images = zip(*pairs, strict=True)
    arrays = [(np.asarray(one), np.asarray(other)) for one, other in pairs]
    expected = [peak_signal_noise_ratio(*pair, data_range=255) for pair in arrays]
    assert psnr_metric.compute(references, images) == pytest.approx(expected, rel=1e-5)
    # The window of the paper: 11 pixels, sigma 1.5, variances with N in the denominator.
    expected = [
        structural_similarity(
            *pair,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        for pair in arrays
    ]
    assert ssim_metric.compute(references, images) == pytest.approx(expected, abs=1e-5)


def test_equal_pictures_are_said_to_be(
    psnr_metric: PSNRMetric, ssim_metric: SSIMMetric, photographs: Photographs
) -> None:
    cat = photographs["chelsea"]
    assert ssim_metric.compute(cat, cat) == [1]
    equal, other = psnr_metric.evaluate(cat, [cat, cat.rotate(1)])
    assert equal["score"] == math.inf and equal["mse"] == 0
    assert equal["error"] == "the pictures are equal, of which PSNR is infinite"
    assert other["score"] == pytest.approx(-10 * math.log10(other["mse"])) and other["error"] is None


def test_pictures_that_cannot_be_compared_are_named(
    psnr_metric: PSNRMetric, ssim_metric: SSIMMetric, tmp_path: Path
) -> None:
    for name, size in (("large", (64, 48)), ("small", (32, 24)), ("thin", (64, 10))):
        PIL.Image.new("RGB", size).save(tmp_path / f"{name}.png")
    large, small, thin = (tmp_path / f"{name}.png" for name in ("large", "small", "thin"))
    for metric in (psnr_metric, ssim_metric):
        with pytest.raises(
            ImageError,
            match=r"resize one of them: reference 1 \(.*large\.png\) is 64x48 and "
            r"image 1 \(.*small\.png\) is 32x24",
        ):
            metric.compute([large, large], [large, small])
    assert psnr_metric.compute(thin, thin) == [math.inf]
    with pytest.raises(ImageError, match=r"reference 0 \(.*thin\.png\) is 64x10.* at least 11 pixels"):
        ssim_metric.compute(thin, thin)
    small.write_bytes(large.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"image 0 .*small\.png.* cannot be read"):
        psnr_metric.compute(large, small)


def test_every_kind_of_picture_is_the_same(
    psnr_metric: PSNRMetric, ssim_metric: SSIMMetric, pairs: list[Any], tmp_path: Path
) -> None:
    one, other = pairs[1]
    other.save(tmp_path / "other.png")
    pixels = torch.from_numpy(np.asarray(other).copy()).permute(2, 0, 1)
    kinds = [other, tmp_path / "other.png", np.asarray(other), pixels, pixels / 255]
    for metric in (psnr_metric, ssim_metric):
        assert metric.compute(one, kinds) == pytest.approx(metric.compute(one, other) * 5, rel=1e-5)
        stacked = torch.stack([pixels] * 3)
        assert metric.compute(one, stacked) == pytest.approx(metric.compute(one, other) * 3, rel=1e-5)


def test_batches_do_not_change_scores(ssim_metric: SSIMMetric, pairs: list[Any]) -> None:
    references, images = zip(*pairs, strict=True)
    alone = [ssim_metric.compute(*pair)[0] for pair in pairs]
    for size in (1, 3, 64):
        together = SSIMMetric(ssim_metric.model, batch_size=size).compute(references, images)
        assert together == pytest.approx(alone, abs=1e-6)
    sizes = [
        first.shape
        for first, _ in pair_batches(
            list(references), list(images), Unresized(), batch_size=3, device=torch.device("cpu")
        )
    ]
    assert sum(shape[0] for shape in sizes) == len(pairs) and max(shape[0] for shape in sizes) <= 3


@pytest.mark.parametrize("name", ["psnr", "ssim"])
class TestBoth:
    def test_gradients_agree_with_finite_differences(self, name: str) -> None:
        metric: Any = load_metric(name, device="cpu", torch_dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        reference, image, direction = torch.rand(3, 2, 3, 14, 17, generator=generator).double()
        reference, image = 0.1 + 0.8 * reference, 0.1 + 0.8 * image
        sides = [side.clone().requires_grad_() for side in (reference, image)]
        reward = metric.reward(*sides)
        assert reward.dtype == torch.float64 and reward.shape == (2,)
        reward.sum().backward()
        step = 1e-5 * (direction - 0.5)
        for index, side in enumerate(sides):
            moved = [
                metric.reward(
                    *(one + sign * step * (index == at) for at, one in enumerate((reference, image)))
                )
                for sign in (1, -1)
            ]
            measured = ((moved[0] - moved[1]) / 2).sum().item()
            assert side.grad is not None
            assert (side.grad * step).sum().item() == pytest.approx(measured, rel=1e-5)

    def test_the_gradient_of_equal_pictures_is_no_nan(self, name: str) -> None:
        metric: Any = load_metric(name, device="cpu")
        image = torch.rand(1, 3, 16, 16).requires_grad_()
        metric.reward(image.detach(), image).sum().backward()
        assert image.grad is not None and image.grad.isfinite().all()

    def test_it_loads_without_weights_and_says_so(self, name: str) -> None:
        metric: Any = load_metric(name, device="cpu", batch_size=2)
        assert isinstance(metric, ReferenceMetric) and metric.needs == ("source",)
        assert (metric.device.type, metric.dtype, metric.batch_size) == ("cpu", torch.float32, 2)
        assert list(metric.parameters()) == [] and metric.weight_files == ()
        assert metric.card.higher_is_better and "unpublished" not in metric.card.name
        provenance = metric.provenance
        assert provenance["weights"] is None and provenance["preprocessing"].startswith("Unresized")
        with pytest.raises(
            ValueError, match=f"leave model_config out: {type(metric).__name__} loads no"
        ):
            type(metric).from_pretrained(ModelConfig.embedded("shapes"))
        twin = pickle.loads(pickle.dumps(metric))
        image = torch.rand(2, 3, 12, 12)
        assert twin.compute(image, image.flip(-1)) == metric.compute(image, image.flip(-1))

    def test_it_computes_in_float32_or_wider(self, name: str, pairs: list[Any]) -> None:
        metric: Any = load_metric(name, device="cpu", torch_dtype=torch.bfloat16)
        usual = load_metric(name, device="cpu").compute(*pairs[0])
        assert metric.dtype == torch.float32 and metric.compute(*pairs[0]) == pytest.approx(usual)
        assert metric.to(torch.float64).dtype == torch.float64
        assert metric.compute(*pairs[0]) == pytest.approx(usual, rel=1e-5)
        assert metric.half().dtype == torch.float32

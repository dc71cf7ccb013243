"""FD-DINOv2 and CMMD: formulas, equality with independent code, statistics that do not mix."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import torch
import torch.nn.functional
from safetensors.torch import load_file
from test_image_similarity import clip_as_transformers, vit_as_transformers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from diffsynth_metrics import (
    CheckpointError,
    CMMDMetric,
    FDDINOv2Metric,
    FeatureSet,
    FIDStatistics,
    ImageSimilarityMetric,
    ModelConfig,
)
from diffsynth_metrics.catalog import load_metric
from diffsynth_metrics.fid.distances import gaussian_mmd
from diffsynth_metrics.fid.statistics import compare_statistics
from diffsynth_metrics.weights.checkpoint import KNOWN_LAYOUTS, fingerprint

few = pytest.mark.filterwarnings("ignore:FD-DINOv2 of .* below 32 the covariance is singular")


@pytest.fixture(scope="module")
def fd(tiny: Callable[[str], Path]) -> FDDINOv2Metric:
    return FDDINOv2Metric.from_pretrained(ModelConfig(path=tiny("fd_dinov2")), device="cpu")


@pytest.fixture(scope="module")
def cmmd(tiny: Callable[[str], Path]) -> CMMDMetric:
    return CMMDMetric.from_pretrained(ModelConfig(path=tiny("cmmd")), device="cpu")


@pytest.fixture(scope="module")
def sides(photographs: dict[str, PIL.Image.Image]) -> tuple[list[Any], list[Any]]:
    """Crops of photographs, of several shapes, one grey."""
    first, second, third = list(photographs.values())[:3]
    boxes = [(10 * i, 5 * i, 10 * i + 90, 5 * i + 60 + 20 * i) for i in range(6)]
    real = [first.crop(box) for box in boxes]
    made = [second.convert("L").crop(boxes[0]), *(third.crop(box) for box in boxes[1:])]
    return real, made


class TestGaussianMMD:
    def by_hand(self, x: np.ndarray, y: np.ndarray, sigma: float = 10) -> float:
        def kernel(a: np.ndarray, b: np.ndarray) -> float:
            return math.exp(
                -sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / 2 / sigma**2
            )

        def mean(first: np.ndarray, second: np.ndarray) -> float:
            values = [kernel(a, b) for a in first for b in second]
            return sum(values) / len(values)

        return mean(x, x) + mean(y, y) - 2 * mean(x, y)

    def test_it_equals_the_formula_written_out(self) -> None:
        generator = np.random.default_rng(0)
        for n, m, width in ((1, 1, 1), (5, 3, 4), (9, 12, 7)):
            x, y = generator.normal(size=(n, width)), generator.normal(2, 3, size=(m, width))
            assert gaussian_mmd(x, y) == pytest.approx(self.by_hand(x, y), rel=1e-9, abs=1e-12)
            assert gaussian_mmd(x, y) == pytest.approx(gaussian_mmd(y, x), rel=1e-9)
            assert gaussian_mmd(x, y, sigma=1) == pytest.approx(self.by_hand(x, y, 1), rel=1e-9)

    def test_it_is_the_biased_estimator(self) -> None:
        x, y = np.array([[0.0], [0.0]]), np.array([[10.0], [0.0]])
        k = math.exp(-1 / 2)
        # Pairs of an image with itself count: the mean within y is (1 + k + k + 1) / 4.
        assert gaussian_mmd(x, y) == pytest.approx(1 + (1 + k) / 2 - 2 * (1 + k) / 2)

    def test_equal_sets_are_0_and_many_images_go_in_blocks(self) -> None:
        x = np.random.default_rng(0).normal(size=(1500, 3)).astype(np.float32)
        assert gaussian_mmd(x, x) == 0
        whole = gaussian_mmd(x, x[:700] + 1)
        kernel = np.exp(-((x[:, None] - x[None, :]) ** 2).sum(-1, dtype=np.float64) / 200)
        other = np.exp(-((x[:, None] - (x[:700] + 1)[None]) ** 2).sum(-1, dtype=np.float64) / 200)
        assert whole == pytest.approx(
            kernel.mean() + kernel[:700, :700].mean() - 2 * other.mean(), rel=1e-4
        )

    def test_wrong_shapes_are_refused(self) -> None:
        for x, y in (((2, 3), (2, 4)), ((0, 3), (2, 3)), ((3,), (3,))):
            with pytest.raises(ValueError, match="must be"):
                gaussian_mmd(np.zeros(x), np.zeros(y))


# Independent code: Pillow, NumPy, SciPy and transformers' networks. -----------------------------------


def dinov2_features(folder: Path, pictures: list[PIL.Image.Image]) -> np.ndarray:
    """Class tokens, with the positions as facebookresearch/dinov2 interpolates them."""
    weights = load_file(folder / "model.safetensors")
    positions = weights["pos_embed"]
    grid = positions[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    scale = 16.1 / 37
    grid = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    weights["pos_embed"] = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=4,
        image_size=224,
        patch_size=14,
    )
    network = vit_as_transformers(weights, Dinov2Model(config), dinov2=True)
    features = []
    for picture in pictures:
        resized = picture.convert("RGB").resize((224, 224), PIL.Image.Resampling.BICUBIC)
        pixels = (np.asarray(resized, np.float64) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        pixel_values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            features.append(network(pixel_values=pixel_values).last_hidden_state[0, 0].numpy())
    return np.array(features, np.float64)


def clip_features(folder: Path, pictures: list[PIL.Image.Image]) -> np.ndarray:
    """L2-normalised embeddings of centred squares."""
    weights = load_file(folder / "model.safetensors")
    bias = weights.pop("head.bias")
    config = CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=336,
        patch_size=14,
        projection_dim=24,
        hidden_act="quick_gelu",
    )
    network = clip_as_transformers(weights, CLIPVisionModelWithProjection(config))
    features = []
    for picture in pictures:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.convert("RGB").crop((left, top, left + side, top + side))
        square = square.resize((336, 336), PIL.Image.Resampling.BICUBIC)
        pixels = np.asarray(square, np.float64) / 255
        pixels -= (0.48145466, 0.4578275, 0.40821073)
        pixels /= (0.26862954, 0.26130258, 0.27577711)
        pixel_values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            embedding = (network(pixel_values=pixel_values).image_embeds[0] + bias).numpy()
        features.append(embedding.astype(np.float64) / np.linalg.norm(embedding))
    return np.array(features)


@few
def test_fd_dinov2_equals_transformers_and_scipy(
    fd: FDDINOv2Metric, tiny: Callable[[str], Path], sides: tuple[list[Any], list[Any]]
) -> None:
    real, made = (dinov2_features(tiny("fd_dinov2"), side) for side in sides)
    np.testing.assert_allclose(fd.encode_image(sides[0]).numpy(), real, atol=1e-5)
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(made.T))
    expected = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(
        np.cov(real.T) + np.cov(made.T) - 2 * root.real
    )
    result = fd.evaluate(*sides)
    assert result["score"] == pytest.approx(expected, rel=1e-4)
    assert result["preprocessing"] == "dgm-eval"
    assert fd.compute(sides[0], sides[0]) == pytest.approx(0, abs=1e-6)


def test_cmmd_equals_transformers_and_numpy(
    cmmd: CMMDMetric, tiny: Callable[[str], Path], sides: tuple[list[Any], list[Any]]
) -> None:
    real, made = (clip_features(tiny("cmmd"), side) for side in sides)
    np.testing.assert_allclose(cmmd.statistics(sides[0]).features, real, atol=1e-5)
    within = [np.exp((side @ side.T - 1) / 100).mean() for side in (real, made)]
    expected = 1000 * (sum(within) - 2 * np.exp((real @ made.T - 1) / 100).mean())
    result = cmmd.evaluate(*sides)
    assert result["score"] == pytest.approx(expected, rel=1e-4)
    assert cmmd.compute(*sides) == result["score"]
    assert (result["reference_count"], result["generated_count"]) == (6, 6)
    assert cmmd.compute(sides[0], sides[0]) == 0


class TestStatistics:
    def test_files_say_which_network_made_them(
        self, fd: FDDINOv2Metric, sides: tuple[list[Any], list[Any]], tmp_path: Path
    ) -> None:
        statistics = fd.statistics(sides[0])
        statistics.save(tmp_path / "dinov2.npz")
        loaded = FIDStatistics.load(tmp_path / "dinov2.npz")
        assert statistics.extractor == loaded.extractor == "dinov2-vitl14"
        assert "extractor='dinov2-vitl14'" in repr(loaded)

    def test_files_of_fid_stay_as_they_were(self, tmp_path: Path) -> None:
        statistics = FIDStatistics(preprocessing="clean").update(np.eye(3))
        statistics.save(tmp_path / "fid.npz")
        with np.load(tmp_path / "fid.npz") as file:
            assert sorted(file.files) == ["count", "mu", "preprocessing", "sigma", "skipped"]
        assert FIDStatistics.load(tmp_path / "fid.npz").extractor == "inception"
        assert "extractor" not in repr(statistics)

    def test_features_of_two_networks_do_not_mix(
        self, fd: FDDINOv2Metric, metrics: Callable[[str], Any], sides: tuple[list[Any], list[Any]]
    ) -> None:
        features = np.random.default_rng(0).random((8, 32))
        dinov2 = FIDStatistics(extractor="dinov2-vitl14").update(features)
        inception = FIDStatistics().update(features)
        with pytest.raises(ValueError, match="features of 'inception', and the generated side of 'din"):
            compare_statistics(inception, dinov2)
        with pytest.raises(ValueError, match="extractor 'inception' and 'dinov2-vitl14' cannot be"):
            inception.merge(dinov2)
        empty = FIDStatistics().merge(dinov2)
        assert empty.extractor == "dinov2-vitl14"
        with pytest.raises(ValueError, match="reference statistics hold features of 'inception', and F"):
            fd.compute(inception, sides[1])
        wide = FIDStatistics(extractor="dinov2-vitl14").update(
            np.random.default_rng(0).random((8, 2048))
        )
        with pytest.raises(
            ValueError, match="generated statistics hold features of 'dinov2-vitl14', and FID"
        ):
            metrics("fid").compute(sides[0], wide)

    @few
    def test_what_fid_has_besides(
        self, fd: FDDINOv2Metric, sides: tuple[list[Any], list[Any]], tmp_path: Path
    ) -> None:
        result = fd.evaluate(*sides, kid=True, prdc=True)
        assert {"kid", "precision", "recall", "coverage"} <= result.keys()
        fd.statistics(sides[0]).save(tmp_path / "real.npz")
        assert fd.compute(tmp_path / "real.npz", sides[1]) == pytest.approx(result["score"], rel=1e-6)

    def test_few_images_are_warned_of_by_its_own_name(
        self, fd: FDDINOv2Metric, sides: tuple[list[Any], list[Any]]
    ) -> None:
        with pytest.warns(UserWarning, match=r"FD-DINOv2 of 6 reference .* below 32 the covariance"):
            fd.compute(*sides)
        with pytest.raises(ValueError, match="FD-DINOv2 needs at least 2 generated images, got 1"):
            fd.compute(sides[0], sides[1][:1])


class TestFeatures:
    def test_they_are_saved_merged_and_compared(
        self, cmmd: CMMDMetric, sides: tuple[list[Any], list[Any]], tmp_path: Path
    ) -> None:
        score = cmmd.compute(*sides)
        cmmd.statistics(sides[0][:2]).save(tmp_path / "0.npz")
        cmmd.statistics(sides[0][2:]).save(tmp_path / "1.npz")
        total = FeatureSet.load(tmp_path / "0.npz").merge(FeatureSet.load(tmp_path / "1.npz"))
        assert (len(total), total.extractor, total.preprocessing) == (6, "clip-vitl14-336", "cmmd")
        assert total.weights == cmmd.weights and total.dtype == "float32"
        assert cmmd.compute(total, sides[1]) == pytest.approx(score, rel=1e-6)
        total.save(tmp_path / "all.npz")
        assert cmmd.compute(str(tmp_path / "all.npz"), sides[1]) == pytest.approx(score, rel=1e-6)

    def test_features_of_another_network_are_refused(
        self, cmmd: CMMDMetric, sides: tuple[list[Any], list[Any]]
    ) -> None:
        ours = cmmd.statistics(sides[0][:2])
        others = FeatureSet(ours.features, "other", preprocessing="cmmd")
        with pytest.raises(
            ValueError, match=r"reference statistics hold features of 'other'.*compares those"
        ):
            cmmd.compute(others, sides[1])
        with pytest.raises(ValueError, match="extractor 'clip-vitl14-336' and 'other' cannot be merged"):
            ours.merge(others)
        twin = FeatureSet(ours.features, "clip-vitl14-336", weights="0" * 64)
        with pytest.warns(UserWarning, match=r"made with different weights \(0000"):
            assert cmmd.compute(twin, ours) == 0

    def test_what_is_no_set_is_an_error(
        self, cmmd: CMMDMetric, sides: tuple[list[Any], list[Any]], tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match="at least 2 generated images, got 1"):
            cmmd.compute(sides[0], sides[1][0])
        with pytest.raises(ValueError, match="at least 2 generated images, got 1"):
            cmmd.compute(sides[0], (image for image in sides[1][:1]))
        with pytest.raises(ValueError, match=r"features must be \[N, D\], got shape \(3,\)"):
            FeatureSet(np.zeros(3), "x")
        with pytest.raises(ValueError, match="the features of image 1 of 2 are not finite"):
            FeatureSet(np.array([[0.0], [np.nan]]), "x")
        np.savez(tmp_path / "fid.npz", mu=np.zeros(2), sigma=np.eye(2))
        with pytest.raises(ValueError, match="has no extractor and no features, only mu, sigma"):
            cmmd.compute(tmp_path / "fid.npz", sides[1])
        with pytest.raises(ValueError, match=r"ends in \.npz"):
            FeatureSet(np.zeros((1, 2)), "x").save(tmp_path / "x.npy")

    def test_an_image_that_cannot_be_read_is_skipped_and_counted(
        self, cmmd: CMMDMetric, sides: tuple[list[Any], list[Any]], tmp_path: Path
    ) -> None:
        (tmp_path / "broken.png").write_bytes(b"no picture")
        images = [*sides[1], tmp_path / "broken.png"]
        result = cmmd.evaluate(sides[0], images, on_error="skip")
        assert (result["generated_count"], result["generated_skipped"]) == (6, 1)
        assert result["score"] == pytest.approx(cmmd.compute(*sides), rel=1e-6)


class TestLoading:
    def test_the_published_networks(self) -> None:
        for metric, parameters in ((FDDINOv2Metric, 304_367_616), (CMMDMetric, 304_294_656)):
            network = metric.build(None)
            assert sum(weight.numel() for weight in network.parameters()) == parameters
            assert all(weight.is_meta for weight in network.parameters())
            layout = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
            assert metric.__name__ in KNOWN_LAYOUTS[fingerprint(layout)]

    def test_other_networks_are_refused(self, tiny: Callable[[str], Path]) -> None:
        for metric, name, message in (
            (FDDINOv2Metric, "cmmd", "Use CMMDMetric or ImageSimilarityMetric for"),
            (CMMDMetric, "fd_dinov2", "Use FDDINOv2Metric or ImageSimilarityMetric for"),
            (FDDINOv2Metric, "fid", "Use FIDMetric for"),
            (FDDINOv2Metric, "image_similarity_dino", "describes 'vit_small_patch16_224', and the"),
            (CMMDMetric, "clip", "Use PickScoreMetric or CLIPMetric"),
            (ImageSimilarityMetric, "clip", "Use PickScoreMetric or CLIPMetric"),
        ):
            with pytest.raises(CheckpointError, match=message):
                metric.from_pretrained(ModelConfig(path=tiny(name)), device="cpu")

    def test_they_load_by_name(self, tiny: Callable[[str], Path]) -> None:
        for name in ("fd_dinov2", "cmmd"):
            metric = load_metric(f"{name}={tiny(name)}", device="cpu", batch_size=2)
            assert metric.card.higher_is_better is False
            assert metric.provenance["preprocessing"] in ("dgm-eval", "cmmd")
            assert metric.needs == ()

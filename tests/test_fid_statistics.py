"""Statistics and distances, on arrays: exact for any number of images, merged, saved, without torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffsynth_metrics import FIDStatistics
from diffsynth_metrics.fid.distances import (
    factor_of_features,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from diffsynth_metrics.fid.statistics import compare_statistics, differences_of_making, fid_infinity

D = 300


def features(count: int, seed: int, dimensions: int = D, shift: float = 0.0) -> np.ndarray:
    """Rectified features with a decaying spectrum, as a network's are; some dimensions never fire."""
    mixing = np.random.default_rng(0).normal(size=(dimensions, dimensions))
    mixing *= (np.arange(1, dimensions + 1) ** -0.7)[:, None]
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, dimensions)) @ mixing + shift
    values[:, ::50] = 0
    return np.maximum(values, 0).astype(np.float32)


def reference_distance(first: np.ndarray, second: np.ndarray) -> float:
    """FID in float64 from triangular factors of the data, without forming a covariance."""
    factors = [np.linalg.qr(factor_of_features(x), mode="r") for x in (first, second)]
    root = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    shift = first.mean(axis=0, dtype=np.float64) - second.mean(axis=0, dtype=np.float64)
    return float(shift @ shift + sum((factor**2).sum() for factor in factors) - 2 * root)


def statistics_of(values: np.ndarray, batch: int = 100) -> FIDStatistics:
    statistics = FIDStatistics()
    for start in range(0, len(values), batch):
        statistics.update(values[start : start + batch])
    return statistics


def distance(first: FIDStatistics, second: FIDStatistics) -> float:
    return sum(compare_statistics(first, second))


def test_the_distance_equals_a_float64_reference() -> None:
    for counts in ((50, 50), (299, 299), (300, 300), (301, 301), (1500, 1500), (700, 40)):
        first, second = features(counts[0], 1), features(counts[1], 2, shift=0.02)
        found = distance(statistics_of(first), statistics_of(second))
        assert found == pytest.approx(reference_distance(first, second), rel=1e-6), counts


def test_the_distance_of_features_of_the_networks_width_equals_a_float64_reference() -> None:
    first, second = features(120, 1, 2048), features(90, 2, 2048)
    expected = reference_distance(first, second)
    assert distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_have_distance_zero() -> None:
    for count in (50, 900):
        values = features(count, 1)
        found = distance(statistics_of(values), statistics_of(values[::-1]))
        assert found == pytest.approx(0, abs=1e-6), count


def test_moments_alone_give_the_distance_of_their_features() -> None:
    for scale in (1e-8, 1.0, 1e8):
        first, second = features(300, 1, 200) * scale, features(300, 2, 200, shift=0.1) * scale
        moments = [(x.mean(axis=0, dtype=float), np.cov(x, rowvar=False)) for x in (first, second)]
        expected = reference_distance(first, second)
        assert frechet_distance(*moments[0], *moments[1]) == pytest.approx(expected, rel=1e-6), scale


def test_a_singular_covariance_needs_no_fudge_term() -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
    mean = np.zeros(64)
    for rank in (1, 10, 63):
        spectra = np.zeros((2, 64))
        spectra[0, :rank] = np.geomspace(1, 1e-6, rank)
        spectra[1, 64 - rank :] = np.geomspace(1e-3, 2, rank)
        # Both have the same axes, so the root of the product is that of the spectra.
        expected = ((np.sqrt(spectra[0]) - np.sqrt(spectra[1])) ** 2).sum()
        covariances = [(rotation * spectrum) @ rotation.T for spectrum in spectra]
        found = frechet_distance(mean, covariances[0], mean, covariances[1])
        assert found == pytest.approx(expected, rel=1e-6), rank


def test_the_distance_of_one_dimension_is_the_textbooks() -> None:
    one = np.ones((1, 1))
    assert frechet_distance(np.array([1.0]), 4 * one, np.array([3.0]), 9 * one) == pytest.approx(4 + 1)


def test_values_that_are_not_finite_are_errors() -> None:
    mean, covariance = np.zeros(3), np.eye(3)
    for broken in (np.nan, np.inf):
        bad_mean, bad_covariance = mean + broken, covariance + broken
        with pytest.raises(ValueError, match="not finite"):
            frechet_distance(bad_mean, covariance, mean, covariance)
        with pytest.raises(ValueError, match="not finite"):
            frechet_distance(mean, covariance, mean, bad_covariance)
        values = np.zeros((5, 3))
        values[3, 1] = broken
        with pytest.raises(ValueError, match="image 3 of 5 are not finite"):
            FIDStatistics().update(values)
        for moments in ((bad_mean, covariance), (mean, bad_covariance)):
            with pytest.raises(ValueError, match="not finite"):
                FIDStatistics.from_moments(*moments)


def test_what_is_no_covariance_is_an_error() -> None:
    mean = np.zeros(3)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(mean, np.diag([1.0, 1.0, -0.5]), mean, np.eye(3))
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_distance(mean, np.triu(np.ones((3, 3))), mean, np.eye(3))
    with pytest.raises(ValueError, match="not symmetric"):
        FIDStatistics.from_moments(mean, np.triu(np.ones((3, 3))))
    for wrong in (np.ones((3, 2)), np.ones((2, 2)), np.ones(3)):
        with pytest.raises(ValueError, match=r"must be \[D\] and \[D, D\], got"):
            FIDStatistics.from_moments(mean, wrong)
    with pytest.raises(ValueError, match="square"):
        frechet_distance(mean, np.ones((3, 2)), mean, np.eye(3))
    with pytest.raises(ValueError, match="different shapes"):
        frechet_distance(mean, np.eye(3), np.zeros(2), np.eye(2))


@pytest.mark.parametrize("count", [100, 900])
def test_merging_uneven_shards_equals_one_pass(count: int) -> None:
    values = features(count, 1, 256) + 7
    once = statistics_of(values)
    shards = np.split(values, [1, 3, 20, 21, 50, 90])
    assert len(shards) == 7
    merged = FIDStatistics()
    for shard in shards[::-1]:
        merged.merge(statistics_of(shard, batch=9))
    assert merged.count == once.count == count
    np.testing.assert_allclose(merged.mean, once.mean, rtol=1e-9)
    np.testing.assert_allclose(merged.covariance, once.covariance, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(once.covariance, np.cov(values, rowvar=False, dtype=float), atol=1e-9)
    other = statistics_of(features(700, 2, 256))
    assert distance(merged, other) == pytest.approx(distance(once, other), rel=1e-9)


def test_shards_in_files_merge_to_one_pass(tmp_path: Path) -> None:
    values, other = features(900, 1, 128), statistics_of(features(500, 2, 128))
    merged = FIDStatistics()
    for index, shard in enumerate(np.split(values, [2, 100, 101 + 2, 300, 450, 800])):
        statistics_of(shard).save(tmp_path / f"{index}.npz")
        merged.merge(FIDStatistics.load(tmp_path / f"{index}.npz"))
    assert merged.count == 900
    assert distance(merged, other) == pytest.approx(distance(statistics_of(values), other), rel=1e-9)


def test_shards_of_one_image_or_none_merge_from_files(tmp_path: Path) -> None:
    values = features(200, 1, 32)
    merged = FIDStatistics()
    for index, shard in enumerate(np.split(values, [0, 1, 2, 2, 150, 199])):
        FIDStatistics(preprocessing="clean", skipped=1).update(shard).save(tmp_path / f"{index}.npz")
        loaded = FIDStatistics.load(tmp_path / f"{index}.npz")
        assert loaded.count == len(shard)
        merged.merge(loaded)
    once = FIDStatistics(preprocessing="clean").update(values)
    assert (merged.count, merged.preprocessing, merged.skipped) == (200, "clean", 7)
    np.testing.assert_allclose(merged.mean, once.mean, rtol=1e-9)
    np.testing.assert_allclose(merged.covariance, once.covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_stay_too_few_in_a_file(count: int, tmp_path: Path) -> None:
    FIDStatistics().update(features(count, 1, 4)).save(tmp_path / "few.npz")
    with pytest.raises(ValueError, match=f"at least two images on each side, got {count}"):
        compare_statistics(FIDStatistics.load(tmp_path / "few.npz"), statistics_of(features(9, 1, 4)))
    with np.load(tmp_path / "few.npz") as file:  # another package gets no number from it
        assert np.isnan(file["sigma"]).all()
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        FIDStatistics.from_moments(np.zeros(4), np.eye(4), -1)


def test_the_order_of_arrival_does_not_matter() -> None:
    values, other = features(1000, 1, 256), statistics_of(features(1000, 2, 256))
    shuffled = np.random.default_rng(0).permutation(values)
    forward, backward = (
        distance(statistics_of(values), other),
        distance(statistics_of(shuffled, 33), other),
    )
    assert forward == pytest.approx(backward, rel=1e-9)


def test_statistics_of_few_images_keep_their_features() -> None:
    values = features(60, 1, 64)
    statistics = statistics_of(values, 7)
    assert statistics.features is not None
    np.testing.assert_array_equal(statistics.features, values)
    assert statistics.dimensions == 64
    statistics.update(features(5, 2, 64))
    assert statistics.features is None and statistics.count == 65
    assert statistics.dimensions == 64 and FIDStatistics().dimensions == 0


def test_statistics_are_used_like_a_tuple_of_mean_and_covariance() -> None:
    values = features(30, 1, 8)
    statistics = statistics_of(values)
    mean, covariance = statistics
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(values, rowvar=False), atol=1e-6)
    assert len(statistics) == 2
    for first, second in (
        (statistics[0], mean),
        (statistics[1], covariance),
        (statistics[-1], covariance),
    ):
        np.testing.assert_allclose(first, second)
    with pytest.raises(IndexError):
        statistics[2]


def test_writing_to_what_was_unpacked_changes_nothing() -> None:
    values = features(30, 1, 8)
    few, many = statistics_of(values[:5]), statistics_of(values)
    for statistics in (few, many, FIDStatistics.from_moments(*many)):
        before = distance(statistics, statistics_of(values))
        for array in (*statistics, statistics[0], statistics[1], *statistics.mean_and_factor()):
            array += 1
        assert distance(statistics, statistics_of(values)) == pytest.approx(before, abs=1e-9)


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    statistics = FIDStatistics(preprocessing="clean", weights="ab" * 32, dtype="float32", skipped=3)
    statistics.update(features(40, 1, 16))
    statistics.save(tmp_path / "a.npz")
    loaded = FIDStatistics.load(tmp_path / "a.npz")
    known = (loaded.count, loaded.preprocessing, loaded.weights, loaded.dtype, loaded.skipped)
    assert known == (40, "clean", "ab" * 32, "float32", 3)
    np.testing.assert_allclose(loaded.mean, statistics.mean, rtol=1e-12)
    np.testing.assert_allclose(loaded.covariance, statistics.covariance, rtol=1e-12, atol=1e-14)
    assert repr(loaded) == (
        "FIDStatistics(count=40, preprocessing='clean', weights='abababababab', dtype='float32', "
        "skipped=3)"
    )
    with np.load(tmp_path / "a.npz") as file:  # as pytorch-fid reads it
        assert file["mu"][:].shape == (16,) and file["sigma"][:].shape == (16, 16)


def test_a_file_of_another_package_is_compared_and_not_merged(tmp_path: Path) -> None:
    values = features(40, 1, 16)
    np.savez_compressed(tmp_path / "b.npz", mu=values.mean(axis=0), sigma=np.cov(values, rowvar=False))
    foreign = FIDStatistics.load(tmp_path / "b.npz", preprocessing="pytorch-fid")
    assert foreign.count is None and foreign.preprocessing == "pytorch-fid"
    own = FIDStatistics(preprocessing="pytorch-fid").update(values)
    assert distance(own, foreign) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="do not know how many images"):
        own.merge(foreign)
    with pytest.raises(ValueError, match="do not know how many images"):
        foreign.update(values)


def test_further_arrays_in_a_file_are_not_read(tmp_path: Path) -> None:
    further = {"names": np.array(["a", None], dtype=object), "arr_0": np.zeros((100, 64, 64, 3))}
    np.savez(tmp_path / "adm.npz", mu=np.zeros(4), sigma=np.eye(4), **further)  # type: ignore[arg-type]
    tracemalloc.start()
    loaded = FIDStatistics.load(tmp_path / "adm.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (loaded.mean == 0).all() and peak < further["arr_0"].nbytes / 2


def test_a_covariance_that_was_rounded_to_float32_is_read(tmp_path: Path) -> None:
    values = features(40, 1, 64)
    covariance = np.cov(values, rowvar=False).astype(np.float32)
    np.savez(tmp_path / "c.npz", mu=values.mean(axis=0), sigma=covariance)
    loaded = FIDStatistics.load(tmp_path / "c.npz")
    assert distance(loaded, FIDStatistics().update(values)) < 0.01 * np.trace(covariance)


def test_files_that_hold_no_statistics_are_errors(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no zip file")
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    np.savez(tmp_path / "objects.npz", mu=np.array([None]), sigma=np.zeros(1))
    with pytest.raises(ValueError, match=r"text\.npz is not a readable \.npz file"):
        FIDStatistics.load(tmp_path / "text.npz")
    with pytest.raises(ValueError, match=r"half\.npz has no sigma, only mu$"):
        FIDStatistics.load(tmp_path / "half.npz")
    np.savez(tmp_path / "adm.npz", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"no mu and no sigma, only arr_0\. .* uint8 \[N, H, W, 3\], pass"
    ):
        FIDStatistics.load(tmp_path / "adm.npz")
    for name, broken in {
        "[D, D], got (3,) and (4, 4)": {"sigma": np.eye(4)},
        "not finite": {"mu": np.full(3, np.nan)},
        "not symmetric": {"sigma": np.triu(np.ones((3, 3)))},
        "": {"count": np.zeros(3)},
    }.items():
        np.savez(tmp_path / "broken.npz", **{"mu": np.zeros(3), "sigma": np.eye(3), **broken})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"broken\.npz holds no statistics: .*" + re.escape(name)):
            FIDStatistics.load(tmp_path / "broken.npz")
    with pytest.raises(ValueError, match=r"objects\.npz is not a readable"):
        FIDStatistics.load(tmp_path / "objects.npz")
    with pytest.raises(FileNotFoundError):
        FIDStatistics.load(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        statistics_of(features(5, 1, 4)).save(tmp_path / "a.npy")


def test_a_file_does_not_change_its_preprocessing(tmp_path: Path) -> None:
    FIDStatistics(preprocessing="clean").update(features(5, 1, 4)).save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="prepared as 'clean', not 'diffsynth'"):
        FIDStatistics.load(tmp_path / "a.npz", preprocessing="diffsynth")


def test_it_is_said_how_sides_were_prepared_differently() -> None:
    reference = FIDStatistics(preprocessing="clean", weights="a", dtype="float32")
    for options, message in (
        ({"preprocessing": "pytorch-fid", "weights": "a"}, "'clean' and the generated images as"),
        ({"weights": "a"}, "does not say how"),
        ({"preprocessing": "clean", "weights": "b"}, "different weights"),
        ({"preprocessing": "clean", "weights": "a", "dtype": "bfloat16"}, "in float32 and bfloat16"),
    ):
        [difference] = differences_of_making(reference, FIDStatistics(**options))
        assert message in difference
    assert differences_of_making(reference, reference) == []
    assert differences_of_making(FIDStatistics(), FIDStatistics()) == []


def test_shards_that_were_prepared_differently_do_not_merge() -> None:
    values = features(20, 1, 8)
    with pytest.raises(ValueError, match="preprocessing 'clean' and 'diffsynth' cannot be merged"):
        FIDStatistics(preprocessing="clean").update(values).merge(
            FIDStatistics(preprocessing="diffsynth").update(values)
        )
    with pytest.raises(ValueError, match="dtype 'float32' and 'float16' cannot be merged"):
        FIDStatistics(dtype="float32").update(values).merge(
            FIDStatistics(dtype="float16").update(values)
        )
    with pytest.raises(ValueError, match="4 dimensions here and 8 there"):
        FIDStatistics().update(values).merge(FIDStatistics().update(values[:, :4]))


def test_one_image_is_too_few() -> None:
    one, two = statistics_of(features(1, 1, 4)), statistics_of(features(2, 1, 4))
    for sides in ((one, two), (two, one), (FIDStatistics(), two)):
        with pytest.raises(ValueError, match="at least two images"):
            compare_statistics(*sides)


def test_features_of_a_wrong_shape_are_errors() -> None:
    for wrong in (np.zeros(3), np.zeros((3, 0)), np.zeros((2, 3, 1))):
        with pytest.raises(ValueError, match=r"must be \[N, D\]"):
            FIDStatistics().update(wrong)


def test_fid_infinity_removes_most_of_the_bias() -> None:
    first, many = features(20000, 1, 32), features(20000, 2, 32, shift=0.1)
    reference = statistics_of(first)
    true = distance(reference, statistics_of(many))
    few = many[:400]
    biased = distance(reference, statistics_of(few))
    extrapolated = [fid_infinity(reference, few, seed=seed) for seed in range(5)]
    assert abs(np.mean(extrapolated) - true) < 0.4 * (biased - true)
    assert fid_infinity(reference, few, seed=3) == pytest.approx(extrapolated[3], rel=1e-9)
    assert np.std(extrapolated) > 1e-6 * true
    with pytest.raises(ValueError, match="at least 20"):
        fid_infinity(reference, few[:19])


def test_kid_is_that_of_the_kernel() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [3.0, 0.0]])
    within = (0 / 2 + 1) ** 3 + (3 / 2 + 1) ** 3
    across = np.mean([(1 / 2 + 1) ** 3, (3 / 2 + 1) ** 3, (2 / 2 + 1) ** 3, (0 / 2 + 1) ** 3])
    kid, deviation = kernel_distance(x, y, subset_size=2, subsets=3)
    assert kid == pytest.approx(within - 2 * across) and deviation == pytest.approx(0, abs=1e-12)


def test_kid_takes_subsets_of_a_thousand_where_there_are_as_many() -> None:
    for count, size in ((9, 4), (999, 499), (1000, 1000), (1200, 1000)):
        x, y = features(count, 1, 4), features(count + 7, 2, 4)
        expected = kernel_distance(x, y, subsets=2, subset_size=size)
        assert kernel_distance(x, y, subsets=2) == pytest.approx(expected), count
        assert kernel_distance(x, y, subsets=2, subset_size=size - 1) != pytest.approx(expected), count


def test_kid_is_unbiased_for_few_images() -> None:
    values = [kernel_distance(features(30, s, 16), features(30, s + 99, 16))[0] for s in range(20)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    far = kernel_distance(features(30, 1, 16), features(30, 2, 16, shift=2))[0]
    assert far > 5 * max(values)


def test_kid_needs_subsets_that_fit() -> None:
    with pytest.raises(ValueError, match="at most 3"):
        kernel_distance(np.zeros((3, 2)), np.zeros((9, 2)), subset_size=4)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(np.zeros((3, 2)), np.zeros((9, 2)))


@pytest.mark.parametrize("nearest", [1, 5])
def test_precision_recall_density_coverage_are_those_of_the_papers(nearest: int) -> None:
    real, fake = features(1100, 1, 6), features(150, 2, 6, shift=0.5)

    def radii(values: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.norm(values[:, None] - values, axis=-1), axis=1)[:, nearest]

    to_reference = np.linalg.norm(real[:, None] - fake, axis=-1)
    inside_real = to_reference <= radii(real)[:, None]
    inside_fake = to_reference <= radii(fake)
    assert precision_recall_density_coverage(real, fake, nearest=nearest) == pytest.approx(
        {
            "precision": inside_real.any(axis=0).mean(),
            "recall": inside_fake.any(axis=1).mean(),
            "density": inside_real.sum() / nearest / len(fake),
            "coverage": inside_real.any(axis=1).mean(),
        }
    )
    with pytest.raises(ValueError, match="more than"):
        precision_recall_density_coverage(real, fake[:nearest], nearest=nearest)


def test_the_edge_of_a_ball_is_inside_for_precision_and_recall_only() -> None:
    for count in (40, 1100):
        values = features(count, 1, 64)
        # Equal sets: every 5th neighbour lies on the edge. prdc, by the authors of density, has 1 too.
        equal = precision_recall_density_coverage(values, values.copy())
        assert equal == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
        # Copies of one image: balls without radius, which hold nothing but their edge.
        copies = np.repeat(values[:1], count, axis=0)
        collapsed = precision_recall_density_coverage(copies, copies.copy())
        assert collapsed == {"precision": 1, "recall": 1, "density": 0, "coverage": 0}


@pytest.mark.parametrize("measure", ["kid", "prdc", "infinity"])
def test_measures_on_features_need_no_memory_of_their_own(measure: str) -> None:
    measures: dict[str, Callable[[np.ndarray], object]] = {
        "kid": lambda x: kernel_distance(x[::2], x[1::2], subsets=2),
        "prdc": lambda x: precision_recall_density_coverage(x[::2], x[1::2]),
        "infinity": lambda x: fid_infinity(
            FIDStatistics.from_moments(np.zeros(64), np.eye(64)), x, points=3
        ),
    }
    peaks = []
    for count in (4200, 9000):  # more than two chunks on each side
        values = np.random.default_rng(0).random((count, 64), dtype=np.float32)
        tracemalloc.start()
        measures[measure](values)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 0.25 * 4800 * 64 * 4, [f"{peak / 1e6:.1f} MB" for peak in peaks]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the process from /proc")
def test_memory_stays_flat_for_20000_features_of_the_networks_width() -> None:
    script = (
        "import numpy, re\nfrom diffsynth_metrics import FIDStatistics\n"
        "block = numpy.random.default_rng(0).random((100, 2048), dtype=numpy.float32)\n"
        "statistics, memory = FIDStatistics(), []\n"
        "for index in range(1, 201):\n"
        "    statistics.update(numpy.roll(block, index, axis=1))\n"
        "    if index % 40 == 0:\n"
        "        status = open('/proc/self/status').read()\n"
        "        memory.append(int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) * 1024)\n"
        "print(statistics.count, *memory)"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    count, *memory = map(int, output.stdout.split())
    assert count == 20_000 and len(memory) == 5
    print("peak after each 4,000:", *(f"{size / 1e6:.0f} MB" for size in memory))
    assert memory[-1] - memory[0] < 20e6


def test_statistics_need_no_torch() -> None:
    script = (
        "import sys, diffsynth_metrics.fid.distances\nfrom diffsynth_metrics import FIDStatistics\n"
        "import numpy\nFIDStatistics().update(numpy.eye(3)).mean_and_factor()\n"
        "print('torch' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert output.stdout == "False\n"


def test_counts_of_numpy_do_not_overflow() -> None:
    parts = [
        FIDStatistics.from_moments(np.full(2, mean), np.eye(2), np.int16(30_000)) for mean in (0.0, 2.0)
    ]
    total = parts[0].merge(parts[1])
    assert total.count == 60_000
    np.testing.assert_allclose(np.diag(total.covariance), 2, rtol=1e-3)
    with pytest.raises(TypeError):
        FIDStatistics.from_moments(np.zeros(2), np.eye(2), 30_000.5)  # type: ignore[arg-type]

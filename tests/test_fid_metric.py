"""FIDMetric: sources, errors, results; a stub network stands in where numbers do not matter."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.inception import Inception3

from diffsynth_metrics import CheckpointError, FIDMetric, FIDStatistics, ImageError, ModelConfig
from diffsynth_metrics.fid.preprocessing import PREPROCESSINGS
from diffsynth_metrics.folders import image_files
from diffsynth_metrics.testing import tiny_checkpoint

FEW = "ignore:FID of:UserWarning"
pytestmark = pytest.mark.filterwarnings(FEW)


class Stub(nn.Module):
    """A network of 48 features: means over a grid of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        assert pixel_values.shape[1:] == (3, 299, 299)
        return nn.functional.adaptive_avg_pool2d(pixel_values * self.scale, 4).flatten(1)


class NoNetwork(Stub):
    def forward(self, pixel_values: Tensor) -> Tensor:
        raise AssertionError("an image went through the network")


class StubMetric(FIDMetric):
    dimensions = 48


@pytest.fixture
def metric() -> FIDMetric:
    metric = StubMetric(Stub(), batch_size=4, num_workers=2)  # type: ignore[arg-type]
    metric.weights = "ab" * 32
    return metric


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Twelve noisy pictures, uint8 ``[12, 40, 50, 3]``."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
    return coarse.repeat(10, axis=1).repeat(10, axis=2)


@pytest.fixture(scope="module")
def folder(pictures: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for index, picture in enumerate(pictures):
        where = folder / "below" if index % 3 == 2 else folder
        PIL.Image.fromarray(picture).save(where / f"{index:02}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


def sources(pictures: np.ndarray, folder: Path) -> dict[str, Any]:
    tensors = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    labelled = TensorDataset(tensors, torch.zeros(len(tensors)))
    return {
        "folder": folder,
        "folder as str": str(folder),
        "paths": sorted(folder.rglob("[0-9]*.png")),
        "PIL images": [PIL.Image.fromarray(picture) for picture in pictures],
        "arrays": list(pictures),
        "one array": pictures,
        "tensors": list(tensors),
        "one tensor": tensors,
        "floats": tensors / 255,
        "generator of images": (PIL.Image.fromarray(picture) for picture in pictures),
        "generator of batches": (tensors[i : i + 5] for i in range(0, 12, 5)),
        "generator of lists": ([tensors[i], pictures[i + 1]] for i in range(0, 12, 2)),
        "DataLoader": DataLoader(tensors, batch_size=7),  # type: ignore[arg-type]
        "DataLoader with labels": DataLoader(labelled, batch_size=5),
    }


def test_every_source_gives_the_same_statistics(
    metric: FIDMetric, pictures: np.ndarray, folder: Path
) -> None:
    expected = metric.statistics(folder)
    for name, source in sources(pictures, folder).items():
        statistics = metric.statistics(source)
        assert statistics.count == 12, name
        np.testing.assert_allclose(statistics.mean, expected.mean, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(statistics.covariance, expected.covariance, atol=1e-6, err_msg=name)


def test_a_generator_may_close_its_pictures_or_draw_on_them_again(
    metric: FIDMetric, pictures: np.ndarray, folder: Path
) -> None:
    def closed() -> Iterator[PIL.Image.Image]:
        for path in sorted(folder.rglob("[0-9]*.png")):
            with PIL.Image.open(path) as picture:
                yield picture

    def drawn_again() -> Iterator[PIL.Image.Image]:
        canvas = PIL.Image.fromarray(pictures[0])
        for picture in pictures:
            canvas.paste(PIL.Image.fromarray(picture))
            yield canvas

    expected = metric.statistics(folder)
    for source, num_workers in ((closed, 0), (closed, 2), (drawn_again, 0), (drawn_again, 2)):
        statistics = metric.statistics(source(), num_workers=num_workers, on_error="skip")
        assert (statistics.count, statistics.skipped) == (12, 0)
        np.testing.assert_allclose(statistics.covariance, expected.covariance, atol=1e-6)


def test_a_picture_of_a_generator_that_cannot_be_read_is_named_or_skipped(
    metric: FIDMetric, pictures: np.ndarray, tmp_path: Path
) -> None:
    PIL.Image.fromarray(pictures[0]).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])

    def source() -> Iterator[PIL.Image.Image]:
        yield from map(PIL.Image.fromarray, pictures[:3])
        with PIL.Image.open(tmp_path / "cut.png") as cut:
            yield cut

    assert metric.statistics(source(), on_error="skip").skipped == 1
    with pytest.raises(ImageError, match=r"^batch 3, image 0.*cut\.png.* cannot be read"):
        metric.statistics(source())


def test_statistics_are_no_images_to_encode(metric: FIDMetric, pictures: np.ndarray) -> None:
    statistics = FIDStatistics.from_moments(np.zeros(48), np.eye(48), 10)
    with pytest.raises(ValueError, match="statistics do not hold features"):
        metric.encode_image(statistics)  # type: ignore[arg-type]
    kept = metric.encode_image(metric.statistics(pictures))  # type: ignore[arg-type]
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, metric.encode_image(list(pictures)))


def test_one_image_is_enough_to_encode(metric: FIDMetric, pictures: np.ndarray, tmp_path: Path) -> None:
    PIL.Image.fromarray(pictures[0]).save(tmp_path / "one.png")
    features = metric.encode_image(tmp_path / "one.png")
    assert features.shape == (1, 48)
    torch.testing.assert_close(features, metric.encode_image([pictures[0]]))


def test_statistics_and_files_of_statistics_are_sources(
    metric: FIDMetric, pictures: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    expected = metric.compute(folder, pictures[3:])
    statistics = metric.statistics(folder)
    statistics.save(tmp_path / "reference.npz")
    assert metric.statistics(statistics) is statistics
    assert metric.compute(statistics, pictures[3:]) == pytest.approx(expected, rel=1e-9)
    for path in (tmp_path / "reference.npz", str(tmp_path / "reference.npz")):
        assert metric.compute(path, pictures[3:]) == pytest.approx(expected, rel=1e-6)
        assert metric.compute(pictures[3:], path) == pytest.approx(expected, rel=1e-6)


def test_a_score_is_a_plain_float_and_its_label_goes_to_the_log(
    metric: FIDMetric, pictures: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt(tmp_path, pictures)
    caplog.set_level("INFO", logger="diffsynth_metrics.fid")
    score = metric.compute(pictures, tmp_path, preprocessing="pytorch-fid", on_error="skip")
    assert type(score) is float and score > 0
    assert caplog.messages[-1] == (
        f"FID {score:.4f}, preprocessing 'pytorch-fid': 12 reference images (0 more skipped), "
        "2 generated images (2 more skipped)"
    )
    assert metric(pictures, pictures) == pytest.approx(0, abs=1e-6)


def test_a_metric_says_its_preprocessing(metric: FIDMetric) -> None:
    assert repr(metric).endswith("preprocessing='clean')")
    assert metric.provenance["preprocessing"] == "clean"


def test_positional_arguments_of_the_verbs_are_those_of_diffsynth(
    metric: FIDMetric, pictures: np.ndarray
) -> None:
    batches = []
    metric.model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    expected = metric.compute(pictures, pictures[4:])
    for call in (metric.compute, metric.forward, metric.score, metric):
        batches.clear()
        assert call(pictures, pictures[4:], 6, 0) == pytest.approx(expected, rel=1e-5)
        assert batches == [6, 6, 6, 2]
    batches.clear()
    mean, covariance = statistics = metric.statistics(pictures, 5, 0)
    assert batches == [5, 5, 2] and len(statistics) == 2
    np.testing.assert_allclose(statistics[0], mean)
    np.testing.assert_allclose(statistics[1], covariance)


def test_batch_size_and_workers_do_not_change_a_score(metric: FIDMetric, pictures: np.ndarray) -> None:
    expected = metric.compute(pictures, pictures[4:])
    for batch_size, num_workers in ((1, 0), (5, 1), (64, 5)):
        score = metric.compute(pictures, pictures[4:], batch_size=batch_size, num_workers=num_workers)
        assert score == pytest.approx(expected, rel=1e-5)


def test_preprocessings_differ(metric: FIDMetric, photographs: dict[str, PIL.Image.Image]) -> None:
    images = list(photographs.values())
    means = [metric.statistics(images, preprocessing=name).mean for name in PREPROCESSINGS]
    for index, mean in enumerate(means):
        for other in means[:index]:
            assert np.abs(mean - other).max() > 1e-5


def test_a_folder_is_read_recursively_and_in_order(folder: Path) -> None:
    files = image_files(folder)
    assert files == sorted(files)
    assert [file.name for file in files if file.parent == folder] == [
        f"{i:02}.png" for i in range(12) if i % 3 != 2
    ]
    assert len(files) == 12


def test_links_are_followed_once(pictures: np.ndarray, tmp_path: Path) -> None:
    for name in ("a", "elsewhere"):
        (tmp_path / name).mkdir()
        PIL.Image.fromarray(pictures[0]).save(tmp_path / name / "1.JPG")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "2.webp").symlink_to(tmp_path / "a" / "1.JPG")
    names = [file.relative_to(tmp_path / "a").as_posix() for file in image_files(tmp_path / "a")]
    assert names == ["1.JPG", "2.webp", "b/1.JPG"]


def test_a_folder_that_cannot_be_listed_is_an_error(
    metric: FIDMetric, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def forbidden(path: str) -> Any:
        if Path(path).name == "below":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    for on_error in ("raise", "skip"):
        with pytest.raises(PermissionError, match="below"):
            metric.statistics(folder, on_error=on_error)  # type: ignore[arg-type]


def test_a_corrupt_file_stops_with_its_name(
    metric: FIDMetric, pictures: np.ndarray, tmp_path: Path
) -> None:
    corrupt(tmp_path, pictures)
    for num_workers in (0, 2):
        with pytest.raises(ImageError, match=r"image 1 .*broken\.png.* cannot be read"):
            metric.compute(tmp_path, pictures, num_workers=num_workers)


def test_a_corrupt_file_is_skipped_and_counted_on_request(
    metric: FIDMetric, pictures: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt(tmp_path, pictures)
    result = metric.evaluate(pictures, tmp_path, on_error="skip")
    assert (result["reference_skipped"], result["generated_skipped"]) == (0, 2)
    assert result["generated_count"] == 2
    assert result["score"] == pytest.approx(metric.compute(pictures, pictures[:2]))
    assert "broken.png" in caplog.text and "truncated.jpg" in caplog.text
    assert metric.statistics(tmp_path, on_error="skip").skipped == 2
    for file in tmp_path.glob("[ac]*"):
        file.unlink()
    with pytest.raises(ValueError, match="no generated image that can be read"):
        metric.evaluate(pictures, tmp_path, on_error="skip")


def wrong_images(pictures: np.ndarray, folder: Path) -> dict[str, Any]:
    """Sources of 12 images, of which image 3 is absent or invalid, and what is said of it."""
    tensors = list((torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255).unbind())
    with_nan, with_alpha = list(tensors), list(tensors)
    with_nan[3] = torch.full_like(tensors[3], torch.nan)
    with_alpha[3] = torch.zeros(4, 8, 8)
    linked = shutil.copytree(folder, folder.parent / "linked")
    third = sorted(linked.rglob("*.png"))[4]  # the first is hidden
    third.unlink()
    third.symlink_to("nowhere.png")
    return {
        "dangling link": (linked, "there is no file '.*png'"),
        "absent path": ([*pictures[:3], folder / "absent.png", *pictures[4:]], "absent.png"),
        "NaN": (with_nan, "NaN"),
        "wrong channels": (with_alpha, r"got shape \[(1, )?4, 8, 8\]"),
        "one tensor with NaN": (torch.stack(with_nan), "NaN"),
        "batches with NaN": (lambda: iter(torch.stack(with_nan).split(6)), "batch 0.*image 3.*NaN"),
        "images with NaN": (lambda: iter(with_nan), "batch 3.*NaN"),
        "labelled": (lambda: iter([(torch.stack(with_nan), torch.zeros(12))]), "batch 0.*image 3.*NaN"),
        "absent path in a batch": (
            lambda: iter([[*pictures[:3], "absent.png"], list(pictures[4:])]),
            "batch 0.*image 3.*absent.png",
        ),
    }


def test_an_absent_or_invalid_image_stops_or_is_skipped_alone(
    metric: FIDMetric, pictures: np.ndarray, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, (source, message) in wrong_images(pictures, folder).items():
        make = source if callable(source) else lambda source=source: source
        with pytest.raises((ImageError, FileNotFoundError), match=message):
            metric.statistics(make())
        caplog.clear()
        statistics = metric.statistics(make(), on_error="skip")
        assert (statistics.count, statistics.skipped) == (11, 1), name
        assert len(caplog.records) == 1
        assert re.search("skipped: .*image 3|skipped: batch 3, image 0", caplog.text), name
        assert re.search(message.rpartition(".*")[2], caplog.text), name


def test_what_no_picture_can_be_is_not_skipped(metric: FIDMetric, pictures: np.ndarray) -> None:
    images = [torch.full((3, 8, 8), torch.nan), pictures[0], torch.zeros(3, 8, 8, dtype=torch.int64)]
    with pytest.raises(TypeError, match="image 2: a tensor must be uint8"):
        metric.statistics(images, on_error="skip")
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        metric.statistics("no/such/folder", on_error="skip")


def test_a_batch_of_several_tensors_of_images_is_an_error(metric: FIDMetric) -> None:
    images = torch.zeros(4, 3, 8, 8)
    for batch in ([images, images], (images, torch.zeros(4), images)):
        with pytest.raises(TypeError, match=r"batch 0: .*yield one tensor of images per batch"):
            metric.statistics(iter([batch]))


def corrupt(folder: Path, pictures: np.ndarray) -> None:
    PIL.Image.fromarray(pictures[0]).save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"no image")
    PIL.Image.fromarray(pictures[1]).save(folder / "c.png")
    PIL.Image.fromarray(np.tile(pictures[1], (9, 9, 1))).save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])


def test_what_is_no_source_is_an_error(metric: FIDMetric) -> None:
    batches = [torch.zeros(2, 3, 8, 8), torch.ones(1, 4, 8, 8)]
    wrong: list[tuple[Any, type[Exception], str]] = [
        ("nowhere/at/all", FileNotFoundError, "there is no folder 'nowhere/at/all'"),
        ("nowhere.npz", FileNotFoundError, r"nowhere\.npz"),
        ([], ValueError, "images is empty"),
        ({"images": 1}, TypeError, "must be a folder.*got dict"),
        (7, TypeError, "must be a folder.*got int"),
        (iter([]), ValueError, "no reference image"),
        (iter([3]), TypeError, "batch 0: images must be"),
        (iter(batches), ImageError, "batch 1: .*got shape"),
        (torch.full((2, 3, 8, 8), 2.0), ImageError, "0..1"),
        (np.zeros((1, 8, 8, 3), np.uint8), ValueError, "at least 2 reference images"),
    ]
    for source, error, message in wrong:
        with pytest.raises(error, match=message):
            metric.evaluate(source, np.zeros((4, 8, 8, 3), np.uint8))


def test_a_single_file_is_no_set_of_images(
    metric: FIDMetric, pictures: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    metric.model = NoNetwork()
    np.save(tmp_path / "images.npy", pictures)
    PIL.Image.fromarray(pictures[0]).save(tmp_path / "one.png")
    for file in ("images.npy", "one.png"):
        message = rf"{file}' is one file; FID compares sets of images: pass a folder, a list"
        for path in (tmp_path / file, str(tmp_path / file)):
            for call in (
                lambda path: metric.compute(path, folder),
                lambda path: metric.evaluate(folder, path),
                metric.statistics,
            ):
                with pytest.raises(ValueError, match=message):
                    call(path)
    np.savez(tmp_path / "adm.npz", pictures)
    with pytest.raises(ValueError, match=r"adm\.npz has no mu and no sigma, .*adm\.npz'\)\['arr_0'\]"):
        metric.compute(folder, tmp_path / "adm.npz")
    metric.model = Stub()
    images = np.load(tmp_path / "adm.npz")["arr_0"]
    assert metric.compute(folder, images) == pytest.approx(0, abs=1e-6)


def test_a_home_folder_is_found(
    metric: FIDMetric, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    home = f"~/{folder.name}"
    metric.statistics(home).save(f"{home}.npz")
    assert metric.compute(f"{home}.npz", home) == pytest.approx(0, abs=1e-6)


def test_an_empty_folder_is_an_error(metric: FIDMetric, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no images in .* looked for bmp, jpeg"):
        metric.compute(tmp_path, tmp_path)


def test_both_sides_are_checked_before_the_first_is_computed(
    metric: FIDMetric, pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metric.statistics(pictures).save("statistics.npz")
    FIDStatistics.from_moments(np.zeros(64), np.eye(64), 99).save("other.npz")
    np.savez("shape.npz", mu=np.zeros(48), sigma=np.eye(64))
    np.savez("skewed.npz", mu=np.zeros(48), sigma=np.triu(np.ones((48, 48))))
    Path("text.npz").write_text("no zip file")
    metric.model = NoNetwork()
    images = np.zeros((19, 8, 8, 3), np.uint8)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ("no/such/folder", {}, "no/such/folder"),
        ([images[0], "absent.png"], {}, "absent.png"),
        (images[:1], {}, "FID needs at least 2 generated images, got 1$"),
        ("statistics.npz", {"kid": True}, "KID need the generated images: statistics do not hold"),
        (images[:3], {"kid": True}, "KID needs at least 4 generated images, got 3"),
        (images[:5], {"prdc": True}, "recall needs at least 6 generated .*, got 5"),
        (images, {"infinity": True}, "infinity needs at least 20 .*, got 19"),
        ("statistics.npz", {"preprocessing": "diffsynth"}, "prepared as 'clean'"),
        ("other.npz", {}, "48 on the reference side and 64 on the generated side"),
        ("shape.npz", {}, r"shape\.npz holds no statistics: .*\(48,\) and \(64, 64\)"),
        ("skewed.npz", {}, r"skewed\.npz holds no statistics: .* not symmetric"),
        ("text.npz", {}, "not a readable"),
        ([], {"on_error": "skip"}, "images is empty"),
    ]
    for generated, options, message in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            metric.evaluate(pictures, generated, **options)
    with pytest.raises(ValueError, match="64 on the reference side and 48 on the generated side"):
        metric.compute("other.npz", "statistics.npz")


def test_a_preprocessing_that_contradicts_statistics_is_an_error(
    metric: FIDMetric, pictures: np.ndarray
) -> None:
    statistics = metric.statistics(pictures)
    assert metric.evaluate(statistics, statistics, preprocessing="clean")["preprocessing"] == "clean"
    with pytest.raises(ValueError, match="reference statistics were prepared as 'clean', which"):
        metric.compute(statistics, statistics, preprocessing="pytorch-fid")
    with pytest.raises(ValueError, match="given statistics were prepared as 'clean', which"):
        metric.statistics(statistics, preprocessing="pytorch-fid")


def test_wrong_options_are_errors(metric: FIDMetric, pictures: np.ndarray) -> None:
    statistics = metric.statistics(pictures)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"preprocessing": ""}, ValueError, "must be one of clean, pytorch-fid.*got ''"),
        ({"preprocessing": "bilinear"}, ValueError, "must be one of clean, .*got 'bilinear'"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive int, got 0"),
        ({"batch_size": -2}, ValueError, "batch_size must be a positive int"),
        ({"num_workers": -1}, ValueError, "num_workers must be an int of at least 0"),
        ({"workers": 1}, TypeError, "no option 'workers'; there are batch_size, num_workers, prep"),
    ]
    for options, error, message in wrong:
        for sides in ((pictures, pictures), (statistics, statistics)):
            with pytest.raises(error, match=message):
                metric.compute(*sides, **options)
        with pytest.raises(error, match=message):
            metric.statistics(pictures, **options)
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        metric.compute(pictures, pictures, on_error="ignore")  # type: ignore[arg-type]


def test_evaluate_returns_the_parts_and_what_they_were_made_of(
    metric: FIDMetric, pictures: np.ndarray
) -> None:
    result = metric.evaluate(pictures, pictures[::2])
    assert result["score"] == pytest.approx(result["mean_term"] + result["covariance_term"])
    assert result["score"] == pytest.approx(metric.compute(pictures, pictures[::2]))
    assert {name: result[name] for name in list(result)[3:]} == {
        "reference_count": 12,
        "generated_count": 6,
        "reference_skipped": 0,
        "generated_skipped": 0,
        "preprocessing": "clean",
        "weights": "ab" * 32,
    }


def test_the_fewest_images_are_enough(metric: FIDMetric) -> None:
    for measure, fewest in (("kid", 4), ("prdc", 6), ("infinity", 20)):
        sides = np.random.default_rng(1).integers(0, 256, (2, fewest, 8, 8, 3), dtype=np.uint8)
        reference = sides[0][:2] if measure == "infinity" else sides[0]
        result = metric.evaluate(reference, sides[1], **{measure: True})  # type: ignore[arg-type]
        assert all(math.isfinite(value) for value in result.values() if isinstance(value, float))


def test_one_pass_over_the_images_serves_all(metric: FIDMetric) -> None:
    generator = np.random.default_rng(1)
    sides = generator.integers(0, 256, (2, 30, 8, 8, 3), dtype=np.uint8)
    options = {"kid": True, "prdc": True, "infinity": True, "seed": 5}
    result = metric.evaluate(iter(sides[0]), iter(sides[1]), **options)  # type: ignore[arg-type]
    extra = {"fid_infinity", "kid", "kid_std", "precision", "recall", "density", "coverage"}
    assert extra < result.keys()
    again = metric.evaluate(list(sides[0]), list(sides[1]), **options)  # type: ignore[arg-type]
    assert result.keys() == again.keys()
    for name, value in result.items():
        expected = again[name]
        assert value == (pytest.approx(expected) if isinstance(value, float) else expected), name
    assert result["fid_infinity"] < result["score"]
    assert abs(result["kid"]) < 3 * result["kid_std"] + 1e-3


def test_measures_on_features_need_the_images(
    metric: FIDMetric, pictures: np.ndarray, tmp_path: Path
) -> None:
    metric.statistics(pictures).save(tmp_path / "a.npz")
    for options in ({"kid": True}, {"prdc": True}):
        with pytest.raises(ValueError, match="need the reference images"):
            metric.evaluate(tmp_path / "a.npz", pictures, **options)
    with pytest.raises(ValueError, match="need the generated images"):
        metric.evaluate(pictures, tmp_path / "a.npz", infinity=True)


@pytest.mark.filterwarnings("error")
def test_few_images_are_warned_of_with_a_figure(metric: FIDMetric, pictures: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="FID of 12 reference and 8 generated images") as caught:
        metric.compute(pictures, pictures[:8])
    message = str(caught[0].message)
    assert "biased upwards" in message and "4 images each, are" in message
    assert caught[0].filename == __file__
    first, second = np.random.default_rng(0).random((2, 3000, 2))
    metric.compute(FIDStatistics().update(first), FIDStatistics().update(second))  # without warning


def test_iterators_are_read_a_few_batches_ahead(metric: FIDMetric) -> None:
    made, seen = 0, 0

    def images() -> Iterator[np.ndarray]:
        nonlocal made
        for _ in range(200):
            made += 1
            assert made - seen < 20
            yield np.zeros((8, 8, 3), np.uint8)

    class Counting(Stub):
        def forward(self, pixel_values: Tensor) -> Tensor:
            nonlocal seen
            seen += len(pixel_values)
            return super().forward(pixel_values)

    metric.model = Counting()  # type: ignore[assignment]
    assert metric.statistics(images()).count == 200


def test_a_buffer_may_be_written_again(metric: FIDMetric, pictures: np.ndarray) -> None:
    buffer = torch.empty(1, 3, 40, 50, dtype=torch.uint8)

    def images() -> Iterator[Tensor]:
        for picture in pictures:
            buffer[0] = torch.from_numpy(picture).permute(2, 0, 1)
            yield buffer

    expected = metric.statistics(pictures).mean
    np.testing.assert_allclose(metric.statistics(images()).mean, expected, atol=1e-6)


def test_threads_of_the_caller_do_not_disturb_each_other(
    metric: FIDMetric, pictures: np.ndarray
) -> None:
    expected = metric.compute(pictures, pictures[5:])
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda _: metric.compute(pictures, pictures[5:]), range(12)))
    assert scores == pytest.approx([expected] * 12)


def test_workers_end_with_the_call(metric: FIDMetric, pictures: np.ndarray) -> None:
    metric.statistics(pictures)
    with pytest.raises(ImageError):
        metric.statistics(iter([*pictures, torch.ones(4, 8, 8)]))
    deadline = [thread for thread in threading.enumerate() if "diffsynth_metrics" in thread.name]
    for thread in deadline:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_progress_bar_names_the_preprocessing(
    metric: FIDMetric, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    metric.compute(pictures, pictures)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "FID (clean), reference" in shown and "FID (clean), generated" in shown
    assert "12/12" in shown
    monkeypatch.setattr(sys, "stderr", Terminal())
    metric.compute(pictures, pictures, progress=False)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.slow
def test_memory_stays_flat_for_20000_small_images(metric: FIDMetric) -> None:
    process = psutil.Process()
    memory = []

    def images() -> Iterator[np.ndarray]:
        generator = np.random.default_rng(0)
        for index in range(20_000):
            if index % 4000 == 3999:
                memory.append(process.memory_info().rss)
            yield generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)

    statistics = metric.statistics(images(), batch_size=16, preprocessing="diffsynth")
    assert statistics.count == 20_000
    assert max(memory) - memory[0] < 30e6, [f"{size / 1e6:.0f} MB" for size in memory]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("fid", tmp_path_factory.mktemp("inception"))


def test_the_metric_loads_its_checkpoint_and_knows_it(checkpoint: Path, tiny_folder: Path) -> None:
    metric = FIDMetric.from_pretrained(ModelConfig(path=checkpoint), device="cpu", batch_size=3)
    assert (metric.batch_size, metric.preprocessing) == (3, "clean")
    assert metric.weights is not None and len(metric.weights) == 64
    assert not metric.card.higher_is_better
    black, white = PIL.Image.new("RGB", (30, 20)), PIL.Image.new("L", (20, 30), 255)
    features = metric.encode_image([black, white])
    assert features.shape == (2, 2048) and (features[0] - features[1]).abs().max() > 0.1
    with pytest.raises(CheckpointError, match=r"not of FIDMetric|does not fit FIDMetric"):
        FIDMetric.from_pretrained(ModelConfig(path=tiny_folder))


def test_positional_arguments_are_those_of_diffsynth(checkpoint: Path) -> None:
    metric = FIDMetric.from_pretrained(ModelConfig(path=checkpoint), "cpu", 3, 0, None)
    assert metric.device.type == "cpu"
    assert (metric.batch_size, metric.num_workers) == (3, 0)


def test_wrong_options_are_told_before_files_are_fetched() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"preprocessing": "none"}, "preprocessing must be one of"),
        ({"batch_size": 0}, "batch_size must be a positive int"),
        ({"num_workers": -1}, "num_workers must be an int"),
        ({"torch_dtype": torch.int64}, "torch_dtype must be one of"),
        ({"device": "nowhere"}, "device"),
        ({"vram_limit": 8.0}, "vram_limit"),
    ]
    for options, message in wrong:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            FIDMetric.from_pretrained(ModelConfig(path="no/such/file"), **options)


def test_half_precision_is_near(checkpoint: Path, photographs: dict[str, PIL.Image.Image]) -> None:
    images = list(photographs.values())
    full = FIDMetric.from_pretrained(ModelConfig(path=checkpoint), device="cpu")
    expected = full.encode_image(images)
    half = FIDMetric.from_pretrained(
        ModelConfig(path=checkpoint), device="cpu", torch_dtype=torch.bfloat16
    )
    for metric in (half, full.to(torch.bfloat16)):
        dtypes = {tensor.dtype for tensor in metric.model.state_dict().values()}
        assert dtypes == {torch.bfloat16, torch.int64} and metric.dtype == torch.bfloat16
        features = metric.encode_image(images)
        assert features.dtype == torch.float32
        assert (features - expected).norm() < 0.05 * expected.norm()


def test_the_network_is_torchvisions_own(checkpoint: Path, pictures: np.ndarray) -> None:
    metric = FIDMetric.from_pretrained(ModelConfig(path=checkpoint), device="cpu")
    assert isinstance(metric.model, Inception3)
    seen = []
    metric.model.Mixed_7c.register_forward_hook(lambda *call: seen.append(call[2].shape))
    pooled = metric.encode_image(pictures[:2])
    assert seen == [(2, 2048, 8, 8)] and pooled.shape == (2, 2048)


def test_statistics_know_the_dtype_of_the_network(metric: FIDMetric, pictures: np.ndarray) -> None:
    reference = metric.statistics(pictures)
    assert reference.dtype == "float32"
    metric.model.double()
    with pytest.warns(UserWarning, match="in float32 and float64"):
        metric.compute(reference, pictures)


def test_sides_that_were_prepared_differently_are_warned_of(
    metric: FIDMetric, pictures: np.ndarray
) -> None:
    reference = metric.statistics(pictures, preprocessing="pytorch-fid")
    for call in (metric.compute, metric.evaluate):
        with pytest.warns(UserWarning, match="as 'pytorch-fid' and the generated .* 'clean'") as caught:
            call(reference, pictures)
        assert caught[0].filename == __file__
    mean, covariance = reference
    with pytest.warns(UserWarning, match="the other does not say how"):
        metric.compute(FIDStatistics.from_moments(mean, covariance), pictures)


def test_broken_weights_are_named_and_not_the_pictures(folder: Path, metric: FIDMetric) -> None:
    with torch.no_grad():
        metric.model.get_parameter("scale").fill_(math.nan)
    with pytest.raises(CheckpointError, match="NaN or infinity in scale"):
        metric.statistics(folder, progress=False)

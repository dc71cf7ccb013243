"""Metrics of references, of sets, of species and of text are scored over samples as they come."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from diffsynth_metrics import ImageSimilarityMetric, ModelConfig
from diffsynth_metrics.catalog import find_class, load_metric
from diffsynth_metrics.evaluation import Sample, score

PROTOCOLS = {"image_similarity_dino": "dino", "image_similarity_dinov2": "dinov2"}
OF_PAIRS = ("lpips", "psnr", "ssim", "image_similarity", *PROTOCOLS)
OF_PROMPTS = ("bioclip", "text_rendering")
OF_SETS = ("cmmd", "fd_dinov2")

has_ocr = all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime")))


@pytest.fixture(scope="module")
def load(tiny: Callable[[str], Path]) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        if name in PROTOCOLS:
            return ImageSimilarityMetric.from_pretrained(
                ModelConfig(path=tiny(name)), protocol=PROTOCOLS[name], device="cpu"
            )
        if find_class(name).default_model is None:
            return load_metric(name, device="cpu")
        return load_metric(f"{name}={tiny(name)}", device="cpu")

    return load


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Noise of three strengths over a picture, which is their source; the last source is missing."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    source = PIL.Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((96, 64))
    source.save(folder / "source.png")
    found = []
    for index, strength in enumerate((5, 20, 60, 90)):
        noisy = np.asarray(source) + generator.normal(0, strength, (64, 96, 3))
        file = folder / f"{index}.png"
        PIL.Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file)
        sources = (folder / ("source.png" if index < 3 else "missing.png"),)
        found.append(Sample(f"s{index}", f'a shop with the number "{index}"', file, sources))
    return found


def scores_of(samples: list[Sample], metric: Any, out: Path) -> list[float]:
    rows = score(samples, metric, out=out, progress=False).to_pandas().set_index("id")
    return [float(rows["score"][sample.id]) for sample in samples]


def test_metrics_of_pairs_take_the_sources_of_the_data(
    load: Callable[[str], Any], samples: list[Sample], tmp_path: Path
) -> None:
    for name in OF_PAIRS:
        metric = load(name)
        out = tmp_path / name
        expected = metric.compute(
            [sample.sources[0] for sample in samples[:3]], [sample.image for sample in samples[:3]]
        )
        *found, missing = scores_of(samples, metric, out)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), name
        assert np.isnan(missing), name
        # The one without a source says which file that is; the others are not asked again.
        (row,) = score(samples, metric, out=out, progress=False).failures().rows
        assert any("missing.png" in str(cell) for cell in row), name
        if not name.startswith("image_similarity"):  # of random weights: noise does not order its scores
            assert sorted(found, reverse=metric.card.higher_is_better) == found, name


def test_pictures_of_other_sizes_have_a_reason_and_no_score(
    load: Callable[[str], Any], samples: list[Sample], tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    PIL.Image.open(str(samples[0].image)).resize((192, 128)).save(large)
    pair = [samples[0], Sample("large", None, large, samples[0].sources)]
    for name in ("psnr", "ssim"):
        results = score(pair, load(name), progress=False)
        (row,) = results.failures().rows
        assert any("resize one of them" in str(cell) and "large.png" in str(cell) for cell in row), row
        assert results.to_pandas()["score"].notna().tolist() == [True, False]
    equal = Sample("equal", None, samples[0].sources[0], samples[0].sources)
    (row,) = score([equal], load("psnr"), progress=False).failures().rows
    assert any("PSNR is infinite" in str(cell) for cell in row)


def test_metrics_of_prompts(load: Callable[[str], Any], samples: list[Sample], tmp_path: Path) -> None:
    for name in OF_PROMPTS if has_ocr else OF_PROMPTS[:1]:
        metric = load(name)
        expected = metric.compute(
            [str(sample.prompt) for sample in samples], [sample.image for sample in samples]
        )
        assert scores_of(samples, metric, tmp_path / name) == pytest.approx(expected, abs=1e-4), name


@pytest.mark.filterwarnings("ignore:FD-DINOv2 of .* the covariance is singular")
def test_metrics_of_sets_take_a_reference(
    load: Callable[[str], Any], samples: list[Sample], tmp_path: Path
) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    for sample in samples[:3]:
        picture = PIL.Image.open(str(sample.image)).transpose(PIL.Image.Transpose.ROTATE_90)
        picture.save(reference / f"{sample.id}.png")
    for name in OF_SETS:
        metric = load(name)
        expected = metric.compute(reference, [sample.image for sample in samples])
        for _ in range(2):
            results = score(samples, metric, out=tmp_path / name, reference=reference, progress=False)
            (of_set,) = [one for one in results.sets if one["metric"] == name]
            assert of_set["score"] == pytest.approx(expected, rel=1e-4), name
            assert of_set["count"] == len(samples), name

"""FID against five packages, with the same random weights and the same real photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fid_photographs import write_photographs
from official_fid import OFFICIAL_DISTANCES, OFFICIAL_FEATURES, official
from safetensors.torch import load_file

from diffsynth_metrics import FIDMetric, FIDStatistics, ModelConfig
from diffsynth_metrics.fid.distances import kernel_distance, precision_recall_density_coverage
from diffsynth_metrics.fid.preprocessing import PREPROCESSINGS
from diffsynth_metrics.networks.inception import build_inception
from diffsynth_metrics.testing import tiny_checkpoint
from diffsynth_metrics.weights.checkpoint import KNOWN_LAYOUTS, fingerprint

pytestmark = pytest.mark.parity

COUNT = 60  # per side


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("fid", tmp_path_factory.mktemp("weights"), seed=5)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    folder = tmp_path_factory.mktemp("photographs")
    return (
        write_photographs(folder / "reference", COUNT, seed=1),
        write_photographs(folder / "generated", COUNT, seed=2, blurred=True),
    )


@pytest.fixture(scope="module")
def features(
    request: pytest.FixtureRequest, folder: Path, photographs: tuple[list[Path], list[Path]]
) -> tuple[str, np.ndarray, np.ndarray]:
    """The name of a preprocessing, and the features of all photographs: ours and its namesake's."""
    name: str = request.param
    files = photographs[0] + photographs[1]
    theirs = OFFICIAL_FEATURES[name](load_file(folder / "model.safetensors"), files)
    metric = FIDMetric.from_pretrained(ModelConfig(path=folder), device="cpu", preprocessing=name)
    return name, metric.encode_image(files).numpy(), theirs


each_preprocessing = pytest.mark.parametrize("features", PREPROCESSINGS, indirect=True, scope="module")


@pytest.mark.slow
@each_preprocessing
def test_features_equal_those_of_the_namesake(features: tuple[str, np.ndarray, np.ndarray]) -> None:
    _, ours, theirs = features
    assert ours.shape == theirs.shape == (2 * COUNT, 2048)
    assert np.ptp(theirs, axis=0).mean() > 0.5, "the random weights tell photographs apart"
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.slow
@each_preprocessing
def test_fid_equals_that_of_the_namesake(features: tuple[str, np.ndarray, np.ndarray]) -> None:
    name, ours, theirs = features
    reference, generated = (FIDStatistics(preprocessing=name).update(half) for half in np.split(ours, 2))
    distance = OFFICIAL_DISTANCES.get(name, OFFICIAL_DISTANCES["torch-fidelity"])
    expected = distance(*np.split(theirs, 2))
    assert expected > 1
    with pytest.warns(UserWarning, match="biased upwards"):
        score = metric_without_network(name).compute(reference, generated)
    assert score == pytest.approx(expected, rel=1e-3)


def metric_without_network(preprocessing: str) -> FIDMetric:
    return FIDMetric(build_inception(), batch_size=1, preprocessing=preprocessing)


def test_the_network_has_the_published_layout() -> None:
    path = Path(__file__).parents[1] / "data" / "layouts" / "fid.json"
    published = {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    own = {name: tuple(tensor.shape) for name, tensor in build_inception().state_dict().items()}
    assert own == published
    assert KNOWN_LAYOUTS[fingerprint(own)] == ("FIDMetric",)


@pytest.fixture(scope="module")
def clouds() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    return (
        generator.normal(size=(70, 24)).astype(np.float32),
        (1.1 * generator.normal(size=(90, 24)) + 0.2).astype(np.float32),
    )


def test_kid_equals_torch_fidelitys(clouds: tuple[np.ndarray, np.ndarray]) -> None:
    with official("torch_fidelity", "torch-fidelity==0.4.0"):
        from torch_fidelity.metric_kid import kid_features_to_metric

        expected = kid_features_to_metric(
            *map(torch.from_numpy, clouds), kid_subset_size=40, rng_seed=7, verbose=False
        )
    kid, deviation = kernel_distance(*clouds, subset_size=40, seed=7)
    assert kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)


def test_the_default_subsets_of_kid_are_torch_fidelitys() -> None:
    generator = np.random.default_rng(3)
    clouds = [generator.normal(size=(count, 8)).astype(np.float32) for count in (1500, 1100)]
    with official("torch_fidelity", "torch-fidelity==0.4.0"):
        from torch_fidelity.metric_kid import kid_features_to_metric

        expected = kid_features_to_metric(*map(torch.from_numpy, clouds), kid_subsets=3, verbose=False)
    ours = kernel_distance(*clouds, subsets=3)
    assert ours == pytest.approx(tuple(expected.values()), rel=1e-3, abs=1e-6)


def test_precision_and_recall_equal_torch_fidelitys(clouds: tuple[np.ndarray, np.ndarray]) -> None:
    reference, generated = clouds
    with official("torch_fidelity", "torch-fidelity==0.4.0"):
        from torch_fidelity.metric_prc import prc_features_to_metric

        expected = prc_features_to_metric(
            torch.from_numpy(generated), torch.from_numpy(reference), verbose=False
        )
    ours = precision_recall_density_coverage(reference, generated, nearest=3)
    assert 0 < ours["recall"] < 1 and 0 < ours["precision"] < 1
    assert ours["precision"] == pytest.approx(expected["precision"])
    assert ours["recall"] == pytest.approx(expected["recall"])

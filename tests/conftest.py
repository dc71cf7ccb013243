"""Fixtures that several test files share: one tiny metric, and real photographs."""

from __future__ import annotations

import os
from pathlib import Path

import PIL.Image
import pytest
import torch
from skimage import data

from diffsynth_metrics import ModelConfig, PickScoreMetric
from diffsynth_metrics.testing import tiny_checkpoint

# On a busy machine, threads of a tiny network that wait for each other cost 100x; full-size networks get
# all cores. Processes that the tests start inherit the variable.
ALL_THREADS = torch.get_num_threads()
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # before the fixtures, of which some run the network for a whole module
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Choose the number of threads for a test and its fixtures."""
    torch.set_num_threads(1 if item.get_closest_marker("slow") is None else ALL_THREADS)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete tiny PickScore checkpoint; read it, do not change it."""
    return tiny_checkpoint("pickscore", tmp_path_factory.mktemp("tiny") / "PickScore")


@pytest.fixture(scope="session")
def tiny_metric(tiny_folder: Path) -> PickScoreMetric:
    """A float32 metric on the CPU; it remembers prompts from test to test."""
    return PickScoreMetric.from_pretrained(ModelConfig(path=tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def photographs() -> dict[str, PIL.Image.Image]:
    """Photographs that scikit-image ships in its wheel, as RGB images; do not change them."""
    names = ("astronaut", "camera", "chelsea", "coffee", "rocket")
    return {name: PIL.Image.fromarray(getattr(data, name)()).convert("RGB") for name in names}

"""Fixtures that several test files share: one tiny metric, and real photographs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
import torch
from skimage import data

from diffsynth_metrics import ModelConfig, PickScoreMetric
from diffsynth_metrics.testing import tiny_checkpoint

# On a busy machine, threads of a tiny network that wait for each other cost 100x. Set here, so that it
# holds for fixtures of modules too; processes that the tests start inherit the variable.
ALL_THREADS = torch.get_num_threads()
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def all_torch_threads_for_slow_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run full-size networks on all cores."""
    if request.node.get_closest_marker("slow") is not None:
        torch.set_num_threads(ALL_THREADS)
    yield
    torch.set_num_threads(1)


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

"""Fixtures that several test files share: one tiny metric, and real photographs."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
from skimage import data

from diffsynth_metrics import ModelConfig, PickScoreMetric
from diffsynth_metrics.testing import tiny_checkpoint


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

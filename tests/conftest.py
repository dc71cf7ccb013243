"""Fixtures that several test files share: tiny checkpoints, their metrics, and real photographs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from classes import metric_class
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


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C interrupt here and in subprocesses: what a shell runs in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny checkpoints by name, such as ``tiny("clip")``; read them, do not change them."""
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: tiny_checkpoint(name, root / name))


@pytest.fixture(scope="session")
def metrics(tiny: Callable[[str], Path]) -> Callable[[str], Any]:
    """Tiny metrics by name, in float32 on the CPU; use them, do not change them."""

    def load(name: str) -> Any:
        return metric_class(name).from_pretrained(
            model_config=ModelConfig(path=tiny(name)), device="cpu", torch_dtype=torch.float32
        )

    return cache(load)


@pytest.fixture(scope="session")
def tiny_folder(tiny: Callable[[str], Path]) -> Path:
    """The tiny PickScore checkpoint; read it, do not change it."""
    return tiny("pickscore")


@pytest.fixture(scope="session")
def tiny_metric(metrics: Callable[[str], Any]) -> PickScoreMetric:
    """The tiny PickScore metric; use it, do not change it."""
    metric: PickScoreMetric = metrics("pickscore")
    return metric


@pytest.fixture(scope="session")
def photographs() -> dict[str, PIL.Image.Image]:
    """Photographs that scikit-image ships in its wheel, as RGB images; do not change them."""
    names = ("astronaut", "camera", "chelsea", "coffee", "rocket")
    return {name: PIL.Image.fromarray(getattr(data, name)()).convert("RGB") for name in names}

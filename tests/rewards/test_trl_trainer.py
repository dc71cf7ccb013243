"""TRL's real GRPOTrainer, with our adapter as its reward function."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "training" / "trl_grpo.py"


@pytest.fixture(scope="module", autouse=True)
def trl() -> None:
    """Skip without TRL, but fail in CI."""
    if importlib.util.find_spec("trl") is None:
        reason = 'TRL is not installed; pip install -e ".[trl]"'
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (never skipped in CI)")
        pytest.skip(reason)


# In a process of its own: TRL and datasets set environment variables, and warn of their own future.
SCRIPT = """
import json, sys
sys.path.insert(0, {folder!r})
import trl_grpo
from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.rewards import to_trl, to_trl_async
metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
if {asynchronous}:
    trl_grpo.to_trl = to_trl_async
print(json.dumps(trl_grpo.train(metric, {steps}, 0, "output")))
"""


def train(folder: Path, steps: int, *, asynchronous: bool = False) -> list[float]:
    script = SCRIPT.format(folder=str(EXAMPLE.parent), steps=steps, asynchronous=asynchronous)
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    history: list[Any] = json.loads(result.stdout.splitlines()[-1])
    return history


def test_the_reward_rises_in_the_real_trainer(tmp_path: Path) -> None:
    history = train(tmp_path, 100)
    assert len(history) == 100
    assert sum(history[-20:]) / 20 > sum(history[:20]) / 20 + 5


def test_the_trainer_awaits_the_coroutine_form_and_gets_the_same(tmp_path: Path) -> None:
    assert train(tmp_path, 3, asynchronous=True) == train(tmp_path, 3)

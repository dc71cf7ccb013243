"""The training examples learn: their reward rises, on a fixed seed and in a short run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import PIL.Image
import pytest

from diffsynth_metrics import CLIPMetric, ModelConfig

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "training"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes() -> CLIPMetric:
    return CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu", batch_size=64)


def test_the_score_rises_when_pixels_follow_its_gradient(shapes: CLIPMetric) -> None:
    before, after, rewards = load("pixel_ascent").climb(shapes, "a red circle", steps=40, seed=0)
    assert len(rewards) == 41
    assert rewards[-1] > rewards[0] + 10
    assert shapes.reward("a red circle", after).item() == pytest.approx(rewards[-1], abs=1e-3)
    assert before.shape == after.shape and 0 <= after.min() and after.max() <= 1
    others = shapes.compute(["a blue square", "a green star"], after)
    assert rewards[-1] > max(others), "it has become the one thing and not everything"


def test_an_edit_fits_its_prompt_better_while_lpips_to_its_source_is_held(
    shapes: CLIPMetric, metrics: Callable[[str], Any]
) -> None:
    example = load("pixel_edit")
    lpips = metrics("lpips")
    source = example.to_tensor(example.draw_shape("circle", "red", image_size=96))
    distances = {}
    for hold in (0.0, 30.0):
        edited, history = example.edit(shapes, lpips, "a red square", source, steps=20, hold=hold)
        assert len(history) == 21 and edited.shape == source.shape
        assert history[0]["alike"] == pytest.approx(0, abs=1e-5)
        assert history[-1]["fits"] > history[0]["fits"] + 4
        (distances[hold],) = lpips.compute(source, edited)
        assert distances[hold] == pytest.approx(-history[-1]["alike"], rel=1e-3)
    assert 0 < distances[30.0] < distances[0.0] / 3


def test_a_policy_learns_to_draw_what_the_prompt_says(shapes: CLIPMetric) -> None:
    scores, images = load("policy_gradient").train(shapes, steps=25, seed=0)
    assert fmean(scores[-5:]) > fmean(scores[:5]) + 5
    assert images.shape == (48, 96, 96, 3)


def test_an_example_prints_and_saves_what_it_says(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    pictures = {
        "pixel_ascent.py": ["before.png", "after.png"],
        "pixel_edit.py": ["source.png", "edited.png"],
        "policy_gradient.py": ["curve.png", "samples.png"],
    }
    steps = ("--steps", "3", "--output")
    more = {"pixel_edit.py": ("--lpips", str(tiny("lpips")))}
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_scripts.py")],
        input=json.dumps(
            [
                (str(tmp_path), False, str(FOLDER / file), *steps, file[:-3], *more.get(file, ()))
                for file in pictures
            ]
        ),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    for (file, names), (printed, problem) in zip(
        pictures.items(), json.loads(result.stdout), strict=True
    ):
        assert problem is None, problem
        assert f"Saved {file[:-3]}/" in printed
        for name in names:
            with PIL.Image.open(tmp_path / file[:-3] / name) as picture:
                assert picture.width > 90
                assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 1, name

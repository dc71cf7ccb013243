"""HPSv3 against the authors' package, whose outputs are in tests/data/hpsv3.

The package needs transformers 4.45, so `build_hpsv3_fixture.py` ran it in an environment of its own; its
docstring is the recipe. The weights are regenerated here from the same seeds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
from hpsv3_cases import CASES, SEEDS, picture, random_sizes, random_weights
from safetensors.numpy import save_file
from torch import Tensor

from diffsynth_metrics import HPSv3Metric, ImageError, ModelConfig
from diffsynth_metrics.networks.hpsv3 import set_frequencies
from diffsynth_metrics.pixels.transforms import SmartResize

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.* tokens of a prompt, and :UserWarning"),  # it is cut
]

DATA = Path(__file__).parents[1] / "data"
OFFICIAL = json.loads((DATA / "hpsv3" / "official.json").read_text())
TOLERANCE = 1e-4  # absolute, on mu and sigma

PROMPTS = [case[0] for case in CASES]


def official(seed: int, what: str) -> Tensor:
    """Return the official mu and sigma of all cases: float64 ``[N, 2]``."""
    values = torch.tensor(OFFICIAL["seeds"][seed][what], dtype=torch.float64)
    return torch.stack([values[:, 0], values[:, 1].exp()], dim=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a checkpoint per seed: the committed tokenizer and config, and regenerated weights."""
    folders = []
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp("hpsv3")
        for file in (DATA / "hpsv3").iterdir():
            shutil.copy(file, folder)
        (folder / "official.json").unlink()
        save_file(random_weights(OFFICIAL["shapes"], seed), folder / "model.safetensors")
        folders.append(folder)
    return folders


def load(folder: Path, **options: Any) -> HPSv3Metric:
    options = {"torch_dtype": torch.float32} | options
    return HPSv3Metric.from_pretrained(ModelConfig(path=folder), device="cpu", **options)


def rows(metric: HPSv3Metric) -> Tensor:
    """Return our mu and sigma of all cases."""
    pictures = [picture(index) for index in range(len(CASES))]
    # The stored scores are of 16 bits of grey as Pillow clips them, and we scale them.
    pictures = [one.convert("RGB") if one.mode == "I;16" else one for one in pictures]
    found = metric.evaluate(PROMPTS, pictures)
    assert [row["score"] for row in found] == [row["mu"] for row in found]
    return torch.tensor([[row["mu"], row["sigma"]] for row in found], dtype=torch.float64)


def test_the_official_scores_depend_on_their_input() -> None:
    """Otherwise their equality with ours would say little."""
    assert len(CASES) >= 12
    for seed in SEEDS:
        assert official(seed, "single").std(dim=0).min() > 0.05
        assert (official(seed, "single") - official(seed, "batch")).abs().max() < TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 5, 16])
@pytest.mark.parametrize("seed", SEEDS)
def test_mu_and_sigma_equal_the_official_ones(folders: list[Path], seed: int, batch_size: int) -> None:
    ours = rows(load(folders[seed], batch_size=batch_size))
    for what in ("single", "batch"):
        assert (ours - official(seed, what)).abs().max() < TOLERANCE


def test_positions_of_diffsynth_are_another_metric(folders: list[Path]) -> None:
    """The official positions matter for these weights: with Qwen2-VL's own, scores are others."""
    ours = rows(load(folders[0], positions="diffsynth"))
    assert (ours - official(0, "single")).abs().max() > 100 * TOLERANCE


def test_bfloat16_follows_the_official_rounding(folders: list[Path]) -> None:
    """Rounded frequencies bring scores closer to the official ones than exact frequencies would."""
    expected = official(0, "bfloat16")
    metric = load(folders[0], torch_dtype=torch.bfloat16)
    ours = rows(metric)
    set_frequencies(metric.model, torch.float32)
    other = rows(metric)
    distance = (ours - expected)[:, 0].abs().mean()
    assert distance < 0.5 * (other - expected)[:, 0].abs().mean()


def test_tokens_up_to_the_reward_token_are_the_official_ones(folders: list[Path]) -> None:
    metric = load(folders[0])
    for index, (prompt, *_) in enumerate(CASES):
        with mock.patch.object(metric.model, "forward", wraps=metric.model.forward) as forward:
            metric.compute(prompt, picture(index))
        ids = forward.call_args.args[0][0].tolist()
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        assert digest == OFFICIAL["ids"][index], repr(prompt)


def test_sizes_and_rejected_ratios_are_the_official_ones() -> None:
    transform = SmartResize()
    accepted = 0
    for width, height, expected in OFFICIAL["sizes"]:
        if expected is None:
            with pytest.raises(ImageError, match="200 times"):
                transform.size(height, width)
        else:
            accepted += 1
            assert list(transform.size(height, width)[::-1]) == expected
    assert [(width, height) for width, height, _ in OFFICIAL["sizes"]] == random_sizes()
    assert 100 < accepted < len(OFFICIAL["sizes"])


def test_pixels_of_pil_images_equal_pillows_resize_to_the_bit() -> None:
    transform = SmartResize()
    for index in range(len(CASES)):
        image = picture(index)
        height, width = transform.size(image.height, image.width)
        resized = image.convert("RGB").resize((width, height), PIL.Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        assert torch.equal(transform.from_pil(image), expected)

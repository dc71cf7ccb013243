"""A tokenizer or image processor of another model is refused: its scores would look like scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffsynth_metrics import (
    CheckpointError,
    HPSv2Metric,
    ImageRewardMetric,
    ModelConfig,
    PickScoreMetric,
)


@pytest.fixture
def image_reward_folder(tiny: Callable[[str], Path]) -> Path:
    return tiny("image_reward")


@pytest.mark.parametrize("foreign", ["shapes", "image_reward"])
def test_clip_refuses_another_tokenizer(
    foreign: str, tiny_folder: Path, image_reward_folder: Path
) -> None:
    processor = ModelConfig(path=image_reward_folder)
    if foreign == "shapes":
        processor = ModelConfig.embedded("shapes")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* belongs to another model: it has \d+"):
        PickScoreMetric.from_pretrained(ModelConfig(path=tiny_folder), processor, device="cpu")


def test_image_reward_refuses_another_vocabulary(image_reward_folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((image_reward_folder / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = [p for p, i in sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces[:-20]), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* belongs to another model: it has"):
        ImageRewardMetric.from_pretrained(
            ModelConfig(path=image_reward_folder), ModelConfig(path=tmp_path), device="cpu"
        )


def test_image_reward_takes_one_tokenizer(image_reward_folder: Path) -> None:
    config = ModelConfig(path=image_reward_folder)
    with pytest.raises(TypeError, match="tokenizer_config and processor_config name the same files"):
        ImageRewardMetric.from_pretrained(config, config, tokenizer_config=config)


def test_clip_refuses_another_preprocessing(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    for name, value in (
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("crop_size", {"height": 336, "width": 336}),
        ("size", 336),
        ("do_center_crop", False),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CheckpointError, match=f"belongs to another model: it has {name} = "):
            PickScoreMetric.from_pretrained(ModelConfig(path=folder), device="cpu")


def test_hpsv2_says_what_its_config_lacks(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("hpsv2"), tmp_path / "HPSv2"))
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json .* has no 'model_cfg'"):
        HPSv2Metric.from_pretrained(ModelConfig(path=folder), device="cpu")

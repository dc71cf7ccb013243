"""A tokenizer or image processor of another model is refused: its scores would look like scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffsynth_metrics import (
    CheckpointError,
    HPSv2Metric,
    ImageRewardMetric,
    ModelConfig,
    PickScoreMetric,
)
from diffsynth_metrics.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def image_reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("image_reward", tmp_path_factory.mktemp("tiny") / "ImageReward")


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
    with pytest.raises(CheckpointError, match="tokenizer belongs to another model: it has"):
        ImageRewardMetric.from_pretrained(
            ModelConfig(path=image_reward_folder), ModelConfig(path=tmp_path), device="cpu"
        )


def test_image_reward_takes_one_tokenizer(image_reward_folder: Path) -> None:
    config = ModelConfig(path=image_reward_folder)
    with pytest.raises(ValueError, match="tokenizer_config and processor_config name the same files"):
        ImageRewardMetric.from_pretrained(config, config, processor_config=config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("crop_size", {"height": 336, "width": 336}),
        ("size", 336),
        ("do_center_crop", False),
    ],
)
def test_clip_refuses_another_preprocessing(
    name: str, value: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(CheckpointError, match=f"belongs to another model: it has {name} = "):
        PickScoreMetric.from_pretrained(ModelConfig(path=folder), device="cpu")


def test_hpsv2_says_what_its_config_lacks(tmp_path: Path) -> None:
    folder = tiny_checkpoint("hpsv2", tmp_path / "HPSv2")
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json .* has no 'model_cfg'"):
        HPSv2Metric.from_pretrained(ModelConfig(path=folder), device="cpu")

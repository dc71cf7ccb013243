"""BioCLIP against open_clip's own model, tokenizer and preprocessing, which its authors use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import PIL.Image
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from safetensors.torch import load_file

pytestmark = pytest.mark.parity

PROMPTS = [
    "a photo of Danaus plexippus.",
    "Animalia Arthropoda Insecta Lepidoptera Nymphalidae Danaus plexippus with common name Monarch",
    "monarch butterfly &amp; MILKWEED",
    "",
    "eine Katze, 一只猫",
]


def test_scores_equal_open_clip(
    metrics: Callable[[str], Any],
    tiny: Callable[[str], Path],
    photographs: dict[str, PIL.Image.Image],
) -> None:
    folder = tiny("bioclip")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    official = open_clip.CLIP(**config).eval()
    official.load_state_dict(load_file(folder / "model.safetensors"))
    transform = image_transform_v2(
        PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), {"size": 224})), is_train=False
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    pictures = list(photographs.values())
    pictures += [pictures[0].convert("L"), pictures[1].resize((301, 224)), pictures[2].convert("RGBA")]
    with torch.no_grad():
        images = official.encode_image(torch.stack(list(map(transform, pictures))), normalize=True)
        texts = official.encode_text(tokenizer(PROMPTS), normalize=True)
        expected = (official.logit_scale.exp() * texts @ images.T).tolist()
    ours = metrics("bioclip").similarity_matrix(PROMPTS, pictures)
    for row, official_row in zip(ours, expected, strict=True):
        assert row == pytest.approx(official_row, abs=1e-4)

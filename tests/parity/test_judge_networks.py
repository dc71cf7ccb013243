"""The judges' networks: the published layouts, and transformers' own rotary frequencies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from diffsynth_metrics.judges.architectures import build_judge
from diffsynth_metrics.judges.prompts import load_prompts
from diffsynth_metrics.weights.checkpoint import KNOWN_LAYOUTS, fingerprint

LAYOUTS = Path(__file__).parent.parent / "data" / "layouts"
PUBLISHED = {
    "unified_reward_2": "UnifiedReward2Metric",
    "unified_reward_edit": "UnifiedRewardEditMetric",
    "qwen_image_bench": "QwenImageBenchMetric",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_full_size_network_has_exactly_the_published_layout(name: str) -> None:
    model = build_judge(None, name)
    layout = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    published = json.loads((LAYOUTS / f"{name}.json").read_text())
    assert layout == {key: tuple(shape) for key, shape in published.items()}
    assert KNOWN_LAYOUTS[fingerprint(layout)] == (PUBLISHED[name],)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_saved_config_describes_the_same_network(name: str) -> None:
    published: Any = build_judge(None, name)
    again = build_judge(json.loads(published.config.to_json_string(use_diff=False)), name)
    layout = {key: tensor.shape for key, tensor in again.state_dict().items()}
    assert layout == {key: tensor.shape for key, tensor in published.state_dict().items()}


SIGHT: dict[str, Any] = {"depth": 1, "hidden_size": 96, "num_heads": 2, "out_hidden_size": 64}
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl"])
def test_rotary_frequencies_are_those_of_transformers(family: str, head_dim: int) -> None:
    judge = "unified_reward_2" if family == "qwen3_5" else "unified_reward_edit"
    published = load_prompts("architectures")[judge]["text_config"]
    text = SMALL | {
        "head_dim": head_dim,
        "num_hidden_layers": 4,
        "rope_parameters": dict(published["rope_parameters"]),
    }
    config: PreTrainedConfig
    if family == "qwen3_5":
        config = Qwen3_5Config(text_config=text, vision_config=SIGHT)
        official = Qwen3_5ForConditionalGeneration(config)
    else:
        config = Qwen3VLConfig(text_config=text, vision_config=SIGHT | {"deepstack_visual_indexes": [0]})
        official = Qwen3VLForConditionalGeneration(config)
    ours = dict(build_judge(config.to_dict(), judge).named_buffers())
    theirs = dict(official.named_buffers())
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for name, buffer in theirs.items():
        assert torch.equal(ours[name], buffer), name
        assert ours[name].dtype == torch.float32

"""The last block of a tower computes the class token alone, and the same one as the whole block does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

import diffsynth_metrics
from diffsynth_metrics import ModelConfig
from diffsynth_metrics.models.class_token import read_class_token_of_open_clip
from diffsynth_metrics.testing import tiny_checkpoint

METRICS = {
    "pickscore": "PickScoreMetric",
    "clip": "CLIPMetric",
    "aesthetic": "AestheticMetric",
    "hpsv2": "HPSv2Metric",
}


def load(name: str, folder: Path, **options: Any) -> Any:
    metric_class = getattr(diffsynth_metrics, METRICS[name])
    files = ModelConfig(path=tiny_checkpoint(name, folder))
    return metric_class.from_pretrained(files, device="cpu", **options)


def last_block(metric: Any) -> Any:
    if hasattr(metric.model, "visual"):
        return metric.model.visual.transformer.resblocks[-1]
    return metric.model.vision_model.encoder.layers[-1]


def features_and_gradient(metric: Any) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(5, 3, 70, 90, generator=torch.Generator().manual_seed(2), requires_grad=True)
    features = metric.encode_image(pixels)
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    (gradient,) = torch.autograd.grad((features * weights).sum(), pixels)
    return features.detach(), gradient


@pytest.mark.parametrize("name", METRICS)
def test_features_and_gradients_are_those_of_the_whole_block(name: str, tmp_path: Path) -> None:
    metric = load(name, tmp_path, torch_dtype=torch.float64)
    lengths: list[int] = []
    last_block(metric).register_forward_hook(
        lambda block, given, result: lengths.append(result.shape[1])
    )
    features, gradient = features_and_gradient(metric)
    del last_block(metric).forward
    whole, gradient_of_whole = features_and_gradient(metric)
    assert lengths[0] == 1 < lengths[1]
    assert whole.std(dim=0).max() > 0.01
    torch.testing.assert_close(features, whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, gradient_of_whole, rtol=1e-6, atol=1e-9)


def test_a_copy_computes_with_its_own_block(tmp_path: Path) -> None:
    metric = load("pickscore", tmp_path)
    picture = torch.rand(3, 64, 64)
    before = metric.encode_image(picture)
    twin = copy.deepcopy(metric)
    with torch.no_grad():
        for weight in last_block(metric).parameters():
            weight.zero_()
    assert torch.equal(twin.encode_image(picture), before)
    assert not torch.allclose(metric.encode_image(picture), before, atol=1e-3)


@pytest.mark.parametrize("options", [{"pool_type": "avg"}, {"attentional_pool": True}])
def test_a_tower_that_reads_other_tokens_is_left_as_it_is(options: dict[str, Any]) -> None:
    config = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
    text = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 64, "context_length": 8}
    visual = open_clip.CLIP(32, config | options, text).eval().visual
    pictures = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = visual(pictures)
        read_class_token_of_open_clip(visual)
        assert torch.equal(visual(pictures), before)

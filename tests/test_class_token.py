"""The last block of a tower computes the class token alone, the same one as the whole tower does."""

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
from diffsynth_metrics.networks.class_token import class_token_of_clip, class_token_of_open_clip
from diffsynth_metrics.testing import tiny_checkpoint

METRICS = {
    "pickscore": "PickScoreMetric",
    "clip": "CLIPMetric",
    "aesthetic": "AestheticMetric",
    "hpsv2": "HPSv2Metric",
}
TOWER = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 64, "context_length": 8}


def load(name: str, folder: Path, **options: Any) -> Any:
    metric_class = getattr(diffsynth_metrics, METRICS[name])
    files = ModelConfig(path=tiny_checkpoint(name, folder))
    return metric_class.from_pretrained(files, device="cpu", **options)


def blocks(metric: Any) -> Any:
    if hasattr(metric.model, "visual"):
        return metric.model.visual.transformer.resblocks
    return metric.model.vision_model.encoder.layers


def whole_tower(metric: Any, pixels: Tensor) -> Tensor:
    """Compute what the metric's own features are made of, by the library's forward."""
    if hasattr(metric.model, "visual"):
        pooled: Tensor = metric.model.encode_image(pixels)
    else:
        pooled = metric.model.vision_model(pixel_values=pixels).pooler_output
    return pooled


def own_tower(metric: Any, pixels: Tensor) -> Tensor:
    if hasattr(metric.model, "visual"):
        return class_token_of_open_clip(metric.model.visual, pixels)
    return class_token_of_clip(metric.model.vision_model, pixels)


def features_and_gradient(tower: Any, metric: Any) -> tuple[Tensor, Tensor]:
    size = metric.transform.size
    pixels = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(2)).double()
    features = tower(metric, pixels.requires_grad_())
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    (gradient,) = torch.autograd.grad((features * weights).sum(), pixels)
    return features.detach(), gradient


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_features_and_gradients_are_those_of_the_whole_tower(
    name: str, gradient_checkpointing: bool, tmp_path: Path
) -> None:
    options = {"torch_dtype": torch.float64, "gradient_checkpointing": gradient_checkpointing}
    metric = load(name, tmp_path, **options)
    features, gradient = features_and_gradient(own_tower, metric)
    whole, gradient_of_whole = features_and_gradient(whole_tower, metric)
    assert whole.std(dim=0).max() > 0.01
    torch.testing.assert_close(features, whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, gradient_of_whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_the_last_block_computes_one_token_and_the_others_all(name: str, tmp_path: Path) -> None:
    metric = load(name, tmp_path)
    lengths: list[int] = []
    for block in blocks(metric):
        block.mlp.register_forward_hook(lambda mlp, given, result: lengths.append(result.shape[1]))
    metric.encode_image(torch.rand(3, 64, 64))
    *others, last = lengths
    assert last == 1 and others and min(others) > 1


def test_a_copy_computes_with_its_own_block(tmp_path: Path) -> None:
    metric = load("pickscore", tmp_path)
    picture = torch.rand(3, 64, 64)
    before = metric.encode_image(picture)
    twin = copy.deepcopy(metric)
    with torch.no_grad():
        for weight in blocks(metric)[-1].parameters():
            weight.zero_()
    assert torch.equal(twin.encode_image(picture), before)
    assert not torch.allclose(metric.encode_image(picture), before, atol=1e-3)


@pytest.mark.parametrize("options", [{"pool_type": "avg"}, {"attentional_pool": True}])
def test_a_tower_that_reads_other_tokens_is_called_as_it_is(options: dict[str, Any]) -> None:
    visual = open_clip.CLIP(32, TOWER | options, TEXT).eval().visual
    pictures = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(class_token_of_open_clip(visual, pictures), visual(pictures))


def test_a_projection_in_the_tower_is_applied() -> None:
    visual = open_clip.CLIP(24, TOWER, TEXT).eval().visual
    pictures = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours, whole = class_token_of_open_clip(visual, pictures), visual(pictures)
    assert ours.shape == (2, 24)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)

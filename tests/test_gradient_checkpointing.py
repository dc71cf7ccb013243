"""Gradient checkpointing keeps less for the backward pass, and changes neither scores nor gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classes import DIFFERENTIABLE, metric_class
from torch import Tensor

from diffsynth_metrics import ModelConfig


def load(name: str, folder: Path) -> Any:
    return metric_class(name).from_pretrained(
        ModelConfig(path=folder), device="cpu", torch_dtype=torch.float32, gradient_checkpointing=True
    )


def reward_and_gradient(metric: Any, name: str) -> tuple[Tensor, Tensor, int]:
    """Return the reward, its gradient, and how many activations were kept in between."""
    pixels = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reward = metric.reward(pixels) if name == "aesthetic" else metric.reward("a cat", pixels)
    known = {weight.data_ptr() for weight in metric.model.parameters()}
    (gradient,) = torch.autograd.grad(reward.sum(), pixels)
    return reward.detach(), gradient, len(kept - known)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_less_is_kept_and_nothing_changes(
    name: str, tiny: Callable[[str], Path], metrics: Callable[[str], Any]
) -> None:
    reward, gradient, kept = reward_and_gradient(metrics(name), name)
    again, gradient_again, fewer = reward_and_gradient(load(name, tiny(name)), name)
    largest = float(gradient.abs().max())
    assert largest > 0
    torch.testing.assert_close(again, reward, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_again, gradient, rtol=1e-4, atol=1e-4 * largest)
    assert fewer < 0.6 * kept


def test_a_copy_computes_with_its_own_weights(tiny_folder: Path) -> None:
    metric = load("pickscore", tiny_folder)
    expected = metric.compute("a cat", torch.ones(3, 64, 64))
    twin = copy.deepcopy(metric)
    with torch.no_grad():
        for weight in metric.model.vision_model.encoder.parameters():
            weight.zero_()
    assert twin.compute("a cat", torch.ones(3, 64, 64)) == pytest.approx(expected, abs=1e-4)
    assert metric.compute("a cat", torch.ones(3, 64, 64)) != pytest.approx(expected, abs=1e-2)

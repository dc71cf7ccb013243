"""Random weights under which the scores of different inputs differ."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["randomize"]


def randomize(model: nn.Module, seed: int = 0, *, gain: float = 1.5) -> None:
    """Fill a network with random weights that make its output depend strongly on its input.

    The usual initialisation makes many of these networks almost constant, so that a test with it
    would not notice an error.

    Args:
        model: Changed in place; parameters that are scalars are left alone.
        seed: Seed of the generator.
        gain: Standard deviation of matrices times the square root of their fan-in.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                embedding = "embedding" in name and "patch" not in name
                fan_in = 1 if embedding else parameter[0].numel()
                parameter.copy_(noise * gain / math.sqrt(fan_in))
            elif ("norm" in name or "ln_" in name or "LayerNorm" in name) and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)

"""The head that LAION Aesthetic and ImageReward share: linear layers without activations."""

from __future__ import annotations

from torch import nn

__all__ = ["score_head"]


def score_head(width: int) -> nn.Sequential:
    """Build the layers ``width``, 1024, 128, 64, 16, 1.

    The dropouts do nothing in evaluation; they give the linear layers their published numbers.
    """
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )

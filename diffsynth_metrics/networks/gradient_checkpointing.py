"""Less memory for gradients to the pixels: the blocks of a tower are computed again on the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(model: nn.Module) -> None:
    """Let every block of a network keep its input alone for the backward pass.

    A block is one of several modules of the same class in a list, such as the layers of a transformer.
    Scores and gradients stay what they are; a backward pass costs one more forward pass. Where no
    gradient is wanted nothing changes.
    """
    for container in list(model.modules()):
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            blocks = list(container)
            if len({type(block) for block in blocks}) == 1 and len(list(blocks[0].children())) > 1:
                for block in blocks:
                    block.forward = _Recomputed(block)


class _Recomputed:
    """The forward of a block; an object and no closure, so that a copied block computes with itself."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _recompute(type(self.block).forward, self.block, *arguments, **options)


def _recompute(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(*arguments, **options)
    # There is no dropout in evaluation, so there is no random state to restore.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

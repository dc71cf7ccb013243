"""Grad mode, inference mode and autocast of one call, whatever the caller's are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from diffsynth_metrics.inputs import SharedImages

__all__ = ["in_its_own_modes", "plain_modes", "wants_gradients"]


def in_its_own_modes(components: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Let ``components`` leave the caller's modes alone: gradients as asked, no autocast."""

    @wraps(components)
    def scored(self: Any, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        gradients = wants_gradients(*inputs, *named.values())
        with plain_modes(self.device.type, gradients=gradients):
            result = components(self, *inputs, **named)
        # Once: a device is waited for, and weights with NaN make every score NaN.
        if "score" in result and not self.has_scored:
            if not result["score"].isfinite().all():
                self.check_weights()
            self.has_scored = True
        return result

    return scored


@contextmanager
def plain_modes(device: str, *, gradients: bool) -> Iterator[None]:
    """Leave the caller's inference mode and autocast, and set the grad mode, for this thread and call.

    Args:
        device: Type of the device whose autocast is left.
        gradients: Whether a graph is kept.
    """
    with (
        # Tensors made in inference mode could not be used by a later call with gradients.
        torch.inference_mode(False),
        # Not set_grad_enabled: it sets the mode when it is made, and under torch.compile that stayed.
        torch.enable_grad() if gradients else torch.no_grad(),
        torch.autocast(device, enabled=False),
    ):
        yield


def wants_gradients(*inputs: Any) -> bool:
    """Tell whether the caller has gradients enabled and an image that requires one."""
    return torch.is_grad_enabled() and any(map(_requires_gradient, inputs))


def _requires_gradient(images: Any) -> bool:
    if isinstance(images, SharedImages):
        images = images.checked
    if isinstance(images, Tensor):
        return images.requires_grad
    return (
        isinstance(images, Sequence)
        and not isinstance(images, (str, bytes))
        and any(isinstance(image, Tensor) and image.requires_grad for image in images)
    )

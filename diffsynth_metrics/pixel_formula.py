"""What metrics share that are a formula on the pixels of two pictures, without a network: PSNR, SSIM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffsynth_metrics.base import ReferenceMetric
from diffsynth_metrics.inputs import ImagesInput, pair_references
from diffsynth_metrics.pixels.pairs import pair_batches
from diffsynth_metrics.pixels.transforms import Unresized

__all__ = ["PixelFormulaMetric"]


class _Formula(nn.Module):
    """A function of two batches of pixels, computed on the device and in the dtype that a module has."""

    zero: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return self.function(first.to(self.zero), second.to(self.zero))


class PixelFormulaMetric(ReferenceMetric):
    """A metric that is a formula on the pixels of two pictures of one size; it has no weights.

    It defines :meth:`formula`. It computes in float32, or in float64 where that is asked for.
    """

    default_model = None
    config_file = None
    smallest_side: ClassVar[int] = 1
    """How many pixels each side of a picture must have at least."""
    transform = Unresized(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    @staticmethod
    @abstractmethod
    def formula(first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Map pixels ``[B, 3, H, W]`` in 0..1 to the metric's components ``[B]``."""

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        """Make a module of the formula."""
        return _Formula(cls.formula)

    @classmethod
    def finish(cls, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Bring the formula to float32, or to float64 if that is the dtype."""
        return model.to(torch.promote_types(dtype, torch.float32))

    def components(self, reference: ImagesInput, images: ImagesInput) -> dict[str, Tensor]:
        """Compute what :meth:`formula` returns for each pair; gradients flow to both sides.

        Raises:
            ImageError: Two pictures of a pair differ in size, or are too small; the message names them.
                See also :meth:`ReferenceMetric.compute`.
        """
        pairs = pair_batches(
            *pair_references(reference, images),
            self.transform,
            smallest_side=self.smallest_side,
            batch_size=self.batch_size,
            device=self.device,
        )
        batches = [self.model(*pair) for pair in pairs]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

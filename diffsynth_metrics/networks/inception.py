"""FID's Inception: torchvision's Inception v3 with the pooling of the TensorFlow graph of 2015-12-05."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

__all__ = ["FEATURES", "SIZE", "build_inception"]

SIZE = 299
"""Height and width of the network's input."""

FEATURES = 2048
"""Width of its pool3 features."""


class _FIDInceptionA(InceptionA):  # type: ignore[misc]
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average(x)),
        ]


class _FIDInceptionC(InceptionC):  # type: ignore[misc]
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average(x)),
        ]


class _FIDInceptionE(InceptionE):  # type: ignore[misc]
    def __init__(self, in_channels: int, conv_block: type[nn.Module] | None = None) -> None:
        super().__init__(in_channels, conv_block)
        # The last block of the graph has a max pool where the one before it has an average pool.
        self.is_last = in_channels == FEATURES

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.is_last else _average(x)
        return [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]


def _average(x: Tensor) -> Tensor:
    # TensorFlow leaves the padding out of the average, torchvision counts it.
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def build_inception() -> Inception3:
    """Build the network on the meta device, with every name of the published checkpoint.

    It maps ``[B, 3, 299, 299]``, scaled to about -1..1, to 1,008 logits.
    """
    with torch.device("meta"):
        return Inception3(
            num_classes=1008,
            aux_logits=False,
            init_weights=False,
            inception_blocks=[
                BasicConv2d,
                _FIDInceptionA,
                InceptionB,
                _FIDInceptionC,
                InceptionD,
                _FIDInceptionE,
                InceptionAux,
            ],
        )

"""The networks of LPIPS in the layout of their checkpoints: a classifier's features, in slices."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models import alexnet, squeezenet1_1, vgg16

__all__ = ["NETS", "SMALLEST_SIDES", "LPIPSNetwork", "unit_normalized"]

NETS = {
    "alex": (alexnet, (0, 2, 5, 8, 10, 12), (64, 192, 384, 256, 256)),
    "squeeze": (squeezenet1_1, (0, 2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512)),
    "vgg": (vgg16, (0, 4, 9, 16, 23, 30), (64, 128, 256, 512, 512)),
}
"""Name to torchvision's network, where its features are cut, and the channels at each cut."""

SMALLEST_SIDES = {"alex": 31, "squeeze": 17, "vgg": 16}
"""Name to the fewest pixels of a side of which something is left behind the last layer."""

_EPS = 1e-10


def unit_normalized(features: Tensor) -> Tensor:
    """Divide features ``[B, C, H, W]`` by their L2 norm over channels, to which 1e-10 is added.

    Where all channels are 0 the gradient is 0; that of the square root in the authors' code is NaN.
    """
    norm: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + _EPS)


class _Scaling(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("shift", "scale"):
            self.register_buffer(name, torch.empty(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        scaled: Tensor = (pixels - self.shift) / self.scale
        return scaled


class _Slices(nn.Module):
    """The layers of a classifier under the names that they have there, in slices ``slice1``, ..."""

    def __init__(self, layers: nn.Sequential, cuts: tuple[int, ...]) -> None:
        super().__init__()
        for number, (start, end) in enumerate(pairwise(cuts), 1):
            part = nn.Sequential()
            for index in range(start, end):
                part.add_module(str(index), layers[index])
            self.add_module(f"slice{number}", part)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        features = []
        for part in self.children():
            pixels = part(pixels)
            features.append(pixels)
        return features


class _Linear(nn.Module):
    """One weight per channel. The dropout before it, which only training used, gives it its name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, difference: Tensor) -> Tensor:
        weighted: Tensor = self.model(difference)
        return weighted


class LPIPSNetwork(nn.Module):
    """The distance of two batches of pictures.

    Attributes:
        name: One of :data:`NETS`.
    """

    def __init__(self, name: str) -> None:
        """Build it with random weights."""
        super().__init__()
        build, cuts, channels = NETS[name]
        self.name = name
        self.scaling_layer = _Scaling()
        self.net = _Slices(build(weights=None).features, cuts)
        for index, width in enumerate(channels):
            self.add_module(f"lin{index}", _Linear(width))
        self.layers = len(channels)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Map pixels ``[B, 3, H, W]`` in -1..1 to distances ``[B]``, float32 or wider."""
        dtype = self.scaling_layer.shift.dtype
        sides = [self.net(self.scaling_layer(pixels.to(dtype))) for pixels in (first, second)]
        distances = []
        for index, features in enumerate(zip(*sides, strict=True)):
            wide = torch.promote_types(dtype, torch.float32)
            one, other = (unit_normalized(side.to(wide)) for side in features)
            weighted = self.get_submodule(f"lin{index}")((one - other) ** 2)
            distances.append(weighted.mean(dim=(1, 2, 3)))
        return torch.stack(distances).sum(dim=0)

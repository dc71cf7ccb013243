"""An image to the pixels that a network was trained on, as PIL does it and as a differentiable map.

A transform is a frozen value with two faces of one definition: :meth:`Transform.from_pil` equals the
official pipeline bit for bit, :meth:`Transform.from_tensor` is the same map in torch, on any device,
with gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import as_rgb
from diffsynth_metrics.pixels.resizing import STRIP_PIXELS, resize, resize_part, strips

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Letterbox",
    "ResizedCrop",
    "ShortestEdgeCrop",
    "SmartResize",
    "Transform",
    "Unresized",
    "normalize_",
]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Transform(Protocol):
    """What a metric needs of a transform: the same geometry for PIL images and for tensors."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean per channel, for pixels in 0..1."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation per channel, for pixels in 0..1."""

    def from_pil(self, image: PIL.Image.Image) -> Tensor:
        """Map a loaded image of any mode to pixels ``[3, S, S]``, uint8 or float in 0..1."""

    def from_tensor(self, images: Tensor) -> Tensor:
        """Map uint8 or float ``[B, 3, H, W]`` to float pixels ``[B, 3, S, S]`` in 0..1, a new tensor."""


_EXTREME_RATIO = 512
"""Of pictures that are longer, only what the crop shows is computed: the rest may take gigabytes."""


def _is_extreme(height: int, width: int) -> bool:
    return max(height, width) > _EXTREME_RATIO * min(height, width)


@dataclass(frozen=True)
class ShortestEdgeCrop:
    """Resize the shorter edge to `size` with bicubic interpolation, then cut out the centre.

    This is what CLIP and its descendants do. ``crop_rounding`` is where they differ by a pixel when
    the margin is odd: transformers rounds the offset down (``"floor"``), OpenAI's CLIP and
    torchvision round it half to even (``"half_even"``). They also differ in whether an image that is
    not RGB is converted before or after these steps.

    Of a picture that is more than 512 times as long as wide only the crop is computed, which is equal
    to within a step of 1/255; otherwise it is equal to the bit.
    """

    size: int = 224
    crop_rounding: Literal["floor", "half_even"] = "floor"
    convert: Literal["before", "after"] = "before"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def from_pil(self, image: PIL.Image.Image) -> Tensor:
        """Map an image of any mode to uint8 pixels ``[3, size, size]``, to the bit as Pillow does."""
        if self.convert == "before":
            image = as_rgb(image)
        if _is_extreme(image.height, image.width):
            window, box = self._window(image.height, image.width)
            size = (self.size, self.size)
            cropped = image.crop(window).resize(size, PIL.Image.Resampling.BICUBIC, box)
        else:
            height, width, top, left = self._geometry(image.height, image.width)
            resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
            cropped = resized.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(as_rgb(cropped))).permute(2, 0, 1)

    def from_tensor(self, images: Tensor) -> Tensor:
        """Map ``[B, 3, H, W]`` (uint8, or float in 0..1) to float ``[B, 3, size, size]`` in 0..1."""
        if _is_extreme(*images.shape[-2:]):
            (first, upper, last, lower), box = self._window(*images.shape[-2:])
            return resize_part(images[..., upper:lower, first:last], self.size, box)
        height, width, top, left = self._geometry(*images.shape[-2:])
        resized = resize(images, height, width)
        return resized[..., top : top + self.size, left : left + self.size].contiguous()

    def _geometry(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the size after resizing and the offset of the crop: height, width, top, left."""
        short = min(height, width)
        height, width = self.size * height // short, self.size * width // short
        return height, width, self._offset(height), self._offset(width)

    def _window(
        self, height: int, width: int
    ) -> tuple[tuple[int, int, int, int], tuple[float, float, float, float]]:
        """Return the part of an image that its crop is computed from, and the crop's box within it.

        Both are left, top, right, bottom, in pixels of the image. The part reaches as far beyond the box
        as the filter does.
        """
        new_height, new_width, top, left = self._geometry(height, width)
        window, box = [], []
        for length, new_length, offset in ((width, new_width, left), (height, new_height, top)):
            scale = length / new_length
            start, stop = offset * scale, (offset + self.size) * scale
            reach = 2 * max(scale, 1.0) + 1
            first, last = max(0, math.floor(start - reach)), min(length, math.ceil(stop + reach))
            window.append((first, last))
            box.append((start - first, min(stop, length) - first))
        (x, right), (y, bottom) = window
        return (x, y, right, bottom), (box[0][0], box[1][0], box[0][1], box[1][1])

    def _offset(self, length: int) -> int:
        margin = length - self.size
        return margin // 2 if self.crop_rounding == "floor" else round(margin / 2)


@dataclass(frozen=True)
class ResizedCrop(ShortestEdgeCrop):
    """Resize the shorter edge to `edge`, which is more than `size`, then cut out the centre of `size`.

    This is how networks are evaluated on ImageNet, DINO and DINOv2 among them.
    """

    edge: int = 256

    def _geometry(self, height: int, width: int) -> tuple[int, int, int, int]:
        short = min(height, width)
        height, width = self.edge * height // short, self.edge * width // short
        return height, width, self._offset(height), self._offset(width)


@dataclass(frozen=True)
class Letterbox:
    """Shrink or enlarge the longer edge to `size`, then pad the shorter one with black around it.

    This is what HPSv2 does, on float pixels: bicubic interpolation without clamping, so values may
    leave 0..1 a little. The authors' code forgets the padding when no scaling is needed, and rounds
    a very short side to nothing, and then fails; here an image is always padded and keeps a pixel.
    """

    size: int = 224
    antialias: bool = True
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def from_pil(self, image: PIL.Image.Image) -> Tensor:
        """Map an image of any mode to float32 pixels ``[3, size, size]``."""
        image = as_rgb(image)
        parts = (torch.from_numpy(np.array(strip)).permute(2, 0, 1)[None] for _, strip in strips(image))
        return self._from_bytes(parts, (1, 3, image.height, image.width), torch.device("cpu"))[0]

    def from_tensor(self, images: Tensor) -> Tensor:
        """Map ``[B, 3, H, W]`` (uint8, or float in 0..1) to float ``[B, 3, size, size]``."""
        height, width = images.shape[-2:]
        if images.dtype == torch.uint8:
            parts = torch.split(images, max(1, STRIP_PIXELS // width), dim=-2)
            return self._from_bytes(parts, images.shape, images.device)
        pixels = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
        return self._padded(self._interpolate(pixels, *self._geometry(height, width)))

    def _from_bytes(self, parts: Iterable[Tensor], shape: Sequence[int], device: torch.device) -> Tensor:
        """Resize bytes ``[B, 3, H, W]`` that come in strips of rows, to the bit as if at once."""
        new_height, new_width = self._geometry(shape[-2], shape[-1])
        # Allocated before the strips: one small result after each would leave holes in the heap.
        rows = torch.empty(*shape[:-1], new_width, dtype=torch.float32, device=device)
        top = 0
        for part in parts:
            # With channels last, as Pillow has them, interpolation is slower; its result is the same.
            floats = part.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
            bottom = top + part.shape[-2]
            rows[..., top:bottom, :] = self._interpolate(floats, part.shape[-2], new_width)
            top = bottom
        return self._padded(self._interpolate(rows, new_height, new_width))

    def _geometry(self, height: int, width: int) -> tuple[int, int]:
        scale = self.size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _interpolate(self, pixels: Tensor, height: int, width: int) -> Tensor:
        if pixels.shape[-2:] == (height, width):
            return pixels
        return interpolate(
            pixels, (height, width), mode="bicubic", antialias=self.antialias, align_corners=False
        )

    def _padded(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        return pad(pixels, (left, self.size - width - left, top, self.size - height - top))


@dataclass(frozen=True)
class SmartResize:
    """Resize to sides that are multiples of `factor`, near a number of pixels, keeping the aspect ratio.

    This is what Qwen2-VL and HPSv3 do, with bicubic interpolation. Where the number of pixels is too
    small the sides are rounded up, where it is too large they are rounded down.
    """

    min_pixels: int = 256 * 28 * 28
    max_pixels: int = 256 * 28 * 28
    factor: int = 28
    max_ratio: int = 200
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        """Check the numbers of pixels."""
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < self.factor**2:
                raise ValueError(f"{name} must be an int of at least {self.factor**2}, got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")

    def from_pil(self, image: PIL.Image.Image) -> Tensor:
        """Map an image of any mode to uint8 pixels ``[3, H, W]``, to the bit as Pillow does."""
        image = as_rgb(image)
        height, width = self.size(image.height, image.width)
        resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    def from_tensor(self, images: Tensor) -> Tensor:
        """Map ``[B, 3, H, W]`` (uint8, or float in 0..1) to float ``[B, 3, H', W']`` in 0..1."""
        return resize(images, *self.size(*images.shape[-2:]))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and the width after resizing.

        Raises:
            ImageError: One side is more than `max_ratio` times the other, before or after resizing.
        """
        factor, area = self.factor, height * width
        new_height, new_width = (max(factor, round(side / factor) * factor) for side in (height, width))
        if new_height * new_width > self.max_pixels:
            scale = math.sqrt(area / self.max_pixels)
            new_height, new_width = (
                max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)
            )
        elif new_height * new_width < self.min_pixels:
            scale = math.sqrt(self.min_pixels / area)
            new_height, new_width = (
                math.ceil(side * scale / factor) * factor for side in (height, width)
            )
        for sides in ((width, height), (new_width, new_height)):
            if max(sides) > self.max_ratio * min(sides):
                raise ImageError(
                    f"one side may be at most {self.max_ratio} times the other, before and after "
                    f"resizing; got {width}x{height}, resized to {new_width}x{new_height}"
                )
        return new_height, new_width


@dataclass(frozen=True)
class Unresized:
    """Leave the size of an image as it is."""

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def from_pil(self, image: PIL.Image.Image) -> Tensor:
        """Return the bytes of an image of any mode in RGB, ``[3, H, W]``."""
        return torch.from_numpy(np.array(as_rgb(image))).permute(2, 0, 1)

    def from_tensor(self, images: Tensor) -> Tensor:
        """Return ``[B, 3, H, W]`` (uint8, or float in 0..1) as new floats in 0..1."""
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        return images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide).clone()


def normalize_(pixels: Tensor, transform: Transform) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel, of floats in place.

    Args:
        pixels: ``[B, 3, S, S]``, uint8 in 0..255 or float in 0..1.
        transform: Where the mean and the standard deviation come from.

    Returns:
        float32 (float64 for float64 pixels) ``[B, 3, S, S]``.
    """
    if pixels.dtype == torch.uint8:
        pixels = pixels.to(torch.float32).div_(255)
    mean, std = (
        _per_channel(values, pixels.dtype, pixels.device) for values in (transform.mean, transform.std)
    )
    return pixels.sub_(mean).div_(std)


@cache
def _per_channel(values: tuple[float, float, float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one value per channel ``[3, 1, 1]``.

    It is kept, because a copy to an accelerator waits for everything that the accelerator has to do.
    """
    with torch.inference_mode(False):  # another call may need it for gradients
        return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)

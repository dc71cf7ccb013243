"""An image to the pixels that a network was trained on, as PIL does it and as a differentiable map.

A transform is a frozen value with two faces of one definition: :meth:`Transform.from_pil` equals the
official pipeline bit for bit, :meth:`Transform.from_tensor` is the same map in torch, on any device,
with gradients. :func:`pixel_batches` runs a transform over many images, ahead of the network.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from diffsynth_metrics.inputs import CheckedImages, SharedImages, open_image

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "Letterbox",
    "ShortestEdgeCrop",
    "Transform",
    "normalize",
    "pixel_batches",
    "resize",
]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BATCHES_AHEAD = 2


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
        """Map uint8 or float ``[B, 3, H, W]`` to float pixels ``[B, 3, S, S]`` in 0..1."""


@dataclass(frozen=True)
class ShortestEdgeCrop:
    """Resize the shorter edge to `size` with bicubic interpolation, then cut out the centre.

    This is what CLIP and its descendants do. ``crop_rounding`` is where they differ by a pixel when
    the margin is odd: transformers rounds the offset down (``"floor"``), OpenAI's CLIP and
    torchvision round it half to even (``"half_even"``). They also differ in whether an image that is
    not RGB is converted before or after these steps.
    """

    size: int = 224
    crop_rounding: Literal["floor", "half_even"] = "floor"
    convert: Literal["before", "after"] = "before"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def from_pil(self, image: PIL.Image.Image) -> Tensor:
        """Map an image of any mode to uint8 pixels ``[3, size, size]``, to the bit as Pillow does."""
        if self.convert == "before":
            image = _rgb(image)
        height, width, top, left = self._geometry(image.height, image.width)
        resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        cropped = resized.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(_rgb(cropped))).permute(2, 0, 1)

    def from_tensor(self, images: Tensor) -> Tensor:
        """Map ``[B, 3, H, W]`` (uint8, or float in 0..1) to float ``[B, 3, size, size]`` in 0..1."""
        height, width, top, left = self._geometry(*images.shape[-2:])
        resized = resize(images, height, width)
        return resized[..., top : top + self.size, left : left + self.size]

    def _geometry(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the size after resizing and the offset of the crop: height, width, top, left."""
        short = min(height, width)
        height, width = self.size * height // short, self.size * width // short
        return height, width, self._offset(height), self._offset(width)

    def _offset(self, length: int) -> int:
        margin = length - self.size
        return margin // 2 if self.crop_rounding == "floor" else round(margin / 2)


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
        pixels = torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1).contiguous()
        return self.from_tensor(pixels[None])[0]

    def from_tensor(self, images: Tensor) -> Tensor:
        """Map ``[B, 3, H, W]`` (uint8, or float in 0..1) to float ``[B, 3, size, size]``."""
        pixels = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
        if images.dtype == torch.uint8:
            pixels = pixels.div_(255)  # a copy of our own, made on the line above
        scale = self.size / max(images.shape[-2:])
        height, width = (max(1, round(length * scale)) for length in images.shape[-2:])
        if scale != 1:
            pixels = interpolate(
                pixels, (height, width), mode="bicubic", antialias=self.antialias, align_corners=False
            )
        top, left = (self.size - height) // 2, (self.size - width) // 2
        return pad(pixels, (left, self.size - width - left, top, self.size - height - top))


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize as Pillow's bicubic filter does, differentiably.

    Pillow filters the rows, stores the result as bytes, then filters the columns. Float images pass
    the same two steps with the clamping but without the rounding to bytes, which has no useful
    gradient; uint8 images are rounded as well, and then differ from Pillow by a rare step of 1/255.

    Args:
        images: ``[B, 3, H, W]``, uint8 or float in 0..1.
        height: Height of the result.
        width: Width of the result.

    Returns:
        float32 (float64 for float64 images) ``[B, 3, height, width]`` in 0..1.
    """
    as_bytes = images.dtype == torch.uint8
    pixels = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
    for size in ((images.shape[-2], width), (height, width)):
        if pixels.shape[-2:] != size:
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
            pixels = pixels.round().clamp(0, 255) if as_bytes else pixels.clamp(0, 1)
    return pixels / 255 if as_bytes else pixels


def normalize(pixels: Tensor, transform: Transform) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel.

    Args:
        pixels: ``[B, 3, S, S]``, uint8 in 0..255 or float in 0..1.
        transform: Where the mean and the standard deviation come from.

    Returns:
        float32 (float64 for float64 pixels) ``[B, 3, S, S]``.
    """
    if pixels.dtype == torch.uint8:
        pixels = pixels.to(torch.float32) / 255
    mean = torch.tensor(transform.mean, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(transform.std, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
    return (pixels - mean) / std


def pixel_batches(
    images: CheckedImages, transform: Transform, *, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the network's inputs, batch by batch, in the order of the images.

    Files are decoded and resized by threads on all cores (Pillow releases the GIL), at most two
    batches ahead of the consumer, so memory does not grow with the number of images.

    Args:
        images: What :func:`diffsynth_metrics.inputs.as_images` returned.
        transform: The metric's transform.
        batch_size: The largest batch.
        device: Where the batches are wanted.

    Yields:
        Normalised float pixels ``[B, 3, S, S]`` with B at most `batch_size`.

    Raises:
        ImageError: An image cannot be read; the message names it.
    """
    if isinstance(images, SharedImages):
        batches = pixel_batches(images.checked, transform, batch_size=batch_size, device=device)
        pixels = images.prepared((transform, device), lambda: _joined(list(batches)))
        yield from torch.split(pixels, batch_size)
        return
    starts = range(0, len(images), batch_size)
    if isinstance(images, Tensor):
        for start in starts:
            chunk = images[start : start + batch_size].to(device)
            yield normalize(transform.from_tensor(chunk), transform)
        return

    def prepare(index: int) -> Tensor:
        item = images[index]
        assert not isinstance(item, Tensor)
        return transform.from_pil(open_image(item, f"image {index}"))

    pending: deque[list[Tensor | Future[Tensor]]] = deque()
    pool = ThreadPoolExecutor(min(_cpu_count(), len(images)), "diffsynth_metrics")
    try:
        for start in starts:
            indices = range(start, min(start + batch_size, len(images)))
            pending.append(
                [
                    item if isinstance(item := images[i], Tensor) else pool.submit(prepare, i)
                    for i in indices
                ]
            )
            if len(pending) > _BATCHES_AHEAD:
                yield _collect(pending.popleft(), transform, device)
        while pending:
            yield _collect(pending.popleft(), transform, device)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _joined(batches: list[Tensor]) -> Tensor:
    # cat would copy a single batch.
    return batches[0] if len(batches) == 1 else torch.cat(batches)


def _collect(batch: list[Tensor | Future[Tensor]], transform: Transform, device: torch.device) -> Tensor:
    """Join tensors and prepared PIL images of one batch, keeping their order."""
    kinds = {
        None if isinstance(item, Future) else (item.shape, item.dtype, item.device) for item in batch
    }
    if len(kinds) > 1:
        return torch.cat([_collect([item], transform, device) for item in batch])
    if None in kinds:
        prepared = [item.result() for item in batch if isinstance(item, Future)]
        # Bytes travel to the device, floats are made there.
        return normalize(torch.stack(prepared).to(device), transform)
    tensors = torch.stack([item for item in batch if isinstance(item, Tensor)])
    return normalize(transform.from_tensor(tensors.to(device)), transform)


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    # convert() would copy an image that is RGB already; nobody writes to it here.
    return image if image.mode == "RGB" else image.convert("RGB")


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""Resizing as Pillow's bicubic filter does it: bytes to the bit, floats differentiably."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = [
    "STRIP_PIXELS",
    "columns_first",
    "cpu_count",
    "filter_bytes",
    "resize",
    "resize_part",
    "strips",
]

_PILLOW = int(PIL.__version__.partition(".")[0])

STRIP_PIXELS = 2**20
"""How many pixels become floats at once: a large picture takes several times its memory as floats."""

_FRACTION_BITS = 22
"""Pillow filters bytes with weights in fixed point: 32 bits, of which 8 and a reserve of 2 are left."""


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize as Pillow's bicubic filter does.

    Pillow filters the rows, stores the result as bytes, then filters the columns. What becomes of bytes
    is equal to that on every device. Float images pass the same two steps with the clamping but without
    the rounding to bytes, which has no useful gradient.

    Args:
        images: ``[B, 3, H, W]``, uint8 or float in 0..1.
        height: Height of the result.
        width: Width of the result.

    Returns:
        float32 (float64 for float64 images) ``[B, 3, height, width]`` in 0..1, never the images
        themselves. Gradients flow to floats.
    """
    if images.dtype == torch.uint8:
        return _resize_bytes(images, height, width).to(torch.float32).div_(255)
    pixels = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return pixels.clone()
    tall = columns_first(old_height, old_width, height, width)
    between = (height, old_width) if tall else (old_height, width)
    for size in (between, (height, width)):
        if pixels.shape[-2:] != size:
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
            pixels = pixels.clamp_(0, 1)
    return pixels


def resize_part(images: Tensor, size: int, box: tuple[float, float, float, float]) -> Tensor:
    """Resize a part of images as :func:`resize` does, within a step of 1/255.

    Args:
        images: ``[B, 3, H, W]``, uint8 or float in 0..1.
        size: Height and width of the result.
        box: The part, in pixels of the images: left, top, right, bottom. What is around it is seen by
            the filter.

    Returns:
        float32 (float64 for float64 images) ``[B, 3, size, size]`` in 0..1, with gradients to floats.
    """
    is_bytes = images.dtype == torch.uint8
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    pixels = images.to(wide) / 255 if is_bytes else images.to(wide)
    left, top, right, bottom = box
    for dim, start, stop in ((-1, left, right), (-2, top, bottom)):
        matrix = _filter_matrix(images.shape[dim], start, stop, size).to(pixels)
        pixels = pixels @ matrix.T if dim == -1 else matrix @ pixels
        pixels = pixels.clamp(0, 1)
        pixels = pixels.mul(255).round().div(255) if is_bytes else pixels
    return pixels


def _filter_matrix(length: int, start: float, stop: float, size: int) -> Tensor:
    """Return the bicubic filter's weights ``[size, length]`` from `start`..`stop` to `size` pixels."""
    scale = (stop - start) / size
    centers = start + (np.arange(size) + 0.5) * scale
    distance = (np.arange(length) + 0.5 - centers[:, None]) / max(scale, 1.0)
    weights = _bicubic(distance)
    return torch.from_numpy(weights / weights.sum(axis=1, keepdims=True))


def _resize_bytes(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    by = _by_pillow if images.device.type == "cpu" else filter_bytes
    return by(images, height, width)


def _by_pillow(images: Tensor, height: int, width: int) -> Tensor:
    """Resize each channel of each image as a grey picture; Pillow releases the GIL."""
    planes = np.ascontiguousarray(images.flatten(0, 1).numpy())
    resized = torch.empty(*images.shape[:2], height, width, dtype=torch.uint8, device="cpu")
    results = resized.flatten(0, 1).numpy()

    def work(first: int) -> None:
        for index in range(first, len(planes), workers):
            picture = PIL.Image.fromarray(planes[index])
            results[index] = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)

    workers = min(cpu_count(), len(planes))
    with ThreadPoolExecutor(workers, "diffsynth_metrics") as pool:
        list(pool.map(work, range(workers)))
    return resized


def filter_bytes(images: Tensor, height: int, width: int) -> Tensor:
    """Resize bytes in Pillow's integers, on any device: uint8 ``[B, C, H, W]`` to its size."""
    if columns_first(images.shape[-2], images.shape[-1], height, width):
        return _filtered(_filtered(images, -2, height), -1, width)
    return _filtered(_filtered(images, -1, width), -2, height)


def columns_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Tell whether Pillow begins with the columns: from 13.0 on, where that leaves it less to do."""
    shrinks = height - new_height
    return _PILLOW >= 13 and shrinks > 0 and shrinks > 2 * (width - new_width)


def strips(
    image: PIL.Image.Image, *, of_columns: bool = False
) -> Iterator[tuple[tuple[int, int], PIL.Image.Image]]:
    """Cut an image into strips of rows (or of columns) of about a million pixels.

    Filters work along one dimension after the other, so the first pass may go strip by strip.

    Yields:
        The left and upper corner of each strip, and the strip.
    """
    across, along = (image.height, image.width) if of_columns else (image.width, image.height)
    step = max(1, STRIP_PIXELS // across)
    for start in range(0, along, step):
        stop = min(start + step, along)
        box = (start, 0, stop, across) if of_columns else (0, start, across, stop)
        yield box[:2], image.crop(box)


def _filtered(images: Tensor, dim: int, size: int) -> Tensor:
    """Filter bytes ``[B, C, H, W]`` along one dimension in Pillow's integers, on any device."""
    if images.shape[dim] == size:
        return images
    shape = list(images.shape)
    shape[dim] = size
    total = torch.full(shape, 1 << (_FRACTION_BITS - 1), dtype=torch.int32, device=images.device)
    places, weights = _taps(images.shape[dim], size, images.device)
    per_line = (-1,) if dim == -1 else (-1, 1)
    for place, weight in zip(places, weights, strict=True):
        total.addcmul_(images.index_select(dim, place), weight.view(per_line))
    return (total >> _FRACTION_BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=256)
def _taps(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where the filter reads and with which weights, kept: copies make an accelerator wait.

    Returns:
        int64 positions and int32 weights in fixed point, both ``[taps, size]``.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    stop = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), length)
    places = first + np.arange((stop - first).max())[:, None]
    weights = np.where(places < stop, _bicubic((places - centers + 0.5) * (1 / stretch)), 0.0)
    weights /= weights.cumsum(axis=0)[-1]  # the sum in Pillow's order
    fixed = np.trunc(weights * 2**_FRACTION_BITS + np.copysign(0.5, weights)).astype(np.int32)
    return (
        torch.from_numpy(places.clip(max=length - 1)).to(device),
        torch.from_numpy(fixed).to(device),
    )


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -0.5, for distances in samples."""
    a = -0.5
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def cpu_count() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

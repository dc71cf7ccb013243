"""Many images to the network's inputs: decoded and transformed ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import PIL.Image
import torch
from torch import Tensor

from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import CheckedImages, SharedImages, open_image
from diffsynth_metrics.pixels.resizing import cpu_count
from diffsynth_metrics.pixels.transforms import Transform, normalize_

__all__ = ["joined", "pixel_batches", "pixel_lists", "tensor_pixels"]

_BATCHES_AHEAD = 2

# On a CPU, a tensor of more than 32 MB is mapped afresh from the kernel (glibc's largest malloc
# threshold), which takes as long as the resizing of what is in it. One picture of 1024x1024 stays below,
# and between the steps of resizing more of a smaller part is still in the processor's caches.
_BYTES_AT_ONCE_ON_CPU = 13_000_000

_Prepared: TypeAlias = "Future[Callable[[], Tensor]]"
"""A decoded image on its way: its result makes the pixels, or has them already."""


def tensor_pixels(images: Tensor | list[Tensor], transform: Transform) -> Tensor:
    """Map images ``[B, 3, H, W]``, or B of ``[3, H, W]``, to the network's inputs ``[B, 3, S, S]``."""
    first, at_once = images[0], len(images)
    by_torch = first.is_floating_point() or transform.uses_all_cores
    if by_torch and first.device.type == "cpu":
        as_floats = first.numel() * max(4, first.element_size())
        at_once = max(1, _BYTES_AT_ONCE_ON_CPU // as_floats)
    parts = [images[start : start + at_once] for start in range(0, len(images), at_once)]
    return normalize_(joined([transform.from_tensor(_copied(part)) for part in parts]), transform)


def _copied(images: Tensor | list[Tensor]) -> Tensor:
    """Return images as a tensor whose floats are not the caller's; bytes become floats later anyway.

    Resizing reads a pixel several times, and finds those of a small copy in the processor's caches.
    """
    if not isinstance(images, Tensor):
        return torch.stack(images)
    if images.dtype == torch.uint8:
        return images
    return images.clone(memory_format=torch.contiguous_format)


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
        if images.keeps(transform):
            pixels = images.prepared((transform, device), lambda: joined(list(batches)))
            yield from torch.split(pixels, batch_size)
        else:
            yield from batches
        return
    if isinstance(images, Tensor):
        for chunk in torch.split(images, batch_size):
            yield tensor_pixels(chunk.to(device), transform)
        return
    for batch in _ahead(images, transform, batch_size):
        yield _collect(batch, transform, device)


def pixel_lists(
    images: CheckedImages, transform: Transform, *, batch_size: int, device: torch.device
) -> Iterator[list[Tensor]]:
    """Yield what :func:`pixel_batches` does, as lists of images ``[3, H, W]`` of different sizes."""
    if isinstance(images, SharedImages):
        images = images.checked
    if isinstance(images, Tensor):
        for batched in pixel_batches(images, transform, batch_size=batch_size, device=device):
            yield list(batched)
        return
    index = 0
    for batch in _ahead(images, transform, batch_size):
        pixels: list[Tensor] = []
        for item in batch:
            if isinstance(item, Tensor):
                with _naming(index):
                    pixels += tensor_pixels(item[None].to(device), transform)
            else:
                pixels += _collect([item], transform, device)
            index += 1
        yield pixels


def _ahead(
    images: list[PIL.Image.Image | Path | Tensor], transform: Transform, batch_size: int
) -> Iterator[list[Tensor | _Prepared]]:
    """Yield batches of tensors and of PIL images that are being prepared, in the order of the images."""
    starts = range(0, len(images), batch_size)

    def finish(index: int, opened: PIL.Image.Image) -> Tensor:
        with _naming(index):
            return transform.from_pil(opened)

    def prepare(index: int) -> Callable[[], Tensor]:
        item = images[index]
        assert not isinstance(item, Tensor)
        finished = partial(finish, index, open_image(item, f"image {index}"))
        if transform.uses_all_cores:
            return finished
        pixels = finished()
        return lambda: pixels

    # Decoded pictures are large, so fewer of them wait than prepared ones.
    batches_ahead = 1 if transform.uses_all_cores else _BATCHES_AHEAD
    pending: deque[list[Tensor | _Prepared]] = deque()
    pool = ThreadPoolExecutor(min(cpu_count(), len(images)), "diffsynth_metrics")
    try:
        for start in starts:
            indices = range(start, min(start + batch_size, len(images)))
            pending.append(
                [
                    item if isinstance(item := images[i], Tensor) else pool.submit(prepare, i)
                    for i in indices
                ]
            )
            if len(pending) > batches_ahead:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def joined(batches: list[Tensor]) -> Tensor:
    """Join batches; a single one is returned as it is, and not copied."""
    return batches[0] if len(batches) == 1 else torch.cat(batches)


def _collect(batch: list[Tensor | _Prepared], transform: Transform, device: torch.device) -> Tensor:
    """Join tensors and prepared PIL images of one batch, keeping their order."""
    kinds = {
        None if isinstance(item, Future) else (item.shape, item.dtype, item.device) for item in batch
    }
    if len(kinds) > 1:
        return torch.cat([_collect([item], transform, device) for item in batch])
    if None in kinds:
        prepared = [item.result()() for item in batch if isinstance(item, Future)]
        # Bytes travel to the device, floats are made there.
        return normalize_(torch.stack(prepared).to(device), transform)
    return tensor_pixels([item.to(device) for item in batch if isinstance(item, Tensor)], transform)


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say which image it is that a transform does not take."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"image {index}: {error}") from error

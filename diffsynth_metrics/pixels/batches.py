"""Many images to the network's inputs: decoded and transformed ahead of it, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import (
    CheckedImage,
    CheckedImages,
    SharedImages,
    image_name,
    open_image,
    pixel_count,
)
from diffsynth_metrics.pixels.resizing import cpu_count
from diffsynth_metrics.pixels.transforms import Transform, normalize_

__all__ = ["joined", "pixel_batches", "pixel_lists", "prepare_ahead", "tensor_pixels"]

_BATCHES_AHEAD = 2

_PIXELS_IN_FLIGHT = 100_000_000
"""How many pixels are decoded at once by one call; a larger picture is decoded while no other is."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def prepare_ahead(
    items: Iterable[_Item],
    prepare: Callable[[_Item], _Result],
    pixels: Callable[[_Item], int],
    *,
    workers: int,
    ahead: int,
) -> Iterator[_Result]:
    """Yield what `prepare` makes of each item, in order; threads prepare the next items meanwhile.

    Memory does not grow with the number of items: an item is given to a thread when at most `ahead`
    others are ahead of the consumer, and when all in preparation have at most 100 million pixels.

    Args:
        items: Items, taken as they are needed.
        prepare: Decodes a picture and makes it small. (Pillow releases the GIL.)
        pixels: How many pixels `prepare` will decode.
        workers: Number of threads; 0 works in the caller's thread.
        ahead: How many items may be ahead of the one that the consumer has.

    Raises:
        Exception: What `prepare` raises, in the place of the item's result.
    """
    if workers == 0:
        yield from map(prepare, items)
        return
    pending: deque[tuple[int, Future[_Result]]] = deque()
    pool = ThreadPoolExecutor(workers, "diffsynth_metrics")
    try:
        for item in items:
            size = pixels(item)
            while pending and (len(pending) > ahead or _in_flight(pending) + size > _PIXELS_IN_FLIGHT):
                yield pending.popleft()[1].result()
            pending.append((size, pool.submit(prepare, item)))
        while pending:
            yield pending.popleft()[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_flight(pending: Iterable[tuple[int, Future[_Result]]]) -> int:
    return sum(size for size, future in pending if not future.done())


def tensor_pixels(images: Tensor, transform: Transform) -> Tensor:
    """Map images ``[B, 3, H, W]`` to the network's inputs ``[B, 3, S, S]``."""
    return normalize_(transform.from_tensor(images), transform)


def pixel_batches(
    images: CheckedImages, transform: Transform, *, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the network's inputs, batch by batch, in the order of the images.

    Files are decoded and resized by threads on all cores, at most two batches ahead of the consumer and
    bounded by pixels in flight, see :func:`prepare_ahead`.

    Args:
        images: What :func:`diffsynth_metrics.inputs.as_images` returned.
        transform: The metric's transform.
        batch_size: The largest batch.
        device: Where the batches are wanted.

    Yields:
        Normalised float pixels ``[B, 3, S, S]`` with B at most `batch_size`.

    Raises:
        ImageError: An image cannot be read; the message names it and its file.
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
        # Bytes travel to the device together, floats are made there.
        if all(pixels is not None for _, _, pixels in batch):
            prepared = torch.stack([pixels for _, _, pixels in batch if pixels is not None])
            yield normalize_(prepared.to(device), transform)
        else:
            yield torch.cat([_alone(*item, transform, device) for item in batch])


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
    for batch in _ahead(images, transform, batch_size):
        yield [_alone(*item, transform, device)[0] for item in batch]


_Prepared = tuple[int, CheckedImage, "Tensor | None"]
"""Position of an image, the image, and its pixels, which a tensor gets later, on its device."""


def _ahead(
    images: list[CheckedImage], transform: Transform, batch_size: int
) -> Iterator[list[_Prepared]]:
    """Yield batches of images and of their pixels, in the order of the images."""

    def prepare(item: tuple[int, CheckedImage]) -> _Prepared:
        index, image = item
        if isinstance(image, Tensor):
            return index, image, None
        opened = open_image(image, f"image {index}")
        with _naming(index, image):
            return index, image, transform.from_pil(opened)

    def pixels(item: tuple[int, CheckedImage]) -> int:
        return 0 if isinstance(item[1], Tensor) else pixel_count(item[1])

    prepared = prepare_ahead(
        enumerate(images),
        prepare,
        pixels,
        workers=min(cpu_count(), len(images)),
        ahead=_BATCHES_AHEAD * batch_size,
    )
    while batch := list(islice(prepared, batch_size)):
        yield batch


def _alone(
    index: int, image: CheckedImage, pixels: Tensor | None, transform: Transform, device: torch.device
) -> Tensor:
    """Return the network's input for one image ``[1, 3, H, W]``."""
    if isinstance(image, Tensor):
        with _naming(index, image):
            return tensor_pixels(image[None].to(device), transform)
    assert pixels is not None
    return normalize_(pixels[None].to(device), transform)


def joined(batches: list[Tensor]) -> Tensor:
    """Join batches; a single one is returned as it is, and not copied."""
    return batches[0] if len(batches) == 1 else torch.cat(batches)


@contextmanager
def _naming(index: int, image: CheckedImage) -> Iterator[None]:
    """Say which image it is that a transform does not take."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{image_name(f'image {index}', image)}: {error}") from error

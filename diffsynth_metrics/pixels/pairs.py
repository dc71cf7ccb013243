"""Pairs of images to batches of pixels, for what compares two pictures position by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import (
    CheckedImage,
    CheckedImages,
    image_name,
    image_size,
    open_image,
    pixel_count,
)
from diffsynth_metrics.pixels.batches import prepare_ahead, tensor_pixels
from diffsynth_metrics.pixels.resizing import cpu_count
from diffsynth_metrics.pixels.transforms import Transform, normalize_

__all__ = ["pair_batches"]

_Sides = list[tuple[CheckedImage, str]]
"""The reference and the image of a pair, with how messages call them."""


def pair_batches(
    references: CheckedImages,
    images: CheckedImages,
    transform: Transform,
    *,
    batch_size: int,
    device: torch.device,
    of_other_sizes: Transform | None = None,
    smallest_side: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pixels of both sides, batch by batch, in the order of the pairs.

    Files are decoded by threads on all cores, at most two batches ahead of the consumer and bounded by
    pixels in flight, see :func:`~diffsynth_metrics.pixels.batches.prepare_ahead`.

    Args:
        references: What :func:`diffsynth_metrics.inputs.pair_references` returned.
        images: As many.
        transform: For the two pictures of a pair that have one size, and keeps it.
        batch_size: The most pairs in a batch; pairs of different sizes are in different batches.
        device: Where the batches are wanted.
        of_other_sizes: For pairs of different sizes, which it brings to one; None: they are an error.
        smallest_side: How many pixels each side must have at least, where `transform` is used.

    Yields:
        Normalised float pixels ``[B, 3, H, W]`` of the references and of the images.

    Raises:
        ImageError: An image cannot be read or is too small, or the sizes of a pair differ; the message
            names the files.
    """

    def choose(sides: _Sides) -> Transform:
        first, second = (image_size(*side) for side in sides)
        if first == second:
            _check_smallest(sides, [first, second], smallest_side)
            return transform
        if of_other_sizes is None:
            raise ImageError(_of_two_sizes(sides, first, second))
        return of_other_sizes

    pending: list[list[Tensor]] = []
    for pair in _pairs(references, images, choose, 2 * batch_size, device):
        other_shape = pending and pending[0][0].shape != pair[0].shape
        if pending and (other_shape or len(pending) == batch_size):
            yield _stacked(pending)
            pending = []
        pending.append(pair)
    yield _stacked(pending)


def _pairs(
    references: CheckedImages,
    images: CheckedImages,
    choose: Callable[[_Sides], Transform],
    ahead: int,
    device: torch.device,
) -> Iterator[list[Tensor]]:
    """Yield the pixels of each pair, ``[3, H, W]`` each, decoded ahead by threads."""

    def sides(index: int) -> _Sides:
        return [(references[index], f"reference {index}"), (images[index], f"image {index}")]

    def prepare(index: int) -> tuple[Transform, list[Tensor]]:
        chosen = choose(sides(index))
        return chosen, [_bytes(*side, chosen) for side in sides(index)]

    def pixels(index: int) -> int:
        return sum(pixel_count(image) for image, _ in sides(index) if not isinstance(image, Tensor))

    workers = min(cpu_count(), len(images))
    prepared = prepare_ahead(range(len(images)), prepare, pixels, workers=workers, ahead=ahead)
    for index, (chosen, pair) in enumerate(prepared):
        # Tensors are transformed here: the threads know nothing of the caller's gradients.
        yield [
            _normalized(image, side[None].to(device), chosen)[0]
            for (image, _), side in zip(sides(index), pair, strict=True)
        ]


def _check_smallest(sides: _Sides, sizes: Sequence[tuple[int, int]], smallest: int) -> None:
    for (image, name), (width, height) in zip(sides, sizes, strict=True):
        if min(width, height) < smallest:
            raise ImageError(
                f"{image_name(name, image)} is {width}x{height}, and each side must have at least "
                f"{smallest} pixels"
            )


def _of_two_sizes(sides: _Sides, first: tuple[int, int], second: tuple[int, int]) -> str:
    """Say which pictures differ in size."""
    named = [
        f"{image_name(name, image)} is {width}x{height}"
        for (image, name), (width, height) in zip(sides, (first, second), strict=True)
    ]
    return f"resize one of them: {' and '.join(named)}, and only pictures of one size can be compared"


def _bytes(image: CheckedImage, name: str, transform: Transform) -> Tensor:
    """Return what the transform makes of a picture, and a tensor as it is."""
    return image if isinstance(image, Tensor) else transform.from_pil(open_image(image, name))


def _normalized(image: CheckedImage, pixels: Tensor, transform: Transform) -> Tensor:
    """Return the pixels ``[1, 3, H, W]`` of a picture, which is transformed already, or of a tensor."""
    if isinstance(image, Tensor):
        return tensor_pixels(pixels, transform)
    return normalize_(pixels, transform)


def _stacked(pairs: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = (torch.stack(side) for side in zip(*pairs, strict=True))
    return first, second

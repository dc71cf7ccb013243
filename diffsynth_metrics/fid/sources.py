"""Where images come from, and their way to the network: found, decoded and resized ahead of it.

A source is a folder, images as every metric takes them, or anything that yields these, such as a
generator or a DataLoader. Of the latter, a few batches are in memory at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.fid.preprocessing import Prepare
from diffsynth_metrics.folders import image_files
from diffsynth_metrics.inputs import (
    CheckedImage,
    ImagesInput,
    as_images,
    as_pil,
    is_one_image,
    open_image,
    pixel_count,
)
from diffsynth_metrics.pixels.batches import prepare_ahead
from diffsynth_metrics.pixels.resizing import cpu_count

__all__ = [
    "ImageReader",
    "ImageSource",
    "OnError",
    "choose_workers",
]

ImageSource: TypeAlias = "ImagesInput | Iterable[Any]"
"""A folder, images, or an iterable of images or of batches of them."""

OnError = Literal["raise", "skip"]

logger = logging.getLogger(__name__)


def choose_workers(num_workers: int | None) -> int:
    """Return the number of threads, or for None one per core and at most 8.

    Raises:
        ValueError: It is not an int of at least 0.
    """
    if num_workers is None:
        return min(cpu_count(), 8)
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f"num_workers must be an int of at least 0, got {num_workers!r}")
    return num_workers


class ImageReader:
    """The images of a source as batches of network inputs, in order; iterate once.

    Worker threads decode and resize at most two batches ahead of the consumer, bounded by pixels in
    flight, so memory does not grow with the number of images.

    Attributes:
        preprocessing: What is done to each image.
        skipped: How many images could not be read so far, with ``on_error="skip"``.
        total: How many images there are, skipped ones included, or None where only the end will tell.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Prepare,
        *,
        batch_size: int,
        num_workers: int,
        on_error: OnError,
        progress: str | None = None,
    ) -> None:
        """Find the images; nothing is decoded yet.

        Args:
            source: Where images come from.
            preprocessing: What is done to each.
            batch_size: The largest batch.
            num_workers: Number of threads; 0 works in the caller's thread.
            on_error: What to do with an image that is absent, invalid or cannot be read.
            progress: Title of the progress bar, or None for no bar.

        Raises:
            TypeError: It is no source of images.
            ValueError: There are none.
            FileNotFoundError: A path does not exist.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.skipped = 0
        self.preprocessing = preprocessing
        self._batch_size = batch_size
        self._workers = num_workers
        self._on_error = on_error
        self._progress = progress
        self._images, self.total = _open_source(source, on_error)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield float32 ``[B, S, S, 3]`` with B at most the batch size.

        Raises:
            ImageError: An image cannot be read; the message names it.
        """
        # Without a terminal, tqdm stays silent.
        disable = None if self._progress else True
        batch: list[np.ndarray] = []
        with tqdm(total=self.total, desc=self._progress, unit="image", disable=disable) as bar:
            for prepared in self._in_order():
                bar.update()
                if isinstance(prepared, ImageError):
                    self.skipped += 1
                    logger.warning("skipped: %s", prepared)
                    continue
                batch.append(prepared)
                if len(batch) == self._batch_size:
                    yield np.stack(batch)
                    batch = []
        if batch:
            yield np.stack(batch)

    def _in_order(self) -> Iterator[np.ndarray | ImageError]:
        return prepare_ahead(
            self._images, self._prepare, _pixels, workers=self._workers, ahead=2 * self._batch_size
        )

    def _prepare(self, named: _Named) -> np.ndarray | ImageError:
        name, image = named
        if isinstance(image, ImageError):
            return image
        try:
            return self.preprocessing(open_image(image, name))
        except ImageError as error:
            if self._on_error == "raise":
                raise
            return error


_Named = tuple[str, "PIL.Image.Image | Path | bytes | ImageError"]
"""How messages call an image, and the image, or what is wrong with it."""


def _pixels(named: _Named) -> int:
    return 0 if isinstance(named[1], ImageError) else pixel_count(named[1])


def _open_source(source: ImageSource, on_error: OnError) -> tuple[Iterator[_Named], int | None]:
    """Return the images of a source with names for messages, and their number if it is known."""
    if isinstance(source, (str, os.PathLike)):
        folder = source if os.path.exists(source) else os.path.expanduser(source)
        # A name that does not exist is a mistyped folder rather than an image to skip.
        if not os.path.exists(folder):
            raise FileNotFoundError(f"there is no folder {os.fspath(folder)!r}")
        source = image_files(folder) if os.path.isdir(folder) else as_images(folder)
    if is_one_image(source) or isinstance(source, (np.ndarray, torch.Tensor, Sequence)):
        images = _check(cast(ImagesInput, source), on_error)
        return _named(images), len(images)
    if not isinstance(source, Iterable) or isinstance(source, (dict, set)):
        raise TypeError(
            "images must be a folder, an image, a list of images, an iterable of these, "
            f"or statistics; got {type(source).__name__}"
        )
    return _from_batches(source, on_error), None


def _from_batches(batches: Iterable[Any], on_error: OnError) -> Iterator[_Named]:
    for number, batch in enumerate(batches):
        try:
            images = _check(_without_labels(batch), on_error, f"batch {number}, ")
        except (ImageError, TypeError, ValueError, FileNotFoundError) as error:
            raise type(error)(f"batch {number}: {error}") from error
        for name, image in _named(images, f"batch {number}, "):
            if isinstance(image, PIL.Image.Image):
                try:
                    # Its own copy: the generator may draw on it or close it before a worker reads it.
                    image = open_image(image, name).copy()
                except ImageError as error:
                    if on_error == "raise":
                        raise
                    image = error
            yield name, image


def _without_labels(batch: Any) -> Any:
    """Return the images of what a DataLoader makes of a dataset with labels."""
    if not isinstance(batch, (tuple, list)) or not batch or getattr(batch[0], "ndim", 0) != 4:
        return batch
    if any(getattr(other, "ndim", 0) == 4 for other in batch[1:]):
        raise TypeError("it holds several tensors of images; yield one tensor of images per batch")
    return batch[0]


def _check(images: ImagesInput, on_error: OnError, batch: str = "") -> Sequence[Any]:
    """Return the checked images; to skip, with an error in the place of every image that has one."""
    try:
        return cast(Sequence[Any], as_images(images))
    except (ImageError, FileNotFoundError):
        if on_error == "raise":
            raise
    items: Any = [images] if is_one_image(images) else images
    return [_check_one(item, f"image {index}", batch) for index, item in enumerate(items)]


def _check_one(image: Any, name: str, batch: str) -> CheckedImage | ImageError:
    try:
        return as_images([image])[0]
    except (ImageError, FileNotFoundError) as error:
        return ImageError(str(error).replace("image 0", f"{batch}{name}", 1))
    except TypeError as error:  # nothing that a picture could be: a mistake in the caller's code
        raise TypeError(str(error).replace("image 0", name, 1)) from error


def _named(images: Sequence[Any], batch: str = "") -> Iterator[_Named]:
    return ((f"{batch}image {index}", _as_pil(images[index])) for index in range(len(images)))


def _as_pil(image: CheckedImage | ImageError) -> PIL.Image.Image | Path | bytes | ImageError:
    """Turn a tensor ``[3, H, W]`` into what it would be in a file: floats are rounded to bytes.

    It is a copy, so the caller may write to the tensor before a worker has read it.
    """
    return as_pil(image) if isinstance(image, torch.Tensor) else image

"""Named preprocessings: a picture of any size to the input of FID's network, as each package does it.

The resize decides the number: the same pictures differ by up to 9 % between these five.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import PIL.Image

from diffsynth_metrics.inputs import as_rgb
from diffsynth_metrics.pixels.resizing import STRIP_PIXELS, columns_first, strips

__all__ = ["PREPROCESSINGS", "Normalized", "Prepare", "Preprocessing", "find_preprocessing"]

_SIZE = (299, 299)
_Resampling = PIL.Image.Resampling


class Prepare(Protocol):
    """What is done to each picture of a set, under a name that belongs to the number."""

    @property
    def name(self) -> str:
        """What results are labelled with."""

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """Map a loaded image of any mode to a network's input, float32 ``[S, S, 3]``."""


@dataclass(frozen=True)
class Normalized:
    """Resize a picture in bytes, and normalise its channels.

    Attributes:
        name: What results are labelled with.
        resize: Maps an RGB image to an RGB image of the network's size.
        mean: Mean per channel, for pixels in 0..1.
        std: Standard deviation per channel, for pixels in 0..1.
    """

    name: str
    resize: Callable[[PIL.Image.Image], PIL.Image.Image]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """Map a loaded image of any mode to the network's input, float32 ``[S, S, 3]``."""
        pixels: np.ndarray = np.asarray(self.resize(as_rgb(image)), dtype=np.float32) / 255
        pixels -= np.array(self.mean, dtype=np.float32)
        pixels /= np.array(self.std, dtype=np.float32)
        return pixels


@dataclass(frozen=True)
class Preprocessing:
    """How a package resizes a picture to 299 x 299, whatever its shape, and scales it to about -1..1.

    Attributes:
        name: What results are labelled with.
        resize: Maps an RGB image to float32 ``[299, 299, 3]`` in 0..255.
        centre: The value in 0..255 that becomes 0; it is also the scale.
    """

    name: str
    resize: Callable[[PIL.Image.Image], np.ndarray]
    centre: float

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """Map a loaded image of any mode to the network's input, float32 ``[299, 299, 3]``.

        Every package converts to RGB first; alpha is dropped.
        """
        pixels = self.resize(as_rgb(image))
        pixels -= np.float32(self.centre)
        pixels /= np.float32(self.centre)
        return pixels


def _bicubic_float(image: PIL.Image.Image) -> np.ndarray:
    pixels = _resize_channels(image, _Resampling.BICUBIC)
    np.clip(pixels, 0, 255, out=pixels)
    return pixels


def _bicubic_bytes(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image.resize(_SIZE, _Resampling.BICUBIC), dtype=np.float32)


def _bilinear_antialiased(image: PIL.Image.Image) -> np.ndarray:
    return _resize_channels(image, _Resampling.BILINEAR)


def _resize_channels(image: PIL.Image.Image, resampling: PIL.Image.Resampling) -> np.ndarray:
    """Resize each channel as floats, so that nothing is rounded to bytes on the way.

    This is ``channel.convert("F").resize((299, 299), resampling)`` to the bit, without the whole picture
    in floats: Pillow's first pass goes strip by strip.
    """
    by_columns = columns_first(image.height, image.width, *_SIZE)
    between = (image.width, 299) if by_columns else (299, image.height)
    channels = [PIL.Image.new("F", between) for _ in range(3)]
    for corner, strip in strips(image, of_columns=by_columns):
        size = (strip.width, 299) if by_columns else (299, strip.height)
        for channel, part in zip(channels, strip.split(), strict=True):
            channel.paste(part.convert("F").resize(size, resampling), corner)
    return np.stack([np.asarray(channel.resize(_SIZE, resampling)) for channel in channels], axis=-1)


def _bilinear(image: PIL.Image.Image) -> np.ndarray:
    """Interpolate between the two nearest pixels, as torch does: pixels are areas."""
    return _interpolate(
        image,
        *(
            np.maximum((np.arange(299) + 0.5) * (length / 299) - 0.5, 0).astype(np.float32)
            for length in (image.height, image.width)
        ),
    )


def _bilinear_tensorflow(image: PIL.Image.Image) -> np.ndarray:
    """Interpolate between the two nearest pixels, as TensorFlow 1 does: pixels are corner points."""
    return _interpolate(
        image,
        *(
            np.arange(299, dtype=np.float32) * np.float32(length / 299)
            for length in (image.height, image.width)
        ),
    )


def _interpolate(image: PIL.Image.Image, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Read an RGB image at fractional rows and columns: float32 ``[299, 299, 3]``."""
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    bottom = np.minimum(top + 1, image.height - 1)
    right = np.minimum(left + 1, image.width - 1)
    down = (rows - top.astype(np.float32))[:, None, None]
    across = (columns - left.astype(np.float32))[:, None]

    def along(lines: np.ndarray) -> np.ndarray:
        first = lines[:, left].astype(np.float32)
        between: np.ndarray = first + (lines[:, right].astype(np.float32) - first) * across
        return between

    parts = []
    for part in np.array_split(np.arange(299), min(299, 1 + image.width * image.height // STRIP_PIXELS)):
        start, stop = top[part[0]], bottom[part[-1]] + 1
        pixels = np.asarray(image.crop((0, start, image.width, stop)))
        upper = along(pixels[top[part] - start])
        parts.append(upper + (along(pixels[bottom[part] - start]) - upper) * down[part])
    return np.concatenate(parts)


PREPROCESSINGS = {
    preprocessing.name: preprocessing
    for preprocessing in (
        Preprocessing("clean", _bicubic_float, 128),
        Preprocessing("pytorch-fid", _bilinear, 127.5),
        Preprocessing("torch-fidelity", _bilinear_tensorflow, 128),
        Preprocessing("torchmetrics", _bilinear_antialiased, 128),
        Preprocessing("diffsynth", _bicubic_bytes, 127.5),
    )
}
"""Name of a preprocessing to what it does; each equals the package that it is named after."""


def find_preprocessing(name: str, known: Mapping[str, Prepare] = PREPROCESSINGS) -> Prepare:
    """Return the preprocessing of that name.

    Raises:
        ValueError: There is none; the message lists the names.
    """
    if name not in known:
        raise ValueError(f"preprocessing must be one of {', '.join(known)}; got {name!r}")
    return known[name]

"""Named preprocessings: a picture of any size to the input of FID's network, as each package does it.

The resize decides the number: the same pictures differ by up to 9 % between these five.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image

from diffsynth_metrics.inputs import as_rgb

__all__ = ["PREPROCESSINGS", "Preprocessing", "find_preprocessing"]

_SIZE = (299, 299)
_Resampling = PIL.Image.Resampling


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

        Every package converts to RGB first; alpha is dropped, 16-bit values above 255 become 255.
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
    """Resize each channel as floats, so that nothing is rounded to bytes on the way."""
    channels = [channel.convert("F").resize(_SIZE, resampling) for channel in image.split()]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def _bilinear(image: PIL.Image.Image) -> np.ndarray:
    """Interpolate between the two nearest pixels, as torch does: pixels are areas."""
    return _interpolate(
        np.asarray(image),
        *(
            np.maximum((np.arange(299) + 0.5) * (length / 299) - 0.5, 0).astype(np.float32)
            for length in (image.height, image.width)
        ),
    )


def _bilinear_tensorflow(image: PIL.Image.Image) -> np.ndarray:
    """Interpolate between the two nearest pixels, as TensorFlow 1 does: pixels are corner points."""
    return _interpolate(
        np.asarray(image),
        *(
            np.arange(299, dtype=np.float32) * np.float32(length / 299)
            for length in (image.height, image.width)
        ),
    )


def _interpolate(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Read bytes ``[H, W, 3]`` at fractional rows and columns: float32 ``[299, 299, 3]``."""
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    bottom = np.minimum(top + 1, pixels.shape[0] - 1)
    right = np.minimum(left + 1, pixels.shape[1] - 1)
    down = (rows - top.astype(np.float32))[:, None, None]
    across = (columns - left.astype(np.float32))[:, None]

    def along(row: np.ndarray) -> np.ndarray:
        line = pixels[row]
        first = line[:, left].astype(np.float32)
        between: np.ndarray = first + (line[:, right].astype(np.float32) - first) * across
        return between

    upper = along(top)
    between: np.ndarray = upper + (along(bottom) - upper) * down
    return between


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


def find_preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing of that name.

    Raises:
        ValueError: There is none; the message lists the names.
    """
    if name not in PREPROCESSINGS:
        raise ValueError(f"preprocessing must be one of {', '.join(PREPROCESSINGS)}; got {name!r}")
    return PREPROCESSINGS[name]

"""What a caller passes, checked and aligned: prompts with images, each image readable.

Nothing here knows a network. An image leaves this module as one of three things: an open
``PIL.Image.Image``, a ``pathlib.Path`` that exists, or a tensor whose values were checked.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch

from diffsynth_metrics.errors import ImageError

__all__ = [
    "CheckedImages",
    "ImageInput",
    "ImagesInput",
    "SharedImages",
    "as_images",
    "as_pil",
    "as_prompts",
    "as_rgb",
    "extremes",
    "open_image",
    "pair",
    "rounded",
]

ImageInput: TypeAlias = "PIL.Image.Image | str | os.PathLike[str] | np.ndarray | torch.Tensor"
"""One image: PIL, a path, an array ``[H, W, 3]`` uint8, or a tensor ``[3, H, W]``."""

ImagesInput: TypeAlias = "ImageInput | Sequence[ImageInput]"
"""One image or several; a tensor ``[N, 3, H, W]`` or an array ``[N, H, W, 3]`` is several."""

CheckedImages: TypeAlias = "list[PIL.Image.Image | Path | torch.Tensor] | torch.Tensor | SharedImages"
"""Several images after checking: a list, one tensor ``[N, 3, H, W]``, or either of them shared."""

_EXPECTED = (
    "a PIL image, a path, a uint8 array [H, W, 3], "
    "or a tensor [3, H, W] (uint8 in 0..255 or float in 0..1)"
)

# Pillow's convert("RGB") cuts floats to whole numbers, which makes a picture in 0..1 black, and does not
# know premultiplied gray.
_NOT_PICTURES = {"F": "it is not known what range its values have", "La": "Pillow cannot make it RGB"}

# Pillow decodes a lazily opened image on first use, and two threads that do so at once with the same
# object corrupt it. A fixed set of locks keeps different images parallel.
_DECODE_LOCKS = [threading.Lock() for _ in range(64)]


class SharedImages(Sequence[Any]):
    """Images that several metrics score in turn: checked once, prepared once for each transform.

    It keeps pixels that another metric may want until it is dropped, so it is made for one call, by one
    thread.

    Attributes:
        checked: What :func:`as_images` made of the images.
    """

    def __init__(self, images: ImagesInput, transforms: Iterable[Hashable] = ()) -> None:
        """Check the images, see :func:`as_images`; keep pixels for what is in `transforms` twice."""
        checked = as_images(images)
        self.checked: list[PIL.Image.Image | Path | torch.Tensor] | torch.Tensor = (
            checked.checked if isinstance(checked, SharedImages) else checked
        )
        self._wanted = Counter(transforms)
        self._prepared: dict[Hashable, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.checked)

    def __getitem__(self, index: Any) -> Any:
        return self.checked[index]

    def keeps(self, transform: object) -> bool:
        """Tell whether more than one metric wants the pixels of a transform."""
        return self._wanted[transform] > 1

    def prepared(self, key: Hashable, prepare: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what was prepared under this key, and prepare it the first time."""
        if key not in self._prepared:
            self._prepared[key] = prepare()
        return self._prepared[key]


def as_prompts(prompt: str | Sequence[str]) -> list[str]:
    """Return the prompts as a list.

    Args:
        prompt: One prompt or a sequence of prompts. The empty string is a valid prompt.

    Raises:
        TypeError: A prompt is not a ``str``; the message gives its position.
        ValueError: The sequence is empty, or a prompt holds half of a surrogate pair.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, Sequence):
        raise TypeError(
            f"prompt must be a str or a list of str, got {type(prompt).__name__}; "
            "the order of the arguments is (prompt, images)"
        )
    if not prompt:
        raise ValueError("prompt is an empty list; pass at least one prompt")
    try:
        "".join(prompt).encode()  # all at once, which Python does much faster than one by one
    except (TypeError, UnicodeEncodeError):
        for index, item in enumerate(prompt):
            _check_prompt(item, f"prompt {index}")
    return list(prompt)


def as_images(images: ImagesInput) -> CheckedImages:
    """Check images and return them as a sequence.

    Args:
        images: One image or several, see :data:`ImagesInput`.

    Returns:
        A list of PIL images, existing paths and tensors ``[3, H, W]``, or the tensor
        ``[N, 3, H, W]`` that was passed. Tensors keep their device, dtype and graph.

    Raises:
        TypeError: An element is not an image, or its dtype is not one that a picture has.
        ValueError: There is no image.
        ImageError: Wrong number of channels, a float outside 0..1, NaN.
        FileNotFoundError: A path does not exist.
    """
    if isinstance(images, SharedImages):
        return images
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        _check_tensor(images, "images")
        return images
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    elif isinstance(images, (PIL.Image.Image, str, os.PathLike, np.ndarray, torch.Tensor)):
        images = [images]
    if not isinstance(images, Sequence):
        raise TypeError(
            f"images must be {_EXPECTED}, or a list of these (not an iterator); "
            f"got {type(images).__name__}"
        )
    if not images:
        raise ValueError("images is empty; pass at least one image")
    return [_as_image(image, f"image {index}") for index, image in enumerate(images)]


def pair(prompt: str | Sequence[str], images: ImagesInput) -> tuple[list[str], CheckedImages, int]:
    """Align prompts with images.

    One prompt (a ``str``) goes with every image, and one image (not in a list) with every prompt;
    otherwise there must be as many prompts as images.

    Returns:
        The prompts (1 or N), the images (1 or N) and N, the number of pairs.

    Raises:
        ValueError: The numbers differ; the message gives both.
    """
    prompts, checked = as_prompts(prompt), as_images(images)
    count = max(len(prompts), len(checked))
    prompts_fit = len(prompts) == count or isinstance(prompt, str)
    images_fit = len(checked) == count or _is_single_image(images)
    if not (prompts_fit and images_fit):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(checked)} images; pass one prompt (a str) for all "
            "images, one image (not in a list) for all prompts, or as many prompts as images"
        )
    return prompts, checked, count


def open_image(image: PIL.Image.Image | Path, name: str) -> PIL.Image.Image:
    """Decode an image, in its own mode.

    Args:
        image: A PIL image of any mode, or a path. The first frame of an animation is read, and the
            EXIF orientation is not applied, as in the official pipelines.
        name: How error messages call the image.

    Raises:
        ImageError: The file is not an image, or is truncated, or Pillow has no RGB for its mode.
    """
    try:
        if isinstance(image, Path):
            opened: PIL.Image.Image
            with PIL.Image.open(image) as opened:
                opened.load()
        else:
            opened = image
            with _DECODE_LOCKS[id(image) // 64 % len(_DECODE_LOCKS)]:
                image.load()
    except Exception as error:  # Pillow's decoders raise nearly anything, even AssertionError
        where = image if isinstance(image, Path) else getattr(image, "filename", "") or repr(image)
        raise ImageError(f"{name} ({where}) cannot be read: {str(error) or repr(error)}") from error
    if opened.mode in _NOT_PICTURES:
        raise ImageError(
            f"{name} has mode {opened.mode!r}: {_NOT_PICTURES[opened.mode]}; convert it first"
        )
    return opened


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an image in RGB, not to be written to: itself if it is RGB, which convert() would copy."""
    return image if image.mode == "RGB" else image.convert("RGB")


def rounded(pixels: torch.Tensor) -> torch.Tensor:
    """Return checked pixels of any shape as the bytes that a file would have, without a gradient."""
    pixels = pixels.detach()
    if pixels.dtype == torch.uint8:
        return pixels
    # float32 holds every product exactly enough; half precision would round it twice.
    return pixels.float().mul(255).round_().to(torch.uint8)


def as_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    """Return a copy of checked pixels ``[3, H, W]`` as the picture that a file would have."""
    return PIL.Image.fromarray(np.array(rounded(pixels).permute(1, 2, 0).cpu().numpy()))


def _check_prompt(prompt: object, name: str) -> None:
    if not isinstance(prompt, str):
        raise TypeError(
            f"{name} must be a str, got {type(prompt).__name__}; "
            "the order of the arguments is (prompt, images)"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from error


def _is_single_image(images: ImagesInput) -> bool:
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim == 3
    return isinstance(images, (PIL.Image.Image, str, os.PathLike))


def _as_image(image: object, name: str) -> PIL.Image.Image | Path | torch.Tensor:
    if isinstance(image, PIL.Image.Image):
        if 0 in image.size:
            raise ImageError(f"{name}: an image must have pixels, got size {image.width}x{image.height}")
        return image
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        # Path.is_file() raises where the name is too long, as that of a misplaced prompt is.
        if not os.path.isfile(path):
            if os.path.isdir(path):
                raise FileNotFoundError(
                    f"{name}: {os.fspath(image)!r} is a folder; pass its files, such as "
                    "sorted(pathlib.Path(folder).glob('*.png'))"
                )
            raise FileNotFoundError(f"{name}: there is no file {os.fspath(image)!r}")
        return path
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"{name}: an array must be uint8 [H, W, 3], got dtype {image.dtype}")
        if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise ImageError(f"{name}: an array must be [H, W, 3], got shape {list(image.shape)}")
        return PIL.Image.fromarray(image)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3:
            raise ImageError(f"{name}: a tensor must be [3, H, W], got shape {list(image.shape)}")
        _check_tensor(image[None], name)
        return image
    raise TypeError(f"{name} must be {_EXPECTED}; got {type(image).__name__}")


def _check_tensor(images: torch.Tensor, name: str) -> None:
    """Check a tensor ``[N, 3, H, W]``; an error names the first image that is wrong."""
    if len(images) == 0:
        raise ValueError(f"{name} is empty (shape {list(images.shape)}); pass at least one image")
    if images.shape[1] != 3 or 0 in images.shape:
        raise ImageError(
            f"{name}: a tensor must be [3, H, W] or [N, 3, H, W], got shape {list(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise TypeError(f"{name}: a tensor must be uint8 in 0..255 or float in 0..1, got {images.dtype}")
    if _in_range(images):  # all at once, which torch does much faster than one by one
        return
    index = next(index for index, image in enumerate(images) if not _in_range(image))
    low, high = (float(value) for value in extremes(images[index]))
    which = f"image {index}" if name == "images" else name
    raise ImageError(
        f"{which}: a float tensor must lie in 0..1, got values from {low:.8g} to {high:.8g}; clamp it, "
        "or pass uint8 for 0..255"
    )


def _in_range(values: torch.Tensor) -> bool:
    low, high = extremes(values)
    # NaN, for which every comparison is false, is not in the range.
    return bool((low >= 0) & (high <= 1))


def extremes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and the highest value, without gradients; both are NaN where there is one."""
    values = values.detach()
    if values.device.type == "cpu" and values.is_contiguous():
        low, high = values.aminmax()  # one pass where reading takes the time; it copies other layouts
        return low, high
    return values.amin(), values.amax()

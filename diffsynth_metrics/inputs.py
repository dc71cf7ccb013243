"""What a caller passes, checked and aligned: prompts with images, each image readable.

Nothing here knows a network. An image leaves this module as one of four things: a
``PIL.Image.Image``, a ``pathlib.Path`` that exists, the bytes of an encoded picture, or a tensor whose
values were checked. docs/images.md says how pictures are read.
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import PIL.Image
import torch

from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.folders import pair_folders

__all__ = [
    "CheckedImage",
    "CheckedImages",
    "ImageInput",
    "ImagesInput",
    "ReferencesInput",
    "SharedImages",
    "as_images",
    "as_pil",
    "as_prompts",
    "as_rgb",
    "extremes",
    "group_references",
    "image_name",
    "image_size",
    "is_one_image",
    "open_image",
    "pair",
    "pair_references",
    "pixel_count",
    "rounded",
]

ImageInput: TypeAlias = (
    "PIL.Image.Image | str | os.PathLike[str] | bytes | IO[bytes] | np.ndarray | torch.Tensor"
)
"""One image: PIL, a path, an encoded picture as bytes or as a binary file object, an array ``[H, W, 3]``
(uint8, or float in 0..1), or a tensor ``[3, H, W]`` (uint8, or float in 0..1)."""

ImagesInput: TypeAlias = "ImageInput | Sequence[ImageInput]"
"""One image or several; a tensor ``[N, 3, H, W]`` or an array ``[N, H, W, 3]`` is several."""

ReferencesInput: TypeAlias = "ImagesInput | Sequence[Sequence[ImageInput]]"
"""One reference for all images or one for each; or a list of several for each image, or for all."""

CheckedImage: TypeAlias = "PIL.Image.Image | Path | bytes | torch.Tensor"
"""One image after checking; bytes are those of an encoded picture."""

CheckedImages: TypeAlias = "list[CheckedImage] | torch.Tensor | SharedImages"
"""Several images after checking: a list, one tensor ``[N, 3, H, W]``, or either of them shared."""

_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EXPECTED = (
    "a PIL image, a path, bytes or a binary file object of an encoded picture, an array [H, W, 3] "
    "(uint8 in 0..255 or float in 0..1), or a tensor [3, H, W] (uint8 in 0..255 or float in 0..1)"
)

_UNKNOWN_RANGE = "it is not known what range its values have"

# Pillow's convert("RGB") cuts floats to whole numbers and clips both at 255, which makes a picture in
# 0..1 black and one in 0..65535 white; it does not know premultiplied gray.
_NOT_PICTURES = {"F": _UNKNOWN_RANGE, "I": _UNKNOWN_RANGE, "La": "Pillow cannot make it RGB"}

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Pillow decodes a lazily opened image on first use, and two threads that do so at once with the same
# object corrupt it. Several locks, because with one a list of such images would be decoded one by one.
_DECODE_LOCKS = [threading.Lock() for _ in range(16)]


def _open_decode_locks() -> None:
    """Forget who holds them: a forked child has no other threads, and would wait for ever."""
    _DECODE_LOCKS[:] = [threading.Lock() for _ in _DECODE_LOCKS]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_decode_locks)


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
        self.checked: list[CheckedImage] | torch.Tensor = (
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
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
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
        images: One image or several, see :data:`ImagesInput`. A ``~`` at the beginning of a path is the
            home folder. File objects are read from their beginning to their end, and not closed.

    Returns:
        A list of PIL images, existing paths, bytes and tensors ``[3, H, W]``, or a tensor
        ``[N, 3, H, W]``. Tensors keep their device, dtype and graph; float arrays become tensors.

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
    elif is_one_image(images) or isinstance(images, (np.ndarray, torch.Tensor)):
        images = [images]  # type: ignore[list-item]
    if not isinstance(images, Sequence):
        raise TypeError(
            f"images must be {_EXPECTED}, or a list of these (not an iterator); "
            f"got {type(images).__name__}"
        )
    if not images:
        raise ValueError("images is empty; pass at least one image")
    return [_as_image(image, f"image {index}") for index, image in enumerate(images)]


def is_one_image(images: object) -> bool:
    """Tell whether this is one image, and not several nor something else."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim == 3
    encoded = (str, os.PathLike, bytes, bytearray, memoryview)
    return isinstance(images, (PIL.Image.Image, *encoded)) or hasattr(images, "read")


def pair(prompt: str | Sequence[str], images: ImagesInput) -> tuple[list[str], CheckedImages, int]:
    """Align prompts with images.

    One prompt (a ``str``) goes with every image, and one image (not in a list) with every prompt;
    otherwise there must be as many prompts as images.

    Returns:
        The prompts (1 or N), the images (1 or N) and N, the number of pairs.

    Raises:
        ValueError: The numbers differ; the message gives both.
        TypeError, ImageError, FileNotFoundError: As :func:`as_prompts` and :func:`as_images`.
    """
    prompts = as_prompts(prompt)
    try:
        checked = as_images(images)
    except FileNotFoundError as error:
        if not (prompts[0].lower().endswith(_PICTURE_SUFFIXES) or os.path.isfile(prompts[0])):
            raise
        raise FileNotFoundError(
            f"the order of the arguments is (prompt, images), and prompt 0 is {prompts[0]!r}; {error}"
        ) from None
    count = max(len(prompts), len(checked))
    prompts_fit = len(prompts) == count or isinstance(prompt, str)
    images_fit = len(checked) == count or is_one_image(images)
    if not (prompts_fit and images_fit):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(checked)} images; pass one prompt (a str) for all "
            "images, one image (not in a list) for all prompts, or as many prompts as images"
        )
    return prompts, checked, count


def pair_references(reference: ImagesInput, images: ImagesInput) -> tuple[CheckedImages, CheckedImages]:
    """Align reference images with images, or two folders by the names of their files.

    Returns:
        As many references as images.

    Raises:
        ValueError: The numbers differ, or the files of two folders do not pair.
        TypeError, ImageError, FileNotFoundError: As :func:`as_images`.
    """
    folders = [_as_folder(side) for side in (reference, images)]
    if folders[0] and folders[1]:
        reference, images = pair_folders(*folders)
    elif any(folders):
        raise ValueError("a folder is paired with a folder; pass two of them, or lists of images")
    references, checked = as_images(reference), as_images(images)
    if len(references) != len(checked) and is_one_image(reference):
        references = [references[0]] * len(checked)
    if len(references) != len(checked):
        raise ValueError(
            f"got {len(references)} reference images and {len(checked)} images; pass as many of both, "
            "or one reference (not in a list) for all images"
        )
    return references, checked


def group_references(
    reference: ReferencesInput, images: ImagesInput
) -> tuple[CheckedImages, list[int], CheckedImages]:
    """Align several references per image with images; without nesting as :func:`pair_references` does.

    Args:
        reference: As in :func:`pair_references`, or a list of lists: the references of each image, or
            one list of them for all images.
        images: As in :func:`pair_references`.

    Returns:
        All references, one group behind the other; how many there are in each group; the images. There
        are as many groups as images, or one, which is that of every image.

    Raises:
        ValueError: The numbers differ, or a group is empty; the message names it.
        TypeError, ImageError, FileNotFoundError: As :func:`as_images`.
    """
    nested = isinstance(reference, (list, tuple)) and not any(map(is_one_image, reference))
    if not nested or not len(reference):  # type: ignore[arg-type]
        references, checked = pair_references(reference, images)  # type: ignore[arg-type]
        return references, [1] * len(checked), checked
    groups: list[list[CheckedImage]] = []
    for index, group in enumerate(reference):  # type: ignore[arg-type]
        try:
            groups.append(list(as_images(group)))
        except (ImageError, TypeError, ValueError, FileNotFoundError) as error:
            raise type(error)(f"references of image {index}: {error}") from error
    checked = as_images(images)
    if len(groups) not in (1, len(checked)):
        raise ValueError(
            f"got references for {len(groups)} images and {len(checked)} images; pass a list of "
            "references for each image, or [[a, b, c]] for all images"
        )
    return [image for group in groups for image in group], [*map(len, groups)], checked


def _as_folder(images: object) -> str:
    """Return the path of a folder, or nothing for anything else."""
    if not isinstance(images, (str, os.PathLike)):
        return ""
    path = os.path.expanduser(os.fspath(images))
    return str(path) if os.path.isdir(path) else ""


def image_name(position: str, image: object) -> str:
    """Return how errors call an image: by its position and, where it has one, its file.

    Args:
        position: Such as ``"image 44"``.
        image: A PIL image, a path, or anything else, which has no file.

    Returns:
        Such as ``"image 44 (folder/x.png)"``.
    """
    file = image if isinstance(image, Path) else getattr(image, "filename", "")
    return f"{position} ({file})" if file else position


def pixel_count(image: PIL.Image.Image | Path | bytes) -> int:
    """Return how many pixels an image has, without decoding it; 0 where :func:`open_image` will fail."""
    if isinstance(image, PIL.Image.Image):
        return image.width * image.height
    try:
        opened: PIL.Image.Image
        with PIL.Image.open(_file(image)) as opened:
            return opened.width * opened.height
    except Exception:  # open_image meets it again and says which image it is
        return 0


def image_size(image: CheckedImage, name: str) -> tuple[int, int]:
    """Return width and height of an image, without decoding it.

    Raises:
        ImageError: It cannot be read; the message names it and its file.
    """
    if isinstance(image, torch.Tensor):
        return image.shape[-1], image.shape[-2]
    if isinstance(image, PIL.Image.Image):
        return image.size
    try:
        opened: PIL.Image.Image
        with PIL.Image.open(_file(image)) as opened:
            return opened.size
    except Exception:
        return open_image(image, name).size  # which says why it cannot be read


def open_image(image: PIL.Image.Image | Path | bytes, name: str) -> PIL.Image.Image:
    """Decode an image, in its own mode, but 16 bits of grey as 8.

    Args:
        image: A PIL image of any mode, a path, or an encoded picture. The first frame of an animation
            is read, and the EXIF orientation is not applied, as in the official pipelines.
        name: How error messages call the image, such as ``"image 44"``; they add its file.

    Raises:
        ImageError: The file is not an image, or is truncated, or it is not known what its values mean.
    """
    name = image_name(name, image)
    try:
        if isinstance(image, PIL.Image.Image):
            opened = image
            with _DECODE_LOCKS[id(image) // 64 % len(_DECODE_LOCKS)]:
                if getattr(image, "tile", None) and getattr(image, "fp", None) is None:
                    raise ValueError("it was closed before it was decoded")
                image.load()
        else:
            with PIL.Image.open(_file(image)) as opened:
                opened.load()
    except Exception as error:  # Pillow's decoders raise nearly anything, even AssertionError
        problem = str(error) or repr(error)
        if isinstance(image, bytes) and isinstance(error, PIL.UnidentifiedImageError):
            problem = f"its {len(image)} bytes are no picture that Pillow knows"
        raise ImageError(f"{name} cannot be read: {problem}") from error
    # Portable grey maps of more than 8 bits are mode I, and Pillow has brought them to 0..65535.
    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM"):
        return _without_low_byte(opened)
    if opened.mode in _NOT_PICTURES:
        raise ImageError(
            f"{name} has mode {opened.mode!r}: {_NOT_PICTURES[opened.mode]}; convert it first"
        )
    return opened


def _file(image: Path | bytes) -> Path | IO[bytes]:
    return image if isinstance(image, Path) else io.BytesIO(image)


def _without_low_byte(image: PIL.Image.Image) -> PIL.Image.Image:
    """Bring grey of 16 bits to mode L.

    Pillow's ``convert`` would clip it at 255, so that nearly everything becomes white. Leaving out the
    low byte is what Pillow does with 16-bit RGB, OpenCV with both, and scikit-image's ``img_as_ubyte``;
    what was made 16-bit by a factor of 256 or 257 comes back as it was.
    """
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # Pillow does not scale TIFF files of 12 bits
    if image.mode not in ("I", "I;16"):
        image = image.convert("I")
    return image.point(lambda value: value / 2 ** (bits - 8)).convert("L")


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


def _as_image(image: object, name: str) -> CheckedImage:
    if isinstance(image, PIL.Image.Image):
        if 0 in image.size:
            raise ImageError(
                f"{image_name(name, image)}: an image must have pixels, got size "
                f"{image.width}x{image.height}"
            )
        return image
    if isinstance(image, (str, os.PathLike)):
        return _as_path(os.fspath(image), name)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, np.ndarray):
        return _as_array(image, name)
    if isinstance(image, torch.Tensor):
        _check_kind(image, name)
        if image.ndim != 3:
            raise ImageError(f"{name}: a tensor must be [3, H, W], got shape {list(image.shape)}")
        _check_tensor(image[None], name)
        return image
    if hasattr(image, "read"):
        return _contents(image, name)
    raise TypeError(f"{name} must be {_EXPECTED}; got {type(image).__name__}")


def _as_path(path: str, name: str) -> Path:
    # Path.is_file() raises where the name is too long, as that of a misplaced prompt is.
    if not os.path.isfile(path):
        path = os.path.expanduser(path)
    if os.path.isfile(path):
        return Path(path)
    if os.path.isdir(path):
        raise FileNotFoundError(
            f"{name}: {path!r} is a folder; pass its files, such as "
            "sorted(pathlib.Path(folder).glob('*.png'))"
        )
    raise FileNotFoundError(f"{name}: there is no file {path!r}")


def _contents(file: Any, name: str) -> bytes:
    """Read a file object from its beginning, as Pillow does: it may have just been written."""
    name = f"{name} ({file.name})" if isinstance(getattr(file, "name", None), str) else name
    try:
        if file.seekable():
            file.seek(0)
        contents = file.read()
    except Exception as error:  # closed, or opened for writing
        raise ImageError(f"{name} cannot be read: {str(error) or repr(error)}") from error
    if not isinstance(contents, bytes):
        raise TypeError(f"{name}: a file object must be opened in binary mode ('rb')")
    return contents


def _as_array(array: np.ndarray, name: str) -> PIL.Image.Image | torch.Tensor:
    if array.dtype.name not in ("uint8", "float16", "float32", "float64"):
        raise TypeError(
            f"{name}: an array must be uint8 in 0..255 or float in 0..1, got dtype {array.dtype}"
        )
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        hint = ""
        if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 1):
            hint = "; a grey picture needs three channels: np.dstack([array] * 3)"
        elif array.ndim == 3 and array.shape[-1] == 4:
            hint = "; leave alpha out: array[..., :3]"
        elif array.ndim == 3 and array.shape[0] == 3:
            hint = "; channels last: array.transpose(1, 2, 0)"
        raise ImageError(f"{name}: an array must be [H, W, 3], got shape {list(array.shape)}{hint}")
    if array.dtype == np.uint8:
        return PIL.Image.fromarray(array)
    # torch takes no array that is read-only, runs backwards or has another byte order than the machine.
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    tensor = torch.from_numpy(native).permute(2, 0, 1)
    _check_tensor(tensor[None], name)
    return tensor


def _check_tensor(images: torch.Tensor, name: str) -> None:
    """Check a tensor ``[N, 3, H, W]``; an error names the first image that is wrong."""
    _check_kind(images, name)
    if len(images) == 0:
        raise ValueError(f"{name} is empty (shape {list(images.shape)}); pass at least one image")
    if images.shape[1] != 3 or 0 in images.shape:
        shape = list(images.shape if name == "images" else images.shape[1:])
        hint = ""
        if images.shape[-1] == 3:
            order = "0, 3, 1, 2" if name == "images" else "2, 0, 1"
            hint = f"; its channels are last: tensor.permute({order})"
        raise ImageError(f"{name}: a tensor must be [3, H, W] or [N, 3, H, W], got shape {shape}{hint}")
    if images.dtype == torch.uint8:
        return
    if _in_range(images):  # all at once, which torch does much faster than one by one
        return
    index = next(index for index, image in enumerate(images) if not _in_range(image))
    which = f"image {index}" if name == "images" else name
    raise ImageError(f"{which}: a float image must lie in 0..1, {_out_of_range(images[index])}")


def _check_kind(images: torch.Tensor, name: str) -> None:
    if images.dtype not in _DTYPES:
        raise TypeError(f"{name}: a tensor must be uint8 in 0..255 or float in 0..1, got {images.dtype}")
    if images.is_nested or images.is_meta or images.layout != torch.strided:
        kind = "nested" if images.is_nested else "on the meta device" if images.is_meta else "sparse"
        raise TypeError(f"{name}: a tensor must be dense and hold values, and this one is {kind}")


def _out_of_range(image: torch.Tensor) -> str:
    """Say what is wrong with values that are not in 0..1, and what would be right where it is known."""
    low, high = (float(value) for value in extremes(image))
    if math.isnan(low):
        return f"it contains NaN ({int(image.isnan().sum())} values)"
    if math.isinf(low) or math.isinf(high):
        return f"it contains infinity ({int(image.isinf().sum())} values)"
    values = f"got values from {low:.8g} to {high:.8g}"
    if -1.1 <= low < -0.1 and high <= 1.1:
        return f"{values}; if they lie in -1..1, use (x + 1) / 2"
    if low > -26 and 2 < high < 281:  # a tenth more on both sides, as bicubic resizing leaves it
        return f"{values}; if they lie in 0..255, divide by 255"
    return values


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

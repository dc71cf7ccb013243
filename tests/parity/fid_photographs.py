"""Crops of the photographs in scikit-image's and scikit-learn's wheels, as files of many kinds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import skimage
from official_image_reward import installed_folder

_NAMES = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "ihc", "moon", "retina", "rocket"),
)
_SUFFIXES = (".png", ".jpg", ".webp")
_MODES = {
    ".png": ("RGB", "L", "RGBA", "P", "L", "RGB"),
    ".jpg": ("RGB", "L", "RGB", "RGB"),
    ".webp": ("RGB", "RGBA"),
}


@cache
def originals() -> tuple[PIL.Image.Image, ...]:
    folder = Path(skimage.__file__).parent / "data"
    files = [file for name in _NAMES for file in sorted(folder.glob(f"{name}.*"))]
    files += sorted(
        (installed_folder("sklearn", "scikit-learn==1.9.1") / "datasets/images").glob("*.jpg")
    )
    assert len(files) == len(_NAMES) + 2
    return tuple(PIL.Image.open(file).convert("RGB") for file in files)


def write_photographs(folder: Path, count: int, seed: int, *, blurred: bool = False) -> list[Path]:
    """Write crops of 96 to 1024 px, most of them small, of any aspect ratio, in three formats."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    files = []
    for index in range(count):
        original = originals()[index % len(originals())]
        largest = (230, 230, 230, 384, 230, 230, 512, 230, 1024, 230)[index % 10]
        if largest == 1024:
            original = original.resize((1100, 1060), PIL.Image.Resampling.LANCZOS)
        width, height = (
            int(generator.integers(96, min(largest, length) + 1)) for length in original.size
        )
        left = int(generator.integers(0, original.width - width + 1))
        top = int(generator.integers(0, original.height - height + 1))
        image = original.crop((left, top, left + width, top + height))
        if blurred:
            image = image.filter(PIL.ImageFilter.GaussianBlur(float(generator.uniform(0, 2))))
        suffix = _SUFFIXES[index % 3]
        mode = _MODES[suffix][index // 3 % len(_MODES[suffix])]
        file = folder / f"{index:04}{suffix}"
        _in_mode(image, mode).save(file)
        files.append(file)
    return files


def _in_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    if mode == "RGBA":
        transparent = image.convert("RGBA")
        transparent.putalpha(image.convert("L"))
        return transparent
    return image.convert(mode)

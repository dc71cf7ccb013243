"""Resizing: bytes equal Pillow's, by Pillow and by integers; floats have the right gradient."""

from __future__ import annotations

import random

import numpy as np
import PIL.Image
import pytest
import torch

from diffsynth_metrics.fid import preprocessing
from diffsynth_metrics.fid.preprocessing import PREPROCESSINGS
from diffsynth_metrics.pixels import resizing
from diffsynth_metrics.pixels.resizing import filter_bytes, resize

# Height and width, before and after. Ratios such as 4/7 have many exact halves; the last ones are of
# pictures that Pillow 13 filters in the other order than older releases.
SIZES = [
    ((300, 451), (224, 337)),
    ((300, 451), (401, 97)),
    ((77, 51), (338, 224)),
    ((451, 300), (3, 7)),
    ((300, 451), (100, 451)),
    ((300, 451), (300, 100)),
    ((128, 128), (224, 224)),
    ((512, 512), (224, 224)),
    ((3, 5), (31, 50)),
    ((1, 1), (5, 9)),
    ((700, 1), (1, 3)),
    ((600, 200), (224, 75)),
    ((500, 90), (60, 120)),
]


def pictures(height: int, width: int) -> torch.Tensor:
    """Noise, a smooth picture and black on white, bytes ``[3, 3, H, W]``."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    noise = torch.rand(3, height, width, generator=generator)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (torch.stack([noise, smooth, noise.round()]) * 255).to(torch.uint8)


def by_pillow(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    arrays = images.permute(0, 2, 3, 1).numpy()
    resized = [
        np.array(PIL.Image.fromarray(array).resize((width, height), PIL.Image.Resampling.BICUBIC))
        for array in arrays
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def test_bytes_equal_pillow() -> None:
    for size, new_size in SIZES:
        images = pictures(*size)
        expected = by_pillow(images, *new_size)
        # What an accelerator does can be tried on a CPU as well.
        assert torch.equal(filter_bytes(images, *new_size), expected), (size, new_size)
        for given in (images, images.to(memory_format=torch.channels_last)):
            resized = resize(given, *new_size) * 255
            assert torch.equal(resized.round(), expected.float()), (size, new_size)
            torch.testing.assert_close(resized, expected.float(), rtol=1e-5, atol=1e-5)


def test_integers_equal_pillow_at_any_ratio() -> None:
    chance = random.Random(0)
    for _ in range(200):
        height, width, new_height, new_width = (
            chance.choice([chance.randint(1, 12), chance.randint(1, 150)]) for _ in range(4)
        )
        images = pictures(height, width)
        filtered = filter_bytes(images, new_height, new_width)
        assert torch.equal(filtered, by_pillow(images, new_height, new_width)), (height, width)


def test_what_lies_elsewhere_is_filtered_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_cpu(*_: object) -> torch.Tensor:
        raise AssertionError("bytes of an accelerator do not go through Pillow")

    monkeypatch.setattr(resizing, "_by_pillow", to_cpu)
    resized = resize(torch.zeros(2, 3, 40, 50, dtype=torch.uint8, device="meta"), 20, 30)
    assert (resized.device.type, resized.shape, resized.dtype) == ("meta", (2, 3, 20, 30), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_the_same_size_is_the_same_image(dtype: torch.dtype) -> None:
    images = pictures(20, 31) if dtype == torch.uint8 else pictures(20, 31) / 255
    resized = resize(images, 20, 31)
    torch.testing.assert_close(resized, pictures(20, 31) / 255, rtol=1e-6, atol=1e-7)
    assert resized.data_ptr() != images.data_ptr()  # what becomes of it may be written to


def test_strips_are_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    image = PIL.Image.fromarray(pictures(30, 47)[0].permute(1, 2, 0).numpy())
    for size in (1, 100, 47 * 30, 10**6):
        monkeypatch.setattr(resizing, "STRIP_PIXELS", size)
        for of_columns in (False, True):
            whole = PIL.Image.new("RGB", image.size)
            for corner, strip in resizing.strips(image, of_columns=of_columns):
                assert strip.width * strip.height <= max(size, 47)
                whole.paste(strip, corner)
            assert whole == image


def test_fid_resizes_strips_as_pillow_does_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for height, width in ((300, 451), (451, 300), (600, 200), (299, 500), (400, 299), (50, 60)):
        image = PIL.Image.fromarray(pictures(height, width)[0].permute(1, 2, 0).numpy())
        expected: dict[int, dict[str, np.ndarray]] = {}
        for strip in (10**9, 3_000):
            monkeypatch.setattr(resizing, "STRIP_PIXELS", strip)
            monkeypatch.setattr(preprocessing, "STRIP_PIXELS", strip)
            expected[strip] = {name: found(image) for name, found in PREPROCESSINGS.items()}
        for name, pixels in expected[3_000].items():
            np.testing.assert_allclose(pixels, expected[10**9][name], atol=1e-5, err_msg=name)
        channels = [channel.convert("F") for channel in image.split()]
        bicubic = [channel.resize((299, 299), PIL.Image.Resampling.BICUBIC) for channel in channels]
        whole = np.stack([np.asarray(channel) for channel in bicubic], axis=-1)
        np.testing.assert_allclose(
            expected[3_000]["clean"] * 128 + 128, whole.clip(0, 255), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize(
    ("height", "width", "new_height", "new_width"),
    [(7, 9, 4, 5), (5, 6, 9, 11), (6, 5, 6, 8), (8, 5, 3, 5), (1, 4, 3, 2)],
)
def test_floats_have_the_right_gradient(
    height: int, width: int, new_height: int, new_width: int
) -> None:
    # Bicubic interpolation overshoots by less than the margin that is left here to 0 and 1, where the
    # clamp has a kink that finite differences cannot see.
    generator = torch.Generator().manual_seed(0)
    pixels = 0.3 + 0.4 * torch.rand(1, 3, height, width, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda images: resize(images, new_height, new_width), (pixels.requires_grad_(),)
    )

"""Pixels: equal to the official pipelines for PIL images, near them and differentiable for tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms as tv
from torch.nn.functional import interpolate
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import CheckedImages, SharedImages, as_images
from diffsynth_metrics.pixels import batches as batches_module
from diffsynth_metrics.pixels import resizing, transforms
from diffsynth_metrics.pixels.batches import pixel_batches, pixel_lists, tensor_pixels
from diffsynth_metrics.pixels.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    Letterbox,
    ShortestEdgeCrop,
    SmartResize,
    Transform,
    normalize_,
)

Photographs = dict[str, PIL.Image.Image]

CPU = torch.device("cpu")
OFFICIAL = CLIPImageProcessorPil()
SIZES = (
    (512, 383),
    (401, 300),
    (224, 224),
    (224, 160),
    (225, 224),
    (224, 227),
    (37, 53),
    (3, 40),
    (600, 400),
    (1024, 768),
    (512, 1040),
)
OPAQUE_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "I;16", "I", "F")
# transformers 5.8 converts these with Pillow's convert("RGB"), as it did when the metrics were published
# and as we do. Later releases lay what is transparent on white, and take LAB for transparent.
ALPHA_MODES = ("LA", "PA", "P with transparency", "RGBA", "LAB")


def in_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    if mode == "LAB":
        return PIL.Image.merge("LAB", image.split())
    if mode == "I;16":
        return PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
    if mode == "P with transparency":
        palette = image.quantize(64)
        palette.info["transparency"] = 3
        return palette
    converted = image.convert(mode)
    if mode in ("LA", "RGBA"):
        converted.putalpha(image.convert("L"))
    return converted


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    return image.convert("RGB")


def by_transformers(image: PIL.Image.Image) -> torch.Tensor:
    """Return the bytes that transformers' CLIP processor makes of an image ``[3, 224, 224]``."""
    # Without the hint it takes a picture of three rows for one with its channels first.
    only_bytes = {"do_rescale": False, "do_normalize": False}
    pixels = OFFICIAL(image, input_data_format="channels_last", **only_bytes)["pixel_values"]
    return torch.as_tensor(np.asarray(pixels))[0]


def by_torchvision(image: PIL.Image.Image, *, convert: str = "before") -> torch.Tensor:
    """Return the bytes of OpenAI's CLIP and ImageReward ``[3, 224, 224]``, which convert last."""
    geometry = [tv.Resize(224, interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(224)]
    steps = [to_rgb, *geometry] if convert == "before" else [*geometry, to_rgb]
    return tv.PILToTensor()(tv.Compose(steps)(image))


def ours(transform: Transform, image: PIL.Image.Image) -> torch.Tensor:
    return normalize_(transform.from_pil(image)[None], transform)[0]


def as_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """Return uint8 ``[1, 3, H, W]``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class TestPilPath:
    def test_bytes_equal_transformers_and_torchvision(self, photographs: Photographs) -> None:
        half_even = ShortestEdgeCrop(crop_rounding="half_even")
        for name, photograph in photographs.items():
            for size in (*SIZES, (1, 300), (300, 1)):
                image = photograph.resize(size)
                expected = by_transformers(image)
                assert torch.equal(ShortestEdgeCrop().from_pil(image), expected), (name, size)
                assert torch.equal(half_even.from_pil(image), by_torchvision(image)), (name, size)

    def test_normalised_pixels_are_theirs(self, photographs: Photographs) -> None:
        image = photographs["coffee"]
        pixels = ours(ShortestEdgeCrop(), image)
        assert_near(pixels, torch.as_tensor(np.asarray(OFFICIAL(image)["pixel_values"]))[0])
        pixels = ours(ShortestEdgeCrop(crop_rounding="half_even"), image)
        assert_near(pixels, tv.Normalize(CLIP_MEAN, CLIP_STD)(by_torchvision(image) / 255))

    @pytest.mark.parametrize("mode", OPAQUE_MODES + ALPHA_MODES)
    def test_every_mode_equals_transformers_and_torchvision(
        self, mode: str, photographs: Photographs
    ) -> None:
        for size in ((512, 383), (37, 53)):
            image = in_mode(photographs["coffee"].resize(size), mode)
            # Transparency is dropped, as Pillow does. Through an array, because convert() keeps the note
            # that one colour is transparent.
            opaque = PIL.Image.fromarray(np.asarray(image.convert("RGB")))
            official = by_transformers(opaque if mode in ALPHA_MODES else image)
            assert torch.equal(ShortestEdgeCrop().from_pil(image), official)
            for convert in ("before", "after"):
                transform = ShortestEdgeCrop(crop_rounding="half_even", convert=convert)  # type: ignore[arg-type]
                assert torch.equal(transform.from_pil(image), by_torchvision(image, convert=convert))
        image = in_mode(photographs["astronaut"].resize((224, 224)), mode)
        assert torch.equal(ShortestEdgeCrop().from_pil(image), as_tensor(image.convert("RGB"))[0])

    def test_the_two_croppings_differ_where_the_margin_is_odd(self, photographs: Photographs) -> None:
        image = photographs["coffee"].resize((224, 227))
        floor = ShortestEdgeCrop().from_pil(image)
        half_even = ShortestEdgeCrop(crop_rounding="half_even").from_pil(image)
        assert torch.equal(floor, as_tensor(image)[0, :, 1:225])
        assert torch.equal(half_even, as_tensor(image)[0, :, 2:226])

    def test_pixels_are_bytes_of_the_wanted_size(self, photographs: Photographs) -> None:
        pixels = ShortestEdgeCrop(size=336).from_pil(photographs["rocket"])
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 336, 336))


class TestLetterbox:
    def test_strips_change_nothing(
        self, photographs: Photographs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However large the strips are, pixels are those of the whole picture in floats."""
        for name, size in (("chelsea", (451, 300)), ("coffee", (90, 700)), ("rocket", (37, 53))):
            image = photographs[name].resize(size)
            floats = as_tensor(image) / 255
            scale = 224 / max(size)
            new = tuple(max(1, round(side * scale)) for side in reversed(size))
            top, left = (224 - new[0]) // 2, (224 - new[1]) // 2
            for antialias in (True, False):
                expected = interpolate(floats, new, mode="bicubic", antialias=antialias)
                transform = Letterbox(antialias=antialias)
                for strip in (1, 5_000, 2**20):
                    monkeypatch.setattr(resizing, "STRIP_PIXELS", strip)
                    monkeypatch.setattr(transforms, "STRIP_PIXELS", strip)
                    for pixels in (
                        transform.from_pil(image)[None],
                        transform.from_tensor(as_tensor(image)),
                    ):
                        inside = pixels[..., top : top + new[0], left : left + new[1]]
                        assert_near(inside, expected)
                        assert pixels.count_nonzero() == inside.count_nonzero()


class TestTensorPath:
    """The measured distances, in steps of 1/255, over these photographs and sizes.

    float: at most 1.09, and at most 0.31 on average over an image, because Pillow rounds to bytes after
    each of its two filters; uint8: none.
    """

    def test_float_images_stay_near_the_pil_path(self, photographs: Photographs) -> None:
        for photograph in photographs.values():
            for size in (*SIZES, (1, 300), (300, 1)):
                image = photograph.resize(size)
                pixels = ShortestEdgeCrop().from_tensor(as_tensor(image) / 255)[0]
                steps = (pixels * 255 - ShortestEdgeCrop().from_pil(image)).abs()
                assert steps.max() < 1.15, size
                assert steps.mean() < 0.33, size

    def test_byte_images_equal_the_pil_path(self, photographs: Photographs) -> None:
        for photograph in photographs.values():
            for size in (*SIZES, (224, 301), (1, 300), (300, 1)):
                image = photograph.resize(size)
                transform = ShortestEdgeCrop(crop_rounding="half_even" if size[1] == 227 else "floor")
                pixels = transform.from_tensor(as_tensor(image))[0] * 255
                expected = transform.from_pil(image).float()
                assert torch.equal(pixels.round(), expected), size
                assert_near(pixels, expected)

    def test_byte_images_equal_the_pil_path_of_hpsv3(self, photographs: Photographs) -> None:
        for size in ((64, 64), (300, 200), (31, 47), (640, 427), (90, 700)):
            image = photographs["astronaut"].resize(size)
            pixels = SmartResize().from_tensor(as_tensor(image))[0]
            assert torch.equal((pixels * 255).round(), SmartResize().from_pil(image).float())

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (torch.uint8, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
        ids=str,
    )
    def test_pixels_are_float32_or_wider(self, given: torch.dtype, expected: torch.dtype) -> None:
        transform = ShortestEdgeCrop(size=16)
        pixels = transform.from_tensor(torch.ones(2, 3, 20, 31).to(given))
        assert (pixels.dtype, pixels.shape) == (expected, (2, 3, 16, 16))
        assert normalize_(pixels, transform).dtype == expected

    @pytest.mark.parametrize("as_bytes", [True, False])
    def test_pixels_stay_in_range_where_bicubic_overshoots(self, as_bytes: bool) -> None:
        stripes = torch.zeros(1, 3, 40, 40)
        stripes[..., ::4] = stripes[..., 1::4] = 1
        images = (stripes * 255).to(torch.uint8) if as_bytes else stripes
        pixels = ShortestEdgeCrop(size=100).from_tensor(images)
        assert (pixels.min(), pixels.max()) == (0, 1)

    def test_the_callers_tensor_is_not_changed(self) -> None:
        for transform in (ShortestEdgeCrop(28), Letterbox(28), SmartResize(784, 784)):
            for shape in ((28, 28), (28, 43), (50, 60)):
                batch = torch.rand(2, 3, *shape)
                before = batch.clone()
                for images in (batch, batch[:1]):
                    tensor_pixels(images, transform)
                    list(pixel_lists(images, transform, batch_size=2, device=CPU))
                    list(pixel_lists(list(images), transform, batch_size=2, device=CPU))
                assert torch.equal(batch, before)


class TestGradients:
    # Bicubic interpolation overshoots by less than the margin that is left here to 0 and 1, where
    # the clamp has a kink that finite differences cannot see.
    def pixels(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(1, 3, *shape, generator=generator, dtype=torch.float64)
        return (0.3 + 0.4 * pixels).requires_grad_()

    @pytest.mark.parametrize("shape", [(9, 13), (13, 9), (6, 6), (4, 7)])
    def test_the_whole_transform_has_the_right_gradient(self, shape: tuple[int, int]) -> None:
        transform = ShortestEdgeCrop(size=6)

        def pixel_values(images: torch.Tensor) -> torch.Tensor:
            return tensor_pixels(images, transform)

        assert torch.autograd.gradcheck(pixel_values, (self.pixels(*shape),))

    def test_gradients_reach_exactly_the_pixels_that_the_crop_keeps(self) -> None:
        images = torch.rand(1, 3, 224, 301, requires_grad=True)
        ShortestEdgeCrop().from_tensor(images).sum().backward()
        assert images.grad is not None
        kept = images.grad[0, 0, 0] != 0
        assert kept.nonzero().flatten().tolist() == list(range(38, 38 + 224))
        assert (images.grad[..., kept] == 1).all()

    def test_gradients_reach_every_pixel_of_a_shrunken_square(self) -> None:
        images = (0.3 + 0.4 * torch.rand(1, 3, 600, 600)).requires_grad_()
        ShortestEdgeCrop().from_tensor(images).sum().backward()
        assert images.grad is not None
        assert (images.grad > 0).all()
        assert images.grad[0, 0].sum().item() == pytest.approx(224 * 224, rel=1e-4)

    def test_gradients_pass_through_half_precision(self) -> None:
        images = torch.rand(1, 3, 30, 40).to(torch.bfloat16).requires_grad_()
        ShortestEdgeCrop(size=20).from_tensor(images).sum().backward()
        assert images.grad is not None and images.grad.dtype == torch.bfloat16
        assert images.grad.abs().sum() > 0


class TestNormalize:
    def test_bytes_and_floats_of_a_picture_agree(self) -> None:
        pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
        transform = ShortestEdgeCrop()
        assert_near(normalize_(pixels, transform), normalize_(pixels / 255, transform))

    def test_a_call_in_inference_mode_leaves_later_ones_their_gradient(self) -> None:
        transform = ShortestEdgeCrop(mean=(0.11, 0.22, 0.33), std=(0.44, 0.55, 0.66))
        with torch.inference_mode():
            normalize_(torch.rand(1, 3, 2, 2), transform)
        pixels = torch.rand(1, 3, 2, 2, requires_grad=True)
        normalize_(pixels.clone(), transform).sum().backward()
        assert pixels.grad is not None
        assert pixels.grad[0, :, 0, 0].tolist() == pytest.approx([1 / std for std in transform.std])

    def test_each_channel_has_its_own_mean_and_deviation(self) -> None:
        transform = ShortestEdgeCrop(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
        normalized = normalize_(torch.full((1, 3, 1, 1), 0.6, dtype=torch.float64), transform)
        assert normalized.flatten().tolist() == pytest.approx([1.0, 1.6, 2.4])


class Watched:
    """A transform that knows which images it was given, by their widths, and may hold some back."""

    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, held_from: float = float("inf")) -> None:
        self.widths: list[int] = []
        self.received = self.furthest = 0
        self.begun = threading.Condition()
        self.release = threading.Event()
        self._held_from = held_from

    def from_pil(self, image: PIL.Image.Image) -> torch.Tensor:
        with self.begun:
            self.widths.append(image.width)
            self.furthest = max(self.furthest, len(self.widths) - self.received)
            self.begun.notify_all()
        if image.width >= self._held_from:
            assert self.release.wait(60)
        return torch.zeros(3, 8, 8)

    def from_tensor(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def pictures(count: int) -> CheckedImages:
    """Return images whose widths are 1 to `count`."""
    return [PIL.Image.new("RGB", (width + 1, 2)) for width in range(count)]


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("diffsynth_metrics")]


def wait_until_no_worker_is_left() -> None:
    for worker in workers():
        worker.join(timeout=60)
        assert not worker.is_alive()


def batches(images: CheckedImages, transform: Transform, batch_size: int) -> Iterator[torch.Tensor]:
    return pixel_batches(images, transform, batch_size=batch_size, device=CPU)


class TestExtremeShapes:
    """Of a picture that is very long, only what the crop shows is computed."""

    def test_the_crop_is_that_of_the_resized_picture_within_a_step(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noise = np.random.default_rng(0)
        for rounding in ("floor", "half_even"):
            transform = ShortestEdgeCrop(64, crop_rounding=rounding)  # type: ignore[arg-type]
            for width, height in ((1, 900), (900, 1), (3, 2000), (2000, 3), (1201, 2), (2, 1201)):
                picture = PIL.Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
                bytes_ = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
                results = []
                for ratio in (100, 10**6):  # the crop alone, and the whole picture first
                    monkeypatch.setattr(transforms, "_EXTREME_RATIO", ratio)
                    results.append(
                        (
                            transform.from_pil(picture).float() / 255,
                            transform.from_tensor(bytes_),
                            transform.from_tensor(bytes_.double() / 255),
                        )
                    )
                for crop, whole in zip(*results, strict=True):
                    torch.testing.assert_close(crop, whole, rtol=0, atol=1.01 / 255)
                torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=1e-3)

    def test_gradients_flow_to_the_part_that_is_seen(self) -> None:
        pixels = torch.rand(1, 3, 1, 3000, requires_grad=True)
        ShortestEdgeCrop(32).from_tensor(pixels).sum().backward()
        assert pixels.grad is not None
        seen = pixels.grad.abs().sum(dim=1).flatten().nonzero().flatten()
        assert 1497 <= int(seen.min()) <= int(seen.max()) <= 1503


class TestPixelBatches:
    @pytest.fixture
    def files(self, photographs: Photographs, tmp_path: Path) -> list[Path]:
        paths = []
        for name, image in photographs.items():
            paths.append(tmp_path / f"{name}.png")
            image.resize((40, 30)).save(paths[-1])
        return paths

    @pytest.fixture
    def mixed(self, photographs: Photographs, files: list[Path]) -> CheckedImages:
        """Ten images of every kind, each different from all others."""
        pictures = list(photographs.values())
        small = [as_tensor(image.resize((50, 40)))[0] for image in pictures]
        return as_images(
            [
                pictures[0],
                small[0],
                files[1],
                files[4].read_bytes(),
                small[1] / 255,
                small[2] / 255,
                as_tensor(pictures[3].resize((31, 64)))[0] / 255,
                np.asarray(pictures[4]),
                small[3],
                in_mode(pictures[2], "RGBA"),
            ]
        )

    def test_a_mixed_list_keeps_its_order_in_batches_of_any_size(self, mixed: CheckedImages) -> None:
        transform = ShortestEdgeCrop(size=16)
        expected = torch.cat([next(batches([image], transform, 1)) for image in mixed])
        assert all((one - other).abs().max() > 0.01 for one, other in combinations(expected, 2))
        for batch_size in (1, 2, 3, 4, 7, 10, 11):
            parts = list(batches(mixed, transform, batch_size))
            assert_near(torch.cat(parts), expected)
            assert {len(part) for part in parts[:-1]} <= {batch_size}
            assert len(parts) == -(-10 // batch_size)
            lists = list(pixel_lists(mixed, transform, batch_size=batch_size, device=CPU))
            assert [len(part) for part in lists] == [len(part) for part in parts]
            assert_near(torch.stack([pixels for part in lists for pixels in part]), expected)

    def test_a_batch_tensor_is_cut_without_a_difference(self) -> None:
        transform = ShortestEdgeCrop(size=16)
        images = torch.rand(7, 3, 30, 40)
        expected = normalize_(transform.from_tensor(images), transform)
        for batch_size in (1, 2, 3, 7):
            assert_near(torch.cat(list(batches(images, transform, batch_size))), expected)

    def test_shared_images_are_prepared_once_if_two_metrics_want_them(self) -> None:
        for wanted, times in ((1, 2), (2, 1)):
            transform = Watched()
            shared = SharedImages(pictures(15), [transform] * wanted)  # type: ignore[arg-type]
            for _ in range(2):
                assert sum(map(len, batches(shared, transform, 2))) == 15
            assert sorted(transform.widths) == sorted([*range(1, 16)] * times)

    def test_preparation_runs_at_most_three_batches_ahead(self) -> None:
        for images in (pictures(400), SharedImages(pictures(400))):  # type: ignore[arg-type]
            transform = Watched()
            for batch in batches(images, transform, 8):
                transform.received += len(batch)
            assert transform.received == len(transform.widths) == 400
            assert transform.furthest <= 3 * 8

    def test_the_next_batches_are_prepared_while_the_consumer_works(self) -> None:
        transform = Watched()
        delivered = batches(pictures(400), transform, 8)
        next(delivered)
        with transform.begun:
            assert transform.begun.wait_for(lambda: len(transform.widths) >= 2 * 8, timeout=60)
        delivered.close()  # type: ignore[attr-defined]

    def test_gradients_reach_each_tensor_of_a_list(self) -> None:
        images = [torch.rand(3, 20, 30, requires_grad=True), torch.rand(3, 25, 20, requires_grad=True)]
        torch.cat(list(batches(as_images(images), ShortestEdgeCrop(size=16), 2))).sum().backward()
        assert all(image.grad is not None and image.grad.abs().sum() > 0 for image in images)

    def test_an_unreadable_file_in_the_middle_is_named(self, files: list[Path], tmp_path: Path) -> None:
        broken = tmp_path / "broken.png"
        broken.write_text("no picture")
        images = as_images([*files * 4, broken, *files * 40])
        with pytest.raises(ImageError, match=rf"^image 20 \({broken}\) cannot be read"):
            list(batches(images, ShortestEdgeCrop(size=16), 8))
        wait_until_no_worker_is_left()

    def test_the_batches_before_an_unreadable_file_are_delivered(
        self, files: list[Path], tmp_path: Path
    ) -> None:
        (tmp_path / "broken.png").write_text("no picture")
        images = as_images([*files, tmp_path / "broken.png"])
        delivered = batches(images, ShortestEdgeCrop(size=16), 2)
        assert len(next(delivered)) == len(next(delivered)) == 2
        with pytest.raises(ImageError, match=r"^image 5"):
            next(delivered)

    def test_a_consumer_that_stops_early_stops_the_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batches_module, "cpu_count", lambda: 1)
        transform = Watched(held_from=3)
        delivered = batches(pictures(20), transform, 2)
        next(delivered)
        delivered.close()  # type: ignore[attr-defined]
        transform.release.set()
        wait_until_no_worker_is_left()
        # The only worker had no more than the third image when the rest was given up.
        assert transform.widths in ([1, 2], [1, 2, 3])

    def test_no_worker_is_left_after_the_last_batch(self, files: list[Path]) -> None:
        list(batches(as_images(files), ShortestEdgeCrop(size=16), 2))
        wait_until_no_worker_is_left()

    def test_no_worker_is_started_for_a_batch_tensor(self) -> None:
        wait_until_no_worker_is_left()
        delivered = batches(torch.rand(4, 3, 20, 20), ShortestEdgeCrop(size=16), 1)
        next(delivered)
        assert not workers()

"""Pixels: equal to the official pipelines for PIL images, near them and differentiable for tensors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms as tv
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import CheckedImages, SharedImages, as_images
from diffsynth_metrics.pixels import batches as batches_module
from diffsynth_metrics.pixels.batches import pixel_batches, tensor_pixels
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
    """Return what transformers' CLIP processor makes of an image ``[3, 224, 224]``."""
    # Without the hint it takes a picture of three rows for one with its channels first.
    pixels = OFFICIAL(image, input_data_format="channels_last")["pixel_values"]
    return torch.as_tensor(np.asarray(pixels))[0]


def by_torchvision(image: PIL.Image.Image, *, convert: str = "before") -> torch.Tensor:
    """Return what OpenAI's CLIP and ImageReward do ``[3, 224, 224]``: they convert after the crop."""
    geometry = [tv.Resize(224, interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(224)]
    steps = [to_rgb, *geometry] if convert == "before" else [*geometry, to_rgb]
    return tv.Compose([*steps, tv.ToTensor(), tv.Normalize(CLIP_MEAN, CLIP_STD)])(image)


def ours(transform: ShortestEdgeCrop, image: PIL.Image.Image) -> torch.Tensor:
    return normalize_(transform.from_pil(image)[None], transform)[0]


def as_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """Return uint8 ``[1, 3, H, W]``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


class TestPilPath:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "coffee", "rocket"])
    def test_equals_transformers_to_the_bit(
        self, name: str, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = photographs[name].resize(size)
        assert torch.equal(ours(ShortestEdgeCrop(), image), by_transformers(image))

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "coffee", "rocket"])
    def test_equals_torchvision_to_the_bit(
        self, name: str, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = photographs[name].resize(size)
        transform = ShortestEdgeCrop(crop_rounding="half_even")
        assert torch.equal(ours(transform, image), by_torchvision(image))

    @pytest.mark.parametrize("size", [(1, 300), (300, 1)], ids=str)
    def test_a_line_of_pixels_equals_both_to_the_bit(
        self, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = photographs["coffee"].resize(size)
        assert torch.equal(ours(ShortestEdgeCrop(), image), by_transformers(image))
        half_even = ShortestEdgeCrop(crop_rounding="half_even")
        assert torch.equal(ours(half_even, image), by_torchvision(image))

    @pytest.mark.parametrize("size", [(512, 383), (37, 53)], ids=str)
    @pytest.mark.parametrize("mode", OPAQUE_MODES)
    def test_every_mode_equals_transformers_to_the_bit(
        self, mode: str, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = in_mode(photographs["coffee"].resize(size), mode)
        assert torch.equal(ours(ShortestEdgeCrop(), image), by_transformers(image))

    @pytest.mark.parametrize("size", [(512, 383), (37, 53)], ids=str)
    @pytest.mark.parametrize("mode", ALPHA_MODES)
    def test_transparency_is_dropped_as_pillow_does(
        self, mode: str, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = in_mode(photographs["coffee"].resize(size), mode)
        # Through an array, because convert() keeps the note that one colour is transparent.
        opaque = PIL.Image.fromarray(np.asarray(image.convert("RGB")))
        assert torch.equal(ours(ShortestEdgeCrop(), image), by_transformers(opaque))

    @pytest.mark.parametrize("size", [(512, 383), (37, 53)], ids=str)
    @pytest.mark.parametrize("mode", OPAQUE_MODES + ALPHA_MODES)
    @pytest.mark.parametrize("convert", ["before", "after"])
    def test_every_mode_equals_torchvision_to_the_bit(
        self, convert: Any, mode: str, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = in_mode(photographs["coffee"].resize(size), mode)
        transform = ShortestEdgeCrop(crop_rounding="half_even", convert=convert)
        assert torch.equal(ours(transform, image), by_torchvision(image, convert=convert))

    @pytest.mark.parametrize("mode", OPAQUE_MODES + ALPHA_MODES)
    def test_an_image_of_the_right_size_is_only_converted(
        self, mode: str, photographs: Photographs
    ) -> None:
        image = in_mode(photographs["astronaut"].resize((224, 224)), mode)
        expected = as_tensor(image.convert("RGB"))[0]
        assert torch.equal(ShortestEdgeCrop().from_pil(image), expected)

    def test_the_two_croppings_differ_where_the_margin_is_odd(self, photographs: Photographs) -> None:
        image = photographs["coffee"].resize((224, 227))
        floor = ShortestEdgeCrop().from_pil(image)
        half_even = ShortestEdgeCrop(crop_rounding="half_even").from_pil(image)
        assert torch.equal(floor, as_tensor(image)[0, :, 1:225])
        assert torch.equal(half_even, as_tensor(image)[0, :, 2:226])

    def test_pixels_are_bytes_of_the_wanted_size(self, photographs: Photographs) -> None:
        pixels = ShortestEdgeCrop(size=336).from_pil(photographs["rocket"])
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 336, 336))


class TestTensorPath:
    """The measured distances, in steps of 1/255, over these photographs and sizes.

    float: at most 1.09, and at most 0.31 on average over an image, because Pillow rounds to bytes after
    each of its two filters; uint8: none.
    """

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_float_images_stay_near_the_pil_path(
        self, size: tuple[int, int], photographs: Photographs
    ) -> None:
        for photograph in photographs.values():
            image = photograph.resize(size)
            pixels = ShortestEdgeCrop().from_tensor(as_tensor(image) / 255)[0]
            steps = (pixels * 255 - ShortestEdgeCrop().from_pil(image)).abs()
            assert steps.max() < 1.15
            assert steps.mean() < 0.33

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_byte_images_equal_the_pil_path(
        self, size: tuple[int, int], photographs: Photographs
    ) -> None:
        for photograph in photographs.values():
            image = photograph.resize(size)
            pixels = normalize_(ShortestEdgeCrop().from_tensor(as_tensor(image)), ShortestEdgeCrop())
            assert torch.equal(pixels[0], ours(ShortestEdgeCrop(), image))

    @pytest.mark.parametrize("size", [(64, 64), (300, 200), (31, 47), (640, 427), (90, 700)], ids=str)
    def test_byte_images_equal_the_pil_path_of_hpsv3(
        self, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = photographs["astronaut"].resize(size)
        pixels = normalize_(SmartResize().from_tensor(as_tensor(image)), SmartResize())
        assert torch.equal(pixels[0], ours(SmartResize(), image))

    @pytest.mark.parametrize("size", [(224, 227), (227, 224), (229, 224), (224, 301)], ids=str)
    @pytest.mark.parametrize("crop_rounding", ["floor", "half_even"])
    def test_the_crop_is_that_of_the_pil_path(
        self, crop_rounding: Any, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = photographs["coffee"].resize(size)
        transform = ShortestEdgeCrop(crop_rounding=crop_rounding)
        from_bytes = normalize_(transform.from_tensor(as_tensor(image)), transform)[0]
        assert torch.equal(from_bytes, ours(transform, image))

    @pytest.mark.parametrize("size", [(1, 300), (300, 1)], ids=str)
    def test_a_line_of_pixels_stays_near_the_pil_path(
        self, size: tuple[int, int], photographs: Photographs
    ) -> None:
        image = photographs["coffee"].resize(size)
        expected = ShortestEdgeCrop().from_pil(image)
        from_floats = ShortestEdgeCrop().from_tensor(as_tensor(image) / 255)[0] * 255
        assert (from_floats - expected).abs().max() < 1.15
        from_bytes = ShortestEdgeCrop().from_tensor(as_tensor(image))[0] * 255
        assert torch.equal(from_bytes.round(), expected.float())

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

    @pytest.mark.parametrize("transform", [ShortestEdgeCrop(28), Letterbox(28), SmartResize(784, 784)])
    @pytest.mark.parametrize("shape", [(28, 28), (28, 43), (50, 60)])
    def test_the_callers_tensor_is_not_changed(
        self, transform: Transform, shape: tuple[int, int]
    ) -> None:
        batch = torch.rand(2, 3, *shape)
        for images in (batch, list(batch), batch[:1], [batch[0]]):
            before = batch.clone()
            tensor_pixels(images, transform)
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
        assert torch.equal(normalize_(pixels, transform), normalize_(pixels / 255, transform))

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


class Counting:
    """A transform that knows how far preparation runs ahead of what its consumer has received."""

    uses_all_cores = False
    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, seconds: float = 0.0) -> None:
        self.started = self.received = self.furthest = 0
        self._seconds = seconds
        self._lock = threading.Lock()

    def from_pil(self, image: PIL.Image.Image) -> torch.Tensor:
        with self._lock:
            self.started += 1
            self.furthest = max(self.furthest, self.started - self.received)
        time.sleep(self._seconds)
        return torch.zeros(3, 8, 8)

    def from_tensor(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("diffsynth_metrics")]


def wait_until_no_worker_is_left() -> None:
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not workers()


def batches(images: CheckedImages, transform: Transform, batch_size: int) -> Iterator[torch.Tensor]:
    return pixel_batches(images, transform, batch_size=batch_size, device=CPU)


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
        """Nine images of every kind, each different from all others."""
        pictures = list(photographs.values())
        small = [as_tensor(image.resize((50, 40)))[0] for image in pictures]
        return as_images(
            [
                pictures[0],
                small[0],
                files[1],
                small[1] / 255,
                small[2] / 255,
                as_tensor(pictures[3].resize((31, 64)))[0] / 255,
                np.asarray(pictures[4]),
                small[3],
                in_mode(pictures[2], "RGBA"),
            ]
        )

    def test_large_tensors_are_resized_in_parts_without_a_difference(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        transform = ShortestEdgeCrop(size=16)
        images = torch.rand(5, 3, 40, 30, generator=torch.Generator().manual_seed(0))
        whole = tensor_pixels(images, transform)
        sizes: list[int] = []
        resized = ShortestEdgeCrop.from_tensor

        def counted(self: ShortestEdgeCrop, part: torch.Tensor) -> torch.Tensor:
            sizes.append(len(part))
            return resized(self, part)

        monkeypatch.setattr(ShortestEdgeCrop, "from_tensor", counted)
        monkeypatch.setattr(batches_module, "_BYTES_AT_ONCE_ON_CPU", 2 * 3 * 40 * 30 * 4)
        assert torch.equal(tensor_pixels(images, transform), whole)
        assert sizes == [2, 2, 1]

    def test_a_mixed_list_keeps_its_order(self, mixed: CheckedImages) -> None:
        transform = ShortestEdgeCrop(size=16)
        together = torch.cat(list(batches(mixed, transform, 4)))
        assert len(together) == len(mixed)
        for index, image in enumerate(mixed):
            (alone,) = batches([image], transform, 1)
            assert torch.equal(together[index], alone[0]), index

    @pytest.mark.parametrize("batch_size", range(1, 12))
    def test_the_batch_size_changes_no_bit(self, batch_size: int, mixed: CheckedImages) -> None:
        transform = ShortestEdgeCrop(size=16)
        expected = torch.cat(list(batches(mixed, transform, 9)))
        parts = list(batches(mixed, transform, batch_size))
        assert torch.equal(torch.cat(parts), expected)
        assert {len(part) for part in parts[:-1]} <= {batch_size}
        assert len(parts) == -(-9 // batch_size)

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
    def test_a_batch_tensor_is_cut_without_changing_a_bit(self, batch_size: int) -> None:
        transform = ShortestEdgeCrop(size=16)
        images = torch.rand(7, 3, 30, 40)
        expected = normalize_(transform.from_tensor(images), transform)
        assert torch.equal(torch.cat(list(batches(images, transform, batch_size))), expected)

    def test_shared_images_are_prepared_once_if_two_metrics_want_them(self, files: list[Path]) -> None:
        transform = Counting()
        for wanted, times in ((1, 2), (2, 1)):
            transform.started = 0
            shared = SharedImages(files * 3, [transform] * wanted)
            for _ in range(2):
                assert sum(map(len, batches(shared, transform, 2))) == 3 * len(files)
            assert transform.started == times * 3 * len(files)

    def test_shared_images_that_one_metric_wants_are_prepared_batch_by_batch(
        self, files: list[Path]
    ) -> None:
        transform = Counting()
        shared = SharedImages(files * 30, [transform])
        for batch in batches(shared, transform, 2):
            transform.received += len(batch)
        assert transform.received == transform.started == 30 * len(files)
        assert transform.furthest <= 2 * (2 + 1)

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

    def test_a_thousand_files_are_prepared_at_most_three_batches_ahead(self, files: list[Path]) -> None:
        transform = Counting()
        for number, batch in enumerate(batches(as_images(files * 200), transform, 8)):
            transform.received += len(batch)
            if number < 20:
                time.sleep(0.02)  # the workers have all the time to run away
        assert transform.started == transform.received == 1000
        assert 8 < transform.furthest <= 3 * 8

    def test_what_uses_all_cores_runs_in_the_callers_thread_as_batches_are_taken(
        self, files: list[Path]
    ) -> None:
        class OfTorch(Counting):
            uses_all_cores = True

            def from_pil(self, image: PIL.Image.Image) -> torch.Tensor:
                assert threading.current_thread() is threading.main_thread()
                return super().from_pil(image)

        transform = OfTorch()
        for number, batch in enumerate(batches(as_images(files * 20), transform, 8)):
            assert len(batch) == min(8, 100 - 8 * number)
            transform.received += len(batch)
        assert transform.started == 100
        assert transform.furthest == 8

    def test_a_consumer_that_stops_early_stops_the_work(self, files: list[Path]) -> None:
        cores = os.cpu_count() or 1
        transform = Counting(seconds=0.005)
        delivered = batches(as_images(files * 2 * cores), transform, 2 * cores)
        next(delivered)
        delivered.close()  # type: ignore[attr-defined]
        wait_until_no_worker_is_left()
        assert transform.started < 5 * cores  # of the six that were submitted

    def test_no_worker_is_left_after_the_last_batch(self, files: list[Path]) -> None:
        list(batches(as_images(files), ShortestEdgeCrop(size=16), 2))
        wait_until_no_worker_is_left()

    def test_no_worker_is_started_for_a_batch_tensor(self) -> None:
        delivered = batches(torch.rand(4, 3, 20, 20), ShortestEdgeCrop(size=16), 1)
        next(delivered)
        assert not workers()

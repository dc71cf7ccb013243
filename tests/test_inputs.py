"""What a caller passes: prompts and images, aligned, and each bad input an error that names it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from diffsynth_metrics import PickScoreMetric
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import as_images, as_prompts, open_image, pair

Photographs = dict[str, PIL.Image.Image]

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I")


def in_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Return the photograph in any mode, transparent in parts where the mode can be."""
    if mode == "LAB":
        return PIL.Image.merge("LAB", image.split())
    if mode == "I;16":
        return PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
    if mode == "P":
        palette = image.quantize(64)
        palette.info["transparency"] = 3
        return palette
    converted = image.convert(mode)
    if mode in ("LA", "RGBA"):
        converted.putalpha(image.convert("L"))
    return converted


def grey(height: int = 4, width: int = 5, value: float = 0.5) -> torch.Tensor:
    return torch.full((3, height, width), value)


def picture(width: int = 5, height: int = 4) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height), "red")


@pytest.fixture(params=["jpg", "png"])
def truncated(request: pytest.FixtureRequest, photographs: Photographs, tmp_path: Path) -> Path:
    path = tmp_path / f"half.{request.param}"
    photographs["chelsea"].save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


class TestPrompts:
    def test_one_prompt_is_a_list_of_one(self) -> None:
        assert as_prompts("a cat") == ["a cat"]

    def test_an_empty_string_is_a_prompt(self) -> None:
        assert as_prompts("") == [""]

    @pytest.mark.parametrize("sequence", [list, tuple])
    def test_a_sequence_keeps_its_order(self, sequence: Callable[[Any], Any]) -> None:
        assert as_prompts(sequence(["b", "a", "b"])) == ["b", "a", "b"]

    @pytest.mark.parametrize("wrong", [None, 3, {"a"}, iter("ab"), {"a": 1}])
    def test_what_is_not_a_sequence_is_named_by_its_type(self, wrong: Any) -> None:
        message = rf"prompt must be a str or a list of str, got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=message):
            as_prompts(wrong)

    def test_an_element_that_is_no_string_is_named_by_its_position(self) -> None:
        with pytest.raises(TypeError, match=r"prompt 2 must be a str, got NoneType"):
            as_prompts(["a", "b", None])  # type: ignore[list-item]

    def test_bytes_are_no_prompt(self) -> None:
        with pytest.raises(TypeError, match=r"prompt 0 must be a str, got int"):
            as_prompts(b"a cat")  # type: ignore[arg-type]

    def test_an_empty_list_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"prompt is an empty list; pass at least one prompt"):
            as_prompts([])

    @pytest.mark.parametrize(("prompt", "index"), [("a \ud83d cat", 0), (["a", "\ud800"], 1)])
    def test_half_a_surrogate_pair_is_refused(self, prompt: str | list[str], index: int) -> None:
        with pytest.raises(ValueError, match=f"^prompt {index} is not valid Unicode: "):
            as_prompts(prompt)

    @pytest.mark.parametrize("images", [picture(), [picture()], grey(), torch.rand(2, 3, 4, 5)])
    def test_swapped_arguments_are_told_the_order(
        self, images: Any, tiny_metric: PickScoreMetric
    ) -> None:
        with pytest.raises(TypeError, match=r"order of the arguments is \(prompt, images\)"):
            tiny_metric.compute(images, "a cat")


class TestPairing:
    def test_one_prompt_goes_with_every_image(self) -> None:
        prompts, images, count = pair("a cat", [picture(), picture(), picture()])
        assert (len(prompts), len(images), count) == (1, 3, 3)

    def test_prompts_and_images_pair_one_to_one(self) -> None:
        first, second = picture(), picture()
        prompts, images, count = pair(["a", "b"], [first, second])
        assert prompts == ["a", "b"]
        assert images[0] is first and images[1] is second
        assert count == 2

    @pytest.mark.parametrize("image", [picture(), grey(), np.zeros((4, 5, 3), np.uint8)])
    def test_one_bare_image_goes_with_every_prompt(self, image: Any) -> None:
        prompts, images, count = pair(["a", "b", "c"], image)
        assert (len(prompts), len(images), count) == (3, 1, 3)

    def test_one_bare_path_goes_with_every_prompt(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        assert pair(["a", "b", "c"], str(tmp_path / "a.png"))[2] == 3

    @pytest.mark.parametrize("images", [[picture()], torch.rand(1, 3, 4, 5)])
    def test_a_list_of_one_image_does_not_go_with_three_prompts(self, images: Any) -> None:
        with pytest.raises(
            ValueError, match=r"got 3 prompts and 1 images; .*one image \(not in a list\)"
        ):
            pair(["a", "b", "c"], images)

    def test_a_list_of_one_prompt_does_not_go_with_three_images(self) -> None:
        with pytest.raises(ValueError, match=r"got 1 prompts and 3 images; pass one prompt \(a str\)"):
            pair(["a"], [picture()] * 3)

    @pytest.mark.parametrize(("prompts", "images"), [(2, 3), (3, 2), (5, 4)])
    def test_different_lengths_are_both_in_the_message(self, prompts: int, images: int) -> None:
        with pytest.raises(ValueError, match=rf"got {prompts} prompts and {images} images"):
            pair(["a"] * prompts, [picture()] * images)

    def test_a_batch_tensor_counts_its_images(self) -> None:
        with pytest.raises(ValueError, match=r"got 3 prompts and 2 images"):
            pair(["a", "b", "c"], torch.rand(2, 3, 4, 5))


class TestImages:
    @pytest.mark.parametrize("as_type", [str, Path])
    def test_a_path_stays_a_path(self, as_type: Callable[[Path], Any], tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        assert as_images(as_type(tmp_path / "a.png")) == [tmp_path / "a.png"]

    def test_an_array_becomes_the_same_pixels(self, photographs: Photographs) -> None:
        array = np.asarray(photographs["chelsea"])
        (image,) = as_images(array)
        assert isinstance(image, PIL.Image.Image)
        assert np.array_equal(np.asarray(image), array)

    def test_an_array_of_several_images_is_a_batch(self) -> None:
        array = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
        images = as_images(array)
        assert [np.asarray(image).tolist() for image in images] == array.tolist()

    def test_a_strided_array_becomes_the_same_pixels(self) -> None:
        array = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)[::2, ::-1]
        (image,) = as_images(array)
        assert np.array_equal(np.asarray(image), array)

    def test_a_batch_tensor_is_returned_as_it_is(self) -> None:
        batch = torch.rand(2, 3, 4, 5, requires_grad=True)
        assert as_images(batch) is batch

    @pytest.mark.parametrize(
        "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    )
    def test_a_tensor_may_have_any_dtype_of_a_picture(self, dtype: torch.dtype) -> None:
        image = torch.tensor([0.0, 1.0]).to(dtype).expand(3, 4, 2)
        (checked,) = as_images([image])
        assert checked is image

    def test_zero_and_one_are_inside_the_range(self) -> None:
        assert len(as_images(torch.stack([grey(value=0.0), grey(value=1.0)]))) == 2

    def test_a_list_may_mix_every_kind_of_image(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        array = np.zeros((4, 5, 3), np.uint8)
        assert len(as_images([picture(), tmp_path / "a.png", array, grey(), grey(7, 9)])) == 5


class TestBadImages:
    @pytest.mark.parametrize("images", [[], (), np.zeros((0, 4, 5, 3), np.uint8)])
    def test_no_image_is_an_error(self, images: Any) -> None:
        with pytest.raises(ValueError, match=r"images is empty; pass at least one image"):
            as_images(images)

    def test_an_empty_batch_tensor_is_an_error_with_its_shape(self) -> None:
        with pytest.raises(ValueError, match=r"images is empty \(shape \[0, 3, 4, 5\]\)"):
            as_images(torch.zeros(0, 3, 4, 5))

    @pytest.mark.parametrize("wrong", [None, 3, {"a": picture()}, iter([picture()])])
    def test_what_is_no_image_and_no_list_is_named_by_its_type(self, wrong: Any) -> None:
        message = rf"images must be a PIL image, .* \(not an iterator\); got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=message):
            as_images(wrong)

    def test_an_element_that_is_no_image_is_named_by_its_position(self) -> None:
        with pytest.raises(TypeError, match=r"image 1 must be a PIL image, a path, .* got NoneType"):
            as_images([picture(), None])  # type: ignore[list-item]

    def test_a_missing_path_is_named(self, tmp_path: Path) -> None:
        missing = tmp_path / "missing.png"
        with pytest.raises(FileNotFoundError, match=rf"image 1: there is no file '{missing}'"):
            as_images([picture(), missing])

    def test_a_folder_is_no_image(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=rf"image 0: '{tmp_path}' is a folder; pass its files"
        ):
            as_images(tmp_path)

    def test_an_address_is_named_as_it_was_given(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no file 'https://example\.com/a\.png'"):
            as_images("https://example.com/a.png")

    def test_a_text_too_long_for_a_path_is_a_missing_file(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"image 0: there is no file 'a cat a cat"):
            as_images("a cat " * 1000)

    @pytest.mark.parametrize(
        "shape", [(4, 5), (4, 5, 1), (4, 5, 4), (3, 4, 5), (0, 5, 3), (4, 0, 3), (1, 1, 4, 5, 3)]
    )
    def test_an_array_of_another_shape_is_told_the_right_one(self, shape: tuple[int, ...]) -> None:
        message = rf"image 1: an array must be \[H, W, 3\], got shape {re.escape(str(list(shape)))}"
        with pytest.raises(ImageError, match=message):
            as_images([picture(), np.zeros(shape, np.uint8)])

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16, np.bool_])
    def test_an_array_of_another_dtype_is_told_the_right_one(self, dtype: Any) -> None:
        message = rf"image 0: an array must be uint8 \[H, W, 3\], got dtype {np.dtype(dtype)}"
        with pytest.raises(TypeError, match=message):
            as_images(np.zeros((4, 5, 3), dtype))

    def test_a_bad_array_in_a_batch_is_named_by_its_position(self) -> None:
        with pytest.raises(ImageError, match=r"image 0: an array must be \[H, W, 3\]"):
            as_images(np.zeros((2, 4, 5, 4), np.uint8))

    @pytest.mark.parametrize("shape", [(1, 4, 5), (4, 4, 5), (4, 5, 3), (3, 0, 5), (3, 4, 0)])
    def test_a_tensor_of_other_channels_is_told_the_right_shape(self, shape: tuple[int, ...]) -> None:
        message = r"image 1: a tensor must be \[3, H, W\] .*, got shape \[1, "
        with pytest.raises(ImageError, match=message + re.escape(str(list(shape))[1:])):
            as_images([picture(), torch.zeros(shape)])

    @pytest.mark.parametrize("shape", [(4, 5), (5,), (1, 1, 3, 4, 5)])
    def test_a_tensor_of_other_dimensions_is_told_the_right_shape(self, shape: tuple[int, ...]) -> None:
        message = rf"image 0: a tensor must be \[3, H, W\], got shape {re.escape(str(list(shape)))}"
        with pytest.raises(ImageError, match=message):
            as_images(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 4, 4, 5), (2, 4, 5, 3), (2, 3, 0, 5)])
    def test_a_batch_tensor_of_other_channels_is_told_the_right_shape(
        self, shape: tuple[int, ...]
    ) -> None:
        message = rf"images: a tensor must be .*\[N, 3, H, W\], got shape {re.escape(str(list(shape)))}"
        with pytest.raises(ImageError, match=message):
            as_images(torch.zeros(shape))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
    def test_a_tensor_of_another_dtype_is_told_the_right_one(self, dtype: torch.dtype) -> None:
        message = rf"image 0: a tensor must be uint8 in 0\.\.255 or float in 0\.\.1, got {dtype}"
        with pytest.raises(TypeError, match=message):
            as_images(torch.zeros(3, 4, 5, dtype=dtype))

    @pytest.mark.parametrize(
        ("value", "shown"), [(255.0, "255"), (-1.0, "-1"), (1.01, "1.01"), (float("inf"), "inf")]
    )
    def test_a_float_outside_the_range_is_told_its_values(self, value: float, shown: str) -> None:
        image = grey()
        image[1, 2, 3] = value
        message = rf"image 0: a float tensor must lie in 0\.\.1, got values from .*{re.escape(shown)}"
        with pytest.raises(ImageError, match=message):
            as_images(image)

    def test_a_float_outside_the_range_is_told_what_to_do(self) -> None:
        with pytest.raises(ImageError, match=r"clamp it, or pass uint8 for 0\.\.255"):
            as_images(grey(value=2.0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_nan_is_an_error_in_every_dtype(self, dtype: torch.dtype) -> None:
        image = grey().to(dtype)
        image[0, 0, 0] = float("nan")
        with pytest.raises(ImageError, match=r"image 0: .* got values from nan to nan"):
            as_images(image)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5])
    def test_a_bad_image_in_a_batch_is_named_by_its_position(
        self, value: float, layout: torch.memory_format
    ) -> None:
        batch = torch.rand(5, 3, 4, 5).to(memory_format=layout)
        batch[3, 1, 2, 2] = value
        with pytest.raises(ImageError, match=r"^image 3: a float tensor must lie in 0\.\.1"):
            as_images(batch)

    def test_a_bad_image_in_a_list_is_named_by_its_position(self) -> None:
        with pytest.raises(ImageError, match=r"^image 3: a float tensor must lie in 0\.\.1"):
            as_images([picture(), grey(), grey(), grey(value=3.0)])

    @pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
    def test_a_pil_image_without_pixels_is_told_its_size(self, size: tuple[int, int]) -> None:
        message = rf"image 1: an image must have pixels, got size {size[0]}x{size[1]}"
        with pytest.raises(ImageError, match=message):
            as_images([picture(), PIL.Image.new("RGB", size)])


class TestOpening:
    def test_a_text_named_png_is_named_with_its_path(self, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("this is not a picture")
        with pytest.raises(ImageError, match=rf"^image 7 \({tmp_path / 'text.png'}\) cannot be read"):
            open_image(tmp_path / "text.png", "image 7")

    def test_an_empty_file_is_named_with_its_path(self, tmp_path: Path) -> None:
        (tmp_path / "empty.jpg").touch()
        with pytest.raises(ImageError, match=rf"^image 7 \({tmp_path / 'empty.jpg'}\) cannot be read"):
            open_image(tmp_path / "empty.jpg", "image 7")

    def test_a_truncated_file_is_named_with_its_path(self, truncated: Path) -> None:
        with pytest.raises(ImageError, match=rf"^image 7 \({truncated}\) cannot be read: .*truncated"):
            open_image(truncated, "image 7")

    def test_a_truncated_file_opened_by_the_caller_is_named_every_time(self, truncated: Path) -> None:
        # Pillow could take the half that it has decoded for the image when it is asked again.
        with PIL.Image.open(truncated) as image:
            for _ in range(2):
                with pytest.raises(ImageError, match=rf"^image 7 \({truncated}\) cannot be read"):
                    open_image(image, "image 7")

    def test_an_image_closed_before_it_was_read_is_named(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        with PIL.Image.open(tmp_path / "a.png") as image:
            pass
        with pytest.raises(ImageError, match=rf"^image 7 \({tmp_path / 'a.png'}\) cannot be read"):
            open_image(image, "image 7")

    def test_a_file_that_vanished_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"^image 7 \(.*gone\.png\) cannot be read"):
            open_image(tmp_path / "gone.png", "image 7")

    @pytest.mark.parametrize("seed", range(8))
    def test_a_damaged_file_is_read_or_named(self, seed: int, tmp_path: Path) -> None:
        generator = np.random.default_rng(seed)
        for kind in ("jpg", "png", "gif", "webp", "tiff", "bmp"):
            path = tmp_path / f"damaged.{kind}"
            picture(60, 40).save(path)
            content = bytearray(path.read_bytes())
            for position in generator.integers(0, len(content), size=5):
                content[position] = generator.integers(256)
            path.write_bytes(content)
            try:
                open_image(path, "image 7")
            except ImageError as error:
                assert str(error).startswith(f"image 7 ({path}) cannot be read: ")

    def test_the_message_of_a_metric_names_the_file(
        self, truncated: Path, tiny_metric: PickScoreMetric
    ) -> None:
        with pytest.raises(ImageError, match=rf"^image 1 \({truncated}\) cannot be read"):
            tiny_metric.compute("a cat", [picture(), truncated])

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
    def test_a_file_equals_pillows_own_reading(
        self, mode: str, photographs: Photographs, tmp_path: Path
    ) -> None:
        expected = in_mode(photographs["chelsea"], mode)
        expected.save(tmp_path / "a.png")
        opened = open_image(tmp_path / "a.png", "image 0")
        assert opened.mode == mode
        assert np.array_equal(np.asarray(opened.convert("RGB")), np.asarray(expected.convert("RGB")))

    def test_the_first_frame_of_an_animation_is_read(self, tmp_path: Path) -> None:
        frames = [PIL.Image.new("RGB", (5, 4), colour) for colour in ("red", "blue", "green")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        opened = open_image(tmp_path / "a.gif", "image 0")
        assert opened.convert("RGB").getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("mode", ["F", "La"])
    def test_a_mode_that_has_no_rgb_is_refused(self, mode: str) -> None:
        with pytest.raises(ImageError, match=f"image 3 has mode '{mode}': .*; convert it first"):
            open_image(PIL.Image.new(mode, (5, 4)), "image 3")

    @pytest.mark.parametrize("mode", MODES)
    def test_the_callers_image_is_not_changed(
        self, mode: str, photographs: Photographs, tiny_metric: PickScoreMetric
    ) -> None:
        image = in_mode(photographs["chelsea"], mode)
        before = image.mode, image.size, image.tobytes(), dict(image.info)
        tiny_metric.compute("a cat", image)
        assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before

    def test_the_callers_lazily_opened_image_stays_usable(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        with PIL.Image.open(tmp_path / "a.png") as image:
            open_image(image, "image 0")
            assert image.getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("kind", ["jpg", "png"])
    def test_a_lazily_opened_image_is_read_by_eight_threads_at_once(
        self, kind: str, photographs: Photographs, tmp_path: Path
    ) -> None:
        path = tmp_path / f"a.{kind}"
        photographs["chelsea"].save(path)
        with PIL.Image.open(path) as image:
            expected = np.asarray(image)
        for _ in range(5):
            with PIL.Image.open(path) as lazy:
                equal: list[bool] = []
                barrier = threading.Barrier(8)

                def read(
                    lazy: PIL.Image.Image = lazy,
                    equal: list[bool] = equal,
                    barrier: threading.Barrier = barrier,
                ) -> None:
                    barrier.wait()
                    equal.append(np.array_equal(np.asarray(open_image(lazy, "image 0")), expected))

                threads = [threading.Thread(target=read) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert equal == [True] * 8

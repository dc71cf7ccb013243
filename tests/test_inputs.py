"""What a caller passes: prompts and images, aligned, and each bad input an error that names it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from diffsynth_metrics import PickScoreMetric
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.inputs import as_images, as_prompts, pair

Photographs = dict[str, PIL.Image.Image]


def grey(height: int = 4, width: int = 5, value: float = 0.5) -> torch.Tensor:
    return torch.full((3, height, width), value)


def picture(width: int = 5, height: int = 4) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height), "red")


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
        with pytest.raises(
            TypeError, match=r"got bytes; the order of the arguments is \(prompt, images\)"
        ):
            as_prompts(b"a cat")  # type: ignore[arg-type]

    def test_an_empty_list_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"prompt is an empty list; pass at least one prompt"):
            as_prompts([])

    @pytest.mark.parametrize(("prompt", "index"), [("a \ud83d cat", 0), (["a", "\ud800"], 1)])
    def test_half_a_surrogate_pair_is_refused(self, prompt: str | list[str], index: int) -> None:
        with pytest.raises(ValueError, match=f"^prompt {index} is not valid Unicode: "):
            as_prompts(prompt)

    def test_swapped_arguments_are_told_the_order(
        self, tiny_metric: PickScoreMetric, tmp_path: Path
    ) -> None:
        path = tmp_path / "picture"
        picture().save(path, "PNG")
        order = r"order of the arguments is \(prompt, images\)"
        images: list[Any] = [
            picture(),
            [picture()],
            grey(),
            torch.rand(2, 3, 4, 5),
            path.read_bytes(),
            path,
        ]
        for image in images:
            with pytest.raises(TypeError, match=order):
                tiny_metric.compute(image, "a cat")
        # Paths are texts, and are recognised where the images are no files.
        for prompt in (str(path), [str(path)], "gone.png", ["gone.JPG", "gone.png"]):
            with pytest.raises(FileNotFoundError, match=rf"{order}.*there is no file 'a cat'"):
                tiny_metric.compute(prompt, ["a cat", "a dog"])
        with pytest.raises(FileNotFoundError, match=r"^image 0: there is no file 'a dog'"):
            tiny_metric.compute("a cat", "a dog")


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

    def test_one_bare_image_goes_with_every_prompt(self) -> None:
        contents = io.BytesIO()
        picture().save(contents, "PNG")
        array = np.zeros((4, 5, 3), np.uint8)
        for image in (picture(), grey(), array, array / 255, contents, contents.getvalue()):
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
    def test_a_path_stays_a_path(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
            assert as_images(path) == [tmp_path / "a.png"]

    def test_the_home_folder_is_meant_by_a_tilde(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        picture().save(tmp_path / "a.png")
        picture().save(tmp_path / "~b.png")
        assert as_images(["~/a.png", Path("~/a.png")]) == [tmp_path / "a.png"] * 2
        assert as_images("~b.png") == [Path("~b.png")]

    def test_encoded_pictures_are_images(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        contents = (tmp_path / "a.png").read_bytes()
        buffer = io.BytesIO()
        picture().save(buffer, "PNG")  # its position is the end
        with (tmp_path / "a.png").open("rb") as file:
            for image in (contents, bytearray(contents), memoryview(contents), buffer, file, file):
                assert as_images(image) == [contents]
            assert as_images([contents, file, buffer]) == [contents] * 3
            assert not file.closed

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

    def test_a_float_array_becomes_the_tensor_of_the_same_values(self) -> None:
        array = np.random.default_rng(0).random((2, 4, 5, 3))
        read_only = array.copy()
        read_only.flags.writeable = False
        given = [read_only, array[:, ::-1, ::-1], array.astype(">f8"), np.asfortranarray(array)]
        given += [array.astype(np.float16), array.astype(np.float32)]
        for values in given:
            for images in (as_images(values), as_images(list(values)), as_images(values[0])):
                for index, image in enumerate(images):
                    assert isinstance(image, torch.Tensor)
                    assert image.dtype == getattr(torch, values.dtype.newbyteorder("=").name)
                    assert np.array_equal(image.permute(1, 2, 0).numpy(), values[index])

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
    def test_no_image_is_an_error(self) -> None:
        for images in ([], (), np.zeros((0, 4, 5, 3), np.uint8), np.zeros((0, 4, 5, 3))):
            with pytest.raises(ValueError, match=r"images is empty; pass at least one image"):
                as_images(images)
        with pytest.raises(ValueError, match=r"images is empty \(shape \[0, 3, 4, 5\]\)"):
            as_images(torch.zeros(0, 3, 4, 5))

    def test_what_is_no_image_and_no_list_is_named_by_its_type(self) -> None:
        wrong: list[Any] = [None, 3, {"a": picture()}, iter([picture()])]
        for images in wrong:
            message = rf"images must be a PIL image, .* \(not an iterator\); got {type(images).__name__}"
            with pytest.raises(TypeError, match=message):
                as_images(images)

    def test_an_element_that_is_no_image_is_named_by_its_position(self) -> None:
        with pytest.raises(TypeError, match=r"image 1 must be a PIL image, a path, .* got NoneType"):
            as_images([picture(), None])  # type: ignore[list-item]

    def test_a_missing_path_is_named(self, tmp_path: Path) -> None:
        missing = tmp_path / "missing.png"
        with pytest.raises(FileNotFoundError, match=rf"image 1: there is no file '{missing}'"):
            as_images([picture(), missing])
        for text in ("https://example.com/a.png", "a cat " * 1000, "~no such user/a.png", "a\0b"):
            with pytest.raises(
                FileNotFoundError, match=re.escape(f"image 0: there is no file {text[:20]!r}"[:-1])
            ):
                as_images(text)

    def test_a_folder_is_no_image(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=rf"image 0: '{tmp_path}' is a folder; pass its files"
        ):
            as_images(tmp_path)

    def test_a_file_object_that_has_no_bytes_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        with path.open("w") as for_writing:
            with pytest.raises(ImageError, match=rf"^image 1 \({path}\) cannot be read: not readable"):
                as_images([picture(), for_writing])  # type: ignore[list-item]
        with path.open() as text, pytest.raises(TypeError, match=r"image 0 .*binary mode \('rb'\)"):
            as_images(text)  # type: ignore[arg-type]
        with pytest.raises(ImageError, match=rf"image 0 \({path}\) cannot be read: .*closed file"):
            as_images(for_writing)  # type: ignore[arg-type]

    def test_an_array_of_another_shape_is_told_what_is_right(self) -> None:
        cases = {
            (4, 5): "np.dstack",
            (4, 5, 1): "np.dstack",
            (4, 5, 4): "leave alpha out",
            (3, 4, 5): "channels last: array.transpose(1, 2, 0)",
            (0, 5, 3): "",
            (4, 0, 3): "",
            (1, 1, 4, 5, 3): "",
        }
        for shape, hint in cases.items():
            for dtype in (np.uint8, np.float32):
                message = f"image 1: an array must be [H, W, 3], got shape {list(shape)}"
                with pytest.raises(ImageError, match=f"{re.escape(message)}.*{re.escape(hint)}"):
                    as_images([picture(), np.zeros(shape, dtype)])

    def test_the_advice_for_an_array_makes_it_an_image(self) -> None:
        grey_array, rgba = np.zeros((4, 5)), np.zeros((4, 5, 4), np.uint8)
        channels_first = np.zeros((3, 4, 5), np.uint8)
        advised = [np.dstack([grey_array] * 3), rgba[..., :3], channels_first.transpose(1, 2, 0)]
        assert len(as_images(advised)) == 3

    def test_an_array_of_another_dtype_is_told_the_right_one(self) -> None:
        for dtype in (np.int64, np.uint16, np.bool_, np.complex64):
            message = rf"image 0: an array must be uint8 .* or float .*, got dtype {np.dtype(dtype)}"
            with pytest.raises(TypeError, match=message):
                as_images(np.zeros((4, 5, 3), dtype))

    def test_a_bad_array_in_a_batch_is_named_by_its_position(self) -> None:
        with pytest.raises(ImageError, match=r"image 0: an array must be \[H, W, 3\]"):
            as_images(np.zeros((2, 4, 5, 4), np.uint8))
        batch = np.zeros((3, 4, 5, 3))
        batch[2, 1, 1, 1] = 2
        with pytest.raises(ImageError, match=r"^image 2: a float image must lie in 0\.\.1, got values"):
            as_images(batch)

    def test_a_tensor_of_another_shape_is_told_what_is_right(self) -> None:
        for shape in (
            (1, 4, 5),
            (4, 4, 5),
            (3, 0, 5),
            (3, 4, 0),
            (4, 5, 3),
            (4, 5),
            (5,),
            (1, 1, 3, 4, 5),
        ):
            hint = r"channels are last: tensor\.permute\(2, 0, 1\)" if shape == (4, 5, 3) else ""
            message = rf"image 1: a tensor must be \[3, H, W\].* got shape {re.escape(str(list(shape)))}"
            with pytest.raises(ImageError, match=f"{message}.*{hint}"):
                as_images([picture(), torch.zeros(shape)])
        for batch in ((2, 1, 4, 5), (2, 4, 4, 5), (2, 3, 0, 5), (2, 4, 5, 3)):
            hint = r"channels are last: tensor\.permute\(0, 3, 1, 2\)" if batch[-1] == 3 else ""
            message = (
                rf"images: a tensor must be .*\[N, 3, H, W\], got shape {re.escape(str(list(batch)))}"
            )
            with pytest.raises(ImageError, match=f"{message}.*{hint}"):
                as_images(torch.zeros(batch))

    def test_a_tensor_of_another_dtype_is_told_the_right_one(self) -> None:
        for dtype in (torch.int64, torch.int32, torch.bool, torch.complex64):
            message = rf"image 0: a tensor must be uint8 in 0\.\.255 or float in 0\.\.1, got {dtype}"
            with pytest.raises(TypeError, match=message):
                as_images(torch.zeros(3, 4, 5, dtype=dtype))

    def test_floats_outside_the_range_are_told_what_they_seem_to_be(self) -> None:
        cases = [
            (-1.0, 1.0, "got values from -1 to 1; if they lie in -1..1, use (x + 1) / 2"),
            (-1.02, 0.3, "use (x + 1) / 2"),
            (0.0, 255.0, "got values from 0 to 255; if they lie in 0..255, divide by 255"),
            (-3.0, 260.0, "divide by 255"),
            (-0.0004, 1.0004, "got values from -0.0004"),
            (-70.0, 3.0, "got values from -70 to 3"),
            (0.5, float("nan"), "it contains NaN (1 values)"),
            (float("-inf"), 0.5, "it contains infinity (1 values)"),
            (0.5, float("inf"), "it contains infinity (1 values)"),
        ]
        for low, high, message in cases:
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                image = grey().to(dtype)
                image[0, 0, 0], image[1, 2, 3] = low, high
                with pytest.raises(
                    ImageError, match=r"^image 0: a float image must lie in 0\.\.1, "
                ) as error:
                    as_images(image)
                if dtype == torch.float64:
                    assert message in str(error.value)
                assert "clamp" not in str(error.value)
                assert ("divide" in str(error.value)) == ("divide" in message)
                assert ("(x + 1) / 2" in str(error.value)) == ("(x + 1) / 2" in message)

    def test_a_bad_image_is_named_by_its_position(self) -> None:
        for layout in (torch.contiguous_format, torch.channels_last):
            for value in (float("nan"), float("inf"), -0.5, 1.5):
                batch = torch.rand(5, 3, 4, 5).to(memory_format=layout)
                batch[3, 1, 2, 2] = value
                for images in (batch, list(batch)):
                    with pytest.raises(ImageError, match=r"^image 3: a float image must lie in 0\.\.1"):
                        as_images(images)

    def test_a_pil_image_without_pixels_is_told_its_size(self) -> None:
        for width, height in ((0, 4), (4, 0), (0, 0)):
            message = rf"image 1: an image must have pixels, got size {width}x{height}"
            with pytest.raises(ImageError, match=message):
                as_images([picture(), PIL.Image.new("RGB", (width, height))])

"""What a contact sheet shows, and of what."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffsynth_metrics import ImageError
from diffsynth_metrics.evaluation import contact_sheet, show

COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def plain(color: str, size: tuple[int, int] = (64, 64)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, COLORS[color])


def colors_in_a_row(sheet: PIL.Image.Image, count: int, size: int = 64) -> list[str]:
    """Return the colours at the middles of the first row's squares."""
    names = {value: name for name, value in COLORS.items()}
    middles = [(10 + column * (size + 10) + size // 2, 10 + size // 2) for column in range(count)]
    return [names[sheet.getpixel(middle)] for middle in middles]  # type: ignore[index]


def ink(sheet: PIL.Image.Image, box: tuple[int, int, int, int]) -> int:
    """Count the pixels of a part that are not background."""
    return int((np.asarray(sheet.crop(box)) != 255).any(axis=-1).sum())


def test_pictures_stand_in_rows_with_captions_below() -> None:
    images = [plain("red"), plain("green"), plain("blue")]
    sheet = show(images, [1.0, 2.0, 3.0], ["a", "b", "c"], columns=2, size=64)
    assert sheet.mode == "RGB"
    assert sheet.width == 10 + 2 * 74
    assert colors_in_a_row(sheet, 2) == ["red", "green"]
    assert ink(sheet, (10, 76, 148, 120)) > 20, "captions"
    plain_sheet = show(images, columns=2, size=64)
    assert plain_sheet.height < sheet.height
    assert ink(plain_sheet, (10, 76, 148, 84)) == 0


def test_every_kind_of_image_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    plain("red").save(file)
    array = np.asarray(plain("red"))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    with file.open("rb") as opened:
        images = [plain("red"), str(file), file, file.read_bytes(), opened, array, tensor]
        sheet = show([*images, tensor.float() / 255], columns=8, size=64)
    assert colors_in_a_row(sheet, 8) == ["red"] * 8
    assert colors_in_a_row(show(torch.stack([tensor, tensor]), size=64), 2) == ["red"] * 2
    assert colors_in_a_row(show(file, size=64), 1) == ["red"]
    assert colors_in_a_row(show(plain("red").quantize(), size=64), 1) == ["red"]


def test_the_callers_images_stay_as_they_are() -> None:
    images = [plain("red", (300, 200)), plain("green", (20, 30)).convert("RGBA")]
    before = [(image.size, image.mode, image.tobytes()) for image in images]
    sheet = show(images, size=64)
    assert [(image.size, image.mode, image.tobytes()) for image in images] == before
    assert colors_in_a_row(sheet, 2) == ["red", "green"]
    assert sheet.getpixel((12, 12)) == PIL.ImageColor.getrgb("#eef0f3"), "fitted and not cut"


def test_order_sorts_by_a_score_and_puts_unknown_ones_last() -> None:
    images = [plain("red"), plain("green"), plain("blue")]
    assert colors_in_a_row(show(images, [2.0, None, 3.0], size=64, order="score"), 3) == [
        "blue",
        "red",
        "green",
    ]
    scores = {"hps": [1.0, 2.0, 3.0], "pick": [2.0, 3.0, float("nan")]}
    assert colors_in_a_row(show(images, scores, size=64, order="-pick"), 3) == ["red", "green", "blue"]
    rows = [{"score": 1.0, "answer": "bad"}, {"score": 3.0, "answer": "good"}, {"score": 2.0}]
    assert colors_in_a_row(show(images, rows, size=64, order="score"), 3) == ["green", "blue", "red"]
    with pytest.raises(ValueError, match=r"order must be one of \['hps', 'pick'\]"):
        show(images, scores, order="clip")


def test_rows_of_a_metric_show_their_numbers_only() -> None:
    row = {"score": 1.0, "logit": 2.0, "answer": "text", "usable": True, "reason": None}
    with_one = show(plain("red"), {"score": [1.0]}, size=64)
    with_two = show(plain("red"), [row], size=64)
    assert with_two.height - with_one.height == contact_sheet._Font(11).line


def test_a_long_prompt_ends_with_an_ellipsis_and_stays_in_its_column() -> None:
    font = contact_sheet._Font(14)
    lines = contact_sheet._wrapped("a red circle on a very long sofa " * 20, font, 200, 2)
    assert len(lines) == 2
    assert lines[1].endswith("…")
    assert all(font.width(line) <= 200 for line in lines)
    assert contact_sheet._wrapped("short", font, 200, 2) == ["short"]
    assert contact_sheet._wrapped("x" * 500, font, 200, 2)[1].endswith("…")
    assert contact_sheet._wrapped("", font, 200, 2) == []
    assert contact_sheet._wrapped("one\n\ttwo", font, 200, 2) == ["one two"]
    sheet = show([plain("red")], prompts="word " * 200, size=64)
    assert ink(sheet, (sheet.width - 9, 0, sheet.width, sheet.height)) == 0


def test_other_scripts_are_drawn_or_replaced_by_a_box(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contact_sheet, "_FONTS_OF_OTHER_SCRIPTS", ("no such font.ttf",))
    with caplog.at_level(logging.WARNING):
        sheet = show(plain("red"), prompts="漢字 🦊 é עברית", size=128)
    assert ink(sheet, (10, 138, 138, 160)) > 50
    assert "漢" in caplog.text and "no font" in caplog.text
    assert "é" not in caplog.text, "it is drawn as an e"


def test_half_a_surrogate_pair_is_drawn_as_its_number() -> None:
    expected = show([plain("red")] * 2, prompts=["a \\ud800", "b"], size=128)
    assert show([plain("red")] * 2, prompts=["a \ud800", "b"], size=128) == expected
    assert show(plain("red"), prompts="a \ud800", size=128) == show(
        plain("red"), prompts="a \\ud800", size=128
    )


def test_what_is_wrong_is_named_with_its_position(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    good = plain("red")
    with pytest.raises(ImageError, match=r"image 1 .*broken\.png"):
        show([good, broken])
    with pytest.raises(FileNotFoundError, match="image 1"):
        show([good, tmp_path / "gone.png"])
    with pytest.raises(ValueError, match="empty"):
        show([])
    with pytest.raises(ValueError, match="1 scores of 'score' and 2 images"):
        show([good, good], [1.0])
    with pytest.raises(ValueError, match="got 3 prompts and 2 images"):
        show([good, good], prompts=["a", "b", "c"])
    with pytest.raises(TypeError, match="'hps' of image 1 must be a number"):
        show([good, good], {"hps": [1.0, "high"]})  # type: ignore[list-item]
    with pytest.raises(TypeError, match="scores of image 1 must be a dict"):
        show([good, good], [{"score": 1.0}, 2.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="columns"):
        show(good, columns=0)
    for size in (0, 31, 4097):
        with pytest.raises(ValueError, match="size must be 32 to 4096 pixels"):
            show(good, size=size)

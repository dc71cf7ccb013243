"""Picture files: each is read as Pillow reads it or named with its file, and memory stays bounded."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffsynth_metrics import PickScoreMetric
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.fid.preprocessing import PREPROCESSINGS
from diffsynth_metrics.fid.sources import ImageReader
from diffsynth_metrics.folders import image_files
from diffsynth_metrics.inputs import image_name, open_image, pixel_count
from diffsynth_metrics.pixels.batches import pixel_batches, pixel_lists
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop, SmartResize

Photographs = dict[str, PIL.Image.Image]

CPU = torch.device("cpu")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B")


def in_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Return the photograph in any mode, transparent in parts where the mode can be."""
    if mode == "LAB":
        return PIL.Image.merge("LAB", image.split())
    if mode.startswith("I;16"):
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        return PIL.Image.fromarray(grey.astype(">u2" if mode == "I;16B" else "<u2"))
    if mode == "P":
        palette = image.quantize(64)
        palette.info["transparency"] = 3
        return palette
    converted = image.convert(mode)
    if mode in ("LA", "RGBA"):
        converted.putalpha(image.convert("L"))
    return converted


def picture(width: int = 5, height: int = 4) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height), "red")


def encoded(image: PIL.Image.Image, kind: str) -> bytes:
    contents = io.BytesIO()
    image.save(contents, kind)
    return contents.getvalue()


@pytest.fixture(params=["jpg", "png"])
def truncated(request: pytest.FixtureRequest, photographs: Photographs, tmp_path: Path) -> Path:
    path = tmp_path / f"half.{request.param}"
    photographs["chelsea"].save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


class TestReading:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
    def test_a_file_equals_pillows_own_reading(
        self, mode: str, photographs: Photographs, tmp_path: Path
    ) -> None:
        expected = in_mode(photographs["chelsea"], mode)
        path = tmp_path / "a.png"
        expected.save(path)
        for image in (path, path.read_bytes()):
            opened = open_image(image, "image 0")
            assert opened.mode == mode
            assert np.array_equal(np.asarray(opened.convert("RGB")), np.asarray(expected.convert("RGB")))

    def test_the_first_frame_of_an_animation_is_read(self, tmp_path: Path) -> None:
        frames = [PIL.Image.new("RGB", (5, 4), colour) for colour in ("red", "blue", "green")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        opened = open_image(tmp_path / "a.gif", "image 0")
        assert opened.convert("RGB").getpixel((0, 0)) == (255, 0, 0)

    def test_the_size_is_known_before_a_picture_is_decoded(self, truncated: Path) -> None:
        assert pixel_count(truncated) == pixel_count(truncated.read_bytes()) == 451 * 300
        assert pixel_count(picture(7, 9)) == 63
        assert pixel_count(b"no picture") == 0

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

    def test_every_kind_of_image_has_the_same_score(
        self, photographs: Photographs, tiny_metric: PickScoreMetric, tmp_path: Path
    ) -> None:
        image = photographs["chelsea"]
        path = tmp_path / "a.png"
        image.save(path)
        contents, array = path.read_bytes(), np.asarray(image)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        with path.open("rb") as file:
            kinds = [image, path, str(path), contents, io.BytesIO(contents), file, array, tensor]
            scores = [tiny_metric.compute("a cat", kind)[0] for kind in kinds]
            scores += tiny_metric.compute("a cat", kinds)
        assert scores == pytest.approx([scores[0]] * 16, rel=1e-4)
        # Floats are not rounded to bytes between the two passes of resizing.
        scores = [tiny_metric.compute("a cat", tensor / 255)[0]]
        scores += tiny_metric.compute("a cat", [array / np.float32(255), array / 255])
        scores += tiny_metric.compute("a cat", np.stack([array / 255] * 2))
        assert scores == pytest.approx([scores[0]] * 5, rel=1e-4)


class TestSixteenBits:
    VALUES = np.arange(65536, dtype=np.uint16).reshape(256, 256)

    def test_the_low_byte_is_left_out(self) -> None:
        images: dict[str, PIL.Image.Image | bytes] = {
            kind: encoded(PIL.Image.fromarray(self.VALUES), kind) for kind in ("PNG", "TIFF", "PPM")
        }
        images["little"] = PIL.Image.fromarray(self.VALUES)
        images["big"] = PIL.Image.fromarray(self.VALUES.astype(">u2"))
        for name, image in images.items():
            opened = open_image(image, "image 0")
            assert opened.mode == "L", name
            assert np.array_equal(np.asarray(opened), self.VALUES >> 8), name

    def test_grey_maps_of_another_depth_are_scaled(self) -> None:
        for contents, expected in (
            (b"P2 3 1 300 0 150 300", [0, 128, 255]),
            (b"P5 2 1 4095 \x01\x02\x0f\xff", [16, 255]),
        ):
            assert np.asarray(open_image(contents, "image 0")).tolist() == [expected]

    def test_the_score_is_that_of_eight_bits(
        self, photographs: Photographs, tiny_metric: PickScoreMetric, tmp_path: Path
    ) -> None:
        grey = photographs["camera"].convert("L")
        expected = tiny_metric.compute("a cat", grey)
        white = tiny_metric.compute("a cat", PIL.Image.new("L", grey.size, 255))
        assert expected != pytest.approx(white, abs=0.1)
        for factor in (256, 257):
            deep = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * factor)
            for suffix in ("png", "tiff", "pgm"):
                deep.save(tmp_path / f"a.{suffix}")
                assert tiny_metric.compute("a cat", tmp_path / f"a.{suffix}") == pytest.approx(expected)

    def test_modes_of_an_unknown_range_are_refused(self) -> None:
        for mode in ("F", "I", "La"):
            with pytest.raises(ImageError, match=f"^image 3 has mode '{mode}': .*; convert it first"):
                open_image(PIL.Image.new(mode, (5, 4)), "image 3")


class TestNames:
    def test_an_image_is_named_by_its_position_and_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        picture().save(path)
        assert image_name("image 4", path) == f"image 4 ({path})"
        with PIL.Image.open(path) as image:
            assert image_name("image 4", image) == f"image 4 ({path})"
        for without_a_file in (path.read_bytes(), picture(), torch.zeros(3, 4, 5)):
            assert image_name("image 4", without_a_file) == "image 4"

    def test_what_cannot_be_read_is_named_with_its_path(self, truncated: Path, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("this is not a picture")
        (tmp_path / "empty.jpg").touch()
        for path in (tmp_path / "text.png", tmp_path / "empty.jpg", tmp_path / "gone.png", truncated):
            with pytest.raises(ImageError, match=rf"^image 7 \({path}\) cannot be read: "):
                open_image(path, "image 7")
        with pytest.raises(ImageError, match=r"^image 7 cannot be read: its 21 bytes are no picture"):
            open_image(b"this is not a picture", "image 7")

    def test_a_truncated_file_opened_by_the_caller_is_named_every_time(self, truncated: Path) -> None:
        # Pillow could take the half that it has decoded for the image when it is asked again.
        with PIL.Image.open(truncated) as image:
            for _ in range(2):
                with pytest.raises(ImageError, match=rf"^image 7 \({truncated}\) cannot be read"):
                    open_image(image, "image 7")

    def test_a_closed_image_is_said_to_be_closed(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        picture().save(path)
        with PIL.Image.open(path) as left:
            pass
        undecoded = PIL.Image.open(path)
        undecoded.close()
        decoded = PIL.Image.open(path)
        decoded.load()
        decoded.close()
        for image in (left, undecoded, decoded):
            with pytest.raises(ImageError, match=rf"^image 7 \({path}\) cannot be read: .*closed"):
                open_image(image, "image 7")

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
                assert str(error).startswith(f"image 7 ({path}) ")

    def test_metrics_name_the_file(self, tiny_metric: PickScoreMetric, tmp_path: Path) -> None:
        floats, narrow = tmp_path / "floats.tiff", tmp_path / "narrow.png"
        PIL.Image.new("F", (5, 4)).save(floats)
        picture(1, 300).save(narrow)
        with pytest.raises(ImageError, match=rf"^image 1 \({floats}\) has mode 'F'"):
            tiny_metric.compute("a cat", [picture(), floats])
        with pytest.raises(ImageError, match=rf"^image 1 \({narrow}\): one side may be at most 200"):
            list(pixel_lists([picture(), narrow], SmartResize(), batch_size=2, device=CPU))
        with pytest.raises(ImageError, match=r"^image 1: one side may be at most 200"):
            images = [picture(), torch.zeros(3, 300, 1)]
            list(pixel_lists(images, SmartResize(), batch_size=2, device=CPU))

    def test_fid_names_what_it_skips(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        paths = [tmp_path / "a.png", tmp_path / "floats.tiff", tmp_path / "gone.png"]
        picture().save(paths[0])
        PIL.Image.new("F", (5, 4)).save(paths[1])
        expected = [
            rf"skipped: .*image 1 \({paths[1]}\) has mode 'F'",
            rf"skipped: .*image 2: there is no file '{paths[2]}'",
        ]

        def batches() -> Iterator[list[Path]]:
            yield paths

        for source, batch in ((paths, ""), (batches(), "batch 0, ")):
            caplog.clear()
            reader = ImageReader(
                source, PREPROCESSINGS["clean"], batch_size=2, num_workers=2, on_error="skip"
            )
            assert (sum(map(len, reader)), reader.skipped) == (1, 2)
            for record, message in zip(caplog.records, expected, strict=True):
                assert record.getMessage().startswith(f"skipped: {batch}image")
                assert re.match(message, record.getMessage())


class TestFolders:
    def test_pictures_that_are_left_out_are_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("a.png", "b.GIF", "c.gif", "below/d.avif", "below/e.txt", ".f.gif", "g"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
        assert image_files(tmp_path) == [tmp_path / "a.png"]
        (record,) = caplog.records
        assert record.getMessage().startswith(f"left out 1 .avif and 2 .gif files in {tmp_path}:")
        caplog.clear()
        (tmp_path / "a.png").unlink()
        with pytest.raises(ValueError, match=r"no images in .*; left out 1 \.avif and 2 \.gif files"):
            image_files(tmp_path)
        assert not caplog.records

    def test_the_home_folder_is_meant_by_a_tilde(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "folder").mkdir()
        picture().save(tmp_path / "folder" / "a.png")
        reader = ImageReader(
            "~/folder", PREPROCESSINGS["clean"], batch_size=2, num_workers=0, on_error="raise"
        )
        assert sum(map(len, reader)) == 1


_MEASURE = """
import sys, warnings
from pathlib import Path
import PIL.Image, torch
from diffsynth_metrics.fid.preprocessing import PREPROCESSINGS
from diffsynth_metrics.fid.sources import ImageReader
from diffsynth_metrics.pixels.batches import pixel_lists
from diffsynth_metrics.pixels.transforms import Letterbox, ShortestEdgeCrop, SmartResize

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

warnings.simplefilter("ignore")  # Pillow's about so many pixels
name, *files = sys.argv[1:]
files = [Path(file) for file in files]
transforms = {"crop": ShortestEdgeCrop(), "letterbox": Letterbox(), "smart": SmartResize()}
transforms["letterbox without antialias"] = Letterbox(antialias=False)
before = peak()
if name == "pillow":
    with PIL.Image.open(files[0]) as image:
        image.load()
    image.convert("RGB")
elif name in transforms:
    list(pixel_lists(files, transforms[name], batch_size=4, device=torch.device("cpu")))
else:
    list(ImageReader(files, PREPROCESSINGS[name], batch_size=4, num_workers=4, on_error="raise"))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_picture_of_169_megapixels_takes_what_pillow_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PIL.Image.new("P", (13000, 13000), 3).save(path)
    assert path.stat().st_size < 100_000

    def peak(name: str, count: int) -> int:
        command = [sys.executable, "-c", _MEASURE, name, *[str(path)] * count]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pillow = peak("pillow", 1)
    for name in ("crop", "letterbox", "letterbox without antialias", "smart", *PREPROCESSINGS):
        assert peak(name, 2) < 1.2 * pillow, name


_MEASURE_LONG = """
import itertools, json, sys
from pathlib import Path
import PIL.Image, torch
from diffsynth_metrics.errors import ImageError
from diffsynth_metrics.pixels.batches import pixel_lists
from diffsynth_metrics.pixels.transforms import Letterbox, ShortestEdgeCrop, SmartResize

def memory(line):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(line + ":")[2].split()[0])

def run(transform, image):
    (pixels,), = pixel_lists([image], transform, batch_size=4, device=torch.device("cpu"))
    if image is not None and getattr(image, "requires_grad", False):
        pixels.sum().backward()

grown = {}
for transform in (ShortestEdgeCrop(), Letterbox(), SmartResize()):
    run(transform, torch.rand(3, 32, 32, requires_grad=True))
    for form, size in itertools.product(("pil", "bytes", "float"), ((1, 20000), (20000, 1))):
        image = PIL.Image.new("RGB", size, "red")
        if form != "pil":
            image = torch.zeros(3, *size, dtype=torch.uint8)
        if form == "float":
            image = (image / 255).requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = memory("VmRSS")
        try:
            run(transform, image)
        except ImageError as error:
            assert "one side may be at most 200 times the other" in str(error)
        grown[f"{transform} {form} {size}"] = memory("VmHWM") - before
print(json.dumps(grown))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_a_very_long_picture_takes_what_its_crop_takes() -> None:
    command = [sys.executable, "-c", _MEASURE_LONG]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    for case, kilobytes in json.loads(result.stdout).items():
        assert kilobytes < 300_000, (case, kilobytes)


def test_pictures_in_memory_are_bounded_by_their_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small pictures are decoded together; one above the budget is decoded while no other is."""
    monkeypatch.setattr("diffsynth_metrics.pixels.batches._PIXELS_IN_FLIGHT", 3 * 100)
    monkeypatch.setattr("diffsynth_metrics.pixels.batches.cpu_count", lambda: 8)
    changed = threading.Condition()
    in_flight: list[int] = []
    together = []

    def too_many() -> bool:
        return sum(in_flight) > 300 and in_flight != [900]

    class Watched(ShortestEdgeCrop):
        def from_pil(self, image: PIL.Image.Image) -> torch.Tensor:
            with changed:
                in_flight.append(image.width * image.height)
                together.append(list(in_flight))
                changed.notify_all()
                changed.wait_for(too_many, timeout=0.02)  # a chance for one that must not come
                in_flight.remove(image.width * image.height)
            return super().from_pil(image)

    images = [picture(10, 10)] * 20 + [picture(30, 30)] * 3 + [picture(10, 20)] * 20
    transform = Watched(size=8)
    count = sum(map(len, pixel_batches(images, transform, batch_size=16, device=CPU)))
    assert count == len(together) == 43
    assert all(sum(sizes) <= 300 or sizes == [900] for sizes in together)

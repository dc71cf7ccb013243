"""A file that is as it was is not read again by the next call; one that may have changed is."""

from __future__ import annotations

import io
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from counting import Brightness, Difference, gray, gray_files

from diffsynth_metrics.evaluation import Results, Sample, reading, score
from diffsynth_metrics.evaluation.run_folder import RunFolder
from diffsynth_metrics.evaluation.samples import PackedImage


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are read, in an hour from now: nothing was written a moment ago."""
    names: list[str] = []
    really, now = reading.read_image, time.time_ns

    def read_image(image: Any, name: str) -> Any:
        names.append(Path(name).name)
        return really(image, name)

    monkeypatch.setattr(reading, "read_image", read_image)
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
    return names


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return gray_files(tmp_path / "pictures", 4)


def brightness_of(results: Results) -> list[float]:
    return list(results.to_pandas()["score"])


def test_what_is_unchanged_is_not_read_again(
    tmp_path: Path, samples: list[Sample], read: list[str]
) -> None:
    out = tmp_path / "run"
    first = score(samples, Brightness(), out=out)
    assert len(read) == 4
    assert score(samples, Brightness(), out=out).to_pandas().equals(first.to_pandas())
    assert score(samples[::-1], Brightness(), out=out, workers=1).summary().records()[0]["scored"] == 4
    assert len(read) == 4


def test_another_file_of_the_same_size_and_date_is_read(
    tmp_path: Path, samples: list[Sample], read: list[str]
) -> None:
    out, file = tmp_path / "run", Path(str(samples[2].image))
    PIL.Image.new("RGB", (8, 8)).save(file, format="BMP")
    score(samples, Brightness(), out=out)
    before = file.stat()
    PIL.Image.new("RGB", (8, 8), (200, 200, 200)).save(file, format="BMP")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    assert brightness_of(score(samples, Brightness(), out=out)) == [0, 1, 200, 3]
    assert read[4:] == [file.name]


def test_what_was_written_a_moment_ago_is_read_again(
    tmp_path: Path, samples: list[Sample], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: Path(str(samples[0].image)).stat().st_ctime_ns)
    for count in (4, 8):
        score(samples, Brightness(), out=tmp_path / "run")
        assert len(read) == count


def test_what_could_not_be_read_is_tried_again(
    tmp_path: Path, samples: list[Sample], read: list[str], metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, out, distance = reading.read_image, tmp_path / "run", metrics("fd_dinov2")
    gray_files(tmp_path / "real", 4, start=90)

    def broken(image: Any, name: str) -> Any:
        if "pictures/0001" in name:
            raise OSError("the disk does not answer")
        return really(image, name)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_image", broken)
        results = score(samples, [Brightness(), distance], out=out, reference=tmp_path / "real")
    assert list(results.to_pandas()["error_type"]) == [None, "OSError", None, None]
    assert results.sets[0]["count"] == 3
    for wanted in (distance, Brightness()):
        reference = {"reference": tmp_path / "real"} if wanted is distance else {}
        results = score(samples, wanted, out=out, **reference)
    assert results.sets[0]["count"] == 4 and brightness_of(results) == [0, 1, 2, 3]


def test_an_id_that_has_another_file_is_read(
    tmp_path: Path, samples: list[Sample], read: list[str]
) -> None:
    score(samples, Brightness(), out=tmp_path / "run")
    samples[0] = replace(samples[0], image=samples[3].image)
    assert brightness_of(score(samples, Brightness(), out=tmp_path / "run")) == [3, 1, 2, 3]
    assert read[4:] == ["0003.png"]


def test_sources_are_looked_at_too(tmp_path: Path, samples: list[Sample], read: list[str]) -> None:
    out = tmp_path / "run"
    edits = [replace(sample, sources=(samples[0].image,)) for sample in samples[1:]]
    score(edits, Brightness(), out=out)
    score(edits, Difference(), out=out)  # reads each picture again, with its source
    assert len(read) == 9
    score(edits, Difference(), out=out)
    assert len(read) == 9
    gray(Path(str(samples[0].image)), 100)
    frame = score(edits, Difference(), out=out).to_pandas()
    assert list(frame["score"][frame["metric"] == "Difference"]) == [-99, -98, -97]
    score(edits, [Brightness(), Difference()], out=out)
    assert len(read) == 15
    score(edits, Brightness(2), out=out)  # reads the pictures only, and what is known of sources stays
    score(edits, Difference(), out=out)
    assert len(read) == 18
    gray(Path(str(samples[0].image)), 60)
    frame = score(edits, Difference(), out=out).to_pandas()
    assert list(frame["score"][frame["metric"] == "Difference"]) == [-59, -58, -57]


def test_a_shard_that_was_written_anew_is_read(
    tmp_path: Path, samples: list[Sample], read: list[str]
) -> None:
    shard = tmp_path / "shard.tar"

    def write(shift: int) -> None:
        with tarfile.open(shard, "w") as opened:
            for index, sample in enumerate(samples):
                gray(Path(str(sample.image)), index + shift)
                opened.add(str(sample.image), arcname=f"{index}.png")

    write(0)
    packed = [
        replace(sample, image=PackedImage(shard, f"{index}.png")) for index, sample in enumerate(samples)
    ]
    for _ in range(2):
        assert brightness_of(score(packed, Brightness(), out=tmp_path / "run")) == [0, 1, 2, 3]
    assert len(read) == 4
    write(50)
    assert brightness_of(score(packed, Brightness(), out=tmp_path / "run")) == [50, 51, 52, 53]


def test_a_shard_that_only_looks_unchanged_is_read(
    tmp_path: Path, samples: list[Sample], read: list[str]
) -> None:
    shard, out = tmp_path / "shard.parquet", tmp_path / "run"

    def write(value: int) -> None:
        file = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (value,) * 3).save(file, format="BMP")
        pq.write_table(pa.table({"image": [file.getvalue()]}), shard, compression="none")
        os.utime(shard, ns=(10**18, 10**18))

    packed = [replace(samples[0], image=PackedImage(shard, "image[0]"))]
    for value in (10, 99):  # of one size and date, in one process
        write(value)
        assert brightness_of(score(packed, Brightness(), out=out)) == [value]


def test_files_of_a_shard_are_told_apart_by_their_whole_name(
    tmp_path: Path, samples: list[Sample], read: list[str]
) -> None:
    shard = tmp_path / "shard.tar"
    names = ["a/b.png", "a//b.png", "a/./b.png"]
    with tarfile.open(shard, "w") as opened:
        for name, sample in zip(names, samples, strict=False):
            opened.add(str(sample.image), arcname=name)
    for value, name in enumerate(names):
        one = replace(samples[0], image=PackedImage(shard, name))
        assert brightness_of(score([one], Brightness(), out=tmp_path / "run")) == [value]


def test_what_is_known_outlives_a_call_that_is_killed(
    tmp_path: Path, samples: list[Sample], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    score(samples, Brightness(), out=out)
    metric = Brightness(2)
    metric.stop = (0, KeyboardInterrupt())
    write, written = RunFolder.write_samples, []

    def write_once(folder: RunFolder, table: pa.Table) -> None:
        if not written:  # a process that is killed does not come to write at the end
            write(folder, table)
        written.append(table)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "write_samples", write_once)
        score(samples, metric, out=out)
    assert len(written) == 2
    del read[:]
    score(samples, Brightness(), out=out)
    assert read == []


def test_a_folder_of_an_earlier_version_and_no_resume_read_everything(
    tmp_path: Path, samples: list[Sample], read: list[str], metrics: Any
) -> None:
    out = tmp_path / "run"
    score(samples, Brightness(), out=out)
    file = out / "samples.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["stamps"]), file)
    score(samples, Brightness(), out=out)
    assert len(read) == 8
    score(samples, Brightness(), out=out, resume=False)
    assert len(read) == 12
    distance = metrics("fd_dinov2")
    distance.statistics([sample.image for sample in samples]).save(tmp_path / "real.npz")
    for resume, count in ((True, 12), (False, 16)):
        score(samples, distance, out=out, reference=tmp_path / "real.npz", resume=resume)
        assert len(read) == count


def test_pictures_in_memory_are_known_by_their_pixels_only(
    tmp_path: Path, samples: list[Sample], read: list[str]
) -> None:
    in_memory = [replace(one, image=PIL.Image.open(one.image)) for one in samples]
    for count in (4, 8):
        score(in_memory, Brightness(), out=tmp_path / "run")
        assert len(read) == count

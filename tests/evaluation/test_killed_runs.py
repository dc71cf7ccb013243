"""A run that is interrupted once and killed twice has every row in the end, and none was made twice."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, describe, draw_shape
from diffsynth_metrics.evaluation import Results, Sample, score
from diffsynth_metrics.evaluation.run_folder import RunFolder

SCRIPT = Path(__file__).with_name("killed_run.py")
COUNT = 300
CORRUPT, MISSING = 40, 250


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A CSV file of 300 pictures; one is corrupt and one is missing."""
    captions = [(shape, color) for shape in SHAPES for color in COLORS if color != "black"]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "prompt", "image", "seed"])
        for index in range(COUNT):
            shape, color = captions[index % len(captions)]
            picture = draw_shape(shape, color, background="black", image_size=64)
            picture.putpixel((0, 0), (index % 256, index // 256, 0))
            name = f"{index:03d}.png"
            picture.save(tmp_path / name)
            rows.writerow([f"s{index}", describe(shape, color), name, index // len(captions)])
    (tmp_path / f"{CORRUPT:03d}.png").write_bytes(b"this was a picture")
    (tmp_path / f"{MISSING:03d}.png").unlink()
    return tmp_path / "data.csv"


@pytest.mark.slow  # four processes that import torch; 40 s
def test_nothing_is_lost_and_nothing_is_made_twice(
    tmp_path: Path, data: Path, tiny: Callable[[str], Path]
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        str(SCRIPT),
        str(data),
        str(out),
        str(tiny("clip")),
        str(tiny("pickscore")),
    ]
    for stop, parts in ((signal.SIGINT, 8), (signal.SIGKILL, 40), (signal.SIGKILL, 80)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(list(out.glob("parts/*.parquet"))) < parts:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        with pytest.raises(BlockingIOError, match="another process is writing"):
            score([Sample("s0", "", "0.png")], "shapes", out=out)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0, "it was done before it was stopped"
        assert ("KeyboardInterrupt" in errors) == (stop is signal.SIGINT)
        assert 6 * parts <= len(Results.open(out)) < 3 * COUNT
    subprocess.run(command, check=True, stderr=subprocess.PIPE, timeout=120)

    frame = Results.open(out).to_pandas()
    assert len(frame) == 3 * COUNT
    assert frame.groupby("metric").size().to_dict() == {"clip": 300, "pickscore": 300, "shapes": 300}
    failed = frame[frame["error"].notna()]
    assert sorted(failed["id"]) == sorted([f"s{CORRUPT}", f"s{MISSING}"] * 3)
    assert (failed["score"].isna() & failed["error_type"].notna()).all()
    assert frame["score"].isna().sum() == 6
    for _, row in failed.iterrows():
        assert row["image"] in row["error"]
    written = [key for part in RunFolder(out).parts() for key in part.column("key").to_pylist()]
    assert len(written) == len(set(written)) == 3 * COUNT
    assert len(set(frame["run_id"])) == 4

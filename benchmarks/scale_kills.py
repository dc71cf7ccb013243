"""Kill processes at random moments, and check that nothing is lost: ``python scale_kills.py``.

First two processes of torchrun, each killed twice, finished by one process. Then a Ray cluster of this
machine: an actor of two is killed, then the driver, and three actors go on. The rows and the statistics
must be those of one process that nobody killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))

import quick_metrics  # noqa: E402

BLOCK = 500


def write_pictures(folder: Path, count: int) -> None:
    for index in range(count):
        picture = PIL.Image.new("RGB", (64, 64), (index % 256, index // 256, 7 * index % 256))
        picture.paste((255, 255, 255), (index % 40, index % 50, index % 40 + 20, index % 50 + 10))
        picture.save(folder / f"{index:05d}.png")


def run(folder: Path, out: Path, workers: str, engine: str) -> None:
    """Score the pictures of a folder: what is killed."""
    import torch

    from diffsynth_metrics.evaluation import Sample, score, set_scoring

    torch.set_num_threads(1)
    set_scoring._BLOCK = BLOCK  # so that there are several
    samples = [Sample(file.stem, None, file) for file in sorted((folder / "pictures").iterdir())]
    if rank := os.environ.get("RANK"):
        (folder / f"pid.{rank}").write_text(str(os.getpid()))
    score(
        samples,
        {"brightness": quick_metrics.Brightness(0.004), "pixels": quick_metrics.PixelFID()},
        reference=samples[::3],
        out=out,
        workers=workers if workers == "ranks" else int(workers) or None,
        engine=engine,
        progress=False,
    )


def start(folder: Path, out: Path, workers: str, engine: str = "processes", *before: str) -> Any:
    command = [sys.executable, *before, str(HERE), "--child", str(folder), str(out), workers, engine]
    log = (folder / "log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log)


def rows_of(out: Path) -> Any:
    from diffsynth_metrics.evaluation import Results

    return Results.open(out).to_pandas() if (out / "run.json").exists() else []


def wait_for_more(out: Path, more: int, process: Any) -> None:
    """Return a random moment after some more parts were written, or when the process is done."""
    parts = len(list((out / "parts").glob("*"))) + more
    while len(list((out / "parts").glob("*"))) < parts and process.poll() is None:
        time.sleep(0.05)
    time.sleep(random.uniform(0, 2))


def kill_ranks(folder: Path, out: Path) -> None:
    """Kill each of two processes of torchrun twice, then torchrun."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=9")
    process = start(folder, out, "ranks", "processes", *torchrun)
    for rank in (0, 1, 1, 0):
        wait_for_more(out, 2, process)
        if process.poll() is None:
            pid = int((folder / f"pid.{rank}").read_text())
            try:
                os.kill(pid, signal.SIGKILL)
                print(f"killed rank {rank}, {len(rows_of(out)):,} rows are there", flush=True)
            except ProcessLookupError:
                print(f"rank {rank} was being started again by torchrun", flush=True)
    wait_for_more(out, 1, process)
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
        child.kill()
    process.kill()
    process.wait()
    print(f"killed torchrun, {len(rows_of(out)):,} rows are there", flush=True)
    assert start(folder, out, "0").wait() == 0, (folder / "log").read_text()


def kill_ray(folder: Path, out: Path) -> None:
    """Kill an actor of two, then the driver; three actors go on."""
    process = start(folder, out, "2", "ray")
    wait_for_more(out, 2, process)
    actors = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.cmdline() and child.cmdline()[0].startswith("ray::_Actor")
    ]
    random.choice(actors).kill()
    print(f"killed one actor of {len(actors)}, {len(rows_of(out)):,} rows are there", flush=True)
    wait_for_more(out, 2, process)
    process.kill()
    process.wait()
    print(f"killed the driver, {len(rows_of(out)):,} rows are there", flush=True)
    assert start(folder, out, "3", "ray").wait() == 0, (folder / "log").read_text()


def check(out: Path, reference: Path, count: int) -> None:
    """Compare a run with the one that nobody killed."""
    from diffsynth_metrics.evaluation import Results
    from diffsynth_metrics.evaluation.run_folder import RunFolder

    frame, expected = rows_of(out), rows_of(reference)
    assert list(frame["id"]) == list(expected["id"]) and len(frame) == count
    difference = np.abs(frame["score"] - expected["score"]).max()
    keys = [key for part in RunFolder(out).parts() for key in part.column("key").to_pylist()]
    assert difference < 1e-5 and len(set(keys)) == count
    sets = [Results.open(folder).sets[0] for folder in (out, reference)]
    assert sets[0]["count"] == sets[1]["count"] == count
    relative = max(
        abs(sets[0][name] / sets[1][name] - 1) for name in ("score", "mean_norm", "covariance_norm")
    )
    assert relative < 1e-9, sets
    print(
        f"{out.name}: {count:,} samples once each ({len(keys) - count} rows made twice), scores "
        f"differ by at most {difference:.1e}, statistics by {relative:.1e} relative",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--child", nargs=4)
    options = parser.parse_args()
    if options.child:
        folder, out, workers, engine = options.child
        run(Path(folder), Path(out), workers, engine)
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        write_pictures(folder / "pictures", options.count)
        assert start(folder, folder / "one", "0").wait() == 0, (folder / "log").read_text()
        print("one process is done", flush=True)
        for kill, label in ((kill_ranks, "torchrun"), (kill_ray, "ray")):
            kill(folder, folder / label)
            check(folder / label, folder / "one", options.count)


if __name__ == "__main__":
    main()

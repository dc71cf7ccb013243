"""What the bookkeeping of ``score`` costs: ``python benchmarks/evaluation.py``.

The same pictures go through the embedded model in a plain loop and in ``score``, each in a process of
its own, in turns; the ratios are those of one round. Then memory: 3,000 and 30,000 small pictures.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import numpy as np
import PIL.Image
from report import machine

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work" / "evaluation"
PICTURES, SIDE = 3_000, 512
MEMORY_SIDE = 64
CHUNK = 256


def write_pictures(folder: Path, count: int, side: int) -> Path:
    """Write JPEGs that all differ, of some 50 kB at 512 px, and a CSV file of them."""
    manifest = folder / "data.csv"
    if manifest.exists():
        return manifest
    from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, describe, draw_shape

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    captions = [(shape, color) for shape in SHAPES for color in COLORS]
    drawn = [
        np.asarray(draw_shape(shape, color, background="gray", image_size=side, rng=Random(index)))
        for index, (shape, color) in enumerate(captions)
    ]
    grain = rng.normal(0, 4, (8, side, side, 1))
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "prompt"])
        for index in range(count):
            picture = drawn[index % len(drawn)] + np.roll(grain[index % 8], index, axis=0)
            name = f"{index:05d}.jpg"
            PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
            rows.writerow([name, describe(*captions[index % len(captions)])])
    return manifest


def worker(mode: str, manifest: Path, out: Path, limit: int) -> None:
    """Score in one way, and print seconds, CPU seconds, peak memory and the mean score."""
    import pandas  # noqa: F401  not to be counted; pyarrow imports it on first use
    import torch

    from diffsynth_metrics import CLIPMetric, ModelConfig
    from diffsynth_metrics.evaluation import Sample, score

    torch.set_num_threads(1)
    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # More samples than files are the same files under other ids, which are scored again.
    rows = [rows[index % len(rows)] for index in range(limit)]
    images = [manifest.parent / row["image"] for row in rows]
    prompts = [row["prompt"] for row in rows]
    metric.compute(prompts[:4], images[:4])
    begun, cpu = time.perf_counter(), time.process_time()
    if mode == "loop":
        scores: list[float] = []
        for start in range(0, limit, CHUNK):
            chunk = slice(start, start + CHUNK)
            scores += [row["score"] for row in metric.evaluate(prompts[chunk], images[chunk])]
        with (out / "scores.csv").open("w", newline="") as file:
            csv.writer(file).writerows(zip(images, scores, strict=True))
    else:
        samples = [Sample(str(i), prompts[i], images[i]) for i in range(limit)]
        results = score(samples, metric, out=out, progress=False)
        scores = list(results.to_pandas()["score"]) if mode == "score" else []
    measured = {
        "seconds": time.perf_counter() - begun,
        "cpu": time.process_time() - cpu,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "mean": statistics.fmean(scores) if scores else None,
    }
    print(json.dumps(measured))


def measure(mode: str, manifest: Path, out: Path, limit: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", mode, str(manifest), str(out), str(limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    measured: dict[str, float] = json.loads(done.stdout)
    print(mode, limit, measured, file=sys.stderr)
    return measured


def compare(rounds: int, count: int) -> list[str]:
    """Return the lines of the table of times."""
    manifest = write_pictures(WORK / f"{SIDE}px", PICTURES, SIDE)
    size = statistics.fmean(file.stat().st_size for file in manifest.parent.glob("*.jpg"))
    measure("loop", manifest, WORK, min(count, 500))  # brings files and code to the page cache
    lines = [
        f"{count:,} JPEGs of {SIDE} px ({size / 1000:.0f} kB each), embedded model, one thread of "
        "torch; import and loading are not counted.",
        "",
        "| round | loop, s | score, s | ratio | CPU ratio | second run, s | means differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios, cpu_ratios = [], []
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            out = Path(folder)
            modes = ("loop", "score") if number % 2 else ("score", "loop")
            done = {mode: measure(mode, manifest, out, count) for mode in modes}
            again = measure("again", manifest, out, count)
        ratios.append(done["score"]["seconds"] / done["loop"]["seconds"])
        cpu_ratios.append(done["score"]["cpu"] / done["loop"]["cpu"])
        lines.append(
            f"| {number} | {done['loop']['seconds']:.1f} | {done['score']['seconds']:.1f} | "
            f"{ratios[-1]:.2f} | {cpu_ratios[-1]:.2f} | {again['seconds']:.1f} | "
            f"{abs(done['score']['mean'] - done['loop']['mean']):.1e} |"
        )
    lines.append(
        f"| median | | | **{statistics.median(ratios):.2f}** | "
        f"**{statistics.median(cpu_ratios):.2f}** | | |"
    )
    return lines


def memory(counts: tuple[int, ...]) -> list[str]:
    """Return the lines of the table of memory."""
    manifest = write_pictures(WORK / f"{MEMORY_SIDE}px", PICTURES, MEMORY_SIDE)
    lines = [
        f"Peak memory of the process, pictures of {MEMORY_SIDE} px:",
        "",
        "| pictures | first run, MB | second run, MB |",
        "|---|---|---|",
    ]
    for count in counts:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            cells = [
                f"{measure(mode, manifest, Path(folder), count)['megabytes']:.0f}"
                for mode in ("score", "again")
            ]
        lines.append(f"| {count:,} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=PICTURES)
    parser.add_argument("--memory", type=int, nargs="*", default=[3_000, 30_000])
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS_EVALUATION.md")
    parser.add_argument("--worker", nargs=4)
    options = parser.parse_args()
    if options.worker:
        mode, manifest, out, limit = options.worker
        worker(mode, Path(manifest), Path(out), int(limit))
        return
    load, begun = os.getloadavg()[0], time.perf_counter()
    tables = [*compare(options.rounds, options.count), "", *memory(tuple(options.memory)), ""]
    head = [
        "# What the bookkeeping of `score` costs",
        "",
        machine("python benchmarks/evaluation.py", time.perf_counter() - begun),
        f"| load average at the start | {load:.1f} |",
        "",
        "Where other work shares the cores, CPU time says more than wall time.",
        "",
    ]
    options.output.write_text("\n".join([*head, *tables]), encoding="utf-8")


if __name__ == "__main__":
    main()

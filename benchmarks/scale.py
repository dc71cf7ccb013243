"""What a large run costs: ``python benchmarks/scale.py``.

A metric that does nothing scores 100,000 and 1,000,000 samples, so that what is measured is reading,
hashing, keeping rows and finding them again. Then the throughput of two workers against one, and the
arithmetic of larger runs from these figures. Each call is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import machine

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work" / "scale"
FILES = 1_000


def no_op() -> Any:
    """Return a metric that does nothing."""
    from torch import nn

    from diffsynth_metrics.base import ImageMetric, MetricCard

    class Nothing(ImageMetric):
        card = MetricCard("nothing", "image", "0", True, "0", "", "", "", "")
        transform: Any = None

        def components(self, images: Any) -> Any:
            raise NotImplementedError

        def evaluate(self, images: Any) -> Any:
            return [{"score": 0.0}] * len(images)

    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    return Nothing(network, batch_size=256)


def small_pictures(folder: Path) -> list[Path]:
    """Write pictures of some hundred bytes; many samples share one."""
    import PIL.Image

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index:04d}.png" for index in range(FILES)]
    for index, file in enumerate(files):
        if not file.exists():
            PIL.Image.new("RGB", (16, 16), (index % 256, index // 256, 0)).save(file)
    return files


def bookkeeping(count: int, out: Path) -> dict[str, float]:
    """Score samples with the metric that does nothing, and say what it took."""
    import pandas  # noqa: F401  imported on first use, not to be counted

    from diffsynth_metrics.evaluation import Sample, score

    files = [str(file) for file in small_pictures(WORK / "small")]
    metric = no_op()
    score([Sample("warm", "", files[0])], metric)
    before = _megabytes()
    samples = [
        Sample(f"sample-{index:09d}", f"a picture of thing {index // 4}", files[index % FILES])
        for index in range(count)
    ]
    of_samples = _megabytes() - before
    begun, cpu = time.perf_counter(), time.process_time()
    results = score(samples, metric, out=out, progress=False)
    assert len(results) == count
    return {
        "seconds": time.perf_counter() - begun,
        "cpu": time.process_time() - cpu,
        "samples_mb": of_samples,
        "more_mb": _megabytes() - before - of_samples,
        "parts": len(list((out / "parts").iterdir())),
        "parts_mb": sum(file.stat().st_size for file in (out / "parts").iterdir()) / 1e6,
        "samples_file_mb": (out / "samples.parquet").stat().st_size / 1e6,
    }


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def throughput(count: int, out: Path) -> dict[str, float]:
    """Score pictures of 512 px with the embedded model by one worker on one core, and by two on two."""
    from evaluation import write_pictures

    from diffsynth_metrics.evaluation import read_samples, score

    cores = sorted(os.sched_getaffinity(0))
    samples = read_samples(write_pictures(HERE / ".work" / "evaluation" / "512px", 3_000, 512))
    measured: dict[str, float] = {}
    for workers in (1, 2):
        os.sched_setaffinity(0, cores[:workers])  # with one thread for each
        seconds = []
        for limit in (8 * workers, count):  # the first is what loading costs
            begun = time.perf_counter()
            score(
                samples,
                "shapes",
                out=out / f"{workers}-{limit}",
                limit=limit,
                device="cpu",
                workers=workers,
                progress=False,
            )
            seconds.append(time.perf_counter() - begun)
        measured[f"loading_{workers}"] = seconds[0]
        measured[f"rate_{workers}"] = (count - 8 * workers) / (seconds[1] - seconds[0])
    return measured


def measure(what: str, count: int, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", what, str(count), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(what, count, measured, file=sys.stderr)
    return measured


def table_of_bookkeeping(counts: list[int]) -> tuple[list[str], dict[str, float]]:
    """Return the lines of the table, and the figures of the largest run."""
    lines = [
        "| samples | run | seconds | CPU, us per sample | samples in memory, bytes each | bookkeeping, "
        "bytes each | parts | parts, bytes per row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured: dict[str, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            for name in ("first", "again"):
                measured = measure("bookkeeping", count, Path(folder))
                lines.append(
                    f"| {count:,} | {name} | {measured['seconds']:.1f} | "
                    f"{measured['cpu'] / count * 1e6:.0f} | "
                    f"{measured['samples_mb'] / count * 1e6:.0f} | "
                    f"{measured['more_mb'] / count * 1e6:.0f} | {measured['parts']:.0f} | "
                    f"{measured['parts_mb'] / count * 1e6:.0f} |"
                )
                if name == "first":
                    first = measured
    return lines, {
        "cpu_us": first["cpu"] / counts[-1] * 1e6,
        "bytes_row": (first["parts_mb"] + first["samples_file_mb"]) / counts[-1] * 1e6,
        "bytes_memory": (first["samples_mb"] + first["more_mb"]) / counts[-1] * 1e6,
        "again_us": measured["cpu"] / counts[-1] * 1e6,
    }


# Pictures a second of one accelerator or server, measured elsewhere in benchmarks/ or assumed; a day has
# 86,400 seconds.
RATES = {
    "the embedded model, one CPU thread (measured here)": None,
    "a CLIP-sized metric on one GPU (assumed)": 500.0,
    "a 7 B judge on one GPU (assumed)": 0.5,
}


def arithmetic(figures: dict[str, float], rate: float | None) -> list[str]:
    """Return what a million and a billion pictures need, by arithmetic on what was measured."""
    lines = ["| | a million | a billion |", "|---|---|---|"]

    def line(name: str, text: str, of_count: Any) -> None:
        lines.append(f"| {name} | {text.format(of_count(1e6))} | {text.format(of_count(1e9))} |")

    for name, assumed in RATES.items():
        if each := assumed or rate:
            line(f"days of {name}, {each:g} a second", "{:,.2f}", lambda n, r=each: n / r / 86_400)
    line(
        "hours of the process that owns a run, one thread",
        "{:,.1f}",
        lambda n: n * figures["cpu_us"] / 1e6 / 3600,
    )
    line("its memory, GB", "{:,.1f}", lambda n: n * figures["bytes_memory"] / 1e9)
    line("rows of one metric on disk, GB", "{:,.2f}", lambda n: n * figures["bytes_row"] / 1e9)
    line("parts at 20,000 rows", "{:,.0f}", lambda n: n / 20_000)
    line("hours to find finished rows again", "{:,.2f}", lambda n: n * figures["again_us"] / 3.6e9)
    line("reading pictures of 200 kB at 1 GB/s, hours", "{:,.1f}", lambda n: n * 2e5 / 1e9 / 3600)
    line("FID: blocks of 5,000 at 34 MB until merged, GB", "{:,.0f}", lambda n: n / 5000 * 0.034)
    line("FID: merging blocks at 0.1 s, hours", "{:,.2f}", lambda n: n / 5000 * 0.1 / 3600)
    line("runs of 10 million samples", "{:,.1f}", lambda n: n / 1e7)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--pictures", type=int, default=3_000)
    parser.add_argument("--no-throughput", action="store_true")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS_SCALE.md")
    parser.add_argument("--worker", nargs=3)
    options = parser.parse_args()
    if options.worker:
        what, count, out = options.worker
        print(json.dumps(globals()[what](int(count), Path(out))))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    load, begun = os.getloadavg()[0], time.perf_counter()
    table, figures = table_of_bookkeeping(options.counts)
    what = (
        f"A metric that does nothing; {FILES:,} pictures of 16 px under many ids; `first` scores all, "
        "`again` finds all rows, scores nothing and reads no picture that is unchanged. Memory is that "
        "of the process beyond its imports."
    )
    lines = ["## Bookkeeping", "", what, "", *table, ""]
    rate = None
    if not options.no_throughput:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            measured = measure("throughput", options.pictures, Path(folder))
        rate = measured["rate_1"]
        lines += [
            "## Two workers against one",
            "",
            f"{options.pictures:,} JPEGs of 512 px, embedded model on the CPU, one thread each. One "
            f"worker: {rate:.0f} pictures a second, two: {measured['rate_2']:.0f}, "
            f"**{measured['rate_2'] / rate:.2f} times**, without the start of "
            f"{measured['loading_1']:.0f} and {measured['loading_2']:.0f} s.",
            "",
        ]
    lines += ["## Larger runs, by arithmetic", "", *arithmetic(figures, rate), ""]
    head = [
        "# What a large run costs",
        "",
        machine("python benchmarks/scale.py", time.perf_counter() - begun),
        f"| load average at the start | {load:.1f} |",
        "",
    ]
    options.output.write_text("\n".join([*head, *lines]), encoding="utf-8")


if __name__ == "__main__":
    main()

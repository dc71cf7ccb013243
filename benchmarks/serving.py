"""What HTTP costs: eight clients of a server against one process that calls the metric.

    python benchmarks/serving.py

The server is a process of its own, the clients are threads of another one, and each sends one picture at
a time, as training loops do. The direct process calls ``compute`` in batches of 16 with the same files.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
import torch

from diffsynth_metrics import ModelConfig, PickScoreMetric
from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, draw_shape
from diffsynth_metrics.serving import RemoteMetric
from diffsynth_metrics.testing import tiny_checkpoint

CLIENTS = 8


def pictures(folder: Path) -> list[Path]:
    files = []
    for shape in SHAPES:
        for color in COLORS:  # none of which is the background
            files.append(folder / f"{color}_{shape}.jpg")
            draw_shape(shape, color, image_size=512, background="gray").save(files[-1], quality=90)
    return files[:48]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("RESULTS_SERVING.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        weights = tiny_checkpoint("pickscore", folder / "tiny")
        files = pictures(folder)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "diffsynth_metrics", "serve", f"pickscore={weights}"]
        server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"])
        try:
            while True:
                try:
                    requests.get(url + "/health", timeout=1)
                    break
                except requests.ConnectionError:
                    time.sleep(0.2)
            direct = PickScoreMetric.from_pretrained(
                ModelConfig(path=weights), device="cpu", batch_size=16
            )
            remotes = [RemoteMetric(url) for _ in range(CLIENTS)]
            rates: dict[str, list[float]] = {"direct": [], "served": []}
            for turn in range(arguments.rounds + 1):
                start = time.perf_counter()
                for first in range(0, len(files), 16):
                    direct.compute("a picture", files[first : first + 16])
                middle = time.perf_counter()
                with ThreadPoolExecutor(CLIENTS) as pool:
                    jobs = [
                        pool.submit(remotes[index % CLIENTS].compute, "a picture", file)
                        for index, file in enumerate(files)
                    ]
                    for job in jobs:
                        job.result()
                end = time.perf_counter()
                if turn:  # the first round warms up
                    rates["direct"].append(len(files) / (middle - start))
                    rates["served"].append(len(files) / (end - middle))
        finally:
            server.terminate()
            server.wait()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(s / d for s, d in zip(rates["served"], rates["direct"], strict=True))
    text = f"""# Metrics behind HTTP

`python benchmarks/serving.py --rounds {arguments.rounds}`, {platform.machine()}, {os.cpu_count()} cores,
torch {torch.__version__}; load average at the end {os.getloadavg()[0]:.1f}.
Tiny PickScore, {len(files)} JPEGs of 512x512.

| | images/s (median) |
|---|--:|
| one process, batches of 16 | {medians["direct"]:.1f} |
| server, {CLIENTS} clients with one picture each | {medians["served"]:.1f} |
| served / direct, median of the rounds | {ratio:.2f} |

The tiny network takes no time: what is compared is decoding and resizing on both sides, and base64,
JSON and HTTP of server and clients, who share the cores.
"""
    print(text)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

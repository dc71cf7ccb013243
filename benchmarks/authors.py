"""Compare HPSv2, Aesthetic and ImageReward with diffsynth.metrics and with their authors' own code.

``python benchmarks/authors.py``; the authors' packages are those of ``tests/parity/requirements.txt``.
The three packages get the same weights, pictures and prompts, each in a process of its own. Only one
works at a time, they take turns in every round, and who begins alternates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import materials
import report
from compare import HERE, LOGS, WORK, Process, peer_python, say

METRICS = {"hpsv2": "HPSv2", "aesthetic": "Aesthetic", "image_reward": "ImageReward"}
PACKAGES = ("ours", "upstream", "authors")
SOURCES = {"tiny": ("memory", "files"), "full": ("memory",)}
PICTURES = 16

Seconds = dict[str, list[float]]
Result = dict[str, Any]  # "seconds", "differences" by package, "prepare" in seconds
Results = dict[str, dict[str, Result]]  # by metric, by source

TEXT = """Images per second of one call with 16 pictures of 1024x1024, which lie decoded in memory or
are PNG files, one prompt of 70 tokens, another in each round; medians, and the lowest and highest ratio
of one round.
**Above 1, ours is faster.** `upstream` is `diffsynth.metrics` 2.1.12, `authors` is the authors' code:
`hpsv2.score`, which loads its checkpoint in every call and encodes the prompt once per picture;
`ImageReward.score`, picture by picture; simple-aesthetics-predictor's network after OpenAI's own
transform, picture by picture. The sizes and metrics may be of several runs
of one day on the same machine."""

LIMITS = """**Two layers of width 32.** Nearly all of such a call is the making of pixels. The table
gives what the official pixels of 16 pictures cost on all cores with nothing around them (those of files
with the decoding), next to upstream's whole call: their ratio is what an implementation without any
other cost could reach.
Upstream resizes with torch's uint8 kernel, which is faster and whose pixels are not the official ones;
for HPSv2 it crops the centre, where the authors' letterbox resizes floats.

**Full size.** All three run the same matrix products, and on this machine a call is little else. The
authors' Aesthetic reads no prompt, and their ImageReward lets the prompt attend to each picture, which
nobody can do once for all: only HPSv2's loop does work that can be left out."""


def folder_of(name: str, size: str) -> Path:
    """Write the weights and processor files of a metric, once."""
    folder = WORK / f"{size}_{name}"
    if not (folder / "ready").exists():
        say(f"writing {folder.name}")
        materials.metric_folder(name, size, folder)
        (folder / "ready").touch()
    return folder


def measure(name: str, size: str, pythons: dict[str, str], rounds: int) -> dict[str, Result]:
    """Time the calls of all three, and our preparation of the pictures, for each source of pictures."""
    folder = folder_of(name, size)
    paths = materials.pictures(WORK / "pictures", PICTURES, 1024)["png"]
    results: dict[str, Result] = {}
    workers = {p: Process(p, pythons[p], script="authors_worker.py") for p in PACKAGES}
    try:
        for package, worker in workers.items():
            say(f"{size} {name}: loading {package}")
            worker("load", name=name, folder=str(folder), size=size)
            few = paths if size == "tiny" else paths[:1]
            worker("score", prompt="warm up", paths=few, source="memory")
        for source in SOURCES[size]:
            results[source] = _rounds(workers, f"{size} {name}", paths, source, rounds)
            prepared = workers["ours"]("prepare", name=name, paths=paths, source=source)
            results[source]["prepare"] = prepared["seconds"]
    finally:
        for worker in workers.values():
            worker.__exit__()
    return results


def _rounds(
    workers: dict[str, Process], label: str, paths: list[str], source: str, rounds: int
) -> Result:
    seconds: Seconds = {package: [] for package in PACKAGES}
    scores: dict[str, list[float]] = {package: [] for package in PACKAGES}
    for index in range(rounds):
        prompt = materials.prompt_of(70, f"{label}/{source}/{index}")
        for package in PACKAGES[index % 3 :] + PACKAGES[: index % 3]:
            answer = workers[package]("score", prompt=prompt, paths=paths, source=source)
            seconds[package].append(answer["seconds"])
            scores[package] += answer["scores"]
        say(f"{label}, {source}: " + ", ".join(f"{p} {seconds[p][-1]:.3f} s" for p in PACKAGES))
    differences = {
        package: max(abs(a - b) for a, b in zip(scores["ours"], scores[package], strict=True))
        for package in PACKAGES[1:]
    }
    return {"seconds": seconds, "differences": differences}


def _labelled(results: Results) -> list[tuple[str, Result]]:
    """Return what a row is called, and its result."""
    titles = {"memory": "", "files": ", PNG files"}
    return [
        (METRICS[name] + titles[source], result)
        for name, by_source in results.items()
        for source, result in by_source.items()
    ]


def table(results: Results) -> str:
    rows = [
        "| | ours | upstream | authors | ours / upstream | ours / authors | rounds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for label, result in _labelled(results):
        seconds = result["seconds"]
        rates = [f"{PICTURES / statistics.median(seconds[p]):.3g}" for p in PACKAGES]
        cells = [_ratio(seconds, package) for package in PACKAGES[1:]]
        rows.append(f"| {label} | {' | '.join(rates + cells)} | {len(seconds['ours'])} |")
    return "\n".join(rows)


def _ratio(seconds: Seconds, package: str) -> str:
    ratio = statistics.median(seconds[package]) / statistics.median(seconds["ours"])
    each = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[package], strict=True)]
    return f"**{ratio:.2f}** ({min(each):.2f} to {max(each):.2f})"


def _floor(results: Results) -> str:
    rows = ["| 16 pictures, milliseconds | our pixels | our call | upstream's call | largest ratio |"]
    rows.append("|---|--:|--:|--:|--:|")
    for label, result in _labelled(results):
        ours, upstream = (statistics.median(result["seconds"][p]) for p in PACKAGES[:2])
        cells = [f"{seconds * 1e3:.0f}" for seconds in (result["prepare"], ours, upstream)]
        rows.append(f"| {label} | {' | '.join(cells)} | {upstream / result['prepare']:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", metavar="PATH", help="Python of an environment with diffsynth")
    parser.add_argument("--only", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "full"), default=["tiny", "full"])
    parser.add_argument("--tiny-rounds", type=int, default=15)
    parser.add_argument("--full-rounds", type=int, default=3)
    arguments = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    peer = arguments.peer_python or peer_python()
    pythons = {"ours": sys.executable, "authors": sys.executable, "upstream": peer}
    start, found = time.perf_counter(), WORK / "authors_by_source.json"
    results: dict[str, Any] = json.loads(found.read_text()) if found.exists() else {}
    for size in arguments.sizes:
        rounds = arguments.tiny_rounds if size == "tiny" else arguments.full_rounds
        for name in arguments.only:
            results.setdefault(size, {})[name] = measure(name, size, pythons, rounds)
            found.write_text(json.dumps(results))
    sections = [
        "# HPSv2, Aesthetic and ImageReward against diffsynth.metrics and their authors' code",
        TEXT,
    ]
    sections.append(report.machine("python benchmarks/authors.py", time.perf_counter() - start))
    for size, title in (("tiny", "Two layers of width 32"), ("full", "Full size, float32")):
        if size in results:
            sections += [f"## {title}", table(results[size]), _differences(results[size])]
    sections += ["## Limits", LIMITS, _floor(results["tiny"])]
    text = "\n\n".join(sections) + "\n"
    print(text)
    if len(results) == len(SOURCES) and all(set(rows) == set(METRICS) for rows in results.values()):
        (HERE / "RESULTS_AUTHORS.md").write_text(text, encoding="utf-8")


def _differences(results: Results) -> str:
    found = [
        f"{label} {result['differences']['upstream']:.1g} from upstream, "
        f"{result['differences']['authors']:.1g} from the authors"
        for label, result in _labelled(results)
    ]
    return f"Largest difference of a score of ours in these calls: {'; '.join(found)}."


if __name__ == "__main__":
    main()

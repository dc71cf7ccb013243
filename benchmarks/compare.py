"""Compare this package with diffsynth.metrics 2.1.12 in one run: ``python benchmarks/compare.py``.

Both packages get the same weights, pictures and prompts, each in a process of its own. Only one works
at a time, they take turns in every round, and who begins alternates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import materials
import report
from report import Measurements, Row

PEER = "diffsynth==2.1.12"
PACKAGES = ("ours", "upstream")
SECTIONS = ("import", "load", "tiny", "full", "peak")
HERE = Path(__file__).resolve().parent
WORK = HERE / ".work"
LOGS = WORK / "logs"
TITLES = {"clip": "CLIP", "pickscore": "PickScore"}

Answer = dict[str, Any]
Interpreters = dict[str, str]


class Process:
    """A worker of one package; leaving the ``with`` block ends it."""

    def __init__(self, package: str, python: str, script: str = "worker.py") -> None:
        """Start the interpreter; nothing is imported yet."""
        self._log = LOGS / f"{package}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(HERE / script), package],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=LOGS,
            )

    def __call__(self, request: str, **arguments: Any) -> Answer:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text().splitlines()[-15:]
            raise RuntimeError("\n".join([f"{request!r} failed in {self._log.name}:", *tail]))
        answer: Answer = json.loads(line)
        return answer

    def __enter__(self) -> Process:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close its input, which ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Pair:
    """Both workers, started and asked in turns."""

    def __init__(self, pythons: Interpreters) -> None:
        """Start both and import the packages."""
        self._workers = {package: Process(package, pythons[package]) for package in PACKAGES}
        self.both("start")

    def both(self, request: str, **arguments: Any) -> dict[str, Answer]:
        """Send the same request to both, one after the other."""
        return {package: self._workers[package](request, **arguments) for package in PACKAGES}

    def rounds(self, count: int, call: Callable[[int], Answer]) -> dict[str, list[Answer]]:
        """Send a request `count` times to both; `call` makes it from the number of the round."""
        answers: dict[str, list[Answer]] = {package: [] for package in PACKAGES}
        for index in range(count):
            for package in in_turn(index):
                answers[package].append(self._workers[package](**call(index)))
        return answers

    def __enter__(self) -> Pair:
        """Return the pair."""
        return self

    def __exit__(self, *details: object) -> None:
        """End both."""
        for worker in self._workers.values():
            worker.__exit__(*details)


def in_turn(index: int) -> tuple[str, ...]:
    return PACKAGES if index % 2 == 0 else PACKAGES[::-1]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def peer_python() -> str:
    """Make the environment of the peer once, with the torch of this one, and return its Python."""
    folder = WORK / "diffsynth"
    python = folder / "bin" / "python"
    installed = folder / "installed.txt"
    wanted = [PEER, *(f"{name}=={version(name)}" for name in ("torch", "torchvision"))]
    if not installed.exists() or installed.read_text().split() != wanted:
        say(f"installing {' '.join(wanted)}")
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *wanted]
        if "+" in version("torch"):  # a build such as 2.14.1+cpu is not on PyPI
            build = version("torch").split("+")[1]
            command += ["--extra-index-url", f"https://download.pytorch.org/whl/{build}"]
        subprocess.run(command, check=True)
        installed.write_text("\n".join(wanted))
    return str(python)


def measure_import(pythons: Interpreters, repeats: int) -> list[Row]:
    statements = {
        "`import` of the package": {
            "ours": "import diffsynth_metrics",
            "upstream": "import diffsynth.metrics",
        },
        "`import PickScoreMetric`": {
            "ours": "from diffsynth_metrics import PickScoreMetric",
            "upstream": "from diffsynth.metrics import PickScoreMetric",
        },
    }
    nothing = dict.fromkeys(PACKAGES, "pass")

    def run(package: str, statement: str) -> float:
        start = time.perf_counter()
        subprocess.run(
            [pythons[package], "-c", statement], check=True, cwd=LOGS, stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - start

    seconds: dict[str, dict[str, list[float]]] = {}
    for name, statement in {"nothing": nothing, **statements}.items():
        seconds[name] = {package: [] for package in PACKAGES}
        for index in range(repeats + 1):
            for package in in_turn(index):
                elapsed = run(package, statement[package])
                if index:  # the first one writes bytecode and fills the page cache
                    seconds[name][package].append(elapsed)
    bare = {package: report.median(seconds["nothing"][package]) for package in PACKAGES}
    rows = []
    for name in statements:
        # A net time cannot be told from zero below the resolution of starting a process.
        net = {p: [max(s - bare[p], 1e-4) for s in seconds[name][p]] for p in PACKAGES}
        rows.append(Row(f"{name}, net of the interpreter's start", "s", **net))
        rows.append(Row(f"{name}, whole process", "s", **seconds[name]))
    rows.append(Row("a process that imports nothing", "s", **seconds["nothing"]))
    return rows


def measure_load(
    pythons: Interpreters, weights: Path, processor: Path, picture: str, repeats: int
) -> list[Row]:
    """Load the full-size checkpoint and score one picture, in fresh processes."""
    with weights.open("rb") as file:  # both find the file in the page cache
        while file.read(1 << 24):
            pass
    columns: dict[str, tuple[str, dict[str, list[float]]]] = {}

    def note(name: str, unit: str, package: str, value: float) -> None:
        columns.setdefault(name, (unit, {p: [] for p in PACKAGES}))[1][package].append(value)

    size = weights.stat().st_size
    for index in range(repeats):
        for package in in_turn(index):
            with Process(package, pythons[package]) as worker:
                start = worker("start")
                load = worker(
                    "load",
                    key="full",
                    name="pickscore",
                    weights=str(weights),
                    processor=str(processor),
                    size="full",
                )
                prompt = materials.prompt_of(20, f"load/{index}")
                score = worker("score", key="full", prompt=prompt, paths=[picture], source="file")
            total = load["seconds"] + score["seconds"]
            note("`from_pretrained`", "s", package, load["seconds"])
            note("`from_pretrained` and a first score", "s", package, total)
            before, loaded, scored = start["memory"], load["memory"], score["memory"]
            note("memory once imported, nothing loaded (RSS)", "MB", package, before["rss"])
            note("peak of the load (VmHWM)", "MB", package, loaded["peak_rss"])
            note("peak of load and first score (VmHWM)", "MB", package, scored["peak_rss"])
            share, net = scored["peak_rss"] / size, (scored["peak_rss"] - before["rss"]) / size
            note("peak of the load, times the file", "x", package, loaded["peak_rss"] / size)
            note("peak of load and first score, times the file", "x", package, share)
            note("the same, net of what imports took", "x", package, net)
            note("after the first score: anonymous", "MB", package, scored["anonymous"])
            note("after the first score: mapped files", "MB", package, scored["file"])
            note("after the first score: Pss", "MB", package, scored["pss"])
    return [Row(name, unit, **values) for name, (unit, values) in columns.items()]


def load_both(pair: Pair, size: str, weights: Path, processor: Path) -> None:
    for name in TITLES:
        pair.both(
            "load",
            key=f"{size} {name}",
            name=name,
            weights=str(weights),
            processor=str(processor),
            size=size,
        )


def measure_scores(
    pair: Pair,
    size: str,
    paths: dict[str, list[str]],
    repeats: int,
    cases: list[tuple[str, str, str]],
) -> tuple[list[Row], float, dict[str, dict[str, float]]]:
    """Time ``compute`` on all pictures.

    Also return the largest difference of two scores, and the page faults of a call by row.
    """
    rows, difference = [], 0.0
    faults: dict[str, dict[str, float]] = {}
    count = len(paths["png"])
    words = {"one": "one prompt", "pairs": "as many prompts", "again": "one prompt, seen before"}
    sources = {"memory": "PIL images in memory", "jpeg": "JPEG files", "png": "PNG files"}
    for name, source, case in cases:
        what = f"{TITLES[name]}, {count} {sources[source]}, {words[case]}"
        say(f"{size}: {what}")

        def call(index: int, name: str = name, source: str = source, case: str = case) -> Answer:
            seed = f"{size}/{name}/{source}/{case}/{'' if case == 'again' else index}"
            mixed = case == "pairs"
            return {
                "request": "score",
                "key": f"{size} {name}",
                "prompt": (
                    materials.mixed_prompts(count, seed) if mixed else materials.prompt_of(70, seed)
                ),
                "paths": paths["png" if source == "memory" else source],
                "source": "memory" if source == "memory" else "file",
            }

        warm_up = call(-1)
        if size == "full" and case != "again":  # a picture is enough to touch all weights
            warm_up |= {"prompt": materials.prompt_of(70, what), "paths": warm_up["paths"][:1]}
        pair.both(**warm_up)
        answers = pair.rounds(repeats, call)
        rates = {p: [count / a["seconds"] for a in answers[p]] for p in PACKAGES}
        rows.append(Row(what, "images/s", **rates))
        faults[what] = {p: report.median([a["faults"] for a in answers[p]]) for p in PACKAGES}
        for ours, upstream in zip(answers["ours"], answers["upstream"], strict=True):
            pairs = zip(ours["scores"], upstream["scores"], strict=True)
            difference = max(difference, *(abs(a - b) for a, b in pairs))
    return rows, difference, faults


def same_pixels(pair: Pair, key: str) -> float:
    """Return the largest difference of scores when both networks get the same pixels."""
    prompt = materials.prompt_of(70, "same pixels")
    answers = pair.both("score_pixels", key=key, prompt=prompt, count=16)
    scores = (answers[package]["scores"] for package in PACKAGES)
    difference = max(abs(a - b) for a, b in zip(*scores, strict=True))
    if difference > 1e-2:
        raise RuntimeError(f"{key}: scores of the same pixels differ by {difference}: unfair")
    return difference


def measure_parts(pair: Pair, paths: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Take the tiny tower's call apart: where the time goes, and what cannot be saved."""

    def call(index: int) -> Answer:
        prompt = materials.prompt_of(70, f"parts/{index}")
        return {"request": "parts", "key": "tiny clip", "prompt": prompt, "paths": paths["png"]}

    pair.both(**call(-1))
    answers = pair.rounds(repeats, call)
    parts: dict[str, Any] = {
        package: {
            name: report.median([answer["seconds"][name] for answer in answers[package]])
            for name in answers[package][0]["seconds"]
        }
        for package in PACKAGES
    }
    for kind in ("jpeg", "png"):
        decoding = pair.rounds(
            repeats, lambda _, kind=kind: {"request": "decoding", "paths": paths[kind]}
        )["ours"]
        parts[kind] = {k: report.median([d[k] for d in decoding]) for k in ("one", "all")}
    parts["count"] = len(paths["png"])
    return parts


def measure(arguments: argparse.Namespace) -> Measurements:
    quick, sections = arguments.quick, arguments.only
    LOGS.mkdir(parents=True, exist_ok=True)
    load_average = os.getloadavg()[0]
    pythons = {"ours": sys.executable, "upstream": arguments.peer_python or peer_python()}
    tiny = materials.tiny_folder(WORK / "tiny")
    paths = materials.pictures(WORK / "pictures", 16, 1024)
    results = Measurements(load_average=load_average)
    if {"load", "full", "peak"} & set(sections):
        full = materials.full_checkpoint(WORK / "full")
        results.file_size = full.stat().st_size
    if "import" in sections:
        say("import")
        results.rows["import"] = measure_import(pythons, 2 if quick else 5)
    if "load" in sections:
        say("load")
        results.rows["load"] = measure_load(pythons, full, tiny, paths["png"][0], 1 if quick else 3)
    with Pair(pythons) as pair:
        results.about = pair.both("about")
        pair.both("decode", paths=paths["png"])
        if "tiny" in sections:
            load_both(pair, "tiny", tiny / "model.safetensors", tiny)
            results.same_pixels = max(same_pixels(pair, f"tiny {name}") for name in TITLES)
            cases = [
                (name, source, case)
                for name in TITLES
                for source in ("memory", "jpeg", "png")
                for case in ("one", "pairs")
            ]
            cases += [("clip", "memory", "again")]
            repeats = 3 if quick else 21
            rows, results.difference, _ = measure_scores(pair, "tiny", paths, repeats, cases)
            results.rows["tiny"] = rows
            results.parts = measure_parts(pair, paths, repeats)
        if {"full", "peak"} & set(sections):
            load_both(pair, "full", full, tiny)
        if "full" in sections:
            few = {kind: files[:2] for kind, files in paths.items()} if quick else paths
            cases = [("clip", "memory", "one"), ("pickscore", "memory", "one")]
            cases += [("clip", "memory", "pairs"), ("clip", "jpeg", "one")]
            rounds = 1 if quick else arguments.full_rounds
            results.rows["full"], _, results.faults = measure_scores(pair, "full", few, rounds, cases)
        if "peak" in sections:
            say("peak")
            results.tower = pair.rounds(
                1 if quick else arguments.full_rounds,
                lambda _: {"request": "tower", "key": "full clip", "batch": 2 if quick else 16},
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peer-python",
        metavar="PATH",
        help=f"Python of an environment that has {PEER}, instead of installing it",
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--quick", action="store_true", help="few repeats, to see that it works; no results file"
    )
    parser.add_argument(
        "--full-rounds", type=int, default=3, help="repeats at full size, about four minutes each"
    )
    parser.add_argument(
        "--output", type=Path, help="where the table goes; benchmarks/RESULTS.md for a whole run"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    results = measure(arguments)
    command = "python benchmarks/compare.py"
    command += " --peer-python PATH" if arguments.peer_python else ""
    command += " --quick" if arguments.quick else ""
    command += f" --full-rounds {arguments.full_rounds}" if arguments.full_rounds != 3 else ""
    whole = len(arguments.only) == len(SECTIONS)
    command += "" if whole else f" --only {' '.join(arguments.only)}"
    text = report.markdown(results, command, time.perf_counter() - start)
    print(text)
    output = arguments.output or (HERE / "RESULTS.md" if whole and not arguments.quick else None)
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

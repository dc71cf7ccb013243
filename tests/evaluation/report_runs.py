"""Runs for the tests of reports: real pictures on disk, and rows with scores that were made up."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import PIL.Image

from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, draw_shape
from diffsynth_metrics.evaluation import Results

METRICS: dict[str, dict[str, Any]] = {
    "shapes": {
        "metric": "CLIPMetric",
        "version": "0.1.0",
        "weights": "ab12",
        "dtype": "float32",
        "fingerprint": "f-shapes",
        "card": {"name": "CLIP score", "range": "10 to 40", "higher_is_better": True},
    },
    "distance": {
        "metric": "DistanceMetric",
        "version": "0.1.0",
        "weights": "cd34",
        "dtype": "bfloat16",
        "fingerprint": "f-distance",
        "card": {"name": "A distance", "range": "0 to 1", "higher_is_better": False},
    },
}


def picture(folder: Path, name: str, prompt: str = "a red circle", side: int = 64) -> Path:
    """Save a drawing, and return its file."""
    color, shape = prompt.split()[1:3]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing: PIL.Image.Image = draw_shape(shape, color, rng=random.Random(name), image_size=side)
    drawing.save(path)
    return path


def row(
    number: int,
    metric: str = "shapes",
    score: float | None = 1.0,
    *,
    image: Path | str = "",
    prompt: str = "a red circle",
    reason: str = "",
    **changes: Any,
) -> dict[str, Any]:
    """Make a row of a run: a picture with its score, or with the reason why there is none."""
    failed, file = score is None, Path(image)
    return {
        "id": f"{number:04d}",
        "prompt_id": f"p{number:04d}",
        "seed": "0",
        "category": "even" if number % 2 == 0 else "odd",
        "prompt": prompt,
        "image": str(image),
        "sources": [],
        "image_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
        "metric": metric,
        "score": float("nan") if failed else score,
        "components": "{}",
        "error_type": "ImageError" if failed else None,
        "error": (reason or "the picture cannot be read") if failed else None,
        "metric_version": "0.1.0",
        "weights": METRICS[metric]["weights"],
        "config": "{}",
        "fingerprint": METRICS[metric]["fingerprint"],
        "key": f"{metric}-{number}",
        "device": "cpu",
        "torch": "2",
        "threads": 1,
        "seconds": 0.1,
        "run_id": "r",
        **changes,
    }


def results(rows: Iterable[dict[str, Any]], name: str = "a") -> Results:
    """Make a run of rows; its metrics are those of the rows."""
    rows = list(rows)
    labels = dict.fromkeys(row["metric"] for row in rows)
    return Results.from_rows(rows, name=name, metrics={label: METRICS[label] for label in labels})


def many_prompts(count: int) -> list[str]:
    """Return prompts of shapes, different ones next to each other."""
    pairs = [(color, shape) for color in sorted(COLORS) for shape in sorted(SHAPES)]
    return [f"a {color} {shape}" for color, shape in (pairs[n * 7 % len(pairs)] for n in range(count))]


def two_runs(
    folder: Path, count: int, *, side: int = 64, prompt_of: Callable[[int, str], str] | None = None
) -> tuple[Results, Results]:
    """Make two checkpoints of drawn pictures, of which the second has better scores of "shapes"."""
    rng = random.Random("two runs")
    prompts = many_prompts(count)
    runs = []
    for name, better in (("before", 0.0), ("after", 1.0)):
        rows = []
        for number, prompt in enumerate(prompts):
            image = picture(folder / name, f"{number:04d}.png", prompt, side)
            text = prompt_of(number, prompt) if prompt_of else prompt
            for metric, score in (
                ("shapes", rng.gauss(25 + better, 3)),
                ("distance", rng.uniform(0.2, 0.6)),
            ):
                rows.append(row(number, metric, score, image=image, prompt=text))
        runs.append(results(rows, name))
    return runs[0], runs[1]

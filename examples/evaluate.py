"""Two checkpoints from their pictures to a verdict: score, compare, report, look.

It draws what two text-to-image models might make of the same prompts. The second one, "distilled",
takes a wrong colour in a quarter of its pictures; nothing else differs. The small model that ships
inside the package finds that out: no download, no network.

    pip install -e ".[eval]" && python examples/evaluate.py

For your own pictures, leave `draw` out and name your folders; docs/data.md says how they may lie.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, describe, draw_shape
from diffsynth_metrics.evaluation import compare, read_samples, report, score, show

SEEDS = 4


def draw(folder: Path, wrong_colors: float) -> None:
    """Draw the pictures of one checkpoint, with a metadata.jsonl that says what was asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = [color for color in COLORS if color not in ("black", "white")]
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for color, shape, seed in itertools.product(colors, SHAPES, range(SEEDS)):
            chance = random.Random(f"{color} {shape} {seed}")  # the same noise for both checkpoints
            wrong = chance.random() < wrong_colors
            drawn = chance.choice([other for other in colors if other != color]) if wrong else color
            name = f"{color}_{shape}_{seed}.png"
            draw_shape(shape, drawn, rng=chance).save(folder / name)
            row = {"file_name": name, "prompt": describe(shape, color), "seed": seed, "category": shape}
            print(json.dumps(row), file=metadata)


def main() -> None:
    """Draw, score, compare, and write a report and a contact sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/evaluate"))
    output = parser.parse_args().output

    runs = []
    for name, wrong_colors in (("base", 0.0), ("distilled", 0.25)):
        draw(output / name, wrong_colors)
        samples = read_samples(output / name)
        print(f"{name}: {len(samples)} pictures, read as {samples.layout}")
        # Stopped at any moment, the same call goes on where it was.
        runs.append(score(samples, ["shapes"], out=output / "runs" / name))

    comparison = compare(*runs)
    print(comparison)

    print(f"report: {report(comparison, output / 'report.html')}")
    losses = comparison.pairs("shapes").nsmallest(4, "gain")
    sheet = show(
        [Path(image) for image in losses["image_second"]],
        scores=list(losses["score_second"]),
        prompts=list(losses["prompt"]),
    )
    sheet.save(output / "worst.png")
    print(f"the four largest losses: {output / 'worst.png'}")


if __name__ == "__main__":
    main()

"""Score a handful of pictures, show which one fits each prompt best, and save a contact sheet.

Without arguments it draws pictures of shapes and scores them with the small model that ships inside
the package: no download, no network. With `--metric pickscore` (or another one) it scores your own
pictures with the published weights:

    python examples/quickstart.py
    python examples/quickstart.py --metric pickscore --prompt "a cat on a sofa" --images a.png b.png
"""

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from diffsynth_metrics import (
    AestheticMetric,
    BaseMetric,
    CLIPMetric,
    HPSv2Metric,
    HPSv3Metric,
    ImageRewardMetric,
    ModelConfig,
    PickScoreMetric,
    QwenImageBenchMetric,
    UnifiedReward2Metric,
)
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.evaluation import show

METRICS: dict[str, Callable[[], BaseMetric]] = {
    "shapes": lambda: CLIPMetric.from_pretrained(ModelConfig.embedded("shapes")),
    "clip": CLIPMetric.from_pretrained,
    "pickscore": PickScoreMetric.from_pretrained,
    "hpsv2": HPSv2Metric.from_pretrained,
    "hpsv3": HPSv3Metric.from_pretrained,
    "image_reward": ImageRewardMetric.from_pretrained,
    "aesthetic": AestheticMetric.from_pretrained,
    "unified_reward_2": UnifiedReward2Metric.from_pretrained,
    "qwen_image_bench": QwenImageBenchMetric.from_pretrained,
}
SHAPES = [
    ("red", "circle"),
    ("blue", "square"),
    ("green", "triangle"),
    ("yellow", "star"),
    ("red", "square"),
]


def main() -> None:
    """Read the command line, score, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--metric", choices=METRICS, default="shapes")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--images", nargs="+", type=Path, help="your own pictures")
    parser.add_argument("--output", type=Path, default=Path("results/quickstart.png"))
    arguments = parser.parse_args()
    if arguments.images and not arguments.prompt and arguments.metric != "aesthetic":
        parser.error("--images needs at least one --prompt")

    if arguments.images:
        names = [path.name for path in arguments.images]
        pictures = [Image.open(path) for path in arguments.images]
    else:
        names = [f"{color} {shape}" for color, shape in SHAPES]
        pictures = draw_pictures()
    prompts = arguments.prompt or [f"a {name}" for name in names]

    metric = METRICS[arguments.metric]()
    if metric.card.inputs == "image":
        prompts = ["any prompt"]
        scores = [metric.compute(pictures)]
    else:
        scores = [metric.compute(prompt, pictures) for prompt in prompts]

    name = "Embedded model 'shapes'" if arguments.metric == "shapes" else metric.card.name
    print(f"{name}; higher is better; the best picture of each prompt is marked *\n")
    print(table(prompts, names, scores))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet = show(
        pictures * len(prompts),
        [score for row in scores for score in row],
        [prompt for prompt in prompts for _ in pictures],
        columns=len(pictures),
        size=160,
    )
    sheet.save(arguments.output)
    print(f"\nSaved {arguments.output}")


def draw_pictures() -> list[Image.Image]:
    """Draw the example pictures."""
    rng = random.Random("quickstart")
    return [draw_shape(shape, color, rng=rng, image_size=256) for color, shape in SHAPES]


def table(prompts: list[str], names: list[str], scores: list[list[float]]) -> str:
    """Align scores in columns, one row per prompt, the best of each row marked."""
    names = [shorten(name, 16) for name in names]
    width = max(len(shorten(prompt, 40)) for prompt in prompts)
    lines = [" " * width + "".join(f"  {name:>16} " for name in names)]
    for prompt, row in zip(prompts, scores, strict=True):
        best = highest(row)
        cells = [f"  {score:>16.4f}{'*' if score == best else ' '}" for score in row]
        lines.append(f"{shorten(prompt, 40):<{width}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def highest(row: list[float]) -> float:
    """Return the best score; NaN, where a judge's answer could not be read, is not one."""
    return max((score for score in row if not math.isnan(score)), default=math.nan)


def shorten(text: str, length: int) -> str:
    """Cut a text that is too long for its column."""
    return text if len(text) <= length else text[: length - 1] + "…"


if __name__ == "__main__":
    main()

"""What an adapter and a RewardSet cost on top of the network: 16 images on the tiny tower.

    python benchmarks/rewards.py

"Bare" is the shortest code that gives the same numbers from the same images: transform, the network
that the metric loaded (``metric.model``, as transformers made it), cosine, formula, under no_grad; no
checks of the input, no names, no failure policy. Only floats are looked at, in one pass that refuses NaN
and what is not in 0..1.
Every figure is the median of many rounds in which all variants take turns, so that a slow moment of the
machine hits all of them.
In its turn a variant is called three times and the third call counts: it finds in the caches of the
processor what it left there itself, as a reward in a loop does, and not what the variant before it left.
glibc is told to keep freed memory: otherwise each variant maps its memory afresh or not depending on
what the one before it left, which takes many times what is measured here.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import normalize as l2_normalize
from transformers import CLIPModel

from diffsynth_metrics import AestheticMetric, ModelConfig, PickScoreMetric
from diffsynth_metrics.metrics.aesthetic import aesthetic_score
from diffsynth_metrics.pixels.transforms import Transform, normalize_
from diffsynth_metrics.rewards import Component, FixedScale, RewardSet, to_dance_grpo, to_flow_grpo
from diffsynth_metrics.testing import tiny_checkpoint

IMAGES = 16
PROMPTS = [f"prompt {number}" for number in range(IMAGES)]
GROUPS = [number // 4 for number in range(IMAGES)]
SIZES = (1024, 512, 224)
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
RESULTS = Path(__file__).parent / "RESULTS_REWARDS.md"


def prepared(images: torch.Tensor, transform: Transform) -> torch.Tensor:
    return normalize_(transform.from_tensor(images), transform)


def bare_pickscore(
    model: CLIPModel, transform: Transform, texts: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=prepared(images, transform)).pooler_output
        features = l2_normalize(model.visual_projection(pooled), dim=-1)
        return model.logit_scale.exp() * (texts * features).sum(dim=-1)


def bare_aesthetic(metric: AestheticMetric, images: torch.Tensor) -> torch.Tensor:
    model = metric.model
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=prepared(images, metric.transform)).pooler_output
        return aesthetic_score(model.visual_projection(pooled), model.layers)


def timed(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round; who begins a round changes."""
    for call in variants.values():
        for _ in range(5):
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            call = variants[name]
            call()
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def refuse_wrong_floats(images: torch.Tensor) -> torch.Tensor:
    low, high = images.aminmax()
    assert low >= 0 and high <= 1
    return images


def measure(size: int, rounds: int, folder: Path) -> list[tuple[str, float, float]]:
    """Return (what, seconds, overhead) for images of one size."""
    pickscore = PickScoreMetric.from_pretrained(
        ModelConfig(path=tiny_checkpoint("pickscore", folder / "pickscore")),
        device="cpu",
        batch_size=IMAGES,
        cache_text=True,
    )
    aesthetic = AestheticMetric.from_pretrained(
        ModelConfig(path=tiny_checkpoint("aesthetic", folder / "aesthetic")),
        device="cpu",
        batch_size=IMAGES,
    )
    images = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8)
    floats = images / 255
    network = pickscore.model
    texts = pickscore.encode_text(PROMPTS)

    def bare(images: torch.Tensor) -> torch.Tensor:
        return bare_pickscore(network, pickscore.transform, texts, images)

    def as_bytes() -> torch.Tensor:
        return (floats * 255).round().clamp(0, 255).to(torch.uint8)

    flow_grpo = to_flow_grpo(pickscore, scale=None)("cpu")
    dance_grpo = to_dance_grpo(pickscore, scale=None)
    one = RewardSet({"pickscore": Component(pickscore, 1.0, FixedScale(20, 2))})
    grouped = RewardSet({"pickscore": Component(pickscore, 1.0, "group")})
    two = RewardSet(
        {
            "pickscore": Component(pickscore, 1.0, FixedScale(20, 2)),
            "aesthetic": Component(aesthetic, 1.0, FixedScale(5.5, 0.7)),
        }
    )

    def bare_both() -> list[float]:
        return (bare(images) + bare_aesthetic(aesthetic, images)).tolist()

    variants: dict[str, Callable[[], object]] = {
        "bare PickScore": lambda: bare(images).tolist(),
        "`metric.reward`": lambda: pickscore.reward(PROMPTS, images).tolist(),
        "`to_flow_grpo`": lambda: flow_grpo(images, PROMPTS, None),
        "`to_dance_grpo`": lambda: dance_grpo(images, PROMPTS).tolist(),
        "`RewardSet` of PickScore": lambda: one.score(PROMPTS, images).reward.tolist(),
        "`RewardSet` of PickScore, 4 groups of 4": lambda: grouped.score(
            PROMPTS, images, groups=GROUPS
        ).reward.tolist(),
        "bare PickScore and Aesthetic": bare_both,
        "`RewardSet` of both": lambda: two.score(PROMPTS, images).reward.tolist(),
        "bare PickScore, floats": lambda: bare(refuse_wrong_floats(floats)).tolist(),
        "`metric.reward`, floats": lambda: pickscore.reward(PROMPTS, floats).tolist(),
        "`RewardSet` of PickScore, floats": lambda: one.score(PROMPTS, floats).reward.tolist(),
        "bare PickScore, floats rounded": lambda: bare(as_bytes()).tolist(),
        "`to_flow_grpo`, floats": lambda: flow_grpo(floats, PROMPTS, None),
    }
    scores = variants["`metric.reward`"]()
    torch.testing.assert_close(flow_grpo(images, PROMPTS, None)[0], scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bare(images).tolist(), scores, rtol=1e-5, atol=1e-5)
    times = timed(variants, rounds)
    rows = []
    bare_name = ""
    for name, seconds in times.items():
        if name.startswith("bare"):
            bare_name = name
        base = times[bare_name]
        # Of one round, so that a slow moment of the machine, longer than a round, is in both.
        more = statistics.median(a - b for a, b in zip(seconds, base, strict=True))
        rows.append((name, statistics.median(seconds), more / statistics.median(base)))
    return rows


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    lines = [
        "# What an adapter and a RewardSet cost",
        "",
        f"`python benchmarks/rewards.py --rounds {arguments.rounds}` on {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
        f"{IMAGES} uint8 images (floats where the table says so), tiny tower (2 layers of width 32), "
        'medians. An overhead is the median difference within a round to the "bare" line above it; '
        "every timed call follows two of the same. glibc keeps freed memory.",
        "",
        "| images | what | ms | overhead |",
        "|---|---|---|---|",
    ]
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            for name, seconds, overhead in measure(size, arguments.rounds, Path(folder)):
                cell = "" if name.startswith("bare") else f"{100 * overhead:+.1f} %"
                lines.append(f"| {size}×{size} | {name} | {1000 * seconds:.2f} | {cell} |")
    lines += [
        "",
        "Images of 224×224 are not resized: there the bare line is a network of a few milliseconds "
        "alone. What checks, names, statistics and the failure policy take is the same at every size. "
        "These two metrics share no transform, so a set of both saves nothing.",
        "",
        "The bare line of floats reads every value once, to refuse NaN and what is not in 0..1; `floats "
        "rounded` is what flow_grpo does with floats, which rounds them to bytes first.",
        "",
    ]
    arguments.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

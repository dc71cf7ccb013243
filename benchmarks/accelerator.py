"""What a reward costs on an accelerator: full-size networks with random weights, images on the device.

    python benchmarks/accelerator.py

"Bare" is the shortest code with the same numbers: transform, the network as transformers made it,
cosine, formula, under no_grad. "Through PIL" is what the scorers of training loops do today: bytes to
the CPU, PIL images, CLIP's processor, the network, with the prompts in each call. Variants take turns;
figures are medians, each up to the scores on the CPU. Results go to RESULTS_ACCELERATOR.md.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from materials import random_weight, tiny_folder
from torch import nn
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffsynth_metrics import HPSv3Metric, PickScoreMetric
from diffsynth_metrics.networks.clip import build_clip, vit_h_14_config
from diffsynth_metrics.networks.gradient_checkpointing import checkpoint_blocks
from diffsynth_metrics.networks.hpsv3 import build_hpsv3, qwen2_vl_7b_config
from diffsynth_metrics.pixels.transforms import Transform, normalize_
from diffsynth_metrics.rewards import RewardSet, to_flow_grpo
from diffsynth_metrics.testing import tiny_checkpoint

IMAGES = 16
PROMPTS = [f"a photograph of {number} cats on a sofa" for number in range(IMAGES)]
SIZES = (1024, 512)
RESULTS = Path(__file__).parent / "RESULTS_ACCELERATOR.md"
Row = tuple[str, str, str]


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype, float32: tuple[str, ...]) -> Any:
    """Give a network on the meta device random weights, as a checkpoint would."""
    generator = torch.Generator(device).manual_seed(0)
    weights = {
        name: random_weight(name, tensor.shape, generator).to(
            device, torch.float32 if name.startswith(float32) else dtype
        )
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    return model.to(device).requires_grad_(False).eval()


def pickscore(folder: Path, device: torch.device, dtype: torch.dtype) -> PickScoreMetric:
    heads = ("logit_scale", "text_projection", "visual_projection")
    model = fill(build_clip(vit_h_14_config()), device, dtype, heads)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return PickScoreMetric(model, tokenizer, batch_size=IMAGES, cache_text=True)


def hpsv3(folder: Path, device: torch.device) -> HPSv3Metric:
    config = qwen2_vl_7b_config()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1
    model = fill(build_hpsv3(config), device, torch.bfloat16, ("rm_head",))
    return HPSv3Metric(HPSv3Metric.finish(model, torch.bfloat16), tokenizer, batch_size=IMAGES)


def timed(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name, call in variants.items():
            torch.accelerator.synchronize()
            start = time.perf_counter()
            call()
            torch.accelerator.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def scores_of(network: CLIPModel, texts: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    pooled = network.vision_model(pixel_values=pixels.to(network.vision_model.dtype)).pooler_output
    features = nn.functional.normalize(network.visual_projection(pooled.float()), dim=-1)
    return network.logit_scale.exp() * (texts * features).sum(dim=-1)


def prepared(images: torch.Tensor, transform: Transform) -> torch.Tensor:
    return normalize_(transform.from_tensor(images), transform)


def through_pil(network: CLIPModel, processor: CLIPProcessor, images: torch.Tensor) -> torch.Tensor:
    arrays = images.cpu().numpy().transpose(0, 2, 3, 1)
    pictures = [PIL.Image.fromarray(array) for array in arrays]
    inputs = processor(
        text=PROMPTS, images=pictures, padding=True, truncation=True, max_length=77, return_tensors="pt"
    ).to(images.device)
    words = network.text_model(input_ids=inputs["input_ids"]).pooler_output
    texts = nn.functional.normalize(network.text_projection(words.float()), dim=-1)
    return scores_of(network, texts, inputs["pixel_values"])


def measure_pickscore(metric: PickScoreMetric, folder: Path, size: int, rounds: int) -> list[Row]:
    device = metric.device
    images = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8, device=device)
    floats = images / 255
    network = metric.model
    texts = metric.encode_text(PROMPTS)
    processor = CLIPProcessor.from_pretrained(folder)
    rewards = RewardSet({"pickscore": metric})
    flow_grpo = to_flow_grpo(metric, scale=None)(device)

    @torch.no_grad()
    def bare_scores() -> list[float]:
        return scores_of(network, texts, prepared(images, metric.transform)).tolist()

    @torch.no_grad()
    def pil_scores() -> list[float]:
        return through_pil(network, processor, images).tolist()

    def bare_gradients() -> torch.Tensor:
        leaf = floats.clone().requires_grad_()
        scores_of(network, texts, prepared(leaf, metric.transform)).sum().backward()
        return leaf.grad

    def gradients() -> torch.Tensor:
        leaf = floats.clone().requires_grad_()
        metric.reward(PROMPTS, leaf).sum().backward()
        return leaf.grad

    variants: dict[str, Callable[[], object]] = {
        "bare": bare_scores,
        "through PIL": pil_scores,
        "`metric.reward`": lambda: metric.reward(PROMPTS, images).tolist(),
        "`metric.reward`, floats": lambda: metric.reward(PROMPTS, floats).tolist(),
        "`to_flow_grpo`": lambda: flow_grpo(images, PROMPTS, None),
        "`to_flow_grpo`, floats": lambda: flow_grpo(floats, PROMPTS, None),
        "`RewardSet`": lambda: rewards.score(PROMPTS, images).reward.tolist(),
        "bare, with gradients": bare_gradients,
        "`metric.reward`, with gradients": gradients,
    }
    # In bfloat16 the two passes round differently.
    tolerance = 1e-3 if metric.dtype == torch.float32 else 5e-2
    assert np.allclose(bare_scores(), metric.compute(PROMPTS, images), rtol=0, atol=tolerance)
    times = timed(variants, rounds)
    what = f"PickScore, {str(metric.dtype).removeprefix('torch.')}, {size} px"
    rows, base = [], "bare"
    for name, seconds in times.items():
        base = name if name == "bare, with gradients" else base
        ratio = statistics.median(a / b for a, b in zip(seconds, times[base], strict=True))
        rows.append((f"{what}: {name}", f"{1000 * statistics.median(seconds):.2f}", f"{ratio:.3f}"))
    return rows


def peak(call: Callable[[], object]) -> float:
    """Return the GB that a call takes on the device beyond what lies there."""
    if not torch.cuda.is_available():
        return float("nan")
    call()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def measure_memory(metric: PickScoreMetric) -> list[Row]:
    images = torch.rand(IMAGES, 3, 512, 512, device=metric.device)

    def gradients() -> None:
        leaf = images.clone().requires_grad_()
        metric.reward(PROMPTS, leaf).sum().backward()

    what = f"PickScore, {str(metric.dtype).removeprefix('torch.')}, 512 px: GB of"
    rows = [
        (f"{what} `metric.reward`", f"{peak(lambda: metric.reward(PROMPTS, images)):.2f}", ""),
        (f"{what} `metric.reward`, with gradients", f"{peak(gradients):.2f}", ""),
    ]
    checkpoint_blocks(metric.model)
    (seconds,) = timed({"": gradients}, 5).values()
    label = f"{what} the same with gradient checkpointing"
    return [*rows, (label, f"{peak(gradients):.2f}", f"{1000 * statistics.median(seconds):.2f} ms")]


def measure_hpsv3(metric: HPSv3Metric, rounds: int) -> list[Row]:
    images = torch.randint(0, 256, (IMAGES, 3, 1024, 1024), dtype=torch.uint8, device=metric.device)
    variants: dict[str, Callable[[], object]] = {
        "one by one": lambda: [
            metric.reward(prompt, image).tolist() for prompt, image in zip(PROMPTS, images, strict=True)
        ],
        "`metric.reward`": lambda: metric.reward(PROMPTS, images).tolist(),
    }
    times = timed(variants, rounds)
    return [
        (
            f"HPSv3, bfloat16, 1024 px: {name}",
            f"{1000 * statistics.median(seconds):.2f}",
            f"{statistics.median(seconds) / statistics.median(times['one by one']):.3f}",
        )
        for name, seconds in times.items()
    ]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        raise SystemExit("torch reports no accelerator")
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny_folder(Path(temporary) / "pickscore")
        for dtype in (torch.float32, torch.bfloat16):
            metric = pickscore(folder, device, dtype)
            for size in SIZES:
                rows += measure_pickscore(metric, folder, size, arguments.rounds)
            rows += measure_memory(metric)
            del metric
        other = tiny_checkpoint("hpsv3", Path(temporary) / "hpsv3")
        rows += measure_hpsv3(hpsv3(other, device), max(3, arguments.rounds // 4))
    lines = [
        "# What a reward costs on an accelerator",
        "",
        f"`python benchmarks/accelerator.py --rounds {arguments.rounds}` on one {name}, "
        f"torch {torch.__version__}. {IMAGES} uint8 images on the device (floats where the table says "
        "so), full-size networks with random weights, medians. The last column is the median ratio "
        'within a round to the "bare" line above (HPSv3: to one call per image).',
        "",
        "| what | ms | ratio |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    arguments.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Teach a tiny generator of shapes to draw what the prompt says, with rewards from a thread pool.

The loop has the shape of flow_grpo: several samples per prompt, a reward function
`(images, prompts, metadata) -> (scores, {})` that runs in a thread while the loop goes on, advantages
relative to the group of the prompt, which the loop computes, and a policy gradient. The policy is a
table: for every prompt, how probable each shape and each colour is. In the beginning it draws anything.

    python examples/training/policy_gradient.py
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, describe, draw_shape
from diffsynth_metrics.rewards import to_flow_grpo

TARGETS = [("circle", "red"), ("square", "blue"), ("triangle", "green"), ("star", "yellow")]
PROMPTS = [describe(shape, color) for shape, color in TARGETS]
GROUP = 12


class ShapePolicy(torch.nn.Module):
    """For each prompt, logits over shapes and colours."""

    def __init__(self) -> None:
        """Start with everything equally probable."""
        super().__init__()
        self.shapes = torch.nn.Parameter(torch.zeros(len(PROMPTS), len(SHAPES)))
        self.colors = torch.nn.Parameter(torch.zeros(len(PROMPTS), len(COLORS)))

    def distributions(self, prompts: torch.Tensor) -> list[torch.distributions.Categorical]:
        """Return the distributions of shape and colour for numbers of prompts ``[N]``."""
        tables = (self.shapes, self.colors)
        return [torch.distributions.Categorical(logits=table[prompts]) for table in tables]


def main() -> None:
    """Read the command line, train, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/policy_gradient"))
    arguments = parser.parse_args()

    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), batch_size=64)
    scores, last = train(metric, arguments.steps, arguments.seed)

    arguments.output.mkdir(parents=True, exist_ok=True)
    plot(scores).save(arguments.output / "curve.png")
    Image.fromarray(np.concatenate(last[::GROUP], axis=1)).save(arguments.output / "samples.png")
    print(f"Mean score: {scores[0]:.2f} in the first step, {scores[-1]:.2f} in the last")
    print(f"Saved {arguments.output}/curve.png and samples.png, for {', '.join(PROMPTS)}")


def train(metric: CLIPMetric, steps: int, seed: int = 0) -> tuple[list[float], np.ndarray]:
    """Train a policy.

    Returns:
        The mean score of each step, and the pictures of the last one ``[N, H, W, 3]``.
    """
    generator, rng = torch.Generator().manual_seed(seed), Random(seed)
    reward_fn = to_flow_grpo(metric, scale=None)(metric.device)
    policy = ShapePolicy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.15)
    numbers = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)
    prompts = [PROMPTS[number] for number in numbers.tolist()]
    means = []
    with ThreadPoolExecutor(max_workers=8) as executor:
        for _ in range(steps):
            with torch.no_grad():
                actions = [
                    torch.multinomial(one.probs, 1, generator=generator).squeeze(1)
                    for one in policy.distributions(numbers)
                ]
            images = draw(actions, rng)
            future = executor.submit(reward_fn, images, prompts, [{}] * len(prompts), only_strict=True)
            # The reward is computed while the loop goes on; flow_grpo trains meanwhile.
            chosen = zip(policy.distributions(numbers), actions, strict=True)
            log_probability = torch.stack([one.log_prob(action) for one, action in chosen]).sum(dim=0)
            scores, _ = future.result()
            groups = torch.as_tensor(scores).view(len(PROMPTS), GROUP)
            spread = groups.std(dim=1, correction=0, keepdim=True) + 1e-4
            advantages = (groups - groups.mean(dim=1, keepdim=True)) / spread
            loss = -(advantages.flatten() * log_probability).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            means.append(float(np.mean(scores)))
    return means, images


def draw(actions: list[torch.Tensor], rng: Random) -> np.ndarray:
    """Draw the chosen shapes in the chosen colours, as bytes ``[N, H, W, 3]``."""
    shapes, colors = list(SHAPES), list(COLORS)
    pictures = [
        draw_shape(shapes[shape], colors[color], image_size=96, rng=rng)
        for shape, color in zip(*(action.tolist() for action in actions), strict=True)
    ]
    return np.stack([np.asarray(picture) for picture in pictures])


def plot(values: list[float], width: int = 480, height: int = 240) -> Image.Image:
    """Draw a curve with the lowest and the highest value written beside it."""
    image = Image.new("RGB", (width, height), "white")
    drawing = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 20, width - 20, height - 30
    low, high = min(values), max(values)
    step, rise = (right - left) / max(1, len(values) - 1), (bottom - top) / max(1e-9, high - low)
    points = [(left + step * x, bottom - rise * (value - low)) for x, value in enumerate(values)]
    drawing.line([(left, top), (left, bottom), (right, bottom)], fill="gray")
    drawing.line(points, fill="green", width=2)
    drawing.text((8, top - 6), f"{high:.2f}", "black")
    drawing.text((8, bottom - 6), f"{low:.2f}", "black")
    drawing.text((left, bottom + 8), f"mean score, {len(values)} steps", "gray")
    return image


if __name__ == "__main__":
    main()

"""Change the pixels of a picture until the metric sees "a red circle" in it.

Gradient ascent on the pixels themselves, the shortest way to see that gradients arrive: it starts from
random colours and follows `as_loss`. The small model that ships inside the package is the metric; it
is easily fooled, and the picture shows what it looks at rather than a proper circle.

    python examples/training/pixel_ascent.py
    python examples/training/pixel_ascent.py --prompt "a blue square" --steps 300
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.rewards import as_loss


def main() -> None:
    """Read the command line, climb, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="a red circle")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/pixel_ascent"))
    arguments = parser.parse_args()

    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"))
    before, after, rewards = climb(metric, arguments.prompt, arguments.steps, arguments.seed)

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, picture in (("before", before), ("after", after)):
        to_picture(picture).save(arguments.output / f"{name}.png")
    print(f'Score of "{arguments.prompt}": {rewards[0]:.2f} before, {rewards[-1]:.2f} after')
    print(f"Saved {arguments.output}/before.png and after.png")


def climb(
    metric: CLIPMetric, prompt: str, steps: int, seed: int = 0
) -> tuple[Tensor, Tensor, list[float]]:
    """Optimise the pixels of one picture.

    Returns:
        The first and the last picture ``[3, H, W]`` in 0..1, and the reward before every step and at
        the end.
    """
    loss_fn = as_loss(metric, loss="neg")
    generator = torch.Generator().manual_seed(seed)
    # Logits of the pixels, so that colours stay in 0..1 without being clipped.
    logits = torch.randn(1, 3, 96, 96, generator=generator).to(metric.device).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)

    def picture() -> Tensor:
        # The blur is the prior that neighbours are alike; without it the pixels become noise.
        return gaussian_blur(logits, kernel_size=[9, 9], sigma=[2.0, 2.0]).mul(4).sigmoid()

    first = picture().detach()[0]
    rewards = []
    for _ in range(steps):
        loss, reward = loss_fn(picture(), [prompt])
        rewards.append(reward.item())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    last = picture().detach()
    return first, last[0], [*rewards, metric.reward(prompt, last).item()]


def to_picture(pixels: Tensor) -> Image.Image:
    """Make a PIL image of pixels ``[3, H, W]`` in 0..1, enlarged to be looked at."""
    array = (pixels.cpu() * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array).resize((384, 384), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()

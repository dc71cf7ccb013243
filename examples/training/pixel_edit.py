"""Edit a picture: change its pixels until the metric sees the prompt, and keep it like it was.

The reward is a sum of two metrics: how well the picture fits the prompt, and how alike the features of
the picture and of its source are, which is a function of the picture and its source. The small model
that ships inside the package is the metric.

    python examples/training/pixel_edit.py
    python examples/training/pixel_edit.py --prompt "a blue square" --hold 0
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchvision.transforms.functional import gaussian_blur, to_tensor

from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.rewards import Component, RewardSet, as_loss


class Likeness:
    """The cosine of the image features of each picture and its source, from -1 to 1."""

    def __init__(self, metric: CLIPMetric) -> None:
        """Take the metric whose features are compared."""
        self.metric = metric

    def __call__(self, prompts: list[str], images: Tensor, sources: list[list[Tensor]]) -> Tensor:
        """Return N cosines, with a graph to the images."""
        before = self.metric.encode_image([source for (source,) in sources])
        return cosine_similarity(self.metric.encode_image(images), before)


def main() -> None:
    """Read the command line, edit, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="a red square")
    parser.add_argument("--hold", type=float, default=30.0, help="the weight of the likeness")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("results/pixel_edit"))
    arguments = parser.parse_args()

    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"))
    source = to_tensor(draw_shape("circle", "red", image_size=96)).to(metric.device)
    edited, history = edit(metric, arguments.prompt, source, arguments.steps, arguments.hold)

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, pixels in (("source", source), ("edited", edited)):
        array = (pixels.cpu() * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(array).resize((384, 384), Image.Resampling.NEAREST)
        picture.save(arguments.output / f"{name}.png")
    first, last = history[0], history[-1]
    print(f'Score of "{arguments.prompt}": {first["fits"]:.2f} before, {last["fits"]:.2f} after')
    print(f"Likeness to the source: {first['alike']:.2f} before, {last['alike']:.2f} after")
    print(f"Saved {arguments.output}/source.png and edited.png")


def edit(
    metric: CLIPMetric, prompt: str, source: Tensor, steps: int, hold: float
) -> tuple[Tensor, list[dict[str, float]]]:
    """Optimise what is added to a picture ``[3, H, W]`` in 0..1.

    Args:
        metric: What sees the prompt, and whose features are held.
        prompt: What the picture shall show.
        source: What is edited.
        steps: How often it is changed.
        hold: The weight of the likeness beside the score, which is about 20 where prompts fit.

    Returns:
        The edited picture, and the scores before every step and at the end.
    """
    rewards = RewardSet({"fits": metric, "alike": Component(Likeness(metric), hold)})
    loss_fn = as_loss(rewards)
    change = torch.zeros_like(source)[None].requires_grad_()
    optimizer = torch.optim.Adam([change], lr=0.03)

    def picture() -> Tensor:
        # The blur is the prior that neighbours are alike; without it the pixels become noise.
        return (source + gaussian_blur(change, kernel_size=[9, 9], sigma=[2.0, 2.0])).clamp(0, 1)

    history = []
    for _ in range(steps):
        history.append(rewards.score(prompt, picture().detach(), [source]).means)
        loss, _ = loss_fn(picture(), [prompt], [source])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    edited = picture().detach()
    return edited[0], [*history, rewards.score(prompt, edited, [source]).means]


if __name__ == "__main__":
    main()

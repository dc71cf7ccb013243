"""Edit a picture: change its pixels until the metric sees the prompt, and keep it like its source.

The reward is a sum of two metrics: how well the picture fits the prompt, by the small model that ships
inside the package, and LPIPS between the picture and its source, which counts negatively. LPIPS
downloads 10 MB at first use.

    python examples/training/pixel_edit.py
    python examples/training/pixel_edit.py --prompt "a blue square" --hold 0
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, to_tensor

from diffsynth_metrics import CLIPMetric, LPIPSMetric, ModelConfig
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.rewards import Component, RewardSet, as_loss


def main() -> None:
    """Read the command line, edit, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="a red square")
    parser.add_argument("--hold", type=float, default=30.0, help="the weight of LPIPS to the source")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lpips", type=Path, help="a file or folder with LPIPS weights")
    parser.add_argument("--output", type=Path, default=Path("results/pixel_edit"))
    arguments = parser.parse_args()

    clip = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"))
    weights = None if arguments.lpips is None else ModelConfig(path=arguments.lpips)
    lpips = LPIPSMetric.from_pretrained(model_config=weights)
    source = to_tensor(draw_shape("circle", "red", image_size=96)).to(clip.device)
    edited, history = edit(clip, lpips, arguments.prompt, source, arguments.steps, arguments.hold)

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, pixels in (("source", source), ("edited", edited)):
        array = (pixels.cpu() * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(array).resize((384, 384), Image.Resampling.NEAREST)
        picture.save(arguments.output / f"{name}.png")
    first, last = history[0], history[-1]
    print(f'Score of "{arguments.prompt}": {first["fits"]:.2f} before, {last["fits"]:.2f} after')
    print(f"LPIPS to the source: {abs(first['alike']):.3f} before, {abs(last['alike']):.3f} after")
    print(f"Saved {arguments.output}/source.png and edited.png")


def edit(
    clip: CLIPMetric, lpips: LPIPSMetric, prompt: str, source: Tensor, steps: int, hold: float
) -> tuple[Tensor, list[dict[str, float]]]:
    """Optimise what is added to a picture ``[3, H, W]`` in 0..1.

    Args:
        clip: What sees the prompt.
        lpips: What compares the picture with its source.
        prompt: What the picture shall show.
        source: What is edited.
        steps: How often it is changed.
        hold: The weight of LPIPS beside the score, which is about 20 where prompts fit.

    Returns:
        The edited picture; and the rewards before every step and at the end: ``"fits"``, the score of
        the prompt, and ``"alike"``, minus the LPIPS to the source.
    """
    rewards = RewardSet({"fits": clip, "alike": Component(lpips, hold)})
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

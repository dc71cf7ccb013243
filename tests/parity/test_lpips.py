"""LPIPS against its authors' package, with its linear weights and random backbones."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
import torch
from official_image_reward import installed_folder
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

from diffsynth_metrics import LPIPSMetric, ModelConfig
from diffsynth_metrics.networks.lpips import NETS

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*'pretrained' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning"),
]


@pytest.mark.parametrize("net", NETS)
def test_distances_and_gradients_equal_the_authors(
    net: str, tmp_path: Path, photographs: dict[str, PIL.Image.Image]
) -> None:
    installed_folder("lpips", "lpips==0.1.4")
    import lpips

    torch.manual_seed(0)
    official = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    weights = {name: tensor for name, tensor in official.state_dict().items() if "lins." not in name}
    save_file(weights, tmp_path / "model.safetensors")
    metric = LPIPSMetric.from_pretrained(net, ModelConfig(path=tmp_path), "cpu")  # type: ignore[arg-type]

    pictures = [picture.resize((160, 128)) for picture in photographs.values()]
    others = [*pictures[1:], pictures[0].rotate(10)]
    first, second = (torch.stack([to_tensor(one) for one in side]) for side in (pictures, others))
    with torch.no_grad():
        expected = official(first, second, normalize=True).flatten()
    assert metric.compute(pictures, others) == pytest.approx(expected.tolist(), abs=1e-6)
    torch.testing.assert_close(metric.components(first, second)["score"], expected, rtol=0, atol=1e-6)

    pixels = second.clone().requires_grad_()
    official(first, pixels, normalize=True).sum().backward()
    expected_gradient, pixels.grad = pixels.grad, None
    (-metric.reward(first, pixels)).sum().backward()
    assert pixels.grad is not None and expected_gradient is not None
    largest = float(expected_gradient.abs().max())
    torch.testing.assert_close(pixels.grad, expected_gradient, rtol=1e-3, atol=1e-3 * largest)

"""``metric.model`` is the library's own network: what users do to it has an effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth_metrics import (
    AestheticMetric,
    HPSv2Metric,
    ImageRewardMetric,
    ModelConfig,
    PickScoreMetric,
)
from diffsynth_metrics.testing import tiny_checkpoint

TOWERS: dict[str, tuple[Any, Callable[[Any], nn.Module]]] = {
    "pickscore": (PickScoreMetric, lambda model: model.vision_model),
    "hpsv2": (HPSv2Metric, lambda model: model.visual),
    "aesthetic": (AestheticMetric, lambda model: model.vision_model),
    "image_reward": (ImageRewardMetric, lambda model: model.blip.text_encoder),
    "image_reward image": (ImageRewardMetric, lambda model: model.blip.visual_encoder),
}


@pytest.fixture(scope="module", params=TOWERS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A metric of its own for these tests, its image tower, and a call that scores."""
    metric_class, tower_of = TOWERS[request.param]
    name = request.param.split()[0]
    folder = tiny_checkpoint(name, tmp_path_factory.mktemp(name))
    metric = metric_class.from_pretrained(ModelConfig(path=folder), device="cpu")
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    arguments = (images,) if request.param == "aesthetic" else ("a cat", images)
    return metric, tower_of(metric.model), lambda: torch.tensor(metric.compute(*arguments))


def test_a_forward_hook_on_a_tower_is_called(loaded: Any) -> None:
    _, tower, score = loaded
    before, seen = score(), []
    handle = tower.register_forward_hook(lambda *arguments: seen.append(arguments))
    torch.testing.assert_close(score(), before)
    handle.remove()
    assert len(seen) == 1


def test_a_hook_on_the_last_block_changes_the_score(loaded: Any) -> None:
    _, tower, score = loaded
    blocks = next(m for m in tower.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)))
    before = score()

    def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
        return tuple(2 * part for part in output) if isinstance(output, tuple) else 2 * output

    norm = next(m for m in list(blocks[-1].modules()) if isinstance(m, nn.LayerNorm))
    handle = norm.register_forward_hook(doubled)
    assert not torch.allclose(score(), before, atol=1e-4)
    handle.remove()
    torch.testing.assert_close(score(), before)


class LowRank(nn.Module):
    """A linear layer with an adapter beside it, as PEFT makes one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T


def test_a_wrapped_linear_layer_takes_part(loaded: Any) -> None:
    _, tower, score = loaded
    # In open_clip's attention, PyTorch reads the weights of its projections without calling them.
    name, linear = next(
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.Linear) and ("mlp" in name or "intermediate" in name)
    )
    parent = tower.get_submodule(name.rpartition(".")[0])
    adapter = LowRank(linear)
    before = score()
    setattr(parent, name.rpartition(".")[2], adapter)
    try:
        torch.testing.assert_close(score(), before)
        with torch.no_grad():
            adapter.up.normal_()
        assert not torch.allclose(score(), before, atol=1e-4)
    finally:
        setattr(parent, name.rpartition(".")[2], linear)


def test_a_compiled_tower_is_what_runs(tmp_path: Any) -> None:
    folder = tiny_checkpoint("pickscore", tmp_path)
    metric = PickScoreMetric.from_pretrained(ModelConfig(path=folder), device="cpu")
    images = torch.rand(2, 3, 40, 40)
    expected = metric.compute("a cat", images)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    metric.model.vision_model = torch.compile(metric.model.vision_model, backend=backend)
    assert metric.compute("a cat", images) == pytest.approx(expected, abs=1e-4)
    assert graphs
    with torch.no_grad():
        metric.model.visual_projection.weight.zero_()
    assert metric.compute("a cat", images) == pytest.approx([0, 0], abs=1e-6)

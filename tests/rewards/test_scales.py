"""Every scale is the arithmetic that its paper or framework does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import Judge

import diffsynth_metrics
from diffsynth_metrics import HPSv2Metric, ModelConfig, PickScoreMetric
from diffsynth_metrics.rewards.batches import as_batch
from diffsynth_metrics.rewards.scales import FRAMEWORKS, SCALES, Scale, find_scale
from diffsynth_metrics.rewards.scoring import MetricScorer

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "scale", "component", "expected"),
    [
        ("pickscore", None, "score", lambda x: x),
        ("pickscore", "official", "score", lambda x: x),
        ("pickscore", "paper", "score", lambda x: x),
        ("pickscore", "flow_grpo", "score", lambda x: x / 26),
        ("pickscore", "diffusion_nft", "score", lambda x: x / 26),
        ("pickscore", "flow_factory", "score", lambda x: x / 26),
        ("pickscore", "verl_omni", "score", lambda x: x / 26),
        ("pickscore", "unirl", "score", lambda x: x / 26),
        ("pickscore", "dance_grpo", "cosine", lambda x: x),
        ("pickscore", "pref_grpo", "cosine", lambda x: x),
        ("pickscore", "srpo", "score", lambda x: x / 20),
        ("pickscore", 0.5, "score", lambda x: x * 0.5),
        ("hpsv2", "official", "cosine", lambda x: x),
        ("hpsv2", "paper", "cosine", lambda x: 100 * x),
        ("hpsv2", "flow_grpo", "cosine", lambda x: x),
        ("hpsv2", "dance_grpo", "cosine", lambda x: x),
        ("pickscore", "cosmos_rl", "score", lambda x: x / 26),
        ("pickscore", "mixgrpo", "score", lambda x: (x - 18) / 8),
        ("clip", "mixgrpo", "cosine", lambda x: x),
        ("clip", "flow_grpo", "score", lambda x: x / 100),
        ("clip", "torchmetrics", "cosine", lambda x: max(100 * x, 0)),
    ],
)
def test_a_scale_is_what_its_framework_computes(
    name: str,
    scale: Any,
    component: str,
    expected: Any,
    metrics: Callable[[str], Any],
    images: torch.Tensor,
) -> None:
    rows = metrics(name).evaluate(PROMPTS, images)
    assert abs(rows[0]["cosine"]) > 0.01
    values = MetricScorer(metrics(name), scale).scored(as_batch(PROMPTS, images)).values
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([expected(row[component]) for row in rows], rel=1e-4)


def test_pyiqa_has_a_prefix_a_weight_and_a_floor(
    metrics: Callable[[str], Any], images: torch.Tensor
) -> None:
    rows = metrics("clip").evaluate([f"A photo depicts {prompt}" for prompt in PROMPTS], images)
    values = MetricScorer(metrics("clip"), "pyiqa").scored(as_batch(PROMPTS, images)).values
    assert values.tolist() == pytest.approx([2.5 * max(row["cosine"], 0) for row in rows], rel=1e-4)


def test_unified_reward_has_the_scales_of_its_users() -> None:
    scores = torch.tensor([1.0, 3.5, 5.0])
    scales = SCALES["UnifiedReward2Metric"]
    assert scales["flow_grpo"].apply(scores).tolist() == pytest.approx([0.2, 0.7, 1.0])
    assert scales["verl_omni"].apply(scores).tolist() == pytest.approx([0.0, 0.625, 1.0])


def test_hpsv2_has_its_official_scale_even_when_loaded_with_upstreams(
    tiny: Callable[[str], Path], metrics: Callable[[str], Any], images: torch.Tensor
) -> None:
    folder = ModelConfig(path=tiny("hpsv2"))
    metric = HPSv2Metric.from_pretrained(folder, device="cpu", scale="diffsynth")
    values = MetricScorer(metric, "flow_grpo").scored(as_batch(PROMPTS, images)).values
    torch.testing.assert_close(values, metrics("hpsv2").reward(PROMPTS, images), rtol=1e-4, atol=1e-5)


def test_a_framework_without_a_scale_of_its_own_uses_the_official_score() -> None:
    for name in ("PickScoreMetric", "LPIPSMetric", "ImageSimilarityMetric", "UnifiedReward2Metric"):
        metric_class = getattr(diffsynth_metrics, name)
        for scale in ("ddpo", "official", "paper"):
            assert find_scale(metric_class.__new__(metric_class), scale) == Scale()
    assert find_scale(lambda prompts, images: [], "flow_grpo") == Scale()


def test_a_subclass_has_the_scales_of_its_metric() -> None:
    class Mine(PickScoreMetric):
        pass

    assert find_scale(Mine.__new__(Mine), "flow_grpo") == Scale(divide=26)


class ByDimension(Judge):
    """A judge that answers the same of everything."""

    def evaluate(self, prompt: Any, images: Any) -> list[dict[str, Any]]:
        row = {"score": 2.5, "alignment": 4.5, "style": None, "text": "4.5", "error": "no style"}
        return [row] * len(prompt)


def test_a_scale_may_start_from_a_dimension_of_a_judge() -> None:
    scored = MetricScorer(ByDimension(), Scale("alignment", multiply=2)).scored(
        as_batch(["a", "b"], [0, 1])
    )
    assert scored.values.tolist() == [9, 9]
    scored = MetricScorer(ByDimension(), Scale("style")).scored(as_batch(["a", "b"], [0, 1]))
    assert scored.values.isnan().all() and scored.reasons == ["no style", "no style"]


@pytest.mark.parametrize("component", ["bogus", "text", "prompt_tokens"])
def test_a_component_that_does_not_exist_is_an_error_that_lists_those_that_do(
    component: str, metrics: Callable[[str], Any], images: torch.Tensor
) -> None:
    sources = [
        (ByDimension(), "bydimension", "score, alignment"),
        (metrics("clip"), "clip", "score, cosine"),
    ]
    for source, name, existing in sources:
        scored = MetricScorer(source, Scale(component)).scored(as_batch(PROMPTS, images))
        reason = (
            f"{name} gives no number '{component}' per sample with these settings; it gives {existing}"
        )
        assert scored.reasons == [reason] * 2 and scored.values.isnan().all()
    with pytest.raises(ValueError, match=f"a callable .* has no component '{component}'"):
        MetricScorer(lambda prompts, images: [1.0], Scale(component))


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    metric = PickScoreMetric.__new__(PickScoreMetric)
    with pytest.raises(ValueError, match=r"PickScoreMetric has no scale 'torchmetrics'; it has .*srpo"):
        find_scale(metric, "torchmetrics")
    with pytest.raises(TypeError, match="scale must be a name"):
        find_scale(metric, [26])  # type: ignore[arg-type]


def test_the_table_names_metrics_and_frameworks_that_exist() -> None:
    later = {"HPSv3Metric", "QwenImageBenchMetric", "UnifiedReward2Metric", "UnifiedRewardEditMetric"}
    assert {*SCALES} <= {*diffsynth_metrics.__all__} | later
    others = {"official", "paper", "diffsynth", "pyiqa", "torchmetrics"}
    assert {name for scales in SCALES.values() for name in scales} <= {*FRAMEWORKS} | others

"""Code written for ``diffsynth.metrics`` runs: its methods, its positions, its neutral values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth_metrics import (
    AestheticMetric,
    BioCLIPMetric,
    CLIPMetric,
    HPSv2Metric,
    HPSv3Metric,
    ImageRewardMetric,
    LPIPSMetric,
    ModelConfig,
    PickScoreMetric,
)
from diffsynth_metrics.testing import tiny_checkpoint

IMAGES = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))

# What upstream takes by position behind processor_config: torch_dtype, device, and these defaults.
POSITIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "bioclip": (BioCLIPMetric, (77, None)),
    "clip": (CLIPMetric, (77, None, None)),
    "pickscore": (PickScoreMetric, (77, {}, None)),
    "hpsv2": (HPSv2Metric, ({}, None)),
    "aesthetic": (AestheticMetric, (None, None)),
    "image_reward": (ImageRewardMetric, (35, {}, None)),
    "hpsv3": (HPSv3Metric, (0, True, 256 * 28 * 28, 256 * 28 * 28, None, None)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    base = tmp_path_factory.mktemp("drop_in")
    return {name: ModelConfig(path=tiny_checkpoint(name, base / name)) for name in POSITIONS}


@pytest.fixture
def metric(folders: dict[str, ModelConfig]) -> PickScoreMetric:
    return PickScoreMetric.from_pretrained(folders["pickscore"], device="cpu")


def test_arguments_by_position_are_upstreams(folders: dict[str, ModelConfig]) -> None:
    for name, (metric_class, more) in POSITIONS.items():
        config = folders[name]
        named = metric_class.from_pretrained(config, torch_dtype=torch.float32, device="cpu")
        placed = metric_class.from_pretrained(config, config, torch.float32, "cpu", *more)
        arguments = (IMAGES,) if name == "aesthetic" else ("a cat", IMAGES)
        expected = named.compute(*arguments)
        assert placed.compute(*arguments) == pytest.approx(expected, abs=1e-3), name


def test_a_position_has_its_meaning(folders: dict[str, ModelConfig]) -> None:
    config = folders["pickscore"]
    assert PickScoreMetric.from_pretrained(config, None, None, "cpu", 12).max_length == 12
    with pytest.raises(TypeError, match="takes max_length, processor_kwargs, vram_limit behind device"):
        PickScoreMetric.from_pretrained(config, None, None, "cpu", 77, None, None, None)
    with pytest.raises(TypeError, match="got max_length twice"):
        PickScoreMetric.from_pretrained(config, None, None, "cpu", 77, max_length=77)
    with pytest.raises(TypeError, match="by position it comes before device"):
        PickScoreMetric.from_pretrained(config, None, "cpu")


def test_neutral_values_are_accepted_and_others_refused(folders: dict[str, ModelConfig]) -> None:
    neutral: list[tuple[Any, str, dict[str, Any]]] = [
        (PickScoreMetric, "pickscore", {"vram_limit": None}),
        (HPSv2Metric, "hpsv2", {"processor_kwargs": {}, "vram_limit": None}),
        (AestheticMetric, "aesthetic", {"processor_kwargs": {}}),
        (ImageRewardMetric, "image_reward", {"tokenizer_kwargs": {}}),
        (ImageRewardMetric, "image_reward", {"tokenizer_config": folders["image_reward"]}),
        (HPSv3Metric, "hpsv3", {"score_index": 0, "use_special_tokens": True}),
    ]
    for metric_class, name, options in neutral:
        metric_class.from_pretrained(folders[name], device="cpu", **options)
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (PickScoreMetric, {"vram_limit": 8.0}, "does not support another vram_limit than None"),
        (HPSv2Metric, {"processor_kwargs": {"size": 3}}, "no processor that processor_kwargs could"),
        (HPSv3Metric, {"score_index": 1}, "does not support another score_index than 0"),
        (HPSv3Metric, {"use_special_tokens": False}, "another use_special_tokens than True"),
    ]
    for metric_class, options, message in refused:
        with pytest.raises((TypeError, ValueError), match=message):
            metric_class.from_pretrained(ModelConfig(path="absent"), **options)


def test_the_methods_of_a_module_work(metric: PickScoreMetric) -> None:
    expected = metric.compute("a cat", IMAGES)
    same = pytest.approx(expected, abs=1e-4)
    assert metric.eval() is metric
    assert metric.requires_grad_(False) is metric
    assert metric.cpu() is metric
    assert metric.to("cpu", torch.float32) is metric
    assert metric.forward("a cat", IMAGES) == same
    assert len(list(metric.parameters())) == len(list(metric.model.parameters()))
    assert metric.compute("a cat", IMAGES) == same
    with pytest.raises(ValueError, match=r"metric\.model\.requires_grad_\(\)"):
        metric.requires_grad_()
    assert metric.bfloat16().dtype == torch.bfloat16
    assert metric.float().to("cpu", non_blocking=True).dtype == torch.float32
    assert metric.half().dtype == torch.float16
    assert metric.compute("a cat", IMAGES) == pytest.approx(expected, abs=1)
    assert metric.model.visual_projection.weight.dtype == torch.float32


def test_cuda_is_asked_for_as_of_a_module(metric: PickScoreMetric) -> None:
    moves: list[Any] = []
    metric.to = lambda device=None, dtype=None, non_blocking=False: moves.append(device)  # type: ignore[assignment,method-assign]
    metric.cuda()
    metric.cuda(1)
    metric.cuda("cuda:2")
    assert moves == ["cuda", torch.device("cuda", 1), "cuda:2"]


def test_probabilities_take_a_list_of_prompts(metric: PickScoreMetric) -> None:
    rows = metric.probabilities(["a cat", "a dog", "a hat"], IMAGES)
    assert [len(row) for row in rows] == [2, 2, 2]
    assert rows[1] == pytest.approx(metric.probabilities("a dog", IMAGES), abs=1e-4)
    assert sum(rows[2]) == pytest.approx(1)


def test_one_prompt_in_a_list_for_several_images_stays_an_error(metric: PickScoreMetric) -> None:
    with pytest.raises(ValueError, match="got 1 prompts and 2 images"):
        metric.compute(["a cat"], IMAGES)


def test_half_of_hpsv3_rounds_its_frequencies_as_loading_does(folders: dict[str, ModelConfig]) -> None:
    loaded = HPSv3Metric.from_pretrained(folders["hpsv3"], torch_dtype=torch.bfloat16, device="cpu")
    moved = HPSv3Metric.from_pretrained(folders["hpsv3"], torch_dtype=torch.float32, device="cpu")
    moved.to(torch.bfloat16)
    for one, other in zip(loaded.model.buffers(), moved.model.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    expected = loaded.compute("a cat", IMAGES)
    assert moved.compute("a cat", IMAGES) == pytest.approx(expected, abs=1e-2)


def test_hpsv2_says_which_version_the_names_tell(folders: dict[str, Any], tmp_path: Path) -> None:
    metric = HPSv2Metric.from_pretrained(folders["hpsv2"], device="cpu")
    assert metric.version == "unknown"
    assert "version unknown" in repr(metric)
    for name, version in (("HPS_v2.1_compressed", "2.1"), ("hpsv2.0", "2.0"), ("HPSv2", "unknown")):
        folder = tiny_checkpoint("hpsv2", tmp_path / name)
        metric = HPSv2Metric.from_pretrained(ModelConfig(path=folder), device="cpu")
        assert metric.version == version
        for text in (repr(metric), metric.card.name, metric.provenance["name"]):
            assert f"version {version}" in text
    assert HPSv2Metric.card.name == "HPSv2"


def test_lpips_and_bioclip_are_called_as_upstreams_examples_do(
    tiny: Any, tmp_path: Path, photographs: dict[str, Any]
) -> None:
    image_a, image_b = (photographs[name].resize((96, 96)) for name in ("chelsea", "coffee"))
    for folder, pictures in (("a", (image_a, image_b)), ("b", (image_b, image_a))):
        (tmp_path / folder).mkdir()
        for index, picture in enumerate(pictures):
            picture.save(tmp_path / folder / f"{index}.png")
    # net, model_config, device, batch_size, target_size, vram_limit
    config = ModelConfig(path=tiny("lpips"))
    lpips = LPIPSMetric.from_pretrained("alex", config, "cpu", 16, 512, None)
    (distance,) = lpips.compute(image_a, image_b)
    assert distance > 0
    assert lpips.compute(str(tmp_path / "a"), str(tmp_path / "b")) == pytest.approx([distance] * 2)
    # model_config, tokenizer_config, torch_dtype, device, max_length
    config = ModelConfig(path=tiny("bioclip"))
    by_position = BioCLIPMetric.from_pretrained(config, None, torch.float32, "cpu", 20)
    by_name = BioCLIPMetric.from_pretrained(
        model_config=config,
        tokenizer_config=None,
        torch_dtype=torch.float32,
        device="cpu",
        max_length=20,
    )
    prompts, images = ["Felis catus", "Canis lupus"], [image_a, image_b]
    assert by_position.max_length == by_name.max_length == 20
    assert by_position.compute(prompts, images) == pytest.approx(by_name.score(prompts, images))
    matrix = by_name.similarity_matrix(prompts, images)
    assert [matrix[0][0], matrix[1][1]] == pytest.approx(by_name.compute(prompts, images), abs=1e-4)

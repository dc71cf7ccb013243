"""Text and image features, what is made of them, and the memory of prompts."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from diffsynth_metrics import CLIPMetric, HPSv2Metric, ModelConfig, PickScoreMetric
from diffsynth_metrics.dual_encoder import (
    _TextCache,
    cosine_matrix,
    paired_cosine,
)
from diffsynth_metrics.metrics.clip import clip_score
from diffsynth_metrics.metrics.pickscore import pick_probabilities
from diffsynth_metrics.testing import tiny_checkpoint

Photographs = dict[str, PIL.Image.Image]

PROMPTS = ["a cat", "an astronaut in orange", "", "a cup of coffee on a table", "a rocket at night"]


@pytest.fixture
def metric(tiny_metric: PickScoreMetric) -> PickScoreMetric:
    """The tiny metric, which has forgotten the prompts of other tests, and who asked for its network."""
    tiny_metric.remembers_prompts = True
    return tiny_metric


@pytest.fixture(scope="session")
def images(photographs: Photographs) -> list[PIL.Image.Image]:
    return [image.resize((300, 240)) for image in photographs.values()]


@pytest.fixture
def encoded(metric: PickScoreMetric, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    return watch_encoding(metric, monkeypatch)


def watch_encoding(metric: PickScoreMetric, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the batches of prompts that reach the text tower from now on."""
    batches: list[list[str]] = []
    embed = metric._embed_texts

    def recorded(prompts: list[str]) -> torch.Tensor:
        batches.append(list(prompts))
        return embed(prompts)

    monkeypatch.setattr(metric, "_embed_texts", recorded)
    return batches


def change_data(network: Any) -> None:
    for weight in network.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))


def step_fused(network: Any) -> None:
    weights = list(network.parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight.requires_grad_())
    torch.optim.AdamW(weights, lr=0.1, fused=True).step()


def hook(network: Any) -> None:
    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))


def unit(*rows: list[float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


class TestFormulas:
    def test_clip_score_is_the_scaled_cosine(self) -> None:
        cosine = torch.tensor([0.25, -0.5, 0.0])
        scores = clip_score(cosine, torch.tensor(math.log(100)))
        assert scores.tolist() == pytest.approx([25.0, -50.0, 0.0], abs=1e-4)

    def test_clip_score_is_not_clamped(self) -> None:
        assert clip_score(torch.tensor(-0.2), torch.tensor(math.log(200))).item() == pytest.approx(-40)

    def test_clip_score_keeps_the_shape_and_the_wider_dtype(self) -> None:
        scores = clip_score(torch.zeros(2, 3, dtype=torch.float64), torch.tensor(1.0))
        assert (scores.shape, scores.dtype) == ((2, 3), torch.float64)

    def test_pick_probabilities_are_the_softmax(self) -> None:
        scores = torch.tensor([20.0, 20.0 + math.log(3), 20.0])
        assert pick_probabilities(scores).tolist() == pytest.approx([0.2, 0.6, 0.2])

    def test_pick_probabilities_of_large_scores_are_finite(self) -> None:
        assert pick_probabilities(torch.tensor([1000.0, 0.0])).tolist() == [1.0, 0.0]

    def test_paired_cosine_goes_row_by_row(self) -> None:
        texts, images = unit([1.0, 0.0], [3.0, 4.0]), unit([1.0, 1.0], [4.0, 3.0])
        assert paired_cosine(texts, images).tolist() == pytest.approx([math.sqrt(0.5), 0.96])

    def test_cosine_matrix_has_a_row_per_text(self) -> None:
        texts, images = unit([1.0, 0.0]), unit([1.0, 1.0], [4.0, 3.0], [0.0, 1.0])
        assert cosine_matrix(texts, images)[0].tolist() == pytest.approx([math.sqrt(0.5), 0.8, 0.0])


class TestFeatures:
    def test_image_features_have_length_one(self, metric: PickScoreMetric, images: list[Any]) -> None:
        features = metric.encode_image(images)
        assert (features.shape, features.dtype) == ((5, 24), torch.float32)
        assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)

    def test_text_features_have_length_one(self, metric: PickScoreMetric) -> None:
        features = metric.encode_text(PROMPTS)
        assert (features.shape, features.dtype) == ((5, 24), torch.float32)
        assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)

    def test_one_prompt_gives_one_row(self, metric: PickScoreMetric) -> None:
        assert metric.encode_text("a cat").shape == (1, 24)

    def test_one_image_gives_one_row(self, metric: PickScoreMetric, images: list[Any]) -> None:
        assert metric.encode_image(images[0]).shape == (1, 24)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_features_of_narrow_towers_are_float32(
        self, dtype: torch.dtype, tiny_folder: Path, images: list[Any]
    ) -> None:
        narrow = PickScoreMetric.from_pretrained(
            ModelConfig(path=tiny_folder), device="cpu", torch_dtype=dtype
        )
        for features in (narrow.encode_image(images), narrow.encode_text(PROMPTS)):
            assert features.dtype == torch.float32
            assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)

    def test_image_features_carry_a_graph_when_the_images_do(self, metric: PickScoreMetric) -> None:
        pixels = torch.rand(1, 3, 224, 224, requires_grad=True)
        metric.encode_image(pixels)[0, 0].backward()
        assert pixels.grad is not None and pixels.grad.abs().sum() > 0
        assert not metric.encode_image(pixels.detach()).requires_grad

    def test_text_features_carry_no_graph(self, metric: PickScoreMetric) -> None:
        assert not metric.encode_text("a cat").requires_grad

    def test_changing_returned_features_changes_no_later_score(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        expected = metric.compute("a cat", images[0])
        metric.encode_text("a cat").zero_()
        assert metric.compute("a cat", images[0]) == expected

    def test_a_prompt_of_any_length_is_cut_to_what_the_network_reads(
        self, metric: PickScoreMetric
    ) -> None:
        long, longer = metric.encode_text(["word " * 100, "word " * 200])
        assert torch.allclose(long, longer, atol=1e-6)


class TestScoreFromFeatures:
    def test_features_give_the_score_of_compute(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        scores = metric.score_from_features(metric.encode_text(PROMPTS), metric.encode_image(images))
        assert scores.tolist() == pytest.approx(metric.compute(PROMPTS, images), abs=1e-4)

    @pytest.mark.parametrize(("texts", "pictures"), [(1, 1), (3, 3), (1, 3), (3, 1)])
    def test_rows_pair_one_to_one_or_one_to_all(
        self, texts: int, pictures: int, metric: PickScoreMetric
    ) -> None:
        text_features, image_features = unit([3.0, 4.0]), unit([1.0, 0.0])
        scores = metric.score_from_features(
            text_features.expand(texts, -1), image_features.expand(pictures, -1)
        )
        assert scores.tolist() == pytest.approx([60.0] * max(texts, pictures), rel=1e-5)

    @pytest.mark.parametrize(
        ("texts", "pictures"),
        [((2, 24), (3, 24)), ((2, 24), (2, 16)), ((24,), (24,)), ((2, 24), (24,)), ((1, 2, 3), (2, 3))],
    )
    def test_shapes_that_do_not_pair_are_both_told(
        self, texts: tuple[int, ...], pictures: tuple[int, ...], metric: PickScoreMetric
    ) -> None:
        message = rf"got \{list(texts)} for text_features and \{list(pictures)} for image_features"
        with pytest.raises(ValueError, match=message):
            metric.score_from_features(torch.ones(texts), torch.ones(pictures))

    def test_gradients_flow_to_both(self, metric: PickScoreMetric) -> None:
        texts, images = torch.rand(2, 24, requires_grad=True), torch.rand(2, 24, requires_grad=True)
        metric.score_from_features(texts, images).sum().backward()
        assert texts.grad is not None and images.grad is not None
        assert torch.allclose(texts.grad, 100 * images.detach(), rtol=1e-4)

    def test_narrow_features_are_widened(self, metric: PickScoreMetric) -> None:
        features = torch.rand(2, 24).to(torch.bfloat16)
        assert metric.score_from_features(features, features).dtype == torch.float32

    def test_autocast_does_not_narrow_the_score(self, metric: PickScoreMetric) -> None:
        features = torch.rand(2, 24)
        expected = metric.score_from_features(features, features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(metric.score_from_features(features, features), expected)


class TestMatrixAndProbabilities:
    def test_the_matrix_has_the_score_of_every_pair(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        matrix = metric.similarity_matrix(PROMPTS[:3], images)
        assert len(matrix) == 3
        for prompt, row in zip(PROMPTS, matrix, strict=False):
            assert all(type(score) is float for score in row)
            assert row == pytest.approx(metric.compute(prompt, images), abs=1e-4)

    def test_the_matrix_of_one_pair_is_one_by_one(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        matrix = metric.similarity_matrix("a cat", images[0])
        assert matrix[0] == pytest.approx(metric.compute("a cat", images[0]), abs=1e-4)
        assert len(matrix) == len(matrix[0]) == 1

    def test_probabilities_sum_to_one_and_follow_the_scores(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        probabilities = metric.probabilities("a cat", images)
        scores = metric.compute("a cat", images)
        assert sum(probabilities) == pytest.approx(1)
        assert sorted(range(5), key=probabilities.__getitem__) == sorted(
            range(5), key=scores.__getitem__
        )

    def test_probabilities_are_of_one_prompt(self, metric: PickScoreMetric, images: list[Any]) -> None:
        with pytest.raises(TypeError, match=r"images of one prompt, so prompt must be a str, got list"):
            metric.probabilities(["a cat"], images)  # type: ignore[arg-type]

    def test_calc_probs_is_another_name_of_probabilities(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        assert metric.calc_probs("a cat", images) == metric.probabilities("a cat", images)


class TestMemoryOfPrompts:
    def test_each_different_prompt_of_a_call_is_encoded_once(
        self, metric: PickScoreMetric, images: list[Any], encoded: list[list[str]]
    ) -> None:
        metric.compute(["a", "b", "a", "a", "b"], images)
        assert encoded == [["a", "b"]]

    def test_one_prompt_for_all_images_is_encoded_once(
        self, metric: PickScoreMetric, images: list[Any], encoded: list[list[str]]
    ) -> None:
        metric.compute("a", images * 5)
        assert encoded == [["a"]]

    def test_the_prompts_of_an_earlier_call_are_remembered(
        self, metric: PickScoreMetric, images: list[Any], encoded: list[list[str]]
    ) -> None:
        metric.compute("a", images)
        metric.reward("a", images)
        metric.encode_text(["a", "b"])
        metric.similarity_matrix(["a", "b"], images[:1])
        metric.compute(["a", "b", "a", "a", "b"], images)
        assert encoded == [["a"], ["a", "b"]]

    def test_prompts_are_encoded_in_batches(
        self, metric: PickScoreMetric, encoded: list[list[str]]
    ) -> None:
        prompts = [f"prompt {number}" for number in range(35)]
        features = metric.encode_text(prompts)
        assert encoded == [prompts[:16], prompts[16:32], prompts[32:]]
        assert torch.allclose(features, torch.cat([metric.encode_text(p) for p in prompts]), atol=1e-5)

    def test_features_are_the_same_to_the_bit_whatever_was_asked_before(
        self, metric: PickScoreMetric
    ) -> None:
        prompts = [f"prompt {number}" for number in range(35)]
        together = metric.to("cpu").encode_text(prompts)
        metric.to("cpu").encode_text(prompts[::2])
        assert torch.equal(metric.encode_text(prompts), together)

    def test_a_caller_that_writes_to_its_features_changes_none_that_are_kept(
        self, metric: PickScoreMetric
    ) -> None:
        before = metric.encode_text("a").clone()
        metric.encode_text("a").zero_()
        assert torch.equal(metric.encode_text("a"), before)

    def test_remembered_and_new_prompts_keep_their_order(self, metric: PickScoreMetric) -> None:
        alone = {prompt: metric.encode_text(prompt)[0] for prompt in ("c", "a")}
        together = metric.encode_text(["a", "b", "c", "b", "a"])
        assert torch.allclose(together[0], alone["a"], atol=1e-5)
        assert torch.allclose(together[2], alone["c"], atol=1e-5)
        assert torch.equal(together[1], together[3])
        assert not torch.allclose(together[1], together[0], atol=1e-3)

    def test_a_move_forgets_the_prompts(self, metric: PickScoreMetric, encoded: list[list[str]]) -> None:
        metric.encode_text("a")
        metric.to("cpu")
        metric.encode_text("a")
        assert encoded == [["a"], ["a"]]

    def test_another_length_is_another_text(self, tiny_metric: PickScoreMetric) -> None:
        metric = copy.deepcopy(tiny_metric)
        metric.remembers_prompts = True
        first = metric.encode_text("a cat on a sofa by the window")
        metric.max_length = 5
        assert not torch.allclose(first, metric.encode_text("a cat on a sofa by the window"), atol=1e-3)

    @pytest.mark.parametrize(("name", "metric_class"), [("clip", CLIPMetric), ("hpsv2", HPSv2Metric)])
    @pytest.mark.parametrize("change", [change_data, step_fused, hook], ids=lambda f: f.__name__)
    def test_no_prompt_outlives_a_change_of_the_network(
        self, change: Any, name: str, metric_class: Any, tmp_path: Path
    ) -> None:
        files = ModelConfig(path=tiny_checkpoint(name, tmp_path))
        metric = metric_class.from_pretrained(files, device="cpu")
        first = metric.encode_text("a")
        assert metric.remembers_prompts
        network = metric.model  # asked for once, before the prompt is asked for again
        assert torch.equal(metric.encode_text("a"), first)
        change(network)
        second = metric.encode_text("a")
        assert not torch.allclose(first, second, atol=1e-3)
        change(network)
        assert not torch.allclose(second, metric.encode_text("a"), atol=1e-4)

    def test_who_has_asked_for_the_network_may_promise_not_to_change_it(
        self, tiny_metric: PickScoreMetric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        metric = copy.deepcopy(tiny_metric)
        encoded = watch_encoding(metric, monkeypatch)
        metric.remembers_prompts = True
        metric.encode_text("a")
        metric.encode_text("a")
        assert metric.model is not None and not metric.remembers_prompts
        metric.encode_text("a")
        metric.encode_text("a")
        metric.remembers_prompts = True
        metric.encode_text("a")
        metric.encode_text("a")
        assert encoded == [["a"]] * 4

    def test_only_a_network_that_nobody_else_has_is_trusted(self, tiny_folder: Path) -> None:
        metric = PickScoreMetric.from_pretrained(ModelConfig(path=tiny_folder), device="cpu")
        assert metric.remembers_prompts
        for same in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.to("cpu")):
            assert same.remembers_prompts
        own = PickScoreMetric(metric._network, metric.tokenizer, max_length=77, batch_size=16)
        assert not own.remembers_prompts
        shallow = copy.copy(metric)
        assert shallow.model is metric._network and not metric.remembers_prompts
        assert not copy.deepcopy(metric).remembers_prompts
        other = PickScoreMetric.from_pretrained(ModelConfig(path=tiny_folder), device="cpu")
        other.model = metric._network
        assert not other.remembers_prompts and other._network is metric._network

    def test_the_batches_used_last_are_kept(self) -> None:
        cache = _TextCache(5, is_used=True)
        for name, rows in (("a", 2), ("b", 3)):
            cache.put(name, torch.zeros(rows, 4))
        assert cache.get("a") is not None
        cache.put("c", torch.zeros(1, 4))
        assert [cache.get(name) is None for name in "abc"] == [False, True, False]

    def test_a_batch_of_more_prompts_than_are_kept_is_kept_alone(self) -> None:
        cache = _TextCache(5, is_used=True)
        cache.put("a", torch.zeros(1, 4))
        cache.put("b", torch.zeros(7, 4))
        assert cache.get("a") is None and cache.get("b") is not None

    def test_more_prompts_than_are_kept_are_scored_all_the_same(
        self, metric: PickScoreMetric, images: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = [metric.compute(prompt, images) for prompt in PROMPTS]
        monkeypatch.setattr(metric, "_text_cache", _TextCache(2, is_used=True))
        assert [metric.compute(prompt, images) for prompt in PROMPTS] == expected
        assert len(metric._text_cache) == 2


class TestNarrowTowers:
    """The measured distance, on scores of 0 to 100 in size: bfloat16 at most 0.58, float16 0.054."""

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1.0), (torch.float16, 0.1)], ids=str)
    def test_scores_stay_near_those_of_float32(
        self,
        dtype: torch.dtype,
        bound: float,
        metric: PickScoreMetric,
        tiny_folder: Path,
        images: list[Any],
    ) -> None:
        narrow = PickScoreMetric.from_pretrained(
            ModelConfig(path=tiny_folder), device="cpu", torch_dtype=dtype
        )
        expected = torch.tensor(metric.similarity_matrix(PROMPTS, images))
        scores = torch.tensor(narrow.similarity_matrix(PROMPTS, images))
        assert expected.std() > 5
        assert (scores - expected).abs().max() < bound

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_gradients_reach_float32_images(self, dtype: torch.dtype, tiny_folder: Path) -> None:
        narrow = PickScoreMetric.from_pretrained(
            ModelConfig(path=tiny_folder), device="cpu", torch_dtype=dtype
        )
        pixels = torch.rand(1, 3, 224, 224, requires_grad=True)
        reward = narrow.reward("a cat", pixels)
        reward.sum().backward()
        assert reward.dtype == torch.float32
        assert pixels.grad is not None and pixels.grad.dtype == torch.float32
        assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0

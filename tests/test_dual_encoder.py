"""Text and image features, what is made of them, and the memory of prompts."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from diffsynth_metrics import (
    CLIPMetric,
    HPSv2Metric,
    ImageRewardMetric,
    ModelConfig,
    PickScoreMetric,
    dual_encoder,
)
from diffsynth_metrics.dual_encoder import (
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
    return tiny_metric


@pytest.fixture
def caching(tiny_folder: Path) -> PickScoreMetric:
    """A metric that keeps the features of prompts."""
    return PickScoreMetric.from_pretrained(
        ModelConfig(path=tiny_folder), device="cpu", batch_size=16, cache_text=True
    )


@pytest.fixture(scope="session")
def images(photographs: Photographs) -> list[PIL.Image.Image]:
    return [image.resize((300, 240)) for image in photographs.values()]


def watch_encoding(metric: PickScoreMetric, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of prompts that reach the text tower together, from now on."""
    batches: list[int] = []
    embed = metric.embed_text

    def recorded(ids: list[list[int]]) -> torch.Tensor:
        batches.append(len(ids))
        return embed(ids)

    monkeypatch.setattr(metric, "embed_text", recorded)
    return batches


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
        assert metric.compute("a cat", images[0]) == pytest.approx(expected, abs=1e-4)

    def test_a_prompt_of_any_length_is_cut_to_what_the_network_reads(
        self, metric: PickScoreMetric
    ) -> None:
        with pytest.warns(UserWarning, match="reads 77 tokens"):
            long, longer = copy.copy(metric).encode_text(["word " * 100, "word " * 200])
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

    def test_calc_probs_is_another_name_of_probabilities(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        expected = metric.probabilities("a cat", images)
        assert metric.calc_probs("a cat", images) == pytest.approx(expected, abs=1e-4)


class TestPromptsOfACall:
    def test_each_different_prompt_is_encoded_once(
        self, metric: PickScoreMetric, images: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded = watch_encoding(metric, monkeypatch)
        metric.compute(["a", "b", "a", "a", "b"], images)
        metric.compute("a", images * 5)
        assert encoded == [2, 1]

    def test_prompts_are_encoded_in_batches(
        self, caching: PickScoreMetric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded = watch_encoding(caching, monkeypatch)
        prompts = [f"prompt {number}" for number in range(35)]
        features = caching.encode_text(prompts)
        assert encoded == [16, 16, 3]
        alone = torch.cat([caching.encode_text(prompt) for prompt in prompts])
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)

    def test_a_cut_prompt_is_said_once_and_in_each_row(
        self, tiny_folder: Path, images: list[Any]
    ) -> None:
        for name, metric_class, limit in (
            ("clip", CLIPMetric, 77),
            ("hpsv2", HPSv2Metric, 77),
            ("image_reward", ImageRewardMetric, 35),
        ):
            folder = tiny_checkpoint(name, tiny_folder.parent / f"cut_{name}")
            metric = metric_class.from_pretrained(ModelConfig(path=folder), device="cpu")
            prompts = ["a cat", "word " * 200]
            with pytest.warns(UserWarning, match=rf"reads {limit} tokens of a prompt, and 'word word"):
                metric.compute(prompts, images[:2])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                short, cut = metric.evaluate(prompts, images[:2])
            assert short["prompt_tokens"] <= limit < cut["prompt_tokens"]
            assert (short["truncated"], cut["truncated"]) == (False, True)

    def test_the_tokenizers_side_of_cutting_is_kept(self, tiny_folder: Path, images: list[Any]) -> None:
        prompt = "red " * 100 + "a cat"
        for side in ("left", "right"):
            metric = PickScoreMetric.from_pretrained(
                ModelConfig(path=tiny_folder), device="cpu", processor_kwargs={"truncation_side": side}
            )
            expected = metric.tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
            assert metric.tokenize([prompt]).ids == [expected]

    def test_hpsv2_does_not_follow_the_callers_default_dtype(
        self, tiny: Callable[[str], Path], images: list[Any]
    ) -> None:
        metric = HPSv2Metric.from_pretrained(ModelConfig(path=tiny("hpsv2")), device="cpu")
        expected = metric.compute("a cat", images[0])
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert metric.compute("a cat", images[0]) == pytest.approx(expected, abs=1e-5)
        finally:
            torch.set_default_dtype(torch.float32)


class TestCacheOfTexts:
    def test_nothing_is_kept_by_default(
        self, metric: PickScoreMetric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded = watch_encoding(metric, monkeypatch)
        metric.encode_text("a")
        metric.encode_text("a")
        assert encoded == [1, 1]

    def test_the_prompts_of_an_earlier_call_are_kept_if_asked(
        self, caching: PickScoreMetric, images: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded = watch_encoding(caching, monkeypatch)
        caching.compute("a", images)
        caching.reward("a", images)
        caching.encode_text(["a", "b"])
        caching.similarity_matrix(["a", "b"], images[:1])
        caching.compute(["a", "b", "a", "a", "b"], images)
        assert encoded == [1, 1]

    def test_kept_and_new_prompts_keep_their_order(self, caching: PickScoreMetric) -> None:
        alone = {prompt: caching.encode_text(prompt)[0] for prompt in ("c", "a")}
        together = caching.encode_text(["a", "b", "c", "b", "a"])
        assert torch.allclose(together[0], alone["a"], atol=1e-5)
        assert torch.allclose(together[2], alone["c"], atol=1e-5)
        assert torch.allclose(together[1], together[3], atol=1e-5)
        assert not torch.allclose(together[1], together[0], atol=1e-3)

    def test_a_caller_that_writes_to_its_features_changes_none_that_are_kept(
        self, caching: PickScoreMetric
    ) -> None:
        before = caching.encode_text("a").clone()
        caching.encode_text("a").zero_()
        assert torch.equal(caching.encode_text("a"), before)  # read, not computed again

    def test_clearing_and_moving_forget_the_prompts(
        self, caching: PickScoreMetric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded = watch_encoding(caching, monkeypatch)
        for forget in (caching.clear_text_cache, lambda: caching.to("cpu")):
            caching.encode_text("a")
            forget()
        caching.encode_text("a")
        assert encoded == [1, 1, 1]

    def test_a_changed_network_is_seen_after_clearing(self, caching: PickScoreMetric) -> None:
        first = caching.encode_text("a")
        for weight in caching.model.parameters():
            weight.data.add_(0.1 * torch.randn_like(weight))
        assert torch.equal(caching.encode_text("a"), first)  # the documented risk
        caching.clear_text_cache()
        assert not torch.allclose(caching.encode_text("a"), first, atol=1e-3)

    def test_another_length_is_another_text(self, caching: PickScoreMetric) -> None:
        first = caching.encode_text("a cat on a sofa by the window")
        caching.max_length = 5
        with pytest.warns(UserWarning, match="reads 5 tokens"):
            cut = caching.encode_text("a cat on a sofa by the window")
        assert not torch.allclose(first, cut, atol=1e-3)

    def test_more_prompts_than_are_kept_are_scored_all_the_same(
        self, caching: PickScoreMetric, images: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = [caching.compute(prompt, images[0])[0] for prompt in PROMPTS]
        monkeypatch.setattr(dual_encoder, "_CACHED_PROMPTS", 2)
        caching.clear_text_cache()
        scores = [caching.compute(prompt, images[0])[0] for prompt in PROMPTS]
        assert scores == pytest.approx(expected, abs=1e-4)
        assert caching.compute(PROMPTS, images[0]) == pytest.approx(expected, abs=1e-4)


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

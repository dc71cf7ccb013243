"""The contract of every metric: its verbs agree, and the caller's torch is neither used nor changed."""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import inspect
import json
import pickle
from collections import UserList
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import diffsynth_metrics
from diffsynth_metrics import BaseMetric, Metric, MetricCard, ModelConfig, PickScoreMetric
from diffsynth_metrics.weights.placement import choose_device, choose_dtype

Photographs = dict[str, PIL.Image.Image]

PROMPTS = ["a cat", "an astronaut in orange", "", "a cup of coffee on a table", "a rocket at night"]
PUBLIC = [getattr(diffsynth_metrics, name) for name in diffsynth_metrics.__all__]
METRICS = [
    thing
    for thing in PUBLIC
    if inspect.isclass(thing) and issubclass(thing, BaseMetric) and thing is not BaseMetric
]


@pytest.fixture
def metric(tiny_metric: PickScoreMetric) -> PickScoreMetric:
    """The tiny metric, which has forgotten the prompts of other tests."""
    return tiny_metric.to("cpu")


@pytest.fixture(scope="session")
def double_metric(tiny_folder: Path) -> PickScoreMetric:
    return PickScoreMetric.from_pretrained(
        ModelConfig(path=tiny_folder), device="cpu", torch_dtype=torch.float64
    )


@pytest.fixture(scope="session")
def images(photographs: Photographs) -> list[PIL.Image.Image]:
    return [image.resize((300, 240)) for image in photographs.values()]


def noise(count: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.8 * torch.rand(count, 3, 224, 224, generator=generator, dtype=dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class TestVerbs:
    def test_scores_are_plain_floats(self, metric: PickScoreMetric, images: list[Any]) -> None:
        scores = metric.compute(PROMPTS, images)
        assert [type(score) for score in scores] == [float] * 5

    def test_scores_of_different_pairs_differ(self, metric: PickScoreMetric, images: list[Any]) -> None:
        scores = torch.tensor(metric.compute(PROMPTS, images))
        assert scores.std() > 1  # otherwise no test of this file would notice an error

    def test_other_names_of_compute(self, metric: PickScoreMetric, images: list[Any]) -> None:
        expected = metric.compute(PROMPTS, images)
        for verb in (metric.score, metric, metric.forward):
            assert verb(PROMPTS, images) == pytest.approx(expected, abs=1e-4)

    def test_evaluate_gives_the_same_score_with_its_components(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        rows = metric.evaluate(PROMPTS, images)
        scores = metric.compute(PROMPTS, images)
        assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-4)
        for row in rows:
            assert row.keys() == {"score", "cosine", "prompt_tokens", "truncated"}
            assert row["score"] == pytest.approx(100 * row["cosine"], rel=1e-5)

    def test_reward_is_the_same_score_as_a_tensor(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        reward = metric.reward(PROMPTS, images)
        assert (reward.dtype, reward.shape, reward.device.type) == (torch.float32, (5,), "cpu")
        assert reward.tolist() == pytest.approx(metric.compute(PROMPTS, images), abs=1e-4)

    def test_components_are_public_and_keep_no_graph_unless_asked(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        components = metric.components(PROMPTS, images)
        assert {len(values) for values in components.values()} == {5}
        assert not any(values.requires_grad for values in components.values())
        assert metric.components("a cat", noise(1).requires_grad_())["cosine"].requires_grad

    def test_a_call_with_other_arguments_says_which_there_are(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        takes = r"takes \(prompt, images\); several images are one list: "
        with pytest.raises(TypeError, match=takes + "too many positional arguments"):
            metric.compute("a cat", images[0], images[1])  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=takes + "there is no argument 'prompts'"):
            metric.evaluate(prompts="a cat", images=images)  # type: ignore[call-arg]

    def test_a_class_without_a_network_says_how_it_is_loaded(self) -> None:
        with pytest.raises(TypeError, match=r"load a metric with PickScoreMetric\.from_pretrained\(\)"):
            PickScoreMetric()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"PickScoreMetric\.from_pretrained\(ModelConfig"):
            PickScoreMetric("model.safetensors", None)  # type: ignore[arg-type]

    def test_a_single_pair_gives_a_list_of_one(self, metric: PickScoreMetric, images: list[Any]) -> None:
        assert len(metric.compute("a cat", images[0])) == 1

    def test_one_image_for_many_prompts_is_scored_with_each(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        together = metric.compute(PROMPTS, images[0])
        alone = [metric.compute(prompt, images[0])[0] for prompt in PROMPTS]
        assert together == pytest.approx(alone, abs=1e-4)

    def test_metric_is_another_name_of_base_metric(self) -> None:
        assert Metric is BaseMetric

    def test_a_metric_is_no_module(self, metric: PickScoreMetric) -> None:
        assert isinstance(metric.model, torch.nn.Module)
        assert not isinstance(metric, torch.nn.Module)


class TestTheCallersTorch:
    """What the caller has switched on changes no score, and is still on afterwards."""

    @pytest.mark.parametrize(
        "context",
        [
            torch.no_grad,
            torch.enable_grad,
            torch.inference_mode,
            lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            lambda: default_dtype(torch.float64),
        ],
        ids=["no_grad", "enable_grad", "inference_mode", "autocast", "default_dtype"],
    )
    @pytest.mark.parametrize("kind", ["PIL", "bytes", "floats"])
    def test_nothing_influences_a_score(
        self,
        context: Callable[[], AbstractContextManager[Any]],
        kind: str,
        metric: PickScoreMetric,
        images: list[Any],
    ) -> None:
        pictures = images[:3] if kind == "PIL" else noise(3)
        if kind == "bytes":
            pictures = (pictures * 255).to(torch.uint8)
        expected = metric.compute(PROMPTS[:3], pictures)
        with context():
            same = pytest.approx(expected, abs=1e-4)
            assert metric.compute(PROMPTS[:3], pictures) == same
            assert metric.reward(PROMPTS[:3], pictures).tolist() == same
            assert [row["score"] for row in metric.evaluate(PROMPTS[:3], pictures)] == same

    @pytest.mark.parametrize("verb", ["compute", "evaluate", "reward", "similarity_matrix"])
    def test_nothing_is_switched_by_a_verb(
        self, verb: str, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        def state() -> tuple[object, ...]:
            return (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.get_default_dtype(),
                torch.get_num_threads(),
                torch.get_rng_state().tolist(),
            )

        for context in (
            torch.enable_grad(),
            torch.no_grad(),
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.float16),
            default_dtype(torch.float64),
        ):
            with context:
                before = state()
                getattr(metric, verb)("a cat", images[0])
                assert state() == before

    def test_grad_mode_is_restored_after_an_error(self, metric: PickScoreMetric) -> None:
        with pytest.raises(TypeError):
            metric.compute("a cat", None)  # type: ignore[arg-type]
        assert torch.is_grad_enabled()

    def test_prompts_met_in_inference_mode_serve_gradients_later(self, metric: PickScoreMetric) -> None:
        with torch.inference_mode():
            metric.compute("a prompt met in inference mode", noise(1))
        pixels = noise(1).requires_grad_()
        metric.reward("a prompt met in inference mode", pixels).sum().backward()
        assert pixels.grad is not None and pixels.grad.abs().sum() > 0

    def test_a_reward_had_in_inference_mode_serves_in_a_graph_later(
        self, metric: PickScoreMetric
    ) -> None:
        with torch.inference_mode():
            reward = metric.reward("a cat", noise(1))
        weight = torch.ones(1, requires_grad=True)
        (weight * reward).sum().backward()
        torch.testing.assert_close(weight.grad, reward)

    def test_images_made_in_inference_mode_are_scored(self, metric: PickScoreMetric) -> None:
        with torch.inference_mode():
            pixels = noise(2) * 1
        expected = metric.compute("a cat", noise(2))
        assert metric.compute("a cat", pixels) == pytest.approx(expected, abs=1e-4)


class TestGradients:
    def test_reward_carries_a_graph_when_the_images_do(self, metric: PickScoreMetric) -> None:
        assert metric.reward("a cat", noise(2).requires_grad_()).requires_grad

    def test_reward_carries_a_graph_when_one_image_of_a_list_does(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        pixels = noise(1)[0].requires_grad_()
        reward = metric.reward("a cat", [images[0], pixels, noise(1)[0]])
        reward[1].backward()
        assert pixels.grad is not None and pixels.grad.abs().sum() > 0
        assert metric.reward("a cat", UserList([pixels])).requires_grad

    def test_reward_carries_no_graph_otherwise(self, metric: PickScoreMetric, images: list[Any]) -> None:
        assert not metric.reward("a cat", noise(2)).requires_grad
        assert not metric.reward("a cat", images).requires_grad

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_reward_carries_no_graph_when_the_caller_wants_none(
        self, context: Callable[[], AbstractContextManager[Any]], metric: PickScoreMetric
    ) -> None:
        pixels = noise(2).requires_grad_()
        with context():
            assert not metric.reward("a cat", pixels).requires_grad

    def test_reward_in_autocast_has_the_gradient_of_float32(self, metric: PickScoreMetric) -> None:
        gradients: list[Any] = []
        for enabled in (False, True):
            pixels = noise(1).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                reward = metric.reward("a cat", pixels)
            reward.sum().backward()  # outside, as PyTorch's documentation asks
            gradients.append(pixels.grad)
        scale = gradients[0].abs().max()
        torch.testing.assert_close(gradients[1] / scale, gradients[0] / scale, rtol=1e-4, atol=1e-4)

    def test_each_image_has_the_gradient_of_its_own_score(self, metric: PickScoreMetric) -> None:
        pixels = noise(3).requires_grad_()
        metric.reward("a cat", pixels)[1].backward()
        assert pixels.grad is not None
        assert (pixels.grad.flatten(1).abs().sum(dim=1) > 0).tolist() == [False, True, False]

    def test_the_weights_never_receive_one(self, metric: PickScoreMetric) -> None:
        metric.reward(PROMPTS[:2], noise(2).requires_grad_()).sum().backward()
        assert all(parameter.grad is None for parameter in metric.model.parameters())
        assert not any(parameter.requires_grad for parameter in metric.model.parameters())

    def test_compute_and_evaluate_keep_no_graph_alive(self, metric: PickScoreMetric) -> None:
        pixels = noise(1).requires_grad_()
        graph = pixels * 1
        metric.compute("a cat", graph)
        metric.evaluate("a cat", graph)
        graph.sum().backward()
        assert pixels.grad is not None and (pixels.grad == 1).all()

    def test_a_reward_in_float64_is_float64(self, double_metric: PickScoreMetric) -> None:
        assert double_metric.reward("a cat", noise(1, dtype=torch.float64)).dtype == torch.float64

    def test_autograd_agrees_with_finite_differences(self, double_metric: PickScoreMetric) -> None:
        pixels = noise(1, dtype=torch.float64)
        leaf = pixels.clone().requires_grad_()
        double_metric.reward("an astronaut", leaf).sum().backward()
        assert leaf.grad is not None
        step = 1e-5
        for seed in range(4):
            direction = noise(1, dtype=torch.float64, seed=seed + 1) - 0.5
            forward = double_metric.reward("an astronaut", pixels + step * direction)
            backward = double_metric.reward("an astronaut", pixels - step * direction)
            measured = ((forward - backward) / (2 * step)).item()
            assert (leaf.grad * direction).sum().item() == pytest.approx(measured, rel=1e-5)

    def test_autograd_agrees_with_finite_differences_through_the_resizing(
        self, double_metric: PickScoreMetric
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        pixels = 0.3 + 0.4 * torch.rand(1, 3, 260, 331, generator=generator, dtype=torch.float64)
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        leaf = pixels.clone().requires_grad_()
        double_metric.reward("an astronaut", leaf).sum().backward()
        assert leaf.grad is not None
        step = 1e-5
        forward = double_metric.reward("an astronaut", pixels + step * direction)
        backward = double_metric.reward("an astronaut", pixels - step * direction)
        measured = ((forward - backward) / (2 * step)).item()
        assert (leaf.grad * direction).sum().item() == pytest.approx(measured, rel=1e-5)


class TestBatches:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 64])
    def test_the_batch_size_changes_no_score(
        self, batch_size: int, tiny_folder: Path, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        other = PickScoreMetric.from_pretrained(
            ModelConfig(path=tiny_folder), device="cpu", batch_size=batch_size
        )
        expected = metric.compute(PROMPTS, images)
        assert other.compute(PROMPTS, images) == pytest.approx(expected, abs=1e-4)

    def test_no_batch_size_chooses_one_by_device(self, tiny_folder: Path) -> None:
        metric = PickScoreMetric.from_pretrained(ModelConfig(path=tiny_folder), device="cpu")
        assert metric.batch_size == 4
        assert metric.to("meta").batch_size == 16
        metric.batch_size = 3
        assert metric.batch_size == 3

    def test_the_company_in_a_batch_changes_no_score(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        together = metric.compute(PROMPTS, images)
        for index, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
            assert metric.compute(prompt, image)[0] == pytest.approx(together[index], abs=1e-4)

    def test_a_long_prompt_beside_it_changes_no_score(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        (alone,) = metric.compute("a cat", images[0])
        beside = metric.compute(["a cat", "a dog " * 30], images[0])[0]
        assert beside == pytest.approx(alone, abs=1e-4)

    def test_duplicates_have_the_same_score(self, metric: PickScoreMetric, images: list[Any]) -> None:
        scores = metric.compute(["a cat", "a dog", "a cat"] * 2, [images[0], images[1], images[0]] * 2)
        assert scores[0] == pytest.approx(scores[2], abs=1e-4)
        assert scores[3:] == pytest.approx(scores[:3], abs=1e-4)

    def test_the_order_of_the_pairs_is_the_order_of_the_scores(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        forward = metric.compute(PROMPTS, images)
        assert metric.compute(PROMPTS[::-1], images[::-1])[::-1] == pytest.approx(forward, abs=1e-4)

    @pytest.mark.parametrize("batch_size", [0, -1, 1.5, "8", True])
    def test_a_batch_size_that_is_no_positive_int_is_refused(
        self, batch_size: Any, tiny_folder: Path
    ) -> None:
        with pytest.raises(ValueError, match=rf"batch_size must be a positive int, got {batch_size!r}"):
            PickScoreMetric.from_pretrained(
                ModelConfig(path=tiny_folder), device="cpu", batch_size=batch_size
            )


class TestThreadsAndMemory:
    def test_eight_threads_get_what_one_gets(self, tiny_folder: Path, images: list[Any]) -> None:
        pairs = [(prompt, image) for prompt in PROMPTS for image in images]
        for cache_text in (False, True):
            metric = PickScoreMetric.from_pretrained(
                ModelConfig(path=tiny_folder), device="cpu", cache_text=cache_text
            )
            expected = [metric.compute(prompt, image)[0] for prompt, image in pairs]
            metric.clear_text_cache()
            with ThreadPoolExecutor(8) as pool:
                for _ in range(2):
                    scores = pool.map(lambda pair: metric.compute(*pair)[0], pairs)  # noqa: B023
                    assert list(scores) == pytest.approx(expected, abs=1e-4)

    def test_eight_threads_may_ask_for_overlapping_prompts(
        self, tiny_folder: Path, images: list[Any]
    ) -> None:
        metric = PickScoreMetric.from_pretrained(
            ModelConfig(path=tiny_folder), device="cpu", cache_text=True
        )
        prompts = [f"prompt {number}" for number in range(40)]
        calls = [prompts[start : start + 8] for start in range(33)]
        expected = [metric.similarity_matrix(call, images[0]) for call in calls]
        metric.clear_text_cache()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda c: metric.similarity_matrix(c, images[0]), calls))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)

    def test_the_grad_mode_of_one_thread_is_not_that_of_another(self, metric: PickScoreMetric) -> None:
        pixels = noise(1)
        with ThreadPoolExecutor(8) as pool:
            rewards = list(
                pool.map(
                    lambda wanted: metric.reward("a cat", pixels.clone().requires_grad_(wanted)),
                    [True, False] * 16,
                )
            )
        assert [reward.requires_grad for reward in rewards] == [True, False] * 16

    def test_a_hundred_calls_leave_no_tensor_behind(
        self, metric: PickScoreMetric, images: list[Any]
    ) -> None:
        def tensors() -> int:
            gc.collect()
            return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

        def call() -> None:
            metric.compute(PROMPTS[:2], images[:2])
            metric.reward("a cat", noise(1).requires_grad_())

        for _ in range(5):
            call()
        before = tensors()
        for _ in range(95):
            call()
        assert tensors() == before


class TestProperties:
    def test_repr_shows_where_a_metric_runs(self, metric: PickScoreMetric) -> None:
        assert repr(metric) == (
            "PickScoreMetric('PickScore v1, unpublished weights', device='cpu', dtype=torch.float32, "
            "batch_size=4)"
        )

    def test_to_returns_the_metric_itself(self, metric: PickScoreMetric) -> None:
        assert metric.to("cpu") is metric
        assert metric.to(torch.device("cpu")) is metric

    def test_to_moves_every_tensor_of_the_network(self, tiny_folder: Path) -> None:
        metric = PickScoreMetric.from_pretrained(ModelConfig(path=tiny_folder), device="cpu").to("meta")
        assert metric.device.type == "meta"
        tensors = [*metric.model.parameters(), *metric.model.buffers()]
        assert all(tensor.is_meta for tensor in tensors)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_dtype_is_that_of_the_towers(self, dtype: torch.dtype, tiny_folder: Path) -> None:
        metric = PickScoreMetric.from_pretrained(
            ModelConfig(path=tiny_folder), device="cpu", torch_dtype=dtype
        )
        assert metric.dtype == dtype
        assert f"device='cpu', dtype={dtype}, batch_size=4)" in repr(metric)

    def test_to_a_dtype_gives_what_loading_in_it_gives(self, tiny_folder: Path) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            loaded = PickScoreMetric.from_pretrained(
                ModelConfig(path=tiny_folder), device="cpu", torch_dtype=dtype
            )
            moved = PickScoreMetric.from_pretrained(ModelConfig(path=tiny_folder), device="cpu").to(
                dtype
            )
            dtypes = [weight.dtype for weight in loaded.model.parameters()]
            assert [weight.dtype for weight in moved.model.parameters()] == dtypes
            expected = loaded.compute("a cat", noise(2))
            assert moved.compute("a cat", noise(2)) == pytest.approx(expected, abs=1e-3)

    def test_a_given_device_is_taken(self) -> None:
        assert choose_device("cpu") == torch.device("cpu")
        assert choose_device(torch.device("meta")) == torch.device("meta")

    @pytest.mark.parametrize("device", ["cuda:99", torch.device("xpu", 99), "hpu:99", "cdua"])
    def test_a_device_that_is_not_there_is_an_error_before_files_are_looked_for(
        self, device: Any
    ) -> None:
        with pytest.raises(RuntimeError, match=f"the device '{device}' cannot be used: "):
            PickScoreMetric.from_pretrained(ModelConfig(path="nowhere"), device=device)

    def test_without_an_accelerator_the_device_is_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        assert choose_device(None) == torch.device("cpu")

    def test_an_accelerator_is_taken_by_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: cuda)
        assert choose_device(None) == cuda

    def test_the_official_dtype_is_the_default(self) -> None:
        assert choose_dtype(None, torch.bfloat16) == torch.bfloat16
        assert choose_dtype(torch.float16, torch.bfloat16) == torch.float16

    @pytest.mark.parametrize("wrong", ["float16", torch.int8, torch.float8_e4m3fn, float, 16])
    def test_a_dtype_that_is_not_floating_is_refused(self, wrong: Any, tiny_folder: Path) -> None:
        with pytest.raises(TypeError, match=r"torch_dtype must be one of torch\.float32, .*, got "):
            PickScoreMetric.from_pretrained(
                ModelConfig(path=tiny_folder), device="cpu", torch_dtype=wrong
            )

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"model_config": "DiffSynth-Studio/ImageMetrics"},
                TypeError,
                "must be a ModelConfig, got 'D",
            ),
            ({"processor_config": "cpu"}, TypeError, r"must be a ModelConfig.*write ModelConfig\(path="),
            ({"torch_dtype": "bf16"}, TypeError, "torch_dtype must be one of"),
            ({"batch_size": 0}, ValueError, "batch_size must be a positive int, got 0"),
            ({"device": "gpu"}, RuntimeError, "device"),
        ],
    )
    @pytest.mark.parametrize("name", ["PickScore", "HPSv2", "Aesthetic", "ImageReward"])
    def test_wrong_arguments_are_refused_before_files_are_fetched(
        self,
        name: str,
        arguments: dict[str, Any],
        error: type[Exception],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fetch(*_: object, **__: object) -> list[str]:
            raise AssertionError("files were asked for")

        monkeypatch.setattr(ModelConfig, "resolve", fetch)
        metric_class = getattr(diffsynth_metrics, f"{name}Metric")
        with pytest.raises(error, match=message):
            metric_class.from_pretrained(**arguments)

    @pytest.mark.parametrize("wrong", [2, -1, True, "5"])
    @pytest.mark.parametrize("name", ["PickScore", "ImageReward"])
    def test_a_length_without_room_for_a_prompt_is_refused(self, name: str, wrong: Any) -> None:
        metric_class = getattr(diffsynth_metrics, f"{name}Metric")
        with pytest.raises(ValueError, match=f"max_length must be an int of at least 3, got {wrong!r}"):
            metric_class.from_pretrained(ModelConfig(path="absent"), max_length=wrong)

    def test_a_metric_can_be_copied_and_pickled(self, tiny_metric: PickScoreMetric) -> None:
        image = torch.zeros(3, 32, 32)
        expected = tiny_metric.compute("a cat", image)
        for twin in (copy.deepcopy(tiny_metric), pickle.loads(pickle.dumps(tiny_metric))):
            assert twin.compute("a cat", image) == pytest.approx(expected, abs=1e-4)
            assert twin.model is not tiny_metric.model


class TestOptions:
    def test_an_unknown_argument_is_refused_with_those_that_exist(self) -> None:
        with pytest.raises(TypeError, match=r"no argument 'max_lenght'; it has .*max_length"):
            PickScoreMetric.from_pretrained(ModelConfig(path="absent"), max_lenght=5)

    def test_one_device_metrics_refuse_a_device_map(self) -> None:
        with pytest.raises(ValueError, match="PickScoreMetric runs on one device"):
            PickScoreMetric.from_pretrained(ModelConfig(path="absent"), device_map="auto")

    def test_provenance_says_what_made_a_number(
        self, metric: PickScoreMetric, tiny_folder: Path
    ) -> None:
        provenance = metric.provenance
        digest = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
        assert provenance["metric"] == "PickScoreMetric"
        assert provenance["weights"] == digest
        assert provenance["dtype"] == "float32"
        assert json.dumps(provenance)


class TestCards:
    def test_there_are_metrics(self) -> None:
        assert PickScoreMetric in METRICS

    @pytest.mark.parametrize("metric_class", METRICS)
    def test_a_card_is_complete(self, metric_class: type[BaseMetric]) -> None:
        for field in dataclasses.fields(MetricCard):
            value = getattr(metric_class.card, field.name)
            if field.name == "higher_is_better":
                assert isinstance(value, bool)
            else:
                assert isinstance(value, str)
                assert value.strip() == value
                assert value or field.name == "notes", field.name

    def test_a_card_links_to_paper_and_code(self) -> None:
        for metric_class in METRICS:
            assert metric_class.card.paper.startswith("https://")
            assert metric_class.card.repository.startswith("https://")

    def test_every_metric_has_its_own_card(self) -> None:
        assert len({metric_class.card.name for metric_class in METRICS}) == len(METRICS)

    def test_a_card_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            PickScoreMetric.card.name = "mine"  # type: ignore[misc]

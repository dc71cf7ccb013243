"""Each adapter fits the call site of its framework, reproduced here as its source has it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from stand_ins import Brightness, Judge

from diffsynth_metrics import (
    AestheticMetric,
    ImageRewardMetric,
    ModelConfig,
    PickScoreMetric,
    RewardError,
    UnifiedReward2Metric,
)
from diffsynth_metrics.pixels.transforms import normalize_
from diffsynth_metrics.rewards import (
    Component,
    FixedScale,
    GroupRelative,
    Rank,
    RewardSet,
    as_loss,
    to_alignprop,
    to_dance_grpo,
    to_ddpo,
    to_flow_factory,
    to_flow_grpo,
    to_multi_score,
    to_pref_grpo,
    to_refl,
    to_srpo,
    to_trl,
    to_trl_async,
    to_verl,
    to_verl_omni,
)
from diffsynth_metrics.testing import ScriptedEngine

PROMPTS = ["a cat", "a dog", "a red circle"]


# The same pixels, scored twice: another batch or another thread may round otherwise.
approx = partial(pytest.approx, rel=1e-4, abs=1e-5)


@pytest.fixture
def pickscore(metrics: Callable[[str], Any]) -> PickScoreMetric:
    metric: PickScoreMetric = metrics("pickscore")
    return metric


@pytest.fixture
def aesthetic(metrics: Callable[[str], Any]) -> AestheticMetric:
    metric: AestheticMetric = metrics("aesthetic")
    return metric


@pytest.fixture
def image_reward(metrics: Callable[[str], Any]) -> ImageRewardMetric:
    metric: ImageRewardMetric = metrics("image_reward")
    return metric


@pytest.fixture
def pixels() -> torch.Tensor:
    """What a pipeline with output_type="pt" returns."""
    return torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def arrays(pixels: torch.Tensor) -> np.ndarray:
    """The same as the bytes that flow_grpo's own scorers make."""
    bytes_ = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return bytes_.permute(0, 2, 3, 1).numpy()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default_dtype": lambda: default_dtype(torch.float64),
}


def caller_state() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        logging.getLogger().level,
    )


class TestFlowGRPO:
    def test_a_factory_is_called_as_multi_score_calls_it(self, pickscore: PickScoreMetric) -> None:
        factory = to_flow_grpo(pickscore)
        assert "device" in factory.__code__.co_varnames  # how flow_grpo decides to pass the device
        function = factory("cpu")
        assert callable(function) and function.__name__ == "pickscore"
        assert factory.__name__ == "pickscore_score"
        assert list(inspect.signature(factory).parameters) == ["device"]

    def test_scores_are_those_of_the_bytes_divided_by_26(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor, arrays: np.ndarray
    ) -> None:
        scores, extra = to_flow_grpo(pickscore)("cpu")(pixels, PROMPTS, [{}] * 3)
        expected = pickscore.reward(PROMPTS, torch.from_numpy(arrays).permute(0, 3, 1, 2)) / 26
        assert scores == approx(expected.tolist())
        assert extra == {}

    def test_arrays_are_taken_as_pictures(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor, arrays: np.ndarray
    ) -> None:
        function = to_flow_grpo(pickscore)("cpu")
        expected = [score / 26 for score in pickscore.compute(PROMPTS, arrays)]
        assert function(arrays, tuple(PROMPTS), ({},) * 3)[0] == approx(expected)
        floats = pixels.permute(0, 2, 3, 1).numpy()
        assert function(floats, PROMPTS, [{}] * 3)[0] == approx(function(pixels, PROMPTS, [{}] * 3)[0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_images_are_rounded_once(
        self, dtype: torch.dtype, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        half = pixels.to(dtype)
        bytes_ = (half.float() * 255).round().to(torch.uint8)
        scores, _ = to_flow_grpo(pickscore, scale=None)("cpu")(half, PROMPTS, [{}] * 3)
        assert scores == approx(pickscore.compute(PROMPTS, bytes_))

    @pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
    def test_the_training_loop_submits_it_to_a_pool_of_eight(
        self,
        context: Callable[[], AbstractContextManager[Any]],
        pickscore: PickScoreMetric,
        aesthetic: AestheticMetric,
        pixels: torch.Tensor,
    ) -> None:
        multi_score = to_multi_score({"pickscore": pickscore, "aesthetic": aesthetic})
        reward_fn = multi_score("cpu", {"pickscore": 0.8, "aesthetic": 0.2})
        expected = {name: approx(one) for name, one in reward_fn(pixels, PROMPTS, [{}] * 3)[0].items()}
        with ThreadPoolExecutor(max_workers=8) as executor, context():
            before = caller_state()
            futures = [
                executor.submit(reward_fn, pixels, PROMPTS, [{}] * 3, only_strict=True) for _ in range(9)
            ]
            for future in futures:
                rewards, extra = future.result()
                assert rewards == expected and extra == {}
                for key, value in rewards.items():  # as train_sd3.py does
                    tensor = torch.as_tensor(value, device="cpu").float()
                    assert tensor.shape == (3,) and not tensor.requires_grad, key
            assert caller_state() == before
            assert reward_fn(pixels, PROMPTS, [{}] * 3)[0] == expected  # and in the loop's own thread

    def test_multi_score_gives_every_score_and_the_weighted_sum(
        self, pickscore: PickScoreMetric, aesthetic: AestheticMetric, arrays: np.ndarray
    ) -> None:
        multi_score = to_multi_score({"pickscore": pickscore, "aesthetic": aesthetic})
        details, _ = multi_score("cpu", {"pickscore": 0.8, "aesthetic": 0.2})(arrays, PROMPTS, None)
        assert list(details) == ["pickscore", "aesthetic", "avg"]
        assert details["pickscore"] == approx(
            [score / 26 for score in pickscore.compute(PROMPTS, arrays)]
        )
        assert details["aesthetic"] == approx(aesthetic.compute(arrays))
        assert details["avg"] == approx(
            [0.8 * p + 0.2 * a for p, a in zip(details["pickscore"], details["aesthetic"], strict=True)]
        )
        with pytest.raises(ValueError, match=r"no reward .ocr.; there are pickscore, aesthetic"):
            multi_score("cpu", {"ocr": 1.0})

    def test_a_set_has_the_form_of_multi_score(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        rewards = RewardSet({"quality": Component(pickscore, 0.5, FixedScale(mean=20, std=4))})
        details, extra = to_flow_grpo(rewards)("cpu")(pixels, ["a cat"] * 3, [{}] * 3)
        assert list(details) == ["quality", "avg"] and extra == {}
        assert details["avg"] == approx([0.5 * (score - 20) / 4 for score in details["quality"]])

    def test_edit_forks_pass_more(self, pickscore: PickScoreMetric, pixels: torch.Tensor) -> None:
        function = to_flow_grpo(pickscore)("cpu")
        expected, _ = function(pixels, PROMPTS, [{}] * 3)
        more = {"ref_images": pixels, "only_strict": False, "step": 3}
        assert function(pixels, PROMPTS, [{}] * 3, **more)[0] == approx(expected)

    def test_ddpo_calls_a_factory_without_a_device(
        self, aesthetic: AestheticMetric, arrays: np.ndarray
    ) -> None:
        reward_fn = to_ddpo(aesthetic)()
        with ThreadPoolExecutor(max_workers=2) as executor:
            rewards, metadata = executor.submit(reward_fn, arrays, tuple(PROMPTS), ({},) * 3).result()
        assert torch.as_tensor(rewards, device="cpu").tolist() == approx(aesthetic.compute(arrays))
        assert metadata == {}

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [(lambda x: x * 2 - 1, "must lie in 0..1"), (lambda x: x * 255, "must lie in 0..1")],
        ids=["-1..1", "0..255"],
    )
    def test_images_of_another_range_are_an_error_and_not_clamped(
        self, wrong: Any, message: str, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        with pytest.raises(RewardError, match=message):
            to_flow_grpo(pickscore)("cpu")(wrong(pixels), PROMPTS, [{}] * 3)

    def test_nan_in_an_image_is_a_failure_of_that_sample(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        good = to_flow_grpo(pickscore, scale=None)("cpu")(pixels, PROMPTS, [{}] * 3)[0]
        pixels[1, 0, 0, 0] = math.nan
        with pytest.raises(RewardError, match=r"pickscore: sample 1 of 3 has no reward"):
            to_flow_grpo(pickscore)("cpu")(pixels, PROMPTS, [{}] * 3)
        scores = to_flow_grpo(pickscore, scale=None, on_failure="nan")("cpu")(pixels, PROMPTS, [{}] * 3)
        assert math.isnan(scores[0][1])
        assert [scores[0][0], scores[0][2]] == approx([good[0], good[2]])
        arrays = pixels.permute(0, 2, 3, 1).numpy()
        scores = to_flow_grpo(pickscore, scale=None, on_failure="nan")("cpu")(arrays, PROMPTS, [{}] * 3)
        assert [scores[0][0], scores[0][2]] == approx([good[0], good[2]])
        replaced = to_flow_grpo(pickscore, on_failure=-10.0)("cpu")(pixels, PROMPTS, [{}] * 3)
        assert replaced[0][1] == -10

    def test_minus_ten_is_dropped_from_every_column_as_the_evaluation_does_it(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        pixels[1, 0, 0, 0] = math.nan
        weights = {"pickscore": 0.8, "other": 0.2}
        metrics = {"pickscore": pickscore, "other": Component(lambda p, i: [1.0] * len(p))}
        reward_fn = to_multi_score(metrics, on_failure=-10.0)("cpu", weights)
        details, _ = reward_fn(pixels, PROMPTS, [{}] * 3, only_strict=False)
        assert details["pickscore"][1] == details["avg"][1] == -10
        assert details["other"] == [1, 1, 1]
        for key in ("pickscore", "avg"):  # as train_sd3.py logs it
            value = np.array(details[key])
            assert np.mean(value[value != -10]) == approx((value[0] + value[2]) / 2)
            assert 0 < np.mean(value[value != -10]) < 2

    def test_multi_score_gives_failures_what_was_declared(self, pixels: torch.Tensor) -> None:
        metrics: dict[str, Any] = {"judge": Judge(), "other": Component(lambda p, i: [1.0] * len(p))}
        weights = {"judge": 1.0, "other": 2.0}

        def call(policy: Any) -> Any:
            multi_score = to_multi_score(metrics, scale=None, on_failure=policy)
            return multi_score("cpu", weights)(pixels, ["4", "?", "2"], [{}] * 3)[0]

        with pytest.raises(RewardError, match=r"sample 1 of 3 has no reward: judge: no number in '\?'"):
            call("raise")
        assert call("mean") == {"judge": [4, 3, 2], "other": [1, 1, 1], "avg": [6, 5, 4]}
        assert call(-1.0) == {"judge": [4, -1, 2], "other": [1, 1, 1], "avg": [6, -1, 4]}
        nan = call("nan")
        assert math.isnan(nan["judge"][1]) and math.isnan(nan["avg"][1]) and nan["other"] == [1, 1, 1]

    def test_a_component_without_a_scale_has_that_of_multi_score(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        official = pickscore.compute(PROMPTS, (pixels * 255).round().byte())
        for scale, factor in ((None, 1 / 26), ("official", 1), ("srpo", 1 / 20)):
            multi_score = to_multi_score({"p": Component(pickscore, scale=scale)})
            details, _ = multi_score("cpu", {"p": 1.0})(pixels, PROMPTS, [{}] * 3)
            assert details["p"] == approx([factor * score for score in official])

    def test_the_name_of_the_sum_is_taken(self, pickscore: PickScoreMetric) -> None:
        with pytest.raises(ValueError, match="'avg' is flow_grpo's name of the sum"):
            to_flow_grpo(RewardSet({"avg": pickscore}))
        with pytest.raises(ValueError, match="'avg' is flow_grpo's name of the sum"):
            to_multi_score({"avg": pickscore})("cpu", {"avg": 1.0})

    @pytest.mark.parametrize("normalize", ["group", "rank", GroupRelative(group_size=24)])
    def test_normalising_within_groups_is_left_to_the_framework(
        self, normalize: Any, pickscore: PickScoreMetric
    ) -> None:
        component = Component(pickscore, normalize=normalize)
        for make in (to_flow_grpo, to_ddpo):
            with pytest.raises(ValueError, match=r"leave 'group' and 'rank' to the trainer: flow_grpo"):
                make(RewardSet({"p": component}))
        with pytest.raises(ValueError, match=r"leave 'group' and 'rank' to the trainer: flow_grpo"):
            to_multi_score({"p": component})("cpu", {"p": 1.0})

    @pytest.mark.parametrize("bad", [np.zeros((8, 8), np.float32), np.zeros((8, 8, 1), np.float32)])
    def test_a_float_array_that_is_no_picture_fails_alone(
        self, bad: np.ndarray, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        function = to_flow_grpo(pickscore, on_failure="nan")("cpu")
        floats = [array[:, ::-1] for array in arrays.astype(np.float32) / 255]
        expected = function([array[:, ::-1] for array in arrays], PROMPTS, [{}] * 3)[0]
        scores = function([floats[0], bad, floats[2]], PROMPTS, [{}] * 3)[0]
        assert math.isnan(scores[1])
        assert scores[::2] == approx(expected[::2])

    def test_a_single_prompt_or_picture_is_not_taken_for_many(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        rewards = RewardSet({"pick": pickscore})
        for source in (pickscore, rewards):
            function = to_flow_grpo(source)("cpu")
            with pytest.raises(TypeError, match="prompts must be a list, one per image, got the str"):
                function(pixels, "cat", [{}] * 3)
            for picture in (pixels[0], pixels[0].permute(1, 2, 0)[:3].numpy()):
                with pytest.raises(ValueError, match=r"images must be a batch .*, got a single one"):
                    function(picture, PROMPTS, [{}] * 3)

    def test_a_judge_without_a_network_needs_no_device(self, pixels: torch.Tensor) -> None:
        judge = UnifiedReward2Metric(ScriptedEngine("no score"))
        assert judge.to("cpu") is judge
        function = to_flow_grpo(judge, on_failure=-10.0)("cpu")
        assert function(pixels, PROMPTS, [{}] * 3)[0] == [-10] * 3

    def test_a_judge_that_cannot_be_read_is_not_zero(self, pixels: torch.Tensor) -> None:
        answers = ["4", "?", "2"]
        with pytest.raises(RewardError, match=r"judge: sample 1 of 3 has no reward: no number in '\?'"):
            to_flow_grpo(Judge())("cpu")(pixels, answers, [{}] * 3)
        neutral = to_flow_grpo(Judge(), on_failure="mean")("cpu")(pixels, answers, [{}] * 3)
        assert neutral[0] == [4, 3, 2]

    def test_settings_are_checked_when_the_adapter_is_made(self, pickscore: PickScoreMetric) -> None:
        with pytest.raises(ValueError, match="has no scale 'flowgrpo'"):
            to_flow_grpo(pickscore, scale="flowgrpo")
        with pytest.raises(ValueError, match="on_failure must be"):
            to_flow_grpo(pickscore, on_failure="ignore")
        with pytest.raises(TypeError, match=r"a reward must be a loaded metric .*; got str"):
            to_flow_grpo("pickscore")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"got the class PickScoreMetric: load it"):
            to_flow_grpo(PickScoreMetric)
        with pytest.raises(TypeError, match="unexpected keyword argument 'on_failures'"):
            to_flow_grpo(pickscore, on_failures="nan")


class TestTRL:
    """The call of ``GRPOTrainer._calculate_rewards``; the real trainer is in test_trl_trainer.py."""

    def call(self, function: Any, completions: list[Any], **columns: Any) -> list[float | None]:
        count = len(completions)
        self.logged: dict[str, Any] = {}
        arguments = {
            "prompts": columns.pop("prompts", PROMPTS[:count]),
            "completions": completions,
            "completion_ids": [[1, 2]] * count,
            **columns,
            "trainer_state": object(),
            "log_extra": self.logged.__setitem__,
            "log_metric": lambda name, value: None,
        }
        if inspect.iscoroutinefunction(function):
            return asyncio.run(function(**arguments))
        result: list[float | None] = function(**arguments)
        return result

    def test_it_looks_like_a_function_with_a_name(self, pickscore: PickScoreMetric) -> None:
        function = to_trl(pickscore, image="image")
        assert callable(function) and not isinstance(function, torch.nn.Module)
        assert not inspect.iscoroutinefunction(function)
        assert function.__name__ == "pickscore"
        assert to_trl(pickscore, image="image", name="taste").__name__ == "taste"
        assert inspect.iscoroutinefunction(to_trl_async(pickscore, image="image"))

    @pytest.mark.parametrize("adapter", [to_trl, to_trl_async])
    def test_images_come_from_a_column_or_are_made_from_the_completion(
        self, adapter: Any, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        pictures = [PIL.Image.fromarray(array) for array in arrays]
        expected = approx(pickscore.compute(PROMPTS, pictures))
        assert self.call(adapter(pickscore, "picture"), ["x"] * 3, picture=pictures) == expected

        def draw(completion: str, *, number: int, **row: Any) -> PIL.Image.Image:
            return pictures[number + len(completion)]

        function = adapter(pickscore, draw)
        assert self.call(function, ["", "", ""], number=[0, 1, 2]) == expected

    def test_a_completion_without_a_score_is_none_with_the_reason(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        def draw(completion: str, **row: Any) -> PIL.Image.Image | None:
            if completion == "bad":
                raise ValueError("not a picture")
            return None if completion == "none" else PIL.Image.fromarray(arrays[2])

        rewards = self.call(to_trl(pickscore, draw), ["bad", "none", "good"])
        assert rewards[:2] == [None, None]
        assert rewards[2] == approx(pickscore.compute(PROMPTS[2], arrays[2])[0])
        assert self.logged == {"pickscore_error": ["ValueError: not a picture", "there is no image", ""]}
        assert self.call(to_trl(pickscore, draw), ["bad", "bad"]) == [None, None]
        assert self.call(to_trl(pickscore, draw, on_failure=-1.0), ["bad", "bad"]) == [-1, -1]
        with pytest.raises(RewardError, match="sample 0 of 1 has no reward: ValueError: not a picture"):
            self.call(to_trl(pickscore, draw, on_failure="raise"), ["bad"])

    def test_a_set_leaves_failures_to_the_adapter(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        rewards = RewardSet({"pick": pickscore, "bright": Brightness()})
        pictures = [PIL.Image.fromarray(arrays[0]), "gone.png", PIL.Image.fromarray(arrays[2])]
        scores = self.call(to_trl(rewards, "picture"), ["x"] * 3, picture=pictures)
        assert scores[1] is None and None not in (scores[0], scores[2])
        assert "pick: FileNotFoundError: " in self.logged["pick+bright_error"][1]
        with pytest.raises(RewardError, match="sample 1 of 3 has no reward: pick: FileNotFoundError"):
            self.call(to_trl(rewards, "picture", on_failure="raise"), ["x"] * 3, picture=pictures)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_rewards_are_not_rounded_to_the_default_dtype(
        self, dtype: torch.dtype, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        def draw(completion: str, **row: Any) -> Any:
            return "gone.png" if completion == "gone" else arrays[int(completion)]

        expected = self.call(to_trl(pickscore, draw), ["0", "gone", "2"])
        tenth = float(torch.tensor(0.1, dtype=torch.float32))
        with default_dtype(dtype):
            first, gone, last = self.call(to_trl(pickscore, draw), ["0", "gone", "2"])
            assert [first, last] == approx(expected[::2]) and gone is None
            assert self.call(to_trl(pickscore, draw, on_failure=0.1), ["gone"] * 2) == [tenth] * 2

    def test_the_prompt_may_be_a_conversation_a_column_or_made(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        expected = approx(pickscore.compute(PROMPTS, arrays))
        columns: dict[str, Any] = {"image": list(arrays), "caption": PROMPTS}
        talks = [
            [{"role": "system", "content": "draw"}, {"role": "user", "content": prompt}]
            for prompt in PROMPTS
        ]
        parts = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            for prompt in PROMPTS
        ]
        for prompts, prompt in (
            (talks, None),
            (parts, None),
            (talks, "caption"),
            ([f"draw {prompt}" for prompt in PROMPTS], lambda text, **row: text[5:]),
        ):
            function = to_trl(pickscore, "image", prompt=prompt)
            assert self.call(function, [[]] * 3, prompts=prompts, **columns) == expected

    def test_a_missing_column_is_an_error(self, pickscore: PickScoreMetric) -> None:
        with pytest.raises(ValueError, match=r"the data set has no column .image.; it has .*photo"):
            self.call(to_trl(pickscore, "image"), ["x"], photo=["a.png"])
        with pytest.raises(ValueError, match=r"the data set has no column .caption.; it has .*photo"):
            self.call(to_trl(pickscore, "photo", prompt="caption"), ["x"], photo=["a.png"])

    def test_a_completion_without_a_prompt_is_none_with_the_reason(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        def refuse(text: Any, **row: Any) -> str:
            raise ValueError("nothing to draw")

        expected = pickscore.compute(PROMPTS[:1], arrays[:1])[0]
        columns: dict[str, Any] = {"image": list(arrays), "caption": [PROMPTS[0], None, []]}
        rewards = self.call(to_trl(pickscore, "image", prompt="caption"), [[]] * 3, **columns)
        assert rewards == [approx(expected), None, None]
        reasons = [f"there is no prompt: {made} is not a text" for made in ("None", "[]")]
        assert self.logged == {"pickscore_error": ["", *reasons]}
        function = to_trl(pickscore, "image", prompt=refuse)
        assert self.call(function, [[]] * 3, **columns) == [None] * 3


class TestVerl:
    def test_a_call_by_keyword_with_one_uint8_image_returns_a_dict_with_a_float(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        compute_score = to_verl_omni(pickscore)
        assert inspect.iscoroutinefunction(compute_score)
        assert compute_score.__name__ == "compute_score_pickscore"
        result = asyncio.run(
            compute_score(
                data_source="prompts",
                solution_image=torch.from_numpy(arrays[0]).permute(2, 0, 1),
                ground_truth="a cat",
                extra_info={},
                reward_router_address=None,
                reward_model_tokenizer=None,
            )
        )
        assert list(result) == ["score"] and type(result["score"]) is float
        (expected,) = pickscore.compute("a cat", torch.from_numpy(arrays[0]).permute(2, 0, 1))
        assert result["score"] == approx(expected / 26)

    def test_calls_awaited_together_are_scored_together(
        self, aesthetic: AestheticMetric, arrays: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []
        original = aesthetic.components
        monkeypatch.setattr(
            aesthetic, "components", lambda images: sizes.append(len(images)) or original(images)
        )
        compute_score = to_verl_omni(aesthetic, max_batch=8, max_wait_ms=2000)
        tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]

        async def main() -> list[dict[str, Any]]:
            return await asyncio.gather(
                *(compute_score("d", tensors[i % 3], "a cat", {}) for i in range(16))
            )

        results = asyncio.run(main())
        assert sizes == [8, 8]
        expected = [score["score"] for score in results[:3]]
        assert [r["score"] for r in results] == approx([expected[i % 3] for i in range(16)])
        assert expected == approx(aesthetic.compute(torch.stack(tensors)))

    def test_several_event_loops_share_one_batcher(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        compute_score = to_verl_omni(pickscore, scale=None)

        def worker(index: int) -> float:
            image = torch.from_numpy(arrays[index % 3]).permute(2, 0, 1)
            return asyncio.run(compute_score("d", image, PROMPTS[index % 3], {}))["score"]

        with ThreadPoolExecutor(8) as pool:
            scores = list(pool.map(worker, range(24)))
        tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
        assert scores == approx(pickscore.compute(PROMPTS, tensors) * 8)

    def test_a_bad_sample_raises_alone(self, pickscore: PickScoreMetric, arrays: np.ndarray) -> None:
        compute_score = to_verl_omni(pickscore, max_wait_ms=50)
        good = torch.from_numpy(arrays[0]).permute(2, 0, 1)
        video = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)

        async def main(function: Any) -> list[Any]:
            calls = (function("d", image, "a cat", {}) for image in (good, video, good))
            return await asyncio.gather(*calls, return_exceptions=True)

        results = asyncio.run(main(compute_score))
        assert results[0]["score"] == approx(results[2]["score"])
        assert isinstance(results[1], ValueError)
        results = asyncio.run(main(to_verl_omni(pickscore, on_failure="nan")))
        assert results[0]["error"] == "" and math.isnan(results[1]["score"])
        assert "pass frames=" in results[1]["error"]

    def test_a_bad_sample_of_a_set_raises_alone(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        rewards = RewardSet({"pick": pickscore, "bright": Brightness()})
        compute_score = to_verl_omni(rewards, max_wait_ms=50)
        good = torch.from_numpy(arrays[0]).permute(2, 0, 1)

        async def main() -> list[Any]:
            calls = (compute_score("d", image, "a cat", {}) for image in (good, "gone.png", good))
            return await asyncio.gather(*calls, return_exceptions=True)

        first, wrong, last = asyncio.run(main())
        assert first["score"] == approx(last["score"])
        assert isinstance(wrong, RewardError) and isinstance(wrong.__cause__, FileNotFoundError)

    def test_verl_makes_the_image_from_the_text(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        pictures = {"one": PIL.Image.fromarray(arrays[0])}
        compute_score = to_verl(pickscore, lambda text, extra_info: pictures[text])
        assert compute_score.__name__ == "compute_score"
        arguments = {"data_source": "d", "ground_truth": "a cat", "extra_info": None}
        result = asyncio.run(compute_score(solution_str="one", **arguments))
        assert result == {"score": approx(pickscore.compute("a cat", pictures["one"])[0])}
        with pytest.raises(KeyError):
            asyncio.run(compute_score(solution_str="two", **arguments))

    def test_the_mean_of_one_sample_is_refused(self, pickscore: PickScoreMetric) -> None:
        with pytest.raises(ValueError, match="needs a batch"):
            to_verl_omni(pickscore, on_failure="mean")

    def test_a_set_that_needs_groups_is_refused(self, pickscore: PickScoreMetric) -> None:
        for normalize in ("group", "rank"):
            with pytest.raises(ValueError, match=r"leave .* to the trainer: verl asks for one sample"):
                to_verl_omni(RewardSet({"a": Component(pickscore, normalize=normalize)}))
        to_verl_omni(RewardSet({"a": Component(pickscore, normalize=FixedScale(20, 2))}))


class TestLosses:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_alignprop_calls_it_with_pixels_from_minus_one_to_one_under_autocast(
        self, dtype: torch.dtype, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        loss_fn = as_loss(pickscore, input_range=(-1, 1), loss="one_minus", grad_scale=0.5)
        im_pix = (pixels * 2 - 1).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            loss, scores = loss_fn(im_pix, PROMPTS)
        loss.mean().backward()
        expected = pickscore.compute(PROMPTS, im_pix.detach().float() / 2 + 0.5)
        assert scores.tolist() == approx(expected)
        assert loss.tolist() == approx(((1 - scores) * 0.5).tolist())
        assert loss.shape == scores.shape == (3,) and loss.dtype == torch.float32
        assert im_pix.grad is not None and im_pix.grad.dtype == dtype
        assert im_pix.grad.isfinite().all() and im_pix.grad.abs().sum() > 0

    def test_kinds_of_loss(self, pickscore: PickScoreMetric, pixels: torch.Tensor) -> None:
        reward = pickscore.reward(PROMPTS, pixels)
        margin = float(reward.median()) + 0.1
        assert as_loss(pickscore)(pixels, PROMPTS)[0].tolist() == approx((-reward).tolist())
        relu_loss, _ = as_loss(pickscore, loss="relu_margin", margin=margin)(pixels, PROMPTS)
        assert relu_loss.tolist() == approx([max(margin - r, 0) for r in reward.tolist()])
        assert 0 in relu_loss.tolist()
        cosine_loss, _ = as_loss(pickscore, scale="dance_grpo", loss="one_minus")(pixels, PROMPTS)
        assert cosine_loss.tolist() == approx((1 - reward / 100).tolist())

    def test_a_metric_of_images_is_called_with_images_alone(
        self, aesthetic: AestheticMetric, pixels: torch.Tensor
    ) -> None:
        loss, reward = as_loss(aesthetic)(pixels)
        assert reward.tolist() == approx(aesthetic.compute(pixels))
        assert not loss.requires_grad

    def test_prompts_may_be_missing_only_where_nothing_needs_them(
        self, pickscore: PickScoreMetric, aesthetic: AestheticMetric, pixels: torch.Tensor
    ) -> None:
        only_images = RewardSet({"a": aesthetic, "b": Brightness()})
        assert as_loss(only_images)(pixels)[1].shape == (3,)
        assert to_alignprop(aesthetic)(pixels)[0].shape == (3,)
        watched = RewardSet({"a": aesthetic}, held_out={"b": pickscore})
        for source in (pickscore, RewardSet({"a": aesthetic, "b": pickscore}), watched, len):
            for function in (as_loss(source), to_alignprop(source)):
                with pytest.raises(ValueError, match="needs prompts, one for each of the 3 images"):
                    function(pixels)

    def test_pixels_must_be_a_batch(self, pickscore: PickScoreMetric, pixels: torch.Tensor) -> None:
        for picture in (pixels[0], pixels[0, 0], pixels[None]):
            with pytest.raises(ValueError, match=r"pixels as a batch \[N, 3, H, W\], got shape"):
                as_loss(pickscore)(picture, PROMPTS)
        with pytest.raises(TypeError, match="pixels as a float tensor"):
            as_loss(pickscore)(pixels.numpy(), PROMPTS)

    def test_the_caller_decides_about_gradients(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        loss_fn = as_loss(pickscore)
        leaf = pixels.requires_grad_()
        with torch.no_grad():
            assert not loss_fn(leaf, PROMPTS)[0].requires_grad
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(loss_fn, leaf, PROMPTS).result()[0].requires_grad

    def test_what_leaves_the_range_is_clamped(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        wide = (pixels * 1.8 - 0.4).requires_grad_()
        _, reward = as_loss(pickscore)(wide, PROMPTS)
        assert reward.tolist() == approx(pickscore.compute(PROMPTS, wide.detach().clamp(0, 1)))

    @pytest.mark.parametrize(
        ("input_range", "wrong"), [((0, 1), (-1, 1)), ((0, 1), (0, 255)), ((-1, 1), (0, 255))]
    )
    def test_pixels_of_another_range_are_an_error(
        self, input_range: Any, wrong: Any, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        low, high = wrong
        with pytest.raises(ValueError, match=r"the pixels reach from .*, which is not input_range="):
            as_loss(pickscore, input_range=input_range)(pixels * (high - low) + low, PROMPTS)

    def test_a_judge_is_no_loss(self) -> None:
        with pytest.raises(TypeError, match="a loss needs gradients, and Judge has none"):
            as_loss(Judge())
        with pytest.raises(TypeError, match="a loss needs gradients, and Judge has none"):
            to_alignprop(Judge())

    def test_settings_are_checked(self, pickscore: PickScoreMetric, pixels: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"input_range must be \(0, 1\) or \(-1, 1\)"):
            as_loss(pickscore, input_range=(0, 255))
        with pytest.raises(ValueError, match="loss must be one of"):
            as_loss(pickscore, loss="mse")  # type: ignore[arg-type]
        for settings in ({"loss": "relu_margin"}, {"margin": 2.0}):
            with pytest.raises(ValueError, match="margin belongs to"):
                as_loss(pickscore, **settings)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="pixels as a float tensor"):
            as_loss(pickscore)((pixels * 255).byte(), PROMPTS)
        with pytest.raises(RewardError, match="sample 0 of 3 has no reward"):
            as_loss(pickscore)(pixels * math.nan, PROMPTS)

    def test_trl_alignprop_takes_reward_and_metadata(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        reward, metadata = to_alignprop(pickscore)(pixels.requires_grad_(), tuple(PROMPTS), ({},) * 3)
        assert metadata == {} and reward.requires_grad
        assert reward.tolist() == approx(pickscore.compute(PROMPTS, pixels.detach()))

    def test_srpo_subtracts_the_negative_prompt(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        image = pixels[:1].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # as SRPO calls HPS
            outputs = to_srpo(pickscore).SRP_cfg(["a cat"], ["a dog"], image, 0.7)
        cat, dog = (pickscore.compute(prompt, pixels[:1].detach())[0] for prompt in ("a cat", "a dog"))
        assert outputs.tolist() == pytest.approx([(1.7 * cat - dog) / 20], rel=1e-4)
        torch.nn.functional.relu(-outputs + 1000).sum().backward()
        assert image.grad is not None and image.grad.abs().sum() > 0
        cosine = to_srpo(pickscore, scale="dance_grpo").SRP_cfg(["a cat"], ["a dog"], image, 0.7)
        assert cosine.tolist() == pytest.approx([(1.7 * cat - dog) / 100], rel=1e-4)
        for scale in ("srpo", "dance_grpo"):
            with pytest.raises(ValueError, match=r"features must be \[N, D\] and \[N, D\]"):
                to_srpo(pickscore, scale=scale).SRP_cfg(["a", "b"], ["c"], pixels, 0.7)

    def test_srpo_needs_features(self, aesthetic: AestheticMetric) -> None:
        with pytest.raises(TypeError, match="AestheticMetric has none"):
            to_srpo(aesthetic)  # type: ignore[arg-type]

    def test_refl_passes_tokens_and_normalised_pixels(
        self, image_reward: ImageRewardMetric, pixels: torch.Tensor
    ) -> None:
        tokens = image_reward.tokenizer(
            PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        size = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(3)).requires_grad_()
        prepared = normalize_(size.clone(), image_reward.transform)
        rewards = to_refl(image_reward)(tokens.input_ids, tokens.attention_mask, prepared)
        assert rewards.shape == (3, 1)
        assert rewards[:, 0].tolist() == pytest.approx(
            image_reward.compute(PROMPTS, size.detach()), abs=1e-5
        )
        (torch.nn.functional.relu(-rewards + 2).mean() * 1e-3).backward()
        assert size.grad is not None and size.grad.abs().sum() > 0
        with pytest.raises(TypeError, match="score_gard is ImageReward's"):
            to_refl(Brightness())  # type: ignore[arg-type]


@dataclass
class RewardModelOutput:
    """As in Flow-Factory."""

    rewards: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


class PointwiseRewardModel(torch.nn.Module):
    """As in Flow-Factory; a Module, which is the harder case."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__()
        self.config, self.accelerator = config, accelerator
        self.device = accelerator.device if config.device.type == "cuda" else config.device
        self.dtype = config.dtype


@dataclass
class RewardArguments:
    """As in Flow-Factory: what the YAML file says."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batch_size: int = 16


class TestFlowFactory:
    @pytest.mark.parametrize("use_tensor_inputs", [False, True])
    def test_the_class_is_made_and_called_as_the_framework_does(
        self, use_tensor_inputs: bool, tiny_folder: Path, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        def load(*, device: Any, torch_dtype: Any) -> PickScoreMetric:
            assert device == torch.device("cpu") and torch_dtype == torch.float32
            return PickScoreMetric.from_pretrained(
                ModelConfig(path=tiny_folder), device=device, torch_dtype=torch_dtype
            )

        reward_class = to_flow_factory(load, PointwiseRewardModel, RewardModelOutput, name="PickReward")
        assert reward_class.__name__ == "PickReward"
        accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
        model = reward_class(RewardArguments(), accelerator)
        assert list(model.parameters()) == []
        images: list[Any] = [PIL.Image.fromarray(array) for array in arrays]
        if use_tensor_inputs:
            images = [torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays]
        output = model(prompt=PROMPTS, image=images, condition_images=None)
        if use_tensor_inputs:
            images = [(image * 255).round().byte() for image in images]
        expected = [score / 26 for score in pickscore.compute(PROMPTS, images)]
        assert output.rewards == approx(expected)
        assert output.extra_info == {"failures": {}}
        with pytest.raises(ValueError, match="Flow-Factory passed neither"):
            model(prompt=PROMPTS, image=None)
        with pytest.raises(TypeError, match="prompts must be a list, one per image, got the str"):
            model(prompt="cat", image=images)
        with pytest.raises(ValueError, match="got a single one"):
            model(prompt=PROMPTS, image=torch.zeros(3, 8, 8))

    def test_a_set_that_needs_groups_is_refused(self) -> None:
        rewards = RewardSet({"bright": Component(Brightness(), normalize="group")})
        reward_class = to_flow_factory(
            lambda **options: rewards, PointwiseRewardModel, RewardModelOutput
        )
        accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
        with pytest.raises(ValueError, match=r"leave .* to the trainer: Flow-Factory calls pointwise"):
            reward_class(RewardArguments(), accelerator)


class TestFilesOnDisk:
    @pytest.fixture
    def paths(self, tmp_path: Path, arrays: np.ndarray) -> list[str]:
        paths = [str(tmp_path / f"flux_0_{index}.png") for index in range(3)]
        for path, array in zip(paths, arrays, strict=True):
            PIL.Image.fromarray(array).save(path)
        return paths

    def test_dance_grpo_scores_one_path_at_a_time_and_concatenates(
        self, pickscore: PickScoreMetric, paths: list[str], arrays: np.ndarray
    ) -> None:
        reward = to_dance_grpo(pickscore)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            all_rewards = [reward([path], [p]) for path, p in zip(paths, PROMPTS, strict=True)]
            all_rewards.append(reward(paths[0], PROMPTS[0]))
        rewards = torch.cat(all_rewards, dim=0).to(torch.float32)
        cosines = [row["cosine"] for row in pickscore.evaluate(PROMPTS, arrays)]
        assert rewards.tolist() == approx([*cosines, cosines[0]])

    def test_pref_grpo_passes_items(
        self, pickscore: PickScoreMetric, paths: list[str], arrays: np.ndarray
    ) -> None:
        items = [{"path": path, "prompt": p} for path, p in zip(paths, PROMPTS, strict=True)]
        rewards, dimensions = to_pref_grpo(pickscore)(items)
        assert rewards.shape == (3,) and rewards.dtype == torch.float32
        assert dimensions == {"pickscore": rewards.tolist()}
        edits = [{"edited_path": path, "instruction": "a cat"} for path in paths]
        function = to_pref_grpo(pickscore, scale=None)
        assert function(edits)[0].tolist() == approx(pickscore.compute("a cat", paths))

    def test_a_single_picture_counts_as_one(
        self, pickscore: PickScoreMetric, arrays: np.ndarray
    ) -> None:
        reward = to_dance_grpo(pickscore, scale=None)
        tensor = torch.from_numpy(arrays[0]).permute(2, 0, 1)
        for picture in (tensor, tensor.float() / 255, arrays[0], PIL.Image.fromarray(arrays[0])):
            assert reward(picture, "a cat").shape == reward(picture, ["a cat"]).shape == (1,)
            exact = tensor if isinstance(picture, torch.Tensor) else picture
            assert reward(picture, "a cat").tolist() == approx(pickscore.compute("a cat", exact))

    def test_a_set_that_needs_groups_is_for_those_who_pass_groups(self, paths: list[str]) -> None:
        for normalize in ("group", "rank"):
            rewards = RewardSet({"bright": Component(Brightness(), normalize=normalize)})
            with pytest.raises(ValueError, match="DanceGRPO scores one image per call"):
                to_dance_grpo(rewards)
            with pytest.raises(ValueError, match="say how large groups are"):
                to_pref_grpo(rewards)
        rewards = RewardSet({"bright": Component(Brightness(), normalize=Rank(group_size=3))})
        items = [{"path": path, "prompt": "a cat"} for path in paths]
        values, _ = to_pref_grpo(rewards)(items)
        assert sorted(values.tolist()) == [0, 0.5, 1]
        with pytest.raises(ValueError, match="has 2 samples of 'a cat'"):
            to_pref_grpo(rewards)(items[:2])

    def test_a_missing_file_is_named(self, pickscore: PickScoreMetric) -> None:
        with pytest.raises(RewardError, match=r"sample 0 of 1 .*there is no file 'gone.png'"):
            to_dance_grpo(pickscore)("gone.png", "a cat")


def call_sites(
    pickscore: PickScoreMetric, image_reward: ImageRewardMetric, folder: Path, arrays: np.ndarray
) -> dict[str, Callable[[], list[float]]]:
    """What each framework does with its adapter, as far as a context of the caller could reach in."""
    pictures = [PIL.Image.fromarray(array) for array in arrays]
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    paths = [str(folder / f"{index}.png") for index in range(3)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    trl, trl_async = to_trl(pickscore, "image"), to_trl_async(pickscore, "image")
    row = {"prompts": PROMPTS, "completions": [""] * 3, "completion_ids": [[]] * 3, "image": pictures}
    verl = to_verl(
        pickscore, lambda text, extra_info: pictures[int(text)], max_wait_ms=1000, max_batch=3
    )
    verl_omni = to_verl_omni(pickscore, max_wait_ms=1000, max_batch=3)
    accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    reward_class = to_flow_factory(lambda **options: pickscore, PointwiseRewardModel, RewardModelOutput)
    flow_factory = reward_class(RewardArguments(), accelerator)
    pref_grpo, score_gard = to_pref_grpo(pickscore), to_refl(image_reward)
    tokens = image_reward.tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    squares = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(3))

    async def together(calls: Any) -> list[float]:
        return [result["score"] for result in await asyncio.gather(*calls)]

    samples = [{"data_source": "d", "ground_truth": prompt, "extra_info": {}} for prompt in PROMPTS]
    return {
        "TRL": lambda: trl(**row),
        "TRL, async": lambda: asyncio.run(trl_async(**row)),
        "verl": lambda: asyncio.run(
            together(verl(solution_str=str(i), **sample) for i, sample in enumerate(samples))
        ),
        "verl-omni": lambda: asyncio.run(
            together(
                verl_omni(solution_image=image, **sample)
                for image, sample in zip(tensors, samples, strict=True)
            )
        ),
        "Flow-Factory": lambda: flow_factory(prompt=PROMPTS, image=pictures).rewards,
        "ReFL": lambda: score_gard(tokens.input_ids, tokens.attention_mask, squares)[:, 0].tolist(),
        "Pref-GRPO": lambda: pref_grpo(
            [{"path": path, "prompt": p} for path, p in zip(paths, PROMPTS, strict=True)]
        )[1]["pickscore"],
    }


class TestContexts:
    @pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
    def test_a_context_of_the_caller_changes_no_score_and_is_not_changed(
        self,
        context: Callable[[], AbstractContextManager[Any]],
        pickscore: PickScoreMetric,
        image_reward: ImageRewardMetric,
        tmp_path: Path,
        arrays: np.ndarray,
    ) -> None:
        sites = call_sites(pickscore, image_reward, tmp_path, arrays)
        expected = {framework: approx(call()) for framework, call in sites.items()}
        pickscore.to("cpu")  # forget the prompts, so that they are encoded in the context
        for framework, call in sites.items():
            with context():
                before = caller_state()
                assert call() == expected[framework], framework
                assert caller_state() == before, framework

    @pytest.mark.parametrize("context", ["inference_mode", "autocast"])
    def test_refl_has_a_gradient_only_where_the_caller_has_one(
        self, context: str, image_reward: ImageRewardMetric
    ) -> None:
        tokens = image_reward.tokenizer("a cat", return_tensors="pt")
        pixels = torch.rand(1, 3, 224, 224, requires_grad=True)
        with CONTEXTS[context]():
            reward = to_refl(image_reward)(tokens.input_ids, tokens.attention_mask, pixels)
        assert reward.dtype == torch.float32
        assert reward.requires_grad == (context == "autocast")

    @pytest.mark.filterwarnings("ignore::UserWarning")  # of what cannot be traced
    def test_a_reward_that_was_compiled_leaves_the_caller_as_it_was(
        self, pickscore: PickScoreMetric, pixels: torch.Tensor
    ) -> None:
        before = caller_state()
        reward = torch.compile(pickscore.reward, backend="eager")(PROMPTS, pixels)
        assert caller_state() == before
        torch.testing.assert_close(reward, pickscore.reward(PROMPTS, pixels))


class TestThreads:
    def test_eight_threads_get_in_20_calls_each_what_one_thread_gets(
        self, pickscore: PickScoreMetric
    ) -> None:
        """Every thread has a state of its own, which no call may change or be influenced by."""
        generator = torch.Generator().manual_seed(7)
        batches = [torch.rand(1, 3, 32, 40, generator=generator) for _ in range(10)]
        reward_fn = to_flow_grpo(pickscore)("cpu")
        expected = [
            (approx(reward_fn(batch, [prompt], None)[0]), approx(pickscore.compute(prompt, batch)))
            for batch, prompt in zip(batches, PROMPTS * 4, strict=False)
        ]
        pickscore.to("cpu")  # forget the prompts
        contexts = [context for name, context in CONTEXTS.items() if name != "default_dtype"] * 2

        def work(thread: int) -> int:
            with contexts[thread]():
                before = caller_state()
                for call in range(20):
                    i = (call * 7 + thread) % 10
                    assert reward_fn(batches[i], [PROMPTS[i % 3]], None)[0] == expected[i][0]
                    reward = pickscore.reward(PROMPTS[i % 3], batches[i])
                    assert reward.tolist() == expected[i][1] and not reward.requires_grad
                assert caller_state() == before
            return call

        before = caller_state()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == [19] * 8
        assert caller_state() == before

    def test_calls_with_several_prompts_get_what_one_thread_gets(
        self, pickscore: PickScoreMetric
    ) -> None:
        generator = torch.Generator().manual_seed(8)
        reward_fn = to_flow_grpo(pickscore)("cpu")
        calls = [
            (torch.rand(3, 3, 32, 40, generator=generator), [f"{call + i} cats" for i in range(3)])
            for call in range(8)
        ]
        pickscore.to("cpu")
        expected = [approx(reward_fn(images, prompts, None)[0]) for images, prompts in calls]
        pickscore.to("cpu")  # forget the prompts

        def work(thread: int) -> None:
            for step in range(8):
                images, prompts = calls[(step + thread) % 8]
                assert reward_fn(images, prompts, None)[0] == expected[(step + thread) % 8]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

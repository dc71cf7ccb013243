"""Frameworks that came later, and what all of them pass besides images: sources of edits and videos.

Each call is reproduced as the framework's source has it, at the commit that the docstring names.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from stand_ins import Brightness, Judge, Likeness

from diffsynth_metrics import (
    AestheticMetric,
    CLIPMetric,
    HPSv2Metric,
    HPSv3Metric,
    PickScoreMetric,
    RewardError,
    UnifiedReward2Metric,
    UnifiedRewardEditMetric,
)
from diffsynth_metrics.rewards import (
    Component,
    GroupRelative,
    RewardSet,
    as_loss,
    to_dance_grpo,
    to_flow_factory,
    to_flow_grpo,
    to_mixgrpo,
    to_ms_swift,
    to_ms_swift_async,
    to_multi_score,
    to_pref_grpo,
    to_srpo,
    to_trl,
    to_unirl,
    to_verl,
    to_verl_omni,
)
from diffsynth_metrics.testing import ScriptedEngine

PROMPTS = ["a cat", "a dog", "a red circle"]
LEVELS = (0.2, 0.5, 0.9)


def approx(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.fixture
def pickscore(metrics: Callable[[str], Any]) -> PickScoreMetric:
    metric: PickScoreMetric = metrics("pickscore")
    return metric


@pytest.fixture
def pictures() -> list[PIL.Image.Image]:
    return [gray(level) for level in LEVELS]


def gray(level: float) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (40, 48), (round(255 * level),) * 3)


def likeness(first: float, second: float) -> float:
    """Return what Likeness says of two gray pictures."""
    (score,) = Likeness().compute([gray(first)], [gray(second)])
    return score


def pixels_of(levels: Any) -> torch.Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 48, 40).contiguous()


class TestMsSwift:
    """modelscope/ms-swift 3602360a (swift/rl_core/grpo_algorithm.py:14-90, compute_rewards_per_func)."""

    def call(self, functions: list[Any], completions: list[str], **columns: Any) -> torch.Tensor:
        rewards = torch.zeros(len(completions), len(functions))
        messages = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(PROMPTS, completions, strict=False)
        ]
        none = [None] * len(completions)
        row = {"messages": messages, "prompt_id": none, "is_truncated": none, "rollout_infos": none}
        reward_kwargs = {"trainer_state": object(), **row, **columns}
        for i, func in enumerate(functions):
            is_async = inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(func.__call__)
            output = func(completions, **reward_kwargs)
            if is_async:
                output = asyncio.run(self.gathered(output))[0]
            output = [reward if reward is not None else torch.nan for reward in output]
            rewards[:, i] = torch.tensor(output, dtype=torch.float32)
        return rewards

    @staticmethod
    async def gathered(*coroutines: Any) -> list[Any]:
        return await asyncio.gather(*coroutines)

    def test_completions_are_scored_by_the_message_before_them(
        self, pickscore: PickScoreMetric, pictures: list[Any]
    ) -> None:
        expected = approx(pickscore.compute(PROMPTS, pictures))
        for make in (to_ms_swift, to_ms_swift_async):
            reward = make(pickscore, "picture", name="taste")
            rewards = self.call([reward], ["x"] * 3, picture=pictures)
            assert rewards[:, 0].tolist() == expected
            assert reward.__class__.__name__ == reward.__name__ == "taste"  # which the trainer logs
            made = {"taste": reward.orm}["taste"](args=object())  # as the registry ``orms`` is used
            assert self.call([made], ["x"] * 3, picture=pictures)[:, 0].tolist() == expected
        by_column = to_ms_swift(pickscore, "picture", prompt="caption")
        rewards = self.call([by_column], ["x"] * 3, picture=pictures, caption=PROMPTS[::-1])
        assert rewards[:, 0].tolist() == approx(pickscore.compute(PROMPTS[::-1], pictures))

    def test_two_rewards_have_two_names(self, pickscore: PickScoreMetric) -> None:
        names = [type(to_ms_swift(one, "picture")).__name__ for one in (pickscore, Brightness())]
        assert names == ["pickscore", "brightness"]

    def test_a_completion_without_a_score_is_left_out(self, pictures: list[Any]) -> None:
        def draw(completion: str, **row: Any) -> Any:
            if completion == "bad":
                raise ValueError("not a picture")
            return None if completion == "none" else pictures[0]

        for make in (to_ms_swift, to_ms_swift_async):
            rewards = self.call([make(Brightness(), draw)], ["bad", "none", "good"])
            assert rewards[:, 0].isnan().tolist() == [True, True, False]

    def test_pictures_may_be_dicts_as_data_sets_keep_them(
        self, pictures: list[Any], tmp_path: Path
    ) -> None:
        paths = [str(tmp_path / f"{index}.png") for index in range(3)]
        for path, picture in zip(paths, pictures, strict=True):
            picture.save(path)
        columns = {
            "made": [{"bytes": Path(path).read_bytes(), "path": None} for path in paths],
            "images": [[{"bytes": None, "path": path}] for path in paths[::-1]],
        }
        reward = to_ms_swift(Likeness(), "made", source_image="images")
        rewards = self.call([reward], ["x"] * 3, **columns)[:, 0].tolist()
        assert rewards == approx([likeness(*pair) for pair in zip(LEVELS, LEVELS[::-1], strict=True)])


@dataclass
class Primitive:
    texts: Any = None
    pixels: Any = None


@dataclass
class RewardRequest:
    """As in UniRL 1a7b501e (unirl/types/reward.py:29-97)."""

    primitives: dict[str, Any]
    generated: dict[str, Any]

    @property
    def prompts(self) -> list[str]:
        return list(self.primitives["text"].texts)

    @property
    def images(self) -> Any:
        if (given := self.generated.get("image")) is None:
            return None
        arrays = (given.pixels * 255).round().byte().movedim(1, -1).numpy()
        return [PIL.Image.fromarray(array) for array in arrays]

    @property
    def videos(self) -> Any:
        given = self.generated.get("video")
        return None if given is None else [frames.permute(1, 0, 2, 3).contiguous() for frames in given]

    @property
    def is_video(self) -> bool:
        return "video" in self.generated


class LocalRewardBackend(ABC):
    """As in UniRL 1a7b501e (unirl/reward/local/base.py:15-80)."""

    canonical_model_name: str | None = None
    input_kind = "image"

    def __init__(
        self, model_name: str | None = None, device: str = "cuda", batch_size: int = 8, **kwargs: Any
    ) -> None:
        self.model_name, self.batch_size, self.device = model_name, batch_size, device
        self.model = None
        self._load_model()

    def compute_rewards(self, request: Any) -> dict[str, Any]:
        rewards = self._compute_model_rewards(request)
        count = len(rewards)
        return {"rewards": rewards, "successes": [True] * count, "errors": [None] * count}

    @abstractmethod
    def _load_model(self) -> None: ...

    @abstractmethod
    def _compute_model_rewards(self, request: Any) -> list[float]: ...

    def offload(self) -> None:
        raise AssertionError("it looks for self.model.cpu(), which a metric does not have")

    def onload(self) -> None:
        raise AssertionError("it looks for self.model.to()")


@dataclass
class Spec:
    batch_size: int = 8
    device: str = "auto"


class TestUniRL:
    """Tencent-Hunyuan/UniRL 1a7b501e: ``_target_(config=Spec, base_device=...)``, then the backend."""

    def request(self, levels: Any = LEVELS, **generated: Any) -> RewardRequest:
        generated = generated or {"image": Primitive(pixels=pixels_of(levels))}
        return RewardRequest({"text": Primitive(texts=PROMPTS)}, generated)

    def test_a_backend_scores_images(self, pickscore: PickScoreMetric, pictures: list[Any]) -> None:
        backend = to_unirl(lambda device: pickscore, LocalRewardBackend, name="Taste")
        assert backend.__name__ == "Taste"
        made = backend(config=Spec(), base_device="cpu")
        rewards = made.compute_rewards(self.request())
        assert rewards["rewards"] == approx([s / 26 for s in pickscore.compute(PROMPTS, pictures)])
        assert all(type(reward) is float for reward in rewards["rewards"])

    def test_the_device_is_the_specs_or_else_the_recipes(self, pickscore: PickScoreMetric) -> None:
        devices: list[Any] = []

        def load(device: Any) -> Any:
            devices.append(device)
            return pickscore

        backend = to_unirl(load, LocalRewardBackend)
        for spec, base in (("cuda", "cpu"), ("auto", "cpu"), ("auto", "auto")):
            backend(config=Spec(device=spec), base_device=base)
        assert devices == ["cuda", "cpu", None]

    def test_offload_and_onload_move_the_weights(self) -> None:
        places: list[Any] = []

        class Moving(Brightness):
            def to(self, device: Any = None, *more: Any) -> Any:
                places.append(str(device))
                return self

        made = to_unirl(lambda device: Moving(), LocalRewardBackend)(config=Spec(), base_device="cpu")
        made.offload()
        made.onload()
        assert places == ["cpu", "cpu"]

    def test_sources_and_videos_reach_the_metric(self) -> None:
        request = self.request()
        request.primitives["image"] = Primitive(pixels=pixels_of(LEVELS[::-1]))
        made = to_unirl(lambda device: Likeness(), LocalRewardBackend)(config=Spec(), base_device="cpu")
        expected = [likeness(*pair) for pair in zip(LEVELS, LEVELS[::-1], strict=True)]
        assert made.compute_rewards(request)["rewards"] == pytest.approx(expected, abs=0.01)
        videos = [pixels_of([level, level, level / 2, level]) for level in LEVELS]
        backend = to_unirl(lambda device: Brightness(), LocalRewardBackend, frames="min")
        assert backend.input_kind == "video"
        rewards = backend(config=Spec(), base_device="cpu").compute_rewards(self.request(video=videos))
        expected = Brightness().compute([gray(level / 2) for level in LEVELS])
        assert rewards["rewards"] == pytest.approx(expected, abs=0.02)

    def test_a_failure_is_raised_and_never_nan(self) -> None:
        def broken(prompts: list[str], images: Any) -> list[float | None]:
            return [1.0, None, 2.0]

        made = to_unirl(lambda device: broken, LocalRewardBackend)(config=Spec(), base_device="cpu")
        with pytest.raises(RewardError, match="sample 1 of 3 has no reward"):
            made.compute_rewards(self.request())
        with pytest.raises(ValueError, match="UniRL would train on NaN"):
            to_unirl(lambda device: broken, LocalRewardBackend, on_failure="nan")(
                config=Spec(), base_device="cpu"
            )
        groups = RewardSet({"b": Component(Brightness(), normalize=GroupRelative(group_size=3))})
        with pytest.raises(ValueError, match="UniRL deals samples out to its workers"):
            to_unirl(lambda device: groups, LocalRewardBackend)(config=Spec(), base_device="cpu")


def compute_reward(images: Any, prompts: Any, reward_models: Any, reward_weights: Any) -> Any:
    """Tencent-Hunyuan/MixGRPO e5cdd6a4 (fastvideo/models/reward_model/utils.py:4-95), in short."""
    rewards_dict, successes_dict = {}, {}
    with concurrent.futures.ThreadPoolExecutor(len(reward_models)) as executor:
        futures = {executor.submit(single_reward, m, images, prompts): m for m in reward_models}
        for future in concurrent.futures.as_completed(futures):
            name = type(futures[future]).__name__
            try:
                rewards_dict[name], successes_dict[name] = future.result()
            except Exception:
                rewards_dict[name] = [0.0] * len(prompts)
                successes_dict[name] = [0] * len(prompts)
    merged = [0.0] * len(prompts)
    for i in range(len(prompts)):
        if all(successes_dict[name][i] == 1 for name in reward_weights):
            for name, weight in reward_weights.items():
                merged[i] += rewards_dict[name][i] * weight
    return merged, rewards_dict, successes_dict


def single_reward(reward_model: Any, images: Any, prompts: Any) -> tuple[Any, Any]:
    name = type(reward_model).__name__
    if name == "CLIPScoreRewardModel":
        rewards = reward_model(prompts, images)
        successes = [1] * len(rewards)
    elif name in ("HPSClipRewardModel", "ImageRewardModel", "PickScoreRewardModel"):
        rewards = reward_model(images, prompts)
        successes = [1] * len(rewards)
    elif name == "UnifiedRewardModel":
        rewards, done = reward_model(images, prompts)
        rewards = [float(r) if success else 0.0 for r, success in zip(rewards, done, strict=True)]
        successes = [1 if success else 0 for success in done]
    else:
        raise ValueError(f"Unknown reward model: {name}")
    assert len(rewards) == len(successes) == len(prompts)
    return rewards, successes


class TestMixGRPO:
    """``images = [decoded_image[0]]``, ``prompts = [batch_caption[0]]`` (train_grpo_flux.py:283-291)."""

    def test_metrics_are_taken_for_mixgrpos_own(
        self, metrics: Callable[[str], Any], pictures: list[Any]
    ) -> None:
        scales: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
            "hpsv2": ("HPSClipRewardModel", lambda row: row["cosine"]),
            "clip": ("CLIPScoreRewardModel", lambda row: row["cosine"]),
            "image_reward": ("ImageRewardModel", lambda row: row["score"]),
            "pickscore": ("PickScoreRewardModel", lambda row: (row["score"] - 18) / 8),
        }
        models = [to_mixgrpo(metrics(name)) for name in scales]
        weights = {name: 0.25 for name, _ in scales.values()}
        assert {type(model).__name__ for model in models} == {*weights}
        merged, rewards, _ = compute_reward(pictures[:1], PROMPTS[:1], models, weights)
        expected = {
            label: scale(metrics(name).evaluate(PROMPTS[:1], pictures[:1])[0])
            for name, (label, scale) in scales.items()
        }
        assert {name: one[0] for name, one in rewards.items()} == approx(expected)
        assert merged == approx([sum(expected.values()) / 4])

    def test_a_judge_says_that_it_succeeded(self, pictures: list[Any]) -> None:
        answer = "Alignment Score: 4\nCoherence Score: 3\nStyle Score: 5"
        model = to_mixgrpo(UnifiedReward2Metric(ScriptedEngine(answer)))
        weights = {"UnifiedRewardModel": 1.0}
        merged, _, successes = compute_reward(pictures[:1], PROMPTS[:1], [model], weights)
        assert successes == {"UnifiedRewardModel": [1]} and merged == [pytest.approx(4)]

    def test_others_stand_for_one_of_them(self, pictures: list[Any]) -> None:
        model = to_mixgrpo(Brightness(), stands_for="HPSv2Metric")
        merged, _, _ = compute_reward(pictures[:1], PROMPTS[:1], [model], {"HPSClipRewardModel": 2.0})
        assert merged == approx([2 * Brightness().compute(pictures[:1])[0]])
        with pytest.raises(
            ValueError, match=r"pass stands_for= as one of .*MixGRPO knows no Brightness"
        ):
            to_mixgrpo(Brightness())

    def test_what_mixgrpo_would_make_zero_is_nan(
        self, pictures: list[Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        weights = {"HPSClipRewardModel": 1.0}
        for answer, prompts in (("?", ["?"]), ("4", "4")):
            model = to_mixgrpo(Judge(), stands_for="HPSv2Metric")
            merged, _, _ = compute_reward(pictures[:1], prompts, [model], weights)
            assert math.isnan(merged[0]), answer
        assert "the call has no rewards" in caplog.text
        replaced = to_mixgrpo(Judge(), stands_for="HPSv2Metric", on_failure=-1.0)
        assert compute_reward(pictures[:1], ["?"], [replaced], weights)[0] == [-1.0]
        with pytest.raises(ValueError, match="must not be 'raise'"):
            to_mixgrpo(Judge(), stands_for="HPSv2Metric", on_failure="raise")
        grouped = RewardSet({"b": Component(Brightness(), normalize="group")})
        with pytest.raises(ValueError, match="MixGRPO scores one image per call"):
            to_mixgrpo(grouped, stands_for="HPSv2Metric")


class TestSRPO:
    """Tencent-Hunyuan/SRPO 81e58984 (fastvideo/SRPO.py:607-626, 714-728, 770-780)."""

    @pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
    def test_the_trainer_takes_it_for_a_model(self, name: str, metrics: Callable[[str], Any]) -> None:
        metric = metrics(name)
        reward_model = to_srpo(metric).to(torch.device("cpu"))
        reward_model.eval()
        reward_model.requires_grad_(False)
        reward_model.eval()
        policy = torch.nn.Linear(2, 2)
        params = list(policy.parameters()) + list(reward_model.parameters())
        assert [p for p in params if p.requires_grad] == list(policy.parameters())
        leaf = torch.rand(1, 3, 64, 64, requires_grad=True)
        image = (leaf.bfloat16() * 2 - 1) / 2 + 0.5
        image = image.clamp(0, 1)
        discount = torch.linspace(0, 1, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = reward_model.SRP_cfg(["a cat"], ("a dog",), image, discount[1])
        torch.nn.functional.relu(-outputs + 1000).mean().backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
        component = "score" if name != "hpsv2" else "cosine"
        rows = metric.evaluate(["a cat", "a dog"], image.detach().float()[0])
        cat, dog = (row[component] for row in rows)
        scale = 20 if name == "pickscore" else 1
        assert outputs.tolist() == approx([(1.5 * cat - dog) / scale])

    def test_weights_take_no_gradient(self, pickscore: PickScoreMetric) -> None:
        with pytest.raises(ValueError, match="the weights of a metric receive no gradient"):
            to_srpo(pickscore).requires_grad_()
        with pytest.raises(ValueError, match="a scale that is linear in the cosine"):
            to_srpo(pickscore, scale="mixgrpo")


class TestDanceGRPO:
    def test_it_is_the_trainers_hpsv3(
        self, metrics: Callable[[str], Any], pictures: list[Any], tmp_path: Path
    ) -> None:
        """XueZeyue/DanceGRPO 15cc71d5 (fastvideo/train_grpo_qwenimage_edit.py:413-418)."""
        metric: HPSv3Metric = metrics("hpsv3")
        path = str(tmp_path / "qwenimage_0_0.png")
        pictures[0].save(path)
        reward_model = to_dance_grpo(metric)
        all_rewards = []
        with torch.no_grad():
            hps_score = reward_model.reward([path], ["a cat"])
            if hps_score.ndim == 2:
                hps_score = hps_score[:, 0]
            all_rewards.append(hps_score)
        assert torch.cat(all_rewards, dim=0).tolist() == approx(metric.compute("a cat", path))

    def test_videos_are_lists_of_frames(self) -> None:
        """train_grpo_wan_2_1.py:346-366 exports a video and scores its first frame."""
        video = [gray(level) for level in LEVELS]
        for frames, level in (("first", 0.2), ("middle", 0.5)):
            reward = to_dance_grpo(Brightness(), frames=frames)
            pixels = torch.stack([torch.from_numpy(np.array(frame)).movedim(-1, 0) for frame in video])
            for given in (video, pixels):
                for images, prompt in (([given], ["a cat"]), ([given], "a cat"), (given, "a cat")):
                    expected = approx(Brightness().compute(gray(level)))
                    assert reward(images, prompt).tolist() == expected


class TestEdits:
    """The picture that was edited reaches a metric that needs it, in every framework that has one."""

    @pytest.fixture
    def sources(self) -> list[PIL.Image.Image]:
        return [gray(level) for level in LEVELS[::-1]]

    expected = property(lambda self: [likeness(*p) for p in zip(LEVELS, LEVELS[::-1], strict=True)])

    def test_edit_r1_passes_it_by_position(self, pictures: list[Any], sources: list[Any]) -> None:
        """PKU-YuanGroup/Edit-R1 4217f251 (scripts/train_nft_qwen_image_edit.py:771-778, 299-301)."""
        images = pixels_of(LEVELS).half()
        single = to_flow_grpo(Likeness())("cpu")
        multi_score = to_multi_score({"like": Likeness(), "bright": Brightness()})
        several = multi_score("cpu", {"like": 0.5, "bright": 0.0})
        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            for ref_images in (sources, [[one] for one in sources], pixels_of(LEVELS[::-1])):
                for strict in (True, False):
                    args = (images, PROMPTS, ({},) * 3, ref_images)
                    scores, _ = executor.submit(single, *args, only_strict=strict).result()
                    assert scores == pytest.approx(self.expected, abs=0.02)
                    details, _ = executor.submit(several, *args, only_strict=strict).result()
                    assert details["avg"] == pytest.approx([x / 2 for x in self.expected], abs=0.02)
        with pytest.raises(
            RewardError, match="needs one source image per sample, and the sample has none"
        ):
            single(images, PROMPTS, ({},) * 3)

    def test_flow_factory_passes_condition_images(self, pictures: list[Any], sources: list[Any]) -> None:
        model = flow_factory(Likeness())
        output = processed(model, PROMPTS, image=pictures, condition_images=[[one] for one in sources])
        assert output.rewards == approx(self.expected)
        assert processed(flow_factory(Brightness()), PROMPTS, image=pictures).rewards == approx(
            Brightness().compute(pictures)
        )

    @pytest.mark.parametrize("source_image", ["picture", lambda extra_info: extra_info["picture"]])
    def test_verl_omni_has_it_in_extra_info(
        self, source_image: Any, sources: list[Any], tmp_path: Path
    ) -> None:
        """verl-project/verl-omni a1139baf (verl_omni/reward_loop/reward_manager/visual.py:85-105)."""
        compute_score = to_verl_omni(Likeness(), source_image=source_image, max_wait_ms=200)
        verl = to_verl(Likeness(), lambda text, info: gray(LEVELS[int(text)]), source_image="picture")
        paths = [tmp_path / f"{index}.png" for index in range(3)]
        for path, picture in zip(paths, sources, strict=True):
            picture.save(path)

        async def main() -> tuple[list[Any], list[Any]]:
            calls, texts = [], []
            for index, path in enumerate(paths):
                sample = {"data_source": "image_edit", "ground_truth": "brighter"}
                extra_info = {"picture": str(path), "num_turns": None}
                image = (pixels_of([LEVELS[index]])[0] * 255).round().byte()
                calls.append(compute_score(solution_image=image, extra_info=extra_info, **sample))
                texts.append(verl(solution_str=str(index), extra_info=extra_info, **sample))
            return await asyncio.gather(*calls), await asyncio.gather(*texts)

        for results in asyncio.run(main()):
            assert [result["score"] for result in results] == approx(self.expected)
        call = compute_score("d", torch.zeros(3, 8, 8, dtype=torch.uint8), "brighter", {})
        with pytest.raises(KeyError, match="picture"):
            asyncio.run(call)

    def test_trl_has_it_in_a_column(self, pictures: list[Any], sources: list[Any]) -> None:
        function = to_trl(Likeness(), "made", source_image="before")
        arguments = {"prompts": PROMPTS, "completions": [""] * 3, "completion_ids": [[]] * 3}
        assert function(**arguments, made=pictures, before=sources) == approx(self.expected)
        logged: dict[str, Any] = {}
        rewards = function(
            **arguments, made=pictures, before=[None, *sources[1:]], log_extra=logged.__setitem__
        )
        assert rewards[0] is None and rewards[1:] == approx(self.expected[1:])
        assert "needs one source image" in logged["likeness_error"][0]

    def test_pref_grpo_has_it_in_the_item(
        self, pictures: list[Any], sources: list[Any], tmp_path: Path
    ) -> None:
        """CodeGoat24/Pref-GRPO 3e787f6d (fastvideo/train_flux1_kontext_edit.py:785-806)."""
        items = []
        for index, (picture, source) in enumerate(zip(pictures, sources, strict=True)):
            paths = {"source_path": tmp_path / f"s{index}.png", "edited_path": tmp_path / f"{index}.png"}
            picture.save(paths["edited_path"])
            source.save(paths["source_path"])
            items.append({name: str(path) for name, path in paths.items()} | {"instruction": "brighter"})
        rewards, dimensions = to_pref_grpo(Likeness())(items)
        assert rewards.tolist() == approx(self.expected) and [*dimensions] == ["likeness"]
        judge = UnifiedRewardEditMetric(ScriptedEngine('{"reasoning": "", "score": [20, 10]}'))
        assert to_pref_grpo(judge)(items)[0].tolist() == [15] * 3
        grouped = Component(Likeness(), normalize=GroupRelative(group_size=1 + 1))
        with pytest.raises(ValueError, match="has 1 samples of"):
            to_pref_grpo(RewardSet({"like": grouped}))(items)

    def test_a_loss_has_it_and_a_gradient(self) -> None:
        pixels = pixels_of(LEVELS).requires_grad_()
        loss_fn = as_loss(RewardSet({"like": Likeness(), "bright": Component(Brightness(), 0.1)}))
        loss, reward = loss_fn(pixels, None, [gray(level) for level in LEVELS[::-1]])
        bright = Brightness().compute(pixels.detach())
        expected = [like + 0.1 * b for like, b in zip(self.expected, bright, strict=True)]
        assert reward.tolist() == pytest.approx(expected, abs=0.02)
        loss.sum().backward()
        assert pixels.grad is not None and pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0

    def test_a_function_of_sources_gets_them_and_another_does_not(self, pictures: list[Any]) -> None:
        def count(prompts: list[str], images: Any, sources: list[list[Any]]) -> list[float]:
            return [float(len(one)) for one in sources]

        rewards = RewardSet({"count": count, "plain": lambda prompts, images: [1.0] * len(prompts)})
        result = rewards.score("a", pictures, [None, pictures[0], pictures[:2]])
        assert result.raw["count"].tolist() == [0, 1, 2] and result.raw["plain"].tolist() == [1] * 3


@dataclass
class Output:
    """As Flow-Factory's RewardModelOutput."""

    rewards: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardArguments:
    """As in Flow-Factory a0b2bc5a (src/flow_factory/hparams/reward_args.py:61-148)."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16


class PointwiseRewardModel(ABC):
    """As in Flow-Factory a0b2bc5a (src/flow_factory/rewards/abc.py:41-125)."""

    required_fields: tuple[str, ...] = ("image", "prompt")
    use_tensor_inputs = False

    def __init__(self, config: RewardArguments, accelerator: Any) -> None:
        self.accelerator, self.config = accelerator, config
        cuda = config.device == torch.device("cuda")
        self.device = accelerator.device if cuda else config.device
        self.dtype = config.dtype
        self.model = None

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def to(self, device: torch.device) -> Any:
        if self.model is not None:
            self.model.to(device)
        self.device = device
        return self


ACCELERATOR = type("Accelerator", (), {"device": torch.device("cpu")})()


def flow_factory(source: Any, **options: Any) -> Any:
    made = to_flow_factory(lambda **asked: source, PointwiseRewardModel, Output, **options)
    return made(config=RewardArguments(torch.device("cuda")), accelerator=ACCELERATOR)


def processed(model: Any, prompts: list[str], **media: Any) -> Any:
    """Flow-Factory a0b2bc5a (rewards/reward_processor.py:158-176; utils/base.py:38-63)."""
    sample = {"prompt": prompts, "all_latents": [object()] * 3, "prompt_embeds": [object()] * 3, **media}
    parameters = inspect.signature(model.__call__).parameters
    assert all(one.kind is not one.VAR_KEYWORD for one in parameters.values())
    return model(**{name: values for name, values in sample.items() if name in parameters})


class TestFlowFactory:
    def test_device_and_dtype_of_the_yaml_are_honoured(self) -> None:
        asked: list[Any] = []
        made = to_flow_factory(
            lambda **options: asked.append(options) or Brightness(), PointwiseRewardModel, Output
        )
        made(config=RewardArguments(torch.device("cuda")), accelerator=ACCELERATOR)
        made(config=RewardArguments(torch.device("meta"), torch.float16), accelerator=ACCELERATOR)
        assert asked == [
            {"device": torch.device("cpu"), "torch_dtype": torch.bfloat16},
            {"device": torch.device("meta"), "torch_dtype": torch.float16},
        ]

    def test_moving_it_moves_the_metric(self) -> None:
        metric = Brightness()
        model = flow_factory(metric)
        assert model.to(torch.device("meta")) is model
        assert model.device == metric.device == torch.device("meta")

    def test_it_scores_videos(self) -> None:
        model = flow_factory(Brightness(), frames="mean")
        assert "video" in model.required_fields
        videos = [[gray(level), gray(level / 2)] for level in LEVELS]
        output = processed(model, PROMPTS, video=videos)
        expected = [sum(Brightness().compute(video)) / 2 for video in videos]
        assert output.rewards == approx(expected)
        with pytest.raises(ValueError, match="there are videos: pass frames="):
            processed(flow_factory(Brightness()), PROMPTS, video=videos)

    def test_failures_are_told(self, pictures: list[Any]) -> None:
        model = flow_factory(Judge(), on_failure=-1.0)
        output = processed(model, ["4", "?", "2"], image=pictures)
        assert output.rewards == [4, -1, 2]
        assert output.extra_info == {"failures": {1: "no number in '?'"}}


class TestVideos:
    @pytest.fixture
    def videos(self) -> torch.Tensor:
        return torch.stack([pixels_of([level, level / 2, level / 4]) for level in LEVELS])

    def test_flow_grpo_passes_a_batch_of_videos(self, videos: torch.Tensor) -> None:
        expected = [sum(Brightness().compute(video)) / 3 for video in videos]
        scores, _ = to_flow_grpo(Brightness(), frames="mean")("cpu")(videos.half(), PROMPTS, [{}] * 3)
        assert scores == pytest.approx(expected, abs=0.02)
        multi_score = to_multi_score({"bright": Brightness()}, frames="min")
        details, _ = multi_score("cpu", {"bright": 1.0})(videos, PROMPTS, [{}] * 3)
        assert details["avg"] == pytest.approx(Brightness().compute(videos[:, 2]), abs=0.02)

    def test_verl_omni_passes_a_video_and_how_many_frames_count(self, videos: torch.Tensor) -> None:
        """verl-omni a1139baf (.agents/rules/reward.md: TCHW, extra_info["frame_interval"])."""
        compute_score = to_verl_omni(Brightness(), frames="min", max_wait_ms=200)
        clips = (videos * 255).round().byte()

        async def main(extra_info: dict[str, Any]) -> list[float]:
            calls = [compute_score("d", clip, "a cat", extra_info) for clip in clips]
            return [result["score"] for result in await asyncio.gather(*calls)]

        assert asyncio.run(main({})) == pytest.approx(Brightness().compute(clips[:, 2]), abs=1e-4)
        every = asyncio.run(main({"frame_interval": 3}))
        assert every == pytest.approx(Brightness().compute(clips[:, 0]), abs=1e-4)


def test_gathered_columns_have_one_entry_per_sample(
    metrics: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """What every framework does with the result: as_tensor, gather, mean."""
    clip: CLIPMetric = metrics("clip")
    hps: HPSv2Metric = metrics("hpsv2")
    taste: AestheticMetric = metrics("aesthetic")
    caplog.set_level(logging.ERROR)
    multi_score = to_multi_score({"clip": clip, "hps": hps, "taste": taste}, on_failure="mean")
    reward_fn = multi_score("cpu", {"clip": 0.5, "hps": 1.0, "taste": 0.1})
    images = np.zeros((3, 32, 32, 3), np.uint8)
    details, _ = reward_fn(images, PROMPTS, ({},) * 3)
    columns = {key: torch.as_tensor(value).float() for key, value in details.items()}
    assert {key: one.shape for key, one in columns.items()} == dict.fromkeys(details, (3,))
    assert json.dumps(details)

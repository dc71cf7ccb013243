"""A set is a weighted sum of normalised scores, and says what failed and what says nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from stand_ins import Brightness, Judge, Likeness

from diffsynth_metrics import AestheticMetric, RewardError, UnifiedRewardEditMetric
from diffsynth_metrics.pixels import transforms
from diffsynth_metrics.rewards import (
    Component,
    FixedScale,
    GroupRelative,
    Rank,
    RewardSet,
    to_flow_grpo,
)
from diffsynth_metrics.rewards.batches import as_batch
from diffsynth_metrics.rewards.scoring import MetricScorer
from diffsynth_metrics.testing import ScriptedEngine

PROMPTS = ["a cat", "a cat", "a dog", "a dog"]

assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.fixture
def five(metrics: Callable[[str], Any]) -> dict[str, Any]:
    names = ("aesthetic", "clip", "hpsv2", "image_reward", "pickscore")
    return {name: metrics(name) for name in names}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 90, 70, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def bright() -> Brightness:
    return Brightness()


class TestSum:
    def test_the_reward_is_the_weighted_sum_of_what_the_metrics_say(
        self, five: dict[str, Any], images: torch.Tensor
    ) -> None:
        rewards = RewardSet(
            {
                "pickscore": Component(five["pickscore"], 2.0, FixedScale(20, 2), scale="flow_grpo"),
                "aesthetic": Component(five["aesthetic"], -0.5),
                "image_reward": five["image_reward"],
            }
        )
        result = rewards.score(PROMPTS, images)
        pick = five["pickscore"].reward(PROMPTS, images) / 26
        aesthetic = five["aesthetic"].reward(images)
        image_reward = five["image_reward"].reward(PROMPTS, images)
        assert_close(result.raw["pickscore"], pick)
        assert_close(result.raw["aesthetic"], aesthetic)
        assert_close(result.normalized["pickscore"], (pick - 20) / 2)
        assert_close(result.reward, 2.0 * (pick - 20) / 2 - 0.5 * aesthetic + image_reward)
        assert_close(rewards.reward(PROMPTS, images), result.reward)
        assert result.failures == {} and not result.reward.requires_grad

    def test_groups_are_prompts_unless_told_otherwise(self, bright: Brightness) -> None:
        images = torch.stack([torch.full((3, 32, 32), value) for value in (0.1, 0.2, 0.3, 0.9)])
        rewards = RewardSet({"bright": Component(bright, normalize="rank")})
        assert rewards.score(PROMPTS, images).reward.tolist() == [0, 1, 0, 1]
        by_hand = rewards.score(PROMPTS, images, groups=["x", "y", "y", "x"])
        assert by_hand.reward.tolist() == [0, 0, 1, 1]

    @pytest.mark.parametrize(
        "groups",
        [torch.tensor([4, 7, 7, 4]), np.array([4, 7, 7, 4]), list(torch.tensor([4, 7, 7, 4]))],
        ids=["tensor", "array", "list of tensors"],
    )
    def test_groups_may_be_numbers_in_a_tensor(self, groups: Any) -> None:
        scores = iter([[1.0, 3.0, 3.0, 2.0], [1.0, 3.0, 3.0, 2.0]])
        rewards = RewardSet({"mine": Component(lambda prompts, images: next(scores), normalize="rank")})
        result = rewards.score("a", torch.rand(4, 3, 8, 8), groups=groups)
        assert result.reward.tolist() == [0, 0.5, 0.5, 1]
        assert result.collapsed == {"mine": [7], "reward": [7]}

    @pytest.mark.parametrize(
        "groups", [[[1], [2]], [{"a": 1}, 2], torch.tensor([[1, 2], [3, 4]]), "ab", torch.tensor(1)]
    )
    def test_groups_that_cannot_be_compared_are_refused(self, groups: Any, bright: Brightness) -> None:
        with pytest.raises(TypeError, match=r"unhashable|groups must be a sequence"):
            RewardSet({"b": bright}).score("a", torch.rand(2, 3, 32, 32), groups=groups)

    def test_one_prompt_goes_with_every_image_and_an_image_may_be_single(
        self, five: dict[str, Any], images: torch.Tensor
    ) -> None:
        rewards = RewardSet({"clip": five["clip"]})
        picture = PIL.Image.new("RGB", (50, 60), "red")
        for pictures in (images, picture):
            assert_close(rewards.reward("a cat", pictures), five["clip"].reward("a cat", pictures))
        assert rewards.reward("a cat", images[0]).shape == (1,)

    def test_gradients_flow_to_the_pixels(self, five: dict[str, Any], images: torch.Tensor) -> None:
        rewards = RewardSet(
            {
                "clip": Component(five["clip"], 0.1, "group"),
                "aesthetic": Component(five["aesthetic"], 1.0, "group"),
                "hpsv2": five["hpsv2"],
            },
            held_out={"image_reward": five["image_reward"]},
        )
        pixels = images.requires_grad_()
        result = rewards.score(PROMPTS, pixels)
        result.reward.sum().backward()
        assert pixels.grad is not None and pixels.grad.abs().sum() > 0
        assert not result.raw["image_reward"].requires_grad
        for metric in five.values():
            assert all(parameter.grad is None for parameter in metric.model.parameters())

    def test_ranks_have_no_gradient_and_say_so(self, bright: Brightness, images: torch.Tensor) -> None:
        rewards = RewardSet({"bright": Component(bright, normalize="rank")})
        with pytest.raises(ValueError, match=r"'bright' is normalised by ranks, which have no gradient"):
            rewards.reward(PROMPTS, images.requires_grad_())
        with torch.no_grad():
            assert rewards.reward(PROMPTS, images).shape == (4,)

    def test_settings_are_checked_when_the_set_is_made(self, bright: Brightness) -> None:
        with pytest.raises(ValueError, match="at least one component"):
            RewardSet({})
        with pytest.raises(ValueError, match="the name 'a' is used twice"):
            RewardSet({"a": bright}, held_out={"a": bright})
        with pytest.raises(ValueError, match="the weight of 'a' must be finite"):
            RewardSet({"a": Component(bright, math.nan)})
        with pytest.raises(ValueError, match="on_failure must be"):
            RewardSet({"a": bright}).score("a", torch.rand(1, 3, 8, 8), on_failure="ignore")  # type: ignore[arg-type]
        for unnamed in ([bright], bright, "bright"):
            with pytest.raises(TypeError, match=r"takes a dict of names and metrics, such as .*; got"):
                RewardSet(unnamed)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"takes a dict of names and metrics"):
                RewardSet({"a": bright}, held_out=unnamed)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="got 3 prompts and 1 images"):
            RewardSet({"a": bright}).reward(["a", "b", "c"], torch.rand(1, 3, 8, 8))
        with pytest.raises(ValueError, match="got 1 groups for 2 samples"):
            RewardSet({"a": bright}).score("a", torch.rand(2, 3, 8, 8), groups=[1])


class TestSharedPixels:
    @pytest.mark.parametrize("kind", ["floats", "bytes", "PIL", "mixed"])
    def test_images_are_prepared_once_per_distinct_transform(
        self, kind: str, five: dict[str, Any], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepared: list[Any] = []
        for name in ("from_tensor", "from_pil"):
            original = getattr(transforms.ShortestEdgeCrop, name)

            def counting(self: Any, pictures: Any, original: Any = original) -> Any:
                prepared.extend([self] * (len(pictures) if isinstance(pictures, torch.Tensor) else 1))
                return original(self, pictures)

            monkeypatch.setattr(transforms.ShortestEdgeCrop, name, counting)
        pictures: Any = images
        if kind == "bytes":
            pictures = (images * 255).to(torch.uint8)
        if kind in ("PIL", "mixed"):
            pictures = [PIL.Image.new("RGB", (40, 50), color) for color in ("red", "blue", "gray")]
            pictures.append(images[0] if kind == "mixed" else pictures[0])
        alone = {name: _reward(metric, pictures) for name, metric in five.items()}
        prepared.clear()
        result = RewardSet(five).score(PROMPTS, pictures)
        assert len(prepared) == 2 * 4  # clip and pickscore share one, aesthetic and image_reward another
        assert len(set(prepared)) == 2
        for name, values in result.raw.items():
            assert_close(values, alone[name])


class TestFailures:
    """A component that raises, returns NaN, or gets an unreadable image does what was declared."""

    @pytest.fixture(params=["unreadable image", "NaN", "unreadable answer"])
    def broken(self, request: Any, tmp_path: Path) -> Iterator[tuple[Any, list[str], Any, str]]:
        """A metric, prompts and images of which only sample 1 fails, and the reason."""
        images: Any = [PIL.Image.new("RGB", (40, 40), (v, v, v)) for v in (10, 80, 160, 240)]
        metric: Any = Brightness()
        prompts, reason = ["1", "2", "3", "5"], "cannot be read"
        if request.param == "unreadable image":
            (tmp_path / "broken.png").write_bytes(b"no picture")
            images[1] = tmp_path / "broken.png"
        elif request.param == "NaN":
            reason = "not a finite number"

            def metric(prompts: list[str], images: Any) -> list[float | None]:
                return [math.inf if prompt == "2" else float(prompt) for prompt in prompts]
        else:
            metric, prompts, reason = Judge(), ["1", "no idea", "3", "5"], "no number in 'no idea'"
        yield metric, prompts, images, reason

    def test_by_default_it_is_an_error_that_names_component_and_sample(self, broken: Any) -> None:
        metric, prompts, images, reason = broken
        with pytest.raises(RewardError, match=rf"quality: sample 1 of 4 has no reward: .*{reason}"):
            RewardSet({"quality": metric}).score(prompts, images)

    def test_nan_is_nan_for_that_sample_with_the_reason(self, broken: Any) -> None:
        metric, prompts, images, reason = broken
        rewards = RewardSet({"quality": metric})
        result = rewards.score(prompts, images, on_failure="nan")
        assert result.reward.isnan().tolist() == [False, True, False, False]
        assert list(result.failures) == ["quality"] and list(result.failures["quality"]) == [1]
        assert reason in result.failures["quality"][1] and "image 0" not in result.failures["quality"][1]
        scored = rewards.scored(as_batch(prompts, images))
        assert scored.reasons[1] is not None and reason in scored.reasons[1]
        assert [scored.reasons[i] for i in (0, 2, 3)] == [None] * 3

    def test_the_caller_says_once_what_a_failure_gets(self, broken: Any) -> None:
        metric, prompts, images, _ = broken
        other = Component(lambda prompts, images: [1.0] * len(prompts), weight=-2.0)
        rewards = RewardSet({"quality": Component(metric, 2.0), "other": other})
        nan = rewards.score(prompts, images, on_failure="nan").reward
        for policy, expected in ((-7.0, -7.0), (0.0, 0.0), ("mean", float(nan.nanmean()))):
            result = rewards.score(prompts, images, on_failure=policy)
            assert float(result.reward[1]) == pytest.approx(expected)
            assert_close(result.reward[[0, 2, 3]], nan[[0, 2, 3]])
            for values in (result.raw["quality"], result.normalized["quality"]):
                assert values.isnan().tolist() == [False, True, False, False]
            assert [*result.failures] == ["quality"] and [*result.failures["quality"]] == [1]
            assert [error is None for error in result.errors] == [True, False, True, True]

    def test_a_failed_sample_leaves_the_others_alone(self, broken: Any) -> None:
        metric, prompts, images, _ = broken
        for policy in ("mean", "nan", -1000.0):
            rewards = RewardSet({"q": Component(metric, normalize="group")})
            result = rewards.score(prompts, images, groups=[0] * 4, on_failure=policy)
            others = [prompts[i] for i in (0, 2, 3)], [images[i] for i in (0, 2, 3)]
            assert_close(result.reward[[0, 2, 3]], rewards.reward(*others, groups=[0] * 3))

    def test_a_failure_takes_no_part_in_its_group(self) -> None:
        """Whatever it gets, it must not make the spread of the others smaller."""
        scores = [0.81, None, 0.82]
        for normalize, expected in (("group", [-1, 0, 1]), ("rank", [0, 0.5, 1])):
            rewards = RewardSet({"mine": Component(lambda prompts, images: scores, normalize=normalize)})
            result = rewards.score("a", torch.rand(3, 3, 8, 8), on_failure="mean")
            assert result.reward.tolist() == pytest.approx(expected, abs=0.02), normalize

    def test_for_an_adapter_a_failure_is_a_reason_and_not_an_error(self, broken: Any) -> None:
        metric, prompts, images, reason = broken
        for normalize in ("none", "group", "rank"):
            quality = Component(metric, normalize=normalize)
            rewards = RewardSet({"quality": quality, "other": lambda p, i: [1.0] * len(p)})
            scored = rewards.scored(as_batch(prompts, images))
            assert scored.values.isnan().tolist() == [False, True, False, False]
            assert [error is None for error in scored.errors] == [True, False, True, True]
            error = scored.errors[1]
            assert isinstance(error, RewardError) and str(error).startswith("quality: ")
            assert reason in str(error) and error.__cause__ is not None

    def test_a_component_that_breaks_fails_every_sample(
        self, bright: Brightness, images: torch.Tensor
    ) -> None:
        bright.raises = RuntimeError("out of memory")
        rewards = RewardSet({"bright": bright}, held_out={"dark": bright})
        result = rewards.score(PROMPTS, images, on_failure="nan")
        assert result.reward.isnan().all() and bright.calls == 2
        assert result.failures["bright"] == dict.fromkeys(range(4), "RuntimeError: out of memory")
        assert all(map(math.isnan, result.means.values())), "a call without scores has no mean"
        with pytest.raises(RewardError, match="out of memory") as caught:
            RewardSet({"bright": bright}).score(PROMPTS, images)
        assert caught.value.__cause__ is not None and caught.value.__cause__.__cause__ is bright.raises
        assert "in components\n    raise self.raises" in "".join(vars(bright.raises)["__notes__"])

    def test_a_wrong_number_of_scores_is_an_error(self, images: torch.Tensor) -> None:
        rewards = RewardSet({"mine": lambda prompts, images: [1.0]})
        with pytest.raises(RewardError, match=r"mine gave scores of shape \[1\] for 4 samples"):
            rewards.score(PROMPTS, images)

    def test_a_held_out_metric_that_fails_costs_no_reward(
        self, bright: Brightness, images: torch.Tensor
    ) -> None:
        broken = Brightness()
        broken.raises = RuntimeError("broken")
        result = RewardSet({"bright": bright}, held_out={"other": broken}).score(PROMPTS, images)
        assert result.reward.isfinite().all()
        assert result.failures == {"other": dict.fromkeys(range(4), "RuntimeError: broken")}


class TestGroups:
    def test_groups_of_equal_scores_are_named(self) -> None:
        scores = iter([[5.0, 5.0, 1.0, 2.0], [3.0, 3.0, 4.0, 4.0]])

        def judge(prompts: list[str], images: Any) -> list[float]:
            return next(scores)

        rewards = RewardSet({"judge": judge})
        assert rewards.score(PROMPTS, torch.rand(4, 3, 8, 8)).collapsed == {
            "judge": ["a cat"],
            "reward": ["a cat"],
        }
        result = rewards.score(PROMPTS, torch.rand(4, 3, 8, 8), groups=[7, 7, 8, 8])
        assert result.collapsed == {"judge": [7, 8], "reward": [7, 8]}

    @pytest.mark.parametrize(("normalize", "expected"), [("group", 0.0), ("rank", 0.5)])
    def test_groups_of_one_are_listed_and_told(
        self, normalize: str, expected: float, bright: Brightness, caplog: pytest.LogCaptureFixture
    ) -> None:
        """flow_grpo's sampler gives such calls; the advantage 0 of each must not pass for a score."""
        rewards = RewardSet({"p": Component(bright, normalize=normalize), "q": bright})
        result = rewards.score(["a", "b", "c"], torch.rand(3, 3, 32, 32))
        assert result.normalized["p"].tolist() == [expected] * 3
        assert result.collapsed == {"p": ["a", "b", "c"], "reward": ["a", "b", "c"]}
        assert "3 of 3 groups have a single sample in this call" in caplog.text
        caplog.clear()
        assert RewardSet({"q": bright}).score(["a", "b"], torch.rand(2, 3, 32, 32)).collapsed == {}
        assert caplog.text == ""

    def test_the_only_readable_score_of_a_group_is_listed(self) -> None:
        rewards = RewardSet({"p": Component(lambda p, i: [1.0, None, 2.0, 3.0], normalize="group")})
        result = rewards.score(PROMPTS, torch.rand(4, 3, 8, 8), on_failure="nan")
        assert result.collapsed == {"p": ["a cat"], "reward": ["a cat"]}

    @pytest.mark.parametrize("kind", [GroupRelative, Rank])
    def test_a_group_of_another_size_is_an_error_that_says_who_normalises(
        self, kind: Any, bright: Brightness, images: torch.Tensor
    ) -> None:
        rewards = RewardSet({"p": Component(bright, normalize=kind(group_size=2))})
        assert rewards.reward(PROMPTS, images).isfinite().all()
        with pytest.raises(ValueError, match=r"pass whole groups: 'p' .* of 2, .* 1 samples of 'a dog'"):
            rewards.reward(PROMPTS[:3], images[:3])
        with pytest.raises(ValueError, match="leave the normalisation to it"):
            rewards.reward("a", images)
        assert bright.calls == 1, "it is said before anything is scored"

    def test_a_failed_sample_counts_in_the_size_of_its_group(self) -> None:
        normalize = GroupRelative(group_size=4)
        rewards = RewardSet({"p": Component(lambda p, i: [1.0, None, 3.0, 2.0], normalize=normalize)})
        result = rewards.score("a", torch.rand(4, 3, 8, 8), on_failure="nan")
        assert result.reward.isnan().tolist() == [False, True, False, False]

    def test_the_group_of_an_edit_has_one_prompt_and_one_source(self, tmp_path: Path) -> None:
        """Many edits of a data set share an instruction, such as "make it blue"."""

        def mine(prompts: list[str], images: Any, sources: Any) -> list[float]:
            return [1.0, 3.0, 1.0, 3.0]

        rewards = RewardSet({"p": Component(mine, normalize="rank")})
        images = torch.rand(4, 3, 8, 8)
        of_two: list[Any] = [
            ["a.png", "a.png", "b.png", "b.png"],
            # Trainers repeat a source as the rows of a tensor, or open its file again.
            images[[0, 0, 1, 1]],
            images[[0, 0, 1, 1]].bfloat16(),
            [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "red", "blue", "blue")],
            [np.full((8, 8, 3), level, np.uint8) for level in (1, 1, 2, 2)],
            [b"a", b"a", b"b", b"b"],
        ]
        for sources in of_two:
            result = rewards.score("make it blue", images, sources)
            assert result.reward.tolist() == [0, 1, 0, 1]
        result = rewards.score("make it blue", images, ["a.png", "b.png", "b.png", "a.png"])
        assert result.reward.tolist() == [0, 1, 0, 1]
        result = rewards.score("make it blue", images)
        assert result.reward.tolist() == pytest.approx([1 / 6, 5 / 6, 1 / 6, 5 / 6])


class TestSources:
    def test_a_metric_of_two_images_is_a_reward_beside_others(self, bright: Brightness) -> None:
        levels = torch.tensor([0.2, 0.6])[:, None, None, None].expand(2, 3, 32, 32)
        rewards = RewardSet({"like": Likeness(), "bright": bright}, held_out={"same": Likeness()})
        result = rewards.score("a", levels, levels.flip(0))
        bright_of = bright.reward(levels)
        assert_close(result.raw["like"], -(bright_of[0] - bright_of[1]).abs().expand(2))
        assert_close(result.raw["same"], result.raw["like"])
        assert_close(result.raw["bright"], bright_of)
        pixels = levels.clone().requires_grad_()
        rewards.score("a", pixels, levels.flip(0)).raw["like"].sum().backward()
        assert pixels.grad is not None and pixels.grad.abs().sum() > 0

    def test_a_sample_without_its_source_fails_with_the_reason(self, bright: Brightness) -> None:
        images = torch.rand(3, 3, 32, 32)
        rewards = RewardSet({"like": Likeness(), "bright": bright})
        for sources, failed in (([images[0], None, [images[2]]], [1]), (None, [0, 1, 2])):
            result = rewards.score("a", images, sources, on_failure="nan")
            assert [*result.failures["like"]] == failed and "bright" not in result.failures
            reason = result.failures["like"][1]
            assert (
                reason
                == "ValueError: Likeness needs one source image per sample, and the sample has none"
            )
        with pytest.raises(RewardError, match=r"like: .* needs one source image per sample"):
            rewards.score("a", images)
        with pytest.raises(ValueError, match="source images as a list with 3 entries, got 2"):
            rewards.score("a", images, [images[0]] * 2)
        with pytest.raises(ValueError, match="source images as a list with 3 entries, got a single one"):
            rewards.score("a", images, images[0])

    def test_a_judge_of_edits_sees_source_and_edit(self) -> None:
        engine = ScriptedEngine('{"reasoning": "fine", "score": [20, 10]}')
        judge = UnifiedRewardEditMetric(engine)
        pictures = [PIL.Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
        rewards = RewardSet({"edit": judge, "bright": Brightness()})
        result = rewards.score("paint it blue", [pictures[1]] * 2, [pictures[0]] * 2)
        assert result.raw["edit"].tolist() == [15, 15]
        seen = [part for part in engine.questions[-1].content if isinstance(part, PIL.Image.Image)]
        assert [one.getpixel((0, 0)) for one in seen] == [(255, 0, 0), (0, 0, 255)]

    @pytest.mark.parametrize("task", ["edit_pairwise_rank", "edit_pairwise_score"])
    def test_a_task_that_compares_two_edits_is_no_reward(self, task: str) -> None:
        judge = UnifiedRewardEditMetric(ScriptedEngine("2"), task=task)
        for make in (MetricScorer, lambda one: RewardSet({"edit": one}), to_flow_grpo):
            with pytest.raises(ValueError, match=rf"a reward must be .*{task} compares two edits"):
                make(judge)

    def test_fid_is_no_reward(self, metrics: Callable[[str], Any]) -> None:
        with pytest.raises(
            TypeError, match=r"a reward must be .*FIDMetric does not score single samples"
        ):
            RewardSet({"fid": metrics("fid")})


class TestFrames:
    """A video has T frames, which are scored in one batch and give one score."""

    @pytest.fixture
    def videos(self) -> torch.Tensor:
        levels = torch.tensor([[0.1, 0.5, 0.9, 0.3], [0.8, 0.4, 0.6, 0.2]])
        return levels[:, :, None, None, None].expand(2, 4, 3, 32, 32).contiguous()

    @pytest.mark.parametrize(
        ("frames", "index"), [("mean", None), ("min", None), ("first", 0), ("middle", 2)]
    )
    @pytest.mark.parametrize("kind", ["tensor", "tensors", "PIL", "arrays"])
    def test_the_score_of_a_video_is_that_of_its_frames(
        self, frames: Any, index: int | None, kind: str, videos: torch.Tensor, bright: Brightness
    ) -> None:
        of_frames = bright.reward(videos.flatten(0, 1)).view(2, 4)
        expected = of_frames.mean(dim=1) if frames == "mean" else of_frames.amin(dim=1)
        if index is not None:
            expected = of_frames[:, index]
        arrays = (videos * 255).round().byte().movedim(2, -1).numpy()
        pictures: Any = {
            "tensor": videos,
            "tensors": list(videos),
            "PIL": [[PIL.Image.fromarray(frame) for frame in video] for video in arrays],
            "arrays": arrays,
        }[kind]
        bright.calls = 0
        rewards = RewardSet({"bright": bright, "mine": lambda prompts, images: [1.0] * len(prompts)})
        result = rewards.score(["a", "b"], pictures, frames=frames)
        torch.testing.assert_close(result.raw["bright"], expected, rtol=1e-4, atol=0.02)
        assert result.raw["mine"].tolist() == [1, 1]
        assert bright.calls == 1

    def test_groups_are_of_videos_and_not_of_frames(
        self, videos: torch.Tensor, bright: Brightness
    ) -> None:
        rewards = RewardSet({"g": Component(bright, normalize=GroupRelative(group_size=2))})
        assert rewards.reward("a", videos, frames="mean").tolist() == pytest.approx([-1, 1], abs=0.01)

    def test_prompts_and_sources_go_with_every_frame(self, videos: torch.Tensor) -> None:
        result = RewardSet({"like": Likeness()}).score("a", videos, videos[:, 0], frames="min")
        assert_close(
            result.reward, torch.tensor([-0.8, -0.6]) * fmean(1 / std for std in Likeness.transform.std)
        )

    def test_a_video_with_a_frame_without_score_has_none(self, videos: torch.Tensor) -> None:
        videos[1, 2, 0, 0, 0] = math.nan
        result = RewardSet({"b": Brightness()}).score("a", videos, frames="mean", on_failure="nan")
        assert result.reward.isnan().tolist() == [False, True] and [*result.failures["b"]] == [1]

    @pytest.mark.parametrize("frames", ["mean", "min", "first", "middle", "all"])
    @pytest.mark.parametrize("nothing", [[], None])
    def test_a_video_without_frames_fails_alone(self, frames: Any, nothing: Any) -> None:
        def count(prompts: list[str], images: Any) -> list[float]:
            return [float(len(one)) if isinstance(one, list) else 1.0 for one in images]

        source: Any = count if frames == "all" else Brightness()
        video = [PIL.Image.new("RGB", (32, 32))] * 2
        result = RewardSet({"b": source}).score(
            "a", [video, nothing, video], frames=frames, on_failure="nan"
        )
        assert result.reward.isnan().tolist() == [False, True, False]
        assert result.failures == {"b": {1: "the video has no frames"}}

    def test_a_function_may_score_all_frames_together(self, videos: torch.Tensor) -> None:
        def steady(prompts: list[str], images: list[list[torch.Tensor]]) -> list[float]:
            return [-float(torch.stack(frames).mean(dim=(1, 2, 3)).std()) for frames in images]

        rewards = RewardSet({"steady": steady, "bright": Brightness()})
        for pictures in (videos, list(videos), [list(video) for video in videos]):
            result = rewards.score("a", pictures, frames="all", on_failure="nan")
            expected = [-float(video.mean(dim=(1, 2, 3)).std()) for video in videos]
            assert result.raw["steady"].tolist() == pytest.approx(expected)
            assert [*result.failures] == ["bright"], "a metric of images does not know videos"

    def test_gradients_flow_to_the_frames(self, videos: torch.Tensor) -> None:
        RewardSet({"b": Brightness()}).reward(
            "a", videos.requires_grad_(), frames="min"
        ).sum().backward()
        assert videos.grad is not None
        assert (videos.grad.flatten(2).abs().sum(-1) > 0).tolist() == [
            [True] + [False] * 3,
            [False] * 3 + [True],
        ]

    def test_a_video_is_not_scored_without_saying_how(self, videos: torch.Tensor) -> None:
        rewards = RewardSet({"b": Brightness()})
        for pictures in (videos, list(videos), [[PIL.Image.new("RGB", (8, 8))] * 2] * 2):
            with pytest.raises(ValueError, match="there are videos: pass frames= as one of mean, min"):
                rewards.score("a", pictures)
        with pytest.raises(ValueError, match="frames must be one of mean, min, first, middle, all, got"):
            rewards.score("a", videos, frames="median")  # type: ignore[arg-type]
        assert rewards.score("a", videos[:, 0], frames="mean").reward.shape == (2,)


def test_a_set_can_be_copied_and_sent(images: torch.Tensor) -> None:
    rewards = RewardSet({"b": Component(Brightness(), normalize="group")}, held_out={"h": Judge()})
    expected = rewards.score(["1", "2", "3", "4"], images, groups=[1, 1, 2, 2])
    for other in (copy.deepcopy(rewards), pickle.loads(pickle.dumps(rewards))):
        result = other.score(["1", "2", "3", "4"], images, groups=[1, 1, 2, 2])
        assert_close(result.reward, expected.reward)
        assert_close(result.raw, expected.raw)


def _reward(metric: Any, images: Any) -> torch.Tensor:
    reward: torch.Tensor = (
        metric.reward(images) if isinstance(metric, AestheticMetric) else metric.reward(PROMPTS, images)
    )
    return reward


def test_sources_with_a_palette_are_told_apart_by_their_colours(bright: Brightness) -> None:
    colors = ("red", "red", "blue", "blue")
    sources = [PIL.Image.new("RGB", (8, 8), color).quantize(2) for color in colors]
    rewards = RewardSet({"bright": Component(bright, normalize="group")})
    pixels = torch.tensor([0.1, 0.2, 0.6, 0.9])[:, None, None, None].expand(4, 3, 8, 8)
    result = rewards.score(["a"] * 4, pixels, sources=[[source] for source in sources])
    assert result.reward.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-3)


def test_what_is_in_no_order_is_no_reward() -> None:
    for returned in ({1.0, 2.0}, {"a": 1.0, "b": 2.0}, "12"):
        rewards = RewardSet({"own": Component(lambda prompts, images, returned=returned: returned)})
        with pytest.raises(RewardError, match="must return a list or tensor of numbers"):
            rewards.score(["a", "b"], torch.rand(2, 3, 8, 8))


def test_a_scale_is_a_finite_number(bright: Brightness) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number"):
        RewardSet({"bright": Component(bright, scale=math.nan)})

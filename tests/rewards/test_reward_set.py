"""A set is a weighted sum of normalised scores, says what failed, and notices when learning ends."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.multiprocessing
from stand_ins import Brightness, Judge
from two_ranks import learn_as_a_rank

from diffsynth_metrics import AestheticMetric, RewardError
from diffsynth_metrics.pixels import transforms
from diffsynth_metrics.rewards import Component, FixedScale, GroupRelative, RewardSet, RunningZScore
from diffsynth_metrics.rewards.divergence import DivergenceMonitor, trend

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
        with pytest.raises(TypeError, match=r"group 0 must be hashable|groups must be a sequence"):
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
                "clip": Component(five["clip"], 0.1, "zscore"),
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
            RewardSet({"a": Component(bright, on_failure="ignore")})  # type: ignore[arg-type]
        shared = RunningZScore()
        with pytest.raises(ValueError, match="share one normalisation object"):
            RewardSet({n: Component(bright, normalize=shared) for n in "ab"})
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
        other = Brightness()
        rewards = RewardSet({"quality": Component(metric, on_failure="nan")})
        result = rewards.score(prompts, images)
        assert result.reward.isnan().tolist() == [False, True, False, False]
        assert list(result.failures) == ["quality"] and list(result.failures["quality"]) == [1]
        assert reason in result.failures["quality"][1] and "image 0" not in result.failures["quality"][1]
        scored = rewards.scored(prompts, images)
        assert scored.reasons[1] is not None and reason in scored.reasons[1]
        assert [scored.reasons[i] for i in (0, 2, 3)] == [None] * 3
        assert other.calls == 0

    def test_a_number_takes_the_place_of_the_score_only_if_declared(self, broken: Any) -> None:
        metric, prompts, images, _ = broken
        result = RewardSet({"quality": Component(metric, 2.0, on_failure=-7.0)}).score(prompts, images)
        assert result.reward[1] == -14.0
        assert result.raw["quality"].isnan().tolist() == [False, True, False, False]
        assert 1 in result.failures["quality"]

    def test_mean_is_that_of_the_group_or_else_of_the_call(self, broken: Any) -> None:
        metric, prompts, images, _ = broken
        rewards = RewardSet({"quality": Component(metric, on_failure="mean")})
        result = rewards.score(prompts, images, groups=[0, 0, 1, 0])
        values = result.raw["quality"]
        assert float(result.reward[1]) == pytest.approx(float((values[0] + values[3]) / 2))
        result = rewards.score(prompts, images, groups=[0, 1, 0, 0])
        assert float(result.reward[1]) == pytest.approx(float(values.nanmean()))

    def test_a_failed_sample_leaves_the_others_and_the_statistics_alone(self, broken: Any) -> None:
        metric, prompts, images, _ = broken
        for policy in ("mean", "nan", -1000.0):
            rewards = RewardSet({"q": Component(metric, normalize="zscore", on_failure=policy)})
            result = rewards.score(prompts, images)
            clean = RewardSet({"q": Component(metric, normalize="zscore")})
            kept = clean.score([prompts[i] for i in (0, 2, 3)], [images[i] for i in (0, 2, 3)])
            assert_close(result.reward[[0, 2, 3]], kept.reward)
            assert_close(rewards.state_dict()["normalization"], clean.state_dict()["normalization"])

    def test_the_mean_stands_apart_from_its_group(self) -> None:
        """It must not make the spread of the others smaller, nor be better or worse than they."""
        for normalize, expected in (("group", [-1, 0, 1, 0]), ("rank", [0, 0.5, 1, 0.5])):
            rewards = RewardSet(
                {
                    "mine": Component(
                        lambda prompts, images: [1.0, None, 3.0, None],
                        normalize=normalize,
                        on_failure="mean",
                    )
                }
            )
            result = rewards.score("a", torch.rand(4, 3, 8, 8), groups=[0, 0, 0, 1])
            assert result.reward.tolist() == pytest.approx(expected, abs=2e-4), normalize

    def test_a_declared_number_is_a_score_of_its_group(self) -> None:
        """Apart from it, it would be an advantage of thousands where the others hardly differ."""
        component = Component(
            lambda prompts, images: [0.81, None, 0.82], normalize="group", on_failure=-10.0
        )
        reward = RewardSet({"mine": component}).score("a", torch.rand(3, 3, 8, 8)).reward
        assert reward.tolist() == pytest.approx([0.7, -1.41, 0.71], abs=0.01)

    def test_an_error_teaches_no_component(self, bright: Brightness) -> None:
        broken = Component(lambda prompts, images: [1.0, None])
        rewards = RewardSet({"bright": Component(bright, normalize="zscore"), "broken": broken})
        before = rewards.state_dict()
        with pytest.raises(RewardError, match="broken: sample 1 of 2"):
            rewards.score("a", torch.rand(2, 3, 32, 32))
        assert rewards.state_dict() == before

    def test_for_an_adapter_a_failure_is_a_reason_and_not_an_error(self, broken: Any) -> None:
        metric, prompts, images, reason = broken
        for normalize in ("none", "group", "zscore"):
            quality = Component(metric, normalize=normalize)
            rewards = RewardSet({"quality": quality, "other": lambda p, i: [1.0] * len(p)})
            scored = rewards.scored(prompts, images)
            assert scored.values.isnan().tolist() == [False, True, False, False]
            assert [error is None for error in scored.errors] == [True, False, True, True]
            error = scored.errors[1]
            assert isinstance(error, RewardError) and str(error).startswith("quality: ")
            assert reason in str(error) and error.__cause__ is not None

    def test_a_component_that_breaks_fails_every_sample(
        self, bright: Brightness, images: torch.Tensor
    ) -> None:
        bright.raises = RuntimeError("out of memory")
        component = Component(bright, on_failure="nan")
        rewards = RewardSet({"bright": component}, held_out={"dark": bright})
        result = rewards.score(PROMPTS, images)
        assert result.reward.isnan().all() and bright.calls == 2
        assert result.failures["bright"] == dict.fromkeys(range(4), "RuntimeError: out of memory")
        assert rewards.state_dict()["history"] == {}, "a call without scores has no mean"
        with pytest.raises(RewardError, match="out of memory") as caught:
            RewardSet({"bright": bright}).score(PROMPTS, images)
        assert caught.value.__cause__ is bright.raises
        assert "in components\n    raise self.raises" in "".join(vars(bright.raises)["__notes__"])

    def test_no_policy_gives_zero_unless_told_so(self, bright: Brightness, images: torch.Tensor) -> None:
        bright.value = math.nan
        for policy in ("nan", "mean"):
            component = Component(bright, on_failure=policy)  # type: ignore[arg-type]
            assert RewardSet({"b": component}).reward(PROMPTS, images).isnan().all()
        assert RewardSet({"b": Component(bright, on_failure=0.0)}).reward(PROMPTS, images).eq(0).all()

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


class TestBeforeAnythingWasLearned:
    """A running z-score without statistics has nothing to compare with."""

    @pytest.mark.parametrize("policy", ["raise", "nan", "mean", 0.0])
    def test_an_evaluation_says_so_whatever_stands_in_for_failures(
        self, policy: Any, images: torch.Tensor
    ) -> None:
        bright = Component(Brightness(), normalize="zscore", on_failure=policy)
        rewards = RewardSet({"bright": bright})
        reason = "its running statistics have seen no score yet"
        if policy == "raise":
            with pytest.raises(RewardError, match=f"bright: .* has no reward: {reason}"):
                rewards.score(PROMPTS, images, update=False)
        else:
            result = rewards.score(PROMPTS, images, update=False)
            assert result.reward.isnan().all() and result.raw["bright"].isfinite().all()
            assert [*result.failures["bright"]] == [0, 1, 2, 3]
        scored = rewards.scored(PROMPTS, images, update=False)
        assert scored.values.isnan().all() and all(reason in str(error) for error in scored.errors)
        assert rewards.score(PROMPTS, images).reward.isfinite().all()
        assert rewards.score(PROMPTS, images, update=False).reward.isfinite().all()


class TestWatch:
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

    def test_a_single_sample_is_no_collapsed_group(self, bright: Brightness) -> None:
        assert RewardSet({"b": bright}).score(["a", "b"], torch.rand(2, 3, 32, 32)).collapsed == {}

    def _train(self, optimized: Any, held_out: Any, steps: int = 30, **settings: Any) -> list[Any]:
        now = {"step": 0}

        def series(function: Any) -> Any:
            return lambda prompts, images: [function(now["step"])] * 2

        rewards = RewardSet(
            {"mine": Component(series(optimized), **settings)},
            held_out={"other": series(held_out)},
            window=20,
        )
        found = []
        for now["step"] in range(steps):
            found.append(rewards.score("a", torch.rand(2, 3, 8, 8)).diverging)
        return found

    def test_a_held_out_metric_that_falls_while_the_reward_rises_is_an_alarm(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        noise = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
        found = self._train(lambda s: s + noise[s], lambda s: -0.1 * s + 0.2 * noise[s + 30])
        assert found[-1] == {"other": ["mine"]}
        assert found[:19] == [{}] * 19, "not before the window is full"
        assert "other falls while mine rises" in caplog.text

    def test_there_is_no_alarm_when_both_rise_or_nothing_happens(self) -> None:
        noise = torch.randn(60, generator=torch.Generator().manual_seed(1)).tolist()
        assert not any(self._train(lambda s: s, lambda s: s + noise[s]))
        assert not any(self._train(lambda s: noise[s], lambda s: noise[s + 30]))
        assert not any(self._train(lambda s: 1.0, lambda s: -s))

    def test_a_negative_weight_wants_less(self) -> None:
        assert self._train(lambda s: -s, lambda s: -s, weight=-1.0)[-1] == {"other": ["mine"]}

    def test_the_trend_is_the_t_statistic_of_the_correlation(self) -> None:
        assert trend([1.0, 2.0, 3.0]) == math.inf
        assert trend([3.0, 2.0, 1.0]) == -math.inf
        assert trend([1.0, 1.0, 1.0]) == trend([1.0]) == 0
        values = [1.0, 3.0, 2.0, 5.0]
        r = float(torch.corrcoef(torch.tensor([[0.0, 1, 2, 3], values]))[0, 1])
        assert trend(values) == pytest.approx(r * math.sqrt(2 / (1 - r * r)), rel=1e-5)

    def test_a_window_needs_three_calls(self) -> None:
        with pytest.raises(ValueError, match="window must be at least 3"):
            DivergenceMonitor(window=2)


class TestState:
    def test_a_restored_set_goes_on_as_if_nothing_had_happened(
        self, bright: Brightness, images: torch.Tensor
    ) -> None:
        def make() -> RewardSet:
            component = Component(bright, normalize="zscore")
            return RewardSet({"bright": component}, held_out={"dark": bright}, window=3)

        first, second = make(), make()
        first.score(PROMPTS, images)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for _ in range(3):
            images = images * 0.9
            one, other = first.score(PROMPTS, images), second.score(PROMPTS, images)
            assert_close(one.reward, other.reward)
            assert_close(first.state_dict()["history"], second.state_dict()["history"])

    def test_a_state_that_every_rank_loads_is_told_to_no_other_rank_again(self) -> None:
        component = Component(lambda prompts, images: [1.0, 3.0], normalize="zscore")
        first, second = RewardSet({"mine": component}), RewardSet({"mine": component})
        first.score("a", torch.rand(2, 3, 8, 8))
        second.load_state_dict(first.state_dict())
        assert second.state_dict()["normalization"]["mine"] == {
            "shared": [2, 2, 2],
            "since_synchronization": [0, 0, 0],
        }

    @pytest.mark.parametrize("key", ["settings", "normalization", "history"])
    def test_a_state_without_a_part_is_refused(self, key: str, bright: Brightness) -> None:
        rewards = RewardSet({"bright": Component(bright, normalize="zscore")})
        state = rewards.state_dict()
        del state[key]
        with pytest.raises(ValueError, match=f"the state of a RewardSet has '{key}', this one has"):
            rewards.load_state_dict(state)

    def test_a_state_of_another_scale_is_refused(self, bright: Brightness) -> None:
        state = RewardSet({"b": Component(bright, normalize="zscore")}).state_dict()
        with pytest.raises(ValueError, match=r"'b' has scale = .*'multiply': 2.0"):
            RewardSet({"b": Component(bright, normalize="zscore", scale=2.0)}).load_state_dict(state)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda state: state["normalization"]["two"].pop("shared"),
            lambda state: state["normalization"]["two"].update(shared=[1.0, math.nan, 0.0]),
            lambda state: state["normalization"]["two"].update(shared=[1.0, 2.0]),
            lambda state: state["normalization"]["two"].update(shared=[-1.0, 2.0, 0.0]),
            lambda state: state["settings"].pop("two"),
            lambda state: state["history"].update(two=["high"]),
        ],
    )
    def test_a_state_that_is_refused_changes_nothing(self, damage: Any) -> None:
        def make() -> RewardSet:
            return RewardSet(
                {name: Component(lambda p, i: [1.0, 3.0], normalize="zscore") for name in ("one", "two")}
            )

        rewards, other = make(), make()
        other.score("a", torch.rand(2, 3, 8, 8))
        state = other.state_dict()
        damage(state)
        before = rewards.state_dict()
        with pytest.raises(ValueError):
            rewards.load_state_dict(state)
        assert rewards.state_dict() == before

    def test_a_state_of_another_set_is_refused(self, bright: Brightness) -> None:
        state = RewardSet({"a": Component(bright, normalize="zscore")}).state_dict()
        with pytest.raises(ValueError, match=r"the state is of the components \['a'\], this set has"):
            RewardSet({"b": bright}).load_state_dict(state)

    @pytest.mark.parametrize("theirs", ["none", "zscore", "rank", FixedScale(5, 1), GroupRelative()])
    def test_a_state_of_another_normalisation_is_refused(self, theirs: Any) -> None:
        state = RewardSet({"b": Component(Brightness(), normalize=theirs)}).state_dict()
        own = RewardSet({"b": Component(Brightness(), normalize=GroupRelative(correction=1))})
        with pytest.raises(
            ValueError, match=r"'b' has normalize = {'type': 'GroupRelative', .*: 1}, and"
        ):
            own.load_state_dict(state)

    def test_a_set_can_be_copied_and_sent(self, images: torch.Tensor) -> None:
        rewards = RewardSet({"b": Component(Brightness(), normalize="zscore")}, held_out={"h": Judge()})
        rewards.score(["1", "2", "3", "4"], images)
        for other in (copy.deepcopy(rewards), pickle.loads(pickle.dumps(rewards))):
            assert other.state_dict() == rewards.state_dict()
            other.score(["1", "2", "3", "4"], images)
            assert other.state_dict() != rewards.state_dict()

    def test_threads_lose_no_statistics(self, bright: Brightness, images: torch.Tensor) -> None:
        rewards = RewardSet({"bright": Component(bright, normalize="zscore")})
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: rewards.score(PROMPTS, images), range(80)))
        count, mean, _ = rewards.state_dict()["normalization"]["bright"]["since_synchronization"]
        assert count == 320
        assert mean == pytest.approx(float(bright.reward(images).mean()))

    def test_synchronize_without_other_processes_does_nothing(self, bright: Brightness) -> None:
        rewards = RewardSet({"bright": Component(bright, normalize="zscore")})
        rewards.score("a", torch.rand(2, 3, 32, 32))
        before = rewards.state_dict()
        rewards.synchronize()
        assert rewards.state_dict() == before

    def test_a_synchronization_that_fails_loses_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        rewards = RewardSet({"m": Component(lambda p, i: [1.0, 3.0], normalize="zscore")})

        def score() -> None:
            rewards.score("a", torch.rand(2, 3, 8, 8))

        def fail(rows: torch.Tensor, group: Any = None) -> None:
            score()  # another thread goes on meanwhile
            raise RuntimeError("a rank is gone")

        score()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        for name, value in {"get_backend": "gloo", "get_world_size": 1, "get_rank": 0}.items():
            monkeypatch.setattr(torch.distributed, name, lambda group, value=value: value)
        monkeypatch.setattr(torch.distributed, "all_reduce", fail)
        with pytest.raises(RuntimeError, match="a rank is gone"):
            rewards.synchronize()
        own = {"shared": [0, 0, 0], "since_synchronization": [4, 2, 4]}
        assert rewards.state_dict()["normalization"]["m"] == own
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda rows, group=None: score())
        rewards.synchronize()
        own = {"shared": [4, 2, 4], "since_synchronization": [2, 2, 2]}
        assert rewards.state_dict()["normalization"]["m"] == own

    def test_two_processes_agree_after_synchronize_and_share_nothing_before(
        self, tmp_path: Path
    ) -> None:
        torch.multiprocessing.spawn(learn_as_a_rank, (str(tmp_path),), nprocs=2)
        states = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
        seen = torch.tensor([1.0, 2, 3, 11, 12, 13, 4, 5, 6, 14, 15, 16]).double()
        assert states[0]["before"] != states[1]["before"]
        for state in states:
            moments = state["after"]["shared"]
            assert_close(state["after"], states[0]["after"])
            assert moments[:2] == pytest.approx([12, float(seen.mean())])
            assert moments[2] == pytest.approx(float((seen - seen.mean()).square().sum()))
            expected = ((torch.tensor([7.0, 8.0]) - seen.mean()) / seen.std(correction=0)).tolist()
            assert state["reward"] == pytest.approx(expected)


def _reward(metric: Any, images: Any) -> torch.Tensor:
    reward: torch.Tensor = (
        metric.reward(images) if isinstance(metric, AestheticMetric) else metric.reward(PROMPTS, images)
    )
    return reward

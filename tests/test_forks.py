"""A process that is forked while nobody is scoring can score, though its parent has scored before."""

from __future__ import annotations

from contextlib import ExitStack

import PIL.Image
import pytest
from forking import is_true_in_a_child, needs_fork

from diffsynth_metrics import CLIPMetric, ModelConfig, inputs
from diffsynth_metrics.rewards import Component, RewardSet


@needs_fork
def test_a_forked_child_scores_as_its_parent_does() -> None:
    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
    rewards = RewardSet({"clip": Component(metric, 0.5)}, held_out={"other": metric})
    prompts = ["a red circle", "a blue square"]
    images = [PIL.Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    expected = metric.compute(prompts, images)
    reward = rewards.reward(prompts, images).tolist()

    def scores_alike() -> bool:
        assert metric.compute(prompts, images) == pytest.approx(expected, rel=1e-4)
        assert metric.compute("a green star", images[0]) != expected[:1]  # a prompt that is new
        assert rewards.reward(prompts, images).tolist() == pytest.approx(reward, abs=1e-3)
        return True

    assert is_true_in_a_child(scores_alike)


@needs_fork
def test_a_child_decodes_pictures_although_threads_of_the_parent_were_decoding() -> None:
    picture = PIL.Image.new("RGB", (8, 8))
    with ExitStack() as held:
        for lock in inputs._DECODE_LOCKS:
            held.enter_context(lock)
        assert is_true_in_a_child(lambda: inputs.open_image(picture, "image 0").size == (8, 8))

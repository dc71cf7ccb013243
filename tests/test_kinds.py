"""Metrics that a user adds: one small class of each kind, loaded and scored like the package's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from diffsynth_metrics import MetricCard, ModelConfig
from diffsynth_metrics.base import ImageMetric, ReferenceMetric, SetMetric
from diffsynth_metrics.dual_encoder import DualEncoderMetric
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.inputs import as_images, pair_references
from diffsynth_metrics.networks.clip import build_clip, clip_config
from diffsynth_metrics.pixels.transforms import ShortestEdgeCrop
from diffsynth_metrics.rewards import Component, RewardSet
from diffsynth_metrics.tokens import TokenizedPrompts, cut_prompts, padded


# An eleventh metric, begin. ---------------------------------------------------------------------------
class ShapesMetric(DualEncoderMetric):
    """Half of 1 + cosine of the embedded CLIP, in 0 to 1."""

    card = MetricCard(
        name="Shapes",
        inputs="prompt and image",
        range="0 to 1",
        higher_is_better=True,
        definition="(1 + cos(text, image)) / 2",
        paper="https://arxiv.org/abs/2103.00020",
        repository="https://github.com/openai/CLIP",
        code_license="Apache-2.0",
        weights_license="Apache-2.0",
    )
    default_model = ModelConfig.embedded("shapes")
    processor_files = ("tokenizer.json",)
    float32_parts = ("logit_scale", "text_projection", "visual_projection")
    transform = ShortestEdgeCrop(64)

    @classmethod
    def build(cls, config: dict[str, Any] | None) -> nn.Module:
        return build_clip(clip_config(config))

    @classmethod
    def load_processor(cls, folder: Path, model: nn.Module, **processor_kwargs: Any) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **processor_kwargs)

    def tokenize(self, prompts: list[str]) -> TokenizedPrompts:
        return cut_prompts(self.processor(prompts)["input_ids"], 32)

    def embed_text(self, ids: list[list[int]]) -> Tensor:
        rows = padded(ids, self.processor.pad_token_id).to(self.device)
        return self.model.text_projection(self.model.text_model(rows).pooler_output.float())

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values).pooler_output.float())

    def score_of_cosine(self, cosine: Tensor) -> Tensor:
        return (1 + cosine) / 2


# An eleventh metric, end. -----------------------------------------------------------------------------


def test_an_eleventh_metric_takes_less_than_sixty_lines() -> None:
    begin, end = (
        index
        for index, line in enumerate(Path(__file__).read_text().splitlines())
        if line.startswith("# An eleventh metric, ")
    )
    assert end - begin < 60


@pytest.fixture(scope="module")
def shapes() -> ShapesMetric:
    return ShapesMetric.from_pretrained(device="cpu")


def test_it_loads_and_scores(shapes: ShapesMetric) -> None:
    pictures = [draw_shape("circle", "red"), draw_shape("square", "blue")]
    circle, square = shapes.compute("a red circle", pictures)
    assert 0 < square < circle < 1
    assert shapes.evaluate("a red circle", pictures)[0]["prompt_tokens"] == 5
    narrow = ShapesMetric.from_pretrained(device="cpu", torch_dtype=torch.bfloat16)
    assert narrow.compute("a red circle", pictures) == pytest.approx([circle, square], abs=0.02)


def test_it_is_a_reward_with_gradients_and_joins_a_set(shapes: ShapesMetric) -> None:
    pixels = torch.rand(2, 3, 64, 64, requires_grad=True)
    shapes.reward("a red circle", pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    rewards = RewardSet({"shapes": Component(shapes), "half": Component(shapes, weight=0.5)})
    result = rewards.score(["a red circle"] * 2, pixels.detach())
    alone = shapes.reward("a red circle", pixels.detach())
    torch.testing.assert_close(result.reward, 1.5 * alone, rtol=1e-4, atol=1e-5)


CARD = ShapesMetric.card


class DifferenceMetric(ReferenceMetric):
    """The mean absolute difference of the pixels of two images."""

    card = CARD
    transform = ShortestEdgeCrop(8)

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))

    def components(self, reference: Any, images: Any) -> dict[str, Tensor]:
        sides = [
            torch.cat(list(self.pixel_batches(side))) for side in pair_references(reference, images)
        ]
        return {"score": (sides[0] - sides[1]).abs().mean(dim=(1, 2, 3))}


class BrightnessMetric(ImageMetric):
    """The mean of the normalised pixels of an image."""

    card = CARD
    transform = ShortestEdgeCrop(8)

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))

    def components(self, images: Any) -> dict[str, Tensor]:
        pixels = torch.cat(list(self.pixel_batches(as_images(images))))
        return {"score": pixels.mean(dim=(1, 2, 3))}


class BrightnessGapMetric(SetMetric):
    """How much brighter one set of images is than another."""

    card = CARD
    transform = ShortestEdgeCrop(8)

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))

    def evaluate(self, reference_images: Any, generated_images: Any, **options: Any) -> dict[str, Any]:
        means = [
            torch.cat(list(self.pixel_batches(as_images(side)))).mean()
            for side in (reference_images, generated_images)
        ]
        return {"score": float(means[1] - means[0])}


def gray(value: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 8), (value,) * 3)


def test_a_reference_metric_compares_one_with_one_many_with_many_and_one_with_many() -> None:
    metric = DifferenceMetric()
    (one,) = metric.compute(gray(0), gray(255))
    assert one == pytest.approx(1 / 0.2687, rel=0.05)  # by the mean standard deviation of CLIP's pixels
    assert metric.compute([gray(0), gray(9)], [gray(255), gray(9)]) == pytest.approx([one, 0], abs=1e-5)
    assert metric.compute(gray(0), [gray(255), gray(0)]) == pytest.approx([one, 0], abs=1e-5)
    assert metric.evaluate(gray(1), gray(1)) == [{"score": 0.0}]
    pixels = torch.rand(1, 3, 8, 8, requires_grad=True)
    assert metric.reward(torch.rand(1, 3, 8, 8), pixels).requires_grad
    assert not metric.reward(torch.rand(1, 3, 8, 8), pixels.detach()).requires_grad


def test_images_and_references_that_do_not_pair_are_an_error() -> None:
    with pytest.raises(ValueError, match="got 2 reference images and 3 images"):
        DifferenceMetric().compute([gray(0)] * 2, [gray(0)] * 3)
    with pytest.raises(TypeError, match=r"compute takes \(reference, images\)"):
        DifferenceMetric().compute(gray(0))  # type: ignore[call-arg]


def test_folders_are_paired_by_stem(tmp_path: Path) -> None:
    for side, suffix in (("real", "png"), ("made", "bmp")):
        (tmp_path / side).mkdir()
        for value in (0, 100, 200):
            gray(value).save(tmp_path / side / f"{value}.{suffix}")
    metric = DifferenceMetric()
    assert metric.compute(tmp_path / "real", tmp_path / "made") == [0, 0, 0]
    with pytest.raises(ValueError, match=r"a folder is paired with a folder"):
        metric.compute(tmp_path / "real", gray(0))
    (tmp_path / "made" / "0.bmp").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 image files have no partner .*0\.png'"):
        metric.compute(tmp_path / "real", tmp_path / "made")
    gray(0).save(tmp_path / "made" / "100.png")
    with pytest.raises(ValueError, match=r"several files are called '100'"):
        metric.compute(tmp_path / "real", tmp_path / "made")


def test_an_image_metric_scores_images_alone() -> None:
    dark, bright = BrightnessMetric().compute([gray(0), gray(255)])
    assert dark < 0 < bright


def test_a_metric_that_does_not_score_each_image_is_at_fault() -> None:
    class One(BrightnessMetric):
        def components(self, images: Any) -> dict[str, Tensor]:
            return {"score": torch.ones(1)}

    for verb in (One().compute, One().evaluate, One().reward):
        with pytest.raises(RuntimeError, match=r"one score per image.* got shape \[1\] for 2 images"):
            verb([gray(0), gray(255)])


def test_a_set_metric_gives_one_number() -> None:
    metric = BrightnessGapMetric()
    gap = metric.compute([gray(0), gray(10)], [gray(100), gray(110)])
    assert type(gap) is float and gap > 1
    assert metric([gray(0)], [gray(100)]) == pytest.approx(metric.score([gray(0)], [gray(100)]))

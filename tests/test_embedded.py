"""The embedded model knows its shapes, and its training script makes such a model."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from random import Random

import PIL.Image
import pytest
from transformers import CLIPTokenizer

import diffsynth_metrics
from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.embedded.drawing import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    describe,
    draw_shape,
)

FOLDER = Path(diffsynth_metrics.__file__).parent / "embedded" / "shapes"
SCRIPT = Path(__file__).parents[1] / "scripts" / "train_shapes.py"
PAIRS = [(shape, color) for shape in SHAPES for color in COLORS]


@pytest.fixture(scope="module")
def metric() -> CLIPMetric:
    return CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu", batch_size=64)


def held_out(count: int, image_size: int | tuple[int, int]) -> tuple[list[PIL.Image.Image], list[int]]:
    """Draw pictures from a random stream that training does not use, with the number of their pair."""
    rng = Random(f"held out {image_size}")
    pictures, labels = [], []
    for _ in range(count):
        label = rng.randrange(len(PAIRS))
        shape, color = PAIRS[label]
        background = rng.choice([name for name in BACKGROUNDS if name != color])
        size = rng.choice(list(SIZES))
        pictures.append(
            draw_shape(shape, color, size=size, background=background, image_size=image_size, rng=rng)
        )
        labels.append(label)
    return pictures, labels


@pytest.mark.parametrize(
    ("image_size", "count"),
    [(64, 500), (128, 500), (224, 200), (512, 50), ((640, 480), 50), ((90, 160), 200)],
)
def test_the_right_caption_is_picked_among_all_pairs(
    metric: CLIPMetric, image_size: int | tuple[int, int], count: int
) -> None:
    pictures, labels = held_out(count, image_size)
    captions = [describe(shape, color) for shape, color in PAIRS]
    by_caption = metric.similarity_matrix(captions, pictures)
    right = 0
    for column, label in enumerate(labels):
        scores = [row[column] for row in by_caption]
        right += scores.index(max(scores)) == label
    assert right / count >= 0.97


@pytest.mark.parametrize(
    "wording", ["a red circle", "red circle", "Red circle.", "a picture of a red circle"]
)
def test_a_red_circle_scores_above_a_blue_square(metric: CLIPMetric, wording: str) -> None:
    circle, square = draw_shape("circle", "red"), draw_shape("square", "blue")
    circle_score, square_score = metric.compute(wording, [circle, square])
    assert circle_score > square_score + 5


def test_size_and_background_are_understood(metric: CLIPMetric) -> None:
    small = draw_shape("star", "green", size="small", background="white")
    large = draw_shape("star", "green", size="large", background="black")
    for caption, better, worse in (
        ("a small green star", small, large),
        ("a large green star", large, small),
        ("a green star on a white background", small, large),
        ("a green star on a black background", large, small),
    ):
        scores = metric.compute(caption, [better, worse])
        assert scores[0] > scores[1], caption


def test_any_text_is_read(metric: CLIPMetric) -> None:
    circle = draw_shape("circle", "red")
    with pytest.warns(UserWarning, match="reads 32 tokens of a prompt"):
        scores = metric.compute(["", "word " * 200, "猫 🎨", "<|endoftext|>"], circle)
    assert len(scores) == 4
    assert all(map(math.isfinite, scores))


def test_caption_words_are_single_tokens() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER)
    for word in (*SHAPES, *COLORS, *SIZES, *BACKGROUNDS, "background"):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert tokenizer.unk_token_id not in tokenizer("naïve 猫 🎨")["input_ids"][1:-1]


def test_files_agree_and_are_small() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER)
    assert config["text_config"]["vocab_size"] == len(tokenizer)
    assert config["text_config"]["eos_token_id"] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000


def test_the_training_script_writes_a_model_that_loads(tmp_path: Path) -> None:
    options = ["--steps", "2", "--examples", "16", "--batch-size", "8"]
    runpy.run_path(str(SCRIPT))["main"](["--output", str(tmp_path), *options])
    metric = CLIPMetric.from_pretrained(ModelConfig(path=tmp_path), device="cpu")
    assert len(metric.compute("a red circle", draw_shape("circle", "red"))) == 1


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match=r"'hexagon' is unknown; there are circle, square"):
        draw_shape("hexagon", "red")
    with pytest.raises(ValueError, match="a white shape cannot be seen on a white background"):
        draw_shape("circle", "white", background="white")


def test_pictures_are_reproducible() -> None:
    first, second = (draw_shape("star", "blue", rng=Random(3)).tobytes() for _ in range(2))
    assert first == second

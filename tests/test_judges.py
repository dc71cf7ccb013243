"""The judge metrics: what they ask, what they return, and how they load."""

from __future__ import annotations

import copy
import hashlib
import math
import threading
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from diffsynth_metrics import (
    CheckpointError,
    HPSv3Metric,
    ImageError,
    ModelConfig,
    QwenImageBenchMetric,
    UnifiedReward2Metric,
    UnifiedRewardEditMetric,
)
from diffsynth_metrics.judges.architectures import build_judge
from diffsynth_metrics.judges.engine import Answer, Question
from diffsynth_metrics.judges.metric import JudgeMetric
from diffsynth_metrics.judges.prompts import load_prompts
from diffsynth_metrics.testing import ScriptedEngine, tiny_checkpoint

RED = PIL.Image.new("RGB", (64, 48), "red")
GREEN = PIL.Image.new("RGB", (48, 64), "green")
BLUE = PIL.Image.new("RGB", (50, 50), "blue")
WIDE = PIL.Image.new("RGB", (3000, 10))
NOWHERE = ModelConfig(path="no such folder")

CLASSES: dict[str, type[JudgeMetric]] = {
    "unified_reward_2": UnifiedReward2Metric,
    "unified_reward_edit": UnifiedRewardEditMetric,
    "qwen_image_bench": QwenImageBenchMetric,
}
DIGESTS = {
    "unified_reward_2": "58a89e57dfe245a7",
    "unified_reward_edit": "32f33a97133f4db2",
    "qwen_image_bench": "3d5ca7136e33e2d3",
}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<think>", "</think>", "<tool_call>", "</tool_response>"),
    "<|Reward|>",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    return {name: tiny_checkpoint(name, root / name) for name in CLASSES}


@pytest.fixture(scope="module")
def judges(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        name: CLASSES[name].from_pretrained(
            ModelConfig(path=folder), device="cpu", torch_dtype=torch.float32, max_new_tokens=12
        )
        for name, folder in folders.items()
    }


def ask_one(metric: Any, prompt: str, **options: Any) -> list[dict[str, Any]]:
    images = [RED, GREEN] if isinstance(metric, UnifiedRewardEditMetric) else RED
    rows: list[dict[str, Any]] = metric.evaluate(prompt, images, **options)
    return rows


# What is asked


def test_the_prompts_are_carried_unchanged() -> None:
    folder = resources.files("diffsynth_metrics") / "judges" / "prompts"
    digests = {
        name: hashlib.sha256((folder / f"{name}.json").read_bytes()).hexdigest()[:16] for name in CLASSES
    }
    assert digests == DIGESTS
    for name in CLASSES:
        assert load_prompts(name)["source"] and load_prompts(name)["licence"]


def test_unified_reward_2_asks_the_official_question_without_thinking() -> None:
    engine = ScriptedEngine()
    UnifiedReward2Metric(engine).evaluate(["a {prompt} cat", "b"], [RED, GREEN])
    first, second = engine.questions
    assert first.content[0].size == RED.size
    assert str(first.content[1]).endswith("Text Caption: [a {prompt} cat]")
    assert "Do not include" not in str(first.content[1]), "upstream's addition is not official"
    assert second.content[0].size == GREEN.size
    assert str(second.content[1]).endswith("Text Caption: [b]")
    assert (first.system, first.thinking, first.repetition_penalty) == (None, False, 1.0)


@pytest.mark.parametrize(
    ("task", "images"),
    [
        ("edit_pointwise_score", [RED, GREEN]),
        ("edit_pointwise_quality", [RED]),
        ("edit_pairwise_rank", [RED, GREEN, BLUE]),
        ("edit_pairwise_score", [RED, GREEN, BLUE]),
    ],
)
def test_unified_reward_edit_asks_images_first(task: str, images: list[PIL.Image.Image]) -> None:
    engine = ScriptedEngine()
    UnifiedRewardEditMetric(engine).evaluate("make it {instruction}", images, task=task)
    (question,) = engine.questions
    *pictures, text = question.content
    assert [picture.size for picture in pictures] == [image.size for image in images]
    prompts = load_prompts("unified_reward_edit")
    official = prompts["user"][task] if task in prompts["user"] else prompts[task]["user"]
    assert text == official.replace("{instruction}", "make it {instruction}")
    assert (question.system, question.thinking, question.repetition_penalty) == (None, None, 1.0)


def test_qwen_image_bench_asks_one_question_per_dimension() -> None:
    engine = ScriptedEngine()
    QwenImageBenchMetric(engine).evaluate("a {cat}", RED)
    names = ["Quality", "Aesthetics", "Alignment", "Real-world Fidelity", "Creative Generation"]
    for question, name in zip(engine.questions, names, strict=True):
        header, picture, body = question.content
        assert header == "# Text Prompt Used to Generate the Image\na {cat}\n\n# Generated Image\n"
        assert picture is engine.questions[0].content[1]
        assert f"# Evaluation Dimension\n{name}\n" in str(body)
        assert '{\n  "{level2_dim}": {\n' in str(body)
        assert question.system == load_prompts("qwen_image_bench")["system"]
        assert (question.thinking, question.repetition_penalty) == (True, 1.05)


def test_qwen_image_bench_makes_large_images_square() -> None:
    engine = ScriptedEngine()
    metric = QwenImageBenchMetric(engine)
    for size in ((1024, 1024), (1024, 300), (1025, 300), (300, 2000)):
        metric.evaluate("a", PIL.Image.effect_noise(size, 90), dimensions="Quality")
    sizes = [question.content[1].size for question in engine.questions]
    assert sizes == [(1024, 1024), (1024, 300), (1024, 1024), (1024, 1024)]
    large = PIL.Image.effect_noise((1025, 300), 90).convert("RGB")
    metric.evaluate("a", large, dimensions="Quality")
    expected = large.resize((1024, 1024), PIL.Image.Resampling.LANCZOS)
    assert np.array_equal(np.array(engine.questions[-1].content[1]), np.array(expected))


def test_dimensions_are_selected() -> None:
    everything = ["Quality", "Aesthetics", "Alignment", "Real-world Fidelity", "Creative Generation"]
    below = "Quality / Realism / Physical Logic; Aesthetics / Color Harmony / Color Harmony"
    cases: list[tuple[Any, list[str]]] = [
        (None, everything),
        ("Quality", ["Quality"]),
        ("quality, Alignment", ["Quality", "Alignment"]),
        (["Alignment", "Alignment"], ["Alignment"]),
        ({"Aesthetics": 1}, ["Aesthetics"]),
        (below + "; Quality / Detail / Noise", ["Quality", "Aesthetics"]),
        (["Real-world Fidelity"], ["Real-world Fidelity"]),
    ]
    for dimensions, asked in cases:
        row = QwenImageBenchMetric(ScriptedEngine()).evaluate("a", RED, dimensions)[0]
        assert row["dimensions"] == asked == list(row["raw_outputs"])


def test_each_pair_may_have_dimensions_of_its_own() -> None:
    metric = QwenImageBenchMetric(ScriptedEngine())
    rows = metric.evaluate("a", [RED, GREEN], dimensions=["Quality / Detail / Noise", ["Alignment"]])
    assert [row["dimensions"] for row in rows] == [["Quality"], ["Alignment"]]
    with pytest.raises(ValueError, match="got 1 sets of dimensions for 2 pairs"):
        metric.evaluate("a", [RED, GREEN], dimensions=[["Quality"]])
    rows = metric.evaluate("a", [RED, GREEN], dimensions=["Quality, Aesthetics", None])
    assert [len(row["dimensions"]) for row in rows] == [2, 5]


def test_a_list_of_names_is_one_set_for_all_pairs() -> None:
    rows = QwenImageBenchMetric(ScriptedEngine()).evaluate(
        "a", [RED, GREEN], dimensions=["Quality", "Alignment"]
    )
    assert [row["dimensions"] for row in rows] == [["Quality", "Alignment"]] * 2


@pytest.mark.parametrize(
    "dimensions",
    [
        ["Quality, Aesthetics", "Alignment"],
        [None, "Alignment"],
        ["Quality", "Quality / Detail / Noise"],
        [["Quality"], "Alignment"],
    ],
)
def test_names_among_sets_of_pairs_are_ambiguous(dimensions: Any) -> None:
    with pytest.raises(ValueError, match="dimensions mixes plain names"):
        QwenImageBenchMetric(ScriptedEngine()).evaluate("a", [RED, GREEN], dimensions=dimensions)


def test_dimensions_that_are_no_names_are_an_error() -> None:
    with pytest.raises(TypeError, match="dimensions must be names of dimensions, got int"):
        QwenImageBenchMetric(ScriptedEngine()).evaluate("a", RED, dimensions=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [True, 1, 31, -5, 32.5, "1024", None])
def test_the_side_of_large_images_is_checked(side: Any) -> None:
    with pytest.raises(ValueError, match="resize_long_edge must be an int of at least 32, or 0"):
        QwenImageBenchMetric(ScriptedEngine(), resize_long_edge=side)
    with pytest.raises(ValueError, match="resize_long_edge must be"):
        QwenImageBenchMetric.from_pretrained(NOWHERE, resize_long_edge=side)


def test_large_images_are_left_as_they_are_on_request() -> None:
    engine = ScriptedEngine()
    QwenImageBenchMetric(engine, resize_long_edge=0).evaluate("a", PIL.Image.new("RGB", (2000, 300)))
    assert engine.questions[0].content[1].size == (2000, 300)


def test_an_unknown_dimension_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no dimension 'Beauty'; there are Quality, Aesth"):
        QwenImageBenchMetric(ScriptedEngine()).evaluate("a", RED, dimensions="Beauty")


# What is returned


def test_unified_reward_2_returns_the_mean_and_its_parts() -> None:
    text = "Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 4.5"
    metric = UnifiedReward2Metric(ScriptedEngine(text))
    assert metric.evaluate("a", RED) == [
        {"alignment": 2, "coherence": 3, "style": 4.5, "score": 9.5 / 3}
        | {"error": None, "raw_text": text, "finish": "stop", "usage": {}}
    ]
    assert metric.compute("a", RED) == metric.score("a", RED) == metric("a", RED) == [9.5 / 3]
    reward = metric.reward(["a", "b"], torch.rand(2, 3, 32, 32, requires_grad=True))
    assert reward.dtype == torch.float32 and reward.shape == (2,) and not reward.requires_grad


def test_one_image_goes_with_all_prompts_and_lists_must_pair() -> None:
    engine = ScriptedEngine()
    assert len(UnifiedReward2Metric(engine).compute(["a", "b"], RED)) == 2
    with pytest.raises(ValueError, match="got 2 prompts and 3 images"):
        UnifiedReward2Metric(engine).compute(["a", "b"], [RED, RED, RED])


def test_the_task_of_a_metric_holds_for_its_calls_and_a_call_can_change_it() -> None:
    metric = UnifiedRewardEditMetric(
        ScriptedEngine("Edited image 2 is better"), task="edit_pairwise_rank"
    )
    assert metric.compute("a", [RED, GREEN, BLUE]) == [2]
    assert metric.evaluate("a", [RED, GREEN, BLUE])[0]["winner"] == 2
    assert math.isnan(metric.compute("a", [RED, GREEN], task="edit_pointwise_score")[0])
    pair = UnifiedRewardEditMetric(ScriptedEngine("Image 1: 2\nImage 2: -1"))
    assert pair.compute("a", [RED, GREEN, BLUE], task="edit_pairwise_score") == [[2.0, -1.0]]


def test_what_an_edit_scores_is_the_score_of_its_row_in_every_task() -> None:
    cases: list[tuple[str, str, Any]] = [
        ("edit_pairwise_rank", "Edited image 2 is better", 2),
        ("edit_pairwise_rank", "Both edited images are equally good", 0),
        ("edit_pairwise_score", "Image 1: 2\nImage 2: -1", [2.0, -1.0]),
        ("edit_pointwise_score", '{"score": [20, 18]}', 19.0),
    ]
    for task, answer, score in cases:
        images = [RED, GREEN, BLUE] if "pairwise" in task else [RED, GREEN]
        metric = UnifiedRewardEditMetric(ScriptedEngine(answer))
        row = metric.evaluate("a", images, task)[0]
        assert row["score"] == score and row.get("winner", score) == score
        assert metric.compute("a", images, task) == metric(None, images, task) == [score]
        assert type(metric.score("a", images, task=task)[0]) is type(score)
        silent = UnifiedRewardEditMetric(ScriptedEngine("?"))
        unreadable = [None, None] if task == "edit_pairwise_score" else None
        assert silent.evaluate("a", images, task)[0]["score"] == unreadable
        (value,) = silent.compute("a", images, task)
        assert all(map(math.isnan, value if isinstance(value, list) else [value]))


@pytest.mark.parametrize("name", CLASSES)
def test_no_prompt_is_the_empty_prompt(name: str) -> None:
    engine = ScriptedEngine()
    metric: Any = CLASSES[name](engine)
    images: Any = [[RED, GREEN]] * 2 if name == "unified_reward_edit" else [RED, GREEN]
    assert len(metric.evaluate(None, images)) == 2
    asked = [question.content for question in engine.questions]
    engine.questions.clear()
    metric.evaluate("", images)
    texts = [[part for part in content if isinstance(part, str)] for content in asked]
    again = [
        [part for part in question.content if isinstance(part, str)] for question in engine.questions
    ]
    assert texts == again
    assert all("None" not in text for parts in texts for text in parts)


def test_unknown_tasks_and_wrong_numbers_of_images_are_errors() -> None:
    metric = UnifiedRewardEditMetric(ScriptedEngine())
    with pytest.raises(ValueError, match="there is no task 'rank'; there are edit_pointwise_score"):
        metric.evaluate("a", [RED, GREEN], task="rank")
    with pytest.raises(
        ValueError, match=r"takes samples of 2 images \(source, edited\), and sample 0 has 3"
    ):
        metric.evaluate("a", [RED, GREEN, BLUE])
    with pytest.raises(ValueError, match="got 2 prompts and 1 samples"):
        metric.evaluate(["a", "b"], [RED, GREEN])
    with pytest.raises(ValueError, match="both_orders belongs to the pairwise tasks"):
        metric.evaluate("a", [RED, GREEN], both_orders=True)


def test_an_error_of_an_edit_names_the_sample() -> None:
    metric = UnifiedRewardEditMetric(ScriptedEngine())
    good = [RED, GREEN]
    with pytest.raises(ValueError, match=r"source, edited\), and sample 2 has 1"):
        metric.evaluate("a", [good, good, [RED]])
    with pytest.raises(FileNotFoundError, match=r"sample 1: image 1: there is no file 'nofile.png'"):
        metric.evaluate("a", [good, [RED, "nofile.png"]])
    with pytest.raises(TypeError, match="sample 1: image 0 must be a PIL image"):
        metric.evaluate("a", [good, [None, RED]])
    with pytest.raises(ImageError, match=r"sample 1: image 1: a float image must lie in 0..1"):
        metric.evaluate("a", [good, [RED, torch.full((3, 8, 8), 2.0)]])
    with pytest.raises(ImageError, match="sample 1: image 0: one side may be at most 200 times"):
        metric.evaluate("a", [good, [WIDE, RED]])


@pytest.mark.parametrize("name", ["unified_reward_2", "qwen_image_bench"])
def test_an_extreme_aspect_ratio_is_an_error_that_names_the_image(name: str) -> None:
    metric = CLASSES[name](ScriptedEngine())
    with pytest.raises(
        ImageError, match="image 1: one side may be at most 200 times the other, got 1000"
    ):
        metric.evaluate("a", [RED, PIL.Image.new("RGB", (1000, 4))])
    assert len(metric.evaluate("a", [RED, PIL.Image.new("RGB", (800, 4))])) == 2


def test_only_a_part_of_the_pictures_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsynth_metrics.judges.metric._PIXELS_AT_ONCE", 3 * 64 * 64)
    paths = [tmp_path / f"{index}.png" for index in range(8)]
    for path in paths:
        PIL.Image.new("RGB", (64, 64), "red").save(path)
    held: list[int] = []

    class Watching(ScriptedEngine):
        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            pictures = {id(part) for q in questions for part in q.content if not isinstance(part, str)}
            held.append(len(pictures))
            return [Answer("?") for _ in questions]

    UnifiedReward2Metric(Watching()).evaluate("a", paths)
    assert held == [3, 3, 2]
    held.clear()
    UnifiedRewardEditMetric(Watching()).evaluate("a", [[paths[0], path] for path in paths])
    assert len(held) == 8, "a path is a picture of its own each time"
    held.clear()
    QwenImageBenchMetric(Watching()).evaluate([str(index) for index in range(8)], paths[0])
    assert held == [1], "a picture that all prompts share is decoded once"
    held.clear()
    large = tmp_path / "large.png"
    PIL.Image.new("RGB", (640, 640)).save(large)
    UnifiedReward2Metric(Watching()).evaluate("a", [paths[0], large, paths[1]])
    assert held == [1, 1, 1], "one that is larger than the limit is asked about alone"


def test_every_picture_is_looked_at_before_the_first_question(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    WIDE.save(tmp_path / "wide.png")
    for name, message in (("broken.png", "cannot be read"), ("wide.png", "at most 200 times")):
        with pytest.raises(ImageError, match=rf"image 1.*{name}.*{message}"):
            UnifiedReward2Metric(engine).evaluate("a", [RED, tmp_path / name])
    assert engine.questions == []


def test_qwen_image_bench_takes_any_shape_that_it_makes_square() -> None:
    assert len(QwenImageBenchMetric(ScriptedEngine()).evaluate("a", WIDE)) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_a_prompt_that_is_no_text_is_an_error_that_names_it(name: str) -> None:
    images: Any = [[RED, GREEN]] * 2 if name == "unified_reward_edit" else [RED, GREEN]
    with pytest.raises(ValueError, match="prompt 1 is not valid Unicode"):
        CLASSES[name](ScriptedEngine()).evaluate(["a", "b \ud800"], images)


def test_samples_of_an_edit_are_lists_of_images() -> None:
    engine = ScriptedEngine()
    metric = UnifiedRewardEditMetric(engine)
    array = np.asarray(RED)
    assert len(metric.evaluate("a", [RED, array])) == 1
    assert len(metric.evaluate("a", [[RED, GREEN], (BLUE, array)])) == 2
    assert len(metric.evaluate(["a", "b"], [torch.rand(2, 3, 32, 32), [RED, RED]])) == 2
    assert [len(question.content) for question in engine.questions] == [3] * 5


def test_both_orders_ask_again_with_the_images_swapped() -> None:
    engine = ScriptedEngine("Edited image 1 is better", "Edited image 2 is better")
    metric = UnifiedRewardEditMetric(engine, task="edit_pairwise_rank")
    (row,) = metric.evaluate("a", [RED, GREEN, BLUE], both_orders=True)
    sizes = [[part.size for part in question.content[:3]] for question in engine.questions]
    assert sizes == [[RED.size, GREEN.size, BLUE.size], [RED.size, BLUE.size, GREEN.size]]
    assert (row["winner"], row["swapped"]["winner"], row["agreement"]) == (1, 1, True)
    assert row["swapped"]["score"] == 1
    biased = UnifiedRewardEditMetric(
        ScriptedEngine("Edited image 1 is better"), task="edit_pairwise_rank"
    )
    (row,) = biased.evaluate("a", [RED, GREEN, BLUE], both_orders=True)
    assert (row["first"]["winner"], row["swapped"]["winner"], row["agreement"]) == (1, 2, False)
    assert row["winner"] == row["score"] == 0 and row["error"] is None
    assert biased.compute("a", [RED, GREEN, BLUE], both_orders=True) == [0]
    half = UnifiedRewardEditMetric(
        ScriptedEngine("Edited image 1 is better", "?"), task="edit_pairwise_rank"
    )
    (row,) = half.evaluate("a", [RED, GREEN, BLUE], both_orders=True)
    assert (row["winner"], row["score"], row["agreement"]) == (None, None, None)
    assert row["error"].startswith("with the images swapped: ") and row["first"]["winner"] == 1


def test_both_orders_number_scores_as_they_were_passed() -> None:
    engine = ScriptedEngine("Image 1: 3\nImage 2: 1", "Image 1: 0.5\nImage 2: 2")
    metric = UnifiedRewardEditMetric(engine, task="edit_pairwise_score")
    (row,) = metric.evaluate("a", [RED, GREEN, BLUE], both_orders=True)
    assert (row["swapped"]["image_1_score"], row["swapped"]["image_2_score"]) == (2, 0.5)
    assert (row["score"], row["swapped"]["score"]) == ([3, 1], [2, 0.5])
    assert row["agreement"] is True
    silent = UnifiedRewardEditMetric(ScriptedEngine("?"), task="edit_pairwise_score")
    assert silent.evaluate("a", [RED, GREEN, BLUE], both_orders=True)[0]["agreement"] is None


def test_qwen_image_bench_aggregates_level_by_level() -> None:
    quality = (
        '</think>{"Realism": {"Physical Logic": {"score": 2}, "Material Texture": {"score": 0}},'
        '"Detail": {"Noise": {"score": 1}, "Edge Clarity": {"score": "N/A"}},'
        '"Resolution": {"Resolution": {"score": "N/A"}}}'
    )
    alignment = '</think>{"Attributes": {"Color": {"score": 2}}}'
    metric = QwenImageBenchMetric(ScriptedEngine(quality, alignment))
    (row,) = metric.evaluate("a", RED, dimensions=["Quality", "Alignment"])
    assert row["level3_scores"]["Quality"]["Realism"] == {"Physical Logic": 100, "Material Texture": 0}
    assert row["level2_scores"]["Quality"] == {"Realism": 50, "Detail": 60, "Resolution": None}
    assert row["level1_scores"] == {"Quality": 55, "Alignment": 100}
    assert row["score"] == row["total_score"] == 77.5
    assert row["parse_failures"] == [] and row["error"] is None
    assert row["raw_outputs"] == {"Quality": quality, "Alignment": alignment}


def test_a_dimension_that_cannot_be_read_leaves_no_total_but_the_others() -> None:
    metric = QwenImageBenchMetric(ScriptedEngine('</think>{"Noise": {"score": 1}}', "no"))
    (row,) = metric.evaluate("a", RED, dimensions=["Quality", "Alignment"])
    assert row["total_score"] is None
    assert row["level1_scores"] == {"Quality": 60, "Alignment": None}
    assert row["parse_failures"] == ["Alignment"]
    assert row["missing"]["Alignment"] is None
    assert row["errors"] == {"Alignment": "there is no JSON object"}


def test_facets_that_an_answer_leaves_out_are_named_and_not_counted() -> None:
    answer = '</think>{"Detail": {"Noise": {"score": 1}, "Edge Clarity": {"score": "N/A"}}}'
    (row,) = QwenImageBenchMetric(ScriptedEngine(answer)).evaluate("a", RED, dimensions="Quality")
    assert row["missing"] == {
        "Quality": ["Physical Logic", "Material Texture", "Naturalness", "Resolution"]
    }
    assert row["total_score"] == 60


def test_what_does_not_apply_is_left_out_of_the_total() -> None:
    engine = ScriptedEngine('</think>{"Noise": {"score": 1}}', '</think>{"Color": {"score": "N/A"}}')
    (row,) = QwenImageBenchMetric(engine).evaluate("a", RED, dimensions=["Quality", "Alignment"])
    assert (row["total_score"], row["level1_scores"]["Alignment"], row["error"]) == (60, None, None)


@pytest.mark.parametrize("adapter", ["flow_grpo", "set", "official"])
def test_every_judge_is_a_reward(adapter: str) -> None:
    from diffsynth_metrics.rewards import RewardSet, to_flow_grpo

    facets = ("Naturalness", "Composition", "Color", "Animals", "Imagination")  # of each dimension
    checklists = [f'</think>{{"{facet}": {{"score": 1}}}}' for facet in facets]
    judges: list[tuple[Any, str, Any]] = [
        (
            UnifiedReward2Metric,
            "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2",
            None,
        ),
        (UnifiedRewardEditMetric, '{"score": [20, 10], "reasoning": "r"}', [RED, RED]),
        (QwenImageBenchMetric, checklists, None),
    ]
    images = [GREEN, BLUE]
    for judge, answer, sources in judges:
        metric = judge(ScriptedEngine(*(answer if isinstance(answer, list) else [answer])))
        pictures = list(zip(sources, images, strict=True)) if sources else images
        expected = metric.reward(["a", "b"], pictures).tolist()
        assert all(map(math.isfinite, expected))
        if adapter == "set":
            scored = RewardSet({"judge": metric}).score(["a", "b"], images, sources=sources)
            rewards = scored.reward.tolist()
        else:
            scale = "official" if adapter == "official" else None
            reward_fn = to_flow_grpo(metric, scale=scale)()
            more = {"ref_images": sources} if sources else {}
            rewards, _ = reward_fn(images, ["a", "b"], [{}, {}], **more)
        assert rewards == expected, judge


def test_which_of_two_edits_is_better_is_no_reward() -> None:
    metric = UnifiedRewardEditMetric(ScriptedEngine("Edited image 2 is better"))
    for task in ("edit_pairwise_rank", "edit_pairwise_score"):
        with pytest.raises(ValueError, match=f"the task {task} compares two edits"):
            metric.reward("a", [RED, GREEN, BLUE], task)


def test_an_engine_that_loses_an_answer_is_found_out() -> None:
    class Forgetful(ScriptedEngine):
        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            return super().ask(questions)[1:]

    for judge in CLASSES.values():
        with pytest.raises(RuntimeError, match=r"Forgetful gave \d+ answers to \d+ questions"):
            judge(Forgetful()).evaluate("a", [RED, GREEN])


def test_a_task_of_one_image_takes_a_flat_list_and_a_batch() -> None:
    metric = UnifiedRewardEditMetric(
        ScriptedEngine('{"score": [20, 10], "reasoning": "r"}'), task="edit_pointwise_quality"
    )
    batch = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for images in (
        [RED, GREEN, BLUE],
        [[RED], [GREEN], [BLUE]],
        batch,
        list(batch),
        batch.movedim(1, -1).numpy(),
    ):
        assert metric.compute(["a", "b", "c"], images) == [15.0] * 3
    assert metric.compute("a", RED) == metric.compute("a", batch[0]) == [15.0]


def test_a_comma_between_dimensions_with_slashes_is_an_error() -> None:
    metric = QwenImageBenchMetric(ScriptedEngine())
    with pytest.raises(ValueError, match=r"has a comma before 'Alignment': write ;"):
        metric.evaluate("a", RED, dimensions="Quality / Realism, Alignment / Color")
    below = "Quality / Detail, and so on / Noise; Alignment / Color"
    assert metric.evaluate("a", RED, dimensions=below)[0]["dimensions"] == ["Quality", "Alignment"]


def test_components_are_the_numbers_of_the_rows() -> None:
    text = "Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 4"
    metric: Any = UnifiedReward2Metric(ScriptedEngine(text, "Style Score (1-5): 5"))
    assert_numbers(
        metric.components("a", [RED, GREEN]),
        {
            "score": [3, math.nan],
            "alignment": [2, math.nan],
            "coherence": [3, math.nan],
            "style": [4, 5],
        },
    )
    metric = UnifiedRewardEditMetric(ScriptedEngine("Image 1: 2\nImage 2: -1", "?"))
    pairs = [[RED, GREEN, BLUE]] * 2
    assert_numbers(
        metric.components("a", pairs, "edit_pairwise_score"),
        {"image_1_score": [2, math.nan], "image_2_score": [-1, math.nan]},
    )
    metric = UnifiedRewardEditMetric(ScriptedEngine("Edited image 2 is better"))
    assert_numbers(
        metric.components("a", pairs, "edit_pairwise_rank"), {"winner": [2, 2], "score": [2, 2]}
    )
    metric = QwenImageBenchMetric(ScriptedEngine('</think>{"Detail": {"Noise": {"score": 1}}}', "?"))
    assert_numbers(
        metric.components("a", [RED, GREEN], [["Quality", "Alignment"], ["Quality"]]),
        {"score": [math.nan, 60], "Quality": [60, 60], "Alignment": [math.nan, math.nan]},
    )


def assert_numbers(found: dict[str, torch.Tensor], expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name].tolist(), values, equal_nan=True, check_dtype=False)
        assert found[name].dtype == torch.float32 and not found[name].requires_grad


# Loading


@pytest.mark.parametrize("name", CLASSES)
def test_a_tiny_judge_answers_noise_that_cannot_be_read(name: str, judges: dict[str, Any]) -> None:
    row = ask_one(judges[name], "a photo of a cat")[0]
    texts = row["raw_outputs"].values() if name == "qwen_image_bench" else [row["raw_text"]]
    assert any(texts) and all(isinstance(text, str) for text in texts)
    assert row["score"] is None and row["error"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_tiny_judge_has_what_a_server_reads(name: str, folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    settings = GenerationConfig.from_pretrained(folders[name])
    assert settings.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (network,) = AutoConfig.from_pretrained(folders[name]).architectures
    assert network.endswith("ForConditionalGeneration")


def test_every_task_can_be_tried_with_a_tiny_judge(judges: dict[str, Any]) -> None:
    metric = judges["unified_reward_edit"]
    row = metric.evaluate("a", [RED, GREEN, BLUE], task="edit_pairwise_rank", both_orders=True)[0]
    assert row["error"] and row["swapped"]["error"] and row["agreement"] is None
    assert metric.evaluate("a", [RED, GREEN, BLUE], task="edit_pairwise_score")[0]["error"]
    assert metric.evaluate("a", [RED], task="edit_pointwise_quality")[0]["error"]


@pytest.mark.parametrize("name", CLASSES)
def test_the_official_dtype_is_bfloat16_and_frequencies_stay_float32(
    name: str, folders: dict[str, Path]
) -> None:
    metric = CLASSES[name].from_pretrained(ModelConfig(path=folders[name]), device="cpu")
    assert metric.dtype == torch.bfloat16
    buffers = dict(metric.model.named_buffers())
    assert any(buffer.endswith("inv_freq") for buffer in buffers)
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())
    metric.engine.max_new_tokens = 4
    assert ask_one(metric, "a")[0]["finish"]
    assert "LocalEngine" in repr(metric)


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_of_another_architecture_is_an_error(name: str, folders: dict[str, Path]) -> None:
    other = "unified_reward_2" if name == "unified_reward_edit" else "unified_reward_edit"
    with pytest.raises(CheckpointError, match="and this judge is a"):
        CLASSES[name].from_pretrained(ModelConfig(path=folders[other]), device="cpu")


@pytest.mark.parametrize("name", CLASSES)
def test_a_misspelt_argument_is_an_error_and_not_ignored(name: str) -> None:
    with pytest.raises(TypeError, match="has no argument 'batchsize'"):
        CLASSES[name].from_pretrained(batchsize=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_are_checked_before_files_are_looked_for(name: str) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"on_parse_error": "zero"}, ValueError, "on_parse_error must be one of"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive int, got 0"),
        ({"batch_size": True}, ValueError, "batch_size must be a positive int, got True"),
        ({"torch_dtype": torch.int8}, TypeError, "torch_dtype must be one of"),
        ({"processor_config": "folder"}, TypeError, "a config must be a ModelConfig"),
        ({"processor_kwargs": {"local_files_only": True}}, TypeError, "local_files_only"),
        ({"processor_kwargs": ["size"]}, TypeError, "processor_kwargs must be a mapping, got list"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            CLASSES[name].from_pretrained(NOWHERE, **options)


@pytest.mark.parametrize("name", ["unified_reward_2", "unified_reward_edit"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotary_frequencies_that_are_not_computed_here_are_an_error(name: str, kind: str) -> None:
    config = copy.deepcopy(load_prompts("architectures")[name])
    config["text_config"]["rope_parameters"] |= {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    with pytest.raises(CheckpointError, match=f"has the rope_type '{kind}'"):
        build_judge(config, name)


def test_arguments_by_position_have_the_order_of_upstream(folders: dict[str, Path]) -> None:
    cases: dict[str, tuple[Any, ...]] = {
        "unified_reward_2": (7, {}, None),
        "unified_reward_edit": ("edit_pairwise_rank", 7, {}, None),
        "qwen_image_bench": (7, 512, {}, None),
    }
    for name, more in cases.items():
        config = ModelConfig(path=folders[name])
        metric = CLASSES[name].from_pretrained(config, config, torch.float32, "cpu", *more)
        assert metric.engine.max_new_tokens == 7
        assert metric.dtype == torch.float32
        assert getattr(metric, "task", "edit_pairwise_rank") == "edit_pairwise_rank"
        assert getattr(metric, "resize_long_edge", 512) == 512
        with pytest.raises(ValueError, match="does not support another vram_limit than None"):
            CLASSES[name].from_pretrained(config, config, torch.float32, "cpu", *more[:-1], 8.0)


def test_a_judge_asks_an_engine() -> None:
    with pytest.raises(TypeError, match=r"a judge asks an Engine, got Linear; .*from_pretrained\(\)"):
        UnifiedReward2Metric(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_the_batch_size_of_a_judge_is_that_of_its_engine(judges: dict[str, Any]) -> None:
    metric = copy.copy(judges["unified_reward_2"])
    metric.engine = copy.copy(metric.engine)
    assert metric.batch_size == metric.engine.batch_size == 20
    metric.batch_size = 3
    assert metric.engine.batch_size == 3


def test_a_missing_shard_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["unified_reward_2"].iterdir():
        if "00002-of-00002" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        UnifiedReward2Metric.from_pretrained(ModelConfig(path=tmp_path), device="cpu")


def first_logits(metric: Any, prompt: str) -> torch.Tensor:
    """What the network says before the first token of its answer, `[1, V]`."""
    seen: dict[int, list[torch.Tensor]] = {}

    def note(_: Any, __: Any, logits: torch.Tensor) -> None:
        seen.setdefault(threading.get_ident(), []).append(logits[:, -1])

    handle = metric.model.lm_head.register_forward_hook(note)
    try:
        metric.evaluate(prompt, RED)
    finally:
        handle.remove()
    return seen[threading.get_ident()][0]


def test_parts_of_the_network_can_be_placed(folders: dict[str, Path], judges: dict[str, Any]) -> None:
    config = ModelConfig(path=folders["unified_reward_2"])
    expected = first_logits(judges["unified_reward_2"], "a")
    for device_map in ("auto", "cpu", {"model.visual": "cpu", "model": "cpu", "lm_head": "cpu"}):
        metric = UnifiedReward2Metric.from_pretrained(
            config, device_map=device_map, torch_dtype=torch.float32, max_new_tokens=2
        )
        torch.testing.assert_close(first_logits(metric, "a").cpu(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="either device or device_map"):
        UnifiedReward2Metric.from_pretrained(config, device="cpu", device_map="auto")


@pytest.mark.parametrize("judge", [*CLASSES.values(), HPSv3Metric])
@pytest.mark.parametrize(
    ("device_map", "error", "message"),
    [
        ("nonsense", RuntimeError, "the device 'nonsense' cannot be used"),
        ({"": "cuda:99"}, RuntimeError, "the device 'cuda:99' cannot be used"),
        ({"": "disk"}, ValueError, "device_map puts the network on the disk"),
        ({"model": "disk", "": "cpu"}, ValueError, "device_map puts model on the disk"),
        (5, TypeError, "device_map must be a str or map modules to devices, got int"),
    ],
)
def test_a_wrong_device_map_is_an_error_before_files_are_looked_for(
    judge: Any, device_map: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        judge.from_pretrained(ModelConfig(path="nowhere"), device_map=device_map)


def test_the_network_of_a_judge_can_be_replaced(judges: dict[str, Any]) -> None:
    metric = copy.copy(judges["unified_reward_2"])
    metric.engine = copy.copy(metric.engine)
    metric.model = other = copy.deepcopy(metric.model)
    assert metric.engine.model is metric.model is other
    passes: list[int] = []
    other.lm_head.register_forward_hook(lambda *_: passes.append(1))
    metric.evaluate("a", RED)
    assert passes


def test_processor_kwargs_reach_the_processor(folders: dict[str, Path]) -> None:
    metric = UnifiedReward2Metric.from_pretrained(
        ModelConfig(path=folders["unified_reward_2"]),
        device="cpu",
        torch_dtype=torch.float32,
        processor_kwargs={"size": {"shortest_edge": 16384, "longest_edge": 16384}},
        max_new_tokens=1,
    )
    metric.evaluate("a", RED)
    assert metric.engine.processor.image_processor.size["longest_edge"] == 16384


def test_the_limit_of_tokens_is_kept_and_reported(folders: dict[str, Path]) -> None:
    metric = UnifiedReward2Metric.from_pretrained(
        ModelConfig(path=folders["unified_reward_2"]), device="cpu", max_new_tokens=5
    )
    row = metric.evaluate("a", RED)[0]
    assert "cut off by max_new_tokens" in row["error"]
    assert len(metric.engine.processor.tokenizer(row["raw_text"])["input_ids"]) <= 5
    with pytest.raises(ValueError, match="max_new_tokens must be a positive int, got 0"):
        UnifiedReward2Metric.from_pretrained(
            ModelConfig(path=folders["unified_reward_2"]), device="cpu", max_new_tokens=0
        )


# The caller's text is data


@pytest.mark.parametrize("name", CLASSES)
def test_a_special_token_of_the_caller_is_plain_text(name: str, judges: dict[str, Any]) -> None:
    engine = judges[name].engine
    tokenizer = engine.processor.tokenizer
    _, without = asked_and_tokens(engine, name, "a  b")
    for token in SPECIAL:
        _, ids = asked_and_tokens(engine, name, f"a {token} b")
        special = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(special) == without.count(special), token
        assert token in tokenizer.decode(ids).replace("<|image_pad|>" * 2, "")
    assert ask_one(judges[name], " ".join(SPECIAL))[0]["finish"]


def asked_and_tokens(engine: Any, name: str, prompt: str) -> tuple[Question, list[int]]:
    spy = ScriptedEngine()
    ask_one(CLASSES[name](spy), prompt)
    question = spy.questions[0]
    (patches,) = engine._patches([question])
    return question, engine._tokens(question, [grid for _, grid in patches])


@pytest.mark.parametrize("name", CLASSES)
def test_ordinary_text_is_tokenized_as_the_official_processor_does(
    name: str, judges: dict[str, Any]
) -> None:
    engine = judges[name].engine
    endings = {False: "<think>\n\n</think>\n\n", True: "<think>\n", None: "assistant\n"}
    texts = ["a cat", "", "Zwölf  Boxkämpfer\n\n42 \t!", "𝕳ello e\u0301", "\ue000 [x]", "x" * 300]
    for prompt in texts:
        question, ids = asked_and_tokens(engine, name, prompt)
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in question.content
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if question.system is not None:
            messages.insert(0, {"role": "system", "content": question.system})
        switch = {} if question.thinking is None else {"enable_thinking": question.thinking}
        text = engine.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **switch
        )
        images = [part for part in question.content if not isinstance(part, str)]
        official = engine.processor(text=[text], images=images)
        assert ids == list(official["input_ids"][0]), prompt
        assert text.endswith(endings[question.thinking])


# Threads


def test_threads_share_a_judge(judges: dict[str, Any]) -> None:
    metric = judges["unified_reward_2"]
    prompts = [f"{'a cat ' * index}and a dog" for index in range(4)]
    alone = [first_logits(metric, prompt) for prompt in prompts]
    assert not torch.allclose(alone[0], alone[1], atol=0.1), "another prompt, another answer"
    together: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        together[index] = first_logits(metric, prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        torch.testing.assert_close(together[index], alone[index], rtol=1e-4, atol=1e-4)


def test_encoded_pictures_are_judged_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    PIL.Image.new("RGB", (64, 48), "red").save(file)
    engine = ScriptedEngine("Alignment Score (1-5): 4\nCoherence Score (1-5): 4\nStyle Score (1-5): 4")
    metric = UnifiedReward2Metric(engine)
    with file.open("rb") as opened:
        assert metric.compute("a wall", [file, file.read_bytes(), opened]) == [4, 4, 4]
    sizes = [part.size for q in engine.questions for part in q.content if not isinstance(part, str)]
    assert sizes == [(64, 48)] * 3
    assert metric.provenance["engine"] == "ScriptedEngine"

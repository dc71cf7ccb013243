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

from diffsynth_metrics import (
    CheckpointError,
    HPSv3Metric,
    ImageError,
    ModelConfig,
    QwenImageBenchMetric,
    UnifiedReward2Metric,
    UnifiedRewardEditMetric,
)
from diffsynth_metrics.judges.architectures import build_judge, judge_config
from diffsynth_metrics.judges.engine import Answer, Engine, Question
from diffsynth_metrics.judges.metric import JudgeMetric, load_prompts
from diffsynth_metrics.rewards import RewardSet, to_flow_grpo
from diffsynth_metrics.testing import tiny_checkpoint

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


class Scripted(Engine):
    """Remembers the questions and gives scripted answers."""

    def __init__(self, *answers: str) -> None:
        self.answers = answers or ("",)
        self.questions: list[Question] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        first = len(self.questions)
        self.questions += questions
        return [Answer(self.answers[(first + i) % len(self.answers)]) for i in range(len(questions))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    return {name: tiny_checkpoint(name, root / name) for name in CLASSES}


@pytest.fixture(scope="module")
def judges(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        name: CLASSES[name].from_pretrained(
            ModelConfig(path=folder), device="cpu", torch_dtype=torch.float32, max_new_tokens=80
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
    engine = Scripted()
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
    engine = Scripted()
    UnifiedRewardEditMetric(engine).evaluate("make it {instruction}", images, task=task)
    (question,) = engine.questions
    *pictures, text = question.content
    assert [picture.size for picture in pictures] == [image.size for image in images]
    prompts = load_prompts("unified_reward_edit")
    official = prompts["user"][task] if task in prompts["user"] else prompts[task]["user"]
    assert text == official.replace("{instruction}", "make it {instruction}")
    assert (question.system, question.thinking, question.repetition_penalty) == (None, None, 1.0)


def test_qwen_image_bench_asks_one_question_per_dimension() -> None:
    engine = Scripted()
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
    engine = Scripted()
    metric = QwenImageBenchMetric(engine)
    for size in ((1024, 1024), (1024, 300), (1025, 300), (300, 2000)):
        metric.evaluate("a", PIL.Image.effect_noise(size, 90), dimensions="Quality")
    sizes = [question.content[1].size for question in engine.questions]
    assert sizes == [(1024, 1024), (1024, 300), (1024, 1024), (1024, 1024)]
    large = PIL.Image.effect_noise((1025, 300), 90).convert("RGB")
    metric.evaluate("a", large, dimensions="Quality")
    expected = large.resize((1024, 1024), PIL.Image.Resampling.LANCZOS)
    assert np.array_equal(np.array(engine.questions[-1].content[1]), np.array(expected))


@pytest.mark.parametrize(
    ("dimensions", "asked"),
    [
        ("Quality", ["Quality"]),
        ("quality, Alignment", ["Quality", "Alignment"]),
        (["Alignment", "Alignment"], ["Alignment"]),
        ({"Aesthetics": 1}, ["Aesthetics"]),
        (
            "Quality / Realism / Physical Logic; Aesthetics / Color Harmony / Color Harmony; "
            "Quality / Detail / Noise",
            ["Quality", "Aesthetics"],
        ),
        (["Real-world Fidelity"], ["Real-world Fidelity"]),
    ],
)
def test_dimensions_are_selected(dimensions: Any, asked: list[str]) -> None:
    row = QwenImageBenchMetric(Scripted()).evaluate("a", RED, dimensions=dimensions)[0]
    assert row["dimensions"] == asked == list(row["raw_outputs"])


def test_each_pair_may_have_dimensions_of_its_own() -> None:
    metric = QwenImageBenchMetric(Scripted())
    rows = metric.evaluate("a", [RED, GREEN], dimensions=["Quality / Detail / Noise", ["Alignment"]])
    assert [row["dimensions"] for row in rows] == [["Quality"], ["Alignment"]]
    with pytest.raises(ValueError, match="got 1 sets of dimensions for 2 pairs"):
        metric.evaluate("a", [RED, GREEN], dimensions=[["Quality"]])
    rows = metric.evaluate("a", [RED, GREEN], dimensions=["Quality, Aesthetics", None])
    assert [len(row["dimensions"]) for row in rows] == [2, 5]


def test_a_list_of_names_is_one_set_for_all_pairs() -> None:
    rows = QwenImageBenchMetric(Scripted()).evaluate(
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
        QwenImageBenchMetric(Scripted()).evaluate("a", [RED, GREEN], dimensions=dimensions)


def test_dimensions_that_are_no_names_are_an_error() -> None:
    with pytest.raises(TypeError, match="dimensions must be names of dimensions, got int"):
        QwenImageBenchMetric(Scripted()).evaluate("a", RED, dimensions=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [True, 1, 31, -5, 32.5, "1024", None])
def test_the_side_of_large_images_is_checked(side: Any) -> None:
    with pytest.raises(ValueError, match="resize_long_edge must be an int of at least 32, or 0"):
        QwenImageBenchMetric(Scripted(), resize_long_edge=side)
    with pytest.raises(ValueError, match="resize_long_edge must be"):
        QwenImageBenchMetric.from_pretrained(NOWHERE, resize_long_edge=side)


def test_large_images_are_left_as_they_are_on_request() -> None:
    engine = Scripted()
    QwenImageBenchMetric(engine, resize_long_edge=0).evaluate("a", PIL.Image.new("RGB", (2000, 300)))
    assert engine.questions[0].content[1].size == (2000, 300)


def test_an_unknown_dimension_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no dimension 'Beauty'; there are Quality, Aesth"):
        QwenImageBenchMetric(Scripted()).evaluate("a", RED, dimensions="Beauty")


# What is returned


def test_unified_reward_2_returns_the_mean_and_its_parts() -> None:
    text = "Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 4.5"
    metric = UnifiedReward2Metric(Scripted(text))
    assert metric.evaluate("a", RED) == [
        {"alignment": 2, "coherence": 3, "style": 4.5, "score": 9.5 / 3}
        | {"error": None, "raw_text": text, "finish": "stop"}
    ]
    assert metric.compute("a", RED) == metric.score("a", RED) == metric("a", RED) == [9.5 / 3]
    reward = metric.reward(["a", "b"], torch.rand(2, 3, 32, 32, requires_grad=True))
    assert reward.dtype == torch.float32 and reward.shape == (2,) and not reward.requires_grad


def test_one_image_goes_with_all_prompts_and_lists_must_pair() -> None:
    engine = Scripted()
    assert len(UnifiedReward2Metric(engine).compute(["a", "b"], RED)) == 2
    with pytest.raises(ValueError, match="got 2 prompts and 3 images"):
        UnifiedReward2Metric(engine).compute(["a", "b"], [RED, RED, RED])


def test_the_task_of_a_metric_holds_for_its_calls_and_a_call_can_change_it() -> None:
    metric = UnifiedRewardEditMetric(Scripted("Edited image 2 is better"), task="edit_pairwise_rank")
    assert metric.compute("a", [RED, GREEN, BLUE]) == [2.0]
    assert metric.evaluate("a", [RED, GREEN, BLUE])[0]["winner"] == 2
    assert math.isnan(metric.compute("a", [RED, GREEN], task="edit_pointwise_score")[0])
    assert metric.reward("a", [RED, GREEN, BLUE]).tolist() == [2.0]
    pair = UnifiedRewardEditMetric(Scripted("Image 1: 2\nImage 2: -1"))
    assert pair.compute("a", [RED, GREEN, BLUE], task="edit_pairwise_score") == [[2.0, -1.0]]


def test_unknown_tasks_and_wrong_numbers_of_images_are_errors() -> None:
    metric = UnifiedRewardEditMetric(Scripted())
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
    metric = UnifiedRewardEditMetric(Scripted())
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
    metric = CLASSES[name](Scripted())
    with pytest.raises(
        ImageError, match="image 1: one side may be at most 200 times the other, got 1000"
    ):
        metric.evaluate("a", [RED, PIL.Image.new("RGB", (1000, 4))])
    assert len(metric.evaluate("a", [RED, PIL.Image.new("RGB", (800, 4))])) == 2


def test_qwen_image_bench_takes_any_shape_that_it_makes_square() -> None:
    assert len(QwenImageBenchMetric(Scripted()).evaluate("a", WIDE)) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_a_prompt_that_is_no_text_is_an_error_that_names_it(name: str) -> None:
    images: Any = [[RED, GREEN]] * 2 if name == "unified_reward_edit" else [RED, GREEN]
    with pytest.raises(ValueError, match="prompt 1 is not valid Unicode"):
        CLASSES[name](Scripted()).evaluate(["a", "b \ud800"], images)


def test_samples_of_an_edit_are_lists_of_images() -> None:
    engine = Scripted()
    metric = UnifiedRewardEditMetric(engine)
    array = np.asarray(RED)
    assert len(metric.evaluate("a", [RED, array])) == 1
    assert len(metric.evaluate("a", [[RED, GREEN], (BLUE, array)])) == 2
    assert len(metric.evaluate(["a", "b"], [torch.rand(2, 3, 32, 32), [RED, RED]])) == 2
    assert [len(question.content) for question in engine.questions] == [3] * 5


def test_both_orders_ask_again_with_the_images_swapped() -> None:
    engine = Scripted("Edited image 1 is better", "Edited image 2 is better")
    metric = UnifiedRewardEditMetric(engine, task="edit_pairwise_rank")
    (row,) = metric.evaluate("a", [RED, GREEN, BLUE], both_orders=True)
    sizes = [[part.size for part in question.content[:3]] for question in engine.questions]
    assert sizes == [[RED.size, GREEN.size, BLUE.size], [RED.size, BLUE.size, GREEN.size]]
    assert (row["winner"], row["swapped"]["winner"], row["agreement"]) == (1, 1, True)
    biased = UnifiedRewardEditMetric(Scripted("Edited image 1 is better"), task="edit_pairwise_rank")
    (row,) = biased.evaluate("a", [RED, GREEN, BLUE], both_orders=True)
    assert (row["winner"], row["swapped"]["winner"], row["agreement"]) == (1, 2, False)


def test_both_orders_number_scores_as_they_were_passed() -> None:
    engine = Scripted("Image 1: 3\nImage 2: 1", "Image 1: 0.5\nImage 2: 2")
    metric = UnifiedRewardEditMetric(engine, task="edit_pairwise_score")
    (row,) = metric.evaluate("a", [RED, GREEN, BLUE], both_orders=True)
    assert (row["swapped"]["image_1_score"], row["swapped"]["image_2_score"]) == (2, 0.5)
    assert row["agreement"] is True
    silent = UnifiedRewardEditMetric(Scripted("?"), task="edit_pairwise_score")
    assert silent.evaluate("a", [RED, GREEN, BLUE], both_orders=True)[0]["agreement"] is None


def test_qwen_image_bench_aggregates_level_by_level() -> None:
    quality = (
        '</think>{"Realism": {"Physical Logic": {"score": 2}, "Material Texture": {"score": 0}},'
        '"Detail": {"Noise": {"score": 1}, "Edge Clarity": {"score": "N/A"}},'
        '"Resolution": {"Resolution": {"score": "N/A"}}}'
    )
    alignment = '</think>{"Attributes": {"Color": {"score": 2}}}'
    metric = QwenImageBenchMetric(Scripted(quality, alignment))
    (row,) = metric.evaluate("a", RED, dimensions=["Quality", "Alignment"])
    assert row["level3_scores"]["Quality"]["Realism"] == {"Physical Logic": 100, "Material Texture": 0}
    assert row["level2_scores"]["Quality"] == {"Realism": 50, "Detail": 60, "Resolution": None}
    assert row["level1_scores"] == {"Quality": 55, "Alignment": 100}
    assert row["score"] == row["total_score"] == 77.5
    assert row["parse_failures"] == [] and row["error"] is None
    assert row["raw_outputs"] == {"Quality": quality, "Alignment": alignment}


def test_a_dimension_that_cannot_be_read_leaves_no_total_but_the_others() -> None:
    metric = QwenImageBenchMetric(Scripted('</think>{"Noise": {"score": 1}}', "no"))
    (row,) = metric.evaluate("a", RED, dimensions=["Quality", "Alignment"])
    assert row["total_score"] is None
    assert row["level1_scores"] == {"Quality": 60, "Alignment": None}
    assert row["parse_failures"] == ["Alignment"]
    assert row["missing"]["Alignment"] is None
    assert row["errors"] == {"Alignment": "there is no JSON object"}


def test_facets_that_an_answer_leaves_out_are_named_and_not_counted() -> None:
    answer = '</think>{"Detail": {"Noise": {"score": 1}, "Edge Clarity": {"score": "N/A"}}}'
    (row,) = QwenImageBenchMetric(Scripted(answer)).evaluate("a", RED, dimensions="Quality")
    assert row["missing"] == {
        "Quality": ["Physical Logic", "Material Texture", "Naturalness", "Resolution"]
    }
    assert row["total_score"] == 60


def test_what_does_not_apply_is_left_out_of_the_total() -> None:
    engine = Scripted('</think>{"Noise": {"score": 1}}', '</think>{"Color": {"score": "N/A"}}')
    (row,) = QwenImageBenchMetric(engine).evaluate("a", RED, dimensions=["Quality", "Alignment"])
    assert (row["total_score"], row["level1_scores"]["Alignment"], row["error"]) == (60, None, None)


@pytest.mark.parametrize("adapter", ["flow_grpo", "set", "official"])
def test_every_judge_is_a_reward(adapter: str) -> None:
    checklist = '</think>{"Realism": {"Naturalness": {"score": 1}}}'
    judges: list[tuple[Any, str, Any]] = [
        (
            UnifiedReward2Metric,
            "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2",
            [RED, GREEN],
        ),
        (UnifiedRewardEditMetric, '{"score": [20, 10], "reasoning": "r"}', [[RED, GREEN], [RED, BLUE]]),
        (QwenImageBenchMetric, checklist, [RED, GREEN]),
    ]
    for judge, answer, images in judges:
        metric = judge(Scripted(answer))
        expected = metric.reward(["a", "b"], images).tolist()
        assert all(map(math.isfinite, expected))
        if adapter == "set":
            rewards = RewardSet({"judge": metric}).score(["a", "b"], images).reward.tolist()
        else:
            scale = "official" if adapter == "official" else None
            rewards, _ = to_flow_grpo(metric, scale=scale)()(images, ["a", "b"], [{}, {}])
        assert rewards == expected, judge


def test_an_engine_that_loses_an_answer_is_found_out() -> None:
    class Forgetful(Scripted):
        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            return super().ask(questions)[1:]

    for judge in CLASSES.values():
        with pytest.raises(RuntimeError, match=r"Forgetful gave \d+ answers to \d+ questions"):
            judge(Forgetful()).evaluate("a", [RED, GREEN])


def test_a_task_of_one_image_takes_a_flat_list_and_a_batch() -> None:
    metric = UnifiedRewardEditMetric(
        Scripted('{"score": [20, 10], "reasoning": "r"}'), task="edit_pointwise_quality"
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
    metric = QwenImageBenchMetric(Scripted())
    with pytest.raises(ValueError, match=r"has a comma before 'Alignment': write ;"):
        metric.evaluate("a", RED, dimensions="Quality / Realism, Alignment / Color")
    below = "Quality / Detail, and so on / Noise; Alignment / Color"
    assert metric.evaluate("a", RED, dimensions=below)[0]["dimensions"] == ["Quality", "Alignment"]


# Loading


@pytest.mark.parametrize("name", CLASSES)
def test_a_tiny_judge_answers_in_its_metrics_form(name: str, judges: dict[str, Any]) -> None:
    row = ask_one(judges[name], "a photo of a cat")[0]
    assert row["error"] is None, row


def test_every_task_can_be_tried_with_a_tiny_judge(judges: dict[str, Any]) -> None:
    metric = judges["unified_reward_edit"]
    row = metric.evaluate("a", [RED, GREEN, BLUE], task="edit_pairwise_rank", both_orders=True)[0]
    assert row["winner"] in (1, 2) and row["agreement"] is not None
    assert metric.evaluate("a", [RED, GREEN, BLUE], task="edit_pairwise_score")[0]["error"] is None
    assert metric.evaluate("a", [RED], task="edit_pointwise_quality")[0]["error"] is None


@pytest.mark.parametrize("name", CLASSES)
def test_the_official_dtype_is_bfloat16_and_frequencies_stay_float32(
    name: str, folders: dict[str, Path]
) -> None:
    metric = CLASSES[name].from_pretrained(ModelConfig(path=folders[name]), device="cpu")
    assert metric.dtype == torch.bfloat16
    buffers = dict(metric.model.named_buffers())
    assert any(buffer.endswith("inv_freq") for buffer in buffers)
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())
    assert ask_one(metric, "a")[0]["raw_text" if name != "qwen_image_bench" else "raw_outputs"]
    assert "LocalEngine" in repr(metric)


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_of_another_architecture_is_an_error(name: str, folders: dict[str, Path]) -> None:
    other = "unified_reward_2" if name == "unified_reward_edit" else "unified_reward_edit"
    with pytest.raises(CheckpointError, match="and this judge is a"):
        CLASSES[name].from_pretrained(ModelConfig(path=folders[other]), device="cpu")


@pytest.mark.parametrize("name", CLASSES)
def test_a_misspelt_argument_is_an_error_and_not_ignored(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected argument 'batchsize'"):
        CLASSES[name].from_pretrained(batchsize=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_parse_error": "zero"}, ValueError, "on_parse_error must be one of"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive int, got 0"),
        ({"batch_size": True}, ValueError, "batch_size must be a positive int, got True"),
        ({"torch_dtype": torch.int8}, TypeError, "torch_dtype must be one of"),
        ({"processor_config": "folder"}, TypeError, "a config must be a ModelConfig"),
        ({"processor_kwargs": {"local_files_only": True}}, TypeError, "local_files_only"),
        ({"processor_kwargs": ["size"]}, TypeError, "processor_kwargs must be a mapping, got list"),
    ],
)
def test_arguments_are_checked_before_files_are_looked_for(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CLASSES[name].from_pretrained(NOWHERE, **options)


@pytest.mark.parametrize(
    "published", [UnifiedReward2Metric.published, UnifiedRewardEditMetric.published]
)
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotary_frequencies_that_are_not_computed_here_are_an_error(published: Any, kind: str) -> None:
    config = published().to_dict()
    config["text_config"]["rope_parameters"] |= {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    with pytest.raises(CheckpointError, match=f"has the rope_type '{kind}'"):
        build_judge(judge_config(config, published()))


def test_a_missing_shard_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["unified_reward_2"].iterdir():
        if "00002-of-00002" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        UnifiedReward2Metric.from_pretrained(ModelConfig(path=tmp_path), device="cpu")


def test_parts_of_the_network_can_be_placed(folders: dict[str, Path], judges: dict[str, Any]) -> None:
    config = ModelConfig(path=folders["unified_reward_2"])
    for device_map in ("auto", "cpu", {"model.visual": "cpu", "model": "cpu", "lm_head": "cpu"}):
        metric = UnifiedReward2Metric.from_pretrained(
            config, device_map=device_map, torch_dtype=torch.float32, max_new_tokens=80
        )
        assert metric.evaluate("a", RED) == judges["unified_reward_2"].evaluate("a", RED)
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
    before = metric.evaluate("a", RED)
    metric.model = other = copy.deepcopy(metric.model)
    assert metric.engine.model is other and metric.evaluate("a", RED) == before


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
@pytest.mark.parametrize("token", SPECIAL)
def test_a_special_token_of_the_caller_is_plain_text(
    name: str, token: str, judges: dict[str, Any]
) -> None:
    engine = judges[name].engine
    spy = Scripted()
    ask_one(CLASSES[name](spy), f"a {token} b")
    question = spy.questions[0]
    ids = engine._prompts([question])[0].ids
    spy.questions.clear()
    ask_one(CLASSES[name](spy), "a  b")
    without = engine._prompts([spy.questions[0]])[0].ids
    special = engine.processor.tokenizer.convert_tokens_to_ids(token)
    assert ids.count(special) == without.count(special)
    assert token in engine.processor.tokenizer.decode(ids).replace("<|image_pad|>" * 2, "")
    assert isinstance(judges[name].evaluate(f"a {token} b", *images_of(name))[0], dict)


def images_of(name: str) -> tuple[Any]:
    return ([RED, GREEN],) if name == "unified_reward_edit" else (RED,)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "prompt", ["a cat", "", "Zwölf  Boxkämpfer\n\n42 \t!", "𝕳ello e\u0301", "\ue000 [x]", "x" * 300]
)
def test_ordinary_text_is_tokenized_as_the_official_processor_does(
    name: str, prompt: str, judges: dict[str, Any]
) -> None:
    engine = judges[name].engine
    spy = Scripted()
    ask_one(CLASSES[name](spy), prompt)
    question = spy.questions[0]
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in question.content
    ]
    messages = [{"role": "user", "content": content}]
    if question.system is not None:
        messages.insert(0, {"role": "system", "content": question.system})  # type: ignore[dict-item]
    switch = {} if question.thinking is None else {"enable_thinking": question.thinking}
    text = engine.processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **switch
    )
    images = [part for part in question.content if not isinstance(part, str)]
    official = engine.processor(text=[text], images=images)
    assert engine._prompts([question])[0].ids == list(official["input_ids"][0])
    ending = {False: "<think>\n\n</think>\n\n", True: "<think>\n", None: "assistant\n"}
    assert text.endswith(ending[question.thinking])


# Threads


def test_threads_share_a_judge(judges: dict[str, Any]) -> None:
    metric = judges["unified_reward_2"]
    prompts = [f"{'a cat ' * index}and a dog" for index in range(4)]
    alone = [metric.evaluate(prompt, RED)[0] for prompt in prompts]
    together: dict[int, dict[str, Any]] = {}

    def work(index: int) -> None:
        together[index] = metric.evaluate(prompts[index], RED)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(4)] == alone

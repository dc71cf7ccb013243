"""Batches are decoded greedily, and never change a token (float32, random networks).

Answers are compared with those that transformers' own processor and generation give to each question
alone, up to the first token where another one is nearly as likely: there, a batch that rounds otherwise
may choose the other.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.utils import logging as transformers_logging

from diffsynth_metrics import ModelConfig, UnifiedReward2Metric, UnifiedRewardEditMetric
from diffsynth_metrics.judges import local
from diffsynth_metrics.judges.engine import Answer, Question
from diffsynth_metrics.judges.local import LocalEngine
from diffsynth_metrics.testing import randomize, tiny_checkpoint

FAMILIES = {"qwen3_5": "unified_reward_2", "qwen3_vl": "unified_reward_edit"}
CLASSES = {"qwen3_5": UnifiedReward2Metric, "qwen3_vl": UnifiedRewardEditMetric}
SIZES = [(64, 64), (200, 100), (150, 300), (90, 700), (33, 61)]
WORDS = "a cat dog red score image of the on 42 ( , Quality".split()
NEW_TOKENS = 24
CLEAR = 1e-3  # of the spread of the logits; rounding is below a hundredth of it


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoding")
    return {family: tiny_checkpoint(name, root / family) for family, name in FAMILIES.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LocalEngine:
    """An engine with widely random weights, whose answers differ from picture to picture."""
    metric = CLASSES[request.param].from_pretrained(
        ModelConfig(path=folders[request.param]),
        device="cpu",
        torch_dtype=torch.float32,
        max_new_tokens=NEW_TOKENS,
    )
    randomize(metric.model, seed=7)
    assert isinstance(metric.engine, LocalEngine)
    return metric.engine


@pytest.fixture
def engine(loaded: LocalEngine) -> LocalEngine:
    """An engine whose settings a test may change."""
    return copy.copy(loaded)


def picture(seed: int) -> PIL.Image.Image:
    width, height = SIZES[seed % len(SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def mixed_questions(count: int, penalty: float = 1.0) -> list[Question]:
    """Questions with none to three pictures, short and long texts, and sometimes a system prompt."""
    rng = random.Random(0)
    return [
        Question(
            content=(
                *(picture(100 * seed + i + seed // 4) for i in range(seed % 4)),
                " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 40, 200]))),
            ),
            system="You judge." if seed % 3 == 0 else None,
            repetition_penalty=penalty,
        )
        for seed in range(count)
    ]


@dataclass(frozen=True)
class Expected:
    """What one question alone is answered, and how many tokens of it are clear choices."""

    tokens: list[int]
    clear: int


def alone(engine: LocalEngine, question: Question) -> Expected:
    """Ask transformers' own processor and greedy generation."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in question.content
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if question.system is not None:
        messages.insert(0, {"role": "system", "content": question.system})
    text = engine.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [part for part in question.content if not isinstance(part, str)]
    inputs = engine.processor(text=[text], images=images or None, return_tensors="pt")
    made = engine.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=question.repetition_penalty,
        eos_token_id=sorted(engine._stop_ids),
        pad_token_id=engine._pad_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens: list[int] = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    scores = torch.cat(made.scores)
    best = scores.topk(2).values
    margins = (best[:, 0] - best[:, 1]) / scores.std(dim=1)
    unclear = (margins < CLEAR).nonzero().flatten().tolist()
    return Expected(tokens, unclear[0] if unclear else len(tokens))


def assert_agree(engine: LocalEngine, answers: list[Answer], expected: list[Expected]) -> None:
    """Compare answers with those that each question has alone."""
    assert len(answers) == len(expected)
    for answer, wanted in zip(answers, expected, strict=True):
        if wanted.clear == len(wanted.tokens):
            assert answer == engine._answer(wanted.tokens)
        else:
            start = engine._answer(wanted.tokens[: wanted.clear]).text
            assert answer.text.startswith(start.rstrip("\ufffd")), "half a character"
    assert sum(wanted.clear for wanted in expected) > 0.7 * sum(len(e.tokens) for e in expected)


def assert_as_alone(engine: LocalEngine, questions: list[Question]) -> list[Expected]:
    """Ask, and compare with what each question is answered alone."""
    expected = [alone(engine, question) for question in questions]
    assert_agree(engine, engine.ask(questions), expected)
    return expected


@contextmanager
def batches(engine: LocalEngine) -> Iterator[list[int]]:
    """Note how many answers are decoded at once, in each pass through the network."""
    rows: list[int] = []
    handle = engine.model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(len(logits)))
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize(("count", "penalty"), [(32, 1.0), (12, 1.05)])
def test_a_batch_answers_as_each_question_alone(engine: LocalEngine, count: int, penalty: float) -> None:
    questions = mixed_questions(count, penalty)
    engine.batch_size = count
    with batches(engine) as rows:
        answers = engine.ask(questions)
    assert set(rows) == {count} and len(rows) <= NEW_TOKENS
    assert_agree(engine, answers, [alone(engine, question) for question in questions])
    assert len({answer.text for answer in answers}) > 0.8 * count, "answers depend on the question"


def test_the_batch_size_is_kept_and_does_not_change_answers_or_their_order(engine: LocalEngine) -> None:
    questions = mixed_questions(10)
    expected = [alone(engine, question) for question in questions]
    for engine.batch_size in (1, 3, 20):
        with batches(engine) as rows:
            answers = engine.ask(questions)
        assert max(rows) == min(engine.batch_size, 10)
        assert_agree(engine, answers, expected)
    assert engine.ask([]) == []


def test_every_question_has_its_own_repetition_penalty(engine: LocalEngine) -> None:
    questions = mixed_questions(8)
    for position in (1, 2, 6):
        questions[position] = replace(questions[position], repetition_penalty=1.5)
    assert_as_alone(engine, questions)


def test_the_repetition_penalty_does_not_count_padding(engine: LocalEngine) -> None:
    engine.model = copy.deepcopy(engine.model)
    with torch.no_grad():  # so that whether it is penalised makes a difference
        engine.model.lm_head.weight[engine._pad_id] *= 3
    questions = mixed_questions(12, penalty=20.0)
    expected = assert_as_alone(engine, questions)
    assert any(engine._pad_id in answer.tokens for answer in expected)


def test_answers_end_at_a_stop_token_and_say_so(engine: LocalEngine) -> None:
    questions = mixed_questions(8)
    whole = [alone(engine, question).tokens for question in questions]
    engine._stop_ids |= {answer[5 + index] for index, answer in enumerate(whole) if len(answer) > 15}
    expected = assert_as_alone(engine, questions)
    assert len({len(answer.tokens) for answer in expected}) > 2, "rows end at different times"
    engine._stop_ids = frozenset({engine._pad_id})
    engine.max_new_tokens = 5
    assert {answer.finish for answer in engine.ask(questions)} == {"length"}


def test_the_same_question_again_has_the_same_answer(engine: LocalEngine) -> None:
    questions = mixed_questions(6)
    assert engine.ask(questions) == engine.ask(questions)


def test_a_picture_that_questions_share_is_prepared_once(engine: LocalEngine) -> None:
    shared = picture(3)
    questions = [
        Question(content=("A cat", shared, "b")),
        Question(content=(shared, "b longer")),
        Question(content=("a cat",)),
        Question(content=(shared, picture(4), "b")),
        Question(content=(shared, "b", shared)),
    ]
    prepared: list[list[PIL.Image.Image]] = []
    processor = copy.copy(engine.processor)
    official = processor.image_processor

    class Watching:
        merge_size = official.merge_size

        def __call__(self, images: list[PIL.Image.Image], **options: Any) -> Any:
            prepared.append(images)
            return official(images=images, **options)

    processor.image_processor = Watching()
    watched = copy.copy(engine)
    watched.processor = processor
    answers = watched.ask(questions)
    assert [len(images) for images in prepared] == [2]
    assert_agree(engine, answers, [alone(engine, question) for question in questions])


# What belongs to the caller


def test_the_networks_own_settings_are_neither_used_nor_changed(engine: LocalEngine) -> None:
    questions = mixed_questions(4)
    expected = engine.ask(questions)
    engine.model = copy.deepcopy(engine.model)
    own = engine.model.generation_config
    own.update(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.3, max_new_tokens=2)
    before = own.to_dict()
    assert engine.ask(questions) == expected
    assert engine.model.generation_config is own and own.to_dict() == before


def test_transformers_has_nothing_to_say(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    transformers_logging.warning_once.cache_clear()  # else what was said before is not said again
    root = transformers_logging.get_logger("transformers")
    root.addHandler(handler)
    level = root.level
    try:
        for family, metric in CLASSES.items():
            judge = metric.from_pretrained(
                ModelConfig(path=folders[family]), device="cpu", max_new_tokens=2
            )
            judge.engine.ask(mixed_questions(4, 1.05))
        assert said == []
        assert root.level == level
        for name in ("integrations.hub_kernels", "models.qwen3_5.modeling_qwen3_5"):
            logging.getLogger(f"transformers.{name}").warning("`x` is not installed")
        assert len(said) == 2, "others are not silenced"
    finally:
        root.removeHandler(handler)


def test_missing_kernels_are_one_line_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    local._name_missing_kernels.cache_clear()
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    for _ in range(3):
        for device in ("cpu", "cuda"):
            local._name_missing_kernels(device)
    (record,) = caplog.records
    assert "pip install flash-linear-attention causal-conv1d" in record.getMessage()
    local._name_missing_kernels.cache_clear()

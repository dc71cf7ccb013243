"""Decoding is greedy, and what makes it faster never changes a token (float32, random networks)."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.cache_utils import DynamicLayer

from diffsynth_metrics import ModelConfig, UnifiedReward2Metric, UnifiedRewardEditMetric
from diffsynth_metrics.judges.decoding import Prompt, RoomyLayer, decode_greedily
from diffsynth_metrics.judges.engine import Question
from diffsynth_metrics.judges.local import LocalEngine
from diffsynth_metrics.metrics.unified_reward_2 import draft_scores
from diffsynth_metrics.testing import randomize, tiny_checkpoint

FAMILIES = {"qwen3_5": "unified_reward_2", "qwen3_vl": "unified_reward_edit"}
CLASSES = {"qwen3_5": UnifiedReward2Metric, "qwen3_vl": UnifiedRewardEditMetric}
SIZES = [(64, 64), (200, 100), (150, 300), (90, 700), (33, 61)]
WORDS = "a cat dog red score image of the on 42 ( , Quality".split()
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoding")
    return {family: tiny_checkpoint(name, root / family) for family, name in FAMILIES.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LocalEngine:
    """An engine with widely random weights, whose answers differ from picture to picture."""
    metric = CLASSES[request.param].from_pretrained(
        ModelConfig(path=folders[request.param]), device="cpu", torch_dtype=torch.float32
    )
    randomize(metric.model, seed=7)
    assert isinstance(metric.engine, LocalEngine)
    metric.engine.max_new_tokens = NEW_TOKENS
    return metric.engine


def picture(seed: int) -> PIL.Image.Image:
    width, height = SIZES[seed % len(SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def mixed_questions(count: int, penalty: float = 1.0) -> list[Question]:
    rng = random.Random(0)
    return [
        Question(
            content=(*(picture(100 * seed + i) for i in range(1 + seed % 3)), words(rng, 40)),
            repetition_penalty=penalty,
        )
        for seed in range(count)
    ]


def questions_with_shared_prefixes(pictures: int, penalty: float) -> list[Question]:
    endings = [words(random.Random(seed), 10 + 25 * seed) for seed in range(5)]
    return [
        Question(
            content=(words(random.Random(seed), 30), image, "\n\n# Evaluation Dimension\n" + ending),
            system="You judge.",
            repetition_penalty=penalty,
        )
        for seed, image in enumerate(map(picture, range(pictures)))
        for ending in endings
    ]


def decode(engine: LocalEngine, prompts: list[Prompt], **options: Any) -> list[list[int]]:
    with torch.no_grad():
        return decode_greedily(
            engine.model,
            prompts,
            max_new_tokens=NEW_TOKENS,
            stop_ids=engine._stop_ids,
            pad_id=engine._pad_id,
            device=torch.device("cpu"),
            **options,
        )


def one_by_one(engine: LocalEngine, prompts: list[Prompt]) -> list[list[int]]:
    return [decode(engine, [prompt])[0] for prompt in prompts]


def by_transformers(engine: LocalEngine, prompt: Prompt) -> list[int]:
    """Return what transformers' own greedy generation gives."""
    ids = torch.tensor([prompt.ids])
    tokens = engine.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == engine._image_id).int(),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=prompt.repetition_penalty,
        eos_token_id=sorted(engine._stop_ids),
        pad_token_id=engine._pad_id,
    )
    answer: list[int] = tokens[0, len(prompt.ids) :].tolist()
    return answer


@contextmanager
def counted(engine: LocalEngine) -> Iterator[list[int]]:
    """Count the passes through the network."""
    passes = [0]

    def count(*_: object) -> None:
        passes[0] += 1

    handle = engine.model.model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("penalty", [1.0, 1.05])
def test_batched_equals_one_by_one_equals_transformers(engine: LocalEngine, penalty: float) -> None:
    prompts = engine._prompts(mixed_questions(32, penalty))
    assert len({len(prompt.ids) for prompt in prompts}) > 20, "mixed lengths"
    batched = decode(engine, prompts)
    assert batched == one_by_one(engine, prompts)
    assert batched[::4] == [by_transformers(engine, prompt) for prompt in prompts[::4]]
    assert len(set(map(tuple, batched))) > 20, "answers depend on the question"


@pytest.mark.parametrize("penalty", [1.0, 1.05])
def test_sharing_prefixes_equals_not_sharing_them(engine: LocalEngine, penalty: float) -> None:
    prompts = engine._prompts(questions_with_shared_prefixes(6, penalty))
    with counted(engine) as passes:
        shared = decode(engine, prompts)
    # One pass over all prefixes, one for each kind of ending, and the tokens after the first.
    assert passes[0] <= 1 + 5 + NEW_TOKENS - 1
    assert shared == decode(engine, prompts, share_prefixes=False)
    assert shared == one_by_one(engine, prompts)
    assert len(set(map(tuple, shared))) > 20


def test_prompts_that_share_an_image_but_no_prefix_are_answered_alike(engine: LocalEngine) -> None:
    image = picture(3)
    questions = [Question(content=(f"{name} cat", image, "b")) for name in ("A", "The", "One")]
    questions.append(Question(content=(image, "b")))
    prompts = engine._prompts(questions)
    assert decode(engine, prompts) == one_by_one(engine, prompts)


def test_the_same_question_twice_has_the_same_answer(engine: LocalEngine) -> None:
    image = picture(4)
    question = Question(content=(image, "b"))
    prompts = engine._prompts([question, question, Question(content=(image, "b longer"))])
    answers = decode(engine, prompts)
    assert answers[0] == answers[1]
    assert answers == one_by_one(engine, prompts)


@pytest.mark.parametrize("wrong", [0.0, 0.03, 0.1, 0.3, 1.0])
def test_drafts_equal_no_drafts_however_wrong_they_are(engine: LocalEngine, wrong: float) -> None:
    prompts = engine._prompts(mixed_questions(32))
    expected = decode(engine, prompts)
    rng = random.Random(1)
    drafted = []
    for prompt, answer in zip(prompts, expected, strict=True):
        guess = [rng.randrange(200) if rng.random() < wrong else token for token in answer]
        width = rng.randint(2, 9)
        drafted.append(
            dataclasses.replace(
                prompt, draft=lambda made, g=guess, w=width: g[len(made) : len(made) + w]
            )
        )
    with counted(engine) as passes:
        assert decode(engine, drafted) == expected
    if wrong == 0:
        assert passes[0] < NEW_TOKENS, "right guesses are taken"
    with counted(engine) as passes:
        alone = one_by_one(engine, drafted)
    assert alone == expected
    if 0 < wrong < 0.5:
        assert passes[0] < sum(map(len, expected)), "right guesses before a wrong one are taken"


def test_drafts_that_are_longer_than_the_limit_or_go_past_the_end(engine: LocalEngine) -> None:
    prompts = engine._prompts(mixed_questions(4))
    expected = decode(engine, prompts)
    stop = min(engine._stop_ids)
    for prompt, answer in zip(prompts, expected, strict=True):
        prompt.draft = lambda made, a=answer: [*a, stop, *a][len(made) :]
    assert decode(engine, prompts) == expected


def test_answers_end_at_a_stop_token(engine: LocalEngine) -> None:
    prompts = engine._prompts(mixed_questions(8))
    expected = one_by_one(engine, prompts)
    stops = frozenset(answer[5 + index] for index, answer in enumerate(expected) if len(answer) > 15)
    before = engine._stop_ids
    stops |= before
    engine._stop_ids = stops
    try:
        stopped = decode(engine, prompts)
    finally:
        engine._stop_ids = before
    for answer, whole in zip(stopped, expected, strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in stops), len(whole))
        assert answer == whole[:end]
    assert len(set(map(len, stopped))) > 2, "rows end at different times"


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_batch_size_does_not_change_answers_or_their_order(
    engine: LocalEngine, batch_size: int
) -> None:
    questions = questions_with_shared_prefixes(2, 1.05) + mixed_questions(4)
    random.Random(0).shuffle(questions)
    expected = engine.ask(questions)
    before, engine.batch_size = engine.batch_size, batch_size
    try:
        assert engine.ask(questions) == expected
    finally:
        engine.batch_size = before


def test_a_question_without_an_image_is_answered(engine: LocalEngine) -> None:
    prompts = engine._prompts([Question(content=("a cat",)), *mixed_questions(2)])
    assert decode(engine, prompts) == one_by_one(engine, prompts)


# The template of UnifiedReward 2.0 as a draft


@pytest.mark.parametrize(
    ("answer", "guess"),
    [
        ("", "Alignment Score (1-5): "),
        ("Align", "ment Score (1-5): "),
        ("Alignment Score (1-5): ", ""),
        ("Alignment Score (1-5): 2.69", ""),
        ("Alignment Score (1-5): 2.69470", "0002670288\nCoherence Score (1-5): "),
        ("Alignment Score (1-5): 2.69471", ""),
        ("Alignment Score (1-5): 2.6\n", "Coherence Score (1-5): "),
        ("A\nCoherence Score (1-5): 2.37150", "0015258789\nStyle Score (1-5): "),
        ("A\nB\nStyle Score (1-5): 2.80250", "0009536743"),
        ("A\nB\nC\n", ""),
        ("Something else", ""),
    ],
)
def test_the_template_is_guessed_from_the_answer_so_far(answer: str, guess: str) -> None:
    assert draft_scores(answer) == guess


def test_every_published_number_is_guessed_from_five_decimals() -> None:
    for number in ("2.694700002670288", "2.371500015258789", "2.802500009536743"):
        start = "Alignment Score (1-5): " + number[:7]
        assert (start + draft_scores(start)).split("\n")[0].endswith(number)


def test_the_metrics_own_draft_changes_no_answer_and_saves_passes(folders: dict[str, Path]) -> None:
    metric = UnifiedReward2Metric.from_pretrained(
        ModelConfig(path=folders["qwen3_5"]),
        device="cpu",
        torch_dtype=torch.float32,
        max_new_tokens=80,
        batch_size=8,
    )
    engine = metric.engine
    assert isinstance(engine, LocalEngine)
    rng = random.Random(3)
    prompts = [words(rng, 30) for _ in range(32)]
    pictures = [picture(seed) for seed in range(32)]
    asked: list[Question] = []
    ask = engine.ask
    engine.ask = lambda questions: asked.extend(questions) or ask(questions)  # type: ignore[method-assign,func-returns-value]
    with counted(engine) as with_draft:
        metric.evaluate(prompts, pictures)
    del engine.ask
    with counted(engine) as without:
        plain = ask([dataclasses.replace(question, draft=None) for question in asked])
    assert ask(asked) == plain
    assert any("Coherence Score (1-5)" in answer.text for answer in plain)
    assert with_draft[0] < without[0]


def test_a_cache_with_room_holds_what_it_was_given_and_copies_seldom() -> None:
    layer, expected = DynamicLayer(), DynamicLayer()
    for width in (7, *[1] * 300, 5, 2):
        if width == 1:
            layer.__class__ = RoomyLayer
        keys, values = torch.randn(3, 2, width, 4), torch.randn(3, 2, width, 4)
        before = layer.keys.data_ptr() if layer.is_initialized else None
        found, wanted = layer.update(keys, values), expected.update(keys, values)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        moves = layer.keys.data_ptr() != before
        assert not moves or layer.keys.shape[-2] in (7, 8, 7 + 256 + 2)
    twin = copy.copy(layer)
    for one in (layer, twin):
        one.reorder_cache(torch.tensor([2, 0, 1]))
    twin.update(torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4))
    expected.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(layer.keys, expected.keys)
    assert torch.equal(twin.values[..., :-1, :], expected.values)

"""Decoding is greedy, and what makes it faster never changes a token (float32, random networks).

Answers are compared with those of transformers' own generation, up to the first token where another one
is nearly as likely: there, a processor that rounds otherwise may choose the other.
"""

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
from diffsynth_metrics.testing import ScriptedEngine, randomize, tiny_checkpoint

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


@dataclasses.dataclass(frozen=True)
class Expected:
    """What transformers' own greedy generation writes, and how many tokens of it are clear choices."""

    tokens: list[int]
    clear: int


def by_transformers(engine: LocalEngine, prompts: list[Prompt]) -> list[Expected]:
    return [_by_transformers(engine, prompt) for prompt in prompts]


def _by_transformers(engine: LocalEngine, prompt: Prompt) -> Expected:
    ids = torch.tensor([prompt.ids])
    images = {
        "mm_token_type_ids": (ids == engine._image_id).int(),
        "pixel_values": prompt.pixel_values,
        "image_grid_thw": prompt.image_grid,
    }
    if prompt.pixel_values is None:
        images = {}
    made = engine.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **images,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=prompt.repetition_penalty,
        eos_token_id=sorted(engine._stop_ids),
        pad_token_id=engine._pad_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens: list[int] = made.sequences[0, len(prompt.ids) :].tolist()
    best = torch.cat(made.scores).topk(2).values
    margins = (best[:, 0] - best[:, 1]) / torch.cat(made.scores).std(dim=1)
    unclear = (margins < CLEAR).nonzero().flatten().tolist()
    return Expected(tokens, unclear[0] if unclear else len(tokens))


def assert_agree(answers: list[list[int]], expected: list[Expected]) -> None:
    assert len(answers) == len(expected)
    for answer, wanted in zip(answers, expected, strict=True):
        if wanted.clear == len(wanted.tokens):
            assert answer == wanted.tokens
        assert answer[: wanted.clear] == wanted.tokens[: wanted.clear]
    assert sum(wanted.clear for wanted in expected) > 0.7 * sum(len(e.tokens) for e in expected)


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
def test_batched_equals_transformers(engine: LocalEngine, penalty: float) -> None:
    prompts = engine._prompts(mixed_questions(12, penalty))
    assert len({len(prompt.ids) for prompt in prompts}) > 8, "mixed lengths"
    batched = decode(engine, prompts)
    assert_agree(batched, by_transformers(engine, prompts))
    assert len(set(map(tuple, batched))) > 8, "answers depend on the question"


@pytest.mark.parametrize("penalty", [1.0, 1.05])
def test_sharing_prefixes_equals_not_sharing_them(engine: LocalEngine, penalty: float) -> None:
    prompts = engine._prompts(questions_with_shared_prefixes(3, penalty))
    with counted(engine) as passes:
        shared = decode(engine, prompts)
    # One pass over all prefixes, one for each kind of ending, and the tokens after the first.
    assert passes[0] <= 1 + 5 + NEW_TOKENS - 1
    expected = by_transformers(engine, prompts)
    assert_agree(shared, expected)
    assert_agree(decode(engine, prompts, share_prefixes=False), expected)
    assert len(set(map(tuple, shared))) > 10


def test_prompts_that_share_an_image_but_no_prefix_are_answered_alike(engine: LocalEngine) -> None:
    image = picture(3)
    questions = [Question(content=(f"{name} cat", image, "b")) for name in ("A", "The", "One")]
    questions.append(Question(content=(image, "b")))
    prompts = engine._prompts(questions)
    assert_agree(decode(engine, prompts), by_transformers(engine, prompts))


def test_the_same_question_twice_and_one_without_an_image_are_answered(engine: LocalEngine) -> None:
    image = picture(4)
    question = Question(content=(image, "b"))
    others = [Question(content=(image, "b longer")), Question(content=("a cat",))]
    prompts = engine._prompts([question, question, *others])
    assert_agree(decode(engine, prompts), by_transformers(engine, prompts))


def test_drafts_equal_no_drafts_however_wrong_they_are(engine: LocalEngine) -> None:
    prompts = engine._prompts(mixed_questions(12))
    expected = by_transformers(engine, prompts)
    rng = random.Random(1)
    for wrong in (0.0, 0.1, 1.0):
        drafted = []
        for prompt, answer in zip(prompts, expected, strict=True):
            guess = [rng.randrange(200) if rng.random() < wrong else token for token in answer.tokens]
            width = rng.randint(2, 9)
            drafted.append(
                dataclasses.replace(
                    prompt, draft=lambda made, g=guess, w=width: g[len(made) : len(made) + w]
                )
            )
        with counted(engine) as passes:
            assert_agree(decode(engine, drafted), expected)
        if wrong == 0:
            assert passes[0] < NEW_TOKENS, "right guesses are taken"
        with counted(engine) as passes:
            assert_agree([decode(engine, [prompt])[0] for prompt in drafted[:4]], expected[:4])
        if wrong < 1:
            assert passes[0] < sum(len(answer.tokens) for answer in expected[:4])


def test_drafts_that_are_longer_than_the_limit_or_go_past_the_end(engine: LocalEngine) -> None:
    prompts = engine._prompts(mixed_questions(4))
    expected = by_transformers(engine, prompts)
    stop = min(engine._stop_ids)
    for prompt, answer in zip(prompts, expected, strict=True):
        prompt.draft = lambda made, a=answer.tokens: [*a, stop, *a][len(made) :]
    assert_agree(decode(engine, prompts), expected)


def test_answers_end_at_a_stop_token(engine: LocalEngine) -> None:
    prompts = engine._prompts(mixed_questions(8))
    before = engine._stop_ids
    whole = [decode(engine, [prompt])[0] for prompt in prompts]
    stops = before | {answer[5 + index] for index, answer in enumerate(whole) if len(answer) > 15}
    engine._stop_ids = stops
    try:
        stopped = decode(engine, prompts)
        assert_agree(stopped, by_transformers(engine, prompts))
    finally:
        engine._stop_ids = before
    for answer in stopped:
        assert len(answer) == NEW_TOKENS or answer[-1] in stops
        assert stops.isdisjoint(answer[:-1])
    assert len(set(map(len, stopped))) > 2, "rows end at different times"


def test_the_batch_size_does_not_change_answers_or_their_order(engine: LocalEngine) -> None:
    questions = questions_with_shared_prefixes(1, 1.05) + mixed_questions(3)
    random.Random(0).shuffle(questions)
    expected = by_transformers(engine, engine._prompts(questions))
    before = engine.batch_size
    try:
        for engine.batch_size in (1, 3, 20):
            for answer, wanted in zip(engine.ask(questions), expected, strict=True):
                assert answer.finish == "length" or wanted.clear < NEW_TOKENS
                if wanted.clear == NEW_TOKENS:
                    assert answer.text == engine._text(wanted.tokens)
    finally:
        engine.batch_size = before


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


def test_the_metrics_own_draft_is_taken_where_it_is_right(engine: LocalEngine) -> None:
    spy = ScriptedEngine()
    UnifiedReward2Metric(spy).evaluate("a", picture(0))
    prompt = engine._prompts(spy.questions)[0]
    assert prompt.draft is not None
    assert engine._text(prompt.draft([])) == "Alignment Score (1-5): "
    so_far = engine._encode("Alignment Score (1-5): 2.69470")
    assert engine._text(prompt.draft(so_far)) == "0002670288\nCoherence Score (1-5): "
    assert_agree(decode(engine, [prompt]), by_transformers(engine, [prompt]))


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

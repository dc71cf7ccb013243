"""Whoever submits a sample gets a score or an error, whatever happens to the batch."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import Any

import pytest
import torch
from forking import SOON, is_true_in_a_child, needs_fork
from stand_ins import Brightness

from diffsynth_metrics.rewards import Component, DynamicBatcher, RewardSet, to_verl_omni
from diffsynth_metrics.rewards.batches import Batch
from diffsynth_metrics.rewards.scoring import MetricScorer, Scored


def lengths(prompts: list[str], images: Any) -> list[int]:
    return [len(prompt) for prompt in prompts]


class Scorer:
    """Scores as it is told, and lets a test hold it up."""

    name = "scorer"
    needs_prompts = True

    def __init__(self, values: Any = None) -> None:
        self.values = values
        self.updates: list[bool] = []
        self.working, self.go_on = threading.Event(), threading.Event()

    def scored(self, batch: Batch, *, update: bool = True) -> Scored:
        self.updates.append(update)
        self.working.set()
        assert self.go_on.wait(SOON)
        if isinstance(self.values, BaseException):
            raise self.values
        return Scored(torch.tensor(self.values), [None] * len(batch))

    def to(self, device: Any) -> Any:
        return self


@pytest.mark.parametrize("wait", [math.inf, math.nan, -1, 60_001, 1e300])
def test_the_wait_must_be_at_most_a_minute(wait: float) -> None:
    with pytest.raises(ValueError, match="max_wait_ms must be between 0 and 60000 milliseconds"):
        DynamicBatcher(MetricScorer(lengths), max_wait_ms=wait)
    DynamicBatcher(MetricScorer(lengths), max_wait_ms=60_000)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt(), SystemExit()])
def test_an_error_of_the_scorer_reaches_everybody(error: BaseException) -> None:
    scorer = Scorer(error)
    batcher = DynamicBatcher(scorer, max_batch=2, max_wait_ms=1000)
    futures = [batcher.submit("a", None) for _ in range(2)]
    scorer.go_on.set()
    assert [future.exception(SOON) for future in futures] == [error, error]


def test_a_wrong_number_of_scores_leaves_nobody_waiting() -> None:
    scorer = Scorer([1.0])
    batcher = DynamicBatcher(scorer, max_batch=2, max_wait_ms=100)
    futures = [batcher.submit("a", None) for _ in range(3)]
    scorer.go_on.set()
    assert [future.result(SOON) for future in futures] == [1, 1, 1]  # two of them alone, after the error


def test_a_worker_that_cannot_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = DynamicBatcher(MetricScorer(lengths))

    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            batcher.submit("abc", None)
    assert batcher.submit("abc", None).result(SOON) == 3


def test_who_gives_up_costs_the_others_nothing() -> None:
    scorer = Scorer([5.0])
    batcher = DynamicBatcher(scorer, max_batch=1)
    first = batcher.submit("a", None)
    assert scorer.working.wait(SOON)
    second, third = batcher.submit("b", None), batcher.submit("c", None)
    assert second.cancel()
    scorer.go_on.set()
    assert first.result(SOON) == third.result(SOON) == 5


def test_an_awaiter_of_a_source_that_raises_stop_iteration_goes_on() -> None:
    def exhausted(prompts: list[str], images: Any) -> list[float]:
        raise StopIteration(3)

    async def main() -> None:
        call = to_verl_omni(exhausted)("d", torch.zeros(3, 8, 8, dtype=torch.uint8), "a cat", {})
        with pytest.raises(RuntimeError, match=r"StopIteration\(3\)"):
            await asyncio.wait_for(call, SOON)

    asyncio.run(main())


def test_statistics_learn_as_the_batcher_was_told() -> None:
    learning = [True, False]
    scorer = Scorer([1.0])
    scorer.go_on.set()
    batcher = DynamicBatcher(scorer, max_batch=1, update=lambda: learning.pop(0))
    for _ in range(2):
        batcher.submit("a", None).result(SOON)
    assert scorer.updates == [True, False]


@pytest.mark.parametrize("bad", ["a path", "a prompt"])
def test_one_bad_sample_of_a_set_fails_alone(bad: str) -> None:
    rewards = RewardSet({"bright": Component(Brightness(), 2.0), "length": lengths})
    batcher = DynamicBatcher(rewards, max_batch=3, max_wait_ms=2000)
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    futures = [batcher.submit("abc", image), batcher.submit("abcd", image)]
    futures.insert(
        1, batcher.submit("x", "gone.png") if bad == "a path" else batcher.submit(None, image)
    )
    first, wrong, last = futures
    message = "bright: .*no file 'gone.png'" if bad == "a path" else "prompt 0 must be a str"
    with pytest.raises(Exception, match=message):
        wrong.result(SOON)
    assert last.result(SOON) - first.result(SOON) == pytest.approx(1)


@needs_fork
def test_a_forked_child_has_a_worker_of_its_own() -> None:
    scorer = Scorer([7.0])
    batcher = DynamicBatcher(scorer, max_batch=1)

    def ask() -> bool:
        scorer.go_on.set()
        return batcher.submit("c", None).result(SOON) == 7

    # The parent's worker is at work, and does not exist in the child.
    first, second = batcher.submit("a", None), batcher.submit("b", None)
    assert scorer.working.wait(SOON)
    assert is_true_in_a_child(ask)
    scorer.go_on.set()
    assert first.result(SOON) == second.result(SOON) == 7
    # The parent has nothing to do.
    assert is_true_in_a_child(ask)

"""Whoever submits a sample gets a result or an error, whatever happens to the batch."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
from typing import Any

import pytest
import torch
from forking import SOON, is_true_in_a_child, needs_fork
from stand_ins import Brightness

from diffsynth_metrics.batcher import Batcher
from diffsynth_metrics.rewards import Component, RewardSet, to_verl_omni


def lengths(prompts: list[str], images: Any = None) -> list[int]:
    return [len(prompt) for prompt in prompts]


class Computer:
    """Computes what it is told, and lets a test hold it up."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.working, self.go_on = threading.Event(), threading.Event()

    def __call__(self, samples: list[Any]) -> Any:
        self.working.set()
        assert self.go_on.wait(SOON)
        if isinstance(self.values, BaseException):
            raise self.values
        return self.values


@pytest.mark.parametrize("wait", [math.inf, math.nan, -1, 60_001, 1e300])
def test_the_wait_must_be_at_most_a_minute(wait: float) -> None:
    for make in (Batcher, to_verl_omni):
        with pytest.raises(ValueError, match="max_wait_ms must be between 0 and 60000 milliseconds"):
            make(lengths, max_wait_ms=wait)
        make(lengths, max_wait_ms=60_000)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_batch_has_at_least_one_sample(size: Any) -> None:
    with pytest.raises(ValueError, match="max_batch must be a positive int"):
        Batcher(lengths, max_batch=size)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt(), SystemExit()])
def test_an_error_of_the_computation_reaches_everybody(error: BaseException) -> None:
    computer = Computer(error)
    batcher: Batcher[str, float] = Batcher(computer, max_batch=2, max_wait_ms=1000)
    futures = [batcher.submit("a") for _ in range(2)]
    computer.go_on.set()
    assert [future.exception(SOON) for future in futures] == [error, error]


def test_a_wrong_number_of_results_leaves_nobody_waiting() -> None:
    computer = Computer([1.0])
    batcher: Batcher[str, float] = Batcher(computer, max_batch=2, max_wait_ms=100)
    futures = [batcher.submit("a") for _ in range(3)]
    computer.go_on.set()
    for future in futures[:2]:
        with pytest.raises(RuntimeError, match="got 1 results for 2 samples"):
            future.result(SOON)
    assert futures[2].result(SOON) == 1


def test_a_worker_that_cannot_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher: Batcher[str, int] = Batcher(lengths)

    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            batcher.submit("abc")
    assert batcher.submit("abc").result(SOON) == 3


def test_who_gives_up_costs_the_others_nothing() -> None:
    computer = Computer([5.0])
    batcher: Batcher[str, float] = Batcher(computer, max_batch=1)
    first = batcher.submit("a")
    assert computer.working.wait(SOON)
    second, third = batcher.submit("b"), batcher.submit("c")
    assert second.cancel()
    computer.go_on.set()
    assert first.result(SOON) == third.result(SOON) == 5


def test_a_pickled_copy_has_its_settings_and_no_samples_of_others() -> None:
    batcher: Batcher[str, int] = Batcher(lengths, max_batch=3)
    assert batcher.submit("ab").result(SOON) == 2
    other = pickle.loads(pickle.dumps(batcher))
    assert other.max_batch == 3 and len(other) == 0
    assert other.submit("abc").result(SOON) == 3


def test_an_awaiter_of_a_source_that_raises_stop_iteration_goes_on() -> None:
    def exhausted(prompts: list[str], images: Any) -> list[float]:
        raise StopIteration(3)

    async def main() -> None:
        call = to_verl_omni(exhausted)("d", torch.zeros(3, 8, 8, dtype=torch.uint8), "a cat", {})
        with pytest.raises(RuntimeError, match=r"StopIteration\(3\)"):
            await asyncio.wait_for(call, SOON)

    asyncio.run(main())


@pytest.mark.parametrize("bad", ["a path", "a prompt"])
def test_one_bad_sample_of_a_set_fails_alone(bad: str) -> None:
    rewards = RewardSet({"bright": Component(Brightness(), 2.0), "length": lengths})
    compute_score = to_verl_omni(rewards, max_batch=3, max_wait_ms=2000)
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    wrong_sample = ("gone.png", "x") if bad == "a path" else (image, None)

    async def main() -> list[Any]:
        samples = [(image, "abc"), wrong_sample, (image, "abcd")]
        calls = (compute_score("d", *sample, {}) for sample in samples)
        return await asyncio.gather(*calls, return_exceptions=True)

    first, wrong, last = asyncio.run(main())
    message = "bright: .*no file 'gone.png'" if bad == "a path" else "prompt 0 must be a str"
    with pytest.raises(Exception, match=message):
        raise wrong
    assert last["score"] - first["score"] == pytest.approx(1)


@needs_fork
def test_a_forked_child_has_a_worker_of_its_own() -> None:
    computer = Computer([7.0])
    batcher: Batcher[str, float] = Batcher(computer, max_batch=1)

    def ask() -> bool:
        computer.go_on.set()
        return batcher.submit("c").result(SOON) == 7

    # The parent's worker is at work, and does not exist in the child.
    first, second = batcher.submit("a"), batcher.submit("b")
    assert computer.working.wait(SOON)
    assert is_true_in_a_child(ask)
    computer.go_on.set()
    assert first.result(SOON) == second.result(SOON) == 7
    # The parent has nothing to do.
    assert is_true_in_a_child(ask)

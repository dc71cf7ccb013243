"""Kept answers: found by everything that they depend on, and never a failure."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from diffsynth_metrics import ModelConfig, UnifiedReward2Metric
from diffsynth_metrics.judges.cached import CachedEngine
from diffsynth_metrics.judges.engine import Answer, Engine, Question
from diffsynth_metrics.testing import ScriptedEngine

RED = PIL.Image.new("RGB", (8, 6), "red")
QUESTION = Question((RED, "how red?"), system="You judge.", thinking=False, repetition_penalty=1.05)
GOOD = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 5"


class Counting(ScriptedEngine):
    """An engine whose answers differ by question, with settings that change them."""

    def __init__(self, *answers: Any, **identity: Any) -> None:
        super().__init__(*(answers or (lambda question: str(question.content[-1]),)))
        self.settings = {"engine": "Counting", "model": "a"} | identity

    @property
    def identity(self) -> dict[str, Any]:
        return self.settings


def numbered(count: int) -> list[Question]:
    return [Question((RED, f"question {index}")) for index in range(count)]


def texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def test_only_what_is_missing_is_asked_and_answers_keep_their_order(tmp_path: Path) -> None:
    questions = numbered(6)
    CachedEngine(Counting(), tmp_path).ask(questions[::2])
    again = Counting()
    answers = CachedEngine(again, tmp_path).ask(questions)
    assert texts(answers) == [f"question {index}" for index in range(6)]
    assert [question.content[-1] for question in again.questions] == [
        f"question {index}" for index in (1, 3, 5)
    ]
    silent = Counting()
    assert CachedEngine(silent, tmp_path).ask(questions) == answers
    assert silent.questions == []
    assert CachedEngine(silent, tmp_path).ask([]) == []


def test_equal_questions_of_a_call_are_asked_once(tmp_path: Path) -> None:
    engine = Counting()
    twin = replace(QUESTION, content=(RED.copy(), "how red?"))
    answers = CachedEngine(engine, tmp_path).ask([QUESTION, *numbered(1), twin])
    assert texts(answers) == ["how red?", "question 0", "how red?"]
    assert len(engine.questions) == 2


def test_everything_that_an_answer_depends_on_is_part_of_the_key(tmp_path: Path) -> None:
    other = RED.copy()
    other.putpixel((3, 3), (254, 0, 0))
    engines: list[tuple[Engine, Question]] = [
        (Counting(), QUESTION),
        (Counting(model="b"), QUESTION),
        (Counting(max_new_tokens=7), QUESTION),
        *(
            (Counting(), question)
            for question in (
                replace(QUESTION, content=(other, "how red?")),
                replace(QUESTION, content=(RED.resize((6, 8)), "how red?")),
                replace(QUESTION, content=(RED.convert("RGBA"), "how red?")),
                replace(QUESTION, content=("how red?", RED)),
                replace(QUESTION, content=(RED, "how", " red?")),
                replace(QUESTION, content=(RED, "how red? ")),
                replace(QUESTION, system=None),
                replace(QUESTION, system="You judge. "),
                replace(QUESTION, thinking=True),
                replace(QUESTION, thinking=None),
                replace(QUESTION, repetition_penalty=1.0),
            )
        ),
    ]
    for engine, question in engines:
        CachedEngine(engine, tmp_path).ask([question])
        assert len(engine.questions) == 1  # type: ignore[attr-defined]
    assert len(list(tmp_path.rglob("*.json"))) == len(engines)


def test_a_failure_is_never_kept(tmp_path: Path) -> None:
    failed = Answer("", error="HTTP 503")
    engine = Counting(failed, GOOD)
    cached = CachedEngine(engine, tmp_path)
    assert cached.ask([QUESTION]) == [failed]
    assert texts(cached.ask([QUESTION])) == [GOOD]
    assert texts(cached.ask([QUESTION])) == [GOOD]
    assert len(engine.questions) == 2


def test_an_answer_comes_back_whole(tmp_path: Path) -> None:
    answer = Answer("“½” \ud83d \n", "length", usage={"answer_tokens": 7, "seconds": 1.5})
    CachedEngine(Counting(answer), tmp_path).ask([QUESTION])
    (kept,) = CachedEngine(Counting(), tmp_path).ask([QUESTION])
    assert kept == answer and kept.usage == answer.usage


def test_answers_are_stored_batch_by_batch_as_they_come(tmp_path: Path) -> None:
    class Failing(Counting):
        batch_size = 4

        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            if len(self.questions) == 8:
                raise ConnectionError("the machine is gone")
            return super().ask(questions)

    with pytest.raises(ConnectionError):
        CachedEngine(Failing(), tmp_path).ask(numbered(20))
    again = Counting()
    CachedEngine(again, tmp_path).ask(numbered(20))
    assert len(again.questions) == 12


def test_a_file_that_is_not_whole_is_asked_again(tmp_path: Path) -> None:
    CachedEngine(Counting(), tmp_path).ask([QUESTION])
    (file,) = tmp_path.rglob("*.json")
    for broken in ("", '{"text": "how', '{"text": "x"}', "[]", "null"):
        file.write_text(broken)
        assert texts(CachedEngine(Counting(), tmp_path).ask([QUESTION])) == ["how red?"]
        assert json.loads(file.read_text())["text"] == "how red?"


def test_threads_share_a_folder(tmp_path: Path) -> None:
    cached = CachedEngine(Counting(), tmp_path)
    questions = numbered(40)
    found: dict[int, list[str]] = {}

    def work(index: int) -> None:
        order = questions[index * 5 :] + questions[: index * 5]
        found[index] = texts(cached.ask(order))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(8):
        assert found[index] == [f"question {(index * 5 + i) % 40}" for i in range(40)]
    assert not list(tmp_path.rglob("*.tmp"))


ASKING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_judge_cache import CachedEngine, Counting, numbered

def answer(question):
    if question.content[-1] == f"question {sys.argv[3]}":
        os.kill(os.getpid(), signal.SIGKILL)
    return str(question.content[-1])

engine = Counting(answer)
engine.batch_size = 1
CachedEngine(engine, sys.argv[2]).ask(numbered(30))
"""


def ask_in_a_process(folder: Path, kill_at: str = "none") -> subprocess.Popen[bytes]:
    here = os.fspath(Path(__file__).parent)
    return subprocess.Popen([sys.executable, "-c", ASKING, here, os.fspath(folder), kill_at])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_processes_share_a_folder_and_may_be_killed(tmp_path: Path) -> None:
    killed = ask_in_a_process(tmp_path / "a", kill_at="17")
    several = [ask_in_a_process(tmp_path / "b") for _ in range(2)]
    assert killed.wait() == -signal.SIGKILL
    assert [process.wait() for process in several] == [0, 0]
    rest = Counting()
    assert texts(CachedEngine(rest, tmp_path / "a").ask(numbered(30))) == [
        f"question {index}" for index in range(30)
    ]
    assert len(rest.questions) == 13
    silent = Counting()
    assert len(CachedEngine(silent, tmp_path / "b").ask(numbered(30))) == 30
    assert silent.questions == []


def test_an_engine_that_does_not_say_what_it_is_is_refused(tmp_path: Path) -> None:
    class Unknown(Engine):
        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            return []

    with pytest.raises(TypeError, match="give Unknown a property `identity`"):
        CachedEngine(Unknown(), tmp_path)
    with pytest.raises(TypeError, match="pass the engine whose answers are kept, got str"):
        CachedEngine("engine", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the weights of its LocalEngine are not known"):
        CachedEngine(Counting(engine="LocalEngine", weights=None), tmp_path).ask([QUESTION])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        CachedEngine(Counting(), tmp_path / "file")


def test_a_metric_asks_through_a_cache_like_any_engine(tmp_path: Path) -> None:
    engine = Counting(GOOD)
    metric = UnifiedReward2Metric(CachedEngine(engine, tmp_path))
    assert metric.compute(["a", "b"], RED) == metric.compute(["a", "b"], RED) == [4, 4]
    assert len(engine.questions) == 2
    assert metric.provenance["identity"] == engine.identity
    assert metric.provenance["reader"] >= 1
    metric.batch_size = 3
    assert engine.batch_size == 3


def test_the_identity_of_a_network_is_its_files_and_settings(
    tiny: Callable[[str], Path], metrics: Callable[[str], Any], tmp_path: Path
) -> None:
    metric = copy.copy(metrics("unified_reward_2"))
    metric.engine = copy.copy(metric.engine)
    metric.engine.max_new_tokens = 3
    identity = metric.engine.identity
    assert identity["weights"] == metric.provenance["weights"]
    assert (identity["dtype"], identity["max_new_tokens"]) == ("float32", 3)
    again = UnifiedReward2Metric.from_pretrained(
        ModelConfig(path=tiny("unified_reward_2")),
        device="cpu",
        torch_dtype=torch.float32,
        max_new_tokens=3,
    )
    assert again.engine.identity == identity
    changed = {"dtype": {"torch_dtype": torch.bfloat16}, "max_new_tokens": {"max_new_tokens": 4}} | {
        "settings": {"processor_kwargs": {"size": {"shortest_edge": 16384, "longest_edge": 16384}}}
    }
    for name, options in changed.items():
        other = UnifiedReward2Metric.from_pretrained(
            ModelConfig(path=tiny("unified_reward_2")),
            device="cpu",
            **({"torch_dtype": torch.float32, "max_new_tokens": 3} | options),
        ).engine.identity
        assert {key for key in identity if other[key] != identity[key]} == {name}
    assert metrics("unified_reward_edit").engine.identity["weights"] != identity["weights"]

    metric.engine = CachedEngine(metric.engine, tmp_path)
    assert metric.evaluate("a", RED) == metric.evaluate("a", RED)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert metric.model is metrics("unified_reward_2").model
    metric.model = copy.deepcopy(metric.model)
    with pytest.raises(ValueError, match="the weights of its LocalEngine are not known"):
        metric.evaluate("a", RED)

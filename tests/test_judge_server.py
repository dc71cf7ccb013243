"""Asking a server: what is sent, what a reply means, and what becomes of failures."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import math
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from diffsynth_metrics import QwenImageBenchMetric, UnifiedReward2Metric, UnifiedRewardEditMetric
from diffsynth_metrics.errors import ServerError
from diffsynth_metrics.judges import server
from diffsynth_metrics.judges.cached import CachedEngine
from diffsynth_metrics.judges.engine import Answer, Question
from diffsynth_metrics.judges.server import (
    ServerEngine,
    find_dialect,
    read_answer,
    request_body,
    retry_delay,
    seconds_of,
)

RED = PIL.Image.new("RGB", (64, 48), "red")
GREEN = PIL.Image.new("RGB", (48, 64), "green")
BLUE = PIL.Image.new("RGB", (50, 50), "blue")
KEY = "sk-secret"
SCORES = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 5"

Reply = tuple[int, dict[str, str], str]


def completion(text: str = SCORES, finish: str = "stop", **message: Any) -> Reply:
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage})


class FakeServer:
    """A server that replies as a test says: a function of the request's body and its number."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [{"id": "judge", "owned_by": "vllm"}]
        self.reply: Callable[[dict[str, Any], int], Reply | None] = lambda body, number: completion()
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.authorizations.append(self.headers["Authorization"])
                self.send(200, {}, json.dumps({"object": "list", "data": fake.models}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                with lock:
                    number = len(fake.bodies)
                    fake.bodies.append(body)
                    fake.authorizations.append(self.headers["Authorization"])
                reply = fake.reply(body, number)
                if reply is None:  # cut the connection in the middle of the text
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                else:
                    self.send(*reply)

            def send(self, status: int, headers: dict[str, str], text: str) -> None:
                data = text.encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = FakeServer()
    yield started
    started.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The decisions about retries, whose pauses take no time."""
    decided: list[tuple[Any, ...]] = []

    def decide(statuses: list[int | None], after: float | None) -> float | None:
        delay = retry_delay(statuses, after)
        decided.append((statuses[-1], after))
        return None if delay is None else 0.0

    monkeypatch.setattr(server, "retry_delay", decide)
    return decided


def texts_of(body: dict[str, Any]) -> list[str]:
    return [part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text"]


def pictures_of(body: dict[str, Any]) -> list[PIL.Image.Image]:
    uris = [p["image_url"]["url"] for p in body["messages"][-1]["content"] if p["type"] == "image_url"]
    prefix = "data:image/png;base64,"
    assert all(uri.startswith(prefix) for uri in uris)
    return [PIL.Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(prefix)))) for uri in uris]


# What is sent


def test_every_dialect_has_its_own_fields() -> None:
    question = Question(
        ("look", RED, "what?"), system="You judge.", thinking=True, repetition_penalty=1.05
    )
    plain = Question((RED, "what?"))
    for dialect in ("vllm", "sglang"):
        body = request_body(question, "judge", dialect)
        messages = body.pop("messages")
        assert body == {
            "model": "judge",
            "temperature": 0,
            "repetition_penalty": 1.05,
            "chat_template_kwargs": {"enable_thinking": True},
        }
        assert messages[0] == {"role": "system", "content": "You judge."}
        assert [part["type"] for part in messages[1]["content"]] == ["text", "image_url", "text"]
        body = request_body(plain, "judge", dialect)
        assert body["repetition_penalty"] == 1, "or the server takes the model's generation_config.json"
        assert "chat_template_kwargs" not in body and len(body["messages"]) == 1
    body = request_body(question, "judge", "transformers")
    settings = json.loads(body.pop("generation_config"))
    assert settings == {"do_sample": False, "repetition_penalty": 1.05}
    assert body.keys() == {"model", "messages", "temperature", "chat_template_kwargs"}
    assert body["temperature"] == 0


def test_the_metrics_send_their_questions(fake: FakeServer) -> None:
    fake.reply = lambda body, number: completion("Edited image 1 is better")
    edit = UnifiedRewardEditMetric.from_server(fake.url, task="edit_pairwise_rank", max_new_tokens=99)
    (row,) = edit.evaluate("make it grey", [RED, GREEN, BLUE])
    assert (row["winner"], row["finish"], row["error"]) == (1, "stop", None)
    assert row["usage"]["prompt_tokens"] == 100 and row["usage"]["answer_tokens"] == 7
    assert row["usage"]["seconds"] > 0
    (body,) = fake.bodies
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 99, 0)
    assert "chat_template_kwargs" not in body and "system" not in [m["role"] for m in body["messages"]]
    assert [picture.tobytes() for picture in pictures_of(body)] == [
        picture.tobytes() for picture in (RED, GREEN, BLUE)
    ]
    assert "make it grey" in texts_of(body)[0]

    fake.reply = lambda body, number: completion()
    reward = UnifiedReward2Metric.from_server(fake.url, extra_body={"seed": 42})
    assert reward.compute(["a", "b"], RED) == [4, 4]
    for body in fake.bodies[1:]:
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert (body["seed"], body["max_tokens"]) == (42, 4096)

    facets = '{"Detail": {"Noise": {"score": 1}}}'
    fake.reply = lambda body, number: completion(facets, reasoning_content="2 dogs.")
    bench = QwenImageBenchMetric.from_server(fake.url, resize_long_edge=0)
    (row,) = bench.evaluate("a", RED, dimensions="Quality")
    assert row["score"] == 60 and row["usage"]["Quality"]["answer_tokens"] == 7
    assert fake.bodies[-1]["repetition_penalty"] == 1.05
    assert fake.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": True}
    assert row["raw_outputs"]["Quality"] == f"2 dogs.\n</think>\n\n{facets}"


def test_answers_keep_the_order_of_their_questions(fake: FakeServer) -> None:
    fake.reply = lambda body, number: completion(texts_of(body)[0])
    questions = [Question((f"question {index}",)) for index in range(40)]
    answers = ServerEngine(fake.url, concurrency=7).ask(questions)
    assert [answer.text for answer in answers] == [f"question {index}" for index in range(40)]


def test_as_many_requests_as_asked_for_are_under_way_at_once(fake: FakeServer) -> None:
    together = threading.Barrier(3, timeout=20)

    def reply(body: dict[str, Any], number: int) -> Reply:
        together.wait()
        return completion()

    fake.reply = reply
    engine = ServerEngine(fake.url, concurrency=3)
    answers = engine.ask([Question((f"question {index}",)) for index in range(9)])
    assert [answer.text for answer in answers] == [SCORES] * 9


def test_a_picture_is_encoded_once_per_call(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    save = PIL.Image.Image.save

    def counted(self: PIL.Image.Image, *arguments: Any, **options: Any) -> None:
        encoded.append(id(self))
        save(self, *arguments, **options)

    monkeypatch.setattr(PIL.Image.Image, "save", counted)
    ServerEngine(fake.url).ask([Question((RED, f"question {index}")) for index in range(8)])
    assert len(encoded) == 1 and len(fake.bodies) == 8


def test_a_special_token_of_the_model_is_refused_for_its_row_only(fake: FakeServer) -> None:
    metric = UnifiedReward2Metric.from_server(fake.url)
    prompts = ["a <|image_pad|> b", "a red wall", "<think>no</think>", "a < b | c > d"]
    rows = metric.evaluate(prompts, RED)
    assert [row["score"] for row in rows] == [None, 4, None, 4]
    assert "'<|image_pad|>', which a server reads as a special token" in rows[0]["error"]
    assert rows[0]["finish"] == "error" and rows[0]["usage"] == {}
    assert len(fake.bodies) == 2
    assert math.isnan(metric.compute("<|im_end|>", RED)[0]), "a refused text is no failing server"


# What a reply means


def test_thinking_is_joined_with_the_answer() -> None:
    def read(content: str | None, finish: str = "stop", thinks: bool = True, **message: Any) -> Answer:
        return read_answer(completion(content, finish, **message)[2], thinks=thinks, seconds=1.5)  # type: ignore[arg-type]

    assert read("{}", reasoning="so").text == "so\n</think>\n\n{}"
    assert read("{}", reasoning_content="so").text == "so\n</think>\n\n{}"
    assert read("so\n</think>\n\n{}").text == "so\n</think>\n\n{}"
    assert read(None, "length", reasoning="so").text == "<think>\nso", "it never stopped thinking"
    assert read(None, reasoning='{"a": 1}').text.endswith("</think>\n\n"), "a draft is no answer"
    assert read("", thinks=False, reasoning_content="4").text == "4", "of a judge that does not think"
    assert read("4", "length").finish == "length"
    assert read("a<|vision_pad|> b<|im_end|>").text == "a b"
    assert read("4").usage == {"prompt_tokens": 100, "answer_tokens": 7, "seconds": 1.5}


def test_a_reply_that_is_no_answer_says_what_it_is() -> None:
    cases = {
        "<html>": "the reply is no chat completion: '<html>'",
        "[]": "the reply is no chat completion",
        "{}": "the reply is no chat completion",
        '{"choices": []}': "the reply is no chat completion",
        '{"choices": [{"message": null, "finish_reason": "stop"}]}': "the reply is no chat completion",
        completion("", "tool_calls")[2]: "the answer ended with finish_reason 'tool_calls'",
        completion("", "abort")[2]: "finish_reason 'abort'",
    }
    for text, reason in cases.items():
        answer = read_answer(text, thinks=False, seconds=1)
        assert answer.error is not None and reason in answer.error
        assert (answer.text, answer.finish) == ("", "error")
    bare = {"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}
    assert read_answer(json.dumps(bare), thinks=False, seconds=1) == Answer("4")


# Failures


def test_what_is_sent_again_and_when() -> None:
    cases: list[tuple[list[int | None], float | None, float | None]] = [
        ([None], None, 0.5),
        ([None] * 4, None, 4.0),
        ([None] * 5000, None, 60.0),
        *(([status], None, 0.5) for status in (408, 429, 502, 503, 504)),
        ([503, 429], None, 1.0),
        ([503, 429], 7.0, 7.0),
        ([503], 3600.0, 60.0),
        ([503], -5.0, 0.0),
        ([500], None, 0.5),
        ([503, 500], None, 1.0),
        ([500, 500], None, None),
        ([500, 503], None, 1.0),
        *(([status], 1.0, None) for status in (400, 401, 403, 404, 413, 422, 501, 301)),
    ]
    for statuses, after, expected in cases:
        assert retry_delay(statuses, after) == expected, (statuses, after)


def test_the_seconds_of_retry_after() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    cases = {
        None: None,
        "7": 7.0,
        " 1.5 ": 1.5,
        "Fri, 02 Jan 2026 03:04:35 GMT": 30.0,
        "soon": None,
        "nan": None,
        "-1": None,
        "": None,
    }
    for header, expected in cases.items():
        assert seconds_of(header, now) == expected, header


def test_what_passes_is_sent_again(fake: FakeServer, pauses: list[tuple[Any, ...]]) -> None:
    replies: list[Reply | None] = [
        (429, {"Retry-After": "7"}, "slow down"),
        (503, {}, "loading"),
        None,
        (500, {}, "once"),
        completion(),
    ]
    fake.reply = lambda body, number: replies[number]
    assert UnifiedReward2Metric.from_server(fake.url, retries=4).compute("a", RED) == [4]
    assert pauses == [(429, 7.0), (503, None), (None, None), (500, None)]
    assert fake.bodies[0] == fake.bodies[-1]


def test_what_does_not_pass_is_not_sent_again(fake: FakeServer, pauses: list[tuple[Any, ...]]) -> None:
    fake.reply = lambda body, number: (400, {}, "too long") if number == 0 else completion()
    engine = ServerEngine(fake.url, concurrency=1)
    first, second = engine.ask([Question(("a",)), Question(("b",))])
    assert (first.error, second.text) == ("HTTP 400: too long", SCORES)
    assert len(fake.bodies) == 2
    fake.reply = lambda body, number: (503, {}, "busy")
    with pytest.raises(ServerError, match="HTTP 503: busy"):
        ServerEngine(fake.url, retries=2).ask([Question(("a",))])
    assert len(fake.bodies) == 2 + 3


def test_half_of_the_answers_may_fail(
    fake: FakeServer, pauses: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        odd = int(re.findall(r"caption (\d+)", texts_of(body)[0])[0]) % 2
        return (422, {}, "cannot") if odd else completion()

    fake.reply = reply
    prompts = [f"caption {index}" for index in range(12)]
    metric = UnifiedReward2Metric.from_server(fake.url)
    rows = metric.evaluate(prompts, RED)
    assert [row["score"] for row in rows] == [4, None] * 6
    assert {row["error"] for row in rows} == {None, "HTTP 422: cannot"}
    assert [math.isnan(score) for score in metric.compute(prompts, RED)] == [False, True] * 6

    metric.engine = CachedEngine(metric.engine, tmp_path)
    metric.compute(prompts, RED)
    sent = len(fake.bodies)
    fake.reply = lambda body, number: completion()
    assert metric.compute(prompts, RED) == [4] * 12
    assert len(fake.bodies) == sent + 6, "failures are not kept"


def test_nothing_but_failures_is_one_error_that_says_what_to_check(
    fake: FakeServer, pauses: list[tuple[Any, ...]]
) -> None:
    fake.reply = lambda body, number: (404, {}, "there is no model judge")
    with pytest.raises(
        ServerError,
        match=r"Check that the server at .*/v1 runs, serves 'judge'.*"
        r"none of 5 questions was answered.*HTTP 404: there is no model judge",
    ):
        UnifiedReward2Metric.from_server(fake.url).compute(["a"] * 5, RED)
    gone = "http://127.0.0.1:9/v1"
    for options in ({}, {"model": "judge", "dialect": "vllm"}):
        with pytest.raises(ServerError, match=r"Check that .*127\.0\.0\.1:9/v1"):
            UnifiedReward2Metric.from_server(gone, retries=1, **options).compute("a", RED)  # type: ignore[arg-type]


def test_a_slow_answer_is_given_up(fake: FakeServer, pauses: list[tuple[Any, ...]]) -> None:
    released = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Reply:
        if texts_of(body) == ["slow"]:
            released.wait(20)
        return completion()

    fake.reply = reply
    try:
        engine = ServerEngine(fake.url, "judge", dialect="vllm", timeout=0.3, retries=1)
        slow, fast = engine.ask([Question(("slow",)), Question(("fast",))])
    finally:
        released.set()
    assert slow.error is not None and "ReadTimeout" in slow.error and fast.text == SCORES
    assert len(fake.bodies) == 3


def test_a_reply_that_is_no_json_fails_its_row_only(fake: FakeServer) -> None:
    fake.reply = lambda body, number: (200, {}, '{"choices": [') if number == 0 else completion()
    first, second = ServerEngine(fake.url, concurrency=1).ask([Question(("a",)), Question(("b",))])
    assert first.error is not None and "no chat completion" in first.error
    assert second == Answer(SCORES)


@pytest.mark.skipif(os.name == "nt", reason="signals work otherwise")
def test_an_interruption_ends_at_once(fake: FakeServer) -> None:
    released = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Reply:
        if number == 1:  # both threads are there
            os.kill(os.getpid(), signal.SIGINT)
        released.wait(20)
        return completion()

    fake.reply = reply
    engine = ServerEngine(fake.url, concurrency=2)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.ask([Question((f"question {index}",)) for index in range(50)])
        assert not released.is_set()
    finally:
        released.set()
    for thread in threading.enumerate():
        if thread.name == "judge server":
            thread.join()
    assert len(fake.bodies) <= 2, "nothing more is sent"


def test_the_key_is_sent_and_never_shown(
    fake: FakeServer, caplog: pytest.LogCaptureFixture, pauses: list[tuple[Any, ...]]
) -> None:
    caplog.set_level(logging.DEBUG)
    metric = UnifiedReward2Metric.from_server(fake.url, api_key=KEY)
    assert metric.compute("a", RED) == [4]
    assert set(fake.authorizations) == {f"Bearer {KEY}"}
    fake.reply = lambda body, number: (401, {}, f"{KEY} is no key")
    with pytest.raises(ServerError, match=r"HTTP 401: \*\*\* is no key") as error:
        metric.compute("a", RED)
    shown = [str(error.value), repr(metric), repr(metric.engine), repr(metric.provenance), caplog.text]
    assert all(KEY not in text for text in shown)


def test_without_a_key_none_is_sent(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hidden")
    monkeypatch.setenv("NETRC", str(netrc))
    ServerEngine(fake.url).ask([Question(("a",))])
    assert set(fake.authorizations) == {None}


# Which server it is


def test_the_server_says_which_it_is_and_what_it_has(fake: FakeServer) -> None:
    lists = {
        "vllm": [{"id": "a", "owned_by": "vllm"}],
        "sglang": [{"id": "a", "owned_by": "sglang"}],
        "transformers": [{"id": "a", "owned_by": "me", "status": {"value": "loaded"}}],
    }
    for dialect, models in lists.items():
        assert find_dialect(models) == dialect
        fake.models = models
        identity = ServerEngine(fake.url).identity
        assert (identity["model"], identity["dialect"]) == ("a", dialect)
    fake.models = [{"id": "a", "owned_by": "me"}]
    with pytest.raises(ValueError, match=r"pass dialect=, one of \('vllm', 'sglang', 'transformers'\)"):
        ServerEngine(fake.url).ask([Question(("a",))])
    assert ServerEngine(fake.url, dialect="vllm").identity["model"] == "a"
    fake.models = [*lists["vllm"], {"id": "b", "owned_by": "vllm"}]
    with pytest.raises(ValueError, match=r"pass model=: http.* has a, b"):
        ServerEngine(fake.url).ask([Question(("a",))])
    assert ServerEngine(fake.url, "b").identity["model"] == "b"


def test_a_metric_on_a_server_can_be_sent_to_another_process(fake: FakeServer) -> None:
    metric = UnifiedReward2Metric.from_server(fake.url, api_key=KEY)
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert twin.compute("a", RED) == [4]


def test_the_identity_of_a_server_is_its_model_and_the_settings(fake: FakeServer) -> None:
    engine = ServerEngine(fake.url, max_new_tokens=7, extra_body={"seed": 1}, api_key=KEY)
    assert engine.identity == {
        "engine": "ServerEngine",
        "model": "judge",
        "dialect": "vllm",
        "max_new_tokens": 7,
        "extra_body": {"seed": 1},
    }
    metric = UnifiedReward2Metric(engine)
    assert metric.provenance["identity"] == engine.identity
    assert metric.provenance["weights"] is None and str(metric.device) == "cpu"
    assert "ServerEngine" in repr(metric)


def test_arguments_are_checked_before_anything_is_sent() -> None:
    url = "http://127.0.0.1:9/v1"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"base_url": "host:8000"}, ValueError, "base_url must be an address such as"),
        ({"base_url": "http://me:pw@host/v1"}, ValueError, "pass the key as api_key"),
        ({"dialect": "tgi"}, ValueError, "dialect must be 'auto' or one of"),
        ({"concurrency": 0}, ValueError, "concurrency must be a positive int, got 0"),
        ({"retries": -1}, ValueError, "retries must be 0 or a positive int, got -1"),
        ({"timeout": 0}, ValueError, "timeout must be a positive number of seconds, got 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive int, got 0"),
        ({"extra_body": {"stream": True}}, ValueError, "extra_body cannot set 'stream'"),
        ({"extra_body": {"a": object()}}, TypeError, "not JSON serializable"),
        ({"on_parse_error": "zero"}, ValueError, "on_parse_error must be one of"),
        ({"batchsize": 1}, TypeError, "batchsize"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message) as found:
            UnifiedReward2Metric.from_server(**({"base_url": url} | options))
        assert "pw" not in str(found.value)
    with pytest.raises(ValueError, match="there is no task 'rank'"):
        UnifiedRewardEditMetric.from_server(url, task="rank")

"""A metric on another machine: the client against a real server on localhost."""

from __future__ import annotations

import math
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import uvicorn

from diffsynth_metrics import PickScoreMetric, ServerError, UnifiedRewardEditMetric
from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, draw_shape
from diffsynth_metrics.rewards import Component, RewardSet, to_flow_grpo
from diffsynth_metrics.serving import RemoteMetric, create_app, serve
from diffsynth_metrics.testing import ScriptedEngine


@contextmanager
def running(metrics: dict[str, BaseMetric], **options: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """Serve metrics on a free port of localhost."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(create_app(metrics, **options), port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def pickscore(metrics: Callable[[str], Any]) -> PickScoreMetric:
    metric: PickScoreMetric = metrics("pickscore")
    return metric


@pytest.fixture(scope="module")
def url(pickscore: PickScoreMetric) -> Iterator[str]:
    with running({"pickscore": pickscore}) as (address, _):
        yield address


PICTURES = [draw_shape(shape, color) for shape in SHAPES for color in COLORS if color != "gray"][:20]
PROMPTS = [f"picture number {index}" for index in range(len(PICTURES))]


def test_it_is_a_metric_like_any_other(url: str, pickscore: PickScoreMetric, tmp_path: Path) -> None:
    metric = RemoteMetric(url)
    expected = pickscore.compute(PROMPTS, PICTURES)
    assert metric.compute(PROMPTS, PICTURES) == pytest.approx(expected, abs=1e-3)
    small = RemoteMetric(url, "pickscore", batch_size=3)
    assert small.compute(PROMPTS, PICTURES) == pytest.approx(expected, abs=1e-3)
    PICTURES[0].save(tmp_path / "a.jpg")
    mixed = [tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes(), torch.rand(3, 40, 50)]
    mixed.append(torch.randint(0, 256, (3, 30, 30), dtype=torch.uint8))
    assert metric.compute("a", mixed[:2] + mixed[3:]) == pytest.approx(
        pickscore.compute("a", mixed[:2] + mixed[3:]), abs=1e-3
    )
    row, other = metric.evaluate("a", mixed[:1])[0], pickscore.evaluate("a", mixed[:1])[0]
    assert row.keys() == other.keys() and row["prompt_tokens"] == other["prompt_tokens"]
    pixels = torch.rand(2, 3, 40, 40, requires_grad=True)
    reward = metric.reward("a", pixels)
    assert reward.shape == (2,) and reward.dtype == torch.float32 and not reward.requires_grad
    assert metric.card == pickscore.card and metric.provenance == pickscore.provenance
    assert "pickscore" in repr(metric) and metric.device.type == "cpu"
    with pytest.raises(FileNotFoundError):
        metric.compute("a", tmp_path / "missing.png")


def test_it_goes_into_adapters_and_sets(url: str, pickscore: PickScoreMetric) -> None:
    metric = RemoteMetric(url)
    pixels = torch.rand(4, 3, 40, 40)
    local = to_flow_grpo(pickscore)("cpu")(pixels, PROMPTS[:4], [{}] * 4)[0]
    remote = to_flow_grpo(metric)("cpu")(pixels, PROMPTS[:4], [{}] * 4)[0]
    torch.testing.assert_close(torch.as_tensor(remote), torch.as_tensor(local), rtol=1e-3, atol=0.02)
    rewards = RewardSet({"remote": Component(metric)})
    both = rewards.score(PROMPTS[:4], pixels).reward
    torch.testing.assert_close(both, metric.reward(PROMPTS[:4], pixels), rtol=1e-4, atol=1e-3)
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute("a", PICTURES[0]) == pytest.approx(metric.compute("a", PICTURES[0]), abs=1e-3)


def test_a_sample_without_a_score_is_nan_with_its_reason(url: str, tmp_path: Path) -> None:
    metric = RemoteMetric(url)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    first, second = metric.evaluate("a", [PICTURES[0], tmp_path / "bad.png"])
    assert "error" not in first and second["score"] is None and "cannot be read" in second["error"]
    scores = metric.compute("a", [PICTURES[0], tmp_path / "bad.png"])
    assert math.isfinite(scores[0]) and math.isnan(scores[1])


def test_sources_reach_a_metric_of_edits() -> None:
    engine = ScriptedEngine("score=[18, 12]")
    with running({"edit": UnifiedRewardEditMetric(engine)}) as (url, _):
        metric = RemoteMetric(url)
        assert metric.needs == ("prompt", "source")
        arguments = metric.arguments(["make it blue"], PICTURES[:1], [[PICTURES[1]]])
        assert metric.compute(*arguments) == pytest.approx([15])
        assert "needs one source image" in metric.evaluate("make it blue", PICTURES[:1])[0]["error"]


def test_a_server_that_is_not_there_or_refuses_is_one_clear_error(
    url: str, pickscore: PickScoreMetric
) -> None:
    with pytest.raises(ServerError, match="check that diffsynth-metrics serve runs at http://127"):
        RemoteMetric("http://127.0.0.1:9", retries=0)
    with pytest.raises(ServerError, match=r"name one of the metrics that .* serves, pickscore; got 'x'"):
        RemoteMetric(url, "x")
    with running({"pickscore": pickscore}, token="secret") as (locked, _):
        with pytest.raises(ServerError, match="401: send the server's token"):
            RemoteMetric(locked, token="wrong")
        assert "secret" not in repr(RemoteMetric(locked, token="secret"))
    with pytest.raises(ValueError, match=r"set a token: everybody who reaches 0\.0\.0\.0"):
        serve({"pickscore": pickscore}, host="0.0.0.0")


@pytest.mark.slow
def test_eight_clients_get_their_own_scores_beside_garbage_and_a_stop(
    pickscore: PickScoreMetric,
) -> None:
    """8 x 200 requests beside a client that sends garbage and cuts connections; then a stop."""
    expected = pickscore.compute(PROMPTS, PICTURES)
    with running({"pickscore": pickscore}) as (url, server):
        stop = threading.Event()

        def disturb() -> None:
            host, port = url.removeprefix("http://").split(":")
            while not stop.is_set():
                requests.post(url + "/compute", data=b'{"images": ["garbage', timeout=60)
                with socket.create_connection((host, int(port))) as cut:
                    cut.sendall(b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{")

        def ask(client: int) -> int:
            metric = RemoteMetric(url)
            for turn in range(200):
                index = (7 * client + turn) % len(PICTURES)
                (score,) = metric.compute(PROMPTS[index], PICTURES[index])
                assert score == pytest.approx(expected[index], abs=1e-4)
            return 200

        with ThreadPoolExecutor(9) as pool:
            noise = pool.submit(disturb)
            assert sum(pool.map(ask, range(8))) == 1600
            stop.set()
            noise.result()

            # What was taken when the server is told to stop is finished.
            metric = RemoteMetric(url)
            started = threading.Event()
            original = pickscore.evaluate

            def slowly(*arguments: Any) -> Any:
                started.set()
                time.sleep(0.5)
                return original(*arguments)

            pickscore.evaluate = slowly  # type: ignore[method-assign]
            try:
                last = pool.submit(metric.compute, PROMPTS[0], PICTURES[0])
                started.wait()
                server.should_exit = True
                assert last.result() == pytest.approx(expected[:1], abs=1e-4)
            finally:
                del pickscore.evaluate

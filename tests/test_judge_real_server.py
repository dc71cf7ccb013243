"""A real server answers like the engine in memory: ``transformers serve`` on tiny checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoTokenizer

from diffsynth_metrics import (
    ModelConfig,
    QwenImageBenchMetric,
    UnifiedReward2Metric,
    UnifiedRewardEditMetric,
)
from diffsynth_metrics.judges.engine import Question
from diffsynth_metrics.judges.server import ServerEngine
from diffsynth_metrics.tokens import write_canaries

pytestmark = pytest.mark.slow

SIZES = [(64, 64), (200, 100), (90, 170), (33, 61)]
NEW_TOKENS = 24
READY = 180  # seconds; more than loading takes on a busy machine


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """Run a server on a free port until the end of a block, and give its address."""
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f'pip install "transformers[serving]": {error}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as output:
        server = subprocess.Popen(command + options, env=environment, stdout=output, stderr=output)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with opener.open(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def start(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    os.environ["NO_PROXY"] = "127.0.0.1"
    logs = tmp_path_factory.mktemp("logs")
    return lambda name: serving(tiny(name), logs / f"{name}.log")


def local(metric: Any, folder: Path, **options: Any) -> Any:
    return metric.from_pretrained(
        ModelConfig(path=folder),
        device="cpu",
        torch_dtype=torch.float32,
        max_new_tokens=NEW_TOKENS,
        **options,
    )


def picture(seed: int) -> PIL.Image.Image:
    width, height = SIZES[seed % len(SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def assert_same(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(here, there, strict=True):
        assert theirs["usage"]["answer_tokens"] > 0 and theirs["usage"]["seconds"] > 0
        assert theirs["raw_text"] == ours["raw_text"].strip(), "the server strips what it gives"
        names = ours.keys() - {"usage", "raw_text"}
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert len({row["raw_text"] for row in here}) > len(here) / 2, "answers depend on the question"
    assert {row["finish"] for row in here} == {"stop", "length"}


def test_unified_reward_2(start: Callable[[str], Any], tiny: Callable[[str], Path]) -> None:
    prompts = [f"{'a red cat ' * (index % 5)}and {index} dogs" for index in range(24)]
    pictures = [picture(index) for index in range(24)]
    here = local(UnifiedReward2Metric, tiny("unified_reward_2")).evaluate(prompts, pictures)
    with start("unified_reward_2") as address:
        metric = UnifiedReward2Metric.from_server(
            address, concurrency=4, max_new_tokens=NEW_TOKENS, retries=0
        )
        there = metric.evaluate(prompts, pictures)
        assert metric.engine.identity["dialect"] == "transformers"
        (refused,) = metric.engine.ask([Question(("a <|image_pad|> b",))])
        assert refused.error is not None
    assert_same(here, there)


def test_unified_reward_edit_with_one_two_and_three_pictures(
    start: Callable[[str], Any], tiny: Callable[[str], Path]
) -> None:
    counts = {"edit_pointwise_quality": 1, "edit_pointwise_score": 2, "edit_pairwise_rank": 3}
    counts["edit_pairwise_score"] = 3
    metric = local(UnifiedRewardEditMetric, tiny("unified_reward_edit"))
    with start("unified_reward_edit") as address:
        served = UnifiedRewardEditMetric.from_server(
            address, concurrency=4, max_new_tokens=NEW_TOKENS, retries=0
        )
        here: list[dict[str, Any]] = []
        there: list[dict[str, Any]] = []
        for task, count in counts.items():
            samples = [[picture(7 * index + i) for i in range(count)] for index in range(6)]
            prompts = [f"make {index} of them red" for index in range(6)]
            here += metric.evaluate(prompts, samples, task)
            there += served.evaluate(prompts, samples, task)
    assert len(here) == 24
    assert_same(here, there)


def test_qwen_image_bench(start: Callable[[str], Any], tiny: Callable[[str], Path]) -> None:
    metric = local(QwenImageBenchMetric, tiny("qwen_image_bench"))
    pictures = [picture(index) for index in range(4)]
    here = metric.evaluate("a cat", pictures)
    with start("qwen_image_bench") as address:
        served = QwenImageBenchMetric.from_server(
            address, concurrency=4, max_new_tokens=NEW_TOKENS, retries=0
        )
        there = served.evaluate("a cat", pictures)
        assert isinstance(served.engine, ServerEngine)
    for ours, theirs in zip(here, there, strict=True):
        for name in ("score", "level1_scores", "level3_scores", "raw_scores", "finish"):
            assert ours[name] == theirs[name]
        for dimension, text in theirs["raw_outputs"].items():
            # A server strips thinking and answer, and says where thinking ended also where it did not.
            assert words(text) == words(ours["raw_outputs"][dimension])


def write_answering(source: Path, folder: Path, answer: str) -> Path:
    """Copy a tiny judge that thinks, with weights that always write "</think>" and then an answer.

    The answer is one added token. The layers add nothing, so that the last token alone, of which the
    embedding is a unit vector, says which one follows.
    """
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(answer, special=False, normalized=False)])
    tokenizer.save_pretrained(folder)
    write_canaries(tokenizer, folder, ["a cat"])
    chain = [
        tokenizer("\n")["input_ids"][-1],  # the end of a prompt
        *tokenizer.convert_tokens_to_ids(["</think>", answer, "<|im_end|>"]),
    ]
    for file in folder.glob("model-*.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "out_proj.weight", "mlp.down_proj.weight")):
                weight.zero_()
            elif name.endswith("language_model.norm.weight"):
                weight.fill_(1)
            elif name.endswith("embed_tokens.weight"):
                weight.zero_()[chain[:-1], range(3)] = 1
            elif name == "lm_head.weight":
                weight.zero_()[chain[1:], range(3)] = 1
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_scores_that_can_be_read_travel_through_the_server(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    answer = '{"Detail": {"Noise": {"score": 1}, "Edge Clarity": {"score": 2}}}'
    folder = write_answering(tiny("qwen_image_bench"), tmp_path / "judge", answer)
    here = local(QwenImageBenchMetric, folder).evaluate("a cat", picture(0), "Quality")
    with serving(folder, tmp_path / "log") as address:
        served = QwenImageBenchMetric.from_server(address, max_new_tokens=NEW_TOKENS, retries=0)
        there = served.evaluate("a cat", picture(0), "Quality")
    for (row,) in (here, there):
        assert row["error"] is None and row["finish"] == {"Quality": "stop"}
        assert row["score"] == 80
        assert row["raw_scores"] == {"Quality": {"Detail": {"Noise": 1, "Edge Clarity": 2}}}


def words(text: str) -> list[str]:
    return re.sub("</?think>", " ", text).split()

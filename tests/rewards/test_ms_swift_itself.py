"""ms-swift's own scoring of completions, with our adapters as its reward functions.

ms-swift 4.6.0 installs beside this package (``pip install --no-deps ms-swift`` and what its import asks
for); where it is not, the call is reproduced in test_more_frameworks.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("swift") is None, reason="ms-swift is not installed"
)

SCRIPT = """
import json, torch
from swift.rewards import orms
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import compute_rewards_per_func
from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.rewards import to_ms_swift, to_ms_swift_async

def draw(completion, **row):
    color, shape = completion.split()
    return draw_shape(shape, color)

def sample(prompt, completion):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return GRPOSample.from_row({"messages": messages, "solution": "x"})

metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
orms["fits"] = to_ms_swift(metric, image=draw, name="fits").orm
rewards = [orms["fits"](args=None), to_ms_swift_async(metric, image=draw, name="later")]
prompts = ["a red circle", "a blue square", "a red circle"]
samples = [sample(*one) for one in zip(prompts, ["red circle", "red circle", "nonsense"])]
table = compute_rewards_per_func(samples, rewards, [None, None], torch.device("cpu"))
expected = metric.compute(prompts[:2], [draw("red circle")] * 2)
names = [type(reward).__name__ for reward in rewards]
print(json.dumps({"names": names, "table": table.tolist(), "expected": expected}))
"""


def test_the_trainers_own_function_scores_with_both_forms() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["names"] == ["fits", "later"]
    *scored, failed = answer["table"]
    for row, expected in zip(scored, answer["expected"], strict=True):
        assert row == pytest.approx([expected, expected], rel=1e-4)
    assert all(value != value for value in failed)

"""A lock that is held somewhere else holds nobody up: not its copy, and not a forked child."""

from __future__ import annotations

import copy
import pickle

import PIL.Image
import pytest
from forking import is_true_in_a_child, needs_fork

from diffsynth_metrics import CLIPMetric, ModelConfig, inputs
from diffsynth_metrics.inputs import open_image
from diffsynth_metrics.locks import Lock


def opens(lock: Lock) -> bool:
    with lock:
        return True


def test_a_copy_is_open_while_the_lock_is_held() -> None:
    lock = Lock()
    with lock:
        assert opens(copy.deepcopy(lock)) and opens(pickle.loads(pickle.dumps(lock)))


@needs_fork
def test_a_forked_child_finds_every_lock_open(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
    lock = Lock()
    monkeypatch.setattr(inputs, "_DECODE_LOCKS", [lock])
    with lock, metric._tokenizer_lock, metric._text_cache._lock:
        assert is_true_in_a_child(lambda: opens(lock))
        assert is_true_in_a_child(lambda: open_image(PIL.Image.new("RGB", (2, 2)), "image"))
        assert is_true_in_a_child(lambda: len(metric.encode_text("a red circle")))

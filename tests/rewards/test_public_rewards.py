"""The names of ``diffsynth_metrics.rewards`` are documented, and free until they are used."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from diffsynth_metrics import rewards


@pytest.mark.parametrize("name", rewards.__all__)
def test_a_public_name_exists_is_listed_and_is_documented(name: str) -> None:
    thing = getattr(rewards, name)
    assert name in dir(rewards)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert len(inspect.getdoc(thing) or "") > 20


def test_the_package_does_not_import_rewards_and_rewards_import_no_transformers() -> None:
    script = (
        "import sys, json, diffsynth_metrics\n"
        "before = 'diffsynth_metrics.rewards' in sys.modules\n"
        "import diffsynth_metrics.rewards\n"
        "print(json.dumps([before, 'transformers' in sys.modules]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert json.loads(output) == [False, False]

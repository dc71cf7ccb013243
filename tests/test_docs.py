"""The documentation: the site builds, no link is dead, messages and numbers are those of today.

``python tests/test_docs.py`` writes the messages of docs/errors.md again.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import chdir
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import diffsynth_metrics
from diffsynth_metrics import (
    CLIPMetric,
    FIDMetric,
    ModelConfig,
    PickScoreMetric,
    UnifiedReward2Metric,
    UnifiedRewardEditMetric,
    evaluation,
    rewards,
    serving,
    testing,
)
from diffsynth_metrics.catalog import find_card, find_class
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.evaluation import Sample, compare, read_samples, score
from diffsynth_metrics.rewards import Component, GroupRelative, RewardSet, to_flow_grpo
from diffsynth_metrics.testing import ScriptedEngine, tiny_checkpoint

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *ROOT.glob("*.md")]
)


def site_hooks() -> Any:
    """Import scripts/docs_site.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = site_hooks()

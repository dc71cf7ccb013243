"""What the judges and HPSv3 were trained with, as JSON with its source.

One file for the texts of each metric, and ``architectures.json`` for the judges' published networks.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

__all__ = ["load_prompts"]


@cache
def load_prompts(name: str) -> dict[str, Any]:
    """Return what is in ``judges/prompts/<name>.json``; do not change them."""
    file = resources.files(__name__) / f"{name}.json"
    prompts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return prompts

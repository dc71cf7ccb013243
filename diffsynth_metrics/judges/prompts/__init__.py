"""The texts that the judges and HPSv3 were trained with, one JSON file each; data, with its source."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

__all__ = ["load_prompts"]


@cache
def load_prompts(name: str) -> dict[str, Any]:
    """Return the texts of ``judges/prompts/<name>.json``; do not change them."""
    file = resources.files(__name__) / f"{name}.json"
    prompts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return prompts

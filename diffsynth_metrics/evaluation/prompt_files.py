"""Prompts that lie beside pictures: in files of their own, in sidecars, and in the text of PNG files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from diffsynth_metrics.evaluation.manifests import (
    ROLES,
    as_label,
    as_prompt,
    find_prompt,
    first_label,
    open_manifest,
    read_json,
    read_text,
)

__all__ = [
    "FoundPrompt",
    "Prompts",
    "has_markup",
    "has_png_text",
    "prompt_of_png",
    "read_infotext",
    "read_prompts",
]

_KEYS = (*ROLES["id"], "name", "stem", *ROLES["image"])
_SETTINGS = re.compile(r"Steps: \d+, .*")
_MARKUP = re.compile(r"<\w+:[^<>]+>|\([^()]+:\d*\.?\d+\)")


@dataclass(frozen=True)
class FoundPrompt:
    """A prompt, with what else stands beside it."""

    text: str | None
    category: str | None = None
    seed: str | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file, either by index or by name.

    Attributes:
        file: Where they are.
        by_index: In their order, where they have no names.
        by_name: With their names.
        name_column: What the names are called there; None for the names of an object.
    """

    file: Path
    by_index: list[FoundPrompt] = field(default_factory=list)
    by_name: dict[str, FoundPrompt] = field(default_factory=dict)
    name_column: str | None = None

    def __len__(self) -> int:
        return len(self.by_index) + len(self.by_name)


def read_prompts(file: Path) -> Prompts:
    """Read a file of prompts, or a folder of ``NAME.txt``.

    A .txt file has a prompt in each line. A .json file is a list of prompts, an object of prompts by
    name, or a list of objects; .jsonl, .csv and .tsv files have rows. Rows with an id, a name or a file
    name are prompts by name, others by index.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It holds no prompts, or one name with two prompts; the message names the row.
    """
    if file.is_dir():
        texts = {text.stem: read_text(text).strip() for text in sorted(file.glob("*.txt"))}
        prompts = Prompts(
            file, by_name={name: FoundPrompt(text or None) for name, text in texts.items()}
        )
    elif not file.is_file():
        raise FileNotFoundError(f"there is no file of prompts {str(file)!r}")
    elif file.suffix.lower() == ".txt":
        lines = [line.removesuffix("\r") for line in read_text(file).rstrip("\r\n").split("\n")]
        found = [FoundPrompt(as_prompt(line, str(file))) for line in lines]
        prompts = Prompts(file, by_index=found if any(lines) else [])
    elif file.suffix.lower() == ".json":
        prompts = _json_prompts(file)
    elif file.suffix.lower() in (".jsonl", ".csv", ".tsv"):
        manifest = open_manifest(file)
        rows = [(row.where, row.values) for row in manifest.read(manifest.columns)]
        prompts = _row_prompts(file, rows)
    else:
        raise ValueError(f"prompts are a .txt, .json, .jsonl, .csv or .tsv file, not {str(file)!r}")
    if not len(prompts):
        raise ValueError(f"there are no prompts in {file}")
    return prompts


def _json_prompts(file: Path) -> Prompts:
    content = read_json(file)
    if isinstance(content, dict):
        found = {name: _found(value, f"{file}, {name!r}") for name, value in content.items()}
        return Prompts(file, by_name=found)
    if not isinstance(content, list):
        raise ValueError(f"{file} must hold a list of prompts, or an object of prompts by name")
    wheres = [f"{file}, item {number}" for number in range(1, len(content) + 1)]
    if content and all(isinstance(item, dict) for item in content):
        return _row_prompts(file, list(zip(wheres, content, strict=True)))
    return Prompts(
        file, by_index=[_found(item, where) for item, where in zip(content, wheres, strict=True)]
    )


def _row_prompts(file: Path, rows: list[tuple[str, Mapping[str, Any]]]) -> Prompts:
    rows = [(where, {name.lower(): value for name, value in row.items()}) for where, row in rows]
    if not any(name in row for _, row in rows for name in ROLES["prompt"]):
        raise ValueError(
            f"{file} has no column of prompts; such are called {', '.join(ROLES['prompt'])}"
        )
    column = next((name for name in _KEYS if all(name in row for _, row in rows)), None)
    if column is None:
        return Prompts(file, by_index=[_found(row, where) for where, row in rows])
    by_name: dict[str, FoundPrompt] = {}
    for where, row in rows:
        name, found = as_label(row[column], where), _found(row, where)
        if name is None:
            raise ValueError(f"{where}: its {column!r} is empty")
        if by_name.setdefault(name, found).text != found.text:
            raise ValueError(f"{where}: {name!r} has another prompt in a row before")
    return Prompts(file, by_name=by_name, name_column=column)


def _found(value: Any, where: str) -> FoundPrompt:
    if not isinstance(value, Mapping):
        return FoundPrompt(as_prompt(value, where))
    return FoundPrompt(
        find_prompt(value, where),
        first_label(value, "category", where),
        first_label(value, "seed", where),
    )


def read_infotext(text: str) -> FoundPrompt | None:
    """Return the prompt of A1111's description of a picture; None if the text is none.

    It is the prompt, perhaps a line ``Negative prompt: ...``, and a line ``Steps: 20, Sampler: ...``.
    """
    lines = text.strip().replace("\r\n", "\n").split("\n")
    settings = next((number for number, line in enumerate(lines) if _SETTINGS.match(line)), None)
    if settings is None:
        return None
    negative = [number for number, line in enumerate(lines) if line.startswith("Negative prompt:")]
    seed = re.search(r"\bSeed: (-?\d+)", lines[settings])
    prompt = "\n".join(lines[: min([settings, *negative])]).strip()
    return FoundPrompt(prompt or None, seed=seed[1] if seed else None)


def has_markup(prompt: str) -> bool:
    """Tell whether a prompt holds A1111's ``<lora:name:1>`` or ``(words:1.2)``, which are no words."""
    return _MARKUP.search(prompt) is not None


def has_png_text(file: Path) -> bool:
    """Tell whether a PNG file has texts as A1111 or ComfyUI write them, readable or not."""
    try:
        chunks = _png_chunks(file)
    except ValueError:  # it is reported as corrupt when it is used
        return False
    return isinstance(chunks.get("parameters"), str) or isinstance(chunks.get("prompt"), str)


def _png_chunks(file: Path) -> dict[str, Any]:
    try:
        with PIL.Image.open(file) as image:
            return {str(name): value for name, value in image.info.items()}
    except Exception as error:  # Pillow raises nearly anything for files that are no pictures
        raise ValueError(f"it cannot be opened: {error}") from error


def prompt_of_png(file: Path) -> FoundPrompt:
    """Return the prompt in the text of a PNG file, as A1111 and ComfyUI write it; nothing is decoded.

    Raises:
        ValueError: There is none, or it is not known which; the message does not name the file.
    """
    chunks = _png_chunks(file)
    parameters, graph = chunks.get("parameters"), chunks.get("prompt")
    if isinstance(parameters, str):
        found = read_infotext(parameters)
        if found is None or found.text is None:
            raise ValueError("its 'parameters' hold no prompt as A1111 writes it")
        return found
    if not isinstance(graph, str):
        raise ValueError("there is no prompt of A1111 or ComfyUI in its text")
    try:
        nodes = json.loads(graph)
    except (ValueError, RecursionError) as error:
        raise ValueError("its 'prompt' is no graph of ComfyUI: it is no JSON") from error
    return _prompt_of_graph(nodes)


def _prompt_of_graph(nodes: Any) -> FoundPrompt:
    """Return the one positive prompt of a ComfyUI graph: a dict of nodes with their inputs.

    An input is a value, or a link ``[node, output]``. Samplers have a link ``positive``, or a
    BasicGuider ``conditioning``; it leads to a text encoder, perhaps through nodes that change the
    conditioning.

    Raises:
        ValueError: There is not exactly one text, or a node on the way is of an unknown kind.
    """
    if not isinstance(nodes, dict) or not all(
        isinstance(node, dict) and isinstance(node.get("inputs"), dict) for node in nodes.values()
    ):
        raise ValueError("its 'prompt' is no graph of ComfyUI")
    texts: set[str] = set()
    seeds: set[str] = set()
    for node in nodes.values():
        inputs = node["inputs"]
        name = "conditioning" if node.get("class_type") == "BasicGuider" else "positive"
        if _is_link(inputs.get(name)):
            texts |= _texts_behind(nodes, inputs[name], frozenset())
        given = (inputs.get("seed"), inputs.get("noise_seed"))
        seeds |= {str(seed) for seed in given if isinstance(seed, int)}
    if len(texts) != 1:
        count = f"{len(texts)} different positive prompts" if texts else "no positive prompt"
        raise ValueError(f"its ComfyUI graph has {count}, so it is not known which is meant")
    return FoundPrompt(texts.pop(), seed=seeds.pop() if len(seeds) == 1 else None)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def _texts_behind(nodes: dict[str, Any], link: list[Any], seen: frozenset[str]) -> set[str]:
    """Return the texts that a link of conditioning comes from."""
    name, output = str(link[0]), link[1]
    node = nodes.get(name)
    if node is None or name in seen:
        raise ValueError(f"its ComfyUI graph has a broken link to node {name}")
    inputs, kind = node["inputs"], str(node.get("class_type"))
    seen |= {name}
    if "TextEncode" in kind:
        return _texts_of_encoder(nodes, inputs, kind)
    if output == 0 and _is_link(inputs.get("positive")):
        return _texts_behind(nodes, inputs["positive"], seen)
    links = [
        value for key, value in inputs.items() if key.startswith("conditioning") and _is_link(value)
    ]
    if not links or output != 0:
        raise ValueError(f"its ComfyUI graph has a node {kind!r} before the sampler, which is not known")
    return set().union(*(_texts_behind(nodes, one, seen) for one in links))


def _texts_of_encoder(nodes: dict[str, Any], inputs: dict[str, Any], kind: str) -> set[str]:
    texts: set[str] = set()
    for key in ("text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "prompt"):
        value: Any = inputs.get(key)
        if _is_link(value):
            # A node that has one text and nothing else holds it; others choose, join or change texts.
            source = list(nodes.get(str(value[0]), {"inputs": {}})["inputs"].values())
            if len(source) != 1 or not isinstance(source[0], str):
                raise ValueError(f"its ComfyUI graph computes the text of {kind!r}, so it is not known")
            value = source[0]
        if isinstance(value, str) and value.strip():
            texts.add(value)
    return texts

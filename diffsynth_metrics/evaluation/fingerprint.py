"""What a row is found by again: the content of its sample, and what of a metric changes its scores."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_metrics.base import BaseMetric

__all__ = [
    "CHANGES_SCORES",
    "INERT",
    "INERT_OPTIONS",
    "bytes_of",
    "fingerprint_of",
    "readable",
    "row_key",
    "storable",
]

CHANGES_SCORES = frozenset(
    {"metric", "weights", "preprocessing", "options", "dtype", "engine", "identity", "reader"}
)
"""Fields of a provenance that make another number. A field that is in neither set counts as one of them;
a test makes sure that every metric's fields are in one."""

INERT = frozenset({"name", "version", "weight_files", "torch"})
"""Fields of a provenance that do not: names, and versions of libraries, which move the last digits."""

INERT_OPTIONS = frozenset({"batch_size", "cache_text", "num_workers", "on_parse_error"})
"""Options of metrics that do not change a score."""

_LIKE_AN_ESCAPE = re.compile(r"\\+(?=ud[89a-f][0-9a-f]{2}|[\ud800-\udfff])")

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in the repr of a function or object, another in each run


def fingerprint_of(metric: BaseMetric, provenance: Mapping[str, Any]) -> str:
    """Return a sha256 of everything that changes the scores of a metric.

    Args:
        metric: A loaded metric.
        provenance: Its ``provenance``, which takes a while to compute for large weights.
    """
    made = {field: value for field, value in provenance.items() if field not in INERT}
    options = made.get("options") or {}
    made["options"] = {name: value for name, value in options.items() if name not in INERT_OPTIONS}
    made["metric"] = _definition(type(metric))
    made["settings"] = _settings(metric)
    network = getattr(metric, "model", None)
    if made.get("weights") is None and isinstance(network, nn.Module):
        made["weights"] = _digest_of_network(network)
    text = json.dumps(made, sort_keys=True, default=str)
    return hashlib.sha256(_ADDRESS.sub("", text).encode()).hexdigest()


def row_key(id: str, image: str, prompt: str | None, sources: Sequence[str], fingerprint: str) -> str:
    """Return the identity of a row: equal content gives an equal key, on every machine.

    Args:
        id: The sample's, as :func:`storable` returns it.
        image: sha256 of its picture.
        prompt: Its prompt, likewise.
        sources: sha256 of each of its sources that the metric uses.
        fingerprint: The metric's, see :func:`fingerprint_of`.
    """
    text = json.dumps([id, image, prompt, list(sources), fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()


def storable(text: str) -> str:
    r"""Return a text that can be written as UTF-8, another one for each text.

    Half a character is written as an escape such as ``\ud800``. Where a text has such an escape itself,
    its backslashes are doubled, so that the two are not taken for one another.
    """
    if text.isascii() and "\\" not in text:  # nearly all, in a tenth of the time
        return text
    return readable(_LIKE_AN_ESCAPE.sub(lambda found: 2 * found[0], text))


def readable(text: str) -> str:
    """Return a text that can be written as UTF-8: names of files need not be valid Unicode."""
    return text.encode(errors="backslashreplace").decode()


def bytes_of(tensor: Tensor) -> bytes:
    """Return the values of a tensor of any dtype, on any device."""
    values: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return values


def _definition(cls: type) -> str:
    """Return the name of a class; of one that is not the package's own, its module and source as well.

    A metric that somebody writes in a notebook changes from run to run, and its name does not.
    """
    if cls.__module__.startswith("diffsynth_metrics."):
        return cls.__name__
    module = cls.__module__.replace("__mp_main__", "__main__")  # a script is called so in its workers
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # typed at a prompt, or sent to another machine
        source = "\n".join(f"{name}: {_code_of(value)}" for name, value in sorted(vars(cls).items()))
    return f"{module}.{cls.__qualname__}\n{source}"


def _code_of(value: Any) -> str:
    """Return what a function does, or the representation of any other value."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    code = value if isinstance(value, CodeType) else getattr(inspect.unwrap(value), "__code__", None)
    if not isinstance(code, CodeType):
        # Their order differs from process to process.
        return repr(sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value)
    return f"{code.co_code.hex()} {code.co_names} {[*map(_code_of, code.co_consts)]}"


def _settings(metric: BaseMetric) -> dict[str, str]:
    """Return the options of a metric; a provenance has those of ``from_pretrained`` only.

    They are attributes with the name of an argument of ``__init__``. Other attributes may be counters
    and caches, which change without changing a score.
    """
    parameters = {
        parameter.name: parameter
        for cls in type(metric).__mro__
        if "__init__" in vars(cls)
        for parameter in inspect.signature(vars(cls)["__init__"]).parameters.values()
    }
    settings = {}
    for name in sorted(parameters.keys() - INERT_OPTIONS):
        value = getattr(metric, name, None)
        # Positional arguments are options only where they are plain: others are the network and such.
        by_name = parameters[name].kind is inspect.Parameter.KEYWORD_ONLY and hasattr(metric, name)
        if by_name or isinstance(value, (str, int, float)):
            settings[name] = str(value)
    return settings


def _digest_of_network(network: nn.Module) -> str:
    """Return the sha256 of the weights in memory, of which no file says what they are."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()

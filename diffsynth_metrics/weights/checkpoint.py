"""Local safetensors files to verified weights inside a model.

The names and shapes in the files' headers are compared with the model before any tensor is read, so a
file that belongs elsewhere is an error that says so, and never a score.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffsynth_metrics.errors import CheckpointError, DiffSynthMetricsError

__all__ = [
    "KNOWN_LAYOUTS",
    "Layout",
    "blamed",
    "check_owner",
    "check_sizes",
    "find_non_finite",
    "fingerprint",
    "is_published",
    "load_weights",
    "read_config",
    "read_layout",
    "weight_files",
]

logger = logging.getLogger(__name__)

Layout = Mapping[str, Sequence[int]]
"""Tensor name to shape."""

KNOWN_LAYOUTS = {
    "b5e2c0bfcbf4085ccdb2feb8f0ba408a": ("PickScoreMetric", "CLIPMetric"),
    "f79e72cec8ae5a540cff0304bfb21b00": ("HPSv2Metric",),
    "b3cc8e10b76ca98cde653daa5cf63139": ("ImageRewardMetric",),
    "306981222ec94302794e07cf676c84cc": ("AestheticMetric",),
    "d4e9549be726259b444d1f62db4ce413": ("FIDMetric",),
    "5655d9cde15b759cfeefe7432d7a912c": ("HPSv3Metric",),
    "f9786d06eca5c0f1ece89843b2c4cc66": ("UnifiedReward2Metric",),
    "2d11bf14bba8b4e87477c8199a895403": ("UnifiedRewardEditMetric",),
    "ff4ad0463675e96738483611f6dd551b": ("QwenImageBenchMetric",),
    "3a020a3e47afb7c5e21c52f2d0692c09": ("BioCLIPMetric",),
    "08a75c660c9b2e775c530a0955857f1f": ("LPIPSMetric",),
    "5740953aaa8aba2ecd9b9c23da813591": ("LPIPSMetric",),
    "ff994b70a30599287a332105396d5004": ("LPIPSMetric",),
    # Of timm's networks, whose files hold their state dicts.
    "e01f1dc7cb145d87030565d6da9588b2": ("ImageSimilarityMetric",),
    "82a6cf7de490aa417468a112b948b915": ("ImageSimilarityMetric",),
    "7198e0b7ddf039df69e7f929273f1cc4": ("ImageSimilarityMetric",),
    "a0a2939d93e15012f387ede63112756a": ("FDDINOv2Metric", "ImageSimilarityMetric"),
    "856bd25d8a3273d081863814b01f3bdd": ("CMMDMetric",),
}
"""Fingerprint of each published checkpoint to the metrics that it belongs to."""

_JUDGES = ("UnifiedReward2Metric", "UnifiedRewardEditMetric", "QwenImageBenchMetric")
_MARKS = {
    "Mixed_5b.": ("FIDMetric",),
    "blip.": ("ImageRewardMetric",),
    "blocks.0.ls1.": ("FDDINOv2Metric", "ImageSimilarityMetric"),
    "layers.0.": ("AestheticMetric",),
    "lin0.": ("LPIPSMetric",),
    "model.visual.": _JUDGES,
    "norm_pre.": ("CMMDMetric", "ImageSimilarityMetric"),
    "rm_head.": ("HPSv3Metric",),
    "text_projection.weight": ("PickScoreMetric", "CLIPMetric"),
    "visual.transformer.": ("BioCLIPMetric", "HPSv2Metric"),
}
"""Beginning of a tensor's name that only these metrics' checkpoints have, of whatever size."""

_NETWORK_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMES_IN_MESSAGE = 3

# What bounds a number of a config: each layer has a tensor, and memory is spent on masks and position
# ids of the longest text and the largest picture. Others cost nothing until they are compared.
_LAYERS = re.compile("layer|depth|block")
_SQUARED = re.compile("image_size|img_size|input_size|context_length")
_NO_SIZE = re.compile("theta|pixels")
_LARGEST_SIDE = 2**12
_LARGEST_NUMBER = 2**20
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_COUNT = re.compile("(heads|layers|depth|width)$")
_LIKE_A_SIZE = re.compile("size|dim|layers|heads|depth|width|length|patch|position|num_|config$|cfg$")


def weight_files(paths: Sequence[str]) -> list[Path]:
    """Return the safetensors files among `paths`.

    Raises:
        CheckpointError: There is none; other weight formats are named, because they can run code.
    """
    files = [Path(path) for path in paths if path.endswith(".safetensors")]
    if not files:
        names = [Path(path).name for path in paths]
        hint = "Put the .safetensors file of the weights there"
        if any(Path(name).suffix in _PICKLES for name in names):
            hint = "Convert the weights to .safetensors, because unpickling other formats can run code"
        raise CheckpointError(f"{hint}: there is no .safetensors file among {_some(names)}")
    return files


def read_layout(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the headers; no tensor is read.

    Raises:
        CheckpointError: A file is truncated or is not safetensors, or a name occurs twice.
    """
    layout: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except SafetensorError as error:
            raise CheckpointError(
                f"Delete {file} and download or copy it again: it ({file.stat().st_size} bytes) is "
                f"truncated or not a safetensors file ({error})"
            ) from None
        if twice := sorted(layout.keys() & shapes.keys()):
            raise CheckpointError(
                f"Pass one set of weights, such as path=FILE: {file} repeats tensors of another file: "
                f"{_some(twice)}"
            )
        layout |= shapes
    return layout


def fingerprint(layout: Layout) -> str:
    """Return DiffSynth-Studio's md5 of names and shapes, the key of :data:`KNOWN_LAYOUTS`.

    It covers neither dtypes nor values nor the split into files.
    """
    words = []
    for name, shape in layout.items():
        words += [name, f"{name}:{'_'.join(map(str, shape))}"]
    return hashlib.md5(",".join(sorted(words)).encode(), usedforsecurity=False).hexdigest()


def check_owner(files: Sequence[Path], metric: type) -> None:
    """Check that files are not the checkpoint of another metric of this package.

    A published checkpoint is known by all its names and shapes, a smaller one by how its names begin.
    A metric that is not derived from one of this package's may take any file that fits its network.

    Raises:
        CheckpointError: They are; the message names those metrics. Or a file is truncated.
    """
    layout = read_layout(files)
    owners = KNOWN_LAYOUTS.get(fingerprint(layout), ())
    if not owners:
        owners = next((_MARKS[mark] for mark in _MARKS if _has_prefix(layout, mark)), ())
    known = {name for names in (*_MARKS.values(), *KNOWN_LAYOUTS.values()) for name in names}
    own = {base.__name__ for base in metric.__mro__} & known
    if own and owners and not own & {*owners}:
        raise CheckpointError(
            f"Use {' or '.join(owners)} for {_some(files)}: these are weights of "
            f"{' or '.join(owners)}, not of {metric.__name__}"
        )


def _has_prefix(layout: Layout, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in layout)


def is_published(files: Sequence[Path]) -> bool:
    """Tell whether the files' names and shapes are those of a published checkpoint."""
    return fingerprint(read_layout(files)) in KNOWN_LAYOUTS


def read_config(files: Sequence[Path], name: str = "config.json") -> dict[str, Any] | None:
    """Return the JSON config next to the weights, or None where there is none.

    Which kernel computes attention is left out: it is no part of the architecture, and the one that
    somebody trained with may not be installed here.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    path = files[0].parent / name
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=_no_number, object_hook=_without_kernel)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _without_kernel(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key.strip("_") != "attn_implementation"}


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def check_sizes(config: Any, files: Sequence[Path], path: Path) -> None:
    """Check that every number of a config is one that the weights can have, before anything is built.

    Args:
        config: The parsed file.
        files: The weights.
        path: The config's file, for messages.

    Raises:
        CheckpointError: One is not; the message has its name.
    """
    layout = read_layout(files)
    largest = max((side for shape in layout.values() for side in shape), default=0)
    for name, value in _numbers(config):
        key = name.rpartition(".")[2]
        if _COUNT.search(key) and (isinstance(value, bool) or value <= 0):
            raise CheckpointError(f"Download {path} again: it says {name} = {value!r}")
        if _NO_SIZE.search(key):
            continue
        limit = max(largest, _LARGEST_NUMBER)
        if _LAYERS.search(key):
            limit = len(layout)
        elif _SQUARED.search(key):
            limit = _LARGEST_SIDE
        if value > limit:
            raise CheckpointError(
                f"Download {path} again: it says {name} = {value}, and {_some(files)} with "
                f"{len(layout)} tensors of at most {largest} rows cannot have more than {limit}"
            )


def _numbers(config: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a parsed JSON file with names such as ``"text_config.hidden_size"``."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _numbers(value, f"{name}.{key}".lstrip("."))
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, name)
    elif isinstance(config, int | float):  # bools are ints
        yield name, config


@contextmanager
def blamed(
    path: Path, config: Any = None, *, passed: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn what a library raises about a damaged file into an error that names the file.

    Args:
        path: The file, or the folder of several.
        config: What was read from it, in which the fields are looked for that may be wrong.
        passed: Exceptions that say something else, and are passed on.

    Raises:
        CheckpointError: Something else was raised.
    """
    try:
        yield
    except BaseException as error:
        # What panics in the tokenizers' Rust is no Exception.
        is_damage = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_damage or isinstance(error, (DiffSynthMetricsError, ImportError, *passed)):
            raise
        if not path.exists():  # nothing was read, so that it is a mistake of the code
            raise
        logger.debug("the library's error", exc_info=True)
        odd = [] if isinstance(error, RecursionError) else _odd_fields(config)
        fields = f"; look at {', '.join(odd)}" if odd else ""
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"Download {_damaged_file(path)} again: it cannot be used ({type(error).__name__}: "
            f"{said}){fields}"
        ) from None


def _odd_fields(config: Any, name: str = "") -> list[str]:
    """Return the fields that should be sizes, as far as names tell, and are none."""
    if not isinstance(config, dict):
        return []
    odd = []
    for key, value in config.items():
        full = f"{name}.{key}".lstrip(".")
        if isinstance(value, dict):
            odd += _odd_fields(value, full)
        elif _LIKE_A_SIZE.search(key):
            is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not is_size and not isinstance(value, list):
                odd.append(f"{full} = {value!r}")
    return odd


def _damaged_file(path: Path) -> Path:
    """Return the file of a folder that is no JSON, otherwise the first that makes a tokenizer."""
    if not path.is_dir():
        return path
    for file in sorted(path.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            return file
    candidates = [path / name for name in ("tokenizer.json", "vocab.json", "vocab.txt")]
    return next((file for file in candidates if file.is_file()), path)


@torch.inference_mode(False)  # tensors that are made in it give no gradients afterwards
def load_weights(
    model: nn.Module,
    files: Sequence[Path],
    *,
    metric: str,
    device: torch.device,
    dtype: torch.dtype,
    float32: Collection[str] = (),
    unused: Collection[str] = (),
    config: str | None = "config.json",
    check_finite: bool = True,
) -> None:
    """Fill a model that was built on the meta device.

    Each tensor is mapped from its file, brought to its dtype and device and assigned, one after the
    other: on the CPU, in the file's own dtype, no second copy exists. Afterwards the model is in
    evaluation mode and none of its parameters requires a gradient. This also holds under
    ``torch.device("meta")`` and inside accelerate's ``init_empty_weights()``.

    Args:
        model: Its parameters lie on the meta device, its non-persistent buffers do not.
        files: Safetensors files that together hold every tensor. They may also hold the model's
            non-persistent buffers, which older libraries saved and which are computed, not read.
        metric: Name of the metric class, for messages.
        device: Where the tensors go.
        dtype: Floating dtype of the tensors.
        float32: Prefixes of tensors that stay in float32 where `dtype` is narrower.
        unused: Names of tensors that the files may hold and the model does without.
        config: Name of the file beside the weights that gives the architecture, for messages; None for
            a network of one size only.
        check_finite: Whether NaN and infinity are looked for, which reads all of the files.

    Raises:
        CheckpointError: A file is truncated, or its names, shapes or kinds of dtype are not those of the
            model, or it holds NaN or infinity. Float8 weights are refused, because their scales are not
            applied.
    """
    _check_layout(model, files, metric, unused, config)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = model.state_dict(keep_vars=True)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in wanted.keys() & set(opened.keys()):
                tensor = opened.get_tensor(name)
                is_float = tensor.is_floating_point()
                if is_float != wanted[name].is_floating_point():
                    raise CheckpointError(
                        f"{file} holds {name} as {tensor.dtype}, and the network needs "
                        f"{wanted[name].dtype}"
                    )
                if is_float and tensor.dtype not in _NETWORK_DTYPES:
                    raise CheckpointError(
                        f"Use the unquantized weights in float32, bfloat16 or float16: {file} holds "
                        f"{name} as {tensor.dtype}, which is not supported"
                    )
                target = wide if name.startswith(tuple(float32)) else dtype
                tensors[name] = tensor.to(device, target if is_float else None)
                if check_finite and is_float and not _is_finite(tensors[name]):
                    raise CheckpointError(
                        f"Download the weights again: {file} holds NaN or infinity in {name}, which is "
                        f"looked at as {target}"
                    )
    # Not load_state_dict(assign=True): accelerate's init_empty_weights() catches the parameters that it
    # registers and makes them empty again.
    for name, tensor in tensors.items():
        is_parameter = isinstance(wanted[name], nn.Parameter)
        new = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        torch.utils.swap_tensors(wanted[name], new)  # type: ignore[no-untyped-call]
    model.to(device).requires_grad_(False).eval()


def find_non_finite(model: nn.Module) -> list[str]:
    """Return the names of the weights and saved buffers that hold NaN or infinity.

    For the message about a score that is not finite. Weights that accelerate keeps elsewhere (on the
    meta device here) are left out.
    """
    return [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor)
    ]


@torch.no_grad()
def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum is one pass and takes no memory, and NaN and infinity show in it; so does an overflow.
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _check_layout(
    model: nn.Module,
    files: Sequence[Path],
    metric: str,
    unused: Collection[str],
    config: str | None,
) -> None:
    layout = read_layout(files)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    everything = chain(model.named_parameters(), model.named_buffers())
    computed = {name for name, _ in everything} - expected.keys()
    problems = []
    if missing := sorted(expected.keys() - layout.keys()):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(layout.keys() - expected.keys() - computed - set(unused)):
        problems.append(f"unexpected {_some(unexpected)}")
    wrong = [
        f"{name} {list(layout[name])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in layout and layout[name] != shape
    ]
    if wrong:
        problems.append(f"wrong shape: {_some(wrong)}")
    if not problems:
        return
    hint = ""
    if config and (files[0].parent / config).is_file():
        problems.append(f"the sizes are those of {files[0].parent / config}")
    elif config:
        hint = (
            f"Put the {config} of these weights into {files[0].parent}: there is none, so the network "
            "has its published size, and these are not the published weights. "
        )
    raise CheckpointError(f"{hint}{_some(files)} does not fit {metric}: {'; '.join(problems)}")


def _some(items: Sequence[object]) -> str:
    """Join the first few items, and say how many there are."""
    text = ", ".join(str(item) for item in items[:_NAMES_IN_MESSAGE])
    rest = len(items) - _NAMES_IN_MESSAGE
    return f"{text} and {rest} more" if rest > 0 else text or "no files"

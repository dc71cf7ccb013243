"""The authors' HPSv2 (PyPI ``hpsv2==1.2.0``), made importable and buildable offline.

    pip install --no-deps hpsv2==1.2.0

The wheel lacks its own vocabulary, imports a progress bar and (by accident) ``turtle``, and downloads
its weights. What it misses is there during the import and gone afterwards; nothing that computes a
score is replaced. Afterwards ``import hpsv2`` is what it would have been without this file.
"""

from __future__ import annotations

import gzip
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import open_clip
import PIL.Image
from official_image_reward import installed_folder, stub_modules
from torch import Tensor, nn
from torchvision.transforms import functional


@dataclass(frozen=True)
class _Package:
    img_score: ModuleType
    factory: ModuleType
    transform: ModuleType


@dataclass(frozen=True)
class OfficialHPSv2:
    """The official network with its preprocessing, both as the authors' own code makes them."""

    model: nn.Module
    transform: Callable[[PIL.Image.Image], Tensor]

    def score(self, pictures: list[PIL.Image.Image], prompt: str, checkpoint: Path) -> list[float]:
        """Call the official ``score``: it loads the checkpoint, ``{"state_dict": ...}``, every time."""
        state = {"model": self.model, "preprocess_val": self.transform}
        with _official_settings(model_dict=state, root_path=str(checkpoint.parent)):
            scores = _package().img_score.score(pictures, prompt, cp=str(checkpoint))
        return [float(score) for score in scores]


def build_official(config: dict[str, Any] | None = None) -> OfficialHPSv2:
    """Build the official network with its own code, untrained; that code downloads a CLIP to begin with.

    Args:
        config: An architecture in open_clip's notation; the package's own ViT-H-14 by default.
    """
    package = _package()
    replaced: dict[str, Any] = {
        "download_pretrained": lambda *_, **__: "not downloaded",
        "load_checkpoint": lambda *_, **__: None,
    }
    if config is not None:
        replaced["get_model_config"] = lambda _: deepcopy(config)
    state: dict[str, Any] = {}
    with _official_settings(model_dict=state), mock.patch.multiple(package.factory, **replaced):
        package.img_score.initialize_model()
    return OfficialHPSv2(state["model"].eval(), state["preprocess_val"])


def official_tokenizer() -> Callable[[list[str]], Tensor]:
    """Return what the official ``score`` uses: strings to token ids ``[N, 77]``."""
    return _package().factory.get_tokenizer("ViT-H-14")


def official_transform() -> Callable[[PIL.Image.Image], Tensor]:
    """Return the official preprocessing of a PIL image to normalised pixels."""
    return _package().transform.image_transform(224, is_train=False, resize_longest_max=True)


def without_antialias() -> Any:
    """Have torchvision resize tensors as it did by default until 0.16."""
    return mock.patch.object(functional, "resize", partial(functional.resize, antialias=False))


def without_vanishing_edges() -> Any:
    """Mend one fault: the official code rounds a short edge below half a pixel to zero, and fails."""
    return mock.patch.object(
        _package().transform, "round", lambda length: max(1, round(length)), create=True
    )


@cache
def _package() -> _Package:
    folder = installed_folder("hpsv2", "hpsv2==1.2.0")
    hpsv2 = ModuleType("hpsv2")  # the real one imports every submodule's dependencies
    hpsv2.__path__ = [str(folder)]
    clint, textui, turtle = map(ModuleType, ("clint", "clint.textui", "turtle"))
    textui.progress = None  # for downloads
    turtle.forward = None  # never used, and the real one needs a display's library
    stubs = {"hpsv2": hpsv2, "clint": clint, "clint.textui": textui, "turtle": turtle}
    loaded = {name for name in sys.modules if name.startswith("hpsv2.")}
    assert not loaded, "the official package is imported already, and not by this file"
    try:
        with (
            stub_modules(stubs),
            mock.patch.object(gzip, "open", _open_vocabulary),
            warnings.catch_warnings(),
        ):
            # The package also switches UserWarning off for the whole process; this undoes it.
            warnings.simplefilter("ignore")
            return _Package(
                *map(
                    importlib.import_module,
                    (
                        "hpsv2.img_score",
                        "hpsv2.src.open_clip.factory",
                        "hpsv2.src.open_clip.transform",
                    ),
                )
            )
    finally:
        for name in [name for name in sys.modules if name.startswith("hpsv2.")]:
            del sys.modules[name]


_gzip_open = gzip.open


def _open_vocabulary(path: str) -> Any:
    """Open a gzip file, or open_clip's copy of the vocabulary where the wheel's is missing."""
    if not os.path.exists(path) and os.path.basename(path) == "bpe_simple_vocab_16e6.txt.gz":
        path = open_clip.tokenizer.default_bpe()
    return _gzip_open(path)


@contextmanager
def _official_settings(**settings: Any) -> Iterator[None]:
    """Set the globals of the official ``img_score``, and keep its use of torch from warning."""
    with (
        mock.patch.multiple(_package().img_score, device="cpu", **settings),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch.cuda.amp is deprecated, and has no effect on a CPU
        yield

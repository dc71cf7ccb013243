"""Text in pictures, read by rapidocr with the PP-OCRv6 networks of its wheel.

rapidocr and onnxruntime are an extra of this package, and imported when they are first needed.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import PIL.Image
from torch import nn

from diffsynth_metrics.errors import ImageError

__all__ = ["Line", "TextReader", "installed_networks"]

_FILES = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}
_MAX_RATIO = 20  # rapidocr enlarges the shorter side, and the longer one with it
_SETTINGS = {
    "Global.log_level": "error",
    # Text that stands on its head is not what a prompt asks for.
    "Global.use_cls": False,
}

# After a fork, sessions of onnxruntime have no threads, and ending one waits for them for ever.
_OF_PARENTS: list[Any] = []

Line = dict[str, Any]
"""A line: ``"text"``, ``"confidence"`` in 0..1, and ``"box"``, its four corners (x, y) in pixels."""


def installed_networks() -> tuple[Path, ...]:
    """Return the files of the networks: detection, and recognition of Chinese and Latin script.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed, or rapidocr has other networks.
    """
    try:
        import_module("onnxruntime")
        rapidocr = import_module("rapidocr")
    except ImportError as error:
        raise ImportError(
            "pip install 'diffsynth-metrics[ocr]': text in pictures is read with rapidocr and "
            f"onnxruntime ({error})"
        ) from None
    files = tuple(Path(str(rapidocr.__file__)).parent / "models" / name for name in _FILES.values())
    if missing := [file.name for file in files if not file.is_file()]:
        raise ImportError(
            "pip install --force-reinstall rapidocr==3.10.0: other networks give other scores, and "
            f"the installed {version('rapidocr')} has no {missing[0]}"
        )
    return files


class TextReader(nn.Module):
    """Reads the lines of a picture, from top to bottom and from left to right.

    It has no tensors of torch's: the networks are onnxruntime's, and run on the CPU. It may be called
    from several threads, copied, pickled and used after a fork.

    Attributes:
        files: See :func:`installed_networks`.
        made_with: The packages that run them, with their versions.
    """

    def __init__(self) -> None:
        """Load the networks.

        Raises:
            ImportError: See :func:`installed_networks`.
        """
        super().__init__()
        self.files = installed_networks()
        self.made_with = {name: version(name) for name in ("rapidocr", "onnxruntime")}
        self._load()

    def forward(self, picture: PIL.Image.Image) -> list[Line]:
        """Read a picture in RGB.

        Raises:
            ImageError: One side is more than 20 times the other.
        """
        if max(picture.size) > _MAX_RATIO * min(picture.size):
            raise ImageError(
                f"one side may be at most {_MAX_RATIO} times the other, got "
                f"{picture.width}x{picture.height}"
            )
        if self._process != os.getpid():
            _OF_PARENTS.append(self._engine)
            self._load()
        result = self._engine(picture)
        if result.txts is None:
            return []
        return [
            {"text": text, "confidence": float(confidence), "box": box.astype(float).tolist()}
            for text, confidence, box in zip(result.txts, result.scores, result.boxes, strict=True)
        ]

    def __reduce__(self) -> tuple[type[TextReader], tuple[()]]:
        """Copy by loading again: a session of onnxruntime cannot be copied."""
        return TextReader, ()

    def _load(self) -> None:
        # Explicit paths: otherwise rapidocr downloads what it does not find.
        paths = dict(zip((f"{part}.model_path" for part in _FILES), map(str, self.files), strict=True))
        self._engine: Any = import_module("rapidocr").RapidOCR(params={**_SETTINGS, **paths})
        self._process = os.getpid()

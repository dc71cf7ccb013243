"""Many pictures on one: a contact sheet with prompts and scores, to look at."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import numbers
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import PIL.Image
import torch
from PIL import ImageDraw, ImageFont, ImageOps

from diffsynth_metrics.evaluation.fingerprint import storable
from diffsynth_metrics.evaluation.tables import shown
from diffsynth_metrics.inputs import ImagesInput, as_images, as_pil, as_prompts, as_rgb, open_image

__all__ = ["show"]

logger = logging.getLogger(__name__)

Scores: TypeAlias = (
    "Sequence[float | None] | Mapping[str, Sequence[float | None]] | Sequence[Mapping[str, Any]]"
)

_MOST_COLUMNS = 8
_LARGEST_SIZE = 4096
_PROMPT_LINES = 2
_MARGIN = 10
_BACKGROUND, _TILE, _INK, _SOFT = "#ffffff", "#eef0f3", "#1d1f23", "#5a6069"
_UNKNOWN = "□"
_NO_CHARACTER = "\U0010ffff"

# Pillow's own font has little more than ASCII. These are looked for where the system keeps its fonts.
_FONTS_OF_OTHER_SCRIPTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "arial.ttf",
)


def show(
    images: ImagesInput,
    scores: Scores | None = None,
    prompts: str | Sequence[str] | None = None,
    *,
    columns: int | None = None,
    size: int = 256,
    order: str | None = None,
) -> PIL.Image.Image:
    """Return a contact sheet: the pictures in a grid, each with its prompt and scores below it.

    A notebook displays it by itself; elsewhere use ``.save()`` or ``.show()``. Pictures are fitted into
    squares and are not cut, and the caller's pictures are not changed. A prompt that is too long for two
    lines ends with an ellipsis.

    Pillow's own font has the letters of English. Others are drawn with a font of the system where a
    known one is installed (Noto Sans CJK, WenQuanYi, PingFang, DejaVu, ...). What no font has is drawn
    without its accents or, in other scripts, as an empty box, and a warning is logged.

    Args:
        images: As metrics take them, see docs/images.md; one image or several.
        scores: One number per image; or lists of numbers by name, such as
            ``{"pickscore": [...], "hpsv2": [...]}``; or one dict per image, as ``metric.evaluate``
            returns them, of which the numbers are shown. None and NaN are shown as "no score".
        prompts: One prompt for every image, or as many as images. Half of a surrogate pair, which is no
            character, is drawn as its number.
        columns: Pictures in a row; by default at most 8.
        size: Side of a square, in pixels, from 32 to 4096.
        order: Name of the score to sort by, the largest first; ``"-name"`` has the smallest first.
            Scores that are a plain list are called ``"score"``. Images without that score come last.

    Returns:
        An RGB image.

    Raises:
        ValueError: There is no image, numbers do not fit, `order` names no score, or `columns` or `size`
            is out of its range.
        ImageError: An image cannot be read; the message gives its position and its file.
        FileNotFoundError: A path does not exist; the message gives its position.
        TypeError: Something is neither an image, a prompt nor a score.
    """
    if not 32 <= size <= _LARGEST_SIZE:
        raise ValueError(f"size must be 32 to {_LARGEST_SIZE} pixels, got {size}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    checked = as_images(images)
    texts = _texts(prompts, len(checked))
    named = _by_name(scores, len(checked))
    positions = _sorted(len(checked), named, order)
    font = _Font(max(11, size // 18))
    captions = [_caption(position, texts, named, font, size) for position in positions]
    tiles = (_tile(checked[position], f"image {position}", size) for position in positions)
    columns = columns or min(_MOST_COLUMNS, max(4, math.ceil(math.sqrt(len(checked)))))
    sheet = _draw(tiles, captions, min(columns, len(checked)), size, font)
    if font.unknown:
        logger.warning(
            "no font of this machine has %s: drawn as %s; install one, such as Noto Sans CJK",
            " ".join(sorted(font.unknown)[:10]),
            _UNKNOWN,
        )
    return sheet


def _texts(prompts: str | Sequence[str] | None, count: int) -> list[str]:
    """Return a prompt per image; empty without prompts."""
    if prompts is None:
        return []
    if isinstance(prompts, str):
        return [storable(prompts)] * count
    if isinstance(prompts, Sequence):
        prompts = [storable(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = as_prompts(prompts)
    if len(texts) != count:
        raise ValueError(f"got {len(texts)} prompts and {count} images; pass one prompt, or as many")
    return texts


def _by_name(scores: Scores | None, count: int) -> dict[str, list[float | None]]:
    """Return the scores of all images by name."""
    named: dict[str, list[Any]]
    if scores is None:
        return {}
    if isinstance(scores, Mapping):
        named = {str(name): list(values) for name, values in scores.items()}
    else:
        rows = list(scores)
        if any(isinstance(row, Mapping) for row in rows):
            named = _columns(rows)
        else:
            named = {"score": rows}
    for name, values in named.items():
        if len(values) != count:
            raise ValueError(f"got {len(values)} scores of {name!r} and {count} images")
    return {
        name: [_number(value, f"{name!r} of image {position}") for position, value in enumerate(values)]
        for name, values in named.items()
    }


def _columns(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Turn dicts, as ``metric.evaluate`` returns them, into lists of their numbers."""
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"scores of image {position} must be a dict as the others, got {row!r}")
    names = dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value))
    return {str(name): [row.get(name) for row in rows] for name in names}


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(value: Any, name: str) -> float | None:
    """Return a score; None where there is none."""
    if value is None:
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"score {name} must be a number or None, got {value!r}") from None
    return None if math.isnan(score) else score


def _sorted(count: int, named: Mapping[str, list[float | None]], order: str | None) -> list[int]:
    """Return the positions of the images in the order of the sheet."""
    positions = list(range(count))
    if order is None:
        return positions
    name, sign = (order, -1) if order in named else (order.removeprefix("-"), 1)
    if name not in named:
        raise ValueError(f"order must be one of {sorted(named)}, or it behind a '-', got {order!r}")
    values = named[name]
    known = [position for position in positions if values[position] is not None]
    known.sort(key=lambda position: sign * values[position])  # type: ignore[operator]
    return known + [position for position in positions if values[position] is None]


def _tile(image: Any, name: str, size: int) -> PIL.Image.Image:
    """Return a new picture that fits into the square."""
    picture = as_pil(image) if isinstance(image, torch.Tensor) else open_image(image, name)
    return ImageOps.contain(as_rgb(picture), (size, size))


def _caption(
    position: int,
    texts: Sequence[str],
    named: Mapping[str, list[float | None]],
    font: _Font,
    width: int,
) -> list[tuple[str, str]]:
    """Return the lines below a picture, each with its color."""
    prompt = _wrapped(texts[position], font, width, _PROMPT_LINES) if texts else []
    scores = [
        _shortened(f"{name}  {_score_text(values[position])}", font, width)
        for name, values in named.items()
    ]
    return [(line, _SOFT) for line in prompt] + [(line, _INK) for line in scores]


def _score_text(score: float | None) -> str:
    return "no score" if score is None else shown(score)


def _draw(
    tiles: Iterable[PIL.Image.Image],
    captions: Sequence[Sequence[tuple[str, str]]],
    columns: int,
    size: int,
    font: _Font,
) -> PIL.Image.Image:
    """Put pictures and captions into a grid; a row is as high as its longest caption."""
    rows = [captions[start : start + columns] for start in range(0, len(captions), columns)]
    heights = [size + max(map(len, row)) * font.line + 2 * _MARGIN for row in rows]
    sheet = PIL.Image.new(
        "RGB", (_MARGIN + columns * (size + _MARGIN), _MARGIN + sum(heights)), _BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    pictures = iter(tiles)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, lines in enumerate(row):
            left, picture = _MARGIN + column * (size + _MARGIN), next(pictures)
            draw.rectangle((left, top, left + size - 1, top + size - 1), _TILE)
            sheet.paste(
                picture, (left + (size - picture.width) // 2, top + (size - picture.height) // 2)
            )
            for number, (text, color) in enumerate(lines):
                font.write(draw, (left, top + size + 4 + number * font.line), text, color)
        top += height
    return sheet


def _wrapped(text: str, font: _Font, width: float, lines: int) -> list[str]:
    """Break a text into lines, at spaces where there are some; the last one may be shortened."""
    rest = " ".join(text.split())
    broken: list[str] = []
    while rest and len(broken) < lines - 1:
        cut = font.fitting(rest, width)
        if cut < len(rest):
            space = rest.rfind(" ", 0, cut + 1)
            cut = space if space > 0 else cut
        broken.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return [*broken, _shortened(rest, font, width)] if rest else broken


def _shortened(text: str, font: _Font, width: float) -> str:
    """Cut a text that is too long, and say so with an ellipsis."""
    if font.fitting(text, width) == len(text):
        return text
    return text[: font.fitting(text, width - font.width("…"))].rstrip() + "…"


class _Font:
    """Writes with Pillow's own font, and with others of the system what that does not have.

    Attributes:
        line: Height of a line, in pixels.
        unknown: Characters that no font has.
    """

    def __init__(self, size: int) -> None:
        self._fonts: list[Any] = [ImageFont.load_default(size)]
        self._size = size
        self._looked_for_others = False
        self._found: dict[str, tuple[Any, str]] = {}
        self.line = round(size * 1.4)
        self.unknown: set[str] = set()

    def width(self, text: str) -> float:
        """Return the width of a text in pixels."""
        glyphs = [self._glyph(character) for character in text]
        return float(sum(font.getlength(drawn) for font, drawn in glyphs))

    def fitting(self, text: str, width: float) -> int:
        """Return how many characters of a text fit into a width; at least one."""
        used = 0.0
        for count, character in enumerate(text):
            used += self.width(character)
            if used > width:
                return max(1, count)
        return len(text)

    def write(
        self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: str
    ) -> None:
        """Write a line; neighbours of one font together."""
        x, y = place
        glyphs = [self._glyph(character) for character in text]
        for font, group in itertools.groupby(glyphs, key=lambda glyph: glyph[0]):
            part = "".join(character for _, character in group)
            draw.text((x, y), part, color, font)
            x += font.getlength(part)

    def _glyph(self, character: str) -> tuple[Any, str]:
        """Return the font to draw a character with, and what to draw."""
        if character not in self._found:
            self._found[character] = self._find(character)
        return self._found[character]

    def _find(self, character: str) -> tuple[Any, str]:
        if character.isspace() or unicodedata.category(character) in ("Cc", "Cf", "Mn"):
            return self._fonts[0], " " if character.isspace() else ""
        if _has(self._fonts[0], character):
            return self._fonts[0], character
        if not self._looked_for_others:
            self._fonts += _other_fonts(self._size)
            self._looked_for_others = True
        for font in self._fonts[1:]:
            if _has(font, character):
                return font, character
        letter = unicodedata.normalize("NFKD", character)[0]
        if letter.isascii():
            return self._fonts[0], letter
        self.unknown.add(character)
        return self._fonts[0], _UNKNOWN


def _has(font: Any, character: str) -> bool:
    """Tell whether a font has a character: what it draws is not what it draws for no character."""
    return bytes(font.getmask(character)) != bytes(font.getmask(_NO_CHARACTER))


def _other_fonts(size: int) -> list[Any]:
    """Load the fonts that this machine has of those with many scripts."""
    fonts = []
    for name in _FONTS_OF_OTHER_SCRIPTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return fonts

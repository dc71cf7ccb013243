"""Pictures of shapes and their captions: what the embedded model `shapes` knows, and all it knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

__all__ = ["BACKGROUNDS", "COLORS", "SHAPES", "SIZES", "describe", "draw_shape"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
SIZES = {"small": 0.2, "large": 0.36}
"""Name to radius, as a share of the picture's shorter side."""
BACKGROUNDS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (15, 15, 15)}

_SUPERSAMPLING = 4


def draw_shape(
    shape: str,
    color: str,
    *,
    size: str = "large",
    background: str = "gray",
    image_size: int | tuple[int, int] = 128,
    rng: Random | None = None,
) -> Image.Image:
    """Draw one shape.

    Args:
        shape: One of :data:`SHAPES`.
        color: One of :data:`COLORS`, other than the background.
        size: One of :data:`SIZES`.
        background: One of :data:`BACKGROUNDS`.
        image_size: Side of the square picture in pixels, or (width, height).
        rng: Varies position, rotation, scale and shades; without it the shape is centred, upright
            and of the nominal colours.

    Returns:
        An RGB picture with smooth edges.

    Raises:
        ValueError: A name is unknown, or shape and background have the same colour.
    """
    for value, known in ((shape, SHAPES), (color, COLORS), (size, SIZES), (background, BACKGROUNDS)):
        if value not in known:
            raise ValueError(f"{value!r} is unknown; there are {', '.join(known)}")
    if color == background:
        raise ValueError(f"a {color} shape cannot be seen on a {background} background")
    width, height = (image_size, image_size) if isinstance(image_size, int) else image_size
    fill, canvas = COLORS[color], BACKGROUNDS[background]
    radius, angle, x, y = SIZES[size], 0.0, 0.5, 0.5
    if rng is not None:
        radius *= rng.uniform(0.85, 1.15)
        angle = math.radians(rng.uniform(-15, 15))
        # The centre keeps the shape inside the square that a centre crop leaves.
        x, y = (0.5 + rng.uniform(-1, 1) * (0.47 - radius) for _ in range(2))
        fill, canvas = _vary(fill, rng, 18), _vary(canvas, rng, 10)
    side = min(width, height) * _SUPERSAMPLING
    left, top = ((length * _SUPERSAMPLING - side) / 2 for length in (width, height))
    picture = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING), canvas)
    draw = ImageDraw.Draw(picture)
    center = (left + x * side, top + y * side)
    _fill_shape(draw, shape, center, radius * side, angle, fill, canvas)
    return picture.resize((width, height), Image.Resampling.BOX)


def describe(
    shape: str,
    color: str,
    *,
    size: str | None = None,
    background: str | None = None,
    article: bool = True,
) -> str:
    """Return the caption of a picture, such as "a small red circle on a white background"."""
    words = ["a"] if article else []
    words += [word for word in (size, color, shape) if word]
    if article and words[1][0] in "aeiou":
        words[0] = "an"
    if background:
        words += ["on", "a", background, "background"]
    return " ".join(words)


def _vary(color: tuple[int, int, int], rng: Random, amount: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in color)
    return red, green, blue


def _fill_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    center: tuple[float, float],
    radius: float,
    angle: float,
    fill: tuple[int, int, int],
    canvas: tuple[int, int, int],
) -> None:
    def disc(share: float, paint: tuple[int, int, int]) -> None:
        r = radius * share
        draw.ellipse((center[0] - r, center[1] - r, center[0] + r, center[1] + r), fill=paint)

    if shape in ("circle", "ring"):
        disc(0.95, fill)
        if shape == "ring":
            disc(0.55, canvas)
        return
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [
        (
            center[0] + radius * (cos * x - sin * y),
            center[1] + radius * (sin * x + cos * y),
        )
        for x, y in _corners(shape)
    ]
    draw.polygon(corners, fill=fill)


def _corners(shape: str) -> Sequence[tuple[float, float]]:
    """Return the polygon of a shape in the unit circle, y pointing down."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0, -1), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "cross":
        a, b = 0.3, 0.95
        right = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
        return [*right, *((-x, -y) for x, y in right)]
    points = []
    for index in range(10):
        r, turn = (1.05, 0.42)[index % 2], math.pi * (index / 5 - 0.5)
        points.append((r * math.cos(turn), r * math.sin(turn)))
    return points

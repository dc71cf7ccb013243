"""What both sides of the HPSv3 comparison are given: weights, pictures, prompts.

It needs numpy, Pillow and safetensors only, because ``build_hpsv3_fixture.py`` imports it next to the
transformers of 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

SEEDS = (0, 1)

_LONG = "a detailed oil painting of a lighthouse in a storm, waves, gulls, dramatic light, " * 40

# Prompt, width, height, mode of the picture.
CASES: list[tuple[str, int, int, str]] = [
    ("a photo of a cat", 512, 512, "RGB"),
    ("", 512, 383, "RGB"),
    (_LONG, 401, 300, "RGB"),
    ("un château à l'été, naïve façade", 768, 1344, "RGB"),
    ("一只猫坐在红色的沙发上", 640, 427, "L"),
    ("🎨🐈\u200d⬛ a painting 🖼️", 37, 53, "RGB"),
    (" leading and trailing  ", 448, 448, "RGB"),
    ("line\nbreaks\r\n\n\tand tabs\n", 150, 1, "RGB"),
    ("e\u0301 is not composed, \ufb01 neither: \u1e69 \u0073\u0323\u0307", 1, 150, "RGB"),
    ("{text_prompt} {0} {{}} %s <b>&amp;</b>", 300, 2, "RGB"),
    ("A Cat, In UPPER and lower case; with: punctuation! (really?) 3.14 1,000", 20, 2500, "RGB"),
    ("don't can't it's dog’s “quoted” – …", 28, 28, "RGBA"),
    ("हिन्दी ภาษาไทย العربية עברית 한국어", 1, 1, "P"),
    ("(((weighted:1.3))), <lora:name:0.8>, trending on artstation", 300, 401, "CMYK"),
    ("word " * 200, 2000, 1500, "RGB"),
    ("a photo of a cat", 383, 512, "I;16"),
]


def picture(index: int) -> PIL.Image.Image:
    """Return the picture of a case: smooth colours and grain."""
    _, width, height, mode = CASES[index]
    generator = np.random.default_rng(index)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BILINEAR)
    grain = generator.normal(0, 12, (height, width, 3))
    image = PIL.Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))
    if mode == "I;16":
        # As Pillow and the official code clip it: here 16 bits are scaled, see docs/images.md.
        return PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 3).convert("RGB")
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
        return image
    return image.convert(mode)


def random_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Any]:
    """Return float32 arrays that make a score depend strongly on image, prompt and positions."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        noise = generator.standard_normal(shape)
        if len(shape) > 1:
            fan_in = 1 if "embed_tokens" in name else math.prod(shape[1:])
            noise *= 1.5 / math.sqrt(fan_in)
        else:
            noise = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise
        # The last token must look at more than itself.
        noise *= 3 if name.endswith(("o_proj.weight", "merger.mlp.2.weight")) else 1
        weights[name] = noise.astype(np.float32)
    return weights


def random_sizes() -> list[tuple[int, int]]:
    """Return widths and heights, many of them extreme."""
    generator = np.random.default_rng(7)
    sizes = np.exp(generator.uniform(0, np.log(6000), (400, 2))).round().astype(int)
    return [(int(width), int(height)) for width, height in sizes]

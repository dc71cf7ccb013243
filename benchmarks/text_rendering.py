"""How well TextRenderingMetric reads drawn pictures: ``python benchmarks/text_rendering.py``.

Every picture says one text. It is scored with a prompt that quotes this text and with one that quotes
another, so that the table says both how much is read and what a wrong text scores. One thing is changed
at a time: size, colour, rotation, compression, noise, background; as far as it can still be read, and
further.
"""

from __future__ import annotations

import argparse
import io
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from skimage import data

from diffsynth_metrics import TextRenderingMetric

ROOT = Path(__file__).parent
FONT_FOLDER = Path("/usr/share/fonts/truetype")
LATIN_FONTS = (
    "dejavu/DejaVuSans.ttf",
    "dejavu/DejaVuSans-Bold.ttf",
    "dejavu/DejaVuSerif.ttf",
    "dejavu/DejaVuSansMono.ttf",
    "dejavu/DejaVuSerifCondensed-BoldItalic.ttf",
    "freefont/FreeSerifItalic.ttf",
    "freefont/FreeMono.ttf",
    "liberation/LiberationSans-Regular.ttf",
    "liberation/LiberationSansNarrow-Bold.ttf",
    "liberation/LiberationSerif-Regular.ttf",
)
CHINESE_FONTS = ("wqy/wqy-zenhei.ttc",)
LATIN_TEXTS = (
    "Grand Opening",
    "Coffee & Cake 50%",
    "Next Gas 100 Miles",
    "Happy Birthday",
    "Trespassers Will Be Jousted",
    "Wish You Were Here",
    "Elevation 8000 Feet",
    "Street Art Rules",
    "Rooms Available Now",
    "Forever Yours",
)
SCRIPTS = ("Latin", "Chinese")
CHINESE_TEXTS = ("盛大开业", "老王面馆", "禁止停车", "生日快乐", "欢迎光临")


@dataclass(frozen=True)
class Condition:
    """How a picture of 640 x 512 is drawn; the defaults are the plain case."""

    name: str = "48 px, black on white"
    size: int = 48
    ink: tuple[int, int, int] = (0, 0, 0)
    ground: tuple[int, int, int] | str = (255, 255, 255)
    rotation: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    jpeg: int | None = None


CONDITIONS = (
    Condition(),
    Condition("24 px", size=24),
    Condition("16 px", size=16),
    Condition("10 px", size=10),
    Condition("8 px", size=8),
    Condition("white on black", ink=(255, 255, 255), ground=(0, 0, 0)),
    Condition("red on yellow", ink=(200, 30, 30), ground=(250, 220, 60)),
    Condition("grey on grey (contrast 40 of 255)", ink=(150, 150, 150), ground=(190, 190, 190)),
    Condition("grey on grey (contrast 12 of 255)", ink=(178, 178, 178), ground=(190, 190, 190)),
    Condition("white on a photograph", ink=(255, 255, 255), ground="photograph"),
    Condition("rotated by -5 degrees", rotation=-5),
    Condition("rotated by 10 degrees", rotation=10),
    Condition("rotated by 30 degrees", rotation=30),
    Condition("rotated by 60 degrees", rotation=60),
    Condition("rotated by 180 degrees", rotation=180),
    Condition("noise (standard deviation 25)", noise=25),
    Condition("noise (standard deviation 90)", noise=90),
    Condition("blurred (radius 4 px)", blur=4),
    Condition("JPEG, quality 50", jpeg=50),
    Condition("JPEG, quality 15", jpeg=15),
    Condition("JPEG, quality 4", jpeg=4),
)


@dataclass(frozen=True)
class Score:
    """What a picture scored with the text that it says, and with another one."""

    script: str
    condition: str
    font: str
    right: float
    wrong: float


def draw(text: str, font: Path, condition: Condition, seed: int = 0) -> Image.Image:
    """Draw a text in the middle of a picture of 640 x 512."""
    if condition.ground == "photograph":
        picture = Image.fromarray(data.chelsea()).resize((640, 512))
    else:
        picture = Image.new("RGB", (640, 512), condition.ground)
    layer = Image.new("L", picture.size)
    letters = ImageFont.truetype(str(font), condition.size)
    while letters.getlength(text) > 560:  # 40 pixels of margin
        letters = letters.font_variant(size=letters.size - 1)
    ImageDraw.Draw(layer).text((320, 256), text, fill=255, font=letters, anchor="mm")
    layer = layer.rotate(condition.rotation, Image.Resampling.BICUBIC)
    picture.paste(condition.ink, mask=layer)
    if condition.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(condition.blur))
    if condition.noise:
        noise = np.random.default_rng(seed).normal(0, condition.noise, (512, 640, 3))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    if condition.jpeg:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=condition.jpeg)
        picture = Image.open(file)
    return picture


def score(metric: TextRenderingMetric, conditions: Sequence[Condition]) -> Iterator[Score]:
    """Draw and score: every Latin font once per condition, the Chinese font with every text."""
    for condition in conditions:
        for script, fonts, texts in zip(
            SCRIPTS,
            (LATIN_FONTS, CHINESE_FONTS * len(CHINESE_TEXTS)),
            (LATIN_TEXTS, CHINESE_TEXTS),
            strict=True,
        ):
            for index, font in enumerate(fonts):
                text, other = texts[index], texts[(index + 1) % len(texts)]
                picture = draw(text, FONT_FOLDER / font, condition, seed=index)
                right, wrong = metric.compute([f'It says "{text}".', f'It says "{other}".'], picture)
                yield Score(script, condition.name, font, right, wrong)


def summarise(scores: Sequence[Score]) -> list[dict[str, float | int | str]]:
    """Return one row per condition, and one for all: right texts by script, and wrong texts."""
    rows = []
    for condition in [*dict.fromkeys(one.condition for one in scores), "all"]:
        here = [one for one in scores if condition in (one.condition, "all")]
        wrong = [one.wrong for one in here]
        row: dict[str, float | int | str] = {"condition": condition, "pictures": len(here)}
        for script in SCRIPTS:
            right = [one.right for one in here if one.script == script]
            row[script] = float(np.mean(right))
            row[f"{script} above 0.9"] = f"{sum(value > 0.9 for value in right)} of {len(right)}"
        rows.append({**row, "wrong": float(np.mean(wrong)), "highest": max(wrong)})
    return rows


def table(rows: Sequence[dict[str, float | int | str]]) -> str:
    """Return a summary as Markdown."""
    lines = [
        "| condition | pictures | Latin | above 0.9 | Chinese | above 0.9 | wrong text | highest |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        by_script = " | ".join(f"{row[script]:.3f} | {row[f'{script} above 0.9']}" for script in SCRIPTS)
        lines.append(
            f"| {row['condition']} | {row['pictures']} | {by_script} | {row['wrong']:.2f} "
            f"| {row['highest']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "RESULTS_TEXT_RENDERING.md")
    parser.add_argument("--quick", action="store_true", help="two conditions, printed and not saved")
    arguments = parser.parse_args()
    metric = TextRenderingMetric.from_pretrained()
    start = time.perf_counter()
    scores = list(score(metric, CONDITIONS[:2] if arguments.quick else CONDITIONS))
    seconds = time.perf_counter() - start
    summary = table(summarise(scores))
    made_with = ", ".join(f"{name} {version}" for name, version in metric.model.made_with.items())
    text = f"""# What TextRenderingMetric reads in drawn pictures

{len(scores)} pictures of 640x512, each with one text in the middle: {len(LATIN_FONTS)} Latin fonts with
one text each, and a Chinese font with {len(CHINESE_TEXTS)}. The columns of the scripts are the means of
the text that is drawn, and how many pictures score above 0.9; a wrong text is another of the list. The
plain case is "{CONDITIONS[0].name}"; every other condition changes one thing.

{summary}

| | |
|---|---|
| command | `python benchmarks/text_rendering.py` |
| duration | {seconds:.0f} s, {seconds / len(scores):.2f} s a picture |
| machine | {platform.machine()} |
| read with | {made_with} |
"""
    print(text)
    if not arguments.quick:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Does a picture say what the prompt quotes? Needs ``pip install 'diffsynth-metrics[ocr]'``.

Without a picture, it draws one: ``python examples/text_rendering.py PICTURE 'a sign "OPEN"'``.
"""

import argparse

from PIL import Image, ImageDraw, ImageFont

from diffsynth_metrics import TextRenderingMetric

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?")
parser.add_argument("prompt", nargs="?", default='a shop sign that says "GRAND OPENING" and "50% off"')
arguments = parser.parse_args()

if arguments.picture is None:
    picture = Image.new("RGB", (640, 400), "ivory")
    pen = ImageDraw.Draw(picture)
    pen.text((320, 120), "GRAND OPENNING", fill="darkred", font=ImageFont.load_default(56), anchor="mm")
    pen.text((320, 280), "50% off", fill="black", font=ImageFont.load_default(40), anchor="mm")
else:
    picture = Image.open(arguments.picture)

metric = TextRenderingMetric.from_pretrained()
row = metric.evaluate(arguments.prompt, picture)[0]
if row["score"] is None:
    print(row["error"])
else:
    print(f"text rendering of {arguments.prompt!r}: {row['score']:.4f}")
for expected, found, accuracy in zip(row["expected"], row["found"], row["accuracies"], strict=True):
    print(f"  {accuracy:.2f}  {expected!r}, found {found!r}")

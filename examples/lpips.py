"""LPIPS between an example picture and copies of it that are worse; downloads 10 MB once."""

import csv
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image, ImageFilter

from diffsynth_metrics import LPIPSMetric

dataset_snapshot_download(
    "DiffSynth-Studio/diffsynth_example_dataset",
    allow_file_pattern="flux/FLUX.1-dev/*",
    local_dir="./data/diffsynth_example_dataset",
)
folder = Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev")
with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
    example = next(csv.DictReader(file))

metric = LPIPSMetric.from_pretrained(net="alex")
image = Image.open(folder / example["image"]).convert("RGB")
blurred = [image.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 1, 4)]
for radius, distance in zip((0, 1, 4), metric.compute(image, blurred), strict=True):
    print(f"blurred by {radius} pixels: {distance:.4f}")

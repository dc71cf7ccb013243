"""Aesthetic score of an example picture; downloads 1.2 GB once."""

import csv
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image

from diffsynth_metrics import AestheticMetric, ModelConfig

dataset_snapshot_download(
    "DiffSynth-Studio/diffsynth_example_dataset",
    allow_file_pattern="flux/FLUX.1-dev/*",
    local_dir="./data/diffsynth_example_dataset",
)
folder = Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev")
with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
    example = next(csv.DictReader(file))

metric = AestheticMetric.from_pretrained(
    model_config=ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="Aesthetic/model.safetensors",
    ),
)
image = Image.open(folder / example["image"])
score = metric.compute(image)[0]
print(f"Aesthetic score of {example['image']}: {score:.4f}")

"""ImageReward of an example picture and its prompt; downloads 1.8 GB once."""

import csv
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image

from diffsynth_metrics import ImageRewardMetric, ModelConfig

dataset_snapshot_download(
    "DiffSynth-Studio/diffsynth_example_dataset",
    allow_file_pattern="flux/FLUX.1-dev/*",
    local_dir="./data/diffsynth_example_dataset",
)
folder = Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev")
with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
    example = next(csv.DictReader(file))

metric = ImageRewardMetric.from_pretrained(
    model_config=ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="ImageReward/model.safetensors",
    ),
)
image = Image.open(folder / example["image"])
score = metric.compute(example["prompt"], image)[0]
print(f"ImageReward of {example['image']} for {example['prompt']!r}: {score:.4f}")

"""HPSv3 of an example picture and its prompt; downloads 17 GB once."""

import csv
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image, ImageFilter

from diffsynth_metrics import HPSv3Metric, ModelConfig

dataset_snapshot_download(
    "DiffSynth-Studio/diffsynth_example_dataset",
    allow_file_pattern="flux/FLUX.1-dev/*",
    local_dir="./data/diffsynth_example_dataset",
)
folder = Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev")
with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
    example = next(csv.DictReader(file))

metric = HPSv3Metric.from_pretrained(
    model_config=ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="HPSv3/model.safetensors",
    ),
)
image = Image.open(folder / example["image"])
row = metric.evaluate(example["prompt"], image)[0]
print(f"HPSv3 of {example['image']} for {example['prompt']!r}: {row['mu']:.4f} ± {row['sigma']:.4f}")

blurred = image.convert("RGB").filter(ImageFilter.GaussianBlur(8))
probability = metric.preference(example["prompt"], image, blurred)[0]
print(f"Probability that it is preferred to a blurred copy: {probability:.4f}")

"""Qwen-Image-Bench of an example picture and its prompt; downloads 55 GB once."""

import csv
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image

from diffsynth_metrics import ModelConfig, QwenImageBenchMetric

dataset_snapshot_download(
    "DiffSynth-Studio/diffsynth_example_dataset",
    allow_file_pattern="flux/FLUX.1-dev/*",
    local_dir="./data/diffsynth_example_dataset",
)
folder = Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev")
with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
    example = next(csv.DictReader(file))

metric = QwenImageBenchMetric.from_pretrained(
    model_config=ModelConfig(
        model_id="Qwen/Qwen-Image-Bench", origin_file_pattern="model-*.safetensors"
    ),
    processor_config=ModelConfig(model_id="Qwen/Qwen-Image-Bench", origin_file_pattern=""),
    on_parse_error="raise",
)
image = Image.open(folder / example["image"])
answer = metric.evaluate(example["prompt"], image, dimensions=["Quality", "Aesthetics", "Alignment"])[0]
for dimension, score in answer["level1_scores"].items():
    print(f"{dimension} of {example['image']}: {score:.2f}")
print(f"total score: {answer['total_score']:.2f}")

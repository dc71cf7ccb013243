"""BioCLIP score of an example picture and a name; downloads 1.7 GB once."""

import csv
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image

from diffsynth_metrics import BioCLIPMetric, ModelConfig

dataset_snapshot_download(
    "DiffSynth-Studio/diffsynth_example_dataset",
    allow_file_pattern="flux/FLUX.1-dev/*",
    local_dir="./data/diffsynth_example_dataset",
)
folder = Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev")
with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
    example = next(csv.DictReader(file))

metric = BioCLIPMetric.from_pretrained(
    model_config=ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="BioCLIPv2/open_clip_model.safetensors",
    ),
)
image = Image.open(folder / example["image"])
for name in ("a photo of Canis lupus familiaris.", "a photo of Felis catus."):
    print(f"{name} {metric.compute(name, image)[0]:.4f}")

"""UnifiedReward 2.0 of an example picture and its prompt; downloads 19 GB once."""

import csv
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image

from diffsynth_metrics import ModelConfig, UnifiedReward2Metric

dataset_snapshot_download(
    "DiffSynth-Studio/diffsynth_example_dataset",
    allow_file_pattern="flux/FLUX.1-dev/*",
    local_dir="./data/diffsynth_example_dataset",
)
folder = Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev")
with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
    example = next(csv.DictReader(file))

metric = UnifiedReward2Metric.from_pretrained(
    model_config=ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="UnifiedReward-2.0-qwen35-9b/model-*.safetensors",
    ),
    processor_config=ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="UnifiedReward-2.0-qwen35-9b/",
    ),
    on_parse_error="raise",
)
image = Image.open(folder / example["image"])
answer = metric.evaluate(example["prompt"], image)[0]
for name in ("alignment", "coherence", "style", "score"):
    print(f"{name} of {example['image']} for {example['prompt']!r}: {answer[name]:.4f}")

"""UnifiedReward-Edit of two edits of an example picture; downloads 18 GB once."""

import csv
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image, ImageFilter, ImageOps

from diffsynth_metrics import ModelConfig, UnifiedRewardEditMetric

dataset_snapshot_download(
    "DiffSynth-Studio/diffsynth_example_dataset",
    allow_file_pattern="flux/FLUX.1-dev/*",
    local_dir="./data/diffsynth_example_dataset",
)
folder = Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev")
with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
    example = next(csv.DictReader(file))

metric = UnifiedRewardEditMetric.from_pretrained(
    model_config=ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="UnifiedReward-Edit-qwen3vl-8b/model-*.safetensors",
    ),
    processor_config=ModelConfig(
        model_id="DiffSynth-Studio/ImageMetrics",
        origin_file_pattern="UnifiedReward-Edit-qwen3vl-8b/",
    ),
    on_parse_error="raise",
)
source = Image.open(folder / example["image"]).convert("RGB")
grey, blurred = ImageOps.grayscale(source), source.filter(ImageFilter.GaussianBlur(8))
instruction = "make it black and white"

answer = metric.evaluate(instruction, [source, grey], task="edit_pointwise_score")[0]
print(f"success {answer['editing_success']:.2f}, overediting {answer['overediting']:.2f}")
pair = [source, grey, blurred]
answer = metric.evaluate(instruction, pair, task="edit_pairwise_rank", both_orders=True)[0]
print(f"the better edit is {answer['winner']}; asked in the other order too: {answer['agreement']}")
scores = metric.compute(instruction, pair, task="edit_pairwise_score")[0]
print(f"scores {scores[0]:.2f} and {scores[1]:.2f}")

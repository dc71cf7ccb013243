"""CMMD of two folders: ``python examples/cmmd.py REFERENCE_DIR GENERATED_DIR``; downloads 1.2 GB once.

Without folders, it compares sharp with blurred crops of an example picture, to show the call.
"""

import argparse
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image, ImageFilter

from diffsynth_metrics import CMMDMetric

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("reference", nargs="?", help="folder of real images, or an .npz file of features")
parser.add_argument("generated", nargs="?", help="folder of generated images")
arguments = parser.parse_args()

reference, generated = arguments.reference, arguments.generated
if reference is not None and generated is None:
    parser.error("give two folders, or none for the example")
if reference is None:
    dataset_snapshot_download(
        "DiffSynth-Studio/diffsynth_example_dataset",
        allow_file_pattern="flux/FLUX.1-dev/*",
        local_dir="./data/diffsynth_example_dataset",
    )
    file = min(Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev").glob("*.jpg"))
    picture = Image.open(file).convert("RGB")
    width, height = picture.width // 4, picture.height // 4
    reference = [
        picture.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
        for x in range(4)
        for y in range(4)
    ]
    generated = [crop.filter(ImageFilter.GaussianBlur(1)) for crop in reference]

metric = CMMDMetric.from_pretrained()
print(f"CMMD: {metric.compute(reference, generated):.4f}")

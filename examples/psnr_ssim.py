"""PSNR and SSIM between an example picture and worse copies of it; only the picture is downloaded.

``python examples/psnr_ssim.py REFERENCE IMAGE`` compares two pictures, or two folders whose files are
paired by their names.
"""

import argparse
import io
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image

from diffsynth_metrics import PSNRMetric, SSIMMetric

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("reference", nargs="?", help="a picture or a folder")
parser.add_argument("image", nargs="?", help="a picture of the same size, or a folder of such")
arguments = parser.parse_args()

reference, images = arguments.reference, arguments.image
if (reference is None) != (images is None):
    parser.error("give two pictures or two folders, or neither for the example")
if reference is None:
    dataset_snapshot_download(
        "DiffSynth-Studio/diffsynth_example_dataset",
        allow_file_pattern="flux/FLUX.1-dev/*",
        local_dir="./data/diffsynth_example_dataset",
    )
    file = min(Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev").glob("*.jpg"))
    reference = Image.open(file).convert("RGB")
    images = []
    for quality in (90, 50, 10):
        copy = io.BytesIO()
        reference.save(copy, "JPEG", quality=quality)
        images.append(copy)

decibels = PSNRMetric.from_pretrained().compute(reference, images)
similarity = SSIMMetric.from_pretrained().compute(reference, images)
for index, (psnr, ssim) in enumerate(zip(decibels, similarity, strict=True)):
    print(f"image {index}: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}")

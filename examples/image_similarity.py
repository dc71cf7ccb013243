"""How much of a subject comes back in other pictures, by CLIP-I; downloads 350 MB once.

``python examples/image_similarity.py --references dog_1.jpg dog_2.jpg --images made_1.png made_2.png``
compares your own pictures; ``--protocol dino`` and ``dinov2`` are the other two protocols.
"""

import argparse
from pathlib import Path

from modelscope import dataset_snapshot_download
from PIL import Image, ImageFilter

from diffsynth_metrics import ImageSimilarityMetric

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--references", nargs="+", help="pictures of the subject")
parser.add_argument("--images", nargs="+", help="pictures that were made of it")
parser.add_argument("--protocol", default="clip-i", choices=["clip-i", "dino", "dinov2"])
arguments = parser.parse_args()

references, images = arguments.references, arguments.images
if (references is None) != (images is None):
    parser.error("give --references and --images, or neither for the example")
if references is None:
    dataset_snapshot_download(
        "DiffSynth-Studio/diffsynth_example_dataset",
        allow_file_pattern="flux/FLUX.1-dev/*",
        local_dir="./data/diffsynth_example_dataset",
    )
    file = min(Path("./data/diffsynth_example_dataset/flux/FLUX.1-dev").glob("*.jpg"))
    picture = Image.open(file).convert("RGB")
    references = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    images = [picture.filter(ImageFilter.GaussianBlur(4)), Image.new("RGB", picture.size, "teal")]

metric = ImageSimilarityMetric.from_pretrained(protocol=arguments.protocol)
for index, score in enumerate(metric.compute([references], images)):
    print(f"{arguments.protocol} of image {index} with {len(references)} references: {score:.4f}")

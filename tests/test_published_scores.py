"""The values that the authors published, for anybody who has the weights: ``pytest -m weights``.

The weights are taken from ``./models`` or downloaded; the authors' pictures are looked for in the
folder that DIFFSYNTH_METRICS_PUBLISHED_IMAGES names and recognised by their sha256. Where either is
missing, the test is skipped and says what it needs. Sources and tolerances: docs/metrics.md; the
originals ran CLIP in fp16 on CUDA, which is what the tolerances allow for.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from diffsynth_metrics import (
    AestheticMetric,
    BaseMetric,
    DownloadError,
    HPSv2Metric,
    ImageRewardMetric,
)

pytestmark = pytest.mark.weights

IMAGE_REWARD_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"


def published_image(sha256: str, source: str) -> Path:
    """Return the authors' picture whose hash begins with `sha256`."""
    folder = os.environ.get("DIFFSYNTH_METRICS_PUBLISHED_IMAGES")
    if not folder:
        pytest.skip(f"set DIFFSYNTH_METRICS_PUBLISHED_IMAGES to a folder with {source}")
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha256):
            return path
    pytest.skip(f"no file in {folder} has the sha256 {sha256}... of {source}")


def load(metric_class: type[BaseMetric]) -> BaseMetric:
    try:
        return metric_class.from_pretrained()  # type: ignore[attr-defined, no-any-return]
    except DownloadError as error:
        pytest.skip(f"the weights of {metric_class.__name__} could not be had: {error}")


def test_image_reward_of_the_readme() -> None:
    hashes = ["a5fcd126", "dc13919a", "ee859bac", "84faf59d"]
    images = [
        published_image(sha256, f"ImageReward's assets/images/{number}.webp")
        for number, sha256 in enumerate(hashes, 1)
    ]
    rows = load(ImageRewardMetric).evaluate(IMAGE_REWARD_PROMPT, images)
    published = [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492]
    assert [row["score"] for row in rows] == pytest.approx(published, abs=1e-2)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]


def test_hpsv2_of_the_demo_image() -> None:
    """Holds for v2.0 weights, which is what issue 27 of the authors' repository used by default."""
    image = published_image("798dfb5b", "HPSv2's hpsv2/assets/demo_image.jpg")
    score = load(HPSv2Metric).compute("A cat with two horns on its head", image)
    assert score == pytest.approx([0.2876], abs=5e-4)


def test_aesthetic_of_the_astronaut() -> None:
    image = published_image(
        "59e7267a", "simple-aesthetics-predictor's a-photo-of-an-astronaut-riding-a-horse.png"
    )
    assert load(AestheticMetric).compute(image) == pytest.approx([5.7546], abs=2e-2)


@pytest.mark.parametrize(
    ("name", "score"),
    [("I03", 3.6420), ("I04", 5.5836), ("I06", 5.0716), ("I08", 4.6458), ("I19", 3.0889)],
)
def test_aesthetic_of_the_iqa_calibration_images(name: str, score: float) -> None:
    folder = os.environ.get("DIFFSYNTH_METRICS_PUBLISHED_IMAGES")
    paths = sorted(Path(folder).rglob(f"{name}.bmp")) if folder else []
    if not paths:
        pytest.skip(
            f"DIFFSYNTH_METRICS_PUBLISHED_IMAGES has no {name}.bmp "
            "(IQA-PyTorch, ResultsCalibra/dist_dir)"
        )
    assert load(AestheticMetric).compute(paths[0]) == pytest.approx([score], abs=2e-2)

"""Every example script and every Python block of the documentation runs as it stands.

They run outside of the tests' process, in an empty folder, against a hub on localhost that serves tiny
checkpoints and a few pictures under the real repository names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL.Image
import pytest
from classes import JUDGES
from hub import LocalHub

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart.py"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python" in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def hub(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    weights = tmp_path_factory.mktemp("weights")
    for name, folder in {
        "pickscore": "PickScore",
        "clip": "CLIP-ViT-H-14-laion2B-s32B-b79K",
        "hpsv2": "HPSv2",
        "hpsv3": "HPSv3",
        "aesthetic": "Aesthetic",
        "image_reward": "ImageReward",
        "fid": "FID",
        "unified_reward_2": "UnifiedReward-2.0-qwen35-9b",
        "unified_reward_edit": "UnifiedReward-Edit-qwen3vl-8b",
    }.items():
        shutil.copytree(tiny(name), weights / folder)
    shutil.copytree(tiny("bioclip"), weights / "BioCLIPv2")
    (weights / "BioCLIPv2" / "model.safetensors").rename(
        weights / "BioCLIPv2" / "open_clip_model.safetensors"
    )
    (weights / "LPIPS").mkdir()
    shutil.copy(tiny("lpips") / "model.safetensors", weights / "LPIPS" / "alexnet.safetensors")
    pictures = tmp_path_factory.mktemp("pictures")
    folder = pictures / "flux" / "FLUX.1-dev"
    folder.mkdir(parents=True)
    PIL.Image.new("RGB", (64, 48), "brown").save(folder / "1.jpg")
    (folder / "metadata.csv").write_text('image,prompt\n1.jpg,"dog, brown fur"\n', encoding="utf-8")
    with LocalHub() as hub:
        hub.add_model("DiffSynth-Studio/ImageMetrics", weights)
        hub.add_model("Qwen/Qwen-Image-Bench", tiny("qwen_image_bench"))
        hub.add_model("timm/vit_base_patch32_clip_224.openai", tiny("image_similarity"))
        hub.add_model("timm/vit_large_patch14_clip_336.openai", tiny("cmmd"))
        hub.add_model("timm/vit_large_patch14_dinov2.lvd142m", tiny("fd_dinov2"))
        hub.add_dataset("DiffSynth-Studio/diffsynth_example_dataset", pictures)
        yield hub


def run(hub: LocalHub, scripts: list[tuple[Path, bool, Path, list[str]]]) -> list[str]:
    """Run scripts in one process, and return what each printed.

    Args:
        hub: Where they find weights.
        scripts: For each its folder, whether judges give readable answers, its file and its arguments.
    """
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_scripts.py")],
        input=json.dumps(
            [(str(folder), readable, str(file), *more) for folder, readable, file, more in scripts]
        ),
        env=os.environ | hub.environment() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    problems = [
        f"{file.name}: {problem}"
        for (_, _, file, _), (_, problem) in zip(scripts, outcomes, strict=True)
        if problem is not None
    ]
    assert not problems, "\n".join(problems)
    return [printed for printed, _ in outcomes]


def test_examples_run_as_they_stand(hub: LocalHub, tmp_path: Path) -> None:
    scripts = [(tmp_path, example.stem in JUDGES, example, []) for example in EXAMPLES]
    for example, output in zip(EXAMPLES, run(hub, scripts), strict=True):
        assert re.search(r"-?\d+\.\d\d", output), f"{example.name} prints a score"
        assert "nan" not in output.lower(), example.name


def test_documentation_runs_as_it_stands(hub: LocalHub, tmp_path: Path) -> None:
    scripts: list[tuple[Path, bool, Path, list[str]]] = []
    for document in DOCUMENTS:
        folder = tmp_path / document.stem
        folder.mkdir()
        blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
        PIL.Image.new("RGB", (64, 48), "brown").save(folder / "cat.png")
        for number, block in enumerate(blocks):
            script = folder / f"{document.stem}_{number}.py"
            script.write_text(block, encoding="utf-8")
            scripts.append((folder, False, script, []))
    run(hub, scripts)


def test_quickstart_marks_the_right_picture_for_each_prompt(hub: LocalHub, tmp_path: Path) -> None:
    requests = len(hub.requests)
    # As a newcomer types it, in a process of its own.
    result = subprocess.run(
        [sys.executable, str(QUICKSTART)],
        cwd=tmp_path,
        env=os.environ | hub.environment() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("a ")]
    assert len(rows) == 5
    for position, row in enumerate(rows):
        cells = re.findall(r"-?\d+\.\d+\*?", row)
        assert [cell.endswith("*") for cell in cells] == [i == position for i in range(5)], row
    with PIL.Image.open(tmp_path / "results" / "quickstart.png") as sheet:
        assert sheet.width > 5 * 160
    assert len(hub.requests) == requests, "the embedded model needs no network"


def test_quickstart_scores_the_users_pictures_with_a_published_metric(
    hub: LocalHub, tmp_path: Path
) -> None:
    titles = {
        "pickscore": "PickScore v1",
        "clip": "CLIP score",
        "hpsv2": "HPSv2",
        "hpsv3": "HPSv3",
        "image_reward": "ImageReward v1.0",
        "aesthetic": "LAION Aesthetic v2",
        "unified_reward_2": "UnifiedReward 2.0",
        "qwen_image_bench": "Qwen-Image-Bench",
    }
    folders = [tmp_path / metric for metric in titles]
    for folder in folders:
        folder.mkdir()
        PIL.Image.new("RGB", (50, 40), "red").save(folder / "a.png")
        PIL.Image.new("L", (40, 50), 7).save(folder / "b.jpg")
    pictures = ["--prompt", "a red wall", "--images", "a.png", "b.jpg"]
    outputs = run(
        hub,
        [
            (folder, folder.name in JUDGES, QUICKSTART, ["--metric", folder.name, *pictures])
            for folder in folders
        ],
    )
    for folder, output in zip(folders, outputs, strict=True):
        assert titles[folder.name] in output
        # In the heading, and the best picture, or both where they are equal.
        assert output.count("*") >= 2, folder.name
        assert (folder / "results" / "quickstart.png").is_file()

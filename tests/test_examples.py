"""Every example script and every Python block of the documentation runs as it stands.

They run in a process of their own, in an empty folder, against a hub on localhost that serves tiny
checkpoints and a few pictures under the real repository names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from hub import LocalHub

from diffsynth_metrics.testing import tiny_checkpoint

JUDGES = ("qwen_image_bench", "unified_reward_2", "unified_reward_edit")
# Tiny judges write noise. Scripts that print a judge's score run with answers that it can read.
READABLE = """
import runpy
import sys

from diffsynth_metrics.judges.local import LocalEngine
from diffsynth_metrics.testing import ScriptedEngine

TEXTS = {
    None: "Edited image 1 is better. score=[8,3]",
    False: "Alignment Score (1-5): 4\\nCoherence Score (1-5): 3\\nStyle Score (1-5): 5",
    True: '</think>{"Detail": {"Noise": {"score": 1}}}',
}
scripted = ScriptedEngine(lambda question: TEXTS[question.thinking])
LocalEngine.ask = lambda self, questions: scripted.ask(questions)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python" in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    weights = tmp_path_factory.mktemp("weights")
    tiny_checkpoint("pickscore", weights / "PickScore")
    tiny_checkpoint("clip", weights / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    tiny_checkpoint("hpsv2", weights / "HPSv2")
    tiny_checkpoint("hpsv3", weights / "HPSv3")
    tiny_checkpoint("aesthetic", weights / "Aesthetic")
    tiny_checkpoint("image_reward", weights / "ImageReward")
    tiny_checkpoint("fid", weights / "FID")
    tiny_checkpoint("unified_reward_2", weights / "UnifiedReward-2.0-qwen35-9b")
    tiny_checkpoint("unified_reward_edit", weights / "UnifiedReward-Edit-qwen3vl-8b")
    bench = tiny_checkpoint("qwen_image_bench", tmp_path_factory.mktemp("bench"))
    pictures = tmp_path_factory.mktemp("pictures")
    folder = pictures / "flux" / "FLUX.1-dev"
    folder.mkdir(parents=True)
    PIL.Image.new("RGB", (64, 48), "brown").save(folder / "1.jpg")
    (folder / "metadata.csv").write_text('image,prompt\n1.jpg,"dog, brown fur"\n', encoding="utf-8")
    with LocalHub() as hub:
        hub.add_model("DiffSynth-Studio/ImageMetrics", weights)
        hub.add_model("Qwen/Qwen-Image-Bench", bench)
        hub.add_dataset("DiffSynth-Studio/diffsynth_example_dataset", pictures)
        yield hub


def run(hub: LocalHub, folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | hub.environment() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_as_it_stands(example: Path, hub: LocalHub, tmp_path: Path) -> None:
    judged = ["-c", READABLE] if example.stem in JUDGES else []
    output = run(hub, tmp_path, *judged, str(example))
    assert re.search(r"-?\d+\.\d\d", output), "an example prints a score"
    assert "nan" not in output.lower()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documentation_runs_as_it_stands(document: Path, hub: LocalHub, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    for number, block in enumerate(blocks):
        script = tmp_path / f"block_{number}.py"
        script.write_text(block, encoding="utf-8")
        run(hub, tmp_path, str(script))


def test_quickstart_marks_the_right_picture_for_each_prompt(hub: LocalHub, tmp_path: Path) -> None:
    requests = len(hub.requests)
    output = run(hub, tmp_path, str(ROOT / "examples" / "quickstart.py"))
    rows = [line for line in output.splitlines() if line.startswith("a ")]
    assert len(rows) == 5
    for position, row in enumerate(rows):
        cells = re.findall(r"-?\d+\.\d+\*?", row)
        assert [cell.endswith("*") for cell in cells] == [i == position for i in range(5)], row
    with PIL.Image.open(tmp_path / "results" / "quickstart.png") as sheet:
        assert sheet.width > 5 * 160
    assert len(hub.requests) == requests, "the embedded model needs no network"


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("pickscore", "PickScore v1"),
        ("clip", "CLIP score"),
        ("hpsv2", "HPSv2"),
        ("hpsv3", "HPSv3"),
        ("image_reward", "ImageReward v1.0"),
        ("aesthetic", "LAION Aesthetic v2"),
        ("unified_reward_2", "UnifiedReward 2.0"),
        ("qwen_image_bench", "Qwen-Image-Bench"),
    ],
)
def test_quickstart_scores_the_users_pictures_with_a_published_metric(
    hub: LocalHub, tmp_path: Path, metric: str, title: str
) -> None:
    PIL.Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    PIL.Image.new("L", (40, 50), 7).save(tmp_path / "b.jpg")
    output = run(
        hub,
        tmp_path,
        *(["-c", READABLE] if metric in JUDGES else []),
        str(ROOT / "examples" / "quickstart.py"),
        *("--metric", metric, "--prompt", "a red wall", "--images", "a.png", "b.jpg"),
    )
    assert title in output
    assert output.count("*") >= 2  # in the heading, and the best picture, or both where they are equal
    assert (tmp_path / "results" / "quickstart.png").is_file()

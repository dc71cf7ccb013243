"""check: what it finds in a data set without loading a model, and what it says it could not look at."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from diffsynth_metrics import AestheticMetric, BaseMetric, CLIPMetric, UnifiedRewardEditMetric
from diffsynth_metrics.catalog import NAMES, find_class
from diffsynth_metrics.evaluation import checking
from diffsynth_metrics.evaluation.checking import Check, check
from diffsynth_metrics.evaluation.samples import Problem, Sample, read_samples
from diffsynth_metrics.tokens import CutsPrompts

LONG = "a red circle on a blue table " * 20


def draw(path: Path, color: str | tuple[int, int, int] = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 3), color).save(path)
    return path


def found(result: Check, kind: str) -> list[Problem]:
    return [problem for problem in result.problems if problem.kind == kind]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A manifest of seven rows, of which three are fine."""
    for number in range(3):
        draw(tmp_path / f"images/{number}.png", (number, 0, 0))
    whole = draw(tmp_path / "images/3.png", (9, 9, 9)).read_bytes()
    (tmp_path / "images/3.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(tmp_path / "images/0.png", tmp_path / "images/4.png")
    draw(tmp_path / "images/6.png", "blue")
    draw(tmp_path / "images/stray.png", "green")
    rows = [
        {"image": f"images/{number}.png", "prompt": f"a {number % 2}", "seed": number, "style": "x"}
        for number in range(6)
    ]
    rows += [{"image": "images/6.png", "prompt": LONG, "style": "y"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data.jsonl"


def test_everything_that_is_wrong_is_found(broken: Path) -> None:
    result = check(broken)
    folder = broken.parent / "images"
    assert [problem.file for problem in found(result, "missing")] == [f"{broken}, line 6"]
    [corrupt] = found(result, "corrupt")
    assert corrupt.file == str(folder / "3.png") and corrupt.message.startswith("cannot be read")
    [identical] = found(result, "identical")
    assert identical.file == str(folder / "4.png") and str(folder / "0.png") in identical.message
    [unused] = found(result, "unused")
    assert unused.file == str(folder / "stray.png")
    [cut] = found(result, "cut")
    assert "bioclip, clip, hpsv2, pickscore read 77" in cut.message
    assert not result.ok
    assert (result.prompts, result.pictures_per_prompt) == (3, (1, 3))
    assert result.categories == {"x": 6, "y": 1}


def test_the_table_counts_and_the_text_lists(broken: Path) -> None:
    result = check(broken)
    counts = {row[0]: row[1] for row in result.table().rows}
    assert counts == {
        "layout": "manifest",
        "samples": 7,
        "prompts": 3,
        "seeds": 6,
        "category x": 6,
        "category y": 1,
        "missing": 1,
        "unused": 1,
        "corrupt": 1,
        "identical": 1,
        "cut": 1,
    }
    assert f"missing: {broken}, line 6: there is no file" in str(result)
    assert "stray.png" in result._repr_html_()


def test_a_clean_data_set_is_ok_also_with_unused_files(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a cat")
    (tmp_path / "README.md").write_text("about")
    result = check(tmp_path)
    assert result.ok
    assert [problem.kind for problem in result.problems] == ["unused"]


def test_prompts_are_missed_by_metrics_that_need_them(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    assert not check(tmp_path).ok
    assert check(tmp_path, ["aesthetic"]).ok
    assert check(tmp_path, [AestheticMetric]).ok
    assert not check(tmp_path, ["aesthetic", "clip"]).ok


def test_sources_are_missed_by_metrics_that_need_them(tmp_path: Path) -> None:
    samples = [Sample("1", "add a hat", draw(tmp_path / "1.png"))]
    result = check(samples, [UnifiedRewardEditMetric])
    [problem] = found(result, "no source")
    assert "unified_reward_edit" in problem.message
    assert not result.ok
    with_source = [Sample("1", "add a hat", tmp_path / "1.png", (draw(tmp_path / "0.png", "blue"),))]
    assert check(with_source, [UnifiedRewardEditMetric]).ok


def test_broken_sources_and_pictures_in_shards_are_found(tmp_path: Path) -> None:
    (tmp_path / "s.png").write_bytes(b"no picture")
    samples = [Sample("1", "x", draw(tmp_path / "1.png"), (tmp_path / "s.png",))]
    assert [problem.file for problem in found(check(samples), "corrupt")] == [str(tmp_path / "s.png")]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    [corrupt] = found(check(tmp_path / "a.tar"), "corrupt")
    assert corrupt.file == f"{tmp_path / 'a.tar'}::0.png"


def test_samples_of_ones_own_are_checked_for_files_and_ids(tmp_path: Path) -> None:
    picture = draw(tmp_path / "1.png")
    samples = [Sample("1", "x", picture), Sample("1", "y", str(tmp_path / "none.png"))]
    result = check(samples)
    assert [problem.file for problem in found(result, "missing")] == [str(tmp_path / "none.png")]
    assert [problem.file for problem in found(result, "same id")] == ["1"]
    assert check([Sample("1", "x", PIL.Image.new("RGB", (4, 4)))]).ok


def test_samples_that_a_comparison_cannot_tell_apart(tmp_path: Path) -> None:
    picture = draw(tmp_path / "1.png")
    samples = [
        Sample(name, "x", picture, seed=seed) for name, seed in (("a", "1"), ("b", "2"), ("c", "1"))
    ]
    result = check(samples)
    [problem] = found(result, "same seed")
    assert (problem.file, "sample 'a'" in problem.message) == ("sample 'c'", True)
    assert result.ok


def test_cut_prompts_by_the_tokenizer_that_the_metric_has(
    tmp_path: Path, metrics: Callable[[str], Any], tiny: Callable[[str], Path]
) -> None:
    prompts = ["a red circle", "a red circle on a blue table " * 6, LONG]
    samples = [
        Sample(str(number), prompt, draw(tmp_path / "1.png")) for number, prompt in enumerate(prompts)
    ]
    loaded: BaseMetric = metrics("clip")
    for metric in (loaded, f"clip={tiny('clip')}", "shapes", CLIPMetric, "hpsv2"):
        result = check(samples, [metric])
        limit = 32 if metric == "shapes" else 77
        expected = 2 if limit == 32 else 1
        if (isinstance(metric, str) and "=" in metric) or metric is loaded:
            lengths = loaded.tokenize(prompts).lengths  # type: ignore[attr-defined]
            read = len(loaded.tokenize([LONG]).ids[0])  # type: ignore[attr-defined]
            limit, expected = read, sum(length > read for length in lengths)
        assert len(found(result, "cut")) == expected, metric
        assert all(f"read {limit}" in problem.message for problem in found(result, "cut"))
        assert result.not_checked == ()


def test_a_tokenizer_that_is_not_on_disk_is_said(
    tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    samples = [Sample("1", LONG, draw(tmp_path / "1.png"))]
    result = check(samples, ["image_reward"])
    assert result.not_checked == (
        "not checked whether image_reward cuts prompts: its tokenizer is not on disk",
    )
    assert "its tokenizer is not on disk" in result.table().text()
    [cut] = found(check(samples, [f"image_reward={tiny('image_reward')}"]), "cut")
    assert "read 35" in cut.message


def test_all_metrics_of_the_package_that_cut_prompts_are_looked_at() -> None:
    cutting = {name for name in NAMES if issubclass(find_class(name), CutsPrompts)}
    assert set(checking._CUTTING) == cutting - {"shapes"}


def test_judges_and_metrics_of_pictures_cut_nothing(tmp_path: Path) -> None:
    samples = [Sample("1", LONG, draw(tmp_path / "1.png"))]
    result = check(samples, ["aesthetic", "fid", "hpsv3", "qwen_image_bench"])
    assert (found(result, "cut"), result.not_checked) == ([], ())
    with pytest.raises(ValueError, match="pickscore"):
        check(samples, ["pickscor"])


def test_the_result_of_read_samples_is_checked_as_it_is(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    samples = read_samples(tmp_path)
    assert check(samples).samples is samples

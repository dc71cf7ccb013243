"""What is known of the published weights: sizes, files on disk and on a hub, verification."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from classes import WITHOUT_WEIGHTS, metric_class
from hub import LocalHub
from modelscope_hub.config import set_default_config
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_metrics.catalog import NAMES, find_card
from diffsynth_metrics.cli import main
from diffsynth_metrics.errors import DownloadError
from diffsynth_metrics.weights import published
from diffsynth_metrics.weights.checkpoint import KNOWN_LAYOUTS, fingerprint, read_layout
from diffsynth_metrics.weights.published import (
    Check,
    PublishedScore,
    download,
    find_parts,
    list_on_hub,
    on_disk,
    size_text,
    verify,
)

LAYOUTS = Path(__file__).parent / "data" / "layouts"
REPOSITORY = "DiffSynth-Studio/ImageMetrics"
LAYOUT_OF = {
    "bioclip": "bioclip2",
    "clip": "clip_h14",
    "lpips": "lpips_alex",
    "pickscore": "clip_h14",
}
IN_PACKAGES = ("shapes", "text_rendering")
PUBLISHED = tuple(name for name in NAMES if name not in (*IN_PACKAGES, *WITHOUT_WEIGHTS))


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of downloads, empty; no setting of whoever runs the tests."""
    for name in ("DIFFSYNTH_DOWNLOAD_SOURCE", "DIFFSYNTH_SKIP_DOWNLOAD", published.PICTURES_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def pickscore(models: Path, tiny: Callable[[str], Path]) -> Path:
    """The folder of PickScore's published files, with a tiny checkpoint instead."""
    return Path(shutil.copytree(tiny("pickscore"), models / REPOSITORY / "PickScore"))


@pytest.fixture
def hub(
    tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalHub]:
    """A hub that serves the tiny checkpoint as PickScore's."""
    shutil.copytree(tiny("pickscore"), tmp_path / "repository" / "PickScore")
    with LocalHub() as hub:
        hub.add_model(REPOSITORY, tmp_path / "repository")
        for name, value in hub.environment().items():
            monkeypatch.setenv(name, value)
        set_default_config(None)
        yield hub
        set_default_config(None)


def results(checks: list[Check]) -> dict[str, str]:
    return {check.what: check.result for check in checks}


def detail(checks: list[Check], what: str) -> str:
    return next(check.detail for check in checks if check.what == what)


# Sizes


def test_the_download_size_of_a_card_is_that_of_the_published_layout() -> None:
    for name in PUBLISHED:
        file = LAYOUT_OF.get(name, name)
        if (LAYOUTS / f"{file}.json").is_file():
            layout = json.loads((LAYOUTS / f"{file}.json").read_text())
        else:  # timm's files are the state dicts of its networks
            weights = metric_class(name).build(None).state_dict()
            layout = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        size = sum(map(math.prod, layout.values())) * metric_class(name).official_dtype.itemsize
        assert find_card(name).download == size_text(size), name


def test_the_memory_of_a_card_is_that_of_the_network_in_its_official_dtype() -> None:
    for name in PUBLISHED:
        metric = metric_class(name)
        narrow = metric.official_dtype
        wide = torch.promote_types(narrow, torch.float32)
        size = sum(
            tensor.numel() * (wide if key.startswith(metric.float32_parts) else narrow).itemsize
            for key, tensor in metric.finish(metric.build(None), narrow).state_dict().items()
        )
        assert find_card(name).memory == size_text(size), name


def test_a_size_is_said_in_the_largest_unit() -> None:
    assert [size_text(size) for size in (1500, 95_541_944, 3.94e9)] == ["2 kB", "96 MB", "3.9 GB"]


# On disk


def test_nothing_of_a_metric_is_on_disk_at_first() -> None:
    for name in PUBLISHED:
        found = on_disk(name)
        assert (found.state, found.size) == ("absent", 0), name
    assert on_disk("shapes").state == "whole"


def test_networks_that_a_package_ships_are_found_in_it() -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    assert on_disk("text_rendering").state == "whole"
    checks = verify("text_rendering")
    assert results(checks) == {"files": "ok", "sha256": "not checked"}
    assert "2 of weights, 31 MB" in detail(checks, "files")
    assert find_parts("text_rendering") == () and download("text_rendering") == []
    with pytest.raises(ValueError, match="reads with the networks of rapidocr, and not with"):
        verify("text_rendering=models/mine")


def test_without_the_package_its_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    found = on_disk("text_rendering")
    assert found.state == "absent" and "pip install 'diffsynth-metrics[ocr]'" in found.problem
    (check,) = verify("text_rendering")
    assert check.result == "failed" and "pip install" in check.detail


def test_a_formula_needs_no_files() -> None:
    for name in WITHOUT_WEIGHTS:
        assert on_disk(name).state == "whole" and find_parts(name) == () and download(name) == []
        assert results(verify(name)) == {"files": "ok"}


def test_weights_of_one_hub_are_asked_of_it_whatever_is_said() -> None:
    for source in (None, "modelscope"):
        assert find_parts("cmmd", source)[0].repository.source == "huggingface"
    assert find_parts("pickscore", "huggingface")[0].repository.source == "huggingface"


def test_files_that_are_whole_are_said_to_be(pickscore: Path) -> None:
    found = on_disk("pickscore")
    assert (found.state, found.folder, found.problem) == ("whole", pickscore, "")
    assert found.size > (pickscore / "model.safetensors").stat().st_size


def test_files_that_are_there_in_part_are_said_to_be(pickscore: Path) -> None:
    weights = pickscore / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    found = on_disk("pickscore")
    assert found.state == "partly"
    assert str(weights) in found.problem and "truncated" in found.problem
    weights.unlink()
    assert on_disk("pickscore").problem == "no weights"
    shutil.rmtree(pickscore)
    pickscore.mkdir()
    (pickscore / "model.safetensors.incomplete").write_bytes(content[:1000])
    found = on_disk("pickscore")
    assert (found.state, found.size) == ("partly", 0)
    assert "download of the weights was interrupted" in found.problem


def test_a_missing_shard_makes_the_weights_incomplete(models: Path) -> None:
    folder = models / REPOSITORY / "UnifiedReward-2.0-qwen35-9b"
    folder.mkdir(parents=True)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    found = on_disk("unified_reward_2")
    assert found.state == "partly" and "weights not complete" in found.problem


# On a hub


def test_both_hubs_list_names_sizes_and_sha256(hub: LocalHub, tiny: Callable[[str], Path]) -> None:
    weights = tiny("pickscore") / "model.safetensors"
    for source in ("modelscope", "huggingface"):
        of_weights, of_processor = find_parts("pickscore", source)
        (file,) = list_on_hub(of_weights)
        assert file.name == "PickScore/model.safetensors"
        assert file.size == weights.stat().st_size
        assert file.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
        names = {file.name for file in list_on_hub(of_processor)}
        assert "PickScore/tokenizer.json" in names and file.name not in names


def test_a_hub_that_is_gone_or_has_other_files_is_an_error_that_says_what_to_do(hub: LocalHub) -> None:
    with pytest.raises(
        DownloadError, match=r"Choose the other hub.*\n.*no file of the repository matches"
    ):
        list_on_hub(find_parts("hpsv2")[0])
    hub.stop()
    with pytest.raises(DownloadError, match=r"^Check the network, or choose the other hub"):
        list_on_hub(find_parts("pickscore", "huggingface")[0])


def test_a_download_is_compared_with_the_hashes_of_the_hub(hub: LocalHub, models: Path) -> None:
    checks = download("pickscore")
    assert set(results(checks).values()) == {"ok"}
    assert on_disk("pickscore").state == "whole"
    weights = models / REPOSITORY / "PickScore" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    damaged = download("pickscore")
    assert results(damaged)["sha256 of the weights"] == "failed"
    assert f"Delete {weights}" in detail(damaged, "sha256 of the weights")


def test_a_download_goes_on_where_it_was_cut(hub: LocalHub) -> None:
    hub.cut_once("PickScore/model.safetensors", after_bytes=10_000)
    assert set(results(download("pickscore")).values()) == {"ok"}
    ranged = [
        request for request in hub.file_requests("PickScore/model.safetensors") if "bytes=" in request
    ]
    assert ranged


def test_what_is_whole_needs_no_hub_and_says_that_its_hash_was_not_checked(
    hub: LocalHub, pickscore: Path
) -> None:
    hub.stop()
    assert set(results(download("pickscore", "huggingface")).values()) == {"not checked"}
    assert download("shapes") == []


# Verification


def test_the_embedded_model_is_verified_by_its_scores() -> None:
    checks = results(verify("shapes"))
    assert checks["files"] == checks["loading"] == checks["values"] == checks["scores"] == "ok"
    assert checks["layout"] == checks["sha256"] == "not checked"


def test_a_checkpoint_of_ones_own_is_checked_as_far_as_it_can_be(tiny: Callable[[str], Path]) -> None:
    checks = verify(f"pickscore={tiny('pickscore')}")
    assert [check.what for check in checks] == [
        "files",
        "layout",
        "sha256",
        "loading",
        "values",
        "scores",
    ]
    assert results(checks)["values"] == "ok"
    assert "no published layout" in detail(checks, "layout")


def test_files_that_are_not_there_fail_and_say_so(tmp_path: Path) -> None:
    (check,) = verify("pickscore")
    assert (check.what, check.result) == ("files", "failed")
    assert check.detail.startswith("Run diffsynth-metrics download pickscore: no weights in ")
    (check,) = verify(f"pickscore={tmp_path / 'nothing'}")
    assert str(tmp_path / "nothing") in check.detail
    with pytest.raises(ValueError, match="on the machine that serves them"):
        verify("unified_reward_2=http://localhost:8000/v1")


def test_weights_with_nan_and_truncated_weights_fail(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    folder = Path(shutil.copytree(tiny("pickscore"), tmp_path / "own"))
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checks = verify(f"pickscore={folder}")
    assert checks[-1].what == "values" and checks[-1].result == "failed"
    assert "logit_scale" in checks[-1].detail
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    (check,) = verify(f"pickscore={folder}")
    assert check.result == "failed" and "truncated" in check.detail


def test_weights_of_another_metric_fail(tiny: Callable[[str], Path]) -> None:
    checks = verify(f"pickscore={tiny('hpsv2')}")
    assert (checks[-1].what, checks[-1].result) == ("loading", "failed")
    assert "HPSv2Metric" in checks[-1].detail


def test_published_files_are_compared_with_layout_hash_and_score(
    hub: LocalHub, pickscore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = fingerprint(read_layout([pickscore / "model.safetensors"]))
    monkeypatch.setitem(KNOWN_LAYOUTS, layout, ("PickScoreMetric", "CLIPMetric"))
    picture = tmp_path / "pictures" / "deep" / "red.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(picture)
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()[:8]
    known = PublishedScore("a paper", "red", (digest,), (0.0,), tolerance=1e-3)
    monkeypatch.setitem(published.PUBLISHED_SCORES, "pickscore", known)

    without = verify("pickscore")
    assert results(without)["layout"] == results(without)["sha256 of the weights"] == "ok"
    assert results(without)["scores"] == "not checked"
    assert "a paper" in detail(without, "scores")

    wrong = verify("pickscore", pictures=tmp_path / "pictures")
    assert results(wrong)["scores"] == "failed"
    score = metric_class("pickscore").from_pretrained(device="cpu").compute("red", picture)[0]
    known = PublishedScore("a paper", "red", (digest,), (score,), tolerance=1e-3)
    monkeypatch.setitem(published.PUBLISHED_SCORES, "pickscore", known)
    assert results(verify("pickscore", pictures=tmp_path / "pictures"))["scores"] == "ok"


# The command


def test_the_command_lists_files_and_sizes_and_asks_in_a_terminal_only(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["download", "pickscore"]) == 0
    assert capsys.readouterr().out == "nothing downloaded\n"
    assert sys.stderr.getvalue().endswith("Download? [Y/n] ")  # type: ignore[attr-defined]
    assert on_disk("pickscore").state == "absent"

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert main(["download", "pickscore"]) == 0
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"to download +\d+ MB  PickScore/model\.safetensors", said)
    assert re.search(r"\d files, \d+ MB\n", said) and "[Y/n]" not in said
    assert "sha256 of the weights" in capsys.readouterr().out
    assert on_disk("pickscore").state == "whole"
    assert main(["download", "pickscore", "--source", "huggingface"]) == 0
    assert "on disk" in sys.stderr.getvalue()  # type: ignore[attr-defined]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

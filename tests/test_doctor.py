"""What the doctor finds, and what it says to do about it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch

from diffsynth_metrics import doctor
from diffsynth_metrics.catalog import NAMES
from diffsynth_metrics.doctor import Finding, diagnose, usable_cores


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads are off, and go to an empty folder; three quiet cores."""
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.delenv("DIFFSYNTH_DOWNLOAD_SOURCE", raising=False)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    monkeypatch.setattr(doctor, "cpu_count", lambda: 3)
    monkeypatch.setattr(doctor, "_CGROUP_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))


def find(subject: str) -> Finding:
    return next(finding for finding in diagnose() if finding.subject == subject)


def test_a_machine_without_weights_works_and_is_told_how_to_get_them() -> None:
    findings = diagnose()
    assert {finding.subject for finding in findings if finding.state == "problem"} == set()
    subjects = [finding.subject for finding in findings]
    assert {"python", "torch", "device", "threads", "hubs", "disk", *NAMES} <= set(subjects)
    assert len(subjects) == len(set(subjects))
    assert "diffsynth-metrics download pickscore takes 3.9 GB" in find("pickscore").detail
    assert find("shapes").state == "ok"


def test_more_threads_than_cores_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert find("threads").state == "problem"
    assert "OMP_NUM_THREADS=3" in find("threads").fix
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert find("threads").state == "ok"
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert usable_cores() == 1.5
    assert "OMP_NUM_THREADS=1" in find("threads").fix
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 3


def test_threads_on_busy_cores_are_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 1.0, 1.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert find("threads").state == "hint"
    assert "OMP_NUM_THREADS=1" in find("threads").fix
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert find("threads").state == "ok"


def test_a_version_that_is_too_old_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=99", "nowhere>=1", 'notthere>=2; extra == "eval"', 'other>=1; extra == "trl"']
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    assert (find("torch").state, find("torch").fix) == ("problem", 'pip install "torch>=99"')
    assert (find("nowhere").state, find("nowhere").fix) == ("problem", "pip install diffsynth-metrics")
    assert (find("notthere").state, find("notthere").fix) == (
        "hint",
        'pip install "diffsynth-metrics[eval]"',
    )
    assert "other" not in {finding.subject for finding in diagnose()}


def test_a_setting_that_means_nothing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "github")
    finding = find("DIFFSYNTH_DOWNLOAD_SOURCE")
    assert finding.state == "problem" and "modelscope" in finding.fix


def test_a_hub_that_does_not_answer_is_a_hint_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "false")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    finding = find("hub modelscope")
    assert finding.state == "hint" and "used by default" in finding.detail
    assert "DIFFSYNTH_DOWNLOAD_SOURCE=huggingface" in finding.fix
    assert find("hub huggingface").state == "hint"


def test_a_proxy_that_reaches_no_hub_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "false")
    for status, state in ((502, "hint"), (407, "hint"), (403, "ok")):

        def answer(*_: object, status: int = status, **__: object) -> None:
            raise HTTPError("http://hub", status, "no", Message(), None)

        monkeypatch.setattr(doctor, "urlopen", answer)
        assert find("hub modelscope").state == state, status


def test_no_hub_is_asked_where_downloads_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a request was made")

    monkeypatch.setattr(doctor, "urlopen", refuse)
    assert "downloads are off" in find("hubs").detail


def test_files_that_are_there_in_part_are_a_problem(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    folder = tmp_path / "models" / "DiffSynth-Studio" / "ImageMetrics" / "PickScore"
    shutil.copytree(tiny("pickscore"), folder)
    assert find("pickscore").state == "ok"
    (folder / "model.safetensors").unlink()
    finding = find("pickscore")
    assert (finding.state, finding.fix) == ("problem", "diffsynth-metrics download pickscore")
    assert "no weights" in finding.detail


def test_a_disk_that_is_full_or_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000_000))
    assert find("disk").state == "hint"
    assert "hpsv3" in find("disk").detail and "pickscore" not in find("disk").detail
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert find("disk").state == "problem"
    assert "DIFFSYNTH_MODEL_BASE_PATH" in find("disk").fix

"""Hostile or damaged hubs, notes and files: nothing is written elsewhere, nothing is trusted."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import LocalHub
from modelscope_hub.config import set_default_config

from diffsynth_metrics.errors import DownloadError
from diffsynth_metrics.weights import hub as hub_module
from diffsynth_metrics.weights.model_config import ModelConfig

REPOSITORY = "some/repository"
WEIGHTS = "M/model.safetensors"
FILES = {
    WEIGHTS: bytes(range(256)) * 1000,
    "M/config.json": b'{"model_type": "clip"}',
    "M/merges.txt": b"a b\nc d\n",
}
SOURCES = ("modelscope", "huggingface")
HOSTILE_NAMES: tuple[object, ...] = (
    "../evil",
    "../../evil",
    "M/../../../evil",
    "M/sub/../../../../evil",
    "/tmp/evil_of_a_listing",
    "//evil",
    "M//evil",
    "M/./evil",
    "./evil",
    "M/..",
    "..",
    "M\\..\\..\\evil",
    "..\\evil",
    "C:\\evil",
    "C:evil",
    "M/CON",
    "M/nul.json",
    "lpt1/evil",
    "M/a\nb",
    "M/a\0b",
    "M/\u202eevil",
    "M/\ud800",
    "",
    ".diffsynth_metrics/0.json",
    3,
    None,
    ["M/evil"],
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Serve the files, and lead the clients there."""
    for name in list(os.environ):
        if name.startswith(("DIFFSYNTH_", "MODELSCOPE_", "HF_")):
            monkeypatch.delenv(name)
    for name, content in FILES.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(content)
    with LocalHub() as hub:
        hub.add_model(REPOSITORY, tmp_path / "repository")
        for name, value in hub.environment().items():
            monkeypatch.setenv(name, value)
        set_default_config(None)  # ModelScope's client keeps the folder of its locks
        yield hub
        set_default_config(None)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Return the local folder of the repository, which does not exist yet."""
    return tmp_path / "deep" / "models" / REPOSITORY


@pytest.fixture
def config(local: Path) -> Callable[..., ModelConfig]:
    """Make configs of the repository."""

    def make(pattern: str | None, source: str, **options: Any) -> ModelConfig:
        return ModelConfig(
            model_id=REPOSITORY,
            origin_file_pattern=pattern,
            download_source=source,
            local_model_path=local.parents[1],
            **options,
        )

    return make


def files_outside(tmp_path: Path, local: Path) -> set[Path]:
    """Return the files of the test's folder that are in no folder where files may be."""
    allowed = (local, tmp_path / "repository")
    return {
        file
        for file in tmp_path.rglob("*")
        if not file.is_dir() and not any(file.is_relative_to(folder) for folder in allowed)
    }


def note_of(local: Path) -> Path:
    """Return the only note of a folder."""
    (note,) = (local / ".diffsynth_metrics").glob("*.json")
    return note


# Listings


@pytest.mark.parametrize("source", SOURCES)
def test_a_listing_that_leads_out_of_the_folder_is_refused_before_anything_is_written(
    source: str, hub: LocalHub, tmp_path: Path, local: Path, config: Callable[..., ModelConfig]
) -> None:
    for name in HOSTILE_NAMES:
        hub.list_no_more()
        hub.list_also(name)
        hub.requests.clear()
        with pytest.raises(DownloadError) as caught:
            config(None, source).resolve()
        # ModelScope's client makes "" of a name that it does not find.
        assert repr(name) in str(caught.value) or name is None, name
        assert not any("resolve/" in request or "/repo?" in request for request in hub.requests)
    assert not Path("/tmp/evil_of_a_listing").exists()
    assert files_outside(tmp_path, local) == set()
    # What is not asked for is not written, so it does not matter.
    hub.list_no_more()
    hub.list_also("../evil")
    assert config(WEIGHTS, source).resolve() == [str(local / WEIGHTS)]


@pytest.mark.parametrize("source", SOURCES)
def test_a_listing_that_says_two_things_of_a_file_is_refused(
    source: str, hub: LocalHub, config: Callable[..., ModelConfig]
) -> None:
    hub.list_also(WEIGHTS, sha256="0" * 64)
    with pytest.raises(DownloadError, match=rf"'{WEIGHTS}' is there twice"):
        config("M/", source).resolve()


@pytest.mark.parametrize("source", SOURCES)
def test_a_client_that_lists_otherwise_than_before_writes_nothing_outside(
    source: str,
    hub: LocalHub,
    tmp_path: Path,
    local: Path,
    config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = hub_module.Repository.list_files

    def list_files(self: Any, files: Any) -> Any:
        listed = checked(self, files)
        hub.list_also("M/../../../evil")
        hub.list_also("../evil")
        return listed

    monkeypatch.setattr(hub_module.Repository, "list_files", list_files)
    config("M/", source).resolve()
    assert files_outside(tmp_path, local) == set()


# What arrives


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_bytes_of_the_right_size_are_refused_and_deleted(
    source: str,
    hub: LocalHub,
    local: Path,
    config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backoff = "modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF"
    monkeypatch.setattr(backoff, 0.01, raising=False)
    for name in (WEIGHTS, "M/config.json"):  # listed with sha256, and on Hugging Face with git's sha1
        hub.corrupt(name)
        with pytest.raises(DownloadError, match=r"(?s)^Try again, or set .* or something between"):
            config(name, source).resolve()
        assert not (local / name).exists()
        hub.send_correctly(name)
        (path,) = config(name, source).resolve()
        assert Path(path).read_bytes() == FILES[name]


@pytest.mark.parametrize("source", SOURCES)
def test_a_client_that_checks_nothing_is_checked(
    source: str, hub: LocalHub, local: Path, config: Callable[..., ModelConfig], monkeypatch: Any
) -> None:
    def fetch(self: hub_module.Repository, names: list[str], revision: str | None) -> None:
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(bytes(len(FILES[name])))

    monkeypatch.setattr(hub_module.Repository, "_fetch_files", fetch)
    with pytest.raises(DownloadError, match=rf"not what the hub lists, and was deleted: .*{WEIGHTS}"):
        config("M/", source).resolve()
    assert not any((local / name).exists() for name in FILES)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("pattern", [WEIGHTS, "M/", "M/*.s*"])
def test_a_file_that_no_longer_fits_its_note_is_fetched_again_or_named(
    pattern: str, source: str, hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    whole = FILES[WEIGHTS]
    config(pattern, source).resolve()
    (local / WEIGHTS).write_bytes(whole[:-1])
    config(pattern, source).resolve()
    assert (local / WEIGHTS).read_bytes() == whole

    note = note_of(local).read_bytes()
    for damage in (whole[:-1], None):
        (local / WEIGHTS).unlink()
        if damage is not None:
            (local / WEIGHTS).write_bytes(damage)
        with pytest.raises(DownloadError, match=f"missing or damaged since the download: {WEIGHTS}"):
            config(pattern, source, skip_download=True).resolve()
        hub.remove_model(REPOSITORY)
        for _ in range(2):  # a failed attempt does not make it better
            with pytest.raises(DownloadError, match=f"missing here: {WEIGHTS}"):
                config(pattern, source).resolve()
            assert note_of(local).read_bytes() == note
        hub.add_model(REPOSITORY, local.parents[3] / "repository")
    config(pattern, source).resolve()
    assert (local / WEIGHTS).read_bytes() == whole


def test_the_note_of_a_folder_holds_for_its_single_files(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    config("M/", "modelscope").resolve()
    (local / WEIGHTS).write_bytes(b"short")
    with pytest.raises(DownloadError, match=f"damaged since the download: {WEIGHTS}"):
        config(WEIGHTS, "modelscope", skip_download=True).resolve()


@pytest.mark.parametrize("source", SOURCES)
def test_digests_are_compared_on_request(
    source: str, hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    paths = config("M/", source).resolve()
    hub.requests.clear()
    assert config("M/", source).resolve(verify=True) == paths
    assert hub.requests == []  # the digests were noted

    other = bytes(reversed(FILES[WEIGHTS]))  # a shard of another revision, copied in by hand
    (local / WEIGHTS).write_bytes(other)
    assert config("M/", source).resolve() == paths
    message = rf"^Allow downloads.*Delete .*{WEIGHTS}"
    with pytest.raises(DownloadError, match=message):
        config("M/", source, skip_download=True).resolve(verify=True)
    assert config("M/", source).resolve(verify=True) == paths
    assert (local / WEIGHTS).read_bytes() == FILES[WEIGHTS]

    (local / "M/config.json").write_text('{"model_type": "mine"}')
    assert config("M/", source).resolve() == paths
    with pytest.raises(DownloadError, match=r"^Delete .*config\.json and let it be downloaded again"):
        config("M/", source).resolve(verify=True)
    assert "mine" in (local / "M/config.json").read_text()  # an edited file is nobody's to overwrite


def test_files_that_were_copied_by_hand_are_verified_with_the_hub_or_not_at_all(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    (local / "M").mkdir(parents=True)
    (local / WEIGHTS).write_bytes(FILES[WEIGHTS])
    with pytest.raises(DownloadError, match="not known to be what modelscope has"):
        config(WEIGHTS, "modelscope", skip_download=True).resolve(verify=True)
    assert config(WEIGHTS, "modelscope").resolve(verify=True)
    assert not hub.file_requests(WEIGHTS)
    with pytest.raises(ValueError, match="verify needs model_id"):
        ModelConfig(path=local / WEIGHTS).resolve(verify=True)


# Notes


def test_a_damaged_or_older_note_says_nothing(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    paths = config("M/", "modelscope").resolve()
    note = note_of(local)
    size = len(FILES[WEIGHTS])
    contents: list[Any] = [
        {"pattern": "M/", "files": {WEIGHTS: size}},  # of an older version
        {"files": {WEIGHTS: "many"}},
        {"files": [{"name": "../../evil", "size": 3}]},
        {"files": [{"name": WEIGHTS, "size": -1}]},
        {"files": [{"name": WEIGHTS, "size": True}]},
        {"files": [{"name": WEIGHTS, "size": 1, "sha256": "short"}]},
        {"files": [{"name": WEIGHTS, "size": 1, "more": 1}]},
        {"files": 3},
        [],
        None,
    ]
    for content in [*(json.dumps(content).encode() for content in contents), b"", b"\xff", b"[" * 10**5]:
        note.write_bytes(content)
        assert config("M/", "modelscope", skip_download=True).resolve() == paths
        hub.requests.clear()
        assert config("M/", "modelscope").resolve() == paths
        assert hub.requests  # only the hub knew that it was all of it


def test_names_of_versions_are_no_leftovers(tmp_path: Path) -> None:
    names = ["model.v1_2_3", "model.safetensors", "data.part_1_2"]
    leftovers = [
        "model.safetensors_0_167772159",
        "model.safetensors_167772160_335544319",
        "model.safetensors.incomplete",
    ]
    for name in [*names, *leftovers]:
        (tmp_path / name).write_bytes(b"x")
    assert [Path(path).name for path in ModelConfig(path=tmp_path).resolve()] == sorted(names)


# Waiting, and what the hub says


def test_a_process_that_waits_says_for_whom(
    hub: LocalHub,
    local: Path,
    config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = (
        "import sys, pathlib\n"
        "from diffsynth_metrics.weights.hub import LocalFiles\n"
        "with LocalFiles(pathlib.Path(sys.argv[1]), 'M/').locked():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    root = str(Path(__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(local)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    monkeypatch.setattr(hub_module, "_SECONDS_OF_SILENCE", 0.1)

    class Release(logging.Handler):
        """Ends the holder as soon as somebody says that it is waited for."""

        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for another download" in record.getMessage():
                holder.stdin.close()  # type: ignore[union-attr]

    handler = Release()
    hub_module.logger.addHandler(handler)
    try:
        with caplog.at_level(logging.WARNING):
            assert len(config("M/", "modelscope").resolve()) == 3
    finally:
        hub_module.logger.removeHandler(handler)
        holder.wait(timeout=30)
        holder.stdout.close()
    (said,) = [record.message for record in caplog.records if "waiting for another" in record.message]
    assert f"process {holder.pid} on " in said and time.strftime("since %Y-") in said
    assert not list((local / ".diffsynth_metrics").glob("*.holder"))


@pytest.mark.parametrize("source", SOURCES)
def test_a_stalled_transfer_ends_and_goes_on(
    source: str, hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    hub.stalls = 1
    result = in_new_process(
        config(WEIGHTS, source), MODELSCOPE_DOWNLOAD_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1"
    )
    assert result == [str(local / WEIGHTS)]
    assert (local / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    if source == "modelscope":  # the other writes blocks of 10 MB, and goes on after the last one
        half = len(FILES[WEIGHTS]) // 2
        assert hub.file_requests(WEIGHTS)[-1].endswith(f"bytes={half}-")


@pytest.mark.parametrize("source", SOURCES)
def test_what_the_hub_says_is_in_the_error(
    source: str, hub: LocalHub, config: Callable[..., ModelConfig]
) -> None:
    for status in (429, 500, 503, 403, 404):
        hub.refuse("M/merges.txt", status)
        options = {"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
        result = in_new_process(config("M/merges.txt", source), **options)
        assert result["error"] == "DownloadError"
        assert str(status) in result["message"]
        if status not in (403, 404):
            assert result["message"].startswith("Try again later"), result["message"]
            assert "the hub is being repaired" in result["message"], result["message"]


def in_new_process(config: ModelConfig, **variables: str) -> Any:
    """Resolve in a new Python, whose clients read their settings afresh."""
    code = (
        "import json, sys\n"
        "from diffsynth_metrics.weights.model_config import ModelConfig\n"
        "try: answer = ModelConfig(**json.loads(sys.argv[1])).resolve()\n"
        "except Exception as e: answer = {'error': type(e).__name__, 'message': str(e)}\n"
        "print(json.dumps(answer))"
    )
    names = ("model_id", "origin_file_pattern", "download_source", "local_model_path")
    fields = {name: getattr(config, name) for name in names}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

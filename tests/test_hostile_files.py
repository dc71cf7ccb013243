"""Hostile or damaged hubs, notes and files: nothing is written elsewhere, nothing is trusted."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import PIL.Image
import pytest
import torch
from classes import metric_class
from hub import LocalHub
from modelscope_hub.config import set_default_config
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from diffsynth_metrics import tokens
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.errors import CheckpointError, DownloadError, ImageError
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
    " ../evil",
    "M/.. /evil",
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
def test_a_listing_with_a_file_that_is_a_folder_is_refused(
    source: str, hub: LocalHub, config: Callable[..., ModelConfig]
) -> None:
    hub.list_also(f"{WEIGHTS}/x")
    with pytest.raises(DownloadError, match=rf"^Do not use[^@]*'{WEIGHTS}' is there as a file and as a"):
        config("M/", source).resolve()


@pytest.mark.parametrize("source", SOURCES)
def test_what_stands_in_the_way_of_a_file_is_named(
    source: str, hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    (local / WEIGHTS).mkdir(parents=True)
    with pytest.raises(DownloadError, match=f"^Move or delete {local / WEIGHTS},"):
        config("M/", source).resolve()
    shutil.rmtree(local)
    local.mkdir()
    (local / "M").write_text("no folder")
    with pytest.raises(DownloadError, match=f"^Move or delete {local / 'M'},"):
        config("M/", source).resolve()
    shutil.rmtree(local)
    local.write_text("no folder")
    with pytest.raises(DownloadError, match=f"^Move or delete {local}"):
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
    source: str, hub: LocalHub, config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clients wait between their attempts.
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for status in (429, 500):
        hub.refuse("M/merges.txt", status)
        with pytest.raises(DownloadError, match=r"^Try again later") as caught:
            config("M/merges.txt", source).resolve()
        assert str(status) in str(caught.value)
        assert "the hub is being repaired" in str(caught.value)


@pytest.mark.parametrize("source", SOURCES)
def test_a_hint_fits_its_cause(
    source: str, hub: LocalHub, config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DownloadError, match=r"^Check model_id and origin_file_pattern"):
        config("M/absent.json", source).resolve()
    cases = {
        "Make room on the disk": OSError(errno.ENOSPC, "No space left on device"),
        "Set DIFFSYNTH_MODEL_BASE_PATH to a folder that can be written": PermissionError(13, "denied"),
        "Check the network": ConnectionError("reset"),
        "Move or delete M/x,": FileExistsError(errno.EEXIST, "File exists", "M/x"),
        "Set DIFFSYNTH_MODEL_BASE_PATH to a folder with a sh": OSError(errno.ENAMETOOLONG, "too long"),
    }
    for hint, cause in cases.items():

        def fail(*arguments: object, cause: Exception = cause) -> None:
            try:
                raise cause
            except Exception as error:
                raise RuntimeError("the client gives up") from error

        monkeypatch.setattr(hub_module.Repository, "_fetch_files", fail)
        with pytest.raises(DownloadError, match=f"^{hint}"):
            config("M/", source).resolve()


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


# Tokenizers


def copy_of(folder: Path, target: Path) -> Path:
    """Return a copy of a tiny checkpoint that may be changed."""
    return Path(shutil.copytree(folder, target, dirs_exist_ok=True))


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    changed = change(content)
    file.write_text(json.dumps(content if changed is None else changed), encoding="utf-8")


def load(name: str, folder: Path) -> Any:
    """Load the metric of a tiny checkpoint."""
    return metric_class(name).from_pretrained(
        ModelConfig(path=folder), device="cpu", torch_dtype=torch.float32
    )


def rotate(tokenizer: Any) -> None:
    """Give each token the id of the next one, but for the two at the end."""
    vocabulary = tokenizer["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    kept = words[-2:]
    words = [words[-3], *words[:-3], *kept]
    tokenizer["model"]["vocab"] = {word: index for index, word in enumerate(words)}


def swap(first: str, second: str) -> Callable[[Any], None]:
    """Return what swaps the ids of two tokens."""

    def change(tokenizer: Any) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    return change


def cut_merges(tokenizer: Any) -> None:
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20_000]


def no_merges(tokenizer: Any) -> None:
    tokenizer["model"]["merges"] = []


def test_a_tokenizer_that_means_something_else_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    cases: list[tuple[str, Callable[[Any], None], str]] = [
        ("clip", cut_merges, r"'A teddy bear .*' as \[49406, .*\], expected \[49406, 320, 11798"),
        ("clip", no_merges, r"reads 'a photo of a cat' as \[49406, .*\], expected \[49406, 320, 1125"),
        ("clip", rotate, "'a photo of a cat' as"),
        ("clip", swap("cat</w>", "dog</w>"), r"expected \[49406, 320, 1125, 539, 320, 2368, 49407\]"),
        ("clip", swap("zebra</w>", "giraffe</w>"), "some of its tokens or merges are others"),
        ("image_reward", swap("cat", "dog"), 'reads "The cat\'s photo, in 4k!" as'),
        ("image_reward", swap("blue", "square"), "some of its tokens or merges are others"),
        ("hpsv3", no_merges, "reads .* as .*, expected"),
        ("unified_reward_edit", no_merges, "reads .* as .*, expected"),
    ]
    for number, (name, change, message) in enumerate(cases):
        folder = copy_of(tiny(name), tmp_path / str(number))
        edit_json(folder / "tokenizer.json", change)
        with pytest.raises(CheckpointError, match=f"(?is){message}") as caught:
            load(name, folder)
        assert str(folder) in str(caught.value), change


def test_added_tokens_that_the_network_does_not_know_are_refused(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    red = {
        "id": 2368,
        "content": "red",
        "special": True,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    }
    without_id = {key: value for key, value in red.items() if key != "id"}

    def add(tokenizer: Any) -> None:
        tokenizer["added_tokens"].append(red)

    def add_to_settings(settings: Any) -> None:
        settings.setdefault("added_tokens_decoder", {})["2368"] = without_id

    cases: list[tuple[str, str, Callable[[Any], Any]]] = [
        ("clip", "special_tokens_map.json", lambda _: {"additional_special_tokens": ["circle"]}),
        ("clip", "added_tokens.json", lambda _: {"red": 2368}),
        ("clip", "tokenizer.json", add),
        ("clip", "tokenizer_config.json", add_to_settings),
        ("clip", "tokenizer_config.json", lambda old: old | {"unk_token": "zebra"}),
        ("image_reward", "tokenizer_config.json", lambda old: old | {"unk_token": "red"}),
        ("hpsv3", "tokenizer.json", lambda old: old["added_tokens"].append(red | {"id": 100})),
        (
            "unified_reward_edit",
            "tokenizer.json",
            lambda old: old["added_tokens"].append(red | {"id": 9}),
        ),
    ]
    expected = scores_of("clip", tiny("clip"))
    for number, (name, file, change) in enumerate(cases):
        folder = copy_of(tiny(name), tmp_path / str(number))
        if not (folder / file).is_file():
            (folder / file).write_text("{}")
        edit_json(folder / file, change)
        try:
            metric = load(name, folder)
        except CheckpointError as error:
            assert str(folder) in str(error), (name, file)
        else:  # this version of transformers does not read the file
            assert name == "clip" and scores(metric) == pytest.approx(expected), (name, file)


def test_words_are_no_added_tokens_of_qwen(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = load("hpsv3", tiny("hpsv3")).tokenizer
    tokens.check_canaries(tokenizer, tmp_path, 248320)
    tokenizer.add_tokens(["red"])
    with pytest.raises(CheckpointError, match=r"added tokens are others.*\{'red': \d+\}"):
        tokens.check_canaries(tokenizer, tmp_path, 248320)


def test_canaries_beside_a_tokenizer_of_ones_own_replace_the_published_ones(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(tiny("clip"), tmp_path / "own")
    edit_json(folder / "tokenizer.json", swap("zebra</w>", "giraffe</w>"))
    with pytest.raises(CheckpointError, match="tokens or merges are others"):
        load("clip", folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens.write_canaries(tokenizer, folder, ["a zebra and a giraffe"])
    load("clip", folder)
    edit_json(folder / "tokenizer.json", swap("cat</w>", "dog</w>"))
    with pytest.raises(CheckpointError, match="tokens or merges are others"):
        load("clip", folder)


def test_a_tokenizer_that_cannot_be_read_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("clip", "image_reward", "hpsv3"):
        for content in (b"", b"{", b"[]", b"null", b'{"model": 3}', b"\xff\xfe", b"[" * 10**5):
            folder = copy_of(tiny(name), tmp_path / name)
            (folder / "tokenizer.json").write_bytes(content)
            with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
                load(name, folder)


def test_the_known_ids_are_those_of_open_clip() -> None:
    clip = open_clip.SimpleTokenizer()
    for text, ids in tokens._PUBLISHED[49408].texts.items():
        assert [clip.sot_token_id, *clip.encode(text), clip.eot_token_id] == ids


# Configs and weights


def test_a_hostile_size_is_refused_before_anything_is_built(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    cases: list[tuple[str, str, tuple[str, ...], Any]] = [
        ("clip", "config.json", ("text_config", "max_position_embeddings"), 10**9),
        ("clip", "config.json", ("text_config", "num_hidden_layers"), 20_000),
        ("clip", "config.json", ("vision_config", "num_hidden_layers"), 20_000),
        ("clip", "config.json", ("vision_config", "image_size"), 10**9),
        ("aesthetic", "config.json", ("image_size",), 10**9),
        ("aesthetic", "config.json", ("num_hidden_layers",), 10**6),
        ("hpsv2", "open_clip_config.json", ("model_cfg", "text_cfg", "context_length"), 10**9),
        ("hpsv2", "open_clip_config.json", ("model_cfg", "vision_cfg", "layers"), 20_000),
        ("image_reward", "config.json", ("text_config", "max_position_embeddings"), 10**9),
        ("image_reward", "config.json", ("vision_config", "image_size"), 10**9),
        ("hpsv3", "config.json", ("vision_config", "depth"), 20_000),
        ("hpsv3", "config.json", ("num_hidden_layers",), 20_000),
        ("unified_reward_edit", "config.json", ("text_config", "num_hidden_layers"), 20_000),
    ]
    for number, (name, file, keys, value) in enumerate(cases):
        folder = copy_of(tiny(name), tmp_path / str(number))
        edit_json(folder / file, lambda config, keys=keys, value=value: set_at(config, keys, value))
        message = rf"{file} again: it says {'.'.join(keys)} = {value}, and .* cannot have more than"
        with pytest.raises(CheckpointError, match=message):
            load(name, folder)


def set_at(config: Any, keys: tuple[str, ...], value: Any) -> None:
    """Set a value of nested dicts."""
    for key in keys[:-1]:
        config = config[key]
    config[keys[-1]] = value


def test_a_processor_that_prepares_pictures_otherwise_is_named_with_its_field(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    judge = "unified_reward_edit"
    cases: list[tuple[str, str, Any]] = [
        ("clip", "image_mean", [0.5] * 3),
        ("clip", "rescale_factor", 1 / 127.5),
        ("clip", "do_normalize", False),
        ("image_reward", "image_std", [0.5] * 3),
        ("hpsv3", "patch_size", 16),
        ("hpsv3", "image_mean", [0.5] * 3),
        (judge, "image_mean", [0.48145466, 0.4578275, 0.40821073]),
        (judge, "do_rescale", False),
        (judge, "rescale_factor", 1.0),
        (judge, "patch_size", 7),
        (judge, "temporal_patch_size", 1),
        (judge, "merge_size", 1),
    ]
    for number, (name, field, value) in enumerate(cases):
        folder = copy_of(tiny(name), tmp_path / str(number))
        flat, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
        settings = json.loads(flat.read_text()) if flat.is_file() else {}
        flat.write_text(json.dumps(settings | {field: value}))
        with pytest.raises(CheckpointError, match=f"{flat} belongs to another model: it has {field} ="):
            load(name, folder)
        # As transformers 5 saves it.
        flat.unlink()
        nested.write_text(json.dumps({"image_processor": settings | {field: value}}))
        with pytest.raises(CheckpointError, match=f"{nested} belongs to another .* it has {field} ="):
            load(name, folder)
    folder = copy_of(tiny("clip"), tmp_path / "clip")
    (folder / "processor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(
        CheckpointError, match=r"processor_config\.json has an image_processor that is no"
    ):
        load("clip", folder)


def test_a_field_that_a_judge_s_processor_lacks_is_checked(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    for number, field in enumerate(("patch_size", "image_mean")):
        folder = copy_of(tiny("unified_reward_edit"), tmp_path / str(number))
        edit_json(folder / "preprocessor_config.json", lambda old, field=field: old.pop(field) and None)
        with pytest.raises(CheckpointError, match=f"preprocessor_config.json .* it has {field} ="):
            load("unified_reward_edit", folder)


def test_the_kernel_of_a_config_is_not_asked_for(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    kernels = {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}
    for name in ("clip", "aesthetic", "hpsv3", "unified_reward_edit"):
        folder = copy_of(tiny(name), tmp_path / name)
        edit_json(
            folder / "config.json",
            lambda config: {
                key: value | kernels if key.endswith("_config") else value
                for key, value in (config | kernels).items()
            },
        )
        load(name, folder)


def test_a_config_that_is_nested_without_end_is_named(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(tiny("clip"), tmp_path / "clip")
    for depth in (100, 400, 900, 10**5):
        nested = '{"a": ' * depth + "1" + "}" * depth
        (folder / "config.json").write_text(f'{{"model_type": "clip", "text_config": {nested}}}')
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load("clip", folder)


def test_zeros_and_wrong_types_are_named_with_file_and_field(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    cases: list[tuple[str, str, tuple[str, ...]]] = [
        ("clip", "config.json", ("text_config", "num_attention_heads")),
        ("clip", "config.json", ("vision_config", "patch_size")),
        ("hpsv2", "open_clip_config.json", ("model_cfg", "vision_cfg", "patch_size")),
        ("hpsv2", "open_clip_config.json", ("model_cfg", "text_cfg", "heads")),
        ("image_reward", "config.json", ("text_config", "num_attention_heads")),
        ("hpsv3", "config.json", ("vision_config", "num_heads")),
    ]
    for number, (name, file, keys) in enumerate(cases):
        for value in (0, "many", None, -1, [], True):
            folder = copy_of(tiny(name), tmp_path / str(number))
            shutil.copy(tiny(name) / file, folder / file)
            edit_json(folder / file, lambda config, keys=keys, value=value: set_at(config, keys, value))
            with pytest.raises(CheckpointError) as caught:
                load(name, folder)
            assert file in str(caught.value), (name, keys, value, caught.value)


def test_values_that_are_no_numbers_are_refused_when_they_are_loaded(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    for number, value in enumerate((math.nan, math.inf, -math.inf)):
        folder = copy_of(tiny("clip"), tmp_path / str(number))
        weights = load_file(folder / "model.safetensors")
        weights["visual_projection.weight"][3, 5] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        message = r"model\.safetensors holds NaN or infinity in visual_projection\.weight"
        with pytest.raises(CheckpointError, match=message):
            load("clip", folder)
        metric = metric_class("clip").from_pretrained(
            ModelConfig(path=folder), device="cpu", check_finite=False
        )
        with pytest.raises(CheckpointError, match=message):
            metric.compute("a red circle", PIL.Image.new("RGB", (32, 32)))


def test_large_values_whose_sum_overflows_are_numbers(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(tiny("clip"), tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.encoder.layers.0.mlp.fc1.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load("clip", folder).model is not None
    with pytest.raises(CheckpointError, match=r"is looked at as torch\.float16"):
        metric_class("clip").from_pretrained(
            ModelConfig(path=folder), device="cpu", torch_dtype=torch.float16
        )


def test_weights_in_float8_and_integers_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32)):
        folder = copy_of(tiny("clip"), tmp_path / str(number))
        weights = load_file(folder / "model.safetensors")
        name = "vision_model.encoder.layers.0.mlp.fc1.weight"
        weights[name] = weights[name].to(dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name} as {dtype}"):
            load("clip", folder)


# Pictures


def test_tensors_of_exotic_kinds_are_our_errors(metrics: Callable[[str], Any]) -> None:
    picture = torch.rand(3, 32, 32)
    nested = torch.nested.nested_tensor([picture, picture[:, :16]], layout=torch.jagged)
    exotic = {
        "float8": picture.to(torch.float8_e4m3fn),
        "sparse": picture.to_sparse(),
        "meta": picture.to("meta"),
        "nested": nested,
    }
    metric = metrics("clip")
    for kind, tensor in exotic.items():
        for given in (tensor, [tensor]):
            with pytest.raises((ImageError, TypeError, ValueError)) as caught:
                metric.compute("a red circle", given)
            assert "image" in str(caught.value), (kind, caught.value)


# Fuzz: the plain suite runs a sample, and `-m slow` the whole


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    """Cut, flip or insert somewhere."""
    at = dice.randrange(len(content))
    kind = dice.randrange(3)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :]
    return content[:at] + dice.randbytes(dice.randrange(1, 5)) + content[at:]


HOSTILE_VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 10**9, 10**30, -(10**9), 1.5, 1e300, True, False, None, "", "x", "10", "../x"),
    *([], [1], [[]], {}, {"a": 1}),
)


def change_value(content: Any, dice: random.Random) -> None:
    """Delete or replace one value of a parsed JSON file."""
    where = content
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = dice.choice(keys)
        inner = where[key]
        if not isinstance(inner, dict | list) or not inner or dice.random() < 0.1:
            break
        where = inner
    if dice.random() < 0.2:
        del where[key]
    else:
        where[key] = dice.choice(HOSTILE_VALUES)


def changed_fields(old: Any, new: Any) -> set[str]:
    """Return the names of the values that two parsed JSON files do not share."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = old.keys() | new.keys()
        inside = [changed_fields(old.get(name), new.get(name)) or set() for name in names]
        return {
            name if found == {""} else part
            for name, found in zip(names, inside, strict=True)
            for part in found
        }
    return set() if old == new and type(old) is type(new) else {""}


@pytest.fixture(params=[12, pytest.param(300, marks=pytest.mark.slow)])
def count(request: pytest.FixtureRequest) -> int:
    """How many hostile things are tried."""
    return int(request.param)


def test_fuzz_listings(
    count: int, hub: LocalHub, tmp_path: Path, local: Path, config: Callable[..., ModelConfig]
) -> None:
    dice = random.Random(0)
    pieces = ["..", ".", "", "M", "evil", "/", "\\", "C:", "~", "con", "a" * 300, "\0", "\n", "\u202e"]
    for _ in range(count):
        hub.list_no_more()
        name = dice.choice(["/", "\\", "//", ""]).join(dice.choices(pieces, k=dice.randrange(1, 6)))
        fields = {
            "size": dice.choice([4, 4, 4, -1, 0, 10**20, "4", None, 1.5, []]),
            "sha256": dice.choice([None, "", "0" * 64, "../" * 20, 3, []]),
        }
        chosen = dice.sample(sorted(fields), k=dice.randrange(3))
        hub.list_also(name, **{field: fields[field] for field in chosen})
        started = time.process_time()
        try:
            for path in config(dice.choice([None, "M/"]), dice.choice(SOURCES)).resolve():
                assert Path(path).resolve().is_relative_to(local)
        except DownloadError:
            pass
        assert time.process_time() - started < 10
        assert files_outside(tmp_path, local) == set(), name


def test_fuzz_notes(
    count: int, hub: LocalHub, tmp_path: Path, local: Path, config: Callable[..., ModelConfig]
) -> None:
    dice = random.Random(0)
    paths = config("M/", "modelscope").resolve()
    note = note_of(local)
    content = note.read_bytes()
    for _ in range(count):
        damaged = change_bytes(content, dice)
        if dice.random() < 0.5:
            parsed = json.loads(content)
            change_value(parsed, dice)
            damaged = json.dumps(parsed).encode()
        note.write_bytes(damaged)
        for verify in (False, True):
            try:
                result = config("M/", "modelscope", skip_download=True).resolve(verify=verify)
                assert result == paths
            except DownloadError as error:
                assert "damaged since the download" in str(error) or verify
            assert note.read_bytes() == damaged
    assert files_outside(tmp_path, local) == set()


UNSEEN_IN_SHAPES = {
    *("num_attention_heads", "num_key_value_heads", "num_heads", "heads", "head_width"),
    *("hidden_act", "layer_norm_eps", "rms_norm_eps", "attn_mask", "quick_gelu", "type"),
    *("rope_theta", "mrope_section", "rope_scaling", "spatial_merge_size", "temporal_patch_size"),
    *("eos_token_id", "bos_token_id", "image_token_id", "text_config", "vision_config"),
}
"""Fields of a config that change scores and no tensor's shape: only the config says them."""


@pytest.mark.filterwarnings("ignore")
def test_fuzz_configs(count: int, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    dice = random.Random(0)
    for number in range(count):
        name = ("clip", "hpsv2", "image_reward", "aesthetic", "hpsv3")[number % 5]
        folder = copy_of(tiny(name), tmp_path / name)
        file = "open_clip_config.json" if name == "hpsv2" else "config.json"
        content = (tiny(name) / file).read_bytes()
        parsed = json.loads(content)
        if dice.random() < 0.3:
            damaged = change_bytes(content, dice)
        else:
            change_value(parsed, dice)
            damaged = json.dumps(parsed).encode()
        (folder / file).write_bytes(damaged)
        check_same_or_refused(name, folder, tiny(name), file, UNSEEN_IN_SHAPES)


@pytest.mark.filterwarnings("ignore")
def test_fuzz_tokenizers(count: int, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    dice = random.Random(0)
    for number in range(count * 2 // 3):
        name = ("image_reward", "hpsv3", "image_reward", "hpsv3", "clip")[number % 5]
        folder = copy_of(tiny(name), tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny(name) / file, folder / file)
        file = "tokenizer.json" if dice.random() < 0.8 else "tokenizer_config.json"
        content = (tiny(name) / file).read_bytes()
        if dice.random() < 0.4:
            (folder / file).write_bytes(change_bytes(content, dice))
        else:
            parsed = json.loads(content)
            change_value(parsed, dice)
            (folder / file).write_text(json.dumps(parsed))
        check_same_or_refused(name, folder, tiny(name), file, set())


def check_same_or_refused(
    name: str, folder: Path, original: Path, file: str, meanings: set[str]
) -> None:
    """Check that a changed checkpoint is refused, or scores as before, or says that it is another."""
    expected = scores_of(name, original)
    started = time.process_time()
    damaged = (folder / file).read_bytes()
    try:
        found = scores(load(name, folder))
    except CheckpointError as error:
        assert str(folder) in str(error) or "next to the weights" in str(error), error
        found = expected
    assert time.process_time() - started < 10
    if not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(found, expected, strict=True)):
        fields = changed_fields(json.loads((original / file).read_bytes()), json.loads(damaged))
        assert fields and fields <= meanings, (name, file, fields, found, expected)


@cache
def scores_of(name: str, folder: Path) -> list[float]:
    """Return the scores of an unchanged checkpoint."""
    return scores(load(name, folder))


def scores(metric: Any) -> list[float]:
    """Return scores of one picture for several prompts, of any metric of single samples."""
    prompts = ["a red circle", "the GREEN zebra's café, isn't it?", "in 4k"]
    pictures = [draw_shape("circle", "red")] * len(prompts)
    return list(map(float, metric.compute(*metric.arguments(prompts, pictures))))

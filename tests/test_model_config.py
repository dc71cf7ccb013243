"""`ModelConfig`: the value, the environment, local paths, and downloads by the real clients."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hub import LocalHub
from modelscope_hub.config import set_default_config

from diffsynth_metrics.errors import CheckpointError, DownloadError
from diffsynth_metrics.weights.hub import causes_of
from diffsynth_metrics.weights.model_config import ModelConfig

REPOSITORY = "DiffSynth-Studio/ImageMetrics"
WEIGHTS = "PickScore/model.safetensors"
FILES = {
    WEIGHTS: bytes(range(256)) * 4000,
    "PickScore/config.json": b'{"model_type": "clip"}',
    "PickScore/processor/tokenizer.json": b"{}",
    "PickScore/processor/preprocessor_config.json": b'{"size": 224}',
    "HPSv3/model-00001-of-00003.safetensors": b"one",
    "HPSv3/model-00002-of-00003.safetensors": b"two",
    "HPSv3/model-00003-of-00003.safetensors": b"three",
    "README.md": b"# metrics",
    ".gitattributes": b"*.safetensors filter=lfs",
}
SHARDS = [name for name in FILES if name.startswith("HPSv3/")]
PROCESSOR = sorted(name for name in FILES if "/processor/" in name)


def write(folder: Path, names: Sequence[str] = tuple(FILES)) -> Path:
    """Write some of the repository's files, as a repository or as a copy made by hand."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(FILES[name])
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the settings of whoever runs the tests out of the environment."""
    for name in list(os.environ):
        if name.startswith(("DIFFSYNTH_", "MODELSCOPE_", "HF_")):
            monkeypatch.delenv(name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Serve the files, and lead the clients there."""
    with LocalHub() as hub:
        hub.add_model(REPOSITORY, write(tmp_path / "repository"))
        for name, value in hub.environment().items():
            monkeypatch.setenv(name, value)
        # ModelScope's client keeps the folder of its locks for the life of the process.
        set_default_config(None)
        yield hub
        set_default_config(None)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Return the local folder of the repository, which does not exist yet."""
    return tmp_path / "models" / REPOSITORY


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ModelConfig]:
    """Make configs of the repository that download below the test's own folder."""

    def make(pattern: str | list[str] | None, **options: Any) -> ModelConfig:
        options = {"model_id": REPOSITORY, "local_model_path": tmp_path / "models", **options}
        return ModelConfig(origin_file_pattern=pattern, **options)

    return make


def in_new_process(config: ModelConfig, *, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start resolving in a new Python, whose clients read their settings afresh."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    code = (
        "import json, sys, logging, traceback; logging.basicConfig()\n"
        "from diffsynth_metrics.weights.model_config import ModelConfig\n"
        "try: answer = ModelConfig(**json.loads(sys.argv[1])).resolve()\n"
        "except Exception as e:\n"
        "    answer = {'error': type(e).__name__, 'message': str(e)}\n"
        "    answer['tracebacks'] = traceback.format_exc().count('Traceback')\n"
        "print(json.dumps(answer))"
    )
    command = [*prefix, sys.executable, "-W", "error", "-c", code, json.dumps(fields)]
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def answer(process: subprocess.Popen[str]) -> tuple[Any, str]:
    """Return the paths (or the error), and the log, of `in_new_process`."""
    output, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    return json.loads(output.splitlines()[-1]), log


# The value


def test_is_immutable_comparable_and_hashable() -> None:
    config = ModelConfig(model_id=REPOSITORY, origin_file_pattern=["a", "b"])
    assert config.origin_file_pattern == ("a", "b")
    assert config == ModelConfig(model_id=REPOSITORY, origin_file_pattern=("a", "b"))
    assert len({config, ModelConfig(path=["a"]), ModelConfig(path=("a",))}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.path = "elsewhere"  # type: ignore[misc]


def test_a_path_object_equals_its_text() -> None:
    assert ModelConfig(path=Path("a/b")) == ModelConfig(path="a/b")


def test_repr_shows_what_was_given() -> None:
    assert repr(ModelConfig(path="a")) == "ModelConfig(path='a')"
    config = ModelConfig(model_id="a/b", origin_file_pattern="c/", skip_download=False)
    expected = "ModelConfig(model_id='a/b', origin_file_pattern='c/', skip_download=False)"
    assert repr(config) == expected


def test_contradictions_are_value_errors() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, r"either path=\.\.\. or model_id=.*got neither"),
        ({"path": ""}, "got neither"),
        ({"path": "a", "model_id": "b/c"}, "got both"),
        ({"path": []}, "path is an empty list"),
        ({"path": "a", "origin_file_pattern": "b"}, "origin_file_pattern belongs to model_id"),
        (
            {"model_id": "a/b", "download_source": "github"},
            "download_source must be huggingface or modelscope, not 'github'",
        ),
        (
            {"model_id": "a/b", "origin_file_pattern": "../c"},
            r"origin_file_pattern must stay inside its folder, and '\.\./c' does not",
        ),
        ({"model_id": "a/b", "origin_file_pattern": ["c", "/d"]}, "and '/d' does not"),
        ({"model_id": "../b"}, r"model_id must stay inside .* '\.\./b'"),
        ({"model_id": "a/b", "revision": "x/../../y"}, "revision must stay inside"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ModelConfig(**arguments)


def test_wrong_types_are_type_errors() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"path": 3}, "path must be str or PathLike, not int"),
        ({"path": ["a", None]}, r"path\[1\] must be str or PathLike, not NoneType"),
        ({"path": [["a"]]}, r"path\[0\] must be str or PathLike, not list"),
        ({"path": b"a"}, "path must be str or PathLike, not bytes"),
        ({"model_id": Path("a/b")}, "model_id must be str, not PosixPath"),
        ({"model_id": "a/b", "origin_file_pattern": 3}, "origin_file_pattern must be str, not int"),
        ({"model_id": "a/b", "skip_download": "true"}, "skip_download must be bool, not str"),
        ({"model_id": "a/b", "revision": 1}, "revision must be str, not int"),
        ({"model_id": "a/b", "local_model_path": 1}, "local_model_path must be str or PathLike"),
    ]
    for arguments, message in cases:
        with pytest.raises(TypeError, match=message):
            ModelConfig(**arguments)


NEUTRAL: dict[str, Any] = {
    **{
        f"{when}_{what}": None
        for when in ("offload", "onload", "preparing", "computation")
        for what in ("device", "dtype")
    },
    "clear_parameters": False,
    "state_dict": None,
    "quantize": None,
}
"""The fields of diffsynth's ModelConfig that mean nothing here, at their defaults."""


def test_the_other_fields_of_diffsynth_are_accepted_at_their_defaults() -> None:
    config, plain = ModelConfig(path="a", **NEUTRAL), ModelConfig(path="a")
    assert config == plain and hash(config) == hash(plain)
    assert repr(config) == "ModelConfig(path='a')"
    assert dataclasses.replace(config, path="b") == ModelConfig(path="b")
    assert {name: getattr(plain, name) for name in NEUTRAL} == NEUTRAL
    # In upstream's order: the seventh value is offload_device.
    assert ModelConfig("a", None, None, None, None, None, None) == plain


def test_the_other_fields_of_diffsynth_are_refused_with_another_value() -> None:
    for name in NEUTRAL:
        message = rf"^Use the arguments device, .*ModelConfig does not support {name}, and got True"
        with pytest.raises(ValueError, match=message):
            ModelConfig(path="a", **{name: True})


def test_download_if_necessary_returns_the_paths(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"{}")
    config = ModelConfig(path=tmp_path)
    assert config.download_if_necessary() == config.resolve() == [str(tmp_path / "a.json")]
    assert config.path == str(tmp_path)


def test_importing_the_module_imports_no_client() -> None:
    code = (
        "import sys, diffsynth_metrics.weights.model_config\n"
        "heavy = {'torch', 'transformers', 'modelscope', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": root})


def test_embedded_models_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shapes", ["README.md"])
    (tmp_path / "shapes" / "model.safetensors").write_bytes(b"")
    (tmp_path / "unfinished").mkdir()
    monkeypatch.setattr("diffsynth_metrics.weights.model_config._EMBEDDED", tmp_path)
    assert ModelConfig.embedded("shapes").path == str(tmp_path / "shapes")
    with pytest.raises(ValueError, match=r"called 'colours'; there are \['shapes'\]"):
        ModelConfig.embedded("colours")


# Paths


def test_a_file_a_list_and_a_folder(tmp_path: Path) -> None:
    write(tmp_path)
    one = str(tmp_path / WEIGHTS)
    assert ModelConfig(path=one).resolve() == [one]
    several = [tmp_path / name for name in (WEIGHTS, "README.md")]
    assert ModelConfig(path=several).resolve() == sorted(map(str, several))
    # A folder means its own files, without those of its subfolders.
    expected = [str(tmp_path / "PickScore" / name) for name in ("config.json", "model.safetensors")]
    assert ModelConfig(path=tmp_path / "PickScore").resolve() == expected


def test_a_relative_path_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = [str(tmp_path / "README.md")]
    assert ModelConfig(path="README.md").resolve() == expected
    assert ModelConfig(path="~/README.md").resolve() == expected


def test_missing_paths_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.bin does not exist"):
        ModelConfig(path=[tmp_path / WEIGHTS, tmp_path / "absent.bin"]).resolve()
    with pytest.raises(FileNotFoundError, match="PickScore is a folder, and a list takes files"):
        ModelConfig(path=[tmp_path / "PickScore"]).resolve()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="empty has no files"):
        ModelConfig(path=tmp_path / "empty").resolve()


def test_a_path_with_a_missing_shard_names_it(tmp_path: Path) -> None:
    write(tmp_path, [SHARDS[0], SHARDS[2]])
    with pytest.raises(CheckpointError, match=r"missing: .*model-00002-of-00003\.safetensors$"):
        ModelConfig(path=tmp_path / "HPSv3").resolve()


# The environment


def test_the_base_path_of_the_environment_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Callable[..., ModelConfig]
) -> None:
    write(tmp_path / "shared" / REPOSITORY)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "shared"))
    assert config(WEIGHTS).resolve() == [str(tmp_path / "shared" / REPOSITORY / WEIGHTS)]


def test_models_is_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [str(write(tmp_path / "models" / REPOSITORY) / WEIGHTS)]
    monkeypatch.chdir(tmp_path)
    assert ModelConfig(model_id=REPOSITORY, origin_file_pattern=WEIGHTS).resolve() == expected


@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_the_environment_can_switch_downloads_off(
    value: str,
    hub: LocalHub,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Callable[..., ModelConfig],
) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", value)
    with pytest.raises(DownloadError, match="no local file matches 'PickScore/'") as caught:
        config("PickScore/").resolve()
    assert str(caught.value).startswith("Allow downloads")
    for word in (REPOSITORY, str(local), "modelscope", "DIFFSYNTH_SKIP_DOWNLOAD"):
        assert word in str(caught.value)
    assert "DIFFSYNTH_MODEL_BASE_PATH" in str(caught.value)
    write(local, ["PickScore/config.json"])
    assert config("PickScore/").resolve() == [str(local / "PickScore/config.json")]
    assert hub.requests == []


def test_an_argument_goes_before_the_environment(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, config: Callable[..., ModelConfig]
) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    assert config(WEIGHTS, skip_download=False, download_source="ModelScope").resolve()
    assert hub.requests[0].startswith("GET /api/v1/models/")


@pytest.mark.parametrize(
    ("name", "value"),
    [("DIFFSYNTH_SKIP_DOWNLOAD", "maybe"), ("DIFFSYNTH_DOWNLOAD_SOURCE", "github")],
)
def test_unknown_values_in_the_environment_name_the_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, config: Callable[..., ModelConfig]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be .*, not '{value}'"):
        config(WEIGHTS).resolve()


# Downloads


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (WEIGHTS, [WEIGHTS]),
        ("./" + WEIGHTS, [WEIGHTS]),
        ("PickScore/processor/", PROCESSOR),
        ("PickScore/", [*PROCESSOR, WEIGHTS, "PickScore/config.json"]),
        ("HPSv3/model*.safetensors", SHARDS),
        ("PickScore/*", [WEIGHTS, "PickScore/config.json"]),
        (["README.md", "HPSv3/*"], ["README.md", *SHARDS]),
        (None, [name for name in FILES if name != ".gitattributes"]),
        ("", [name for name in FILES if name != ".gitattributes"]),
        ("./", [name for name in FILES if name != ".gitattributes"]),
    ],
)
def test_a_pattern_brings_its_files_once(
    pattern: str | list[str] | None,
    expected: list[str],
    hub: LocalHub,
    local: Path,
    config: Callable[..., ModelConfig],
) -> None:
    paths = config(pattern).resolve()
    assert paths == sorted(str(local / name) for name in expected)
    assert [Path(path).read_bytes() for path in paths] == [FILES[n] for n in sorted(expected)]
    fetched = {name for name in FILES if hub.file_requests(name)}
    assert fetched - {".gitattributes"} == set(expected)
    hub.requests.clear()
    assert config(pattern).resolve() == paths
    assert hub.requests == []


def test_names_with_commas_and_brackets(
    tmp_path: Path, hub: LocalHub, config: Callable[..., ModelConfig]
) -> None:
    for name in ("a, b.json", "c[1].json"):
        (tmp_path / "repository" / name).write_bytes(b"{}")
    assert [Path(p).name for p in config("a, b.json").resolve()] == ["a, b.json"]
    assert [Path(p).name for p in config("c[[]1].json").resolve()] == ["c[1].json"]


def test_only_what_is_missing_is_downloaded(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    write(local, [WEIGHTS, PROCESSOR[0]])
    assert len(config([WEIGHTS, "PickScore/processor/"]).resolve()) == 3
    assert hub.file_requests(WEIGHTS) == []
    assert hub.file_requests(PROCESSOR[0]) == []
    assert len(hub.file_requests(PROCESSOR[1])) == 1


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"{")])
def test_a_damaged_folder_is_repaired(
    damage: Callable[[Path], object],
    hub: LocalHub,
    local: Path,
    config: Callable[..., ModelConfig],
) -> None:
    paths = config("PickScore/").resolve()
    damage(local / "PickScore/config.json")
    hub.requests.clear()
    assert config("PickScore/").resolve() == paths
    assert (local / "PickScore/config.json").read_bytes() == FILES["PickScore/config.json"]
    assert [name for name in FILES if hub.file_requests(name)] == ["PickScore/config.json"]


@pytest.mark.parametrize("text", ['{"model_type": "clip", "hidden_act": "quick_gelu"}', "{}"])
def test_an_edited_config_is_used_without_the_network(
    text: str, hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    paths = config("PickScore/").resolve()
    (local / "PickScore/config.json").write_text(text)
    hub.requests.clear()
    assert config("PickScore/").resolve() == paths
    assert (local / "PickScore/config.json").read_text() == text
    assert hub.requests == []


def test_a_cut_download_resumes(hub: LocalHub, local: Path, config: Callable[..., ModelConfig]) -> None:
    hub.cut_once(WEIGHTS, after_bytes=600_000)
    assert config(WEIGHTS).resolve() == [str(local / WEIGHTS)]
    assert (local / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    first, second = hub.file_requests(WEIGHTS)
    assert not first.endswith("bytes=600000-")
    assert second.endswith("bytes=600000-")


def test_corrupted_bytes_are_refused_every_time(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client waits between its three attempts.
    backoff = "modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF"
    monkeypatch.setattr(backoff, 0.01, raising=False)
    hub.corrupt(WEIGHTS)
    for _ in range(2):
        with pytest.raises(DownloadError, match=r"(?s)could not download .*model\.safetensors"):
            config(WEIGHTS).resolve()
        assert not (local / WEIGHTS).exists()
    with pytest.raises(DownloadError, match="could not download 'PickScore/'") as caught:
        config("PickScore/").resolve()
    assert "Hash mismatch" in str(caught.value)
    with pytest.raises(DownloadError, match="the download of 'PickScore/' was interrupted"):
        config("PickScore/", skip_download=True).resolve()


def test_an_unknown_repository(hub: LocalHub, config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(DownloadError, match=r"(?s)could not download 'x/y\.bin'.*404") as caught:
        config("x/y.bin", model_id="nobody/nothing").resolve()
    for word in ("repository nobody/nothing on modelscope", "nobody/nothing", "Check model_id"):
        assert word in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_hub_that_refuses_a_file(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
    statuses = {429: "PickScore/config.json", 500: "README.md"}
    for status, name in statuses.items():
        hub.refuse(name, status)
    processes = [in_new_process(config(name)) for name in statuses.values()]
    for (status, name), process in zip(statuses.items(), processes, strict=True):
        result, _ = answer(process)
        assert (result["error"], result["tracebacks"]) == ("DownloadError", 1)
        assert result["message"].startswith("Try again later")
        assert f"could not download '{name}'" in result["message"] and str(status) in result["message"]


def test_errors_that_cause_each_other_are_looked_at_once() -> None:
    first, second, third = ValueError("first"), ValueError("second"), ValueError("third")
    first.__cause__, second.__context__ = second, first
    first.failed_files = {"a": third, "b": second}  # type: ignore[attr-defined]
    assert list(causes_of(first)) == [first, second, third]


@pytest.mark.parametrize("pattern", ["Absent/model.safetensors", "PickScore/*.bin", "PickScore"])
def test_a_pattern_without_match(
    pattern: str, hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    with pytest.raises(DownloadError, match="no file of the repository matches") as caught:
        config(["README.md", pattern]).resolve()
    for word in (repr(pattern), REPOSITORY, str(local), "a folder ends with a slash"):
        assert word in str(caught.value)


def test_a_missing_shard_is_named(
    tmp_path: Path, hub: LocalHub, config: Callable[..., ModelConfig]
) -> None:
    (tmp_path / "repository" / SHARDS[1]).unlink()
    with pytest.raises(DownloadError, match=f"shards are missing: {SHARDS[1]}\n"):
        config("HPSv3/*.safetensors").resolve()


def test_a_missing_local_shard_is_downloaded(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    write(local, [SHARDS[0], SHARDS[2]])
    with pytest.raises(DownloadError, match=f"shards are missing: {SHARDS[1]}\n"):
        config("HPSv3/", skip_download=True).resolve()
    assert config("HPSv3/").resolve() == [str(local / name) for name in SHARDS]


def test_revisions_do_not_mix(tmp_path: Path, hub: LocalHub, config: Callable[..., ModelConfig]) -> None:
    old = tmp_path / "old" / "README.md"
    old.parent.mkdir()
    old.write_bytes(b"# old")
    hub.add_model(REPOSITORY, old.parent, revision="v1")
    (new_path,) = config("README.md").resolve()
    (old_path,) = config("README.md", revision="v1").resolve()
    assert old_path == str(tmp_path / "models" / f"{REPOSITORY}@v1" / "README.md")
    assert Path(old_path).read_bytes() == b"# old"
    assert Path(new_path).read_bytes() == FILES["README.md"]


def test_two_processes_download_a_folder_once(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    hub.delay = 1.0
    processes = [in_new_process(config("PickScore/")) for _ in range(2)]
    expected = sorted(str(local / name) for name in FILES if name.startswith("PickScore/"))
    assert [answer(process)[0] for process in processes] == [expected, expected]
    assert all(Path(p).read_bytes() == FILES[os.path.relpath(p, local)] for p in expected)
    # The one that waited asks nothing: the listings are ours, which is checked, and the client's.
    listings = [request for request in hub.requests if "/repo/files" in request]
    assert (len(listings), len(hub.file_requests(WEIGHTS))) == (2, 1)


# Without a hub


def test_files_that_are_there_need_no_request(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    write(local)
    exact = config(["README.md", WEIGHTS])
    by_hand = config("PickScore/processor/")
    shards = config("HPSv3/model*.safetensors")
    assert len(exact.resolve()) == 2
    assert len(by_hand.resolve(sufficient=["absent.json", "preprocessor_config.json"])) == 2
    assert len(shards.resolve()) == 3
    assert hub.requests == []
    # Without a file that suffices, only the hub knows what belongs to a folder.
    assert len(by_hand.resolve(sufficient=["absent.json"])) == 2
    assert len(hub.requests) == 1


def test_complete_shards_do_not_stand_for_a_wider_pattern(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    write(local, SHARDS)
    config("HPSv3/").resolve()
    assert hub.requests


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_a_dead_hub(source: str, hub: LocalHub, local: Path, config: Callable[..., ModelConfig]) -> None:
    write(local, [WEIGHTS, *PROCESSOR, *SHARDS[:2]])
    hub.stop()
    patterns = (WEIGHTS, "PickScore/processor/", "README.md", "HPSv3/")
    processes = [in_new_process(config(p, download_source=source)) for p in patterns]
    exact, folder, absent, shards = [answer(process) for process in processes]

    assert exact[0] == [str(local / WEIGHTS)]
    assert "diffsynth_metrics" not in exact[1]

    assert folder[0] == [str(local / name) for name in PROCESSOR]
    assert f"WARNING:diffsynth_metrics.weights.hub:{source} could not be reached" in folder[1]
    assert f"using the files of {REPOSITORY} that match 'PickScore/processor/'" in folder[1]

    assert absent[0]["error"] == "DownloadError"
    assert absent[0]["message"].startswith("Check the network") and absent[0]["tracebacks"] == 1
    words = ["'README.md'", REPOSITORY, source, str(local), "MODELSCOPE_ENDPOINT"]
    assert "could not download 'README.md': ConnectionRefusedError: [Errno 111]" in absent[0]["message"]
    for word in [*words, "DIFFSYNTH_SKIP_DOWNLOAD", "DIFFSYNTH_DOWNLOAD_SOURCE"]:
        assert word in absent[0]["message"]

    # What is tried is said before the client, which takes its time, is asked.
    first_line = f"downloading 'README.md' of {REPOSITORY} from {source} to {local}"
    assert absent[1].startswith(f"WARNING:diffsynth_metrics.weights.hub:{first_line}")

    assert f"missing here: {SHARDS[2]}\n" in shards[0]["message"]


def test_an_interrupted_download_is_not_used_until_it_is_finished(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
    hub.cut_once(WEIGHTS, after_bytes=600_000)
    result, _ = answer(in_new_process(config("PickScore/")))
    assert "could not download 'PickScore/'" in result["message"]
    assert (local / f"{WEIGHTS}.incomplete").stat().st_size == 600_000
    assert (local / "PickScore/config.json").is_file()

    with pytest.raises(DownloadError, match="the download of 'PickScore/' was interrupted") as error:
        config("PickScore/", skip_download=True).resolve()
    (note,) = (local / ".diffsynth_metrics").glob("*.begun")
    assert f"If you have completed the files yourself, delete {note}" in str(error.value)
    endpoint = hub.environment()["MODELSCOPE_ENDPOINT"]
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    result, _ = answer(in_new_process(config("PickScore/")))
    assert "could not download 'PickScore/'" in result["message"]

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    paths = config("PickScore/").resolve(sufficient=["config.json"])
    assert [Path(p).read_bytes() for p in paths] == [
        FILES[name] for name in sorted(FILES) if name.startswith("PickScore/")
    ]
    assert hub.file_requests(WEIGHTS)[-1].endswith("bytes=600000-")


def test_a_failed_request_leaves_a_copy_made_by_hand_as_it_was(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig], caplog: pytest.LogCaptureFixture
) -> None:
    write(local, PROCESSOR)
    hub.remove_model(REPOSITORY)
    with pytest.raises(DownloadError, match="404"):
        config("PickScore/processor/").resolve()
    assert [path.name for path in (local / ".diffsynth_metrics").iterdir()] in ([], ["download.lock"])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(config("PickScore/processor/", skip_download=True).resolve()) == 2
    assert caplog.records == []


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"{")])
def test_files_that_were_damaged_after_a_download_are_not_used_without_the_hub(
    damage: Callable[[Path], object],
    hub: LocalHub,
    local: Path,
    config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config("PickScore/").resolve()
    damage(local / "PickScore/config.json")
    hub.remove_model(REPOSITORY)
    for _ in range(2):  # a failed attempt does not make them better
        with pytest.raises(DownloadError, match=r"missing here: PickScore/config\.json"):
            config("PickScore/").resolve()
    message = r"missing or damaged since the download: PickScore/config\.json"
    with pytest.raises(DownloadError, match=message):
        config("PickScore/", skip_download=True).resolve()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    result, _ = answer(in_new_process(config("PickScore/")))
    assert "missing here: PickScore/config.json" in result["message"]


def test_a_damaged_note_counts_as_none(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    paths = config("PickScore/").resolve()
    (note,) = (local / ".diffsynth_metrics").glob("*.json")
    for content in (b"", b"[]", b'{"files": 3}', b"null"):
        note.write_bytes(content)
        hub.requests.clear()
        assert config("PickScore/").resolve() == paths
        assert hub.requests  # only the hub knew that it was all of it


def test_leftovers_of_the_clients_are_never_returned(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    write(local, ["PickScore/config.json"])
    leftovers = [
        "PickScore/model.safetensors.incomplete",
        "PickScore/model.safetensors.parallel_tmp",
        "PickScore/model.safetensors_0_167772159",
        "PickScore/model.safetensors_167772160_335544319",
        "PickScore/.model.safetensors.part",
        "PickScore/._____temp/model.safetensors",
        ".cache/huggingface/download/PickScore/model.safetensors.incomplete",
        ".lock/PickScore",
        ".msc",
        ".mdl",
        ".mv",
    ]
    for name in leftovers:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(b"part")
    expected = [str(local / "PickScore/config.json")]
    for pattern in ("PickScore/", "PickScore/*", None):
        assert config(pattern, skip_download=True).resolve() == expected
    assert ModelConfig(path=local / "PickScore").resolve() == expected


def without_root_rights() -> list[str]:
    """Return the command that takes root's right to write everywhere from a process."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root writes into read-only folders, and setpriv is not here to prevent it")
    rights = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]


def test_a_read_only_folder(hub: LocalHub, local: Path, config: Callable[..., ModelConfig]) -> None:
    prefix = without_root_rights()
    write(local, ["README.md"])
    local.chmod(0o555)
    try:
        there, absent = [
            answer(in_new_process(config(pattern), prefix=prefix))[0]
            for pattern in ("README.md", WEIGHTS)
        ]
    finally:
        local.chmod(0o755)
    assert there == [str(local / "README.md")]
    assert absent["error"] == "DownloadError"
    for word in ("PermissionError", str(local), "DIFFSYNTH_MODEL_BASE_PATH", REPOSITORY):
        assert word in absent["message"]
    assert hub.requests == []


# Hugging Face


def test_huggingface_serves_the_same_patterns(
    hub: LocalHub, local: Path, config: Callable[..., ModelConfig]
) -> None:
    hub.cut_once(WEIGHTS, after_bytes=600_000)
    everything = config(["HPSv3/*", "PickScore/", "README.md"], download_source="HuggingFace")
    missing = config("PickScore/*.bin", download_source="huggingface")
    nobody = config(None, download_source="huggingface", model_id="nobody/nothing")
    first, second, third = [in_new_process(c) for c in (everything, missing, nobody)]
    names = [name for name in FILES if name != ".gitattributes"]
    assert answer(first)[0] == sorted(str(local / name) for name in names)
    assert all((local / name).read_bytes() == FILES[name] for name in names)
    assert len(hub.file_requests(WEIGHTS)) == 2
    assert all("/api/v1/" not in request for request in hub.requests)
    assert "no file of the repository matches 'PickScore/*.bin'" in answer(second)[0]["message"]
    assert "repository nobody/nothing on huggingface" in answer(third)[0]["message"]
    hub.stop()
    result, log = answer(in_new_process(everything))
    assert len(result) == len(names)
    assert "could not be reached" not in log

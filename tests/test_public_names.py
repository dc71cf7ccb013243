"""The public surface: sorted, documented, and free until it is used."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest

import diffsynth_metrics

NAMES = diffsynth_metrics.__all__
MODULES = [
    module.name
    for module in pkgutil.walk_packages(diffsynth_metrics.__path__, "diffsynth_metrics.")
    if not module.name.startswith("diffsynth_metrics.embedded.")
]
HEAVY = ("PIL", "accelerate", "modelscope", "numpy", "open_clip", "scipy", "torch", "transformers")


def run(script: str) -> str:
    """Run a script in a fresh interpreter and return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_the_public_names_are_sorted_and_unique() -> None:
    assert sorted(set(NAMES)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_can_be_imported(name: str) -> None:
    assert getattr(diffsynth_metrics, name) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_docstring(name: str) -> None:
    docstring = inspect.getdoc(getattr(diffsynth_metrics, name))
    assert docstring and len(docstring) > 20


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_listed_by_dir(name: str) -> None:
    assert name in dir(diffsynth_metrics)


@pytest.mark.parametrize("name", NAMES)
def test_the_public_methods_of_a_class_have_docstrings(name: str) -> None:
    thing = getattr(diffsynth_metrics, name)
    methods = inspect.getmembers(thing, inspect.isroutine) if inspect.isclass(thing) else []
    for method, function in methods:
        home = getattr(function, "__module__", None) or ""
        if not method.startswith("_") and home.startswith("diffsynth_metrics"):
            assert inspect.getdoc(function), method


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'diffsynth_metrics' has no attribute 'Nothing'"):
        _ = diffsynth_metrics.Nothing


@pytest.mark.parametrize("module", MODULES)
def test_a_module_states_its_one_job(module: str) -> None:
    assert inspect.getdoc(importlib.import_module(module))


@pytest.mark.parametrize("module", MODULES)
def test_the_names_of_a_module_exist_and_are_sorted(module: str) -> None:
    imported = importlib.import_module(module)
    names = getattr(imported, "__all__", [])
    assert sorted(names) == names
    assert all(hasattr(imported, name) for name in names)


def test_importing_the_package_imports_nothing_heavy() -> None:
    output = run("import diffsynth_metrics, sys, json; print(json.dumps(sorted(sys.modules)))")
    loaded = {name.partition(".")[0] for name in json.loads(output)}
    assert loaded.isdisjoint(HEAVY)


def test_importing_the_package_changes_neither_environment_nor_logging() -> None:
    output = run(
        "import logging, os, sys, warnings\n"
        "def state():\n"
        "    root = logging.getLogger()\n"
        "    return dict(os.environ), root.level, list(root.handlers), list(warnings.filters)\n"
        "before = state()\n"
        "import diffsynth_metrics\n"
        "print(state() == before)"
    )
    assert output == "True\n"


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_garbage_collector_rests_during_an_import_and_is_then_as_before(
    monkeypatch: pytest.MonkeyPatch, collects: bool, fails: bool
) -> None:
    during: list[bool] = []

    def import_module(name: str) -> ModuleType:
        during.append(gc.isenabled())
        if fails:
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr("diffsynth_metrics.import_module", import_module)
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(ImportError) if fails else nullcontext():
            diffsynth_metrics.__getattr__("ImageError")
        after = gc.isenabled()
    finally:
        (gc.enable if before else gc.disable)()
    assert during == [False] and after == collects


def test_model_config_is_had_without_torch() -> None:
    output = run(
        "import sys\nfrom diffsynth_metrics import ModelConfig, CheckpointError\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert output == "False False\n"


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert diffsynth_metrics.__version__ == version("diffsynth-metrics")

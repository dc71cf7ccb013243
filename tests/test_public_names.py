"""The public surface: sorted, documented, and free until it is used."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffsynth_metrics.metrics

ROOT = Path(__file__).parents[1]
NAMES = diffsynth_metrics.__all__
MODULES = [
    module.name
    for module in pkgutil.walk_packages(diffsynth_metrics.__path__, "diffsynth_metrics.")
    if not module.name.startswith("diffsynth_metrics.embedded.")
    # The one module whose package the tests do without; tests/evaluation/test_ray.py is for where it is.
    and (module.name != "diffsynth_metrics.evaluation.ray" or importlib.util.find_spec("ray"))
]
HEAVY = ("PIL", "accelerate", "modelscope", "numpy", "open_clip", "scipy", "torch", "transformers")


def as_ruff_sorts(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def run(script: str) -> str:
    """Run a script in a fresh interpreter and return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_the_public_names_are_sorted_and_unique() -> None:
    assert sorted(set(NAMES)) == NAMES


def test_a_public_name_can_be_imported_and_says_what_it_is() -> None:
    for name in NAMES:
        docstring = inspect.getdoc(getattr(diffsynth_metrics, name))
        assert docstring and len(docstring) > 20, name


def test_the_public_methods_of_a_class_have_docstrings() -> None:
    classes = [getattr(diffsynth_metrics, name) for name in NAMES]
    for cls in filter(inspect.isclass, classes):
        for method, function in inspect.getmembers(cls, inspect.isroutine):
            home = getattr(function, "__module__", None) or ""
            if not method.startswith("_") and home.startswith("diffsynth_metrics"):
                assert inspect.getdoc(function), f"{cls.__name__}.{method}"


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(diffsynth_metrics) == dir(diffsynth_metrics.metrics) == NAMES


def test_type_checkers_are_told_the_same_names_and_modules() -> None:
    tree = ast.parse(Path(diffsynth_metrics.__file__).read_text(encoding="utf-8"))
    imports = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(imports) == NAMES
    for name, module in imports.items():
        value = getattr(diffsynth_metrics, name)
        assert value is getattr(importlib.import_module(str(module)), name), name


def test_help_begins_with_an_example_of_three_lines() -> None:
    _, example, _ = str(inspect.getdoc(diffsynth_metrics)).split("\n\n")
    lines = inspect.cleandoc(example).splitlines()
    assert len(lines) == 3 and lines[0] == "from diffsynth_metrics import PickScoreMetric"
    ast.parse("\n".join(lines))


def test_an_unknown_name_is_an_attribute_error() -> None:
    message = r"^module 'diffsynth_metrics' has no attribute 'Nothing'$"
    with pytest.raises(AttributeError, match=message):
        _ = diffsynth_metrics.Nothing  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from diffsynth_metrics import Nothing")


def test_a_misspelt_name_is_told_the_right_one() -> None:
    for wrong, right in {
        "PickscoreMetric": "PickScoreMetric",
        "fidmetric": "FIDMetric",
        "ImageReward": "ImageRewardMetric",
        "HPSV2Metric": "HPSv2Metric",
        "ModelConfigs": "ModelConfig",
    }.items():
        for package in ("diffsynth_metrics", "diffsynth_metrics.metrics"):
            module = importlib.import_module(package)
            with pytest.raises(AttributeError, match=rf"{wrong}' \(did you mean '{right}'\?\)"):
                getattr(module, wrong)
            with pytest.raises(ImportError, match=rf"{wrong}' .*\(did you mean '{right}'\?\)"):
                exec(f"from {package} import {wrong}")
            assert not hasattr(module, wrong)


def test_a_module_is_imported_although_a_public_name_is_like_its_own() -> None:
    run("from diffsynth_metrics import errors, metrics\nfrom diffsynth_metrics.metrics import clip, fid")


def test_a_module_states_its_one_job_and_its_names_exist_and_are_sorted() -> None:
    for module in MODULES:
        imported = importlib.import_module(module)
        assert inspect.getdoc(imported), module
        names = getattr(imported, "__all__", [])
        assert sorted(names, key=as_ruff_sorts) == names, module
        assert all(hasattr(imported, name) for name in names), module


@pytest.mark.parametrize("folder", ["diffsynth_metrics/rewards", "diffsynth_metrics/fid", "examples"])
def test_the_names_that_begin_with_an_underscore_stay_in_their_file(folder: str) -> None:
    """What stands on the metrics' contract needs no more than the contract."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [use for file in files for use in foreign_underscores(file)] == []


def foreign_underscores(file: Path) -> list[str]:
    """Return the uses, in a file, of names with one underscore that the file does not define."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    own = {node.name for node in nodes if isinstance(node, functions)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    used = [(node.lineno, node.attr) for node in attributes]
    used += [
        (node.lineno, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for line, name in used
        if name.startswith("_") and not name.startswith("__") and name not in own
    ]


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


def test_importing_a_metric_leaves_the_garbage_collector_alone() -> None:
    output = run(
        "import gc\nseen = []\ngc.callbacks.append(lambda phase, info: seen.append(phase))\n"
        "from diffsynth_metrics import CLIPMetric\nprint(gc.isenabled(), bool(seen))"
    )
    assert output == "True True\n"


def test_model_config_is_had_without_torch() -> None:
    output = run(
        "import sys\nfrom diffsynth_metrics import ModelConfig, CheckpointError\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert output == "False False\n"


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert diffsynth_metrics.__version__ == version("diffsynth-metrics")

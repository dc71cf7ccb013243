"""The notebooks run from first to last cell, show what they say, and are stored without outputs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
LARGEST_BYTES = 20_000

Run = Callable[[str], list[Any]]

# Of Jupyter's own packages.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a notebook beside the scripts that it imports, and return all outputs of its cells."""

    def execute(name: str) -> list[Any]:
        for file in EXAMPLES.glob("*.py"):
            shutil.copy(file, tmp_path)
        notebook = nbformat.read(EXAMPLES / name, as_version=4)
        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        return [output for cell in notebook.cells for output in cell.get("outputs", [])]

    return execute


def shown(outputs: list[Any], kind: str) -> list[str]:
    """Return what was displayed as `kind`, such as ``"image/png"``."""
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def printed(outputs: list[Any]) -> str:
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_notebooks_are_stored_small_and_without_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["evaluate", "quickstart", "reward"]
    for path in NOTEBOOKS:
        assert path.stat().st_size < LARGEST_BYTES, path.name
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in cells), path.name
        for cell in notebook.cells:
            for link in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert (EXAMPLES / link).exists(), f"{path.name}: {link}"


def test_quickstart_scores_and_shows(run: Run) -> None:
    outputs = run("quickstart.ipynb")
    assert len(shown(outputs, "image/png")) == 2, "contact sheets show themselves"
    assert any("PickScore" in table for table in shown(outputs, "text/html")), "a card shows itself"
    assert "broken.png" in printed(outputs), "the error names the file"


def test_evaluate_finds_the_worse_checkpoint(run: Run) -> None:
    outputs = run("evaluate.ipynb")
    assert shown(outputs, "text/html"), "results and comparisons show themselves"
    assert shown(outputs, "image/png"), "a contact sheet shows itself"
    assert "distilled is worse than base on shapes" in printed(outputs)


def test_reward_climbs(run: Run) -> None:
    outputs = run("reward.ipynb")
    first, *_, last = (float(number) for number in re.findall(r"-?\d+\.\d+", printed(outputs)))
    assert last > first + 5
    assert len(shown(outputs, "image/png")) == 1

"""The evaluator's notebook runs from its first cell to its last, and finds the worse checkpoint."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_the_notebook_finds_the_worse_checkpoint() -> None:
    notebook = nbformat.read(EXAMPLES / "evaluate.ipynb", as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "the notebook is stored without its outputs"
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("text/html" in data for data in shown), "results and comparisons show themselves"
    assert any("image/png" in data for data in shown), "a contact sheet shows itself"
    (verdict,) = [output["text"] for output in outputs if " than " in output.get("text", "")]
    assert "distilled is worse than base on shapes" in verdict

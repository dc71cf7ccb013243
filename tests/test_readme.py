"""The README and its Chinese edition: tables, code, commands, links and figures are true.

``python tests/test_readme.py`` writes the tables again.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from diffsynth_metrics import __version__
from diffsynth_metrics.catalog import NAMES, find_card, find_class
from diffsynth_metrics.cli import main
from diffsynth_metrics.embedded.drawing import draw_shape

ROOT = Path(__file__).parents[1]
README, CHINESE_README = ROOT / "README.md", ROOT / "README.zh.md"
BEGIN, END = "<!-- table: python tests/test_readme.py -->\n", "<!-- end of table -->"

HEADING = ("metric", "what for", "input", "range", "better", "download", "memory", "licence")
CHINESE_HEADING = ("指标", "用途", "输入", "取值范围", "方向", "下载", "内存", "权重许可")
# Texts of cards to Chinese; what is missing there stays English.
CHINESE = json.loads((ROOT / "tests" / "data" / "cards_in_chinese.json").read_text(encoding="utf-8"))
EDITIONS: tuple[tuple[Path, tuple[str, ...], dict[str, str]], ...] = (
    (README, HEADING, {}),
    (CHINESE_README, CHINESE_HEADING, CHINESE),
)


def table(heading: tuple[str, ...], words: dict[str, str]) -> str:
    """Return the table of all metrics in Markdown, by what they need, the embedded model last.

    Args:
        heading: The names of the columns.
        words: Texts of cards to what stands for them.
    """
    order = sorted(NAMES, key=lambda name: (name == "shapes", find_card(name).inputs))
    lines = [heading, ("---",) * len(heading), *(_row(name, words) for name in order)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(name: str, words: dict[str, str]) -> tuple[str, ...]:
    card = find_card(name)
    cells = (
        *(card.good_for, card.inputs, card.range, "higher" if card.higher_is_better else "lower"),
        *(card.download, card.memory, card.weights_license),
    )
    return (f"`{name}`<br>`{find_class(name).__name__}`", *(words.get(cell, cell) for cell in cells))


def with_table(text: str, new: str) -> str:
    """Return a README with another table."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END)[1]


def write_tables() -> None:
    for path, heading, words in EDITIONS:
        text = read(path)
        path.write_text(with_table(text, table(heading, words)), encoding="utf-8")


def blocks(path: Path, language: str = "[a-z]*") -> list[str]:
    """Return the code blocks of a README, in the order of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(path), re.DOTALL | re.MULTILINE)


def targets(path: Path) -> list[str]:
    """Return the files that a README links to."""
    return [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", read(path))]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_cards() -> None:
    for path, heading, words in EDITIONS:
        text = read(path)
        assert text == with_table(text, table(heading, words)), "run python tests/test_readme.py"


def test_both_editions_have_the_same_code() -> None:
    assert len(blocks(README)) == 5
    assert blocks(README) == blocks(CHINESE_README)
    commands, same = (set(re.findall(r"`[^`\n]+`", read(path))) for path in (README, CHINESE_README))
    assert commands == same
    links, chinese = (set(targets(path)) for path in (README, CHINESE_README))
    assert links - {"README.zh.md"} == {
        link.replace("docs/zh/", "docs/") for link in chinese - {"README.md"}
    }


@pytest.mark.parametrize("path", [README, CHINESE_README], ids=lambda path: path.name)
def test_no_link_is_dead(path: Path) -> None:
    assert not [link for link in targets(path) if not (ROOT / link).exists()]


def test_ci_runs_the_commands_of_the_first_block() -> None:
    ci = read(ROOT / ".ci" / "run").replace(" -q", "")
    commands = re.split(r" && |\n", blocks(README, "bash")[0].strip())
    assert len(commands) == 4
    for command in commands:
        assert f"\n{command}" in ci or f" {command}" in ci, command


def test_the_evaluation_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, color in (("before", "blue"), ("after", "red")):
        Path(name).mkdir()
        for shape in ("circle", "square", "star"):
            draw_shape(shape, color).save(f"{name}/{shape}.png")
            Path(name, f"{shape}.txt").write_text(f"a red {shape}", encoding="utf-8")
    (block,) = (block for block in blocks(README, "bash") if "compare" in block)
    commands = [
        shlex.split(line) for line in block.splitlines() if line.startswith("diffsynth-metrics ")
    ]
    assert len(commands) == 3
    for _, *arguments in commands:
        # The embedded model scores instead of metrics whose weights have to be downloaded.
        embedded = ["shapes" if word == "pickscore" else word for word in arguments if word != "hpsv2"]
        assert main(embedded) == 0, capsys.readouterr().err
    assert Path("report.html").is_file()


def test_figures_are_those_of_the_results() -> None:
    for path in (README, CHINESE_README):
        items = [item for item in re.split(r"^- ", read(path), flags=re.MULTILINE) if "RESULTS" in item]
        assert len(items) == 4
        for item in items:
            results = re.findall(r"\((benchmarks/RESULTS\w*\.md)\)", item)
            measured = {number for file in results for number in numbers(read(ROOT / file))}
            figures = re.findall(r"\*\*(\d\S*)\*\*", item)
            assert len(figures) >= 2
            assert set(figures) <= measured, f"not the figures of {results}: {item}"
            for script in re.findall(r"python (benchmarks/\w+\.py)", item):
                assert (ROOT / script).is_file()


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d.]*(?:e-\d+)?", text)


def test_the_numbers_beside_the_code_are_what_it_computes() -> None:
    (block,) = (block for block in blocks(README, "python") if "show(" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    shown = [float(number) for number in numbers(re.findall(r"  # \[(.*)\]", block)[0])]
    assert names["scores"] == pytest.approx(shown, abs=0.06)


def test_the_picture_is_small() -> None:
    assert (ROOT / "examples" / "report.webp").stat().st_size < 200_000


def test_files_about_the_release_have_the_version_of_the_package() -> None:
    version = re.escape(__version__)
    assert re.search(rf"^version: {version}$", read(ROOT / "CITATION.cff"), re.MULTILINE)
    assert re.search(rf'^version = "{version}"$', read(ROOT / "pyproject.toml"), re.MULTILINE)
    assert re.search(rf"^## {version} ", read(ROOT / "CHANGELOG.md"), re.MULTILINE)


if __name__ == "__main__":
    write_tables()

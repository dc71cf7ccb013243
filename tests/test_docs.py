"""The documentation: the site builds, no link is dead, messages and numbers are those of today.

``python tests/test_docs.py`` writes the messages of docs/errors.md again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import diffsynth_metrics
from diffsynth_metrics import (
    CLIPMetric,
    FIDMetric,
    ModelConfig,
    PickScoreMetric,
    UnifiedReward2Metric,
    UnifiedRewardEditMetric,
    evaluation,
    rewards,
    serving,
    testing,
)
from diffsynth_metrics.catalog import find_card, find_class
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.evaluation import Sample, compare, read_samples, score
from diffsynth_metrics.rewards import Component, GroupRelative, RewardSet, to_flow_grpo
from diffsynth_metrics.testing import ScriptedEngine, tiny_checkpoint

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *ROOT.glob("*.md")])


def site_hooks() -> Any:
    """Import scripts/docs_site.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = site_hooks()
NUMBER = r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?"


# Messages


def prepare(tmp: Path) -> None:
    """Write into a folder the files that the messages are about."""
    draw_shape("circle", "red").save(tmp / "cat.png")
    (tmp / "half.png").write_bytes((tmp / "cat.png").read_bytes()[:300])
    for name in ("pickscore", "image_reward", "fid"):
        tiny_checkpoint(name, tmp / name)
    shutil.copytree(tmp / "pickscore", tmp / "mine")
    weights = tmp / "mine" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp / "empty").mkdir()
    (tmp / "data.csv").write_text("picture,wish\na.png,a cat\n", encoding="utf-8")


def shapes(**options: Any) -> CLIPMetric:
    """Load the embedded model."""
    return CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu", **options)


def pickscore(folder: str, **options: Any) -> PickScoreMetric:
    """Load PickScore from a folder."""
    return PickScoreMetric.from_pretrained(ModelConfig(path=folder), **options)


def download(**options: Any) -> None:
    """Load published weights, where no hub can be reached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
        patch.setenv("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "1")
        patch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
        patch.delenv("DIFFSYNTH_DOWNLOAD_SOURCE", raising=False)
        patch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "false")
        file = "PickScore/model.safetensors"
        model = ModelConfig(
            model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern=file, **options
        )
        PickScoreMetric.from_pretrained(model)


def compare_dtypes() -> None:
    """Compare two runs of different dtypes."""
    samples = [Sample("1", "a red circle", draw_shape("circle", "red"))]
    score(samples, {"shapes": shapes()}, out="runs/before", progress=False)
    narrow = shapes(torch_dtype=torch.bfloat16)
    score(samples, {"shapes": narrow}, out="runs/after", progress=False)
    compare("runs/before", "runs/after")


RED = draw_shape("circle", "red")
SILENT = ScriptedEngine("I like this picture.")
MESSAGES: dict[str, Callable[[], Any]] = {
    "missing": lambda: shapes().compute("a cat", "dog.png"),
    "damaged": lambda: shapes().compute("a cat", ["cat.png", "half.png"]),
    "range": lambda: shapes().compute("a cat", torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)),
    "bytes": lambda: shapes().compute("a cat", torch.linspace(0, 255, 48).reshape(1, 3, 4, 4)),
    "shape": lambda: shapes().compute("a cat", torch.rand(1, 4, 8, 8)),
    "mode": lambda: shapes().compute("a cat", PIL.Image.new("F", (8, 8))),
    "counts": lambda: shapes().compute(["a cat", "a dog"], [RED, RED, RED]),
    "order": lambda: shapes().compute("cat.png", "a cat"),
    "list": lambda: shapes().compute("a cat", "a.png", "b.png"),  # type: ignore[call-arg]
    "load": lambda: PickScoreMetric(),  # type: ignore[call-arg]
    "name": lambda: exec("from diffsynth_metrics import PickscoreMetric"),
    "metric": lambda: find_class("pikscore"),
    "off": lambda: download(skip_download=True),
    "hub": lambda: download(),
    "truncated": lambda: pickscore("mine"),
    "other": lambda: pickscore("image_reward"),
    "empty": lambda: pickscore("empty"),
    "device": lambda: pickscore("pickscore", device="cuda:99"),
    "upstream": lambda: pickscore("pickscore", vram_limit=8),
    "answer": lambda: UnifiedReward2Metric(SILENT, on_parse_error="raise").compute("a cat", RED),
    "server": lambda: UnifiedReward2Metric.from_server("http://127.0.0.1:9/v1", retries=0).compute(
        "a cat", RED
    ),
    "sources": lambda: UnifiedRewardEditMetric(SILENT).compute("make it grey", [RED]),
    "one_file": lambda: FIDMetric.from_pretrained(ModelConfig(path="fid")).compute("cat.png", "empty"),
    "few": lambda: FIDMetric.from_pretrained(ModelConfig(path="fid")).compute([RED], [RED, RED]),
    "reference": lambda: score([Sample("1", "a cat", RED)], ["fid"]),
    "column": lambda: read_samples("data.csv"),
    "nothing": lambda: read_samples("empty"),
    "dtype": compare_dtypes,
    "reward": lambda: to_flow_grpo(UnifiedReward2Metric(SILENT))()([RED], ["a cat"], [{}]),
    "group": lambda: RewardSet({"shapes": Component(shapes(), 1.0, GroupRelative(group_size=4))}).score(
        ["a cat"] * 3, torch.rand(3, 3, 8, 8)
    ),
}
"""What goes wrong, by the name in a comment in docs/errors.md above the message."""


def message(case: Callable[[], Any]) -> str:
    """Return what an error says, without what other libraries add and what depends on the machine."""
    try:
        case()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        raise AssertionError("there is no error")
    text = text.replace(f"{os.path.realpath('.')}/", "").replace(f"{os.getcwd()}/", "")
    text = re.sub(r"There are aesthetic, .*", "There are ...", text)
    text = re.sub(r"\(\d+ bytes\) (.*?) \(.*\)", r"\1", text)
    text = re.sub(r"(cannot be used|Connection\w*Error): .*", r"\1: ...", text)
    return "\n".join(textwrap.fill(line, 78, subsequent_indent="  ") for line in text.splitlines())


def errors_page(folder: Path) -> str:
    """Return docs/errors.md with the messages of today."""
    prepare(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        messages = {name: message(case) for name, case in MESSAGES.items()}
    finally:
        os.chdir(before)

    def write(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n```text\n{messages.pop(match[1])}\n```"

    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    page = re.sub(r"<!-- (\w+) -->\n```text\n.*?```", write, page, flags=re.DOTALL)
    assert not messages, f"docs/errors.md does not show {sorted(messages)}"
    return page


def test_the_messages_of_errors_are_those_of_today(tmp_path: Path) -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert page == errors_page(tmp_path), "run python tests/test_docs.py"


# Links and code


def blocks(path: Path) -> list[str]:
    """Return the code of a page."""
    return re.findall(r"^```\w+\n.*?^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {HOOKS.slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_no_link_between_files_of_the_repository_is_dead() -> None:
    dead = []
    for page in PAGES:
        for target in HOOKS.links(page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert not dead, "\n".join(dead)


def test_the_chinese_pages_have_the_code_of_the_english_ones() -> None:
    translated = sorted((DOCS / "zh").glob("*.md"))
    assert [path.name for path in translated] == ["choosing.md", "getting_started.md"]
    for path in translated:
        assert blocks(path) == blocks(DOCS / path.name), path.name


# The site


def test_every_metric_has_a_page_with_its_card() -> None:
    overview = HOOKS.overview_page((DOCS / "metrics.md").read_text(encoding="utf-8"))
    assert "## What holds for all" in overview
    for name in HOOKS.PUBLISHED:
        card, page = find_card(name), HOOKS.metric_page(name)
        assert page.startswith(f"# {card.name}\n")
        for value in (card.good_for, card.inputs, card.range, card.download, card.weights_license):
            assert f"| {value} |" in page, f"{name}: {value}"
        assert f"`{find_class(name).__name__}`" in page.partition("## Definition")[2]
        assert f"(metrics/{name}.md)" in overview
        assert f"## {HOOKS.section_of(name)}\n" not in overview


def test_the_sizes_in_choosing_are_those_of_the_cards() -> None:
    table = (DOCS / "choosing.md").read_text(encoding="utf-8").partition("\n## ")[0]
    downloads = {find_card(name).download for name in HOOKS.PUBLISHED}
    assert set(re.findall(r"\d[\d.]* [GM]B", table)) <= downloads


def test_the_reference_has_every_public_name() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")]
    text = "\n".join(HOOKS.reference_page(page) for page in pages)
    shown = set(re.findall(r"^::: .*?(\w+)$|toc_label: (\w+)", text, re.MULTILINE))
    for module in (diffsynth_metrics, evaluation, rewards, serving, testing):
        for name in module.__all__:
            assert {(name, ""), ("", name)} & shown, name


def test_the_numbers_about_speed_are_those_of_the_results() -> None:
    parts = re.split(r"^## ", (DOCS / "speed.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    seen, stale = [], []
    for part in parts:
        title = part.splitlines()[0]
        (name,) = re.findall(r"\]\(\.\./benchmarks/(\w+\.md)\)", part)
        results = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
        known = set(re.findall(NUMBER, results))
        prose = re.sub(r"^```.*?^```|\]\([^)]*\)", "", part, flags=re.DOTALL | re.MULTILINE)
        stale += [f"{title}: {number}" for number in re.findall(NUMBER, prose) if number not in known]
        seen.append(name)
        (command,) = re.findall(r"^python (benchmarks/\w+\.py)$", part, re.MULTILINE)
        assert (ROOT / command).is_file() and command in results, f"{title}: {command}"
    results_files = {path.name for path in (ROOT / "benchmarks").glob("RESULTS*.md")}
    assert not results_files - set(seen), "docs/speed.md needs a section about these"
    assert not stale, "not in the results:\n" + "\n".join(stale)


class Assets(HTMLParser):
    """Collects what a browser loads by itself for a page, its links, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loaded.append(values.get("href", ""))
        self.loaded += [values[name] for name in ("src", "srcset", "data") if name in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if importlib.util.find_spec("mkdocs") is None and not os.environ.get("CI"):
        pytest.skip("needs mkdocs: pip install 'diffsynth-metrics[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        for address in Assets(page).loaded:
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text("utf-8")), sheet


def test_no_link_of_the_site_is_dead(site: Path) -> None:
    pages = {path: Assets(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the root of the server
            continue
        for link in page.links:
            name, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", name):
                continue
            file = (path.parent / name).resolve() if name else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].ids):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead, "\n".join(dead)


def test_the_site_is_searched_in_the_browser(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = [entry["location"] for entry in index["docs"] if "Pick-a-Pic" in entry["text"]]
    assert "metrics/pickscore.html#definition" in found
    assert list(site.glob("assets/javascripts/workers/search.*.js"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        (DOCS / "errors.md").write_text(errors_page(Path(temporary)), encoding="utf-8")

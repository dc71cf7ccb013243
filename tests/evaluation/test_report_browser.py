"""A report in a real browser, without a network: what a reader clicks, types and sees.

Debian's chromium is driven by playwright; where one of them is absent the tests are skipped, but never
in CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import picture, results, row, two_runs

from diffsynth_metrics.evaluation import compare, report

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NOT_FOUND = "Failed to load resource: net::ERR_FILE_NOT_FOUND"
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"> \" ' & " + "long " * 300 + "עברית 🦊"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a network."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _absent("playwright is not installed")
    if CHROMIUM is None:
        _absent("there is no chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


def _absent(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI must run these tests")
    pytest.skip(reason)


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a file offline; in the end nothing may have been asked of a network or gone wrong."""
    contexts, problems, requests = [], [], []

    def open_page(path: Path, **options: Any) -> Any:
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.absolute().as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == [NOT_FOUND] * len([url for url in requests if url.endswith("/gone.png")])
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def of_500_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a comparison of 500 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    return report(compare(*two_runs(folder, 500, side=128)), folder / "report.html")


@pytest.fixture(scope="module")
def of_12_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small comparison, with a hostile prompt and a sample without a score."""
    folder = tmp_path_factory.mktemp("small")
    prompt_of = lambda number, prompt: HOSTILE if number == 3 else prompt  # noqa: E731
    before, after = two_runs(folder, 12, prompt_of=prompt_of)
    extra = [
        results(
            [
                row(number, metric, None, image=folder / "gone.png", reason="there is no file gone.png")
                for number in (12, 13)
                for metric in ("shapes", "distance")
            ],
            name,
        )
        for name in ("before", "after")
    ]
    runs = [
        results([*run.to_pandas().to_dict("records"), *more.to_pandas().to_dict("records")], run.name)
        for run, more in zip((before, after), extra, strict=True)
    ]
    return report(compare(*runs), folder / "report.html")


def cards(page: Any) -> list[str]:
    """Return the ids on the cards of the gallery, in their order."""
    tags: list[str] = page.locator("#cards .tags").all_inner_texts()
    return [text.split(" · ")[0] for text in tags]


def column(page: Any, place: str, name: str, metric: str = "shapes") -> list[float]:
    """Return the numbers of a metric in a column of the cards' tables."""
    read = """(tables, [name, metric]) => tables.map(table => {
        const titles = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
        const row = [...table.tBodies[0].rows].find(row => row.cells[0].textContent === metric);
        return Number(row.cells[titles.indexOf(name)].textContent);
    })"""
    numbers: list[float] = page.locator(f"{place} .card table").evaluate_all(read, [name, metric])
    return numbers


def data_of(page: Any) -> dict[str, Any]:
    data: dict[str, Any] = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    return data


def test_500_pairs_are_one_small_file_that_opens_offline(
    opened: Callable[..., Any], of_500_pairs: Path
) -> None:
    assert of_500_pairs.stat().st_size < 10_000_000
    page = opened(of_500_pairs)
    assert page.locator("#count").inner_text() == "500 of 500 pairs"
    assert len(cards(page)) == 60
    assert page.locator("#page").inner_text() == "Page 1 of 9"
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    page.locator("#cards img").last.scroll_into_view_if_needed()
    page.locator("#wins img").first.scroll_into_view_if_needed()
    assert page.locator("#wins img").evaluate_all(loaded)
    page.click("#next")
    assert page.locator("#page").inner_text() == "Page 2 of 9"
    assert cards(page)[0] == "0060"


def test_sorting_by_gain_puts_the_largest_first(opened: Callable[..., Any], of_500_pairs: Path) -> None:
    page = opened(of_500_pairs)
    page.select_option("#sort", "high")
    gains = column(page, "#cards", "gain")
    assert gains == sorted(gains, reverse=True)
    data = data_of(page)
    largest = max(item["scores"][0][1] - item["scores"][0][0] for item in data["items"])
    assert gains[0] == pytest.approx(largest, rel=1e-3)
    page.select_option("#metric", "1")
    page.select_option("#sort", "low")
    worst = column(page, "#cards", "gain", "distance")
    assert worst == sorted(worst)
    assert worst[0] < 0, "of a distance, larger is worse"
    page.select_option("#value", "0")
    scores = column(page, "#cards", "before", "distance")
    assert scores == sorted(scores)
    page.select_option("#sort", "id")
    assert cards(page)[:3] == ["0000", "0001", "0002"]


def test_counts_and_means_follow_the_filters(opened: Callable[..., Any], of_500_pairs: Path) -> None:
    page = opened(of_500_pairs)
    data = data_of(page)
    page.select_option("#category", "even")
    assert page.locator("#count").inner_text() == "250 of 500 pairs"
    even = [item["scores"][0] for item in data["items"] if item["category"] == "even"]
    mean = sum(scores[0] for scores in even) / len(even)
    cells = page.locator("#selection tbody tr").first.locator("td").all_inner_texts()
    assert float(cells[0]) == pytest.approx(mean, rel=1e-3)
    assert cells[1] == "250"
    better, equal, worse = (int(count) for count in cells[-1].split(" / "))
    assert (better, equal + better + worse) == (sum(after > before for before, after in even), 250)
    assert page.locator(".unfiltered:visible").count() == 2, "intervals and drawings say what they show"
    page.fill("#text", "RED CIRCLE")
    found = [
        item for item in data["items"] if item["category"] == "even" and "red circle" in item["prompt"]
    ]
    assert page.locator("#count").inner_text() == f"{len(found)} of 500 pairs"
    assert 0 < len(found) < 250
    page.fill("#text", "")
    page.fill("#from", "2")
    page.fill("#to", "3")
    gains = column(page, "#cards", "gain")
    assert gains and all(2 <= gain <= 3 for gain in gains)
    page.fill("#from", "1000000")
    assert page.locator("#nothing").is_visible()
    assert page.locator("#count").inner_text() == "0 of 500 pairs"
    page.click("#clear")
    assert page.locator("#count").inner_text() == "500 of 500 pairs"
    assert page.locator(".unfiltered:visible").count() == 0


def test_means_are_those_of_prompts(opened: Callable[..., Any], tmp_path: Path) -> None:
    scores = [("p", 0.0), ("p", 0.0), ("p", 3.0), ("q", 5.0)]
    rows = [
        row(n, score=score, prompt_id=prompt, seed=str(n)) for n, (prompt, score) in enumerate(scores)
    ]
    page = opened(report(results(rows), tmp_path / "r.html"))
    cells = page.locator("#selection tbody td").all_inner_texts()
    assert cells == ["3", "4"], "the mean of 1 and 5, of four pictures"
    page.fill("#to", "3")
    assert page.locator("#selection tbody td").all_inner_texts() == ["1", "3"]


def test_pictures_stand_side_by_side_or_one_by_one(
    opened: Callable[..., Any], of_12_pairs: Path
) -> None:
    page = opened(of_12_pairs)
    first = page.locator("#cards .card").first
    boxes = [figure.bounding_box() for figure in first.locator("figure").all()]
    assert len(boxes) == 2
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert first.locator("figcaption").all_inner_texts() == ["before", "after"]
    page.click("#view-single")
    assert page.locator("#count").inner_text() == "28 of 28 pictures"
    assert page.get_attribute("#view-single", "aria-pressed") == "true"
    assert page.locator("#cards .card").first.locator("figure").count() == 1
    page.select_option("#sort", "low")
    scores = column(page, "#cards", "score")[:24]
    assert scores == sorted(scores)
    page.check("#failed")
    assert page.locator("#count").inner_text() == "4 of 28 pictures"
    assert page.locator("#cards .reason").first.inner_text().endswith("there is no file gone.png")
    assert "gone.png" in page.locator("#cards .problem").first.inner_text()
    page.click("#view-pairs")
    assert page.locator("#count").inner_text() == "2 of 14 pairs"


def test_wins_and_losses_are_the_ends_of_the_order(
    opened: Callable[..., Any], of_12_pairs: Path
) -> None:
    page = opened(of_12_pairs)
    data = data_of(page)
    for number, (metric, sign) in enumerate((("shapes", 1), ("distance", -1))):
        page.select_option("#extremes-metric", str(number))
        pairs = [item["scores"][number] for item in data["items"] if None not in item["scores"][number]]
        gains = sorted((sign * (after - before) for before, after in pairs), reverse=True)
        assert column(page, "#wins", "gain", metric)[0] == pytest.approx(gains[0], rel=1e-3)
        assert column(page, "#losses", "gain", metric)[0] == pytest.approx(gains[-1], rel=1e-3)


def test_tables_sort_by_value(opened: Callable[..., Any], of_12_pairs: Path) -> None:
    page = opened(of_12_pairs)
    title = page.locator("#summary th", has_text="mean").first
    index = title.evaluate("cell => cell.cellIndex")
    values = f"#summary tbody tr td:nth-child({index + 1})"
    read = "cells => cells.map(cell => Number(cell.dataset.value))"
    title.get_by_role("button").click()
    assert title.get_attribute("aria-sort") == "ascending"
    numbers = page.locator(values).evaluate_all(read)
    assert len(numbers) == 4 and numbers == sorted(numbers)
    title.get_by_role("button").click()
    assert title.get_attribute("aria-sort") == "descending"
    assert page.locator(values).evaluate_all(read) == numbers[::-1]


def test_a_hostile_prompt_is_shown_as_text(opened: Callable[..., Any], of_12_pairs: Path) -> None:
    page = opened(of_12_pairs, viewport={"width": 400, "height": 800})
    prompt = page.locator("#cards .card", has_text="onerror").locator(".prompt")
    assert prompt.evaluate("element => element.textContent") == HOSTILE
    assert page.title() != "hacked"
    assert page.locator("img[src=x]").count() == 0
    assert prompt.bounding_box()["height"] < 200, "a long prompt scrolls in its card"


def test_the_keyboard_is_enough(opened: Callable[..., Any], of_12_pairs: Path) -> None:
    page = opened(of_12_pairs)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the pictures"
    page.locator("#view-single").focus()
    page.keyboard.press("Enter")
    assert page.locator("#count").inner_text() == "28 of 28 pictures"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    for element in ("#view-single", "nav a", "th button", "#metric", "#text", ".picture", "summary"):
        page.locator(element).first.focus()
        assert page.evaluate(outline) == "solid", f"the focus on {element} is visible"
    page.locator("#view-pairs").focus()
    page.keyboard.press("Space")
    page.locator("#cards .picture").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog").is_visible()
    first = page.locator("dialog .tags").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("dialog .tags").inner_text() != first
    page.keyboard.press("ArrowLeft")
    assert page.locator("dialog .tags").inner_text() == first
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    assert page.evaluate("document.activeElement.className") == "picture", "back where one was"


def test_everything_has_a_name(opened: Callable[..., Any], of_12_pairs: Path) -> None:
    page = opened(of_12_pairs)
    nameless = """elements => elements.filter(element => {
        const label = element.labels?.[0]?.textContent ?? "";
        const text = element.getAttribute("aria-label") || element.alt || label || element.textContent;
        return !text.trim();
    }).map(element => element.outerHTML.slice(0, 200))"""
    assert page.locator("button, select, input, img, svg[role=img]").evaluate_all(nameless) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(
    opened: Callable[..., Any], of_12_pairs: Path, scheme: str
) -> None:
    page = opened(of_12_pairs, color_scheme=scheme)
    contrast = """() => {
        const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((value) => {
                const part = value / 255;
                return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const background = (element) => {
            for (; element; element = element.parentElement) {
                const color = getComputedStyle(element).backgroundColor;
                if (color !== "rgba(0, 0, 0, 0)") return color;
            }
        };
        const texts = "p, td, th, h1, h2, h3, a, button, label, select, summary, li";
        return [...document.querySelectorAll(texts)]
            .filter((element) => element.textContent.trim() && element.checkVisibility())
            .filter((element) => !element.disabled)
            .map((element) => {
                const one = light(getComputedStyle(element).color), other = light(background(element));
                const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
                return [ratio, element.outerHTML.slice(0, 150)];
            }).filter(([ratio]) => !(ratio >= 4.5));
    }"""
    assert page.evaluate(contrast) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = int(background.removeprefix("rgb(").split(",")[0]) < 100
    assert is_dark == (scheme == "dark"), background


def test_a_phone_does_not_scroll_sideways(opened: Callable[..., Any], of_12_pairs: Path) -> None:
    page = opened(of_12_pairs, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.locator("#cards .picture").first.click()
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= 400
    widths = page.locator("#cards .card").evaluate_all("cards => cards.map(card => card.scrollWidth)")
    assert max(widths) <= 400


def test_linked_pictures_are_shown_while_they_are_there(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    here, gone = picture(tmp_path, "he re#1.png"), picture(tmp_path, "gone.png")
    path = report(results([row(0, image=here), row(1, image=gone)]), tmp_path / "r.html", size_limit=0)
    gone.unlink()
    page = opened(path)
    page.locator("#cards .problem").wait_for()
    assert "cannot be shown" in page.locator("#cards .problem").inner_text()
    assert page.locator("#cards img").evaluate_all(
        "images => images.map(image => image.naturalWidth)"
    ) == [64]


def test_an_empty_run_is_a_page_too(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(report(results([]), tmp_path / "r.html"))
    assert page.locator("#nothing").is_visible()
    assert page.locator("#count").inner_text() == "0 of 0 pictures"


def test_of_thousands_of_pairs_only_a_page_is_drawn(opened: Callable[..., Any], tmp_path: Path) -> None:
    runs = [
        results([row(number, score=number * 7919 % 5003 + shift) for number in range(5_000)], name)
        for name, shift in (("before", 0), ("after", 1))
    ]
    page = opened(report(compare(*runs), tmp_path / "r.html"))
    page.select_option("#value", "0")
    page.select_option("#sort", "high")
    assert page.locator("#cards .card").count() == 60
    assert column(page, "#cards", "before")[:3] == [5002, 5001, 5000]
    assert page.locator("#page").inner_text() == "Page 1 of 84"

"""A report as data and as a file; test_report_browser.py looks at it in a browser."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import PIL.Image
import pytest
from report_runs import METRICS, picture, results, row, two_runs

from diffsynth_metrics.evaluation import Results, Sample, compare, report, score
from diffsynth_metrics.evaluation.charts import Interval, histogram, interval_chart
from diffsynth_metrics.evaluation.gallery import by_importance, gather_items

HOSTILE = "</script><img src=x onerror=\"alert('x')\"> & \u2028 ' \" {{ 7 * 7 }} <!-- עברית 🦊 漢字"


class Page(html.parser.HTMLParser):
    """The elements, texts and attributes of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {}
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())
        self.data: dict[str, Any] = json.loads(self.contents["script"][0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open.append(tag)
            self.contents.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.contents[self._open[-1]][-1] += data
        else:
            self.words.append(data)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


def page_of(subject: Any, folder: Path, **options: Any) -> Page:
    return Page(report(subject, folder / "report.html", **options))


def pictures_of(page: Page) -> dict[str, dict[str, Any]]:
    return {os.path.basename(picture["name"]): picture for picture in page.data["pictures"]}


def test_a_comparison_begins_with_its_verdict(tmp_path: Path) -> None:
    before, after = two_runs(tmp_path, 8)
    comparison = compare(before, after)
    path = report(comparison, tmp_path / "report.html", title="Colours")
    assert path == tmp_path / "new folder" / "report.html"
    page = Page(path)
    assert comparison.verdict in page.text
    assert page.text.index(comparison.verdict) < page.text.index("Means are over prompts")
    assert "<title>Colours</title>" in page.source
    assert page.data["runs"] == list(comparison.names)
    assert [metric["label"] for metric in page.data["metrics"]] == ["shapes", "distance"]
    assert [metric["higher"] for metric in page.data["metrics"]] == [True, False]
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    expected = ["Summary", "Differences", "Distributions", "Biggest wins and losses", "Pictures"]
    assert headings == [*expected, "Failures", "Provenance"]


def test_the_page_asks_nobody_and_allows_only_its_own_script(tmp_path: Path) -> None:
    page = page_of(two_runs(tmp_path, 4), tmp_path)
    addresses = [*page.attributes("src"), *page.attributes("href")]
    assert all(address.startswith(("#", "data:")) for address in addresses), addresses
    assert "://" not in page.contents["style"][0] + page.contents["script"][1]
    policy = next(value for value in page.attributes("content") if "default-src" in value)
    assert "default-src 'none'" in policy
    for kind, content in (
        ("script", page.contents["script"][1]),
        ("style", page.contents["style"][0]),
    ):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not page.attributes("style"), "the policy blocks these"
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_text_of_the_data_is_never_markup(tmp_path: Path) -> None:
    image = picture(tmp_path, "x.png")
    rows = [
        row(0, image=image, prompt=HOSTILE, category=HOSTILE),
        row(1, score=None, image=HOSTILE, prompt="half", reason=HOSTILE),
    ]
    page = page_of(results(rows, name=HOSTILE), tmp_path, title=f"{HOSTILE} \ud800")
    assert "img" not in [tag for tag, _ in page.tags]
    assert len(page.contents["script"]) == 2
    assert page.data["items"][0]["prompt"] == HOSTILE
    assert page.data["runs"] == [HOSTILE]
    assert HOSTILE.split("\u2028")[0].strip() in page.text, "it is shown as it is"


def test_a_missing_score_has_its_reason_and_is_no_number(tmp_path: Path) -> None:
    rows = [
        row(0, score=2.0, image=picture(tmp_path, "0.png")),
        row(1, score=None, image=tmp_path / "gone.png", reason="there is no file gone.png"),
    ]
    page = page_of(results(rows), tmp_path)
    assert [item["scores"] for item in page.data["items"]] == [[[2.0]], [[None]]]
    errors = [item["errors"][0][0] for item in page.data["items"]]
    assert errors == [None, "there is no file gone.png"]
    assert "there is no file gone.png" in page.text.split("Samples without a score")[1]
    assert "NaN" not in page.contents["script"][0]
    [infinite] = gather_items([[row(2, score=float("inf"))]], ["shapes"])
    assert (infinite.scores, infinite.errors) == ([[None]], [["the score is inf"]])


def test_many_failures_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    rows = [row(number, score=None, reason=f"reason {number};") for number in range(250)]
    page = page_of(results(rows), tmp_path)
    assert "reason 199;" in page.text
    assert "reason 200;" not in page.text
    assert "The first 200 of 250" in page.text
    assert "ImageError 250" in page.text


def test_a_picture_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [
        row(0, image=picture(tmp_path, "good.png")),
        row(1, image=tmp_path / "broken.png"),
        row(2, image=tmp_path / "gone.png"),
        row(3, image=f"{tmp_path / 'gone.tar'}::x.png"),
        row(4, image=""),
    ]
    page = page_of(results(rows), tmp_path)
    shown = pictures_of(page)
    assert [name for name, picture in shown.items() if picture["source"]] == ["good.png"]
    assert shown["good.png"]["problem"] == ""
    assert "broken.png" in shown["broken.png"]["problem"]
    assert "gone.png" in shown["gone.png"]["problem"]
    assert shown["gone.tar::x.png"]["problem"]
    assert "1 of 5 pictures are inside this file as small copies. 4 cannot be shown" in page.text
    assert shown[""]["problem"] == "the run does not know a file of this picture"


def test_a_picture_that_changed_is_not_shown_beside_the_score_of_another(tmp_path: Path) -> None:
    file = picture(tmp_path, "x.png", "a red circle")
    before = row(0, image=file)
    assert page_of(results([before]), tmp_path).data["pictures"][0]["problem"] == ""
    picture(tmp_path, "x.png", "a blue star")
    after = row(0, image=file)
    page = page_of([results([before], "before"), results([after], "after")], tmp_path)
    changed, current = (page.data["pictures"][n] for n in page.data["items"][0]["pictures"])
    assert changed["problem"] == f"{file} has changed since it was scored"
    assert changed["source"] == changed["link"] == ""
    assert current["source"].startswith("data:") and current["problem"] == ""


def test_another_folder_shows_the_pictures_that_were_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: picture(tmp_path / name, "1.png", f"a {name} star") for name in ("red", "blue")}
    monkeypatch.chdir(tmp_path / "red")
    with PIL.Image.open("1.png") as opened:  # pixels in memory that still know their file
        samples = [Sample("file", "a star", "1.png"), Sample("pixels", "a star", opened)]
        scored = score(samples, ["shapes"], progress=False)
    assert list(scored.to_pandas()["image"]) == [str(files["red"])] * 2
    monkeypatch.chdir(tmp_path / "blue")
    page = page_of(scored, tmp_path)
    assert {one["name"] for one in page.data["pictures"]} == {str(files["red"])}
    assert all(one["source"].startswith("data:") for one in page.data["pictures"])


def test_small_copies_fill_the_limit_and_the_rest_is_linked(tmp_path: Path) -> None:
    before, after = two_runs(tmp_path, 12)
    everything = page_of(compare(before, after), tmp_path)
    sizes = [len(picture["source"]) for picture in everything.data["pictures"]]
    assert all(
        picture["source"].startswith("data:image/webp") for picture in everything.data["pictures"]
    )
    limit = sum(sizes) // 3
    page = page_of(compare(before, after), tmp_path, size_limit=limit)
    inline = [p for p in page.data["pictures"] if p["source"].startswith("data:")]
    linked = [p for p in page.data["pictures"] if not p["source"].startswith("data:")]
    assert 0 < sum(len(picture["source"]) for picture in inline) <= limit
    assert len(inline) + len(linked) == 24
    assert f"{len(inline)} of 24 pictures are inside this file" in page.text
    assert f"{len(linked)} are linked" in page.text
    assert all((tmp_path / picture["source"]).is_file() for picture in linked)
    gains = [item["scores"][0][1] - item["scores"][0][0] for item in page.data["items"]]
    extreme = page.data["items"][gains.index(max(gains))]
    assert all(page.data["pictures"][number] in inline for number in extreme["pictures"])


def test_links_survive_odd_file_names(tmp_path: Path) -> None:
    names = ["a b#?%41.png", "javascript:alert(1).png", "ü 漢.png", "x.png?y=.png"]
    rows = [row(n, image=picture(tmp_path / "pictures", name)) for n, name in enumerate(names)]
    (tmp_path / "reports").mkdir()
    page = Page(report(results(rows), tmp_path / "reports" / "r.html", size_limit=0))
    shown = pictures_of(page)
    assert set(shown) == set(names)
    for name, picture_of_page in shown.items():
        assert ":" not in picture_of_page["source"]
        linked = tmp_path / "reports" / unquote(picture_of_page["source"])
        assert linked.resolve() == (tmp_path / "pictures" / name).resolve()


def test_a_picture_in_a_shard_is_copied_or_left_out_but_not_linked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(picture(tmp_path, "x.png"), "x.png")
    rows = [row(0, image=f"{tmp_path / 'shard.tar'}::x.png")]
    [copied] = page_of(results(rows), tmp_path).data["pictures"]
    assert copied["source"].startswith("data:image/webp")
    assert copied["link"] == ""
    [shown] = page_of(results(rows), tmp_path, size_limit=0).data["pictures"]
    assert shown["source"] == shown["link"] == ""
    assert "size_limit=0" in shown["problem"]


def test_the_pictures_of_one_prompt_and_seed_stand_side_by_side() -> None:
    first = [row(n, id=f"a{n}", seed=str(n % 2), prompt_id=f"p{n // 2}", score=n) for n in range(4)]
    second = [  # ids in another order than seeds
        row(n, id=f"b{9 - n}", seed=str(n % 2), prompt_id=f"p{n // 2}", score=10 + n) for n in (3, 2, 9)
    ]
    items = gather_items([first, second], ["shapes"])
    assert [item.ids for item in items] == [
        ["a0", None],
        ["a1", None],
        ["a2", "b7"],
        ["a3", "b6"],
        [None, "b0"],
    ]
    assert items[2].scores == [[2.0, 12.0]]


def test_where_seeds_are_not_known_ids_tell_which_pictures_belong_together() -> None:
    first = [row(n, id=f"{n}.png", seed=None, prompt_id="p", score=n) for n in range(3)]
    second = [row(n, id=f"{n}.png", seed=float("nan"), prompt_id="p", score=n) for n in (2, 0)]
    items = gather_items([first, second], ["shapes"])
    assert [item.ids for item in items] == [["0.png", "0.png"], ["1.png", None], ["2.png", "2.png"]]


def test_pictures_of_failures_and_of_both_ends_come_first() -> None:
    first = [row(n, score=score) for n, score in enumerate([5, 5, 5, None, 5])]
    second = [row(n, score=score) for n, score in enumerate([5, 6, 9, 5, 1])]
    ranked = by_importance(gather_items([first, second], ["shapes"]))
    assert [item.ids[0] for item in ranked] == ["0003", "0002", "0004", "0000", "0001"]
    alone = by_importance(gather_items([second], ["shapes"]))
    assert [item.ids[0] for item in alone[:2]] == ["0002", "0004"]
    assert by_importance([]) == []


def test_sources_of_edits_are_pictures_of_the_page(tmp_path: Path) -> None:
    source, edited = picture(tmp_path, "source.png"), picture(tmp_path, "edited.png")
    page = page_of(results([row(0, image=edited, sources=[str(source)])]), tmp_path)
    [item] = page.data["items"]
    names = [page.data["pictures"][number]["name"] for number in (*item["sources"], *item["pictures"])]
    assert names == [str(source), str(edited)]


def test_provenance_marks_what_differs(tmp_path: Path) -> None:
    before = results([row(0)], "before")
    other = {"shapes": {**METRICS["shapes"], "dtype": "bfloat16", "fingerprint": "other"}}
    after = Results.from_rows([row(0, fingerprint="other")], name="after", metrics=other)
    page = page_of([before, after], tmp_path)
    words = page.text.split("Provenance")[-1]
    assert "dtype float32 bfloat16 differs" in words
    assert "weights ab12 ab12" in words
    assert "These runs are not compared. " in page.text, "compare refuses them, and the page says so"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = page_of([results([row(0)], "a"), results([row(1)], "a")], tmp_path)
    assert len(set(page.data["runs"])) == 2


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    page = page_of(Results.from_rows([], name="nothing", metrics={}), tmp_path)
    assert "no sample was scored" in page.text
    assert page.data["items"] == []


def test_scores_of_sets_are_shown(tmp_path: Path) -> None:
    run = results([row(0)])
    run.sets.append({"metric": "fid", "score": 12.345, "reference": "coco", "count": 300})
    page = page_of(run, tmp_path)
    assert "fid 12.35 coco 300" in page.text or "fid 12.34 coco 300" in page.text


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    run = results([row(0)])
    with pytest.raises(TypeError, match="Results"):
        report("runs/a", tmp_path / "r.html")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="thumbnail"):
        report(run, tmp_path / "r.html", thumbnail=0)
    with pytest.raises(ValueError, match="size_limit"):
        report(run, tmp_path / "r.html", size_limit=-1)
    with pytest.raises(IsADirectoryError, match=r"report\.html"):
        report(run, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"make the folder .*: there is no '.*typo'"):
        report(run, tmp_path / "typo" / "r.html")
    assert not (tmp_path / "typo").exists()


def test_a_histogram_shows_shares_of_each_run() -> None:
    drawing = histogram("m", {0: [0.0] * 50 + [1.0] * 50, 1: [1.0] * 10, 2: []})
    assert drawing is not None
    assert [outline.color for outline in drawing.outlines] == [0, 1]
    assert drawing.top == "100%"
    heights = [
        sorted({float(y) for y in re.findall(r",(\d+\.\d)", outline.path)})
        for outline in drawing.outlines
    ]
    assert heights == [[80.0], [10.0, 150.0]], "a half, and everything"
    assert histogram("m", {0: []}) is None
    constant = histogram("m", {0: [3.0, 3.0]})
    assert constant is not None
    assert constant.outlines[0].mean == pytest.approx(180)


def test_intervals_of_a_chart_have_one_scale() -> None:
    rows = [(None, [(None, Interval(1.0, 0.0, 2.0))]), ("cats", [(None, Interval(-2.0))]), ("none", [])]
    chart = interval_chart("m", "", rows, with_zero=True)
    everything, cats, nothing = chart.rows
    assert chart.ends == ("-2", "2")
    assert chart.zero == pytest.approx(100)
    assert everything.marks[0].x == pytest.approx((100 + everything.marks[0].right) / 2)
    assert everything.marks[0].text == "1.00 [0.00, 2.00]"
    assert cats.marks[0].left == cats.marks[0].right, "no interval is known"
    assert nothing.marks == ()

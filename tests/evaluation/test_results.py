"""Results: what a summary says and how sure it is, which rows count, and what a folder must hold."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting import Brightness, Wordiness, gray_files

from diffsynth_metrics.evaluation import Results, Sample, score
from diffsynth_metrics.evaluation.reading import SampleReader
from diffsynth_metrics.evaluation.run_folder import ROWS, RowWriter, RunFolder, table_of


def row(id: str, score: float | None, **more: Any) -> dict[str, Any]:
    return {"id": id, "metric": "m", "score": score, **more}


SEEDS = [
    row("a0", 1.0, prompt_id="a", category="animals"),
    row("a1", 3.0, prompt_id="a", category="animals"),
    row("b0", 5.0, prompt_id="b", category="animals"),
    row("c0", 9.0, prompt_id="c", category="cars"),
    row("c1", None, prompt_id="c", category="cars", error_type="ImageError", error="c1.png is broken"),
]


class TestSummary:
    def test_the_mean_and_its_error_are_those_of_prompt_means(self) -> None:
        (summary,) = Results.from_rows(SEEDS).summary().records()
        means = [2.0, 5.0, 9.0]
        assert summary["mean"] == pytest.approx(np.mean(means))
        assert summary["standard error"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
        assert (summary["prompts"], summary["scored"], summary["failed"]) == (3, 4, 1)

    def test_categories_are_summarised_apart(self) -> None:
        table = Results.from_rows([*SEEDS, row("d0", 7.0)]).summary(by_category=True)
        animals, cars, none = table.records()
        assert (animals["category"], animals["mean"], animals["prompts"]) == ("animals", 3.5, 2)
        assert (cars["category"], cars["mean"], cars["standard error"]) == ("cars", 9.0, None)
        assert (cars["scored"], cars["failed"]) == (1, 1)
        assert (none["category"], none["mean"]) == (None, 7.0)

    def test_coverage_counts_samples_that_have_no_row(self) -> None:
        samples = [Sample(id, None, id) for id in ("a0", "a1", "x")]
        (summary,) = Results.from_rows(SEEDS[:2], samples=samples).summary().records()
        assert (summary["scored"], summary["failed"], summary["missing"]) == (2, 0, 1)
        (nothing,) = Results.from_rows([], metrics={"m": {}}, samples=samples).summary().records()
        assert (nothing["mean"], nothing["scored"], nothing["missing"]) == (None, 0, 3)

    def test_an_infinite_score_has_failed_and_is_in_no_mean(self) -> None:
        rows = [
            row("a", math.inf),
            row("b", -math.inf),
            row("c", 2.0),
            row("d", 1e308),
            row("e", 1.7e308),
        ]
        results = Results.from_rows(rows[:3])  # pytest turns a RuntimeWarning into an error
        (summary,) = results.summary().records()
        assert (summary["mean"], summary["scored"], summary["failed"]) == (2.0, 1, 2)
        assert [one[3] for one in results.failures().rows] == ["the score is not a finite number"] * 2
        assert Results.from_rows(rows).summary().records()[0]["scored"] == 3

    def test_it_says_that_scores_are_missing(self) -> None:
        assert "1 of 5 rows have no score" in str(Results.from_rows(SEEDS, name="mine"))
        assert "mine: 5 samples" in str(Results.from_rows(SEEDS, name="mine"))


class TestForms:
    def test_a_table_of_failures(self) -> None:
        failures = Results.from_rows([*SEEDS, row("d", math.nan)]).failures()
        assert failures.columns == ("id", "metric", "image", "reason")
        assert failures.rows[0] == ("c1", "m", "", "c1.png is broken")
        assert failures.rows[1][3] == "the score is not a finite number"

    def test_a_frame_has_none_where_nothing_is_known(self) -> None:
        frame = Results.from_rows(SEEDS).to_pandas()
        assert frame["error"][0] is None and frame["category"][0] == "animals"
        assert frame["seed"][0] is None
        assert list(frame["sources"]) == [[]] * 5
        assert math.isnan(frame["score"][4])

    def test_a_csv_file_has_every_row(self, tmp_path: Path) -> None:
        Results.from_rows(SEEDS).save_csv(tmp_path / "x.csv")
        with (tmp_path / "x.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [one["score"] for one in rows] == ["1.0", "3.0", "5.0", "9.0", ""]
        assert rows[4]["error"] == "c1.png is broken"

    def test_a_notebook_shows_it_and_escapes_what_others_wrote(self) -> None:
        rows = [*SEEDS, row("<b>", None, error_type="X", error="<script>alert(1)</script>")]
        html = Results.from_rows(rows, name="<i>")._repr_html_()
        assert "<script>" not in html and "&lt;script&gt;" in html and "<i>" not in html
        assert "2 scores are missing" in html
        assert "<details>" in html and "<details>" not in Results.from_rows(SEEDS[:1])._repr_html_()

    def test_a_column_that_does_not_exist_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no column 'scores'"):
            Results.from_rows([row("a", 1.0, scores=2)])

    def test_two_samples_of_one_id_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="an id of its own"):
            Results.from_rows([row("a", 1.0)], samples=[Sample("a", "x", "1.png")] * 2)


class TestFolders:
    def test_what_was_scored_is_read_again(self, tmp_path: Path) -> None:
        samples = gray_files(tmp_path / "pictures", 6)
        scored = score(samples, [Brightness, Wordiness], out=tmp_path / "run")
        opened = Results.open(tmp_path / "run")
        assert opened.name == "run" and opened.path == tmp_path / "run"
        assert opened.to_pandas().equals(scored.to_pandas())
        made = opened.metrics["Brightness"]
        assert made["metric"] == "Brightness" and len(made["fingerprint"]) == 64
        assert made["card"]["name"] == "brightness" and made["card"]["higher_is_better"]

    def test_rows_of_other_samples_are_kept_and_not_counted(self, tmp_path: Path) -> None:
        first = gray_files(tmp_path / "first", 4)
        other = gray_files(tmp_path / "other", 3, start=100)
        metric = Brightness()
        score(first, metric, out=tmp_path / "run")
        assert len(score(other, metric, out=tmp_path / "run")) == 3
        assert len(score(first, metric, out=tmp_path / "run")) == 4
        assert metric.asked == 7

    def test_after_a_kill_the_rows_of_what_was_not_read_again_count(self, tmp_path: Path) -> None:
        samples, folder = gray_files(tmp_path / "pictures", 4), RunFolder(tmp_path / "run")
        score(samples, Wordiness, out=folder.path)
        samples[1] = replace(samples[1], prompt="another prompt")
        # What a call has written that was killed before it read the first picture.
        folder.write_samples(SampleReader(samples).table())
        assert list(Results.open(folder.path).to_pandas()["id"]) == ["s0", "s2", "s3"]

    def test_a_foreign_folder_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="there is no run folder"):
            Results.open(tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match=r"is no run folder: it has no run\.json"):
            Results.open(tmp_path)
        (tmp_path / "run.json").write_text(json.dumps({"format": 99}))
        with pytest.raises(ValueError, match="update diffsynth-metrics"):
            Results.open(tmp_path)
        for text in ("", "[]", "{}"):
            (tmp_path / "run.json").write_text(text)
            with pytest.raises(ValueError, match=r"delete .*run\.json"):
                Results.open(tmp_path)

    def test_damaged_samples_are_said(self, tmp_path: Path) -> None:
        metric, samples = Brightness(), gray_files(tmp_path / "pictures", 6)
        score(samples, metric, out=tmp_path / "run")
        (tmp_path / "run" / "samples.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=r"delete .*samples\.parquet and score again"):
            Results.open(tmp_path / "run")
        assert len(score(samples, metric, out=tmp_path / "run")) == 6
        assert metric.asked == 6

    def test_what_was_deleted_is_said(self, tmp_path: Path) -> None:
        metric, out = Brightness(), tmp_path / "run"
        samples = gray_files(tmp_path / "pictures", 6)
        score(samples, metric, out=out)
        (out / "samples.parquet").unlink()
        with pytest.raises(ValueError, match=r"score again, which keeps all rows: .*samples\.parquet"):
            Results.open(out)
        assert len(score(samples, metric, out=out)) == 6 and metric.asked == 6
        for part in (out / "parts").iterdir():
            part.unlink()
        assert "there are no rows" in str(Results.open(out))
        (out / "parts").rmdir()
        with pytest.raises(ValueError, match=r"score again: .*parts"):
            Results.open(out)
        assert "there are no rows" not in str(score(samples, metric, out=out))


class TestRowWriter:
    def test_parts_are_closed_by_time_soon_at_first_and_seldom_later(self, tmp_path: Path) -> None:
        folder, now = RunFolder(tmp_path / "run"), [0.0]
        with folder.locked():
            writer = RowWriter(folder, clock=lambda: now[0])
            sizes = []
            for second in range(1, 1000):
                now[0] = float(second)
                before = len(list((folder.path / "parts").iterdir()))
                writer.add(table_of([row(str(second), 1.0)], ROWS))
                if len(list((folder.path / "parts").iterdir())) > before:
                    sizes.append(second)
            writer.close()
        gaps = np.diff([0, *sizes])
        assert gaps[0] == 2
        assert gaps[-1] == 30
        assert all(gap <= max(2, second / 10 + 1) for gap, second in zip(gaps, sizes, strict=True))
        ids = [id for part in folder.parts() for id in part.column("id").to_pylist()]
        assert ids == [str(second) for second in range(1, 1000)]

"""score(): which rows there are, what is asked again, and what a bad sample, metric or folder costs."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import stat
import tempfile
import warnings
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from classes import LOADED
from counting import Brightness, Difference, Wordiness, gray, gray_files

from diffsynth_metrics import CLIPMetric, ModelConfig, UnifiedReward2Metric, UnifiedRewardEditMetric
from diffsynth_metrics.base import BaseMetric, ImageMetric
from diffsynth_metrics.errors import ServerError
from diffsynth_metrics.evaluation import (
    Results,
    Sample,
    SampleSet,
    read_samples,
    sample_scoring,
    score,
)
from diffsynth_metrics.evaluation.fingerprint import CHANGES_SCORES, INERT, fingerprint_of
from diffsynth_metrics.evaluation.run_folder import ROWS, RowWriter, RunFolder
from diffsynth_metrics.testing import ScriptedEngine

COLUMNS = [
    "id", "prompt_id", "seed", "category", "prompt", "image", "sources", "image_sha256", "metric",
    "score", "components", "error_type", "error", "metric_version", "weights", "config",
    "fingerprint", "key", "device", "torch", "threads", "seconds", "run_id",
]  # fmt: skip


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return gray_files(tmp_path / "pictures", 10)


def scores(results: Results, label: str = "Brightness") -> dict[str, float]:
    frame = results.to_pandas()
    frame = frame[frame["metric"] == label]
    return dict(zip(frame["id"], frame["score"], strict=True))


def parts(out: Path) -> list[Path]:
    return sorted((out / "parts").glob("*.parquet"))


class TestRows:
    def test_a_row_has_the_score_and_everything_that_made_it(self, tmp_path: Path) -> None:
        file = tmp_path / "x.png"
        gray(file, 7)
        sample = Sample("x", "a red circle", file, (), "p1", "3", "shapes")
        metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
        frame = score([sample], metric, out=tmp_path / "run").to_pandas()
        assert list(frame.columns) == COLUMNS
        row = frame.iloc[0].to_dict()
        assert row["score"] == pytest.approx(metric.compute("a red circle", file)[0], rel=1e-5)
        assert (row["id"], row["prompt_id"], row["seed"], row["category"]) == ("x", "p1", "3", "shapes")
        assert (row["prompt"], row["image"], row["sources"]) == ("a red circle", str(file), [])
        assert (row["metric"], row["error_type"], row["error"]) == ("clip", None, None)
        components = json.loads(row["components"])
        assert components["score"] == pytest.approx(row["score"])
        assert {"cosine", "prompt_tokens", "truncated"} <= components.keys()
        assert row["weights"] == metric.provenance["weights"]
        assert json.loads(row["config"])["dtype"] == "float32"
        assert (row["device"], row["torch"]) == ("cpu", torch.__version__)
        assert row["threads"] == torch.get_num_threads()
        assert row["seconds"] > 0
        assert len(row["image_sha256"]) == len(row["key"]) == len(row["fingerprint"]) == 64

    def test_rows_come_in_the_order_of_samples_then_metrics(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        frame = score(samples[::-1], [Brightness, Wordiness], out=tmp_path / "run").to_pandas()
        assert list(frame["id"]) == [sample.id for sample in samples[::-1] for _ in range(2)]
        assert list(frame["metric"]) == ["Brightness", "Wordiness"] * 10

    def test_prompt_id_is_the_datas_or_the_prompts_or_the_samples(self, samples: list[Sample]) -> None:
        given = replace(samples[0], prompt_id="mine")
        bare = replace(samples[3], prompt=None)
        ids = list(score([given, *samples[1:3], bare], Brightness).to_pandas()["prompt_id"])
        assert ids[0] == "mine"
        assert ids[1].startswith("p-") and len(ids[1]) == 14
        assert ids[1] != ids[2]
        assert ids[3] == "s3"
        same = score([replace(samples[0], prompt="prompt 0")], Brightness).to_pandas()["prompt_id"][0]
        assert same == ids[1]

    def test_pictures_of_any_kind_are_known_by_their_content(self, tmp_path: Path) -> None:
        gray(tmp_path / "x.png", 100)
        picture = PIL.Image.open(tmp_path / "x.png")
        kinds = {
            "path": tmp_path / "x.png",
            "text": str(tmp_path / "x.png"),
            "bytes": (tmp_path / "x.png").read_bytes(),
            "file": (tmp_path / "x.png").open("rb"),
            "PIL": picture,
            "array": np.asarray(picture),
            "tensor": torch.full((3, 8, 8), 100, dtype=torch.uint8).float() / 255,
        }
        metric = Brightness()
        given = [Sample(name, None, image) for name, image in kinds.items()]
        first = score(given, metric, out=tmp_path / "run")
        assert set(first.to_pandas()["score"].round(3)) == {100.0}
        assert len(set(first.to_pandas()["image_sha256"][:4])) == 1
        score(given, metric, out=tmp_path / "run")
        assert metric.asked == len(kinds)
        other = PIL.Image.new("RGB", (8, 8), (101, 100, 100))
        score([Sample("PIL", None, other)], metric, out=tmp_path / "run")
        assert metric.asked == len(kinds) + 1
        kinds["file"].close()

    def test_names_that_are_not_unicode_are_kept_readable(self, tmp_path: Path) -> None:
        file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
        gray(Path(file), 1)
        metric = Brightness()
        for _ in range(2):
            results = score([Sample(file, "a\ud800", file)], metric, out=tmp_path / "run")
        assert scores(results) == {file.encode(errors="backslashreplace").decode(): 1.0}
        assert metric.asked == 1

    def test_texts_that_only_look_alike_in_a_file_are_told_apart(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        texts = ["a\ud800", "a\\ud800", "a\\\ud800", "a\\\\ud800", "a\\n", "a\\\\n"]
        by_id = [replace(samples[index], id=text) for index, text in enumerate(texts)]
        assert list(scores(score(by_id, Brightness)).values()) == list(range(len(texts)))
        out = tmp_path / "run"
        for text in texts:
            results = score([replace(samples[0], prompt=text)], Wordiness, out=out)
            refused = "\ud800" in text  # metrics take no prompt that is not Unicode
            expected = math.nan if refused else len(text)
            assert scores(results, "Wordiness")["s0"] == pytest.approx(expected, nan_ok=True)
            assert len(results.failures().rows) == refused
        assert scores(Results.open(out), "Wordiness") == {"s0": len(texts[-1])}
        kept = json.loads(score(by_id[:1], Quoting).to_pandas()["components"][0])
        assert kept["text"] == texts


class Quoting(Brightness):
    """Says texts that are hard to write to a file."""

    def evaluate(self, images: Any) -> Any:
        texts = ["a\ud800", "a\\ud800", "a\\\ud800", "a\\\\ud800", "a\\n", "a\\\\n"]
        return [{"score": 1.0, "text": texts} for _ in images]


class Returning(Brightness):
    """Returns what it is told to for each picture, or as a whole."""

    returned: Any = None

    def evaluate(self, images: Any) -> Any:
        self.count(images)
        if callable(self.returned):
            return self.returned(len(images))
        return [{"score": self.returned} for _ in images]


class TestWhatIsAskedAgain:
    def test_a_second_call_asks_nothing_and_writes_no_row(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        first = score(samples, metric, out=out)
        written = parts(out)
        second = score(samples, metric, out=out)
        assert metric.asked == 10
        assert parts(out) == written
        assert second.to_pandas().equals(first.to_pandas())

    def test_an_interrupted_run_keeps_its_rows_and_asks_only_the_rest(
        self, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sample_scoring, "_LARGEST_CHUNK", 2)
        for stop in (KeyboardInterrupt(), RuntimeError("out of memory")):
            metric, out = Brightness(), tmp_path / type(stop).__name__
            metric.stop = (4, stop)
            with pytest.raises(type(stop)):
                score(samples, metric, out=out)
            assert len(Results.open(out)) == 4
            assert Results.open(out).summary().records()[0]["missing"] == 6
            metric.stop = None
            results = score(samples, metric, out=out)
            assert metric.asked == 10
            assert list(scores(results).values()) == list(range(10))

    def test_a_changed_picture_asks_only_itself_and_the_old_one_back_asks_nothing(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        score(samples, metric, out=out)
        gray(samples[3].image, 200)
        assert scores(score(samples, metric, out=out))["s3"] == 200
        assert metric.asked == 11
        gray(samples[3].image, 3)
        results = score(samples, metric, out=out)
        assert metric.asked == 11
        assert scores(results)["s3"] == 3
        assert scores(Results.open(out)) == scores(results)

    def test_a_changed_prompt_asks_only_itself(self, tmp_path: Path, samples: list[Sample]) -> None:
        metric, out = Wordiness(), tmp_path / "run"
        score(samples, metric, out=out)
        samples[5] = replace(samples[5], prompt="a longer prompt")
        assert scores(score(samples, metric, out=out), "Wordiness")["s5"] == 5 + len("a longer prompt")
        assert metric.asked == 11

    def test_a_larger_a_shuffled_and_a_smaller_data_set_ask_only_what_is_new(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        score(samples[:6], metric, out=out)
        results = score(samples[::-1], metric, out=out)
        assert metric.asked == 10
        assert list(scores(results)) == [sample.id for sample in samples[::-1]]
        smaller = score(samples[2:5], metric, out=out)
        assert list(scores(smaller)) == ["s2", "s3", "s4"]
        assert len(score(samples, metric, out=out)) == 10
        assert metric.asked == 10

    def test_other_names_of_a_sample_ask_nothing_and_are_shown(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        score(samples, metric, out=out)
        moved = [
            replace(
                one, category="new", seed="9", prompt_id="p", image=one.image.rename(tmp_path / one.id)
            )
            for one in samples
        ]
        frame = score(moved, metric, out=out).to_pandas()
        assert metric.asked == 10
        assert set(frame["category"]) == {"new"} and set(frame["seed"]) == {"9"}
        assert list(frame["image"]) == [str(tmp_path / sample.id) for sample in samples]

    def test_other_weights_ask_everything_and_their_rows_count(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        out = tmp_path / "run"
        score(samples, Brightness(1), out=out)
        double = Brightness(2)
        assert scores(score(samples, double, out=out))["s4"] == 8
        assert double.asked == 10
        again = Brightness(1)
        assert scores(score(samples, again, out=out))["s4"] == 4
        assert again.asked == 0

    def test_another_dtype_asks_everything(self, tmp_path: Path, samples: list[Sample]) -> None:
        metric, out = Brightness(), tmp_path / "run"
        score(samples, metric, out=out)
        metric.to(dtype=torch.bfloat16)
        score(samples, metric, out=out)
        assert metric.asked == 20

    def test_without_resume_everything_is_asked_and_the_new_rows_count(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        first = score(samples, metric, out=out).to_pandas()
        second = score(samples, metric, out=out, resume=False).to_pandas()
        assert metric.asked == 20
        assert len(second) == 10
        assert set(first["run_id"]).isdisjoint(second["run_id"])

    def test_rows_of_a_picture_that_has_changed_since_do_not_count(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        out = tmp_path / "run"
        score(samples, [Brightness, Wordiness], out=out)
        gray(samples[0].image, 99)
        results = score(samples, Brightness, out=out)
        assert "s0" not in scores(results, "Wordiness")
        assert len(scores(results, "Wordiness")) == 9
        by_label = {row["metric"]: row["missing"] for row in results.summary().records()}
        assert by_label == {"Brightness": 0, "Wordiness": 1}

    def test_a_missing_file_that_appears_is_scored(self, tmp_path: Path, samples: list[Sample]) -> None:
        metric, out = Brightness(), tmp_path / "run"
        contents = samples[2].image.read_bytes()
        samples[2].image.unlink()
        assert math.isnan(scores(score(samples, metric, out=out))["s2"])
        score(samples, metric, out=out)
        assert metric.asked == 9
        samples[2].image.write_bytes(contents)
        assert scores(score(samples, metric, out=out))["s2"] == 2
        assert metric.asked == 10

    def test_another_failure_of_a_file_gets_its_own_reason(
        self, tmp_path: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
    ) -> None:
        metrics, out = [Brightness(), Wordiness()], tmp_path / "run"
        file = samples[2].image
        moved = [*samples[:2], replace(samples[2], image=tmp_path / "gone.png"), *samples[3:]]
        file.unlink()
        results = score(samples, metrics, out=out)
        assert [str(file) in row[3] for row in results.failures().rows] == [True, True]
        written = parts(out)
        score(samples, metrics, out=out)
        assert parts(out) == written  # the same reason
        for given, reason in ((moved, "gone.png"), (samples, str(file))):
            results = score(given, metrics, out=out)
            assert [reason in row[3] for row in results.failures().rows] == [True, True]
            assert scores(Results.open(out)).keys() == {sample.id for sample in samples}
        file.mkdir()
        assert "is a folder" in score(samples, metrics, out=out).failures().rows[0][3]
        assert [metric.asked for metric in metrics] == [9, 9]
        assert "no score at all" not in caplog.text

    def test_a_picture_that_is_broken_is_not_written_again(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        samples[1].image.write_bytes(b"no picture")
        samples[4].image.write_bytes(samples[4].image.read_bytes()[:45])
        samples[5] = replace(samples[5], prompt=None)
        metric, out = Wordiness(), tmp_path / "run"
        score(samples, metric, out=out)
        written = parts(out)
        score(samples, metric, out=out)
        assert parts(out) == written

    def test_an_argument_that_is_an_attribute_changes_the_scores(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        class Scaled(Brightness):
            def __init__(self, scale: float = 1.0) -> None:
                super().__init__()
                self.scale = scale

            def components(self, images: Any) -> Any:
                return {"score": super().components(images)["score"] * self.scale}

        metric, out = Scaled(), tmp_path / "run"
        score(samples, metric, out=out)
        metric.scale = 2.0
        assert scores(score(samples, metric, out=out), "Scaled")["s4"] == 8
        score(samples, metric, out=out)
        assert metric.asked == 20


class TestBadSamples:
    def test_each_costs_its_own_row_and_is_named_once(
        self, tmp_path: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
    ) -> None:
        samples[1].image.write_bytes(b"no picture")
        samples[4].image.write_bytes(samples[4].image.read_bytes()[:45])
        samples[6].image.unlink()
        results = score(samples, [Brightness, Wordiness], out=tmp_path / "run")
        frame = results.to_pandas()
        failed = frame[frame["score"].isna()]
        assert list(failed["id"]) == ["s1", "s1", "s4", "s4", "s6", "s6"]
        assert set(failed["error_type"]) == {"ImageError", "FileNotFoundError"}
        for _, row in failed.iterrows():
            assert row["image"] in row["error"]
        assert frame["error"].isna().sum() == 14
        for index in (1, 4, 6):
            assert caplog.text.count(f"no score: {samples[index].image}") + caplog.text.count(
                f"no score: there is no file '{samples[index].image}'"
            ) == 1  # fmt: skip
        assert [row[0] for row in results.failures().rows[::2]] == ["s1", "s4", "s6"]

    def test_all_others_are_scored_in_few_calls(self, tmp_path: Path) -> None:
        samples = gray_files(tmp_path / "pictures", 64)
        samples[20].image.write_bytes(b"no picture")
        metric = Brightness()
        results = score(samples, metric)
        assert results.to_pandas()["score"].notna().sum() == 63
        assert len(metric.chunks) < 20

    def test_the_log_stays_readable_where_all_fail(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        missing = [Sample(f"s{index}", None, tmp_path / f"{index}.png") for index in range(300)]
        with caplog.at_level(logging.WARNING):
            results = score(missing, [Brightness, Wordiness])
        named = [record for record in caplog.records if "no score: there is no file" in record.message]
        assert len(named) == 20
        assert caplog.text.count("Results.failures() lists them all") == 1
        assert len(results.failures().rows) == 600

    def test_what_no_picture_has_is_said(self, samples: list[Sample]) -> None:
        bad = [
            replace(samples[0], prompt=None),
            replace(samples[1], prompt="nothing"),
            replace(samples[2], image=torch.full((3, 4, 4), 300.0)),
            replace(samples[3], image=object()),
        ]
        frame = score(bad, Wordiness).to_pandas()
        assert frame["score"].isna().all()
        assert f"{samples[0].image} has no prompt" in frame["error"][0]
        assert frame["error"][1] == "the score is not a finite number"
        assert json.loads(frame["components"][1]) == {"score": None, "length": None}
        assert "the picture of sample 's2': a float image must lie in 0..1" in frame["error"][2]
        assert "the picture of sample 's3' must be a PIL image" in frame["error"][3]

    def test_a_prompt_is_missed_only_where_it_is_needed(self, samples: list[Sample]) -> None:
        assert score([replace(samples[0], prompt=None)], Brightness).to_pandas()["error"][0] is None

    def test_raise_stops_at_the_first_and_keeps_the_rows_before_it(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        samples[7].image.write_bytes(b"no picture")
        with pytest.raises(ValueError, match=f"{samples[7].image} cannot be read"):
            score(samples, metric, out=out, on_error="raise")
        assert list(scores(Results.open(out))) == [f"s{index}" for index in range(7)]
        score(samples, metric, out=out)
        with pytest.raises(ValueError, match="cannot be read"):  # though it has a row now
            score(samples, metric, out=out, on_error="raise")

    def test_a_metric_that_scores_nothing_is_warned_of(
        self, samples: list[Sample], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            results = score([replace(one, prompt="nothing") for one in samples], Wordiness)
        assert results.summary().records()[0]["failed"] == 10
        assert "Wordiness gave no score at all" in caplog.text

    def test_broken_weights_are_no_samples_fault(
        self, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffsynth_metrics.errors import CheckpointError

        metric = Brightness()
        metric.stop = (0, CheckpointError("weights hold NaN"))
        with pytest.raises(CheckpointError):
            score(samples, metric, out=tmp_path / "run")
        assert len(Results.open(tmp_path / "run")) == 0


class TestSources:
    @pytest.fixture
    def edits(self, tmp_path: Path, samples: list[Sample]) -> list[Sample]:
        sources = gray_files(tmp_path / "sources", 4, start=50)
        return [
            replace(sample, sources=(source.image,))
            for sample, source in zip(samples, sources, strict=False)
        ]

    def test_a_changed_source_asks_only_itself_where_it_is_used(
        self, tmp_path: Path, edits: list[Sample]
    ) -> None:
        difference, alone, out = Difference(), Brightness(), tmp_path / "run"
        results = score(edits, [difference, alone], out=out)
        assert scores(results, "Difference") == {f"s{index}": -50.0 for index in range(4)}
        assert results.to_pandas()["sources"][0] == [str(edits[0].sources[0])]
        gray(edits[2].sources[0], 100)
        results = score(edits, [difference, alone], out=out)
        assert scores(results, "Difference")["s2"] == -98
        assert (difference.asked, alone.asked) == (5, 4)
        assert scores(Results.open(out), "Difference") == scores(results, "Difference")

    def test_what_is_wrong_with_a_source_is_said_of_the_source(
        self, tmp_path: Path, edits: list[Sample]
    ) -> None:
        edits[0].sources[0].write_bytes(b"no picture")
        edits[1].sources[0].unlink()
        edits[2] = replace(edits[2], sources=())
        frame = score(edits, [Difference, Brightness]).to_pandas()
        errors = list(frame[frame["metric"] == "Difference"]["error"])
        assert errors[0].startswith(f"{edits[0].sources[0]} cannot be read")
        assert f"there is no file '{edits[1].sources[0]}'" in errors[1]
        assert "needs one source image per sample, and sample 's2' has none" in errors[2]
        assert errors[3] is None
        assert frame[frame["metric"] == "Brightness"]["error"].isna().all()


class TestMetrics:
    def test_names_classes_objects_and_mappings_are_metrics(
        self, tiny: Any, samples: list[Sample]
    ) -> None:
        for given, labels in (
            ("shapes", ["shapes"]),
            (["Shapes", f"pickscore={tiny('pickscore')}"], ["shapes", "pickscore"]),
            (Brightness, ["Brightness"]),
            ([Brightness(), Wordiness], ["Brightness", "Wordiness"]),
            ({"one": Brightness(1), "two": Brightness(2)}, ["one", "two"]),
        ):
            assert list(score(samples[:1], given).metrics) == labels

    def test_what_is_asked_for_is_checked_before_anything_is_loaded(
        self, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*arguments: Any, **options: Any) -> Any:
            raise AssertionError("nothing is loaded")

        monkeypatch.setattr(Brightness, "from_pretrained", load)
        for metrics, error, message in (
            (["pikscore"], ValueError, "did you mean 'pickscore'"),
            ([Brightness, "pikscore"], ValueError, "did you mean 'pickscore'"),
            ([Brightness, Brightness], ValueError, "two metrics are called 'Brightness'"),
            ([Brightness, 3], TypeError, "a name, a class or a loaded metric, got 3"),
            ({"x/y": Brightness}, ValueError, "'x/y' cannot"),
            ({"a\0": Brightness}, ValueError, r"'a\\x00' cannot"),
            ({"\ud800": Brightness}, ValueError, r"'\\ud800' cannot"),
            ([], ValueError, "no metrics"),
            ([Brightness, "fid"], ValueError, "fid compares two sets"),
        ):
            with pytest.raises(error, match=message):
                score(samples, metrics, out=tmp_path / "run")
        for options, error in (
            ({"on_error": "skip"}, ValueError),
            ({"limit": 0}, ValueError),
            ({"batch_size": 0}, ValueError),
            ({"reference": tmp_path}, ValueError),
        ):
            with pytest.raises(error):
                score(samples, Brightness, out=tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()

    def test_samples_are_checked_first(self, tmp_path: Path, samples: list[Sample]) -> None:
        for given, error, message in (
            ([], ValueError, "no samples"),
            (SampleSet([]), ValueError, "no samples"),
            ("data.csv", TypeError, "read_samples"),
            (["a.png"], TypeError, "item 0 of samples must be a Sample, got str"),
            ([samples[0], samples[1], samples[0]], ValueError, "2 samples are called 's0'"),
        ):
            with pytest.raises(error, match=message):
                score(given, Brightness, out=tmp_path / "run")
        for name, value in (
            ("id", 3), ("id", None), ("prompt", 3), ("prompt", b"a"), ("prompt", math.nan),
            ("sources", None), ("sources", "a.png"), ("seed", math.nan), ("category", 1.5),
            ("prompt_id", ["p"]),
        ):  # fmt: skip
            with pytest.raises(TypeError, match=f"^{name} of sample 1 must be"):
                score(
                    [samples[0], replace(samples[1], **{name: value})], Brightness, out=tmp_path / "run"
                )
        with pytest.raises(TypeError, match=r"pass list\(samples\).*generator"):
            score((one for one in samples), Brightness, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_numbers_are_seeds_too(self, samples: list[Sample]) -> None:
        frame = score([replace(samples[0], seed=np.int64(7))], Brightness).to_pandas()
        assert frame["seed"][0] == "7"

    def test_a_class_without_source_is_known_by_what_it_does(self) -> None:
        text = "class Mine(Brightness):\n    def components(self, images):\n        return {0}\n"
        found = []
        for factor in ("1.0", "1.0", "2.0"):
            names: dict[str, Any] = {"Brightness": Brightness, "__name__": "__main__"}
            exec(text.format("{'score': " + factor + "}"), names)
            mine = names["Mine"]()
            found.append(fingerprint_of(mine, mine.provenance))
        assert found[0] == found[1] != found[2]

    def test_a_class_that_does_not_know_its_weights_is_said(self, samples: list[Sample]) -> None:
        class Bare(ImageMetric):
            def components(self, images: Any) -> Any:
                return {}

        with pytest.raises(TypeError, match="pass a loaded Bare: its class has no default_model"):
            score(samples, [Brightness, Bare])

    def test_numbers_of_numpy_are_scores(self, samples: list[Sample]) -> None:
        for number in (np.float32(1.5), np.float64(1.5), np.int64(2), 2, 1.5):
            metric = Returning()
            metric.returned = number
            row = score(samples[:1], metric).to_pandas().iloc[0]
            assert row["score"] == number
            assert json.loads(row["components"]) == {"score": number}
        for number in (np.float32("inf"), -math.inf, np.float64("nan"), None):
            metric.returned = number
            row = score(samples[:1], metric).to_pandas().iloc[0]
            assert math.isnan(row["score"])
            assert row["error"] == "the score is not a finite number"

    def test_a_metric_that_returns_something_else_is_at_fault_and_not_its_samples(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        metric = Returning()
        for returned, message in (
            (lambda count: [1.0] * count, "a list of float"),
            (lambda count: None, "it returned NoneType"),
            (lambda count: ({"score": 1.0} for _ in range(count)), "it returned generator"),
            (lambda count: [{"value": 1.0}] * count, "it returned value and no 'score'"),
            (lambda count: [{}] * count, "it returned nothing and no 'score'"),
            ("3", "the score '3'"),
            ([3.0], r"the score \[3.0\]"),
            (10**400, "too large"),
        ):
            metric.returned = returned
            with pytest.raises(TypeError, match=f"^Returning.evaluate must return.*{message}"):
                score(samples, metric, out=tmp_path / "run")
        metric.returned = lambda count: [{"score": 1.0}] * (count + 1)
        with pytest.raises(RuntimeError, match="gave 5 rows to 4 samples"):
            score(samples, metric, out=tmp_path / "run")
        assert len(Results.open(tmp_path / "run")) == 0

    def test_each_is_freed_before_the_next_is_loaded(self, samples: list[Sample]) -> None:
        alive: list[Any] = []

        class First(Brightness):
            @classmethod
            def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
                assert not [metric for metric in alive if metric() is not None]
                metric = cls()
                metric.myself = metric  # as hooks and caches of real networks do
                alive.append(weakref.ref(metric))
                return metric

        class Second(First):
            pass

        score(samples, [First, Second])
        assert len(alive) == 2

    def test_options_go_to_what_is_loaded_and_not_to_the_callers_metric(
        self, samples: list[Sample]
    ) -> None:
        asked: dict[str, Any] = {}

        class Loaded(Brightness):
            @classmethod
            def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
                asked.update(options)
                return cls()

        own = Wordiness()
        before = own.batch_size
        score(samples, [Loaded, own], batch_size=3, device="cpu", dtype=torch.bfloat16)
        assert asked == {"batch_size": 3, "device": "cpu", "torch_dtype": torch.bfloat16}
        assert own.batch_size == before

    def test_limit_takes_the_first(self, samples: list[Sample]) -> None:
        assert list(scores(score(SampleSet(samples), Brightness, limit=3))) == ["s0", "s1", "s2"]

    def test_without_out_the_rows_are_in_memory(self, samples: list[Sample]) -> None:
        results = score(SampleSet(samples, source="data/mine.csv"), Brightness)
        assert (results.name, results.path, len(results)) == ("mine", None, 10)

    def test_the_first_rows_of_a_slow_metric_are_soon_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        written: list[tuple[float, int]] = []

        class Slow(Brightness):
            def count(self, images: Any) -> None:
                super().count(images)
                now[0] += 0.03 * len(images)

        def append(folder: RunFolder, rows: Any) -> None:
            written.append((now[0], rows.num_rows))

        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr(sample_scoring, "time", clock)
        monkeypatch.setattr(sample_scoring, "RowWriter", partial(RowWriter, clock=clock.monotonic))
        monkeypatch.setattr(RunFolder, "append", append)
        metric = Slow()
        score(gray_files(tmp_path / "pictures", 256), metric, out=tmp_path / "run")
        seconds, rows = zip(*written, strict=True)
        assert metric.chunks[0] == 4
        assert seconds[0] < 3
        assert rows[0] == pytest.approx(seconds[0] / 0.03)  # all that was scored until then
        assert max(np.diff(seconds)) < 3

    def test_memory_is_bounded_by_number_and_by_bytes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        samples = gray_files(tmp_path / "pictures", 40)
        monkeypatch.setattr(sample_scoring, "_LARGEST_CHUNK", 8)
        metric = Brightness()
        score(samples, metric)
        assert max(metric.chunks) == 8
        size = samples[0].image.stat().st_size
        monkeypatch.setattr(sample_scoring, "_CHUNK_BYTES", 3 * size - 20)
        metric = Brightness()
        score(samples, metric)
        assert max(metric.chunks) == 3


class Crop:
    """A transform with the repr that Python gives to objects."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"<Crop object at {hex(id(self))}, size {self.size}>"


class TestFingerprint:
    def test_every_field_of_a_provenance_is_classified(self, metrics: Any) -> None:
        assert not CHANGES_SCORES & INERT
        loaded: list[BaseMetric] = [metrics(name) for name in LOADED]
        loaded.append(UnifiedReward2Metric(ScriptedEngine("")))
        for metric in loaded:
            unknown = metric.provenance.keys() - CHANGES_SCORES - INERT
            assert not unknown, f"say in fingerprint.py whether {unknown} of {metric} changes the score"

    def test_only_what_changes_scores_changes_it(self, tiny: Any) -> None:
        def made(**options: Any) -> str:
            metric = CLIPMetric.from_pretrained(ModelConfig(path=tiny("clip")), device="cpu", **options)
            return fingerprint_of(metric, metric.provenance)

        plain = made()
        assert made(cache_text=True) == plain
        assert made(batch_size=1) == plain
        assert made(max_length=10) != plain
        assert made(torch_dtype=torch.bfloat16) != plain

    def test_options_of_a_metric_that_was_built_by_hand_change_it(self, metrics: Any) -> None:
        def fingerprint(metric: BaseMetric) -> str:
            return fingerprint_of(metric, metric.provenance)

        judges = [
            UnifiedRewardEditMetric(ScriptedEngine(""), **options)
            for options in ({}, {"on_parse_error": "raise"}, {"task": "edit_pointwise_quality"})
        ]
        usual, strict, other = map(fingerprint, judges)
        assert usual == strict != other
        clip = metrics("clip")
        short, long = (CLIPMetric(clip.model, clip.processor, max_length=length) for length in (8, 9))
        assert fingerprint(short) != fingerprint(long)

    def test_unknown_fields_change_it(self) -> None:
        metric = Brightness()
        known = metric.provenance
        assert fingerprint_of(metric, {**known, "new": 1}) != fingerprint_of(metric, known)
        assert fingerprint_of(metric, {**known, "version": "9"}) == fingerprint_of(metric, known)

    def test_addresses_do_not_change_it(self) -> None:
        metric = Brightness()
        crops = (Crop(8), Crop(8), Crop(9))
        made = [{**metric.provenance, "preprocessing": repr(crop)} for crop in crops]
        assert made[0] != made[1]
        assert fingerprint_of(metric, made[0]) == fingerprint_of(metric, made[1])
        assert fingerprint_of(metric, made[0]) != fingerprint_of(metric, made[2])

    def test_classes_of_one_name_are_told_apart(self) -> None:
        class Other(Brightness):
            pass

        Other.__qualname__ = Brightness.__qualname__
        own = Brightness()
        assert fingerprint_of(Other(), own.provenance) != fingerprint_of(own, own.provenance)


class TestJudges:
    ANSWER = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2"

    def test_an_unreadable_answer_is_a_row_with_its_text(self, samples: list[Sample]) -> None:
        engine = ScriptedEngine(self.ANSWER, "I cannot say.")
        frame = score(samples[:2], UnifiedReward2Metric(engine)).to_pandas()
        assert frame["score"][0] == 3
        assert math.isnan(frame["score"][1])
        assert frame["error_type"][1] == "AnswerError"
        assert json.loads(frame["components"][1])["raw_text"] == "I cannot say."

    def test_kept_answers_are_read_by_a_newer_reader_without_asking(
        self, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine, out = ScriptedEngine(self.ANSWER), tmp_path / "run"
        metric = UnifiedReward2Metric(engine)
        first = score(samples, metric, out=out)
        assert metric.engine is engine
        assert len(engine.questions) == 10
        assert list((out / "answers" / "unified_reward_2").rglob("*.json"))
        monkeypatch.setattr("diffsynth_metrics.judges.metric.READER", 1_000)
        again = score(samples, metric, out=out)
        assert len(engine.questions) == 10
        assert set(first.to_pandas()["fingerprint"]).isdisjoint(again.to_pandas()["fingerprint"])
        assert set(scores(again, "unified_reward_2").values()) == {3.0}

    def test_an_engine_with_a_network_of_the_callers_is_asked(self, samples: list[Sample]) -> None:
        engine = ScriptedEngine(self.ANSWER)
        engine.model = torch.nn.Linear(1, 1)
        results = score(samples[:2], UnifiedReward2Metric(engine))
        assert set(scores(results, "unified_reward_2").values()) == {3.0}

    def test_the_engine_comes_back_when_scoring_fails(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        def fail(question: Any) -> str:
            raise RuntimeError("the server is gone")

        engine = ScriptedEngine(fail)
        metric = UnifiedReward2Metric(engine)
        with pytest.raises(RuntimeError, match="the server is gone"):
            score(samples, metric, out=tmp_path / "run")
        assert metric.engine is engine

    def test_a_server_that_answers_nothing_ends_the_run(self, tmp_path: Path) -> None:
        def gone(question: Any) -> str:
            raise ServerError("check that it runs")

        engine = ScriptedEngine(gone)
        engine.batch_size = 2
        samples = gray_files(tmp_path / "pictures", 40)
        with pytest.raises(ServerError, match="check that it runs"):
            score(samples, UnifiedReward2Metric(engine), out=tmp_path / "run", progress=False)
        assert 0 < len(engine.questions) < 20  # once for a whole chunk, and not for each in turn

    def test_what_could_not_be_answered_is_asked_again(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        from diffsynth_metrics.judges.engine import Answer

        out = tmp_path / "run"
        down = UnifiedReward2Metric(ScriptedEngine(Answer("", error="the server is gone")))
        frame = score(samples, down, out=out).to_pandas()
        assert frame["score"].isna().all()
        up = ScriptedEngine(self.ANSWER)
        results = score(samples, UnifiedReward2Metric(up), out=out)
        assert len(up.questions) == 10
        assert set(scores(results, "unified_reward_2").values()) == {3.0}


class TestSets:
    @pytest.fixture
    def fid(self, metrics: Any) -> Any:
        return metrics("fid")

    @pytest.fixture
    def distance(self, metrics: Any) -> Any:
        """Return a metric with statistics as FID's, whose tiny network is much smaller."""
        return metrics("fd_dinov2")

    @pytest.fixture
    def counted(self, fid: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many pictures went through the network, call by call."""
        counts: list[int] = []
        features = type(fid)._features

        def count(metric: Any, batch: np.ndarray) -> np.ndarray:
            counts.append(len(batch))
            return features(metric, batch)

        monkeypatch.setattr(type(fid), "_features", count)
        return counts

    def test_fid_takes_the_same_samples_and_keeps_what_it_made(
        self, tmp_path: Path, samples: list[Sample], fid: Any, counted: list[int]
    ) -> None:
        gray_files(tmp_path / "real", 8, start=100)
        out = tmp_path / "run"
        first = score(samples, [Brightness, fid], out=out, reference=tmp_path / "real")
        (result,) = first.sets
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = fid.compute(tmp_path / "real", [sample.image for sample in samples])
        assert result["score"] == pytest.approx(expected, rel=1e-6)
        assert (result["metric"], result["reference"]) == ("fid", str(tmp_path / "real"))
        assert (result["count"], result["reference_count"], result["skipped"]) == (10, 8, 0)
        assert "strongly biased" in result["warnings"][0]
        assert "fid: " in str(first)
        assert [row["metric"] for row in first.summary().records()] == ["Brightness"]
        counted.clear()
        assert score(samples, fid, out=out, reference=tmp_path / "real").sets == first.sets
        assert sum(counted) == 0
        gray(samples[0].image, 250)
        (changed,) = score(samples, fid, out=out, reference=tmp_path / "real").sets
        assert sum(counted) == 10  # and not the reference's
        assert changed["score"] != result["score"]
        assert Results.open(out).sets == [changed]
        gray_files(tmp_path / "real", 8, start=200)
        (other,) = score(samples, fid, out=out, reference=tmp_path / "real").sets
        assert other["score"] != changed["score"], "of the reference as it is now, and nothing else"

    def test_statistics_and_samples_are_references_too(
        self, tmp_path: Path, samples: list[Sample], distance: Any
    ) -> None:
        real = SampleSet(gray_files(tmp_path / "real", 8, start=100), source="real.csv")
        distance.statistics([sample.image for sample in real]).save(tmp_path / "real.npz")
        names = {}
        for reference in (tmp_path / "real.npz", real):
            (result,) = score(samples, distance, reference=reference).sets
            names[result["reference"]] = result["score"]
        assert [*names] == [str(tmp_path / "real.npz"), "real.csv"]
        assert len({round(value, 4) for value in names.values()}) == 1

    def test_pictures_that_cannot_be_read_are_counted_or_raise(
        self, tmp_path: Path, samples: list[Sample], distance: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        gray_files(tmp_path / "real", 8, start=100)
        samples[3].image.write_bytes(b"no picture")
        samples[4].image.unlink()
        results = score(samples, distance, reference=tmp_path / "real")
        (result,) = results.sets
        assert (result["count"], result["skipped"]) == (8, 2)
        assert str(samples[3].image) in caplog.text and str(samples[4].image) in caplog.text
        failures = results.failures()
        assert failures.rows == (
            ("s4", "fd_dinov2", str(samples[4].image), "the file could not be read"),
        )
        assert failures.notes == ("fd_dinov2 left out 2 pictures, which the log names",)
        for index in (4, 3):
            with pytest.raises((ValueError, FileNotFoundError), match=str(samples[index].image)):
                score(samples[3 : index + 1], distance, reference=tmp_path / "real", on_error="raise")

    def test_a_reference_is_checked_before_anything_is_loaded(
        self, tmp_path: Path, samples: list[Sample]
    ) -> None:
        (tmp_path / "x.txt").write_text("")
        for reference, error, message in (
            (None, ValueError, "pass reference="),
            (tmp_path / "gone", FileNotFoundError, "there is no reference"),
            (tmp_path / "x.txt", ValueError, r"a folder, samples, or an \.npz file"),
            ([1, 2], TypeError, "a folder, samples"),
        ):
            with pytest.raises(error, match=message):
                score(samples, "fid", reference=reference)


class TestFolders:
    def test_a_folder_that_cannot_be_written_to_is_said_before_loading(
        self, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Brightness, "from_pretrained", None)
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
            root = os.geteuid() == 0
            if root:
                os.seteuid(65534)
            try:
                with pytest.raises(PermissionError, match=r"^choose another out=.*denied"):
                    score(samples, Brightness, out=Path(folder) / "run")
            finally:
                if root:
                    os.seteuid(0)
                os.chmod(folder, stat.S_IRWXU)

    def test_a_file_in_place_of_the_folder_is_said(self, tmp_path: Path, samples: list[Sample]) -> None:
        (tmp_path / "run").write_text("")
        for out in (tmp_path / "run", tmp_path / "run" / "a"):
            with pytest.raises(OSError, match=r"^choose another out=: .*is not a folder"):
                score(samples, Brightness, out=out)

    def test_an_empty_name_is_no_folder(
        self, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        before = list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="the name is empty"):
            score(samples, Brightness, out="")
        assert list(tmp_path.iterdir()) == before

    def test_a_full_disk_loses_no_row_that_was_written(
        self, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        score(samples[:5], metric, out=out)
        real = os.fsync

        def full(descriptor: int) -> None:
            if "parts" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"make space.*No space left on device") as raised:
                score(samples, metric, out=out)
            assert raised.value.errno == errno.ENOSPC
        assert list(scores(Results.open(out))) == ["s0", "s1", "s2", "s3", "s4"]
        assert not list(out.rglob("*.tmp"))
        assert len(scores(score(samples, metric, out=out))) == 10
        assert metric.asked == 15  # five of them twice, whose rows could not be written

    def test_a_damaged_part_is_moved_aside_and_its_rows_are_made_again(
        self, tmp_path: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
    ) -> None:
        for damage in (_cut, _flip, _empty):
            metric, out = Brightness(), tmp_path / damage.__name__
            score(samples[:4], metric, out=out)
            score(samples, metric, out=out)
            first, second = parts(out)
            damage(first)
            caplog.clear()
            assert list(scores(Results.open(out))) == [f"s{index}" for index in range(4, 10)]
            assert str(first) in caplog.text
            results = score(samples, metric, out=out)
            assert metric.asked == 14
            assert list(scores(results).values()) == list(range(10))
            assert first.with_name(f"{first.name}.damaged").is_file() and second.is_file()
            assert score(samples, metric, out=out) and metric.asked == 14

    def test_one_process_writes_at_a_time(self, tmp_path: Path, samples: list[Sample]) -> None:
        out = tmp_path / "run"
        score(samples[:2], Brightness, out=out)
        with RunFolder(out).locked():
            with pytest.raises(BlockingIOError, match=f"another process is writing to {out}"):
                score(samples, Brightness, out=out)
            assert len(Results.open(out)) == 2  # reading is free
        assert len(score(samples, Brightness, out=out)) == 10

    def test_a_damaged_description_is_said(self, tmp_path: Path, samples: list[Sample]) -> None:
        metric, out = Brightness(), tmp_path / "run"
        score(samples, metric, out=out)
        (out / "run.json").write_text("{")
        with pytest.raises(ValueError, match=r"delete .*run\.json and score again"):
            score(samples, metric, out=out)
        (out / "run.json").unlink()
        assert len(score(samples, metric, out=out)) == 10
        assert metric.asked == 10

    def test_what_a_killed_writer_left_is_cleaned(self, tmp_path: Path, samples: list[Sample]) -> None:
        out = tmp_path / "run"
        score(samples, Brightness, out=out)
        left = out / "parts" / "000009.parquet.tmp"
        left.write_bytes(b"half")
        assert len(score(samples, Brightness, out=out)) == 10
        assert not left.exists()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file: Path) -> None:
    """Change one bit among the scores, which nothing but a checksum notices."""
    scores = pq.read_metadata(file).row_group(0).column(ROWS.get_field_index("score"))
    contents = bytearray(file.read_bytes())
    contents[scores.dictionary_page_offset + scores.total_compressed_size - 2] ^= 1
    file.write_bytes(contents)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def test_a_folder_that_has_shown_other_samples_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / name / "1.png")
    good, bad = ([Sample("1", "a red circle", tmp_path / name / "1.png")] for name in ("good", "bad"))
    for _ in range(2):
        score(good, ["shapes"], out=tmp_path / "run")
    assert not [record for record in caplog.records if "other samples" in record.message]
    score(bad, ["shapes"], out=tmp_path / "run")
    assert "1 of 1, such as '1', are not among those of this call" in caplog.text


def test_the_folder_of_the_pictures_is_no_run_folder(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a red circle")
    with pytest.raises(ValueError, match=r"choose another out=: .* is the folder of the pictures"):
        score(read_samples(tmp_path), ["shapes"], out=tmp_path)

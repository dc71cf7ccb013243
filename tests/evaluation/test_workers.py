"""score(workers=...): what dies costs its task only, and the rows are those of one process."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counting import Brightness, Counting, Deadly, Difference, Wordiness, gray, gray_files

from diffsynth_metrics import UnifiedReward2Metric
from diffsynth_metrics.cli import DONE, FAILURES_RECORDED, USAGE, main
from diffsynth_metrics.evaluation import Results, Sample, score, scoring, set_scoring, workers
from diffsynth_metrics.evaluation.run_folder import RunFolder, Share
from diffsynth_metrics.judges.server import ServerEngine
from diffsynth_metrics.testing import ScriptedEngine


class Died(Exception):
    """A worker is no more."""


class FakeWorker:
    """A worker in this process, which can die. All have one metric, as real ones have copies."""

    died = (Died,)
    started = 0
    tasks = 0
    before: Callable[[Any], None] = staticmethod(lambda task: None)
    """Called with each task before it is done; raises Died, or what a task raises."""

    def __init__(self, number: int, job: bytes, count: int) -> None:
        FakeWorker.started += 1
        workers.begin(job, (None, None))

    def submit(self, task: bytes) -> Future[bytes]:
        future: Future[bytes] = Future()
        opened = pickle.loads(task)
        FakeWorker.tasks += opened.method != "facts"
        try:
            FakeWorker.before(opened)
            future.set_result(workers.work(task))
        except Died as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    monkeypatch.setattr(FakeWorker, "started", 0)
    monkeypatch.setattr(FakeWorker, "tasks", 0)
    monkeypatch.setattr(FakeWorker, "before", staticmethod(lambda task: None))
    monkeypatch.setattr(scoring, "ProcessWorker", FakeWorker)
    return FakeWorker


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return gray_files(tmp_path / "pictures", 40)


def scores(results: Results) -> dict[tuple[str, str], float]:
    frame = results.to_pandas()
    return {
        (row.id, row.metric): round(row.score, 5) for row in frame.itertuples() if not row.error_type
    }


def keys(out: Path) -> list[str]:
    return [key for part in RunFolder(out).parts() for key in part.column("key").to_pylist()]


class TestWorkers:
    def test_rows_and_what_is_asked_are_those_of_one_process(
        self, tmp_path: Path, samples: list[Sample], fake: type[FakeWorker]
    ) -> None:
        samples = [replace(one, sources=(samples[0].image,)) for one in samples]
        samples[3].image.write_bytes(b"no picture")
        samples[4].image.unlink()
        samples[5] = replace(samples[5], prompt="nothing")
        metrics = [Brightness, Wordiness, Difference]
        alone = score(samples, metrics, out=tmp_path / "alone")
        several = score(samples, metrics, out=tmp_path / "several", workers=3)
        assert scores(several) == scores(alone)
        assert several.failures().rows == alone.failures().rows
        assert fake.tasks > 9
        samples_of = [
            # Without the stamps: those of files that were only just written are empty.
            RunFolder(tmp_path / name).read_samples().drop_columns("stamps")
            for name in ("alone", "several")
        ]
        assert samples_of[0].equals(samples_of[1])
        # Whoever goes on, nothing is made twice; a worker makes what has changed.
        gray(samples[3].image, 200)
        score(samples, metrics, out=tmp_path / "several")
        gray(samples[4].image, 201)
        results = score(samples, metrics, out=tmp_path / "several", workers=2)
        assert len(scores(results)) == 3 * 40 - 1
        assert len(keys(tmp_path / "several")) == 3 * 40 + 3 + 3

    def test_a_batch_of_a_dead_worker_is_scored_by_another(
        self,
        tmp_path: Path,
        samples: list[Sample],
        fake: type[FakeWorker],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def dies_twice(task: Any) -> None:
            if task.method == "score" and fake.tasks in (2, 4):
                fake.tasks += 1
                raise Died("killed by signal 9")

        monkeypatch.setattr(fake, "before", staticmethod(dies_twice))
        with caplog.at_level(logging.WARNING):
            results = score(samples, Brightness, out=tmp_path / "run", workers=2)
        assert len(scores(results)) == len(set(keys(tmp_path / "run"))) == len(keys(tmp_path / "run"))
        assert len(scores(results)) == 40
        assert fake.started == 4
        assert "killed by signal 9" in caplog.text and "'s" in caplog.text

    def test_what_ends_every_worker_stops_the_run_and_is_named(
        self,
        tmp_path: Path,
        samples: list[Sample],
        fake: type[FakeWorker],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def deadly(task: Any) -> None:
            if task.method == "score" and any(one.id == "s20" for one in task.arguments[0]):
                raise Died("out of memory")

        monkeypatch.setattr(fake, "before", staticmethod(deadly))
        out = tmp_path / "run"
        with pytest.raises(
            RuntimeError, match=r"smaller batch_size.*samples 's\d+' to 's\d+' ended 3 .*out of memory"
        ):
            score(samples, Brightness, out=out, workers=2)
        monkeypatch.setattr(fake, "before", staticmethod(lambda task: None))
        kept = len(keys(out))
        assert 0 < kept < 40
        assert len(scores(score(samples, Brightness, out=out, workers=3))) == len(keys(out)) == 40

    def test_a_worker_that_cannot_even_begin_is_said(
        self, samples: list[Sample], fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(task: Any) -> None:
            raise Died("it ended")

        monkeypatch.setattr(fake, "before", staticmethod(never))
        with pytest.raises(RuntimeError, match=r"if __name__ == '__main__'.*it ended"):
            score(samples, Brightness, workers=2)

    def test_too_little_memory_is_raised_and_the_rows_before_it_are_kept(
        self, tmp_path: Path, samples: list[Sample], fake: type[FakeWorker]
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        metric.stop = (12, MemoryError("no memory left"))
        with pytest.raises(MemoryError, match="no memory left") as raised:
            score(samples, metric, out=out, workers=2)
        assert "in a worker" in str(raised.value.__cause__)
        assert 0 < len(keys(out)) <= 16
        assert len(scores(score(samples, Brightness, out=out, workers=2))) == len(keys(out)) == 40

    def test_a_full_disk_stops_and_loses_no_row_that_was_written(
        self,
        tmp_path: Path,
        samples: list[Sample],
        fake: type[FakeWorker],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out, real = tmp_path / "run", os.fsync
        score(samples[:10], Brightness, out=out, workers=2)

        def full(descriptor: int) -> None:
            if "parts" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="make space"):
                score(samples, Brightness, out=out, workers=2)
        assert len(keys(out)) == 10
        assert len(scores(score(samples, Brightness, out=out, workers=2))) == len(keys(out)) == 40

    def test_a_worker_without_the_pictures_stops_the_run(
        self,
        tmp_path: Path,
        samples: list[Sample],
        fake: type[FakeWorker],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        read, seen = workers.work, tmp_path / "pictures"

        def elsewhere(task: bytes) -> bytes:
            os.rename(seen, tmp_path / "unmounted")
            try:
                return read(task)
            finally:
                os.rename(tmp_path / "unmounted", seen)

        monkeypatch.setattr(workers, "work", elsewhere)
        with pytest.raises(RuntimeError, match=r"mount the pictures.*pictures/00\d\d\.png is there"):
            score(samples, Brightness, out=tmp_path / "run", workers=2)
        assert keys(tmp_path / "run") == []

    def test_pictures_that_are_nowhere_are_rows_with_the_reason_and_come_back(
        self, tmp_path: Path, samples: list[Sample], fake: type[FakeWorker]
    ) -> None:
        os.rename(tmp_path / "pictures", tmp_path / "away")
        lost = score(samples, Brightness, out=tmp_path / "run", workers=2)
        assert len(lost.failures().rows) == 40
        assert {row.error_type for row in lost.to_pandas().itertuples()} == {"FileNotFoundError"}
        os.rename(tmp_path / "away", tmp_path / "pictures")
        back = score(samples, Brightness, out=tmp_path / "run", workers=2)
        assert len(scores(back)) == 40

    def test_workers_with_other_weights_are_refused(
        self, samples: list[Sample], fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Other(FakeWorker):
            def __init__(self, number: int, job: bytes, count: int) -> None:
                opened = pickle.loads(job)
                metric = replace(opened.metric, metric=Brightness(weight=1.0 + number))
                super().__init__(number, pickle.dumps(replace(opened, metric=metric)), count)

        monkeypatch.setattr(scoring, "ProcessWorker", Other)
        with pytest.raises(RuntimeError, match=r"same weights.*they differ in"):
            score(samples, Brightness, workers=2)

    def test_raise_stops_and_the_log_of_workers_is_heard(
        self,
        tmp_path: Path,
        samples: list[Sample],
        fake: type[FakeWorker],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        samples[7].image.write_bytes(b"no picture")
        with pytest.raises(ValueError, match=f"{samples[7].image} cannot be read"):
            score(samples, Brightness, out=tmp_path / "run", on_error="raise", workers=2)
        assert "s7" not in Results.open(tmp_path / "run").to_pandas()["id"].tolist()
        score(samples, Brightness, out=tmp_path / "run", workers=2)
        assert caplog.text.count(f"no score: {samples[7].image}") == 1

    def test_what_cannot_be_sent_is_said(self, samples: list[Sample], fake: type[FakeWorker]) -> None:
        class Local(Brightness):
            pass

        with pytest.raises(TypeError, match=r"pass a name, or a class .*'Local' cannot be sent"):
            score(samples, Local, workers=2)
        with samples[0].image.open("rb") as opened:
            with pytest.raises(TypeError, match=r"pass pictures as paths.*samples 's0'"):
                score([replace(samples[0], image=opened)], Brightness, workers=2)

    def test_workers_may_be_in_another_folder(
        self,
        tmp_path: Path,
        samples: list[Sample],
        fake: type[FakeWorker],
        tiny: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "weights").symlink_to(tiny("clip"))
        monkeypatch.chdir(tmp_path)
        given = [
            replace(samples[0], image=Path("pictures/0000.png")),
            replace(samples[1], image="pictures/0001.png", sources=("pictures/0000.png",)),
        ]
        work = workers.work

        def elsewhere(task: bytes) -> bytes:
            os.chdir("/")
            try:
                return work(task)
            finally:
                os.chdir(tmp_path)

        monkeypatch.setattr(workers, "work", elsewhere)
        results = score(given, {"clip": "clip=weights", "b": Brightness}, workers=1, device="cpu")
        assert len(results) == 4 and not results.failures().rows
        assert results.to_pandas()["sources"].tolist()[2] == [str(samples[0].image)]

    def test_options_of_workers_are_checked_first(self, samples: list[Sample]) -> None:
        for options, message in (
            ({"workers": 0}, "a positive int"),
            ({"workers": True}, "a positive int"),
            ({"workers": "rank"}, "or 'ranks'"),
            ({"engine": "dask"}, "'processes' or 'ray'"),
            ({"engine": "ray"}, "how many actors"),
            ({"workers": 2, "gpus_per_worker": 1}, "go with engine='ray'"),
            ({"workers": 2, "address": "auto"}, "go with engine='ray'"),
            ({"workers": 2, "engine": "ray", "gpus_per_worker": -1}, "at least 0"),
            ({"workers": "ranks"}, "pass out="),
        ):
            with pytest.raises(ValueError, match=message):
                score(samples, Brightness, **options)

    def test_parts_are_in_order_whatever_the_clock_says(
        self,
        tmp_path: Path,
        samples: list[Sample],
        fake: type[FakeWorker],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out, real = tmp_path / "run", time.time
        for number, hours in enumerate((0, -72, 500, -9000)):
            monkeypatch.setattr(time, "time", lambda hours=hours: real() + hours * 3600)
            weight = Brightness(weight=1.0)
            score(samples, weight, out=out, resume=False, workers=2)
            for part in (out / "parts").iterdir():
                os.utime(part, (1e9 - number, 1e9 - number))
        ids = [part.column("run_id")[0].as_py() for part in RunFolder(out).parts()]
        assert len(set(ids)) == 4
        assert set(Results.open(out).to_pandas()["run_id"]) == {ids[-1]}


def test_judges_score_in_workers_and_keep_their_answers(
    tmp_path: Path, samples: list[Sample], fake: type[FakeWorker]
) -> None:
    answer = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2"
    judge, out = UnifiedReward2Metric(ScriptedEngine(answer)), tmp_path / "run"
    results = score(samples[:9], judge, out=out, workers=2)
    assert set(scores(results).values()) == {3.0}
    assert len(list((out / "answers").rglob("*.json"))) == 9
    asking = UnifiedReward2Metric(ServerEngine("http://127.0.0.1:9/v1", "judge", concurrency=8))
    assert pickle.loads(pickle.dumps(asking)).engine.concurrency == 8


class TestSets:
    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(set_scoring, "_BLOCK", 7)
        monkeypatch.setattr(set_scoring, "_READ_AT_ONCE", 5)

    def test_statistics_of_blocks_give_the_number_of_one_process(
        self,
        tmp_path: Path,
        metrics: Any,
        fake: type[FakeWorker],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        distance, samples = metrics("fd_dinov2"), gray_files(tmp_path / "pictures", 16)
        gray_files(tmp_path / "real", 9, start=100)
        samples[15].image.write_bytes(b"no picture")  # alone with s14 in its block
        samples[14].image.unlink()
        samples[3].image.unlink()
        (several,) = score(
            samples, distance, out=tmp_path / "run", reference=tmp_path / "real", workers=2
        ).sets
        monkeypatch.setattr(set_scoring, "_BLOCK", 1000)
        (alone,) = score(samples, distance, reference=tmp_path / "real").sets
        assert several["score"] == pytest.approx(alone["score"], rel=1e-6)
        assert (several["count"], several["skipped"]) == (alone["count"], alone["skipped"]) == (13, 3)
        assert several["reference_count"] == 9
        assert len(list((tmp_path / "run" / "statistics").iterdir())) == 2  # blocks are merged

    def test_a_killed_run_does_not_compute_its_blocks_again(
        self,
        tmp_path: Path,
        metrics: Any,
        fake: type[FakeWorker],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        samples = gray_files(tmp_path / "pictures", 21)
        metrics("fd_dinov2").statistics([samples[0].image, samples[1].image]).save(tmp_path / "real.npz")
        asked: list[int] = []

        def third(task: Any) -> None:
            if task.method == "statistics":
                asked.append(len(task.arguments[0]))
                if len(asked) == 3:
                    raise KeyboardInterrupt

        call = {"out": tmp_path / "run", "reference": tmp_path / "real.npz", "workers": 1}
        monkeypatch.setattr(fake, "before", staticmethod(third))
        with pytest.raises(KeyboardInterrupt):
            score(samples, metrics("fd_dinov2"), **call)
        (result,) = score(samples, metrics("fd_dinov2"), **call).sets
        assert asked == [7, 7, 7, 7]
        assert result["count"] == 21


class TestRanks:
    """Several processes that share a folder, here one after the other or at once."""

    @pytest.fixture
    def as_rank(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Results]:
        def call(rank: int, world: int, *arguments: Any, **options: Any) -> Results:
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            return score(*arguments, workers="ranks", **options)

        return call

    def test_shares_of_any_number_of_processes_make_one_run(
        self, tmp_path: Path, samples: list[Sample], as_rank: Callable[..., Results]
    ) -> None:
        metric, out = Brightness(), tmp_path / "run"
        assert len(as_rank(1, 8, samples, metric, out=out)) == 5
        assert len(as_rank(2, 3, samples, metric, out=out)) == 5 + 13 - 1
        done = score(samples, [metric, Wordiness()], out=out)
        assert metric.asked == len(samples)  # nothing twice
        assert scores(done) == scores(score(samples, [Brightness, Wordiness]))
        assert set(RunFolder(out).read_samples()["image_sha256"].to_pylist()) != {None}

    def test_processes_at_once_do_not_disturb_each_other(
        self, tmp_path: Path, samples: list[Sample], as_rank: Callable[..., Results]
    ) -> None:
        out = tmp_path / "run"
        with RunFolder(out, Share(1, 2)).locked():
            half = out / "parts" / "000001.1-00000000.parquet.tmp"
            half.write_bytes(b"the other is writing")
            as_rank(0, 2, samples, [Brightness, Wordiness], out=out)
            assert half.exists()
            for call in (
                lambda: as_rank(1, 2, samples, Brightness, out=out),
                lambda: score(samples, Brightness, out=out),
            ):
                with pytest.raises(BlockingIOError, match="another process is writing"):
                    call()
            # A slower process describes its metric when another has described a further one.
            folder = RunFolder(out, Share(1, 2))
            assert list(folder.read_description()["metrics"]) == ["Brightness", "Wordiness"]
        as_rank(1, 2, samples, Brightness, out=out)
        assert list(RunFolder(out).read_description()["metrics"]) == ["Brightness", "Wordiness"]
        assert len(score(samples, [Brightness, Wordiness], out=out)) == 80
        assert not half.exists()

    def test_a_run_of_one_process_keeps_ranks_out(
        self,
        tmp_path: Path,
        samples: list[Sample],
        as_rank: Callable[..., Results],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("diffsynth_metrics.evaluation.run_folder._LOCK_SECONDS", 0.0)
        with RunFolder(tmp_path / "run").locked():
            with pytest.raises(BlockingIOError, match="another process is writing"):
                as_rank(0, 2, samples, Brightness, out=tmp_path / "run")

    def test_srun_says_it_too_and_nobody_is_an_error(
        self, tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ValueError, match="start the processes with torchrun or srun"):
            score(samples, Brightness, out=tmp_path / "run", workers="ranks")
        for rank, world in (("5", "2"), ("-1", "2"), ("x", "2"), ("0", "0")):
            monkeypatch.setenv("SLURM_PROCID", rank)
            monkeypatch.setenv("SLURM_NTASKS", world)
            with pytest.raises(ValueError, match="SLURM_PROCID must be a number from 0 to SLURM_NTASKS"):
                score(samples, Brightness, out=tmp_path / "run", workers="ranks")
        monkeypatch.setenv("SLURM_PROCID", "3")
        monkeypatch.setenv("SLURM_NTASKS", "4")
        assert len(score(samples, Brightness, out=tmp_path / "run", workers="ranks")) == 10
        # Without workers="ranks", the environment of a training changes nothing.
        assert len(score(samples, Brightness, out=tmp_path / "other")) == 40

    def test_statistics_of_shares_merge_in_the_last_call(
        self,
        tmp_path: Path,
        metrics: Any,
        as_rank: Callable[..., Results],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(set_scoring, "_BLOCK", 7)
        distance, samples = metrics("fd_dinov2"), gray_files(tmp_path / "pictures", 16)
        call = {"reference": gray_files(tmp_path / "real", 9, start=100)}
        for rank in (1, 0):
            assert as_rank(rank, 2, samples, distance, out=tmp_path / "run", **call).sets == []
        asked: list[int] = []
        statistics = type(distance).statistics
        monkeypatch.setattr(
            type(distance),
            "statistics",
            lambda self, *a, **o: asked.append(1) or statistics(self, *a, **o),
        )
        (merged,) = score(samples, distance, out=tmp_path / "run", **call).sets
        assert asked == []
        (alone,) = score(samples, distance, **call).sets
        assert merged["score"] == pytest.approx(alone["score"], rel=1e-6)
        assert (merged["count"], merged["reference_count"]) == (16, 9)


def test_processes_score_and_one_that_is_killed_costs_its_batch_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = gray_files(tmp_path / "pictures", 200)
    metric: Counting = Deadly(tmp_path / "killed", after=10)
    with caplog.at_level(logging.WARNING):
        results = score(samples, metric, out=tmp_path / "run", workers=2, progress=False)
    assert metric.marker.exists() and "a worker died" in caplog.text
    assert {id: value for (id, _), value in scores(results).items()} == {
        f"s{index}": float(index) for index in range(200)
    }
    assert len(keys(tmp_path / "run")) == len(set(keys(tmp_path / "run"))) == 200
    assert set(results.to_pandas()["threads"]) == {max(1, workers.cpu_count() // 2)}
    assert metric.asked == 0  # the caller's own is left alone


def test_the_command_takes_workers_and_ranks(
    tmp_path: Path,
    fake: type[FakeWorker],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gray_files(tmp_path / "pictures", 6)
    (tmp_path / "pictures" / "0003.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "prompts.txt").write_text("a\nb\nc\nd\ne\nf\n")
    data = [str(tmp_path / "pictures"), "--prompts", str(tmp_path / "pictures" / "prompts.txt")]
    command = ["score", *data, "--metrics", "shapes", "--device", "cpu", "--json", "--out"]
    assert main([*command, str(tmp_path / "a"), "--workers", "2"]) == FAILURES_RECORDED
    assert fake.started == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    # torchrun would end the others if one of its processes told of failures by its exit code.
    assert main([*command, str(tmp_path / "b"), "--workers", "ranks"]) == DONE
    assert '"scored": 2' in capsys.readouterr().out
    assert main([*command, str(tmp_path / "b"), "--workers", "0"]) == USAGE
    assert main([*command, str(tmp_path / "b"), "--gpus-per-worker", "-1"]) == USAGE

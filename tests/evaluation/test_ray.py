"""score(engine="ray") on a cluster of this machine: an actor dies, the driver stops, others go on."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when Ray begins: no usage statistics, no warning about accelerators of later versions.
for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
    os.environ.setdefault(name, "0")
ray = pytest.importorskip("ray")

from counting import Brightness, Deadly, gray_files  # noqa: E402

from diffsynth_metrics.evaluation import Results, score, set_scoring  # noqa: E402
from diffsynth_metrics.evaluation.run_folder import RunFolder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=100_000_000,
        # pytest has put the folder of these tests on the path; a script's own is sent by Ray itself.
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
    )
    yield
    ray.shutdown()


def test_an_actor_dies_and_the_driver_stops_and_more_actors_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples, out = gray_files(tmp_path / "pictures", 200), tmp_path / "run"
    metric = Deadly(tmp_path / "killed", after=12)
    append, written = RunFolder.append, [0]

    def stopping(folder: RunFolder, rows: Any) -> None:
        if written[0] > 60:
            raise KeyboardInterrupt  # these rows are lost
        append(folder, rows)
        written[0] += rows.num_rows

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("diffsynth_metrics.evaluation.run_folder._ROWS_OF_PART", 8)
        patch.setattr(RunFolder, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            score(samples, metric, out=out, engine="ray", workers=2, progress=False)
    assert metric.marker.exists() and "a worker died" in caplog.text
    assert 60 < len(Results.open(out)) < 200
    results = score(samples, metric, out=out, engine="ray", workers=3, progress=False)
    frame = results.to_pandas()
    assert dict(zip(frame["id"], frame["score"].round(4), strict=True)) == {
        f"s{index}": float(index) for index in range(200)
    }
    keys = [key for part in RunFolder(out).parts() for key in part.column("key").to_pylist()]
    assert len(keys) == len(set(keys)) == 200
    assert ray.is_initialized()  # the caller's cluster is left alone
    assert score(samples, Brightness, out=out).summary().records()[0]["scored"] == 200


def test_statistics_and_errors_come_back_from_actors(
    tmp_path: Path, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_scoring, "_BLOCK", 7)
    samples, real = gray_files(tmp_path / "pictures", 10), gray_files(tmp_path / "real", 8, start=90)
    distance = metrics("fd_dinov2")
    (several,) = score(samples, distance, reference=real, engine="ray", workers=2).sets
    (alone,) = score(samples, distance, reference=real).sets
    assert several["score"] == pytest.approx(alone["score"], rel=1e-6)
    metric: Any = Brightness()
    metric.stop = (0, MemoryError("no memory left"))
    with pytest.raises(MemoryError, match="no memory left"):
        score(samples, metric, engine="ray", workers=1)


def test_a_dataset_of_ray_is_samples(tmp_path: Path) -> None:
    files = [one.image for one in gray_files(tmp_path / "pictures", 6)]
    rows = [{"image": str(file), "prompt": "a", "id": f"x{n}"} for n, file in enumerate(files)]
    ray.data.DataContext.get_current().enable_progress_bars = False
    results = score(ray.data.from_items(rows), Brightness, engine="ray", workers=1, limit=4)
    frame = results.to_pandas()
    assert sorted(zip(frame["id"], frame["score"].round(4), strict=True)) == [
        (f"x{n}", float(n)) for n in range(4)
    ]
    packed = ray.data.from_items([{"image": file.read_bytes()} for file in files])
    assert sorted(score(packed, Brightness).to_pandas()["score"].round(4)) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"name the column of pictures 'image'.*there are picture"):
        score(packed.rename_columns({"image": "picture"}), Brightness)

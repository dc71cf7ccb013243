"""The command: what it prints where, its exit codes, its errors, and its page in docs/."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import diffsynth_metrics
from diffsynth_metrics import cli, doctor, evaluation
from diffsynth_metrics.catalog import NAMES, load_metric
from diffsynth_metrics.cli import main, make_parser
from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, draw_shape
from diffsynth_metrics.errors import DownloadError
from diffsynth_metrics.evaluation.results import Results
from diffsynth_metrics.evaluation.run_folder import RunFolder
from diffsynth_metrics.evaluation.samples import Problem, Sample, SampleSet
from diffsynth_metrics.evaluation.tables import Table
from diffsynth_metrics.weights import published
from diffsynth_metrics.weights.published import Check

PAGE = Path(__file__).parents[1] / "docs" / "command.md"
COMMANDS = tuple(make_parser().commands)

Run = Callable[..., tuple[int, str, str]]
Done = subprocess.CompletedProcess[str]


def command_page() -> str:
    """Return docs/command.md: ``python tests/test_cli.py`` writes it."""
    parser = make_parser()
    introduction = (
        "# The command\n\n"
        "`diffsynth-metrics` and `python -m diffsynth_metrics` are the same. The result goes to\n"
        "stdout, as text or with `--json`; progress, the log and errors go to stderr. With `--json`,\n"
        'an error that stops a command is also on stdout, as `{"error": "..."}`; the exit code is the\n'
        "same. A wrong usage (exit code 2) has no JSON. What stdout cannot encode is written as an\n"
        "escape such as `\\u732b`.\n\n"
        "This page is what `--help` prints; `python tests/test_cli.py` writes it again.\n\n"
    )
    helps = [("diffsynth-metrics", parser.format_help())]
    helps += [(name, one.format_help()) for name, one in parser.commands.items()]
    return introduction + "\n".join(f"## {name}\n\n```text\n{text}```\n" for name, text in helps)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; returns its exit code and what it wrote to stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


def python(*argv: str, stdout: int = subprocess.PIPE, **variables: str) -> Done:
    """Run a new Python with some environment variables."""
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[1]), **variables}
    return subprocess.run(
        [sys.executable, *argv],
        text=True,
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=300,
    )


# Help


def test_the_page_about_the_command_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == command_page(), "run python tests/test_cli.py"


def test_every_command_has_help_with_an_example_that_is_right(run: Run) -> None:
    assert COMMANDS == (
        *("score", "check", "compare", "report", "fid"),
        *("metrics", "download", "verify", "doctor", "serve"),
    )
    for name in COMMANDS:
        code, out, err = run(name, "--help")
        assert (code, err) == (0, ""), name
        _, example = out.split("example:\n")
        (line,) = re.findall(r"^  diffsynth-metrics (.*)$", example, re.MULTILINE)
        assert make_parser().parse_args(shlex.split(line)).command == name
        assert max(map(len, out.splitlines())) <= 100, name


def test_help_version_and_usage_errors_import_nothing_heavy() -> None:
    for argv, code in (
        (["--help"], 0),
        (["--version"], 0),
        (["score", "--help"], 0),
        (["score", "data", "--metrics", "pikscore", "--out", "a"], 2),
    ):
        done = python(
            "-c",
            "import sys\nfrom diffsynth_metrics.cli import main\ncode = main(sys.argv[1:])\n"
            "heavy = {'torch', 'numpy', 'PIL', 'pandas', 'pyarrow', 'transformers'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else code)",
            *argv,
        )
        assert done.returncode == code, done.stderr


def test_the_module_is_the_command() -> None:
    done = python("-m", "diffsynth_metrics", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"diffsynth-metrics {diffsynth_metrics.__version__}\n"


# Wrong usage


def test_wrong_usage_says_what_may_be_meant_and_exits_with_2(run: Run, tmp_path: Path) -> None:
    for argv, wanted in (
        ((), "the following arguments are required: COMMAND"),
        (("scor",), "there is no command scor; did you mean score?"),
        (("frobnicate",), "There are score, check"),
        (("--vresion",), "did you mean --version?"),
        (
            ("score", "d", "--metrcs", "shapes", "--out", "a"),
            "no option --metrcs; did you mean --metrics?",
        ),
        (("score", "d", "--metrics", "shapes"), "required: --out"),
        (("score", "d", "--metrics", "pikscore", "--out", "a"), "did you mean 'pickscore'?"),
        (("score", "--metrics", "shapes", tmp_path, "--out", "a"), "and name data before --metrics"),
        (
            ("score", "d", "--metrics", "shapes", "--out", "a", "--limit", "0"),
            "must be a positive number",
        ),
        (("score", "d", "--metrics", "shapes", "--out", "a", "--column", "image"), "write NAME=COLUMN"),
        (("compare", "a"), "two runs or more are compared"),
        (("metrics", "hpsv4"), "did you mean 'hpsv"),
        (("download", "nothing"), "there is no metric 'nothing'"),
        (("fid", "a", "b", "--preprocessing", "none"), "clean"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, ""), argv
        assert wanted in err, err
        assert err.splitlines()[-1].startswith("See diffsynth-metrics"), argv


# Errors


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


SCORE = ("score", "data", "--metrics", "shapes", "--out", "runs/a")


def test_an_error_is_one_line_that_begins_with_what_to_do(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "choose a file or folder that you may read and write: Permission denied: a"
    full = "make room on the disk and start the same command again, it goes on: No space left"
    for error, line in (
        (DownloadError("Check the network.\n  could not\n  x"), "Check the network. could not x"),
        (ValueError("unknown layout 'a'"), "unknown layout 'a'"),
        (FileNotFoundError(errno.ENOENT, "No such file", "data"), "No such file: data"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), refused),
        (OSError(errno.ENOSPC, "No space left"), full),
        (MemoryError(), "choose a smaller --batch-size, or another --device: MemoryError"),
        (
            ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"),
            "pip install \"diffsynth-metrics[eval]\": No module named 'pyarrow'",
        ),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
    ):
        monkeypatch.setitem(vars(evaluation), "read_samples", failing(error))
        monkeypatch.setitem(vars(evaluation), "score", None)
        assert run(*SCORE) == (1, "", f"error: {line}\n")
    code, out, err = run(*SCORE, "--debug")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback") and err.endswith("error: KeyError: 'x' (--debug shows where)\n")


def test_an_interruption_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(evaluation), "read_samples", failing(KeyboardInterrupt()))
    monkeypatch.setitem(vars(evaluation), "score", None)
    code, out, err = run(*SCORE)
    assert (code, out) == (130, "")
    assert err == "interrupted; what was done is kept, and the same command goes on from there\n"
    monkeypatch.setattr(doctor, "diagnose", failing(KeyboardInterrupt()))
    assert run("doctor") == (130, "", "interrupted; the same command starts again\n")


def test_a_reader_who_has_gone_is_not_worth_a_word() -> None:
    # Some versions of argparse leave it unsaid that help could not be written.
    for argv, codes in ((["--help"], (0, 141)), (["download", "shapes", "--json"], (141,))):
        reading, writing = os.pipe()
        os.close(reading)
        done = python("-m", "diffsynth_metrics", *argv, stdout=writing)
        os.close(writing)
        assert done.returncode in codes and done.stderr == "", argv


def test_what_libraries_print_and_warn_goes_to_stderr(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy() -> list[doctor.Finding]:
        print("a library's line")
        cli.logging.getLogger("diffsynth_metrics.weights").warning("a line of the log")
        cli.warnings.showwarning("a warning", UserWarning, "file", 1)
        return []

    monkeypatch.setattr(doctor, "diagnose", noisy)
    code, out, err = run("doctor", "--json")
    assert (code, json.loads(out)) == (0, [])
    assert err == "a library's line\na line of the log\nwarning: a warning\n"


# Scoring, checking, comparing, reporting: one public call each


class Scored:
    """What `score` returns, as far as the command looks at it."""

    def __init__(self, failures: int, skipped: int) -> None:
        self._failures = failures
        self.sets = [{"metric": "fid", "score": 12.25, "skipped": skipped}]

    def summary(self) -> Table:
        return Table(("metric", "mean"), (("shapes", 9.5), ("clip", float("nan"))))

    def failures(self) -> Table:
        rows = tuple((f"id{index}", "shapes", "cannot be read") for index in range(self._failures))
        return Table(("id", "metric", "reason"), rows)


def test_score_prints_the_summary_and_says_by_its_code_whether_all_were_scored(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    failures = skipped = 0

    def score(samples: object, metrics: object, **options: Any) -> Scored:
        asked.update(options, metrics=metrics)
        return Scored(failures, skipped)

    def read_samples(source: str, **options: Any) -> SampleSet:
        asked.update(options, source=source)
        return SampleSet([])

    monkeypatch.setitem(vars(evaluation), "read_samples", read_samples)
    monkeypatch.setitem(vars(evaluation), "score", score)
    code, out, err = run(*SCORE, "clip=models/tiny", "--limit", 5, "--no-resume", "--column", "image=p",
                         "--column", "prompt=c", "--reference", "real")  # fmt: skip
    assert code == 2  # what stands behind --out is no metric
    code, out, err = run(
        *("score", "data", "--metrics", "shapes", "Pick-Score=models/tiny", "--out", "runs/a"),
        *("--limit", 5, "--no-resume", "--column", "image=p", "--column", "prompt=c", "seed=s"),
        *("--reference", "real", "--batch-size", 2, "--on-error", "raise", "--device", "cpu"),
        *("--dtype", "bfloat16"),
    )
    assert (code, err) == (0, "kept in runs/a\n")
    assert out == "metric  mean\n------  ----\nshapes   9.5\nclip       –\n"
    assert asked["metrics"] == {
        "shapes": "shapes",
        "pickscore": "pickscore=models/tiny",
    }
    assert asked["columns"] == {"image": "p", "prompt": "c", "seed": "s"}
    assert (asked["limit"], asked["batch_size"], asked["resume"]) == (5, 2, False)
    assert (asked["reference"], asked["device"], asked["on_error"]) == ("real", "cpu", "raise")
    assert asked["dtype"] is torch.bfloat16

    skipped = 1
    assert run(*SCORE)[0] == 3
    skipped, failures = 0, 25
    code, out, err = run(*SCORE)
    assert code == 3
    assert "id19" in out and "id20" not in out and "and 5 more" in out
    code, out, err = run(*SCORE, "--json")
    answer = json.loads(out)
    assert (code, len(answer["failures"]), answer["run"]) == (3, 25, "runs/a")
    assert answer["summary"] == [{"metric": "shapes", "mean": 9.5}, {"metric": "clip", "mean": None}]


def test_check_says_by_its_code_whether_something_is_wrong(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem("missing", "b.png", "is not there")
    samples = SampleSet([Sample("a", "red", "a.png")], source="data", layout="sidecar", reason="txt")
    found = SimpleNamespace(ok=False, problems=(problem,), table=lambda: Table(("file",), (("b.png",),)))
    monkeypatch.setitem(vars(evaluation), "read_samples", lambda source, **_: samples)
    monkeypatch.setitem(vars(evaluation), "check", lambda samples, metrics: found)
    code, out, err = run("check", "data")
    assert (code, out, err) == (3, "file\n-----\nb.png\n", "")
    answer = json.loads(run("check", "data", "--json")[1])
    assert (answer["layout"], answer["samples"], answer["ok"]) == ("sidecar", 1, False)
    assert answer["problems"] == [{"kind": "missing", "file": "b.png", "message": "is not there"}]
    found.ok = True
    assert run("check", "data")[0] == 0


# Metrics and weights


def test_the_metrics_are_listed_and_shown_whole(run: Run) -> None:
    code, out, err = run("metrics")
    assert (code, err) == (0, "")
    for name in NAMES:
        assert re.search(rf"^{name} ", out, re.MULTILINE), name
    assert max(map(len, out.splitlines())) <= 150
    cards = json.loads(run("metrics", "--json")[1])
    assert [card["metric"] for card in cards] == list(NAMES)
    for card in cards:
        for field in ("good_for", "inputs", "range", "download", "memory", "weights_license"):
            assert card[field], (card["metric"], field)
    code, out, err = run("metrics", "HPSv3")
    assert "16.6 GB" in out and "https://arxiv.org/abs/2508.03789" in out
    assert "inside" not in out and "none" in run("metrics", "shapes")[1]


def test_a_card_is_a_table_in_a_notebook_and_escaped() -> None:
    card = diffsynth_metrics.HPSv3Metric.card
    html = card._repr_html_()
    assert html.startswith("<table>") and "h_&lt;|Reward|&gt;" in html and "<|Reward|>" not in html
    assert html.count("<tr>") == 13 and "16.6 GB" in html


def test_a_judge_may_be_named_with_a_server_and_others_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://localhost:8000/v1"
    asked = classmethod(lambda cls, *arguments, **options: (cls.__name__, *arguments, options))
    monkeypatch.setattr(diffsynth_metrics.UnifiedReward2Metric, "from_server", asked, raising=False)
    loaded = load_metric(f"unified-reward-2={url}", device="cuda", batch_size=None, timeout=2)
    assert loaded == ("UnifiedReward2Metric", url, {"timeout": 2})
    with pytest.raises(ValueError, match="CLIPMetric runs in this process and cannot ask the server"):
        load_metric(f"clip={url}")


def test_the_embedded_model_needs_no_download_and_is_verified(run: Run) -> None:
    code, out, err = run("download", "shapes")
    assert (code, err) == (0, "") and "inside the package" in out
    code, out, err = run("verify", "shapes", "--json")
    assert (code, err) == (0, "")
    assert {"what": "values", "result": "ok", "detail": "no NaN and no infinity"} in json.loads(out)


def test_a_check_that_fails_is_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("files", "ok", "one"), Check("layout", "failed", "another\n  line")]
    monkeypatch.setattr(published, "verify", lambda *_, **__: checks)
    code, out, err = run("verify", "pickscore")
    assert (code, err) == (1, "") and "another line" in out
    monkeypatch.setattr(published, "verify", lambda *_, **__: checks[:1])
    assert run("verify", "pickscore")[0] == 0


def test_the_doctor_fails_with_a_problem_and_not_with_a_hint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [doctor.Finding("threads", "hint", "busy", "set it")]
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    code, out, err = run("doctor")
    assert (code, err) == (0, "") and "threads: set it" in out
    findings.append(doctor.Finding("disk", "problem", "full", "make room"))
    assert run("doctor")[0] == 1
    assert json.loads(run("doctor", "--json")[1])[1]["state"] == "problem"


# The whole way, with the embedded model


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A manifest of eight drawn shapes, one of them corrupt and one missing."""
    return write_pictures(tmp_path / "data", 8)


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    lines = ["image,prompt,seed"]
    for index in range(count):
        color, shape = list(COLORS)[index % 6], SHAPES[index % len(SHAPES)]
        draw_shape(shape, color, image_size=64).save(folder / f"{index:03}.png")
        lines.append(f"{index:03}.png,a {color} {shape},{index // 6}")
    (folder / "001.png").write_bytes(b"no picture")
    (folder / "002.png").unlink()
    (folder / "data.csv").write_text("\n".join(lines))
    return folder / "data.csv"


def test_a_folder_becomes_a_verdict_and_a_report(run: Run, pictures: Path, tmp_path: Path) -> None:
    assert run("check", pictures)[0] == 3
    for name in ("a", "b"):
        code, out, err = run("score", pictures, "--metrics", "shapes", "--out", tmp_path / name)
        assert code == 3
        assert "there is no file" in out and "001.png cannot be read" in out
        assert err.count("001.png") == 1 and err.endswith(f"kept in {tmp_path / name}\n")
    code, out, err = run("score", pictures, "--metrics", "shapes", "--out", tmp_path / "a", "--json")
    answer = json.loads(out)
    assert (code, answer["summary"][0]["scored"], answer["summary"][0]["failed"]) == (3, 6, 2)
    assert {failure["id"] for failure in answer["failures"]} == {"001", "002"}

    report = tmp_path / "report.html"
    code, out, err = run("compare", tmp_path / "a", tmp_path / "b", "--report", report)
    assert code == 0 and report.stat().st_size > 10_000
    answer = json.loads(run("compare", tmp_path / "a", tmp_path / "b", "--json")[1])
    assert answer["verdict"] in out
    assert answer["differences"][0]["difference"]["value"] == 0
    assert run("report", tmp_path / "a", "--out", tmp_path / "one.html")[:2] == (
        0,
        f"{tmp_path / 'one.html'}\n",
    )


def test_what_is_wrong_with_the_input_is_said_in_one_line(
    run: Run, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    shapes = ("--metrics", "shapes", "--out", tmp_path / "run")
    for argv, wanted in (
        (("score", tmp_path / "empty", *shapes), str(tmp_path / "empty")),
        (("score", tmp_path / "nothing", *shapes), str(tmp_path / "nothing")),
        (("score", pictures, "--layout", "manifst", *shapes), "manifest"),
        (("score", pictures, "--metrics", "fid", "--out", tmp_path / "run"), "reference"),
        (("score", pictures, "--metrics", "shapes", "--out", tmp_path / "file" / "a"), "choose another"),
        (("score", pictures, "--metrics", "shapes=nowhere", "--out", tmp_path / "run"), "nowhere"),
        (("score", pictures, "--on-error", "raise", *shapes), "001.png"),
        (("compare", tmp_path / "nothing", tmp_path / "file"), "nothing"),
        (("report", tmp_path / "empty", "--out", tmp_path / "r.html"), "no run folder"),
        (("fid", tmp_path / "nothing", tmp_path / "empty", "--weights", "nowhere"), "nowhere"),
    ):
        code, out, err = run(*argv)
        *_, line = err.splitlines()
        assert (code, out) == (1, ""), argv
        assert line.startswith("error: ") and wanted in line, line
        assert "Traceback" not in err


def test_an_error_is_json_too_and_the_exit_code_stays(run: Run, tmp_path: Path) -> None:
    code, out, err = run("check", tmp_path / "nothing", "--json")
    assert code == 1 and err == f"error: {json.loads(out)['error']}\n"
    assert str(tmp_path / "nothing") in err
    for argv, code in ((("metrics", "--json"), 0), (("metrics", "nothing", "--json"), 2)):
        assert run(*argv)[0] == code
    code, out, err = run("report", tmp_path, "--out", tmp_path / "r.html")
    assert (code, out) == (1, "")


def test_a_terminal_without_the_characters_gets_escapes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    draw_shape("star", "red").save(tmp_path / "data" / "1.png")
    (tmp_path / "data" / "data.csv").write_text("image,prompt\n1.png,a\n猫é🦊.png,b\n", "utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = ("-m", "diffsynth_metrics", "check", str(tmp_path / "data" / "data.csv"))
    done = python(*command, **ascii_only)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"\\u(732b|2026)", done.stdout), "a character of the name, or an ellipsis"
    done = python(*command, "--json", **ascii_only)
    assert done.returncode == 3 and done.stdout.isascii(), done.stderr
    assert "猫é🦊.png" in json.loads(done.stdout)["problems"][0]["message"]


def test_two_metrics_of_one_kind_have_labels(run: Run, pictures: Path, tmp_path: Path) -> None:
    score = ("score", pictures, "--out", tmp_path / "run", "--json", "--metrics")
    code, out, _ = run(*score, "first:shapes", "shapes")
    assert code == 3
    assert [row["metric"] for row in json.loads(out)["summary"]] == ["first", "shapes"]
    for labels in (("shapes", "shapes"), ("a:shapes", "a:shapes")):
        code, out, _ = run(*score, *labels)
        assert code == 1 and "name them apart, such as a:" in json.loads(out)["error"]
    for wrong in (":shapes", "a:shaps", "a:"):
        assert run(*score, wrong)[0] == 2, wrong


def test_a_full_disk_loses_no_row_and_the_same_command_goes_on(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("score", pictures, "--metrics", "shapes", "--out", tmp_path / "run")
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        code, out, err = run(*command)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: make space, or choose another out=")
    assert run(*command)[0] == 3
    assert len(Results.open(tmp_path / "run").to_pandas()) == 8


def test_a_damaged_part_is_scored_again(run: Run, pictures: Path, tmp_path: Path) -> None:
    command = ("score", pictures, "--metrics", "shapes", "--out", tmp_path / "run")
    assert run(*command)[0] == 3
    (part,) = (tmp_path / "run" / "parts").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    code, _, err = run(*command)
    assert code == 3 and str(part) in err
    assert len(Results.open(tmp_path / "run").to_pandas()) == 8


def test_a_second_process_on_one_run_is_refused(run: Run, pictures: Path, tmp_path: Path) -> None:
    command = ("score", pictures, "--metrics", "shapes", "--out", tmp_path / "run")
    with RunFolder(tmp_path / "run").locked():
        code, out, err = run(*command)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: another process is writing to {tmp_path / 'run'}")


# Stops itself by a signal in the n-th call of a network; parts are small, so that some are written.
STOPPING = """
import os, signal, sys
from diffsynth_metrics import CLIPMetric
from diffsynth_metrics.cli import main
from diffsynth_metrics.evaluation import run_folder, sample_scoring

run_folder._ROWS_OF_PART, sample_scoring._LARGEST_CHUNK = 25, 20
evaluate, calls = CLIPMetric.evaluate, 0

def stop(*arguments):
    global calls
    calls += 1
    if calls == int(os.environ["STOP_AT"]):
        signal.raise_signal(getattr(signal, os.environ["STOP_BY"]))
    return evaluate(*arguments)

CLIPMetric.evaluate = stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_300_pictures_and_three_interruptions_give_900_rows(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    data, folder = write_pictures(tmp_path / "data", 300), tmp_path / "run"
    metrics = ("shapes", f"clip={tiny('clip')}", f"pickscore={tiny('pickscore')}")
    command = ("score", str(data), "--metrics", *metrics, "--out", str(folder), "--json")
    rows = [0]
    for stop_by, code in (("SIGINT", 130), ("SIGKILL", -9), ("SIGKILL", -9)):
        done = python("-c", STOPPING, *command, STOP_BY=stop_by, STOP_AT="12")
        assert done.returncode == code, done.stderr
        assert "interrupted" in done.stdout if code == 130 else done.stdout == ""
        if stop_by == "SIGINT":
            assert "the same command goes on" in done.stderr.splitlines()[-1]
        rows.append(sum(pq.read_metadata(part).num_rows for part in folder.glob("parts/*.parquet")))
        assert rows[-1] > rows[-2]
    assert rows[-1] < 900
    done = python("-m", "diffsynth_metrics", *command)
    assert done.returncode == 3, done.stderr
    failures = json.loads(done.stdout)["failures"]
    assert {failure["id"] for failure in failures} == {"001", "002"} and len(failures) == 6
    assert all(failure["image"].split("/")[-1] in failure["reason"] for failure in failures)
    frame = Results.open(folder).to_pandas()
    assert len(frame) == 900 and not frame.duplicated(["id", "metric"]).any()
    assert frame["score"].isna().sum() == 6
    written = sum(pq.read_metadata(part).num_rows for part in folder.glob("parts/*.parquet"))
    assert written == 900, "a row was scored twice"


if __name__ == "__main__":
    PAGE.write_text(command_page(), encoding="utf-8")

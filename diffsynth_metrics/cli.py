"""The command ``diffsynth-metrics``: read, make one public call, print.

The result goes to stdout, as text or with ``--json``, and everything else to stderr; with ``--json`` an
error is also ``{"error": "..."}`` on stdout. Exit codes: 0 done,
1 failed, 2 wrong usage, 3 done with failures recorded, 130 interrupted. Nothing heavy is imported before
the command line is known to be right.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import logging
import math
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from diffsynth_metrics import __version__
from diffsynth_metrics.catalog import NAMES, find_name
from diffsynth_metrics.evaluation.tables import Table

if TYPE_CHECKING:
    import torch

    from diffsynth_metrics.base import MetricCard
    from diffsynth_metrics.weights.published import HubFile

__all__ = ["DONE", "FAILED", "FAILURES_RECORDED", "INTERRUPTED", "USAGE", "main", "make_parser"]

DONE, FAILED, USAGE, FAILURES_RECORDED, INTERRUPTED = 0, 1, 2, 3, 130
_PIPE_CLOSED = 141  # what a shell reports of a program that SIGPIPE ended

_HELP_WIDTH = 100
_FAILURES_SHOWN = 20
_GOES_ON = "interrupted; what was done is kept, and the same command goes on from there"
_DTYPES = ("float32", "bfloat16", "float16")
_PREPROCESSINGS = ("clean", "pytorch-fid", "torch-fidelity", "torchmetrics", "diffsynth")


@dataclasses.dataclass(frozen=True)
class _Output:
    """What a command prints, and its exit code.

    Attributes:
        text: For people.
        data: The same for ``--json``.
        code: The exit code.
    """

    text: str
    data: Any
    code: int = DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code.

    Args:
        argv: The arguments behind the program's name; None means those of the process.
    """
    try:
        arguments = make_parser().parse_args(argv)
    except SystemExit as end:  # argparse ends so after --help, --version and a wrong usage
        return _write("", int(end.code or DONE))
    try:
        with _all_to_stderr():
            output: _Output = arguments.run(arguments)
    except KeyboardInterrupt:
        return _stop(arguments.interrupted, INTERRUPTED, as_json=arguments.json)
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        return _stop(_in_one_line(error), FAILED, as_json=arguments.json, before="error: ")
    return _print(output, as_json=arguments.json)


# What is printed


def _print(output: _Output, *, as_json: bool) -> int:
    text = output.text
    if as_json:
        # JSON has its own way to write what stdout cannot.
        only_ascii = str(sys.stdout.encoding).lower() not in ("utf-8", "utf8")
        text = json.dumps(_plain(output.data), indent=1, ensure_ascii=only_ascii)
    return _write(f"{text}\n", output.code)


def _stop(reason: str, code: int, *, as_json: bool, before: str = "") -> int:
    """Say why there is no result, and return the exit code."""
    _say(f"{before}{reason}")
    return _print(_Output("", {"error": reason}, code), as_json=True) if as_json else code


def _write(text: str, code: int) -> int:
    """Write to stdout, and return the exit code; a reader who has gone is not worth a word."""
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError as error:  # a terminal without the characters of a prompt
            sys.stdout.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return code


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it: a number that is not finite is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def _all_to_stderr() -> Iterator[None]:
    """Send the package's log, Python's warnings and what libraries print to stderr."""
    logger = logging.getLogger("diffsynth_metrics")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    show = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        warnings.showwarning = show
        logger.removeHandler(handler)


def _in_one_line(error: Exception) -> str:
    """Return an error's message in one line that begins with what to do, where the error says it."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    expected = (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError)
    if not isinstance(error, expected):
        return f"{type(error).__name__}: {message or 'no message'} (--debug shows where)"
    return _hint_for(error) + (message or type(error).__name__)


def _hint_for(error: Exception) -> str:
    """Return what to do about an error of Python or a library, whose message does not say it."""
    code = error.errno if isinstance(error, OSError) and error.strerror else None
    if code == errno.ENOSPC:
        return "make room on the disk and start the same command again, it goes on: "
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a file or folder that you may read and write: "
    if isinstance(error, ImportError) and error.name in ("filelock", "jinja2", "pandas", "pyarrow"):
        return 'pip install "diffsynth-metrics[eval]": '
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "choose a smaller --batch-size, or another --device: "
    return ""


# The commands


def _score(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.evaluation import read_samples, score

    samples = read_samples(
        arguments.data,
        layout=arguments.layout,
        prompts=arguments.prompts,
        columns=dict(arguments.column) or None,
        allow_outside=arguments.allow_outside,
    )
    results = score(
        samples,
        _by_label(arguments.metrics),
        out=arguments.out,
        on_error=arguments.on_error,
        resume=not arguments.no_resume,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        reference=arguments.reference,
        device=arguments.device,
        dtype=_dtype(arguments.dtype),
        workers=arguments.workers,
        engine=arguments.engine,
        gpus_per_worker=arguments.gpus_per_worker,
        address=arguments.address,
    )
    summary, failures = results.summary(), results.failures()
    _say(f"kept in {arguments.out}")
    skipped = any(of_set.get("skipped") for of_set in results.sets)
    tables = [summary, *([_first_rows(failures)] if failures.rows else [])]
    data = {
        "run": arguments.out,
        "summary": summary.records(),
        "failures": failures.records(),
        "sets": results.sets,
    }
    failed = bool(failures.rows) or skipped
    if arguments.workers == "ranks":
        failed = False  # torchrun would end the other processes
    return _Output(
        "\n\n".join(table.text() for table in tables), data, FAILURES_RECORDED if failed else DONE
    )


def _by_label(specs: Sequence[tuple[str, str]]) -> dict[str, str]:
    labels = [label for label, _ in specs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(
            f"name them apart, such as a:{twice[0]}=PATH b:{twice[0]}=PATH: two metrics are called "
            f"{twice[0]!r}"
        )
    return dict(specs)


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype


def _first_rows(table: Table) -> Table:
    more = len(table.rows) - _FAILURES_SHOWN
    notes = (*table.notes, *([f"and {more} more, see --json or report"] if more > 0 else []))
    return dataclasses.replace(table, rows=table.rows[:_FAILURES_SHOWN], notes=notes)


def _check(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.evaluation import check, read_samples

    samples = read_samples(
        arguments.data,
        layout=arguments.layout,
        prompts=arguments.prompts,
        columns=dict(arguments.column) or None,
        allow_outside=arguments.allow_outside,
    )
    found = check(samples, metrics=arguments.metrics or None)
    data = {
        "source": samples.source,
        "layout": samples.layout,
        "reason": samples.reason,
        "samples": len(samples),
        "ok": found.ok,
        "problems": found.problems,
    }
    return _Output(str(found.table()), data, DONE if found.ok else FAILURES_RECORDED)


def _compare(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.evaluation import compare, report

    comparison = compare(
        *arguments.runs, metrics=arguments.metrics or None, allow=tuple(arguments.allow or ())
    )
    if arguments.report:
        _say(f"report in {report(comparison, arguments.report)}")
    data = {
        "runs": comparison.names,
        "verdict": comparison.verdict,
        "differences": comparison.differences,
        "strengths": {name: table.records() for name, table in comparison.strengths.items()},
        "table": comparison.table().records(),
        "left_out": comparison.unpaired.records(),
    }
    return _Output(str(comparison), data)


def _report(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.evaluation import Results, report

    results = [Results.open(run) for run in arguments.runs]
    path = report(results[0] if len(results) == 1 else results, arguments.out, title=arguments.title)
    return _Output(str(path), {"report": str(path)})


def _fid(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.catalog import load_metric

    weights = f"fid={arguments.weights}" if arguments.weights else "fid"
    metric = load_metric(
        weights,
        device=arguments.device,
        preprocessing=arguments.preprocessing,
        batch_size=arguments.batch_size,
    )
    result = metric.evaluate(  # type: ignore[attr-defined]
        arguments.reference,
        arguments.generated,
        kid=arguments.kid,
        prdc=arguments.prdc,
        infinity=arguments.infinity,
        on_error=arguments.on_error,
    )
    skipped = result["reference_skipped"] + result["generated_skipped"]
    rows = tuple((name.replace("_", " "), value) for name, value in result.items())
    table = Table(("", "FID"), rows)
    return _Output(table.text(), result, FAILURES_RECORDED if skipped else DONE)


def _metrics(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.catalog import find_card

    if arguments.metric:
        card = find_card(arguments.metric)
        return _Output(_card_text(card), {"metric": arguments.metric, **dataclasses.asdict(card)})
    cards = {name: find_card(name) for name in NAMES}
    data = [{"metric": name, **dataclasses.asdict(card)} for name, card in cards.items()]
    return _Output(_cards_table(cards).text(), data)


def _card_text(card: MetricCard) -> str:
    lines = []
    for field in dataclasses.fields(card):
        value = getattr(card, field.name)
        value = {True: "yes", False: "no"}.get(value, value)
        label = field.name.replace("_", " ").ljust(18)
        lines += (
            textwrap.wrap(f"{label}{value}", _HELP_WIDTH, subsequent_indent=" " * 18) if value else []
        )
    return "\n".join(lines)


def _cards_table(cards: Mapping[str, MetricCard]) -> Table:
    columns = {
        "metric": 20,
        "good for": 26,
        "input": 17,
        "range": 26,
        "better": 6,
        "download": 8,
        "memory": 8,
        "licence of the weights": 24,
    }
    rows = []
    for name, card in cards.items():
        cells = (
            name,
            card.good_for,
            card.inputs,
            card.range,
            "higher" if card.higher_is_better else "lower",
            card.download,
            card.memory,
            card.weights_license,
        )
        rows += _wrapped(cells, tuple(columns.values()))
    note = f"The whole card of one: diffsynth-metrics metrics {NAMES[-3]}"
    return Table(tuple(columns), tuple(rows), notes=(note,))


def _wrapped(cells: Sequence[str], widths: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the rows that a row of long cells takes, the further ones with what did not fit."""
    columns = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    return list(zip(*padded, strict=True))


def _download(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.weights.published import download

    names = list(dict.fromkeys(arguments.metrics))
    if not _agreed(names, arguments):
        return _Output("nothing downloaded", {"downloaded": []})
    checks = {name: download(name, arguments.source) for name in names}
    rows = tuple(
        (name, check.what, check.result, check.detail) for name in names for check in checks[name]
    )
    embedded = [name for name, done in checks.items() if not done]
    notes = tuple(f"{name} is inside the package: there is nothing to download" for name in embedded)
    failed = any(check.result == "failed" for done in checks.values() for check in done)
    table = Table(("metric", "check", "result", "detail"), rows, notes=notes)
    return _Output(table.text() if rows else "\n".join(notes), checks, FAILED if failed else DONE)


def _agreed(names: Sequence[str], arguments: argparse.Namespace) -> bool:
    """List what would be downloaded, and ask where somebody is there to answer."""
    missing = _list_missing(names, arguments.source)
    if not missing or arguments.yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    sys.stderr.write("Download? [Y/n] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


def _list_missing(names: Sequence[str], source: str | None) -> list[HubFile]:
    from diffsynth_metrics.weights.published import find_parts, list_on_hub, size_text

    missing = []
    for part in (part for name in names for part in find_parts(name, source)):
        if part.files.are_complete(part.sufficient):
            _say(f"on disk      {part.repository.folder}: {part.files}")
            continue
        local = set(part.files.names())
        for file in list_on_hub(part):
            if file.name not in local:
                _say(f"to download  {size_text(file.size):>8}  {file.name}")
                missing.append(file)
    if missing:
        _say(f"{len(missing)} files, {size_text(sum(file.size for file in missing))}")
    return missing


def _verify(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.weights.published import verify

    checks = verify(arguments.metric, pictures=arguments.pictures, source=arguments.source)
    rows = tuple((check.what, check.result, " ".join(check.detail.split())) for check in checks)
    failed = any(check.result == "failed" for check in checks)
    table = Table(("check", "result", "detail"), rows)
    return _Output(table.text(), checks, FAILED if failed else DONE)


def _doctor(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.doctor import diagnose

    findings = diagnose()
    rows = tuple((finding.state, finding.subject, finding.detail) for finding in findings)
    fixes = [f"{finding.subject}: {finding.fix}" for finding in findings if finding.fix]
    table = Table(
        ("", "subject", "found"), rows, notes=("", "What can be done:", *fixes) if fixes else ()
    )
    broken = any(finding.state == "problem" for finding in findings)
    return _Output(table.text(), findings, FAILED if broken else DONE)


def _serve(arguments: argparse.Namespace) -> _Output:
    from diffsynth_metrics.catalog import load_metric
    from diffsynth_metrics.serving import serve

    token = arguments.token or os.environ.get("DIFFSYNTH_METRICS_TOKEN")
    metrics = {
        spec.partition("=")[0]: load_metric(
            spec,
            device=arguments.device,
            batch_size=arguments.batch_size,
            torch_dtype=_dtype(arguments.dtype),
        )
        for spec in arguments.metrics
    }
    serve(
        metrics,
        host=arguments.host,
        port=arguments.port,
        token=token,
        insecure=arguments.insecure,
        on_start=lambda address: _say(f"serving {', '.join(metrics)} at {address}"),
    )
    return _Output("stopped", {"served": list(metrics)})


# The command line


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the option or command that may be meant."""

    def __init__(self, **options: Any) -> None:
        self.option_names: list[str] = []
        self.commands: Mapping[str, _Parser] = {}
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self.option_names += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Look for misspelt words first: what argparse says of them depends on what else is missing."""
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            if word == "--":
                break
            if word.startswith("--"):
                self._check_word("option", word.partition("=")[0], self.option_names)
            elif self.commands:
                self._check_word("command", word, list(self.commands))
                break  # what follows are the command's own
        return super().parse_known_args(args, namespace)

    def _check_word(self, kind: str, word: str, known: list[str]) -> None:
        if word in known:
            return
        near = get_close_matches(word, known, n=1)
        suggestion = f"did you mean {near[0]}? " if near else ""
        self.error(f"there is no {kind} {word}; {suggestion}There are {', '.join(known)}")

    def error(self, message: str) -> NoReturn:
        _say(f"{self.prog}: {message}\nSee {self.prog} --help")
        sys.exit(USAGE)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_HELP_WIDTH, max_help_position=30)


def make_parser() -> _Parser:
    """Return the parser of the whole command line; its ``commands`` maps each command to its parser."""
    parser = _Parser(
        prog="diffsynth-metrics",
        usage="diffsynth-metrics COMMAND ...",
        description="Score generated images, compare checkpoints, look after the weights.",
        epilog=(
            "Try it without a download: diffsynth-metrics score DATA --metrics shapes --out runs/a\n"
            "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with failures recorded, 130 stopped."
        ),
    )
    parser.add_argument("--version", action="version", version=f"diffsynth-metrics {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, prog="diffsynth-metrics"
    )
    for add in _ADDERS:
        add(commands)
    parser.commands = commands.choices
    return parser


def _add(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], _Output],
    *,
    usage: str,
    summary: str,
    more: str = "",
    example: str,
    interrupted: str = "interrupted; the same command starts again",
) -> _Parser:
    """Add a command with what all have: one summary, one example, ``--json`` and ``--debug``."""
    parser: _Parser = commands.add_parser(
        name,
        help=summary,
        usage=f"diffsynth-metrics {name} {usage}",
        description=f"{summary[0].upper()}{summary[1:]}.{more and chr(10) * 2}{more}",
        epilog=f"example:\n  diffsynth-metrics {example}",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, interrupted=interrupted)
    return parser


def _add_score(commands: Any) -> None:
    parser = _add(
        commands,
        "score",
        _score,
        usage="DATA --metrics [LABEL:]NAME[=PATH] ... --out DIR [options]",
        summary="score pictures with one or several metrics",
        more=(
            "DATA is a manifest (CSV, TSV, JSON, JSONL, parquet) or a folder. A picture that cannot be\n"
            "scored is a row with its reason. Started again after an interruption, the same command\n"
            "goes on; exit code 3 says that there are failures."
        ),
        example="score DATA --metrics shapes --out runs/a",
        interrupted=_GOES_ON,
    )
    _add_data(parser)
    _add_metric_names(
        parser,
        type=_labelled_spec,
        metavar="[LABEL:]NAME[=PATH]",
        required=True,
        help=(
            "names, see diffsynth-metrics metrics; NAME=PATH loads a file or folder of weights; "
            "LABEL: tells two of one NAME apart"
        ),
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the run")
    parser.add_argument("--reference", metavar="DATA", help="reference pictures, for fid")
    parser.add_argument("--limit", metavar="N", type=_positive, help="score the first N samples only")
    _add_hardware(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="of the networks; the official one by default")
    parser.add_argument(
        "--on-error",
        choices=("record", "raise"),
        default="record",
        help="record a picture that fails with its reason (default), or stop",
    )
    parser.add_argument("--no-resume", action="store_true", help="score everything again")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_workers,
        help="processes or actors that score; ranks: this is one of the processes of torchrun or srun",
    )
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="what workers are: processes of this machine (default), or actors of a Ray cluster",
    )
    parser.add_argument(
        "--gpus-per-worker", metavar="G", type=_share_of_gpus, help="GPUs that an actor reserves"
    )
    parser.add_argument("--address", metavar="A", help="the Ray cluster, such as auto")


def _add_check(commands: Any) -> None:
    parser = _add(
        commands,
        "check",
        _check,
        usage="DATA [options]",
        summary="say what is wrong with a data set, without loading a model",
        more="Exit code 3 says that something is wrong.",
        example="check DATA --metrics shapes",
    )
    _add_data(parser)
    _add_metric_names(
        parser,
        type=_metric_spec,
        metavar="NAME[=PATH]",
        required=False,
        help="look also for prompts that these metrics will cut",
    )


def _add_compare(commands: Any) -> None:
    parser = _add(
        commands,
        "compare",
        _compare,
        usage="RUN RUN [RUN ...] [options]",
        summary="compare runs, paired by prompt and seed, with intervals",
        example="compare runs/a runs/b --report report.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", action=_AtLeastTwo, help="folders of runs")
    parser.add_argument(
        "--metrics", metavar="NAME", nargs="+", help="these only; by default all that the runs share"
    )
    parser.add_argument("--report", metavar="FILE", help="write an HTML report too")
    parser.add_argument(
        "--allow", metavar="WHAT", nargs="+", help="what may differ between the runs, such as dtype"
    )


def _add_report(commands: Any) -> None:
    parser = _add(
        commands,
        "report",
        _report,
        usage="RUN [RUN ...] --out FILE [options]",
        summary="write an HTML report of one or several runs",
        example="report runs/a runs/b --out report.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument("--out", metavar="FILE", required=True, help="the report, one file")
    parser.add_argument("--title", help="what stands above it")


def _add_fid(commands: Any) -> None:
    parser = _add(
        commands,
        "fid",
        _fid,
        usage="REFERENCE GENERATED [options]",
        summary="compute FID between two sets of pictures",
        more=(
            "Each side is a folder, read recursively, or an .npz file of statistics. The network is\n"
            "Inception: 96 MB to download, or --weights with a file or folder of yours."
        ),
        example="fid real/ generated/ --kid",
    )
    parser.add_argument("reference", metavar="REFERENCE", help="real pictures")
    parser.add_argument("generated", metavar="GENERATED", help="the pictures to judge")
    parser.add_argument(
        "--preprocessing", choices=_PREPROCESSINGS, default="clean", help="default: clean"
    )
    parser.add_argument("--kid", action="store_true", help="add KID, unbiased for few pictures")
    parser.add_argument("--prdc", action="store_true", help="add precision, recall, density, coverage")
    parser.add_argument("--infinity", action="store_true", help="add FID extrapolated to infinity")
    parser.add_argument(
        "--weights", metavar="PATH", help="file or folder instead of the published weights"
    )
    _add_hardware(parser)
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="stop at a picture that cannot be read (default), or leave it out and exit with 3",
    )


def _add_metrics(commands: Any) -> None:
    parser = _add(
        commands,
        "metrics",
        _metrics,
        usage="[NAME] [options]",
        summary="list the metrics, or show the whole card of one",
        example="metrics shapes",
    )
    parser.add_argument("metric", metavar="NAME", nargs="?", type=_metric_name, help="one of them")


def _add_download(commands: Any) -> None:
    parser = _add(
        commands,
        "download",
        _download,
        usage="METRIC [METRIC ...] [options]",
        summary="download published weights, and compare them with the hub's sha256",
        more="Files and sizes are listed first. An interrupted download goes on.",
        example="download shapes",
        interrupted=_GOES_ON,
    )
    parser.add_argument(
        "metrics", metavar="METRIC", nargs="+", type=_metric_name, help="names of metrics"
    )
    _add_source(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _add_verify(commands: Any) -> None:
    parser = _add(
        commands,
        "verify",
        _verify,
        usage="METRIC[=PATH] [options]",
        summary="check the weights on disk: layout, sha256, values, published scores",
        more="What could not be checked is said, with what it needs. Nothing is downloaded.",
        example="verify shapes",
    )
    parser.add_argument("metric", metavar="METRIC[=PATH]", type=_metric_spec, help="a metric's name")
    parser.add_argument("--pictures", metavar="DIR", help="the authors' pictures, for published scores")
    _add_source(parser)


def _add_doctor(commands: Any) -> None:
    _add(
        commands,
        "doctor",
        _doctor,
        usage="[options]",
        summary="look at versions, devices, threads, hubs, disk and weights",
        more="Exit code 1 says that something does not work; hints do not change it.",
        example="doctor",
    )


def _add_serve(commands: Any) -> None:
    parser = _add(
        commands,
        "serve",
        _serve,
        usage="NAME[=PATH] [NAME[=PATH] ...] [options]",
        summary="serve metrics over HTTP, for training loops on other machines",
        more=(
            "Clients use diffsynth_metrics.serving.RemoteMetric, or POST /compute in the JSON of\n"
            "Flow-Factory. Told to stop, the server finishes what it has taken."
        ),
        example="serve shapes --port 8000",
        interrupted="stopped",
    )
    parser.add_argument(
        "metrics", metavar="NAME[=PATH]", nargs="+", type=_metric_spec, help="metrics to serve"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen; by default to this machine only"
    )
    parser.add_argument("--port", metavar="N", type=_positive, default=8000, help="default: 8000")
    parser.add_argument(
        "--token", help="what clients must send; or the environment's DIFFSYNTH_METRICS_TOKEN"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="listen to other machines without a token"
    )
    _add_hardware(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="of the networks; the official one by default")


_ADDERS = (
    *(_add_score, _add_check, _add_compare, _add_report, _add_fid),
    *(_add_metrics, _add_download, _add_verify, _add_doctor, _add_serve),
)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="manifest or folder")
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts of a bare folder, by index or by stem"
    )
    parser.add_argument("--layout", metavar="NAME", help="layout of DATA; by default it is found")
    parser.add_argument(
        "--column",
        metavar="NAME=COLUMN",
        nargs="+",
        action="extend",
        type=_column,
        default=[],
        help="columns of a manifest, such as image=path prompt=caption",
    )
    parser.add_argument(
        "--allow-outside", action="store_true", help="let a manifest name files outside its folder"
    )


def _add_metric_names(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument("--metrics", nargs="+", action="extend", **options)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", metavar="N", type=_positive, help="pictures in the network at once"
    )
    parser.add_argument("--device", metavar="D", help="such as cuda:1 or cpu; the best by default")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", choices=("modelscope", "huggingface"), help="the hub to ask")


class _AtLeastTwo(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if len(values) < 2:
            parser.error(f"two runs or more are compared, got {len(values)}; report shows one run")
        setattr(namespace, self.dest, values)


def _metric_name(text: str) -> str:
    try:
        return find_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _metric_spec(text: str) -> str:
    """Check ``NAME`` or ``NAME=PATH``, and return it with the name as the catalog has it."""
    name, equals, path = text.partition("=")
    if os.path.exists(text) and not equals:
        raise argparse.ArgumentTypeError(
            f"write NAME={text} for weights, and name data before --metrics: {text!r} is a file or "
            "folder"
        )
    return f"{_metric_name(name)}{equals}{path}"


def _labelled_spec(text: str) -> tuple[str, str]:
    """Check ``[LABEL:]NAME[=PATH]``; return the label, by default the name, and the rest."""
    before, equals, path = text.partition("=")
    label, colon, name = before.rpartition(":")
    if not colon or os.path.exists(text):
        spec = _metric_spec(text)
        return spec.partition("=")[0], spec
    if not label:
        raise argparse.ArgumentTypeError(f"write LABEL:NAME, got {text!r}")
    return label, _metric_spec(f"{name}{equals}{path}")


def _column(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise argparse.ArgumentTypeError(f"write NAME=COLUMN, such as image=path, got {text!r}")
    return name, column


def _workers(text: str) -> int | str:
    return text if text == "ranks" else _positive(text)


def _share_of_gpus(text: str) -> float:
    try:
        gpus = float(text)
    except ValueError:
        gpus = math.nan
    if not 0 <= gpus < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of GPUs such as 1 or 0.5, got {text!r}")
    return gpus


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)

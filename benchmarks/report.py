"""Measurements to the Markdown of ``RESULTS.md``: tables of ratios, and the limits."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Measurements", "Row", "machine", "markdown", "median"]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


@dataclass
class Row:
    """One quantity of both packages, once per round."""

    name: str
    unit: str
    ours: list[float]
    upstream: list[float]

    @property
    def ratio(self) -> float:
        """The ratio of the medians; above 1 we are faster or smaller."""
        return self._advantage(median(self.ours), median(self.upstream))

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio of one round."""
        ratios = [
            self._advantage(ours, upstream)
            for ours, upstream in zip(self.ours, self.upstream, strict=True)
        ]
        return min(ratios), max(ratios)

    def _advantage(self, ours: float, upstream: float) -> float:
        return ours / upstream if self.unit == "images/s" else upstream / ours


@dataclass
class Measurements:
    """Everything that one run measured; sections that were left out are empty."""

    load_average: float
    about: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    file_size: int = 0
    faults: dict[str, dict[str, float]] = field(default_factory=dict)
    difference: float = 0.0
    same_pixels: float = 0.0
    parts: dict[str, Any] = field(default_factory=dict)
    tower: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def markdown(results: Measurements, command: str, seconds: float) -> str:
    """Return the whole results file."""
    sections = [
        _head(results, command, seconds),
        _section("Import", results.rows.get("import"), _IMPORT),
        _section("Full-size checkpoint: load time and memory", results.rows.get("load"), _LOAD),
        _section(
            "Tiny tower: the cost of everything around the network",
            results.rows.get("tiny"),
            _TINY.format(difference=results.difference, same_pixels=results.same_pixels),
        ),
        _section("Full size: ViT-H/14, float32", results.rows.get("full"), _FULL),
        _tower(results),
        _limits(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_SCORED_SHARE = "peak of load and first score, times the file"

_IMPORT = """Fresh processes of `python -c "..."`, bytecode and page cache warm. The first row of each
statement has the median time of a process that imports nothing taken off, floored at 0.1 ms.
`import diffsynth_metrics` is lazy: torch and transformers are paid with the first metric, which the
second statement shows."""

_LOAD = """`PickScoreMetric.from_pretrained` on a ViT-H/14 checkpoint with random float32 weights and the
published names and shapes, in fresh processes with the file in the page cache; the first score is one
1024x1024 PNG with one prompt. Upstream reads its copy of the weights into anonymous memory; ours maps
the file, so its pages are read when a score first needs them, belong to the page cache, and are shared
by all processes that load the same file. They count in RSS once touched: the load alone therefore
flatters us, and the rows that include the first score are the fair ones. VmHWM is the kernel's highest
RSS of the process since its start, interpreter and libraries included; anonymous and mapped files are
RssAnon and RssFile, Pss the proportional size of `/proc/self/smaps_rollup`."""

_TINY = """16 pictures of 1024x1024, two layers of width 32, batch 16, gelu in both. Each round has a new
prompt (70 tokens; 10 to 70 tokens where there are as many prompts as images), because ours is
loaded with `cache_text=True`; the last row shows a prompt whose features it kept. Files are opened
and decoded within the measured call; upstream takes only PIL images, so it gets `PIL.Image.open(path)`.
Upstream loads only checkpoints of published size, so here its own wrapper and metric classes are put
around a `transformers.CLIPModel` with the same weights. For as many prompts as images upstream's
PickScore answers the matrix of all pairs; its diagonal is compared.
Scores of the same pixels differ by at most {same_pixels:.1g} (asserted below 0.01). Scores of the same
pictures differ by up to {difference:.2g} on the logit scale: ours resizes as Pillow does, to the bit,
upstream with torch's uint8 kernel, which rounds differently."""

_FULL = """One batch of pictures of 1024x1024, random weights, a new prompt in each round as above.
Upstream runs this network with quick_gelu, a product with a sigmoid; ours with the gelu that ViT-H/14
was trained with. The two therefore compute slightly different functions, and scores are not compared
at this size."""


def machine(command: str, seconds: float) -> str:
    """Return a table of what was run, when, for how long and where."""
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            f"| command | `{command}` |",
            f"| date | {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC |",
            f"| duration | {seconds / 60:.0f} min |",
            f"| machine | {_cpu()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib():.0f} GiB |",
            f"| system | {platform.system()} {platform.release()} |",
        ]
    )


def _head(results: Measurements, command: str, seconds: float) -> str:
    ours, upstream = results.about["ours"], results.about["upstream"]
    names = list(dict.fromkeys([*ours["versions"], *upstream["versions"]]))
    lines = [
        "# diffsynth_metrics against diffsynth.metrics",
        "Ratios of medians; **above 1, ours is faster or smaller**. Both packages score the same "
        "weights, pictures and prompts on the CPU in float32, each in a process of its own, one at a "
        "time, in turns; who begins alternates. The range is the lowest and the highest ratio of one "
        "round.",
        "\n".join(
            [
                machine(command, seconds),
                f"| load average at the start | {results.load_average:.2f} |",
                f"| torch threads, ours / upstream | {ours['threads']} / {upstream['threads']} |",
            ]
        ),
        "\n".join(
            ["| version of | ours | upstream |", "|---|---|---|"]
            + [
                f"| {n} | {ours['versions'].get(n, '-')} | {upstream['versions'].get(n, '-')} |"
                for n in names
            ]
        ),
    ]
    if results.load_average > 0.25 * ours["cores"]:
        lines.append("**The machine was busy when this began: do not trust these figures.**")
    return "\n\n".join(lines)


def _cpu() -> str:
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.machine()
    details = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    vectors = ", AVX-512" if "avx512f" in fields.get("flags", "").split() else ""
    return f"{fields['model name']} ({details}{vectors})"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _section(title: str, rows: list[Row] | None, text: str) -> str:
    if not rows:
        return ""
    table = ["| | unit | ours | upstream | ratio | range | rounds |", "|---|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        low, high = row.spread
        table.append(
            f"| {row.name} | {row.unit} | {_value(row.ours, row.unit)} | "
            f"{_value(row.upstream, row.unit)} | **{_number(row.ratio)}** | "
            f"{_number(low)} to {_number(high)} | {len(row.ours)} |"
        )
    return "\n\n".join([f"## {title}", "\n".join(table), text])


def _value(values: Sequence[float], unit: str) -> str:
    value = median(values)
    return f"{value / 1e6:.0f}" if unit == "MB" else _number(value)


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _get(results: Measurements, section: str) -> list[Row]:
    return results.rows.get(section, [])


def _tower(results: Measurements) -> str:
    if not results.tower:
        return ""
    ours, upstream = results.tower["ours"], results.tower["upstream"]
    flops = ours[0]["flops"]
    formula = ours[0]["flops_by_formula"]
    rates = {
        shape: max(answer["rates"][shape] for answer in ours + upstream) for shape in ours[0]["rates"]
    }
    peak = max(rates.values())
    table = ["| | ours | upstream |", "|---|--:|--:|"]
    seconds = [median([a["seconds"] for a in answers]) for answers in (ours, upstream)]
    achieved = [flops / s for s in seconds]
    table += [
        "| seconds for the batch | {:.2f} | {:.2f} |".format(*seconds),
        "| achieved GFLOP/s | {:.0f} | {:.0f} |".format(*(a / 1e9 for a in achieved)),
        "| **share of the peak** | **{:.0%}** | {:.0%} |".format(*(a / peak for a in achieved)),
    ]
    products = ", ".join(f"{shape}: {rate / 1e9:.0f}" for shape, rate in rates.items())
    return "\n\n".join(
        [
            "## The image tower against this machine's matrix products",
            "\n".join(table),
            f"The ViT-H/14 image tower alone, one batch. Its matrix products are {flops / 1e9:.0f} "
            f"GFLOP, attention included (torch's FlopCounterMode; by formula {formula / 1e9:.0f}). "
            "The peak is the fastest "
            f"float32 `torch.mm` in the same processes, with the same threads, right before and after "
            f"the tower; GFLOP/s by shape: {products}. What is missing to 100 % is softmax, "
            "layer norms, the activation, residual sums and the smaller products of attention.",
        ]
    )


def _limits(results: Measurements) -> str:
    blocks = []
    if load := _get(results, "load"):
        blocks.append(_memory_limits({row.name: row for row in load}))
    if results.parts:
        blocks.append(_tiny_limits(results))
    if results.tower and _get(results, "full"):
        blocks.append(_full_limits(results))
    return "\n\n".join(["## Limits", *blocks]) if blocks else ""


def _memory_limits(load: dict[str, Row]) -> str:
    imported = median(load["memory once imported, nothing loaded (RSS)"].ours)
    peak = median(load["peak of load and first score (VmHWM)"].ours)
    share, net = (
        median(load[_SCORED_SHARE].ours),
        median(load["the same, net of what imports took"].ours),
    )
    return (
        f"**Memory.** Of our peak of {peak / 1e6:.0f} MB with a first score ({share:.2f} times the "
        f"file), {imported / 1e6:.0f} MB are there before anything is loaded: the interpreter, torch "
        f"and transformers. The rest is {net:.2f} times the file: each weight is in memory at most "
        "once, and rows of the token embedding that no prompt used are not in memory at all. What is "
        "left to save is in the imports."
    )


def _tiny_limits(results: Measurements) -> str:
    parts, count = results.parts, results.parts["count"]
    ours, upstream = parts["ours"], parts["upstream"]
    rows = {row.name: row for row in _get(results, "tiny")}
    calls = rows[f"CLIP, {count} PIL images in memory, one prompt"]
    whole = {p: count / median(getattr(calls, p)) for p in ("ours", "upstream")}
    spent = {
        p: sum(part[name] for name in ("pixels", "network", "text"))
        for p, part in (("ours", ours), ("upstream", upstream))
    }
    serial, parallel = ours["resize, one image after the other"], ours["resize, all cores"]
    table = ["| CLIP, one prompt, PIL images in memory: milliseconds | ours | upstream |"]
    table += ["|---|--:|--:|"]

    def line(name: str, *seconds: float | None) -> str:
        cells = ["-" if s is None else f"{s * 1e3:.1f}" for s in seconds]
        return f"| {name} | {' | '.join(cells)} |"

    copying = upstream["copy to RGB"]
    table += [
        line("Pillow's resize and crop, one image after the other", serial, None),
        line("the same on all cores", parallel, None),
        line("copies to RGB", None, copying),
        line("pixels: resize, crop, normalise", ours["pixels"], upstream["pixels"]),
        line("image network", ours["network"], upstream["network"]),
        line("text, tokenizer included", ours["text"], upstream["text"]),
        line(
            "rest (upstream encodes one prompt once per image in CLIP)",
            whole["ours"] - spent["ours"],
            whole["upstream"] - spent["upstream"] - copying,
        ),
        line("whole call", whole["ours"], whole["upstream"]),
    ]
    text = [
        f"**Tiny tower.** Pillow's bicubic filter costs {serial / count * 1e3:.1f} ms per picture "
        f"on one core, {parallel / count * 1e3:.1f} ms on all {results.about['ours']['cores']}. "
        "To give the pixels of the official pipeline to the bit, each of its steps has to be "
        "done, so no call can be faster than that, plus the decoding of files. "
        "Upstream resizes with torch's uint8 kernel, "
        f"{upstream['pixels'] / count * 1e3:.1f} ms per picture with normalisation "
        f"({upstream['pixels, one thread'] / count * 1e3:.1f} ms with one torch thread), whose pixels "
        "are not the official ones. The largest ratio that an implementation of ours without any other "
        "cost could reach in this run:",
    ]
    bounds = ["| | our floor (ms) | our time (ms) | largest ratio | reached |"]
    bounds += ["|---|--:|--:|--:|--:|"]
    for row in rows.values():
        floor = parallel
        for kind, source in (("jpeg", "JPEG files"), ("png", "PNG files")):
            floor += parts[kind]["all"] if source in row.name else 0
        ours_seconds, theirs = (count / median(v) for v in (row.ours, row.upstream))
        bounds.append(
            f"| {row.name} | {floor * 1e3:.1f} | {ours_seconds * 1e3:.1f} | "
            f"{theirs / floor:.2f} | {row.ratio:.2f} |"
        )
    decode = "; ".join(
        f"{kind.upper()} {parts[kind]['one'] / count * 1e3:.1f} ms on one core, "
        f"{parts[kind]['all'] / count * 1e3:.1f} ms on all"
        for kind in ("jpeg", "png")
    )
    found = (
        f"Found by timing each part by itself in the processes above, in turns. Decoding, per picture: "
        f"{decode}. The floor is Pillow's resize, and for files its decoding, spread over all cores."
    )
    return "\n\n".join(["\n".join(table), *text, "\n".join(bounds), found])


_FAULTS = """What is left between the tower and its matrix products is memory. An activation of more
than 32 MB (glibc's largest threshold) is mapped from the kernel, zeroed page by page, and given back
after each operation, unless the process happens to hold enough freed memory. Ours gives the network at
most four images at a time, no activation of which is larger, but freed memory at the end of the heap is
given back all the same; upstream gives it all 16, larger products. How much is mapped anew depends on
what a process did before, for both packages, and moves the ratio from run to run. Both need the same
products, and only upstream's CLIP encodes a prompt more than once. Pages that were mapped anew in one
call (`ru_minflt`, median):"""


def _faults(results: Measurements) -> str:
    table = ["| | ours | upstream |", "|---|--:|--:|"]
    table += [
        f"| {name} | {faults['ours']:,.0f} | {faults['upstream']:,.0f} |"
        for name, faults in results.faults.items()
    ]
    return "\n".join(table)


def _full_limits(results: Measurements) -> str:
    answers = results.tower["ours"]
    tower = median([answer["seconds"] for answer in answers])
    peak = max(rate for answer in answers for rate in answer["rates"].values())
    ideal = answers[0]["flops"] / peak
    lines = [
        "**Full size.** Nearly everything is the image tower: "
        f"{tower:.2f} s of ours for the batch, of which its matrix products alone take {ideal:.2f} s "
        "at this machine's peak. Both packages need the same products. The largest ratio with our "
        "tower and nothing else, and with a tower at the peak:",
        "| | ours (s) | upstream (s) | tower only | tower at the peak | reached |\n"
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in _get(results, "full"):
        count = int(row.name.split(", ")[1].split()[0])
        ours, upstream = (count / median(values) for values in (row.ours, row.upstream))
        lines[-1] += (
            f"\n| {row.name} | {ours:.2f} | {upstream:.2f} | {upstream / tower:.2f} | "
            f"{upstream / ideal:.2f} | {row.ratio:.2f} |"
        )
    if results.faults:
        lines += [_FAULTS, _faults(results)]
    return "\n\n".join(lines)

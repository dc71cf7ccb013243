"""Compare the judges with those of diffsynth.metrics 2.1.12 in one run: ``python benchmarks/judges.py``.

Both packages get the same tiny random networks, pictures and prompts, each in a process of its own, in
turns as in ``compare.py``. The networks never end an answer, so both write equally many tokens.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import compare
import materials
import report
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from diffsynth_metrics.testing import tiny_checkpoint

COUNT = 8
TOKENS = 96  # about what an answer of UnifiedReward 2.0 has
ROUNDS = 5
TITLES = {
    "unified_reward_2": "UnifiedReward 2.0",
    "unified_reward_edit": "UnifiedReward-Edit, `edit_pointwise_score`",
    "qwen_image_bench": "Qwen-Image-Bench, five dimensions",
}

_HEAD = """# Judges against diffsynth.metrics

{count} pictures of 512×512 with prompts of mixed lengths, tiny random networks of the judges'
architectures in float32 on the CPU, {tokens} new tokens per answer. Ratios of medians over {rounds}
round(s) in turns, each package in a process of its own; **above 1, ours is faster**. A turn is a call
that is not timed, after which caches are warm, and one that is. A pass is one sequential call of the
network; on an accelerator, where a pass reads all weights whatever the batch, passes are what costs.

| judge | ours, images/s | upstream | ratio | range | passes, ours | upstream | ms a pass | upstream |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""

_REMARKS = """Upstream returns the texts of Qwen-Image-Bench only. Its prompt of UnifiedReward 2.0 is not
the official one (docs/metrics.md), so the texts there differ.

A pass of ours has the rows of all pictures; its milliseconds include preparing pictures and reading
prompts. That work is the same for both packages and is no cheaper for many prompts at once on a CPU, so
the ratio stays below the ratio of the passes. With real weights a pass costs what it reads of the
weights, once for all rows.
"""


def random_judge(name: str, folder: Path) -> Path:
    """Write a tiny checkpoint whose answers never end."""
    if (folder / "config.json").exists():
        return folder
    tiny_checkpoint(name, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():  # a logit of zero is never the largest of many random ones
        model.lm_head.weight[[tokenizer.eos_token_id, tokenizer.pad_token_id]] = 0
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measure(pythons: dict[str, str], rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return one record per judge, and what both workers say about themselves."""
    paths = materials.pictures(compare.WORK / "pictures", COUNT, 512)["png"]
    records = []
    workers = {
        package: compare.Process(package, pythons[package], "judge_worker.py")
        for package in compare.PACKAGES
    }
    try:
        for process in workers.values():
            process("start")
        for name, title in TITLES.items():
            folder = str(random_judge(name, compare.WORK / "judges" / name))
            prompts = materials.mixed_prompts(COUNT, name)
            for process in workers.values():
                process("load", key=name, name=name, folder=folder, tokens=TOKENS, batch_size=40)
                process("score", key=name, name=name, prompts=prompts[:2], paths=paths[:2])
            answers: dict[str, list[dict[str, Any]]] = {package: [] for package in compare.PACKAGES}
            for index in range(rounds):
                for package in compare.in_turn(index):
                    compare.say(f"{title}: round {index + 1}, {package}")
                    request = {"key": name, "name": name, "prompts": prompts, "paths": paths}
                    workers[package]("score", **request)
                    answers[package].append(workers[package]("score", **request))
            rates = {p: [COUNT / a["seconds"] for a in answers[p]] for p in compare.PACKAGES}
            records.append(
                {
                    "row": report.Row(title, "images/s", **rates),
                    "passes": {p: answers[p][0]["passes"] for p in compare.PACKAGES},
                    "same": answers["ours"][0]["texts"] == answers["upstream"][0]["texts"],
                    "has_texts": answers["upstream"][0]["texts"][0] is not None,
                }
            )
        return records, {package: process("about") for package, process in workers.items()}
    finally:
        for process in workers.values():
            process.__exit__()


def markdown(
    records: list[dict[str, Any]], about: dict[str, Any], rounds: int, command: str, seconds: float
) -> str:
    """Return the results file."""
    lines = [_HEAD.format(count=COUNT, tokens=TOKENS, rounds=rounds)]
    for record in records:
        row, (low, high), passes = record["row"], record["row"].spread, record["passes"]
        cells = [
            row.name,
            f"{statistics.median(row.ours):.2f}",
            f"{statistics.median(row.upstream):.2f}",
            f"**{row.ratio:.1f}**",
            f"{low:.1f} to {high:.1f}",
            str(passes["ours"]),
            str(passes["upstream"]),
            f"{1000 * COUNT / statistics.median(row.ours) / passes['ours']:.1f}",
            f"{1000 * COUNT / statistics.median(row.upstream) / passes['upstream']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    same = [record for record in records if record["has_texts"]]
    lines += [
        f"{record['row'].name}: both packages wrote "
        f"{'the same texts' if record['same'] else '**different texts**'}."
        for record in same
    ]
    lines += [
        "",
        _REMARKS,
        "| | |",
        "|---|---|",
        f"| command | `{command}` |",
        f"| date | {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} |",
        f"| duration | {seconds:.0f} s |",
        f"| machine | {platform.machine()}, torch threads {about['ours']['threads']} / "
        f"{about['upstream']['threads']} |",
    ]
    for package in compare.PACKAGES:
        versions = ", ".join(f"{name} {value}" for name, value in about[package]["versions"].items())
        lines.append(f"| {package} | {versions} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", metavar="PATH", help="as for compare.py")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=compare.HERE / "RESULTS_JUDGES.md")
    arguments = parser.parse_args()
    compare.LOGS.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    pythons = {"ours": sys.executable, "upstream": arguments.peer_python or compare.peer_python()}
    records, about = measure(pythons, arguments.rounds)
    command = "python benchmarks/judges.py" + (" --peer-python PATH" if arguments.peer_python else "")
    text = markdown(records, about, arguments.rounds, command, time.perf_counter() - start)
    print(text)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

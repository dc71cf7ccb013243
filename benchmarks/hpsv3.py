"""Compare HPSv3 with diffsynth.metrics 2.1.12 in one run: ``python benchmarks/hpsv3.py``.

Both packages get the same random weights, pictures and prompts, each in a process of its own, and take
turns. ``--peer-python`` is an environment that has ``diffsynth==2.1.12``. The table goes to
RESULTS_HPSV3.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work"
PACKAGES = ("ours", "upstream")
COUNT = 8
SIZES = {
    "tiny": {},
    # The proportions of Qwen2-VL at a fraction of its size: about 100 million parameters.
    "middle": {
        "hidden_size": 768,
        "intermediate_size": 4096,
        "num_attention_heads": 6,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
}
MIDDLE_VISION = {"depth": 8, "embed_dim": 320, "hidden_size": 768, "num_heads": 4}


def checkpoint(size: str) -> Path:
    """Write a checkpoint of random weights, once."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig

    from diffsynth_metrics.networks.hpsv3 import HPSv3Network
    from diffsynth_metrics.testing import randomize, tiny_checkpoint

    folder = tiny_checkpoint("hpsv3", WORK / f"hpsv3_{size}")
    if size == "middle":
        config = json.loads((folder / "config.json").read_text()) | SIZES[size]
        config["vision_config"] |= MIDDLE_VISION
        (folder / "config.json").write_text(json.dumps(config))
        network = HPSv3Network(Qwen2VLConfig.from_dict(config))
        randomize(network, gain=1.0)
        head = torch.zeros(config["vocab_size"], config["hidden_size"])
        weights = network.state_dict() | {"lm_head.weight": head}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_ours(folder: Path, positions: str) -> Any:
    import torch

    from diffsynth_metrics import HPSv3Metric, ModelConfig

    return HPSv3Metric.from_pretrained(
        ModelConfig(path=folder),
        device="cpu",
        torch_dtype=torch.float32,
        positions=positions,
    )


def load_upstream(folder: Path) -> Any:
    """Put the peer together as its ``from_pretrained`` does, which only knows the published size."""
    from diffsynth.metrics.hpsv3 import HPSv3Metric
    from diffsynth.models.hpsv3 import HPSv3Model, HPSv3Qwen2VLRewardModel
    from diffsynth.utils.state_dict_converters.image_metrics import (
        ImageMetricsHPSv3StateDictConverter,
    )
    from safetensors.torch import load_file
    from transformers import AutoProcessor, Qwen2VLConfig

    config = Qwen2VLConfig.from_dict(json.loads((folder / "config.json").read_text()))
    processor = AutoProcessor.from_pretrained(folder, padding_side="right")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    special = processor.tokenizer.convert_tokens_to_ids(["<|Reward|>"])
    network = HPSv3Qwen2VLRewardModel(config, special_token_ids=special)
    weights = ImageMetricsHPSv3StateDictConverter(load_file(folder / "model.safetensors"))
    network.load_state_dict(weights)
    network.config.pad_token_id = processor.tokenizer.pad_token_id
    network.config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    return HPSv3Metric(HPSv3Model(model=network, processor=processor).eval())


def parts(package: str, metric: Any) -> dict[str, Any]:
    """Return the modules whose calls are the sequential passes of a score."""
    if package == "ours":
        return {"decoder": metric.model.model, "vision tower": metric.model.visual}
    network = metric.model.model.model
    return {"decoder": network.language_model, "vision tower": network.visual}


def count_pass(passes: Counter[str], name: str, *_: Any) -> None:
    passes[name] += 1


def work(package: str) -> None:
    """Answer requests of the main process as JSON lines."""
    import PIL.Image
    import torch

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    metrics: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        size = request["size"]
        if size not in metrics:
            folder = Path(request["folder"])
            metrics[size] = (
                load_ours(folder, request["positions"]) if package == "ours" else load_upstream(folder)
            )
        metric = metrics[size]
        passes: Counter[str] = Counter()
        hooks = [
            module.register_forward_hook(partial(count_pass, passes, name))
            for name, module in parts(package, metric).items()
        ]
        images = [PIL.Image.open(path) for path in request["paths"]]
        for image in images:
            image.load()
        start = time.perf_counter()
        scores = metric.compute(request["prompts"], images)
        seconds = time.perf_counter() - start
        for hook in hooks:
            hook.remove()
        answer = {"seconds": seconds, "scores": scores, "passes": passes}
        answers.write(json.dumps(answer | {"threads": torch.get_num_threads()}) + "\n")


class Worker:
    """A process of one package."""

    def __init__(self, package: str, python: str, positions: str = "official") -> None:
        """Start it; nothing is imported before the first request."""
        self._positions = positions
        self._process = subprocess.Popen(
            [python, str(HERE / "hpsv3.py"), "--worker", package],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=WORK,
        )

    def __call__(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request | {"positions": self._positions}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[~middle]) / 2


def measure(size: str, rounds: int, peer: str, pictures: dict[str, list[str]]) -> list[str]:
    import materials

    folder = str(checkpoint(size))
    workers = {"ours": Worker("ours", sys.executable), "upstream": Worker("upstream", peer)}
    same = Worker("ours", sys.executable, "diffsynth")
    lines = []
    for kind, paths in pictures.items():
        prompts = materials.mixed_prompts(COUNT, f"hpsv3/{kind}")
        request = {"size": size, "folder": folder, "paths": paths, "prompts": prompts}
        first = {package: worker(**request) for package, worker in workers.items()}
        pairs = zip(same(**request)["scores"], first["upstream"]["scores"], strict=True)
        difference = max(abs(a - b) for a, b in pairs)
        if difference > 0.05:
            raise RuntimeError(f"{size}: with the same positions scores differ by {difference}: unfair")
        rates: dict[str, list[float]] = {package: [] for package in PACKAGES}
        for index in range(rounds):
            for package in PACKAGES if index % 2 == 0 else PACKAGES[::-1]:
                rates[package].append(COUNT / workers[package](**request)["seconds"])
        ours, upstream = (median(rates[package]) for package in PACKAGES)
        ratios = [a / b for a, b in zip(rates["ours"], rates["upstream"], strict=True)]
        passes = (
            ", ".join(f"{count} {name}" for name, count in first[package]["passes"].items())
            for package in PACKAGES
        )
        lines.append(
            f"| {size}, {kind} | {ours:.2f} | {upstream:.2f} | {ours / upstream:.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {' | '.join(passes)} | {difference:.1e} |"
        )
        print(lines[-1], flush=True)
    for worker in (*workers.values(), same):
        worker.close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=PACKAGES, help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", help="Python of an environment with diffsynth==2.1.12")
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS_HPSV3.md")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    import materials
    import torch
    from compare import peer_python

    WORK.mkdir(exist_ok=True)
    start = time.perf_counter()
    peer = arguments.peer_python or peer_python()
    pictures = {
        f"{COUNT} pictures of {side} x {side}": materials.pictures(WORK / "pictures", COUNT, side)["png"]
        for side in (512, 1024)
    }
    rows = [
        line
        for size in arguments.only
        for line in measure(size, 21 if size == "tiny" else 3, peer, pictures)
    ]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pillow"))
    text = f"""# HPSv3 next to diffsynth.metrics 2.1.12

`python benchmarks/hpsv3.py`, {time.perf_counter() - start:.0f} s on {len(os.sched_getaffinity(0))} cores
({platform.machine()}, {torch.get_num_threads()} threads), {libraries}.
Random weights in float32, the same for both; {COUNT} PIL images in memory, as many prompts. Medians of
rounds in which the packages take turns; the extremes of the ratio are of single rounds. "tiny" is the
checkpoint of the tests, where most time goes into preparing pictures and text; "middle" has about 100
million parameters and hidden size 768, where the network decides.

The last column is the largest difference of scores when our metric is loaded with
`positions="diffsynth"`: the pixels are resized by Pillow in both, and the rest is rounding. With the
official positions, which are what is timed, scores are others (see docs/metrics.md).

| weights, pictures | images/s, ours | upstream | ratio | passes, ours | passes, upstream | difference |
|---|---|---|---|---|---|---|
"""
    arguments.output.write_text(text + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""One package in one process: reads requests as JSON lines and answers with times, scores, memory.

``compare.py`` starts it as ``python worker.py ours`` and ``python worker.py upstream``, each in the
environment of its package. Everything runs on the CPU in float32 with torch's own number of threads.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Answer = dict[str, Any]

LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "safetensors", "pillow", "numpy")


def timed(action: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def cores() -> int:
    return len(os.sched_getaffinity(0))


def memory() -> dict[str, int]:
    """Return this process's memory in bytes, as the kernel counts it."""
    status = _kilobytes(Path("/proc/self/status"))
    rollup = _kilobytes(Path("/proc/self/smaps_rollup"))
    return {
        "peak_rss": status["VmHWM"],
        "rss": status["VmRSS"],
        "anonymous": status["RssAnon"],
        "file": status["RssFile"],
        "pss": rollup["Pss"],
    }


def _kilobytes(path: Path) -> dict[str, int]:
    fields = (line.split() for line in path.read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}


class Ours:
    """The package of this repository."""

    distribution = "diffsynth-metrics"
    at_once = 3  # how many images its network gets at once on a CPU

    def __init__(self) -> None:
        """Import the package as a user would who is about to score."""
        from diffsynth_metrics import CLIPMetric, ModelConfig, PickScoreMetric

        self._classes = {"clip": CLIPMetric, "pickscore": PickScoreMetric}
        self._config = ModelConfig

    def load(self, name: str, weights: str, processor: str, size: str) -> Any:
        """Load a metric; tiny and full size take the same path."""
        return self._classes[name].from_pretrained(
            self._config(path=weights), self._config(path=processor), device="cpu", cache_text=True
        )

    def open(self, paths: list[str]) -> list[Any]:
        """Return what the package takes for files: their paths."""
        return list(paths)

    def network(self, metric: Any) -> Any:
        """Return the transformers CLIPModel inside the metric, which is only looked at."""
        return metric.model

    def components(self, metric: Any, images: list[Any], prompt: str) -> dict[str, Any]:
        """Return what a call consists of, as actions to be timed."""
        from diffsynth_metrics.pixels.batches import pixel_batches

        transform = metric.transform
        return {
            "resize, one image after the other": lambda: [transform.from_pil(i) for i in images],
            "resize, all cores": lambda: _on_all_cores(transform.from_pil, images),
            "pixels": lambda: next(
                pixel_batches(images, transform, batch_size=len(images), device=metric.device)
            ),
            "text": lambda: self.encode_text(metric, prompt),
        }

    def encode_text(self, metric: Any, prompt: str) -> Any:
        """Return the normalised features ``[1, D]`` of a prompt."""
        return metric.encode_text(prompt)


class Upstream:
    """``diffsynth.metrics``."""

    distribution = "diffsynth"
    at_once = 1 << 30

    def __init__(self) -> None:
        """Import the package as a user would who is about to score."""
        from diffsynth.metrics import CLIPMetric, ModelConfig, PickScoreMetric

        self._classes = {"clip": CLIPMetric, "pickscore": PickScoreMetric}
        self._config = ModelConfig

    def load(self, name: str, weights: str, processor: str, size: str) -> Any:
        """Load a metric; the tiny one is put together by hand.

        The package knows a checkpoint by its fingerprint and can load no other size, so for the tiny
        tower its own wrapper is put around a network that transformers builds from the config.
        """
        if size == "full":
            return self._classes[name].from_pretrained(
                self._config(path=weights), self._config(path=processor), device="cpu"
            )
        from diffsynth.models.clip import CLIPModel as ClipWrapper
        from diffsynth.models.pickscore import PickScoreModel
        from safetensors.torch import load_file
        from transformers import AutoProcessor, CLIPConfig, CLIPModel

        network = CLIPModel(CLIPConfig.from_pretrained(Path(weights).parent))
        network.load_state_dict(load_file(weights))
        wrapper = {"clip": ClipWrapper, "pickscore": PickScoreModel}[name]
        model = wrapper(model=network, processor=AutoProcessor.from_pretrained(processor))
        return self._classes[name](model.eval())

    def open(self, paths: list[str]) -> list[Any]:
        """Return what the package takes for files: PIL images, which it decodes later."""
        import PIL.Image

        return [PIL.Image.open(path) for path in paths]

    def network(self, metric: Any) -> Any:
        """Return the transformers CLIPModel inside the metric."""
        return metric.model.model

    def components(self, metric: Any, images: list[Any], prompt: str) -> dict[str, Any]:
        """Return what a call consists of, as actions to be timed."""
        model = metric.model
        return {
            "copy to RGB": lambda: [image.convert("RGB") for image in images],
            "pixels": lambda: model._processor_call(images=images)["pixel_values"],
            "pixels, one thread": lambda: _on_one_thread(lambda: model._processor_call(images=images)),
            "text": lambda: self.encode_text(metric, prompt),
        }

    def encode_text(self, metric: Any, prompt: str) -> Any:
        """Return the normalised features ``[1, D]`` of a prompt."""
        return metric.model.get_text_features(prompt)


class Worker:
    """The requests; each public method is one, with its arguments by name."""

    def __init__(self, package: str) -> None:
        """Nothing is imported before the first request, so that imports can be measured."""
        self._package = package
        self._api: Any = None
        self._metrics: dict[str, Any] = {}
        self._decoded: dict[str, Any] = {}

    def start(self) -> Answer:
        """Import the package."""
        seconds, self._api = timed({"ours": Ours, "upstream": Upstream}[self._package])
        return {"seconds": seconds, "memory": memory()}

    def about(self) -> Answer:
        """Return versions and threads."""
        import torch

        versions = {"python": platform.python_version()}
        for name in (self._api.distribution, *LIBRARIES):
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = "absent"
        return {"versions": versions, "threads": torch.get_num_threads(), "cores": cores()}

    def load(self, key: str, name: str, weights: str, processor: str, size: str) -> Answer:
        """Load a metric and keep it under a key."""
        seconds, metric = timed(lambda: self._api.load(name, weights, processor, size))
        self._metrics[key] = metric
        return {"seconds": seconds, "memory": memory()}

    def decode(self, paths: list[str]) -> Answer:
        """Decode pictures for the later scores from memory."""
        import PIL.Image

        for path in paths:
            with PIL.Image.open(path) as image:
                self._decoded[path] = image.convert("RGB")
        return {}

    def score(self, key: str, prompt: str | list[str], paths: list[str], source: str) -> Answer:
        """Time one call of ``compute``; opening files belongs to it."""
        metric = self._metrics[key]

        def call() -> list[Any]:
            in_memory = source == "memory"
            images = [self._decoded[p] for p in paths] if in_memory else self._api.open(paths)
            result: list[Any] = metric.compute(prompt, images)
            return result

        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds, scores = timed(call)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        if isinstance(scores[0], list):  # upstream's PickScore answers pairs with the whole matrix
            scores = [row[index] for index, row in enumerate(scores)]
        return {"seconds": seconds, "scores": scores, "memory": memory(), "faults": faults}

    def score_pixels(self, key: str, prompt: str, count: int) -> Answer:
        """Score random pixels, which are the same in both packages, past all preprocessing."""
        import torch
        from torch.nn.functional import normalize

        metric, network = self._metrics[key], self._api.network(self._metrics[key])
        size = network.config.vision_config.image_size
        pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            output = network.get_image_features(pixel_values=pixels)
            image_features = normalize(getattr(output, "pooler_output", output), dim=-1)
            text_features = self._api.encode_text(metric, prompt)
            scores = network.logit_scale.exp() * (text_features @ image_features.T)[0]
        return {"scores": scores.tolist()}

    def parts(self, key: str, prompt: str, paths: list[str]) -> Answer:
        """Time the parts of a call, each once; the prompt must be a new one."""
        import torch

        metric, network = self._metrics[key], self._api.network(self._metrics[key])
        images = [self._decoded[path] for path in paths]
        seconds: dict[str, float] = {}
        with torch.no_grad():
            for part, action in self._api.components(metric, images, prompt).items():
                seconds[part], result = timed(action)
                if part == "pixels":
                    seconds["network"], _ = timed(
                        lambda pixels=result: network.get_image_features(pixel_values=pixels)
                    )
        return {"seconds": seconds}

    def decoding(self, paths: list[str]) -> Answer:
        """Time the decoding of files, one after the other and on all cores."""
        import PIL.Image

        def decode(path: str) -> None:
            with PIL.Image.open(path) as image:
                image.load()

        one, _ = timed(lambda: [decode(path) for path in paths])
        every, _ = timed(lambda: _on_all_cores(decode, paths))
        return {"one": one, "all": every}

    def tower(self, key: str, batch: int) -> Answer:
        """Time the image tower alone, as a call uses it, and large matrix products around it."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        tower = self._api.network(self._metrics[key]).vision_model
        size = tower.config.image_size
        pixels = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            # The counter does not know the CPU's fused attention, but the products it consists of.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                tower(pixel_values=pixels[:1])
            before = _matrix_product_rates(batch)
            parts = pixels.split(min(self._api.at_once, batch))
            seconds, _ = timed(lambda: [tower(pixel_values=part) for part in parts])
            after = _matrix_product_rates(batch)
        rates = {shape: max(before[shape], after[shape]) for shape in before}
        return {
            "seconds": seconds,
            "flops": counter.get_total_flops() * batch,
            "flops_by_formula": _vision_flops(tower.config) * batch,
            "rates": rates,
        }


def _on_all_cores(action: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(min(cores(), len(items))) as pool:
        return list(pool.map(action, items))


def _on_one_thread(action: Callable[[], T]) -> T:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return action()
    finally:
        torch.set_num_threads(threads)


def _matrix_product_rates(batch: int) -> dict[str, float]:
    """Return float32 FLOP/s of torch.mm, the best of three, for large shapes and the tower's own."""
    import torch

    tokens = batch * 257
    rates = {}
    for m, k, n in ((4096, 4096, 4096), (tokens, 1280, 5120), (tokens, 1280, 1280)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        fastest = min(timed(lambda a=a, b=b: torch.mm(a, b))[0] for _ in range(3))
        rates[f"{m} x {k} x {n}"] = 2 * m * k * n / fastest
    return rates


def _vision_flops(config: Any) -> int:
    """Count the matrix products of a vision transformer on one image, by formula."""
    patches = (config.image_size // config.patch_size) ** 2
    tokens, width, hidden = patches + 1, config.hidden_size, config.intermediate_size
    patch = patches * 3 * config.patch_size**2 * width
    layer = 4 * tokens * width**2 + 2 * tokens * width * hidden + 2 * tokens**2 * width
    return int(2 * (patch + config.num_hidden_layers * layer))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # upstream prints while it loads; the answers keep a channel of their own
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        method = getattr(worker, request.pop("request"))
        answers.write(json.dumps(method(**request)) + "\n")


if __name__ == "__main__":
    main()

"""One package in one process, asked by ``judges.py``: loads tiny judges, answers with times."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import PIL.Image
import torch
import worker
from worker import Answer, timed

IMAGES_OF_A_SAMPLE = {"unified_reward_2": 1, "unified_reward_edit": 2, "qwen_image_bench": 1}


def load_ours(name: str, folder: str, tokens: int, batch_size: int) -> tuple[Any, Any]:
    """Return a metric and its network."""
    import diffsynth_metrics as package

    classes = {
        "unified_reward_2": package.UnifiedReward2Metric,
        "unified_reward_edit": package.UnifiedRewardEditMetric,
        "qwen_image_bench": package.QwenImageBenchMetric,
    }
    metric = classes[name].from_pretrained(
        package.ModelConfig(path=folder),
        device="cpu",
        torch_dtype=torch.float32,
        max_new_tokens=tokens,
        batch_size=batch_size,
    )
    return metric, metric.model


def load_upstream(name: str, folder: str, tokens: int, batch_size: int) -> tuple[Any, Any]:
    """Return upstream's own metric around a network that transformers loads.

    It knows a checkpoint by its fingerprint and can load no other size; it has no batch size.
    """
    from diffsynth import metrics
    from diffsynth.models import qwen_image_bench, unified_reward_2, unified_reward_edit
    from transformers import AutoModelForImageTextToText, AutoProcessor

    classes = {
        "unified_reward_2": (metrics.UnifiedReward2Metric, unified_reward_2.UnifiedReward2Model),
        "unified_reward_edit": (
            metrics.UnifiedRewardEditMetric,
            unified_reward_edit.UnifiedRewardEditModel,
        ),
        "qwen_image_bench": (
            metrics.QwenImageBenchMetric,
            qwen_image_bench.QwenImageBenchModel,
        ),
    }
    metric, model = classes[name]
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    return metric(model(network, processor, max_new_tokens=tokens).eval()), network


class Worker:
    """Answers the requests of ``judges.py``."""

    def __init__(self, package: str) -> None:
        """Remember which package this is."""
        self._package = package
        self._metrics: dict[str, Any] = {}
        self._passes = 0

    def start(self) -> Answer:
        """Import torch and transformers, which both packages use."""
        import transformers  # noqa: F401

        return {}

    def about(self) -> Answer:
        """Return versions and threads."""
        own = {"ours": "diffsynth-metrics", "upstream": "diffsynth"}[self._package]
        versions = {name: version(name) for name in (own, "torch", "torchvision", "transformers")}
        return {"versions": versions, "threads": torch.get_num_threads()}

    def load(self, key: str, name: str, folder: str, tokens: int, batch_size: int) -> Answer:
        """Load a judge and count the passes through its network from then on."""
        load = load_ours if self._package == "ours" else load_upstream
        metric, network = load(name, folder, tokens, batch_size)
        network.model.register_forward_pre_hook(self._count)
        self._metrics[key] = metric
        return {}

    def score(self, key: str, name: str, prompts: list[str], paths: list[str]) -> Answer:
        """Evaluate pairs of prompts and pictures; return the time, the passes and the scores."""
        pictures = [PIL.Image.open(path).convert("RGB") for path in paths]
        images: list[Any] = pictures
        if IMAGES_OF_A_SAMPLE[name] == 2:
            images = [
                [picture, picture.transpose(PIL.Image.Transpose.ROTATE_180)] for picture in pictures
            ]
        self._passes = 0
        seconds, rows = timed(lambda: self._metrics[key].evaluate(prompts, images))
        texts = [row.get("raw_outputs") for row in rows]
        return {"seconds": seconds, "passes": self._passes, "texts": texts}

    def _count(self, *_: object) -> None:
        self._passes += 1


def main() -> None:
    """Answer requests until the input ends."""
    worker.Worker = Worker  # type: ignore[assignment,misc]
    worker.main()


if __name__ == "__main__":
    main()

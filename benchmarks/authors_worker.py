"""HPSv2, Aesthetic or ImageReward by one of three packages, asked in JSON lines.

``authors.py`` starts it as ``python authors_worker.py ours``, ``upstream`` or ``authors``. Everything
runs on the CPU in float32 with torch's own number of threads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import Answer, timed

Images = list[Any]
Score = Callable[[str, Images], list[float]]
PARITY = Path(__file__).resolve().parent.parent / "tests" / "parity"


def ours(name: str, folder: Path, size: str) -> Score:
    """Return ``compute`` of this repository's metric."""
    import diffsynth_metrics

    classes = {
        "hpsv2": "HPSv2Metric",
        "aesthetic": "AestheticMetric",
        "image_reward": "ImageRewardMetric",
    }
    metric_class = getattr(diffsynth_metrics, classes[name])
    metric = metric_class.from_pretrained(diffsynth_metrics.ModelConfig(path=folder), device="cpu")
    if name == "aesthetic":
        return lambda prompt, images: metric.compute(images)
    return lambda prompt, images: metric.compute(prompt, images)


def upstream(name: str, folder: Path, size: str) -> Score:
    """Return ``compute`` of ``diffsynth.metrics``; the tiny networks are put together by hand.

    The package knows a checkpoint by its fingerprint and can load no other size, so for the tiny ones
    its own wrapper is put around a network from transformers, filled by the package's own converter.
    """
    from diffsynth.metrics import AestheticMetric, HPSv2Metric, ImageRewardMetric, ModelConfig

    classes = {"hpsv2": HPSv2Metric, "aesthetic": AestheticMetric, "image_reward": ImageRewardMetric}
    if size == "full":
        metric = classes[name].from_pretrained(
            ModelConfig(path=str(folder / "model.safetensors")),
            ModelConfig(path=str(folder)),
            device="cpu",
        )
    else:
        metric = classes[name](_TINY_UPSTREAM[name](folder).eval())
    if name == "aesthetic":
        return lambda prompt, images: metric.compute(images)
    return lambda prompt, images: metric.compute(prompt, images)


def _upstream_hpsv2(folder: Path) -> Any:
    from diffsynth.models.hpsv2 import HPSv2Model
    from diffsynth.utils.state_dict_converters.image_metrics import (
        ImageMetricsOpenCLIPStateDictConverter,
    )
    from safetensors.torch import load_file
    from transformers import AutoProcessor, CLIPConfig, CLIPModel

    sizes = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    vision, text = sizes["vision_cfg"], sizes["text_cfg"]

    def tower(width: int, heads: int, layers: int) -> dict[str, Any]:
        return {
            "hidden_act": "quick_gelu",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
        }

    config = CLIPConfig(
        projection_dim=sizes["embed_dim"],
        text_config=tower(text["width"], text["heads"], text["layers"]),
        vision_config=tower(vision["width"], vision["width"] // vision["head_width"], vision["layers"])
        | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
    )
    network = CLIPModel(config)
    weights = ImageMetricsOpenCLIPStateDictConverter(load_file(folder / "model.safetensors"))
    network.load_state_dict(weights)
    return HPSv2Model(model=network, processor=AutoProcessor.from_pretrained(folder))


def _upstream_aesthetic(folder: Path) -> Any:
    from diffsynth.models.aesthetic import AestheticMLP, AestheticModel
    from safetensors.torch import load_file
    from torch.nn import Linear
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig.from_pretrained(folder)
    model = AestheticModel(
        AestheticMLP(config.projection_dim),
        CLIPVisionModel(config),
        Linear(config.hidden_size, config.projection_dim, bias=False),
        CLIPImageProcessor.from_pretrained(folder),
    )
    model.load_state_dict(_renamed(load_file(folder / "model.safetensors"), model))
    return model


def _upstream_image_reward(folder: Path) -> Any:
    from diffsynth.models.image_reward import ImageRewardModel
    from diffsynth.utils.state_dict_converters.image_metrics import (
        ImageMetricsImageRewardStateDictConverter,
    )
    from safetensors.torch import load_file
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

    tokenizer = BertTokenizer.from_pretrained(folder)
    model = ImageRewardModel(BlipForImageTextRetrieval(BlipConfig.from_pretrained(folder)), tokenizer)
    weights = ImageMetricsImageRewardStateDictConverter(load_file(folder / "model.safetensors"))
    # The retrieval heads score nothing here, and the package builds them in one size only.
    model.load_state_dict(_renamed(weights, model), strict=False)
    return model


def _renamed(weights: dict[str, Any], model: Any) -> dict[str, Any]:
    """Drop what does not fit the model; newer transformers name CLIP's vision tower alike."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return {name: value for name, value in weights.items() if shapes.get(name) == value.shape}


_TINY_UPSTREAM: dict[str, Callable[[Path], Any]] = {
    "hpsv2": _upstream_hpsv2,
    "aesthetic": _upstream_aesthetic,
    "image_reward": _upstream_image_reward,
}


def authors(name: str, folder: Path, size: str) -> Score:
    """Return the authors' own scoring of a list of pictures, made importable as in ``tests/parity``."""
    sys.path.insert(0, str(PARITY))
    return {
        "hpsv2": _authors_hpsv2,
        "aesthetic": _authors_aesthetic,
        "image_reward": _authors_image_reward,
    }[name](folder)


def _authors_hpsv2(folder: Path) -> Score:
    import torch
    from official_hpsv2 import build_official
    from safetensors.torch import load_file

    config = folder / "open_clip_config.json"
    official = build_official(json.loads(config.read_text())["model_cfg"] if config.exists() else None)
    checkpoint = folder / "official.pt"
    if not checkpoint.exists():
        torch.save({"state_dict": load_file(folder / "model.safetensors")}, checkpoint)
    return lambda prompt, images: official.score(images, prompt, checkpoint)


def _authors_aesthetic(folder: Path) -> Score:
    import torch
    from safetensors.torch import load_file
    from test_aesthetic import build_predictor, openai_clip
    from transformers import CLIPVisionConfig

    from diffsynth_metrics.networks.clip import vit_l_14_config

    tiny = (folder / "config.json").exists()
    predictor = build_predictor(CLIPVisionConfig.from_pretrained(folder) if tiny else vit_l_14_config())
    weights = load_file(folder / "model.safetensors")
    predictor.load_state_dict(
        {k: v for k, v in weights.items() if not k.endswith("position_ids")}, strict=False
    )
    preprocess = openai_clip()[0]._transform(224)

    def score(prompt: str, images: list[Any]) -> list[float]:
        with torch.no_grad():
            return [
                float(predictor(pixel_values=preprocess(image)[None], return_dict=True).logits[0])
                for image in images
            ]

    return score


def _authors_image_reward(folder: Path) -> Score:
    from official_image_reward import build_official
    from safetensors.torch import load_file
    from transformers import BertTokenizer, BlipConfig

    from diffsynth_metrics.networks.image_reward import blip_vit_l_16_config

    tiny = (folder / "config.json").exists()
    config = BlipConfig.from_pretrained(folder) if tiny else blip_vit_l_16_config()
    vocabulary = BertTokenizer.from_pretrained(folder).get_vocab()
    (folder / "official").mkdir(exist_ok=True)
    pieces = [p for p in sorted(vocabulary, key=vocabulary.__getitem__) if p not in ("[DEC]", "[ENC]")]
    (folder / "official" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    official = build_official(folder / "official", config, folder / "official" / "vocab.txt")
    official.load_state_dict(load_file(folder / "model.safetensors"), strict=False)

    def score(prompt: str, images: list[Any]) -> list[float]:
        rewards = official.score(prompt, images)  # a float for one picture, else a list
        return rewards if isinstance(rewards, list) else [rewards]

    return score


class Worker:
    """The requests; each public method is one, with its arguments by name."""

    def __init__(self, package: str) -> None:
        """Nothing is imported before the first request."""
        self._package = package
        self._build = {"ours": ours, "upstream": upstream, "authors": authors}[package]
        self._score: Score | None = None

    def load(self, name: str, folder: str, size: str) -> Answer:
        """Build a metric."""
        seconds, self._score = timed(lambda: self._build(name, Path(folder), size))
        return {"seconds": seconds}

    def prepare(self, name: str, paths: list[str], source: str) -> Answer:
        """Time the official pixels of all pictures, made by ours on all cores and nothing else."""
        from concurrent.futures import ThreadPoolExecutor

        import PIL.Image
        from worker import cores

        from diffsynth_metrics.pixels.transforms import Letterbox, ShortestEdgeCrop

        transform = Letterbox() if name == "hpsv2" else ShortestEdgeCrop(convert="after")
        make: Callable[[Any], Any] = transform.from_pil
        if source == "files":
            images, make = list(paths), lambda path: transform.from_pil(PIL.Image.open(path))
        else:
            images = _decoded(paths)
        with ThreadPoolExecutor(cores()) as pool:
            timings = [timed(lambda: list(pool.map(make, images)))[0] for _ in range(9)]
        return {"seconds": sorted(timings)[len(timings) // 2]}

    def score(self, prompt: str, paths: list[str], source: str) -> Answer:
        """Time one call on pictures that lie decoded in memory, or on files that belong to the call."""
        score = self._score
        assert score is not None
        decoded = [] if source == "files" else _decoded(paths)
        seconds, scores = timed(lambda: score(prompt, decoded or self._opened(paths)))
        return {"seconds": seconds, "scores": [float(score) for score in scores]}

    def _opened(self, paths: list[str]) -> Images:
        """Return what the package takes for files: ours their paths, the others opened pictures."""
        import PIL.Image

        return list(paths) if self._package == "ours" else [PIL.Image.open(path) for path in paths]


def _decoded(paths: list[str]) -> Images:
    import PIL.Image

    images = []
    for path in paths:
        with PIL.Image.open(path) as image:
            images.append(image.convert("RGB"))
    return images


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

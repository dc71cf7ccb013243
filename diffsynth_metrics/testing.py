"""Tiny random checkpoints of every metric, for our tests and for users' own CI.

A tiny checkpoint has every file of the real one and loads through the ordinary path in well under a
second; its scores mean nothing.

Example:
    >>> folder = tiny_checkpoint("pickscore", tmp_path)
    >>> metric = PickScoreMetric.from_pretrained(ModelConfig(path=folder))
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

__all__ = ["TINY_CHECKPOINTS", "randomize", "tiny_checkpoint"]


def tiny_checkpoint(name: str, folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write a complete tiny random checkpoint.

    Args:
        name: A metric, one of :data:`TINY_CHECKPOINTS`.
        folder: Where the files go; it is made if needed.
        seed: The same seed gives the same weights.

    Returns:
        The folder, for ``ModelConfig(path=...)``.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in TINY_CHECKPOINTS:
        raise ValueError(f"there is no tiny checkpoint {name!r}; known: {', '.join(TINY_CHECKPOINTS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    TINY_CHECKPOINTS[name](folder, seed)
    return folder


def randomize(model: nn.Module, seed: int = 0, *, gain: float = 1.5) -> None:
    """Fill a network with random weights that make its output depend strongly on its input.

    The usual initialisation makes many of these networks almost constant, so that a test with it
    would not notice an error.

    Args:
        model: Changed in place; parameters that are scalars are left alone.
        seed: Seed of the generator.
        gain: Standard deviation of matrices times the square root of their fan-in.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                embedding = "embedding" in name and "patch" not in name
                fan_in = 1 if embedding else parameter[0].numel()
                parameter.copy_(noise * gain / math.sqrt(fan_in))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)


def _tiny_clip(folder: Path, seed: int) -> None:
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_act": "gelu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 24,
    }
    config = CLIPConfig(
        projection_dim=24,
        text_config=tower,
        vision_config=tower | {"image_size": 224, "patch_size": 32},
    )
    model = CLIPModel(config)
    randomize(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    _write_clip_processor(folder, image_size=224)


def _write_clip_processor(folder: Path, *, image_size: int) -> None:
    """Write the tokenizer with CLIP's real vocabulary, and the image processor's settings."""
    from transformers import CLIPTokenizer

    from diffsynth_metrics.transforms import CLIP_MEAN, CLIP_STD

    vocabulary, merges = _clip_vocabulary()
    CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=77).save_pretrained(
        folder
    )
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's 49,408 tokens and its merges, from the copy that open_clip carries."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    vocabulary = dict(tokenizer.encoder)
    # open_clip spells the two special tokens differently from the published tokenizer files.
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    ordered[-2:] = ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(ordered)}, merges


TINY_CHECKPOINTS = {"clip": _tiny_clip, "pickscore": _tiny_clip}
"""Name of a metric to what writes its tiny checkpoint."""

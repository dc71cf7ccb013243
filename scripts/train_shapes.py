"""Train the embedded model: a CLIP of about one million parameters, on drawn shapes, on a CPU.

``python scripts/train_shapes.py --output FOLDER`` writes what ships in
``diffsynth_metrics/embedded/shapes``. Pictures come from :mod:`diffsynth_metrics.embedded.drawing`;
their random streams are named "train", and no test draws from those.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import log_softmax, normalize
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffsynth_metrics.embedded.drawing import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    describe,
    draw_shape,
)
from diffsynth_metrics.pixels.transforms import CLIP_MEAN, CLIP_STD, ShortestEdgeCrop
from diffsynth_metrics.pixels.transforms import normalize_ as normalize_pixels_

__all__ = ["main", "train"]

logger = logging.getLogger(__name__)

_IMAGE_SIZE = 64
_MAX_LENGTH = 32
_TEMPLATES = (
    "{}",
    "{}",
    "{}",
    "a picture of {}",
    "a photo of {}",
    "a drawing of {}",
    "{}.",
    "an image of {}",
)

# Every pair stands beside each batch, so that a picture is always told from all of its near misses,
# whatever the batch happens to hold. A plain caption may match no picture of the batch.
_PLAIN_CAPTIONS = [
    (describe(shape, color), {"shape": shape, "color": color}) for shape in SHAPES for color in COLORS
]

Attributes = tuple[str, str, str, str]
"""Shape, colour, size, background."""


def draw_examples(count: int, stream: str) -> tuple[Tensor, list[Attributes]]:
    """Draw pictures as they come: many sizes and shapes of picture, some of them as JPEG.

    Returns:
        uint8 pixels ``[count, 3, 64, 64]`` after CLIP's own preparation, and what they show.
    """
    rng = Random(stream)
    transform = ShortestEdgeCrop(_IMAGE_SIZE)
    pixels, attributes = [], []
    for _ in tqdm(range(count), desc=f"drawing ({stream})"):
        shape, color, size, background = (
            rng.choice(SHAPES),
            rng.choice(list(COLORS)),
            rng.choice(list(SIZES)),
            rng.choice(list(BACKGROUNDS)),
        )
        while background == color:
            background = rng.choice(list(BACKGROUNDS))
        side = rng.choice((64, 64, 96, 128, 160))
        sides = (side, round(side * rng.choice((1, 1, 1.33, 1.5))))
        picture = draw_shape(
            shape,
            color,
            size=size,
            background=background,
            image_size=sides if rng.random() < 0.5 else sides[::-1],
            rng=rng if rng.random() < 0.9 else None,
        )
        if rng.random() < 0.25:
            picture = _as_jpeg(picture, rng.randint(50, 95))
        pixels.append(transform.from_pil(picture))
        attributes.append((shape, color, size, background))
    return torch.stack(pixels), attributes


def caption(attributes: Attributes, rng: Random) -> tuple[str, dict[str, str]]:
    """Return a caption in one of several wordings, and the attributes that it mentions."""
    shape, color, size, background = attributes
    said = {"shape": shape, "color": color}
    if rng.random() < 0.3:
        said["size"] = size
    if rng.random() < 0.3:
        said["background"] = background
    text = describe(
        shape,
        color,
        size=said.get("size"),
        background=said.get("background"),
        article=rng.random() < 0.8,
    )
    return rng.choice(_TEMPLATES).format(text), said


def train(*, steps: int, examples: int, batch_size: int, seed: int) -> tuple[CLIPModel, CLIPTokenizer]:
    """Train from scratch with CLIP's loss, where every true caption of a picture counts as a match."""
    torch.manual_seed(seed)
    rng = Random(f"train captions {seed}")
    pixels, attributes = draw_examples(examples, f"train {seed}")
    tokenizer = build_tokenizer()
    model = CLIPModel(build_config(tokenizer)).train()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=min(0.1, 2 / steps) if steps < 20 else 0.1
    )
    progress = tqdm(range(steps), desc="training")
    for step in progress:
        chosen = [rng.randrange(examples) for _ in range(batch_size)]
        captions = [caption(attributes[index], rng) for index in chosen] + _PLAIN_CAPTIONS
        images = normalize_pixels_(_fade(pixels[chosen]), ShortestEdgeCrop(_IMAGE_SIZE))
        images = images + 0.05 * rng.random() * torch.randn_like(images)
        text_features = _text_features(model, tokenizer, [text for text, _ in captions])
        image_features = normalize(
            model.visual_projection(model.vision_model(pixel_values=images).pooler_output), dim=-1
        )
        matches = _matches([attributes[index] for index in chosen], [said for _, said in captions])
        logits = model.logit_scale.exp() * image_features @ text_features.T
        by_text, wanted = logits.T[:batch_size], matches.T[:batch_size]
        loss = (_soft_cross_entropy(logits, matches) + _soft_cross_entropy(by_text, wanted)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), tokenizer


def build_tokenizer() -> CLIPTokenizer:
    """Build CLIP's tokenizer with only those merges that the captions need; any text tokenises."""
    from diffsynth_metrics.testing import clip_vocabulary

    vocabulary, merges = clip_vocabulary()
    symbols = list(vocabulary)[:512]  # every byte, and every byte at the end of a word
    words = {word for template in _TEMPLATES for word in template.replace(".", " .").split()} - {"{}"}
    words |= {"an", "on", "background", *SHAPES, *COLORS, *SIZES, *BACKGROUNDS}
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    used = sorted({merge for word in words for merge in _merges_of(word, ranks)}, key=ranks.__getitem__)
    tokens = [*symbols, *("".join(merge) for merge in used), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=used,
        model_max_length=_MAX_LENGTH,
    )


def build_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Return the architecture."""
    tower = {
        "hidden_act": "gelu",
        "hidden_size": 112,
        "intermediate_size": 336,
        "num_attention_heads": 4,
        "projection_dim": 64,
    }
    return CLIPConfig(
        projection_dim=64,
        text_config=tower
        | {
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": _MAX_LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=tower | {"num_hidden_layers": 4, "image_size": _IMAGE_SIZE, "patch_size": 8},
    )


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write weights (float16), config, tokenizer and processor settings."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "size": {"shortest_edge": _IMAGE_SIZE},
        "crop_size": {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE},
        "resample": 3,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, count: int, stream: str) -> float:
    """Return how often "a COLOR SHAPE" is picked right among all colours and shapes."""
    pixels, attributes = draw_examples(count, stream)
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    with torch.no_grad():
        texts = _text_features(model, tokenizer, [describe(*pair) for pair in pairs])
        images = normalize_pixels_(pixels, ShortestEdgeCrop(_IMAGE_SIZE))
        pooled = model.vision_model(pixel_values=images).pooler_output
        picked = (model.visual_projection(pooled) @ texts.T).argmax(dim=1).tolist()
    right = [pairs[index] == shown[:2] for index, shown in zip(picked, attributes, strict=True)]
    return float(sum(right) / count)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, report the accuracy and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--examples", type=int, default=40_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, tokenizer = train(
        steps=options.steps,
        examples=options.examples,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    logger.info("accuracy on fresh pictures: %.4f", accuracy(model, tokenizer, 500, "validation"))
    save(model, tokenizer, options.output)


def _text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=_MAX_LENGTH, return_tensors="pt")
    pooled = model.text_model(input_ids=tokens["input_ids"]).pooler_output
    return normalize(model.text_projection(pooled), dim=-1)


def _matches(shown: list[Attributes], said: list[dict[str, str]]) -> Tensor:
    """Return which caption is true of which picture: bool ``[pictures, captions]``."""
    table = torch.ones(len(shown), len(said), dtype=torch.bool)
    for position, name in enumerate(("shape", "color", "size", "background")):
        have = np.array([attributes[position] for attributes in shown])
        want = np.array([words.get(name, "") for words in said])
        table &= torch.from_numpy((have[:, None] == want) | (want == ""))
    return table


def _soft_cross_entropy(logits: Tensor, matches: Tensor) -> Tensor:
    """Return the cross entropy with the targets of a row spread evenly over its matches."""
    targets = matches / matches.sum(dim=1, keepdim=True).clamp(min=1)
    return -(targets * log_softmax(logits, dim=1)).sum(dim=1).mean()


def _merges_of(word: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Return the merges that byte-pair encoding applies to a word."""
    parts = [*word[:-1], word[-1] + "</w>"]
    applied: list[tuple[str, str]] = []
    while True:
        pairs = [pair for pair in pairwise(parts) if pair in ranks]
        if not pairs:
            return applied
        best = min(pairs, key=ranks.__getitem__)
        applied.append(best)
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == best:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged


def _fade(pixels: Tensor) -> Tensor:
    """Take colour out of half of the pictures: pale red is red, which is what ascent on pixels follows.

    Args:
        pixels: uint8 ``[B, 3, S, S]``. White, gray and black stay what they are.

    Returns:
        float32 ``[B, 3, S, S]`` in 0..1.
    """
    floats = pixels.float() / 255
    gray = (floats * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    kept = (0.4 + 1.2 * torch.rand(len(pixels), 1, 1, 1)).clamp(max=1)
    return kept * floats + (1 - kept) * gray


def _as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


if __name__ == "__main__":
    main()

"""What both packages are given: pictures, prompts, a tiny checkpoint and one of full size."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file
from transformers import BertTokenizer

from diffsynth_metrics.networks.clip import build_clip, vit_h_14_config
from diffsynth_metrics.testing import tiny_checkpoint
from diffsynth_metrics.weights.checkpoint import KNOWN_LAYOUTS, fingerprint, read_layout

__all__ = ["full_checkpoint", "metric_folder", "mixed_prompts", "pictures", "prompt_of", "tiny_folder"]

_LAYOUTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "layouts"

# Each word is one token of CLIP's vocabulary, so a prompt has as many tokens as words, and two more.
_WORDS = (
    "a the red blue green yellow small large old new cat dog horse house tree river mountain sky sun "
    "moon city street car boat bridge light dark bright soft warm cold winter summer spring photo "
    "painting portrait landscape detailed sharp digital art studio garden forest beach ocean island "
    "castle tower window door table chair book lamp flower rose bird fish lion tiger bear robot dragon "
    "king queen girl boy woman man child smile dress hat gold silver glass stone wood paper cloud rain "
    "snow storm night morning evening"
).split()


def prompt_of(tokens: int, seed: str) -> str:
    """Return a prompt of so many tokens, start and end included; another seed, another prompt."""
    return " ".join(random.Random(seed).sample(_WORDS, tokens - 2))


def mixed_prompts(count: int, seed: str) -> list[str]:
    """Return different prompts of 10 to 70 tokens."""
    lengths = [10 + 60 * index // max(count - 1, 1) for index in range(count)]
    return [prompt_of(length, f"{seed}/{index}") for index, length in enumerate(lengths)]


def pictures(folder: Path, count: int, size: int) -> dict[str, list[str]]:
    """Draw smooth random pictures with fine grain; return the paths of their JPEG and PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, list[str]] = {"jpeg": [], "png": []}
    for index in range(count):
        files = {"jpeg": folder / f"{size}_{index}.jpg", "png": folder / f"{size}_{index}.png"}
        if not all(file.exists() for file in files.values()):
            generator = np.random.default_rng(index)
            coarse = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            smooth = PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC)
            grain = generator.normal(0, 4, (size, size, 3))
            image = PIL.Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))
            image.save(files["png"])
            image.save(files["jpeg"], quality=90)
        for kind, file in files.items():
            paths[kind].append(str(file))
    return paths


def tiny_folder(folder: Path) -> Path:
    """Write the tiny checkpoint with its processor files, which serve the full size as well."""
    return tiny_checkpoint("pickscore", folder)


def full_checkpoint(folder: Path) -> Path:
    """Write a ViT-H/14 checkpoint in float32 with random weights, once, tensor by tensor.

    It has every name and shape of the published file, the two ``position_ids`` included, so both
    packages know it by its fingerprint.
    """
    path = folder / "model.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        _write_full(unfinished)
        unfinished.rename(path)
    if fingerprint(read_layout([path])) not in KNOWN_LAYOUTS:
        raise RuntimeError(f"{path.name} does not have the published layout; delete it")
    return path


def metric_folder(name: str, size: str, folder: Path) -> None:
    """Write the weights of HPSv2, Aesthetic or ImageReward with what every package needs beside them.

    At full size the weights are random, with the names and shapes of the published file.
    """
    tiny_checkpoint(name, folder)
    if name == "aesthetic":  # ours and the authors' need no processor files, upstream does
        clip = tiny_checkpoint("clip", folder / "clip")
        shutil.copy(clip / "preprocessor_config.json", folder)
        shutil.rmtree(clip)
    if size == "full":
        for config in ("config.json", "open_clip_config.json"):  # they describe the tiny network
            (folder / config).unlink(missing_ok=True)
        layout = json.loads((_LAYOUTS / f"{name}.json").read_text())
        if name == "image_reward":
            _fill_vocabulary(folder, layout["blip.text_encoder.embeddings.word_embeddings.weight"][0])
        generator = torch.Generator().manual_seed(0)
        weights = {
            key: torch.arange(shape[-1])[None]
            if key.endswith("position_ids")
            else random_weight(key, torch.Size(shape), generator)
            for key, shape in layout.items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _fill_vocabulary(folder: Path, count: int) -> None:
    """Give a tokenizer of BERT as many pieces as a network has embeddings."""
    pieces = BertTokenizer.from_pretrained(folder).get_vocab()
    pieces |= {f"[unused{number}]": number for number in range(len(pieces), count)}
    BertTokenizer(vocab=pieces, model_max_length=512).save_pretrained(folder)


def _write_full(path: Path) -> None:
    model = build_clip(vit_h_14_config())
    positions = {
        f"{tower}.embeddings.position_ids": getattr(model, tower).embeddings.position_ids
        for tower in ("text_model", "vision_model")
    }
    weights = model.state_dict()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # The int64 tensors come first: safetensors wants tensors aligned to their dtype.
    for name, tensor in (positions | weights).items():
        end = offset + tensor.numel() * tensor.element_size()
        dtype = {torch.int64: "I64", torch.float32: "F32"}[tensor.dtype]
        entry = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[name], offset = entry, end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in positions.values():
            file.write(tensor.numpy().tobytes())
        for name, tensor in weights.items():
            file.write(random_weight(name, tensor.shape, generator).numpy().data)


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name == "logit_scale":
        return torch.tensor(math.log(100))
    noise = torch.randn(shape, generator=generator, device=generator.device) * 0.02
    norm = "norm" in name.lower() or "ln_" in name
    return noise + 1 if norm and name.endswith("weight") else noise

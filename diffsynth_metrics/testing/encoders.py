"""Tiny checkpoints of the metrics that embed or classify."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffsynth_metrics.testing.random_weights import randomize
from diffsynth_metrics.tokens import write_canaries

__all__ = [
    "clip_vocabulary",
    "write_aesthetic",
    "write_clip",
    "write_fid",
    "write_hpsv2",
    "write_image_reward",
    "write_lpips",
]


def write_clip(folder: Path, seed: int) -> None:
    """Write a two-layer CLIP with its processor files; PickScore has the same."""
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


def write_hpsv2(folder: Path, seed: int) -> None:
    """Write a two-layer CLIP in open_clip's layout; BioCLIP has the same."""
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 224,
            "patch_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    model = open_clip.CLIP(**config)
    randomize(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}, indent=2))
    _write_clip_processor(folder, image_size=224)


def write_aesthetic(folder: Path, seed: int) -> None:
    """Write a two-layer CLIP image tower with the head."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from diffsynth_metrics.networks.score_head import score_head

    config = CLIPVisionConfig(
        hidden_act="quick_gelu",
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        patch_size=32,
        projection_dim=24,
    )
    model = CLIPVisionModelWithProjection(config)
    model.layers = score_head(config.projection_dim)
    randomize(model, seed)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def write_image_reward(folder: Path, seed: int) -> None:
    """Write a two-layer BLIP and BERT with a small vocabulary."""
    from transformers import BertTokenizer, BlipConfig

    from diffsynth_metrics.networks.image_reward import ImageRewardNetwork

    vocabulary = _word_pieces()
    tokenizer = BertTokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)}, model_max_length=512
    )
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    tokenizer.save_pretrained(folder)
    write_canaries(tokenizer, folder, ["a red circle", "The cat's photo, in 4k!", "naïve café"])
    config = BlipConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 224,
            "patch_size": 32,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "encoder_hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "bos_token_id": tokenizer.bos_token_id,
        },
    )
    config.save_pretrained(folder)
    model = ImageRewardNetwork(config)
    randomize(model, seed)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def write_fid(folder: Path, seed: int) -> None:
    """Write a complete Inception, which has one size."""
    from diffsynth_metrics.networks.inception import build_inception

    # torchvision's Inception has one size, so this one is complete: 95 MB, and a second to write.
    model = build_inception().to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if name.endswith("num_batches_tracked"):
                tensor.zero_()
                continue
            tensor.normal_(generator=generator)
            if tensor.ndim > 1:
                tensor.mul_(math.sqrt(2 / tensor[0].numel()))
            elif name.endswith("bn.weight"):
                tensor.mul_(0.2).add_(1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.mul_(0.2)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def write_lpips(folder: Path, seed: int) -> None:
    """Write LPIPS on AlexNet, which has one size: 10 MB."""
    write_lpips_of("alex", folder, seed)


def write_lpips_of(net: str, folder: Path, seed: int) -> None:
    """Write LPIPS on one of its networks."""
    from diffsynth_metrics.networks.lpips import LPIPSNetwork

    model = LPIPSNetwork(net)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            weight.normal_(generator=generator)
            if name.startswith("lin"):
                weight.abs_()
            elif weight.ndim > 1:
                weight.mul_(math.sqrt(2 / weight[0].numel()))
            else:
                weight.mul_(0.1)
        model.scaling_layer.shift[:] = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        model.scaling_layer.scale[:] = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def _word_pieces() -> list[str]:
    """Return a small vocabulary for BERT's tokenizer: it reads any text, mostly letter by letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = "a an the of in on with and cat dog red green blue photo painting picture circle square"
    return [*special, *characters, *(f"##{character}" for character in characters), *words.split()[1:]]


def _write_clip_processor(folder: Path, *, image_size: int) -> None:
    """Write the tokenizer with CLIP's real vocabulary, and the image processor's settings."""
    from transformers import CLIPTokenizer

    from diffsynth_metrics.pixels.transforms import CLIP_MEAN, CLIP_STD

    vocabulary, merges = clip_vocabulary()
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
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's 49,408 tokens and its merges, from the copy that open_clip carries."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    vocabulary = dict(tokenizer.encoder)
    # open_clip spells the two special tokens differently from the published tokenizer files.
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    ordered[-2:] = ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(ordered)}, merges

"""PickScore and CLIP score against transformers' and open_clip's own computation, same weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import open_clip
import PIL.Image
import pytest
import torch
from eight_bits import in_eight_bits
from safetensors.torch import load_file, save_file
from skimage import data
from transformers import CLIPModel, CLIPTokenizer

from diffsynth_metrics import CLIPMetric, ModelConfig, PickScoreMetric
from diffsynth_metrics.networks.clip import build_clip, vit_h_14_config
from diffsynth_metrics.testing import randomize, tiny_checkpoint

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.* tokens of a prompt, and :UserWarning"),  # it is cut
]

try:
    from transformers import CLIPImageProcessorPil
except ImportError:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TOLERANCE = 1e-4  # absolute, on scores of magnitude exp(logit_scale) = 100

PROMPTS = [
    "",
    "a photo of a cat",
    "A Cat, In UPPER and lower case; with: punctuation! (really?)",
    "word " * 200,
    "un château à l'été, naïve façade",
    "一只猫坐在红色的沙发上",
    "🎨🐈‍⬛ a painting 🖼️",
    "two  spaces\tand\nlines ",
]
SPECIAL_PROMPTS = [
    "a cat <|endoftext|> a dog",
    "<|startoftext|> a cat",
    "dog’s &amp; cat’s ＡＢ",
]
"""Prompts that open_clip's tokenizer cleans (ftfy, html) or spells differently, by design."""


def photograph(name: str, size: tuple[int, int], mode: str) -> PIL.Image.Image:
    image = PIL.Image.fromarray(getattr(data, name)()).convert("RGB").resize(size)
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
        return image
    return image.convert(mode)


PICTURES = [
    photograph("astronaut", (512, 512), "RGB"),
    photograph("astronaut", (512, 383), "RGBA"),
    photograph("coffee", (401, 300), "L"),
    photograph("coffee", (224, 160), "P"),
    photograph("chelsea", (224, 224), "CMYK"),
    photograph("chelsea", (37, 53), "RGB"),
    photograph("rocket", (1, 300), "RGB"),
    photograph("rocket", (640, 427), "L"),
    photograph("astronaut", (1024, 768), "YCbCr"),
    photograph("coffee", (333, 1000), "1"),
]


def transformers_scores(folder: Path, prompts: list[str]) -> torch.Tensor:
    """Return logits_per_text [T, N] by transformers alone, image by image, prompt by prompt."""
    model = CLIPModel.from_pretrained(folder).eval()
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "gelu"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)
    columns = []
    for picture in map(in_eight_bits, PICTURES):
        pixel_values = pixels(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        column = []
        for prompt in prompts:
            tokens = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
            with torch.no_grad():
                column.append(model(**tokens, pixel_values=pixel_values).logits_per_text[0, 0])
        columns.append(torch.stack(column))
    return torch.stack(columns, dim=1)


def to_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers' CLIP tensors to open_clip's, for the oracle only."""
    renamed = {"logit_scale": weights["logit_scale"]}
    for ours, theirs in (("text_model", ""), ("vision_model", "visual.")):
        for name, tensor in weights.items():
            if not name.startswith(f"{ours}.encoder.layers."):
                continue
            _, _, _, layer, *rest = name.split(".")
            block = f"{theirs}transformer.resblocks.{layer}."
            rest_name = ".".join(rest)
            for old, new in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("self_attn.out_proj", "attn.out_proj"),
            ):
                if rest_name.startswith(old):
                    renamed[block + rest_name.replace(old, new)] = tensor
            if rest_name.startswith("self_attn.q_proj"):
                kind = rest[-1]
                parts = [weights[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
                renamed[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    for old, new in (
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm.weight", "ln_final.weight"),
        ("text_model.final_layer_norm.bias", "ln_final.bias"),
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.pre_layrnorm.weight", "visual.ln_pre.weight"),
        ("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias"),
        ("vision_model.post_layernorm.weight", "visual.ln_post.weight"),
        ("vision_model.post_layernorm.bias", "visual.ln_post.bias"),
    ):
        renamed[new] = weights[old]
    renamed["text_projection"] = weights["text_projection.weight"].T
    renamed["visual.proj"] = weights["visual_projection.weight"].T
    return renamed


def open_clip_model(folder: Path) -> open_clip.CLIP:
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    model = open_clip.CLIP(
        embed_dim=config["projection_dim"],
        text_cfg={
            "context_length": 77,
            "vocab_size": 49408,
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
        vision_cfg={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "layers": vision["num_hidden_layers"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
    )
    model.load_state_dict(to_open_clip(load_file(folder / "model.safetensors")))
    return model.eval()


@pytest.fixture(scope="module", params=[0, 1])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("pickscore", tmp_path_factory.mktemp("tiny"), seed=request.param)


@pytest.fixture(scope="module")
def official(folder: Path) -> torch.Tensor:
    return transformers_scores(folder, PROMPTS + SPECIAL_PROMPTS)


@pytest.mark.parametrize("metric_class", [PickScoreMetric, CLIPMetric])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_equal_transformers(
    folder: Path, official: torch.Tensor, metric_class: type[CLIPMetric], batch_size: int
) -> None:
    prompts = PROMPTS + SPECIAL_PROMPTS
    assert official.std() > 5  # a test with constant scores would pass for any code

    metric = metric_class.from_pretrained(ModelConfig(path=folder), device="cpu", batch_size=batch_size)
    matrix = torch.tensor(metric.similarity_matrix(prompts, PICTURES))
    pairs = [(p, i) for p in range(len(prompts)) for i in range(len(PICTURES))]
    paired = metric.compute([prompts[p] for p, _ in pairs], [PICTURES[i] for _, i in pairs])

    assert (matrix - official).abs().max() < TOLERANCE
    assert (torch.tensor(paired).view_as(official) - official).abs().max() < TOLERANCE


def test_scores_equal_open_clip(folder: Path) -> None:
    model = open_clip_model(folder)
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    preprocess = open_clip.image_transform(224, is_train=False)
    # open_clip rounds an odd crop margin the other way, so such a picture is left to transformers.
    pictures = [picture for picture in PICTURES if _crop_agrees(picture)]
    assert len(pictures) >= 6
    # open_clip converts to RGB after resizing, transformers (the official PickScore) before.
    rgb = torch.stack([preprocess(picture.convert("RGB")) for picture in pictures])
    with torch.no_grad():
        images = model.encode_image(rgb, normalize=True)
        texts = model.encode_text(tokenizer(PROMPTS), normalize=True)
        official = model.logit_scale.exp() * texts @ images.T

    metric = PickScoreMetric.from_pretrained(ModelConfig(path=folder), device="cpu")
    ours = torch.tensor(metric.similarity_matrix(PROMPTS, pictures))

    assert official.std() > 5
    assert (ours - official).abs().max() < TOLERANCE


def _crop_agrees(picture: PIL.Image.Image) -> bool:
    longest = 224 * max(picture.size) // min(picture.size)
    return (longest - 224) // 2 == round((longest - 224) / 2)


def test_probabilities_are_the_softmax_over_images(folder: Path, official: torch.Tensor) -> None:
    expected = torch.softmax(official[PROMPTS.index("a photo of a cat")], dim=-1)
    metric = PickScoreMetric.from_pretrained(ModelConfig(path=folder), device="cpu")
    ours = torch.tensor(metric.probabilities("a photo of a cat", PICTURES))
    assert torch.allclose(ours, expected, atol=1e-4)


@pytest.fixture(scope="module")
def full_size_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write a ViT-H/14 checkpoint with the layout of the published file."""
    folder = tiny_checkpoint("pickscore", tmp_path_factory.mktemp("full"))
    config = vit_h_14_config()
    model = build_clip(config).to_empty(device="cpu")
    randomize(model, gain=1.0)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    weights = model.state_dict()
    for tower, positions in (("text_model", 77), ("vision_model", 257)):
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.mark.slow
def test_full_size_scores_equal_transformers(full_size_folder: Path) -> None:
    pictures = PICTURES[:3]
    prompts = ["a photo of a cat", "word " * 200, ""]
    metric = PickScoreMetric.from_pretrained(
        ModelConfig(path=full_size_folder), device="cpu", batch_size=2
    )
    ours = torch.tensor(metric.similarity_matrix(prompts, pictures))
    del metric

    model = CLIPModel.from_pretrained(full_size_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(full_size_folder)
    pixels = CLIPImageProcessorPil.from_pretrained(full_size_folder)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    images = pixels([p.convert("RGB") for p in pictures], return_tensors="pt")
    with torch.no_grad():
        official = model(**tokens, **images).logits_per_text

    assert official.std() > 0.5
    assert (ours - official).abs().max() < TOLERANCE

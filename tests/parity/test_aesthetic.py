"""LAION Aesthetic against two implementations of others, with the same weights.

- PyPI ``simple-aesthetics-predictor==0.1.2``: the network whose layout the published file has.
- OpenAI's own ``clip``, as PyPI ``clip-anytorch==2.6.0`` packages it, and the head as the authors'
  ``simple_inference.py`` applies it: pixels, tower and L2 norm, none of it from transformers.

    pip install --no-deps simple-aesthetics-predictor==0.1.2 clip-anytorch==2.6.0

The first imports torch and transformers, the second torch, torchvision, packaging, tqdm, ftfy and regex,
which open_clip depends on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import packaging.version
import PIL.Image
import pytest
import torch
import transformers
from eight_bits import in_eight_bits
from official_image_reward import import_past_init, installed_folder, stub_modules
from safetensors.torch import load_file, save_file
from test_image_reward import PICTURES, photograph
from torch import Tensor
from transformers import CLIPVisionConfig

from diffsynth_metrics import AestheticMetric, ModelConfig
from diffsynth_metrics.inputs import as_images
from diffsynth_metrics.metrics.aesthetic import aesthetic_score
from diffsynth_metrics.networks.clip import vision_config
from diffsynth_metrics.networks.score_head import score_head
from diffsynth_metrics.pixels.batches import pixel_batches
from diffsynth_metrics.testing import randomize

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4  # absolute, on scores with a standard deviation of about 1

TINY = CLIPVisionConfig(
    hidden_act="quick_gelu",
    hidden_size=128,  # OpenAI's code derives the heads from it: 64 to a head
    intermediate_size=512,
    num_attention_heads=2,
    num_hidden_layers=2,
    patch_size=32,
    projection_dim=24,
)


@cache
def openai_clip() -> tuple[ModuleType, ModuleType]:
    """Return the modules ``clip.clip`` and ``clip.model``."""
    folder = installed_folder("clip", "clip-anytorch==2.6.0")
    # setuptools dropped this module, from which the package takes `packaging`.
    setuptools = ModuleType("pkg_resources")
    setuptools.packaging = packaging
    with stub_modules({"pkg_resources": setuptools}):
        clip = import_past_init("official_openai_clip_package", folder, "clip")
    return clip, importlib.import_module("official_openai_clip_package.model")


def build_predictor(config: CLIPVisionConfig) -> Any:
    """Build simple-aesthetics-predictor's network, untrained, in evaluation mode."""
    folder = installed_folder("aesthetics_predictor", "simple-aesthetics-predictor==0.1.2")
    verbosity = transformers.logging.get_verbosity()
    module = import_past_init("official_aesthetics_predictor_package", folder, "v2")
    transformers.logging.set_verbosity(verbosity)
    return module.AestheticsPredictorV2Linear(config).eval()


def predictor_scores(predictor: Any, pictures: list[PIL.Image.Image]) -> Tensor:
    """Return simple-aesthetics-predictor's scores of OpenAI's pixels."""
    pixels = openai_clip()[0]._transform(224)
    with torch.no_grad():
        return torch.cat(
            [
                predictor(pixel_values=pixels(in_eight_bits(picture))[None], return_dict=True).logits[0]
                for picture in pictures
            ]
        )


def openai_tower(weights: dict[str, Tensor], config: CLIPVisionConfig) -> Any:
    """Return OpenAI's CLIP with the weights of an Aesthetic checkpoint and a text tower of nothing."""
    clip = openai_clip()[1].CLIP(
        embed_dim=config.projection_dim,
        image_resolution=config.image_size,
        vision_layers=config.num_hidden_layers,
        vision_width=config.hidden_size,
        vision_patch_size=config.patch_size,
        context_length=1,
        vocab_size=1,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=1,
    )
    heads = clip.visual.transformer.resblocks[0].attn.num_heads
    assert heads == config.num_attention_heads
    renamed = {"proj": weights["visual_projection.weight"].T}
    for theirs, ours in (
        ("class_embedding", "embeddings.class_embedding"),
        ("conv1.weight", "embeddings.patch_embedding.weight"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
    ):
        renamed[theirs] = weights[f"vision_model.{ours}"]
    for kind in ("weight", "bias"):
        renamed[f"ln_pre.{kind}"] = weights[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"ln_post.{kind}"] = weights[f"vision_model.post_layernorm.{kind}"]
        for layer in range(config.num_hidden_layers):
            theirs = f"transformer.resblocks.{layer}"
            ours = f"vision_model.encoder.layers.{layer}"
            renamed[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(
                [weights[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for new, old in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                renamed[f"{theirs}.{new}.{kind}"] = weights[f"{ours}.{old}.{kind}"]
    clip.visual.load_state_dict(renamed)
    return clip.eval()


def affine(weights: dict[str, Tensor]) -> tuple[np.ndarray, float]:
    """Return the head as one affine map, in float64: its weight ``[D]`` and bias."""
    weight, bias = np.eye(weights["layers.0.weight"].shape[1]), 0.0
    for layer in (0, 2, 4, 6, 7):
        matrix = weights[f"layers.{layer}.weight"].double().numpy()
        weight, bias = matrix @ weight, matrix @ np.atleast_1d(bias) if layer else 0.0
        bias = bias + weights[f"layers.{layer}.bias"].double().numpy()
    return weight[0], float(bias[0])


def openai_scores(
    weights: dict[str, Tensor], config: CLIPVisionConfig, pictures: list[PIL.Image.Image]
) -> Tensor:
    """Return the scores as the authors' script computes them: CLIP, norm in numpy, head."""
    clip = openai_tower(weights, config)
    pixels = openai_clip()[0]._transform(224)
    weight, bias = affine(weights)
    scores = []
    for picture in pictures:
        with torch.no_grad():
            features = clip.encode_image(pixels(in_eight_bits(picture))[None])[0].double().numpy()
        scores.append(features @ weight / np.linalg.norm(features) + bias)
    return torch.tensor(scores, dtype=torch.float32)


def load(folder: Path, **options: Any) -> AestheticMetric:
    return AestheticMetric.from_pretrained(ModelConfig(path=folder), device="cpu", **options)


@pytest.fixture(scope="module", params=[0, 1])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Return a tiny checkpoint, and simple-aesthetics-predictor's network with its weights."""
    folder = tmp_path_factory.mktemp("tiny")
    predictor = build_predictor(TINY)
    randomize(predictor, request.param)
    save_file(predictor.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    TINY.save_pretrained(folder)
    return folder, predictor


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_scores_equal_both_official_ones(checkpoint: tuple[Path, Any], batch_size: int) -> None:
    folder, predictor = checkpoint
    weights = load_file(folder / "model.safetensors")
    first = predictor_scores(predictor, PICTURES)
    second = openai_scores(weights, TINY, PICTURES)
    ours = torch.tensor(load(folder, batch_size=batch_size).compute(PICTURES))

    assert len(PICTURES) >= 12
    assert first.std() > 0.3  # constant scores would pass for any code
    assert (ours - first).abs().max() < TOLERANCE
    assert (ours - second).abs().max() < TOLERANCE


def test_every_verb_takes_images_alone(folder: Path) -> None:
    metric = load(folder)
    scores = metric.compute(PICTURES[:3])
    for again in (
        metric.score(PICTURES[:3]),
        metric(PICTURES[:3]),
        [row["score"] for row in metric.evaluate(PICTURES[:3])],
        metric.reward(PICTURES[:3]).tolist(),
    ):
        assert again == pytest.approx(scores, abs=TOLERANCE)
    assert metric.compute(PICTURES[1]) == pytest.approx(scores[1:2], abs=TOLERANCE)
    with pytest.raises(TypeError):
        metric.compute("a prompt", PICTURES[:3])
    square = np.asarray(PICTURES[4])
    mixed = [PICTURES[4], square, torch.from_numpy(square.copy()).permute(2, 0, 1), PICTURES[0]]
    expected = [*metric.compute(PICTURES[4]) * 3, scores[0]]
    assert metric.compute(mixed) == pytest.approx(expected, abs=TOLERANCE)


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path]) -> Path:
    return tiny("aesthetic")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16"]
)
def test_pixels_equal_the_official_ones_to_the_bit(folder: Path, mode: str) -> None:
    metric = load(folder)
    official = openai_clip()[0]._transform(224)
    for size in ((512, 383), (401, 300), (160, 224), (224, 224), (31, 47), (1, 500), (500, 1)):
        picture = photograph("coffee", size, mode)
        assert picture.mode == mode
        assert torch.equal(pixels_of(metric, picture)[0], official(in_eight_bits(picture))), size


def pixels_of(metric: AestheticMetric, images: PIL.Image.Image | Tensor) -> Tensor:
    checked = as_images(images)
    (pixels,) = pixel_batches(checked, metric.transform, batch_size=1, device=torch.device("cpu"))
    return pixels


def test_activation_matters(folder: Path) -> None:
    """The tower was trained with quick_gelu; a tower with gelu would be noticed."""
    metric = load(folder)
    assert metric.model.config.hidden_act == vision_config(None).hidden_act == "quick_gelu"
    scores = torch.tensor(metric.compute(PICTURES[:3]))
    for layer in metric.model.vision_model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU()
    assert (torch.tensor(metric.compute(PICTURES[:3])) - scores).abs().min() > 10 * TOLERANCE


def test_head_is_the_affine_map_that_it_collapses_to(checkpoint: tuple[Path, Any]) -> None:
    folder, _ = checkpoint
    weight, bias = affine(load_file(folder / "model.safetensors"))
    head = load(folder).model.layers
    embeddings = torch.randn(50, TINY.projection_dim, generator=torch.Generator().manual_seed(0))
    unit = embeddings.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    scores = aesthetic_score(embeddings, head)
    assert torch.allclose(scores.double(), torch.from_numpy(unit @ weight + bias), atol=1e-5)
    # No embedding at all: the authors' norm leaves zeros as they are.
    nothing = aesthetic_score(torch.zeros(1, TINY.projection_dim), head)
    assert nothing.item() == pytest.approx(bias, abs=1e-5)


def test_head_with_values_computed_by_hand() -> None:
    """Each layer here is a mean plus a number, the first one x + 2y + 0.5."""
    head = score_head(2).eval()
    with torch.no_grad():
        for bias, layer in enumerate([head[0], head[2], head[4], head[6], head[7]]):
            layer.weight.fill_(1 / layer.in_features)
            layer.bias.fill_(bias or 0.5)
        head[0].weight.copy_(torch.tensor([1.0, 2.0]).expand(1024, 2))
        scores = aesthetic_score(torch.tensor([[3.0, 4.0], [-3.0, -4.0], [0.0, 7.0], [0.0, 0.0]]), head)
    # (x, y) of length 1, x + 2y + 0.5 + 1 + 2 + 3 + 4
    assert scores.tolist() == pytest.approx([12.7, 8.3, 12.5, 10.5], abs=1e-4)


def test_tensor_path_stays_close_to_pil(folder: Path) -> None:
    metric = load(folder)
    std = torch.tensor(metric.transform.std).view(3, 1, 1)
    for picture in PICTURES[:5]:
        tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        for images, step, bound in ((tensor, 1.01 / 255, 1e-3), (tensor / 255, 2.01 / 255, 1e-2)):
            difference = (pixels_of(metric, images) - pixels_of(metric, picture)) * std
            assert difference.abs().max() <= step
            assert metric.compute(images) == pytest.approx(metric.compute(picture), abs=bound)


@pytest.mark.parametrize("size", [(224, 224), (230, 301)])
def test_gradient_agrees_with_finite_differences(folder: Path, size: tuple[int, int]) -> None:
    metric = load(folder, torch_dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) * 0.6 + 0.2
    images.requires_grad_()
    reward = metric.reward(images)
    assert reward.dtype == torch.float64
    (gradient,) = torch.autograd.grad(reward.sum(), images)
    images = images.detach()

    step = 1e-5
    directions = [gradient / gradient.norm(), torch.randn(images.shape, generator=generator).double()]
    for image, channel, row, column in [(0, 0, 100, 117), (1, 1, 57, 80), (1, 2, 130, 200)]:
        pixel = torch.zeros_like(images)
        pixel[image, channel, row, column] = 1
        directions.append(pixel)
    for direction in directions:
        ahead, behind = (metric.reward(images + sign * step * direction).sum() for sign in (1, -1))
        measured, expected = (ahead - behind) / (2 * step), (gradient * direction).sum()
        assert expected != 0
        assert torch.isclose(measured, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision_stays_close(folder: Path, dtype: torch.dtype, bound: float) -> None:
    metric = load(folder, torch_dtype=dtype)
    reward = metric.reward(PICTURES)
    assert metric.dtype == dtype
    assert reward.dtype == torch.float32
    assert (reward - torch.tensor(load(folder).compute(PICTURES))).abs().max() < bound


@pytest.mark.slow
def test_full_size_scores_equal_both_official_ones(tmp_path: Path) -> None:
    """Also: the published file's names, without any config, load as they are."""
    config = vision_config(None)
    predictor = build_predictor(config)
    randomize(predictor)
    weights = predictor.state_dict()
    # The weight of the published head, as one map, has a length of 18.0.
    weights["layers.7.weight"].mul_(18 / np.linalg.norm(affine(weights)[0]))
    weights["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    assert len(weights) == 403
    file = tmp_path / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    first = predictor_scores(predictor, PICTURES)
    del predictor
    second = openai_scores(weights, config, PICTURES)
    del weights

    metric = AestheticMetric.from_pretrained(ModelConfig(path=file), device="cpu", batch_size=4)
    ours = torch.tensor(metric.compute(PICTURES))
    del metric
    file.unlink()

    assert first.std() > 0.3
    assert (ours - first).abs().max() < TOLERANCE
    assert (ours - second).abs().max() < TOLERANCE

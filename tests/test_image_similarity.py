"""Image similarity: equal to transformers' networks with the same weights, references, gradients."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file

from diffsynth_metrics import CheckpointError, ImageError, ImageSimilarityMetric, ModelConfig
from diffsynth_metrics.catalog import load_metric
from diffsynth_metrics.metrics.image_similarity import mean_cosine
from diffsynth_metrics.pixels.transforms import IMAGENET_MEAN, IMAGENET_STD, ResizedCrop
from diffsynth_metrics.weights.checkpoint import KNOWN_LAYOUTS, fingerprint

TINY = {
    "clip-i": "image_similarity",
    "dino": "image_similarity_dino",
    "dinov2": "image_similarity_dinov2",
}


@pytest.fixture(scope="module")
def load(tiny: Callable[[str], Path]) -> Callable[..., ImageSimilarityMetric]:
    def load(protocol: str, **options: Any) -> ImageSimilarityMetric:
        return ImageSimilarityMetric.from_pretrained(
            ModelConfig(path=tiny(TINY[protocol])), protocol=protocol, device="cpu", **options
        )

    return load


@pytest.fixture(scope="module")
def metric(load: Callable[..., ImageSimilarityMetric]) -> ImageSimilarityMetric:
    return load("clip-i")


@pytest.fixture(scope="module")
def pictures(photographs: dict[str, PIL.Image.Image]) -> list[PIL.Image.Image]:
    sizes = [(250, 190), (301, 452), (640, 333), (224, 224)]
    return [picture.resize(size) for picture, size in zip(photographs.values(), sizes, strict=False)]


def test_the_formula() -> None:
    references = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    assert mean_cosine(references, torch.tensor([0.6, 0.8])).item() == pytest.approx(1 / 3)


# timm's names to those of transformers' networks


def vit_as_transformers(weights: dict[str, torch.Tensor], network: Any, dinov2: bool) -> Any:
    """Load DINO or DINOv2 into ``ViTModel`` or ``Dinov2Model``, whose names depend on the release."""
    known = set(network.state_dict())
    new = any("q_proj" in name for name in known)
    prefixes = {re.match(r"(.*layers?\.)0\.", name) for name in known} - {None}
    layer = prefixes.pop().group(1) + "{}."  # type: ignore[union-attr]
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
        "attn.proj": "attention.o_proj" if new else "attention.output.dense",
    }
    if dinov2:
        names |= {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    else:
        names |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        if not any("mlp.fc1" in name for name in known):
            names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    renamed = {}
    for name, tensor in weights.items():
        if not name.startswith("blocks."):
            renamed[names[name]] = tensor
            continue
        _, number, rest = name.split(".", 2)
        if rest.startswith("attn.qkv"):
            parts = ("q_proj", "k_proj", "v_proj") if new else ("query", "key", "value")
            inner = "attention." if new else "attention.attention."
            for part, piece in zip(parts, tensor.chunk(3), strict=True):
                renamed[layer.format(number) + inner + part + rest.removeprefix("attn.qkv")] = piece
            continue
        for ours, theirs in names.items():
            if rest == ours or rest.startswith(f"{ours}."):
                rest = theirs + rest.removeprefix(ours)
                break
        renamed[layer.format(number) + rest] = tensor
    missing = known - set(renamed) - {"embeddings.mask_token"}
    assert not missing and not set(renamed) - known
    network.load_state_dict(renamed, strict=False)
    return network.eval()


def clip_as_transformers(weights: dict[str, torch.Tensor], network: Any) -> Any:
    """Map the image tower of CLIP to ``CLIPVisionModelWithProjection``."""
    renamed = {
        "vision_model.embeddings.class_embedding": weights["cls_token"].flatten(),
        "vision_model.embeddings.position_embedding.weight": weights["pos_embed"][0],
        "vision_model.embeddings.patch_embedding.weight": weights["patch_embed.proj.weight"],
        "visual_projection.weight": weights["head.weight"],
    }
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        for kind in ("weight", "bias"):
            renamed[f"vision_model.{theirs}.{kind}"] = weights[f"{ours}.{kind}"]
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            layer = f"vision_model.encoder.layers.{number}."
            if rest.startswith("attn.qkv"):
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}self_attn.{part}_proj{rest.removeprefix('attn.qkv')}"] = piece
                continue
            rest = rest.replace("norm1", "layer_norm1").replace("norm2", "layer_norm2")
            renamed[layer + rest.replace("attn.proj", "self_attn.out_proj")] = tensor
    known = {name for name in network.state_dict() if not name.endswith("position_ids")}
    assert known == set(renamed)
    network.load_state_dict(renamed, strict=False)
    return network.eval()


def reference_network(protocol: str, weights: dict[str, torch.Tensor]) -> Any:
    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if protocol == "clip-i":
        config: Any = transformers.CLIPVisionConfig(
            **shared, intermediate_size=128, patch_size=32, projection_dim=24, hidden_act="quick_gelu"
        )
        network = transformers.CLIPVisionModelWithProjection(config)
        # timm's projection has a bias, which is 0 in OpenAI's weights.
        assert weights.pop("head.bias").shape == (24,)
        return clip_as_transformers(weights, network)
    if protocol == "dino":
        config = transformers.ViTConfig(**shared, intermediate_size=128, layer_norm_eps=1e-6)
        return vit_as_transformers(
            weights, transformers.ViTModel(config, add_pooling_layer=False), dinov2=False
        )
    config = transformers.Dinov2Config(**shared, mlp_ratio=4, image_size=518, patch_size=14)
    return vit_as_transformers(weights, transformers.Dinov2Model(config), dinov2=True)


def reference_pixels(protocol: str, picture: PIL.Image.Image) -> torch.Tensor:
    """Prepare a picture with Pillow and NumPy alone."""
    edge, mean, std = 256, IMAGENET_MEAN, IMAGENET_STD
    if protocol == "clip-i":
        edge = 224
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    short = min(picture.size)
    size = tuple(int(edge * side / short) for side in picture.size)
    resized = picture.resize(size, PIL.Image.Resampling.BICUBIC)
    margins = [side - 224 for side in size]
    left, top = (round(margin / 2) if protocol == "dino" else margin // 2 for margin in margins)
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float64) / 255
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("protocol", TINY)
def test_it_equals_transformers_and_numpy(
    protocol: str,
    load: Callable[..., ImageSimilarityMetric],
    tiny: Callable[[str], Path],
    pictures: list[PIL.Image.Image],
) -> None:
    weights = load_file(tiny(TINY[protocol]) / "model.safetensors")
    if protocol == "clip-i":
        weights["head.bias"] = torch.zeros_like(weights["head.bias"])
    network = reference_network(protocol, dict(weights))
    metric = load(protocol)
    if protocol == "clip-i":
        metric.model.load_state_dict(weights)
    with torch.no_grad():
        outputs = [network(pixel_values=reference_pixels(protocol, picture)) for picture in pictures]
    features = np.concatenate(
        [
            (one.image_embeds if protocol == "clip-i" else one.last_hidden_state[:, 0]).numpy()
            for one in outputs
        ]
    ).astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(metric.encode_image(pictures).numpy(), features, atol=1e-5)
    cosines = features @ features.T
    assert metric.compute(pictures[0], pictures) == pytest.approx(cosines[0], abs=1e-5)
    assert metric.compute([pictures[:3]], pictures) == pytest.approx(cosines[:3].mean(0), abs=1e-5)


class TestReferences:
    def test_pairs_one_for_all_and_several_for_each(
        self, metric: ImageSimilarityMetric, pictures: list[PIL.Image.Image]
    ) -> None:
        a, b, c, d = pictures
        matrix = np.array([metric.compute(one, pictures) for one in pictures])
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-5)
        np.testing.assert_allclose(np.diagonal(matrix), 1, atol=1e-5)
        assert matrix[0, 1] < 0.99
        assert metric.compute([a, b], [c, d]) == pytest.approx([matrix[0, 2], matrix[1, 3]], abs=1e-5)
        rows = metric.evaluate([[a, b, c], [d]], [d, a])
        assert [row["references"] for row in rows] == [3, 1]
        assert [row["score"] for row in rows] == pytest.approx(
            [matrix[:3, 3].mean(), matrix[3, 0]], abs=1e-5
        )
        assert metric.compute([[a, b]], [c, d]) == pytest.approx(matrix[:2, 2:].mean(0), abs=1e-5)

    def test_a_picture_that_comes_up_again_is_embedded_once(
        self,
        metric: ImageSimilarityMetric,
        pictures: list[PIL.Image.Image],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        pictures[0].save(tmp_path / "a.png")
        seen = []
        embed = ImageSimilarityMetric.image_embeddings

        def count(self: Any, images: Any) -> torch.Tensor:
            seen.append(len(images))
            return embed(self, images)

        monkeypatch.setattr(ImageSimilarityMetric, "image_embeddings", count)
        metric.compute([[str(tmp_path / "a.png"), pictures[1]]] * 3, pictures[:3])
        metric.compute(pictures[0], pictures[:3])
        assert seen == [2, 3, 1, 3]

    def test_folders_are_paired_by_stem(
        self, metric: ImageSimilarityMetric, pictures: list[PIL.Image.Image], tmp_path: Path
    ) -> None:
        for side in ("one", "two"):
            (tmp_path / side).mkdir()
            for index, picture in enumerate(pictures[:2]):
                picture.save(tmp_path / side / f"{index}.png")
        assert metric.compute(tmp_path / "one", tmp_path / "two") == pytest.approx([1, 1], abs=1e-5)

    def test_samples_with_several_sources(
        self, metric: ImageSimilarityMetric, pictures: list[PIL.Image.Image]
    ) -> None:
        a, b, c, d = pictures
        arguments = metric.arguments(["", ""], [c, d], [(a, b), (b,)])
        assert metric.compute(*arguments) == metric.compute([[a, b], [b]], [c, d])
        for sources in ((), [(a,), ()]):
            with pytest.raises(ValueError, match="needs a source image per sample, and sample"):
                metric.arguments(["", ""], [c, d], sources)

    def test_what_does_not_fit_is_an_error(
        self, metric: ImageSimilarityMetric, pictures: list[PIL.Image.Image], tmp_path: Path
    ) -> None:
        a, b, c, _ = pictures
        with pytest.raises(ValueError, match=r"references for 2 images and 3 images; .*\[\[a, b, c\]\]"):
            metric.compute([[a], [b]], [a, b, c])
        with pytest.raises(ValueError, match="got 2 reference images and 3 images"):
            metric.compute([a, b], [a, b, c])
        with pytest.raises(ValueError, match="references of image 1: images is empty"):
            metric.compute([[a], []], [a, b])
        (tmp_path / "broken.png").write_bytes(b"no picture")
        with pytest.raises(ImageError, match=r"^reference image 1 \(.*broken\.png\) cannot be read"):
            metric.compute([[a, tmp_path / "broken.png"]], [b])
        with pytest.raises(ImageError, match=r"^image 0 \(.*broken\.png\) cannot be read"):
            metric.compute([a], [tmp_path / "broken.png"])


class TestTensors:
    @pytest.mark.parametrize("protocol", TINY)
    def test_gradients_reach_both_sides(
        self, protocol: str, load: Callable[..., ImageSimilarityMetric]
    ) -> None:
        metric = load(protocol)
        generator = torch.Generator().manual_seed(0)
        reference, image = (
            torch.rand(1, 3, 40, 48, generator=generator, requires_grad=True) for _ in range(2)
        )
        reward = metric.reward(reference, image)
        reward.sum().backward()
        for side in (reference, image):
            assert side.grad is not None and side.grad.abs().sum() > 0
        # A step along the gradient changes the score by as much as the gradient says.
        assert image.grad is not None
        step = 1e-2 * image.grad / image.grad.norm()
        with torch.no_grad():
            moved = metric.reward(reference, (image + step).clamp(0, 1)) - reward
        assert moved.item() == pytest.approx((image.grad * step).sum().item(), rel=0.2)
        assert not any(weight.requires_grad for weight in metric.model.parameters())

    def test_uint8_tensors_are_the_same_as_pictures(
        self, metric: ImageSimilarityMetric, pictures: list[PIL.Image.Image]
    ) -> None:
        tensors = [torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) for one in pictures]
        expected = metric.compute(pictures[0], pictures)
        assert metric.compute(tensors[0], tensors) == pytest.approx(expected, abs=1e-5)
        close = metric.compute(tensors[0] / 255, [tensor / 255 for tensor in tensors])
        assert close == pytest.approx(expected, abs=0.02)

    def test_gradient_checkpointing_changes_nothing(
        self, load: Callable[..., ImageSimilarityMetric]
    ) -> None:
        gradients = []
        for checkpointing in (False, True):
            image = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).requires_grad_()
            metric = load("dinov2", gradient_checkpointing=checkpointing)
            metric.reward(image.detach().flip(-1), image).sum().backward()
            gradients.append(image.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    def test_narrow_towers_stay_near(
        self, load: Callable[..., ImageSimilarityMetric], pictures: list[PIL.Image.Image]
    ) -> None:
        for protocol in TINY:
            expected = load(protocol).compute(pictures[0], pictures)
            narrow = load(protocol, torch_dtype=torch.bfloat16)
            assert narrow.encode_image(pictures).dtype == torch.float32
            assert narrow.compute(pictures[0], pictures) == pytest.approx(expected, abs=0.03)


class TestLoading:
    def test_the_wrong_protocol_is_named(self, tiny: Callable[[str], Path]) -> None:
        with pytest.raises(CheckpointError, match="Pass protocol='dinov2': the weights are not those"):
            ImageSimilarityMetric.from_pretrained(
                ModelConfig(path=tiny(TINY["dinov2"])), protocol="dino", device="cpu"
            )
        with pytest.raises(ValueError, match="protocol must be one of clip-i, dino, dinov2; got 'clip'"):
            ImageSimilarityMetric.from_pretrained(protocol="clip")  # type: ignore[arg-type]

    def test_a_config_of_another_network_is_refused(
        self, tiny: Callable[[str], Path], tmp_path: Path
    ) -> None:
        (tmp_path / "model.safetensors").symlink_to(tiny(TINY["dino"]) / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
        with pytest.raises(CheckpointError, match="describes 'resnet50', and the weights are a DINO"):
            ImageSimilarityMetric.from_pretrained(ModelConfig(path=tmp_path), protocol="dino")

    def test_openais_activation_whatever_the_config_says(
        self, tiny: Callable[[str], Path], tmp_path: Path, metric: ImageSimilarityMetric
    ) -> None:
        folder = tiny(TINY["clip-i"])
        (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        plain = config | {"architecture": "vit_base_patch32_clip_224"}
        (tmp_path / "config.json").write_text(json.dumps(plain))
        twin = ImageSimilarityMetric.from_pretrained(ModelConfig(path=tmp_path), device="cpu")
        image = torch.rand(2, 3, 32, 32)
        assert twin.compute(image[0], image) == pytest.approx(metric.compute(image[0], image), abs=1e-6)

    def test_the_published_networks(self) -> None:
        for protocol, parameters in (
            ("clip-i", 87_849_728),
            ("dino", 21_665_664),
            ("dinov2", 22_056_192),
        ):
            network = ImageSimilarityMetric.build({"protocol": protocol})
            assert sum(weight.numel() for weight in network.parameters()) == parameters, protocol
            assert all(weight.is_meta for weight in network.parameters())
            layout = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
            assert KNOWN_LAYOUTS[fingerprint(layout)] == ("ImageSimilarityMetric",), protocol

    def test_it_loads_by_name_with_its_protocol_in_the_card(self, tiny: Callable[[str], Path]) -> None:
        metric = load_metric(f"image-similarity={tiny(TINY['dino'])}", protocol="dino", device="cpu")
        assert metric.card.name.startswith("Image similarity (DINO)")
        assert metric.provenance["options"] == {"protocol": "dino"}
        assert "edge=256" in metric.provenance["preprocessing"]
        assert metric.needs == ("source",)


def test_resize_and_crop_are_torchvisions(photographs: dict[str, PIL.Image.Image]) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    theirs = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])
    ours = ResizedCrop(224, crop_rounding="half_even")
    for picture in photographs.values():
        for size in ((300, 211), (257, 640), (100, 101)):
            resized = picture.resize(size)
            expected = np.asarray(theirs(resized)).transpose(2, 0, 1)
            np.testing.assert_array_equal(ours.from_pil(resized).numpy(), expected)

"""HPSv3's own behaviour, on tiny random weights; `tests/parity/test_hpsv3.py` compares its scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from diffsynth_metrics import CheckpointError, HPSv3Metric, ImageError, ModelConfig
from diffsynth_metrics.base import choose_device
from diffsynth_metrics.metrics.hpsv3 import preference_probability
from diffsynth_metrics.pixels.transforms import SmartResize
from diffsynth_metrics.testing import tiny_checkpoint

# The same pair, scored twice: other threads, shapes of a batch or processors round float32 differently.
approx = partial(pytest.approx, rel=1e-4, abs=2e-5)

SMALL = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 24}
"""Options for pictures of few tokens, which take less time."""


def picture(seed: int, width: int, height: int) -> PIL.Image.Image:
    generator = np.random.default_rng(seed)
    small = PIL.Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return small.resize((width, height))


PICTURES = [
    picture(seed, width, height)
    for seed, (width, height) in enumerate(
        [(64, 64), (300, 200), (100, 700), (512, 512), (31, 47), (640, 427)]
    )
]


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path]) -> Path:
    return tiny("hpsv3")


def load(folder: Path, **options: Any) -> HPSv3Metric:
    options = {"device": "cpu", "torch_dtype": torch.float32} | options
    return HPSv3Metric.from_pretrained(ModelConfig(path=folder), **options)


@pytest.fixture
def metric(metrics: Callable[[str], Any]) -> HPSv3Metric:
    metric: HPSv3Metric = metrics("hpsv3")
    return metric


@pytest.fixture(scope="module")
def small(folder: Path) -> HPSv3Metric:
    return load(folder, **SMALL)


def test_evaluate_gives_mean_and_deviation(metric: HPSv3Metric) -> None:
    rows = metric.evaluate("a cat", PICTURES)
    assert [row["score"] for row in rows] == approx(metric.compute("a cat", PICTURES))
    assert all(row.keys() == {"score", "mu", "sigma"} for row in rows)
    assert all(row["mu"] == row["score"] and row["sigma"] > 0 for row in rows)
    assert len({row["mu"] for row in rows}) == len({row["sigma"] for row in rows}) == len(PICTURES)


def test_batches_equal_one_by_one(folder: Path, small: HPSv3Metric) -> None:
    """36 pairs of six sizes and six lengths of prompts."""
    words = ["", "a cat", "a red cat " * 9, "一只猫", "word " * 60, "🎨"]
    pairs = [(word, image) for word in words for image in PICTURES]
    prompts, images = map(list, zip(*pairs, strict=True))
    single = [small.evaluate(prompt, image)[0] for prompt, image in pairs]
    for batch_size in (2, 5, 36):
        together = load(folder, batch_size=batch_size, **SMALL).evaluate(prompts, images)
        for one, other in zip(single, together, strict=True):
            assert other == approx(one)


def test_every_way_to_pair_gives_the_scores_of_pairs(folder: Path) -> None:
    metric = load(folder, batch_size=2)
    words = ["a cat", "a dog and 3 birds", "x"]
    single = {
        (word, index): metric.compute(word, PICTURES[index])[0] for word in words for index in range(3)
    }
    one_image = metric.compute(words, PICTURES[1])
    assert one_image == approx([single[word, 1] for word in words])
    one_prompt = metric.compute("x", PICTURES[:3])
    assert one_prompt == approx([single["x", i] for i in range(3)])
    square = np.asarray(PICTURES[0])
    mixed = [PICTURES[1], square, torch.from_numpy(square.copy()).permute(2, 0, 1)]
    scores = metric.compute(words, mixed)
    expected = [single[words[0], 1], single[words[1], 0], single[words[2], 0]]
    assert scores == pytest.approx(expected, abs=5e-3)  # tensors are resized in torch


def test_one_image_for_many_prompts_is_seen_once(metric: HPSv3Metric) -> None:
    with mock.patch.object(metric.model.visual, "forward", wraps=metric.model.visual.forward) as seen:
        metric.compute(["a", "b", "c"], PICTURES[0])
    assert seen.call_count == 1
    assert seen.call_args.args[0].shape[0] == 4 * 256


def test_a_batch_is_one_pass_without_cache_that_ends_at_the_reward_token(metric: HPSv3Metric) -> None:
    with mock.patch.object(metric.model.model, "forward", wraps=metric.model.model.forward) as decoder:
        metric.compute("a cat", PICTURES[: metric.batch_size])
    assert decoder.call_count == 1
    assert decoder.call_args.kwargs["use_cache"] is False
    length = decoder.call_args.kwargs["inputs_embeds"].shape[1]
    frame = metric._frame
    images = max(
        h // 28 * (w // 28)
        for h, w in (SmartResize().size(p.height, p.width) for p in PICTURES[: metric.batch_size])
    )
    assert length == len(frame.before) + images + len(frame.encode("a cat", 0))
    assert frame.encode("a cat", 0)[-1] == frame.reward_id


def test_the_language_models_head_is_not_loaded(folder: Path, metric: HPSv3Metric) -> None:
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert not any("lm_head" in name for name, _ in metric.model.named_parameters())


def test_a_special_token_in_a_prompt_is_text(small: HPSv3Metric) -> None:
    without = small.compute("a cat  and a dog", PICTURES[0])
    expected = [small.compute("a", PICTURES[0])[0], small.compute("b", PICTURES[2])[0]]
    special = {*small.tokenizer.added_tokens_decoder, small._frame.reward_id}
    vision = ("<|image_pad|>", "<|vision_start|>")
    for token in ("<|Reward|>", "<|im_end|>", "<think>", "<|endoftext|>", *vision):
        prompt = f"a cat {token} and a dog"
        plain = small._frame.encode(prompt, 0)
        assert [index for index in plain if index in special] == [plain[0], plain[-1]], token
        assert prompt in small.tokenizer.decode(plain[1:-1])
        score = small.compute(prompt, PICTURES[0])
        assert math.isfinite(score[0]) and score != approx(without), token
        # In a batch it changes nothing for its neighbours.
        neighbours = small.compute(["a", prompt, "b"], PICTURES[:3])
        assert neighbours[::2] == approx(expected), token


def test_positions_of_diffsynth_are_those_of_qwen2_vl(folder: Path) -> None:
    """transformers' own model numbers rows and columns, as ``diffsynth.metrics`` lets it do."""
    metric = load(folder, positions="diffsynth")
    image = PICTURES[1]
    with mock.patch.object(metric.model, "forward", wraps=metric.model.forward) as forward:
        score = metric.compute("a cat", image)
    ids, is_image, _, positions, _ = forward.call_args.args
    config = Qwen2VLConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        qwen = Qwen2VLModel(config)
    height, width = (side // 14 for side in metric.transform.size(image.height, image.width))
    expected, _ = qwen.get_rope_index(
        ids, mm_token_type_ids=is_image.int(), image_grid_thw=torch.tensor([[1, height, width]])
    )
    assert torch.equal(positions, expected)
    assert abs(score[0] - load(folder).compute("a cat", image)[0]) > 1e-3


def test_preference_probability_is_the_models_integral() -> None:
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(2, 40, generator=generator) * 4
    sigma = (torch.randn(2, 40, generator=generator) * 2).exp()
    ours = preference_probability(mu[0], sigma[0], mu[1], sigma[1])
    normal = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for index in range(40):
        spread = torch.hypot(sigma[0, index].double(), sigma[1, index].double())
        drawn = torch.sigmoid(mu[0, index].double() - mu[1, index].double() + spread * normal)
        assert abs(ours[index] - drawn.mean()) < 6 * drawn.std() / math.sqrt(len(normal)) + 1e-9
    other = preference_probability(mu[1], sigma[1], mu[0], sigma[0])
    assert torch.allclose(ours + other, torch.ones(40).double(), atol=1e-12)


def test_preference_probability_of_certain_and_of_ignorant_models() -> None:
    mu, zero = torch.tensor([2.0]), torch.tensor([0.0])
    certain = preference_probability(mu, zero, zero, zero)
    assert certain.item() == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-12)
    known = preference_probability(mu * 0.5, zero + 1, zero, zero)
    # The integral of sigmoid(1 + z) over a standard normal z, by adaptive quadrature.
    from scipy.integrate import quad

    value, _ = quad(
        lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (1 + math.exp(-1 - z)), -12, 12
    )
    assert known.item() == pytest.approx(value, abs=1e-9)
    just_above = preference_probability(mu * 0.5, zero + 1.0000001, zero, zero)
    assert just_above.item() == pytest.approx(known.item(), abs=1e-6)
    ignorant = preference_probability(mu, zero + 1e9, zero, zero)
    assert ignorant.item() == pytest.approx(0.5, abs=1e-8)


def test_preference_compares_two_images_of_a_prompt(metric: HPSv3Metric) -> None:
    rows = metric.evaluate("a cat", PICTURES[:3])
    mu, sigma = (torch.tensor([row[name] for row in rows]) for name in ("mu", "sigma"))
    found = metric.preference("a cat", PICTURES[:2], PICTURES[1:3])
    expected = preference_probability(mu[:2], sigma[:2], mu[1:], sigma[1:]).tolist()
    assert found == pytest.approx(expected, abs=1e-5)
    swapped = metric.preference("a cat", PICTURES[1:3], PICTURES[:2])
    assert [a + b for a, b in zip(found, swapped, strict=True)] == pytest.approx([1, 1], abs=1e-9)
    assert metric.preference("a cat", PICTURES[0], PICTURES[0]) == pytest.approx([0.5], abs=1e-9)
    assert len(metric.preference("a cat", PICTURES[0], PICTURES[:3])) == 3
    with pytest.raises(ValueError, match="2 images a and 3 images b"):
        metric.preference("a cat", PICTURES[:2], PICTURES[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rewards_carry_gradients_to_the_pixels(folder: Path, dtype: torch.dtype) -> None:
    metric = load(folder, torch_dtype=dtype)
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reward = metric.reward(["a cat", "a longer prompt"], images)
    assert metric.dtype == dtype
    assert reward.dtype == torch.float32
    assert next(metric.model.rm_head.parameters()).dtype == torch.float32
    reward[0].backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert images.grad[0].abs().sum() > 0
    assert images.grad[1].abs().sum() == 0
    assert not any(parameter.requires_grad for parameter in metric.model.parameters())
    with torch.no_grad():
        assert not metric.reward("a cat", images).requires_grad


def test_half_precision_stays_close(folder: Path, metric: HPSv3Metric) -> None:
    expected = torch.tensor(metric.compute("a cat", PICTURES))
    for dtype, bound in ((torch.bfloat16, 0.3), (torch.float16, 0.03)):
        ours = load(folder, torch_dtype=dtype).reward("a cat", PICTURES)
        assert (ours - expected).abs().max() < bound


def test_bfloat16_is_the_default_and_the_head_keeps_the_files_values(folder: Path) -> None:
    metric = load(folder, torch_dtype=None)
    assert metric.dtype == torch.bfloat16
    weights = load_file(folder / "model.safetensors")
    for name, parameter in metric.model.rm_head.named_parameters():
        assert torch.equal(parameter, weights[f"rm_head.{name}"])


@pytest.fixture(scope="module")
def double(folder: Path) -> HPSv3Metric:
    return load(folder, torch_dtype=torch.float64)  # of fewer tokens, a score bends more


@pytest.mark.parametrize(
    "size",
    [(70, 51), (512, 512), (64, 512), (300, 170)],
    ids=lambda size: "x".join(map(str, size)),
)
def test_gradient_agrees_with_finite_differences(double: HPSv3Metric, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) * 0.6 + 0.2
    images.requires_grad_()
    prompts = ["a red cat", "一只 cat, in green"]

    def total(at: Tensor) -> Tensor:
        return double.reward(prompts, at).sum()

    reward = total(images)
    assert reward.dtype == torch.float64
    (gradient,) = torch.autograd.grad(reward, images)
    assert gradient.norm() > 1e-2
    images = images.detach()
    # transformers computes norms and rotations in float32 in any case: 1e-7 of rounding, so the step is
    # larger than float64 would need.
    step = 1e-3
    patch = torch.zeros_like(images)
    patch[1, :, 30:44, 20:34] = gradient[1, :, 30:44, 20:34].sign()
    noise = torch.randn(images.shape, generator=generator).double()
    for direction in (gradient, patch, noise):
        direction = direction / direction.norm()
        measured = (total(images + step * direction) - total(images - step * direction)) / (2 * step)
        expected = (gradient * direction).sum()
        assert torch.isclose(measured, expected, rtol=5e-3, atol=1e-3)


def test_tensor_path_stays_close_to_pil(metric: HPSv3Metric) -> None:
    for image in PICTURES:
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = metric.transform.from_pil(image) / 255
        # Bytes are rounded after each of two passes, and floats are not.
        for images in (tensor, tensor / 255):
            difference = metric.transform.from_tensor(images[None])[0] - pixels
            assert difference.abs().max() <= 2.01 / 255
        rounded = metric.transform.from_tensor(tensor[None])[0] - pixels
        assert (rounded.abs() > 1e-6).float().mean() < 0.05


def test_threads_share_a_metric(small: HPSv3Metric) -> None:
    jobs = [(f"prompt {index} " * (index % 5), PICTURES[index % 6]) for index in range(24)]
    expected = [small.compute(*job)[0] for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: small.compute(*job)[0], jobs))
    assert found == approx(expected)


def test_an_extreme_aspect_ratio_is_an_error_that_names_the_image(metric: HPSv3Metric) -> None:
    wide = PIL.Image.new("RGB", (2001, 10))
    with pytest.raises(ImageError, match="image 1: one side may be at most 200 times"):
        metric.compute("a cat", [PICTURES[0], wide])
    with pytest.raises(ImageError, match="image 1: one side may be at most 200 times"):
        metric.compute("a cat", [torch.rand(3, 8, 8), torch.rand(3, 1, 300)])


@pytest.mark.parametrize(
    ("images", "error"),
    [
        ("no such file.png", FileNotFoundError),
        (torch.full((3, 8, 8), 2.0), ImageError),
        (torch.full((3, 8, 8), torch.nan), ImageError),
        (torch.rand(1, 8, 8), ImageError),
        ([], ValueError),
        (3, TypeError),
    ],
)
def test_bad_images_are_errors(metric: HPSv3Metric, images: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        metric.compute("a cat", images)


def test_bad_prompts_are_errors(metric: HPSv3Metric) -> None:
    with pytest.raises(TypeError, match="prompt 1 must be a str"):
        metric.compute(["a", 3], PICTURES[:2])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="2 prompts and 3 images"):
        metric.compute(["a", "b"], PICTURES[:3])
    with pytest.raises(ValueError, match="prompt 0"):
        metric.compute("a \ud800 surrogate", PICTURES[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 100}, "max_pixels"),
        ({"min_pixels": 10**6}, "min_pixels 1000000 is above max_pixels"),
        ({"max_pixels": 1e6}, "max_pixels must be an int"),
        ({"positions": "other"}, "positions must be"),
        ({"batch_size": 0}, "batch_size"),
        ({"device_map": "auto"}, "either device or device_map"),
    ],
)
def test_bad_options_are_errors(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positions": "other"}, ValueError, "positions must be 'official' or 'diffsynth'"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive int, got 0"),
        ({"torch_dtype": torch.int8}, TypeError, "torch_dtype must be one of"),
        ({"max_pixels": 100}, ValueError, "max_pixels"),
        ({"processor_kwargs": {"local_files_only": True}}, TypeError, "local_files_only"),
        ({"processor_kwargs": 5}, TypeError, "processor_kwargs must be a mapping, got int"),
    ],
)
def test_options_are_checked_before_files_are_looked_for(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HPSv3Metric.from_pretrained(ModelConfig(path="no such folder"), **options)


def test_max_pixels_bounds_the_tokens_of_an_image(folder: Path, metric: HPSv3Metric) -> None:
    bounded = load(folder, max_pixels=28 * 28 * 16, min_pixels=28 * 28)
    with mock.patch.object(bounded.model.visual, "forward", wraps=bounded.model.visual.forward) as seen:
        scores = bounded.compute("a cat", PICTURES[3])
    assert seen.call_args.args[0].shape[0] == 4 * 16
    assert scores != approx(metric.compute("a cat", PICTURES[3]))


def test_processor_kwargs_reach_the_tokenizer(folder: Path) -> None:
    metric = load(folder, processor_kwargs={"model_max_length": 77})
    assert metric.tokenizer.model_max_length == 77


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "sequential",
        "cpu",
        {"": "cpu"},
        {"visual": "cpu", "model": "cpu", "rm_head": torch.device("cpu")},
    ],
)
def test_device_map_places_the_network(folder: Path, small: HPSv3Metric, device_map: Any) -> None:
    placed = load(folder, device=None, device_map=device_map, **SMALL)
    is_named = device_map not in ("auto", "sequential")
    assert placed.device.type == ("cpu" if is_named else choose_device(None).type)
    rel = 1e-4 if placed.device.type == "cpu" else 1e-3
    scores = placed.compute("a cat", PICTURES)
    assert scores == approx(small.compute("a cat", PICTURES), rel=rel)


def test_parts_on_devices_of_their_own_give_the_same_scores(folder: Path, small: HPSv3Metric) -> None:
    """accelerate's hooks, which move inputs between devices, are at work on one device here."""
    places = {"visual": "cpu", "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "rm_head": "cpu"}
    places |= {"model.norm": "cpu"} | {f"model.layers.{index}": "cpu" for index in range(3)}
    hooked: Callable[..., Any] = partial(accelerate.dispatch_model, force_hooks=True)
    with mock.patch("accelerate.dispatch_model", hooked):
        placed = load(folder, device=None, device_map=places, **SMALL)
    assert hasattr(placed.model.visual, "_hf_hook")
    assert placed.device.type == "cpu"
    assert placed.compute("a cat", PICTURES) == approx(small.compute("a cat", PICTURES))
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    placed.reward("a cat", images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_the_disk_is_no_device(folder: Path) -> None:
    places = {"visual": "cpu", "model": "disk", "rm_head": "cpu"}
    with pytest.raises(ValueError, match="puts model on the disk"):
        load(folder, device=None, device_map=places)


def copy_of(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(copy_of(folder, tmp_path) / "model.safetensors")
    del weights["rm_head.5.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing rm_head\.5\.bias"):
        load(tmp_path)


def test_weights_without_the_unused_head_load_as_well(
    folder: Path, tmp_path: Path, metric: HPSv3Metric
) -> None:
    weights = load_file(copy_of(folder, tmp_path) / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    expected = approx(metric.compute("a cat", PICTURES[0]))
    assert load(tmp_path).compute("a cat", PICTURES[0]) == expected


def test_a_config_with_a_padded_vocabulary_is_resized_to_the_file(
    folder: Path, tmp_path: Path, metric: HPSv3Metric
) -> None:
    """Qwen2-VL's own config.json says 152,064 tokens; the authors cut the embedding to 151,658."""
    path = copy_of(folder, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 100}))
    expected = approx(metric.compute("a cat", PICTURES[0]))
    assert load(tmp_path).compute("a cat", PICTURES[0]) == expected
    path.write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    with pytest.raises(CheckpointError, match="'qwen3_vl' network"):
        load(tmp_path)


def test_a_tokenizer_of_other_weights_is_an_error(
    folder: Path, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    path = copy_of(folder, tmp_path) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<|one_more|>"})
    path.write_text(json.dumps(tokenizer))
    (path.parent / "canaries.json").unlink()
    with pytest.raises(CheckpointError, match="does not belong to these weights"):
        load(tmp_path)
    other = tiny("clip")
    with pytest.raises(CheckpointError, match="not Qwen2-VL's"):
        HPSv3Metric.from_pretrained(ModelConfig(path=folder), ModelConfig(path=other), device="cpu")


def test_the_tiny_checkpoint_is_small_and_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    again = tiny_checkpoint("hpsv3", tmp_path)
    files = sorted(file.name for file in folder.iterdir())
    assert files == sorted(file.name for file in again.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert sum((folder / name).stat().st_size for name in files) < 5_000_000

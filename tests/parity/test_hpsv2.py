"""HPSv2 against its authors' package, with the same weights in the published layout."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from eight_bits import in_eight_bits
from official_hpsv2 import (
    OfficialHPSv2,
    build_official,
    official_tokenizer,
    official_transform,
    without_antialias,
    without_vanishing_edges,
)
from safetensors.torch import save_file
from skimage import data
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from diffsynth_metrics import HPSv2Metric, ModelConfig
from diffsynth_metrics.inputs import as_images
from diffsynth_metrics.pixels.batches import pixel_batches
from diffsynth_metrics.testing import randomize, tiny_checkpoint

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.* tokens of a prompt, and :UserWarning"),  # it is cut
]

TOLERANCE = 1e-6  # absolute, on cosines

PROMPTS = [
    "",
    "a photo of a cat",
    "A Cat, In UPPER and lower case; with: punctuation! (really?)",
    "word " * 200,
    "un château à l'été, naïve façade, 一只猫坐在红色的沙发上",
    "🎨🐈‍⬛ a painting 🖼️",
    "a cat <end_of_text> a dog <start_of_text> <|endoftext|>",
    "the dog’s “quoted” ＡＢＣ",
    "cat &amp;amp; dog &lt;b&gt; two  spaces\tand\nlines ",
]


def photograph(name: str, size: tuple[int, int], mode: str = "RGB") -> PIL.Image.Image:
    image = PIL.Image.fromarray(getattr(data, name)()).convert("RGB").resize(size)
    if mode in ("RGBA", "LA", "PA"):
        opaque = image.convert(mode.rstrip("A") if mode != "PA" else "P").convert(mode)
        opaque.putalpha(image.convert("L"))
        return opaque
    return image.convert(mode)


PICTURES = [
    photograph("astronaut", (512, 512)),
    photograph("astronaut", (512, 383)),
    photograph("coffee", (401, 300)),
    photograph("coffee", (224, 160)),
    photograph("coffee", (161, 224)),
    photograph("chelsea", (224, 224)),
    photograph("chelsea", (37, 53)),
    photograph("rocket", (2, 500)),
    photograph("rocket", (1, 500)),
    photograph("rocket", (500, 1)),
    photograph("chelsea", (300, 401), "L"),
    photograph("astronaut", (383, 512), "RGBA"),
    photograph("coffee", (401, 300), "P"),
    photograph("rocket", (640, 427), "L"),
    photograph("chelsea", (300, 401), "CMYK"),
]


def for_official(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Return a picture that the authors' code can read, and that shows the same.

    Their code converts every mode to RGB itself, except for RGBA, which it passes on with four channels.
    It also forgets to pad a picture whose longer edge needs no scaling: here that is done by hand.
    """
    picture = picture.convert("RGB") if picture.mode == "RGBA" else in_eight_bits(picture)
    if max(picture.size) != 224:
        return picture
    padded = PIL.Image.new("RGB", (224, 224))
    padded.paste(picture.convert("RGB"), ((224 - picture.width) // 2, (224 - picture.height) // 2))
    return padded


@dataclass(frozen=True)
class Pair:
    """One set of weights: our checkpoint's folder, the official network, and its scores."""

    folder: Path
    official: OfficialHPSv2
    checkpoint: Path

    def official_scores(self, prompts: list[str], pictures: list[PIL.Image.Image]) -> Tensor:
        """Return ``[T, N]`` by the official ``score``, picture by picture, prompt by prompt."""
        accepted = [for_official(picture) for picture in pictures]
        with without_vanishing_edges():
            rows = [self.official.score(accepted, prompt, self.checkpoint) for prompt in prompts]
        return torch.tensor(rows)


def make_pair(folder: Path, seed: int) -> Pair:
    """Complete a tiny checkpoint with the weights of an official network."""
    tiny_checkpoint("hpsv2", folder)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    official = build_official(config)
    randomize(official.model, seed)
    with torch.no_grad():
        official.model.logit_scale.fill_(4.3)
    weights = official.model.state_dict()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({"state_dict": weights}, folder / "official.pt")
    randomize(official.model, seed + 100)  # the official score() must have read the file
    return Pair(folder, official, folder / "official.pt")


def load(folder: Path, **options: Any) -> HPSv2Metric:
    return HPSv2Metric.from_pretrained(ModelConfig(path=folder), device="cpu", **options)


@pytest.fixture(scope="module", autouse=True)
def usual_threads() -> Iterator[int]:
    """Compute in one thread; several only wait for each other in networks as tiny as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return [make_pair(tmp_path_factory.mktemp("tiny"), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def official_scores(pairs: list[Pair]) -> Tensor:
    """Return the official cosines ``[2, T, N]`` of PROMPTS and PICTURES with both sets of weights."""
    return torch.stack([pair.official_scores(PROMPTS, PICTURES) for pair in pairs])


@pytest.fixture(scope="module")
def metric(pairs: list[Pair]) -> HPSv2Metric:
    return load(pairs[0].folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint for the tests that need no oracle."""
    return tiny_checkpoint("hpsv2", tmp_path_factory.mktemp("alone"))


def pixels_of(metric: HPSv2Metric, images: Any) -> Tensor:
    """Return what one image becomes on its way to the network."""
    batches = pixel_batches(
        as_images(images), metric.transform, batch_size=1, device=torch.device("cpu")
    )
    return torch.cat(list(batches))


def bytes_of(picture: PIL.Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_the_official_ones(
    pairs: list[Pair], official_scores: Tensor, seed: int, batch_size: int
) -> None:
    metric = load(pairs[seed].folder, batch_size=batch_size)
    everything = list(itertools.product(PROMPTS, PICTURES))
    prompts, pictures = map(list, zip(*everything, strict=True))
    ours = torch.tensor(metric.compute(prompts, pictures)).view_as(official_scores[seed])

    # Scores that do not depend on the picture, or on the prompt, would be right for wrong code.
    assert official_scores[seed].std(dim=0).min() > 0.01
    assert official_scores[seed].std(dim=1).min() > 0.01
    assert (ours - official_scores[seed]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "picture",
    [
        photograph("coffee", (224, 160)),
        photograph("coffee", (300, 200), "RGBA"),
        photograph("coffee", (1, 500)),
    ],
    ids=["longest side 224", "RGBA", "vanishing edge"],
)
def test_pictures_that_the_official_code_cannot_read_have_a_score(
    pairs: list[Pair], metric: HPSv2Metric, picture: PIL.Image.Image
) -> None:
    with pytest.raises(RuntimeError):
        pairs[0].official.score([picture], "a photo of a cat", pairs[0].checkpoint)
    mended = pairs[0].official_scores(["a photo of a cat"], [picture]).item()
    assert metric.compute("a photo of a cat", picture) == pytest.approx([mended], abs=TOLERANCE)


SIZES = [(512, 512), (512, 383), (401, 300), (300, 401), (37, 53), (224, 224), (2, 500), (1000, 333)]


@pytest.mark.parametrize("antialias", [True, False])
def test_pixels_equal_the_official_ones_to_the_bit(pairs: list[Pair], antialias: bool) -> None:
    metric = load(pairs[0].folder, antialias=antialias)
    official = official_transform()
    with contextlib.nullcontext() if antialias else without_antialias():
        for size in SIZES:
            picture = photograph("coffee", size)
            assert torch.equal(pixels_of(metric, picture)[0], official(picture)), size


def test_antialias_is_a_choice(pairs: list[Pair], metric: HPSv2Metric) -> None:
    without = load(pairs[0].folder, antialias=False)
    assert metric.transform.antialias
    picture = PICTURES[0]
    assert (pixels_of(metric, picture) - pixels_of(without, picture)).abs().max() > 0.1
    with without_antialias():
        official = pairs[0].official_scores(PROMPTS[:3], PICTURES[:3])
    ours = torch.tensor(without.similarity_matrix(PROMPTS[:3], PICTURES[:3]))
    assert (ours - official).abs().max() < TOLERANCE


@pytest.mark.parametrize("mode", "1 L LA P PA RGB RGBX CMYK YCbCr HSV I;16".split())
def test_pixels_of_every_mode_equal_the_official_ones_to_the_bit(metric: HPSv2Metric, mode: str) -> None:
    picture = photograph("coffee", (401, 300), mode)
    assert picture.mode == mode
    assert torch.equal(pixels_of(metric, picture)[0], official_transform()(in_eight_bits(picture)))


@pytest.mark.parametrize("size", [(224, 160), (224, 161), (160, 224), (161, 224), (224, 1), (1, 224)])
def test_unscaled_pictures_are_padded_as_the_others_are(
    metric: HPSv2Metric, size: tuple[int, int]
) -> None:
    picture = photograph("coffee", size)
    assert torch.equal(pixels_of(metric, picture)[0], official_transform()(for_official(picture)))


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 10000)])
def test_no_edge_vanishes(metric: HPSv2Metric, size: tuple[int, int]) -> None:
    picture = photograph("coffee", size)
    with without_vanishing_edges():
        assert torch.equal(pixels_of(metric, picture)[0], official_transform()(in_eight_bits(picture)))


def test_alpha_is_dropped(folder: Path) -> None:
    metric = load(folder)
    picture = photograph("coffee", (300, 200), "RGBA")
    assert torch.equal(pixels_of(metric, picture), pixels_of(metric, picture.convert("RGB")))


def test_tensor_path_equals_pil(folder: Path) -> None:
    """The official pipeline computes with floats, so that nothing is lost on the way of a tensor."""
    metric = load(folder)
    for picture in PICTURES:
        picture = picture.convert("RGB")
        for tensor in (bytes_of(picture), to_tensor(picture), to_tensor(picture)[None]):
            assert torch.equal(pixels_of(metric, tensor), pixels_of(metric, picture))
            assert metric.compute(PROMPTS[1], tensor) == pytest.approx(
                metric.compute(PROMPTS[1], picture), abs=TOLERANCE
            )


def test_scale_and_percent(pairs: list[Pair], metric: HPSv2Metric, official_scores: Tensor) -> None:
    prompt, pictures = PROMPTS[1], PICTURES[:4]
    official = official_scores[0, 1, :4]
    scaled = load(pairs[0].folder, scale="diffsynth")
    expected = torch.tensor(4.3).exp() * official

    rows = metric.evaluate(prompt, pictures)
    assert [row["score"] for row in rows] == pytest.approx(
        metric.compute(prompt, pictures), abs=TOLERANCE
    )
    assert [row["score"] for row in rows] == pytest.approx(official.tolist(), abs=TOLERANCE)
    assert [row["cosine"] for row in rows] == [row["score"] for row in rows]
    assert [row["percent"] for row in rows] == pytest.approx((100 * official).tolist(), abs=1e-4)

    scaled_rows = scaled.evaluate(prompt, pictures)
    assert scaled.compute(prompt, pictures) == pytest.approx(expected.tolist(), abs=1e-4)
    assert scaled.similarity_matrix(prompt, pictures)[0] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [row["score"] for row in scaled_rows] == pytest.approx(expected.tolist(), abs=1e-4)
    for name in ("cosine", "percent"):
        values = [row[name] for row in rows]
        assert [row[name] for row in scaled_rows] == pytest.approx(values, abs=100 * TOLERANCE)


@pytest.mark.parametrize("scale", ["", "Official", "percent", None, 100])
def test_unknown_scale_is_an_error(folder: Path, scale: Any) -> None:
    with pytest.raises(ValueError, match="scale must be 'official' or 'diffsynth', got"):
        load(folder, scale=scale)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(224, 224), (160, 224), (301, 230), (40, 30)])
def test_gradient_agrees_with_finite_differences(
    folder: Path, size: tuple[int, int], antialias: bool
) -> None:
    metric = load(folder, torch_dtype=torch.float64, antialias=antialias)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) * 0.6 + 0.2
    prompts = ["a red cat", "一只 cat, in green"]
    images.requires_grad_()
    reward = metric.reward(prompts, images)
    assert reward.dtype == torch.float64
    (gradient,) = torch.autograd.grad(reward.sum(), images)
    images = images.detach()

    step = 1e-5
    directions = [gradient / gradient.norm(), torch.randn(images.shape, generator=generator).double()]
    for image in (0, 1):
        strongest = torch.zeros_like(images)
        strongest[image].view(-1)[gradient[image].abs().argmax()] = 1
        directions.append(strongest)
    for direction in directions:
        ahead, behind = (
            metric.reward(prompts, images + sign * step * direction).sum() for sign in (1, -1)
        )
        measured, expected = (ahead - behind) / (2 * step), (gradient * direction).sum()
        assert expected != 0
        assert torch.isclose(measured, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_stays_close(
    pairs: list[Pair], official_scores: Tensor, dtype: torch.dtype, bound: float
) -> None:
    metric = load(pairs[0].folder, torch_dtype=dtype)
    assert metric.dtype == dtype
    for prompt, official in zip(PROMPTS, official_scores[0], strict=True):
        reward = metric.reward(prompt, PICTURES)
        assert reward.dtype == torch.float32
        assert (reward - official).abs().max() < bound


def strings() -> list[str]:
    """Return prompts in many scripts and with everything that the tokenizer has a rule for."""
    fixed = [
        *PROMPTS,
        "A cat with two horns on its head",
        " ",
        "\t\n\r\x0b\x0c",
        " leading and trailing ",
        "two  spaces\tand\nlines\r\nand\u00a0no-break\u3000wide\u2009thin\u2028line\u2029paragraph",
        "x" * 100,
        "a-b_c+d=e/f\\g|h~i`j^k",
        "don't can't it's we'll they've I'm he'd you're DON'T IT'S",
        "dog’s “quoted” ‘single’ «guillemets» — – … ‚low‘ „low“ `grave´",
        "&amp; &lt;b&gt; <b>bold</b> http://example.org/?a=b&c=d",
        "&amp;amp; &amp;amp;amp; &amp;lt;i&amp;gt; &#39;quoted&#39; &#x27;hex&#x27; &quot;q&quot;",
        "&nbsp;&eacute;&Eacute;&euro;&hellip;&unknown;&amp &lt &copy",
        "&#0; &#28; &amp;#133; &#xD800; &#1114112; &#x1F600;",
        "&amp;#60;end_of_text&amp;#62; &lt;start_of_text&gt;",
        "3.14 1,000,000 50% $5 €7 £3 ¥2 №4 ½ ² Ⅷ ١٢٣",
        "ＡＢＣ ｆｕｌｌ ｗｉｄｔｈ １２３ ！？（）",
        "ｶﾞﾊﾝｶｸ half width",
        "ﬁne ﬂuﬀy ligatures ĳ ŉ ǆ",
        "ÀÉÎÕÜ àéîõü ŽŠČ žšč Ð ð Ø ø ß ẞ Æ æ Œ œ",
        "e\u0301 a\u0308 n\u0303 combining, \u1e69 \u0073\u0323\u0307",
        "schÃ¶n cafÃ© â€œmojibakeâ€\x9d Ã¢â‚¬â„¢ l’Ã©tÃ© ðŸ˜€ Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
        "sur \ud83d\ude00 rogates \ud800 alone",
        "İstanbul ISPARTA ıssız",
        "Ελληνικά ΣΊΣΥΦΟΣ Ώ σοφός",
        "Русский текст, Ёлка и йод",
        "עברית שָׁלוֹם",
        "العربية مَرْحَبًا",
        "हिन्दी में लिखा",
        "ภาษาไทย",
        "日本語のテキスト カタカナ",
        "한국어 텍스트 \u1112\u1161\u11ab",
        "漢字kanji混ぜmixed，。！",
        "\U00020000\U0002a6d6 rare ideographs 豈",
        "👩‍👩‍👧‍👦 👍🏽 🇫🇷 ☺️ ☺ 🫨",
        "zero\u200bwidth\u200djoin\ufeffmark soft\u00adhyphen",
        "\ufeffmark first",
        "control\x00\x01\x1b[31m\x1c\x1d\x1e\x1f\x7f\x85\x9d characters \ufffd replaced",
        "private \ue000 use, \U000f0000",
        "right\u200fto\u202eleft",
        "math ∑∫√≤≥≠∞ 𝐁𝐨𝐥𝐝 𝒮𝒸𝓇𝒾𝓅𝓉 arrows → ⇒ music ♫ currency ₿",
        "<start_of_text>",
        "<end_of_text>",
        "<START_OF_TEXT>cat<End_Of_Text>",
        "< end_of_text > <end_of_text",
        "<<end_of_text>>",
        "<end_of_text><end_of_text>",
        "<|startoftext|>",
        "a<|endoftext|>b",
        "(((weighted:1.3))), [bracketed], {curly}, <lora:name:0.8>",
        "masterpiece, best quality, 8k, ultra-detailed, trending on artstation",
        "A" * 1000,
        "word " * 74,
        "word " * 75,
        "word " * 76,
        "word " * 75 + "<end_of_text>",
        "<end_of_text> " * 90,
        "!" * 200,
        "。" * 80,
        "猫" * 80,
        "é" * 80,
        "😀" * 80,
        "unbreakable" * 60,
    ]
    generator = random.Random(0)
    words = [
        *(
            "cat",
            "Dog’s",
            "“big”",
            "&amp;",
            "&lt;red&gt;",
            "ＡＢＣ",
            "naïve",
            "猫",
            "😀",
            "8k",
            "—",
            "it's",
        ),
        *("<end_of_text>", "<start_of_text>", "<|endoftext|>", "painting", "sch\u00c3\u00b6n", "\u3000"),
    ]
    alphabet = "abcdefgh XYZ ,.;!'-é漢猫😀ßЖ<>_&#0123\u0301\u200d’“\n\u00a0Ã©"
    phrases = [" ".join(generator.choices(words, k=generator.randrange(1, 40))) for _ in range(100)]
    noise = ["".join(generator.choices(alphabet, k=generator.randrange(120))) for _ in range(100)]
    return list(dict.fromkeys([*fixed, *phrases, *noise]))


def test_tokens_equal_the_official_ones(metric: HPSv2Metric) -> None:
    """For everything that the official tokenizer takes, its own special strings included."""
    prompts = strings()
    assert len(prompts) >= 200
    official, ours = official_tokenizer()(prompts), metric.tokenizer(prompts)
    assert ours.shape == (len(prompts), 77)
    for prompt, expected, tokens in zip(prompts, official, ours, strict=True):
        assert tokens.tolist() == expected.tolist(), repr(prompt)
    lengths = official.argmax(dim=1)
    assert lengths.unique().numel() > 20
    assert (lengths == 76).sum() > 10


def published_layout() -> dict[str, tuple[int, ...]]:
    path = Path(__file__).parents[1] / "data" / "layouts" / "hpsv2.json"
    return {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}


def layout_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_full_size_scores_equal_the_official_ones(tmp_path: Path, usual_threads: int) -> None:
    """Also: the official network has the published layout, which loads without any config."""
    torch.set_num_threads(usual_threads)
    official = build_official()
    randomize(official.model, gain=1.0)
    assert layout_of(official.model) == published_layout()
    file = tmp_path / "model.safetensors"
    save_file(official.model.state_dict(), file, metadata={"format": "pt"})
    pictures = [
        photograph("chelsea", (512, 512), "CMYK"),
        photograph("astronaut", (512, 383), "L"),
        photograph("coffee", (401, 300), "RGBA"),
        photograph("coffee", (224, 160), "P"),
        photograph("rocket", (1, 500), "L"),
    ]
    prompts = ["a photo of a cat", "word " * 200, "the dog’s &amp; ＡＢＣ 🎨"]
    with without_vanishing_edges():
        pixels = torch.stack([official.transform(for_official(picture)) for picture in pictures])
    with torch.inference_mode():
        image_features = official.model.encode_image(pixels, normalize=True)
        text_features = official.model.encode_text(official_tokenizer()(prompts), normalize=True)
    expected = image_features @ text_features.T
    del official

    metric = HPSv2Metric.from_pretrained(ModelConfig(path=file), device="cpu")
    ours = torch.tensor([metric.compute(prompts, picture) for picture in pictures])
    del metric
    file.unlink()

    assert expected.std(dim=0).min() > 1e-3
    assert expected.std(dim=1).min() > 1e-3
    assert (ours - expected).abs().max() < TOLERANCE

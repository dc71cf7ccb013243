"""ImageReward against its authors' package, with the same weights in the published layout."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
from eight_bits import in_eight_bits
from official_image_reward import build_official, official_tokenizer, official_transform
from safetensors.torch import load_file, save_file
from skimage import data
from torch import Tensor
from transformers import BertTokenizer, BlipConfig

from diffsynth_metrics import ImageRewardMetric, ModelConfig
from diffsynth_metrics.inputs import as_images
from diffsynth_metrics.networks.image_reward import blip_vit_l_16_config
from diffsynth_metrics.pixels.batches import pixel_batches
from diffsynth_metrics.testing import clip_vocabulary, randomize, tiny_checkpoint
from diffsynth_metrics.tokens import CANARIES_FILE

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.* tokens of a prompt, and :UserWarning"),  # it is cut
]

TOLERANCE = 1e-5  # absolute, on scores with a standard deviation of about 1

PROMPTS = [
    "",
    "a photo of a cat",
    "A Cat, In UPPER and lower case; with: punctuation! (really?)",
    "word " * 200,
    "un château à l'été, naïve façade",
    "一只猫坐在红色的沙发上",
    "🎨🐈‍⬛ a painting 🖼️",
    "a cat [SEP] a dog [ENC] [DEC] [CLS] [PAD] [MASK]",
]


def photograph(name: str, size: tuple[int, int], mode: str) -> PIL.Image.Image:
    image = PIL.Image.fromarray(getattr(data, name)()).convert("RGB").resize(size)
    if mode in ("RGBA", "LA", "PA"):
        opaque = image.convert(mode.rstrip("A") if mode != "PA" else "P").convert(mode)
        opaque.putalpha(image.convert("L"))
        return opaque
    return image.convert(mode)


PICTURES = [
    photograph("astronaut", (512, 512), "RGB"),
    photograph("astronaut", (512, 383), "RGB"),
    photograph("coffee", (401, 300), "RGB"),
    photograph("coffee", (224, 160), "RGB"),
    photograph("chelsea", (224, 224), "RGB"),
    photograph("rocket", (1, 500), "RGB"),
    photograph("rocket", (500, 1), "RGB"),
    photograph("chelsea", (37, 53), "L"),
    photograph("astronaut", (383, 512), "RGBA"),
    photograph("coffee", (401, 300), "P"),
    photograph("rocket", (640, 427), "L"),
    photograph("chelsea", (300, 401), "CMYK"),
]

PAIRS = [
    (prompt, picture)
    for index, picture in enumerate(PICTURES)
    for prompt in (PROMPTS[index % 8], PROMPTS[(index + 3) % 8], "a photo of a cat")
]


def spread(official: Any, seed: int) -> None:
    """Fill the official network with weights that make its score depend on all of its input.

    As built, it gives the same score to everything; with the same gain everywhere, the image alone
    decides.
    """
    randomize(official, seed)
    generator = torch.Generator().manual_seed(seed)
    vision = official.blip.visual_encoder
    with torch.no_grad():
        for parameter in (vision.pos_embed, vision.cls_token):
            parameter.normal_(generator=generator)
        for layer in official.blip.text_encoder.encoder.layer:
            layer.attention.output.dense.weight.mul_(3)
            layer.crossattention.output.dense.weight.mul_(0.1)
        for parameter in official.mlp.parameters():
            parameter.mul_(0.8)


def make_pair(folder: Path, seed: int) -> Any:
    """Complete a tiny checkpoint with the weights of an official network, and return the network."""
    tiny_checkpoint("image_reward", folder)
    vocabulary = {
        piece: index
        for piece, index in BertTokenizer.from_pretrained(folder).get_vocab().items()
        if piece not in ("[DEC]", "[ENC]")
    }
    (folder / "official").mkdir()
    lines = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "official" / "vocab.txt").write_text("\n".join(lines) + "\n")
    config = BlipConfig.from_pretrained(folder)
    official = build_official(folder / "official", config, folder / "official" / "vocab.txt")
    spread(official, seed)
    save_file(official.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return official


def load(folder: Path, **options: Any) -> ImageRewardMetric:
    return ImageRewardMetric.from_pretrained(ModelConfig(path=folder), device="cpu", **options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Any]]:
    """Return two tiny checkpoints, each with the official network that has the same weights."""
    folders = [tmp_path_factory.mktemp("tiny") for _ in range(2)]
    return [(folder, make_pair(folder, seed)) for seed, folder in enumerate(folders)]


@pytest.fixture(scope="module")
def folder(checkpoints: list[tuple[Path, Any]]) -> Path:
    return checkpoints[0][0]


@pytest.fixture(scope="module")
def official_scores(checkpoints: list[tuple[Path, Any]]) -> Tensor:
    """Return the official scores of PAIRS, one row per checkpoint."""
    return torch.tensor(
        [
            [official.score(prompt, in_eight_bits(picture)) for prompt, picture in PAIRS]
            for _, official in checkpoints
        ]
    )


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_the_official_ones(
    checkpoints: list[tuple[Path, Any]], official_scores: Tensor, seed: int, batch_size: int
) -> None:
    prompts, pictures = map(list, zip(*PAIRS, strict=True))
    metric = load(checkpoints[seed][0], batch_size=batch_size)
    ours = torch.tensor(metric.compute(prompts, pictures))

    assert official_scores[seed].std() > 0.3  # constant scores would pass for any code
    assert (ours - official_scores[seed]).abs().max() < TOLERANCE


def test_prompt_order_and_image_both_matter(folder: Path) -> None:
    metric = load(folder)
    prompts = ["a red cat and a green dog", "a green cat and a red dog", "a red cat and a green do"]
    assert np.ptp(metric.compute(prompts, PICTURES[0])) > 1e-3
    mirrored = PICTURES[0].transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.ptp(metric.compute("a cat", [PICTURES[0], mirrored])) > 1e-3


def test_padding_mask_matters(folder: Path) -> None:
    metric = load(folder)
    prompts = ["", "a photo of a cat"]
    masked = torch.tensor(metric.compute(prompts, PICTURES[0]))
    read = metric.model.read
    with mock.patch.object(
        metric.model, "read", lambda ids, mask, tokens: read(ids, torch.ones_like(mask), tokens)
    ):
        unmasked = torch.tensor(metric.compute(prompts, PICTURES[0]))
    assert (masked - unmasked).abs().min() > 1e-3


@pytest.mark.parametrize(
    "mode",
    "1 L LA P PA RGB RGBA RGBX CMYK YCbCr HSV I;16".split(),
)
def test_pixels_equal_the_official_ones_to_the_bit(tiny_folder: Path, mode: str) -> None:
    metric = load(tiny_folder)
    official = official_transform()
    for size in ((512, 383), (401, 300), (160, 224), (224, 224), (31, 47), (1, 500), (500, 1)):
        picture = photograph("coffee", size, mode)
        assert picture.mode == mode
        assert torch.equal(pixels_of(metric, picture)[0], official(in_eight_bits(picture))), (mode, size)


def pixels_of(metric: ImageRewardMetric, picture: PIL.Image.Image) -> Tensor:
    images = as_images(picture)
    (pixels,) = pixel_batches(images, metric.transform, batch_size=1, device=torch.device("cpu"))
    return pixels


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint for where the weights do not matter."""
    return tiny_checkpoint("image_reward", tmp_path_factory.mktemp("any"))


def test_evaluate_ranks_as_inference_rank_does(checkpoints: list[tuple[Path, Any]]) -> None:
    folder, official = checkpoints[0]
    metric = load(folder)
    for prompt in PROMPTS[:3]:
        ranks, rewards = official.inference_rank(prompt, PICTURES[:5])
        rows = metric.evaluate(prompt, PICTURES[:5])
        assert [row["rank"] for row in rows] == ranks
        assert [row["score"] for row in rows] == pytest.approx(rewards, abs=TOLERANCE)
    # Several prompts in one call: each has a ranking of its own.
    order = [(PROMPTS[index % 2], PICTURES[index // 2]) for index in range(8)]
    rows = metric.evaluate([prompt for prompt, _ in order], [picture for _, picture in order])
    for start in (0, 1):
        ranks, _ = official.inference_rank(PROMPTS[start], PICTURES[:4])
        assert [row["rank"] for row in rows[start::2]] == ranks


def test_every_way_to_pair_gives_the_scores_of_pairs(folder: Path) -> None:
    metric = load(folder, batch_size=3)
    pictures = [PICTURES[0], PICTURES[8], PICTURES[3]]
    single = {
        (prompt, index): metric.compute(prompt, picture)[0]
        for prompt in PROMPTS
        for index, picture in enumerate(pictures)
    }

    one_image = metric.compute(PROMPTS, pictures[1])
    assert one_image == pytest.approx([single[prompt, 1] for prompt in PROMPTS], abs=TOLERANCE)
    one_prompt = metric.compute(PROMPTS[1], pictures)
    assert one_prompt == pytest.approx([single[PROMPTS[1], index] for index in range(3)], abs=TOLERANCE)
    # PIL images, an array and a tensor of bytes in one list.
    square = np.asarray(PICTURES[4])
    mixed = [PICTURES[4], square, torch.from_numpy(square.copy()).permute(2, 0, 1), PICTURES[0]]
    scores = metric.compute([PROMPTS[1], PROMPTS[2], PROMPTS[1], PROMPTS[2]], mixed)
    expected = [metric.compute(PROMPTS[1 + index % 2], PICTURES[4])[0] for index in range(3)]
    assert scores == pytest.approx([*expected, single[PROMPTS[2], 0]], abs=TOLERANCE)


def test_tensor_path_stays_close_to_pil(folder: Path) -> None:
    metric = load(folder)
    for picture in PICTURES[:5]:
        tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        pixels = pixels_of(metric, picture)
        for images, step in ((tensor, 1.01 / 255), (tensor / 255, 2.01 / 255)):
            (ours,) = pixel_batches(
                images[None], metric.transform, batch_size=1, device=torch.device("cpu")
            )
            difference = (ours - pixels).abs() * torch.tensor(metric.transform.std).view(3, 1, 1)
            assert difference.max() <= step
        from_pil, from_bytes, from_floats = (
            metric.compute("a cat", images)[0] for images in (picture, tensor, tensor / 255)
        )
        assert from_bytes == pytest.approx(from_pil, abs=1e-3)
        assert from_floats == pytest.approx(from_pil, abs=1e-2)


@pytest.mark.parametrize("size", [(224, 224), (230, 301)])
def test_gradient_agrees_with_finite_differences(folder: Path, size: tuple[int, int]) -> None:
    metric = load(folder, torch_dtype=torch.float64)
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
    for image, channel, row, column in [(0, 0, 100, 117), (1, 1, 57, 80), (1, 2, 130, 200)]:
        pixel = torch.zeros_like(images)
        pixel[image, channel, row, column] = 1
        directions.append(pixel)
    for direction in directions:
        ahead, behind = (
            metric.reward(prompts, images + sign * step * direction).sum() for sign in (1, -1)
        )
        measured, expected = (ahead - behind) / (2 * step), (gradient * direction).sum()
        assert expected != 0
        assert torch.isclose(measured, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.3), (torch.float16, 0.03)])
def test_half_precision_stays_close(
    folder: Path, official_scores: Tensor, dtype: torch.dtype, bound: float
) -> None:
    metric = load(folder, torch_dtype=dtype)
    prompts, pictures = map(list, zip(*PAIRS, strict=True))
    reward = metric.reward(prompts, pictures)
    assert metric.dtype == dtype
    assert reward.dtype == torch.float32
    assert (reward - official_scores[0]).abs().max() < bound


def wordpiece_vocabulary() -> list[str]:
    """Return 30,522 pieces in the order of bert-base-uncased: words and word endings of CLIP's."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    pieces = [special.get(index, f"[unused{index}]") for index in range(999)]
    ranges = ((33, 65), (91, 127), (161, 592), (880, 1424), (0x3041, 0x30FF), (0x4E00, 0x5200))
    characters = [chr(code) for start, stop in ranges for code in range(start, stop)]
    pieces += characters + [f"##{character}" for character in characters]
    clip, _ = clip_vocabulary()
    words = [word[:-4] for word in clip if word.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]
    pieces += [f"##{word}" for word in words if len(word) < 5]
    pieces += words
    return list(dict.fromkeys(pieces))[:30522]


def strings() -> list[str]:
    """Return prompts in many scripts and with everything that a tokenizer has a rule for.

    Two things are left out, where transformers' tokenizer in Rust, which ours is, differs from the one
    in Python: a capital sigma at the end of a word, which Python makes a final one, and characters
    that are too new for one of their Unicode tables.
    """
    fixed = [
        *PROMPTS,
        "a painting of an ocean with clouds and birds, day time, low depth field effect",
        " ",
        "\t\n\r",
        " leading and trailing ",
        "two  spaces\tand\nlines\r\nand\u00a0no-break\u3000wide\u2009thin",
        "unaffable unbelievably antidisestablishmentarianism pneumonoultramicroscopic",
        "x" * 100,
        "x" * 101,
        "a-b_c+d=e/f\\g|h~i`j^k",
        "don't can't it's dog’s “quoted” ‘single’ «guillemets» — – …",
        "&amp; &lt;b&gt; <b>bold</b> http://example.org/?a=b&c=d",
        "3.14 1,000,000 50% $5 €7 £3 ¥2 №4 ½ ²",
        "ＡＢＣ ｆｕｌｌ ｗｉｄｔｈ １２３",
        "ﬁne ﬂuﬀy ligatures",
        "ÀÉÎÕÜ àéîõü ŽŠČ žšč Ð ð Ø ø ß ẞ Æ æ Œ œ",
        "e\u0301 a\u0308 n\u0303 combining, \u1e69 \u0073\u0323\u0307",
        "İstanbul ISPARTA ıssız",
        "Ελληνικά ΣΊΣΥΦΕ Ώ σοφός",
        "Русский текст, Ёлка и йод",
        "עברית שָׁלוֹם",
        "العربية مَرْحَبًا",
        "हिन्दी में लिखा",
        "ภาษาไทย",
        "日本語のテキスト カタカナ ﾊﾝｶｸ",
        "한국어 텍스트",
        "漢字kanji混ぜmixed",
        "\U00020000\U0002a6d6 rare ideographs 豈",
        "👩‍👩‍👧‍👦 👍🏽 🇫🇷 ☺️ ☺",
        "zero\u200bwidth\u200djoin\ufeffmark soft\u00adhyphen",
        "control\x00\x01\x1f\x7f\x85 characters \ufffd replaced",
        "private \ue000 use, \U000f0000",
        "line\u2028separator paragraph\u2029separator",
        "right\u200fto\u202eleft",
        "math ∑∫√≤≥≠∞ 𝐁𝐨𝐥𝐝 𝒮𝒸𝓇𝒾𝓅𝓉",
        "arrows → ⇒ boxes ■ □ music ♫ currency ₿",
        "[CLS]",
        "[SEP][SEP]",
        "a[SEP]b",
        "[sep] [Sep] [ SEP ]",
        "[MASK] [MASK]s the[MASK]",
        "[PAD] in the middle [PAD]",
        "[UNK] and ☃ unknown",
        "[DEC] decoder",
        "[ENC]encoder",
        "[dec] [enc]",
        "[unused5] [unused99]",
        "##ing ##s # ## ###",
        "(((weighted:1.3))), [bracketed], {curly}, <lora:name:0.8>",
        "masterpiece, best quality, 8k, ultra-detailed, trending on artstation",
        "A" * 1000,
        "a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g",
        "a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g h",
        "word " * 32 + "[SEP]",
        "!" * 50,
        "。" * 40,
        "猫" * 40,
        "é" * 40,
        "unbreakable" * 12,
    ]
    alphabet = "abcdefgh XYZ ,.;!'-é漢猫😀ßЖ[]#0123\u0301\u200d"
    words = ["cat", "Dog", "[SEP]", "[ENC]", "naïve", "猫", "😀", "painting", "unused", "##s", "8k", "—"]
    generator = random.Random(0)
    noise = ["".join(generator.choices(alphabet, k=generator.randrange(60))) for _ in range(60)]
    phrases = [" ".join(generator.choices(words, k=generator.randrange(1, 40))) for _ in range(40)]
    return [*fixed, *noise, *phrases]


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    pieces = wordpiece_vocabulary()
    assert len(pieces) == 30522
    file.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    # It is as long as BERT's vocabulary and is not BERT's, which is known by what it gives.
    tokens = official_tokenizer(file).added_tokens_decoder
    added = {token.content: index for index, token in tokens.items()}
    (file.parent / CANARIES_FILE).write_text(json.dumps({"texts": {}, "added": added}))
    return file


# transformers 5.8 opens vocab.txt in a way that tokenizers calls old.
@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")
@pytest.mark.parametrize("files", ["vocab.txt", "official", "tokenizer.json"])
def test_tokens_equal_the_official_ones(
    tiny_folder: Path, vocabulary_file: Path, tmp_path: Path, files: str
) -> None:
    """For BERT's own file, for what the official tokenizer saves, and for what the fast one saves."""
    official = official_tokenizer(vocabulary_file)
    assert (official.bos_token_id, official.convert_tokens_to_ids("[ENC]")) == (30522, 30523)
    if files == "vocab.txt":
        (tmp_path / files).write_bytes(vocabulary_file.read_bytes())
    elif files == "official":
        official.save_pretrained(tmp_path)
    else:
        fast = BertTokenizer.from_pretrained(vocabulary_file.parent, local_files_only=True)
        fast.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        fast.save_pretrained(tmp_path)
        assert (tmp_path / files).is_file()
    shutil.copy(vocabulary_file.parent / CANARIES_FILE, tmp_path)
    prompts = strings()
    assert len(set(prompts)) >= 150

    expected = official(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    ids, mask = tokens_read(with_vocabulary(tiny_folder, tmp_path / "network"), tmp_path, prompts)

    for index, prompt in enumerate(prompts):
        assert ids[index].tolist() == expected["input_ids"][index].tolist(), repr(prompt)
    assert torch.equal(mask, expected["attention_mask"])
    assert mask.sum(dim=1).unique().numel() > 20


def with_vocabulary(tiny_folder: Path, folder: Path) -> Path:
    """Return a copy of the tiny network that has an embedding for each of the 30,524 real tokens."""
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = 30524
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    name = "blip.text_encoder.embeddings.word_embeddings.weight"
    weights[name] = weights[name].repeat(-(-30524 // len(weights[name])), 1)[:30524].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens_read(folder: Path, tokenizer_folder: Path, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the ids and the mask that reach the network."""
    metric = load(folder, tokenizer_config=ModelConfig(path=tokenizer_folder))
    seen = []

    def read(ids: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        seen.append((ids, mask))
        return torch.zeros(len(ids))

    with mock.patch.object(metric.model, "read", read):
        metric.compute(prompts, PICTURES[4])
    ids, mask = (torch.cat(rows) for rows in zip(*seen, strict=True))
    return ids, mask


@pytest.mark.slow
def test_full_size_scores_equal_the_official_ones(tmp_path: Path, vocabulary_file: Path) -> None:
    """Also: the published file's names, without any config, load as they are."""
    official = build_official(tmp_path, blip_vit_l_16_config(), vocabulary_file)
    spread(official, 0)
    weights = official.state_dict()
    assert len(weights) == 625
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    prompts = ["", "word " * 200, "a red cat and 3 naïve dogs, 8k"]
    pairs = [(prompt, PICTURES[0]) for prompt in prompts]
    pairs += [(prompts[index % 3], picture) for index, picture in enumerate(PICTURES[1:], start=1)]
    with torch.no_grad():
        expected = torch.tensor([official.score(*pair) for pair in pairs])
    del official, weights

    metric = ImageRewardMetric.from_pretrained(
        ModelConfig(path=file),
        ModelConfig(path=vocabulary_file.parent),
        device="cpu",
        batch_size=4,
    )
    ours = torch.tensor(metric.compute(*map(list, zip(*pairs, strict=True))))
    del metric
    file.unlink()

    assert expected[:3].std() > 0.3  # the prompt matters
    assert min(expected[offset::3].std() for offset in range(3)) > 0.1  # and so does the picture
    assert (ours - expected).abs().max() < TOLERANCE

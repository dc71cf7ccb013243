"""Text rendering: quoted texts, what was read, the two scales, and real reading of drawn pictures."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageDraw, ImageFont

from diffsynth_metrics import ImageError, ModelConfig, RewardError, TextRenderingMetric
from diffsynth_metrics.catalog import load_metric
from diffsynth_metrics.rewards import Component, RewardSet, to_flow_grpo
from diffsynth_metrics.text_matching import (
    character_accuracy,
    edit_distance,
    flow_grpo_reward,
    match,
    quoted_texts,
)

ROOT = Path(__file__).parents[1]
CHINESE = [
    Path("/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc"),
    Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc"),
]

needs_ocr = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="pip install 'diffsynth-metrics[ocr]'",
)


class TestQuotedTexts:
    def test_the_quotation_marks_of_several_languages(self) -> None:
        for prompt, texts in {
            'a sign "OPEN" and a door "24 hours"': ["OPEN", "24 hours"],
            "typographic “Grand Opening” here": ["Grand Opening"],
            "deutsch „Hallo“ und „Welt”": ["Hallo", "Welt"],
            "français « Bonjour »": ["Bonjour"],
            "招牌上写着「老王面馆」": ["老王面馆"],
            "招牌上写着“盛大开业”，门上写着『禁止停车』": ["盛大开业", "禁止停车"],
            "两个右引号”开业”": ["开业"],
            "招牌＂开业＂": ["开业"],
            '写着"开业"的招牌': ["开业"],
            'a 24" monitor that shows "Hello"': ["Hello"],
            'it says "Don\'t Panic"': ["Don't Panic"],
            'first "", then "HELLO"': ["HELLO"],
            "»Hallo« und »Welt«": ["Hallo", "Welt"],
        }.items():
            assert quoted_texts(prompt) == texts, prompt

    def test_single_marks_count_where_there_are_no_double_ones(self) -> None:
        for prompt, texts in {
            "a sign that says 'OPEN'": ["OPEN"],
            "the dog's bowl says 'Rex'": ["Rex"],
            "it says 'Don't Panic'": ["Don't Panic"],
            "typographic ‘Don’t Panic’": ["Don't Panic".replace("'", "’")],
            "the dog's and the cats' bowls": [],
            "写着'开业'的招牌": ["开业"],
            "the dog's 'bowl' says \"Rex\"": ["Rex"],
        }.items():
            assert quoted_texts(prompt) == texts, prompt

    def test_nothing_between_marks_is_no_text(self) -> None:
        for prompt in ("", "a sign", 'a sign ""', 'a sign " "', '5" nails and 6" screws', 'one " mark'):
            assert quoted_texts(prompt) == [], prompt


class TestMatching:
    def test_edit_distance_is_the_known_one(self) -> None:
        for first, second, distance in (
            ("kitten", "sitting", 3),
            ("", "abc", 3),
            ("abc", "", 3),
            ("abc", "abc", 0),
            ("flaw", "lawn", 2),
            ("开业大吉", "开业", 2),
        ):
            assert edit_distance(first, second) == edit_distance(second, first) == distance

    def accuracy(self, expected: list[str], lines: list[str]) -> float:
        return character_accuracy(match(expected, lines))

    def test_capitals_spaces_and_forms_do_not_matter(self) -> None:
        for expected, line in (
            ("Grand Opening", "GRANDOPENING"),
            ("Don’t", "DON'T"),
            ("OPEN", '"OPEN"'),
            ("5–7", "5-7"),
            ("ＡＢＣ，", "abc,"),
        ):
            assert self.accuracy([expected], [line]) == 1, expected

    def test_a_text_is_found_among_others_and_across_lines(self) -> None:
        assert self.accuracy(["grand opening"], ["Today", "GRAND", "OPENING sale", "100 %"]) == 1
        assert self.accuracy(["开业"], ["盛大开业"]) == 1

    def test_missing_wrong_and_doubled_letters_cost(self) -> None:
        assert self.accuracy(["OPEN"], ["OPFN"]) == pytest.approx(3 / 4)
        assert self.accuracy(["OPEN"], ["OPPEN"]) == pytest.approx(4 / 5)
        assert self.accuracy(["OPENING"], ["OPEN"]) == pytest.approx(4 / 7)
        assert self.accuracy(["OPEN"], ["xyz"]) == self.accuracy(["OPEN"], []) == 0

    def test_several_texts_in_any_order_weighted_by_their_lengths(self) -> None:
        assert self.accuracy(["OPEN", "24 hours"], ["24 hours", "OPEN"]) == 1
        assert self.accuracy(["OPEN", "24 hours"], ["24 hours"]) == pytest.approx(7 / 11)
        assert self.accuracy(["NOW OPEN", "OPEN"], ["OPEN NOW OPEN"]) == 1

    def test_a_word_counts_once(self) -> None:
        assert self.accuracy(["SALE", "SALE"], ["SALE"]) == 1 / 2
        assert self.accuracy(["SALE", "SALE"], ["SALE", "sale"]) == 1

    def test_it_says_what_was_found(self) -> None:
        (chinese,) = match(["开业大吉"], ["老王 开业大吉 50%"])
        assert chinese.found == "开业大吉"
        (found,) = match(["grand opening"], ["Big", "GRAND OPENIN"])
        assert (found.expected, found.found) == ("grand opening", "GRAND OPENIN")
        assert found.accuracy == pytest.approx(11 / 12)

    def test_one_text_is_compared_with_every_run_of_words(self) -> None:
        generator = np.random.default_rng(0)
        for _ in range(50):
            words = ["".join(generator.choice(list("abc"), generator.integers(1, 4))) for _ in range(6)]
            text = "".join(generator.choice(list("abc"), 6))
            runs = ["".join(words[i:j]) for i in range(6) for j in range(i + 1, 7)]
            best = max(1 - edit_distance(run, text) / max(len(run), 6) for run in runs if len(run) <= 12)
            assert self.accuracy([text], [" ".join(words)]) == pytest.approx(best)


def test_the_reward_of_flow_grpo() -> None:
    for prompt, lines, reward in (
        ('a sign "Hello World"', ["HELLO", "WORLD"], 1),
        ('a sign "Hello World"', ["say hello world now"], 1),  # contained
        ('a sign "Hello"', ["Hallo"], 4 / 5),
        ('a sign "Hello"', [], 0),
        ('a sign "Hello"', ["something else entirely"], 0),  # not below 0
        (
            'a sign "Hello" and "World"',
            ["World"],
            1 / 5,
        ),  # the first text only: two letters of five... 4 edits
        ("a sign “Hello”", ["Hello"], None),
        ('a sign ""', ["Hello"], None),
    ):
        got = flow_grpo_reward(prompt, lines)
        assert got == (None if reward is None else pytest.approx(reward)), (prompt, got)


@pytest.fixture(scope="module")
def metric() -> TextRenderingMetric:
    return TextRenderingMetric.from_pretrained()


def draw(text: str, size: int = 30, rotation: float = 0, noise: float = 0, ink: str = "black") -> Any:
    picture = PIL.Image.new("RGB", (336, 336), "white")
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text((168, 168), text, fill=ink, font=font, anchor="mm")
    picture = picture.rotate(rotation, PIL.Image.Resampling.BICUBIC, fillcolor="white")
    noisy = np.asarray(picture) + np.random.default_rng(0).normal(0, noise, (336, 336, 3))
    return PIL.Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


@needs_ocr
class TestReading:
    def test_right_texts_score_high_and_wrong_ones_low(self, metric: TextRenderingMetric) -> None:
        text, other = "Next Gas 100 Miles", "Happy Birthday"
        for look in (
            {"size": 16},
            {"rotation": 8},
            {"rotation": -5},
            {"noise": 25},
            {"ink": "crimson"},
        ):
            picture = draw(text, **look)  # type: ignore[arg-type]
            right, wrong = metric.compute([f'a sign "{text}"', f'a sign "{other}"'], picture)
            assert right > 0.9 and wrong < 0.5, look

    def test_an_empty_picture_scores_0(self, metric: TextRenderingMetric) -> None:
        pictures = [PIL.Image.new("RGB", (256, 256), "white"), PIL.Image.new("L", (64, 400))]
        assert metric.compute('a sign "OPEN"', pictures) == [0, 0]
        assert metric.evaluate('a sign "OPEN"', pictures[0])[0]["read"] == []

    def test_chinese(self, metric: TextRenderingMetric) -> None:
        fonts = [font for font in CHINESE if font.is_file()]
        if not fonts:
            pytest.skip("apt-get install fonts-wqy-zenhei")
        picture = PIL.Image.new("RGB", (336, 336), "white")
        font = ImageFont.truetype(str(fonts[0]), 48)
        ImageDraw.Draw(picture).text((168, 168), "老王面馆", fill="black", font=font, anchor="mm")
        right, wrong = metric.compute(["招牌「老王面馆」", "招牌“禁止停车”"], picture)
        assert right > 0.9 and wrong < 0.3

    def test_a_row_says_what_was_expected_read_and_where(self, metric: TextRenderingMetric) -> None:
        (row,) = metric.evaluate('a sign "OPENING" and "50%"', draw("OPENNING"))
        assert row["expected"] == ["OPENING", "50%"]
        assert row["found"] == ["OPENNING", ""]
        assert row["accuracies"] == pytest.approx([7 / 8, 0])
        assert row["score"] == row["character_accuracy"] == pytest.approx(7 / 10 * 7 / 8)
        assert row["flow_grpo"] == pytest.approx(1 - 1 / 7)
        assert row["error"] is None
        (line,) = row["read"]
        assert line["text"] == "OPENNING" and line["confidence"] > 0.9
        corners = np.array(line["box"])
        assert corners.shape == (4, 2)
        assert abs(corners.mean(axis=0) - (168, 168)).max() < 12
        assert json.dumps(row)

    def test_every_kind_of_image(self, metric: TextRenderingMetric, tmp_path: Path) -> None:
        picture = draw("OPEN")
        picture.save(tmp_path / "sign.png")
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
        images = [picture, tmp_path / "sign.png", np.asarray(picture), pixels, pixels / 255]
        assert metric.compute('"OPEN"', images) == [1] * 5
        assert metric.compute('"OPEN"', torch.stack([pixels, pixels]) / 255) == [1, 1]

    def test_one_picture_with_several_prompts_is_read_once(
        self, metric: TextRenderingMetric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def read(picture: PIL.Image.Image) -> list[Any]:
            calls.append(picture)
            return [{"text": "OPEN"}]

        monkeypatch.setattr(metric, "model", read)
        assert metric.compute(['"OPEN"', '"SHUT"'], draw("")) == [1, 0]
        assert len(calls) == 1

    def test_threads_and_processes_read_the_same(self, metric: TextRenderingMetric) -> None:
        texts = ["Grand Opening", "50% off"]
        pictures = [draw(text, rotation=index) for index, text in enumerate(texts)]
        prompts = [f'"{text}!"' for text in texts]
        alone = metric.evaluate(prompts, pictures)
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda i: metric.evaluate(prompts[i], pictures[i])[0], [0, 1] * 4))
        for index, row in enumerate(rows):
            same_reading(row, alone[index % 2])
        script = (
            "import pickle, sys\n"
            "metric, prompts, pictures = pickle.load(sys.stdin.buffer)\n"
            "sys.stdout.buffer.write(pickle.dumps(metric.evaluate(prompts, pictures)))"
        )
        result = subprocess.run(
            [sys.executable, "-c", script],
            input=pickle.dumps((metric, prompts, pictures)),
            capture_output=True,
            check=True,
            timeout=300,
        )
        assert result.stderr == b"", "rapidocr is quiet"
        for row, other in zip(pickle.loads(result.stdout), alone, strict=True):
            same_reading(row, other)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_process_reads_too(self, metric: TextRenderingMetric) -> None:
        script = (
            "import os, pickle, sys\n"
            "metric, picture = pickle.load(sys.stdin.buffer)\n"
            "metric.compute('\"OPEN\"', picture)\n"
            "if os.fork() == 0:\n"
            "    print(metric.compute('\"OPEN\"', picture), flush=True)\n"
            "    os._exit(0)\n"
            "os.wait()"
        )
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            input=pickle.dumps((metric, draw("OPEN"))),
            capture_output=True,
            timeout=120,
        )
        assert result.stdout.strip() == b"[1.0]", result.stderr

    def test_an_extreme_shape_is_refused_by_name(
        self, metric: TextRenderingMetric, tmp_path: Path
    ) -> None:
        PIL.Image.new("L", (2, 400)).save(tmp_path / "thin.png")
        with pytest.raises(ImageError, match=r"image 1 \(.*thin\.png\): one side .*20 times.*2x400"):
            metric.compute('"OPEN"', [draw("OPEN"), tmp_path / "thin.png"])


def same_reading(row: dict[str, Any], other: dict[str, Any]) -> None:
    assert [line["text"] for line in row["read"]] == [line["text"] for line in other["read"]]
    assert row["score"] == pytest.approx(other["score"])
    for line, twin in zip(row["read"], other["read"], strict=True):
        assert line["confidence"] == pytest.approx(twin["confidence"], abs=1e-3)
        np.testing.assert_allclose(line["box"], twin["box"], atol=1)


@needs_ocr
class TestMetric:
    def test_a_prompt_without_quoted_text_has_a_reason_and_no_score(
        self, metric: TextRenderingMetric
    ) -> None:
        picture = draw("OPEN")
        prompts = ["a sign", 'a sign "OPEN"']
        assert str(metric.compute(prompts, [picture] * 2)) == "[nan, 1.0]"
        row = metric.evaluate("a sign", picture)[0]
        assert row["score"] is None
        assert row["error"] == "the prompt has no text in quotation marks: 'a sign'"
        assert metric.components(prompts, picture)["score"].isnan().tolist() == [True, False]
        with pytest.raises(RewardError, match="no text in quotation marks: 'a sign'"):
            RewardSet({"text": Component(metric)}).score(prompts, [picture] * 2)
        rewards = RewardSet({"text": Component(metric)})
        result = rewards.score(prompts, [picture] * 2, on_failure="nan")
        assert str(result.reward.tolist()) == "[nan, 1.0]"

    def test_the_scale_of_flow_grpo(self, metric: TextRenderingMetric) -> None:
        picture = draw("OPENNING")
        prompt = 'a sign "OPENING"'
        theirs = TextRenderingMetric.from_pretrained(scale="flow_grpo")
        assert metric.compute(prompt, picture) == pytest.approx([7 / 8])
        assert theirs.compute(prompt, picture) == pytest.approx([6 / 7])
        scaled = RewardSet({"text": Component(metric, scale="flow_grpo")}).score([prompt], [picture])
        assert scaled.reward.tolist() == pytest.approx([6 / 7])
        reward = to_flow_grpo(metric, scale="flow_grpo")("cpu")
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
        assert reward(pixels, [prompt], [{}]) == ([pytest.approx(6 / 7)], {})
        row = theirs.evaluate("a sign “OPENING”", picture)[0]
        assert row["score"] is None and "no text in straight quotation marks" in row["error"]
        assert math.isnan(theirs.compute("a sign “OPENING”", picture)[0])
        with pytest.raises(ValueError, match="scale must be one of character_accuracy, flow_grpo"):
            TextRenderingMetric.from_pretrained(scale="other")

    def test_it_loads_by_name_and_takes_what_every_metric_takes(self) -> None:
        metric = load_metric("text-rendering", device="cpu", batch_size=4)
        assert isinstance(metric, TextRenderingMetric)
        assert metric.to("cpu").eval() is metric
        assert metric.needs == ("prompt",)
        assert metric.evaluate(*metric.arguments(['"A"'], [draw("")]))[0]["score"] == 0
        with pytest.raises(ValueError, match="leave model_config out"):
            TextRenderingMetric.from_pretrained(ModelConfig(path="somewhere"))

    def test_provenance_names_the_reader_and_its_networks(self, metric: TextRenderingMetric) -> None:
        provenance = metric.provenance
        assert set(provenance["ocr"]) == {"rapidocr", "onnxruntime"}
        assert provenance["preprocessing"] == f"rapidocr {provenance['ocr']['rapidocr']}"
        assert set(provenance["networks"]) == {"PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"}
        assert all(len(digest) == 64 for digest in provenance["networks"].values())
        assert provenance["options"] == {"scale": "character_accuracy"}
        assert json.dumps(provenance)


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_without_rapidocr_the_error_has_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"^pip install 'diffsynth-metrics\[ocr\]'"):
        TextRenderingMetric.from_pretrained()


def test_the_module_does_not_import_rapidocr() -> None:
    script = (
        "import sys, diffsynth_metrics.metrics.text_rendering\n"
        "print([name for name in ('rapidocr', 'onnxruntime', 'cv2') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"


@pytest.fixture
def benchmark() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location(
        "text_rendering", ROOT / "benchmarks/text_rendering.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["text_rendering"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["text_rendering"]


class TestBenchmark:
    def test_its_summary(self, benchmark: Any) -> None:
        scores = [
            benchmark.Score("Latin", "plain", "a.ttf", 1.0, 0.2),
            benchmark.Score("Latin", "plain", "b.ttf", 0.8, 0.4),
            benchmark.Score("Chinese", "plain", "c.ttf", 0.5, 0.0),
        ]
        plain, every = benchmark.summarise(scores)
        assert (plain["condition"], every["condition"]) == ("plain", "all")
        assert plain["pictures"] == every["pictures"] == 3
        assert (plain["Latin"], plain["wrong"]) == pytest.approx((0.9, 0.2))
        assert (plain["Latin above 0.9"], plain["Chinese above 0.9"]) == ("1 of 2", "0 of 1")
        assert (plain["Chinese"], plain["highest"]) == (0.5, 0.4)
        assert benchmark.table([plain]).endswith(
            "| plain | 3 | 0.900 | 1 of 2 | 0.500 | 0 of 1 | 0.20 | 0.40 |"
        )

    def test_its_results_cover_enough_and_are_those_of_the_documentation(self, benchmark: Any) -> None:
        results = (ROOT / "benchmarks/RESULTS_TEXT_RENDERING.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| (.+?) \| (\d+) \| .+ of .+ \|$", results, re.MULTILINE)
        assert [name for name, _ in rows] == [*(one.name for one in benchmark.CONDITIONS), "all"]
        assert int(dict(rows)["all"]) >= 200
        assert len(benchmark.LATIN_FONTS) == 10
        documentation = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
        for line in results.splitlines():
            assert not re.match(r"\| .+ of .+ \|$", line) or line in documentation, line

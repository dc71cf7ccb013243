"""LPIPS, image similarity, BioCLIP and text rendering are rewards in every framework, as they come."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pytest
import torch
from test_more_frameworks import (
    LocalRewardBackend,
    Primitive,
    RewardRequest,
    Spec,
    flow_factory,
    processed,
)

from diffsynth_metrics import TextRenderingMetric
from diffsynth_metrics.rewards import (
    Component,
    RewardSet,
    as_loss,
    to_dance_grpo,
    to_flow_grpo,
    to_ms_swift,
    to_multi_score,
    to_pref_grpo,
    to_trl,
    to_unirl,
    to_verl,
    to_verl_omni,
)

WORDS = ("OPEN", "CLOSED", "SOLD OUT")
PROMPTS = [f'a sign that says "{word}"' for word in WORDS]
OF_EDITS = ("lpips", "image_similarity")
NAMES = (*OF_EDITS, "bioclip", "text_rendering")

BACKGROUNDS = {(250, 240, 200): "OPEN", (200, 250, 240): "CLOSE", (255, 255, 255): "ART"}


class Reader(torch.nn.Module):
    """Reads a sign by the colour of its background, in place of OCR, which takes seconds."""

    files = ()

    def forward(self, picture: PIL.Image.Image) -> list[dict[str, Any]]:
        colour: Any = picture.getpixel((1, 1))
        return [{"text": BACKGROUNDS[colour], "confidence": 1.0, "box": []}]


@pytest.fixture(scope="module")
def find(metrics: Callable[[str], Any]) -> Callable[[str], Any]:
    text_rendering = TextRenderingMetric(Reader())  # type: ignore[arg-type]
    return lambda name: text_rendering if name == "text_rendering" else metrics(name)


@pytest.fixture(scope="module")
def pictures() -> list[PIL.Image.Image]:
    signs = []
    for colour, word in BACKGROUNDS.items():
        sign = PIL.Image.new("RGB", (240, 96), colour)
        PIL.ImageDraw.Draw(sign).text((20, 24), word, "black", PIL.ImageFont.load_default(size=40))
        signs.append(sign)
    return signs


@pytest.fixture(scope="module")
def sources(pictures: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
    return [pictures[2], pictures[0].rotate(3), pictures[1]]


def pixels(pictures: list[PIL.Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(one)).movedim(-1, 0) for one in pictures])


def wanted(name: str, metric: Any, pictures: Any, sources: Any) -> list[float]:
    """Return what the metric itself says; of LPIPS minus the distance, as of every reward."""
    scores: list[float] = metric.compute(sources if name in OF_EDITS else PROMPTS, pictures)
    return [-score for score in scores] if name == "lpips" else scores


def call_sites(folder: Path, pictures: Any, sources: Any) -> dict[str, Callable[[Any], list[float]]]:
    """What each framework does with a metric, on samples of which any may have no source."""
    given = [source for source in sources if source is not None]
    paths: list[dict[str, str]] = []
    for index, pair in enumerate(zip(pictures, sources, strict=True)):
        item = {"instruction": PROMPTS[index]}
        for key, picture in zip(("edited_path", "source_path"), pair, strict=True):
            if picture is not None:
                item[key] = str(folder / f"{key}{index}.png")
                picture.save(item[key])
        paths.append(item)
    talks = [[{"role": "user", "content": p}, {"role": "assistant", "content": ""}] for p in PROMPTS]
    columns = {"completions": [""] * 3, "made": pictures, "before": sources}
    extra = [{"source": item.get("source_path")} for item in paths]

    async def together(function: Any, key: str, made: Any) -> list[float]:
        calls = (
            function(**{key: made[i]}, data_source="d", ground_truth=PROMPTS[i], extra_info=extra[i])
            for i in range(3)
        )
        return [result["score"] for result in await asyncio.gather(*calls)]

    def unirl(metric: Any) -> list[float]:
        """UniRL has source images for all samples or for none."""
        request = RewardRequest({"text": Primitive(texts=PROMPTS)}, {"image": Primitive()})
        request.generated["image"].pixels = pixels(pictures) / 255
        if given:
            request.primitives["image"] = Primitive(pixels=pixels(given) / 255)
        made = to_unirl(lambda device: metric, LocalRewardBackend, scale=None, on_failure=-99.0)
        rewards = made(config=Spec(), base_device="cpu").compute_rewards(request)["rewards"]
        return [math.nan if reward == -99 else reward for reward in rewards]

    nan: dict[str, Any] = {"on_failure": "nan", "scale": None}
    images = pixels(pictures)
    return {
        "flow_grpo": lambda m: to_flow_grpo(m, **nan)("cpu")(images, PROMPTS, [{}] * 3, sources)[0],
        "multi_score": lambda m: to_multi_score({"m": m}, **nan)("cpu", {"m": 1.0})(
            images / 255, PROMPTS, [{}] * 3, ref_images=sources
        )[0]["avg"],
        "DanceGRPO": lambda m: to_dance_grpo(m, **nan)(pictures, PROMPTS, sources).tolist(),
        "Flow-Factory": lambda m: (
            processed(
                flow_factory(m, **nan), PROMPTS, image=pictures, condition_images=[[s] for s in sources]
            ).rewards
        ),
        "TRL": lambda m: to_trl(m, "made", source_image="before", scale=None)(
            prompts=PROMPTS, completion_ids=[[]] * 3, **columns
        ),
        "ms-swift": lambda m: to_ms_swift(m, "made", source_image="before")(messages=talks, **columns),
        "Pref-GRPO": lambda m: to_pref_grpo(m, **nan)(paths)[0].tolist(),
        "verl": lambda m: asyncio.run(
            together(
                to_verl(m, lambda text, info: pictures[int(text)], source_image="source", **nan),
                "solution_str",
                "012",
            )
        ),
        "verl-omni": lambda m: asyncio.run(
            together(to_verl_omni(m, source_image="source", **nan), "solution_image", images)
        ),
        "UniRL": unirl,
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_framework_gets_what_the_metric_says(
    name: str, find: Any, pictures: list[Any], sources: list[Any], tmp_path: Path
) -> None:
    metric = find(name)
    expected = wanted(name, metric, pictures, sources)
    assert len({round(score, 3) for score in expected}) == 3
    for framework, call in call_sites(tmp_path, pictures, sources).items():
        assert call(metric) == pytest.approx(expected, rel=1e-3, abs=1e-3), framework


@pytest.mark.parametrize("name", OF_EDITS)
def test_a_sample_without_its_source_has_no_score_anywhere(
    name: str, find: Any, pictures: list[Any], sources: list[Any], tmp_path: Path
) -> None:
    metric, missing = find(name), [sources[0], None, sources[2]]
    expected = wanted(name, metric, pictures, sources)
    for framework, call in call_sites(tmp_path, pictures, missing).items():
        if framework == "UniRL":
            continue
        scores = [math.nan if score is None else score for score in call(metric)]
        assert math.isnan(scores[1]), framework
        assert scores[::2] == pytest.approx(expected[::2], rel=1e-3, abs=1e-3), framework
    for framework, call in call_sites(tmp_path, pictures, [None] * 3).items():
        scores = [math.nan if score is None else score for score in call(metric)]
        assert all(map(math.isnan, scores)), framework


def test_the_reason_names_the_metric_and_what_it_lacks(
    find: Any, pictures: list[Any], sources: list[Any]
) -> None:
    rewards = RewardSet({name: find(name) for name in OF_EDITS} | {"species": find("bioclip")})
    result = rewards.score(PROMPTS, pictures, [sources[0], None, sources[2]], on_failure="nan")
    assert result.reward.isnan().tolist() == [False, True, False]
    assert result.failures == {
        "lpips": {
            1: "ValueError: LPIPSMetric needs one source image per sample, and the sample has none"
        },
        "image_similarity": {
            1: "ValueError: ImageSimilarityMetric needs a source image per sample, "
            "and the sample has none"
        },
    }
    logged: dict[str, Any] = {}
    to_trl(find("lpips"), "made", source_image="before")(
        prompts=PROMPTS,
        completions=[""] * 3,
        made=pictures,
        before=[sources[0], None, sources[2]],
        log_extra=logged.__setitem__,
    )
    assert [bool(reason) for reason in logged["lpips_error"]] == [False, True, False]
    output = processed(flow_factory(find("lpips"), on_failure="nan"), PROMPTS, image=pictures)
    assert "needs one source image" in output.extra_info["failures"][0]


def test_a_prompt_that_quotes_nothing_has_no_score_and_the_others_have(
    find: Any, pictures: list[Any]
) -> None:
    metric = find("text_rendering")
    prompts = [PROMPTS[0], "a sign", PROMPTS[2]]
    expected = metric.compute(PROMPTS, pictures)
    scores = to_flow_grpo(metric, scale=None, on_failure="nan")("cpu")(pixels(pictures), prompts)[0]
    assert math.isnan(scores[1]) and scores[::2] == pytest.approx(expected[::2])
    output = processed(flow_factory(metric, scale=None, on_failure=-1.0), prompts, image=pictures)
    assert output.rewards == pytest.approx([expected[0], -1, expected[2]])
    reason = "the prompt has no text in quotation marks: 'a sign'"
    assert output.extra_info == {"failures": {1: reason}}
    logged: dict[str, Any] = {}
    columns = {"completions": [""] * 3, "made": pictures, "log_extra": logged.__setitem__}
    assert to_trl(metric, "made")(prompts=prompts, **columns)[1] is None
    assert logged == {"textrendering_error": ["", reason, ""]}


@pytest.mark.parametrize("name", NAMES)
def test_they_are_a_loss_where_they_have_a_gradient(
    name: str, find: Any, pictures: list[Any], sources: list[Any]
) -> None:
    metric = find(name)
    if name == "text_rendering":
        with pytest.raises(TypeError, match="a loss needs gradients, and TextRenderingMetric has none"):
            as_loss(metric)
        return
    leaf = (pixels(pictures) / 255).requires_grad_()
    loss, reward = as_loss(metric)(leaf, PROMPTS, sources)
    expected = wanted(name, metric, leaf.detach(), sources)
    assert reward.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    loss.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert (leaf.grad.abs().flatten(1).sum(1) > 0).all()


def test_all_of_them_are_one_reward(find: Any, pictures: list[Any], sources: list[Any]) -> None:
    rewards = RewardSet({name: Component(find(name), 2.0) for name in NAMES})
    expected = {name: wanted(name, find(name), pictures, sources) for name in NAMES}
    for images in (pictures, pixels(pictures)):
        result = rewards.score(PROMPTS, images, sources)
        for name in NAMES:
            assert result.raw[name].tolist() == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name
        total = [2 * sum(scores) for scores in zip(*expected.values(), strict=True)]
        assert result.reward.tolist() == pytest.approx(total, rel=1e-3, abs=1e-3)
        assert result.failures == {} and result.collapsed == {}


def test_an_edit_may_have_another_size_than_its_source_and_similarity_several_sources(
    find: Any, pictures: list[Any]
) -> None:
    small = [picture.resize((120, 48)) for picture in pictures]
    for name in OF_EDITS:
        metric = find(name)
        expected = wanted(name, metric, pictures, small)
        scores, _ = to_flow_grpo(metric)("cpu")(pixels(pictures), PROMPTS, None, [[s] for s in small])
        assert scores == pytest.approx(expected, rel=1e-3, abs=1e-3)
    several = [[pictures[0], small[1]], [pictures[1]], [pictures[2]] * 3]
    scores, _ = to_flow_grpo(find("image_similarity"))("cpu")(pixels(pictures), PROMPTS, None, several)
    assert scores == pytest.approx(find("image_similarity").compute(several, pictures), rel=1e-3)
    failed, _ = to_flow_grpo(find("lpips"), on_failure="nan")("cpu")(
        pixels(pictures), PROMPTS, None, several
    )
    assert [math.isnan(score) for score in failed] == [True, False, True]

"""Metrics behind HTTP, in process: what a client may send, and what comes back."""

from __future__ import annotations

import base64
import gc
import io
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest
from fastapi.testclient import TestClient

from diffsynth_metrics import CLIPMetric, FIDMetric, ModelConfig, UnifiedRewardEditMetric
from diffsynth_metrics.embedded.drawing import draw_shape
from diffsynth_metrics.serving import create_app
from diffsynth_metrics.serving.requests import Limits
from diffsynth_metrics.testing import ScriptedEngine


def encoded(image: PIL.Image.Image, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    image.save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


RED, BLUE = draw_shape("circle", "red"), draw_shape("square", "blue")


@pytest.fixture(scope="module")
def shapes() -> CLIPMetric:
    return CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")


@pytest.fixture(scope="module")
def client(shapes: CLIPMetric) -> Iterator[TestClient]:
    with TestClient(create_app({"shapes": shapes})) as client:
        yield client


def test_scores_are_those_of_the_metric(client: TestClient, shapes: CLIPMetric) -> None:
    body = {"prompts": ["a red circle", "a blue square"], "images": [encoded(RED), encoded(BLUE)]}
    answer = client.post("/compute", json=body)
    assert answer.status_code == 200
    content = answer.json()
    assert content["metric"] == "shapes" and content["errors"] == [None, None]
    expected = shapes.compute(body["prompts"], [RED, BLUE])
    assert content["rewards"] == pytest.approx(expected, abs=1e-4)
    assert [row["prompt_tokens"] for row in content["components"]] == [5, 5]
    # One prompt for all, and data URIs.
    body = {"prompts": "a red circle", "images": ["data:image/png;base64," + encoded(RED)] * 2}
    assert client.post("/compute", json=body).json()["rewards"] == pytest.approx([expected[0]] * 2)


def test_flow_factorys_client_gets_its_rewards_unchanged(client: TestClient, shapes: CLIPMetric) -> None:
    """The body that ``RemoteRewardClient.compute`` sends.

    X-GenGroup/Flow-Factory, src/flow_factory/rewards/my_reward_remote.py at commit a0b2bc5a; it reads
    ``data["rewards"]`` unless ``data.get("error")`` is true. Its documentation spells the names in the
    plural, and both are taken.
    """
    payload = {
        "prompt": ["a red circle", "a blue square"],
        "image": [encoded(RED), encoded(BLUE)],
        "video": None,
        "condition_images": None,
        "condition_videos": None,
    }
    assert client.get("/health").is_success
    data = client.post("/compute", json=payload).json()
    assert not data.get("error")
    expected = shapes.compute(payload["prompt"], [RED, BLUE])  # type: ignore[arg-type]
    assert data["rewards"] == pytest.approx(expected, abs=1e-4)
    plural = {"prompts": payload["prompt"], "images": payload["image"], "extra": {}}
    assert client.post("/compute", json=plural).json()["rewards"] == pytest.approx(expected, abs=1e-4)


def test_a_sample_without_a_score_is_null_with_its_reason(client: TestClient) -> None:
    broken = base64.b64encode(base64.b64decode(encoded(RED))[:80]).decode()
    body = {"prompts": ["a red circle"] * 3, "images": [encoded(RED), broken, encoded(BLUE)]}
    content = client.post("/compute", json=body).json()
    assert content["rewards"][1] is None and content["rewards"][0] > content["rewards"][2]
    assert content["errors"][0] is None and "cannot be read" in content["errors"][1]


def test_edits_get_their_sources_and_unreadable_answers_are_said() -> None:
    app = create_app({"edit": UnifiedRewardEditMetric(ScriptedEngine("I cannot tell."))})
    body = {"prompts": ["make it blue"], "images": [encoded(BLUE)]}
    edit = {**body, "condition_images": [[encoded(RED)]]}
    with TestClient(app) as client:
        content = client.post("/compute", json=edit).json()
        assert content["rewards"] == [None] and content["errors"][0]
        assert content["components"][0]["raw_text"] == "I cannot tell."
        content = client.post("/compute", json=body).json()
        assert "needs one source image" in content["errors"][0]


def test_several_metrics_are_chosen_by_name(shapes: CLIPMetric, metrics: Callable[[str], Any]) -> None:
    app = create_app({"shapes": shapes, "aesthetic": metrics("aesthetic")})
    body = {"prompts": ["a red circle"], "images": [encoded(RED)]}
    with TestClient(app) as client:
        refused = client.post("/compute", json=body)
        assert refused.status_code == 422
        assert refused.json()["error"] == "metric: say which metric; served here: shapes, aesthetic"
        refused = client.post("/compute", json={**body, "metric": "hpsv2"})
        assert "there is no metric 'hpsv2'" in refused.json()["error"]
        for name in ("shapes", "aesthetic"):
            content = client.post("/compute", json={**body, "metric": name}).json()
            assert content["metric"] == name and content["rewards"][0] is not None
        served = client.get("/metrics").json()["metrics"]
        assert served["aesthetic"]["needs"] == [] and served["shapes"]["needs"] == ["prompt"]
        assert served["shapes"]["card"]["higher_is_better"] is True
        assert served["shapes"]["provenance"]["metric"] == "CLIPMetric"


def test_what_is_wrong_with_a_request_is_said(client: TestClient) -> None:
    good = encoded(RED)
    for body, status, message in [
        ([], 400, "the body is a list of 0"),
        ({}, 422, "images: send a list of pictures in base64, got nothing"),
        ({"images": [good], "prompts": ["a", "b"]}, 422, "as many prompts as images, got 2 and 1"),
        ({"images": [good], "prompts": [1]}, 422, "prompts: send a list of strings"),
        ({"images": [good], "image": [good]}, 422, "send images or image, not both"),
        ({"images": ["/etc/passwd"]}, 422, r"images[0]: this is not base64 of a picture file"),
        (
            {"images": [{"url": "http://x"}]},
            422,
            "images[0]: send an encoded picture in base64",
        ),
        ({"images": [good], "condition_images": []}, 422, "one list of pictures for each image"),
        ({"images": [good], "video": [[good]]}, 422, "video: metrics here score images"),
        ({"images": [good], "metric": 3}, 422, "metric: send the name of a metric, got int"),
    ]:
        answer = client.post("/compute", json=body)
        assert answer.status_code == status, body
        assert message in answer.json()["error"], body
    answer = client.post("/compute", content=b"\x80not json")
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]
    assert client.get("/nothing").status_code == 404
    assert client.get("/compute").status_code == 405


def test_limits_are_kept(shapes: CLIPMetric) -> None:
    limits = Limits(body=40_000, samples=2, pixels=200 * 200, waiting=1)
    with TestClient(create_app({"shapes": shapes}, limits=limits)) as client:
        small = encoded(RED)
        assert client.post("/compute", json={"images": [small], "prompts": "a"}).status_code == 200
        answer = client.post("/compute", json={"images": [small] * 3})
        assert answer.status_code == 413 and "at most 2 at once" in answer.json()["error"]
        answer = client.post("/compute", content=b"x" * 40_001)
        assert answer.status_code == 413 and "more than 40000 bytes" in answer.json()["error"]
        large = encoded(PIL.Image.new("RGB", (201, 200)))
        answer = client.post("/compute", json={"images": [large]})
        assert answer.status_code == 422 and "it has 40200 pixels" in answer.json()["error"]
        answer = client.post("/compute", json={"images": [small] * 2})
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"


def test_a_token_is_asked_for(shapes: CLIPMetric) -> None:
    with TestClient(create_app({"shapes": shapes}, token="secret")) as client:
        body = {"images": [encoded(RED)], "prompts": "a"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer é".encode()}):
            assert client.post("/compute", json=body, headers=headers).status_code == 401
            assert client.get("/metrics", headers=headers).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert client.post("/compute", json=body, headers=headers).status_code == 200
        assert client.get("/health").status_code == 200


def test_what_cannot_be_served_is_an_error(metrics: Callable[[str], Any]) -> None:
    fid: FIDMetric = metrics("fid")
    with pytest.raises(TypeError, match="fid gives one number for two sets of images"):
        create_app({"fid": fid})
    with pytest.raises(ValueError, match="no metrics to serve"):
        create_app({})


def test_malformed_bodies_never_break_the_server(client: TestClient) -> None:
    """Two thousand bodies, made from a good one: each is refused or answered, and nothing is kept."""
    noise = random.Random(0)
    good = json.dumps({"prompts": ["a red circle"], "images": [encoded(RED.resize((8, 8)))]}).encode()
    memory: list[int] = []
    wrong: list[Any] = [None, 0, -1, 1e999, "", "x", [], {}, [[]], [None], True, {"a": []}, "\ud800"]
    for index in range(2000):
        if index % 2:
            body = bytearray(good)
            for _ in range(noise.randrange(1, 9)):
                body[noise.randrange(len(body))] = noise.randrange(256)
            content = bytes(body[: noise.randrange(len(body))] if index % 4 == 1 else body)
        else:
            # Large enough that memory shows bodies that are kept.
            fields: dict[str, Any] = {**json.loads(good), "extra": "x" * 100_000}
            for name in ("prompts", "images", "condition_images", "metric", "extra", "prompt", "video"):
                if noise.random() < 0.3:
                    fields[name] = noise.choice(wrong)
            content = json.dumps(fields).encode()
        answer = client.post("/compute", content=content)
        assert answer.status_code in (200, 400, 413, 422), content
        if answer.status_code == 200:
            assert len(answer.json()["rewards"]) == 1
        if index in (499, 1999):
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
    assert memory[1] - memory[0] < 30 * 2**20, "memory grows with what is refused"
    assert client.post("/compute", content=good).json()["errors"] == [None]
    deep = b"[" * 100_000
    assert client.post("/compute", content=deep).status_code == 400


def test_pictures_keep_their_mode(client: TestClient, shapes: CLIPMetric) -> None:
    transparent = RED.convert("RGBA")
    transparent.putalpha(128)
    grey = PIL.Image.fromarray(np.full((40, 40), 40_000, dtype=np.uint16))
    pictures = [transparent, RED.convert("L"), grey]
    body = {"prompts": ["a red circle"] * 3, "images": [encoded(picture) for picture in pictures]}
    expected = shapes.compute("a red circle", pictures)
    assert client.post("/compute", json=body).json()["rewards"] == pytest.approx(expected, abs=1e-4)

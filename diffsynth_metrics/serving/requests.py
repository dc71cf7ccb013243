"""What a client sends, checked: a body of JSON becomes samples, or a problem with its HTTP status."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffsynth_metrics.inputs import pixel_count

__all__ = ["BadRequest", "Limits", "Request", "Sample", "read_request"]


class BadRequest(Exception):
    """The client's fault, in words.

    Attributes:
        status: The HTTP status that says so.
    """

    def __init__(self, status: int, message: str) -> None:
        """Keep the status next to the message."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        body: Bytes of a request; more is 413.
        samples: Samples of a request; more is 413.
        pixels: Pixels of one picture; more is 422.
        waiting: Samples of a metric that wait for the network; more is 429.
    """

    body: int = 256 * 2**20
    samples: int = 1024
    pixels: int = 50_000_000
    waiting: int = 4096


@dataclass(frozen=True)
class Sample:
    """One picture to score: its prompt, its encoded bytes, and those of what it was made from."""

    prompt: str
    image: bytes
    sources: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Request:
    """What a client asks.

    Attributes:
        metric: The name of the metric; None where the client names none.
        samples: What it wants scored.
    """

    metric: str | None
    samples: tuple[Sample, ...]


def read_request(body: bytes, limits: Limits) -> Request:
    """Read the body of ``POST /compute``.

    The field names are Flow-Factory's: its documentation says ``prompts`` and ``images``, its client
    sends ``prompt`` and ``image``, so both are read.

    Raises:
        BadRequest: It is no JSON object (400), too large (413), or a field is wrong (422).
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"send a JSON object; the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRequest(400, f"send a JSON object; the body is {_kind(fields)}")
    for name in ("video", "videos", "condition_videos"):
        if fields.get(name):
            raise BadRequest(422, f"{name}: metrics here score images; send frames as images")
    images = _images(_either(fields, "images", "image"), "images", limits)
    prompts = _prompts(_either(fields, "prompts", "prompt"), len(images))
    sources = _sources(fields.get("condition_images"), len(images), limits)
    metric = fields.get("metric")
    if metric is not None and not isinstance(metric, str):
        raise BadRequest(422, f"metric: send the name of a metric, got {_kind(metric)}")
    return Request(metric, tuple(map(Sample, prompts, images, sources)))


def _either(fields: dict[str, Any], name: str, other: str) -> Any:
    values = [fields[key] for key in (name, other) if fields.get(key) is not None]
    if len(values) > 1:
        raise BadRequest(422, f"send {name} or {other}, not both")
    return values[0] if values else None


def _images(encoded: Any, name: str, limits: Limits) -> list[bytes]:
    if not isinstance(encoded, list) or not encoded:
        raise BadRequest(422, f"{name}: send a list of pictures in base64, got {_kind(encoded)}")
    if len(encoded) > limits.samples:
        raise BadRequest(413, f"{name}: send at most {limits.samples} at once, got {len(encoded)}")
    return [_picture(text, f"{name}[{index}]", limits) for index, text in enumerate(encoded)]


def _picture(encoded: Any, name: str, limits: Limits) -> bytes:
    if not isinstance(encoded, str):
        raise BadRequest(422, f"{name}: send an encoded picture in base64, got {_kind(encoded)}")
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        picture = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(422, f"{name}: this is not base64 of a picture file") from None
    # A picture that cannot be read counts 0 here, and is an error of its own sample later.
    if (pixels := pixel_count(picture)) > limits.pixels:
        raise BadRequest(422, f"{name}: it has {pixels} pixels, and {limits.pixels} are the most here")
    return picture


def _prompts(prompts: Any, count: int) -> Sequence[str]:
    if isinstance(prompts, str):
        return [prompts] * count
    if prompts is None:
        return [""] * count
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadRequest(422, f"prompts: send a list of strings, got {_kind(prompts)}")
    if len(prompts) != count:
        raise BadRequest(422, f"send as many prompts as images, got {len(prompts)} and {count}")
    return prompts


def _sources(encoded: Any, count: int, limits: Limits) -> list[tuple[bytes, ...]]:
    if encoded is None:
        return [()] * count
    if not isinstance(encoded, list) or len(encoded) != count:
        raise BadRequest(422, "condition_images: send one list of pictures for each image")
    return [
        tuple(_images(pictures, f"condition_images[{index}]", limits)) if pictures else ()
        for index, pictures in enumerate(encoded)
    ]


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else type(value).__name__

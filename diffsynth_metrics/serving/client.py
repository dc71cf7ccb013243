"""The client: a metric that another machine computes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor
from typing_extensions import Self
from urllib3 import Retry

from diffsynth_metrics.base import MetricCard, RowMetric, check_batch_size
from diffsynth_metrics.errors import ServerError
from diffsynth_metrics.inputs import (
    CheckedImage,
    ImageInput,
    ImagesInput,
    as_images,
    as_pil,
    as_rgb,
    pair,
)

__all__ = ["RemoteMetric"]

_AGAIN = (429, 502, 503, 504)
_FAULTS_OF_A_REQUEST = (400, 413, 422)
_PNG_MODES = ("1", "I;16", "L", "LA", "P", "RGB", "RGBA")


class RemoteMetric(RowMetric):
    """A metric on a server, used like any other; without gradients.

    Example:
        >>> metric = RemoteMetric("http://gpu-box:8000", "pickscore", token="...")
        >>> metric.compute("a cat", "cat.png")

    Files are sent as they are; other pictures, also float tensors, as PNG, so they are rounded to bytes.
    A sample that the server could not score is NaN in :meth:`compute`, and :meth:`evaluate` has the
    reason as ``"error"``.

    Attributes:
        card: The card of the metric on the server.
        url: Where the server is.
        served: The class of the metric there, whose scales it has as a reward.
    """

    def __init__(
        self,
        url: str,
        metric: str | None = None,
        *,
        token: str | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        timeout: float = 300,
        retries: int = 4,
        session: requests.Session | None = None,
    ) -> None:
        """Ask a server what it serves.

        Args:
            url: Such as ``"http://gpu-box:8000"``.
            metric: The name of the metric there; not needed where one is served.
            token: What the server wants as a bearer token.
            device: Where rewards are.
            batch_size: The most pictures in one request.
            timeout: Seconds for one request.
            retries: How often a request is sent again, with growing pauses, when there is no
                connection or the server is busy (429, 502, 503, 504).
            session: A session of ``requests`` of your own, for proxies and certificates; it retries as
                it is set up.

        Raises:
            ServerError: The server is not reached, refuses the token, or does not serve the metric.
        """
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.session = session or _session(retries)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._device = torch.device(device)
        self._batch_size = check_batch_size(batch_size)
        self.options = {}
        self.weight_files = ()
        served = self._ask("GET", "/metrics")["metrics"]
        if metric is None and len(served) == 1:
            (metric,) = served
        if metric not in served:
            raise ServerError(
                f"name one of the metrics that {self.url} serves, {', '.join(served)}; got {metric!r}"
            )
        self.name = metric
        known = {field.name for field in fields(MetricCard)}
        card = served[metric]["card"]
        self.card = MetricCard(**{name: value for name, value in card.items() if name in known})
        self.needs = tuple(served[metric]["needs"])  # type: ignore[misc]
        self._provenance = served[metric]["provenance"]
        self.served = str(self._provenance["metric"])

    def arguments(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageInput] | Tensor,
        sources: Sequence[Sequence[ImageInput]] = (),
    ) -> tuple[Any, ...]:
        """Return what the verbs take, see :meth:`BaseMetric.arguments`."""
        return prompts, images, sources

    def evaluate(
        self,
        prompt: str | Sequence[str],
        images: ImagesInput,
        sources: Sequence[Sequence[ImageInput]] = (),
    ) -> list[dict[str, Any]]:
        """Let the server score pairs of prompts and images.

        Args:
            prompt: One prompt for all images, or as many prompts as images; ``""`` where the metric
                needs none.
            images: One image or several, as every metric takes them.
            sources: For a metric that needs them, the source images of each sample.

        Returns:
            The rows of the metric's own ``evaluate``, as JSON has them: ``"score"`` is None where there
            is none, with the reason as ``"error"``.

        Raises:
            ServerError: The server is not reached, or does not do what it is asked.
            TypeError, ValueError, ImageError, FileNotFoundError: An argument is wrong, or more than the
                server accepts.
        """
        prompts, checked, count = pair(prompt, images)
        prompts = prompts * count if len(prompts) == 1 else prompts
        pictures = list(checked) * (count if len(checked) == 1 else 1)
        if sources and len(sources) != count:
            raise ValueError(f"got {len(sources)} lists of sources and {count} images")
        rows = []
        for start in range(0, count, self.batch_size):
            part = slice(start, start + self.batch_size)
            body: dict[str, Any] = {
                "metric": self.name,
                "prompts": prompts[part],
                "images": [_encoded(picture) for picture in pictures[part]],
            }
            if "source" in self.needs and sources:
                body["condition_images"] = [
                    [_encoded(picture) for picture in as_images(list(of_sample))] if of_sample else []
                    for of_sample in sources[part]
                ]
            rows += list(_rows(self._ask("POST", "/compute", body)))
        return rows

    def _numbers(self, row: dict[str, Any]) -> dict[str, float | None]:
        """Return the score and the other numbers of a row."""
        return {
            name: value
            for name, value in row.items()
            if isinstance(value, (int, float)) or name == "score"
        }

    def reward(self, prompt: Any, images: Any, *asked: Any, **options: Any) -> Tensor:
        """Return the scores as a tensor ``[N]`` without gradients: minus them where lower is better."""
        score = super().reward(prompt, images, *asked, **options)
        return score if self.card.higher_is_better else -score

    @property
    def batch_size(self) -> int:
        """The most pictures in one request."""
        return self._batch_size or 1

    @batch_size.setter
    def batch_size(self, batch_size: int | None) -> None:
        self._batch_size = check_batch_size(batch_size or 64)

    @property
    def device(self) -> torch.device:
        """Where rewards are."""
        return self._device

    def to(
        self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Self:
        """Choose where rewards are; the network stays on the server."""
        if device is not None and not isinstance(device, torch.dtype):
            self._device = torch.device(device)
        return self

    @property
    def provenance(self) -> dict[str, Any]:
        """What made a number, as the server says it."""
        return dict(self._provenance)

    def __repr__(self) -> str:
        """Show which metric it is, and where."""
        return f"RemoteMetric({self.url!r}, {self.name!r})"

    def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            answer = self.session.request(
                method, self.url + path, json=body, headers=self._headers, timeout=self.timeout
            )
            content = answer.json()
        except requests.RequestException as error:
            raise ServerError(
                f"check that diffsynth-metrics serve runs at {self.url} and that this machine reaches "
                f"it: {error}"
            ) from None
        if not answer.ok or not isinstance(content, dict):
            problem = content.get("error", content) if isinstance(content, dict) else content
            kind = ValueError if answer.status_code in _FAULTS_OF_A_REQUEST else ServerError
            raise kind(f"{self.url}{path} answers {answer.status_code}: {problem}")
        return content


def _session(retries: int) -> requests.Session:
    session = requests.Session()
    again = Retry(total=retries, backoff_factor=0.5, status_forcelist=_AGAIN, allowed_methods=None)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=16))
    return session


def _rows(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    columns = (answer["rewards"], answer["errors"], answer["components"])
    for score, error, components in zip(*columns, strict=True):
        yield {**(components or {}), "score": score, **({"error": error} if error else {})}


def _encoded(image: CheckedImage) -> str:
    """Return the bytes of a file as they are, of anything else as PNG, in base64."""
    if isinstance(image, Path):
        image = image.read_bytes()
    if not isinstance(image, bytes):
        picture = as_pil(image) if isinstance(image, Tensor) else image
        picture = picture if picture.mode in _PNG_MODES else as_rgb(picture)
        stream = io.BytesIO()
        picture.save(stream, "PNG", compress_level=1)
        image = stream.getvalue()
    return base64.b64encode(image).decode("ascii")

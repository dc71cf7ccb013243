"""The server: a factory that takes loaded metrics, and the command's ``serve``."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from diffsynth_metrics import __version__
from diffsynth_metrics.base import BaseMetric
from diffsynth_metrics.batcher import Batcher
from diffsynth_metrics.each_sample import evaluate_each
from diffsynth_metrics.serving.requests import BadRequest, Limits, Sample, read_request

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
except ImportError as missing:
    raise ImportError(
        f'pip install "diffsynth-metrics[serve]": a server needs FastAPI and uvicorn ({missing})'
    ) from None

__all__ = ["create_app", "serve"]

logger = logging.getLogger(__name__)

_LOCAL = ("127.0.0.1", "::1", "localhost")


class _Served:
    """A metric with its queue."""

    def __init__(self, name: str, metric: BaseMetric, *, max_batch: int, max_wait_ms: float) -> None:
        if not hasattr(metric, "reward"):
            raise TypeError(f"{name} gives one number for two sets of images, and cannot be served")
        self.metric = metric
        self.batcher: Batcher[Sample, dict[str, Any]] = Batcher(
            self.rows, max_batch=max_batch, max_wait_ms=max_wait_ms
        )

    def rows(self, samples: Sequence[Sample]) -> list[dict[str, Any] | Exception]:
        """Score a batch; a sample that cannot be scored gets its error, and costs no other its score."""
        return evaluate_each(
            self.metric,
            [sample.prompt for sample in samples],
            [sample.image for sample in samples],
            [sample.sources for sample in samples],
        )

    def describe(self) -> dict[str, Any]:
        """Return what a client needs to know of the metric."""
        return {
            "card": asdict(self.metric.card),
            "needs": list(self.metric.needs),
            "provenance": self.metric.provenance,
        }


def create_app(
    metrics: Mapping[str, BaseMetric],
    *,
    token: str | None = None,
    max_batch: int = 16,
    max_wait_ms: float = 5.0,
    limits: Limits | None = None,
) -> FastAPI:
    """Make an application that serves loaded metrics.

    ``POST /compute`` takes ``{"prompts": [...], "images": [base64, ...]}``, and where a metric needs
    them ``"condition_images": [[base64, ...], ...]``; ``"metric"`` says which one, where several are
    served. It answers ``{"rewards": [...], "errors": [...], "components": [...], "metric": name}``: a
    sample without a score is null in ``rewards`` and has its reason in ``errors``. ``GET /metrics``
    says what is served, ``GET /health`` that the server runs. Samples of several clients go through
    the network together.

    Args:
        metrics: Names to loaded metrics.
        token: What clients must send as ``Authorization: Bearer ...``; None asks for nothing.
        max_batch: The most samples that a metric is given at once.
        max_wait_ms: How long a sample waits for company, in milliseconds.
        limits: What is refused; see :class:`~diffsynth_metrics.serving.requests.Limits`.

    Raises:
        TypeError: A metric does not score single samples.
        ValueError: There are no metrics.
    """
    if not metrics:
        raise ValueError("there are no metrics to serve")
    limits = limits or Limits()
    served = {
        name: _Served(name, metric, max_batch=max_batch, max_wait_ms=max_wait_ms)
        for name, metric in metrics.items()
    }
    app = FastAPI(title="diffsynth_metrics", version=__version__)

    @app.exception_handler(BadRequest)
    async def refused(request: Request, error: BadRequest) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse({"error": str(error)}, error.status, headers)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise BadRequest(401, "send the server's token as Authorization: Bearer TOKEN")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    descriptions: dict[str, Any] = {}

    @app.get("/metrics")
    async def cards(request: Request) -> dict[str, Any]:
        check_token(request)
        if not descriptions:  # weights are hashed once
            for name, one in served.items():
                descriptions[name] = await asyncio.to_thread(one.describe)
        return {"metrics": descriptions}

    @app.post("/compute")
    async def compute(request: Request) -> JSONResponse:
        check_token(request)
        body = await _body(request, limits.body)
        wanted = await asyncio.to_thread(read_request, body, limits)
        name = _chosen(wanted.metric, list(served))
        batcher = served[name].batcher
        if len(batcher) + len(wanted.samples) > limits.waiting:
            raise BadRequest(429, f"{len(batcher)} samples wait for {name}: send again later")
        futures = [asyncio.wrap_future(batcher.submit(sample)) for sample in wanted.samples]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        return JSONResponse({"metric": name, **_answer(outcomes)})

    return app


async def _body(request: Request, most: int) -> bytes:
    """Read a body, and no more of it than allowed."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise BadRequest(413, f"the body has more than {most} bytes: send fewer pictures at once")
        parts.append(part)
    return b"".join(parts)


def _chosen(name: str | None, names: list[str]) -> str:
    if name in names:
        return str(name)
    if name is None and len(names) == 1:
        return names[0]
    problem = "say which metric" if name is None else f"there is no metric {name!r}"
    raise BadRequest(422, f"metric: {problem}; served here: {', '.join(names)}")


def _answer(outcomes: Sequence[dict[str, Any] | BaseException]) -> dict[str, list[Any]]:
    """Turn rows of ``evaluate`` and errors into columns; null is a missing score."""
    rewards: list[float | None] = []
    errors: list[str | None] = []
    components: list[dict[str, Any] | None] = []
    for outcome in outcomes:
        row = {} if isinstance(outcome, BaseException) else _plain(outcome)
        score = row.get("score")
        number = score if isinstance(score, (int, float)) else None
        rewards.append(number)
        components.append(row or None)
        if isinstance(outcome, BaseException):
            errors.append(f"{type(outcome).__name__}: {outcome}")
        else:
            missing = "the score is not a finite number" if score is None else "the score is several"
            errors.append(None if number is not None else str(row.get("error") or missing))
    return {"rewards": rewards, "errors": errors, "components": components}


def _plain(value: Any) -> Any:
    """Return a value for JSON, which has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, type(None))) else str(value)


def serve(
    metrics: Mapping[str, BaseMetric],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    insecure: bool = False,
    on_start: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve metrics until the process is told to stop; what was taken is finished first.

    Args:
        metrics: Names to loaded metrics.
        host: Where to listen; others than this machine's own need a `token`.
        port: The port.
        token: See :func:`create_app`.
        insecure: Listen to other machines without a token all the same.
        on_start: Called with the address when the server begins.
        **options: The other arguments of :func:`create_app`.

    Raises:
        ValueError: Other machines could use the server without a token.
    """
    if host not in _LOCAL and token is None and not insecure:
        raise ValueError(
            f"set a token: everybody who reaches {host} could use the server (insecure=True or "
            "--insecure if that is meant)"
        )
    app = create_app(metrics, token=token, **options)
    if on_start is not None:
        on_start(f"http://{host}:{port}")
    uvicorn.run(app, host=host, port=port, log_level="warning")

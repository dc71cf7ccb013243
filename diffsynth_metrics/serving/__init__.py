"""Metrics behind HTTP: :func:`serve` them on one machine, use a :class:`RemoteMetric` on another.

JSON in, JSON out; nothing is unpickled, and no path or address of a client is opened. Serving needs
``pip install "diffsynth-metrics[serve]"``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_metrics.serving.app import create_app, serve
    from diffsynth_metrics.serving.client import RemoteMetric

_HOME = {"RemoteMetric": "client", "create_app": "app", "serve": "app"}

__all__ = ["RemoteMetric", "create_app", "serve"]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name from the module that defines it, and keep it."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

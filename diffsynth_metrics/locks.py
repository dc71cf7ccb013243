"""A lock that its owner can be copied and pickled with."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["Lock"]


class Lock:
    """A mutex; a copy or a pickle of it is a new one, so that metrics can be copied and sent."""

    def __init__(self) -> None:
        """Make an open lock."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()

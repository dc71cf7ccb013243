"""Locks whose owners can be copied, pickled and forked with."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import Protocol

__all__ = ["Lock", "renew_in_children"]


class _Renewable(Protocol):
    def _renew(self) -> None:
        """Become as new: in a forked child, which has no other threads and locks as they just were."""


_renewed_in_children: weakref.WeakSet[_Renewable] = weakref.WeakSet()


def renew_in_children(thing: _Renewable) -> None:
    """Call ``thing._renew()`` in every process that is forked from now on, as long as it lives."""
    _renewed_in_children.add(thing)


class Lock:
    """A mutex; a copy or a pickle of it is a new one, and in a forked child it is open."""

    def __init__(self) -> None:
        """Make an open lock."""
        self._renew()
        renew_in_children(self)

    def _renew(self) -> None:
        """Forget who holds it."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


def _renew_all() -> None:
    for thing in list(_renewed_in_children):
        thing._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)

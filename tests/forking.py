"""What a forked child finds."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

import pytest

SOON = 20.0
"""Seconds; more than any of these takes, and less than anybody waits for a test that hangs."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


def is_true_in_a_child(ask: Callable[[], object]) -> bool:
    """Fork, and tell whether `ask` returns something true there before long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        answers: list[object] = []
        try:
            asking = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
            asking.start()
            asking.join(SOON)
        finally:
            os._exit(0 if answers and answers[0] else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

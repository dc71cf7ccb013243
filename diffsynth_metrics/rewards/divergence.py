"""Noticing that a metric falls while the optimised ones rise: the sign of reward hacking."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping

__all__ = ["DivergenceMonitor", "trend"]

# One for all histories: it is held for microseconds, and without a lock of their own monitors can be
# copied and pickled.
_LOCK = threading.Lock()


def trend(values: list[float]) -> float:
    """Return how clearly a series rises: the t statistic of its correlation with time.

    About -2 to 2 without a trend; below 0 for a falling series; 0 for fewer than 3 values or a
    constant series; infinite for a straight line.
    """
    count = len(values)
    if count < 3:
        return 0.0
    middle, mean = (count - 1) / 2, math.fsum(values) / count
    across = math.fsum((step - middle) * (value - mean) for step, value in enumerate(values))
    time = math.fsum((step - middle) ** 2 for step in range(count))
    squares = math.fsum((value - mean) ** 2 for value in values)
    if squares <= (1e-9 * max(1.0, abs(mean))) ** 2 * count:
        return 0.0
    r = across / math.sqrt(time * squares)
    return math.copysign(math.inf, r) if 1 - r * r < 1e-12 else r * math.sqrt((count - 2) / (1 - r * r))


class DivergenceMonitor:
    """Keeps the mean of every metric over the last calls, and compares their trends."""

    def __init__(self, *, window: int = 50, threshold: float = 3.0) -> None:
        """Start without a history.

        Args:
            window: How many calls are looked at; there is no alarm before as many were seen.
            threshold: How clear the trends must be, see :func:`trend`.
        """
        if window < 3:
            raise ValueError(f"window must be at least 3, got {window!r}")
        self.window = window
        self.threshold = threshold
        self._history: dict[str, deque[float]] = {}

    def add(self, means: Mapping[str, float]) -> None:
        """Remember the means of a call, in the direction in which higher is better; NaN is skipped."""
        with _LOCK:
            for name, mean in means.items():
                if not math.isnan(mean):
                    self._history.setdefault(name, deque(maxlen=self.window)).append(mean)

    def diverging(self, optimized: list[str], held_out: list[str]) -> dict[str, list[str]]:
        """Return the held-out metrics that fall, each with the optimised metrics that rise meanwhile."""
        history = self.state_dict()
        trends = {name: trend(values) for name, values in history.items() if len(values) == self.window}
        rising = [name for name in optimized if trends.get(name, 0) > self.threshold]
        falling = [name for name in held_out if trends.get(name, 0) < -self.threshold]
        return {name: rising for name in falling if rising}

    def state_dict(self) -> dict[str, list[float]]:
        """Return the history as plain numbers."""
        with _LOCK:
            return {name: list(values) for name, values in self._history.items()}

    def check_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Check that :meth:`load_state_dict` can take a state.

        Raises:
            ValueError: It is not a history.
        """
        for name, values in state.items():
            numbers = isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)
            if not numbers:
                raise ValueError(f"the history of {name!r} must be a list of numbers, got {values!r}")

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.check_state_dict(state)
        with _LOCK:
            self._history = {name: deque(values, maxlen=self.window) for name, values in state.items()}

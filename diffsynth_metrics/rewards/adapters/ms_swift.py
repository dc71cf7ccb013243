"""Rewards for ms-swift's GRPO, ModelScope's own trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from typing_extensions import Self

from diffsynth_metrics.rewards.adapters.trl import ColumnReward


class _SwiftReward(ColumnReward):
    """A reward function ``(completions, **columns)`` for ms-swift's ``reward_funcs``.

    A plugin registers it as ``orms["pickscore"] = reward.orm``, for ``--reward_funcs pickscore``. The
    prompt is by default the message before the completion. The trainer logs the name of its class, so
    each reward is of a class that is called as the reward.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.__class__ = type(self.__name__, (type(self),), {})

    def __call__(self, completions: Sequence[str], **columns: Any) -> Any:
        return self.rewards(_prompts(columns), completions, columns)

    def orm(self, args: Any = None, **ignored: Any) -> Self:
        """Return itself: the trainer calls what is registered for a reward."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self).__bases__[0], self.__dict__)


class _AsyncSwiftReward(_SwiftReward):
    """The coroutine form of :func:`to_ms_swift`, which is run along with other ones."""

    async def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
        return await asyncio.to_thread(self.rewards, _prompts(columns), completions, columns)


to_ms_swift, to_ms_swift_async = _SwiftReward, _AsyncSwiftReward


def _prompts(columns: dict[str, Any]) -> list[Any]:
    """Return the conversations without their completions."""
    return [messages[:-1] for messages in columns["messages"]]


def _restored(base: type[_SwiftReward], state: dict[str, Any]) -> _SwiftReward:
    """Unpickle a reward with a class of its name."""
    made: _SwiftReward = object.__new__(type(state["__name__"], (base,), {}))
    made.__dict__.update(state)
    return made

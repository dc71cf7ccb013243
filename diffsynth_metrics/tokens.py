"""Prompts to token ids, cut where the network stops reading; a cut prompt is said."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CutsPrompts", "TokenizedPrompts", "cut_prompts", "padded"]


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts as token ids.

    Attributes:
        ids: The ids of each prompt as the network reads them, begin and end included.
        lengths: How many ids each prompt has before it is cut.
    """

    ids: list[list[int]]
    lengths: list[int]

    def components(self, count: int) -> dict[str, Tensor]:
        """Return what a person should know about the prompts of `count` pairs.

        Returns:
            ``"prompt_tokens"`` (int64) and ``"truncated"`` (bool), both ``[count]`` on the CPU.
        """
        tokens = torch.tensor(self.lengths, device="cpu")
        cut = torch.tensor(
            [len(ids) < length for ids, length in zip(self.ids, self.lengths, strict=True)],
            device="cpu",
        )
        return {"prompt_tokens": tokens.expand(count), "truncated": cut.expand(count)}


def cut_prompts(ids: Sequence[Sequence[int]], max_length: int, side: str = "right") -> TokenizedPrompts:
    """Cut the ids of prompts to `max_length`; the first and the last one, begin and end, stay.

    Args:
        ids: The ids of each prompt.
        max_length: The most that the network reads.
        side: Where ids are left out: a tokenizer's ``truncation_side``.
    """
    if side == "left":
        cut = [list(row) if len(row) <= max_length else [row[0], *row[1 - max_length :]] for row in ids]
    else:
        cut = [list(row) if len(row) <= max_length else [*row[: max_length - 1], row[-1]] for row in ids]
    return TokenizedPrompts(cut, [len(row) for row in ids])


class CutsPrompts:
    """A metric whose network reads a limited number of tokens; it warns once of a cut prompt."""

    _has_warned = False

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check ``max_length``, if the metric has it: an int that leaves room for a prompt.

        Raises:
            ValueError: It is not an int of at least 3, for begin, end and something between them.
        """
        max_length = options.get("max_length", 3)
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 3:
            raise ValueError(f"max_length must be an int of at least 3, got {max_length!r}")

    @abstractmethod
    def tokenize(self, prompts: list[str]) -> TokenizedPrompts:
        """Turn prompts into the token ids that the network reads."""

    def tokens_of(self, prompts: list[str]) -> TokenizedPrompts:
        """Do :meth:`tokenize`, and warn if a prompt is cut for the first time."""
        tokens = self.tokenize(prompts)
        if not self._has_warned:
            for prompt, ids, length in zip(prompts, tokens.ids, tokens.lengths, strict=True):
                if len(ids) < length:
                    self._has_warned = True
                    start = prompt if len(prompt) <= 60 else prompt[:57] + "..."
                    warnings.warn(
                        f"{type(self).__name__} reads {len(ids)} tokens of a prompt, and {start!r} has "
                        f"{length}: what is behind them does not change the score. evaluate() says of "
                        "each pair whether its prompt was cut; this comes once per metric object.",
                        UserWarning,
                        stacklevel=2,
                    )
                    break
        return tokens


def padded(ids: Sequence[Sequence[int]], value: int | None, length: int | None = None) -> Tensor:
    """Return ids as one int64 tensor ``[B, L]`` on the CPU, padded on the right.

    Without a `value`, the last id of a row is repeated, which ends a prompt.
    """
    length = max(map(len, ids)) if length is None else length
    rows = [[*row, *[row[-1] if value is None else value] * (length - len(row))] for row in ids]
    return torch.tensor(rows, device="cpu")

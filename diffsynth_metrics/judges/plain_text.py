"""Text of a caller as plain text: what looks like a special token in it is not one."""

from __future__ import annotations

from tokenizers import Tokenizer

__all__ = ["without_added_tokens"]


def without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer for which ``<|im_end|>`` and ``<think>`` are text like any other."""
    plain = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    return plain

"""Prompts to token ids, cut where the network stops reading; a cut prompt is said.

A tokenizer whose ids mean something else to the network gives wrong scores without a word, so a few
texts with known ids, canaries, are tokenized when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth_metrics.errors import CheckpointError

__all__ = [
    "CANARIES_FILE",
    "Canaries",
    "CutsPrompts",
    "TokenizedPrompts",
    "check_canaries",
    "cut_prompts",
    "digest_of_vocabulary",
    "padded",
    "write_canaries",
]

CANARIES_FILE = "canaries.json"
"""The file beside a tokenizer with texts and the ids that it gives them."""


@dataclass(frozen=True)
class Canaries:
    """What a tokenizer must give.

    Attributes:
        texts: Texts to their ids, with begin and end.
        vocabulary: What :func:`digest_of_vocabulary` returns; empty where nobody has derived it.
        added: Its added tokens, which go before the vocabulary, and their ids; empty where not all of
            them are known.
    """

    texts: Mapping[str, Sequence[int]]
    vocabulary: str = ""
    added: Mapping[str, int] = field(default_factory=dict)


# The ids of open_clip's own copy of CLIP's vocabulary, which transformers' tokenizer of OpenAI's files
# gives as well; the digest is of both.
_CLIP = Canaries(
    {
        "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
        "A teddy bear on a skateboard, in Times Square; 4k": [
            *(49406, 320, 11798, 4298, 525, 320, 31777, 267, 530, 1661, 3999, 282, 275, 330, 49407)
        ],
        "naïve café 🙂": [49406, 1097, 35689, 563, 15304, 14860, 49407],
        "don't stop — it's 1999": [*(49406, 847, 713, 1691, 2005, 585, 568, 272, 280, 280, 280, 49407)],
    },
    "05f6f898f4f9c824c37b7dcacccc3d2e3ebab7b5a76de05da606127062a08e0e",
    {"<|startoftext|>": 49406, "<|endoftext|>": 49407},
)
# As several tests of other tokenizers have them from bert-base-uncased, and what ImageReward adds.
_BERT = Canaries(
    {
        "Hello, my dog is cute": [101, 7592, 1010, 2026, 3899, 2003, 10140, 102],
        "The quick brown fox jumps over the lazy dog.": [
            *(101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102)
        ],
        "café naïve résumé": [101, 7668, 15743, 13746, 102],
        "embeddings": [101, 7861, 8270, 4667, 2015, 102],
    },
    added={
        "[PAD]": 0,
        "[UNK]": 100,
        "[CLS]": 101,
        "[SEP]": 102,
        "[MASK]": 103,
        "[DEC]": 30522,
        "[ENC]": 30523,
    },
)
# From transformers' test of the published tokenizer, which Qwen2-VL and Qwen3-VL share, and from the
# latter's config.
_QWEN2 = Canaries(
    {
        "Hello world": [9707, 1879],
        " provides general-purpose architectures": [5707, 4586, 58238, 77235],
        " models in 100+ languages": [4119, 304, 220, 16, 15, 15, 10, 15459],
        "世界，你好！": [99489, 3837, 108386, 6313],
        "<|im_end|><|vision_start|><|image_pad|><|vision_end|>": [151645, 151652, 151655, 151653],
    }
)
# The form of Qwen's added tokens, which are not all known here; a word among them would cut texts.
_MARKUP = re.compile(r"<.+>")
_PUBLISHED = {49408: _CLIP, 30524: _BERT, 151658: _QWEN2, 151936: _QWEN2, 248320: Canaries({})}
"""Tokens of a published network to what its tokenizer gives; no ids of Qwen3.5's are known here."""


def check_canaries(tokenizer: Any, folder: Path, tokens: int) -> None:
    """Check that a tokenizer gives the ids that its network was trained with.

    Args:
        tokenizer: A tokenizer of transformers.
        folder: Where it was loaded from; a :data:`CANARIES_FILE` there replaces what is known here, so
            that a tokenizer of one's own can be used.
        tokens: How many tokens the network has, which tells which tokenizer it is.

    Raises:
        CheckpointError: It gives other ids, or has another vocabulary, other merges or added tokens.
    """
    canaries = _PUBLISHED.get(tokens)
    if (folder / CANARIES_FILE).is_file():
        canaries = Canaries(**json.loads((folder / CANARIES_FILE).read_text(encoding="utf-8")))
    if canaries is None:
        return
    hint = f"Download the tokenizer in {folder} again: it is not that of the weights."
    for text, expected in canaries.texts.items():
        if (found := tokenizer(text, verbose=False)["input_ids"]) != list(expected):
            raise CheckpointError(f"{hint} It reads {text!r} as {found}, expected {expected}")
    if canaries.vocabulary and digest_of_vocabulary(tokenizer) != canaries.vocabulary:
        raise CheckpointError(f"{hint} Some of its tokens or merges are others")
    added = _added_tokens(tokenizer)
    odd = dict(added.items() ^ canaries.added.items())
    if not canaries.added:
        odd = {token: index for token, index in added.items() if not _MARKUP.fullmatch(token)}
    if tokenizer.pad_token == "!":  # as copies of CLIP's have it that others publish
        odd.pop("!", None)
    if odd:
        raise CheckpointError(
            f"{hint} Some of its added tokens are others, see tokenizer.json, added_tokens.json and the "
            f"settings of special tokens: {odd}"
        )


def _added_tokens(tokenizer: Any) -> dict[str, int]:
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}


def write_canaries(tokenizer: Any, folder: Path, texts: Sequence[str]) -> None:
    """Write beside a tokenizer what it gives texts and its added tokens, for :func:`check_canaries`."""
    texts = [*texts, "".join(tokenizer.get_added_vocab())]
    ids = {text: tokenizer(text, verbose=False)["input_ids"] for text in texts}
    canaries = Canaries(ids, digest_of_vocabulary(tokenizer), _added_tokens(tokenizer))
    (folder / CANARIES_FILE).write_text(json.dumps(asdict(canaries), indent=1), encoding="utf-8")


def digest_of_vocabulary(tokenizer: Any) -> str:
    """Return the sha256 of a tokenizer's tokens in the order of their ids, and of its merges."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges", [])]
    return hashlib.sha256("\n".join([*tokens, "", *merges]).encode()).hexdigest()


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

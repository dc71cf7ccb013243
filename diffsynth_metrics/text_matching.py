"""The texts that a prompt puts in quotation marks, and how much of them was read in a picture.

Pure functions on strings; nothing here knows a picture.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Match", "character_accuracy", "edit_distance", "flow_grpo_reward", "match", "quoted_texts"]

# An inch sign, as in 24" monitor, opens nothing.
_DOUBLE = re.compile(
    r'(?<!\d)["＂]([^"＂]*)["＂]|[“”„]([^“”„]*)[“”]|«([^»]*)»|»([^»«]*)«|「([^」]*)」|『([^』]*)』'
)
# Apostrophes inside a word neither open nor close.
_LATIN = "0-9A-Za-zÀ-ɏ"
_SINGLE = re.compile(
    rf"(?<![{_LATIN}])['‘]((?:[^'‘’]|(?<=[{_LATIN}])['’](?=[{_LATIN}]))+)['’](?![{_LATIN}])"
)
_MARKS = dict.fromkeys(map(ord, '"“”„«»「」『』'))
_ALIKE = {**_MARKS, **dict.fromkeys(map(ord, "‘’`´"), "'"), **dict.fromkeys(map(ord, "‐‑–—−"), "-")}
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_BETWEEN_CJK = re.compile(rf"(?<=[{_CJK}]) (?=[{_CJK}])")
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


@dataclass(frozen=True)
class Match:
    """A text that was asked for, and what comes nearest to it in a picture.

    Attributes:
        expected: The text as the prompt has it.
        found: The words that come nearest, or nothing.
        accuracy: Share of right characters, 0 to 1.
    """

    expected: str
    found: str
    accuracy: float


def quoted_texts(prompt: str) -> list[str]:
    """Return the texts in quotation marks, in order.

    Straight, typographic, French and Chinese double quotation marks count. Single ones, which are
    apostrophes as well, count in a prompt without double ones.
    """
    groups = _DOUBLE.findall(prompt) or [(text,) for text in _SINGLE.findall(prompt)]
    texts = ["".join(group).strip() for group in groups]
    return [text for text in texts if _letters(text)]


def match(expected: Sequence[str], lines: Sequence[str]) -> list[Match]:
    """Find each text among the words of the lines that were read.

    A text is compared with runs of consecutive words, also across lines, of at most twice its length
    (a Chinese or Japanese character is a word). The pair that is most alike is taken first, of equals
    the longer one, and a word counts for one text only: the order of the texts does not matter.

    Capitals, spaces, quotation marks, and the forms of apostrophes, hyphens and wide characters do not
    matter either.
    """
    words = [word for line in lines for word in _WORD.findall(line) if _letters(word)]
    pairs = sorted(_pairs(expected, words), key=lambda pair: pair[:2], reverse=True)
    found: dict[int, Match] = {}
    used: set[int] = set()
    for accuracy, _, index, start, stop in pairs:
        if index not in found and used.isdisjoint(range(start, stop)):
            text = _BETWEEN_CJK.sub("", " ".join(words[start:stop]))
            found[index] = Match(expected[index], text, accuracy)
            used.update(range(start, stop))
    return [found.get(index, Match(text, "", 0.0)) for index, text in enumerate(expected)]


def character_accuracy(matches: Sequence[Match]) -> float:
    """Return the mean accuracy of texts, weighted by their numbers of characters."""
    lengths = [len(_letters(one.expected)) for one in matches]
    right = sum(one.accuracy * length for one, length in zip(matches, lengths, strict=True))
    return right / sum(lengths)


def flow_grpo_reward(prompt: str, lines: Sequence[str]) -> float | None:
    """Return flow_grpo's OCR reward, or None where it is not defined.

    The first text in straight quotation marks is its target: 1 if all that was read contains it,
    otherwise 1 - min(edit distance, length) / length; lower-cased and without spaces.
    """
    parts = prompt.split('"')
    target = parts[1].replace(" ", "").lower() if len(parts) > 1 else ""
    if not target:
        return None
    read = "".join(lines).replace(" ", "").lower()
    distance = 0 if target in read else min(edit_distance(read, target), len(target))
    return 1 - distance / len(target)


def edit_distance(first: str, second: str) -> int:
    """Return the least number of characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            nearest = min(diagonal + (left != right), row[j] + 1, row[j - 1] + 1)
            diagonal, row[j] = row[j], nearest
    return row[-1]


def _letters(text: str) -> str:
    """Return what of a text is compared."""
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_ALIKE)
    return "".join(folded.split())


def _pairs(expected: Sequence[str], words: Sequence[str]) -> list[tuple[float, int, int, int, int]]:
    """Return (accuracy, length, index of the text, first word, end) of what is alike at all."""
    compared = [_letters(word) for word in words]
    pairs = []
    for index, text in enumerate(map(_letters, expected)):
        for start in range(len(words)):
            run = ""
            for stop in range(start + 1, len(words) + 1):
                run += compared[stop - 1]
                if len(run) > 2 * len(text) and stop > start + 1:
                    break
                accuracy = 1 - edit_distance(run, text) / max(len(run), len(text))
                if accuracy > 0:
                    pairs.append((accuracy, len(text), index, start, stop))
    return pairs

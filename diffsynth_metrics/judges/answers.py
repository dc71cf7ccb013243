"""A judge's text in, numbers or a reason out; one reader per form of answer.

The readers share three ideas. A number counts where its label, perhaps with the scale, stands directly
before it. What stands around it may explain it, and not doubt or change it. A verdict is a whole
sentence. Of what cannot be read so, `problem` says why: nothing is guessed, and of values that
contradict each other none is taken.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffsynth_metrics.judges.checklists import read_checklist
from diffsynth_metrics.judges.engine import Answer
from diffsynth_metrics.judges.reading import (
    NUMBER,
    NoJson,
    Reading,
    Unreadable,
    because,
    check_lines,
    check_words,
    final_text,
    has_digit,
    json_object,
    may_precede,
    plain,
    plain_name,
    read_or_explain,
)
from diffsynth_metrics.judges.verdicts import find_verdicts

__all__ = [
    "READER",
    "Reading",
    "read_checklist",
    "read_labelled_scores",
    "read_pair_scores",
    "read_score_list",
    "read_winner",
]

READER = 2
"""Version of what is read in a text; raised whenever the same text may be read otherwise."""

_EXCERPT = 40
_IS = r" ?(?:[:=|]|-(?= )|is\b) ?"
# Behind a number: nothing, or a remark that cannot be part of it.
_REMARK = r"[\"']?(?P<remark> ?(?:$|[(|}\]]|[,;.!](?=[ \"'}]|$)|- ).*)"
_LIST = re.compile(
    rf"(?<![\w\\])(?P<key>[\"']?scores?[\"']?)(?: ?\([^()\n]*\))?[\"']?{_IS}\s?"
    rf"(?:\[(?P<items>[^\[\]]*)\]|(?P<pair>{NUMBER}(?: ?; ?|, | and ){NUMBER})(?![\w.]))?"
    r"(?P<rest>[^\n]*)",
    re.IGNORECASE,
)
_SCORE_BELOW = r"\W*(?:(?:the|my|final|overall|total) )*(?:score|rating)\b"
_IMAGE = r"(?<![^\W_])(?:edited[ _])?image[ _]?(?P<key>[0-9]+)(?:'s)?(?:[ _](?:score|rating)(?!\w))?"
_SCALE_OF_PAIRS = r"\((?:[^()0-9]*|(?:out of )?[0-9]+(?: ?(?:-|to) ?[0-9]+)?)\)"


@dataclass(frozen=True)
class _Mention:
    """A label in a text: whether a score may follow it, the rest of its line, and the lines below."""

    key: str
    is_label: bool
    line: str
    below: list[str]


def read_labelled_scores(
    answer: Answer, labels: Mapping[str, str], *, low: float, high: float
) -> Reading:
    """Read ``Alignment Score (1-5): 2.6947`` and the like, also as JSON or below a heading.

    Args:
        answer: What the model wrote.
        labels: Name of a value to its label, such as ``"Alignment Score"``.
        low: The lowest possible value.
        high: The highest possible value.
    """
    values: dict[str, float | None] = dict.fromkeys(labels)
    problems = []
    words = "|".join(label.replace(" ", "[ _]") for label in labels.values())
    scale, of = rf"\( ?{low:g} ?(?:-|to) ?{high:g} ?\)", rf" ?(?:/|(?:out )?of) ?{high:g}(?:\.0+)?"
    try:
        found = _mentions(rf"(?<![\w-])(?P<key>{words})(?!\w)", _whole_lines(answer))
    except Unreadable as error:
        return Reading(values, because(answer, [str(error)]))
    for name, label in labels.items():
        own = [mention for mention in found if mention.key.replace("_", " ") == label.casefold()]
        try:
            if not (scores := _scores(own, scale, of)):
                raise Unreadable(f"there is no {label}")
            score: float = _one(f"values of {label}", scores)
            values[name] = _in_range(score, low, high, label)
        except Unreadable as error:
            problems.append(str(error))
    return Reading(values, because(answer, problems))


def read_score_list(answer: Answer, names: Sequence[str], *, low: float, high: float) -> Reading:
    """Read ``{"reasoning": "...", "score": [20, 18]}``; the JSON around the list need not be valid.

    Where it is valid, its ``"score"`` is the score, and what the reasoning says is not.

    Args:
        answer: What the model wrote.
        names: What the numbers of the list are.
        low: The lowest possible value.
        high: The highest possible value.
    """

    def read() -> dict[str, Any]:
        text, _ = final_text(answer)
        try:
            value, rest = json_object(text)
        except NoJson:
            value = {"score": _one("lists of scores", [scores for _, scores in _lists(plain(text))])}
            rest = ""
        scores = _one("scores", [value[key] for key in value if plain_name(key) in ("score", "scores")])
        if not isinstance(scores, list) or not all(isinstance(score, float) for score in scores):
            raise Unreadable(f"its score is {str(scores)[:_EXCERPT]!r}, no list of numbers")
        if len(scores) != len(names):
            raise Unreadable(f"the list of scores has {len(scores)} numbers instead of {len(names)}")
        check_words(plain(rest), scores)
        reasoning = value.get("reasoning")
        return {
            **{
                name: _in_range(score, low, high, name)
                for name, score in zip(names, scores, strict=True)
            },
            "reasoning": reasoning if isinstance(reasoning, str) else None,
        }

    return read_or_explain(answer, [*names, "reasoning"], read)


def read_pair_scores(answer: Answer) -> Reading:
    """Read the scores of two images, any real numbers: ``Image 1: 2.5``, or ``Scores: [2.5, -1]``."""
    names = ("image_1_score", "image_2_score")

    def read() -> dict[str, float]:
        pair: list[float] = _one("pairs of scores", _pairs(_whole_lines(answer)))
        if len(pair) != len(names):
            raise Unreadable(f"there are {len(pair)} scores instead of two")
        return dict(zip(names, pair, strict=True))

    return read_or_explain(answer, names, read)


def read_winner(answer: Answer) -> Reading:
    """Read which of two images is better: ``winner`` is 1 or 2, or 0 where the text says a tie.

    A verdict is a sentence that says nothing else: "Edited image 1 is better in colour" is none.
    Verdicts must agree, or the last one must say that it is final, and after it nothing may change it.
    Where there is an ``<answer>``, only it counts, and may be a bare number.
    """

    def read() -> dict[str, int]:
        text, tagged = final_text(answer)
        if answer.finish == "length" and not tagged:
            raise Unreadable("there is no verdict that later words could not change")
        verdicts = find_verdicts(_LIST.sub(" ", plain(text)), bare=tagged)
        return {"winner": _one("verdicts", verdicts)}

    return read_or_explain(answer, ["winner"], read)


def _whole_lines(answer: Answer) -> str:
    """Return the plain answer without a last line that the limit of tokens may have cut."""
    text, _ = final_text(answer)
    return plain(text.rpartition("\n")[0] if answer.finish == "length" else text)


def _one(what: str, found: Sequence[Any]) -> Any:
    """Return the one distinct thing that was found."""
    different = {json.dumps(thing): thing for thing in found}
    if not different:
        raise Unreadable(f"there are no {what}")
    if len(different) > 1:
        raise Unreadable(f"there are different {what}: {' and '.join(list(different)[:3])}")
    return next(iter(different.values()))


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Unreadable("a number is too large")
    return number


def _in_range(value: float, low: float, high: float, name: str) -> float:
    if not low <= value <= high:
        raise Unreadable(f"{name} is {value:g}, outside {low:g} to {high:g}")
    return value


def _mentions(label: str, text: str) -> list[_Mention]:
    """Return the labels of a text with what follows each, up to the next one."""
    found = list(re.finditer(label, text, re.IGNORECASE))
    ends = [0, *(match.end() for match in found)]
    starts = [*(match.start() for match in found), len(text)]
    mentions = []
    for index, match in enumerate(found):
        line, *below = text[ends[index + 1] : starts[index + 1]].split("\n")
        is_label = may_precede(text[ends[index] : starts[index]])
        mentions.append(_Mention(match["key"].casefold(), is_label, line, below))
        check_lines(below)
    return mentions


def _scores(mentions: Sequence[_Mention], scale: str, of: str) -> list[float]:
    """Return the numbers behind labels or, below labels that are headings, alone or behind "Score:"."""
    opening = rf"[\"']?(?: ?{scale})?[\"']?"
    number = rf"[\"']?(?P<number>{NUMBER})(?:{of})?"
    scored = re.compile(rf"(?:{opening}|{_SCORE_BELOW}{opening}){_IS}{number}{_REMARK}", re.IGNORECASE)
    values, around = [], []
    for mention in mentions:
        found = scored.fullmatch(mention.line)
        heads = re.match(rf"{opening}(?: ?[:=|(]| ?- | ?$)", mention.line)
        if not mention.is_label or not (found or heads):
            around.append(mention.line)
            continue
        # Below a label that has its number, an overall score is that of everything.
        own = _SCORE_BELOW.replace("|overall|total", "") if found else _SCORE_BELOW
        lines = [line for line in mention.below if re.match(own, line, re.IGNORECASE)]
        forms = [scored.fullmatch(line) for line in lines if has_digit(line)]
        behind = mention.line[heads.end() :] if heads else ""
        if found or has_digit(behind) or re.search(r"\b(?:nan|inf|n/a)", behind, re.IGNORECASE):
            forms.append(found)
        elif alone := re.fullmatch(f"{number}(?P<remark>)", (mention.below or [""])[0]):
            forms.append(alone)
        for form in forms:
            if form is None:
                raise Unreadable(f"{(mention.key + mention.line)[:_EXCERPT]!r} has no single number")
            values.append(_number(form["number"]))
            around.append(form["remark"])
    if values:
        check_words("\n".join(around), values)
    return values


def _lists(text: str, *, strict: bool = True) -> Iterator[tuple[re.Match[str], list[float]]]:
    """Yield where a ``score: [20, 18]`` stands, and its numbers.

    In JSON that is not valid, only a key counts, and not what the reasoning says. Other scores are
    skipped, or an error with `strict`.
    """
    in_json = re.search(r"[\"']reasoning[\"'] ?: ?[\"']", text) is not None
    done = 0
    for found in _LIST.finditer(text):
        before, done = text[done : found.start()], found.end()
        if in_json and found["key"][0] not in "\"'":
            continue
        items = re.split(r",|;| and ", (found["pair"] or found["items"] or "").strip().rstrip(","))
        are_numbers = all(re.fullmatch(NUMBER, item.strip()) for item in items)
        if are_numbers and may_precede(before) and re.match(_REMARK, found["rest"]):
            scores = [_number(item) for item in items]
            check_words(found["rest"], scores)
            check_lines(text[done:].split("\n"))
            yield found, scores
        elif strict and has_digit(re.sub(r"\bscore[12]\b", "", found.group())):
            raise Unreadable(f"{found.group()[:_EXCERPT]!r} is no list of scores")


def _pairs(text: str) -> list[list[float]]:
    """Return the scores of both images, from labels that name them and from lists."""
    lists = list(_lists(text, strict=False))
    rest = text
    for found, _ in reversed(lists):
        rest = rest[: found.start()] + rest[found.end() :]
    mentions = _mentions(_IMAGE, rest)
    keys = dict.fromkeys(["1", "2", *(mention.key for mention in mentions)])
    values = {
        key: _scores([m for m in mentions if m.key == key], _SCALE_OF_PAIRS, "(?!)") for key in keys
    }
    if any(values.values()):
        named = [_one(f"scores of image {key}", found) for key, found in values.items()]
        return [named, *(scores for _, scores in lists)]
    if any(m.is_label and m.line.strip("\"' ") in ("", ":") for m in mentions):
        raise Unreadable("a list of scores stands below the name of one image")
    return [scores for _, scores in _lists(text)]

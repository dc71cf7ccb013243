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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffsynth_metrics.judges.engine import Answer
from diffsynth_metrics.judges.texts import (
    NUMBER,
    TAKES_BACK,
    NoJson,
    Unreadable,
    check_words,
    final_text,
    has_digit,
    json_object,
    may_precede,
    plain,
    plain_name,
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
class Reading:
    """What an answer says.

    Attributes:
        values: Name to value; None is what the answer does not say.
        problem: Why a value is None, or None where everything was read.
    """

    values: dict[str, Any]
    problem: str | None = None


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
        return Reading(values, _because(answer, [str(error)]))
    for name, label in labels.items():
        own = [mention for mention in found if mention.key.replace("_", " ") == label.casefold()]
        try:
            if not (scores := _scores(own, scale, of)):
                raise Unreadable(f"there is no {label}")
            score: float = _one(f"values of {label}", scores)
            values[name] = _in_range(score, low, high, label)
        except Unreadable as error:
            problems.append(str(error))
    return Reading(values, _because(answer, problems))


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

    return _reading(answer, [*names, "reasoning"], read)


def read_pair_scores(answer: Answer) -> Reading:
    """Read the scores of two images, any real numbers: ``Image 1: 2.5``, or ``Scores: [2.5, -1]``."""
    names = ("image_1_score", "image_2_score")

    def read() -> dict[str, float]:
        pair: list[float] = _one("pairs of scores", _pairs(_whole_lines(answer)))
        if len(pair) != len(names):
            raise Unreadable(f"there are {len(pair)} scores instead of two")
        return dict(zip(names, pair, strict=True))

    return _reading(answer, names, read)


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

    return _reading(answer, ["winner"], read)


def read_checklist(
    answer: Answer,
    *,
    level2_of: Mapping[str, str],
    rename: Mapping[str, str],
    score_map: Mapping[int, float],
) -> Reading:
    """Read ``{"Realism": {"Noise": {"score": 1}, ...}, ...}``, also without its outer level.

    Args:
        answer: What the model wrote after thinking.
        level2_of: Level-3 name to the level-2 name that it belongs to: the facets of the dimension.
            Another name counts only in the form that was asked for, an object with a score next to a
            facet in one of these level-2 objects, and counts there, as in the official code.
        rename: Level-3 names that the model is known to write for others.
        score_map: What 0, 1 and 2 are worth.

    Returns:
        ``"raw"``, level 2 to level 3 to 0, 1, 2 or None (not applicable), and ``"scores"``, the same
        with what they are worth.
    """

    def read() -> dict[str, Any]:
        text, tagged = final_text(answer)
        if answer.finish == "length" and not tagged and text == answer.text:
            raise Unreadable("it never came to its answer")
        value, rest = json_object(text)
        check_words(plain(rest), [])
        if has_digit(rest) or re.search(r"\bshould\b", rest, re.IGNORECASE):
            raise Unreadable(f"{rest.strip()[:_EXCERPT]!r} follows the JSON object, and may correct it")
        names = {plain_name(name): name for name in level2_of}
        names |= {plain_name(wrong): right for wrong, right in rename.items()}
        groups = {plain_name(name): name for name in level2_of.values()}
        raw: dict[str, dict[str, int | None]] = {}
        for level2, name, found in _facets(value, names, groups):
            group = raw.setdefault(level2_of.get(name, level2), {})
            score = _facet_score(name, found, score_map)
            if group.setdefault(name, score) != score:
                raise Unreadable(f"{name!r} has two scores")
        if not raw:
            raise Unreadable("it scores nothing")
        scores = {
            level2: {name: None if score is None else score_map[score] for name, score in group.items()}
            for level2, group in raw.items()
        }
        return {"raw": raw, "scores": scores}

    return _reading(answer, ["raw", "scores"], read)


def _reading(answer: Answer, names: Sequence[str], read: Callable[[], dict[str, Any]]) -> Reading:
    """Return what is read, or nothing and why."""
    try:
        return Reading(read())
    except Unreadable as error:
        return Reading(dict.fromkeys(names), _because(answer, [str(error)]))


def _because(answer: Answer, problems: list[str]) -> str | None:
    """Join the problems, and say where the limit of tokens is their likely cause."""
    if not problems:
        return None
    cut = "the answer was cut off by max_new_tokens: " if answer.finish == "length" else ""
    return cut + "; ".join(problems)


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
        for words in below:
            if re.search(TAKES_BACK, words, re.IGNORECASE):
                raise Unreadable(f"{words[:_EXCERPT]!r} may change the scores")
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
        lines = [
            line for line in mention.below if re.match(_SCORE_BELOW, line, re.I) and has_digit(line)
        ]
        forms = [scored.fullmatch(line) for line in lines]
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


def _facets(
    value: dict[str, Any], names: Mapping[str, str], groups: Mapping[str, str]
) -> Iterator[tuple[str, str, Any]]:
    """Yield level 2, the official name and the value of facets, also of facets without their level 2.

    A number or an object that could be a score and is no facet's is refused, because it is not clear
    what it stands for, except a number next to level-2 names, as in the official code.
    """
    is_flat = any(plain_name(name) in names and not _is_group(inner) for name, inner in value.items())
    for level2, inner in value.items():
        members = inner if _is_group(inner) else {level2: inner}
        if _is_group(inner) and not any(plain_name(name) in names for name in members):
            raise Unreadable(f"{level2!r} has no facet of the dimension")
        group = groups.get(plain_name(level2)) if _is_group(inner) else None
        for name, found in members.items():
            known = names.get(plain_name(name))
            is_scored = isinstance(found, dict) and "score" in found
            if known or (group and is_scored and not re.search(r"(?i)overall|total|summ|aver", name)):
                yield group or level2, known or name, found
            elif isinstance(found, dict) or ((group or is_flat) and not _is_note(found)):
                raise Unreadable(f"{name!r} is no facet of the dimension")


def _is_group(value: Any) -> bool:
    return isinstance(value, dict) and "score" not in value


def _is_note(value: Any) -> bool:
    """Whether a value is a remark that nobody takes for a score."""
    return value is None or (isinstance(value, str) and not has_digit(value))


def _facet_score(name: str, value: Any, score_map: Mapping[int, float]) -> int | None:
    if isinstance(value, dict):
        if "score" not in value or any(isinstance(part, dict) for part in value.values()):
            raise Unreadable(f"{name!r} has no single score")
        value = value["score"]
    if value is None or (isinstance(value, str) and value.strip().upper() in ("N/A", "NA")):
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]", value.strip()):
        value = float(value)
    if not isinstance(value, float) or value not in score_map:
        shown = f"{value:g}" if isinstance(value, float) else str(value)[:_EXCERPT]
        raise Unreadable(f"{name!r} has the score {shown!r}, not 0, 1, 2 or N/A")
    return int(value)

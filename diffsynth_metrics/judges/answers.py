"""A judge's text in, numbers or a reason out; one reader per form of answer.

A reader accepts a number only where the text says unambiguously what it is the number of. What it
cannot read is None, and `problem` says why; it never guesses, averages what is left, or takes the first
of several contradicting numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffsynth_metrics.judges.engine import Answer

__all__ = [
    "Reading",
    "read_checklist",
    "read_labelled_scores",
    "read_pair_scores",
    "read_score_list",
    "read_winner",
]

_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
# What follows a number that is only part of one: more of it, a unit, a fraction, a range.
_PART = r"(?![\w%]|\.[0-9]|\s*/|\s*[-–—~]\s*[0-9]|\s+(?:to|or)\s+[0-9])"
_EXCERPT = 40


@dataclass(frozen=True)
class Reading:
    """What an answer says.

    Attributes:
        values: Name to value; None is what the answer does not say.
        problem: Why a value is None, or None where everything was read.
    """

    values: dict[str, Any]
    problem: str | None = None


class _Unreadable(Exception):
    """Carries the reason from where it is found to the end of a reader."""


def read_labelled_scores(
    answer: Answer, labels: Mapping[str, str], *, low: float, high: float
) -> Reading:
    """Read lines such as ``Alignment Score (1-5): 2.6947``.

    Args:
        answer: What the model wrote.
        labels: Name of a value to its label, such as ``"Alignment Score"``.
        low: The lowest possible value.
        high: The highest possible value.
    """
    values: dict[str, float | None] = dict.fromkeys(labels)
    problems = []
    try:
        text = _whole_lines(answer)
    except _Unreadable as error:
        return Reading(values, str(error))
    for name, label in labels.items():
        try:
            values[name] = _in_range(_labelled(text, label, list(labels.values())), low, high, label)
        except _Unreadable as error:
            problems.append(str(error))
    return Reading(values, _because(answer, problems))


def read_score_list(answer: Answer, names: Sequence[str], *, low: float, high: float) -> Reading:
    """Read ``{"reasoning": "...", "score": [20, 18]}``; the JSON around the list need not be valid.

    Args:
        answer: What the model wrote.
        names: What the numbers of the list are.
        low: The lowest possible value.
        high: The highest possible value.
    """
    values: dict[str, Any] = dict.fromkeys([*names, "reasoning"])
    try:
        text = _after_thinking(answer)
        scores = _one("lists of scores", _score_lists(text, len(names)))
        for name, score in zip(names, scores, strict=True):
            _in_range(score, low, high, name)
        values |= dict(zip(names, scores, strict=True))
    except _Unreadable as error:
        return Reading(values, _because(answer, [str(error)]))
    values["reasoning"] = _reasoning(text)
    return Reading(values)


def read_pair_scores(answer: Answer) -> Reading:
    """Read the scores of two images, any real numbers: ``Image 1: 2.5``, or ``Scores: [2.5, -1]``."""
    names = ("image_1_score", "image_2_score")
    try:
        text = _whole_lines(answer)
        found = [*_score_lists(text, 2), *_listed_scores(text), *_labelled_pair(text)]
        pair = _one("pairs of scores", found)
        return Reading(dict(zip(names, (_finite(score) for score in pair), strict=True)))
    except _Unreadable as error:
        return Reading(dict.fromkeys(names), _because(answer, [str(error)]))


def read_winner(answer: Answer) -> Reading:
    """Read which of two images is better: ``winner`` is 1 or 2, or 0 where the text says a tie.

    A verdict that is denied or conditional decides nothing, and neither do verdicts that contradict each
    other. Where there is an ``<answer>``, only it counts.
    """
    try:
        text = _after_thinking(answer)
        tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
        if answer.finish == "length" and not tagged:
            raise _Unreadable("there is no verdict that later words could not change")
        clauses = re.split(
            r"[.!?;\n]+|,\s*(?:but|while|whereas|although|though)\b", tagged[-1] if tagged else text
        )
        verdicts = [verdict for clause in clauses for verdict in _verdicts(clause)]
        return Reading({"winner": _one("verdicts", verdicts)})
    except _Unreadable as error:
        return Reading({"winner": None}, _because(answer, [str(error)]))


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
        level2_of: Level-3 name to the level-2 name that it belongs to.
        rename: Level-3 names that the model is known to write for others.
        score_map: What 0, 1 and 2 are worth.

    Returns:
        ``"raw"``, level 2 to level 3 to 0, 1, 2 or None (not applicable), and ``"scores"``, the same
        with what they are worth.
    """
    try:
        text = _after_thinking(answer)
        if answer.finish == "length" and text is answer.text:
            raise _Unreadable("it never came to its answer")
        raw: dict[str, dict[str, int | None]] = {}
        for level2, level3, value in _facets(_json_object(text)):
            level3 = rename.get(level3, level3)
            group = raw.setdefault(level2_of.get(level3, level2 or level3), {})
            score = _facet_score(level3, value, score_map)
            if group.setdefault(level3, score) != score:
                raise _Unreadable(f"{level3!r} has two scores")
        if not raw:
            raise _Unreadable("it scores nothing")
    except _Unreadable as error:
        return Reading({"raw": None, "scores": None}, _because(answer, [str(error)]))
    scores = {
        level2: {name: None if score is None else score_map[score] for name, score in group.items()}
        for level2, group in raw.items()
    }
    return Reading({"raw": raw, "scores": scores})


def _because(answer: Answer, problems: list[str]) -> str | None:
    """Join the problems, and say where the limit of tokens is their likely cause."""
    if not problems:
        return None
    cut = "the answer was cut off by max_new_tokens: " if answer.finish == "length" else ""
    return cut + "; ".join(problems)


def _after_thinking(answer: Answer) -> str:
    """Return what follows the model's thinking, in which it may have tried other answers."""
    if "</think>" in answer.text:
        return answer.text.rpartition("</think>")[2]
    if "<think>" in answer.text:
        raise _Unreadable("it never stopped thinking")
    return answer.text


def _whole_lines(answer: Answer) -> str:
    """Return the answer without emphasis, and without a last line that the limit may have cut."""
    text = _after_thinking(answer)
    if answer.finish == "length":
        text = text.rpartition("\n")[0]
    return re.sub(r"[*`]", "", text)


def _one(what: str, found: Sequence[Any]) -> Any:
    """Return the one distinct thing that was found."""
    different = {json.dumps(thing): thing for thing in found}
    if not different:
        raise _Unreadable(f"there are no {what}")
    if len(different) > 1:
        raise _Unreadable(f"there are different {what}: {' and '.join(list(different)[:3])}")
    return next(iter(different.values()))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise _Unreadable("a number is too large")
    return value


def _in_range(value: float, low: float, high: float, name: str) -> float:
    if not low <= value <= high:
        raise _Unreadable(f"{name} is {value:g}, outside {low:g} to {high:g}")
    return value


def _labelled(text: str, label: str, labels: Sequence[str]) -> float:
    """Return the one number that stands behind a label, up to the next label or line."""
    others = "|".join(map(re.escape, labels))
    pattern = rf"{re.escape(label)}[\"']?\s*(?:\([^()\n]*\))?\s*[:：=]((?:(?!{others})[^\n])*)"
    values: list[float] = []
    rest = None
    for found in re.finditer(pattern, text, re.IGNORECASE):
        rest = found.group(1).strip()
        # Words may follow the number, but no other number that could be the one that is meant.
        number = re.match(rf"({_NUMBER})(?:\s*/\s*5(?:\.0)?(?![0-9.]))?{_PART}[^0-9]*$", rest)
        if number:
            values.append(_finite(float(number.group(1))))
        elif re.match(r"[-+]?(nan|inf)", rest, re.IGNORECASE):
            raise _Unreadable(f"{label} is {rest[:_EXCERPT]!r}")
    if not values and rest is not None:
        raise _Unreadable(f"{label} is {rest[:_EXCERPT]!r}, no single number")
    if not values:
        raise _Unreadable(f"there is no {label}")
    value: float = _one(f"values of {label}", values)
    return value


def _score_lists(text: str, count: int) -> list[list[float]]:
    """Return the numbers of each ``"score": [...]``."""
    lists = []
    for found in re.finditer(
        r"(?<![\w\\])[\"']?scores?[\"']?\s*[:=]\s*\[([^\[\]]*)\]", text, re.IGNORECASE
    ):
        items = [item.strip() for item in found.group(1).rstrip(", \n").split(",")]
        if not all(re.fullmatch(_NUMBER, item) for item in items):
            continue  # the form that the prompt shows, or words
        if len(items) != count:
            raise _Unreadable(f"the list of scores has {len(items)} numbers instead of {count}")
        lists.append([_finite(float(item)) for item in items])
    return lists


def _listed_scores(text: str) -> list[list[float]]:
    """Return the numbers of lines such as ``Scores: 2.5, 1.5``."""
    pattern = rf"^\s*scores?\s*[:：=]\s*({_NUMBER})\s*(?:,|;|and)\s*({_NUMBER})\s*\.?\s*$"
    pairs = re.findall(pattern, text, re.IGNORECASE | re.MULTILINE)
    return [[float(first), float(second)] for first, second in pairs]


def _labelled_pair(text: str) -> list[list[float]]:
    """Return the numbers behind ``Image 1`` and ``Image 2``, where there are such."""
    pattern = (
        r"\bimage[\s_]*([12])(?![0-9])(?:'s)?[\s_]*(?:score)?[\"']?\s*(?:\([^()\n]*\))?"
        rf"(?:\s*[:：=]\s*|\s+[-–—]\s+)({_NUMBER}){_PART}"
    )
    values: dict[str, list[float]] = {"1": [], "2": []}
    for image, number in re.findall(pattern, text, re.IGNORECASE):
        values[image].append(float(number))
    if not any(values.values()):
        return []
    return [[_one(f"scores of image {image}", values[image]) for image in ("1", "2")]]


_BETTER = r"(?:better|best|superior|preferred|preferable|(?:the\s+)?winner)"
_IMAGE = r"(?:edited\s+)?image\s*([12])(?![0-9])"
_DEGREE = r"(?:\s+(?:clearly|much|slightly|significantly|overall|generally|the|a|an))*"
_VERDICT = (
    rf"\b{_IMAGE}\s+is{_DEGREE}\s+{_BETTER}\b",
    rf"\b{_IMAGE}\s+wins\b",
    rf"\b(?:better|best|preferred|superior|winning)(?:\s+(?:one|image|edit|edited\s+image|result))?"
    rf"\s*(?:is|:)\s*(?:the\s+)?{_IMAGE}",
    rf"\bwinner\s*(?:is|:)\s*{_IMAGE}",
    rf"\bprefer\s+{_IMAGE}",
)
_TIE = (
    r"\bequally\s+(?:good|well|bad|successful)\b",
    r"\bimages?\s+(?:[12]\s+and\s+(?:edited\s+)?(?:image\s+)?[12]\s+)?are\s+(?:tied|equal|equivalent)\b",
    r"^\W*(?:it\s+is\s+|it's\s+)?(?:a\s+)?(?:tie|draw)\W*$",
)
# Before a verdict these deny it; anywhere in its clause the others make it conditional or a question.
_DENIED = r"\b(?:not|no|neither|nor|never|hardly|cannot|would|could|might|may)\b|n['’]t\b"
_OPEN = r"\b(?:if|unless|whether)\b|\bor\s+(?:edited\s+)?image\b"


def _verdicts(clause: str) -> list[int]:
    """Return who wins by a clause: 1, 2 or 0 for a tie; nothing where it says none or denies one."""
    clause = re.sub(r"[*`\"]", "", clause)
    if re.search(_OPEN, clause, re.IGNORECASE):
        return []
    verdicts = []
    for pattern in (*_VERDICT, *_TIE):
        for found in re.finditer(pattern, clause, re.IGNORECASE):
            if not re.search(_DENIED, clause[: found.start()], re.IGNORECASE):
                verdicts.append(0 if pattern in _TIE else int(found.group(1)))
    return verdicts


def _reasoning(text: str) -> str | None:
    try:
        reasoning = _json_object(text).get("reasoning")
    except _Unreadable:
        return None
    return reasoning if isinstance(reasoning, str) else None


def _json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that starts at the first brace; only blanks or a fence may follow it."""
    # The form that the prompts show has a comma before the closing brace.
    text = re.sub(
        r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', lambda m: m.group(1) or "", text, flags=re.DOTALL
    )
    start = text.find("{")
    if start < 0:
        raise _Unreadable("there is no JSON object")
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_without_contradiction)
    try:
        value, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"its JSON is not valid: {str(error)[:_EXCERPT]}") from error
    if "{" in text[end:]:
        raise _Unreadable("there is more than one JSON object")
    result: dict[str, Any] = value
    return result


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if result.setdefault(key, value) != value:
            raise _Unreadable(f"{key!r} has two values")
    return result


def _facets(value: dict[str, Any]) -> list[tuple[str | None, str, Any]]:
    """Return level 2 (None where it is left out), level 3 and value of everything that is scored."""
    facets: list[tuple[str | None, str, Any]] = []
    for name, inner in value.items():
        if not isinstance(inner, dict) or "score" in inner:
            facets.append((None, name, inner))
        else:
            facets += [(name, level3, score) for level3, score in inner.items()]
    return facets


def _facet_score(name: str, value: Any, score_map: Mapping[int, float]) -> int | None:
    if isinstance(value, dict):
        if "score" not in value:
            raise _Unreadable(f"{name!r} has no score")
        value = value["score"]
    if value is None or (isinstance(value, str) and value.strip().upper() in ("N/A", "NA")):
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]", value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in score_map:
        raise _Unreadable(f"{name!r} has the score {str(value)[:_EXCERPT]!r}, not 0, 1, 2 or N/A")
    return int(value)

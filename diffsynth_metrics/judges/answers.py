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
from typing import Any, NamedTuple

from diffsynth_metrics.judges.engine import Answer
from diffsynth_metrics.judges.reading import (
    NO_SCORES,
    NUMBER,
    NoJson,
    Reading,
    Unreadable,
    because,
    check_scale,
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

READER = 4
"""Version of what is read in a text; raised whenever the same text may be read otherwise."""

_EXCERPT = 40
_IS = r" ?(?:[:=|]|-(?= )|is\b) ?"
# Behind a value: nothing, or a remark that cannot be part of it.
_REMARK = r"[\"']?(?P<remark> ?(?:$|[(|}\]]|[,;.!](?=[ \"'}]|$)|- ).*)"
_SCORE_BELOW = r"\W*(?:(?:the|my|final|overall|total) )*(?:score|rating)\b"
_LIST = rf"\[ ?{NUMBER}(?: ?, ?{NUMBER})* ?,? ?\]|{NUMBER}(?: ?; ?|, | and ){NUMBER}(?![\w.])"
_IMAGE = r"(?<![^\W_])(?:edited[ _])?image[ _]?(?P<key>[0-9]+)(?:'s)?(?:[ _](?:score|rating)(?!\w))?"
_SUMS_UP = re.compile(r"overall|total|summ|aver|final|score|rating|\bmean\b", re.IGNORECASE)
_ANY_SCALE = rf"\((?![^()]*{NO_SCORES})(?:[^()0-9]*|(?:out of )?[0-9]+(?: ?(?:-|to) ?[0-9]+)?)\)"


class _Label(NamedTuple):
    """A label in a text: whether a value may follow it, the rest of its line, and the lines below."""

    key: str
    may_have_value: bool
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
    scale, of = rf"\( ?{low:g} ?(?:-|to) ?{high:g} ?\)", rf"(?: ?(?:/|(?:out )?of) ?{high:g}(?:\.0+)?)?"
    try:
        text = _whole_lines(answer)
        check_scale(text, low, high)
        found = _labels(rf"(?<![\w-])(?P<key>{words})(?!\w)", text)
    except Unreadable as error:
        return Reading(values, because(answer, [str(error)]))
    for name, label in labels.items():
        own = [one for one in found if one.key.replace("_", " ") == label.casefold()]
        try:
            if not (scores := _values(own, scale, NUMBER, of)):
                raise Unreadable(f"there is no {label}")
            score = _one(f"values of {label}", scores)[0]
            said = (
                rf"\b{label.split()[0]}(?: score)?[ :=]{{1,3}}({NUMBER})(?= ?(?:$|[,;|)]|\.(?![0-9])))"
            )
            for number in re.findall(said, text, re.IGNORECASE | re.MULTILINE):
                _one(f"values of {label}", [score, float(number)])
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
        check_scale(plain(text), low, high)
        try:
            value, rest = json_object(text)
        except NoJson:
            value, rest = {"score": _one("lists of scores", _lists(plain(text)))}, ""
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
        text = _whole_lines(answer)
        check_scale(text)
        labels = _labels(_IMAGE, text)
        keys = dict.fromkeys(["1", "2", *(label.key for label in labels)])
        found = {key: _values([one for one in labels if one.key == key], _ANY_SCALE) for key in keys}
        if any(found.values()):
            pair = [_one(f"scores of image {key}", scores)[0] for key, scores in found.items()]
        else:
            pair = _one("pairs of scores", _lists(text))
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
        return {"winner": _one("verdicts", find_verdicts(plain(text), bare=tagged))}

    return read_or_explain(answer, ["winner"], read)


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
    names = {plain_name(name): name for name in level2_of}
    names |= {plain_name(wrong): right for wrong, right in rename.items()}
    groups = {plain_name(name): name for name in level2_of.values()}

    def read() -> dict[str, Any]:
        text, tagged = final_text(answer)
        if answer.finish == "length" and not tagged and text == answer.text:
            raise Unreadable("it never came to its answer")
        value, rest = json_object(text)
        check_scale(plain(text), min(score_map), max(score_map))
        check_words(plain(rest), [])
        if has_digit(rest) or re.search(r"\bshould\b", rest, re.IGNORECASE):
            raise Unreadable(f"{rest.strip()[:_EXCERPT]!r} follows the JSON object, and may correct it")
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

    return read_or_explain(answer, ["raw", "scores"], read)


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


def _in_range(value: float, low: float, high: float, name: str) -> float:
    if not low <= value <= high:
        raise Unreadable(f"{name} is {value:g}, outside {low:g} to {high:g}")
    return value


def _labels(label: str, text: str) -> list[_Label]:
    """Return the labels of a text with what follows each, up to the next one."""
    found = list(re.finditer(label, text, re.IGNORECASE))
    heading = (text[: found[0].start()] if found else "").rstrip("{\"'#-\n ").rpartition("\n")[2]
    if heading.endswith(":") and re.search(NO_SCORES, heading, re.IGNORECASE):
        raise Unreadable(f"{heading[:_EXCERPT]!r} is no heading of scores")
    starts, ends = [match.start() for match in found], [match.end() for match in found]
    labels = []
    for match, done, until in zip(found, [0, *ends], [*starts[1:], len(text)], strict=False):
        line, *below = text[match.end() : until].split("\n")
        check_words("\n".join(below))
        may_have_value = may_precede(text[done : match.start()])
        labels.append(_Label(match["key"].casefold(), may_have_value, line, below))
    return labels


def _values(
    labels: Sequence[_Label], scale: str, value: str = NUMBER, of: str = ""
) -> list[list[float]]:
    """Return the numbers of each value behind a label, or below one that is a heading.

    Args:
        labels: Labels of one kind.
        scale: What may stand between label and value.
        value: A number, or a list of numbers.
        of: What may stand behind it.

    Raises:
        Unreadable: What stands there could be a value and is not clearly one, or is taken back.
    """
    opening = rf"[\"']?(?: ?{scale})?[\"']?"
    value = rf"[\"']?(?P<value>{value}){of}"
    form = re.compile(rf"(?:{opening}|{_SCORE_BELOW}{opening}){_IS}{value}{_REMARK}", re.IGNORECASE)
    values, around = [], []
    for label in labels:
        found = form.fullmatch(label.line)
        heads = re.match(rf"{opening}(?: ?[:=|(]| ?- | ?$)", label.line)
        if not label.may_have_value or not (found or heads):
            around.append(label.line)
            continue
        # Below a label that has its value, an overall score is that of everything.
        below = _SCORE_BELOW.replace("|overall|total", "") if found else _SCORE_BELOW
        lines = [line for line in label.below if re.match(below, line, re.IGNORECASE)]
        forms = [form.fullmatch(line) for line in lines if has_digit(line)]
        behind = label.line[heads.end() :] if heads else ""
        if found or has_digit(behind) or re.search(r"\b(?:nan|inf|n/a)", behind, re.IGNORECASE):
            forms.append(found)
        elif alone := re.fullmatch(f"{value}(?P<remark>)", (label.below or [""])[0]):
            forms.append(alone)
        for one in forms:
            if one is None:
                raise Unreadable(f"{(label.key + label.line)[:_EXCERPT]!r} has no single value")
            values.append([float(number) for number in re.findall(NUMBER, one["value"])])
            around.append(one["remark"])
    if any(not math.isfinite(number) for numbers in values for number in numbers):
        raise Unreadable("a number is too large")
    if values:
        check_words("\n".join(around), [number for numbers in values for number in numbers])
    return values


def _lists(text: str) -> list[list[float]]:
    """Return the lists behind "score:"; in JSON that is not valid, only those behind a key."""
    text = re.sub(r"\[[^\[\]]*\]", lambda found: found.group().replace("\n", " "), text)
    in_json = re.search(r"[\"']reasoning[\"'] ?: ?[\"']", text)
    label = r"[\"'](?P<key>scores?)(?=[\"']| ?\()" if in_json else r"(?<![\w\\])(?P<key>scores?)(?!\w)"
    return _values(_labels(label, text), _ANY_SCALE, _LIST)


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
            sums_up = plain_name(name) == plain_name(level2) or _SUMS_UP.search(name)
            if known or (group and is_scored and not sums_up):
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

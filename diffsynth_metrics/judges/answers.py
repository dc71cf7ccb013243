"""A judge's text in, numbers or a reason out; one reader per form of answer.

A reader accepts a number only where the text says unambiguously what it is the number of. What it
cannot read is None, and `problem` says why; it never guesses, averages what is left, or takes the first
of several contradicting numbers. So the forms that are accepted are spelled out here, and everything
else that holds a number where a score could be is refused.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffsynth_metrics.judges.engine import Answer

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
# Blanks within a line. No two of these stand side by side in a pattern: that would take quadratic time.
_BLANKS = r"[^\S\n]*"
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
# What may follow a number: nothing, or a comment that cannot be part of the number.
_COMMENT = rf"{_BLANKS}(?:(?:[(|}}]|[,;.](?=\s|$)|(?<=\s)[-–—](?=\s))(?P<comment>[^\n]*))?"
_NUMBER_WORD = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|half|quarter|third)\b", re.IGNORECASE
)


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


class _NoJson(_Unreadable):
    """There is no JSON object, or it is not valid."""


def read_labelled_scores(
    answer: Answer, labels: Mapping[str, str], *, low: float, high: float
) -> Reading:
    """Read lines such as ``Alignment Score (1-5): 2.6947``, also with ``/5`` behind the number.

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
        return Reading(values, _because(answer, [str(error)]))
    found = _labelled(text, list(labels.values()), low, high)
    for name, label in labels.items():
        try:
            values[name] = _in_range(_labelled_score(label, found[label]), low, high, label)
        except _Unreadable as error:
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
    values: dict[str, Any] = dict.fromkeys([*names, "reasoning"])
    try:
        scores, reasoning = _scores_and_reasoning(_after_thinking(answer), len(names))
        for name, score in zip(names, scores, strict=True):
            _in_range(score, low, high, name)
    except _Unreadable as error:
        return Reading(values, _because(answer, [str(error)]))
    return Reading(dict(zip(names, scores, strict=True)) | {"reasoning": reasoning})


def read_pair_scores(answer: Answer) -> Reading:
    """Read the scores of two images, any real numbers: ``Image 1: 2.5``, or ``Scores: [2.5, -1]``."""
    names = ("image_1_score", "image_2_score")
    try:
        pair = _pair(_whole_lines(answer))
        return Reading(dict(zip(names, pair, strict=True)))
    except _Unreadable as error:
        return Reading(dict.fromkeys(names), _because(answer, [str(error)]))


def read_winner(answer: Answer) -> Reading:
    """Read which of two images is better: ``winner`` is 1 or 2, or 0 where the text says a tie.

    A verdict is a sentence that says nothing else, see ``_VERDICTS``: "Edited image 1 is better in
    colour" is none. Verdicts must agree, and after the last one nothing may change it. Where there is
    an ``<answer>``, only it counts.
    """
    try:
        text = _after_thinking(answer)
        tagged = _tagged(text)
        if answer.finish == "length" and not tagged:
            raise _Unreadable("there is no verdict that later words could not change")
        return Reading({"winner": _winner("\n".join(tagged) if tagged else text)})
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
        level2_of: Level-3 name to the level-2 name that it belongs to: the facets of the dimension.
            Another name counts only in the form that was asked for, an object with a score inside a
            level-2 object, and counts there, as in the official code.
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
        facets = {name.casefold(): name for name in level2_of}
        facets |= {wrong.casefold(): right for wrong, right in rename.items()}
        raw: dict[str, dict[str, int | None]] = {}
        for level2, name, value in _facets(_json_object(text), facets):
            group = raw.setdefault(level2_of.get(name, level2), {})
            score = _facet_score(name, value, score_map)
            if group.setdefault(name, score) != score:
                raise _Unreadable(f"{name!r} has two scores")
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
    return _without_emphasis(text)


def _without_emphasis(text: str) -> str:
    """Put blanks in place of asterisks and the like, so that digits on both sides stay apart."""
    return re.sub(r"[*`]", " ", text)


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
        raise _Unreadable("a number is too large, or is none")
    return value


def _in_range(value: float, low: float, high: float, name: str) -> float:
    if not low <= value <= high:
        raise _Unreadable(f"{name} is {value:g}, outside {low:g} to {high:g}")
    return value


def _has_digit(text: str) -> bool:
    """Whether a text has a digit of any script, a fraction such as ½, or the like."""
    return any(unicodedata.category(character)[0] == "N" for character in text)


def _follows_a_word(before: str) -> bool:
    """Whether what stands before a label makes it part of a sentence."""
    return before.rpartition("\n")[2].rstrip()[-1:].isalpha()


def _in_lines(label: str, text: str) -> Iterator[tuple[re.Match[str], bool, str]]:
    """Yield each label, whether it follows a word, and what is behind it: to the next label or line."""
    found = list(re.finditer(label, text, re.IGNORECASE))
    ends = [0, *(match.end() for match in found)]
    starts = [*(match.start() for match in found), len(text)]
    for i, match in enumerate(found):
        before, behind = text[ends[i] : starts[i]], text[ends[i + 1] : starts[i + 1]]
        yield match, _follows_a_word(before), behind.partition("\n")[0]


def _number_in(form: str, rest: str) -> float | None:
    """Return the number of what follows a label, or None where it does not have the form."""
    found = re.fullmatch(form + _COMMENT, rest.strip(), re.IGNORECASE)
    comment = (found and found["comment"]) or ""
    if found is None or _has_digit(comment) or _NUMBER_WORD.search(comment):
        return None
    return float(found["number"])


def _labelled(
    text: str, labels: Sequence[str], low: float, high: float
) -> dict[str, list[tuple[str, float | None]]]:
    """Return what follows each label and its scale, with the number where it is a single one."""
    scale = rf"\({_BLANKS}{low:g}{_BLANKS}(?:[-–—]|to){_BLANKS}{high:g}{_BLANKS}\)"
    form = rf"[:：=]{_BLANKS}(?P<number>{_NUMBER})(?:{_BLANKS}/{_BLANKS}{high:g}(?:\.0+)?)?"
    words = "|".join(r"[^\S\n]+".join(map(re.escape, label.split())) for label in labels)
    named = {label.casefold(): label for label in labels}
    found: dict[str, list[tuple[str, float | None]]] = {label: [] for label in labels}
    for match, in_sentence, rest in _in_lines(rf"(?<![\w-])(?:{words})(?!\w)", text):
        label = named[" ".join(match.group().casefold().split())]
        rest = re.sub(rf"^[\"']?{_BLANKS}(?:{scale})?", "", rest).strip()
        found[label].append((rest, None if in_sentence else _number_in(form, rest)))
    return found


def _labelled_score(label: str, found: list[tuple[str, float | None]]) -> float:
    """Return the one number that stands behind a label."""
    for rest, value in found:
        if value is None and (_has_digit(rest) or re.search(r"\b(?:nan|inf)", rest, re.IGNORECASE)):
            raise _Unreadable(f"{label} is {rest[:_EXCERPT]!r}, no single number")
    values = [value for _, value in found if value is not None]
    if found and not values:
        raise _Unreadable(f"{label} is {found[-1][0][:_EXCERPT]!r}, no single number")
    if not values:
        raise _Unreadable(f"there is no {label}")
    only: float = _one(f"values of {label}", values)
    return only


def _scores_and_reasoning(text: str, count: int) -> tuple[list[float], str | None]:
    """Return the numbers of the one list of scores, and the reasoning where the JSON is valid."""
    try:
        value = _json_object(text)
    except _NoJson:
        scores: list[float] = _one("lists of scores", _score_lists(text, count))
        return scores, None
    score, reasoning = value.get("score"), value.get("reasoning")
    if not isinstance(score, list) or not all(isinstance(number, float) for number in score):
        raise _Unreadable(f"its score is {str(score)[:_EXCERPT]!r}, no list of numbers")
    return _counted(score, count), reasoning if isinstance(reasoning, str) else None


def _counted(scores: list[float], count: int) -> list[float]:
    if len(scores) != count:
        raise _Unreadable(f"the list of scores has {len(scores)} numbers instead of {count}")
    return [_finite(score) for score in scores]


_SCORE = r"(?<![\w\\])(?:(?:output|final)[^\S\n]+)?[\"']?scores?[\"']?\s*[:：=]"
_LIST = r"\s*(?P<list>\[[^\[\]]*\])"
_TWO = rf"({_NUMBER})(?:{_BLANKS};{_BLANKS}|,[^\S\n]+|[^\S\n]+and[^\S\n]+)({_NUMBER}){_BLANKS}\.?"


def _score_lists(text: str, count: int, *, bare_pairs: bool = False) -> list[list[float]]:
    """Return the numbers of each ``"score": [...]``, and on request of each ``Scores: 2.5, 1.5``."""
    lists = []
    done = 0
    for found in re.finditer(rf"{_SCORE}(?:{_LIST})?(?P<rest>[^\n]*)", text, re.IGNORECASE):
        in_sentence = _follows_a_word(text[done : found.start()])
        done = found.end()
        numbers = _listed(found["list"], found["rest"], bare_pairs=bare_pairs)
        if numbers and not in_sentence:
            lists.append(_counted([float(number) for number in numbers], count))
        elif _has_digit(re.sub(r"\bscore[12]\b", "", found.group())):  # the form that the prompt shows
            raise _Unreadable(f"{found.group()[:_EXCERPT]!r} is no list of {count} numbers")
    return lists


def _listed(inner: str | None, rest: str, *, bare_pairs: bool) -> Sequence[str] | None:
    """Return the numbers of a list in brackets, with none behind it, or of a pair without brackets."""
    if inner is None:
        pair = re.fullmatch(_TWO, rest.strip(), re.IGNORECASE)
        return pair.groups() if pair and bare_pairs else None
    items = [item.strip() for item in inner[1:-1].rstrip(", \n").split(",")]
    numeric = all(re.fullmatch(_NUMBER, item) for item in items)
    return items if numeric and not _has_digit(rest) else None


_OF_IMAGE = (
    r"(?:\bscores?[^\S\n]+(?:of|for)[^\S\n]+)?(?:\bthe[^\S\n]+)?(?:(?<![^\W_])edited(?:_|[^\S\n])+)?"
    r"(?<![^\W_])image(?:_|[^\S\n])*(?P<image>[12])(?![0-9])(?:['’]s)?(?:(?:_|[^\S\n])*score(?!\w))?[\"']?"
)
# A scale that does not say what the number means is no part of the form: any number is possible.
_SCALE = r"(?:\((?:after applying the instruction|out of [0-9]+)\)[^\S\n]*)?"
_IS = rf"{_SCALE}(?:[:：=]|[-–—](?=[^\S\n]))"


def _pair(text: str) -> list[float]:
    """Return the scores of both images, from lines that name them or from a list."""
    values: dict[str, list[float]] = {"1": [], "2": []}
    is_heading = False
    for found, in_sentence, rest in _in_lines(_OF_IMAGE, text):
        value = None if in_sentence else _number_in(rf"{_IS}{_BLANKS}(?P<number>{_NUMBER})", rest)
        labels = not in_sentence and re.match(_IS, rest.strip(), re.IGNORECASE) is not None
        if value is not None:
            values[found["image"]].append(_finite(value))
        elif _has_digit(rest if labels else _without_lists(rest)):
            raise _Unreadable(f"{(found.group() + rest)[:_EXCERPT]!r} has no single number")
        else:
            is_heading = is_heading or labels
    pairs = []
    if any(values.values()):
        pairs.append([_one(f"scores of image {image}", found) for image, found in values.items()])
    lists = _score_lists(re.sub(_OF_IMAGE, "\n", text, flags=re.IGNORECASE), 2, bare_pairs=True)
    if lists and not pairs and is_heading:
        raise _Unreadable("a list of scores stands below the name of one image")
    pair: list[float] = _one("pairs of scores", pairs + lists)
    return pair


def _without_lists(text: str) -> str:
    return re.sub(_SCORE + _LIST, " ", text, flags=re.IGNORECASE)


_EDIT = r"(?:the )?(?:edited )?image ?[12]"
_WINNER = r"(?:the )?(?:edited )?image ?(?P<winner>[12])"
_OPENING = (
    r"(?:(?:so|thus|therefore|hence|overall|finally|in conclusion|in summary"
    r"|based on the above evaluation|(?:final )?(?:answer|conclusion|decision|output|verdict))[,:]? "
    rf"|(?:compared (?:to|with)|comparing|between) {_EDIT}(?: and {_EDIT})?, )*"
)
_NOUN = r"(?: (?:one|(?:edited )?image|edit|result|choice))?"
_DEGREE = r"(?:(?:clearly|much|slightly|significantly|overall|generally|the|a|an) )*"
_THAN = r"(?: (?:than|over|to|compared (?:to|with)) (?:the )?(?:edited )?image ?(?P<other>[12]))?"
_ENDING = r"(?: overall)?(?:(?:,? because|, the best) (?P<reason>.*))?"
# A sentence has to be one of these as a whole, without what would make it a part of a verdict, a
# concession, a condition or a denial.
_VERDICTS = [
    re.compile(_OPENING + verdict + _THAN + _ENDING, re.IGNORECASE)
    for verdict in (
        rf"{_WINNER} is {_DEGREE}(?:better|best|superior|preferred|preferable|winner){_NOUN}",
        rf"{_WINNER} wins",
        rf"(?:the )?(?:better|best|preferred|superior|winning){_NOUN}(?: is|:) {_WINNER}",
        rf"(?:the )?winner(?: is|:) {_WINNER}",
        rf"(?:i )?prefer {_WINNER}",
    )
]
_TIE = re.compile(
    rf"{_OPENING}(?:(?:it is |it['’]s )?(?:a )?(?:tie|draw)|(?:both|they|(?:both |the |the two |two )?"
    r"(?:edited )?(?:images|edits|images? [12] and (?:edited )?(?:image )?[12])) are "
    r"(?:equally (?:good|well|bad|successful)|tied|equal|equivalent)(?: overall)?)",
    re.IGNORECASE,
)
# What a reason or a later sentence may not say, because it could take the verdict back.
_RETRACTS = re.compile(
    r"\b(?:actually|although|but|correction|except|false|first|former|however|if|incorrect|instead"
    r"|latter|loses?|mistake|neither|other|overall|second|though|unless|wait|worse|wrong)\b"
    r"|^(?:no|not)\b|\bnot(?: true| so| correct| right| the case)?$",
    re.IGNORECASE,
)


def _tagged(text: str) -> list[str]:
    """Return what stands in ``<answer>`` and ``</answer>``."""
    before_ends = re.split("</answer>", text, flags=re.IGNORECASE)[:-1]
    parts = [re.split("<answer>", part, flags=re.IGNORECASE) for part in before_ends]
    return [part[-1] for part in parts if len(part) > 1]


def _winner(text: str) -> int:
    """Return the one verdict of a text: 1, 2 or 0 for a tie."""
    verdicts: list[int] = []
    retracted = False
    for found in re.finditer(r"([^.!?;\n]+)([.!?;\n]?)", _without_lists(text)):
        sentence = " ".join(re.sub(r"[*`\"“”]", " ", found[1]).split()).lstrip("#->• ")
        verdict = None if found[2] == "?" else _verdict(sentence)
        if verdict is not None:
            verdicts.append(verdict)
            retracted = False
        else:
            retracted = retracted or found[2] == "?" or _may_retract(sentence)
    winner: int = _one("verdicts", verdicts)
    if retracted:
        raise _Unreadable("what follows the verdict may change it")
    return winner


def _verdict(sentence: str) -> int | None:
    """Return who wins by a sentence, or None where it is no verdict or more than that."""
    if _TIE.fullmatch(sentence):
        return 0
    for pattern in _VERDICTS:
        found = pattern.fullmatch(sentence)
        if found and found["winner"] != found["other"] and not _may_retract(found["reason"] or ""):
            return int(found["winner"])
    return None


def _may_retract(words: str) -> bool:
    """Whether words behind a verdict name an image, or could deny what was said."""
    return _has_digit(words) or _RETRACTS.search(words) is not None


def _json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that starts at the first brace; only blanks or a fence may follow it.

    All of its numbers are floats; one with an exponent is refused, because its value is not in the text.

    Raises:
        _NoJson: There is none that is valid.
        _Unreadable: It is valid and contradicts itself, or what follows could correct it.
    """
    start = text.find("{")
    if start < 0:
        raise _NoJson("there is no JSON object")
    # The form that the prompts show has a comma before the closing brace.
    text = re.sub(
        r'("(?:\\.|[^"\\])*(?:"|\Z))|,(?=\s*[}\]])',
        lambda m: m.group(1) or "",
        text[start:],
        flags=re.DOTALL,
    )
    decoder = json.JSONDecoder(
        strict=False, object_pairs_hook=_without_contradiction, parse_float=_plain, parse_int=float
    )
    try:
        value, end = decoder.raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise _NoJson(f"its JSON is not valid: {str(error)[:_EXCERPT]}") from error
    rest = text[end:].strip()
    if rest not in ("", "```"):
        raise _Unreadable(f"{rest[:_EXCERPT]!r} follows the JSON object, and may correct it")
    result: dict[str, Any] = value
    return result


def _plain(number: str) -> float:
    if "e" in number.lower():
        raise _Unreadable(f"{number[:_EXCERPT]} is no plain number")
    return float(number)


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if repr(result.setdefault(key, value)) != repr(value):  # true equals 1 in Python
            raise _Unreadable(f"{key!r} has two values")
    return result


def _facets(value: dict[str, Any], names: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    """Yield level 2, the official name and the value of facets; `names` has the names by lower case.

    As the official code has it, facets stand inside level-2 names, or all of them at the top. A number
    or an object that could be a score and is no facet's is refused, because it is not clear what it
    stands for. Besides facets there may be texts, and next to level-2 names anything but objects.
    """
    flat = isinstance(first := next(iter(value.values()), None), dict) and "score" in first
    for name, inner in value.items():
        facet = names.get(name.strip().casefold())
        if facet and (not isinstance(inner, dict) or "score" in inner):
            yield facet, facet, inner
        elif isinstance(inner, dict) and "score" not in inner:
            yield from _nested(name, inner, names, is_facet=facet is not None)
        elif isinstance(inner, dict) or (flat and not _is_note(inner)):
            raise _Unreadable(f"{name!r} has a score and is no facet of the dimension")


def _nested(
    level2: str, inner: dict[str, Any], names: Mapping[str, str], *, is_facet: bool
) -> Iterator[tuple[str, str, Any]]:
    """Yield the facets inside a level-2 name."""
    found = False
    for name, score in inner.items():
        facet = names.get(name.strip().casefold())
        if facet or (isinstance(score, dict) and "score" in score and not is_facet):
            found = True
            yield level2, facet or name, score
        elif not _is_note(score):
            raise _Unreadable(f"{name!r} in {level2!r} is no facet of the dimension")
    if is_facet and not found:
        raise _Unreadable(f"{level2!r} has no score")


def _is_note(value: Any) -> bool:
    """Whether a value is a remark that nobody takes for a score."""
    return value is None or (isinstance(value, str) and not _has_digit(value))


def _facet_score(name: str, value: Any, score_map: Mapping[int, float]) -> int | None:
    if isinstance(value, dict):
        if "score" not in value:
            raise _Unreadable(f"{name!r} has no score")
        if any(isinstance(part, dict) for part in value.values()):
            raise _Unreadable(f"{name!r} has a score and parts that may have others")
        value = value["score"]
    if value is None or (isinstance(value, str) and value.strip().upper() in ("N/A", "NA")):
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]", value.strip()):
        value = float(value)
    if not isinstance(value, float) or value not in score_map:
        shown = f"{value:g}" if isinstance(value, float) else str(value)[:_EXCERPT]
        raise _Unreadable(f"{name!r} has the score {shown!r}, not 0, 1, 2 or N/A")
    return int(value)

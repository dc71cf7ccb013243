"""What the readers of answers share: plain text, words that change a score, and JSON in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffsynth_metrics.judges.engine import Answer

__all__ = [
    "CONDITION",
    "DOUBTS",
    "NO_SCORES",
    "NUMBER",
    "NoJson",
    "Reading",
    "Unreadable",
    "because",
    "check_scale",
    "check_words",
    "final_text",
    "has_digit",
    "json_object",
    "may_precede",
    "plain",
    "plain_name",
    "read_or_explain",
]

NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_IF = r"(?<!as )if(?! you (?:look|need|want|zoom))"
# "The format is:" is followed by an example, "in the requested format:" by an answer.
_FORMAT = r"(?<!json )(?<!requested )(?<!required )(?<!specified )format"
CONDITION = (
    rf"\b(?:{_IF}|unless|assum(?:e|ing|ption)|suppos(?:e|ing)|imagine|maybe|perhaps|possibly"
    rf"|hypothetical(?:ly)?|template|{_FORMAT}|(?<!for )example|had (?:\w+ ){{1,4}}been)\b"
)
# What a judge calls its own scores, where a subject such as "the collar" is part of the image.
_OWN = (
    r"(?:^|\b(?:this|that|it|i|these|they|above|scores?|ratings?|number|verdict|answer|my \w+|[0-9]"
    r"|alignment|coherence|style) )"
)
_TAKES_BACK = re.compile(
    # At the beginning of a sentence or a part of it.
    r"(?:^|[.!?,;:(-] ?)(?:wait|hmm+|oops|sorry|actually|correct(?:ion|ed)|scratch|never ?mind"
    r"|on (?:second thought|reflection)\b(?!:)|i (?:take|was|mis|first (?:th|s))|my mistake"
    rf"|let me (?:re|correct|change)|(?:only )?(?:{_IF}|unless|assuming)\b|rather the"
    r"|no ?(?=[,.!;:-]|$))|(?:^|[.!?] )(?:nope|false|wrong|incorrect) ?(?=[,.!]|$)"
    # Anywhere.
    r"|\btoo (?:generous|harsh|kind|lenient|strict|optimistic)\b|\b(?:reconsider|revis)"
    rf"|(?:{_OWN}(?:is|are|was|seems?|looks?) |^\W*|[(,;] ?)(?:\w+ )?too (?:high|low)\b"
    r"|\b(?:disregard|ignore) (?:th|my)|\bchanged? my\b|\b(?:kidding|joking|swapped)\b"
    r"|\b(?:is|are|was) (?:just |only )?(?:an? (?:mistake|example|draft|placeholder))\b"
    rf"|{_OWN}(?:is|are|was) (?:\w+ )?(?:wrong|incorrect)\b"
    rf"|(?:{_OWN}(?:is|are|was)(?:n't| not)|^\W*not) (?:\w+ )?(?:correct|right)\b"
    r"|\b(?:deserves?|merits?|warrants?) (?:\w+ )?[0-9]"
    r"|(?:\bnot|n't) (?:true|so|the case|final|my|sure|certain|believe)\b|\bcannot tell\b"
    r"|\b(?:score|rating|verdict)s? (?:sh|w|c)ould\b|\bholds? only\b|\bopposite is\b"
    r"|\b(?:w|sh)ould (?:lower|raise|reduce|correct|only)\b",
    re.IGNORECASE,
)
DOUBTS = re.compile(f"{CONDITION}|{_TAKES_BACK.pattern}", re.IGNORECASE)
# A number in a sentence that may be another score.
_CLAIM = re.compile(
    rf"(?:^[^\w(]*(?!{NUMBER} (?!stars|points)[a-z]+s(?:\W|$))(?:(?:of|at) )?|^(?=[^a-z]*$)\W*"
    r"|[:=\[] ?|\bto |\((?=[-+])|\b(?:minus|plus|add(?:ed|ing)?|deduct\w*|subtract\w*) "
    # A sentence of a few words and a number.
    rf"|[.!?;,(]\W{{0,3}}(?:[a-z]+,? ){{1,2}}(?={NUMBER} ?(?:[.!?;)](?![0-9])|$))"
    r"|\b(?:scores?|ratings?|rated?|should|would|deserves?|final|first|second|previously)\b[^.]{0,60}?)"
    rf"(?P<number>{NUMBER})|\bor (?:\w+ )?(?:[0-9]|one|two|three|four|five|half)",
    re.IGNORECASE,
)
# What may stand before a label in its sentence, and what may not.
_BEFORE = re.compile(
    r"(?:^|[^\w\s]|[0-9])\s?(?:(?:and|the|my|final|overall|total|output|edited|json|scores?|of|for) )*$",
    re.IGNORECASE,
)
_SUPPOSES = re.compile(
    rf"{CONDITION}|\b(?:would(?! (?:evaluate|rate|score) [^,.]*as follows)|could|might|were|not|never"
    r"|than|example|typical|like)\b",
    re.IGNORECASE,
)
# Headings of numbers that are no scores of the images.
NO_SCORES = (
    r"\b(?:ideal|perfect|draft|rubric|rank(?:s|ing|ings)?|count|number of"
    r"|(?:errors?|mistakes|flaws|issues|defects|art[ei]facts)(?: (?:per|in|of|for|found)\b.*)?(?=\W*$))"
)
_N = r"[0-9]+(?:\.[0-9]+)?"
_SCALE = re.compile(
    rf"\( ?(?P<low>{_N}) ?(?:-|to) ?(?P<high>{_N}) ?\)"
    r"|(?<![0-9] )(?<![^\W_])(?:out[ _]of|max(?:imum)?(?:[ _]score)?|scale|range)[^\w\n]{1,4}"
    rf"(?:(?:of|is|from|in)\W{{1,3}})?(?:(?P<from>{_N}) ?(?:-|to|,|and) ?)?(?P<to>{_N})"
    rf"(?!\.?[0-9]| ?[a-z(-])|\b(?P<points>{_N})[- ]point scale",
    re.IGNORECASE,
)
_LOWER_IS_BETTER = re.compile(
    r"\b(?:lower|less|fewer|smaller) ?(?:is|are|means|=) ?(?:the )?better", re.I
)
_SAME = str.maketrans("：＝−“”’{", ':=-""\'\n') | {
    ord("–"): " - ",
    ord("—"): " - ",
    ord("（"): "(",
    ord("）"): ")",
    ord("。"): ". ",
}
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


class Unreadable(Exception):
    """Carries the reason from where it is found to the end of a reader."""


class NoJson(Unreadable):
    """There is no JSON object, or it is not valid."""


def read_or_explain(answer: Answer, names: Sequence[str], read: Callable[[], dict[str, Any]]) -> Reading:
    """Return what is read, or nothing and why."""
    try:
        return Reading(read())
    except Unreadable as error:
        return Reading(dict.fromkeys(names), because(answer, [str(error)]))


def because(answer: Answer, problems: list[str]) -> str | None:
    """Join the problems, and say where the limit of tokens is their likely cause."""
    if not problems:
        return None
    cut = "the answer was cut off by max_new_tokens: " if answer.finish == "length" else ""
    return cut + "; ".join(problems)


def final_text(answer: Answer) -> tuple[str, bool]:
    """Return what follows the model's thinking, and whether it stands in ``<answer>``."""
    if answer.error is not None:
        raise Unreadable(answer.error)
    _, thought, text = answer.text.rpartition("</think>")
    if not thought and "<think>" in answer.text:
        raise Unreadable("it never stopped thinking")
    tags = re.findall("</?answer>", text.lower())
    tagged = bool(tags) and tags == ["<answer>", "</answer>"] * (len(tags) // 2)
    parts = re.split("</?answer>", text, flags=re.IGNORECASE)
    return "\n".join(parts[1::2] if tagged else parts), tagged


def plain(text: str) -> str:
    """Return a text without emphasis, with single blanks and line breaks, and one sign for each thing.

    A blank takes the place of emphasis, so that digits on both sides stay apart.
    """
    text = re.sub(r"[*`]|(?<![^\W_])_+|_+(?![^\W_])", " ", text.translate(_SAME))
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text))


def plain_name(key: str) -> str:
    """Return a name without its scale, emphasis, signs and case."""
    key = re.sub(r"\([^()]*\)", "", key).replace("&", " and ")
    return " ".join(re.sub(r"[\W_]+", " ", key).casefold().split())


def has_digit(text: str) -> bool:
    """Whether a text has a digit of any script, a fraction such as ½, or the like."""
    return any(character.isnumeric() for character in text)


def may_precede(before: str) -> bool:
    """Whether a score that follows these words is neither inside a sentence nor a supposition."""
    before = before[-300:]
    sentence = re.split(r"[.!?][\"']?,? |[\"'], ?|(?<!\w[:,])\n", before)[-1]
    sentence = re.sub(r"\([^()]*\)", "", sentence)
    imagines = re.search(r"\b(?:suppose|imagine)\b", before, re.IGNORECASE)
    return bool(_BEFORE.search(sentence)) and not (imagines or _SUPPOSES.search(sentence))


def check_words(words: str, scores: Sequence[float] | None = None) -> None:
    """Check that words do not take scores back.

    Args:
        words: Plain text, line by line.
        scores: Where the words stand next to scores, these: then they may also neither doubt them nor
            give others. Further away they may be about anything else.

    Raises:
        Unreadable: They do.
    """
    for line in map(str.strip, words.split("\n")):
        doubt = (_TAKES_BACK if scores is None else DOUBTS).search(line)
        claims = [] if scores is None else [claim["number"] for claim in _CLAIM.finditer(line)]
        if doubt or any(claim is None or float(claim) not in (scores or ()) for claim in claims):
            raise Unreadable(f"{line[:_EXCERPT]!r} may change the scores")


def check_scale(text: str, low: float | None = None, high: float | None = None) -> None:
    """Check that a text names no other scale than from low to high, and none where less is better.

    Raises:
        Unreadable: It does.
    """
    if found := _LOWER_IS_BETTER.search(text):
        raise Unreadable(f"{found.group()!r} turns the scores round")
    for found in _SCALE.finditer(text) if high is not None else ():
        first = found["low"] or found["from"] or low
        last = found["high"] or found["to"] or found["points"]
        if (first, float(last)) != (low, high) and (float(first or 0), float(last)) != (low, high):
            raise Unreadable(f"{found.group()[:_EXCERPT]!r} is another scale than {low:g} to {high:g}")


def json_object(text: str) -> tuple[dict[str, Any], str]:
    """Return the JSON object of a text, and what stands behind it.

    All of its numbers are floats; one with an exponent is refused, because its value is not in the text.

    Raises:
        NoJson: There is none that is valid.
        Unreadable: It is valid and contradicts itself, or the words before it say that it is none.
    """
    opening = re.search(r"\{(?=\s*[\"'}*])", text)
    if opening is None:
        raise NoJson("there is no JSON object")
    if not may_precede(plain(text[: opening.start()])):
        raise Unreadable("the JSON object is inside a sentence or a supposition")
    # The form that the prompts show has a comma before the closing brace; numbers may be emphasized.
    text = re.sub(
        r'("(?:\\.|[^"\\])*(?:"|\Z))|,(?=\s*[}\]])|[*`](?=[\s*`0-9\]},])',
        lambda found: found.group(1) or "",
        text[opening.start() :],
        flags=re.DOTALL,
    )
    decoder = json.JSONDecoder(
        strict=False, object_pairs_hook=_without_contradiction, parse_float=_plain_float, parse_int=float
    )
    try:
        value, end = decoder.raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise NoJson(f"its JSON is not valid: {str(error)[:_EXCERPT]}") from error
    return value, text[end:]


def _plain_float(number: str) -> float:
    if "e" in number.lower():
        raise Unreadable(f"{number[:_EXCERPT]} is no plain number")
    return float(number)


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if repr(result.setdefault(key, value)) != repr(value):  # true equals 1 in Python
            raise Unreadable(f"{key!r} has two values")
    scores = [value for key, value in pairs if plain_name(key) in ("score", "scores")]
    for key, value in pairs if scores else []:
        is_second = re.search(r"(?i)score|final|correct|revis", key) and has_digit(str(value))
        if is_second and not isinstance(value, dict) and repr(value) != repr(scores[0]):
            if not isinstance(value, str) or re.fullmatch(rf"[\[ ]*{NUMBER}[^a-z]*", value):
                raise Unreadable(f"{key!r} stands beside the score, and may be another")
    return result

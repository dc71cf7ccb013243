"""The checklists of Qwen-Image-Bench: a JSON object in, scores of facets out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffsynth_metrics.judges.engine import Answer
from diffsynth_metrics.judges.reading import (
    Reading,
    Unreadable,
    check_words,
    final_text,
    has_digit,
    json_object,
    plain,
    plain_name,
    read_or_explain,
)

__all__ = ["read_checklist"]

_EXCERPT = 40


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

    return read_or_explain(answer, ["raw", "scores"], read)


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

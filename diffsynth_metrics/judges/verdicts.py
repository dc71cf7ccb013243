"""Sentences that say which of two edited images is better."""

from __future__ import annotations

import re

from diffsynth_metrics.judges.reading import CONDITION, DOUBTS, Unreadable

__all__ = ["find_verdicts"]

_WINNER = r"(?:the )?(?:edited )?image ?(?P<winner>[12])"
_EDIT = r"(?:the )?(?:edited )?image ?[12]"
_ANSWER = (
    r"(?:my |the )?(?:final |overall )?(?:answer|choice|conclusion|decision|judge?ment|output|preference"
    r"|result|verdict|winner)(?: is)?"
)
_SUMS_UP = (
    r"so|thus|therefore|hence|overall|finally|in (?:conclusion|summary|the end)|to sum up|on balance"
    r"|all in all|all things considered|(?:based on|considering|given) (?:all|both|these|the)(?: above)?"
    r"(?: evaluations?| criteria| analysis| comparison| assessment)"
    r"|after (?:careful )?(?:comparison|consideration|evaluation)"
    rf"|after (?:comparing|evaluating) both(?: edited)? images|{_ANSWER}"
)
_OPENING = (
    rf"(?:(?P<final>{_SUMS_UP})[,:]* |i (?:think|believe|conclude|find)(?: that)? "
    rf"|(?:compared (?:to|with)|comparing|between) {_EDIT}(?: and {_EDIT})?, )*"
)
_NOUN = r"(?: (?:one|(?:edited )?image|edit|result|choice))?"
_DEGREE = r"(?:(?:clearly|much|slightly|significantly|overall|generally|the|a|an) )*"
_THAN = r"(?: (?:than|over|to|compared (?:to|with)) (?:the )?(?:edited )?image ?(?P<other>[12]))?"
_ENDING = (
    r"(?: overall| in (?:every|all) (?:respects?|ways?|aspects?|criteria))?"
    r"(?:(?:,? (?:because|since|as|while|whereas|due to)|, the best)\b(?P<reason>.*))?"
)
# A sentence has to be one of these as a whole, without what would make it a part of a verdict, a
# concession, a condition or a denial.
_VERDICTS = [
    re.compile(_OPENING + verdict + _THAN + _ENDING, re.IGNORECASE)
    for verdict in (
        rf"{_WINNER} is {_DEGREE}(?:better|best|superior|preferred|preferable|winner){_NOUN}",
        rf"{_WINNER} wins",
        rf"(?:the )?(?:better|best|preferred|superior|winning){_NOUN}(?: is:?|:) {_WINNER}",
        rf"(?:i )?prefer {_WINNER}",
        rf"(?(final){_WINNER}|(?!))",
        rf"{_ANSWER}:? (?P<winner>[12])",
    )
]
_TIE = re.compile(
    rf"{_OPENING}(?:(?:it is |it's )?(?:a )?(?:tie|draw)"
    r"|neither (?:of (?:them|the (?:two )?(?:edited )?images) |(?:edited )?image 1 nor (?:edited )?"
    rf"(?:image )?2 |(?:edited )?image |edit )?is {_DEGREE}(?:better|superior|best)"
    r"(?: than the other(?: one)?)?|(?:both|they|(?:both |the |the two |two )?"
    r"(?:edited )?(?:images|edits|images? [12] and (?:edited )?(?:image )?[12])) are "
    r"(?:equally (?:good|well|bad|successful)|tied|equal|equivalent)(?: overall)?)",
    re.IGNORECASE,
)
_PREFERS = re.compile(
    r"\b(?:better|best|prefer\w*|cho(?:ice|ose|oses|sen|osing)|picks?|selects?|wins?|winner|superior"
    r"|verdict|answer|deserves)\b",
    re.IGNORECASE,
)
_DENIES = re.compile(
    r"^(?:but|however|although|though|yet|except|not)\b|\b(?:though|however)$"
    r"|\b(?:worse|worst|inferior|opposite|kidding|joking)\b"
    r"|(?:\bnot|n't|\bnever|\bno longer)\b.*(?:better|best|prefer|win)",
    re.IGNORECASE,
)


def find_verdicts(text: str, *, bare: bool) -> list[int]:
    """Return who wins by each verdict of a text, 1, 2 or 0 for a tie; the final ones, where the last is.

    Args:
        text: A plain text.
        bare: Whether the text is an answer already, so that a number or a name alone is a verdict.

    Raises:
        Unreadable: What follows the last verdict may change it.
    """
    verdicts: list[tuple[int, bool]] = []
    turned = supposing = False
    for found in re.finditer(r"([^.!?;\n]+)([.!?;\n]?)", text):
        sentence = (
            re.sub(r'["}]', "", found[1]).replace(" :", ":").replace(" ,", ",").strip().lstrip("#->•| ")
        )
        is_said = found[2] != "?" and not supposing
        verdict = _verdict(f"Answer: {sentence}" if bare else sentence) if is_said else None
        if verdict is not None:
            verdicts.append(verdict)
            turned = False
        elif verdicts:
            turned = turned or found[2] == "?" or _turns(sentence, verdicts[-1][0])
        supposing = re.match(CONDITION, sentence, re.IGNORECASE) is not None
    if turned:
        raise Unreadable("what follows the verdict may change it")
    last_is_final = bool(verdicts) and verdicts[-1][1]
    return [winner for winner, is_final in verdicts if is_final or not last_is_final]


def _verdict(sentence: str) -> tuple[int, bool] | None:
    """Return who wins by a sentence, and whether it sums up; None where it is no verdict, or more."""
    for pattern in (_TIE, *_VERDICTS):
        if found := pattern.fullmatch(sentence):
            said = {"winner": "0", "other": None, "reason": None, **found.groupdict()}
            winner = int(said["winner"] or 0)
            if said["winner"] != said["other"] and not _turns(said["reason"] or "", winner):
                return winner, said["final"] is not None
    return None


def _turns(words: str, winner: int) -> bool:
    """Whether words behind a verdict could deny it or prefer another image."""
    words = words.strip(" ,")
    other = rf"\bimage ?(?!{winner})[0-9]|\b(?:other|former|latter|first|second)\b"
    # A few words and the other number, or the other image as more than what "it" is compared with.
    names = rf"[^0-9]{{0,40}}(?<!image )(?<!image)\b(?!{winner})[12]"
    compares = r"(?:it|this)\b|.*\b(?:than|in|of|over|by|for|unlike)\b"
    makes = rf"(?!{compares})(?:[a-z']+[ ,:]+){{0,5}}image ?(?!{winner})[12]"
    if DOUBTS.search(words) or re.fullmatch(f"{names}|{makes}", words, re.IGNORECASE):
        return True
    if re.search(other, words, re.IGNORECASE):
        is_about_it = re.match(rf"(?:the )?(?:edited )?(?:{other})", words, re.IGNORECASE)
        return bool(_PREFERS.search(words) or (not is_about_it and _DENIES.search(words)))
    return bool(_DENIES.search(words)) or words.lower().endswith(" not")

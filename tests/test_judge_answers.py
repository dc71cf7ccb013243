"""What is read in a judge's answer, and that nothing else is ever read.

The answers follow those that the authors print and those that people met in the judges' issue trackers;
the ones under "misread elsewhere" get a wrong number from the readers of `diffsynth.metrics` 2.1.12.
"""

from __future__ import annotations

import json
import math
import random
import re

import PIL.Image
import pytest

from diffsynth_metrics import (
    AnswerError,
    QwenImageBenchMetric,
    UnifiedReward2Metric,
    UnifiedRewardEditMetric,
)
from diffsynth_metrics.judges.answers import (
    read_checklist,
    read_labelled_scores,
    read_pair_scores,
    read_score_list,
    read_winner,
)
from diffsynth_metrics.judges.engine import Answer
from diffsynth_metrics.testing import ScriptedEngine

IMAGE = PIL.Image.new("RGB", (32, 32), "red")


def lines(alignment: object, coherence: object, style: object) -> str:
    return (
        f"Alignment Score (1-5): {alignment}\nCoherence Score (1-5): {coherence}\n"
        f"Style Score (1-5): {style}"
    )


def unified_reward_2(answer: Answer | str) -> tuple[float | None, ...]:
    row = UnifiedReward2Metric(ScriptedEngine(answer)).evaluate("p", IMAGE)[0]
    assert (row["error"] is None) == (row["score"] is not None)
    return row["alignment"], row["coherence"], row["style"]


UNIFIED_REWARD_2 = {
    "published": (
        lines("2.694700002670288", "2.371500015258789", "2.802500009536743"),
        (2.694700002670288, 2.371500015258789, 2.802500009536743),
    ),
    "short numbers": (lines(3, 4.5, "2.0"), (3, 4.5, 2)),
    "ends of the range": (lines(1, 5, 1), (1, 5, 1)),
    "trailing newline": (lines(3, 4, 5) + "\n", (3, 4, 5)),
    "bold": (lines("**3.5**", "**4**", "**2**").replace("Score", "**Score**"), (3.5, 4, 2)),
    "bullets": ("- " + lines(3, 4, 2).replace("\n", "\n- "), (3, 4, 2)),
    "without the range": (lines(3, 4, 2).replace(" (1-5)", ""), (3, 4, 2)),
    "lower case": (lines(3, 4, 2).lower(), (3, 4, 2)),
    "of five": (lines("3/5", "4 / 5", "2.5/5.0"), (3, 4, 2.5)),
    "one line": (lines(3.25, 4, 2).replace("\n", ", "), (3.25, 4, 2)),
    "reasons": (lines("3 (a cat)", "4 - clean", "2, flat colours."), (3, 4, 2)),
    "after prose": ("Here are my scores.\n\n" + lines(3, 4, 2), (3, 4, 2)),
    "an empty thought": ("<think>\n\n</think>\n\n" + lines(3, 4, 2), (3, 4, 2)),
    "the same twice": (lines(3, 4, 2) + "\n\n" + lines(3, 4, 2), (3, 4, 2)),
    "the form first": (lines("X", "Y", "Z") + "\n" + lines(3, 4, 2), (3, 4, 2)),
    # misread elsewhere
    "full-width colon": (lines(3, 4, 2).replace(":", "："), (3, 4, 2)),
    "a draft while thinking": (
        "<think>\n" + lines(1, 1, 1) + "\n</think>\n" + lines(3, 4, 2),
        (3, 4, 2),
    ),
    "nan": (lines(3, 4, "nan"), (3, 4, None)),
    "one missing": (lines(3, 4, 2).rpartition("\n")[0], (3, 4, None)),
    "out of the range": (lines(3, 45, -2), (3, None, None)),
    # nothing to read
    "the form only": (lines("X", "Y", "Z"), (None, None, None)),
    "one word": ("Final", (None, None, None)),
    "empty": ("", (None, None, None)),
    "a range": (lines("3-4", "3 to 4", "3 or 4"), (None, None, None)),
    "percent": (lines("80%", "3.2.1", "3e0"), (None, None, None)),
    "of ten": (lines("3/10", 4, 2), (None, 4, 2)),
    "contradiction": (lines(3, 4, 2) + "\nAlignment Score (1-5): 4", (None, 4, 2)),
    "still thinking": ("<think>\n" + lines(3, 4, 2), (None, None, None)),
    "two numbers": (lines("3, or maybe 4", 4, 2), (None, 4, 2)),
    "number words": (lines("3 or four", "3, or four", "3 and a half"), (None, None, None)),
    "other scripts": (lines("3.４", "3 ½", "3²"), (None, None, None)),
    "other dashes": (lines("3−4", "3～4", "3..4"), (None, None, None)),
    "decimal comma": (lines("3,5", "4,5", "2;5"), (None, None, None)),
    "units": (lines("5 %", "4 stars", "2nd"), (None, None, None)),
    "approximate": (lines("~3", "3?", "3-ish"), (None, None, None)),
    "marks in a number": (lines("2*.5", "4`5", "**3**.**5**"), (None, None, None)),
    "labels in other words": (
        lines(4, 5, 2)
        .replace("Align", "Misalign")
        .replace("Coh", "Incoh")
        .replace("Style", "Lifestyle"),
        (None, None, None),
    ),
    "foreign scales": (
        "Alignment Score (0-100): 4\nCoherence Score (1-10): 5\nStyle Score (lower is better): 2",
        (None, None, None),
    ),
    "its own scale": (lines(3, 4, 2).replace("1-5", "1 to 5"), (3, 4, 2)),
    "corrected by what is no number": (
        lines(3, 4, 2) + "\n\nOn reflection:\nAlignment Score (1-5): 4.5 out of 5",
        (None, 4, 2),
    ),
    "corrected in a sentence": (lines(3, 4, 2) + "\nThe style score should be 1.", (3, 4, None)),
    "conditional": ("If it were red, the " + lines(3, 4, 2), (None, 4, 2)),
    "infinite": (lines("inf", "9" * 400, 2), (None, None, 2)),
}


def test_the_three_scores_are_read() -> None:
    read = {name: unified_reward_2(text) for name, (text, _) in UNIFIED_REWARD_2.items()}
    assert read == {name: expected for name, (_, expected) in UNIFIED_REWARD_2.items()}


POINTWISE = {
    "published": ('{\n\n"reasoning" : "Good.",\n"score" : [20, 18]\n}', (20, 18, "Good.")),
    "decimals": ('{"reasoning": "Good.", "score": [20.5, 18.25]}', (20.5, 18.25, "Good.")),
    "ends of the range": ('{"reasoning": "", "score": [0, 25]}', (0, 25, "")),
    "fence": ('```json\n{"reasoning": "Good.", "score": [20, 18]}\n```', (20, 18, "Good.")),
    "prose before": ('Sure!\n{"reasoning": "Good.", "score": [20, 18]}', (20, 18, "Good.")),
    "newline in the reasoning": ('{"reasoning": "a\nb", "score": [20, 18]}', (20, 18, "a\nb")),
    "no JSON around": ("score = [20, 18]", (20, 18, None)),
    "single quotes": ("{'reasoning': 'Good.', 'score': [20, 18]}", (20, 18, None)),
    "quotes in the reasoning": ('{"reasoning": "The "red" cat.", "score": [20, 18]}', (20, 18, None)),
    # misread elsewhere
    "the prompt's comma": ('{\n"reasoning" : "Good.",\n"score" : [20, 18],\n}', (20, 18, "Good.")),
    "out of the range": ('{"reasoning": "", "score": [300, -5]}', (None, None, None)),
    "one of two": ('{"reasoning": "", "score": [20]}', (None, None, None)),
    "a scalar": ('{"reasoning": "", "score": 20}', (None, None, None)),
    # nothing to read
    "the form only": ('{"reasoning": "...", "score": [score1, score2]}', (None, None, None)),
    "three": ('{"reasoning": "", "score": [20, 18, 3]}', (None, None, None)),
    "contradiction": ('{"score": [20, 18]}\n{"score": [2, 18]}', (None, None, None)),
    "words": ('{"reasoning": "", "score": ["high", "low"]}', (None, None, None)),
    "cut list": ('{"reasoning": "", "score": [20, 1', (None, None, None)),
    "nan": ('{"reasoning": "", "score": [NaN, 18]}', (None, None, None)),
    "empty": ("", (None, None, None)),
    "a list in the reasoning": (
        '{"reasoning": "A failed edit would have score: [0, 0].", "score": ["20", "18"]}',
        (None, None, None),
    ),
    "a list in the reasoning, JSON broken": (
        '{"reasoning": "A "failed" edit has score: [0, 0].", "score": [20 18]}',
        (None, None, None),
    ),
    "another list of the JSON": ('{"max score": [25, 25], "given": [3, 4]}', (None, None, None)),
    "a scalar beside a list": ('{"reasoning": "score: [1, 2]", "score": 19}', (None, None, None)),
    "an unreadable correction": (
        '{"score": [20, 18]}\nCorrected: {"score": [2/25, 3/25]}',
        (None, None, None),
    ),
    "a correction in words": ('{"score": [20, 18]} The second should be 5.', (None, None, None)),
    "an unreadable list after a good one": (
        "score = [20, 18]\nscore = [2/25, 3/25]",
        (None, None, None),
    ),
    "an exponent": ('{"score": [1e1, 18]}', (None, None, None)),
    "true": ('{"score": [true, 18]}', (None, None, None)),
    "huge": (f'{{"score": [{"9" * 5000}, 18]}}', (None, None, None)),
    # the JSON decides
    "a draft in the reasoning": (
        '{"reasoning": "At first score: [25, 25].", "score": [2, 3]}',
        (2, 3, "At first score: [25, 25]."),
    ),
    "the prompt's words": ("output score = [20, 18]", (20, 18, None)),
}


def test_the_pointwise_scores_are_read() -> None:
    for name, (text, (success, overediting, reasoning)) in POINTWISE.items():
        row = UnifiedRewardEditMetric(ScriptedEngine(text)).evaluate("p", [IMAGE, IMAGE])[0]
        assert (row["editing_success"], row["overediting"]) == (success, overediting), name
        assert row["reasoning"] == reasoning, name
        assert row["score"] == (None if success is None else (success + overediting) / 2), name


RANK = {
    "trained 1": ("Edited image 1 is better", 1),
    "trained 2": ("Edited image 2 is better.", 2),
    "explained": ("Edited image 1 is better. It follows the instruction and has no artifacts.", 1),
    "in one sentence": ("Edited image 2 is better because it does not change the sky.", 2),
    "emphasis": ("**Edited Image 1** is **better**", 1),
    "than": ("Edited image 1 is better than edited image 2", 1),
    "tagged": ("<think>Edited image 1 is better</think><answer>Edited image 2 is better</answer>", 2),
    "tag wins": ("Edited image 1 is better?\n<answer>Edited image 2 is better</answer>", 2),
    "winner": ("Winner: Image 2", 2),
    "best": ("The best edit is edited image 1.", 1),
    "degrees": ("Edited image 2 is clearly the better one.", 2),
    # misread elsewhere
    "compared": ("Compared to edited image 1, edited image 2 is better.", 2),
    "fidelity": ("Edited image 2 is better than edited image 1, the best fidelity.", 2),
    "wins": ("Image 2 wins over image 1. Better fidelity.", 2),
    "comparing": ("Comparing image 1 and image 2, the better one is edited image 2.", 2),
    "denied": ("Image 1 is not better than image 2.", None),
    "upstream's tie": ("Edited image 1 and 2 are equally good", 0),
    "tie": ("The two edited images are equally good", 0),
    # nothing to read
    "contradiction": ("Edited image 1 is better in colour, but edited image 2 is better overall.", None),
    "a necktie": ("There is a tie around his neck.", None),
    "question": ("Which is better: edited image 1 or edited image 2?", None),
    "denied before": ("It is not true that edited image 1 is better.", None),
    "conditional": ("If colour matters, edited image 1 is better.", None),
    "cut": ("Edited image 1 is bett", None),
    "empty": ("", None),
    "although": (
        "Although edited image 1 is better in colour, edited image 2 follows the instruction and "
        "should be chosen.",
        None,
    ),
    "while": (
        "While edited image 1 is better at preserving the background, edited image 2 executes the "
        "instruction, so edited image 2 is the one to pick.",
        None,
    ),
    "in one respect": ("Edited image 1 is better at lighting. I choose edited image 2.", None),
    "of a criterion": ("Instruction fidelity: edited image 1 is better. Overall: Image 2.", 2),
    "a question first": ("Edited image 1 is better? No, edited image 2.", None),
    "false": ("It is false that edited image 1 is better.", None),
    "doubt": ("I doubt that edited image 1 is better.", None),
    "disagree": ("I disagree that edited image 1 is better.", None),
    "in no way": ("Edited image 1 is better in no way.", None),
    "less": ("Edited image 1 is preferred less.", None),
    "partial tie": (
        "Both edited images are equally good at keeping the background, and edited image 2 alone "
        "adds the hat.",
        None,
    ),
    "tie in one respect": (
        "The two edits are equally successful in lighting. Only edited image 2 follows the instruction.",
        None,
    ),
    "best at something else": ("Edited image 1 is best ignored.", None),
    "worst": ("Edited image 1 is the winner of the worst edit award.", None),
    "thought": ("Edited image 1 is better, I first thought. Edited image 2 follows the text.", None),
    "retracted": ("Edited image 1 is better. No, the other one.", None),
    "the other is named later": ("Edited image 1 is better. I choose edited image 2.", None),
    "a reason that retracts": ("Edited image 1 is better because of colour, but it is worse.", None),
    "denied in a word": ("Edited image 1 is better. It is not.", None),
    "than itself": ("Edited image 1 is better than edited image 1.", None),
    "answers that contradict": (
        "<answer>Edited image 1 is better</answer> or <answer>Edited image 2 is better</answer>",
        None,
    ),
    # reasoning first
    "parts, then the verdict": (
        "Edited image 1 is better in colour. Edited image 2 adds the hat. Overall, edited image 2 wins.",
        2,
    ),
    "doubt, then the verdict": ("Is edited image 1 better? Edited image 2 is better.", 2),
    "final output": ("### Final Output:\n**Final answer:** Edited image 1 is better.", 1),
    "in the prompt's words": ("Based on the above evaluation, edited image 2 is better.", 2),
    "both": ("Both edited images are equally good.", 0),
    "it's a tie": ("It's a tie.", 0),
    "preference": ("I prefer edited image 2 over edited image 1.", 2),
    "twice": ("Edited image 1 is better.\nWinner: Image 1", 1),
}


def test_the_winner_is_read() -> None:
    for name, (text, winner) in RANK.items():
        metric = UnifiedRewardEditMetric(ScriptedEngine(text), task="edit_pairwise_rank")
        row = metric.evaluate("p", [IMAGE] * 3)[0]
        assert row["winner"] == row["score"] == winner, name
        assert (row["error"] is None) == (winner is not None), name


PAIR = {
    "labels": ("Image 1: 2.5\nImage 2: -1.3", (2.5, -1.3)),
    "edited": ("Edited Image 1 Score: 3.2\nEdited Image 2 Score: 4", (3.2, 4)),
    "emphasis": ("**Edited Image 1**: **3.2**\n**Edited Image 2**: **4.1**", (3.2, 4.1)),
    "list": ('"score": [2.5, -1]', (2.5, -1)),
    "keys": ('{"image_1_score": 2.5, "image_2_score": 1.5}', (2.5, 1.5)),
    "one line": ("Edited Image 1: 2.5, Edited Image 2: 1.25.", (2.5, 1.25)),
    "source too": ("Source Image: 5\nEdited Image 1: 2.5\nEdited Image 2: 1.5", (2.5, 1.5)),
    # misread elsewhere
    "decimals in a line": ("Scores: 2.5, 1.5", (2.5, 1.5)),
    "out of ten": ("Image 1 (out of 10): 7.5\nImage 2 (out of 10): 6", (7.5, 6)),
    "dashes": ("Edited Image 1 - 2.5\nEdited Image 2 - 1.5", (2.5, 1.5)),
    "other numbers": ("Image 1 follows all 3 changes: 4.2. Image 2 misses 1: 2.", (None, None)),
    # nothing to read
    "one missing": ("Image 1: 2.5", (None, None)),
    "contradiction": ("Image 1: 2.5\nImage 2: 1\nImage 1: 3", (None, None)),
    "range": ("Image 1: 2-3\nImage 2: 1", (None, None)),
    "fraction": ("Image 1: 7/10\nImage 2: 6/10", (None, None)),
    "huge": (f"Image 1: {'9' * 400}\nImage 2: 1", (None, None)),
    "empty": ("", (None, None)),
    "sections": (
        "**Edited Image 1:**\n1. Instruction Fidelity: red.\nScore: 3.5\n\n"
        "**Edited Image 2:**\n1. Instruction Fidelity: blue.\nScore: -1.2",
        (3.5, -1.2),
    ),
    "decimal commas": ("Image 1: 2,5\nImage 2: 1,5", (None, None)),
    "thousands": ("Image 1: 1,234.5\nImage 2: 2,345", (None, None)),
    "apostrophes": ("Image 1: 1'000\nImage 2: 2", (None, None)),
    "counts": (
        "Image 1: 2 of 3 changes are made. Score: 4.5\nImage 2: 1 of 3 changes is made. Score: 1.5",
        (None, None),
    ),
    "sums": ("Edited Image 1: 3.5 + 4.0 = 7.5\nEdited Image 2: 2 + 1 = 3", (None, None)),
    "issues": ("Edited Image 1 - 3 issues found\nEdited Image 2 - 1 issue found", (None, None)),
    "full-width range": ("Image 1: 2～3\nImage 2: 1", (None, None)),
    "range with a minus": ("Image 1: 2−3\nImage 2: 1", (None, None)),
    "range with dots": ("Image 1: 2..3\nImage 2: 1", (None, None)),
    "range in words": ("Image 1: 2-to-3\nImage 2: 1", (None, None)),
    "two numbers": ("Image 1: 2 and 3\nImage 2: 1", (None, None)),
    "other digits": ("Image 1: 3.５\nImage 2: 1", (None, None)),
    "marks in a number": ("Image 1: 2*3\nImage 2: 1", (None, None)),
    "one number with a comma": ("Scores: 2,5", (None, None)),
    "one score": ("Image 1: 2.5\nImage 2: 1\nScore: 9", (None, None)),
    "parts of each image": (
        '{"image_1": {"score": [8, 7]}, "image_2": {"score": [8, 7]}}',
        (None, None),
    ),
    "parts of each image, in lines": (
        '{"image_1": {\n"score": [8, 7]\n}, "image_2": {\n"score": [8, 7]\n}}',
        (None, None),
    ),
    "corrected by fractions": (
        "Image 1: 2.5\nImage 2: 1\nFinal: Image 1: 7/10, Image 2: 9/10",
        (None, None),
    ),
    "corrected in a sentence": ("Image 1: 2.5\nImage 2: 1\nImage 1 should have 7.", (None, None)),
    "a third image": ("Image 1: 2.5, Image 2: 1.5, Image 3: 4", (None, None)),
    # ordinary forms
    "a title": ("Scores:\n- **Edited Image 1:** 2.5\n- **Edited Image 2:** -1.5", (2.5, -1.5)),
    "score for": ("Score for Edited Image 1: 2.5\nScore for Edited Image 2: 1", (2.5, 1)),
    "comments": ("Edited Image 1: 2.5 (clean)\nEdited Image 2: 1.5 - visible seams", (2.5, 1.5)),
    "sections, then the scores": (
        "### Edited Image 1:\n1. **Fidelity** – good\n### Edited Image 2:\n1. **Fidelity** – bad\n"
        "### Final Output:\nEdited Image 1 Score: 3.5\nEdited Image 2 Score: -1",
        (3.5, -1),
    ),
    "long keys": ('{"edited_image_1_score": 2.5, "edited_image_2_score": 1}', (2.5, 1)),
    "a sentence, then a list": ("Edited image 1 is better. score=[3,8]", (3, 8)),
}


def test_the_scores_of_a_pair_are_read() -> None:
    for name, (text, expected) in PAIR.items():
        metric = UnifiedRewardEditMetric(ScriptedEngine(text), task="edit_pairwise_score")
        row = metric.evaluate("p", [IMAGE] * 3)[0]
        assert (row["image_1_score"], row["image_2_score"]) == expected, name
        assert row["score"] == list(expected), name


def checklist(text: str, dimension: str = "Quality", finish: str = "stop") -> dict[str, object] | None:
    answer = Answer(text, finish)  # type: ignore[arg-type]
    row = QwenImageBenchMetric(ScriptedEngine(answer)).evaluate("p", IMAGE, dimensions=dimension)[0]
    assert (row["error"] is None) == (row["raw_scores"][dimension] is not None)
    raw: dict[str, object] | None = row["raw_scores"][dimension]
    return raw


NOISE = {"Detail": {"Noise": 1}}
CHECKLIST = {
    "published": ('Fine.\n</think>\n\n{"Detail": {"Noise": {"score": 1}}}', NOISE),
    "no thinking": ('{"Detail": {"Noise": {"score": 1}}}', NOISE),
    "fence": ('</think>```json\n{"Detail": {"Noise": {"score": 1}}}\n```', NOISE),
    "prose": ('</think>Here it is: {"Detail": {"Noise": {"score": 1}}}', NOISE),
    "a string": ('</think>{"Detail": {"Noise": {"score": "1"}}}', NOISE),
    "a whole float": ('</think>{"Detail": {"Noise": {"score": 1.0}}}', NOISE),
    "no inner object": ('</think>{"Detail": {"Noise": 1}}', NOISE),
    "not applicable": ('</think>{"Detail": {"Noise": {"score": "N/A"}}}', {"Detail": {"Noise": None}}),
    "NA": ('</think>{"Detail": {"Noise": {"score": "na"}}}', {"Detail": {"Noise": None}}),
    "null": ('</think>{"Detail": {"Noise": {"score": null}}}', {"Detail": {"Noise": None}}),
    "flat": ('</think>{"Noise": {"score": 1}}', NOISE),
    "misplaced": ('</think>{"Realism": {"Noise": {"score": 1}}}', NOISE),
    "trailing comma": ('</think>{"Detail": {"Noise": {"score": 1},},}', NOISE),
    "a draft while thinking": (
        '{"Detail": {"Noise": {"score": 2}}}</think>{"Noise": {"score": 1}}',
        NOISE,
    ),
    # misread elsewhere
    "flat and nested": (
        '</think>{"Noise": {"score": 1}, "Realism": {"Physical Logic": {"score": 2}}}',
        {**NOISE, "Realism": {"Physical Logic": 2}},
    ),
    "a list": ("</think>[1, 2]", None),
    "a number": ("</think>5", None),
    "a fraction": ('</think>{"Detail": {"Noise": {"score": 1.9}}}', None),
    "true": ('</think>{"Detail": {"Noise": {"score": true}}}', None),
    "three": ('</think>{"Detail": {"Noise": {"score": 3}}}', None),
    # nothing to read
    "nothing scored": ("</think>{}", None),
    "no score": ('</think>{"Noise": {"reason": "x"}, "Edge Clarity": {"score": 1}}', None),
    "twice": ('</think>{"Detail": {"Noise": {"score": 1}}, "Realism": {"Noise": {"score": 2}}}', None),
    "double key": ('</think>{"Noise": {"score": 1}, "Noise": {"score": 2}}', None),
    "two objects": ('</think>{"Noise": {"score": 1}} {"Noise": {"score": 2}}', None),
    "truncated": ('</think>{"Detail": {"Noise": {"score": 1}, "Edge Cl', None),
    "a number beside level 2": (
        '</think>{"Realism": {"Physical Logic": {"score": 1}}, "overall": 2, "version": 0}',
        {"Realism": {"Physical Logic": 1}},
    ),
    "a number beside facets": ('</think>{"Noise": {"score": 1}, "overall": 2}', None),
    "a text beside facets": ('</think>{"reasoning": "x", "Noise": {"score": 1}}', NOISE),
    "a bare facet": ('</think>{"Noise": 1}', NOISE),
    "only a score": ('</think>{"score": 2}', None),
    "the score of level 2": ('</think>{"Realism": {"score": 2}}', None),
    "the score of level 2 beside a facet": (
        '</think>{"Realism": {"Physical Logic": {"score": 0}, "score": 2}}',
        None,
    ),
    "a score beside parts": ('</think>{"Noise": {"score": 2, "Edge Clarity": {"score": 0}}}', None),
    "a key in capitals": ('</think>{"Noise": {"Score": 1}}', None),
    "lower case": ('</think>{"detail": {"noise": {"score": 1}}}', NOISE),
    "no facet": ('</think>{"Detail": {"Overall": 2, "Noise": {"score": 1}}}', None),
    "no facet, in the form of one": (
        '</think>{"Detail": {"Noises": {"score": 2}, "Noise": {"score": 1}}}',
        {"Detail": {"Noises": 2, "Noise": 1}},
    ),
    "one more level": ('</think>{"Quality": {"Detail": {"Noise": {"score": 1}}}}', None),
    "corrected in words": ('</think>{"Noise": {"score": 1}} Correction: Noise deserves 0.', None),
    "prose after": ('</think>{"Noise": {"score": 1}}\nI hope this helps.', NOISE),
    "an exponent": ('</think>{"Noise": {"score": 1e0}}', None),
    "one and true": ('</think>{"Noise": {"score": 1}, "Noise": {"score": true}}', None),
    "nested deeply": ("</think>" + '{"a": ' * 5000, None),
    "empty": ("", None),
}


def test_the_checklist_is_read() -> None:
    read = {name: checklist(text) for name, (text, _) in CHECKLIST.items()}
    assert read == {name: expected for name, (_, expected) in CHECKLIST.items()}


def test_a_draft_in_unfinished_thinking_is_no_answer() -> None:
    assert checklist('{"Detail": {"Noise": {"score": 1}}}', finish="length") is None


def test_a_facet_that_the_model_calls_otherwise_has_its_official_name() -> None:
    raw = checklist('</think>{"Feature Mapping": {"score": 2}}', "Creative Generation")
    assert raw == {"Feature Matching": {"Feature Matching": 2}}


def test_there_are_sixty_answers_or_more() -> None:
    assert sum(map(len, (UNIFIED_REWARD_2, POINTWISE, RANK, PAIR, CHECKLIST))) >= 60


# Cut off by the limit of tokens


def test_a_number_that_may_have_been_cut_is_not_read() -> None:
    row = UnifiedReward2Metric(ScriptedEngine(Answer(lines(3, 4, "2.8"), "length"))).evaluate(
        "p", IMAGE
    )[0]
    assert (row["alignment"], row["coherence"], row["style"], row["score"]) == (3, 4, None, None)
    assert "cut off by max_new_tokens" in row["error"]
    assert row["raw_text"].endswith("2.8")


def test_an_answer_that_was_cut_off_while_thinking_says_so() -> None:
    row = UnifiedReward2Metric(ScriptedEngine(Answer("<think>\nLet me see", "length"))).evaluate(
        "p", IMAGE
    )[0]
    assert row["error"] == "the answer was cut off by max_new_tokens: it never stopped thinking"


def test_a_row_says_how_its_answer_ended_also_where_everything_was_read() -> None:
    cut = Answer(lines(3, 4, 2) + "\nBecause", "length")
    row = UnifiedReward2Metric(ScriptedEngine(cut)).evaluate("p", IMAGE)[0]
    assert (row["score"], row["error"], row["finish"]) == (3, None, "length")
    assert (
        UnifiedReward2Metric(ScriptedEngine(lines(3, 4, 2))).evaluate("p", IMAGE)[0]["finish"] == "stop"
    )
    cut = Answer('{"reasoning": "x", "score": [20, 18]', "length")
    row = UnifiedRewardEditMetric(ScriptedEngine(cut)).evaluate("p", [IMAGE] * 2)[0]
    assert (row["score"], row["error"], row["finish"]) == (19, None, "length")
    answers = ScriptedEngine('</think>{"Noise": 1}', Answer("Let me think", "length"))
    row = QwenImageBenchMetric(answers).evaluate("p", IMAGE, dimensions=["Quality", "Alignment"])[0]
    assert row["finish"] == {"Quality": "stop", "Alignment": "length"}


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("edit_pointwise_score", '{"reasoning": "It is'),
        ("edit_pairwise_rank", "Edited image 1 is better. But"),
        ("edit_pairwise_score", "Image 1: 2.5\nImage 2: 1"),
    ],
)
def test_an_edit_answer_that_was_cut_off_says_so(task: str, text: str) -> None:
    metric = UnifiedRewardEditMetric(ScriptedEngine(Answer(text, "length")), task=task)
    row = metric.evaluate("p", [IMAGE] * (2 if task == "edit_pointwise_score" else 3))[0]
    assert "cut off by max_new_tokens" in row["error"]


def test_a_checklist_that_was_cut_off_says_so() -> None:
    metric = QwenImageBenchMetric(ScriptedEngine(Answer("Let me think", "length")))
    row = metric.evaluate("p", IMAGE, dimensions="Quality")[0]
    assert "Quality: the answer was cut off by max_new_tokens" in row["error"]


# What becomes of an unreadable answer


def test_what_cannot_be_read_is_nan_in_compute() -> None:
    assert math.isnan(UnifiedReward2Metric(ScriptedEngine("?")).compute("p", IMAGE)[0])
    assert math.isnan(QwenImageBenchMetric(ScriptedEngine("?")).compute("p", IMAGE)[0])
    edit = UnifiedRewardEditMetric(ScriptedEngine("?"))
    assert math.isnan(edit.compute("p", [IMAGE] * 2)[0])
    assert math.isnan(edit.compute("p", [IMAGE] * 3, task="edit_pairwise_rank")[0])
    assert all(map(math.isnan, edit.compute("p", [IMAGE] * 3, task="edit_pairwise_score")[0]))


def test_what_cannot_be_read_raises_on_request_and_names_the_pair() -> None:
    engine = ScriptedEngine(lines(3, 4, 2), "no idea")
    metric = UnifiedReward2Metric(engine, on_parse_error="raise")
    with pytest.raises(AnswerError, match="pair 1 cannot be read: there is no Alignment Score") as error:
        metric.evaluate("p", [IMAGE, IMAGE])
    assert error.value.text == "no idea"
    with pytest.raises(AnswerError, match="pair 0"):
        UnifiedRewardEditMetric(ScriptedEngine("?"), on_parse_error="raise").compute("p", [IMAGE] * 2)
    with pytest.raises(AnswerError, match="Alignment: there is no JSON object"):
        QwenImageBenchMetric(ScriptedEngine("?"), on_parse_error="raise").compute("p", IMAGE)


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="on_parse_error must be one of"):
        UnifiedReward2Metric(ScriptedEngine("?"), on_parse_error="zero")


# 500 malformed answers: random truncations and mutations of good ones

GOOD = {
    "unified_reward_2": lines("2.694700002670288", "2.371500015258789", "2.802500009536743"),
    "edit_pointwise_score": '{"reasoning": "It follows all 3 changes.", "score": [20, 18.5]}',
    "edit_pairwise_rank": "Compared to edited image 1, edited image 2 is better.",
    "edit_pairwise_score": "Edited Image 1: 2.5\nEdited Image 2: -1.25",
    "qwen_image_bench": 'Let me see: 2 cats.\n</think>\n\n{"Realism": {"Physical Logic": {"score": 2}, '
    '"Material Texture": {"score": "N/A"}}, "Detail": {"Noise": {"score": 0}}}',
}
NOISY = [
    *'{}[]":,.-+0123456789eE/*` \n',
    "NaN",
    "null",
    "true",
    "<think>",
    "</think>",
    "image 1",
    "not ",
]


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(0, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 1, 5, 20]))
        replacement = rng.choice(["", rng.choice(NOISY), text[end : end + rng.randint(1, 20)]])
        text = text[:start] + replacement + text[end:]
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.5 else text


MALFORMED = [
    (form, mutated(GOOD[form], random.Random(seed)), random.Random(seed).choice(["stop", "length"]))
    for seed, form in zip(range(500), list(GOOD) * 100, strict=True)
]


def numbers_in(text: str) -> set[float]:
    """Return every number that some part of a text spells."""
    return {float(number) for number in re.findall(r"(?=([-+]?(?:\d+(?:\.\d+)?|\.\d+)))", text)} | {
        float(text[start:end])
        for match in re.finditer(r"[-+]?\d*\.?\d+", text)
        for start in range(match.start(), match.end())
        for end in range(start + 1, match.end() + 1)
        if re.fullmatch(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)", text[start:end])
    }


@pytest.mark.parametrize("form", GOOD)
def test_malformed_answers_never_raise_and_never_give_a_number_of_their_own(form: str) -> None:
    cases = [(text, finish) for kind, text, finish in MALFORMED if kind == form]
    assert len(cases) == 100
    unreadable = 0
    for text, finish in cases:
        engine = ScriptedEngine(Answer(text, finish))  # type: ignore[arg-type]
        if form == "unified_reward_2":
            row = UnifiedReward2Metric(engine).evaluate("p", IMAGE)[0]
            values = [row["alignment"], row["coherence"], row["style"]]
        elif form == "qwen_image_bench":
            row = QwenImageBenchMetric(engine).evaluate("p", IMAGE, dimensions="Quality")[0]
            groups = (row["raw_scores"]["Quality"] or {}).values()
            values = [score for group in groups for score in group.values()]
        else:
            count = 2 if form == "edit_pointwise_score" else 3
            row = UnifiedRewardEditMetric(engine, task=form).evaluate("p", [IMAGE] * count)[0]
            names = ("editing_success", "overediting", "winner", "image_1_score", "image_2_score")
            values = [row[name] for name in names if name in row]
        found = [value for value in values if value is not None]
        tie = found == [0] and form == "edit_pairwise_rank" and "equal" in text
        assert tie or set(map(float, found)) <= numbers_in(text), (text, found)
        unreadable += row["error"] is not None
    assert 10 < unreadable < 100, "some must be broken, and some must have survived"


def test_readers_say_what_they_read_and_why_not() -> None:
    reading = read_score_list(Answer('{"score": [26, 1]}'), ("a", "b"), low=0, high=25)
    assert reading.values == {"a": None, "b": None, "reasoning": None}
    assert reading.problem == "a is 26, outside 0 to 25"
    reading = read_checklist(
        Answer(json.dumps({"y": 2})),
        level2_of={"x": "a"},
        rename={"y": "x"},
        score_map={0: 0.0, 1: 60.0, 2: 100.0},
    )
    assert reading.values == {"raw": {"a": {"x": 2}}, "scores": {"a": {"x": 100.0}}}


FLOODS = [" ", "\n", "\t\u00a0", '\\"', ", ", "image 1 ", "score=[", "<answer>"]


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_is_refused_and_not_waited_for(flood: str) -> None:
    for start in (
        "Alignment Score",
        "Alignment Score (1-5): 3",
        "edited image 1",
        "Image 1: 2",
        "score:",
    ):
        answer = Answer(f'{{"score": [1, 2], "reasoning": "{start}{flood * (200_000 // len(flood))}x')
        labels = {"alignment": "Alignment Score"}
        assert read_labelled_scores(answer, labels, low=1, high=5).values
        assert read_pair_scores(answer).values
        assert read_score_list(answer, ("a", "b"), low=0, high=25).values
        assert read_winner(answer).problem
        assert read_checklist(answer, level2_of={}, rename={}, score_map={}).problem

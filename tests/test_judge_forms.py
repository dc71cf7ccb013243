"""Forms of answers that a person reads at once are read, and those that take a score back are not."""

# ruff: noqa: E501
from __future__ import annotations

import re
from typing import Any

from test_judge_answers import NOISE, lines

from diffsynth_metrics.judges.answers import (
    Reading,
    read_checklist,
    read_labelled_scores,
    read_pair_scores,
    read_score_list,
    read_winner,
)
from diffsynth_metrics.judges.engine import Answer
from diffsynth_metrics.judges.prompts import load_prompts

N3 = (None,) * 3
N2 = (None,) * 2

LABELLED: list[tuple[str, Any]] = [
    ('{"Alignment Score (1-5)": 3, "Coherence Score (1-5)": 4, "Style Score (1-5)": 2}', (3, 4, 2)),
    (
        '```json\n{\n "Alignment Score (1-5)": 3.5,\n "Coherence Score (1-5)": 4,\n "Style Score (1-5)": 2.5\n}\n```',
        (3.5, 4, 2.5),
    ),
    (
        '```json\n{\n "alignment_score": 3.5,\n "coherence_score": 4,\n "style_score": 2.5\n}\n```\nThe dog is brown rather than red.',
        (3.5, 4, 2.5),
    ),
    ('{"Alignment Score": "3", "Coherence Score": "4", "Style Score": "2"}', (3, 4, 2)),
    (
        lines(
            "2.5 (only 2 of the 3 dogs are visible)", "4 (no artifacts)", "3 - 2 of the colours clash"
        ),
        (2.5, 4, None),
    ),
    (
        lines(
            "2.5 (2 of the 3 dogs are visible)",
            "4, since 1 hand has 6 fingers",
            "3. The style is flat in 2 places.",
        ),
        (2.5, 4, 3),
    ),
    (lines("4.0 out of 5", "3 out of 5", "2 of 5"), (4, 3, 2)),
    (
        "**Alignment Score (1-5):** 3\n**Coherence Score (1-5):** **4**\n**Style Score (1-5): 2**",
        (3, 4, 2),
    ),
    ("__Alignment Score (1-5)__: __3__\n_Coherence Score_ (1-5): _4_\n*Style* Score: *2*", (3, 4, 2)),
    (
        "### Alignment Score (1-5)\n3.5\n\n### Coherence Score (1-5)\n4\n\n### Style Score (1-5)\n2",
        (3.5, 4, 2),
    ),
    (
        "**Alignment Score (1-5):**\n3.5\n**Coherence Score (1-5):**\n4\n**Style Score (1-5):**\n2",
        (3.5, 4, 2),
    ),
    (
        "### Alignment Score\nThe cat is red.\nScore: 3.5\n\n### Coherence Score\nNo glitches.\n**Score:** 4/5\n\n### Style Score\nFlat.\nScore: 2",
        (3.5, 4, 2),
    ),
    (
        "| Axis | Value |\n|---|---|\n| Alignment Score (1-5) | 3 |\n| Coherence Score (1-5) | 4 |\n| Style Score (1-5) | 2 |",
        (3, 4, 2),
    ),
    ("The alignment score is 3. The coherence score is 4. The style score is 2.", (3, 4, 2)),
    (
        lines(3, 4, 2)
        + "\n\nThe image shows 2 of the 3 dogs. The style score of 2 reflects the flat colours.",
        (3, 4, 2),
    ),
    ("1. Alignment Score (1-5): 3\n2. Coherence Score (1-5): 4\n3. Style Score (1-5): 2", (3, 4, 2)),
    (
        "Let me look at it. The image has a dog, and it would be better in red.\n" + lines(3, 4, 2),
        (3, 4, 2),
    ),
    (lines(3, 4, 2) + "\nOverall Score: 3", (3, 4, 2)),
    ("Final Scores:\n" + lines(3, 4, 2), (3, 4, 2)),
    ("Alignment Score (1-5): 3 | Coherence Score (1-5): 4 | Style Score (1-5): 2", (3, 4, 2)),
    ("Alignment Score (1–5): 3\nCoherence Score (1 – 5): 4\nStyle Score (1 to 5): 2", (3, 4, 2)),
    ("Alignment Score (1-5) = 3\nCoherence Score (1-5) – 4\nStyle Score (1-5): 2.", (3, 4, 2)),
    (lines("3 ⭐", 4, 2), (None, 4, 2)),
    (lines("3 (good, but not perfect)", "4 (could be sharper)", "2 (flat)"), (3, 4, 2)),
    (lines("3 (2/3 dogs)", "4", "2"), (3, 4, 2)),
    ("<answer>" + lines(3, 4, 2) + "</answer>", (3, 4, 2)),
    ("Here are the scores in the requested format:\n\n" + lines(3, 4, 2), (3, 4, 2)),
    ("I would rate this picture as follows:\n" + lines(3, 4, 2), (3, 4, 2)),
    # refused
    (
        "If the dog were red, Alignment Score (1-5): 5.\nCoherence Score (1-5): 4\nStyle Score (1-5): 2",
        (None, 4, 2),
    ),
    (
        "If the dog were red:\nAlignment Score (1-5): 5\nCoherence Score (1-5): 4\nStyle Score (1-5): 2",
        (None, 4, 2),
    ),
    (lines("5 if the dog were red", 4, 2), (None, 4, 2)),
    (lines("5, if the dog were red", 4, 2), (None, 4, 2)),
    (lines("5 (too generous)", 4, 2), (None, 4, 2)),
    (lines("5? No, 4", 4, 2), (None, 4, 2)),
    (lines(3, 4, 5) + "\nHmm, no.", N3),
    (lines(3, 4, 5) + "\nWait, that is too generous.", N3),
    (lines(3, 4, 5) + "\nActually, the style is a 2.", N3),
    (lines(3, 4, 5) + "\nI take that back.", N3),
    (lines("1-5", 4, 2), (None, 4, 2)),
    (lines("1 to 5 scale", 4, 2), (None, 4, 2)),
    (lines("1 (lowest) to 5 (highest)", 4, 2), (None, 4, 2)),
    (lines("3 (or 4)", 4, 2), (None, 4, 2)),
    (lines("3 (maybe 4)", 4, 2), (None, 4, 2)),
    (lines("3 (4)", 4, 2), (None, 4, 2)),
    (lines("3, 4", 4, 2), (None, 4, 2)),
    (
        "An ideal image has Alignment Score (1-5): 5.\nCoherence Score (1-5): 4\nStyle Score (1-5): 2",
        (None, 4, 2),
    ),
    (
        "A better image could have an Alignment Score (1-5): 5.\nCoherence Score (1-5): 4\nStyle Score (1-5): 2",
        (None, 4, 2),
    ),
    ("Not Alignment Score (1-5): 5.\nCoherence Score (1-5): 4\nStyle Score (1-5): 2", (None, 4, 2)),
    (
        "Alignment Score (1-5): 5 would be wrong.\nCoherence Score (1-5): 4\nStyle Score (1-5): 2",
        (None, 4, 2),
    ),
    (lines("N/A", 4, 2), (None, 4, 2)),
    (lines("~~3~~ 4", 4, 2), (None, 4, 2)),
    (lines(3, 4, 2) + "\nRevised Alignment Score (1-5): 4", N3),
    (lines(3, 4, 2) + "\nAlignment Score (1-5): N/A", (None, 4, 2)),
    (
        "Suppose the dog were red. Alignment Score (1-5): 5\nCoherence Score (1-5): 4\nStyle Score (1-5): 2",
        (None, 4, 2),
    ),
    (lines(3, 4, 2) + "\nOn second thought, alignment deserves a 2.", N3),
    (
        "Alignment Score: 3 for colour, 4 for shape\nCoherence Score (1-5): 4\nStyle Score (1-5): 2",
        (None, 4, 2),
    ),
]
LISTS: list[tuple[str, Any]] = [
    ('{"reasoning": "ok", "score": [20, 18]}\n\nThe edit keeps 2 of the 3 dogs.', (20, 18)),
    ('Here is my evaluation:\n\n{"reasoning": "ok", "score": [20, 18]}\n\nI hope this helps!', (20, 18)),
    (
        '```json\n{"reasoning": "ok", "score": [20, 18]}\n```\nThe first score of 20 reflects the success, the second score of 18 the overediting.',
        (20, 18),
    ),
    ('{"reasoning": "ok", "Score (0-25)": [20, 18]}', (20, 18)),
    ('{"reasoning": "ok", "**score**": [**20**, **18**]}', (20, 18)),
    ("**Score:** [20, 18]", (20, 18)),
    ("**Reasoning:** It is fine.\n\n**Score:** **[20, 18]**", (20, 18)),
    ("Reasoning: It is fine.\nScore:\n[20, 18]", (20, 18)),
    ("Score (0-25): [20, 18]", (20, 18)),
    ("score = [20, 18] (only 2 of the 3 dogs are kept)", (20, 18)),
    ("Final score: [20, 18].", (20, 18)),
    ("Scores: 20, 18", (20, 18)),
    ("The final score is [20, 18].", (20, 18)),
    ('{"reasoning": "He said "hi".", "score": [20, 18]}\nDone.', (20, 18)),
    ('<answer>{"reasoning": "ok", "score": [20, 18]}</answer>', (20, 18)),
    ('{\n"reasoning": "ok",\n"score": [\n20,\n18\n]\n}', (20, 18)),
    ('{\n"reasoning": "It says "hi".",\n"score": [\n20,\n18\n],\n}', (20, 18)),
    ('Here is the result in JSON format:\n{"reasoning": "ok", "score": [20, 18]}', (20, 18)),
    # refused
    ('A typical answer is {"score": [20, 18]}', N2),
    ('{"reasoning": "score: [1, 2]", "scor', N2),
    ("score: [20, 18]\nscore [19, 17]", N2),
    ("Score: [20, 18] would be too generous here.", N2),
    ("Score: [0, 25] scale.", N2),
    ("If it were red, score: [20, 18].", N2),
    ('If it were red: {"score": [20, 18]}', N2),
    ('{"score": [20, 18]}\nHmm, that is too generous.', N2),
    ('{"score": [20, 18]}\nActually the second should be lower.', N2),
    ('{"reasoning": "At first sight score: [10, 12], but the hat', N2),
    ('{"reasoning": "At first sight. score: [10, 12], but the hat', N2),
    ('{"reasoning": "At first sight,\nscore: [10, 12]\nbut the hat', N2),
    ('{"reasoning": "A perfect edit: score = [25, 25]\n', N2),
    ('{"score": [20, 18]} Wait, no.', N2),
    ("The scores range: [0, 25].", N2),
    ("Score range: [0, 25]", N2),
    ("score: [20, 18] or [19, 17]", N2),
    ("score: [20, 18]\nscore: [19, 17]", N2),
    ("score: [20, 18] if the hat counts", N2),
    ("score: [20, 18], if the hat counts", N2),
    ("Not score: [20, 18]", N2),
]
PAIRS: list[tuple[str, Any]] = [
    (
        "### Edited Image 1\nIt is good.\nScore: 3.5\n\n### Edited Image 2\nBad.\nScore: -1.5",
        (3.5, -1.5),
    ),
    ("### Edited Image 1\n3.5\n### Edited Image 2\n-1.5", (3.5, -1.5)),
    (
        "**Edited Image 1:**\n- Instruction Fidelity: follows 2 of 3 changes\n- **Score:** 3.5\n\n**Edited Image 2:**\n- Fidelity: 1 of 3\n- **Score:** -1.5",
        (3.5, -1.5),
    ),
    ("Image 1: −2.5\nImage 2: 1", (-2.5, 1)),
    ("Image 1: 2.5 (only 2 of the 3 dogs changed)\nImage 2: 1 (0 dogs changed)", (2.5, 1)),
    ("Image 1 keeps 2 of the 3 dogs.\nImage 2 keeps 1.\nImage 1: 4\nImage 2: 3", (4, 3)),
    ('{"image_1": {"score": 4.5}, "image_2": {"score": 3}}', (4.5, 3)),
    ('{"image_1": 4.5, "image_2": 3}\nImage 1 is more faithful.', (4.5, 3)),
    ('{"Edited Image 1 (score)": 4.5, "Edited Image 2 (score)": 3}', (4.5, 3)),
    ("| Edited Image 1 | 4.5 |\n| Edited Image 2 | 3 |", (4.5, 3)),
    ("Edited Image 1 score is 4.5. Edited Image 2 score is 3.", (4.5, 3)),
    ("**Scores:** [2.5, −1]", (2.5, -1)),
    ("Edited Image 1 — 4.5\nEdited Image 2 — 3", (4.5, 3)),
    (
        "### Edited Image 1\n- Fidelity score: 4\n- Realism score: 3\n- Overall score: 3.5\n### Edited Image 2\n- Fidelity score: 2\n- Overall score: 2.5",
        (3.5, 2.5),
    ),
    ("<answer>Image 1: 4\nImage 2: 3</answer>", (4, 3)),
    ("_Edited Image 1_: **4.5**\n_Edited Image 2_: **3**", (4.5, 3)),
    ("Edited Image 1's score: 4.5\nEdited Image 2's score: 3", (4.5, 3)),
    ("The score for edited image 1 is 4.5.\nThe score for edited image 2 is 3.", (4.5, 3)),
    # refused
    ("If the sky were blue, Image 1: 4\nImage 2: 3", N2),
    ("Image 1: 4\nImage 2: 3\nHmm, no, too generous.", N2),
    ("Image 1: 4\nImage 2: 3\nWait, the scores should be swapped.", N2),
    ("Image 1: 4\nImage 2: 3\nCorrection: image 1 gets 2.", N2),
    ("Image 1: 4 would be too generous.\nImage 2: 3", N2),
    ("Image 1: 0 to 10\nImage 2: 0 to 10", N2),
    ("Image 1: 4 or 5\nImage 2: 3", N2),
    ("Image 1: [0, 10] scale\nImage 2: 3", N2),
    ('If it were red:\n{"image_1": {"score": [8, 7]}, "image_2": {"score": [8, 7]}}', N2),
    (
        "### Edited Image 1\n1. Fidelity: good\n2. Realism: good\n### Edited Image 2\n1. Fidelity: bad",
        N2,
    ),
    ("### Edited Image 1\nScore: 3\n### Edited Image 2\nScore: 4\nOverall score: 8", N2),
    (
        "### Edited Image 1\nFidelity score: 3\nRealism score: 4\n### Edited Image 2\nFidelity score: 3",
        N2,
    ),
]
RANKS: list[tuple[str, Any]] = [
    (
        "Instruction fidelity: edited image 1 is better. Visual quality: edited image 2 is better. Overall, edited image 2 is better.",
        2,
    ),
    (
        "1. Instruction Fidelity: Edited image 1 is better.\n2. Visual Integrity: Edited image 2 is better.\n\nFinal verdict: Edited image 1 is better.",
        1,
    ),
    ("Edited image 1 is better. Edited image 2 is worse. Overall, edited image 2 is better.", 2),
    ("<answer>2</answer>", 2),
    ("<answer>1</answer>", 1),
    ("<answer>Image 2</answer>", 2),
    ("<answer>tie</answer>", 0),
    ("<think>hm</think><answer>\n2\n</answer>", 2),
    ("Edited image 2 is better because edited image 1 leaves the sky unchanged.", 2),
    ("Edited image 2 is better, while edited image 1 leaves the sky unchanged.", 2),
    ("Edited image 1 is better, as it follows the instruction and edited image 2 does not.", 1),
    ("Edited image 1 is better since edited image 2 changed 3 of the 4 dogs.", 1),
    ("Neither is better.", 0),
    ("Neither image is better than the other.", 0),
    ("Neither edited image is better.", 0),
    ("Neither of the two edited images is better.", 0),
    ("Neither edited image 1 nor edited image 2 is better.", 0),
    ("Edited image 1 is better. It removes the car, and the shadow is realistic.", 1),
    ("Edited image 1 is better. Edited image 2 changes the sky.", 1),
    ("**Edited Image 2 is better.**\n\nIt follows 2 of the 3 instructions.", 2),
    ("__Edited image 2__ is _better_", 2),
    ("`Edited image 2` is better", 2),
    ("After careful comparison, edited image 1 is better.", 1),
    ("I think edited image 1 is better.", 1),
    ("After evaluating both images, edited image 1 is better.", 1),
    ("Overall: Image 2", 2),
    ("Winner: Edited Image 2", 2),
    ("The winner is edited image 2.", 2),
    ("Better image: Edited Image 1", 1),
    ("### Final Output:\nEdited Image 2 is better.", 2),
    ("Final answer: 2", 2),
    ("The better edited image is edited image 2.", 2),
    ("Edited image 2 is the better edit.", 2),
    ('"Edited image 2 is better"', 2),
    ('{"answer": "Edited image 2 is better"}', 2),
    # refused
    ("Edited image 1 is better. Hmm, no.", None),
    ("Edited image 1 is better. Hmm.", None),
    ("Edited image 1 is better. Wait, edited image 2 follows the text.", None),
    ("Edited image 1 is better. But edited image 2 follows the text.", None),
    ("Edited image 1 is better, while edited image 2 is better in colour.", None),
    ("Edited image 1 is better if colour matters.", None),
    ("Edited image 1 is better. That is, if you ignore the hat.", None),
    ("If colour matters:\nEdited image 1 is better.", None),
    ("Edited image 1 is better than nothing.", None),
    ("Edited image 1 is better. Not really.", None),
    ("Edited image 1 is better. Or is it?", None),
    ("Edited image 1 is better. I was wrong.", None),
    (
        "Edited image 1 is better. Overall, edited image 2 is better. Final answer: edited image 1 is better.",
        None,
    ),
    ("Instruction fidelity: edited image 1 is better.", None),
    ("Edited image 1 is better. Edited image 2 is better.", None),
    ("Edited image 1 is better because it is worse.", None),
    ("Neither is bad.", None),
    ("I would say edited image 1 is better if it had a hat.", None),
    ("Maybe edited image 1 is better.", None),
    ("Suppose the instruction asked for blue. Edited image 1 is better.", None),
    ("Edited image 1 is better. Scratch that.", None),
    ("Some say: Edited image 1 is better. They are wrong.", None),
    ("<answer>3</answer>", None),
    ("<answer>1 or 2</answer>", None),
    ("2", None),
    ("<answer>12</answer>", None),
    ("Edited image 1 is better. On second thought, it is not.", None),
    ("One could say that edited image 1 is better.", None),
    ("Edited image 1 is better for the background; edited image 2 for the subject.", None),
]
CHECKLISTS: list[tuple[str, Any]] = [
    (
        '{"Realism": {"Physical_Logic": {"score": 2}}, "Detail": {"Edge_Clarity": {"score": 1}}}',
        {"Realism": {"Physical Logic": 2}, "Detail": {"Edge Clarity": 1}},
    ),
    ('</think>{"Detail": {"Noise": {"score": 1}}}\n\nI hope this helps.', NOISE),
    ('</think>```json\n{"Detail": {"Noise": {"score": 1}}}\n```\nAll other facets look fine.', NOISE),
    ('</think>{"Detail": {"**Noise**": {"score": 1}}}', NOISE),
    ('</think>{"Detail": {"Noise": {"score": **1**}}}', NOISE),
    ('</think>{"Detail": {"Noise (0-2)": {"score": 1}}}', NOISE),
    ('</think>**Detail**\n{"Detail": {"Noise": {"score": 1}}}', NOISE),
    ('</think>{"Detail": {"Noise": {"score": 1}}, "reasoning": "fine"}', NOISE),
    ('</think>Here {as asked} it is: {"Detail": {"Noise": {"score": 1}}}', NOISE),
    # refused
    ('</think>{"Detail": {"Noise": {"score": 1}}, "Summary": {"Overall Quality": {"score": 2}}}', None),
    ('</think>{"Detail": {"Noise": {"score": 1}}, "Overall": {"score": 2}}', None),
    ('</think>{"Detail": {"Noise": {"score": 1}, "Overall": {"score": 2}}}', None),
    ('</think>{"Detail": {"Noise": {"score": 1}}} Hmm, no.', None),
    ('</think>{"Detail": {"Noise": {"score": 1}}}\nNoise should be lower.', None),
    ('</think>If it were sharper: {"Detail": {"Noise": {"score": 1}}}', None),
]


TAKEN_BACK = [
    "Hmm, no.",
    "No, that is wrong.",
    "Wait.",
    "Wait, let me look again.",
    "Actually, no.",
    "Actually, I would lower it.",
    "Scratch that.",
    "On second thought, that is too high.",
    "The style is too low.",
    "I take it back.",
    "I take that back.",
    "That is too generous.",
    "This is too harsh.",
    "Let me reconsider.",
    "Let me correct that.",
    "Correction: it should be lower.",
    "Sorry, that was a mistake.",
    "My mistake.",
    "I was wrong.",
    "Ignore the above.",
    "Disregard this.",
    "That was only an example.",
    "This is just an example.",
    "Not my final answer.",
    "This is not final.",
    "But I am not sure.",
    "I am not sure about this.",
    "I cannot tell.",
    "Never mind.",
    "Oops.",
    "I changed my mind.",
    "The scores should be swapped.",
    "Please ignore these scores.",
    "These scores are wrong.",
    "This would only hold if the dog were red.",
    "Only if the dog were red.",
    "Unless the dog is red.",
    "Assuming the dog is red.",
    "That holds only under the assumption of a red dog.",
    "Rather the opposite.",
    "The opposite is true.",
    "Just kidding.",
    "I do not believe this.",
    "It is a draft.",
    "This is a placeholder.",
    "Revised below.",
]
SUPPOSED = [
    "If the dog were red, ",
    "If the dog were red: ",
    "If the dog were red:\n",
    "Had the dog been red, ",
    "Suppose the dog were red. ",
    "Assuming a red dog, ",
    "With a red dog, it would be ",
    "Were the dog red, ",
    "Imagine a red dog: ",
    "For example: ",
    "For example, ",
    "Example: ",
    "A perfect image would get ",
    "Not ",
    "Never ",
    "It is not ",
    "I would not say ",
    "Nobody would say: ",
    "Unless the dog is red, ",
    "Hypothetically, ",
    "Maybe ",
    "Perhaps ",
    "The format is: ",
    "The template says: ",
]
EXPLAINED = [
    "The image shows 2 of the 3 dogs.",
    "No artifacts are visible.",
    "I hope this helps!",
    "Let me know if you need anything else.",
    "The hand has six fingers, which is a clear glitch.",
    "It follows the instruction but leaves the sky unchanged.",
    "The dog should be red, but it is brown.",
    "The caption asks for a red dog; the image has a brown one.",
    "There is not a single flaw.",
    "The lighting could be better.",
    "The style is consistent with the prompt.",
    "Reasoning: the sky is blue instead of grey.",
    "The text would be easier to read in white.",
    "For example, the left hand is blurred.",
    "If you look closely, the fur is noisy.",
    "The background does not match the caption.",
    "The edit is faithful and natural.",
    "The composition is balanced, with a clear subject.",
    "Overall, the image is good.",
    "In summary, the result is decent.",
    "The car is correctly removed.",
    "There are 2 visible seams.",
    "The image looks like a photograph.",
    "I first looked at the colours.",
]
LABELS = {"a": "Alignment Score", "c": "Coherence Score", "s": "Style Score"}


def read_list(answer: Answer) -> Reading:
    return read_score_list(answer, ("x", "y"), low=0, high=25)


def read_quality(answer: Answer) -> Reading:
    texts = load_prompts("qwen_image_bench")
    return read_checklist(
        answer,
        level2_of=texts["level3_to_level2"]["Quality"],
        rename={},
        score_map={0: 0.0, 1: 60.0, 2: 100.0},
    )


def read_scores(answer: Answer) -> Reading:
    return read_labelled_scores(answer, LABELS, low=1, high=5)


GOOD: list[tuple[str, Any]] = [
    (lines(4, 3, 2), read_scores),
    (lines(4, 3, 2).replace("\n", ", ") + ".", read_scores),
    ("score: [20, 18].", read_list),
    ('{"reasoning": "ok", "score": [20, 18]}', read_list),
    ("Image 1: 4\nImage 2: 3", read_pair_scores),
    ("Image 1: 4, Image 2: 3.", read_pair_scores),
    ("Scores: [4, 3].", read_pair_scores),
    ("Edited image 1 is better.", read_winner),
    ('{"Detail": {"Noise": {"score": 1}}}', read_quality),
]


def check(cases: list[tuple[str, Any]], read: Any, value_of: Any) -> None:
    wrong = []
    for text, expected in cases:
        reading: Reading = read(Answer(text))
        found = value_of(list(reading.values.values()))
        if found != expected:
            wrong.append((text, expected, found, reading.problem))
    assert wrong == []


def test_labelled_scores() -> None:
    check(LABELLED, read_scores, tuple)


def test_lists_of_scores() -> None:
    check(LISTS, read_list, lambda values: tuple(values[:2]))


def test_pairs_of_scores() -> None:
    check(PAIRS, read_pair_scores, tuple)


def test_verdicts() -> None:
    check(RANKS, read_winner, lambda values: values[0])


def test_checklists() -> None:
    check(CHECKLISTS, read_quality, lambda values: values[0])


def test_what_is_taken_back_or_supposed_is_not_read() -> None:
    texts = [
        (text, changed, read)
        for text, read in GOOD
        for changed in (
            *(f"{text}{gap}{words}" for words in TAKEN_BACK for gap in (" ", "\n")),
            *(words + text for words in SUPPOSED),
        )
    ]
    for text, changed, read in texts:
        assert read(Answer(text)).problem is None, text
        assert read(Answer(changed)).problem is not None, changed


def test_what_is_explained_is_read() -> None:
    for text, read in GOOD:
        expected = read(Answer(text))
        for words in EXPLAINED:
            if read is read_quality and ("should" in words or re.search("[0-9]", words)):
                continue  # could correct a facet
            assert read(Answer(f"{text}\n\n{words}")) == expected, words


def test_a_number_inside_a_reasoning_that_was_cut_off_is_no_score() -> None:
    for text in (
        '{"reasoning": "A first impression is score: [10, 12], but the',
        '{"reasoning": "A first impression.\nscore = [10, 12]\nbut the',
        '{"reasoning": "A first impression. Scores: 10, 12. But the',
    ):
        for finish in ("length", "stop"):
            answer = Answer(text, finish)  # type: ignore[arg-type]
            assert read_score_list(answer, ("x", "y"), low=0, high=25).problem, text
    cut = Answer("The edit is good.\nImage 1: 4\nImage 2: 3", "length")
    assert read_pair_scores(cut).problem


REFUSED: list[tuple[Any, list[str]]] = [
    (
        read_list,
        [
            '{"score (0-10)": [8,9]}',
            "score (0-10): [8, 9]",
            "score (out of 10): [8, 9]",
            '{"score":[20,18],"final_score":[2,1]}',
            '{"score":[20,18],"revised_score":[2,1]}',
            '{"score":[8,9],"scale":10}',
            '{"score":[8,9],"scale":"0-10"}',
            '{"score":[8,9],"max_score":10}',
            '{"reasoning":"On a scale from 1 to 10.","score":[8,9]}',
            '{"score":[20,18],"final_score":"[2, 1]"}',
            '{"score":[20,18],"overall_score":2}',
            '{"Score (0-100)":[20,18]}',
        ],
    ),
    (
        read_scores,
        [
            lines("4 (out of 10)", 4, 4),
            lines("4 (max 10)", 3, 3),
            lines("2 (on a scale of 10)", 3, 3),
            "All scores out of 10.\n" + lines(3, 4, 5),
            lines("4 (minus 1 for the missing hat)", 3, 3),
            lines("2 (+0.5 for colour)", 3, 3),
            lines("4. Strictly speaking 3.", 2, 2),
            lines(4, 4, 4) + "\nThough really it deserves a 3.",
            lines(4, 4, 4) + "\nFinal: Alignment 2, Coherence 3, Style 5",
            "The ideal image:\n" + lines(5, 5, 5),
            "Draft:\n" + lines(4, 4, 4),
            "Rubric:\n" + lines(5, 5, 5),
            "### Draft:\n" + lines(4, 4, 4),
            "Scores on a 10-point scale:\n" + lines(4, 4, 4),
            "Draft scores:\n" + lines(4, 4, 4),
            lines(4, 3, 2) + "\n(maximum 10)",
        ],
    ),
    (
        read_quality,
        [
            '{"Detail":{"Noise":{"score":2,"scale":"0-10"}}}',
            '{"Detail":{"Noise (0-10)":{"score":2}}}',
            '{"Detail":{"Noise":{"score":2,"corrected_score":0}}}',
        ]
        + [
            f'{{"Detail":{{"Noise":{{"score":1}},"{n}":{{"score":2}}}}}}'
            for n in ("Mean", "Score", "Final", "Group Score", "Detail Score", "Detail", "Average")
        ],
    ),
    (
        read_winner,
        [
            "Edited image 1 is better. " + w
            for w in (
                "False.",
                "Make that edited image 2.",
                "My final answer is therefore 2.",
                "Final: 2",
                "I meant 2.",
                "Going with image 2.",
                "Wrong.",
                "I meant image 2.",
                "Sorry, 2.",
                "It is wrong.",
            )
        ],
    ),
    (
        read_pair_scores,
        [
            h + "Image 1: 4\nImage 2: 3"
            for h in (
                "Errors per image:\n",
                "Ranking:\n",
                "Number of artefacts:\n",
                "**Ranking:**\n",
                "Errors:\n",
                "Scores (lower is better):\n",
                "Number of mistakes: ",
                "Artifact count:\n",
            )
        ]
        + [
            "Image 1 (lower is better): 4\nImage 2 (lower is better): 3",
            "Image 1: 4 (lower is better)\nImage 2: 3",
        ],
    ),
]
READ: list[tuple[Any, list[str]]] = [
    (
        read_scores,
        [
            lines("4. The contrast is too high.", 3, 2),
            lines("4. The dog's collar is wrong.", 3, 2),
            lines("4", 3, 2) + "\nThe colours are not correct everywhere.",
            lines("4", 3, "2. The number of dogs is not correct."),
            lines("4", "3. 6 fingers.", 2),
            lines(4, 3, 2) + "\nThe contrast is too high.",
            lines(4, 3, 2) + "\nThe dog's collar is wrong.",
            lines("4 (two out of 3 dogs)", 3, 2),
            lines("4 (2 out of 3 dogs)", 3, 2),
            lines(4, 3, 2) + "\nAlignment: 2 of the 3 dogs are there.",
            "On a scale of 1 to 5:\n" + lines(4, 3, 2),
            "On a scale from 1 (worst) to 5 (best):\n" + lines(4, 3, 2),
            "Here are the scores:\n" + lines(4, 3, 2),
            "Evaluation based on the criteria:\n" + lines(4, 3, 2),
            "1. Alignment\n2. Coherence\n3. Style\n\n" + lines(4, 3, 2),
            lines("4. Good, but only 2 dogs.", 3, 2),
            lines(4, 3, 2).replace("(1-5):", "（1-5）："),
            lines("4。", "3。The hat is red.", 2),
            "Each score is out of 5.\n" + lines(4, 3, 2),
            lines("4 (minor flaws)", 3, 2),
        ],
    ),
    (
        read_list,
        [
            '{"reasoning":"on a scale of 0 to 25, good","score":[20,18]}',
            '{"score":[20,18],"max_score":"none"}',
            '{"score":[20,18],"final_score":[20,18]}',
            "Score (out of 25): [20, 18]",
            '{"score (0-25)":[20,18]}',
            '{"score (0 to 25)":[20,18], "final_remark":"3 dogs"}',
        ],
    ),
    (
        read_quality,
        [
            '{"Detail":{"Noise":{"score":1,"scale":"0-2"}}}',
            '{"Detail":{"Noise":{"score":1,"reason":"3 of 4"}}}',
            '{"Detail":{"Noise":{"score":1},"Meaningful Lines":{"score":2}}}',
        ],
    ),
    (
        read_winner,
        [
            "Edited image 1 is better. " + w
            for w in (
                "It is more faithful than edited image 2.",
                "It beats edited image 2.",
                "It keeps 2 of 3 dogs.",
                "The hat is wrong in edited image 2.",
                "The sky is unchanged in edited image 2.",
                "The contrast is too high in image 2.",
                "It shows both dogs, unlike image 2.",
            )
        ],
    ),
    (
        read_pair_scores,
        [
            "My evaluation of the errors and strengths:\nImage 1: 4\nImage 2: 3",
            "Image 1: 4 (few errors)\nImage 2: 3",
        ],
    ),
]


def test_other_scales_second_scores_corrections_and_headings_are_refused() -> None:
    read = [text for read, texts in REFUSED for text in texts if not read(Answer(text)).problem]
    assert read == []


def test_remarks_about_the_image_do_not_refuse_its_scores() -> None:
    refused = [text for read, texts in READ for text in texts if read(Answer(text)).problem]
    assert refused == []

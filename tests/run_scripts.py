"""Run scripts one after another in this process: what they import is imported once.

Reads from stdin a JSON list of [folder to run in, whether judges give readable answers, script, its
arguments...], and writes to stdout a JSON list of [what the script printed, its traceback or null].
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from unittest import mock

from diffsynth_metrics.judges.engine import Question
from diffsynth_metrics.judges.local import LocalEngine
from diffsynth_metrics.testing import ScriptedEngine

# Tiny judges write noise.
ANSWERS = {
    None: "Edited image 1 is better. score=[8,3]",
    False: "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 5",
}
# A facet of each dimension of Qwen-Image-Bench.
FACETS = {
    "Quality": "Noise",
    "Aesthetics": "Composition",
    "Alignment": "Color",
    "Real-world Fidelity": "Animals",
    "Creative Generation": "Imagination",
}


def answer(question: Question) -> str:
    if question.thinking is not True:
        return ANSWERS[question.thinking]
    asked = str(question.content[-1]).partition("# Evaluation Dimension\n")[2].partition("\n")[0]
    return f'</think>{{"{FACETS[asked]}": {{"score": 1}}}}'


def run(folder: str, readable: bool, *arguments: str) -> tuple[str, str | None]:
    os.chdir(folder)
    sys.argv[:] = arguments
    sys.path[0] = os.path.dirname(arguments[0])
    printed = io.StringIO()
    scripted = ScriptedEngine(answer)
    try:
        with contextlib.ExitStack() as context:
            context.enter_context(contextlib.redirect_stdout(printed))
            if readable:
                context.enter_context(mock.patch.object(LocalEngine, "ask", scripted.ask))
            runpy.run_path(arguments[0], run_name="__main__")
    except BaseException:
        return printed.getvalue(), traceback.format_exc()
    return printed.getvalue(), None


if __name__ == "__main__":
    print(json.dumps([run(*script) for script in json.load(sys.stdin)]))

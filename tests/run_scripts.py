"""Run scripts one after another in this process: what they import is imported once.

Reads from stdin a JSON list of [folder to run in, script, its arguments...], and writes to stdout a JSON
list of [what the script printed, its traceback or null].
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback


def run(folder: str, *arguments: str) -> tuple[str, str | None]:
    os.chdir(folder)
    sys.argv[:] = arguments
    sys.path[0] = os.path.dirname(arguments[0])
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(arguments[0], run_name="__main__")
    except BaseException:
        return printed.getvalue(), traceback.format_exc()
    return printed.getvalue(), None


if __name__ == "__main__":
    print(json.dumps([run(*script) for script in json.load(sys.stdin)]))

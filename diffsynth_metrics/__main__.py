"""``python -m diffsynth_metrics`` is the command ``diffsynth-metrics``."""

import sys

from diffsynth_metrics.cli import main

if __name__ == "__main__":
    sys.exit(main())

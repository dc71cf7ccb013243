"""What test_killed_runs.py kills: score the pictures of a CSV with three metrics, a few at a time."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch

from diffsynth_metrics.evaluation import Sample, run_folder, sample_scoring, score

data, out, clip, pickscore = sys.argv[1:]
torch.set_num_threads(1)
# Many small parts, so that it is killed between two of them and not at their end.
sample_scoring._LARGEST_CHUNK = 8
run_folder._ROWS_OF_PART = 8

with Path(data).open(newline="") as file:
    samples = [
        Sample(row["id"], row["prompt"], Path(data).parent / row["image"], seed=row["seed"])
        for row in csv.DictReader(file)
    ]
score(samples, ["shapes", f"clip={clip}", f"pickscore={pickscore}"], out=out)

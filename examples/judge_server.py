"""UnifiedReward 2.0 on a server: three lines, whichever server runs the checkpoint.

Start one of these where the GPU is, FOLDER being a download of the checkpoint (19 GB):

    vllm serve FOLDER --port 8000 --served-model-name UnifiedReward --enable-prefix-caching
    transformers serve FOLDER --port 8000

    python examples/judge_server.py --url http://127.0.0.1:8000/v1

Without --url a scripted answer takes the place of the server's.
"""

import argparse

from PIL import Image

from diffsynth_metrics import UnifiedReward2Metric
from diffsynth_metrics.testing import ScriptedEngine

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--url", help="address of the server, which ends with /v1")
url = parser.parse_args().url

if url is None:
    text = "Alignment Score (1-5): 4.25\nCoherence Score (1-5): 3.75\nStyle Score (1-5): 4"
    metric = UnifiedReward2Metric(ScriptedEngine(text))
else:
    metric = UnifiedReward2Metric.from_server(url)
row = metric.evaluate("a brown wall", Image.new("RGB", (640, 480), "brown"))[0]
print(f"score: {row['score']}" if row["error"] is None else f"no score: {row['error']}")
print(f"the answer took {dict(row['usage']) or 'nothing'}: {row['raw_text']!r}")

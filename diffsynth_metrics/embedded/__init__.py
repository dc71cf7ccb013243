"""The small trained model that the quickstart runs on, and the pictures that it was trained with."""

from typing import Any

SHAPES_CARD: dict[str, Any] = {
    "name": "CLIP of drawn shapes (embedded)",
    "range": "about 19 where prompt and picture fit, below 15 where not",
    "weights_license": "Apache-2.0",
    "notes": "It knows drawn shapes, their colours, sizes and backgrounds, and nothing else.",
    "good_for": "trying the package without a download; it does not judge real pictures",
    "download": "none",
    "memory": "2 MB",
}
"""What the card of ``ModelConfig.embedded("shapes")`` says otherwise than that of CLIP."""

"""What metrics share whose checkpoints have open_clip's layout: its network and its tokenizer."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import Tensor

from diffsynth_metrics.dual_encoder import DualEncoderMetric
from diffsynth_metrics.networks.open_clip import detach_heads
from diffsynth_metrics.tokens import TokenizedPrompts, cut_prompts, padded

__all__ = ["OpenCLIPMetric"]


class OpenCLIPMetric(DualEncoderMetric):
    """A dual encoder on open_clip's CLIP. Prompts go through open_clip's own tokenizer.

    It repairs text (ftfy, HTML entities) and lowers its case. A metric says which architecture it
    builds, and its formula.
    """

    config_file = "open_clip_config.json"
    float32_parts = ("logit_scale", "text_projection", "visual.proj", "heads")
    model: open_clip.CLIP

    def __init__(self, model: open_clip.CLIP, processor: None = None, **base: Any) -> None:
        """Wrap a loaded network; users call ``from_pretrained``."""
        super().__init__(model, processor, **base)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
        self.max_length = model.context_length

    @classmethod
    def finish(cls, model: Any, dtype: torch.dtype) -> open_clip.CLIP:
        """Take the projections out of the towers, which open_clip would run in the towers' dtype."""
        detach_heads(model)
        return model

    def tokenize(self, prompts: list[str]) -> TokenizedPrompts:
        """Tokenize as open_clip does; whole at first, so that a cut prompt is noticed."""
        begin, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        ids = [[begin, *self.tokenizer.encode(prompt), end] for prompt in prompts]
        return cut_prompts(ids, self.max_length)

    def embed_text(self, ids: list[list[int]]) -> Tensor:
        """Embed texts, padded with zeros to the network's context as open_clip pads them."""
        rows = padded(ids, 0, self.model.context_length)
        return self._projected(self.model.encode_text(rows.to(self.device)), "text")

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Embed images with the image tower."""
        return self._projected(self.model.encode_image(pixel_values.to(self.dtype)), "visual")

    def _projected(self, pooled: Tensor, tower: str) -> Tensor:
        head: Tensor = self.model.heads[tower]
        return pooled.to(head.dtype) @ head

"""Rewards for DanceGRPO, which saves every image and passes its path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffsynth_metrics.rewards.adapters.common import Reward
from diffsynth_metrics.rewards.batches import has_videos


class _DanceGRPOReward(Reward):
    """A function ``(image_paths, prompts) -> rewards`` for DanceGRPO's inline reward code.

    It takes one path (or image, or with `frames` a video) and one prompt, or lists, and returns float32
    ``[N]`` on the metric's device. Its method ``reward`` does the same, so that it can be the trainer's
    HPSv3 ``reward_model``.
    """

    framework = "dance_grpo"
    parts_of_groups = "DanceGRPO scores one image per call, and normalises the gathered rewards itself"

    def __call__(self, images: Any, prompts: str | Sequence[str], sources: Any = None) -> Tensor:
        one = isinstance(images, (str, os.PathLike)) or not hasattr(images, "__len__")
        one = one or getattr(images, "ndim", 4) == 3
        # With one prompt as a text, pictures are the frames of one video.
        if one or (self.frames and isinstance(prompts, str) and not has_videos(images)):
            images, sources = [images], None if sources is None else [sources]
        texts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        return self.score(self.batch(texts, images, sources))[0].float()

    reward = __call__


to_dance_grpo = _DanceGRPOReward

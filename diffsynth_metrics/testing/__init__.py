"""Tiny random checkpoints of every metric and a scripted judge, for our tests and for users' own CI.

A tiny checkpoint has every file of the real one and loads through the ordinary path in well under a
second; its scores mean nothing. A tiny judge writes noise that its metric cannot read; a judge that says
what a test wants is made of a :class:`ScriptedEngine`, ``UnifiedReward2Metric(ScriptedEngine(text))``.

Example:
    >>> folder = tiny_checkpoint("pickscore", tmp_path)
    >>> metric = PickScoreMetric.from_pretrained(ModelConfig(path=folder))
"""

from __future__ import annotations

import os
from pathlib import Path

from diffsynth_metrics.testing.encoders import (
    clip_vocabulary,
    write_aesthetic,
    write_clip,
    write_fid,
    write_hpsv2,
    write_image_reward,
    write_lpips,
)
from diffsynth_metrics.testing.hpsv3 import write_hpsv3
from diffsynth_metrics.testing.judges import write_qwen3_5, write_qwen3_vl
from diffsynth_metrics.testing.random_weights import randomize
from diffsynth_metrics.testing.scripted_engine import ScriptedEngine
from diffsynth_metrics.testing.vit import (
    write_clip_336,
    write_clip_vit,
    write_dino,
    write_dinov2,
    write_dinov2_l,
)

__all__ = ["TINY_CHECKPOINTS", "ScriptedEngine", "clip_vocabulary", "randomize", "tiny_checkpoint"]

TINY_CHECKPOINTS = {
    "aesthetic": write_aesthetic,
    "bioclip": write_hpsv2,
    "clip": write_clip,
    "cmmd": write_clip_336,
    "fd_dinov2": write_dinov2_l,
    "fid": write_fid,
    "hpsv2": write_hpsv2,
    "hpsv3": write_hpsv3,
    "image_reward": write_image_reward,
    "image_similarity": write_clip_vit,
    "image_similarity_dino": write_dino,
    "image_similarity_dinov2": write_dinov2,
    "lpips": write_lpips,
    "pickscore": write_clip,
    "qwen_image_bench": write_qwen3_5,
    "unified_reward_2": write_qwen3_5,
    "unified_reward_edit": write_qwen3_vl,
}
"""Name of a metric, and of a protocol other than its default, to what writes its tiny checkpoint."""


def tiny_checkpoint(name: str, folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write a complete tiny random checkpoint.

    Args:
        name: A metric, one of :data:`TINY_CHECKPOINTS`.
        folder: Where the files go; it is made if needed.
        seed: The same seed gives the same weights.

    Returns:
        The folder, for ``ModelConfig(path=...)``.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in TINY_CHECKPOINTS:
        raise ValueError(f"there is no tiny checkpoint {name!r}; known: {', '.join(TINY_CHECKPOINTS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    TINY_CHECKPOINTS[name](folder, seed)
    return folder

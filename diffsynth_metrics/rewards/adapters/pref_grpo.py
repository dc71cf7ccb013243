"""Rewards for Pref-GRPO, whose dispatcher passes paths of images as items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffsynth_metrics.rewards.adapters.common import Reward


class _PrefGRPOReward(Reward):
    """A reward of Pref-GRPO's dispatcher, ``items -> (rewards [N], {name: N floats})``.

    An item has ``"path"`` and ``"prompt"``; that of an edit ``"source_path"``, ``"edited_path"`` and
    ``"instruction"``. A :class:`RewardSet` normalises within groups only with a `group_size`.
    """

    framework = "pref_grpo"

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> tuple[Tensor, dict[str, list[float]]]:
        prompts = [item.get("instruction") or item.get("prompt") or "" for item in items]
        images = [item.get("edited_path") or item["path"] for item in items]
        sources = [item.get("source_path") for item in items]
        rewards = self.score(self.batch(prompts, images, sources))[0].float()
        return rewards, {self.__name__: rewards.tolist()}


to_pref_grpo = _PrefGRPOReward

"""Rewards for verl-omni, which asks for one image or video per call and awaits the answer."""

from __future__ import annotations

from typing import Any

from diffsynth_metrics.rewards.adapters.common import RewardSource
from diffsynth_metrics.rewards.adapters.verl import SingleReward


class _VerlOmniReward(SingleReward):
    """A ``compute_score`` for verl-omni's visual rewards, ``compute_score_<metric>`` by default.

    It is called by keyword with an image (uint8 ``[3, H, W]``) or a video ``[T, 3, H, W]``, of which
    every ``extra_info["frame_interval"]``-th frame counts; the prompt is ``ground_truth``. verl-omni
    makes what is raised 0.0 unless the reward has ``required: true``.
    """

    framework = "verl_omni"

    def __init__(self, source: RewardSource, *, name: str | None = None, **options: Any) -> None:
        super().__init__(source, **options)
        self.__name__ = name or f"compute_score_{self.__name__}"

    async def __call__(
        self,
        data_source: str,
        solution_image: Any,
        ground_truth: str,
        extra_info: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        if getattr(solution_image, "ndim", 3) == 4:
            solution_image = solution_image[:: (extra_info or {}).get("frame_interval", 1)]
        return await self.one(ground_truth, solution_image, extra_info)


to_verl_omni = _VerlOmniReward

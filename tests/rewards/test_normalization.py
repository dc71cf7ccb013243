"""Normalisations against hand-computed values, and what they do with NaN and equal scores."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from diffsynth_metrics.rewards import FixedScale, GroupRelative, Rank
from diffsynth_metrics.rewards.normalization import collapsed, find_normalization
from diffsynth_metrics.rewards.scoring import Scored

NAN = math.nan
SCORES = torch.tensor([1.0, 3.0, 5.0, 10.0, 20.0, 20.0])
GROUPS = [[0, 1, 2], [3, 4, 5]]


def scored(values: torch.Tensor) -> Scored:
    return Scored(values, [None] * len(values))


def test_none_changes_nothing() -> None:
    assert torch.equal(find_normalization("none")(scored(SCORES), GROUPS), SCORES)


def test_a_fixed_scale_subtracts_and_divides() -> None:
    assert FixedScale(2, 4)(scored(SCORES), GROUPS).tolist() == [
        -0.25,
        0.25,
        0.75,
        2,
        4.5,
        4.5,
    ]


@pytest.mark.parametrize(("mean", "std"), [(0, 0), (0, -1), (NAN, 1), (0, math.inf)])
def test_a_fixed_scale_must_be_one(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="mean must be finite and std positive"):
        FixedScale(mean, std)


def test_group_relative_is_the_advantage_of_each_group() -> None:
    result = GroupRelative(epsilon=0.0)(scored(SCORES), GROUPS).tolist()
    assert result[:3] == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert result[3:] == pytest.approx([-math.sqrt(2), math.sqrt(0.5), math.sqrt(0.5)])


def test_epsilon_is_added_to_the_spread() -> None:
    result = GroupRelative(epsilon=1.0)(scored(torch.tensor([0.0, 2.0])), [[0, 1]])
    assert result.tolist() == [-0.5, 0.5]


def test_the_spread_is_that_of_flow_grpo_or_with_a_correction_that_of_trl() -> None:
    scores, one = torch.tensor([1.0, 2.0, 6.0]), [[0, 1, 2]]
    flow_grpo = [(x - 3) / (statistics.pstdev([1, 2, 6]) + 1e-4) for x in (1, 2, 6)]
    trl = [(x - 3) / (statistics.stdev([1, 2, 6]) + 1e-4) for x in (1, 2, 6)]
    assert GroupRelative()(scored(scores), one).tolist() == pytest.approx(flow_grpo)
    assert GroupRelative(correction=1)(scored(scores), one).tolist() == pytest.approx(trl)
    assert GroupRelative(correction=1)(scored(scores[:1]), [[0]]).tolist() == [0]
    with pytest.raises(ValueError, match="correction must be 0 or 1, got 2"):
        GroupRelative(correction=2)


def test_equal_scores_of_a_group_are_zero_and_not_amplified_noise() -> None:
    scores = torch.tensor([20.0, 20.000002, 20.0, 7.0])
    groups = [[0, 1, 2], [3]]
    assert GroupRelative()(scored(scores), groups).tolist() == [0, 0, 0, 0]


def test_ranks_are_shares_and_ties_share() -> None:
    assert Rank()(scored(SCORES), GROUPS).tolist() == [0, 0.5, 1, 0, 0.75, 0.75]
    assert Rank()(scored(torch.tensor([3.0])), [[0]]).tolist() == [0.5]
    rounded = torch.tensor([1.0, 1 + 1e-7, 1 - 1e-7, NAN])
    assert Rank()(scored(rounded), [[0, 1, 2, 3]]).tolist()[:3] == [0.5, 0.5, 0.5]


def test_ranks_are_not_rounded_to_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        ranks = Rank()(scored(torch.arange(12, dtype=torch.float32)), [range(12)])
    finally:
        torch.set_default_dtype(before)
    assert ranks.dtype == torch.float32
    assert ranks.tolist() == pytest.approx([i / 11 for i in range(12)])


@pytest.mark.parametrize("normalize", [FixedScale, GroupRelative, Rank])
def test_nan_stays_nan_and_changes_no_other_sample(normalize: Any) -> None:
    holes = torch.tensor([1.0, NAN, 3.0, 5.0, 10.0, 20.0, 20.0, NAN])
    groups = [[0, 1, 2, 3], [4, 5, 6], [7]]
    result = normalize()(scored(holes), groups)
    assert result.isnan().tolist() == holes.isnan().tolist()
    kept = ~holes.isnan()
    torch.testing.assert_close(result[kept], normalize()(scored(SCORES), GROUPS))


@pytest.mark.parametrize("normalize", [FixedScale, GroupRelative])
def test_gradients_flow_through_what_is_differentiable(normalize: Any) -> None:
    scores = SCORES.clone().requires_grad_()
    (normalize()(scored(scores), GROUPS) * torch.arange(6.0)).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad.abs().sum() > 0


@pytest.mark.parametrize("normalize", [FixedScale, GroupRelative])
def test_statistics_carry_no_gradient(normalize: Any) -> None:
    """Otherwise the gradient of a sum over a group is zero: whatever raises a score raises the mean."""
    scores = SCORES.clone().requires_grad_()
    normalize()(scored(scores), GROUPS).sum().backward()
    assert scores.grad is not None and (scores.grad > 0).all()


def test_names_are_short_forms() -> None:
    for name, kind in {
        "none": FixedScale,
        "group": GroupRelative,
        "rank": Rank,
    }.items():
        assert isinstance(find_normalization(name), kind)
    with pytest.raises(ValueError, match=r"normalize must be one of none, group, rank.*'zscore'"):
        find_normalization("zscore")
    with pytest.raises(ValueError, match="normalize must be one of"):
        find_normalization(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [GroupRelative, Rank])
def test_a_group_has_two_samples_or_more(kind: Any) -> None:
    for size in (1, 0, True):
        with pytest.raises(ValueError, match="group_size must be at least 2"):
            kind(group_size=size)
    assert kind(group_size=2).group_size == 2


def test_a_group_says_nothing_when_its_scores_are_equal_or_there_is_one() -> None:
    scores = [1.0, 1.0, 2.0, 3.0, 4.0, NAN, NAN]
    groups = [[0, 1], [2, 3], [4, 5], [6]]
    assert collapsed(scores, groups, alone=False) == [0]
    assert collapsed(scores, groups, alone=True) == [0, 2]

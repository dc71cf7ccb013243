"""The formulas of a comparison, against hand-computed values, statsmodels, and simulations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm

from diffsynth_metrics.evaluation.statistics import (
    Estimate,
    bradley_terry,
    bradley_terry_intervals,
    difference_of_means,
    effect_size,
    estimate_mean,
    estimate_win_rate,
    holm,
    outcomes,
    prompt_means,
    standard_error,
    wilcoxon_p,
)

PROMPTS, SEEDS = 200, 4
OPTIONS: dict[str, Any] = {"confidence": 0.95, "seed": 0, "resamples": 9999, "images": 0}


def simulate(generator: np.random.Generator, shift: float = 0.0) -> np.ndarray:
    """Differences of two models, ``[P, S]``: what a prompt does to a model is common to its seeds.

    The difficulty of a prompt is common to both models and leaves their difference. Pictures of a prompt
    correlate with 0.5. `shift` is in standard deviations of the differences of prompt means.
    """
    difficulty = generator.normal(scale=3, size=(1, PROMPTS, 1))
    of_prompt = generator.normal(size=(2, PROMPTS, 1))
    of_picture = generator.normal(size=(2, PROMPTS, SEEDS))
    first, second = difficulty + of_prompt + of_picture
    return second - first + shift * math.sqrt(2 * (1 + 1 / SEEDS))


def test_prompt_means_are_the_same_in_any_order() -> None:
    prompts, scores = ["b", "a", "b", "b"], [0.1, 7.0, 0.2, 0.3]
    names, means = prompt_means(prompts, scores)
    assert names == ["a", "b"]
    assert means.tolist() == pytest.approx([7.0, 0.2])
    for order in itertools.permutations(range(4)):
        again = prompt_means([prompts[i] for i in order], [scores[i] for i in order])
        assert again[1].tolist() == means.tolist()  # to the last bit, since ties depend on it


def test_means_of_scores_that_cancel_out_are_exact() -> None:
    scores = [-0.7, 0.3, 0.4]
    once, twice = (prompt_means(["p"] * 3 * n, scores * n)[1] for n in (1, 2))
    assert difference_of_means(once, twice).tolist() == [0]
    assert once[0] == pytest.approx(math.fsum(scores) / 3, rel=1e-12, abs=0)
    assert prompt_means([], [])[1].tolist() == []


def test_rounding_does_not_break_a_tie() -> None:
    first, second = np.array([0.1 + 0.2, 1.0, 0.0]), np.array([0.3, 1.0 + 1e-6, 0.0])
    assert first[0] != second[0]
    assert np.sign(difference_of_means(first, second)).tolist() == [0, 1, 0]


def test_the_standard_error_is_statsmodels_clustered_one() -> None:
    for seed in range(3):
        pictures = simulate(np.random.default_rng(seed))
        groups = np.repeat(np.arange(PROMPTS), SEEDS)
        fit = sm.OLS(pictures.ravel(), np.ones(pictures.size)).fit(
            cov_type="cluster", cov_kwds={"groups": groups}
        )
        assert standard_error(pictures.mean(axis=1)) == pytest.approx(float(fit.bse[0]), rel=1e-6)
        # Pictures taken as independent look more certain than they are.
        assert standard_error(pictures.ravel()) < 0.7 * fit.bse[0]


def test_intervals_agree_with_statsmodels_clustered_errors() -> None:
    # An interval of 9,999 resamples is itself uncertain by 1 %.
    options = {**OPTIONS, "resamples": 60_000}
    for seed in range(3):
        pictures = simulate(np.random.default_rng(seed))
        groups = np.repeat(np.arange(PROMPTS), SEEDS)
        fit = sm.OLS(pictures.ravel(), np.ones(pictures.size)).fit(
            cov_type="cluster", cov_kwds={"groups": groups}
        )
        low, high = fit.conf_int()[0]
        found = estimate_mean(pictures.mean(axis=1), **options)
        assert found.low is not None and found.high is not None
        assert found.value == pytest.approx(float(fit.params[0]))
        assert found.high - found.low == pytest.approx(high - low, rel=0.02), seed


def test_an_interval_leans_to_the_side_of_the_long_tail() -> None:
    # BCa's point: a symmetric interval of skewed values would miss too often above.
    values = np.random.default_rng(0).lognormal(sigma=1.2, size=60)
    found = estimate_mean(values, **OPTIONS)
    assert found.low is not None and found.high is not None and found.value is not None
    assert found.high - found.value > 1.2 * (found.value - found.low)


def test_an_interval_is_repeatable_and_mirrors() -> None:
    values = np.random.default_rng(0).gamma(2, size=50) - 1
    found = estimate_mean(values, **OPTIONS)
    assert found == estimate_mean(values, **OPTIONS)
    assert found != estimate_mean(values, **{**OPTIONS, "seed": 1})
    mirrored = estimate_mean(-values, **OPTIONS)
    assert mirrored.value is not None and mirrored.low is not None and mirrored.high is not None
    assert (-mirrored.value, -mirrored.high, -mirrored.low) == pytest.approx(
        (found.value, found.low, found.high)
    )


def test_what_is_not_known_is_none() -> None:
    nothing, one, same = np.array([]), np.array([0.5]), np.full(4, 0.1 + 0.2)
    assert estimate_mean(nothing, **OPTIONS) == Estimate(None, None, None, 0, 0)
    assert estimate_mean(one, **OPTIONS) == Estimate(0.5, None, None, 1, 0)
    assert estimate_mean(same, **OPTIONS) == Estimate(0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2, 4, 0)
    assert estimate_win_rate(nothing, **OPTIONS) == Estimate(None, None, None, 0, 0)
    assert estimate_win_rate(one, **OPTIONS) == Estimate(1.0, None, None, 1, 0)
    for values in (nothing, one):
        assert standard_error(values) is None
        assert wilcoxon_p(values) is None
    assert [effect_size(values) for values in (nothing, one, same)] == [None] * 3


def test_ties_are_half_a_win() -> None:
    gains = np.array([2.0, 0.0, -1.0, 3.0, 0.0, 5.0])
    assert outcomes(gains).tolist() == [1, 0.5, 0, 1, 0.5, 1]
    rate = estimate_win_rate(gains, **OPTIONS)
    assert rate.value == pytest.approx(4 / 6)
    assert rate.low is not None and rate.high is not None
    assert 0 <= rate.low < 4 / 6 < rate.high <= 1
    assert estimate_win_rate(np.zeros(5), **OPTIONS) == Estimate(0.5, 0.5, 0.5, 5, 0)


def test_a_run_that_wins_everything_is_not_certain_to_win() -> None:
    rate = estimate_win_rate(np.array([1.0, 2.0, 3.0]), **OPTIONS)
    assert (rate.value, rate.high) == (1, 1)
    assert rate.low == pytest.approx(0.025 ** (1 / 3))
    lost = estimate_win_rate(-np.array([1.0, 2.0, 3.0]), **OPTIONS)
    assert (lost.low, lost.high) == pytest.approx((0, 1 - 0.025 ** (1 / 3)))


def test_the_win_rates_interval_covers_what_it_says() -> None:
    generator = np.random.default_rng(0)
    options = {**OPTIONS, "resamples": 999}
    covered = 0
    for _ in range(200):
        rate = estimate_win_rate(generator.normal(loc=0.5, size=80), **options)
        assert rate.low is not None and rate.high is not None
        covered += rate.low <= 0.6915 <= rate.high
    assert 0.90 <= covered / 200 <= 0.99


def test_wilcoxon_by_hand() -> None:
    # Ranks 1, 2, 3, all positive: of the 8 signs, two are as far out.
    assert wilcoxon_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    # Ranks 1 and 2 against 3: equal sums, so nothing is further in.
    assert wilcoxon_p(np.array([1.0, 2.0, -3.0])) == 1
    # Tied sizes, as judges' whole numbers have: ranks 2, 2, 2, all positive.
    assert wilcoxon_p(np.array([1.0, 1.0, 1.0])) == pytest.approx(2 / 8)
    # Ranks 1.5, 1.5, 3, 4; one of 1.5 is negative, sum 7: of 16 signs +-10 and twice +-7.
    assert wilcoxon_p(np.array([1.0, -1.0, 2.0, 5.0])) == pytest.approx(6 / 16)
    # A prompt that does not differ says nothing.
    assert wilcoxon_p(np.array([1.0, 2.0, 3.0, 0.0, 0.0])) == pytest.approx(2 / 8)
    assert wilcoxon_p(np.zeros(9)) == 1
    assert wilcoxon_p(np.r_[np.ones(80), -np.ones(20)]) < 1e-8


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []
    # What was not tested takes no share.
    assert holm([None, 0.02, None]) == [None, 0.02, None]


def test_two_runs_have_the_log_odds_as_strengths() -> None:
    logs = bradley_terry(np.array([[0, 30], [10, 0]]))
    assert logs.tolist() == pytest.approx([math.log(3) / 2, -math.log(3) / 2])


def test_strengths_that_made_the_wins_are_found() -> None:
    true = np.array([1.2, 0.3, -0.4, -1.1])
    wins = 100 / (1 + np.exp(true[None, :] - true[:, None]))
    assert bradley_terry(wins).tolist() == pytest.approx(true.tolist(), abs=1e-6)
    # The diagonal is not read, runs may be renamed, and many are fitted at once.
    order = [2, 0, 3, 1]
    both = np.stack([wins, wins[np.ix_(order, order)]]) + 7 * np.eye(4)
    assert bradley_terry(both)[1].tolist() == pytest.approx(true[order].tolist(), abs=1e-6)
    # Not every pair needs a game; a chain of games is enough.
    wins[0, 3] = wins[3, 0] = wins[0, 2] = wins[2, 0] = 0
    assert bradley_terry(wins).tolist() == pytest.approx(true.tolist(), abs=1e-6)


def test_a_strength_of_zero_is_no_rounding() -> None:
    wins = np.array([[0, 3, 7, 5], [7, 0, 4, 5], [3, 6, 0, 5], [5, 5, 5, 0]], dtype=float)
    assert bradley_terry(wins)[3] == 0.0
    assert not (np.abs(bradley_terry(np.array([wins * k for k in (1, 3, 7)]))) < 1e-9).all()


def test_strengths_without_bound_are_not_numbers() -> None:
    unbeaten = np.array([[0, 5, 5], [0, 0, 3], [0, 2, 0]])
    never_met = np.array([[0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 2], [0, 0, 1, 0]])
    for wins in (unbeaten, never_met, np.zeros((3, 3))):
        assert np.isnan(bradley_terry(wins)).all()
    circle = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert bradley_terry(circle).tolist() == pytest.approx([0, 0, 0])


def test_intervals_of_strengths() -> None:
    generator = np.random.default_rng(0)
    true = np.array([0.5, 0.0, -0.5])
    wins = np.zeros((300, 3, 3))
    for i, j in itertools.combinations(range(3), 2):
        won = generator.random(300) < 1 / (1 + math.exp(true[j] - true[i]))
        wins[:, i, j], wins[:, j, i] = won, ~won
    options: dict[str, Any] = {"confidence": 0.95, "seed": 0, "resamples": 999}
    found = bradley_terry_intervals(wins, **options)
    logs = bradley_terry(wins.sum(axis=0))
    assert found.shape == (3, 2)
    assert ((found[:, 0] < logs) & (logs < found[:, 1])).all()
    assert ((found[:, 0] < true) & (true < found[:, 1])).all()
    np.testing.assert_allclose(found, bradley_terry_intervals(wins, **options), rtol=1e-9, atol=1e-12)
    # About as wide as the normal interval of two runs: 1.96 / sqrt(n p q), halved for the mean of 0.
    two = bradley_terry_intervals(wins[:, :2, :2], **options)
    rate = wins[:, 0, 1].mean()
    assert two[0, 1] - two[0, 0] == pytest.approx(1.96 / math.sqrt(300 * rate * (1 - rate)), rel=0.1)
    assert np.isnan(bradley_terry_intervals(wins[:1], **options)).all()
    # Where a resample in two has a run that won everything, no end of the interval is known.
    rare = np.zeros((5, 2, 2))
    rare[:, 0, 1], rare[0, 0, 1], rare[0, 1, 0] = 1, 0, 1
    assert np.isnan(bradley_terry_intervals(rare, **options)).all()


def rates_of_claims(simulations: int, shift: float) -> tuple[float, float]:
    """Share of simulations with a claim, and with one of a test that takes pictures for prompts."""
    generator = np.random.default_rng(0)
    options = {**OPTIONS, "resamples": 499}
    claimed = naive = 0
    for _ in range(simulations):
        pictures = simulate(generator, shift)
        change = pictures.mean(axis=1)
        p, interval = wilcoxon_p(change), estimate_mean(change, **options)
        assert p is not None and interval.low is not None and interval.high is not None
        claimed += p < 0.05 and not interval.low <= 0 <= interval.high
        naive += wilcoxon_p(pictures.ravel()) < 0.05
    return claimed / simulations, naive / simulations


def test_equal_models_differ_as_rarely_as_promised() -> None:
    # 300 simulations know 5 % to within 2.5; the slow test of compare() runs 1,000.
    claimed, naive = rates_of_claims(300, shift=0)
    assert 0.025 <= claimed <= 0.075
    assert naive > 0.15  # what pairing pictures instead of prompts would do


def test_a_difference_of_a_fifth_of_a_standard_deviation_is_found_in_most_cases() -> None:
    claimed, _ = rates_of_claims(100, shift=0.2)
    assert claimed > 0.65

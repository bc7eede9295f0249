"""The three tests of drift against scipy and closed forms, and how often they cry wolf.

Shapes: M scores of the baseline, N of the window.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from services.reward import drift
from services.reward.drift import Baseline, compare, holm, kolmogorov_smirnov, mean_shift, permuted_psi, read_baseline
from services.runtime.errors import StartError

RNG = np.random.default_rng
SAMPLES = [(100, 100, 0.0), (100, 256, 0.3), (1000, 1000, 0.1), (50, 700, 0.0), (512, 500, 1.0), (1000, 100, 0.02)]


def bounds(rate: float, trials: int) -> tuple[float, float]:
    """What a share of ``trials`` lies within in all but one of 10,000 cases, where each has the chance ``rate``."""
    low, high = stats.binom.ppf([5e-5, 1 - 5e-5], trials, rate)
    return low / trials, high / trials


@pytest.mark.parametrize(("m", "n", "shift"), SAMPLES)
def test_kolmogorov_smirnov_is_scipys_exact_test(m, n, shift):
    random = RNG(m + n)
    first, second = random.normal(size=m), random.normal(shift, 1.2, size=n)
    theirs = stats.ks_2samp(first, second, method="exact")
    ks, p = kolmogorov_smirnov(first, second)
    assert ks == pytest.approx(theirs.statistic, abs=1e-12)
    assert p == pytest.approx(theirs.pvalue, rel=1e-7, abs=1e-13)
    assert kolmogorov_smirnov(second, first) == (ks, p)


def test_kolmogorov_smirnov_counts_what_counting_all_orders_counts():
    """Of all 6 choose 2 orders of two and four values, those with a distance at least as large."""
    first, second = np.array([0.0, 3.5]), np.array([1.0, 2.0, 3.0, 4.0])
    everything = np.concatenate([first, second])

    def distance(chosen: tuple[int, ...]) -> float:
        mine = everything[list(chosen)]
        other = np.delete(everything, chosen)
        return max(abs((mine <= x).mean() - (other <= x).mean()) for x in everything)

    found = [distance(chosen) for chosen in itertools.combinations(range(6), 2)]
    ks, p = kolmogorov_smirnov(first, second)
    assert ks == pytest.approx(distance((0, 1)))
    assert p == pytest.approx(np.mean([d >= ks - 1e-12 for d in found]))


def test_kolmogorov_smirnov_with_ties_is_scipys_and_never_too_small():
    random = RNG(0)
    for _ in range(20):
        first, second = random.integers(0, 4, 90).astype(float), random.integers(0, 4, 120).astype(float)
        theirs = stats.ks_2samp(first, second, method="exact")
        assert kolmogorov_smirnov(first, second) == pytest.approx((theirs.statistic, theirs.pvalue), abs=1e-10)


@pytest.mark.parametrize(("m", "n", "shift"), SAMPLES)
def test_the_z_test_is_welchs_statistic_with_the_normals_tail(m, n, shift):
    random = RNG(m * n)
    first, second = random.normal(size=m), random.normal(shift, 2.0, size=n)
    z, p = mean_shift(first, second)
    assert z == pytest.approx(stats.ttest_ind(second, first, equal_var=False).statistic)
    assert p == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)


def test_constant_scores_have_a_z_test_too():
    same, other = np.full(60, 2.0), np.full(70, 3.0)
    assert mean_shift(same, same) == (0.0, 1.0)
    assert mean_shift(same, other) == (math.inf, 0.0)
    assert mean_shift(other, same) == (-math.inf, 0.0)


def test_holms_correction_by_hand():
    # 0.01 x 3, then the larger of that and 0.02 x 2, then of that and 0.9.
    assert holm([0.02, 0.9, 0.01]) == pytest.approx([0.04, 0.9, 0.03])
    assert holm([0.01, 0.012, 0.014]) == pytest.approx([0.03, 0.03, 0.03])
    assert holm([0.5, 0.6, 0.7]) == [1.0, 1.0, 1.0]


def test_psi_by_hand():
    """Four scores of five of the baseline are -1, and one of five of the window; half a score is added to each bin."""
    p, q = np.array([40.5, 10.5]) / 51, np.array([10.5, 40.5]) / 51
    expected = ((q - p) * np.log(q / p)).sum()
    assert drift.stability_index(np.array([40, 10]), np.array([10, 40])) == pytest.approx(expected)
    baseline, window = np.repeat([-1.0, 1.0], [40, 10]), np.repeat([-1.0, 1.0], [10, 40])
    psi, p_value = permuted_psi(baseline, window)
    assert psi == pytest.approx(expected)
    assert p_value == pytest.approx(1 / 5000)
    # All alike: one bin, nothing to tell apart.
    assert permuted_psi(np.zeros(60), np.zeros(70))[1] == 1.0


def test_the_permutation_p_value_of_two_bins_is_fishers_exact_test():
    """With two bins, PSI orders the tables with the same margins by how unlike the samples are."""
    baseline, window = np.repeat([-1.0, 1.0], [60, 40]), np.repeat([-1.0, 1.0], [44, 56])
    exact = stats.fisher_exact([[60, 40], [44, 56]]).pvalue
    _, p = permuted_psi(baseline, window, permutations=100_000)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact / 100_000))


@pytest.mark.parametrize(("size", "alarms"), [(100, 0.84), (256, 0.19)])
def test_psi_above_a_tenth_alone_cries_wolf(size, alarms):
    """PSI of two samples of n from one distribution is about 2/n times a chi-squared of nine degrees of freedom."""
    random = RNG(size)
    found = [permuted_psi(*random.normal(size=(2, size)), permutations=1)[0] > 0.1 for _ in range(1500)]
    assert np.mean(found) == pytest.approx(alarms, abs=0.05)
    assert np.mean(found) == pytest.approx(stats.chi2.sf(0.1 * size / 2, df=9), abs=0.05)


@pytest.mark.parametrize("draw", ["normal", "exponential", "five_values"])
@pytest.mark.parametrize("size", [100, 256])
def test_false_alarms_are_no_more_frequent_than_the_level(size, draw):
    trials, alpha = 400, 0.05
    random = RNG(size)

    def sample() -> np.ndarray:  # type: ignore[type-arg]
        if draw == "five_values":
            return random.choice([-2.0, -1.0, 0.0, 1.0, 2.0], size=size, p=[0.5, 0.2, 0.1, 0.1, 0.1])
        return getattr(random, draw)(size=size)

    found = [compare(Baseline(sample()), sample(), alpha=alpha, seed=trial) for trial in range(trials)]
    # Three tests of one thing: Holm's correction makes alarms rarer than the level, and never more frequent.
    assert np.mean([x.drifted for x in found]) <= bounds(alpha, trials)[1]
    low, high = bounds(alpha, trials)
    by_psi = np.mean([x.psi_p <= alpha for x in found])
    assert by_psi <= high
    if draw != "five_values":  # Where ties leave few tables, the next smaller p-value is often far below the level.
        assert low <= by_psi
        assert low <= np.mean([x.z_p <= alpha for x in found]) <= high
    assert np.mean([x.ks_p <= alpha for x in found]) <= high


@pytest.mark.parametrize("size", [100, 256])
def test_a_shift_by_half_a_deviation_is_found_as_often_as_the_z_test_can(size):
    trials, alpha = 300, 0.01
    random = RNG(size)
    baseline = Baseline(random.normal(size=1000))
    found = [compare(baseline, random.normal(0.5, 1.0, size), alpha=alpha, seed=trial) for trial in range(trials)]
    # One of the three p-values at alpha / 3 is enough.
    standardised = 0.5 / math.sqrt(1 / size + 1 / 1000)
    power = stats.norm.sf(stats.norm.isf(alpha / 6) - standardised)
    assert power > 0.9
    assert np.mean([x.drifted for x in found]) >= bounds(power, trials)[0] - 0.05  # The baseline is one draw.
    assert np.mean([x.shift_stds for x in found]) == pytest.approx(0.5, abs=0.1)


def test_a_wider_distribution_with_the_same_mean_is_found_as_well():
    random = RNG(0)
    found = compare(Baseline(random.normal(size=1000)), random.normal(0, 2.0, 1000), alpha=0.01)
    assert found.drifted
    assert found.z_p > 0.01
    assert max(found.psi_p, found.ks_p) < 0.001


def test_the_same_scores_give_the_same_figures_and_few_or_infinite_ones_are_refused():
    random = RNG(0)
    baseline, window = Baseline(random.normal(size=300)), random.normal(size=200)
    assert compare(baseline, window, alpha=0.01) == compare(baseline, window.copy(), alpha=0.01)
    for wrong in (window[:49], np.append(window, math.inf)):
        with pytest.raises(ValueError, match="at least 50 finite ones are compared"):
            compare(baseline, wrong, alpha=0.01)


# The baseline kept with a model ------------------------------------------------------------------------------------


def test_a_baseline_is_read_as_it_was_kept():
    values = [float(x) for x in range(60)]
    read = read_baseline({"baseline": {"scores": values}}, "m")
    assert isinstance(read, Baseline)
    assert read.scores.tolist() == values
    assert (read.mean, read.std) == (29.5, pytest.approx(math.sqrt(60 * 61 / 12)))


def test_no_or_too_small_a_baseline_is_said_and_no_obstacle():
    assert "no baseline scores are kept" in str(read_baseline({}, "m"))
    assert read_baseline({"baseline": {"scores": [1.0] * 49}}, "m") == (
        "the model's baseline has 49 scores, at least 50 are needed"
    )


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([1.0] * 60, "must be a list of raw scores, is NoneType"),
        ({"scores": "many"}, "must be a list of raw scores, is str"),
        ({"scores": [0.0, math.nan]}, r"baseline.scores\[1\] is nan, must be a finite number"),
        ({"scores": [0.0, 1.0, math.inf]}, r"baseline.scores\[2\] is inf, must be a finite number"),
        ({"scores": [True]}, r"baseline.scores\[0\] is True, must be a finite number"),
        ({"scores": [None]}, r"baseline.scores\[0\] is None, must be a finite number"),
        ({"scores": [0.0] * 100_001}, "has 100001 values, at most 100000 are taken"),
    ],
)
def test_a_wrong_baseline_is_refused_with_its_place(kept, said):
    with pytest.raises(StartError, match=f"^m/quartet.json: baseline.scores.*{said.removeprefix('baseline.scores')}"):
        read_baseline({"baseline": kept}, "m")

"""Temperatures, calibration figures and intervals over groups, against closed forms, simulation and scikit-learn.

Shapes: N judged pairs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

from trainer.calibration import (
    brier,
    calibration_figures,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    sigmoid,
)
from trainer.statistics import bootstrap_of_groups, wilson_interval, wilson_interval_of_groups


@given(difference=st.floats(0.05, 20), right=st.integers(51, 99))
def test_the_temperature_of_equal_differences_is_theirs_over_the_log_odds_of_being_right(difference, right):
    label_N = np.array([1.0] * right + [0.0] * (100 - right))
    share = (right + 1) / 102  # Platt's target.
    found = fit_temperature(np.full(100, difference), label_N)
    expected = difference / math.log(share / (1 - share))
    if 0.01 < expected < 100:
        assert found.value == pytest.approx(expected, rel=1e-6)
        assert not found.at_bound
    assert found.pairs == 100


def test_the_temperature_is_that_of_a_logistic_regression_without_intercept():
    random = np.random.default_rng(0)
    difference_N = random.normal(0, 3, 4000)
    label_N = (random.random(4000) < sigmoid(difference_N / 2.5)).astype(float)
    model = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10).fit(difference_N[:, None], label_N)
    found = fit_temperature(difference_N, label_N)
    assert found.value == pytest.approx(1 / model.coef_[0, 0], rel=2e-3)
    assert found.value == pytest.approx(2.5, rel=0.1)
    before, after = (calibration_figures(sigmoid(difference_N / t), label_N, range(4000)) for t in (1.0, found.value))
    assert after["nll"].value < before["nll"].value
    assert after["ece"].high < before["ece"].low


def test_a_soft_label_counts_as_so_many_of_each_hard_one():
    difference_N = np.array([1.0, 2.0, -0.5])
    soft = fit_temperature(np.tile(difference_N, 10), np.tile([0.9, 0.8, 0.5], 10))
    hard = fit_temperature(
        np.tile(difference_N, 10), np.array([1, 1, 1] * 5 + [1, 1, 0] * 3 + [1, 0, 0] * 1 + [0, 0, 0])
    )
    assert soft.value == pytest.approx(hard.value, rel=1e-9)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, None), (-1.0, 100.0), (0.0, 100.0)])
def test_a_model_that_is_always_right_is_not_certain_and_one_that_is_wrong_is_a_coin(sign, expected):
    found = fit_temperature(np.full(30, sign * 2.0), np.ones(30))
    assert found.at_bound == (expected is not None)
    assert found.value == pytest.approx(expected if expected is not None else 2.0 / math.log(31))


@given(st.lists(st.tuples(st.floats(0.001, 0.999), st.sampled_from([0.0, 1.0])), min_size=2, max_size=30))
def test_losses_are_those_of_scikit_learn(pairs):
    probability_N, label_N = np.array(pairs).T
    assert brier(probability_N, label_N).mean() == pytest.approx(brier_score_loss(label_N, probability_N, pos_label=1))
    expected = sklearn_log_loss(label_N, probability_N, labels=[0, 1])
    assert log_loss(probability_N, label_N).mean() == pytest.approx(expected)


@given(
    st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=40).filter(
        lambda rows: any(weight for _, _, weight in rows)
    )
)
def test_the_calibration_error_is_its_definition_bin_by_bin(rows):
    total = sum(weight for _, _, weight in rows)
    bins: dict[int, list[tuple[float, float, int]]] = {}
    for p, label, weight in rows:
        confidence = max(p, 1 - p)
        right = label if p > 0.5 else 1 - label if p < 0.5 else 0.5
        bins.setdefault(min(9, int(2 * (confidence - 0.5) * 10)), []).append((confidence, right, weight))
    expected = 0.0
    for members in bins.values():
        inside = sum(weight for _, _, weight in members)
        if inside:
            confidence, right = (sum(m[i] * m[2] for m in members) / inside for i in (0, 1))
            expected += inside / total * abs(confidence - right)
    columns = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    assert expected_calibration_error(*columns) == pytest.approx(expected, abs=1e-12)


# Intervals over groups


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40).filter(lambda x: len(set(x)) > 1))
def test_with_one_observation_a_group_the_interval_is_wilsons(values):
    found = wilson_interval_of_groups(values, range(len(values)))
    expected = wilson_interval(sum(values), len(values))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (found.value, found.count) == (pytest.approx(expected.value), len(values))


@pytest.mark.parametrize("copies", [2, 6])
def test_copies_of_an_observation_say_nothing_more(copies):
    values = [1.0] * 70 + [0.0] * 30
    once = wilson_interval(70, 100)
    found = wilson_interval_of_groups(np.repeat(values, copies), np.repeat(np.arange(100), copies).tolist())
    # Bessel's corrections of 100 groups and of so many observations are not the same.
    assert (found.low, found.high) == (pytest.approx(once.low, abs=1e-3), pytest.approx(once.high, abs=1e-3))
    assert found.count == 100 * copies
    alike = wilson_interval_of_groups([1.0] * 10 * copies, np.repeat(np.arange(10), copies).tolist())
    assert (alike.low, alike.high) == (pytest.approx(wilson_interval(10, 10).low), pytest.approx(1.0))


def test_intervals_of_grouped_pairs_hold_the_truth_as_often_as_they_say():
    """Six pairs a prompt, prompts of different difficulty: 95 % intervals, where ungrouped ones hold far less often."""
    random = np.random.default_rng(0)
    held = {"grouped": 0, "ungrouped": 0, "bootstrap": 0}
    trials = 400
    for _ in range(trials):
        difficulty = random.beta(1.4, 0.6, 60)  # Of mean .7.
        x_N = (random.random((60, 6)) < difficulty[:, None]).astype(float).ravel()
        groups = np.repeat(np.arange(60), 6).tolist()
        grouped = wilson_interval_of_groups(x_N, groups)
        ungrouped = wilson_interval(float(x_N.sum()), len(x_N))
        drawn = bootstrap_of_groups(lambda w_N, x_N=x_N: float(np.average(x_N, weights=w_N)), groups, resamples=200)
        for name, interval in (("grouped", grouped), ("ungrouped", ungrouped), ("bootstrap", drawn)):
            held[name] += interval.low <= 0.7 <= interval.high
    assert 0.92 <= held["grouped"] / trials <= 0.98
    assert 0.90 <= held["bootstrap"] / trials <= 0.98
    assert held["ungrouped"] / trials < 0.85


def test_what_is_no_share_and_what_has_no_group_is_refused():
    with pytest.raises(ValueError, match=r"values lie between 0 and 2: shares are of values from 0 to 1"):
        wilson_interval_of_groups([0.0, 2.0], [1, 2])
    with pytest.raises(ValueError, match="there are 1 groups for 2 values"):
        wilson_interval_of_groups([0.0, 1.0], [1])
    with pytest.raises(ValueError, match="resamples is 5"):
        bootstrap_of_groups(lambda w_N: 0.0, [1, 2], resamples=5)
    with pytest.raises(ValueError, match="at least 1 pair"):
        fit_temperature(np.zeros(0), np.zeros(0))

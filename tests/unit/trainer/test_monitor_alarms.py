"""Each alarm on a run that deserves it, and none of them on a healthy one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from trainer.monitor_alarms import RULES, checked, crossings, worst_alarms
from trainer.monitor_settings import AlarmSettings
from trainer.ppo_config import PPOSettings

BOUNDS = AlarmSettings()
BEFORE = {
    "n": 256,
    "score_mean": 0.1,
    "score_std": 0.8,
    "kl_sequence_mean": 0.0,
    "kl_exact_mean": 0.0,
    "unique_share": 0.99,
    "distinct_1": 0.2,
    "distinct_2": 0.6,
    "distinct_3": 0.85,
    "length_correlation": 0.1,
    "length_correlation_within": 0.05,
    "entropy_mean": 2.5,
    "demonstration_perplexity": 12.0,
    "spread_mean": 0.3,
    "judge_mean": 0.0,
}
# Rewards and judge rise, a little variety goes, nothing crosses a bound.
HEALTHY = BEFORE | {
    "score_mean": 1.6,
    "kl_sequence_mean": 7.4,
    "kl_exact_mean": 7.1,
    "unique_share": 0.95,
    "distinct_1": 0.17,
    "distinct_2": 0.5,
    "distinct_3": 0.74,
    "length_correlation": 0.22,
    "length_correlation_within": 0.15,
    "entropy_mean": 1.4,
    "demonstration_perplexity": 14.0,
    "spread_mean": 0.4,
    "judge_mean": 0.9,
    "best_step": 10,
    "judge_since_best": 0.05,
    "judge_since_best_ci95": 0.1,
    "score_since_best": 0.2,
    "score_since_best_ci95": 0.1,
}


def test_a_healthy_run_raises_none():
    assert crossings(HEALTHY, BEFORE, BOUNDS) == []
    assert worst_alarms([(0, BEFORE), (10, HEALTHY), (20, HEALTHY)], BOUNDS) == []
    assert checked(HEALTHY, BEFORE, BOUNDS) == {f"alarm/{name}": 0.0 for name in RULES} | {"alarm/count": 0.0}


@pytest.mark.parametrize(
    ("rule", "key", "changes", "value", "bound", "words"),
    [
        ("kl", "kl_exact_mean", {"kl_exact_mean": 20.5}, 20.5, 20.0, "The KL to the reference: 20.5"),
        ("unique", "unique_share", {"unique_share": 0.89}, 0.89, 0.9, "(before training 0.990)"),
        # The 2-grams fell furthest: to a half.
        ("distinct", "distinct_2", {"distinct_1": 0.13, "distinct_2": 0.3}, 0.3, 0.42, "Distinct 2-grams: 0.300"),
        ("distinct", "distinct_3", {"distinct_3": 0.5}, 0.5, 0.595, "the policy is losing its variety"),
        (
            "judge",
            "judge_since_best",
            {"judge_since_best": -0.31},
            -0.31,
            -0.1,
            "since step 10, which it liked best, while the reward rose by 0.200",
        ),
        (
            "length",
            "length_correlation_within",
            {"length_correlation_within": 0.45},
            0.4,
            0.3,
            "reward and length within prompts: 0.400",
        ),
        ("entropy", "entropy_mean", {"entropy_mean": 0.49}, 0.49, 0.5, "nearly stopped exploring"),
        (
            "perplexity",
            "demonstration_perplexity",
            {"demonstration_perplexity": 18.5},
            18.5,
            18.0,
            "the policy forgets what it was taught",
        ),
        ("score_shift", "score_mean", {"score_mean": 3.5}, 4.25, 4.0, "in standard deviations of before: 4.25"),
        ("score_shift", "score_mean", {"score_mean": -3.5}, -4.5, -4.0, "below -4"),
        ("spread", "spread_mean", {"spread_mean": 0.7}, 0.7, 0.6, "the members of the reward ensemble no longer agree"),
    ],
)
def test_an_alarm_names_what_it_saw_and_the_bound(rule, key, changes, value, bound, words):
    sick = HEALTHY | changes
    (found,) = crossings(sick, BEFORE, BOUNDS)
    assert (found.rule, found.key) == (rule, key)
    assert (found.value, found.bound) == (pytest.approx(value), pytest.approx(bound))
    series = [(0, BEFORE), (5, HEALTHY), (10, sick), (15, HEALTHY)]
    ((place, same, text),) = worst_alarms(series, BOUNDS)
    assert (place, same) == (2, found)
    assert words in text
    assert "in the held-out evaluation at step 10 (in 1 of 3)" in text
    assert ("above" if value > bound else "below") in text
    found_for_log = checked(sick, BEFORE, BOUNDS)
    assert {name for name, raised in found_for_log.items() if raised} == {f"alarm/{rule}", "alarm/count"}


def test_sampled_kl_counts_where_the_exact_one_is_not_known():
    sampled = {name: value for name, value in HEALTHY.items() if name != "kl_exact_mean"} | {"kl_sequence_mean": 21.0}
    (found,) = crossings(sampled, BEFORE, BOUNDS)
    assert (found.key, found.value) == ("kl_sequence_mean", 21.0)
    assert crossings(HEALTHY | {"kl_sequence_mean": 21.0}, BEFORE, BOUNDS) == []  # A noisy estimate of 7.1.


@pytest.mark.parametrize(
    "changes",
    [
        {"judge_since_best": -0.09},  # Within its interval: chance.
        {"judge_since_best": -0.5, "score_since_best": 0.05},  # The judge falls and the reward does not rise.
        {"judge_since_best": -0.5, "score_since_best": -0.4},  # Both fall: no over-optimisation.
    ],
)
def test_a_judge_that_falls_by_chance_or_with_the_reward_raises_none(changes):
    assert crossings(HEALTHY | changes, BEFORE, BOUNDS) == []


def test_a_correlation_that_rises_by_chance_raises_none():
    """Of few prompts: of 400 pairs of samples without any correlation fewer than 5 % pass both bound and chance."""
    random = np.random.default_rng(0)
    raised = 0
    for _ in range(400):
        r = [float(np.corrcoef(random.normal(size=(2, 24)))[0, 1]) for _ in range(2)]
        figures = [{"n": 24, "length_correlation": value} for value in r]
        raised += bool(crossings(figures[1], figures[0], BOUNDS))
    assert raised < 0.05 * 400
    assert crossings({"n": 24, "length_correlation": 0.4}, {"n": 24, "length_correlation": 0.0}, BOUNDS) == []
    assert crossings({"n": 240, "length_correlation": 0.4}, {"n": 240, "length_correlation": 0.0}, BOUNDS) != []


def test_what_was_not_measured_raises_none():
    assert crossings({}, BEFORE, BOUNDS) == []
    assert crossings(HEALTHY, {}, BOUNDS) == []
    assert [found.rule for found in crossings({"kl_sequence_mean": 30.0, "unique_share": 0.1}, {}, BOUNDS)] == [
        "kl",
        "unique",
    ]
    assert worst_alarms([], BOUNDS) == []


def test_the_worst_evaluation_of_several_is_named():
    series = [
        (0, BEFORE),
        *((step, HEALTHY | {"unique_share": share}) for step, share in ((5, 0.8), (10, 0.5), (15, 0.7))),
    ]
    ((place, found, text),) = worst_alarms(series, BOUNDS)
    assert (place, found.value) == (2, 0.5)
    assert "at step 10 (in 3 of 3)" in text


@pytest.mark.parametrize(
    ("changes", "bounds", "rules"),
    [
        ({}, {"alarm_kl": 5.0}, ["kl"]),
        ({}, {"alarm_unique": 0.96}, ["unique"]),
        ({}, {"alarm_distinct": 0.9}, ["distinct"]),
        ({}, {"alarm_entropy": 0.6}, ["entropy"]),
        ({}, {"alarm_perplexity": 1.1}, ["perplexity"]),
        ({}, {"alarm_score_shift": 1.5}, ["score_shift"]),
        ({}, {"alarm_spread": 1.2}, ["spread"]),
        ({"length_correlation_within": 0.3}, {"alarm_length_correlation": 0.2}, ["length"]),
        ({"unique_share": 0.5}, {"alarm_unique": 0.4}, []),
    ],
)
def test_every_bound_is_a_setting(changes, bounds, rules):
    assert [found.rule for found in crossings(HEALTHY | changes, BEFORE, AlarmSettings(**bounds))] == rules


def test_bounds_are_refused_by_name_and_decide_nothing():
    for name, value in (("alarm_kl", 0), ("alarm_unique", 1.1), ("alarm_spread", math.nan)):
        with pytest.raises(ValidationError, match=name):
            AlarmSettings(**{name: value})
    run = PPOSettings(model="m", prompts=("p",), output="o")
    watched = ("alarm_kl", "judge", "monitor_demonstrations", "exact_kl", "track")
    assert not {*watched} & set(run.decisive)
    assert run.decisive["eval_samples"] == 1

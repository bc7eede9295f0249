"""Scores from heads, members and rules, by numbers worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest

from services.reward.combining import (
    Combination,
    Head,
    Marks,
    Member,
    Reduction,
    Statistics,
    WeightsRefusedError,
    reduce_members,
)

HEADS = (Head(name="helpfulness", weight=0.7), Head(name="safety", weight=0.3))


def ensemble(reduction: Reduction = Reduction.MEAN, *members: Member, **others: object) -> Combination:
    return Combination(members=members or (Member(), Member(), Member()), reduction=reduction, **others)  # type: ignore[arg-type]


def raw(*scores: float, rule: dict[str, float] | None = None) -> Marks:
    return Marks(tuple((score,) for score in scores), rule or {})


def of(mean: float, std: float, temperature: float = 1.0) -> Member:
    return Member(statistics=Statistics(mean=mean, std=std, count=10), temperature=temperature)


@pytest.mark.parametrize(
    ("reduction", "penalty", "expected"),
    [
        (Reduction.MEAN, 0.5, 7 / 3),
        (Reduction.WORST_CASE, 0.5, 1.0),
        (Reduction.UNCERTAINTY, 0.5, 1.5556),  # The vector of Coste et al.'s UWO: 7/3 - .5 x 14/9.
        (Reduction.UNCERTAINTY, 0.0, 7 / 3),
        (Reduction.UNCERTAINTY, 2.0, 7 / 3 - 28 / 9),
    ],
)
def test_members_one_two_and_four_become(reduction, penalty, expected):
    assert reduce_members([1.0, 2.0, 4.0], reduction, penalty) == pytest.approx(expected, abs=5e-5)
    combination = ensemble(reduction, penalty=penalty)
    found = combination.combine(raw(1, 2, 4), combination.weights({}))
    assert found.score == pytest.approx(expected, abs=5e-5)
    assert found.spread == pytest.approx(statistics.pstdev([1, 2, 4]))
    assert found.member_scores == (1, 2, 4)


def test_one_head_without_a_name_is_the_score_and_nothing_else():
    combination = Combination()
    found = combination.combine(raw(0.1), combination.weights({}))
    assert (found.score, found.attributes, found.spread, found.member_scores) == (0.1, (), None, ())


def test_heads_are_weighted_and_a_request_may_weigh_them_otherwise():
    combination = Combination(heads=HEADS)
    marks = Marks(((2.0, -1.0),))
    found = combination.combine(marks, combination.weights({}))
    assert found.score == pytest.approx(0.7 * 2 - 0.3)
    assert found.attributes == (("helpfulness", 2.0), ("safety", -1.0))
    other = combination.combine(marks, combination.weights({"safety": 5.0}))
    assert other.score == pytest.approx(0.7 * 2 - 5)
    assert combination.combine(marks, combination.weights({"safety": 0, "helpfulness": 0})).score == 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kindness": 1.0}, "names 'kindness', which there is not; there is 'helpfulness', 'safety'"),
        ({"safety": math.nan}, "gives 'safety' the weight nan, must be a finite number"),
        ({"safety": -math.inf}, "gives 'safety' the weight -inf, must be a finite number"),
    ],
)
def test_weights_of_no_head_and_no_number_are_refused(overrides, message):
    with pytest.raises(WeightsRefusedError, match=message) as refused:
        Combination(heads=HEADS).weights(overrides)
    assert not refused.value.precondition
    with pytest.raises(WeightsRefusedError, match="there is none: its score is the one output of the model"):
        Combination().weights({"safety": 1.0})


def test_statistics_hold_for_the_kept_weights_alone():
    single = Combination(heads=HEADS, members=(of(0.5, 2.0),))
    assert single.weights({"safety": 1.0}).heads == (0.7, 1.0)
    assert single.weights({"safety": 0.3}, normalise=True).heads == (0.7, 0.3)  # The same as kept.
    with pytest.raises(WeightsRefusedError, match=r"'safety' another weight, but the statistics .* ask for raw") as no:
        single.weights({"safety": 1.0}, normalise=True)
    assert no.value.precondition
    with pytest.raises(WeightsRefusedError, match="host an ensemble without statistics"):
        Combination(heads=HEADS, members=(of(0, 1), of(0, 1))).weights({"safety": 1.0})
    # A rule has no part in them.
    ruled = Combination(members=(of(0.5, 2.0),), rule_name="exact")
    assert ruled.weights({"exact": 4.0}, normalise=True).rule_default == 4.0


def test_members_on_different_scales_are_normalised_before_they_are_reduced():
    """Raw, the second would decide alone: 2 against 120."""
    combination = ensemble(Reduction.WORST_CASE, of(1.0, 0.5), of(100.0, 10.0))
    found = combination.combine(raw(2.0, 110.0), combination.weights({}), normalise=True)
    assert found.member_scores == (2.0, 1.0)
    assert (found.score, found.normalised, found.spread) == (1.0, 1.0, 0.5)


def test_a_rule_is_added_with_its_weight_on_its_own_scale():
    combination = Combination(members=(of(1.0, 4.0),), rule_name="exact", rule_weight=3.0)
    found = combination.combine(raw(9.0, rule={"exact": 0.5}), combination.weights({}), normalise=True)
    assert found.score == 9.0 + 1.5
    assert found.normalised == 2.0 + 1.5
    assert found.attributes == (("exact", 0.5),)
    # In an ensemble it is added to what the members make together, and is no member.
    both = ensemble(Reduction.MEAN, of(1.0, 4.0), of(0.0, 1.0), rule_name="exact", rule_weight=3.0)
    found = both.combine(raw(9.0, 4.0, rule={"exact": 0.5}), both.weights({}))
    assert (found.score, found.member_scores, found.spread) == (3.0 + 1.5, (2.0, 4.0), 1.0)


def test_attributes_that_a_rule_declares_have_weights_of_their_own_and_others_share_one():
    declared = Combination(members=(), rule=(Head(name="correct", weight=2.0), Head(name="format", weight=0.1)))
    marks = Marks((), {"correct": 1.0, "format": -1.0})
    assert declared.combine(marks, declared.weights({})).score == pytest.approx(1.9)
    assert declared.combine(marks, declared.weights({"format": 1.0})).score == pytest.approx(1.0)
    free = Combination(members=(), rule_name="judge", rule_weight=0.5)
    assert free.combine(marks, free.weights({})).score == 0.0
    assert free.combine(Marks((), {"a": 1, "b": 2}), free.weights({"judge": 2.0})).score == 6.0


# Preferences ------------------------------------------------------------------------------------------------------


def test_a_preference_is_the_sigmoid_of_the_difference_over_the_temperature():
    combination = Combination(members=(Member(temperature=2.0),))
    (found,) = combination.preferences(raw(3.0), raw(1.0), combination.weights({}))
    assert found == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert combination.preferences(raw(1.0), raw(1.0), combination.weights({})) == (0.5,)
    (back,) = combination.preferences(raw(1.0), raw(3.0), combination.weights({}))
    assert found + back == pytest.approx(1.0)
    assert combination.preferences(raw(1e30), raw(-1e30), combination.weights({})) == (1.0,)
    assert combination.preferences(raw(-1e30), raw(1e30), combination.weights({})) == (0.0,)


def test_members_prefer_by_their_raw_scores_and_their_own_temperature():
    """They were fitted to raw differences: normalising first would be another temperature."""
    combination = ensemble(Reduction.MEAN, of(5.0, 2.0), of(100.0, 10.0, 4.0))
    first, second = combination.preferences(raw(6.0, 90.0), raw(5.0, 98.0), combination.weights({}))
    assert first == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert second == pytest.approx(1 / (1 + math.exp(2.0)))


def test_a_rule_counts_in_a_preference_as_it_counts_in_the_score():
    alone = Combination(members=(), rule_name="exact", rule_weight=2.0)
    right, wrong = Marks((), {"exact": 1.0}), Marks((), {"exact": 0.0})
    assert alone.preferences(right, wrong, alone.weights({})) == (pytest.approx(1 / (1 + math.exp(-2.0))),)
    # Where members are normalised it is worth so many of their standard deviations, of each on its own scale.
    both = ensemble(Reduction.MEAN, of(0.0, 2.0), of(0.0, 8.0), rule_name="exact")
    found = both.preferences(raw(1.0, 4.0, rule={"exact": 1.0}), raw(3.0, 12.0, rule={"exact": 0.0}), both.weights({}))
    assert found == (0.5, 0.5)
    scores = [
        both.combine(marks, both.weights({})).score
        for marks in (raw(1.0, 4.0, rule={"exact": 1.0}), raw(3.0, 12.0, rule={"exact": 0.0}))
    ]
    assert scores[0] == scores[1]

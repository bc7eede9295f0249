"""Figures of responses against naive computations and other libraries."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.monitors import (
    correlation,
    distinct_n,
    quantile,
    repeated_share,
    self_bleu,
    unique_share,
    within_correlation,
)

RESPONSES = st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=2, max_size=7)


def naive_bleu(hypothesis: list[int], references: list[list[int]]) -> float:
    """Papineni et al. 2002 with every reference looked through for every n-gram; counts of 0 are .1."""
    logs = []
    for n in (1, 2, 3, 4):
        grams = [tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1)]
        matched = 0
        for gram in set(grams):
            most = max(sum(tuple(other[i : i + n]) == gram for i in range(len(other) - n + 1)) for other in references)
            matched += min(grams.count(gram), most)
        if n == 1 and matched == 0:
            return 0.0
        logs.append(math.log((matched or 0.1) / max(1, len(grams))))
    nearest = min((len(other) for other in references), key=lambda length: (abs(length - len(hypothesis)), length))
    brevity = 1.0 if len(hypothesis) > nearest else math.exp(1 - nearest / len(hypothesis))
    return brevity * math.exp(sum(logs) / 4)


@settings(max_examples=150, deadline=None)
@given(RESPONSES)
def test_self_bleu_is_the_mean_bleu_of_each_response_against_all_others(responses):
    naive = [naive_bleu(response, responses[:i] + responses[i + 1 :]) for i, response in enumerate(responses)]
    assert self_bleu(responses) == pytest.approx(sum(naive) / len(naive), rel=1e-9, abs=1e-12)


def test_self_bleu_is_that_of_nltk():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    random = np.random.default_rng(0)
    responses = [random.integers(0, 6, random.integers(1, 14)).tolist() for _ in range(20)]
    smooth = bleu.SmoothingFunction().method1
    theirs = [
        bleu.sentence_bleu(responses[:i] + responses[i + 1 :], response, smoothing_function=smooth)
        for i, response in enumerate(responses)
    ]
    assert self_bleu(responses) == pytest.approx(np.mean(theirs), rel=1e-9)


def test_self_bleu_is_1_where_all_say_the_same_and_near_0_where_none_do():
    assert self_bleu([(1, 2, 3, 4, 5)] * 3) == pytest.approx(1.0)
    assert self_bleu([(1, 2, 3, 4), (5, 6, 7, 8)]) == 0.0
    assert self_bleu([(1, 2)]) == self_bleu([]) == 0.0


@settings(max_examples=100, deadline=None)
@given(RESPONSES, st.integers(1, 4))
def test_distinct_unique_and_repeated_shares_are_counted(responses, n):
    windows = [[tuple(r[i + k] for k in range(n)) for i in range(len(r)) if i + n <= len(r)] for r in responses]
    counts = Counter(gram for own in windows for gram in own)
    assert distinct_n(responses, n) == (len(counts) / counts.total() if counts else 1.0)
    repeats = []
    for own in windows:
        seen: set[tuple[int, ...]] = set()
        again = 0
        for gram in own:
            again += gram in seen
            seen.add(gram)
        if own:
            repeats.append(again / len(own))
    assert repeated_share(responses, n) == pytest.approx(np.mean(repeats) if repeats else 0.0)
    different = 1 + sum(first != second for first, second in pairwise(sorted(responses)))
    assert unique_share(responses) == pytest.approx(different / len(responses))


def test_correlations_are_scipys_and_those_of_deviations_from_each_prompts_mean():
    random = np.random.default_rng(1)
    prompts = np.repeat(np.arange(12), 4)
    # Between prompts length and score go together, within a prompt they go apart.
    ease = random.normal(size=12)[prompts]
    lengths = 30 + 20 * ease + random.normal(size=48)
    scores = 2 * ease - 0.3 * (lengths - 20 * ease - 30) + 0.1 * random.normal(size=48)
    assert correlation(scores, lengths) == pytest.approx(stats.pearsonr(scores, lengths).statistic, rel=1e-9)
    assert correlation(scores, lengths) > 0.9
    x = np.concatenate([scores[prompts == p] - scores[prompts == p].mean() for p in range(12)])
    y = np.concatenate([lengths[prompts == p] - lengths[prompts == p].mean() for p in range(12)])
    assert within_correlation(scores, lengths, prompts.tolist()) == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    assert within_correlation(scores, lengths, prompts.tolist()) < -0.8


@pytest.mark.parametrize(
    ("scores", "lengths"), [([1.0, 2.0], [1.0, 2.0]), ([0.1] * 5, [1.0, 2, 3, 4, 5]), ([1.0, 2, 3], [7.0] * 3)]
)
def test_a_correlation_of_nothing_is_none(scores, lengths):
    assert correlation(scores, lengths) is None
    groups = list(range(len(scores)))
    assert within_correlation(scores, lengths, groups) is None  # One answer a prompt.
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == 1.0
    assert within_correlation([1.0, 2.0, 9.0, 8.0], [2.0, 4.0, 1.0, 3.0], "aabb") == pytest.approx(0.0)


def test_quantiles_lie_between_neighbours():
    assert [quantile([4.0, 1.0, 2.0, 3.0], share) for share in (0.0, 0.5, 1.0)] == [1.0, 2.5, 4.0]

"""Are a reward model's probabilities true? The temperature that makes them so, and what is measured of them.

Differences of scores over a temperature T are log-odds of a preference, P = sigma(D / T).

Shapes: N judged pairs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.statistics import Interval, bootstrap_of_groups

Array = npt.NDArray[np.float64]

_BINS = 10
# Temperatures are looked for between these. At the upper end a model's probabilities are all but a coin's.
_MOST_TEMPERATURE = 100.0
_BISECTIONS = 60


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """T and the number of pairs that it was fitted on. ``at_bound``: there is no better one within reason."""

    value: float
    pairs: int
    at_bound: bool

    def as_json(self) -> dict[str, float | bool]:
        return {"temperature": self.value, "pairs": self.pairs, "at_bound": self.at_bound}


def fit_temperature(difference_N: Array, label_N: Array) -> Temperature:
    """The T whose P = sigma(D / T) has the least negative log-likelihood of the labels.

    The labels are first drawn to .5 by 1 / (N + 2), as Platt's targets are: a model that is right about all of a few
    pairs would else have a T of 0 and be certain of everything.

    Args:
        difference_N: (N,) score of the first answer less that of the second.
        label_N: (N,) probability that the first is better, in [0, 1].

    Raises:
        ValueError: there is no pair.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2; Platt 1999, "Probabilistic Outputs
    for Support Vector Machines", section 2.2.
    """
    count = len(difference_N)
    if count == 0:
        raise ValueError("a temperature is fitted on at least 1 pair, there is none")
    target_N = label_N + (1.0 - 2.0 * label_N) / (count + 2)

    def slope(inverse: float) -> float:
        # Of the negative log-likelihood in 1 / T, in which it is convex.
        return float(((sigmoid(inverse * difference_N) - target_N) * difference_N).mean())

    low, high = 1.0 / _MOST_TEMPERATURE, _MOST_TEMPERATURE
    if slope(low) >= 0 or slope(high) <= 0:
        value = 1.0 / (low if slope(low) >= 0 else high)
        return Temperature(value=value, pairs=count, at_bound=True)
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return Temperature(value=float(1.0 / np.sqrt(low * high)), pairs=count, at_bound=False)


def sigmoid(x_N: Array) -> Array:
    """Without overflow at either end."""
    result: Array = np.exp(-np.logaddexp(0.0, -x_N))
    return result


def log_loss(probability_N: Array, label_N: Array) -> Array:
    """(N,) negative log-likelihood of the labels, nats."""
    tiny = np.finfo(np.float64).tiny
    p_N, q_N = np.maximum(probability_N, tiny), np.maximum(1.0 - probability_N, tiny)
    result: Array = -(label_N * np.log(p_N) + (1.0 - label_N) * np.log(q_N))
    return result


def brier(probability_N: Array, label_N: Array) -> Array:
    """(N,) expected squared distance to what a label of that probability turns out to be, 0 or 1.

    Source: Brier 1950, "Verification of Forecasts Expressed in Terms of Probability".
    """
    result: Array = label_N * (1.0 - probability_N) ** 2 + (1.0 - label_N) * probability_N**2
    return result


def expected_calibration_error(
    probability_N: Array, label_N: Array | None = None, weights_N: Array | None = None, bins: int = _BINS
) -> float:
    """Mean distance between confidence and accuracy over bins of equal width, by their share of pairs.

    The confidence is max(P, 1 - P), and the accuracy the probability that the answer it is about is the better one.

    Args:
        probability_N: (N,) that the first answer is better.
        label_N: (N,) the same, as annotated; None: the first is the better one of all pairs.
        weights_N: (N,) how often each pair counts; None: once.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
    """
    label_N = np.ones(len(probability_N)) if label_N is None else label_N
    weights_N = np.ones(len(probability_N)) if weights_N is None else weights_N
    confidence_N = np.maximum(probability_N, 1.0 - probability_N)
    right_N = np.where(probability_N > 0.5, label_N, np.where(probability_N < 0.5, 1.0 - label_N, 0.5))
    place_N = np.minimum((2 * (confidence_N - 0.5) * bins).astype(int), bins - 1)
    # Of each bin: its share times the distance of its means is the distance of its sums, over all weights.
    gap_K = np.bincount(place_N, weights=weights_N * (confidence_N - right_N), minlength=bins)
    return float(np.abs(gap_K).sum() / weights_N.sum())


def calibration_figures(probability_N: Array, label_N: Array, groups_N: Sequence[Hashable]) -> dict[str, Interval]:
    """Negative log-likelihood, Brier score and calibration error, with bootstrap intervals over whole groups.

    Args:
        probability_N: (N,) that the first answer is better, of held-out pairs that nothing was fitted on.
        label_N: (N,) the same, as annotated.
        groups_N: prompt of each pair.
    """
    nll_N, brier_N = log_loss(probability_N, label_N), brier(probability_N, label_N)
    return {
        "nll": bootstrap_of_groups(lambda weights_N: float(np.average(nll_N, weights=weights_N)), groups_N),
        "brier": bootstrap_of_groups(lambda weights_N: float(np.average(brier_N, weights=weights_N)), groups_N),
        "ece": bootstrap_of_groups(
            lambda weights_N: expected_calibration_error(probability_N, label_N, weights_N), groups_N
        ),
    }

"""What a reward model's scores of held-out answers say: figures, intervals, baselines, and whether it has collapsed.

Pairs of one prompt are not independent: every interval is of prompts, with all the pairs of each.

Shapes: N judged pairs, K answers to one prompt, H heads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.calibration import Array, Temperature, brier, calibration_figures, expected_calibration_error, sigmoid
from trainer.calibration import log_loss as label_loss
from trainer.comparisons import Comparison
from trainer.encoding import EncodedComparison
from trainer.errors import CollapsedError
from trainer.statistics import Interval, mean_interval, wilson_interval_of_groups

# A model that tells nothing apart: answers to one prompt score the same within this, and its loss is that of a coin.
_COLLAPSED_DIFFERENCE = 1e-3
_LENGTH_BINS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgedPairs:
    """Scores of judged pairs, and what was said of them; each pair scored by the head of its attribute.

    ``first_N`` and ``second_N``: (N,) scores, the first answer being the one that more say is better; ``label_N``: (N,)
    the probability that it is; ``groups_N``: prompt of each pair; ``longer_N``: (N,) tokens of the first answer less
    those of the second; ``heads_N``: (N,) place of the head.
    """

    first_N: Array
    second_N: Array
    label_N: Array
    groups_N: tuple[str, ...]
    longer_N: Array
    heads_N: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.first_N)

    @property
    def difference_N(self) -> Array:
        return self.first_N - self.second_N

    @property
    def decided_N(self) -> np.ndarray[Any, Any]:
        """(N,) True where a model can be right or wrong: not on ties."""
        return self.label_N > 0.5

    def where(self, chosen_N: np.ndarray[Any, Any]) -> JudgedPairs:
        """Those pairs alone."""
        return JudgedPairs(
            first_N=self.first_N[chosen_N],
            second_N=self.second_N[chosen_N],
            label_N=self.label_N[chosen_N],
            groups_N=tuple(group for group, is_in in zip(self.groups_N, chosen_N, strict=True) if is_in),
            longer_N=self.longer_N[chosen_N],
            heads_N=self.heads_N[chosen_N],
        )


def judged_pairs(
    rows: Sequence[EncodedComparison], groups: Sequence[str], scores: Sequence[Array], heads: Sequence[str]
) -> JudgedPairs:
    """All judged pairs of ``rows``, in their order.

    Args:
        rows: with their judgements.
        groups: prompt of each row.
        scores: (K, H) of each row's answers.
        heads: names of the heads; none for one without a name.
    """
    first, second, label, prompts, longer, places = [], [], [], [], [], []
    for row, group, scores_KH in zip(rows, groups, scores, strict=True):
        tokens = [len(answer) - answer.prompt_tokens for answer in row.answers]
        for judgement in row.judgements:
            head = heads.index(judgement.attribute) if judgement.attribute is not None else 0
            first.append(scores_KH[judgement.first, head])
            second.append(scores_KH[judgement.second, head])
            label.append(judgement.probability)
            prompts.append(group)
            longer.append(tokens[judgement.first] - tokens[judgement.second])
            places.append(head)
    return JudgedPairs(
        first_N=np.array(first, dtype=np.float64),
        second_N=np.array(second, dtype=np.float64),
        label_N=np.array(label, dtype=np.float64),
        groups_N=tuple(prompts),
        longer_N=np.array(longer, dtype=np.float64),
        heads_N=np.array(places, dtype=np.int64),
    )


def right(difference_N: Array) -> Array:
    """(N,) 1 where the first answer is scored higher, .5 of equal scores, else 0."""
    result: Array = (difference_N > 0) + 0.5 * (difference_N == 0)
    return result


def accuracy(difference_N: Array, pairs: JudgedPairs) -> Interval:
    """Share of the decided pairs that are ranked as annotated. ``difference_N``: (N,) of whatever ranks them.

    Raises:
        ValueError: fewer than 2 of them are decided.
    """
    decided_N = pairs.decided_N
    groups = [group for group, is_decided in zip(pairs.groups_N, decided_N, strict=True) if is_decided]
    return wilson_interval_of_groups(right(difference_N[decided_N]), groups)


def pair_figures(first_N: Array, second_N: Array, label_N: Array | None = None) -> dict[str, float]:
    """What (N,) scores of better and worse answers say: accuracy, loss, calibration, spread.

    ``label_N``: probability that the first is the better one; None: it is of all pairs. Pairs of .5 are ties, which no
    model is right or wrong about: they count in loss and calibration alone.
    """
    label_N = np.ones(len(first_N)) if label_N is None else label_N
    difference_N = first_N - second_N
    decided_N = difference_N[label_N > 0.5]
    probability_N = sigmoid(difference_N)
    interval = mean_interval(decided_N)
    return {
        "eval_loss": float(label_loss(probability_N, label_N).mean()),
        "eval_accuracy": float(right(decided_N).mean()),
        "eval_brier": float(brier(probability_N, label_N).mean()),
        "eval_ece": expected_calibration_error(probability_N, label_N),
        "eval_margin_mean": interval.value,
        "eval_margin_ci95": (interval.high - interval.low) / 2,
        "eval_score_std": float(np.concatenate([first_N, second_N]).std(ddof=1)),
    }


def refuse_collapsed(pairs: JudgedPairs, heads: Sequence[str] = ()) -> None:
    """Asks every head by itself, and of differences within pairs: scores may differ between prompts and tell nothing.

    Args:
        pairs: held-out ones.
        heads: names; none for one without a name.

    Raises:
        CollapsedError: the model, or a head of it, tells nothing apart, whatever its accuracy.
    """
    for place, name in enumerate(heads or [""]):
        own = pairs.where(pairs.heads_N == place)
        if not len(own):
            continue
        difference = math.sqrt(float(np.square(own.difference_N).mean()))
        if difference < _COLLAPSED_DIFFERENCE:
            loss = float(label_loss(sigmoid(own.difference_N), own.label_N).mean())
            spread = float(np.concatenate([own.first_N, own.second_N]).std(ddof=1))
            raise CollapsedError(
                f"the reward model has collapsed{f' in its head {name!r}' if name else ''}: the scores of the two "
                f"answers of a held-out pair differ by {difference:.1e} (root mean square; between prompts their "
                f"standard deviation is {spread:.1e}), and its loss is {loss:.4f}, a coin's (ln 2); it is not saved. "
                "Lower --learning-rate, or check the data"
            )


def by_length(difference_N: Array, pairs: JudgedPairs) -> list[dict[str, Any]]:
    """Accuracy in bins of how many tokens the better answer is longer, as many pairs in each as can be.

    A model that ranks by length alone is right at one end and wrong at the other.
    """
    decided = pairs.where(pairs.decided_N)
    difference_N = difference_N[pairs.decided_N]
    edges = np.unique(np.quantile(decided.longer_N, np.arange(1, _LENGTH_BINS) / _LENGTH_BINS, method="inverted_cdf"))
    place_N = np.searchsorted(edges, decided.longer_N, side="left")
    found = []
    for place in np.unique(place_N):
        inside_N = place_N == place
        if inside_N.sum() < 2:
            continue
        part = decided.where(inside_N)
        interval = accuracy(difference_N[inside_N], part)
        bounds = {"from": float(part.longer_N.min()), "to": float(part.longer_N.max())}
        found.append({**bounds, "pairs": len(part), "accuracy": interval.as_json()})
    return found


def describe(pairs: JudgedPairs, temperature: Temperature | None) -> dict[str, Any]:
    """Everything that is said of one head's held-out pairs, for evaluation.json."""
    difference_N = pairs.difference_N
    described: dict[str, Any] = {
        **pair_figures(pairs.first_N, pairs.second_N, pairs.label_N),
        "accuracy": accuracy(difference_N, pairs).as_json(),
        "pairs": len(pairs),
        "ties": int((~pairs.decided_N).sum()),
        "by_length": by_length(difference_N, pairs),
        "length_correlation": correlation(difference_N, pairs.longer_N),
    }
    before_N = sigmoid(difference_N)
    after_N = None if temperature is None else sigmoid(difference_N / temperature.value)
    described["calibration"] = calibration(before_N, after_N, pairs)
    if temperature is not None:
        described["calibration"] |= temperature.as_json()
    return described


def calibration(before_N: Array, after_N: Array | None, pairs: JudgedPairs) -> dict[str, Any]:
    """Figures with intervals of the probabilities without temperature and, where there is one, with it."""
    found = {}
    for name, probability_N in (("before", before_N), ("after", after_N)):
        if probability_N is not None:
            figures = calibration_figures(probability_N, pairs.label_N, pairs.groups_N)
            found[name] = {figure: interval.as_json() for figure, interval in figures.items()}
    return found


def correlation(x_N: Array, y_N: Array) -> float:
    """Pearson's, 0 where one of the two is constant."""
    if x_N.std() == 0 or y_N.std() == 0:
        return 0.0
    return float(np.corrcoef(x_N, y_N)[0, 1])


def baselines(
    train: Sequence[Comparison], held_out: Sequence[Comparison], attribute: str | None = None
) -> dict[str, Interval]:
    """Held-out accuracy of two logistic models of the difference between answers: their words, their length.

    Args:
        train, held_out: rows; of the judgements by ``attribute`` alone.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels, _ = _texts(train, attribute)
    held_out_texts, held_out_labels, groups = _texts(held_out, attribute)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, lowercase=True)
    try:
        vectorizer.fit([text for pair in texts for text in pair])
    except ValueError as error:
        # Too few words in common, or a script without blanks. The model that was trained is worth more than this.
        sys.stderr.write(f"warning: no baselines: TF-IDF can't be fitted on these texts ({error})\n")
        return {}

    def words(pairs: Sequence[tuple[str, str]]) -> Any:
        return vectorizer.transform([a for a, _ in pairs]) - vectorizer.transform([b for _, b in pairs])

    def lengths(pairs: Sequence[tuple[str, str]]) -> Any:
        return np.array([[math.log(len(a.split()) + 1) - math.log(len(b.split()) + 1)] for a, b in pairs])

    found = {}
    # Each pair as won and, so far as it is a tie or a soft label, as lost; in both orders, so that nothing is learned
    # but the difference.
    weights_N = np.array([*labels, *(1.0 - label for label in labels)])
    told = np.flatnonzero(weights_N)
    y = np.repeat([1, 0], len(told))
    decided_N = np.array(held_out_labels) > 0.5
    of_decided = [group for group, is_decided in zip(groups, decided_N, strict=True) if is_decided]
    for name, features, stack in (("TF-IDF logistic", words, vstack), ("length alone", lengths, np.vstack)):
        difference = features(texts)
        won = stack([difference, -difference])[told]
        model = LogisticRegression(fit_intercept=False, max_iter=1000)
        model.fit(stack([won, -won]), y, sample_weight=np.tile(weights_N[told], 2))
        margin_N = model.decision_function(features(held_out_texts))
        found[name] = wilson_interval_of_groups(right(margin_N[decided_N]), of_decided)
    return found


def _texts(rows: Sequence[Comparison], attribute: str | None) -> tuple[list[tuple[str, str]], list[float], list[str]]:
    """The judged pairs as texts, better answer first, with their labels and prompts."""
    texts, labels, groups = [], [], []
    for row in rows:
        for judgement in row.judgements:
            if attribute is None or judgement.attribute in (None, attribute):
                texts.append((row.answers[judgement.first], row.answers[judgement.second]))
                labels.append(judgement.probability)
                groups.append(row.group_key)
    return texts, labels, groups


def report(title: str, accuracies: Mapping[str, Interval], described: Mapping[str, Any]) -> None:
    """Prints the held-out accuracies side by side, with 95 % intervals, then by length and how true probabilities are.

    Args:
        title: of what the figures are, such as the name of a head; empty for all of it.
        accuracies: by what is compared.
        described: of ``describe``.
    """
    width = max(map(len, accuracies))
    of_title = f" for {title}" if title else ""
    ties = f", {described['ties']:,} ties beside them" if described["ties"] else ""
    count = next(iter(accuracies.values())).count
    lines = [f"held-out pairs ranked as annotated{of_title} ({count:,} pairs{ties}, 95 % intervals):"]
    lines += [f"  {name:<{width}}  {interval}" for name, interval in accuracies.items()]
    lines += ["by how many tokens the better answer is longer:"]
    for part in described["by_length"]:
        lines.append(f"  {part['from']:>5.0f} to {part['to']:>5.0f}  {Interval(**part['accuracy'])}")
    lines += [f"held-out loss {described['eval_loss']:.4f} (a coin: {math.log(2):.4f})"]
    told = described["calibration"]
    for name, what in (("before", "as it is"), ("after", f"T = {told.get('temperature', 1):.3g}")):
        if name in told:
            ece, brier_score = (Interval(**told[name][figure]) for figure in ("ece", "brier"))
            lines.append(f"probabilities, {what}: calibration error {ece}, Brier score {brier_score}")
    sys.stdout.write("\n".join(lines) + "\n")

"""Alarms of held-out evaluations: what a policy does that a rising reward does not show.

An evaluation is its figures by name, as ``Evaluation.figures`` gives them; the first of a series is the one before
training. Every rule compares the figures of one evaluation with a bound, which may be a share of the first's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.monitor_settings import AlarmSettings
from trainer.wording import brief, number

Figures = Mapping[str, float]

# Two-sided, at 5 %.
_NORMAL_975 = 1.959963984540054
_ORDERS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A figure that crossed ``bound``. ``step`` is where it did so worst; None: over the whole run, or held out."""

    key: str
    step: int | None
    value: float
    bound: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A rule that an evaluation breaks. ``excess``: how far beyond the bound, to tell the worst evaluation by."""

    rule: str
    key: str
    value: float
    bound: float
    excess: float
    what: str
    advice: str

    def text(self, when: str) -> str:
        """For people: what was seen, where, the bound and what to do."""
        side = "above" if self.value > self.bound else "below"
        return f"{self.what}: {number(self.value)} {when}, {side} {brief(self.bound)}; {self.advice}."


def crossings(figures: Figures, before: Figures, settings: AlarmSettings) -> list[Crossing]:
    """The rules that an evaluation breaks, in their order; those whose figures are missing are left out.

    Args:
        figures: of the evaluation.
        before: of the one before training.
        settings: the bounds.
    """
    return [found for rule in RULES.values() for found in rule(figures, before, settings)]


def checked(figures: Figures, before: Figures, settings: AlarmSettings) -> dict[str, float]:
    """For the log: ``alarm/RULE`` of every rule, 1 where it is broken, and how many are."""
    broken = {found.rule for found in crossings(figures, before, settings)}
    return {f"alarm/{name}": float(name in broken) for name in RULES} | {"alarm/count": float(len(broken))}


def worst_alarms(series: Sequence[tuple[int, Figures]], settings: AlarmSettings) -> list[tuple[int, Crossing, str]]:
    """Of every rule the evaluation that breaks it worst, and what there is to say of it.

    Args:
        series: steps and figures of all evaluations, the one before training first.
        settings: the bounds.

    Returns:
        Place in ``series``, the crossing, and its text.
    """
    if not series:
        return []
    worst: dict[str, tuple[int, Crossing]] = {}
    often: dict[str, int] = {}
    for place, (_, figures) in list(enumerate(series))[1:]:
        for found in crossings(figures, series[0][1], settings):
            often[found.rule] = often.get(found.rule, 0) + 1
            if found.rule not in worst or found.excess > worst[found.rule][1].excess:
                worst[found.rule] = place, found
    evaluations = len(series) - 1
    said = []
    for name, (place, found) in worst.items():
        when = f"in the held-out evaluation at step {series[place][0]:,d}"
        if evaluations > 1:
            when += f" (in {often[name]:,d} of {evaluations:,d})"
        said.append((place, found, found.text(when)))
    return said


# Rules ---------------------------------------------------------------------------------------------------------------


def _above(rule: str, key: str, value: float, bound: float, what: str, advice: str) -> Iterator[Crossing]:
    if value > bound:
        excess = value - bound
        yield Crossing(rule=rule, key=key, value=value, bound=bound, excess=excess, what=what, advice=advice)


def _below(rule: str, key: str, value: float, bound: float, what: str, advice: str) -> Iterator[Crossing]:
    if value < bound:
        excess = bound - value
        yield Crossing(rule=rule, key=key, value=value, bound=bound, excess=excess, what=what, advice=advice)


def _kl(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    key = "kl_exact_mean" if "kl_exact_mean" in now else "kl_sequence_mean"
    if key in now:
        advice = "the reward model may be over-optimised: read the samples, raise beta"
        yield from _above("kl", key, now[key], settings.alarm_kl, "The KL to the reference", advice)


def _unique(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    if "unique_share" in now:
        was = f" (before training {number(before['unique_share'])})" if "unique_share" in before else ""
        what, advice = "The share of unique responses", f"the policy says the same to different prompts{was}"
        yield from _below("unique", "unique_share", now["unique_share"], settings.alarm_unique, what, advice)


def _distinct(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    """Of the n that fell furthest alone: they fall together."""
    keys = [key for n in _ORDERS if (key := f"distinct_{n}") in now and before.get(key, 0) > 0]
    if not keys:
        return
    key = min(keys, key=lambda key: now[key] / before[key])
    what = f"Distinct {key[-1]}-grams"
    advice = f"before training {number(before[key])}: the policy is losing its variety"
    yield from _below("distinct", key, now[key], settings.alarm_distinct * before[key], what, advice)


def _judge(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    """Both changes since the evaluation that the judge liked best, each beyond its 95 % interval."""
    needed = ("judge_since_best", "judge_since_best_ci95", "score_since_best", "score_since_best_ci95")
    if not all(key in now for key in needed):
        return
    judge, judge_ci95, score, score_ci95 = (now[key] for key in needed)
    if score - score_ci95 > 0:
        since = f"since step {number(int(now['best_step']))}, which it liked best," if "best_step" in now else ""
        advice = (
            f"{since} while the reward rose by {number(score)}: the reward model is being over-optimised; go back to "
            "that step, raise beta"
        ).strip()
        if judge + judge_ci95 < 0:
            yield Crossing(
                rule="judge",
                key="judge_since_best",
                value=judge,
                bound=-judge_ci95,
                excess=-judge - judge_ci95,
                what="The change of the judge's score",
                advice=advice,
            )


def _length(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    """Within prompts where that is known; a rise that chance explains (Fisher's z) is none."""
    within = "length_correlation_within"
    key = within if within in now and within in before else "length_correlation"
    if key not in now or key not in before or "n" not in now:
        return
    rise = now[key] - before[key]
    chance = _NORMAL_975 * math.sqrt(1 / max(1.0, now["n"] - 3) + 1 / max(1.0, before.get("n", now["n"]) - 3))
    if _fisher(now[key]) - _fisher(before[key]) > chance:
        what = "The rise of the correlation of reward and length" + (" within prompts" if key == within else "")
        advice = f"from {number(before[key])} to {number(now[key])}: length pays; see whether longer answers are better"
        yield from _above("length", key, rise, settings.alarm_length_correlation, what, advice)


def _fisher(r: float) -> float:
    return math.atanh(max(-0.999999, min(0.999999, r)))


def _entropy(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    key = "entropy_mean"
    if key in now and before.get(key, 0) > 0:
        advice = f"before training {number(before[key])}: the policy has nearly stopped exploring"
        bound = settings.alarm_entropy * before[key]
        yield from _below("entropy", key, now[key], bound, "The held-out entropy", advice)


def _perplexity(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    key = "demonstration_perplexity"
    if key in now and key in before:
        advice = f"before training {number(before[key])}: the policy forgets what it was taught"
        bound = settings.alarm_perplexity * before[key]
        yield from _above("perplexity", key, now[key], bound, "The perplexity of held-out demonstrations", advice)


def _score_shift(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    if "score_mean" not in now or not before.get("score_std", 0) > 0:
        return
    shift = (now["score_mean"] - before["score_mean"]) / before["score_std"]
    what = "The shift of the mean score, in standard deviations of before"
    advice = "such answers the reward model was not tried on: have people compare fresh ones"
    bound = settings.alarm_score_shift
    if shift < 0:
        yield from _below("score_shift", "score_mean", shift, -bound, what, advice)
    else:
        yield from _above("score_shift", "score_mean", shift, bound, what, advice)


def _spread(now: Figures, before: Figures, settings: AlarmSettings) -> Iterator[Crossing]:
    key = "spread_mean"
    if key in now and before.get(key, 0) > 0:
        advice = f"before training {number(before[key])}: the members of the reward ensemble no longer agree"
        bound = settings.alarm_spread * before[key]
        yield from _above("spread", key, now[key], bound, "The spread of the ensemble's scores", advice)


RULES: Mapping[str, Callable[[Figures, Figures, AlarmSettings], Iterator[Crossing]]] = {
    "kl": _kl,
    "unique": _unique,
    "distinct": _distinct,
    "judge": _judge,
    "length": _length,
    "entropy": _entropy,
    "perplexity": _perplexity,
    "score_shift": _score_shift,
    "spread": _spread,
}

"""From what models and rules say of a response to one score: weights, normalisation, ensembles, preferences.

Plain numbers in, plain numbers out. A model has one or more heads; an ensemble has several models (members) with the
same heads; a rule (a Python scorer) adds attributes of its own, on a scale of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

# Characters of what was sent that a message repeats: it travels in headers, which are few kilobytes.
_MOST_QUOTED = 100


class Reduction(StrEnum):
    """How the scores of an ensemble's members become one."""

    MEAN = "mean"
    WORST_CASE = "worst_case"
    UNCERTAINTY = "uncertainty"


@dataclass(frozen=True, kw_only=True)
class Head:
    """One addend of a score: its name and weight."""

    name: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation (> 0) of a model's combined score on ``count`` calibration samples."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Member:
    """What is kept with one model. Differences of its scores over ``temperature`` are log-odds of a preference."""

    statistics: Statistics | None = None
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Marks:
    """What was said of one response: ``members`` of the heads of each model, ``rule`` of each attribute of the rule."""

    members: tuple[Sequence[float], ...] = ()
    rule: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Combined:
    """One response's scores. ``spread`` and ``member_scores`` are of ensembles alone."""

    score: float
    normalised: float | None
    attributes: tuple[tuple[str, float], ...]
    spread: float | None
    member_scores: tuple[float, ...]

    @property
    def numbers(self) -> tuple[float, ...]:
        """All of them."""
        optional = [number for number in (self.normalised, self.spread) if number is not None]
        return (self.score, *optional, *(score for _, score in self.attributes), *self.member_scores)


class WeightsRefusedError(Exception):
    """Weights that cannot be used; the message says why. ``precondition``: they would do with another model."""

    def __init__(self, message: str, *, precondition: bool = False) -> None:
        super().__init__(message)
        self.precondition = precondition


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of one request: of the heads in their order, and of the rule's attributes.

    ``rule_default``: of attributes of the rule that it did not declare.
    """

    heads: tuple[float, ...]
    rule: Mapping[str, float]
    rule_default: float

    def of_model(self, heads: Sequence[float]) -> float:
        """The combined score of one model."""
        return sum(weight * score for weight, score in zip(self.heads, heads, strict=True))

    def of_rule(self, rule: Mapping[str, float]) -> float:
        """What the rule adds."""
        return sum(self.rule.get(name, self.rule_default) * score for name, score in rule.items())


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How the score of what is hosted is made.

    Args:
        heads: of the model; empty for one head without a name. Those of all members are the same.
        members: one for a single model, none where a rule scores alone.
        rule: attributes that the rule declares.
        rule_name: of a rule that declares none: the name that its one number has, and the one by which the weight of
            all that it gives is changed.
        rule_weight: of a rule that declares no attributes.
        reduction, penalty: of an ensemble; ``penalty`` is lambda, the price of a unit of variance.
    """

    heads: tuple[Head, ...] = ()
    members: tuple[Member, ...] = (Member(),)
    rule: tuple[Head, ...] = ()
    rule_name: str | None = None
    rule_weight: float = 1.0
    reduction: Reduction = Reduction.MEAN
    penalty: float = 0.5

    @property
    def is_ensemble(self) -> bool:
        return len(self.members) > 1

    @property
    def members_normalised(self) -> bool:
        """Whether members are brought to one scale before they are reduced."""
        return self.is_ensemble and self.members[0].statistics is not None

    @property
    def can_normalise(self) -> bool:
        return bool(self.members) and self.members[0].statistics is not None

    @property
    def addends(self) -> tuple[Head, ...]:
        """Every name that a request may give a weight, the rule's last."""
        named = (Head(name=self.rule_name, weight=self.rule_weight),) if self.rule_name is not None else ()
        return (*self.heads, *self.rule, *named)

    def weights(self, overrides: Mapping[str, float], *, normalise: bool = False) -> Weights:
        """The weights of a request that gives some names others.

        Raises:
            WeightsRefusedError: a name is unknown, a weight is not finite, or statistics that were taken with the
                kept weights would be used with others.
        """
        known = {head.name: head.weight for head in self.addends}
        for name, weight in overrides.items():
            if name not in known:
                names = ", ".join(map(repr, known)) or "none: its score is the one output of the model"
                shown = name if len(name) <= _MOST_QUOTED else name[:_MOST_QUOTED] + "..."
                raise WeightsRefusedError(f"head_weights names {shown!r}, which there is not; there is {names}")
            if not math.isfinite(weight):
                raise WeightsRefusedError(f"head_weights gives {name!r} the weight {weight}, must be a finite number")
        changed = [head.name for head in self.heads if overrides.get(head.name, head.weight) != head.weight]
        if changed and (self.members_normalised or normalise):
            raise WeightsRefusedError(
                f"head_weights gives {changed[0]!r} another weight, but the statistics that the score is normalised "
                "with were taken with the kept one; "
                + (
                    "host an ensemble without statistics to weigh its heads"
                    if self.members_normalised
                    else "ask for raw scores"
                ),
                precondition=True,
            )
        now = {**known, **overrides}
        return Weights(
            heads=tuple(now[head.name] for head in self.heads) or (1.0,),
            rule={head.name: now[head.name] for head in self.rule},
            rule_default=now[self.rule_name] if self.rule_name is not None else self.rule_weight,
        )

    def combine(self, marks: Marks, weights: Weights, *, normalise: bool = False) -> Combined:
        """The scores of one response.

        Statistics hold for the model's part: what a rule adds is on its own scale, and is added as it is.
        """
        own = [weights.of_model(heads) for heads in marks.members]
        added = weights.of_rule(marks.rule) if marks.rule else 0.0
        attributes = tuple(self._attributes(marks))
        if not self.is_ensemble:
            model = own[0] if own else 0.0
            normalised = _standard(model, self.members[0].statistics) + added if normalise else None
            return Combined(
                score=model + added, normalised=normalised, attributes=attributes, spread=None, member_scores=()
            )
        if self.members_normalised:
            own = [_standard(score, member.statistics) for score, member in zip(own, self.members, strict=True)]
        score = reduce_members(own, self.reduction, self.penalty) + added
        return Combined(
            score=score,
            normalised=score if normalise else None,
            attributes=attributes,
            spread=math.sqrt(population_variance(own)),
            member_scores=tuple(own),
        )

    def preferences(self, first: Marks, second: Marks, weights: Weights) -> tuple[float, ...]:
        """Each member's probability that the first is preferred: sigmoid of the difference of raw scores over T.

        What a rule adds counts as in the score: where members are normalised it is worth so many of their standard
        deviations. A rule alone is a member of its own with T = 1.
        """
        added = weights.of_rule(first.rule) - weights.of_rule(second.rule)
        if not self.members:
            return (_sigmoid(added),)
        probabilities = []
        for member, one, other in zip(self.members, first.members, second.members, strict=True):
            scale = member.statistics.std if self.members_normalised and member.statistics else 1.0
            difference = weights.of_model(one) - weights.of_model(other) + scale * added
            probabilities.append(_sigmoid(difference / member.temperature))
        return tuple(probabilities)

    def _attributes(self, marks: Marks) -> list[tuple[str, float]]:
        named = [
            (head.name, sum(heads[index] for heads in marks.members) / len(marks.members))
            for index, head in enumerate(self.heads)
        ]
        return [*named, *marks.rule.items()]


def reduce_members(scores: Sequence[float], reduction: Reduction, penalty: float) -> float:
    """One score of those of an ensemble's members.

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", section 3: mean, worst-case
    (WCO) and uncertainty-weighted (UWO) optimisation, the last with the population variance over members.
    """
    if reduction is Reduction.WORST_CASE:
        return min(scores)
    mean = sum(scores) / len(scores)
    return mean if reduction is Reduction.MEAN else mean - penalty * population_variance(scores)


def population_variance(scores: Sequence[float]) -> float:
    """Mean squared distance to the mean."""
    mean = sum(scores) / len(scores)
    return sum((score - mean) * (score - mean) for score in scores) / len(scores)


def _standard(score: float, statistics: Statistics | None) -> float:
    assert statistics is not None
    return (score - statistics.mean) / statistics.std


def _sigmoid(x: float) -> float:
    """Without overflow at either end."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))

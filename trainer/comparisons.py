"""Comparisons: what people said of several answers to one prompt, in every shape that a reward model learns from.

======================================================  ====================================================
fields                                                  read as
======================================================  ====================================================
the shapes of a preference (``trainer.data``)           a pair of which the chosen answer is the better one
(prompt | instruction, input), first, second,           a pair; what was said of it is in ``preference``
preference
the same with preferences instead of preference         a pair judged by several attributes, ``{"safety": ...}``
..., ranking                                            a list of answers, the best first
..., answers, ranks                                     answers and their ranks, 1 the best; equal ranks are ties
..., answers, comparisons                               answers and what was said of some pairs of them: objects
                                                        with first and second (places from 0) and preference
======================================================  ====================================================

A preference is ``"first"``, ``"second"``, ``"tie"``, or the probability in [0, 1] that the first is better; or a list
of these, one an annotator, or an object of them by the annotators' names. A pair may have a ``margin`` by which the
better answer should win, and an ``attribute`` that it was judged by: the head that learns from it.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainer.data import read_preference
from trainer.errors import DataError
from trainer.rows import Fields, Row, has, kind_of, load_rows, no_shape, present, read_answer, read_prompt_if_any

Aggregation = Literal["mean", "majority"]

_SAID = {"first": 1.0, "second": 0.0, "tie": 0.5}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was said of two answers of a comparison, whose places in it are ``first`` and ``second``.

    ``first`` is the one that more say is the better one, and ``probability`` that it is, in [.5, 1]: 1 where nobody
    says otherwise, .5 of a tie. ``margin``: by how much its score should be higher, None where the row says nothing.
    ``attribute``: what they were judged by, None for the answer as a whole.
    """

    first: int
    second: int
    probability: float = 1.0
    margin: float | None = None
    attribute: str | None = None

    @property
    def decided(self) -> bool:
        """Whether one of the two is said to be better, so that a model can be right or wrong."""
        return self.probability > 0.5

    def with_probability(self, probability: float) -> Judgement:
        """The same pair where ``probability`` is that its present first answer is better; turned round below .5."""
        if probability >= 0.5:
            return replace(self, probability=probability)
        return replace(self, first=self.second, second=self.first, probability=1.0 - probability)


@dataclass(frozen=True, kw_only=True)
class Comparison(Row):
    """A prompt, at least two answers, and at least one judgement of two of them.

    ``ranked``: the answers stand in their order, the best first, and the judgements are of all their pairs.
    """

    answers: tuple[str, ...]
    judgements: tuple[Judgement, ...]
    ranked: bool = False

    @property
    def group_key(self) -> str:
        # Without a prompt nothing but the texts themselves tells rows apart, as of a ``Preference``.
        return super().group_key or json.dumps(sorted(self.answers))


def load_comparisons(
    sources: Sequence[str], *, split_by: str | None = None, annotators: Aggregation = "mean"
) -> list[Comparison]:
    """The comparisons of all ``sources``, in order.

    Args:
        sources: files or hub names.
        split_by: name of the field whose value is the row's group.
        annotators: how the labels of several become one: their mean, a soft label, or what most of them say.

    Raises:
        DataError: a source can't be read or has no row, or a row doesn't fit; with file, line and field.
    """
    parse = functools.partial(_comparison, annotators=annotators)
    return load_rows(sources, parse, split_by, ("ranking", "ranks", "comparisons", "first", "chosen"))


def refuse_strange_attributes(rows: Sequence[Comparison], heads: Sequence[str]) -> None:
    """Every judgement must be for a head that there is.

    Args:
        rows: as they were loaded.
        heads: names of the model's heads; none for one without a name.

    Raises:
        DataError: a row names another attribute, or none where there are several heads; with file and line.
    """
    for row in rows:
        for judgement in row.judgements:
            if judgement.attribute in heads or (judgement.attribute is None and len(heads) < 2):
                continue
            if judgement.attribute is None:
                problem = "has no field 'attribute' (or 'preferences')"
            else:
                problem = f"is judged by attribute {judgement.attribute!r}"
            raise DataError(
                f"{row.where}: {problem}, and --heads names {', '.join(map(repr, heads)) or 'none'}: each pair is for "
                "the head of its attribute"
            )


# Shapes ------------------------------------------------------------------------------------------------------------


def _comparison(fields: Fields, where: str, *, annotators: Aggregation) -> Comparison:
    if has(fields, "ranking"):
        answers = _answers(fields, "ranking", where)
        pairs = itertools.combinations(range(len(answers)), 2)
        judgements = [Judgement(first=a, second=b, attribute=_attribute(fields, where)) for a, b in pairs]
        return _row(fields, answers, judgements, where, ranked=True)
    if has(fields, "answers"):
        answers = _answers(fields, "answers", where)
        if has(fields, "ranks"):
            answers, judgements, ranked = _from_ranks(fields, answers, where)
            return _row(fields, answers, judgements, where, ranked=ranked)
        return _row(fields, answers, _from_comparisons(fields, len(answers), where, annotators), where)
    if has(fields, "first") or has(fields, "second"):
        needs = "a pair needs first, second and preference"
        answers = tuple(read_answer(present(fields, name, where, needs), name, where) for name in ("first", "second"))
        return _row(fields, answers, _judgements(fields, 0, 1, where, annotators), where)
    if not has(fields, "chosen") and not has(fields, "rejected"):
        raise no_shape(
            fields,
            where,
            "a comparison needs chosen and rejected; first, second and preference; ranking; or answers with ranks or "
            "comparisons",
        )
    pair = read_preference(fields, where)
    return Comparison(
        prompt=pair.prompt,
        answers=(pair.chosen, pair.rejected),
        judgements=tuple(_judgements(fields, 0, 1, where, annotators, default="first")),
        where=where,
    )


def _row(
    fields: Fields, answers: tuple[str, ...], judgements: Sequence[Judgement], where: str, *, ranked: bool = False
) -> Comparison:
    prompt = read_prompt_if_any(fields, where)
    return Comparison(prompt=prompt, answers=answers, judgements=tuple(judgements), ranked=ranked, where=where)


def _from_ranks(fields: Fields, answers: tuple[str, ...], where: str) -> tuple[tuple[str, ...], list[Judgement], bool]:
    """The answers, the best first, what their ranks say of each pair, and whether no two are tied."""
    ranks = fields["ranks"]
    if not isinstance(ranks, list) or len(ranks) != len(answers):
        raise DataError(
            f"{where}: field 'ranks' must be a list of {len(answers)} numbers, one an answer, is {kind_of(ranks)}"
        )
    ranked = [(_number(rank, f"'ranks', number {i}", where), i - 1) for i, rank in enumerate(ranks, start=1)]
    ranked.sort()
    attribute = _attribute(fields, where)
    judgements = [
        Judgement(first=a, second=b, probability=0.5 if ranked[a][0] == ranked[b][0] else 1.0, attribute=attribute)
        for a, b in itertools.combinations(range(len(answers)), 2)
    ]
    in_order = tuple(answers[place] for _, place in ranked)
    return in_order, judgements, all(judgement.decided for judgement in judgements)


def _from_comparisons(fields: Fields, count: int, where: str, annotators: Aggregation) -> list[Judgement]:
    said = present(fields, "comparisons", where, "what was said of the answers: it or 'ranks'")
    if not isinstance(said, list) or not said:
        raise DataError(f"{where}: field 'comparisons' must be a list of at least one object, is {kind_of(said)}")
    judgements: list[Judgement] = []
    for number, item in enumerate(said, start=1):
        part = f"{where}: field 'comparisons', number {number}"
        if not isinstance(item, dict):
            raise DataError(f"{part}: must be an object with first, second and preference, is {kind_of(item)}")
        places = []
        for name in ("first", "second"):
            place = present(item, name, part, "the place of an answer, from 0")
            if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < count:
                raise DataError(f"{part}: field {name!r} must be a whole number from 0 to {count - 1}, is {place!r}")
            places.append(place)
        if places[0] == places[1]:
            raise DataError(f"{part}: fields 'first' and 'second' are both {places[0]}: an answer is no pair")
        judgements += _judgements(item, places[0], places[1], part, annotators)
    return judgements


def _judgements(
    fields: Fields, first: int, second: int, where: str, annotators: Aggregation, *, default: str | None = None
) -> list[Judgement]:
    """Of one pair: one, or one an attribute."""
    if has(fields, "preferences"):
        by_attribute = fields["preferences"]
        if not isinstance(by_attribute, Mapping) or not by_attribute:
            raise DataError(
                f"{where}: field 'preferences' must be an object of preferences by attribute, is "
                f"{kind_of(by_attribute)}"
            )
        # Parquet gives every row the same names, and null to those that it does not have.
        said = {name: value for name, value in by_attribute.items() if value is not None}
    else:
        # Parquet gives every row the same names, and null to those that it does not have.
        value = fields["preference"] if has(fields, "preference") else default
        if value is None:
            present(fields, "preference", where, "first, second, tie, a probability, or those of several annotators")
        said = {_attribute(fields, where): value}
    judgements = []
    for attribute, value in said.items():
        probability = _aggregate(_votes(value, where), annotators)
        judgement = Judgement(first=first, second=second, margin=_margin(fields, where), attribute=attribute)
        if judgement.margin and probability == 0.5:
            raise DataError(f"{where}: field 'margin' is {judgement.margin:g} of a tie, which nothing wins")
        judgements.append(judgement.with_probability(probability))
    return judgements


# Fields ------------------------------------------------------------------------------------------------------------


def _votes(value: object, where: str) -> list[float]:
    """Each annotator's probability that the first is better."""
    if isinstance(value, Mapping):
        value = [vote for vote in value.values() if vote is not None]
    votes = value if isinstance(value, list) else [value]
    if not votes:
        raise DataError(f"{where}: field 'preference' is empty: nobody has said anything")
    found = []
    for vote in votes:
        if isinstance(vote, str) and vote in _SAID:
            found.append(_SAID[vote])
        elif isinstance(vote, int | float) and not isinstance(vote, bool) and 0 <= vote <= 1:
            found.append(float(vote))
        else:
            raise DataError(
                f"{where}: field 'preference' must be first, second, tie, or the probability from 0 to 1 that the "
                f"first is better, is {kind_of(vote)}"
            )
    return found


def _aggregate(votes: Sequence[float], how: Aggregation) -> float:
    """The mean, or what more annotators say than anything else: first (1), second (0) or tie (.5); else a tie.

    A probability says the one that it favours, .5 a tie.
    """
    if how == "mean":
        return math.fsum(votes) / len(votes)
    (said, most), *others = Counter(0.5 if vote == 0.5 else float(vote > 0.5) for vote in votes).most_common(2)
    return 0.5 if others and others[0][1] == most else said


def _margin(fields: Fields, where: str) -> float | None:
    if not has(fields, "margin"):
        return None
    margin = _number(fields["margin"], "'margin'", where)
    if margin < 0:
        raise DataError(f"{where}: field 'margin' must be at least 0, is {margin:g}")
    return margin


def _attribute(fields: Fields, where: str) -> str | None:
    if not has(fields, "attribute"):
        return None
    if not isinstance(fields["attribute"], str) or not fields["attribute"]:
        raise DataError(f"{where}: field 'attribute' must be the name of one, is {kind_of(fields['attribute'])}")
    return str(fields["attribute"])


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: field {name} must be a finite number, is {kind_of(value)}")
    return float(value)


def _answers(fields: Fields, name: str, where: str) -> tuple[str, ...]:
    value = fields[name]
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{where}: field {name!r} must be a list of at least 2 answers, is {kind_of(value)}")
    return tuple(read_answer(answer, name, where) for answer in value)

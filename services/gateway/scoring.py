"""Scores and rankings: from what a caller asks to what the reward service says."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from quartet.client import Comparison, ComparisonItem, ItemFailure, RewardInfo, Score, ScoreItem, ServedBy
from quartet.client.errors import InvalidInputError
from quartet.client.types import PromptLike
from services.gateway import exchange
from services.gateway.backends import Backends
from services.gateway.coalescer import Options
from services.gateway.problems import ProblemError


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Results in the order of the items. ``served_by``: who gave them."""

    results: tuple[Score | ItemFailure, ...]
    served_by: ServedBy


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Scores in the order of the candidates; ``order``: their indices, best first; ``preferred``: of each over each."""

    scores: tuple[Score, ...]
    order: tuple[int, ...]
    preferred: tuple[tuple[float, ...], ...]
    served_by: ServedBy


async def score(backends: Backends, items: Sequence[ScoreItem], options: Options) -> Scored:
    """A single item goes with those of other requests, where there are any; several are a call of their own.

    Raises:
        QuartetError: the call failed.
    """
    own = exchange.current()
    if len(items) == 1:
        result, served_by = await backends.single.score(items[0], options, own.request_id)
        results: tuple[Score | ItemFailure, ...] = (result,)
    else:
        found = await backends.score(items, options)
        results, served_by = found.results, found.served_by
    own.items += len(results)
    own.tokens += sum(result.token_count for result in results if isinstance(result, Score))
    return Scored(results=results, served_by=served_by)


async def require_scores(
    backends: Backends,
    items: Sequence[ScoreItem],
    options: Options,
    fields: Sequence[str],
    prompt_field: str | None = "prompt",
) -> tuple[tuple[Score, ...], ServedBy]:
    """The same where a caller has no room for one item's failure: then all fail.

    Args:
        backends: whom to ask.
        items: what to score.
        options: how.
        fields: where in the caller's request each response stands.
        prompt_field: where the prompt does; None: with its response.

    Raises:
        ProblemError: an item failed; names its field.
        QuartetError: the call failed.
    """
    try:
        found = await score(backends, items, options)
    except InvalidInputError as error:
        raise _named_by_caller(error, fields, prompt_field) from error
    scores = []
    for result, field in zip(found.results, fields, strict=True):
        if isinstance(result, ItemFailure):
            raise ProblemError.of_item(result, backends.reward.name, field)
        scores.append(result)
    return tuple(scores), found.served_by


def _named_by_caller(
    error: InvalidInputError, fields: Sequence[str], prompt_field: str | None
) -> InvalidInputError | ProblemError:
    """The error with the field's name in the caller's request, where it is of an item."""
    place = re.match(r"items\[(\d+)\]\.(prompt|response)", error.field)
    if place is None:
        return error
    own = fields[int(place[1])]
    name = prompt_field if place[2] == "prompt" and prompt_field is not None else own
    problem = ProblemError.of(error)
    field = name + error.field[place.end() :]
    return ProblemError(problem.status, error.message.replace(error.field, field), field=field, service=error.service)


async def rank(
    backends: Backends, prompt: PromptLike, responses: Sequence[str], finished: Sequence[bool], options: Options
) -> Ranked:
    """Candidates by their scores; of equal ones the earlier first.

    Raises:
        ProblemError: a candidate failed.
        QuartetError: a call failed.
    """
    items = [
        ScoreItem(prompt=prompt, response=response, finished=ended)
        for response, ended in zip(responses, finished, strict=True)
    ]
    fields = [f"responses[{index}]" for index in range(len(items))]
    scores, served_by = await require_scores(backends, items, options, fields)
    info = await backends.reward_info()
    preferred = (
        _by_difference(scores, info)
        if info.ensemble is None
        else await _by_members(backends, prompt, responses, finished, options)
    )
    order = sorted(range(len(scores)), key=lambda index: (-scores[index].score, index))
    return Ranked(scores=scores, order=tuple(order), preferred=preferred, served_by=served_by)


def _by_difference(scores: Sequence[Score], info: RewardInfo) -> tuple[tuple[float, ...], ...]:
    """Bradley-Terry of the scores over the model's temperature, as the reward service's Compare has it."""
    temperature = info.temperature or 1.0
    return tuple(tuple(sigmoid((one.score - other.score) / temperature) for other in scores) for one in scores)


async def _by_members(
    backends: Backends, prompt: PromptLike, responses: Sequence[str], finished: Sequence[bool], options: Options
) -> tuple[tuple[float, ...], ...]:
    """What the members of an ensemble say in the mean, which their scores alone don't tell."""
    pairs = list(itertools.combinations(range(len(responses)), 2))
    found = [[0.5] * len(responses) for _ in responses]
    if pairs:
        compared = await backends.reward.compare(
            [
                ComparisonItem(
                    prompt=prompt,
                    first=responses[i],
                    second=responses[j],
                    first_finished=finished[i],
                    second_finished=finished[j],
                )
                for i, j in pairs
            ],
            truncation=options.truncation,
            head_weights=dict(options.head_weights) or None,
        )
        for (i, j), result in zip(pairs, compared.results, strict=True):
            if not isinstance(result, Comparison):
                raise ProblemError.of_item(result, backends.reward.name, f"responses[{i}]")
            found[i][j], found[j][i] = result.probability, 1.0 - result.probability
    return tuple(map(tuple, found))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), also far from 0."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))

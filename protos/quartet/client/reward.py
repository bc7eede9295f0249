"""Client of the reward service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from quartet.client import types
from quartet.client.arguments import choice, message
from quartet.client.channel import ServiceClient
from quartet.client.types import ItemFailure, ModelInfo, PromptLike, ServedBy, WorkInterval
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc


class Truncation(StrEnum):
    """What happens to an item longer than the model: refused, cut on a side, or what became of it in training."""

    REFUSE = "refuse"
    LEFT = "left"
    RIGHT = "right"
    AS_TRAINED = "as_trained"


_TRUNCATION = {
    Truncation.REFUSE: reward_pb2.TRUNCATION_POLICY_REFUSE,
    Truncation.LEFT: reward_pb2.TRUNCATION_POLICY_LEFT,
    Truncation.RIGHT: reward_pb2.TRUNCATION_POLICY_RIGHT,
    Truncation.AS_TRAINED: reward_pb2.TRUNCATION_POLICY_AS_TRAINED,
}
_TRAINED_TRUNCATION = {message: name for name, message in _TRUNCATION.items() if name is not Truncation.AS_TRAINED}
_REDUCTION = {
    reward_pb2.ENSEMBLE_REDUCTION_MEAN: "mean",
    reward_pb2.ENSEMBLE_REDUCTION_WORST_CASE: "worst_case",
    reward_pb2.ENSEMBLE_REDUCTION_UNCERTAINTY: "uncertainty",
}


@dataclass(frozen=True, kw_only=True)
class ScoreItem:
    """One response to score: text, or token ids exactly when the prompt is token ids.

    ``finished``: whether a text response ended by itself, so that the end token is appended as in training.
    """

    prompt: PromptLike
    response: str | Sequence[int]
    finished: bool = True


@dataclass(frozen=True, kw_only=True)
class Score:
    """Raw score, the normalised one when asked for, and what was scored.

    ``attributes``: what the score is a weighted sum of, by name; empty for a model with one head. ``spread`` and
    ``member_scores`` are of ensembles: the population standard deviation of the scores of its members.
    """

    score: float
    normalised_score: float | None
    token_count: int
    truncated: bool
    attributes: Mapping[str, float] = field(default_factory=dict)
    spread: float | None = None
    member_scores: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Results in the order of the items."""

    results: tuple[Score | ItemFailure, ...]
    served_by: ServedBy
    work: WorkInterval


@dataclass(frozen=True, kw_only=True)
class ComparisonItem:
    """Two responses to one prompt: text, or token ids exactly when the prompt is token ids.

    ``first_finished``, ``second_finished``: whether a text response ended by itself.
    """

    prompt: PromptLike
    first: str | Sequence[int]
    second: str | Sequence[int]
    first_finished: bool = True
    second_finished: bool = True


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How likely the first is preferred, in [0, 1], and how each was scored. Members are those of an ensemble."""

    probability: float
    first: Score
    second: Score
    member_probabilities: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Results in the order of the pairs."""

    results: tuple[Comparison | ItemFailure, ...]
    served_by: ServedBy
    work: WorkInterval


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Mean and standard deviation of raw scores on the calibration samples."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """One addend of a score. ``python``: given by a Python scorer, not by the model."""

    name: str
    weight: float
    python: bool


@dataclass(frozen=True, kw_only=True)
class EnsembleMember:
    """One model of an ensemble."""

    model_id: str
    weights_fingerprint: str
    normalisation: Normalisation | None
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Several models that score together. ``reduction``: mean, worst_case or uncertainty."""

    members: tuple[EnsembleMember, ...]
    reduction: str
    variance_penalty: float


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """All that a reward service says of what it hosts.

    ``trained_truncation`` and ``trained_max_tokens`` are None where they are not kept with the model, ``temperature``
    is None of an ensemble, whose members have their own.
    """

    model: ModelInfo
    normalisation: Normalisation | None
    heads: tuple[Head, ...]
    ensemble: Ensemble | None
    trained_truncation: Truncation | None
    trained_max_tokens: int | None
    temperature: float | None


class RewardClient(ServiceClient):
    """Scores responses."""

    health_service = "quartet.reward.v1.RewardService"
    name = "reward service"

    async def get_model_info(self) -> tuple[ModelInfo, Normalisation | None]:
        """What the service hosts, and the normalisation kept with the model."""
        info = await self.get_reward_info()
        return info.model, info.normalisation

    async def get_reward_info(self) -> RewardInfo:
        """All of it: heads and their weights, the members of an ensemble, how the model was trained."""
        stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        reply = await self._call(stub.GetModelInfo, reward_pb2.GetModelInfoRequest())
        return RewardInfo(
            model=types.model_info(reply.model),
            normalisation=_normalisation(reply.normalisation),
            heads=tuple(Head(name=head.name, weight=head.weight, python=head.python) for head in reply.heads),
            ensemble=_ensemble(reply.ensemble) if reply.HasField("ensemble") else None,
            trained_truncation=_TRAINED_TRUNCATION.get(reply.trained_truncation),
            trained_max_tokens=reply.trained_max_tokens or None,
            temperature=reply.temperature or None,
        )

    async def score(
        self,
        items: Sequence[ScoreItem],
        *,
        tokenizer_fingerprint: str = "",
        normalise: bool = False,
        truncation: Truncation = Truncation.REFUSE,
        head_weights: Mapping[str, float] | None = None,
    ) -> Scores:
        """Scores every item, in order. Repeated while the service is away, for it is stateless.

        Args:
            items: what to score.
            tokenizer_fingerprint: of the tokenizer that made the token ids, where there are any.
            normalise: also return scores normalised with the statistics kept with the model.
            truncation: of items longer than the model.
            head_weights: other weights for some of the names that ``get_reward_info`` tells.

        Raises:
            InvalidInputError: an argument does not fit; names the field.
            QuartetError: see quartet.client.errors.
        """
        request = message(
            "",
            reward_pb2.ScoreRequest,
            items=[_item(item, f"items[{index}]") for index, item in enumerate(items)],
            tokenizer_fingerprint=tokenizer_fingerprint,
            normalise=normalise,
            truncation=choice("truncation", truncation, _TRUNCATION),
            head_weights=head_weights,
        )
        stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        reply = await self._call(stub.Score, request)
        types.require_results(reply.results, items, self.name)
        return Scores(
            results=tuple(_result(result) for result in reply.results),
            served_by=types.served_by(reply.served_by),
            work=types.work_interval(reply.work),
        )

    async def compare(
        self,
        items: Sequence[ComparisonItem],
        *,
        tokenizer_fingerprint: str = "",
        truncation: Truncation = Truncation.REFUSE,
        head_weights: Mapping[str, float] | None = None,
    ) -> Comparisons:
        """How likely the first response of each pair is preferred, in order. Arguments as ``score`` has them.

        Raises:
            InvalidInputError: an argument does not fit; names the field.
            QuartetError: see quartet.client.errors.
        """
        request = message(
            "",
            reward_pb2.CompareRequest,
            items=[_pair(item, f"items[{index}]") for index, item in enumerate(items)],
            tokenizer_fingerprint=tokenizer_fingerprint,
            truncation=choice("truncation", truncation, _TRUNCATION),
            head_weights=head_weights,
        )
        stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        reply = await self._call(stub.Compare, request)
        types.require_results(reply.results, items, self.name)
        return Comparisons(
            results=tuple(_comparison(result) for result in reply.results),
            served_by=types.served_by(reply.served_by),
            work=types.work_interval(reply.work),
        )


def _item(item: ScoreItem, name: str) -> reward_pb2.ScoreItem:
    prompt = types.prompt_message(item.prompt, f"{name}.prompt")
    named = f"{name}.response"
    if isinstance(item.response, str):
        return message(
            named,
            reward_pb2.ScoreItem,
            prompt=prompt,
            response_text=item.response,
            response_unfinished=not item.finished,
        )
    return reward_pb2.ScoreItem(prompt=prompt, response_token_ids=types.token_ids_message(item.response, named))


def _pair(item: ComparisonItem, name: str) -> reward_pb2.Comparison:
    return reward_pb2.Comparison(
        prompt=types.prompt_message(item.prompt, f"{name}.prompt"),
        first=_response(item.first, item.first_finished, f"{name}.first"),
        second=_response(item.second, item.second_finished, f"{name}.second"),
    )


def _result(result: reward_pb2.ScoreResult) -> Score | ItemFailure:
    failure = types.failure(result.status)
    return failure if failure is not None else _score(result)


def _score(result: reward_pb2.ScoreResult) -> Score:
    return Score(
        score=result.score,
        normalised_score=result.normalised_score if result.HasField("normalised_score") else None,
        token_count=result.token_count,
        truncated=result.truncated,
        attributes={attribute.name: attribute.score for attribute in result.attributes},
        spread=result.spread if result.HasField("spread") else None,
        member_scores=tuple(result.member_scores),
    )


def _response(response: str | Sequence[int], finished: bool, name: str) -> reward_pb2.Response:
    if isinstance(response, str):
        return message(name, reward_pb2.Response, text=response, unfinished=not finished)
    return reward_pb2.Response(token_ids=types.token_ids_message(response, name))


def _comparison(result: reward_pb2.CompareResult) -> Comparison | ItemFailure:
    failure = types.failure(result.status)
    if failure is not None:
        return failure
    return Comparison(
        probability=result.probability,
        first=_score(result.first),
        second=_score(result.second),
        member_probabilities=tuple(result.member_probabilities),
    )


def _normalisation(kept: reward_pb2.Normalisation) -> Normalisation | None:
    return Normalisation(mean=kept.mean, std=kept.std, count=kept.count) if kept.count else None


def _ensemble(message: reward_pb2.Ensemble) -> Ensemble:
    return Ensemble(
        members=tuple(
            EnsembleMember(
                model_id=member.model_id,
                weights_fingerprint=member.weights_fingerprint,
                normalisation=_normalisation(member.normalisation),
                temperature=member.temperature,
            )
            for member in message.members
        ),
        reduction=_REDUCTION.get(message.reduction, "unknown"),
        variance_penalty=message.variance_penalty,
    )

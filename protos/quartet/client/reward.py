"""Client of the reward service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from quartet.client import types
from quartet.client.channel import ServiceClient
from quartet.client.types import ItemFailure, ModelInfo, PromptLike, ServedBy, WorkInterval
from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc


class Truncation(StrEnum):
    """What happens to an item longer than the model: refused, or cut from the left."""

    REFUSE = "refuse"
    LEFT = "left"


_TRUNCATION = {
    Truncation.REFUSE: reward_pb2.TRUNCATION_POLICY_REFUSE,
    Truncation.LEFT: reward_pb2.TRUNCATION_POLICY_LEFT,
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
    """Raw score, the normalised one when asked for, and what was scored."""

    score: float
    normalised_score: float | None
    token_count: int
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Results in the order of the items."""

    results: tuple[Score | ItemFailure, ...]
    served_by: ServedBy
    work: WorkInterval


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Mean and standard deviation of raw scores on the calibration samples."""

    mean: float
    std: float
    count: int


class RewardClient(ServiceClient):
    """Scores responses."""

    health_service = "quartet.reward.v1.RewardService"
    name = "reward service"

    async def get_model_info(self) -> tuple[ModelInfo, Normalisation | None]:
        """What the service hosts, and the normalisation kept with the model."""
        stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        reply = await self._call(stub.GetModelInfo, reward_pb2.GetModelInfoRequest())
        kept = reply.normalisation
        normalisation = Normalisation(mean=kept.mean, std=kept.std, count=kept.count) if kept.count else None
        return types.model_info(reply.model), normalisation

    async def score(
        self,
        items: Sequence[ScoreItem],
        *,
        tokenizer_fingerprint: str = "",
        normalise: bool = False,
        truncation: Truncation = Truncation.REFUSE,
    ) -> Scores:
        """Scores every item, in order. Repeated while the service is away, for it is stateless.

        Raises:
            QuartetError: see quartet.client.errors.
        """
        request = reward_pb2.ScoreRequest(
            items=[_item(item) for item in items],
            tokenizer_fingerprint=tokenizer_fingerprint,
            normalise=normalise,
            truncation=_TRUNCATION[truncation],
        )
        stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        reply = await self._call(stub.Score, request)
        types.require_results(reply.results, items, self.name)
        return Scores(
            results=tuple(_result(result) for result in reply.results),
            served_by=types.served_by(reply.served_by),
            work=types.work_interval(reply.work),
        )


def _item(item: ScoreItem) -> reward_pb2.ScoreItem:
    prompt = types.prompt_message(item.prompt)
    if isinstance(item.response, str):
        return reward_pb2.ScoreItem(prompt=prompt, response_text=item.response, response_unfinished=not item.finished)
    return reward_pb2.ScoreItem(prompt=prompt, response_token_ids=common_pb2.TokenIds(ids=item.response))


def _result(result: reward_pb2.ScoreResult) -> Score | ItemFailure:
    failure = types.failure(result.status)
    if failure is not None:
        return failure
    return Score(
        score=result.score,
        normalised_score=result.normalised_score if result.HasField("normalised_score") else None,
        token_count=result.token_count,
        truncated=result.truncated,
    )

"""Protobuf to plain values and back for the reward service."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.hosting import serving
from services.hosting.model import out_of_range
from services.reward.drift import Baseline
from services.reward.score_watch import ScoreWatch
from services.reward.scorer import Encoding, Scorer, ScorerItem
from services.runtime.admission import Hold
from services.runtime.batcher import Batcher, ItemError
from services.runtime.errors import FailedPreconditionError, UnavailableError
from services.runtime.telemetry import ServiceMetrics


@dataclass(frozen=True, kw_only=True)
class HostedReward:
    """One loaded reward model and what belongs to it. A call is answered by one of these from beginning to end."""

    scorer: Scorer
    encoding: Encoding
    tokenizer: Any
    model: common_pb2.ModelInfo
    normalisation: reward_pb2.Normalisation | None
    batcher: Batcher[ScorerItem, float]
    baseline: Baseline | str = "no baseline scores are kept with the model"
    """Scores kept with it, or why its scores are not compared with any."""


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Scores batches; every item has a status of its own. ``hosted`` is None until a model is loaded."""

    def __init__(self, metrics: ServiceMetrics, watch: ScoreWatch | None = None) -> None:
        self.metrics = metrics
        self.watch = watch or ScoreWatch(metrics)
        self.hosted: HostedReward | None = None

    def host(self, hosted: HostedReward) -> None:
        """``hosted`` answers from now on; calls in hand are answered by the one that they began with."""
        known = hosted.normalisation
        version = hosted.model.served_by.weights_version
        self.hosted = hosted
        self.watch.begin(version, hosted.baseline, None if known is None else (known.mean, known.std))
        self.metrics.weights_version.set(version)

    def _hosted(self) -> HostedReward:
        if self.hosted is None:
            raise UnavailableError("the reward model is still loading; try again later")
        return self.hosted

    async def GetModelInfo(
        self, request: reward_pb2.GetModelInfoRequest, context: Any
    ) -> reward_pb2.GetModelInfoResponse:
        hosted = self._hosted()
        return reward_pb2.GetModelInfoResponse(model=hosted.model, normalisation=hosted.normalisation)

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        hosted = self._hosted()
        with hosted.batcher.hold(request.ByteSize()) as hold:
            return await self._score(hosted, request, context, hold)

    async def _score(
        self, hosted: HostedReward, request: reward_pb2.ScoreRequest, context: Any, hold: Hold
    ) -> reward_pb2.ScoreResponse:
        serving.require_items(len(request.items))
        if any(item.prompt.WhichOneof("content") == "token_ids" for item in request.items):
            serving.require_same_tokenizer(request.tokenizer_fingerprint, hosted.model.served_by.tokenizer_fingerprint)
        if request.normalise and hosted.normalisation is None:
            raise FailedPreconditionError(
                "normalise is true, but no statistics are kept with this model; calibrate it first", field="normalise"
            )
        left = request.truncation == reward_pb2.TRUNCATION_POLICY_LEFT
        # Tokenising holds no lock of the interpreter, so it may run beside the event loop.
        prepared = await asyncio.to_thread(lambda: [_prepare(hosted, item, left) for item in request.items])
        ready = [item for item in prepared if isinstance(item, _Prepared)]
        clock = serving.WorkClock()
        scores = await hosted.batcher.submit(
            [item.tokens for item in ready],
            [item.count for item in ready],
            time_remaining_s=serving.time_remaining_s(context),
            caller=serving.caller(context),
            hold=hold,
        )
        work = clock.stop()
        answers = iter(scores)
        results = [
            _result(item, next(answers), hosted.normalisation if request.normalise else None)
            if isinstance(item, _Prepared)
            else reward_pb2.ScoreResult(status=serving.invalid(item))
            for item in prepared
        ]
        for result in results:
            self.metrics.items.labels(common_pb2.ItemStatusCode.Name(result.status.code)).inc()
        self.metrics.tokens.labels("scored").inc(sum(item.count for item in ready))
        scored = [result for result in results if result.status.code == common_pb2.ITEM_STATUS_CODE_OK]
        self.watch.observe(
            hosted.model.served_by.weights_version,
            [result.score for result in scored],
            truncated=[result.truncated for result in scored],
            invalid=sum(result.status.code == common_pb2.ITEM_STATUS_CODE_INVALID for result in results),
        )
        return reward_pb2.ScoreResponse(results=results, served_by=hosted.model.served_by, work=work)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One item, ready for the model."""

    tokens: ScorerItem
    truncated: bool = False

    @property
    def count(self) -> int:
        return len(self.tokens.token_ids)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Token ids, the segments that an encoder's tokenizer tells, and how many special tokens must stay in front."""

    token_ids: list[int]
    segments: list[int] | None = None
    head: int = 0

    def last(self, count: int) -> ScorerItem:
        """Without as many tokens on the left, behind the special ones, as are more than ``count``."""
        ids, segments = (
            None if x is None else [*x[: self.head], *x[self.head + len(x) - count :]]
            for x in (self.token_ids, self.segments)
        )
        assert ids is not None
        return ScorerItem(ids, segments)


def _prepare(hosted: HostedReward, item: reward_pb2.ScoreItem, left: bool) -> _Prepared | str:
    """The token ids of one item, or why it is refused."""
    form = item.prompt.WhichOneof("content")
    if form is None:
        return "prompt is not set: give text, token_ids or messages"
    response_form = item.WhichOneof("response")
    if response_form is None:
        return "response is not set: give response_text or response_token_ids"
    if (form == "token_ids") != (response_form == "response_token_ids"):
        return f"prompt is {form} but response is {response_form}: both must be token ids, or neither"
    if form == "token_ids":
        if not item.response_token_ids.ids:
            return "response_token_ids is empty: there is nothing to score"
        encoded = _Encoded([*item.prompt.token_ids.ids, *item.response_token_ids.ids])
    else:
        if not item.response_text and item.response_unfinished:
            return "response_text is empty and unfinished: there is nothing to score"
        try:
            encoded = _encode(hosted, item)
        except serving.ItemRefusedError as error:
            return str(error)
    count = len(encoded.token_ids)
    if not count:
        return "prompt and response have no tokens: there is nothing to score"
    if (reason := out_of_range(encoded.token_ids, hosted.scorer.vocab_size)) is not None:
        return reason
    limit = hosted.scorer.max_sequence_tokens
    if count > limit:
        if not left:
            return (
                f"prompt and response have {count} tokens, the model takes {limit}; "
                "shorten them, or ask for truncation LEFT"
            )
        return _Prepared(encoded.last(limit), truncated=True)
    return _Prepared(ScorerItem(encoded.token_ids, encoded.segments))


def _encode(hosted: HostedReward, item: reward_pb2.ScoreItem) -> _Encoded:
    """
    Raises:
        ItemRefusedError: the chat template refuses the messages.
    """
    is_chat = item.prompt.WhichOneof("content") == "messages"
    prompt = serving.chat_text(hosted.tokenizer, item.prompt.messages.messages) if is_chat else item.prompt.text
    if hosted.encoding.pair:
        pair = hosted.tokenizer(prompt, item.response_text, return_special_tokens_mask=True)
        mask = pair["special_tokens_mask"]
        # An encoder reads its score off the first token: it stays, whatever is dropped.
        head = mask.index(0) if 0 in mask else len(mask)
        return _Encoded(list(pair["input_ids"]), pair.get("token_type_ids"), head)
    ids = _plain_ids(hosted, prompt) + _plain_ids(hosted, item.response_text)
    if hosted.encoding.end_token_id is not None and not item.response_unfinished:
        ids.append(hosted.encoding.end_token_id)
    return _Encoded(ids)


def _plain_ids(hosted: HostedReward, text: str) -> list[int]:
    return list(hosted.tokenizer(text, add_special_tokens=False).input_ids) if text else []


def _result(
    item: _Prepared, score: float | ItemError, normalisation: reward_pb2.Normalisation | None
) -> reward_pb2.ScoreResult:
    if isinstance(score, ItemError):
        return reward_pb2.ScoreResult(status=serving.failed(score.reason, score.retryable))
    if not math.isfinite(score):
        return reward_pb2.ScoreResult(status=serving.invalid(f"the model's score is {score}, not a finite number"))
    result = reward_pb2.ScoreResult(status=serving.ok(), score=score, token_count=item.count, truncated=item.truncated)
    if normalisation is not None:
        result.normalised_score = (score - normalisation.mean) / normalisation.std
    return result

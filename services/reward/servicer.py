"""Protobuf to plain values and back for the reward service."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.hosting import serving
from services.reward.combining import Marks, Reduction, Statistics, Weights, WeightsRefusedError
from services.reward.hosted import HostedReward as HostedReward
from services.reward.hosted import LoadedReward
from services.reward.panel import Answers, Work
from services.reward.preparing import Prepared, choose_cut, prepare
from services.reward.score_watch import ScoreWatch
from services.runtime import calls
from services.runtime.admission import Hold
from services.runtime.batcher import ItemError
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, OverloadedError, UnavailableError
from services.runtime.telemetry import ServiceMetrics

# Of float32.
_LARGEST = (2.0 - 2.0**-23) * 2.0**127
_TRUNCATIONS = {
    "refuse": reward_pb2.TRUNCATION_POLICY_REFUSE,
    "left": reward_pb2.TRUNCATION_POLICY_LEFT,
    "right": reward_pb2.TRUNCATION_POLICY_RIGHT,
}
_REDUCTIONS = {
    Reduction.MEAN: reward_pb2.ENSEMBLE_REDUCTION_MEAN,
    Reduction.WORST_CASE: reward_pb2.ENSEMBLE_REDUCTION_WORST_CASE,
    Reduction.UNCERTAINTY: reward_pb2.ENSEMBLE_REDUCTION_UNCERTAINTY,
}


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Scores batches; every item has a status of its own. ``hosted`` is None until a model is loaded."""

    def __init__(
        self,
        metrics: ServiceMetrics,
        watch: ScoreWatch | None = None,
        *,
        max_request_items: int = serving.MAX_REQUEST_ITEMS,
    ) -> None:
        self.metrics = metrics
        self.max_request_items = max_request_items
        self.readers = serving.Readers()
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

    def refusal(self, method: str, context: Any) -> OverloadedError | None:
        """Why a call is refused before its request is read."""
        if self.hosted is None or not method.endswith(("/Score", "/Compare")):
            return None
        return self.hosted.batcher.refusal(serving.caller(context))

    async def GetModelInfo(
        self, request: reward_pb2.GetModelInfoRequest, context: Any
    ) -> reward_pb2.GetModelInfoResponse:
        return describe(self._hosted())

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        hosted = self._hosted()
        serving.require_items(len(request.items), self.max_request_items)
        with hosted.batcher.hold(request.ByteSize()) as hold:
            return await self._score(hosted, request, context, hold)

    async def _score(
        self, hosted: HostedReward, request: reward_pb2.ScoreRequest, context: Any, hold: Hold
    ) -> reward_pb2.ScoreResponse:
        _require_readable(hosted, [item.prompt for item in request.items], request.tokenizer_fingerprint)
        if request.normalise and not hosted.combination.can_normalise:
            raise FailedPreconditionError(
                "normalise is true, but no statistics are kept with this model; calibrate it first", field="normalise"
            )
        weights = _weights(hosted, request.head_weights, normalise=request.normalise)
        cut = choose_cut(hosted, request.truncation)
        prepared = await self.readers.read(
            lambda: [prepare(hosted, item, cut) for item in request.items], size_bytes=hold.size_bytes
        )
        ready = [item for item in prepared if isinstance(item, Prepared)]
        answers, work = await self._submit(hosted, [(item,) for item in ready], context, hold)
        marks = iter(answers)
        results = await serving.make_reply(
            lambda: [
                _result(hosted, item, next(marks)[0], weights, normalise=request.normalise)
                if isinstance(item, Prepared)
                else reward_pb2.ScoreResult(status=serving.invalid(item))
                for item in prepared
            ],
            items=len(prepared),
        )
        self._count(hosted, results, ready)
        if not request.head_weights:  # Scores of other weights are of another distribution.
            self._watch(hosted, results)
        return reward_pb2.ScoreResponse(results=results, served_by=hosted.model.served_by, work=work)

    async def Compare(self, request: reward_pb2.CompareRequest, context: Any) -> reward_pb2.CompareResponse:
        hosted = self._hosted()
        serving.require_items(len(request.items), self.max_request_items)
        with hosted.batcher.hold(request.ByteSize()) as hold:
            return await self._compare(hosted, request, context, hold)

    async def _compare(
        self, hosted: HostedReward, request: reward_pb2.CompareRequest, context: Any, hold: Hold
    ) -> reward_pb2.CompareResponse:
        _require_readable(hosted, [pair.prompt for pair in request.items], request.tokenizer_fingerprint)
        weights = _weights(hosted, request.head_weights)
        cut = choose_cut(hosted, request.truncation)

        def prepare_pair(pair: reward_pb2.Comparison) -> tuple[Prepared, Prepared] | str:
            both = []
            for name, response in (("first", pair.first), ("second", pair.second)):
                found = prepare(hosted, _score_item(pair.prompt, response), cut)
                if isinstance(found, str):
                    return f"{name}: {found}"
                both.append(found)
            return both[0], both[1]

        prepared = await self.readers.read(
            lambda: [prepare_pair(pair) for pair in request.items], size_bytes=hold.size_bytes
        )
        ready = [pair for pair in prepared if not isinstance(pair, str)]
        answers, work = await self._submit(hosted, ready, context, hold)
        marks = iter(answers)
        results = await serving.make_reply(
            lambda: [
                reward_pb2.CompareResult(status=serving.invalid(pair))
                if isinstance(pair, str)
                else _comparison(hosted, pair, next(marks), weights)
                for pair in prepared
            ],
            items=len(prepared),
        )
        self._count(hosted, results, [item for pair in ready for item in pair])
        return reward_pb2.CompareResponse(results=results, served_by=hosted.model.served_by, work=work)

    async def _submit(
        self, hosted: HostedReward, ready: Sequence[tuple[Prepared, ...]], context: Any, hold: Hold
    ) -> tuple[list[Answers], common_pb2.WorkInterval]:
        """What the panel says of each, and when. Those that failed as a batch have an ItemError for each response."""
        clock = serving.WorkClock()
        works: list[Work] = [tuple(item.candidate for item in together) for together in ready]
        found = await hosted.batcher.submit(
            works,
            # Without a model nothing has tokens; a budget counts responses then.
            [sum(item.count for item in together) or len(together) for together in ready],
            time_remaining_s=serving.time_remaining_s(context),
            caller=serving.caller(context),
            hold=hold,
        )
        answers = [
            (answer,) * len(work) if isinstance(answer, ItemError) else answer
            for work, answer in zip(works, found, strict=True)
        ]
        return answers, clock.stop()

    def _watch(self, hosted: HostedReward, results: Sequence[reward_pb2.ScoreResult]) -> None:
        scored = [result for result in results if result.status.code == common_pb2.ITEM_STATUS_CODE_OK]
        self.watch.observe(
            hosted.model.served_by.weights_version,
            [result.score for result in scored],
            truncated=[result.truncated for result in scored],
            invalid=sum(result.status.code == common_pb2.ITEM_STATUS_CODE_INVALID for result in results),
        )

    def _count(
        self,
        hosted: HostedReward,
        results: Sequence[reward_pb2.ScoreResult | reward_pb2.CompareResult],
        scored: Iterable[Prepared],
    ) -> None:
        serving.count_items(self.metrics, (result.status for result in results))
        tokens = sum(item.count for item in scored)
        self.metrics.tokens.labels("scored").inc(tokens)
        calls.note(items=len(results), tokens=tokens, weights_version=hosted.model.served_by.weights_version)


def describe(hosted: LoadedReward) -> reward_pb2.GetModelInfoResponse:
    """What GetModelInfo tells of ``hosted``."""
    combination = hosted.combination
    models = set(combination.heads)
    info = reward_pb2.GetModelInfoResponse(
        model=hosted.model,
        normalisation=statistics(hosted.normalisation),
        heads=[
            reward_pb2.Head(name=head.name, weight=head.weight, python=head not in models)
            for head in combination.addends
        ],
        trained_truncation=_TRUNCATIONS.get(hosted.trained.truncation or ""),  # type: ignore[arg-type]
        trained_max_tokens=hosted.trained.max_tokens or 0,
    )
    if not combination.is_ensemble:
        info.temperature = combination.members[0].temperature if combination.members else 1.0
        return info
    info.ensemble.reduction = _REDUCTIONS[combination.reduction]
    if combination.reduction is Reduction.UNCERTAINTY:
        info.ensemble.variance_penalty = combination.penalty
    for member, model in zip(combination.members, hosted.member_infos, strict=True):
        info.ensemble.members.add(
            model_id=model.served_by.model_id,
            weights_fingerprint=model.served_by.weights_fingerprint,
            normalisation=statistics(member.statistics),
            temperature=member.temperature,
        )
    return info


def statistics(kept: Statistics | None) -> reward_pb2.Normalisation | None:
    """As a message."""
    return None if kept is None else reward_pb2.Normalisation(mean=kept.mean, std=kept.std, count=kept.count)


def _require_readable(hosted: HostedReward, prompts: Iterable[common_pb2.Prompt], fingerprint: str) -> None:
    """Refuses token ids that are not of our tokenizer."""
    if not any(prompt.WhichOneof("content") == "token_ids" for prompt in prompts):
        return
    if hosted.tokenizer is None:
        raise FailedPreconditionError(
            "prompt is token_ids, but a Python scorer alone is hosted, without a tokenizer to read them: send text",
            field="tokenizer_fingerprint",
        )
    serving.require_same_tokenizer(fingerprint, hosted.model.served_by.tokenizer_fingerprint)


def _weights(hosted: HostedReward, overrides: Any, *, normalise: bool = False) -> Weights:
    try:
        return hosted.combination.weights(dict(overrides), normalise=normalise)
    except WeightsRefusedError as error:
        kind = FailedPreconditionError if error.precondition else InvalidArgumentError
        raise kind(str(error), field="head_weights") from error


def _score_item(prompt: common_pb2.Prompt, response: reward_pb2.Response) -> reward_pb2.ScoreItem:
    form = response.WhichOneof("content")
    return reward_pb2.ScoreItem(
        prompt=prompt,
        response_text=response.text if form == "text" else None,
        response_token_ids=response.token_ids if form == "token_ids" else None,
        response_unfinished=response.unfinished,
    )


def _result(
    hosted: HostedReward, item: Prepared, marks: Marks | ItemError, weights: Weights, *, normalise: bool = False
) -> reward_pb2.ScoreResult:
    if isinstance(marks, ItemError):
        return reward_pb2.ScoreResult(status=serving.failed(marks.reason, marks.retryable))
    for scores in marks.members:
        for score in scores:
            if not math.isfinite(score):
                reason = f"the model's score is {score}, not a finite number"
                return reward_pb2.ScoreResult(status=serving.invalid(reason))
    found = hosted.combination.combine(marks, weights, normalise=normalise)
    if not all(abs(number) <= _LARGEST for number in found.numbers):
        # Weights or a rule may be as large as they like: an infinity is no score.
        reason = f"the score, weighted, is {found.score:g}: it or a part of it is more than float32 holds"
        return reward_pb2.ScoreResult(status=serving.invalid(reason))
    return reward_pb2.ScoreResult(
        status=serving.ok(),
        score=found.score,
        normalised_score=found.normalised,
        token_count=item.count,
        truncated=item.truncated,
        attributes=[reward_pb2.Attribute(name=name, score=score) for name, score in found.attributes],
        spread=found.spread,
        member_scores=found.member_scores,
    )


def _comparison(
    hosted: HostedReward, pair: tuple[Prepared, Prepared], answers: Answers, weights: Weights
) -> reward_pb2.CompareResult:
    results = [_result(hosted, item, marks, weights) for item, marks in zip(pair, answers, strict=True)]
    for name, result in zip(("first", "second"), results, strict=True):
        if result.status.code != common_pb2.ITEM_STATUS_CODE_OK:
            retryable = result.status.code == common_pb2.ITEM_STATUS_CODE_RETRYABLE
            status = serving.failed(f"{name}: {result.status.reason}", retryable)
            return reward_pb2.CompareResult(status=status)
    first, second = answers
    assert isinstance(first, Marks)
    assert isinstance(second, Marks)
    probabilities = hosted.combination.preferences(first, second, weights)
    return reward_pb2.CompareResult(
        status=serving.ok(),
        probability=math.fsum(probabilities) / len(probabilities),
        first=results[0],
        second=results[1],
        member_probabilities=probabilities if hosted.combination.is_ensemble else (),
    )

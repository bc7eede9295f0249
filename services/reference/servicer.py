"""Protobuf to plain values and back for the reference service."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quartet.common.v1 import common_pb2
from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
from services.hosting import serving
from services.hosting.model import out_of_range
from services.reference.logprobs import ReferenceItem, ReferenceModel, ReferenceResult
from services.runtime import calls
from services.runtime.admission import Hold
from services.runtime.batcher import Batcher, ItemError
from services.runtime.errors import InvalidArgumentError, OverloadedError, UnavailableError
from services.runtime.telemetry import ServiceMetrics


@dataclass(frozen=True, kw_only=True)
class HostedReference:
    """The loaded reference model and what belongs to it."""

    reference: ReferenceModel
    model: common_pb2.ModelInfo
    batcher: Batcher[ReferenceItem, ReferenceResult]


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    """Log-probabilities of batches; every item has a status of its own. ``hosted`` is None until a model is loaded."""

    def __init__(self, metrics: ServiceMetrics, *, max_request_items: int = serving.MAX_REQUEST_ITEMS) -> None:
        self.metrics = metrics
        self.max_request_items = max_request_items
        self.readers = serving.Readers()
        self.hosted: HostedReference | None = None

    def _hosted(self) -> HostedReference:
        if self.hosted is None:
            raise UnavailableError("the reference model is still loading; try again later")
        return self.hosted

    def refusal(self, method: str, context: Any) -> OverloadedError | None:
        """Why a call is refused before its request is read."""
        if self.hosted is None or not method.endswith("/LogProbs"):
            return None
        return self.hosted.batcher.refusal(serving.caller(context))

    async def GetModelInfo(
        self, request: reference_pb2.GetModelInfoRequest, context: Any
    ) -> reference_pb2.GetModelInfoResponse:
        return reference_pb2.GetModelInfoResponse(model=self._hosted().model)

    async def LogProbs(self, request: reference_pb2.LogProbsRequest, context: Any) -> reference_pb2.LogProbsResponse:
        hosted = self._hosted()
        serving.require_items(len(request.items), self.max_request_items)
        with hosted.batcher.hold(request.ByteSize()) as hold:
            return await self._logprobs(hosted, request, context, hold)

    async def _logprobs(
        self, hosted: HostedReference, request: reference_pb2.LogProbsRequest, context: Any, hold: Hold
    ) -> reference_pb2.LogProbsResponse:
        serving.require_same_tokenizer(request.tokenizer_fingerprint, hosted.model.served_by.tokenizer_fingerprint)
        temperature = request.temperature if request.HasField("temperature") else 1.0
        if not (math.isfinite(temperature) and temperature > 0):
            raise InvalidArgumentError(
                f"temperature is {temperature}, must be a finite number greater than 0", field="temperature"
            )
        # Not on the event loop: a large request would hold it up, and with it every health check.
        prepared = await self.readers.read(
            lambda: [_prepare(hosted, item, temperature, request.return_entropy) for item in request.items],
            size_bytes=hold.size_bytes,
        )
        ready = [item for item in prepared if isinstance(item, ReferenceItem)]
        clock = serving.WorkClock()
        answers = iter(
            await hosted.batcher.submit(
                ready,
                [len(item.token_ids) for item in ready],
                time_remaining_s=serving.time_remaining_s(context),
                caller=serving.caller(context),
                hold=hold,
            )
        )
        work = clock.stop()
        # Long by its tokens as well: a number each.
        results = await serving.make_reply(
            lambda: [
                _result(next(answers))
                if isinstance(item, ReferenceItem)
                else reference_pb2.LogProbsResult(status=serving.invalid(item))
                for item in prepared
            ],
            items=max(len(prepared), sum(len(item.token_ids) for item in ready) // 64),
        )
        serving.count_items(self.metrics, (result.status for result in results))
        tokens = sum(len(item.token_ids) for item in ready)
        self.metrics.tokens.labels("reference").inc(tokens)
        calls.note(items=len(results), tokens=tokens, weights_version=hosted.model.served_by.weights_version)
        return reference_pb2.LogProbsResponse(results=results, served_by=hosted.model.served_by, work=work)


def _prepare(
    hosted: HostedReference, item: reference_pb2.LogProbsItem, temperature: float, entropy: bool
) -> ReferenceItem | str:
    """One item ready for the model, or why it is refused."""
    token_ids = list(item.token_ids)
    if not token_ids:
        return "token_ids is empty"
    if not 1 <= item.response_start < len(token_ids):
        return (
            f"response_start is {item.response_start}, must lie in [1, {len(token_ids) - 1}]: "
            "the first token has nothing before it to be predicted from, and the response must not be empty"
        )
    if (reason := out_of_range(token_ids, hosted.reference.vocab_size)) is not None:
        return reason
    limit = hosted.reference.max_sequence_tokens
    if len(token_ids) > limit:
        return f"token_ids has {len(token_ids)} tokens, the model takes {limit}"
    return ReferenceItem(token_ids, item.response_start, temperature, entropy)


def _result(result: ReferenceResult | ItemError) -> reference_pb2.LogProbsResult:
    if isinstance(result, ItemError):
        return reference_pb2.LogProbsResult(status=serving.failed(result.reason, result.retryable))
    for name, values in (("a log-probability", result.logprobs), ("an entropy", result.entropies)):
        if not all(map(math.isfinite, values)):
            return reference_pb2.LogProbsResult(
                status=serving.invalid(f"the model gives {name} that is not a finite number")
            )
    return reference_pb2.LogProbsResult(status=serving.ok(), logprobs=result.logprobs, entropies=result.entropies)

"""Client of the reference service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quartet.client import types
from quartet.client.arguments import message
from quartet.client.channel import ServiceClient
from quartet.client.types import ItemFailure, ModelInfo, ServedBy, WorkInterval
from quartet.reference.v1 import reference_pb2, reference_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Token ids of prompt and response, and where the response begins (at least 1)."""

    token_ids: Sequence[int]
    response_start: int


@dataclass(frozen=True, kw_only=True)
class LogProbs:
    """Natural-log probabilities of the response tokens, and entropies in nats when asked for."""

    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LogProbsBatch:
    """Results in the order of the items."""

    results: tuple[LogProbs | ItemFailure, ...]
    served_by: ServedBy
    work: WorkInterval


class ReferenceClient(ServiceClient):
    """Log-probabilities under the reference model."""

    health_service = "quartet.reference.v1.ReferenceService"
    name = "reference service"

    async def get_model_info(self) -> ModelInfo:
        """What the service hosts."""
        stub = reference_pb2_grpc.ReferenceServiceStub(self._channel)
        reply = await self._call(stub.GetModelInfo, reference_pb2.GetModelInfoRequest())
        return types.model_info(reply.model)

    async def logprobs(
        self,
        items: Sequence[TokenSequence],
        *,
        tokenizer_fingerprint: str,
        temperature: float = 1.0,
        return_entropy: bool = False,
    ) -> LogProbsBatch:
        """Log-probabilities of every item's response tokens, in order. Repeated while the service is away.

        Raises:
            InvalidInputError: an argument does not fit; names the field.
            QuartetError: see quartet.client.errors.
        """
        request = message(
            "",
            reference_pb2.LogProbsRequest,
            items=[
                message(
                    f"items[{index}].",
                    reference_pb2.LogProbsItem,
                    token_ids=item.token_ids,
                    response_start=item.response_start,
                )
                for index, item in enumerate(items)
            ],
            tokenizer_fingerprint=tokenizer_fingerprint,
            temperature=temperature,
            return_entropy=return_entropy,
        )
        stub = reference_pb2_grpc.ReferenceServiceStub(self._channel)
        reply = await self._call(stub.LogProbs, request)
        types.require_results(reply.results, items, self.name)
        return LogProbsBatch(
            results=tuple(_result(result, item) for result, item in zip(reply.results, items, strict=True)),
            served_by=types.served_by(reply.served_by),
            work=types.work_interval(reply.work),
        )


def _result(result: reference_pb2.LogProbsResult, item: TokenSequence) -> LogProbs | ItemFailure:
    failure = types.failure(result.status)
    if failure is not None:
        return failure
    wanted = len(item.token_ids) - item.response_start
    if len(result.logprobs) != wanted:
        return ItemFailure(
            reason=f"the service gave {len(result.logprobs)} log-probabilities for {wanted} response tokens",
            retryable=False,
        )
    return LogProbs(logprobs=tuple(result.logprobs), entropies=tuple(result.entropies))

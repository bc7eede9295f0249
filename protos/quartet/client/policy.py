"""Client of the policy service: generation and weight updates."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import grpc

from quartet.client import types
from quartet.client.arguments import choice, message
from quartet.client.channel import ServiceClient, new_request_id, spread_pause_s
from quartet.client.errors import InvalidInputError, ServiceFailedError, UnavailableError
from quartet.client.types import ItemFailure, ModelInfo, PromptLike, ServedBy, WorkInterval
from quartet.fingerprint import TensorDigest, weights_fingerprint
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc, weights_pb2, weights_pb2_grpc

# Measured on loopback: 0.7 to 0.9 GB/s from 64 KiB to 4 MiB, a third of that at 32 MiB.
CHUNK_BYTES = 1024 * 1024
# Initial metadata with which the service accepts the begin of an update.
UPDATE_ACCEPTED = "quartet-update-accepted"

# A status that is not here by then never comes.
_STATUS_S = 2.0

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class FinishReason(StrEnum):
    """Why a completion ended: an end or stop token, max_new_tokens, or a weight update that aborted it."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


class InFlightPolicy(StrEnum):
    """What a weight update does to requests in flight."""

    KEEP = "keep"
    FINISH = "finish"
    ABORT = "abort"


_FINISH_REASONS = {
    policy_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    policy_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    policy_pb2.FINISH_REASON_ABORTED: FinishReason.ABORTED,
}
_IN_FLIGHT = {
    InFlightPolicy.KEEP: weights_pb2.IN_FLIGHT_POLICY_KEEP,
    InFlightPolicy.FINISH: weights_pb2.IN_FLIGHT_POLICY_FINISH,
    InFlightPolicy.ABORT: weights_pb2.IN_FLIGHT_POLICY_ABORT,
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample; log-probabilities come back of exactly this distribution. See SamplingParams in policy.proto.

    A trainer that computes log-probabilities itself gets the same ones as long as it uses temperature alone.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished completion. ``token_ids`` and ``logprobs`` have the same length; natural logarithms.

    ``adapter`` and its content fingerprint tell which LoRA adapter sampled it; empty: the base model. What ended it
    when ``finish_reason`` is STOP: ``stop_token_id``, the last token, or ``stop_string``, before which ``text`` ends.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    version_spans: tuple[tuple[int, int], ...]
    text: str
    prompt_token_ids: tuple[int, ...]
    served_by: ServedBy
    work: WorkInterval
    adapter: str = ""
    adapter_fingerprint: str = ""
    stop_token_id: int | None = None
    stop_string: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenDelta:
    """The next tokens of a completion that is not finished, their natural-log probabilities, and text that has become
    certain: whole characters. Joined they are the completion that follows; where it fails, they are void."""

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class FailedCompletion:
    """A (prompt, sample) that was not generated, and why."""

    prompt_index: int
    sample_index: int
    failure: ItemFailure


@dataclass(frozen=True, kw_only=True)
class WireTensor:
    """One tensor to send: ``data`` is its contiguous, row-major, little-endian content."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview = field(repr=False)

    def digest(self) -> TensorDigest:
        return TensorDigest(
            name=self.name, dtype=self.dtype, shape=self.shape, sha256=hashlib.sha256(self.data).hexdigest()
        )


@dataclass(frozen=True, kw_only=True)
class WeightsUpdate:
    """Outcome of an update: who answers now, bytes sent, and how long generation stood still."""

    served_by: ServedBy
    received_bytes: int
    pause_s: float


class PolicyClient(ServiceClient):
    """Generates from the policy service."""

    health_service = "quartet.policy.v1.PolicyService"
    name = "policy service"

    async def get_model_info(self) -> ModelInfo:
        """What the service hosts."""
        stub = policy_pb2_grpc.PolicyServiceStub(self._channel)
        reply = await self._call(stub.GetModelInfo, policy_pb2.GetModelInfoRequest())
        return types.model_info(reply.model)

    async def generate(
        self,
        prompts: Sequence[PromptLike],
        sampling: Sampling,
        *,
        n: int = 1,
        tokenizer_fingerprint: str = "",
        return_text: bool = False,
        prompt_seeds: Sequence[int] = (),
        adapter: str = "",
        request_id: str | None = None,
        patience_s: float | None = None,
    ) -> AsyncGenerator[Completion | FailedCompletion, None]:
        """Yields each (prompt, sample) as soon as it is finished, in no set order.

        Leaving the iteration early cancels the rest. When the service is away or overloaded, the client asks again for
        what it has not got, under the same request id: the service runs nothing twice that it has finished or is
        running still. What came before a break stays valid; what comes after it may be of other weights.
        ``patience_s``: seconds that the service may be away or overloaded at a stretch; by default the policy's. With 0
        UnavailableError is raised at once, and the caller asks again (``prompt_seeds`` keeps the draws).
        ``adapter``: name of a loaded LoRA adapter (``AdapterClient``) to generate with; empty: the base model.
        ``request_id``: under which the service knows this request; by default a fresh one. For a retry of the caller's
        own, give the same id and the same arguments again.

        Raises:
            InvalidInputError: an argument does not fit; names the field.
            NotFoundError: no such adapter is loaded.
            QuartetError: see quartet.client.errors.
        """
        request = _request(prompts, sampling, n, tokenizer_fingerprint, return_text, prompt_seeds, adapter, request_id)
        async with contextlib.aclosing(self._answers(request, patience_s)) as answers:
            async for answer in answers:
                if not isinstance(answer, TokenDelta):
                    yield answer

    async def generate_stream(
        self,
        prompts: Sequence[PromptLike],
        sampling: Sampling,
        *,
        n: int = 1,
        tokenizer_fingerprint: str = "",
        return_text: bool = True,
        prompt_seeds: Sequence[int] = (),
        adapter: str = "",
        request_id: str | None = None,
        patience_s: float | None = None,
    ) -> AsyncGenerator[TokenDelta | Completion | FailedCompletion, None]:
        """Yields the tokens of each (prompt, sample) as they are sampled, and then the finished completion.

        As ``generate``, but for ``patience_s``: once tokens of an unfinished completion were yielded, a service that
        goes away is not asked again, because other weights or another batch may draw other tokens the second time.

        Raises:
            InvalidInputError: an argument does not fit; names the field.
            NotFoundError: no such adapter is loaded.
            QuartetError: see quartet.client.errors.
        """
        request = _request(prompts, sampling, n, tokenizer_fingerprint, return_text, prompt_seeds, adapter, request_id)
        request.stream_tokens = True
        async with contextlib.aclosing(self._answers(request, patience_s)) as answers:
            async for answer in answers:
                yield answer

    async def _answers(
        self, request: policy_pb2.GenerateRequest, patience_s: float | None
    ) -> AsyncGenerator[TokenDelta | Completion | FailedCompletion, None]:
        """Every answer once, over as many calls as patience allows."""
        stub = policy_pb2_grpc.PolicyServiceStub(self._channel)
        n = max(request.n, 1)
        total = len(request.prompts) * n
        received: set[int] = set()
        begun: set[int] = set()  # Tokens of them were yielded, and their end was not.
        if patience_s is None:
            patience_s = self.policy.patience_s
        away_s: float | None = None  # Since when, on the monotonic clock; None while it answers.
        backoff_s = self.policy.first_backoff_s
        while True:
            try:
                async with self._stream(request.request_id, method="Generate") as metadata:
                    # Not wait_for_ready, as in ServiceClient._call.
                    call = stub.Generate(request, timeout=self.policy.deadline_s, metadata=metadata)
                    try:
                        async for reply in call:
                            away_s, backoff_s = None, self.policy.first_backoff_s
                            index = reply.prompt_index * n + reply.sample_index
                            if reply.HasField("delta"):
                                begun.add(index)
                                yield _delta(reply)
                                continue
                            begun.discard(index)
                            received.add(index)
                            yield _completion(reply)
                    finally:
                        call.cancel()
                break
            except UnavailableError as error:
                now_s = time.monotonic()
                away_s = now_s if away_s is None else away_s
                pause_s = spread_pause_s(backoff_s, error.retry_after_s)
                if begun or now_s - away_s + pause_s > patience_s:
                    raise
                await asyncio.sleep(pause_s)
                backoff_s = min(2 * backoff_s, self.policy.max_backoff_s)
                del request.received[:]
                request.received.extend(sorted(received))
        if len(received) != total:
            raise ServiceFailedError(
                f"the stream ended after {len(received)} of {total} completions",
                service=self.name,
                request_id=request.request_id,
            )


def _request(
    prompts: Sequence[PromptLike],
    sampling: Sampling,
    n: int,
    tokenizer_fingerprint: str,
    return_text: bool,
    prompt_seeds: Sequence[int],
    adapter: str,
    request_id: str | None,
) -> policy_pb2.GenerateRequest:
    if request_id is not None and not (
        isinstance(request_id, str) and request_id.isascii() and request_id.isprintable()
    ):
        # It goes as metadata, too, which takes nothing else.
        raise InvalidInputError(f"request_id is {request_id!r}, must be printable ASCII", field="request_id")
    params = message(
        "sampling.",
        policy_pb2.SamplingParams,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        stop_strings=sampling.stop_strings,
        logit_bias=sampling.logit_bias,
        prompt_seeds=prompt_seeds,
    )
    return message(
        "",
        policy_pb2.GenerateRequest,
        prompts=[types.prompt_message(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)],
        n=n,
        sampling=params,
        tokenizer_fingerprint=tokenizer_fingerprint,
        return_text=return_text,
        adapter=adapter,
        request_id=request_id or new_request_id(),
    )


def _delta(reply: policy_pb2.GenerateResponse) -> TokenDelta:
    return TokenDelta(
        prompt_index=reply.prompt_index,
        sample_index=reply.sample_index,
        token_ids=tuple(reply.delta.token_ids),
        logprobs=tuple(reply.delta.logprobs),
        text=reply.delta.text,
    )


def _completion(reply: policy_pb2.GenerateResponse) -> Completion | FailedCompletion:
    failure = types.failure(reply.status)
    if failure is not None:
        return FailedCompletion(prompt_index=reply.prompt_index, sample_index=reply.sample_index, failure=failure)
    completion = reply.completion
    return Completion(
        prompt_index=reply.prompt_index,
        sample_index=reply.sample_index,
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(completion.logprobs),
        finish_reason=_FINISH_REASONS[completion.finish_reason],
        version_spans=tuple((span.weights_version, span.token_count) for span in completion.version_spans),
        text=completion.text,
        prompt_token_ids=tuple(completion.prompt_token_ids),
        served_by=types.served_by(reply.served_by),
        work=types.work_interval(reply.work),
        adapter=reply.adapter,
        adapter_fingerprint=reply.adapter_fingerprint,
        stop_token_id=completion.stop_token_id if completion.HasField("stop_token_id") else None,
        stop_string=completion.stop_string,
    )


class WeightsClient(ServiceClient):
    """Replaces the weights of one policy replica, on its admin listener."""

    health_service = "quartet.policy.v1.WeightsService"
    name = "policy weights service"

    async def get_info(self) -> ServedBy:
        """Which weights serve now."""
        stub = weights_pb2_grpc.WeightsServiceStub(self._channel)
        reply = await self._call(stub.GetWeightsInfo, weights_pb2.GetWeightsInfoRequest())
        return types.served_by(reply.served_by)

    async def update(
        self,
        tensors: Sequence[WireTensor],
        *,
        weights_version: int,
        fingerprint: str | None = None,
        in_flight: InFlightPolicy = InFlightPolicy.KEEP,
    ) -> WeightsUpdate:
        """Sends all tensors and commits them as ``weights_version``. Never retried by itself.

        ``fingerprint``: of these tensors, when the caller knows it already; else it is computed while sending.

        Raises:
            DamagedError: the service received something else; the old weights serve on.
            PreconditionError: the version is not greater than the one that serves, or another update is under way.
            QuartetError: see quartet.client.errors.
        """
        stub = weights_pb2_grpc.WeightsServiceStub(self._channel)
        async with self._stream(method="UpdateWeights") as metadata:
            steps = _update_steps(tensors, weights_version, fingerprint, in_flight)
            call: grpc.aio.StreamUnaryCall[weights_pb2.UpdateWeightsRequest, weights_pb2.UpdateWeightsResponse]
            call = stub.UpdateWeights(timeout=self.policy.deadline_s, metadata=metadata, wait_for_ready=True)
            reply = await upload(call, steps)
        return WeightsUpdate(
            served_by=types.served_by(reply.served_by),
            received_bytes=reply.received_bytes,
            pause_s=reply.pause_seconds,
        )


async def upload(call: grpc.aio.StreamUnaryCall[Request, Reply], steps: Iterator[Request]) -> Reply:
    """Sends ``steps`` and returns the reply. The first is accepted or refused before the rest is sent.

    Raises:
        grpc.aio.AioRpcError: with the status that the service gave.
    """
    broken = False
    try:
        for number, step in enumerate(steps):
            try:
                await call.write(step)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The service has ended the call. Why is in its own status, which may come only after the write failed.
                broken = True
                break
            # The service answers begin with this or with a refusal: gigabytes are not sent in vain.
            if number == 0 and UPDATE_ACCEPTED not in await call.initial_metadata():
                break
        else:
            await call.done_writing()
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise (await _own_status(call, error) if broken else error) from None
    finally:
        call.cancel()  # Does nothing once it is answered.


async def _own_status(call: grpc.aio.StreamUnaryCall[Request, Reply], error: grpc.aio.AioRpcError) -> Exception:
    """What the service said, once it is here: until then gRPC takes the failed write for the end of the call."""
    end_s = time.monotonic() + _STATUS_S
    while await call.details() == error.details() and error.code() is grpc.StatusCode.INTERNAL:
        if time.monotonic() > end_s:
            return error
        await asyncio.sleep(0.01)
    return grpc.aio.AioRpcError(
        await call.code(),
        grpc.aio.Metadata(*(await call.initial_metadata() or ())),
        grpc.aio.Metadata(*(await call.trailing_metadata() or ())),
        details=await call.details(),
        debug_error_string=error.debug_error_string(),
    )


def tensor_specs(tensors: Sequence[WireTensor]) -> list[weights_pb2.TensorSpec]:
    """
    Raises:
        InvalidInputError: a name, dtype or shape does not fit.
    """
    return [
        message(f"begin.tensors[{index}].", weights_pb2.TensorSpec, name=t.name, dtype=t.dtype, shape=t.shape)
        for index, t in enumerate(tensors)
    ]


def _update_steps(
    tensors: Sequence[WireTensor], weights_version: int, fingerprint: str | None, in_flight: InFlightPolicy
) -> Iterator[weights_pb2.UpdateWeightsRequest]:
    begin = message(
        "begin.",
        weights_pb2.BeginUpdate,
        weights_version=weights_version,
        tensors=tensor_specs(tensors),
        in_flight=choice("begin.in_flight", in_flight, _IN_FLIGHT),
    )
    yield weights_pb2.UpdateWeightsRequest(begin=begin)
    digests = []
    for index, tensor in enumerate(tensors):
        data = tensor.data.cast("B")
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = weights_pb2.TensorChunk(tensor_index=index, data=bytes(data[start : start + CHUNK_BYTES]))
            yield weights_pb2.UpdateWeightsRequest(chunk=chunk)
        if fingerprint is None:
            digests.append(tensor.digest())
    commit = weights_pb2.CommitUpdate(weights_fingerprint=fingerprint or weights_fingerprint(digests))
    yield weights_pb2.UpdateWeightsRequest(commit=commit)

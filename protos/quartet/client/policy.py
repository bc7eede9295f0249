"""Client of the policy service: generation and weight updates."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import grpc

from quartet.client import types
from quartet.client.channel import ServiceClient
from quartet.client.errors import ServiceFailedError
from quartet.client.types import ItemFailure, ModelInfo, PromptLike, ServedBy, WorkInterval
from quartet.fingerprint import TensorDigest, weights_fingerprint
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc, weights_pb2, weights_pb2_grpc

# Measured on loopback: 0.7 to 0.9 GB/s from 64 KiB to 4 MiB, a third of that at 32 MiB.
CHUNK_BYTES = 1024 * 1024
# Initial metadata with which the service accepts the begin of an update.
UPDATE_ACCEPTED = "quartet-update-accepted"


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
    """How to sample; log-probabilities come back of exactly this distribution. See SamplingParams in policy.proto."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished completion. ``token_ids`` and ``logprobs`` have the same length; natural logarithms.

    ``adapter`` and its content fingerprint tell which LoRA adapter sampled it; empty: the base model.
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
    ) -> AsyncGenerator[Completion | FailedCompletion, None]:
        """Yields each (prompt, sample) as soon as it is finished, in no set order.

        Leaving the iteration early cancels the rest. Not retried: when the service goes away in the middle,
        UnavailableError is raised and the caller asks again for what it has not got (``prompt_seeds`` keeps the draws).
        ``adapter``: name of a loaded LoRA adapter (``AdapterClient``) to generate with; empty: the base model.

        Raises:
            NotFoundError: no such adapter is loaded.
            QuartetError: see quartet.client.errors.
        """
        params = policy_pb2.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            seed=sampling.seed,
            stop_token_ids=sampling.stop_token_ids,
            prompt_seeds=prompt_seeds,
        )
        request = policy_pb2.GenerateRequest(
            prompts=[types.prompt_message(prompt) for prompt in prompts],
            n=n,
            sampling=params,
            tokenizer_fingerprint=tokenizer_fingerprint,
            return_text=return_text,
            adapter=adapter,
        )
        stub = policy_pb2_grpc.PolicyServiceStub(self._channel)
        count = 0
        async with self._stream(method="Generate") as metadata:
            call = stub.Generate(request, timeout=self.policy.deadline_s, metadata=metadata, wait_for_ready=True)
            try:
                async for reply in call:
                    count += 1
                    yield _completion(reply)
            finally:
                call.cancel()
        if count != len(prompts) * max(n, 1):
            raise ServiceFailedError(
                f"the stream ended after {count} of {len(prompts) * max(n, 1)} completions", service=self.name
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
            try:
                for number, step in enumerate(steps):
                    await call.write(step)
                    # The service answers begin with this or with a refusal: gigabytes are not sent in vain.
                    if number == 0 and UPDATE_ACCEPTED not in await call.initial_metadata():
                        break
                else:
                    await call.done_writing()
                reply = await call
            finally:
                call.cancel()  # Does nothing once it is answered.
        return WeightsUpdate(
            served_by=types.served_by(reply.served_by),
            received_bytes=reply.received_bytes,
            pause_s=reply.pause_seconds,
        )


def _update_steps(
    tensors: Sequence[WireTensor], weights_version: int, fingerprint: str | None, in_flight: InFlightPolicy
) -> Iterator[weights_pb2.UpdateWeightsRequest]:
    specs = [weights_pb2.TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in tensors]
    begin = weights_pb2.BeginUpdate(weights_version=weights_version, tensors=specs, in_flight=_IN_FLIGHT[in_flight])
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

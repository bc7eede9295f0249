"""Protobuf to plain values and back for generation."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from quartet.common.v1 import common_pb2
from quartet.fingerprint import derive_seeds
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc
from services.hosting import serving
from services.hosting.model import out_of_range
from services.policy.adapters import Adapter
from services.policy.engine import (
    EngineFailedError,
    Finish,
    Generated,
    GenerationFailedError,
    GenerationTask,
    Sampling,
)
from services.policy.hosted import HostedPolicy
from services.runtime import calls
from services.runtime.errors import InvalidArgumentError, OverloadedError, UnavailableError
from services.runtime.telemetry import ServiceMetrics

_FINISH = {
    Finish.STOP: policy_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: policy_pb2.FINISH_REASON_LENGTH,
    Finish.ABORTED: policy_pb2.FINISH_REASON_ABORTED,
}
_RETRY_AFTER_MS = 1000


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A prompt ready for the engine."""

    token_ids: list[int]


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Streams completions as they finish. ``hosted`` is None until the engine has warmed up."""

    def __init__(self, metrics: ServiceMetrics, *, max_queued: int, stop: Callable[[str], None]) -> None:
        """
        Args:
            metrics: of the service.
            max_queued: completions that may be generated or wait at the same time; a request beyond is refused whole.
            stop: ends the service with a reason, when the engine has died.
        """
        self.metrics = metrics
        self.max_queued = max_queued
        self.stop = stop
        self.hosted: HostedPolicy | None = None
        self._admitted = 0

    def _hosted(self) -> HostedPolicy:
        if self.hosted is None:
            raise UnavailableError("the policy is still loading; try again later")
        return self.hosted

    async def GetModelInfo(
        self, request: policy_pb2.GetModelInfoRequest, context: Any
    ) -> policy_pb2.GetModelInfoResponse:
        return policy_pb2.GetModelInfoResponse(model=self._hosted().model)

    async def Generate(
        self, request: policy_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[policy_pb2.GenerateResponse]:
        hosted = self._hosted()
        n = _check(request)
        sampling = _sampling(request.sampling, hosted)
        if any(prompt.WhichOneof("content") == "token_ids" for prompt in request.prompts):
            serving.require_same_tokenizer(request.tokenizer_fingerprint, hosted.model.served_by.tokenizer_fingerprint)
        total = len(request.prompts) * n
        if total > self.max_queued:
            raise InvalidArgumentError(
                f"prompts times n is {total}, at most {self.max_queued} completions may be asked for at once",
                field="prompts",
            )
        if self._admitted + total > self.max_queued:
            raise OverloadedError(
                f"{self._admitted} completions are in hand and {total} more were asked for, at most {self.max_queued} "
                "are taken; try again later",
                retry_after_ms=_RETRY_AFTER_MS,
                refused_as="completions",
            )
        adapter = hosted.adapters.take(request.adapter)
        self._admitted += total
        try:
            # Tokenising holds no lock of the interpreter, so it may run beside the event loop.
            prepared = await asyncio.to_thread(
                lambda: [_prepare(hosted, prompt, sampling) for prompt in request.prompts]
            )
            async with contextlib.aclosing(self._generate(hosted, request, prepared, sampling, n, adapter)) as replies:
                async for reply in replies:
                    self.metrics.items.labels(common_pb2.ItemStatusCode.Name(reply.status.code)).inc()
                    version = reply.served_by.weights_version
                    calls.note(items=1, tokens=len(reply.completion.token_ids), weights_version=version)
                    if adapter is not None:
                        reply.adapter, reply.adapter_fingerprint = adapter.name, adapter.fingerprint
                    yield reply
        finally:
            self._admitted -= total
            hosted.adapters.give_back(adapter)

    async def _generate(
        self,
        hosted: HostedPolicy,
        request: policy_pb2.GenerateRequest,
        prepared: list[_Prepared | str],
        sampling: Sampling,
        n: int,
        adapter: Adapter | None,
    ) -> AsyncGenerator[policy_pb2.GenerateResponse, None]:
        seeds = _seeds(request.sampling, len(prepared), n)
        call_id = f"{calls.current_request_id()}.{secrets.token_hex(4)}"
        done: asyncio.Queue[asyncio.Task[Generated]] = asyncio.Queue()
        places: dict[asyncio.Task[Generated], tuple[int, int]] = {}
        try:
            for p, prompt in enumerate(prepared):
                for s in range(n):
                    if isinstance(prompt, str):
                        yield policy_pb2.GenerateResponse(
                            prompt_index=p,
                            sample_index=s,
                            status=serving.invalid(prompt),
                            served_by=hosted.model.served_by,
                        )
                        continue
                    task = asyncio.create_task(
                        hosted.engine.generate(
                            GenerationTask(
                                prompt_ids=prompt.token_ids,
                                sampling=sampling,
                                seed=seeds[p * n + s],
                                request_id=f"{call_id}-{p}-{s}",
                                adapter=adapter.number if adapter is not None else 0,
                            )
                        )
                    )
                    places[task] = (p, s)
                    task.add_done_callback(done.put_nowait)
            for _ in range(len(places)):
                task = await done.get()
                p, s = places[task]
                try:
                    generated = task.result()
                except EngineFailedError as error:
                    self.stop(str(error))
                    raise UnavailableError(f"{error}; the service is restarted") from error
                except GenerationFailedError as error:
                    yield policy_pb2.GenerateResponse(
                        prompt_index=p,
                        sample_index=s,
                        status=serving.failed(str(error), retryable=True),
                        served_by=hosted.model.served_by,
                    )
                    continue
                yield self._reply(hosted, request, prepared[p], p, s, generated)
        finally:
            # The client left, or the engine failed: free the slots at once.
            for task in places:
                task.cancel()

    def _reply(
        self,
        hosted: HostedPolicy,
        request: policy_pb2.GenerateRequest,
        prompt: _Prepared | str,
        p: int,
        s: int,
        generated: Generated,
    ) -> policy_pb2.GenerateResponse:
        work = common_pb2.WorkInterval(start_unix_ns=generated.start_unix_ns, end_unix_ns=generated.end_unix_ns)
        reply = policy_pb2.GenerateResponse(prompt_index=p, sample_index=s, served_by=hosted.model.served_by, work=work)
        if not all(map(math.isfinite, generated.logprobs)) or len(generated.logprobs) != len(generated.token_ids):
            reply.status.CopyFrom(
                serving.invalid("the model gives a log-probability that is not a finite number: its weights are broken")
            )
            return reply
        reply.status.CopyFrom(serving.ok())
        completion = reply.completion
        completion.token_ids.extend(generated.token_ids)
        completion.logprobs.extend(generated.logprobs)
        completion.finish_reason = _FINISH[generated.finish]
        for version, count in generated.version_spans:
            completion.version_spans.add(weights_version=version, token_count=count)
        if request.return_text:
            completion.text = hosted.tokenizer.decode(generated.token_ids, skip_special_tokens=True)
        if isinstance(prompt, _Prepared) and request.prompts[p].WhichOneof("content") != "token_ids":
            completion.prompt_token_ids.extend(prompt.token_ids)
        self.metrics.tokens.labels("generated").inc(len(generated.token_ids))
        if isinstance(prompt, _Prepared):
            self.metrics.tokens.labels("prompt").inc(len(prompt.token_ids))
        return reply


def _check(request: policy_pb2.GenerateRequest) -> int:
    """Refuses what cannot be sampled as a whole; returns n."""
    if not request.prompts:
        raise InvalidArgumentError("prompts is empty: send at least one", field="prompts")
    if request.n < 0:
        raise InvalidArgumentError(f"n is {request.n}, must be at least 1 (0 means 1)", field="n")
    return request.n or 1


def _sampling(params: policy_pb2.SamplingParams, hosted: HostedPolicy) -> Sampling:
    """The sampling settings, with defaults in place.

    Raises:
        InvalidArgumentError: one is out of bounds; names it, its value and the bound.
    """

    def require(fine: bool, name: str, value: object, bound: str) -> None:
        if not fine:
            raise InvalidArgumentError(f"sampling.{name} is {value}, must be {bound}", field=f"sampling.{name}")

    temperature = params.temperature if params.HasField("temperature") else 1.0
    top_p = params.top_p if params.HasField("top_p") else 1.0
    require(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, "a finite number, at least 0")
    require(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
    require(params.top_k >= 0, "top_k", params.top_k, "at least 0 (0 keeps all)")
    longest = hosted.engine.max_sequence_tokens
    require(1 <= params.max_new_tokens < longest, "max_new_tokens", params.max_new_tokens, f"in [1, {longest - 1}]")
    require(
        0 <= params.min_new_tokens <= params.max_new_tokens,
        "min_new_tokens",
        params.min_new_tokens,
        f"in [0, max_new_tokens {params.max_new_tokens}]",
    )
    bad = [token for token in params.stop_token_ids if not 0 <= token < hosted.engine.vocab_size]
    require(not bad, "stop_token_ids", bad, f"in the vocabulary, [0, {hosted.engine.vocab_size})")
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=params.top_k,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        stop_token_ids=tuple(dict.fromkeys((*hosted.model.eos_token_ids, *params.stop_token_ids))),
    )


def _seeds(params: policy_pb2.SamplingParams, prompts: int, n: int) -> list[int]:
    """One seed a completion, by prompt and then sample.

    Raises:
        InvalidArgumentError: prompt_seeds is neither empty nor as long as prompts.
    """
    if params.prompt_seeds and len(params.prompt_seeds) != prompts:
        raise InvalidArgumentError(
            f"sampling.prompt_seeds has {len(params.prompt_seeds)} values, must have none or {prompts}, one a prompt",
            field="sampling.prompt_seeds",
        )
    if params.prompt_seeds:
        return derive_seeds([("prompt", seed, s) for seed in params.prompt_seeds for s in range(n)])
    seed = params.seed if params.HasField("seed") else secrets.randbits(62)
    return derive_seeds([("request", seed, p, s) for p in range(prompts) for s in range(n)])


def _prepare(hosted: HostedPolicy, prompt: common_pb2.Prompt, sampling: Sampling) -> _Prepared | str:
    """The token ids of a prompt, or why it is refused."""
    form = prompt.WhichOneof("content")
    if form is None:
        return "prompt is not set: give text, token_ids or messages"
    if form == "token_ids":
        token_ids = list(prompt.token_ids.ids)
    elif form == "text":
        token_ids = list(hosted.tokenizer(prompt.text, add_special_tokens=False).input_ids)
    else:
        try:
            text = serving.chat_text(hosted.tokenizer, prompt.messages.messages)
        except serving.ItemRefusedError as error:
            return str(error)
        token_ids = list(hosted.tokenizer(text, add_special_tokens=False).input_ids)
    if not token_ids:
        return "prompt has no tokens: there is nothing to continue"
    if (reason := out_of_range(token_ids, hosted.engine.vocab_size)) is not None:
        return reason
    longest = hosted.engine.max_sequence_tokens
    if len(token_ids) + sampling.max_new_tokens > longest:
        return (
            f"prompt has {len(token_ids)} tokens and max_new_tokens is {sampling.max_new_tokens}, together more than "
            f"the {longest} that the model takes"
        )
    return _Prepared(token_ids)

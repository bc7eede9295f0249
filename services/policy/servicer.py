"""Protobuf to plain values and back for generation."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge

from quartet.common.v1 import common_pb2
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc
from services.hosting import serving
from services.policy import asked
from services.policy.budget import Budget, BudgetLimits
from services.policy.hosted import HostedPolicy
from services.policy.kept_requests import KeepLimits, KeptRequests, RequestName
from services.policy.run import GenerationRun
from services.runtime import calls
from services.runtime.errors import OverloadedError, UnavailableError
from services.runtime.telemetry import ServiceMetrics


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Streams completions as they finish. ``hosted`` is None until the engine has warmed up."""

    def __init__(
        self,
        metrics: ServiceMetrics,
        *,
        limits: BudgetLimits,
        stop: Callable[[str], None],
        keep: KeepLimits | None = None,
        retry_grace_s: float = 0.0,
    ) -> None:
        """
        Args:
            metrics: of the service.
            limits: what may be in hand at a time; a request beyond is refused whole.
            stop: ends the service with a reason, when the engine has died.
            keep: bounds of what is kept for requests that are tried again.
            retry_grace_s: seconds that work with a request id goes on after its last call has left.
        """
        self.metrics = metrics
        self.budget = Budget(limits, metrics)
        self.stop = stop
        self.retry_grace_s = retry_grace_s
        self.hosted: HostedPolicy | None = None
        self._kept: KeptRequests[GenerationRun] = KeptRequests(keep or KeepLimits())
        self._rejoined = Counter(
            "quartet_policy_rejoined_total",
            "Calls that found the work of an earlier one with the same request id",
            registry=metrics.registry,
        )
        for name, meaning, value in (
            ("completions_in_hand", "Completions admitted and not yet let go", lambda: self.budget.completions),
            ("tokens_in_hand", "Tokens that unfinished completions may come to", lambda: self.budget.tokens),
            ("held_bytes", "Bytes of requests in hand", lambda: self.budget.held_bytes),
            ("kept_requests", "Requests known by their id, running ones included", lambda: len(self._kept)),
            ("kept_bytes", "Bytes of results kept for retries", lambda: self._kept.held_bytes),
        ):
            Gauge(f"quartet_policy_{name}", meaning, registry=metrics.registry).set_function(value)

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
        n = asked.check_request(request)
        total = len(request.prompts) * n
        self.budget.check(total)
        with contextlib.ExitStack() as held:
            held.enter_context(self.budget.hold(request.ByteSize()))
            sampling = asked.sampling_of(request.sampling, hosted)
            stop_strings = asked.stop_strings_of(request.sampling, hosted)
            asked.check_seeds(request.sampling, len(request.prompts))
            if any(prompt.WhichOneof("content") == "token_ids" for prompt in request.prompts):
                ours = hosted.model.served_by.tokenizer_fingerprint
                serving.require_same_tokenizer(request.tokenizer_fingerprint, ours)
            indices = asked.wanted(request, total)
            run = self._run_of(hosted, request, n, context)
            async with contextlib.aclosing(run.follow(request, sampling, stop_strings, indices, held)) as replies:
                async for reply in replies:
                    if reply.HasField("status"):
                        self.metrics.items.labels(common_pb2.ItemStatusCode.Name(reply.status.code)).inc()
                        version = reply.served_by.weights_version
                        calls.note(items=1, tokens=len(reply.completion.token_ids), weights_version=version)
                    yield reply

    def refusal(self, method: str, context: Any) -> OverloadedError | None:
        """Why a call is refused before its request is read."""
        return self.budget.refusal() if method.endswith("/Generate") else None

    def _run_of(self, hosted: HostedPolicy, request: policy_pb2.GenerateRequest, n: int, context: Any) -> GenerationRun:
        """The work of an earlier call with this request id of the same caller, or new work."""
        if not request.request_id or not self._kept.limits.count:
            return GenerationRun(self, hosted, n)
        name = RequestName(calls.identity_of(context), request.request_id)
        content = asked.content_of(request)
        run = self._kept.find(name, content)
        if run is not None and run.failed:
            self._kept.forget(name, run)
            run = None
        if run is not None:
            self._rejoined.inc()
            return run
        keep = _KeepRun(self._kept, name)
        run = keep.run = GenerationRun(self, hosted, n, keep=keep, grace_s=self.retry_grace_s)
        self._kept.add(name, content, run)
        return run

    # What a run needs ------------------------------------------------------------------------------------------------

    def count_tokens(self, prompt: int, generated: int) -> None:
        """Of a completion that was generated."""
        self.metrics.tokens.labels("generated").inc(generated)
        self.metrics.tokens.labels("prompt").inc(prompt)


@dataclass
class _KeepRun:
    """Keeps one run under its name."""

    kept: KeptRequests[GenerationRun]
    name: RequestName
    run: GenerationRun | None = None

    def grow(self, count: int) -> bool:
        return self.run is not None and self.kept.grow(self.name, self.run, count)

    def rest(self) -> None:
        if self.run is None:
            return
        if self.run.failed or not self.run.begun:
            self.kept.forget(self.name, self.run)
        else:
            self.kept.leave(self.name, self.run)

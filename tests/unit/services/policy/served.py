"""The servicer on a real server, before a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from quartet.common.v1 import common_pb2
from quartet.policy.v1 import policy_pb2
from services.policy.engine import Generated, GenerationTask
from services.policy.servicer import PolicyServicer
from tests.unit.services.policy.scripted_engine import ScriptedEngine, generated

# Completions that the house takes at a time.
MOST = 8


def ids(*token_ids: int) -> common_pb2.Prompt:
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=token_ids))


def params(**changes: Any) -> policy_pb2.SamplingParams:
    return policy_pb2.SamplingParams(**{"max_new_tokens": 4, "seed": 11, **changes})


def hold(house: House, held: Callable[[GenerationTask], bool]) -> asyncio.Event:
    """Completions for which ``held`` is true wait for the event that is returned; the others are answered at once."""
    free = asyncio.Event()

    async def answer(task: GenerationTask) -> Generated:
        if held(task):
            await free.wait()
        return generated(task)

    house.engine.answer = answer
    return free


@dataclass
class House:
    """The servicer on a real server, before a scripted engine."""

    servicer: PolicyServicer
    engine: ScriptedEngine
    stub: Any
    fingerprint: str
    stopped: list[str] = field(default_factory=list)

    def call(
        self, prompts: list[Any], sampling: policy_pb2.SamplingParams | None = None, *, token: str = "", **fields: Any
    ) -> Any:
        """The stream of an asked request. Prompts are lists of token ids, or messages."""
        request = policy_pb2.GenerateRequest(
            prompts=[ids(*prompt) if isinstance(prompt, list) else prompt for prompt in prompts],
            sampling=sampling or params(),
            **{"tokenizer_fingerprint": self.fingerprint, **fields},
        )
        metadata = (("authorization", f"Bearer {token}"),) if token else None
        return self.stub.Generate(request, timeout=20, metadata=metadata)

    async def generate(self, prompts: list[Any], sampling: Any = None, **fields: Any) -> list[Any]:
        """All replies, in the order in which they came."""
        return [reply async for reply in self.call(prompts, sampling, **fields)]

    async def refusal(self, prompts: list[Any], sampling: Any = None, **fields: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.generate(prompts, sampling, **fields)
        return refused.value

    def metric(self, name: str, **labels: str) -> float:
        return self.servicer.metrics.registry.get_sample_value(f"quartet_policy_{name}", labels) or 0.0

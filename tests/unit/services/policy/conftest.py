"""The policy service of a test: a servicer before a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from quartet.common.v1 import common_pb2
from quartet.fingerprint import tokenizer_fingerprint
from quartet.policy.v1 import policy_pb2_grpc
from services.policy.budget import BudgetLimits
from services.policy.hosted import HostedPolicy
from services.policy.servicer import PolicyServicer
from services.policy.staging import Layout
from services.runtime.telemetry import ServiceMetrics
from tests.unit.services.policy.scripted_engine import ScriptedEngine
from tests.unit.services.policy.served import MOST, House


@pytest.fixture
async def house(serve, tokenizer) -> AsyncIterator[House]:
    """Takes eight completions at a time, of a model of 300 tokens whose sequences have at most 128."""
    engine, stopped = ScriptedEngine(), []
    servicer = PolicyServicer(
        ServiceMetrics("policy", batches=False), limits=BudgetLimits(max_completions=MOST), stop=stopped.append
    )
    fingerprint = tokenizer_fingerprint(tokenizer)
    served_by = common_pb2.ServedBy(model_id="m", weights_version=3, tokenizer_fingerprint=fingerprint)
    servicer.hosted = HostedPolicy(
        engine=engine,
        tokenizer=tokenizer,
        model=common_pb2.ModelInfo(served_by=served_by, eos_token_ids=[1, 2]),
        layout=Layout(shapes={}, optional=frozenset()),
    )
    channel = await serve(
        servicer.metrics, lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server)
    )
    yield House(servicer, engine, policy_pb2_grpc.PolicyServiceStub(channel), fingerprint, stopped)
    engine.gate.set()

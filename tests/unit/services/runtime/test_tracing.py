"""Traces across a socket: client, service, wait and batch join, and nothing that people wrote is in them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import structlog
from structlog.testing import capture_logs

from quartet import tracing
from quartet.client import CallPolicy, OverloadedError, RewardClient, ScoreItem, ServiceFailedError
from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.runtime import errors
from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.interceptors import CallInterceptor
from services.runtime.telemetry import ServiceMetrics

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

OK = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)
CALL = "quartet.reward.v1.RewardService/Score"
TEXT = "I have a rare illness"


@pytest.fixture
def kept():
    """kept("name", ...): the finished spans of these names, all without one, in the order in which they began."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)

    def read(*names: str) -> list[Any]:
        spans = [span for span in exporter.get_finished_spans() if not names or span.name in names]
        return sorted(spans, key=lambda span: span.start_time)

    read.provider = provider  # type: ignore[attr-defined]
    yield read
    tracing.stop()
    provider.shutdown()


class House(reward_pb2_grpc.RewardServiceServicer):
    """Scores by the length of responses; ``gate`` holds the model, ``errors`` are raised first."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []
        self.model_error: Exception | None = None
        self.metrics = ServiceMetrics("test")
        limits = BatchLimits(max_batch_tokens=1000, max_batch_items=4, max_queued_tokens=10_000)
        self.batcher: Batcher[str, float] = Batcher(self._process, limits=limits, metrics=self.metrics)

    def _process(self, texts: list[str]) -> list[float]:
        self.gate.wait(10)
        if self.model_error is not None:
            raise self.model_error
        return [float(len(text)) for text in texts]

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        if self.errors:
            raise self.errors.pop(0)
        texts = [item.response_text for item in request.items]
        remaining = context.time_remaining()
        scores = await self.batcher.submit(texts, [len(x) for x in texts], time_remaining_s=remaining)
        results = [reward_pb2.ScoreResult(status=OK, score=x if isinstance(x, float) else -1.0) for x in scores]
        return reward_pb2.ScoreResponse(results=results)


@pytest.fixture
async def house() -> AsyncIterator[tuple[House, str]]:
    service = House()
    server = grpc.aio.server(interceptors=[CallInterceptor(service.metrics)])
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    service.gate.set()
    await server.stop(0)
    service.batcher.close()


def items(*texts: str) -> list[ScoreItem]:
    return [ScoreItem(prompt="a", response=text) for text in texts]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110  # It becomes so in another thread.
            await asyncio.sleep(0.005)


def linked(span: Any) -> set[int]:
    return {link.context.span_id for link in span.links}


def inside(span: Any, parent: Any) -> bool:
    return span.parent is not None and span.parent.span_id == parent.context.span_id


async def test_one_call_is_one_trace_from_the_client_to_the_batch(house, kept):
    _, address = house
    async with RewardClient(address) as client:
        with tracing.phase("step"), capture_logs() as logs:
            await client.score(items(TEXT, "no"))
    step, client_span, server_span, queue, batch = kept()
    assert [span.name for span in kept()] == ["step", CALL, CALL, "queue", "model batch"]
    assert (client_span.kind, server_span.kind) == (trace.SpanKind.CLIENT, trace.SpanKind.SERVER)
    assert inside(client_span, step)
    assert inside(server_span, client_span)
    assert inside(queue, server_span)
    assert inside(batch, server_span)
    assert len({span.context.trace_id for span in kept()}) == 1
    assert linked(batch) == {server_span.context.span_id}
    assert linked(queue) == {batch.context.span_id}
    assert queue.end_time == batch.start_time
    assert client_span.start_time <= server_span.start_time <= queue.start_time
    assert batch.end_time <= server_span.end_time <= client_span.end_time
    assert dict(batch.attributes) == {
        "quartet.batch.items": 2,
        "quartet.batch.tokens": len(TEXT) + 2,
        "quartet.batch.padded_tokens": 2 * len(TEXT),
        "quartet.batch.requests": 1,
    }
    request_id = client_span.attributes["quartet.request_id"]
    assert server_span.attributes["quartet.request_id"] == queue.attributes["quartet.request_id"] == request_id
    assert server_span.attributes["rpc.grpc.status_code"] == 0
    assert logs[-1]["request_id"] == request_id
    assert TEXT not in json.dumps([json.loads(span.to_json()) for span in kept()])


async def test_a_line_of_the_log_names_its_trace(house, kept, capsys):
    _, address = house
    seen: list[Any] = []

    def keep(_: Any, __: str, event: Any) -> Any:
        seen.append(dict(event))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, keep])
    try:
        async with RewardClient(address) as client:
            await client.score(items("no"))
    finally:
        structlog.configure(**before)
    (done,) = [event for event in seen if event["event"] == "call_done"]
    assert int(done["trace_id"], 16) == kept(CALL)[0].context.trace_id


async def test_a_batch_of_several_requests_is_linked_to_each_and_each_wait_to_it(house, kept):
    service, address = house
    service.gate.clear()
    async with RewardClient(address) as client:
        first = asyncio.create_task(client.score(items("first")))
        await until(lambda: bool(kept("queue")))
        others = [asyncio.create_task(client.score(items("b" * (i + 1)))) for i in range(3)]
        await until(lambda: service.batcher.queue.items == 3)
        await asyncio.sleep(0.2)
        service.gate.set()
        await asyncio.gather(first, *others)
    alone, together = kept("model batch")
    assert (alone.attributes["quartet.batch.requests"], together.attributes["quartet.batch.requests"]) == (1, 3)
    servers = {span.context.span_id: span for span in kept(CALL) if span.kind == trace.SpanKind.SERVER}
    assert len(linked(together)) == 3
    assert linked(together) | linked(alone) == set(servers)
    assert together.parent.span_id in linked(together)
    waits = [span for span in kept("queue") if linked(span) == {together.context.span_id}]
    assert {span.parent.span_id for span in waits} == linked(together)
    assert len({span.context.trace_id for span in waits}) == 3
    for wait in waits:
        assert wait.end_time - wait.start_time >= 0.2e9


async def test_a_request_of_several_batches_waits_once_for_each(house, kept):
    _, address = house
    async with RewardClient(address) as client:
        await client.score(items(*["abc"] * 10))
    batches, waits = kept("model batch"), kept("queue")
    assert [span.attributes["quartet.batch.items"] for span in batches] == [4, 4, 2]
    assert [span.attributes["quartet.items"] for span in waits] == [4, 4, 2]
    for before, wait in zip(batches, waits[1:], strict=False):
        assert wait.start_time >= before.start_time


async def test_attempts_of_a_call_are_one_span_with_an_event_for_each_new_try(house, kept):
    service, address = house
    service.errors = [errors.OverloadedError("full", retry_after_ms=10), errors.UnavailableError("away")]
    async with RewardClient(address, policy=CallPolicy(first_backoff_s=0.01)) as client:
        await client.score(items("no"))
    (client_span,) = [span for span in kept(CALL) if span.kind == trace.SpanKind.CLIENT]
    assert [event.attributes["code"] for event in client_span.events] == ["RESOURCE_EXHAUSTED", "UNAVAILABLE"]
    servers = [span for span in kept(CALL) if inside(span, client_span)]
    assert [span.attributes["rpc.grpc.status_code"] for span in servers] == [8, 14, 0]
    # Overload is not a fault of the service's; being away is.
    assert [span.status.status_code.name for span in servers] == ["UNSET", "ERROR", "UNSET"]
    assert client_span.status.is_ok


async def test_failures_are_marked_by_code_and_type_and_never_by_message(house, kept):
    service, address = house
    async with RewardClient(address, policy=CallPolicy(patience_s=0.0, deadline_s=0.3)) as client:
        service.errors = [KeyError(TEXT)]
        with pytest.raises(ServiceFailedError):
            await client.score(items(TEXT))
        service.errors = [errors.OverloadedError("full")]
        with pytest.raises(OverloadedError):
            await client.score(items(TEXT))
        service.model_error = ValueError(TEXT)
        await client.score(items(TEXT))
    clients = [span for span in kept(CALL) if span.kind == trace.SpanKind.CLIENT]
    assert [span.status.description for span in clients] == ["ServiceFailedError", "OverloadedError", None]
    assert [span.attributes.get("rpc.grpc.status_code") for span in clients] == [13, 8, None]
    (batch,) = kept("model batch")
    assert (batch.status.status_code.name, batch.status.description) == ("ERROR", "ValueError")
    assert TEXT not in json.dumps([json.loads(span.to_json()) for span in kept()])


async def test_a_wait_that_expired_is_marked(house, kept):
    service, address = house
    service.gate.clear()
    async with RewardClient(address) as client:
        first = asyncio.create_task(client.score(items("first")))
        await until(lambda: bool(kept("queue")))
        late = asyncio.create_task(service.batcher.submit(["late"], [4], time_remaining_s=0.05))
        await asyncio.sleep(0.1)
        service.gate.set()
        await first
        with pytest.raises(errors.DeadlineExceededError):
            await late
    assert [span.status.description for span in kept("queue")] == [None, "expired"]


async def test_a_traceparent_that_is_none_or_not_sampled_is_followed_or_not_as_w3c_says(house, kept):
    _, address = house
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(response_text="b")])
        for sent in ("nonsense", f"00-{'a' * 32}-{'b' * 16}-01", f"00-{'c' * 32}-{'d' * 16}-00"):
            await stub.Score(request, metadata=(("traceparent", sent), ("baggage", f"text={TEXT}")))
    own, joined = kept(CALL)  # The third asked not to be kept.
    assert own.parent is None
    assert joined.context.trace_id == int("a" * 32, 16)
    assert joined.parent.span_id == int("b" * 16, 16)


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported():
    code = (
        "import sys, quartet.client, services.runtime.server, services.runtime.batcher\n"
        "import services.policy.watched_engine\n"
        "from quartet import tracing\n"
        "assert tracing.start('quartet-test') is False\n"
        "assert tracing.span('a') is tracing.NO_SPAN and tracing.here() is None and tracing.NO_SPAN.metadata == ()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env())
    assert run.stdout == "[]\n"


@pytest.fixture
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    yield monkeypatch
    tracing.stop()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "", "grpc://a:1"])
def test_an_endpoint_that_is_none_is_refused(clean, endpoint):
    with pytest.raises(tracing.TracingError, match=f"the endpoint of traces is '{endpoint}', must be http://host:port"):
        tracing.start("quartet-test", endpoint)


def test_without_the_extra_the_setting_is_refused_and_the_environment_warned_of(clean, caplog):
    clean.setattr(tracing, "_PARTS", ("opentelemetry.sdk", "opentelemetry_is_not_here"))
    with pytest.raises(tracing.TracingError, match=r"pip install 'quartet\[otel\]'"):
        tracing.start("quartet-test", "http://127.0.0.1:4317")
    clean.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    assert tracing.start("quartet-test") is False
    assert "no traces are sent, although an endpoint is set in the environment" in caplog.text


@pytest.mark.parametrize(
    ("variables", "starts", "warns"),
    [
        ({}, False, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True, ""),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}, False, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, False, ""),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            False,
            "asks for OTEL_EXPORTER_OTLP_PROTOCOL http/protobuf",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "zipkin"},
            False,
            "asks for OTEL_TRACES_EXPORTER zipkin",
        ),
    ],
)
def test_the_standard_variables_decide(clean, caplog, variables, starts, warns):
    for name, value in variables.items():
        clean.setenv(name, value)
    assert tracing.start("quartet-test") is starts
    assert tracing.active() is starts
    assert warns in caplog.text if warns else not caplog.text


def _env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}

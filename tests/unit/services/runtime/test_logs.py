"""Logs: one JSON object a call, its request id from the client to the model and back, and nothing that people wrote."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import structlog

from quartet.client import CallPolicy, RewardClient, ScoreItem, Security, ServiceFailedError
from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.runtime import calls, tracebacks
from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.errors import InvalidArgumentError, NotFoundError, OverloadedError
from services.runtime.gate import Gate
from services.runtime.interceptors import CallInterceptor
from services.runtime.logs import configure_logging
from services.runtime.security import TokenCheck
from services.runtime.telemetry import ServiceMetrics
from tests.certificates import Authority

SECRET = "hunter2-hunter2-hunter2"
TEXT = "I have a rare illness"
OK = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)


@pytest.fixture
def logged(capsys):
    """logged(): what was logged since, one object a line. Logging is as it was afterwards."""
    root = logging.getLogger()
    before, level, handlers = structlog.get_config(), root.level, root.handlers[:]

    def configure(level: str = "info") -> Any:
        configure_logging(level, "json")
        return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]

    yield configure
    structlog.configure(**before)
    root.setLevel(level)
    root.handlers[:] = handlers


class House(reward_pb2_grpc.RewardServiceServicer):
    """Scores through a batcher by a function of the texts."""

    def __init__(self) -> None:
        self.metrics = ServiceMetrics("test")
        self.error: Exception | None = None
        self.refusal: Exception | None = None
        self.seen: list[str] = []
        limits = BatchLimits(max_batch_tokens=100, max_batch_items=10, max_queued_tokens=1000)
        self.batcher: Batcher[str, float] = Batcher(self._process, limits=limits, metrics=self.metrics)

    def _process(self, texts: list[str]) -> list[float]:
        if self.error is not None:
            raise self.error
        return [float(len(text)) for text in texts]

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        structlog.get_logger().info("inside")
        await asyncio.to_thread(structlog.get_logger().info, "inside_thread")
        self.seen.append(calls.current_request_id())
        texts = [item.response_text for item in request.items]
        if self.refusal is not None:
            raise self.refusal
        if "raise" in texts:
            raise KeyError(TEXT)
        scores = await self.batcher.submit(texts, [len(text) for text in texts])
        calls.note(items=len(texts), tokens=sum(map(len, texts)), weights_version=3)
        results = [reward_pb2.ScoreResult(status=OK, score=x if isinstance(x, float) else -1.0) for x in scores]
        return reward_pb2.ScoreResponse(results=results)


@pytest.fixture
async def house(tmp_path) -> AsyncIterator[tuple[House, str]]:
    service = House()
    (tmp_path / "tokens").write_text(SECRET)
    gate = Gate(
        tokens=TokenCheck(tmp_path / "tokens", "--token-file"), max_calls=32, max_slow_requests=8, request_timeout_s=5.0
    )
    server = grpc.aio.server(interceptors=[CallInterceptor(service.metrics), gate])
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(0)
    service.batcher.close()


def _metadata(request_id: str, token: str = SECRET) -> tuple[tuple[str, str], ...]:
    return (("quartet-request-id", request_id), ("authorization", f"Bearer {token}"))


def _request(*texts: str) -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(response_text=text) for text in texts])


async def test_a_call_is_one_line_and_its_id_is_in_every_line_of_it_and_in_the_trailer(house, logged):
    service, address = house
    read = logged()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        call = stub.Score(_request(TEXT, "yes"), metadata=_metadata("run-1.step7"))
        await call
        assert ("quartet-request-id", "run-1.step7") in list(await call.trailing_metadata())
        assert await call.initial_metadata() is not None
    events = [event for event in read() if event.get("request_id") == "run-1.step7"]
    assert [event["event"] for event in events] == ["inside", "inside_thread", "call_done"]
    done = events[-1]
    assert {key: done[key] for key in ("level", "method", "code", "items", "tokens", "weights_version")} == {
        "level": "info",
        "method": "Score",
        "code": "OK",
        "items": 2,
        "tokens": len(TEXT) + 3,
        "weights_version": 3,
    }
    assert done["caller"].startswith("ipv4:127.0.0.1:")
    assert 0 <= done["seconds"] < 5
    assert service.seen == ["run-1.step7"]


async def test_calls_at_the_same_time_keep_their_ids_apart(house, logged):
    _, address = house
    read = logged()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        await asyncio.gather(*(stub.Score(_request("a" * i), metadata=_metadata(f"id-{i}")) for i in range(1, 21)))
    done = {event["request_id"]: event["tokens"] for event in read() if event["event"] == "call_done"}
    assert done == {f"id-{i}": i for i in range(1, 21)}


async def test_neither_tokens_nor_texts_are_logged_whatever_goes_wrong(house, logged):
    service, address = house
    read = logged()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        await stub.Score(_request(TEXT), metadata=_metadata("good"))
        for request, metadata in (
            (_request(TEXT, "raise"), _metadata("raises")),
            (_request(TEXT), _metadata("stranger", "wrong-" + SECRET)),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Score(request, metadata=metadata)
        service.error = ValueError(f"cannot read {TEXT!r}")
        await stub.Score(_request(TEXT), metadata=_metadata("model"))
    events = read()
    assert SECRET not in json.dumps(events)
    assert TEXT not in json.dumps(events)
    (failed,) = [event for event in events if event["event"] == "call_failed"]
    assert (failed["request_id"], failed["code"]) == ("raises", "INTERNAL")
    assert failed["exception"].endswith("KeyError " + tracebacks._WITHHELD)
    assert "in Score\n    raise KeyError(TEXT)" in failed["exception"]
    (refused,) = [event for event in events if event["event"] == "call_refused"]
    assert (refused["request_id"], refused["code"]) == ("stranger", "UNAUTHENTICATED")
    (batch,) = [event for event in events if event["event"] == "batch_failed"]
    assert batch["request_ids"] == ["model"]
    assert "ValueError (message withheld" in batch["exception"]


@pytest.mark.parametrize("level", ["info", "debug"])
async def test_why_a_call_is_refused_is_logged_but_what_it_quotes_at_debug_alone(house, logged, level):
    service, address = house
    read = logged(level)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        for error in (
            InvalidArgumentError(f"stop is {TEXT!r}: too long", field="sampling.stop"),
            NotFoundError(f"no adapter is called {TEXT!r}"),
            OverloadedError("8 calls are in hand"),
        ):
            service.refusal = error
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Score(_request(TEXT), metadata=_metadata("refused"))
            assert refused.value.details() == error.message
    wrong, missing, full = [event for event in read() if event["event"] == "call_refused"]
    assert (wrong["code"], wrong["field"], full["reason"]) == (
        "INVALID_ARGUMENT",
        "sampling.stop",
        "8 calls are in hand",
    )
    if level == "debug":
        assert (wrong["reason"], missing["reason"]) == (
            f"stop is {TEXT!r}: too long",
            f"no adapter is called {TEXT!r}",
        )
    else:
        assert "reason" not in wrong
        assert "reason" not in missing
        assert TEXT not in json.dumps([wrong, missing, full])


async def test_the_client_s_error_names_the_id_that_the_log_has(house, logged):
    _, address = house
    read = logged()
    client = RewardClient(address, policy=CallPolicy(patience_s=0.0), security=Security(token=SECRET))
    async with client:
        with pytest.raises(ServiceFailedError) as failed:
            await client.score([ScoreItem(prompt="a", response="raise")])
    (event,) = [event for event in read() if event["event"] == "call_failed"]
    assert event["request_id"] == failed.value.request_id
    assert failed.value.request_id in str(failed.value)


@dataclass
class Peer:
    identities: list[bytes] | None

    def peer(self) -> str:
        return "ipv4:10.0.0.7:4242"

    def peer_identities(self) -> list[bytes] | None:
        return self.identities


@pytest.mark.parametrize(
    ("identities", "caller"),
    [
        (None, "ipv4:10.0.0.7:4242"),
        ([b"trainer", b"spiffe://lab/trainer"], "trainer,spiffe://lab/trainer ipv4:10.0.0.7:4242"),
        ([b'bad "name\n'], "bad__name_ ipv4:10.0.0.7:4242"),
    ],
)
def test_a_caller_is_named_by_its_certificate_and_its_address(identities, caller):
    assert calls.caller_of(Peer(identities)) == caller


async def test_a_call_under_mtls_is_logged_with_the_name_in_the_client_s_certificate(tmp_path, logged):
    authority = Authority.make()
    cert, key = authority.sign("reward").write(tmp_path, "service")
    service = House()
    server = grpc.aio.server(interceptors=[CallInterceptor(service.metrics)])
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    pair = [(key.read_bytes(), cert.read_bytes())]
    trusted = authority.certificate_pem
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair, trusted, require_client_auth=True))
    await server.start()
    read = logged()
    client_cert, client_key = authority.sign("night-trainer", host="trainer.example").write(tmp_path, "client")
    (tmp_path / "ca").write_bytes(trusted)
    security = Security(ca_file=tmp_path / "ca", cert_file=client_cert, key_file=client_key, server_name="localhost")
    async with RewardClient(f"127.0.0.1:{port}", security=security) as client:
        await client.score([ScoreItem(prompt="a", response="b")])
    await server.stop(0)
    service.batcher.close()
    (done,) = [event for event in read() if event["event"] == "call_done"]
    assert done["caller"].startswith("trainer.example,127.0.0.1 ipv4:127.0.0.1:")


def test_libraries_log_in_the_same_form_and_info_of_theirs_not_at_all(logged):
    read = logged()
    logging.getLogger("some.library").info("chatter")
    try:
        raise ValueError(TEXT)
    except ValueError:
        logging.getLogger("some.library").warning("odd %s", "thing", exc_info=True)
    (event,) = read()
    assert (event["event"], event["logger"], event["level"]) == ("odd thing", "some.library", "warning")
    assert event["exception"].endswith("ValueError " + tracebacks._WITHHELD)


def test_messages_of_the_machine_stay_and_debug_shows_all():
    def fail(error: Exception) -> Exception:
        try:
            try:
                raise FileNotFoundError(2, "No such file", "/models/reward")
            except OSError as cause:
                raise error from cause
        except Exception as raised:
            return raised

    error = fail(KeyError(TEXT))
    rendered = tracebacks.render(error)
    first, second = rendered.split("\n\nwhich led to:\n\n")
    assert first.endswith("FileNotFoundError: [Errno 2] No such file: '/models/reward'")
    assert second.endswith("KeyError " + tracebacks._WITHHELD)
    assert tracebacks.render(error, messages=True).endswith(f"KeyError: {TEXT!r}")

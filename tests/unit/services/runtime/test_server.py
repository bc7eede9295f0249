"""The life of a service: ports refused early, health that tells the truth, work finished before the end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from quartet.client import CallPolicy, RewardClient, ScoreItem, UnavailableError
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.reward.config import RewardSettings
from services.runtime.probe import probe
from services.runtime.server import Listener, ServiceRuntime
from services.runtime.telemetry import ServiceMetrics
from tests import http2

ITEM = ScoreItem(prompt="a", response="b")
SERVICE = RewardClient.health_service
ENDING = "the service is ending and could not finish this call in time; try again"


@dataclass
class Process:
    """The slow service and where it listens."""

    process: subprocess.Popen[str]
    address: str
    metrics: str

    async def wait_health(self, wanted: str, service: str = SERVICE, timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while (answer := await asyncio.to_thread(probe, self.address, service, 1.0)) != wanted:
            assert time.monotonic() < end, f"{service or 'liveness'} is {answer}, not {wanted}"
            await asyncio.sleep(0.05)

    async def end(self) -> tuple[int, str]:
        _, said = await asyncio.to_thread(self.process.communicate, timeout=20)
        return self.process.returncode, said


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def metrics_of(service: Process) -> str:
    with urllib.request.urlopen(service.metrics, timeout=5) as reply:
        return str(reply.read().decode())


async def until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not await asyncio.to_thread(true):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """start("--flag", ..., load_s=0, call_s=0, model_s=0, port=, metrics_port=) starts slow_service.py."""
    started: list[Process] = []

    def launch(
        *flags: str, load_s: float = 0, call_s: float = 0, model_s: float = 0, port: int = 0, metrics_port: int = 0
    ) -> Process:
        free, free_metrics = free_ports()
        port, metrics_port = port or free, metrics_port or free_metrics
        command = [sys.executable, str(Path(__file__).with_name("slow_service.py")), "--model", "none"]
        command += ["--port", str(port), "--metrics-port", str(metrics_port), *flags]
        environment = os.environ | {
            "SLOW_LOAD_S": str(load_s),
            "SLOW_CALL_S": str(call_s),
            "SLOW_MODEL_S": str(model_s),
        }
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(Process(process, f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"))
        return started[-1]

    yield launch
    for service in started:
        service.process.kill()
        service.process.communicate()


async def test_health_tells_loading_from_serving_and_liveness_from_readiness(start):
    service = start(load_s=2)
    await service.wait_health("NOT_SERVING")
    assert probe(service.address, "") == "SERVING"
    with pytest.raises(UnavailableError):
        async with RewardClient(service.address, policy=CallPolicy(patience_s=0.0)) as client:
            await client.score([ITEM])
    await service.wait_health("SERVING")
    assert probe(service.address, "quartet.no.such.Service").startswith("NOT_FOUND")
    async with RewardClient(service.address) as client:
        assert len((await client.score([ITEM])).results) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_work_in_flight_is_finished_before_the_end_and_new_work_refused(start, number):
    service = start("--grace-s", "10", call_s=1.5)
    await service.wait_health("SERVING")
    async with RewardClient(service.address) as client:
        call = asyncio.create_task(client.score([ITEM, ITEM]))
        await asyncio.sleep(0.5)
        service.process.send_signal(number)
        scores = await call
    assert [result.score for result in scores.results] == [1.0, 1.0]
    code, said = await service.end()
    assert code == 0
    events = [line for line in said.splitlines() if '"event"' in line]
    assert [name for name in ("ready", "draining", "stopped") if any(f'"event": "{name}"' in e for e in events)] == [
        "ready",
        "draining",
        "stopped",
    ]


async def test_readiness_ends_as_soon_as_the_end_begins(start):
    service = start("--grace-s", "10", call_s=2.0)
    await service.wait_health("SERVING")
    async with grpc.aio.insecure_channel(service.address) as watching, RewardClient(service.address) as client:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        statuses = health_pb2_grpc.HealthStub(watching).Watch(request)
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.SERVING
        call = asyncio.create_task(client.score([ITEM]))
        await asyncio.sleep(0.3)
        service.process.terminate()
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not call.done()  # And not when the work is done.
        statuses.cancel()
        await call


def watch_without_reading(address: str) -> socket.socket:
    """A watch of health whose reader has no room for a single byte, which gRPC then waits for."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + 20
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=5)
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.02)
    request = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()
    connection.sendall(
        http2.PREFACE
        + http2.settings(INITIAL_WINDOW_SIZE=0)
        + http2.call_headers("/grpc.health.v1.Health/Watch")
        + http2.message(request)
    )
    return connection


async def test_a_watch_that_nobody_reads_keeps_a_service_neither_from_becoming_ready_nor_from_ending(start):
    service = start("--grace-s", "1", load_s=2)
    with (
        await asyncio.to_thread(watch_without_reading, service.address),
        await asyncio.to_thread(watch_without_reading, service.address),
    ):
        await service.wait_health("NOT_SERVING")
        await service.wait_health("SERVING")
        service.process.terminate()
        start_s = time.monotonic()
        code, said = await service.end()
        assert code == 0
        assert time.monotonic() - start_s < 8
        assert "Traceback" not in said


async def test_large_requests_at_once_take_the_memory_of_a_few(start):
    """40 of 8 MiB on 8 connections: 320 MiB, each twice while it is parsed, come to hundreds more without the limit.

    How many are here in the moment that is free depends on the machine.
    """
    service = start("--max-slow-requests", "2", "--max-message-mib", "8", "--log-level", "error")
    await service.wait_health("SERVING")
    process = psutil.Process(service.process.pid)
    before_mib = most_mib = process.memory_info().rss / 2**20
    content = reward_pb2.ScoreRequest(
        items=[reward_pb2.ScoreItem(response_text="a" * (8 * 2**20 - 100))]
    ).SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    channels = [grpc.aio.insecure_channel(service.address, options=options) for _ in range(8)]
    ended = asyncio.Event()

    def watch() -> None:
        nonlocal most_mib
        while not ended.is_set():
            most_mib = max(most_mib, process.memory_info().rss / 2**20)
            time.sleep(0.01)

    watching = asyncio.create_task(asyncio.to_thread(watch))
    path = f"/{SERVICE}/Score"
    calls = [channels[i % 8].unary_unary(path)(content, timeout=60) for i in range(40)]
    replies = await asyncio.gather(*calls, return_exceptions=True)
    ended.set()
    await watching
    codes = {reply.code().name if isinstance(reply, grpc.aio.AioRpcError) else "OK" for reply in replies}
    assert codes <= {"OK", "RESOURCE_EXHAUSTED"}
    assert most_mib - before_mib < 550
    for channel in channels:
        await channel.close()


async def test_work_longer_than_the_grace_is_given_up(start):
    service = start("--grace-s", "0.5", call_s=30)
    await service.wait_health("SERVING")
    async with RewardClient(service.address, policy=CallPolicy(patience_s=0.0)) as client:
        call = asyncio.create_task(client.score([ITEM]))
        await asyncio.sleep(0.5)
        service.process.terminate()
        start_s = time.monotonic()
        code, _ = await service.end()
        assert code == 0
        assert time.monotonic() - start_s < 6.0
        with pytest.raises(UnavailableError) as told:
            await call
        assert (told.value.code, told.value.message) == (grpc.StatusCode.UNAVAILABLE, ENDING)


async def test_who_still_waits_when_the_grace_is_over_is_told_to_try_again_and_is_answered_by_the_next_service(start):
    service = start("--grace-s", "0.5", model_s=600)
    await service.wait_health("SERVING")
    request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(response_text="b")])
    async with (
        grpc.aio.insecure_channel(service.address) as channel,
        RewardClient(service.address, policy=CallPolicy(patience_s=60.0)) as client,
    ):
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        calls = [stub.Score(request, timeout=60) for _ in range(5)]  # One is with the model, the others wait for it.
        patient = asyncio.create_task(client.score([ITEM]))
        in_hand = "quartet_slow_calls_in_flight 6.0"
        await until(lambda: in_hand in metrics_of(service))
        assert "quartet_slow_queue_items 5.0" in metrics_of(service)
        service.process.terminate()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        told = [(one.code(), one.details()) for one in ended if isinstance(one, grpc.aio.AioRpcError)]
        assert told == [(grpc.StatusCode.UNAVAILABLE, ENDING)] * 5
        code, said = await service.end()
        assert code == 0
        assert "Traceback" not in said
        assert said.count('"event": "call_refused"') == said.count('"code": "UNAVAILABLE"') == 6
        start(port=int(service.address.rpartition(":")[2]))
        assert [result.score for result in (await patient).results] == [1.0]


async def test_a_failure_ends_the_service_with_code_1_for_its_supervisor(start):
    service = start(call_s=30)
    await service.wait_health("SERVING")
    async with RewardClient(service.address, policy=CallPolicy(patience_s=0.0)) as client:
        with pytest.raises(UnavailableError) as told:
            await client.score([ScoreItem(prompt="a", response="fail")])
    assert (told.value.code, told.value.message) == (grpc.StatusCode.UNAVAILABLE, ENDING)
    code, said = await service.end()
    assert code == 1
    assert '"failure": "the engine died"' in said


async def test_a_port_already_taken_is_one_clear_line_before_anything_is_loaded(start):
    first = start()
    await first.wait_health("SERVING")
    port, metrics_port = (
        int(text.partition("/metrics")[0].rpartition(":")[2]) for text in (first.address, first.metrics)
    )
    code, said = await start(load_s=30, port=port).end()
    assert (code, said) == (
        2,
        f"slow-service: cannot listen on 127.0.0.1:{port} for the slow service: Address already in use; "
        "stop what holds it or choose another\n",
    )
    code, said = await start(load_s=30, metrics_port=metrics_port).end()
    assert (code, said) == (
        2,
        f"slow-service: cannot listen on 127.0.0.1:{metrics_port} for metrics: Address already in use; "
        "stop what holds it or choose another --metrics-port\n",
    )
    assert probe(first.address, SERVICE) == "SERVING"


async def test_an_address_that_is_not_ours_is_refused_with_the_reason(start):
    code, said = await start("--host", "192.0.2.1").end()
    assert code == 2
    assert said.startswith("slow-service: cannot listen on 192.0.2.1:")
    assert "Cannot assign requested address" in said


async def test_an_address_open_to_a_network_is_served_with_a_warning(start):
    service = start("--host", "0.0.0.0", "--health-port", "0")
    await service.wait_health("SERVING")
    service.process.terminate()
    code, said = await service.end()
    assert code == 0
    (warning,) = [line for line in said.splitlines() if '"listener_open_to_anyone"' in line]
    assert '"listener": "the slow service", "host": "0.0.0.0"' in warning
    assert '"level": "warning"' in warning
    assert "set --token-file or --tls-client-ca" in warning


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def listeners_of(settings: RewardSettings) -> tuple[Listener, Listener]:
    data = Listener(name="data", port=settings.port, services=("data",), add=lambda server: None)
    admin = Listener(
        name="admin",
        host=settings.admin_host,
        port=settings.admin_port,
        services=("admin",),
        add=lambda server: None,
        security=settings.admin_security,
    )
    return data, admin


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ("", {"data": 1, "admin": 1, "metrics": 1}),
        ("--host 127.0.0.2", {"data": 2, "admin": 2, "metrics": 2}),
        ("--host 127.0.0.2 --admin-host 127.0.0.1", {"data": 2, "admin": 1, "metrics": 2}),
        ("--metrics-host 127.0.0.3 --admin-host 127.0.0.2", {"data": 1, "admin": 2, "metrics": 3}),
    ],
)
async def test_each_listener_is_reached_at_its_own_host_alone(flags, hosts):
    free = "--model m --port 0 --admin-port 0 --metrics-port 0"
    settings = RewardSettings.from_command_line([*free.split(), *flags.split()])
    runtime = ServiceRuntime(name="test", settings=settings, metrics=ServiceMetrics("test"))
    try:
        await runtime.bind(*listeners_of(settings))
        ports = {listener.name: listener.port for listener in runtime.listeners} | {"metrics": runtime.serve_metrics()}
        found = {name: [n for n in (1, 2, 3) if listens(f"127.0.0.{n}", port)] for name, port in ports.items()}
        assert found == {name: [number] for name, number in hosts.items()}
    finally:
        await runtime.close(0)


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ("--host 0.0.0.0 --admin-host 127.0.0.1", {("data", "0.0.0.0", "--token-file")}),
        ("--admin-host 0.0.0.0", {("admin", "0.0.0.0", "--admin-token-file")}),
        ("--metrics-host 0.0.0.0", set()),  # Metrics have no credentials: README says so.
        ("--host 0.0.0.0", {("data", "0.0.0.0", "--token-file"), ("admin", "0.0.0.0", "--admin-token-file")}),
    ],
)
async def test_each_listener_is_warned_of_by_its_own_host(flags, warned):
    free = "--model m --port 0 --admin-port 0 --metrics-port 0"
    settings = RewardSettings.from_command_line([*free.split(), *flags.split()])
    runtime = ServiceRuntime(name="test", settings=settings, metrics=ServiceMetrics("test"))
    try:
        with capture_logs() as logged:
            await runtime.bind(*listeners_of(settings))
    finally:
        await runtime.close(0)
    events = [event for event in logged if event["event"] == "listener_open_to_anyone"]
    said = {(event["listener"], event["host"], event["advice"].split("set ")[1].split()[0]) for event in events}
    assert said == warned


async def test_thousands_of_calls_at_once_are_answered_or_told_to_come_back_and_none_is_cancelled(start):
    """gRPC itself drops calls at random, as CANCELLED, where more than 1,000 have not been looked at."""
    # Nobody reads what it says meanwhile.
    service = start("--max-connection-calls", "20000", "--max-calls", "1000", "--log-level", "error", call_s=1)
    await service.wait_health("SERVING")
    request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(response_text="b")])
    codes: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)

        async def one() -> None:
            try:
                await stub.Score(request)
                codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1

        await asyncio.gather(*(one() for _ in range(5000)))
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert codes["OK"] >= 1000


async def test_more_connections_than_allowed_are_closed_and_silent_ones_make_room(start):
    service = start("--max-connections", "4", "--handshake-timeout-s", "1.5")
    await service.wait_health("SERVING")
    await asyncio.sleep(0.2)  # The probe's connection closes.
    port = int(service.address.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(7)]

    def closed(connection: socket.socket, timeout_s: float) -> bool:
        connection.settimeout(timeout_s)
        try:
            while connection.recv(1024):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        return True

    assert sum([await asyncio.to_thread(closed, connection, 0.1) for connection in silent]) == 3
    assert [await asyncio.to_thread(closed, connection, 5.0) for connection in silent] == [True] * 7
    async with RewardClient(service.address) as client:
        assert len((await client.score([ITEM])).results) == 1
    for connection in silent:
        connection.close()


def test_metrics_are_served_over_http(start):
    service = start()

    async def score_one() -> None:
        await service.wait_health("SERVING")
        async with RewardClient(service.address) as client:
            await client.score([ITEM])

    asyncio.run(score_one())
    with urllib.request.urlopen(service.metrics, timeout=5) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain")
        text = reply.read().decode()
    assert 'quartet_slow_calls_total{code="OK",method="Score"} 1.0' in text
    assert 'quartet_slow_call_seconds_bucket{le="+Inf",method="Score"} 1.0' in text


@pytest.mark.parametrize("wanted", [True, False])
async def test_reflection_is_served_exactly_when_asked_for(start, wanted):
    service = start(*(["--reflection"] if wanted else []))
    await service.wait_health("SERVING")
    async with grpc.aio.insecure_channel(service.address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        if wanted:
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {found.name for found in (await call.read()).list_services_response.service}
            assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        else:  # Not written to: that would race with the refusal, and fail as such.
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_probe_for_containers_exits_0_exactly_when_serving(start):
    service = start()
    command = [sys.executable, "-m", "services.runtime.probe"]
    asyncio.run(service.wait_health("SERVING"))
    done = subprocess.run([*command, service.address, SERVICE], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, "SERVING\n")
    done = subprocess.run([*command, f"127.0.0.1:{free_ports()[0]}"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert done.stdout.startswith("UNAVAILABLE: ")
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "the following arguments are required: HOST:PORT" in done.stderr


def test_the_metrics_port_gives_up_on_a_client_that_says_nothing_or_trickles(monkeypatch, capfd):
    monkeypatch.setattr("services.runtime.server._HTTP_TIMEOUT_S", 0.5)
    settings = RewardSettings(model="m", metrics_port=0)
    port = ServiceRuntime(name="test", settings=settings, metrics=ServiceMetrics("test")).serve_metrics()
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as silent,
        socket.create_connection(("127.0.0.1", port), timeout=5) as half,
        socket.create_connection(("127.0.0.1", port), timeout=5) as scraper,
    ):
        half.sendall(b"GET /metrics HT")
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert scraper.recv(15).startswith(b"HTTP/1.0 200")
        assert (silent.recv(1), half.recv(1)) == (b"", b"")
    time.sleep(0.1)
    assert "Traceback" not in capfd.readouterr().err

"""A live reward service with TLS, client certificates and tokens: who is refused, and that nobody else notices."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

pytest.importorskip("cryptography", reason="no cryptography here to make certificates with")

from cryptography import x509
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from quartet.client import (
    CallPolicy,
    CredentialsError,
    InvalidInputError,
    NotReadyError,
    PolicyClient,
    QuartetError,
    RewardClient,
    ScoreItem,
    Security,
    UnavailableError,
    WeightsClient,
)
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc, weights_pb2_grpc
from services.runtime.probe import probe
from tests import http2
from tests.certificates import Authority, replace
from tests.conftest import LiveService, free_port

ITEM = ScoreItem(prompt="hello", response=" thanks")
ONCE = CallPolicy(patience_s=0.0, deadline_s=20.0)
TOKEN, WRONG = "right-73577357735773577357", "wrong-99889988998899889988"
ADMIN = "admin-11221122112211221122"
SERVICE = RewardClient.health_service
HANDSHAKE_S = 2.0
REQUEST_S = 2.0


@dataclass
class Fort:
    """The live service, its files and its authorities."""

    live: LiveService
    folder: Path
    servers: Authority
    clients: Authority
    health_address: str

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    def security(self, **changes: object) -> Security:
        """What the service accepts."""
        ca, cert, key = (self.folder / name for name in ("servers.crt", "client.crt", "client.key"))
        right = Security(ca_file=ca, cert_file=cert, key_file=key, token=TOKEN)
        return dataclasses.replace(right, **changes)  # type: ignore[arg-type]

    def client(self, policy: CallPolicy = ONCE, **changes: object) -> RewardClient:
        return RewardClient(self.live.address, policy=policy, security=self.security(**changes))

    @property
    def port(self) -> int:
        return int(self.live.address.rpartition(":")[2])

    def connect(self) -> ssl.SSLSocket:
        """A TLS connection with the client's certificate and nothing of gRPC on it yet."""
        context = ssl.create_default_context(cafile=str(self.folder / "servers.crt"))
        context.load_cert_chain(self.folder / "client.crt", self.folder / "client.key")
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=15)
        return context.wrap_socket(plain, server_hostname="localhost")

    def serial(self) -> int:
        """Serial number of the certificate that the service shows now."""
        with self.connect() as connection:
            return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"").serial_number

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.live.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def events(self, name: str) -> list[dict[str, object]]:
        lines = [line for line in self.live.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.fixture(scope="module")
def fort(start_service, make_reward_model, tmp_path_factory) -> Iterator[Fort]:
    folder = tmp_path_factory.mktemp("secrets")
    servers, clients = Authority.make("servers"), Authority.make("clients")
    (folder / "servers.crt").write_bytes(servers.certificate_pem)
    (folder / "clients.crt").write_bytes(clients.certificate_pem)
    servers.sign("reward").write(folder, "service")
    clients.sign("trainer").write(folder, "client")
    (folder / "tokens").write_text(f"{TOKEN}\n")
    health_port = free_port()
    fort = Fort(
        live=None,  # type: ignore[arg-type]
        folder=folder,
        servers=servers,
        clients=clients,
        health_address=f"127.0.0.1:{health_port}",
    )
    flags = f"--tls-cert {folder}/service.crt --tls-key {folder}/service.key --tls-client-ca {folder}/clients.crt "
    (folder / "admin").write_text(f"{ADMIN}\n")
    flags += f"--token-file {folder}/tokens --admin-token-file {folder}/admin --health-port {health_port} "
    flags += "--max-message-mib 1 --reflection "
    flags += f"--handshake-timeout-s {HANDSHAKE_S} --request-timeout-s {REQUEST_S} --log-level debug --log-format json"
    fort.live = start_service("reward", make_reward_model(), *flags.split(), security=fort.security())
    yield fort
    assert fort.live.stop() == 0


async def refusal(client: RewardClient) -> QuartetError:
    async with client:
        with pytest.raises(QuartetError) as refused:
            await client.score([ITEM])
    return refused.value


async def test_the_right_credentials_are_served_and_health_needs_a_certificate_alone(fort):
    async with fort.client() as client:
        await client.wait_ready(10)
        assert len((await client.score([ITEM])).results) == 1
    tokenless = fort.security(token=None)
    assert await asyncio.to_thread(probe, fort.live.address, SERVICE, 3.0, tokenless) == "SERVING"
    async with fort.client(token=None) as client:
        await client.wait_ready(10)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (WRONG, "the token is not accepted: it is wrong, or has been replaced"),
        (TOKEN[:-1], "the token is not accepted: it is wrong, or has been replaced"),
        (None, "no token: send the metadata authorization: Bearer TOKEN"),
    ],
)
async def test_a_wrong_or_missing_token_is_unauthenticated_and_not_repeated(fort, token, said):
    error = await refusal(fort.client(token=token))
    assert (type(error), error.code, error.message) == (CredentialsError, grpc.StatusCode.UNAUTHENTICATED, said)


async def test_clients_without_a_certificate_of_the_authority_get_no_connection(fort, tmp_path):
    strangers = Authority.make("clients")  # The same name, another key.
    pairs = {
        "none": (None, None),
        "a stranger's": strangers.sign("trainer").write(tmp_path, "stranger"),
        "an expired one": fort.clients.sign("trainer", ends_in_s=-60).write(tmp_path, "expired"),
        "one of the servers' authority": fort.servers.sign("trainer").write(tmp_path, "crossed"),
    }
    for what, (cert, key) in pairs.items():
        error = await refusal(fort.client(cert_file=cert, key_file=key))
        assert isinstance(error, UnavailableError), what
    # Nor does one who speaks no TLS.
    error = await refusal(RewardClient(fort.live.address, policy=ONCE, security=Security(token=TOKEN)))
    assert isinstance(error, UnavailableError)


async def test_a_client_refuses_a_service_it_has_no_reason_to_trust(fort, tmp_path):
    (tmp_path / "other.crt").write_bytes(Authority.make("servers").certificate_pem)
    for changes in ({"ca_file": tmp_path / "other.crt"}, {"server_name": "reward.example.org"}):
        async with fort.client(**changes) as client:
            with pytest.raises(
                NotReadyError,
                match=r"not ready at .*(certificate signature failure|Hostname Verification Check failed)",
            ):
                await client.wait_ready(1.0)
            with pytest.raises(UnavailableError):
                await client.score([ITEM])
    async with fort.client(server_name="localhost") as client:
        assert len((await client.score([ITEM])).results) == 1


async def test_reflection_needs_the_token(fort):
    stubs = []
    for token in (TOKEN, WRONG):
        security = fort.security(token=token)
        async with security.open_channel(f"dns:///{fort.live.address}", []) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                metadata=security.metadata_source("localhost:1")()
            )
            try:
                if token is TOKEN:  # What is refused is refused without a request, and writing would race with that.
                    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                stubs.append({found.name for found in (await call.read()).list_services_response.service})
            except grpc.aio.AioRpcError as error:
                stubs.append(error.code())
    assert SERVICE in stubs[0]
    assert stubs[1] is grpc.StatusCode.UNAUTHENTICATED


async def test_the_health_port_speaks_no_tls_and_serves_nothing_else(fort):
    assert await asyncio.to_thread(probe, fort.health_address, SERVICE) == "SERVING"
    error = await refusal(RewardClient(fort.health_address, policy=ONCE, security=Security(token=TOKEN)))
    assert error.code is grpc.StatusCode.UNIMPLEMENTED


async def test_tokens_are_rotated_while_a_client_calls_without_a_restart_or_a_lost_call(fort, tmp_path):
    new = "fresh-55665566556655665566"
    mine = tmp_path / "mine"
    mine.write_text(TOKEN)
    try:
        async with fort.client(token=None, token_file=mine) as client, fort.client() as old:
            replace(fort.tokens, f"{new}\n{TOKEN}\n".encode())
            served = 0
            for step in range(20):
                if step == 13:  # A second and more after the service's file: both are accepted.
                    replace(mine, new.encode())
                served += len((await client.score([ITEM])).results)
                await asyncio.sleep(0.1)
            assert served == 20
            await asyncio.sleep(0.6)
            replace(fort.tokens, f"{new}\n".encode())
            await asyncio.sleep(1.1)
            assert len((await client.score([ITEM])).results) == 1
            with pytest.raises(CredentialsError, match="it is wrong, or has been replaced"):
                await old.score([ITEM])  # On a connection that was open all the time.
        # Emptied by mistake: nobody is locked out, and the log says so.
        replace(fort.tokens, b"")
        await asyncio.sleep(1.1)
        async with fort.client(token=new) as client:
            assert len((await client.score([ITEM])).results) == 1
        assert "is empty" in str(fort.events("tokens_not_rotated")[-1]["reason"])
    finally:
        replace(fort.tokens, f"{TOKEN}\n".encode())
        await asyncio.sleep(1.1)


async def test_the_certificate_is_rotated_without_a_restart_and_a_wrong_key_changes_nothing(fort):
    before = await asyncio.to_thread(fort.serial)
    async with fort.client() as client:
        await client.score([ITEM])
        new = fort.servers.sign("reward")
        new.write(fort.folder, "service")
        assert await asyncio.to_thread(fort.serial) == new.certificate.serial_number != before
        assert len((await client.score([ITEM])).results) == 1  # The connection that was open goes on.
    replace(fort.folder / "service.key", fort.servers.sign("another").key_pem())
    assert await asyncio.to_thread(fort.serial) == new.certificate.serial_number
    assert "does not belong to the certificate" in str(fort.events("certificate_not_rotated")[-1]["reason"])
    replace(fort.folder / "service.key", new.key_pem())
    async with fort.client() as client:
        assert len((await client.score([ITEM])).results) == 1


async def test_client_authorities_are_rotated_as_well(fort, tmp_path):
    successor = Authority.make("clients, next")
    cert, key = successor.sign("trainer").write(tmp_path, "next")
    replace(fort.folder / "clients.crt", fort.clients.certificate_pem + successor.certificate_pem)
    async with fort.client(cert_file=cert, key_file=key) as client:
        assert len((await client.score([ITEM])).results) == 1
    async with fort.client() as client:
        assert len((await client.score([ITEM])).results) == 1
    replace(fort.folder / "clients.crt", fort.clients.certificate_pem)
    assert isinstance(await refusal(fort.client(cert_file=cert, key_file=key)), UnavailableError)


async def test_an_oversized_message_is_refused_and_the_connection_serves_on(fort):
    async with fort.client() as client:
        with pytest.raises(InvalidInputError, match="larger than max") as refused:
            await client.score([ScoreItem(prompt="hello", response="x" * (2 * 1024 * 1024))])
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len((await client.score([ITEM])).results) == 1


async def test_the_message_of_a_caller_without_token_is_not_even_read(fort):
    before = fort.resident_mib()
    async with fort.client(token=WRONG) as client:
        calls = [client.score([ScoreItem(prompt="a", response="x" * 1_000_000)]) for _ in range(64)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in errors} == {CredentialsError}
    assert fort.resident_mib() < before + 64


def begin_score(token: str) -> bytes:
    """Preface, settings, headers of a Score call, and 3 of the 1000 bytes of its message."""
    headers = http2.call_headers("/quartet.reward.v1.RewardService/Score", authorization=f"Bearer {token}")
    begun = b"\x00" + struct.pack(">I", 1000) + b"abc"
    return http2.PREFACE + http2.settings() + headers + http2.frame(http2.DATA, 0, 1, begun)


def read_until_end(connection: socket.socket, trickle: bytes, wanted: bytes) -> float:
    """Seconds until ``wanted`` comes or the connection is closed, sending ``trickle`` now and then."""
    start_s = time.monotonic()
    connection.settimeout(0.2)
    seen = b""
    while wanted not in seen:
        assert time.monotonic() - start_s < 15, "never ended"
        try:
            got = connection.recv(4096)
            seen += got
            if not got:
                break
        except TimeoutError:
            try:
                connection.sendall(trickle)
            except OSError:
                break
        except OSError:
            break
    return time.monotonic() - start_s


async def test_a_trickled_request_is_given_up_while_others_are_served(fort):
    def trickle() -> float:
        with fort.connect() as connection:
            connection.sendall(begin_score(TOKEN))
            # HPACK without Huffman coding: the trailer stands readable in the answer. 4 is DEADLINE_EXCEEDED.
            return read_until_end(connection, http2.frame(http2.DATA, 0, 1, b"x"), b"grpc-status\x014")

    slow = [asyncio.create_task(asyncio.to_thread(trickle)) for _ in range(3)]
    async with fort.client() as client:
        while not all(task.done() for task in slow):
            assert len((await client.score([ITEM])).results) == 1
            await asyncio.sleep(0.05)
    assert all(REQUEST_S - 0.5 < task.result() < REQUEST_S + 4 for task in slow)


async def test_clients_that_open_connections_and_say_nothing_are_put_out_and_nobody_waits_for_them(fort):
    async with fort.client() as client:
        await client.score([ITEM])
        before_mib = fort.resident_mib()
        mute = [socket.create_connection(("127.0.0.1", fort.port), timeout=15) for _ in range(300)]
        for number, connection in enumerate(mute):
            if number % 3:  # A third says nothing at all, the others begin a TLS record and stop.
                connection.sendall(b"\x16\x03\x01\x02\x00\x01" if number % 3 == 1 else b"\x16")
        start_s = time.monotonic()
        waited_s = []
        while time.monotonic() - start_s < HANDSHAKE_S:
            call_s = time.monotonic()
            await client.score([ITEM])
            waited_s.append(time.monotonic() - call_s)
            await asyncio.sleep(0.02)
        async with fort.client() as newcomer:  # Nor is the door blocked.
            await newcomer.score([ITEM])
        assert len(waited_s) > 10
        assert sorted(waited_s)[len(waited_s) // 2] < 0.5
        ended_s = [await asyncio.to_thread(read_until_end, connection, b"", b"\xff\xff\xff") for connection in mute]
        assert time.monotonic() - start_s < HANDSHAKE_S + 8
        assert len(ended_s) == 300
        for connection in mute:
            connection.close()
        assert fort.resident_mib() < before_mib + 100


def start_fails(*arguments: str) -> str:
    ports = ("--port", "0", "--metrics-port", "0", "--admin-port", "0")
    command = [sys.executable, "-m", "services.reward", *ports, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_a_model_that_leads_out_of_its_folder_or_is_pickled_or_missing_is_refused_at_the_start(
    make_reward_model, tmp_path
):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(make_reward_model(), folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../../etc/passwd"}}')
    said = start_fails("--model", str(folder))
    assert "model.safetensors.index.json names '../../../etc/passwd', which is not a file of the folder" in said
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "its weights are pickled (pytorch_model.bin)" in start_fails("--model", str(folder))
    said = start_fails("--model", f"{folder}/../../../../../../etc/passwd")
    assert "there is no such folder" in said
    assert "Traceback" not in said


def test_code_that_comes_with_a_model_is_run_only_when_asked_for(make_reward_model, tmp_path):
    import shutil

    folder, trace = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(make_reward_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "of_their_own"
    config["auto_map"] = {
        "AutoConfig": "theirs.TheirConfig",
        "AutoModelForSequenceClassification": "theirs.TheirModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(
        f"from transformers import LlamaConfig, LlamaForSequenceClassification\nopen({str(trace)!r}, 'w').close()\n"
        "class TheirConfig(LlamaConfig):\n    model_type = 'of_their_own'\n"
        "class TheirModel(LlamaForSequenceClassification):\n    config_class = TheirConfig\n"
        "    def __init__(self, config):\n        raise ValueError('their code ran')\n"
    )
    said = start_fails("--model", str(folder))
    assert "trust_remote_code" in said
    assert not trace.exists()
    assert "their code ran" in start_fails("--model", str(folder), "--trust-remote-code")
    assert trace.exists()


def test_a_wrong_file_is_one_clear_line_at_the_start_before_the_model_is_loaded(fort, make_reward_model, tmp_path):
    model = make_reward_model()
    (tmp_path / "empty").write_text("")
    (tmp_path / "admin").write_text(ADMIN)
    tokens = ("--token-file", str(tmp_path / "empty"), "--admin-token-file", str(tmp_path / "admin"))
    said = start_fails("--model", str(model), *tokens)
    assert said.startswith(f"quartet-reward: --token-file: token file '{tmp_path}/empty' is empty")
    other = fort.servers.sign("another").write(tmp_path, "other")
    said = start_fails(
        "--model", str(model), "--tls-cert", str(fort.folder / "service.crt"), "--tls-key", str(other[1])
    )
    assert said.count("\n") == 1
    assert "the key does not belong to the certificate" in said


def test_an_admin_port_that_would_let_in_whom_the_services_port_does_is_one_clear_line(
    fort, make_reward_model, tmp_path
):
    model = make_reward_model()
    folder = fort.folder
    server = ("--tls-cert", str(folder / "service.crt"), "--tls-key", str(folder / "service.key"))
    (tmp_path / "same.crt").symlink_to(folder / "clients.crt")
    authorities = ("--tls-client-ca", str(folder / "clients.crt"), "--admin-tls-client-ca", str(tmp_path / "same.crt"))
    said = start_fails("--model", str(model), *server, *authorities)
    assert said.startswith(f"quartet-reward: --admin-tls-client-ca '{tmp_path}/same.crt' and --tls-client-ca")
    assert "have an authority in common" in said
    assert said.count("\n") == 1
    (tmp_path / "admin").write_text(f"{ADMIN}\n{TOKEN}\n")
    said = start_fails(
        "--model", str(model), "--token-file", str(fort.tokens), "--admin-token-file", str(tmp_path / "admin")
    )
    assert said.startswith(
        f"quartet-reward: --admin-token-file: token file '{tmp_path}/admin': 1 of its 2 tokens stand"
    )
    assert said.count("\n") == 1
    assert TOKEN not in said


@pytest.fixture(scope="module")
def policy(start_service, make_policy, tmp_path_factory) -> Iterator[LiveService]:
    folder = tmp_path_factory.mktemp("policy-secrets")
    (folder / "tokens").write_text(TOKEN)
    (folder / "admin").write_text(ADMIN)
    flags = f"--engine transformers --token-file {folder}/tokens --admin-token-file {folder}/admin --log-level debug"
    flags += f" --request-timeout-s {REQUEST_S}"
    live = start_service("policy", make_policy(), *flags.split())
    yield live
    assert live.stop() == 0
    log = live.log.read_text()
    assert "call_refused" in log
    assert not [secret for secret in (TOKEN, ADMIN, WRONG) if secret in log]


async def test_weight_updates_are_answered_on_the_admin_port_alone_and_with_its_own_token_alone(policy):
    generate, admin = Security(token=TOKEN), Security(token=ADMIN)
    async with WeightsClient(policy.admin_address, policy=ONCE, security=admin) as weights:
        assert (await weights.get_info()).weights_version == 0
    for token in (TOKEN, ADMIN):  # On the data port there is no such service, whoever asks.
        async with WeightsClient(policy.address, policy=ONCE, security=Security(token=token)) as weights:
            with pytest.raises(QuartetError) as refused:
                await weights.get_info()
            assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED
    async with grpc.aio.insecure_channel(policy.address) as channel:
        bearer = (("authorization", f"Bearer {ADMIN}"),)
        update = weights_pb2_grpc.WeightsServiceStub(channel).UpdateWeights(metadata=bearer)
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await update
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for security in (generate, Security(token=WRONG), Security()):
        async with WeightsClient(policy.admin_address, policy=ONCE, security=security) as weights:
            with pytest.raises(CredentialsError):
                await weights.get_info()
            with pytest.raises(CredentialsError):
                await weights.update([], weights_version=1)
    async with grpc.aio.insecure_channel(policy.admin_address) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.GetModelInfo(policy_pb2.GetModelInfoRequest(), metadata=bearer)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with PolicyClient(policy.address, policy=ONCE, security=admin) as client:
        with pytest.raises(CredentialsError):
            await client.get_model_info()
    async with PolicyClient(policy.address, policy=ONCE, security=generate) as client:
        assert (await client.get_model_info()).vocab_size == 300


async def test_an_update_whose_sender_goes_silent_is_given_up_and_the_next_one_is_heard(policy):
    admin = Security(token=ADMIN)
    async with grpc.aio.insecure_channel(policy.admin_address) as channel:
        bearer = (("authorization", f"Bearer {ADMIN}"),)
        start_s = time.monotonic()
        silent = weights_pb2_grpc.WeightsServiceStub(channel).UpdateWeights(metadata=bearer)
        await asyncio.sleep(REQUEST_S / 4)
        async with WeightsClient(policy.admin_address, policy=ONCE, security=admin) as weights:
            with pytest.raises(QuartetError, match="another weight update is under way"):
                await weights.update([], weights_version=1)
            with pytest.raises(grpc.aio.AioRpcError, match="message of the stream did not come within") as given_up:
                await silent
            assert given_up.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert 0.9 * REQUEST_S < time.monotonic() - start_s < REQUEST_S + 3
            with pytest.raises(QuartetError, match="tensors"):
                await weights.update([], weights_version=1)


async def test_the_log_holds_no_secret_even_at_debug_level(fort):
    """Of calls that succeed and that fail, here and in the tests before."""
    for token in (WRONG, None, TOKEN):
        async with fort.client(token=token) as client:
            for _ in range(3):
                if token is TOKEN:
                    await client.score([ITEM])
                else:
                    with pytest.raises(CredentialsError):
                        await client.score([ITEM])
    log = fort.live.log.read_text()
    assert len([e for e in fort.events("call_refused") if e["code"] == "UNAUTHENTICATED"]) >= 6
    assert len(fort.events("call_done")) >= 3
    shown = [
        secret for secret in (TOKEN, WRONG, "fresh-5566", "BEGIN", "Bearer right", "Bearer wrong") if secret in log
    ]
    assert shown == []
    assert "Traceback" not in log


async def test_addresses_in_a_list_are_balanced_over_with_the_name_that_they_share(fort):
    addresses = f"{fort.live.address},{fort.live.address}"
    with pytest.raises(CredentialsError, match="are several addresses: set server_name"):
        RewardClient(addresses, policy=ONCE, security=fort.security())
    async with RewardClient(addresses, policy=ONCE, security=fort.security(server_name="localhost")) as client:
        await client.wait_ready(10)
        assert len((await client.score([ITEM])).results) == 1

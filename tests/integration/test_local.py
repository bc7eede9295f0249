"""quartet-local with real services: it hands over addresses, keeps services up, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.runtime.probe import probe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

# Stands for a trainer: notes where the services are, and on SIGINT how many came before it ended by itself with 130.
COMMAND = """
import json, os, signal, sys, time
interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(time.time()))
with open(sys.argv[1] + ".new", "w") as file:
    json.dump({k: v for k, v in os.environ.items() if k.startswith("QUARTET_TRAIN_")}, file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
while not interrupts:
    time.sleep(0.05)
time.sleep(1.0)
open(sys.argv[1] + ".interrupts", "w").write(str(len(interrupts)))
sys.exit(130)
"""
HEALTH = {
    "POLICY": "quartet.policy.v1.PolicyService",
    "POLICY_ADMIN": "quartet.policy.v1.WeightsService",
    "REWARD": "quartet.reward.v1.RewardService",
    "REFERENCE": "quartet.reference.v1.ReferenceService",
}


@dataclass
class Launched:
    """A quartet-local and the mark in the environment of all it started."""

    process: subprocess.Popen[bytes]
    mark: str
    output: Path
    noted: Path
    sessions: set[int] = field(default_factory=set)

    def processes(self) -> dict[int, str]:
        """Living processes that have the mark or the session of one that had it, by pid, with their command lines.

        The session, too, because vLLM's engine writes its title over its environment.
        """
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    environment = (folder / "environ").read_bytes()
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    session = os.getsid(int(folder.name))
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
                if self.mark.encode() in environment and session != os.getsid(0):
                    self.sessions.add(session)
                if self.mark.encode() in environment or session in self.sessions:
                    found[int(folder.name)] = line
        return found

    def addresses(self, timeout_s: float = 120.0) -> dict[str, str]:
        """What the command was given, once it runs."""
        wait_for(lambda: self.noted.exists() or self.process.poll() is not None, timeout_s, self.output.read_text)
        assert self.noted.exists(), self.output.read_text()
        given = json.loads(self.noted.read_text())
        return {name: given[f"QUARTET_TRAIN_PPO_{name}"] for name in HEALTH}

    def service_pid(self, name: str) -> int:
        (pid,) = [
            pid for pid, line in self.processes().items() if f"services.{name} " in line and "tether.py" not in line
        ]
        return pid

    def assert_nothing_is_left(self, addresses: dict[str, str], within_s: float) -> None:
        wait_for(lambda: not self.processes(), within_s, lambda: str(self.processes()))
        for address in addresses.values():
            host, _, port = address.rpartition(":")
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Closed connections may linger.
                listener.bind((host, int(port)))
                listener.listen()


def wait_for(condition: Callable[[], bool], timeout_s: float, explain: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s:\n{explain()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def models(make_policy, make_reward_model):
    return ["--policy-model", str(make_policy()), "--reward-model", str(make_reward_model())]


@pytest.fixture
def launch(models, tmp_path) -> Iterator[Callable[..., Launched]]:
    """launch(*flags, command=...) starts quartet-local; what is left of it at the end is killed."""
    launched: list[Launched] = []

    def start(*flags: str, command: list[str] | None = None, engine: str = "transformers", **popen) -> Launched:
        mark = f"quartet-test-{uuid.uuid4().hex}"
        noted, output = tmp_path / "noted", tmp_path / "output"
        given = [sys.executable, "-c", COMMAND, str(noted)] if command is None else command
        line = [sys.executable, "-m", "deploy.local", *models, "--engine", engine, "--logs", str(tmp_path / "logs")]
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [*line, *flags, *(["--", *given] if given else [])],
                env=os.environ | {"QUARTET_TEST_MARK": mark},
                stderr=sink,
                **({"stdout": sink} | popen),
            )
        launched.append(Launched(process, mark, output, noted))
        return launched[-1]

    yield start
    for house in launched:
        for pid in house.processes():
            os.kill(pid, signal.SIGKILL)
        house.process.wait()


def test_the_command_gets_the_addresses_of_serving_services_and_its_exit_code_comes_back(launch):
    code = (
        "import json, os, sys; from services.runtime.probe import probe\n"
        "names = json.loads(sys.argv[1])\n"
        "for prefix in ('QUARTET_TRAIN_PPO_', 'QUARTET_TRAIN_EVALUATE_'):\n"
        "    for name, service in names.items():\n"
        "        print(prefix + name, probe(os.environ[prefix + name], service))\n"
        "sys.exit(7)"
    )
    house = launch(command=[sys.executable, "-c", code, json.dumps(HEALTH)])
    assert house.process.wait(timeout=180) == 7
    answers = [line for line in house.output.read_text().splitlines() if line.startswith("QUARTET_TRAIN_")]
    assert answers == [
        f"{prefix}{name} SERVING" for prefix in ("QUARTET_TRAIN_PPO_", "QUARTET_TRAIN_EVALUATE_") for name in HEALTH
    ]
    house.assert_nothing_is_left({}, within_s=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_launcher_ends_everything(launch, number):
    house = launch()
    addresses = house.addresses()
    assert len(house.processes()) >= 8  # The launcher, the command, three services, and a tether for each.
    house.process.send_signal(number)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert house.process.wait(timeout=60) == expected
    house.assert_nothing_is_left(addresses, within_s=30)
    if number == signal.SIGINT:
        assert Path(f"{house.noted}.interrupts").read_text() == "1"


def test_ctrl_c_on_a_terminal_reaches_the_command_once_and_the_services_not_at_all(launch):
    terminal, theirs = pty.openpty()
    try:
        house = launch(stdin=theirs, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        addresses = house.addresses()
        os.write(terminal, b"\x03")
        assert house.process.wait(timeout=60) == 130
        assert Path(f"{house.noted}.interrupts").read_text() == "1"
        house.assert_nothing_is_left(addresses, within_s=1)
        assert "was ended by" not in house.output.read_text()
    finally:
        os.close(terminal)
        os.close(theirs)


def test_killed_services_come_back_on_their_ports_and_the_command_goes_on(launch):
    house = launch()
    addresses = house.addresses()
    before = {name: house.service_pid(name) for name in ("reward", "policy")}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    for name in before:
        service, address = HEALTH[name.upper()], addresses[name.upper()]
        wait_for(lambda n=name: f"{n} was ended by SIGKILL" in house.output.read_text(), 10, house.output.read_text)
        wait_for(lambda a=address, s=service: probe(a, s, 1.0) == "SERVING", 120, house.output.read_text)
        assert house.service_pid(name) != before[name]
    told = house.output.read_text()
    assert "reward was ended by SIGKILL; starting it again in 1 s (1 of 5); its log" in told
    assert "policy was ended by SIGKILL; starting it again in 1 s (1 of 5); its log" in told
    assert house.process.poll() is None
    house.process.send_signal(signal.SIGINT)
    assert house.process.wait(timeout=60) == 130
    house.assert_nothing_is_left(addresses, within_s=1)


def test_two_launchers_run_at_once_and_without_a_command_serve_until_told_to_end(launch):
    first = launch(command=[], stdout=subprocess.PIPE)
    second = launch(command=[], stdout=subprocess.PIPE)
    seen = []
    for house in (first, second):
        assert house.process.stdout is not None
        lines = [house.process.stdout.readline().decode().split() for _ in range(4)]
        addresses = {name.upper(): address for name, address in lines}
        for name, service in HEALTH.items():
            assert probe(addresses[name], service) == "SERVING"
        seen += addresses.values()
    assert len(set(seen)) == 8
    for house in (first, second):
        house.process.send_signal(signal.SIGTERM)
    assert [house.process.wait(timeout=60) for house in (first, second)] == [0, 0]
    first.assert_nothing_is_left({str(i): address for i, address in enumerate(seen)}, within_s=1)


def test_an_engine_of_several_processes_ends_with_its_launcher(launch):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here")
    house = launch(engine="vllm")
    addresses = house.addresses(timeout_s=240)
    assert any("EngineCore" in line for line in house.processes().values())
    house.process.kill()
    house.assert_nothing_is_left(addresses, within_s=60)


# What goes wrong at the start -----------------------------------------------------------------------------------------


def refused(house: Launched, *, code: int, within_s: float) -> str:
    assert house.process.wait(timeout=within_s) == code, house.output.read_text()
    text = house.output.read_text()
    assert "Traceback" not in text
    assert not house.noted.exists()  # The command never ran.
    house.assert_nothing_is_left({}, within_s=1)
    return text


def test_a_port_already_taken_is_refused_before_anything_is_loaded(launch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        text = refused(launch("--reward-port", str(port)), code=1, within_s=20)
    assert text == (
        f"quartet-local: --reward-port: cannot take port {port} of 127.0.0.1: Address already in use; stop what holds "
        "it, choose another, or leave the flag out for a free one\n"
    )


def test_wrong_flags_models_and_commands_are_one_clear_line(launch, make_policy, tmp_path):
    nothing = str(tmp_path / "nothing")
    bare = str(make_policy(seed=5, with_tokenizer=False))
    file = tmp_path / "file"
    file.touch()
    for flags, code, message in [
        (["--reward-model", nothing], 2, f"--reward-model: model '{nothing}': there is no such folder"),
        (["--reference-model", bare], 2, f"--reference-model: model '{bare}': the folder has no tokenizer"),
        (["--ready-timeout-s", "-1"], 2, "--ready-timeout-s is '-1': Input should be greater than 0"),
        (["--reward-port", "50052", "--policy-port", "50052"], 2, "--policy-port and --reward-port are both 50052"),
        (["--logs", str(file)], 2, f"--logs is '{file}': can't be a folder: File exists"),
        (["--logs", str(file / "x")], 2, f"--logs is '{file}/x': can't be a folder: Not a directory"),
        (["--policy-args", "'"], 2, '--policy-args is "\'": No closing quotation'),
    ]:
        text = refused(launch(*flags), code=code, within_s=20)
        assert text.startswith(f"quartet-local: {message}"), text
        assert text.count("\n") == 1, text
    text = refused(launch(command=["no-such-command"]), code=127, within_s=20)
    assert text == "quartet-local: there is no command 'no-such-command' to run\n"


def test_a_service_that_refuses_to_start_is_named_with_its_reason(launch, make_policy):
    text = refused(launch("--reward-model", str(make_policy(seed=6))), code=1, within_s=120)
    assert "quartet-local: reward ended (exit code 2) before it was ready; its log" in text
    assert "is not a reward model: its checkpoint lacks score.weight" in text


def test_a_service_that_never_comes_up_is_named_after_the_wait(launch):
    text = refused(launch("--ready-timeout-s", "0.5"), code=1, within_s=60)
    assert "quartet-local: policy is not ready after 0.5 s (--ready-timeout-s); its log" in text

"""``quartet-local``: policy, reward and reference services on this machine, for as long as a command runs.

    quartet-local --policy-model sft --reward-model reward -- quartet-train ppo --model sft --prompts p.jsonl --output o

The services are processes of their own on free ports of loopback. Once all are SERVING, the command is started with
their addresses in its environment; without one, the services run until Ctrl-C. A service that dies is started again on
its port. When the command ends, when this process is told to end, and when it is killed, all of them end with it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from deploy.supervision import UNDERSTOOD, HeldPort, LocalError, Service, start_tethered, take_signal
from quartet.model_folder import ModelFolderError, find_model
from quartet.settings import NonNegativeFloat, NonNegativeInt, Port, PositiveFloat, Settings

# Stages of the trainer that talk to services, by the prefix of their settings in the environment.
_TRAINER_PREFIXES = ("QUARTET_TRAIN_PPO_", "QUARTET_TRAIN_EVALUATE_")
_POLL_S = 0.1
_PROGRESS_EVERY_S = 15.0
_PORTS = (
    "policy_port",
    "policy_admin_port",
    "policy_metrics_port",
    "reward_port",
    "reward_admin_port",
    "reward_metrics_port",
    "reference_port",
    "reference_metrics_port",
)
# Services and trainer share the cores in turn: a thread without work must sleep at once, not spin for the next.
_PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
# Exit codes after which nobody looks for logs: success, and an end that was asked for.
_PEACEFUL = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class LocalSettings(Settings):
    """Starts policy, reward and reference services on this machine, then a command given after ``--``."""

    command: ClassVar[str] = "quartet-local"

    policy_model: str = Field(description="model to generate with and to train: a Hugging Face folder or hub id")
    reward_model: str = Field(description="reward model")
    reference_model: str | None = Field(None, description="frozen reference; default the policy's model")
    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="generation engine of the policy")
    deterministic: bool = Field(False, description="run every service in its deterministic mode; slower")
    threads: NonNegativeInt = Field(
        0, description="processor threads of each service; 0: all cores for the policy, half for each of the others"
    )
    policy_args: str = Field("", description='more flags of the policy service, as --policy-args="--kv-cache-gib 4"')
    reward_args: str = Field("", description="more flags of the reward service")
    reference_args: str = Field("", description="more flags of the reference service")
    policy_port: Port = Field(0, description="gRPC port of the policy; 0 takes a free one, as for all ports here")
    policy_admin_port: Port = Field(0, description="gRPC port of the policy's weight updates")
    policy_metrics_port: Port = Field(0, description="Prometheus port of the policy")
    reward_port: Port = Field(0, description="gRPC port of the reward service")
    reward_admin_port: Port = Field(0, description="gRPC port of the reward service's model swaps")
    reward_metrics_port: Port = Field(0, description="Prometheus port of the reward service")
    reference_port: Port = Field(0, description="gRPC port of the reference service")
    reference_metrics_port: Port = Field(0, description="Prometheus port of the reference service")
    logs: Path | None = Field(
        None, description="folder for the services' logs; default a temporary one, kept only after a failure"
    )
    ready_timeout_s: PositiveFloat = Field(300.0, description="seconds that the services may take to be ready")
    grace_s: NonNegativeFloat = Field(15.0, description="seconds that services may take to end before they are killed")
    command_grace_s: NonNegativeFloat = Field(
        60.0, description="seconds that the command may take to end on SIGTERM before it is killed"
    )
    max_restarts: NonNegativeInt = Field(5, description="restarts of a service in a row before giving up")

    @field_validator("policy_args", "reward_args", "reference_args")
    @classmethod
    def _splits(cls, value: str) -> str:
        shlex.split(value)  # ValueError: no closing quotation.
        return value

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        flags: dict[int, str] = {}
        for name in _PORTS:
            port = getattr(self, name)
            if port and port in flags:
                raise ValueError(f"{flags[port]} and {_flag(name)} are both {port}: each needs its own")
            flags[port] = _flag(name)
        return self


def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
        if not command:
            _refuse("no command stands after --")
    settings = LocalSettings.from_command_line(arguments)
    # Signals wait until the loop takes them: none can end this process before it has ended its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, UNDERSTOOD)
    try:
        code = Launcher(settings, command).run()
    except LocalError as error:
        _announce(str(error))
        code = error.exit_code
    sys.exit(code)


class Launcher:
    """The services of one machine, and the command they are for."""

    def __init__(self, settings: LocalSettings, command: Sequence[str]) -> None:
        """Checks what can be checked before anything is started, and takes the ports.

        Raises:
            LocalError: a model or logs folder is not usable, a port is taken, or there is no such command.
        """
        self.settings = settings
        self.command = list(command)
        if self.command and shutil.which(self.command[0]) is None:
            raise LocalError(f"there is no command {self.command[0]!r} to run", exit_code=127)
        reference_model = settings.reference_model or settings.policy_model
        _check_model("--policy-model", settings.policy_model)
        _check_model("--reward-model", settings.reward_model)
        if reference_model != settings.policy_model:
            _check_model("--reference-model", reference_model)
        # Those asked for before the free ones: a free one must not be one of them.
        chosen_first = sorted(_PORTS, key=lambda name: getattr(settings, name) == 0)
        self.ports = {name: HeldPort(_flag(name), getattr(settings, name)) for name in chosen_first}
        self.logs = _make_logs(settings.logs)
        cores = _cores()
        policy_flags = ["--engine", settings.engine, "--admin-port", str(self.ports["policy_admin_port"])]
        reward_flags = ["--admin-port", str(self.ports["reward_admin_port"])]
        self.services = [
            self._service("policy", "Policy", settings.policy_model, settings.threads or cores, policy_flags),
            self._service(
                "reward", "Reward", settings.reward_model, settings.threads or max(1, cores // 2), reward_flags
            ),
            self._service("reference", "Reference", reference_model, settings.threads or max(1, cores // 2)),
        ]

    def _service(self, name: str, title: str, model: str, threads: int, flags: Sequence[str] = ()) -> Service:
        settings = self.settings
        port = self.ports[f"{name}_port"]
        # -P: a folder named services where the user stands must not be taken for ours.
        command = [sys.executable, "-P", "-m", f"services.{name}", "--model", model, "--port", str(port)]
        command += ["--metrics-port", str(self.ports[f"{name}_metrics_port"]), "--threads", str(threads)]
        command += ["--grace-s", str(settings.grace_s), *flags]
        command += ["--deterministic"] if settings.deterministic else []
        return Service(
            name=name,
            health_service=f"quartet.{name}.v1.{title}Service",
            address=f"127.0.0.1:{port}",
            command=[*command, *shlex.split(getattr(settings, f"{name}_args"))],
            environment=_PASSIVE_WAITING | {"OMP_NUM_THREADS": str(threads)},
            log=self.logs / f"{name}.log",
            ready_timeout_s=settings.ready_timeout_s,
            # A little more than the service itself takes as its grace.
            kill_after_s=settings.grace_s + 5.0,
            max_restarts=settings.max_restarts,
        )

    def run(self) -> int:
        """Returns the exit code: the command's, or 0 where Ctrl-C or SIGTERM ended services without a command.

        Raises:
            LocalError: a service did not come up, or died more often than allowed.
        """
        code = None
        try:
            for service in self.services:
                service.start()
            code = self._wait_ready() or (self._run_command() if self.command else self._serve())
        finally:
            self._end_services()
            if self.settings.logs is None and code in _PEACEFUL:
                shutil.rmtree(self.logs, ignore_errors=True)
            elif self.settings.logs is None:
                _say(f"the services' logs are in {self.logs}")
        return code

    def addresses(self) -> dict[str, str]:
        """The addresses by the trainer's names for them."""
        found = {service.name: service.address for service in self.services}
        return found | {"policy_admin": f"127.0.0.1:{self.ports['policy_admin_port']}"}

    def _wait_ready(self) -> int:
        """Waits until all are SERVING; returns 0, or the exit code where a signal came first."""
        start_s = told_s = time.monotonic()
        while waiting := [service for service in self.services if not service.ready]:
            number, _ = take_signal(_POLL_S)
            if number is not None:
                _announce("told to end")
                return 128 + number
            names = ", ".join(service.name for service in waiting)
            now_s = time.monotonic()
            _progress(f"loading {names}: {now_s - start_s:.0f} s")
            if not sys.stderr.isatty() and now_s - told_s > _PROGRESS_EVERY_S:
                told_s = now_s
                _say(f"loading {names}: {now_s - start_s:.0f} s")
            for service in waiting:
                service.await_first(_announce)
        return 0

    def _serve(self) -> int:
        """Without a command: tells where the services are and keeps them up until told to end."""
        for name, address in self.addresses().items():
            sys.stdout.write(f"{name:<13}{address}\n")
        sys.stdout.write(f"{'reward_admin':<13}127.0.0.1:{self.ports['reward_admin_port']}\n")
        for service in self.services:
            sys.stdout.write(f"{service.name + ' metrics':<19}http://127.0.0.1:{self._metrics_port(service)}/metrics\n")
        sys.stdout.flush()
        _say("serving; Ctrl-C ends it")
        while take_signal(_POLL_S)[0] is None:
            for service in self.services:
                service.supervise(_announce)
        return 0

    def _metrics_port(self, service: Service) -> HeldPort:
        return self.ports[f"{service.name}_metrics_port"]

    def _run_command(self) -> int:
        """Runs the command to its end, keeping the services up and handing signals on; returns its exit code."""
        addresses = {
            prefix + name.upper(): address for prefix in _TRAINER_PREFIXES for name, address in self.addresses().items()
        }
        tether = start_tethered(
            self.command,
            environment=_PASSIVE_WAITING | os.environ | addresses,
            kill_after_s=self.settings.command_grace_s,
            own_session=False,
        )
        failure: LocalError | None = None
        while (code := tether.poll()) is None:
            number, from_terminal = take_signal(_POLL_S)
            if number is not None:
                tether.hand_on(number, from_terminal)
            for service in self.services:
                try:
                    service.supervise(_announce)
                except LocalError as error:
                    if failure is None:
                        failure = error
                        tether.send(signal.SIGINT)  # As Ctrl-C does: a trainer saves what it has.
        if failure is not None:
            raise failure
        return code

    def _end_services(self) -> None:
        for service in self.services:
            service.end()
        while any(service.running() for service in self.services):
            number, _ = take_signal(_POLL_S)
            if number is not None:
                _say("killing the services")
                for service in self.services:
                    service.kill()
        for port in self.ports.values():
            port.close()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_model(flag: str, model: str) -> None:
    try:
        find_model(model)
    except ModelFolderError as error:
        raise LocalError(f"{flag}: {error}", exit_code=2) from error


def _make_logs(folder: Path | None) -> Path:
    """The folder of the logs, made where it is not there; a temporary one for None."""
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="quartet-local-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalError(f"--logs is {str(folder)!r}: can't be a folder: {error.strerror}", exit_code=2) from error
    return folder


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _announce(message: str) -> None:
    _progress("")
    _say(message)


def _say(message: str) -> None:
    for line in message.splitlines():
        sys.stderr.write(f"quartet-local: {line}\n")
    sys.stderr.flush()


def _progress(message: str) -> None:
    """One line that is written over, on a terminal alone."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{'quartet-local: ' + message if message else ''}")
        sys.stderr.flush()


def _refuse(message: str) -> None:
    _say(message)
    sys.exit(2)


if __name__ == "__main__":
    main()

"""Processes that live no longer than their launcher, the signals it takes, and ports kept across restarts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TETHER = Path(__file__).with_name("tether.py")
_FIRST_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 30.0
# A service that was ready for so long starts its count of restarts anew.
_STABLE_S = 60.0
_PROBE_EVERY_S = 0.25
_TAIL_LINES = 20
# Linux's <asm-generic/siginfo.h>: sent by the kernel, as a terminal's Ctrl-C is, to the whole foreground group.
_SI_KERNEL = 0x80
# Signals that ask a launcher to end. It blocks them, so that none ends it before it has ended what it started.
UNDERSTOOD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LocalError(Exception):
    """The launcher cannot go on; the message says why and what to do."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def take_signal(timeout_s: float) -> tuple[signal.Signals | None, bool]:
    """Waits for one of ``UNDERSTOOD``, which must be blocked; whether a terminal sent it, and so to the command too."""
    if sys.platform == "linux":
        info = signal.sigtimedwait(UNDERSTOOD, timeout_s)
        return (None, False) if info is None else (signal.Signals(info.si_signo), info.si_code == _SI_KERNEL)
    # Without siginfo, a Ctrl-C is taken to come from the terminal where there is one and we are in its foreground.
    time.sleep(timeout_s)
    pending = signal.sigpending() & set(UNDERSTOOD)
    if not pending:
        return None, False
    number = signal.Signals(signal.sigwait(pending))
    return number, sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()


class HeldPort:
    """A port of loopback, the given one or a free one, kept for our own services as long as this is open.

    It is bound and never listened on. With SO_REUSEADDR on both sides, as gRPC and Python's HTTP server set it, Linux
    lets a service listen on it all the same, but gives it to nobody who asks for any free port: two launchers never
    choose the same, and a service that is started again finds its port free.
    """

    def __init__(self, flag: str, port: int) -> None:
        """Raises LocalError: the port is taken or not allowed."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
        except OSError as error:
            self._socket.close()
            raise LocalError(
                f"{flag}: cannot take port {port} of 127.0.0.1: {error.strerror}; stop what holds it, "
                "choose another, or leave the flag out for a free one"
            ) from error
        self.number = int(self._socket.getsockname()[1])
        if sys.platform != "linux":
            self._socket.close()  # Others refuse a second bind: the port is chosen, but not held.

    def close(self) -> None:
        self._socket.close()

    def __str__(self) -> str:
        return str(self.number)


@dataclass(frozen=True)
class Tethered:
    """A running process, held by a tether (see tether.py)."""

    process: subprocess.Popen[bytes]
    lifeline: socket.socket

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process; nothing happens where it has ended."""
        with contextlib.suppress(OSError):
            self.lifeline.send(bytes([number]))

    def end(self) -> None:
        """SIGTERM now, SIGKILL for it and all its descendants after its grace."""
        with contextlib.suppress(OSError):
            self.lifeline.send(b"\0")

    def hand_on(self, number: signal.Signals, from_terminal: bool) -> None:
        """What a launcher that was sent ``number`` owes the command that it runs in the terminal's foreground."""
        if number != signal.SIGINT:
            self.end()
        elif not from_terminal:  # A terminal's has reached the command already.
            self.send(number)

    def poll(self) -> int | None:
        """Its exit code, 128 + N where signal N ended it; None while it or a descendant of it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code


def start_tethered(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    kill_after_s: float,
    own_session: bool,
    log: IO[bytes] | None = None,
) -> Tethered:
    """Starts ``command``. It ends at the latest when this process ends, in whatever way."""
    ours, theirs = socket.socketpair()
    with theirs:
        place = "session" if own_session else "here"
        tether = [sys.executable, "-I", "-S", str(_TETHER), str(theirs.fileno()), str(kill_after_s), place]
        process = subprocess.Popen(
            [*tether, *command],
            env=dict(environment),
            stdout=log,
            stderr=log,
            pass_fds=(theirs.fileno(),),
            start_new_session=own_session,
        )
    return Tethered(process, ours)


@dataclass(eq=False, kw_only=True)
class Service:
    """One service: started, watched, started again, ended."""

    name: str
    health_service: str
    address: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    ready_timeout_s: float
    kill_after_s: float
    max_restarts: int
    ready: bool = field(default=False, init=False)
    _tether: Tethered | None = field(default=None, init=False)
    _started_s: float = field(default=0.0, init=False)
    _ready_s: float = field(default=0.0, init=False)
    _restart_at_s: float | None = field(default=None, init=False)
    _restarts: int = field(default=0, init=False)
    _channel: grpc.Channel | None = field(default=None, init=False)
    _probe: grpc.Future[health_pb2.HealthCheckResponse] | None = field(default=None, init=False)
    _probed_s: float = field(default=0.0, init=False)

    def start(self) -> None:
        self._started_s = time.monotonic()
        self._restart_at_s = None
        with self.log.open("ab") as log:
            self._tether = start_tethered(
                self.command,
                environment=os.environ | self.environment,
                kill_after_s=self.kill_after_s,
                own_session=True,
                log=log,
            )

    def running(self) -> bool:
        return self._tether is not None and self._tether.poll() is None

    def await_first(self, tell: Callable[[str], None]) -> None:
        """Notices that it became ready.

        Raises:
            LocalError: it ended, or took longer than ``ready_timeout_s``.
        """
        if self._tether is not None and (code := self._tether.poll()) is not None:
            raise LocalError(f"{self.name} {_ended(code)} before it was ready; {self.tail()}")
        self._notice_ready(tell)
        if not self.ready and time.monotonic() - self._started_s > self.ready_timeout_s:
            raise LocalError(
                f"{self.name} is not ready after {self.ready_timeout_s:g} s (--ready-timeout-s); {self.tail()}"
            )

    def supervise(self, tell: Callable[[str], None]) -> None:
        """Keeps it up: notices its death, starts it again after a growing wait, notices that it is back.

        Raises:
            LocalError: it died more often in a row than allowed.
        """
        now_s = time.monotonic()
        if self._restart_at_s is not None:
            if now_s >= self._restart_at_s:
                self.start()
        elif self._tether is not None and (code := self._tether.poll()) is not None:
            self._bury(code, now_s, tell)
        elif self._tether is not None and not self.ready:
            self._notice_ready(tell)
            if not self.ready and now_s - self._started_s > self.ready_timeout_s:
                self.kill()  # And its death is noticed above.

    def _bury(self, code: int, now_s: float, tell: Callable[[str], None]) -> None:
        death = f"{self.name} {_ended(code)}"
        if self.ready and now_s - self._ready_s > _STABLE_S:
            self._restarts = 0
        self.ready = False
        self._tether = None
        if self._restarts >= self.max_restarts:
            raise LocalError(f"{death}, after {self._restarts} restarts in a row: giving up; {self.tail()}")
        wait_s = min(_FIRST_BACKOFF_S * 2**self._restarts, _MAX_BACKOFF_S)
        self._restarts += 1
        self._restart_at_s = now_s + wait_s
        tell(f"{death}; starting it again in {wait_s:g} s ({self._restarts} of {self.max_restarts}); {self.tail()}")

    def end(self) -> None:
        """Ends it: SIGTERM, then SIGKILL after its grace."""
        self._restart_at_s = None
        if self._tether is not None:
            self._tether.end()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def kill(self) -> None:
        """Ends it at once; its tether stays until its descendants are gone, too."""
        if self._tether is not None:
            self._tether.send(signal.SIGKILL)

    def tail(self) -> str:
        """The end of its log, for a message."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if not lines:
            return f"its log {self.log} is empty"
        return "\n    ".join([f"its log {self.log} ends:", *(line[:400] for line in lines[-_TAIL_LINES:])])

    def _notice_ready(self, tell: Callable[[str], None]) -> None:
        if not self.ready and self._is_serving():
            self.ready = True
            self._ready_s = time.monotonic()
            tell(f"{self.name} is ready at {self.address} after {self._ready_s - self._started_s:.0f} s")

    def _is_serving(self) -> bool:
        """Whether its last health answer was SERVING. Asks again without waiting for the answer."""
        if self._probe is not None and self._probe.done():
            probe, self._probe = self._probe, None
            if probe.exception() is None:
                return bool(probe.result().status == health_pb2.HealthCheckResponse.SERVING)
        now_s = time.monotonic()
        if self._probe is None and now_s - self._probed_s >= _PROBE_EVERY_S:
            if self._channel is None:
                options = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 500)]
                self._channel = grpc.insecure_channel(self.address, options=options)
            request = health_pb2.HealthCheckRequest(service=self.health_service)
            self._probed_s = now_s
            self._probe = health_pb2_grpc.HealthStub(self._channel).Check.future(request, timeout=2.0)
        return False


def _ended(code: int) -> str:
    """How a process ended, by its exit code."""
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(code - 128).name}"
    return f"ended (exit code {code})"

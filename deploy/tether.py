"""Holds one process, and ends it with all its descendants when the launcher lets go of it, however the launcher ended.

Run by path as ``python -I -S tether.py LIFELINE GRACE_S PLACE COMMAND...`` with the standard library alone, so that
it costs little. LIFELINE is the number of an inherited descriptor whose other end the launcher holds:

- each byte read is the number of a signal to send to the process;
- a zero byte, or the end of the lifeline, as when the launcher was killed and could do nothing, means: SIGTERM, then
  after GRACE_S seconds SIGKILL for the process and everything it started.

PLACE is ``session``: the process gets a session of its own and no standard input (a service, which a terminal's Ctrl-C
must not reach); or ``here``: it stays in the terminal's foreground (the user's command).

Exits with the process's code, 128 + N where signal N ended it, once none of its descendants is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import sys
import time
from typing import NoReturn

# Numbers of linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> NoReturn:
    lifeline, grace_s, place, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]
    own_session = place == "session"
    os.set_inheritable(lifeline, False)
    wakeup, wakeup_writer = os.pipe()
    os.set_blocking(wakeup_writer, False)
    signal.set_wakeup_fd(wakeup_writer)
    signal.signal(signal.SIGCHLD, _noted)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # Only the lifeline commands here. Handled rather than ignored: the process would inherit that.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _noted)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # What the process leaves behind becomes ours, and is found below.
    # The launcher blocked signals so that it gets them in turn; the process must not inherit that either.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    process = _start(command, own_session)
    code = _hold(process, lifeline, wakeup, grace_s, own_session)
    _end_descendants(process if own_session else None)
    os._exit(code)


def _start(command: list[str], own_session: bool) -> int:
    tether = os.getpid()
    process = os.fork()
    if process:
        return process
    try:
        if own_session:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # Should the tether itself be killed.
        if os.getppid() == tether:
            os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"quartet-local: cannot run {command[0]!r}: {error.strerror}\n")
        sys.stderr.flush()
    os._exit(127)


def _hold(process: int, lifeline: int, wakeup: int, grace_s: float, own_session: bool) -> int:
    """Waits for the end of the process, doing what the lifeline says; returns the exit code."""
    kill_at_s: float | None = None
    watched = [lifeline, wakeup]
    while True:
        remaining_s = None if kill_at_s in (None, math.inf) else max(0.0, kill_at_s - time.monotonic())
        readable, _, _ = select.select(watched, [], [], remaining_s)
        if wakeup in readable:
            os.read(wakeup, 4096)
        if (code := _reap(process)) is not None:
            return code
        if lifeline in readable:
            orders = _read(lifeline)
            for number in filter(None, orders):
                _signal(process, number, own_session)
            if not orders:
                watched.remove(lifeline)
            if (not orders or 0 in orders) and kill_at_s is None:
                _signal(process, signal.SIGTERM, own_session)
                kill_at_s = time.monotonic() + grace_s
        if kill_at_s is not None and time.monotonic() >= kill_at_s:
            _signal(process, signal.SIGKILL, own_session)
            kill_at_s = math.inf


def _read(lifeline: int) -> bytes:
    try:
        return os.read(lifeline, 64)
    except ConnectionResetError:
        return b""


def _signal(process: int, number: int, own_session: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL and own_session:
            os.killpg(process, number)
        os.kill(process, number)


def _reap(process: int) -> int | None:
    """Collects whoever ended; the exit code when the process itself did."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == process:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _end_descendants(group: int | None) -> None:
    """Kills what the process left running: its process group, and whatever was handed up to us when it ended."""
    if group is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    while True:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # Its children become ours in turn: look again.
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Our children, where the system lists processes in /proc."""
    children = []
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with (
                    contextlib.suppress(OSError),
                    open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file,
                ):
                    # pid (name) state parent ...; the name may hold anything.
                    if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                        children.append(int(name))
    return children


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _noted(number: int, frame: object) -> None:
    """Wakes the loop, by the wakeup descriptor."""


if __name__ == "__main__":
    main()

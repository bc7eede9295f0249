"""A tethered process ends with all it started; a held port is ours and nobody else's."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.supervision import HeldPort, LocalError, start_tethered

# Starts a process that leaves the session and its parent, as a daemon does, and a plain child; then waits.
FAMILY = """
import os, signal, sys, time
folder = sys.argv[1]
def note(name):
    open(f"{folder}/{name}", "w").write(str(os.getpid()))
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setsid()
    if os.fork():
        os._exit(0)
    note("daemon")
    time.sleep(600)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note("child")
    time.sleep(600)
note("process")
exec(sys.argv[2])
"""


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def tether(folder: Path, then: str, *, kill_after_s: float = 30.0, own_session: bool = True):  # type: ignore[no-untyped-def]
    held = start_tethered(
        [sys.executable, "-c", FAMILY, str(folder), then],
        environment=os.environ,
        kill_after_s=kill_after_s,
        own_session=own_session,
    )
    wait_for(lambda: len([path for path in folder.iterdir() if path.read_text()]) == 3)
    return held, {path.name: int(path.read_text()) for path in folder.iterdir()}


linux = pytest.mark.skipif(sys.platform != "linux", reason="orphans are only handed up on Linux")


@linux
@pytest.mark.parametrize("own_session", [True, False])
@pytest.mark.parametrize(
    ("then", "code"),
    [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + 11)],
)
def test_descendants_end_with_the_process_and_its_exit_code_comes_back(tmp_path, then, code, own_session):
    held, pids = tether(tmp_path, f"time.sleep(0.3); {then}", own_session=own_session)
    assert held.process.wait(timeout=10) == code
    assert not any(map(alive, pids.values()))


@linux
@pytest.mark.parametrize("own_session", [True, False])
def test_closing_the_lifeline_ends_even_what_ignores_sigterm(tmp_path, own_session):
    held, pids = tether(
        tmp_path,
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
        kill_after_s=0.5,
        own_session=own_session,
    )
    start_s = time.monotonic()
    held.lifeline.close()  # As when the launcher is killed.
    assert held.process.wait(timeout=10) == 128 + signal.SIGKILL
    assert 0.5 <= time.monotonic() - start_s < 5
    assert not any(map(alive, pids.values()))


@linux
def test_a_process_may_end_by_itself_on_sigterm(tmp_path):
    held, pids = tether(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); time.sleep(600)")
    held.end()
    assert held.process.wait(timeout=10) == 5
    assert not any(map(alive, pids.values()))


@linux
def test_a_killed_tether_takes_the_process_with_it(tmp_path):
    held, pids = tether(tmp_path, "time.sleep(600)")
    try:
        held.process.kill()
        wait_for(lambda: not alive(pids["process"]))
    finally:
        for pid in (pids["daemon"], pids["child"]):
            os.kill(pid, signal.SIGKILL)


def test_signals_are_handed_on_and_the_process_inherits_no_mask_of_ours():
    code = (
        "import signal, time\n"
        # A shell's background job ignores SIGINT, and hands that on.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: raise SystemExit(9)"
    )
    read, write = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        with os.fdopen(read) as output, os.fdopen(write, "wb") as sink:
            held = start_tethered(
                [sys.executable, "-c", code], environment=os.environ, kill_after_s=5, own_session=True, log=sink
            )
            assert output.readline() == "set()\n"
            held.send(signal.SIGINT)
            assert held.process.wait(timeout=10) == 9
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_command_that_cannot_run_says_so(capfd):
    held = start_tethered(["/nowhere/at-all"], environment=os.environ, kill_after_s=5, own_session=False)
    assert held.process.wait(timeout=10) == 127
    assert capfd.readouterr().err == "quartet-local: cannot run '/nowhere/at-all': No such file or directory\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse the second bind")
def test_a_held_port_can_be_listened_on_again_and_again_and_is_given_to_nobody_else():
    held = HeldPort("--port", 0)
    for _ in range(2):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", held.number))
            listener.listen()
            with socket.create_connection(("127.0.0.1", held.number)):
                pass
            with pytest.raises(LocalError, match=f"--port: cannot take port {held.number} of 127.0.0.1"):
                HeldPort("--port", held.number)
    with socket.socket() as stranger, pytest.raises(OSError, match="Address already in use"):
        stranger.bind(("127.0.0.1", held.number))
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    others = [HeldPort("--port", 0) for _ in range(min(2000, (high - low) // 8))]
    assert held.number not in [other.number for other in others]
    assert len({other.number for other in others}) == len(others)
    for port in (held, *others):
        port.close()

"""Sides of a comparison as processes of their own, which stay up and take turns.

Each side is a Python process that loads its model, says that it is ready, and then does the work that it is told to,
whenever it is. Turns that lie seconds apart see the same state of a shared machine; memory is that of the process that
holds the model, and nothing of another side is in it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]

_SAMPLE_EVERY_S = 0.02
_END_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn: seconds, most memory above what the loaded model takes (MiB), and what the side found."""

    seconds: float
    peak_mib: float
    found: list[float]


class Side:
    """A process that takes turns."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Starts it. ``command``: of a program that calls ``serve_turns``."""
        self.name = name
        self.turns: list[Turn] = []
        self._busy = True
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is for us, who end it.
        )
        try:
            self.model_mib = float(self._answer()["model_mib"])
        except BaseException:
            self.end()
            raise

    def turn(self, task: str = "") -> Turn:
        """Does the work once, of the tasks that it has the one named, and keeps its figures."""
        assert self._process.stdin is not None
        self._busy = True
        self._process.stdin.write(f"{task}\n")
        self._process.stdin.flush()
        turn = Turn(**self._answer())
        self.turns.append(turn)
        return turn

    def _answer(self) -> dict[str, Any]:
        """The next line that is ours: libraries write to the output, too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("turn: "):
                answer: dict[str, Any] = json.loads(line.removeprefix("turn: "))
                self._busy = False
                return answer
        self._busy = False
        raise SystemExit(f"{self.name} ended with {self._process.wait()} before it answered")

    def end(self) -> None:
        """Asks it to end, and waits: not for the turn that it is in."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._busy:
            os.killpg(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def start_sides(commands: Mapping[str, Sequence[str]]) -> Iterator[list[Side]]:
    """All sides, one after another, so that no two load at the same time."""
    sides: list[Side] = []
    try:
        for name, command in commands.items():
            print(f"starting {name}", flush=True)
            sides.append(Side(name, command))
        yield sides
    finally:
        for side in sides:
            side.end()


def serve_turns(work: Callable[[str], tuple[float, list[float]]], holds_model: psutil.Process | None = None) -> None:
    """A side's main loop: ``work`` once for every line of the input, which names the task, until it ends.

    Args:
        work: returns the seconds it took and what it found.
        holds_model: the process whose memory counts, with its children; default this one.
    """
    process = holds_model or psutil.Process()
    loaded = _memory(family(process))
    _say({"model_mib": loaded / 2**20})
    with suppress(KeyboardInterrupt):  # In mid-turn: nobody waits for the rest.
        for line in sys.stdin:
            with _peak(process) as peak:
                seconds, found = work(line.strip())
            _say({"seconds": seconds, "peak_mib": (peak[0] - loaded) / 2**20, "found": found})


def _say(content: dict[str, Any]) -> None:
    sys.stdout.write("\nturn: " + json.dumps(content) + "\n")
    sys.stdout.flush()


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all that descend from it."""
    return [process, *process.children(recursive=True)]


def _memory(processes: Sequence[psutil.Process]) -> int:
    """Bytes in memory that are the processes' own."""
    total = 0
    for one in processes:
        try:
            information = one.memory_info()
            total += information.rss - information.shared
        except psutil.NoSuchProcess:
            continue
    return total


@contextmanager
def _peak(process: psutil.Process) -> Iterator[list[int]]:
    """The most memory inside the block, sampled, of the process and the children that it has.

    These are looked for once: doing it for each sample would take from what is measured.
    """
    processes = family(process)
    peak = [_memory(processes)]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_EVERY_S):
            peak[0] = max(peak[0], _memory(processes))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def set_threads() -> None:
    """As many threads as there are cores, for every side alike."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def vllm_environment() -> dict[str, str]:
    """Our environment, and vLLM told to use all cores and to say little."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    return os.environ | {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_SERVER_DEV_MODE": "1",  # So that its HTTP server can be told to empty its cache.
    }


def set_vllm_environment() -> None:
    """The same for this process, with the engine in it, so that its memory is seen. Before vLLM is imported."""
    os.environ.update(vllm_environment(), VLLM_ENABLE_V1_MULTIPROCESSING="0")


def compiles() -> bool:
    """Whether vLLM can run compiled, as it does by default: on a processor that takes a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++"))


def end_at_once() -> None:
    """Ends the process without the interpreter's farewell, in which vLLM's parts fill the screen with warnings."""
    sys.stdout.flush()
    os._exit(0)


def free_port() -> int:
    """A port of loopback that nobody had a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

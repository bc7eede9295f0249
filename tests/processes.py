"""Groups of processes, as torchrun starts them, in the time of a fork.

They are forked from a server that has imported what they need and computed nothing: that takes seconds once, and not
for each. There is no agent that ends the others when one dies: they have to see that for themselves, or be told.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.conftest import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


class Group:
    """``count`` processes that run ``target(*arguments)``, each with a log of its own; 1 is a process by itself."""

    def __init__(self, count: int, logs: Path, target: Callable[..., None], *arguments: Any) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port()
        # As torchrun has it: where they meet outlives each of them.
        self._store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self._logs = [logs / f"{name}.log" for name in range(count)]
        self.processes: list[BaseProcess] = [
            _context.Process(target=_run, args=(name, count, port, str(log), target, arguments), daemon=True)
            for name, log in enumerate(self._logs)
        ]
        for process in self.processes:
            process.start()
        # Asked to end, they would finish their step first; before multiprocessing waits for that.
        atexit.register(self.kill)

    def wait(self, timeout_s: float = 120.0) -> list[int | None]:
        """Exit codes, in the order of the processes; None: it is still there after ``timeout_s``."""
        end_s = time.monotonic() + timeout_s
        try:
            for process in self.processes:
                process.join(max(0.0, end_s - time.monotonic()))
            return [process.exitcode for process in self.processes]
        finally:
            self.kill()

    def finish(self, timeout_s: float = 120.0) -> str:
        """Waits until all have succeeded; returns what they said."""
        codes = self.wait(timeout_s)
        assert codes == [0] * len(codes), (codes, self.said)
        return self.said

    def terminate(self) -> None:
        """SIGTERM to those that are left, as torchrun sends when one has died."""
        for process in self.processes:
            process.terminate()

    def kill(self, *which: int) -> None:
        """SIGKILL to those, or to all."""
        for process in [self.processes[name] for name in which] or self.processes:
            process.kill()
            process.join()

    @property
    def said(self) -> str:
        """On stdout and stderr, process after process."""
        return "".join(log.read_text() for log in self._logs if log.exists())

    def said_by(self, name: int) -> str:
        return self._logs[name].read_text()


def train(count: int, logs: Path, *command: str) -> Group:
    """``quartet-train`` with ``command``, in ``count`` processes."""
    return Group(count, logs, _train, command)


def _train(command: Sequence[str]) -> None:
    from trainer.__main__ import main

    main(list(command))


def _run(name: int, count: int, port: int, log: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    torch.set_num_threads(1)
    if count > 1:
        place = {"RANK": name, "LOCAL_RANK": name, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    target(*arguments)

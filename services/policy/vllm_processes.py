"""What vLLM's processes do for us, which find it through the entry point ``vllm.general_plugins``.

The worker's side of a weight update: a weight-transfer engine that loads a staged safetensors file. Only a path crosses
to the worker; the tensors are mapped from the file. And how these processes end and wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from typing import Any

BACKEND = "quartet_staged_file"
# Set by the service for its engine alone, in milliseconds.
WAIT_MS = "QUARTET_VLLM_WAIT_MS"


def register() -> None:
    """Makes the backend known; called by vLLM in every one of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "services.policy.staged_file_transfer", "StagedFileTransferEngine"
        )
    if WAIT_MS in os.environ:
        wait_asleep(int(os.environ[WAIT_MS]))
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)


def end_with_parent(parent_pid: int) -> None:
    """When the service is killed its engine process must not stay behind, holding memory and cores (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent_pid:  # It died before the call above.
        os.kill(os.getpid(), signal.SIGKILL)


def wait_asleep(most_ms: int) -> None:
    """Lets vLLM's processes sleep where they wait for one another busily; they look again each ``most_ms``.

    The engine waits for its worker through every step, and on a processor would do it on the cores that the worker
    computes on, and that read requests and refuse what is too much. vLLM wakes who waits by a message, but only after a
    second without any does it trust in that: a message may be dropped while the one before is under way.
    """
    import zmq
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    wait = SpinCondition.wait

    def asleep(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() > self.last_read + self.busy_loop_s:
            wait(self, timeout_ms)
        elif self.local_notify_socket in dict(self.poller.poll(most_ms)):
            with contextlib.suppress(zmq.Again):
                self.local_notify_socket.recv(zmq.NOBLOCK)

    SpinCondition.wait = asleep

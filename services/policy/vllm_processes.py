"""What vLLM's processes do for us, which find it through the entry point ``vllm.general_plugins``.

The worker's side of a weight update: a weight-transfer engine that loads a staged safetensors file. Only a path crosses
to the worker; the tensors are mapped from the file. And how these processes end and wait.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from typing import Any

BACKEND = "quartet_staged_file"
# Set by the service for its engine alone, in seconds.
PAUSE = "QUARTET_VLLM_PAUSE_S"


def register() -> None:
    """Makes the backend known; called by vLLM in every one of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "services.policy.staged_file_transfer", "StagedFileTransferEngine"
        )
    if PAUSE in os.environ:
        pause_while_waiting(float(os.environ[PAUSE]))
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


def pause_while_waiting(pause_s: float) -> None:
    """Lets vLLM's processes sleep for moments where they wait for one another busily.

    The engine waits for its worker through every step, and on a processor would do it on the cores that the worker
    computes on, and that read requests and refuse what is too much.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    wait = SpinCondition.wait

    def patient(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() <= self.last_read + self.busy_loop_s:
            time.sleep(pause_s)
        else:
            wait(self, timeout_ms)

    SpinCondition.wait = patient

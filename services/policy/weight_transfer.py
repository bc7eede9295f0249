"""The worker's side of a weight update: a vLLM weight-transfer engine that loads a staged safetensors file.

Runs in vLLM's worker process, which finds it through the entry point ``vllm.general_plugins``. Only a path crosses to
the worker; the tensors are mapped from the file.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

BACKEND = "quartet_staged_file"


def register() -> None:
    """Makes the backend known; called by vLLM in every one of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "services.policy.staged_file_transfer", "StagedFileTransferEngine"
        )
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

"""How vLLM's processes wait for one another, with vLLM's own means of waiting."""

from __future__ import annotations

import importlib.util
import time
from types import SimpleNamespace

import pytest

from services.policy.vllm_processes import pause_while_waiting

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


def test_who_waits_sleeps_for_moments_and_then_waits_as_vllm_does(monkeypatch):
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    waited: list[int | None] = []
    monkeypatch.setattr(SpinCondition, "wait", lambda self, timeout_ms=None: waited.append(timeout_ms))
    pause_while_waiting(0.01)
    busy = SimpleNamespace(last_read=time.monotonic(), busy_loop_s=60.0)
    start_s, start_cpu_s = time.monotonic(), time.thread_time()
    for _ in range(10):
        SpinCondition.wait(busy, 5000)
    assert time.monotonic() - start_s >= 0.1
    assert time.thread_time() - start_cpu_s < 0.05
    assert waited == []
    SpinCondition.wait(SimpleNamespace(last_read=time.monotonic() - 61.0, busy_loop_s=60.0), 5000)
    assert waited == [5000]

"""How vLLM's processes wait for one another, with vLLM's own means of waiting."""

from __future__ import annotations

import importlib.util
import threading
import time

import pytest

from services.policy.vllm_processes import wait_asleep

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


def test_who_waits_sleeps_until_woken_or_for_moments_and_then_waits_as_vllm_does(monkeypatch, tmp_path):
    import zmq
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    waited: list[int | None] = []
    monkeypatch.setattr(SpinCondition, "wait", lambda self, timeout_ms=None: waited.append(timeout_ms))
    wait_asleep(20)
    context = zmq.Context()
    try:
        writer = SpinCondition(False, context, f"ipc://{tmp_path}/wake")
        reader = SpinCondition(True, context, f"ipc://{tmp_path}/wake", busy_loop_s=60.0)
        start_s, start_cpu_s = time.monotonic(), time.thread_time()
        for _ in range(10):
            reader.wait(5000)
        assert time.monotonic() - start_s >= 0.2
        assert time.thread_time() - start_cpu_s < 0.1

        wait_asleep(30_000)
        for _ in range(3):
            threading.Timer(0.05, writer.notify).start()
            start_s = time.monotonic()
            reader.wait(5000)
            assert 0.04 < time.monotonic() - start_s < 15
        assert waited == []

        reader.last_read = time.monotonic() - 61.0
        reader.wait(5000)
        assert waited == [5000]
    finally:
        context.destroy(linger=0)

"""Memory of a process and of those that it started, as Linux tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from prometheus_client import CollectorRegistry

from services.runtime.memory import DeviceMemory, MemoryMetrics, resident_bytes
from services.runtime.telemetry import ServiceMetrics


def _process(proc: Path, pid: int, parent: int, pages: int, name: str = "python") -> None:
    (proc / str(pid)).mkdir()
    before = " ".join(["0"] * 19)
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} {before} {pages} 0 0\n")


def test_a_process_its_children_and_theirs_count_and_others_do_not(tmp_path):
    _process(tmp_path, 10, 1, 100)
    _process(tmp_path, 11, 10, 20, name="odd) S 1 (name")
    _process(tmp_path, 12, 11, 3)
    _process(tmp_path, 13, 1, 5000)
    (tmp_path / "self").symlink_to(tmp_path / "10")
    (tmp_path / "14").mkdir()  # It ended while it was looked at.
    assert resident_bytes(tmp_path) == 123 * os.sysconf("SC_PAGE_SIZE")


def test_a_child_that_takes_memory_is_seen():
    code = "held = b'x' * 64_000_000; print('ready', flush=True); input()"
    before = resident_bytes()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        here = psutil.Process()
        own = sum(process.memory_info().rss for process in (here, *here.children(recursive=True)))
        assert child.pid in [process.pid for process in here.children()]
        during = resident_bytes()
        child.communicate(b"\n")
    assert during == pytest.approx(own, rel=0.02)
    assert during - before >= 64_000_000


def test_without_linux_and_without_a_gpu_there_is_no_sample_rather_than_a_zero(tmp_path):
    registry = CollectorRegistry()
    metrics = MemoryMetrics("quartet_test", proc=tmp_path / "none")
    registry.register(metrics)  # type: ignore[arg-type]
    assert [family.samples for family in registry.collect()] == [[], []]
    metrics.device = lambda: DeviceMemory(allocated_bytes=5, reserved_bytes=8)
    assert registry.get_sample_value("quartet_test_gpu_bytes", {"state": "allocated"}) == 5
    assert registry.get_sample_value("quartet_test_gpu_bytes", {"state": "reserved"}) == 8


def test_a_service_without_batches_shows_none():
    names = {family.name for family in ServiceMetrics("test", batches=False).registry.collect()}
    assert not {name for name in names if "batch" in name or "held" in name or name == "quartet_test_queue_seconds"}
    assert {"quartet_test_queue_tokens", "quartet_test_resident_bytes", "process_open_fds"} <= names

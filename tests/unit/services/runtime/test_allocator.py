"""Facts of glibc's allocator, each in a process of its own: what is set stays set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")


def run(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(("keeps", "most", "least"), [(True, 60_000, 0), (False, 10**9, 200_000)])
def test_what_a_thread_frees_is_kept_for_what_comes_next(keeps: bool, most: int, least: int) -> None:
    """20 times 40 MiB are 204,800 pages: asked for again each time, or kept but for the first few."""
    found = run(f"""
import resource, threading, torch
from services.runtime import allocator
if {keeps}:
    allocator.share_one_arena()
    allocator.keep_freed()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(5):
        torch.ones(10, 2**20)
    before = faults()
    for _ in range(20):
        torch.ones(10, 2**20)
    print(faults() - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
""")
    assert least <= int(found) <= most


def test_what_threads_freed_and_the_allocator_kept_is_given_back() -> None:
    """Four threads at once, each of which takes 48 MiB in pieces that an arena of its own would hold."""
    found = run("""
import threading
from pathlib import Path
from services.runtime import allocator
allocator.share_one_arena()
allocator.keep_freed()
def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
together = threading.Barrier(4)
def work():
    held = [bytearray(b"x") * 2**20 for _ in range(48)]
    together.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
before = resident_mib()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
kept = resident_mib()
allocator.give_back()
print(before, kept, resident_mib())
""")
    before, kept, after = map(int, found.split())
    assert kept - before >= 150
    assert after - before < 20

"""What a model needs, what is free, and that the two are compared in the right direction."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.hosting import memory

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """1,000 floats in bfloat16, 500 in float32 and 7 integers, over two files."""
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"a": torch.zeros(10, 100, dtype=torch.bfloat16)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(500), "c": torch.zeros(7, dtype=torch.int64)}, folder / "model-2.safetensors")
    return folder


@pytest.fixture
def system(tmp_path: Path):  # type: ignore[no-untyped-def]
    """system(available_kib, {group: (limit, used, inactive file bytes)}) makes the files that Linux would show."""

    def make(available_kib: int | None, groups: dict[str, tuple[str, int, int]]) -> dict[str, Path]:
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        if available_kib is not None:
            (proc / "meminfo").write_text(f"MemTotal: 99999 kB\nMemAvailable: {available_kib} kB\n")
        (proc / "self" / "cgroup").write_text("0::/slice/service\n")
        for group, (limit, used, inactive) in groups.items():
            folder = cgroups / group
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
        return {"proc": proc, "cgroups": cgroups}

    return make


def test_weights_need_what_they_take_in_the_precision_of_the_service(weights):
    assert memory.weights_bytes(weights, torch.float32) == 1500 * 4
    assert memory.weights_bytes(weights, torch.bfloat16) == 1500 * 2


def test_only_what_plainly_does_not_fit_is_refused(weights):
    assert memory.shortage([weights], torch.float32, CPU, free_bytes=6000) is None
    said = memory.shortage([weights], torch.float32, CPU, free_bytes=5999)
    assert said == "its weights take 0.00 GiB beside those that serve, and 0.00 GiB are free"
    assert memory.shortage([weights], torch.bfloat16, CPU, free_bytes=5999) is None
    assert memory.shortage([weights], torch.float32, CPU) is None  # On this machine, as it is.


def test_free_is_what_the_tightest_limit_leaves(system):
    files = system(
        8 * 2**20,
        {
            "slice/service": ("max", 5 * GIB, 0),
            "slice": (str(6 * GIB), 5 * GIB, GIB),  # Two are left, one of them is a cache that gives way.
            "": (str(100 * GIB), GIB, 0),
        },
    )
    assert memory.free_memory_bytes(CPU, **files) == 2 * GIB


def test_without_limits_it_is_what_linux_says_and_elsewhere_nothing_is_known(system, tmp_path):
    files = system(3 * 2**20, {})
    assert memory.free_memory_bytes(CPU, **files) == 3 * GIB
    nowhere = tmp_path / "nowhere"
    assert memory.free_memory_bytes(CPU, proc=nowhere, cgroups=nowhere) is None


def test_a_model_in_a_circle_that_was_frozen_at_the_start_is_freed_all_the_same():
    model = torch.nn.Linear(4, 4)
    model.itself = [model]
    gone = weakref.ref(model)
    gc.freeze()
    del model
    gc.collect()
    assert gone() is not None  # What is frozen is not looked at.
    memory.release()
    assert gone() is None
    gc.unfreeze()

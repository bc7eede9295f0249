"""Whether a second model fits beside the first, and giving back what a former one took."""

from __future__ import annotations

import gc
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from services.runtime import allocator
from services.runtime.memory import DeviceMemory
from services.runtime.telemetry import ServiceMetrics

# Of safetensors; all are held in the precision of the service, but integers.
_FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_GIB = 2**30


def weights_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Least memory that the folder's weights take in precision ``dtype``. Reads their headers alone."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in _FLOATING:
                total += math.prod(entry["shape"]) * dtype.itemsize
    return total


def shortage(
    folders: Sequence[Path], dtype: torch.dtype, device: torch.device, *, free_bytes: int | None = None
) -> str | None:
    """Why the weights of ``folders`` plainly do not fit into the memory that is free now, None where they may.

    ``free_bytes``: instead of what is free now. Where the system does not say, nothing is refused.
    """
    needed = sum(weights_bytes(folder, dtype) for folder in folders)
    free = free_memory_bytes(device) if free_bytes is None else free_bytes
    if free is None or needed <= free:
        return None
    return f"its weights take {needed / _GIB:.2f} GiB beside those that serve, and {free / _GIB:.2f} GiB are free"


def free_memory_bytes(
    device: torch.device, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Memory that may still be taken, by the GPU or else by Linux and the limits of this process's control groups (v2).

    None where nothing says it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps of former tensors is taken for new ones.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = [_available_bytes(proc / "meminfo"), *_group_bytes(proc / "self" / "cgroup", cgroups)]
    known = [value for value in found if value is not None]
    return min(known, default=None)


def _available_bytes(meminfo: Path) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _group_bytes(membership: Path, cgroups: Path) -> list[int | None]:
    """What each limited group that the process is in leaves. Cached files count as free: they give way."""
    try:
        (path,) = [line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return []
    group = cgroups / path.strip("/")
    left: list[int | None] = []
    while group.is_relative_to(cgroups):
        try:
            limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            if limit != "max":
                left.append(int(limit) - int(used) + int(stat.get("inactive_file", 0)))
        except (OSError, ValueError):
            pass  # The root has no limit, and a part of the tree may not be ours to read.
        group = group.parent
    return left


def watch_gpu(metrics: ServiceMetrics, device_type: str) -> None:
    """Lets ``metrics`` tell what torch holds of the GPU that it runs on; does nothing elsewhere."""
    if device_type == "cuda":
        metrics.memory.device = lambda: DeviceMemory(
            allocated_bytes=torch.cuda.memory_allocated(), reserved_bytes=torch.cuda.memory_reserved()
        )


def release() -> None:
    """Gives the memory of a model that nobody refers to back to the system.

    Collects everything, what was frozen at the start included: a model may be held by its own circles. That stops all
    threads for tenths of a second, once a swap.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    allocator.give_back()

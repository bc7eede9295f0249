"""``make bench-overload``: the reward or the reference service under five times the load that it can bear.

Capacity is measured first, by callers who wait for their answers. Then requests arrive at five times that rate whether
or not earlier ones are answered, and nobody asks again. Served throughput should stay what it was, refusals be quick
and say when to come back, what is served be served in bounded time, memory stay flat, and once the load has ended the
next caller should be answered as before it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import psutil  # type: ignore[import-untyped]

from bench.models import make_models
from bench.turns import free_port
from quartet.client import ReferenceClient, RewardClient
from quartet.client.channel import pushback_s

Name = Literal["reward", "reference"]
_ITEMS, _PROMPT, _RESPONSE = 4, 96, 32
_TOKENS = _ITEMS * (_PROMPT + _RESPONSE)
_WAITING_S = 1.0
"""The queue holds what the model does in so many seconds."""
_CALLERS = 8
_READY_S = 120.0

SERVED_TARGET = 0.9
"""Of capacity."""
REFUSED_TARGET_S = 0.25
GROWTH_TARGET_MIB = 64
RECOVERY_TARGET_S = 3.0


@dataclass
class Found:
    """What was seen. Seconds, MiB; requests a second."""

    capacity: float = 0.0
    offered: float = 0.0
    served: float = 0.0
    served_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    pushbacks_s: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    queue_s: float = 0.0
    calm_s: float = 0.0
    recovery_s: float = 0.0
    growth_mib: float = 0.0

    @property
    def served_bound_s(self) -> float:
        """The full queue, and as much again for the batches in hand and for turns that others had first."""
        return 2 * self.queue_s + 1.0

    def verdicts(self) -> list[tuple[bool, str]]:
        p99_served, p99_refused = percentile(self.served_s, 99), percentile(self.refused_s, 99)
        return [
            (
                self.served >= SERVED_TARGET * self.capacity,
                f"served {self.served:.1f} requests/s of {self.offered:.0f} offered, capacity {self.capacity:.1f}: "
                f"{self.served / self.capacity:.2f}, target at least {SERVED_TARGET}",
            ),
            (
                set(self.codes) <= {"OK", "RESOURCE_EXHAUSTED"},
                f"answers: {', '.join(f'{code} {count}' for code, count in self.codes.most_common())}",
            ),
            (
                p99_refused <= REFUSED_TARGET_S,
                f"refused in {1000 * percentile(self.refused_s, 50):.0f} ms (p50), {1000 * p99_refused:.0f} ms (p99), "
                f"target at most {1000 * REFUSED_TARGET_S:.0f}",
            ),
            (
                bool(self.pushbacks_s) and min(self.pushbacks_s) > 0 and max(self.pushbacks_s) <= 2 * self.queue_s,
                f"told to come back after {min(self.pushbacks_s, default=0):.2f} to "
                f"{max(self.pushbacks_s, default=0):.2f} s; the full queue takes {self.queue_s:.2f} s",
            ),
            (
                p99_served <= self.served_bound_s,
                f"served in {percentile(self.served_s, 50):.2f} s (p50), {p99_served:.2f} s (p99), target at most "
                f"{self.served_bound_s:.2f}",
            ),
            (
                self.growth_mib <= GROWTH_TARGET_MIB,
                f"memory grew by {self.growth_mib:.0f} MiB, target at most {GROWTH_TARGET_MIB}",
            ),
            (
                self.recovery_s <= RECOVERY_TARGET_S,
                f"answered as before ({1000 * self.calm_s:.0f} ms) {self.recovery_s:.2f} s after the load ended, "
                f"target at most {RECOVERY_TARGET_S:.0f}",
            ),
        ]


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else 0.0


def measure(name: Name, *, seconds: float = 10.0, factor: float = 5.0) -> Found:
    """Starts the service and does it all, in about twice ``seconds`` and the start."""
    with tempfile.TemporaryDirectory() as folder:
        policy, reward = make_models(Path(folder))
        model = reward if name == "reward" else policy
        # First with a queue that nothing fills, to learn what a queue of a second is.
        with _running(name, model) as (_, address):
            capacity = asyncio.run(_capacity(name, address, seconds / 3))
        queued = max(2 * _TOKENS, int(capacity * _TOKENS * _WAITING_S))
        with _running(name, model, "--max-queued-tokens", str(queued)) as (process, address):
            return asyncio.run(_measure(name, address, process, queued, seconds, factor))


@contextlib.contextmanager
def _running(name: Name, model: Path, *flags: str) -> Iterator[tuple[psutil.Process, str]]:
    port = free_port()
    # One thread for the model: the callers are on this machine, too, and must not be what is measured.
    command = ["-m", f"services.{name}", "--model", str(model), "--port", str(port), "--threads", "1"]
    command += ["--metrics-port", str(free_port()), "--log-level", "error", *flags]
    command += ["--admin-port", "0"] if name == "reward" else []
    process = subprocess.Popen([sys.executable, *command], stdout=sys.stderr)
    try:
        yield psutil.Process(process.pid), f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@contextlib.asynccontextmanager
async def _ask(name: Name, address: str) -> Any:
    """A function that asks once, without any retry, and raises what the service answers."""
    client: RewardClient | ReferenceClient
    client = RewardClient(address) if name == "reward" else ReferenceClient(address)
    async with client:
        await client.wait_ready(_READY_S)
        if isinstance(client, RewardClient):
            fingerprint = (await client.get_model_info())[0].served_by.tokenizer_fingerprint
        else:
            fingerprint = (await client.get_model_info()).served_by.tokenizer_fingerprint
    async with grpc.aio.insecure_channel(address) as channel:
        yield _asker(name, channel, fingerprint)


def _asker(name: Name, channel: grpc.aio.Channel, fingerprint: str) -> Callable[[], Awaitable[object]]:
    from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
    from quartet.reward.v1 import reward_pb2, reward_pb2_grpc

    if name == "reward":
        scored = reward_pb2.ScoreRequest(tokenizer_fingerprint=fingerprint)
        for index in range(_ITEMS):
            item = scored.items.add()
            item.prompt.token_ids.ids.extend([5 + index] * _PROMPT)
            item.response_token_ids.ids.extend([7] * _RESPONSE)
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        return lambda: stub.Score(scored)
    known = reference_pb2.LogProbsRequest(tokenizer_fingerprint=fingerprint)
    for index in range(_ITEMS):
        known.items.add(token_ids=[5 + index] * (_PROMPT + _RESPONSE), response_start=_PROMPT)
    reference = reference_pb2_grpc.ReferenceServiceStub(channel)
    return lambda: reference.LogProbs(known)


async def _capacity(name: Name, address: str, seconds: float) -> float:
    async with _ask(name, address) as ask:
        return await _closed_loop(ask, seconds)


async def _closed_loop(ask: Callable[[], Awaitable[object]], seconds: float) -> float:
    """Requests a second by callers who wait, the first fifth of the time not counted."""
    begin_s = time.perf_counter() + 0.2 * seconds
    end_s = time.perf_counter() + seconds
    answered = 0

    async def caller() -> None:
        nonlocal answered
        while time.perf_counter() < end_s:
            await ask()
            answered += begin_s <= time.perf_counter() <= end_s

    await asyncio.gather(*(caller() for _ in range(_CALLERS)))
    return answered / (end_s - begin_s)


async def _measure(
    name: Name, address: str, process: psutil.Process, queued: int, seconds: float, factor: float
) -> Found:
    found = Found()
    async with _ask(name, address) as ask:
        await _closed_loop(ask, seconds / 5)
        found.calm_s = statistics.median([await _timed(ask) for _ in range(20)])
        found.capacity = await _closed_loop(ask, seconds / 2)
        found.queue_s = queued / _TOKENS / found.capacity
        found.offered = factor * found.capacity
        await _overload(ask, found, process, seconds)
        ended_s = time.perf_counter()
        while await _timed(ask) > 2 * found.calm_s + 0.01 and time.perf_counter() < ended_s + 60:
            pass
        found.recovery_s = time.perf_counter() - ended_s
    return found


async def _timed(ask: Callable[[], Awaitable[object]]) -> float:
    start_s = time.perf_counter()
    with contextlib.suppress(grpc.aio.AioRpcError):
        await ask()
        return time.perf_counter() - start_s
    await asyncio.sleep(0.01)
    return float("inf")


async def _overload(
    ask: Callable[[], Awaitable[object]], found: Found, process: psutil.Process, seconds: float
) -> None:
    """Requests arrive evenly at ``found.offered`` for ``seconds``; the first second fills the queue."""
    before = process.memory_info().rss
    start_s = time.perf_counter()
    counted_s, end_s = start_s + _WAITING_S, start_s + seconds
    served = 0
    most = before

    async def one() -> None:
        nonlocal served
        asked_s = time.perf_counter()
        try:
            await ask()
        except grpc.aio.AioRpcError as error:
            found.codes[error.code().name] += 1
            found.refused_s.append(time.perf_counter() - asked_s)
            found.pushbacks_s.append(pushback_s(error))
        else:
            now_s = time.perf_counter()
            found.codes["OK"] += 1
            found.served_s.append(now_s - asked_s)
            served += counted_s <= now_s <= end_s

    async with asyncio.TaskGroup() as tasks:
        asked = 0
        while (now_s := time.perf_counter()) < end_s:
            while asked < (now_s - start_s) * found.offered:
                tasks.create_task(one())
                asked += 1
            most = max(most, process.memory_info().rss)
            await asyncio.sleep(0.005)
    found.served = served / (end_s - counted_s)
    found.growth_mib = (max(most, process.memory_info().rss) - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the load lasts")
    options = parser.parse_args()
    names: tuple[Name, ...] = ("reward", "reference")
    for name in names:
        print(f"\n{name} service", flush=True)
        for held, text in measure(name, seconds=options.seconds).verdicts():
            print(f"{'PASS' if held else 'MISS'}  {text}")


if __name__ == "__main__":
    main()

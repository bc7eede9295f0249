"""``make bench-overload``: each service under five times the load that it can bear.

Capacity is measured first, by callers who wait for their answers: the most that any number of them gets out of it. Then
requests arrive at five times that rate whether or not earlier ones are answered, and nobody asks again; no text waits
twice. Served throughput should stay what it was, refusals be quick and say when to come back, what is served be served
in bounded time, memory stay flat, and once the load has ended the next caller should be answered as before it. What
does not is a MISS, and the exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import psutil  # type: ignore[import-untyped]

from bench.models import VOCABULARY, make_models
from bench.outcome import Verdict, conclude, log_of
from bench.turns import family, free_port
from quartet.client import PolicyClient, ReferenceClient, RewardClient
from quartet.client.errors import pushback_s

Name = Literal["policy", "reward", "reference"]
_ITEMS, _PROMPT, _RESPONSE = 4, 112, 16
_TOKENS = _ITEMS * (_PROMPT + _RESPONSE)
_WAITING_S = 1.0
"""The queue holds what the model does in so many seconds."""
_LEAST_WAITING, _LEAST_WAITING_LARGER = 10, 40
"""Requests that it has room for at least: a slow model's capacity is that of callers of whom some always wait."""
_CALLERS = (8, 16, 32)
"""That capacity is measured with: the most that any of them gets. Of the policy, so many times its slots are filled."""
_SLOTS = 32
_DIFFERENT = 1000
"""Requests: more than ever wait. Made before, for the load is made on the machine that it is put on."""
_READY_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is calm. ``served``: least share of capacity. ``refused_percent``: percentile of the times of refusals that
    ``refused_s`` bounds. ``slack``: factor of the bounds of all other times."""

    served: float = 0.9
    refused_percent: int = 99
    refused_s: float = 0.25
    slack: float = 1.0
    growth_mib: float = 64
    recovery_s: float = 3.0


ON_A_BUSY_MACHINE = Targets(served=0.85, refused_percent=75, slack=1.5)
"""For tests: what else the machine does lengthens times and takes from what is served, and differs between the
measurement of the capacity and that of the load. The best of three runs is judged by it."""


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

    def figures(self) -> dict[str, Any]:
        """What a program wants to know of it."""
        return asdict(self) | {"codes": dict(self.codes)}  # asdict counts the pairs of a Counter.

    def verdicts(self, targets: Targets = Targets()) -> list[Verdict]:
        """Whether each target was held, and the figures."""
        slack = targets.slack
        # The full queue, and as much again for the batches in hand and for turns that others had first.
        served_bound_s = slack * (2 * self.queue_s + 1.0)
        pushback_bound_s = slack * 2 * self.queue_s
        recovery_bound_s = slack * targets.recovery_s
        percent = targets.refused_percent
        p99_served, refused_s = percentile(self.served_s, 99), percentile(self.refused_s, percent)
        return [
            Verdict(
                targets.served <= self.served / self.capacity <= 2.0 - targets.served,
                f"served {self.served:.1f} requests/s of {self.offered:.0f} offered, capacity {self.capacity:.1f}: "
                f"{self.served / self.capacity:.2f}, target {targets.served:g} to {2.0 - targets.served:g}",
            ),
            Verdict(
                set(self.codes) <= {"OK", "RESOURCE_EXHAUSTED"},
                f"answers: {', '.join(f'{code} {count}' for code, count in self.codes.most_common())}",
            ),
            Verdict(
                refused_s <= targets.refused_s,
                f"refused in {1000 * percentile(self.refused_s, 50):.0f} ms (p50), {1000 * refused_s:.0f} ms "
                f"(p{percent}), target at most {1000 * targets.refused_s:.0f}",
            ),
            Verdict(
                bool(self.pushbacks_s) and min(self.pushbacks_s) > 0 and max(self.pushbacks_s) <= pushback_bound_s,
                f"told to come back after {min(self.pushbacks_s, default=0):.2f} to "
                f"{max(self.pushbacks_s, default=0):.2f} s; the full queue takes {self.queue_s:.2f} s, target "
                f"at most {pushback_bound_s:.2f}",
            ),
            Verdict(
                p99_served <= served_bound_s,
                f"served in {percentile(self.served_s, 50):.2f} s (p50), {p99_served:.2f} s (p99), target at most "
                f"{served_bound_s:.2f}",
            ),
            Verdict(
                self.growth_mib <= targets.growth_mib,
                f"memory grew by {self.growth_mib:.0f} MiB, target at most {targets.growth_mib:.0f}",
            ),
            Verdict(
                self.recovery_s <= recovery_bound_s,
                f"answered as before ({1000 * self.calm_s:.0f} ms) {self.recovery_s:.2f} s after the load ended, "
                f"target at most {recovery_bound_s:.1f}",
            ),
        ]


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else 0.0


def measure(
    name: Name, *, seconds: float = 10.0, factor: float = 5.0, flags: Sequence[str] = (), larger: bool = False
) -> Found:
    """Starts the service, with further ``flags``, and does it all, in about twice ``seconds`` and the starts.

    ``larger``: with a model of 29 M parameters instead of 5 M.
    """
    with tempfile.TemporaryDirectory() as folder:
        policy, reward = make_models(Path(folder), larger=larger)
        model = reward if name == "reward" else policy
        # First with a queue that nothing fills, to learn what a queue of a second is.
        with _running(name, model, *flags) as (_, address):
            capacity = asyncio.run(_capacity(name, address, seconds / 3))
        least = _LEAST_WAITING_LARGER if larger else _LEAST_WAITING
        queued = max(least * _TOKENS, int(capacity * _TOKENS * _WAITING_S))
        # What the policy is generating counts as well, and what waits while its capacity is measured.
        queued += _SLOTS // _ITEMS * _TOKENS if name == "policy" else 0
        with _running(name, model, *flags, "--max-queued-tokens", str(queued)) as (process, address):
            return asyncio.run(_measure(name, address, process, queued, seconds, factor))


@contextlib.contextmanager
def _running(name: Name, model: Path, *flags: str) -> Iterator[tuple[psutil.Process, str]]:
    port = free_port()
    # One thread for the model: the callers are on this machine, too, and must not be what is measured.
    command = ["-m", f"services.{name}", "--model", str(model), "--port", str(port), "--threads", "1"]
    command += ["--metrics-port", str(free_port()), *flags]
    command += [] if name == "reference" else ["--admin-port", "0"]
    # No more slots than callers can fill while capacity is measured, so that overload is no larger batch.
    command += ["--max-concurrent", str(_SLOTS)] if name == "policy" else []
    with log_of(f"{name}-service") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=sys.stderr, stderr=log)
    try:
        yield psutil.Process(process.pid), f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@contextlib.asynccontextmanager
async def _ask(name: Name, address: str) -> Any:
    """A function that asks once, without any retry, and raises what the service answers."""
    kinds: dict[Name, type[PolicyClient | RewardClient | ReferenceClient]]
    kinds = {"policy": PolicyClient, "reward": RewardClient, "reference": ReferenceClient}
    async with kinds[name](address) as client:
        await client.wait_ready(_READY_S)
        if isinstance(client, RewardClient):
            fingerprint = (await client.get_model_info())[0].served_by.tokenizer_fingerprint
        else:
            fingerprint = (await client.get_model_info()).served_by.tokenizer_fingerprint
    async with grpc.aio.insecure_channel(address) as channel:
        yield _asker(name, channel, fingerprint)


def _asker(name: Name, channel: grpc.aio.Channel, fingerprint: str) -> Callable[[], Awaitable[object]]:
    from quartet.common.v1 import common_pb2
    from quartet.policy.v1 import policy_pb2, policy_pb2_grpc
    from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
    from quartet.reward.v1 import reward_pb2, reward_pb2_grpc

    draw = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        """Others for every text: what is the same is computed once, or not at all."""
        drawn: list[int] = draw.integers(5, VOCABULARY, count).tolist()
        return drawn

    if name == "reward":
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        scored = [reward_pb2.ScoreRequest(tokenizer_fingerprint=fingerprint) for _ in range(_DIFFERENT)]
        for request in scored:
            for _ in range(_ITEMS):
                item = request.items.add()
                item.prompt.token_ids.ids.extend(ids(_PROMPT))
                item.response_token_ids.ids.extend(ids(_RESPONSE))
        to_score = itertools.cycle(scored)
        return lambda: stub.Score(next(to_score))
    if name == "policy":
        sampling = policy_pb2.SamplingParams(max_new_tokens=_RESPONSE, min_new_tokens=_RESPONSE)
        policy = policy_pb2_grpc.PolicyServiceStub(channel)

        async def generate() -> None:  # vLLM would know a prompt again for long.
            asked = policy_pb2.GenerateRequest(tokenizer_fingerprint=fingerprint, sampling=sampling)
            for _ in range(_ITEMS):
                asked.prompts.add().token_ids.ids.extend(ids(_PROMPT))
            done = [reply.status.code async for reply in policy.Generate(asked)]
            if done != [common_pb2.ITEM_STATUS_CODE_OK] * _ITEMS:
                raise RuntimeError(f"{_ITEMS} completions were asked for, the statuses are {done}")

        return generate
    reference = reference_pb2_grpc.ReferenceServiceStub(channel)

    known = [reference_pb2.LogProbsRequest(tokenizer_fingerprint=fingerprint) for _ in range(_DIFFERENT)]
    for wanted in known:
        for _ in range(_ITEMS):
            wanted.items.add(token_ids=ids(_PROMPT + _RESPONSE), response_start=_PROMPT)
    to_know = itertools.cycle(known)
    return lambda: reference.LogProbs(next(to_know))


async def _capacity(name: Name, address: str, seconds: float) -> float:
    async with _ask(name, address) as ask:
        return await _most(ask, seconds)


async def _most(ask: Callable[[], Awaitable[object]], seconds: float, most: float = math.inf) -> float:
    """Requests a second: the most that any number of callers, up to ``most``, gets.

    Half of ``seconds`` finds out which number that is, and the other half measures with it: the largest of several
    measurements would be too large by what chance has added to it.
    """
    tried = [callers for callers in _CALLERS if callers <= most]
    rates = {callers: await _closed_loop(ask, seconds / 2 / len(tried), callers) for callers in tried}
    return await _closed_loop(ask, seconds / 2, max(tried, key=lambda callers: rates[callers]))


async def _closed_loop(ask: Callable[[], Awaitable[object]], seconds: float, callers: int) -> float:
    """Requests a second by callers who wait: over ``seconds`` and some rounds, the first fifth not counted.

    They begin one after another, as requests come that nobody has arranged: all at once, they would stay in step, and a
    policy would generate for them in batches that begin and end together, as for no others.
    """
    alone_s = await _timed(ask)
    begin_s = time.perf_counter() + 0.2 * seconds
    end_s = time.perf_counter() + seconds
    answered_s: list[float] = []
    enough = False

    async def caller(place: int) -> None:
        nonlocal enough
        await asyncio.sleep(min(alone_s, 1.0) * place / callers)
        while not enough:
            await ask()
            if (now_s := time.perf_counter()) >= begin_s:
                answered_s.append(now_s)
                enough = now_s >= end_s and len(answered_s) >= 4 * callers

    await asyncio.gather(*map(caller, range(callers)))
    return per_second(answered_s)


def per_second(times_s: Sequence[float]) -> float:
    """How many answers come in a second: the slope of their number over time, by least squares.

    They come a batch at a time. Counted from a moment to another, one batch more or less would lie between them.
    """
    if len(times_s) < 2:
        return 0.0
    return float(np.polyfit(np.array(times_s) - times_s[0], np.arange(len(times_s)), 1)[0])


async def _measure(
    name: Name, address: str, process: psutil.Process, queued: int, seconds: float, factor: float
) -> Found:
    found = Found()
    async with _ask(name, address) as ask:
        await _closed_loop(ask, seconds / 5, _CALLERS[0])
        found.calm_s = statistics.median([await _timed(ask) for _ in range(20)])
        processes = family(process)  # vLLM runs in one of its own.
        async with _peak(processes) as before:
            # No more than the queue has room for, of which one caller may take most.
            found.capacity = await _most(ask, seconds / 2, most=0.8 * queued / _TOKENS)
        found.queue_s = queued / _TOKENS / found.capacity
        found.offered = factor * found.capacity
        async with _peak(processes) as during:
            await _overload(ask, found, seconds)
        ended_s = time.perf_counter()
        found.growth_mib = (during[0] - before[0]) / 2**20
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


async def _overload(ask: Callable[[], Awaitable[object]], found: Found, seconds: float) -> None:
    """Requests arrive evenly at ``found.offered`` for ``seconds``; those until the queue is full are not counted."""
    start_s = time.perf_counter()
    counted_s, end_s = start_s + min(found.queue_s, seconds / 2), start_s + seconds
    answered_s: list[float] = []

    async def one() -> None:
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
            if counted_s <= now_s <= end_s:
                answered_s.append(now_s)

    async with asyncio.TaskGroup() as tasks:
        asked = 0
        while (now_s := time.perf_counter()) < end_s:
            while asked < (now_s - start_s) * found.offered:
                tasks.create_task(one())
                asked += 1
            await asyncio.sleep(0.005)
    found.served = per_second(answered_s)


@contextlib.asynccontextmanager
async def _peak(processes: Sequence[psutil.Process]) -> AsyncIterator[list[int]]:
    """The most resident bytes of all together inside the block, sampled."""
    peak = [0]

    async def watch() -> None:
        while True:
            peak[0] = max(peak[0], sum(process.memory_info().rss for process in processes))
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    try:
        yield peak
    finally:
        watching.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="how long the load lasts")
    parser.add_argument("--small", action="store_true", help="a model of 5 M parameters instead of 29 M")
    parser.add_argument("--services", nargs="+", choices=typing.get_args(Name), default=typing.get_args(Name))
    options = parser.parse_args()
    verdicts: list[Verdict] = []
    figures: dict[str, Any] = {}
    for name in options.services:
        print(f"measuring the {name} service", flush=True)
        found = measure(name, seconds=options.seconds, larger=not options.small)
        figures[name] = found.figures()
        verdicts += [Verdict(verdict.held, f"{name}: {verdict.text}") for verdict in found.verdicts()]
    conclude("overload", verdicts, figures)


if __name__ == "__main__":
    main()

"""Online scoring: what callers wait for one score when so many ask at once, each again when it has its answer."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.outcome import Verdict
from bench.reward_servers import ONE_BY_ONE_SERVER, SERVICE, VLLM_SERVER, Ids, client, running

CONCURRENCIES = (1, 8, 64)
FEW = (1, 8)
"""Callers whose waits are judged: their own text, or little more, is what they wait for."""
WAIT_TARGET = 1.0
"""At most, of vLLM's p50 and p99."""
RATE_TARGET = 0.95
"""Of its texts/s, where many wait: each asks again when it has its answer, so that many are always in hand."""
_SECONDS = 8.0
_WARM_UP_S = 2.0
_ANSWERS = 3
"""To each caller at least, however long they take, and one before to warm up: a slow machine's batches take long."""


@dataclass
class Waits:
    """Seconds that each answer took, and how long was measured."""

    seconds: list[float] = field(default_factory=list)
    measured_s: float = 0.0

    @property
    def rate(self) -> float:
        """Texts a second."""
        return len(self.seconds) / self.measured_s

    def percentile_ms(self, percent: int) -> float:
        return 1000 * statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


Results = dict[str, dict[int, Waits]]
"""By server and concurrency."""


def measure(results: Results, model: Path, texts: Sequence[tuple[Ids, Ids]], *, dtype: str, rounds: int) -> None:
    """All servers are up, and take turns: the one-by-one server, which is far slower and not judged by, in one round.

    Breaking it off leaves in ``results`` what is finished.
    """
    names = (SERVICE, VLLM_SERVER, ONE_BY_ONE_SERVER)
    results.update({name: {count: Waits() for count in CONCURRENCIES} for name in names})
    with ExitStack() as stack:
        ports = {}
        for name in names:
            print(f"starting {name}", flush=True)
            ports[name] = stack.enter_context(running(name, model, dtype))[1]
        for number, count in itertools.product(range(rounds), CONCURRENCIES):
            taking = names if number == 0 else names[:2]
            for name in taking if number % 2 == 0 else reversed(taking):
                asyncio.run(_turn(name, ports[name], texts, count, results[name][count]))
            line = ", ".join(f"{name} {results[name][count].rate:,.1f}" for name in taking)
            print(f"round {number + 1}, {count:>3} at once: texts/s: {line}", flush=True)


async def _turn(name: str, port: int, texts: Sequence[tuple[Ids, Ids]], count: int, waits: Waits) -> None:
    async with client(name, port) as ask:
        warm_s = time.perf_counter() + _WARM_UP_S
        answers = 0
        begin_s = end_s = 0.0
        seconds: list[float] = []

        # Each text once before any comes again, for all callers together: a cache of texts is not what is measured.
        following = itertools.cycle(random.Random(count).sample(texts, len(texts)))

        async def caller() -> None:
            nonlocal answers, begin_s, end_s
            while not end_s:
                start_s = time.perf_counter()
                await ask([next(following)])
                now_s = time.perf_counter()
                answers += 1
                if not begin_s:  # Counted from one answer to another, so that the rate is true.
                    begin_s = now_s if now_s >= warm_s and answers >= count else 0.0
                elif not end_s:
                    seconds.append(now_s - start_s)
                    enough = now_s >= begin_s + _SECONDS and len(seconds) >= _ANSWERS * count
                    end_s = now_s if enough else 0.0

        await asyncio.gather(*(caller() for _ in range(count)))
    waits.seconds += seconds
    waits.measured_s += end_s - begin_s


def verdicts(results: Results) -> list[Verdict]:
    """Ours against vLLM's HTTP server, at each number of callers that both have been measured with."""
    found = []
    for count in CONCURRENCIES:
        ours, theirs = (results[name][count] if name in results else Waits() for name in (SERVICE, VLLM_SERVER))
        if not ours.seconds or not theirs.seconds:
            continue
        if count in FEW:
            for percent in (50, 99):
                ratio = ours.percentile_ms(percent) / theirs.percentile_ms(percent)
                text = f"{count} at once: p{percent} / {VLLM_SERVER}'s: {ratio:.2f}, target at most {WAIT_TARGET:.2f}"
                found.append(Verdict(ratio <= WAIT_TARGET, text))
        else:
            rate = ours.rate / theirs.rate
            text = f"{count} at once: texts/s / {VLLM_SERVER}'s: {rate:.2f}, target at least {RATE_TARGET:.2f}"
            found.append(Verdict(rate >= RATE_TARGET, text))
    return found


def table(results: Results) -> list[str]:
    found = [f"{'one text a request':<20}{'at once':>8}{'texts/s':>10}{'p50 ms':>10}{'p99 ms':>10}"]
    for count in CONCURRENCIES:
        for name, by_count in results.items():
            waits = by_count[count]
            if not waits.seconds:
                continue
            found.append(
                f"{name:<20}{count:>8}{waits.rate:>10,.1f}{waits.percentile_ms(50):>10,.0f}"
                f"{waits.percentile_ms(99):>10,.0f}"
            )
    return found

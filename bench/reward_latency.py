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

CONCURRENCIES = (1, 4, 16, 64)
TARGET = 0.95
"""Of its texts/s, where each caller asks again when it has its answer: so many in hand, so long they wait."""
_SECONDS = 8.0
_WARM_UP_S = 2.0


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


def measure(model: Path, texts: Sequence[tuple[Ids, Ids]], rounds: int) -> Results:
    """All servers are up, and take turns."""
    names = (SERVICE, VLLM_SERVER, ONE_BY_ONE_SERVER)
    results: Results = {name: {count: Waits() for count in CONCURRENCIES} for name in names}
    with ExitStack() as stack:
        ports = {}
        for name in names:
            print(f"starting {name}", flush=True)
            ports[name] = stack.enter_context(running(name, model))[1]
        for number, count in itertools.product(range(rounds), CONCURRENCIES):
            for name in names if number % 2 == 0 else reversed(names):
                asyncio.run(_turn(name, ports[name], texts, count, results[name][count]))
            line = ", ".join(f"{name} {results[name][count].rate:,.1f}" for name in names)
            print(f"round {number + 1}, {count:>3} at once: texts/s: {line}", flush=True)
    return results


async def _turn(name: str, port: int, texts: Sequence[tuple[Ids, Ids]], count: int, waits: Waits) -> None:
    async with client(name, port) as ask:
        begin_s = time.perf_counter() + _WARM_UP_S
        end_s = begin_s + _SECONDS

        # Each text once before any comes again, for all callers together: a cache of texts is not what is measured.
        following = itertools.cycle(random.Random(count).sample(texts, len(texts)))

        async def caller() -> None:
            while (start_s := time.perf_counter()) < end_s:
                await ask([next(following)])
                now_s = time.perf_counter()
                if begin_s <= now_s <= end_s:  # Counted by when they end, so that the rate is true.
                    waits.seconds.append(now_s - start_s)

        await asyncio.gather(*(caller() for _ in range(count)))
    waits.measured_s += _SECONDS


def verdicts(results: Results) -> list[Verdict]:
    """Ours against vLLM's HTTP server, at each number of callers."""
    found = []
    for count in CONCURRENCIES:
        ours, theirs = results[SERVICE][count], results[VLLM_SERVER][count]
        rate = ours.rate / theirs.rate
        p50, p99 = (ours.percentile_ms(percent) / theirs.percentile_ms(percent) for percent in (50, 99))
        found.append(
            Verdict(
                rate >= TARGET,
                f"{count} at once: texts/s / {VLLM_SERVER}'s: {rate:.2f}, target at least {TARGET:.2f}; p50 / its "
                f"{p50:.2f}, p99 / its {p99:.2f}",
            )
        )
    return found


def table(results: Results) -> list[str]:
    found = [f"{'one text a request':<20}{'at once':>8}{'texts/s':>10}{'p50 ms':>10}{'p99 ms':>10}"]
    for count in CONCURRENCIES:
        for name, by_count in results.items():
            waits = by_count[count]
            found.append(
                f"{name:<20}{count:>8}{waits.rate:>10,.1f}{waits.percentile_ms(50):>10,.0f}"
                f"{waits.percentile_ms(99):>10,.0f}"
            )
    return found

"""An engine whose work is measured: what runs and waits in it, how long completions and weight updates take.

And one that hangs is found out: it has something to do, and does nothing for longer than any step takes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import structlog
from prometheus_client import Gauge, Histogram

from quartet import tracing
from services.policy.engine import Engine, EngineFailedError, Generated, GenerationTask, InFlight, Piece
from services.runtime.telemetry import LATENCY_BUCKETS_S, QueueState, ServiceMetrics

log = structlog.get_logger()

_COMPLETION_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# A pause may be shorter than a decoding step, and a model of hundreds of gigabytes takes minutes.
_PAUSE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def watched(engine: Engine, metrics: ServiceMetrics, *, slots: int, timeout_s: float = math.inf) -> Engine:
    """``engine``, measured.

    Args:
        engine: what does the work.
        metrics: of the service.
        slots: completions that it generates at the same time; what is beyond them waits.
        timeout_s: longest that it may make no progress while it has completions or a weight update in hand, seen by
            ``check``.
    """
    watch = WatchedEngine(engine, metrics, slots=slots, timeout_s=timeout_s)
    metrics.queues.watch(watch)
    return cast(Engine, watch)


@dataclass(eq=False)
class _Watched:
    """A completion in the engine."""

    prompt_tokens: int
    start_s: float
    tokens: int = 0
    finish: str = ""


class WatchedEngine:
    """Hands everything on, and measures generations and updates. See ``watched``."""

    def __init__(self, engine: Engine, metrics: ServiceMetrics, *, slots: int, timeout_s: float) -> None:
        self._engine = engine
        self._slots = slots
        self._timeout_s = timeout_s
        self._updating = False
        self._progress: object = None
        self._progress_s = time.monotonic()
        # In order of arrival, in which both engines serve. Prometheus copies it, in a thread of its own.
        self._inside: dict[_Watched, None] = {}
        prefix = f"quartet_{metrics.service}"

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{prefix}_{name}", meaning, buckets=buckets, registry=metrics.registry)

        running = Gauge(
            f"{prefix}_engine_running", "Completions in the engine's slots; queue_items wait", registry=metrics.registry
        )
        running.set_function(lambda: min(len(self._inside), slots))
        Gauge(
            f"{prefix}_engine_silent_seconds",
            "Time without a token or a finished weight update while the engine has any to work on",
            registry=metrics.registry,
        ).set_function(lambda: time.monotonic() - self._progress_s if self._busy else 0.0)
        Gauge(f"{prefix}_engine_slots", "Completions that the engine generates at once", registry=metrics.registry).set(
            slots
        )
        self._seconds = histogram(
            "generation_seconds", "Time of a completion in the engine, waiting included", LATENCY_BUCKETS_S
        )
        self._first_seconds = histogram(
            "first_token_seconds", "Time to the first token of a streamed completion", LATENCY_BUCKETS_S
        )
        self._tokens = histogram("completion_tokens", "Tokens of a completion", _COMPLETION_BUCKETS)
        self._pause_seconds = histogram(
            "update_pause_seconds", "Time that generation paused for a weight update", _PAUSE_BUCKETS_S
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, task: GenerationTask) -> Generated:
        with self._watch(task) as (seen, task):
            generated = await self._engine.generate(task)
            seen.tokens, seen.finish = len(generated.token_ids), str(generated.finish)
            return generated

    async def stream(self, task: GenerationTask) -> AsyncGenerator[Piece, None]:
        with self._watch(task) as (seen, task):
            async with contextlib.aclosing(self._engine.stream(task)) as pieces:
                async for piece in pieces:
                    if not seen.tokens and piece.token_ids:
                        self._first_seconds.observe(time.monotonic() - seen.start_s)
                    seen.tokens += len(piece.token_ids)
                    seen.finish = str(piece.finish or "")
                    yield piece

    async def update_weights(self, safetensors: Path, version: int, in_flight: InFlight, wait_s: float) -> float:
        attributes: tracing.Attributes = {"quartet.weights_version": version, "quartet.in_flight": str(in_flight)}
        with tracing.span("update weights", attributes=attributes) as span:
            self._updating = True
            try:
                pause_s = await self._engine.update_weights(safetensors, version, in_flight, wait_s)
            finally:
                self._updating = False
            span.set({"quartet.pause_s": pause_s})
        self._pause_seconds.observe(pause_s)
        return pause_s

    async def check(self) -> None:
        """To be called every second or so.

        Raises:
            EngineFailedError: the engine is dead, or hangs.
        """
        await self._engine.check()
        now_s, progress = time.monotonic(), self._engine.progress
        if progress != self._progress or not self._busy:
            self._progress, self._progress_s = progress, now_s
        elif now_s - self._progress_s > self._timeout_s:
            reason = f"the engine hangs: it has done nothing for more than {self._timeout_s:g} s (engine_timeout_s)"
            log.error("engine_hangs", completions=len(self._inside), updating=self._updating)
            self._engine.give_up(reason)
            raise EngineFailedError(reason)

    @property
    def _busy(self) -> bool:
        return bool(self._inside) or self._updating

    @property
    def queue(self) -> QueueState:
        """What waits for a slot."""
        # list() of a dictionary is one step for other threads.
        waiting = list(itertools.islice(list(self._inside), self._slots, None))
        return QueueState(
            tokens=sum(one.prompt_tokens for one in waiting),
            items=len(waiting),
            held_bytes=0,
            oldest_s=time.monotonic() - waiting[0].start_s if waiting else 0.0,
        )

    @contextlib.contextmanager
    def _watch(self, task: GenerationTask) -> Iterator[tuple[_Watched, GenerationTask]]:
        """Counts and traces a completion as long as it is in the engine; measures it when it was finished.

        Gives the task with its place in the trace, where the engine's own spans belong.
        """
        seen = _Watched(len(task.prompt_ids), time.monotonic())
        self._inside[seen] = None
        try:
            with tracing.span("generate") as span:
                try:
                    yield seen, task if span is tracing.NO_SPAN else replace(task, trace=dict(span.metadata))
                finally:
                    if span is not tracing.NO_SPAN:
                        span.set(self._attributes(task, seen))
            self._seconds.observe(time.monotonic() - seen.start_s)
            self._tokens.observe(seen.tokens)
        finally:
            del self._inside[seen]

    def _attributes(self, task: GenerationTask, seen: _Watched) -> tracing.Attributes:
        """By the conventions for generative models where these have a name."""
        return {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.usage.input_tokens": seen.prompt_tokens,
            "gen_ai.usage.output_tokens": seen.tokens,
            "gen_ai.request.max_tokens": task.sampling.max_new_tokens,
            "gen_ai.request.temperature": task.sampling.temperature,
            "gen_ai.response.finish_reasons": [seen.finish or "unfinished"],
            "quartet.engine": self._engine.name,
            "quartet.engine_request_id": task.request_id,
        }

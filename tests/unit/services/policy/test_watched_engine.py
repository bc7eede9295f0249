"""What an engine does is measured: who runs, who waits, how long and how many tokens."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.policy.engine import EngineFailedError, GenerationFailedError, GenerationTask, InFlight, Sampling
from services.policy.watched_engine import watched
from services.runtime.telemetry import ServiceMetrics
from tests.unit.services.policy.scripted_engine import ScriptedEngine, until

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8, min_new_tokens=0, stop_token_ids=())


def task(number: int = 0, prompt_tokens: int = 3) -> GenerationTask:
    return GenerationTask(prompt_ids=[1] * prompt_tokens, sampling=SAMPLING, seed=0, request_id=f"r-{number}")


@dataclass
class Piece:
    token_ids: list[int]
    finish: str | None = None


@dataclass
class StreamingEngine(ScriptedEngine):
    closed: list[str] = field(default_factory=list)

    async def stream(self, task: GenerationTask) -> Any:
        try:
            for token_ids in ([], [4], [5, 6], []):
                await asyncio.sleep(0)
                yield Piece(token_ids)
        finally:
            self.closed.append(task.request_id)


@pytest.fixture
def value():
    metrics = ServiceMetrics("policy", batches=False)

    def read(name: str) -> float:
        return metrics.registry.get_sample_value(f"quartet_policy_{name}")

    read.metrics = metrics  # type: ignore[attr-defined]
    return read


async def test_those_beyond_the_slots_wait_by_age_and_their_prompts_are_the_queue(value):
    inner = ScriptedEngine()
    inner.gate.clear()
    engine = watched(inner, value.metrics, slots=2)
    running = [asyncio.create_task(engine.generate(task(i, prompt_tokens=10**i))) for i in range(4)]
    await until(lambda: inner.running == 4)
    assert (value("engine_running"), value("engine_slots"), value("queue_items")) == (2, 2, 2)
    assert value("queue_tokens") == 1100
    assert 0 < value("queue_oldest_seconds") < 5
    running[0].cancel()
    await until(lambda: inner.cancelled == 1)
    await asyncio.sleep(0)
    assert (value("engine_running"), value("queue_items"), value("queue_tokens")) == (2, 1, 1000)
    inner.gate.set()
    await asyncio.gather(*running[1:])
    assert (value("engine_running"), value("queue_items"), value("queue_oldest_seconds")) == (0, 0, 0)
    assert value("generation_seconds_count") == 3
    assert value("completion_tokens_sum") == 6


async def test_what_failed_is_in_the_engine_no_more_and_measures_nothing(value):
    async def fails(task: GenerationTask) -> Any:
        raise GenerationFailedError("odd")

    engine = watched(ScriptedEngine(answer=fails), value.metrics, slots=2)
    with pytest.raises(GenerationFailedError):
        await engine.generate(task())
    assert (value("engine_running"), value("generation_seconds_count")) == (0, 0)


async def test_a_stream_is_measured_to_its_first_token_and_closed_at_once(value):
    inner = StreamingEngine()
    engine: Any = watched(inner, value.metrics, slots=2)
    assert [piece.token_ids async for piece in engine.stream(task(1))] == [[], [4], [5, 6], []]
    assert (value("first_token_seconds_count"), value("completion_tokens_sum")) == (1, 3)
    pieces = engine.stream(task(2))
    await anext(pieces)
    assert value("engine_running") == 1
    await pieces.aclose()
    assert inner.closed == ["r-1", "r-2"]
    assert (value("engine_running"), value("generation_seconds_count")) == (0, 1)


async def test_the_pause_of_an_update_is_measured_and_all_else_is_the_engine_s_own(value, tmp_path):
    inner = ScriptedEngine(name="inner", vocab_size=77)
    engine = watched(inner, value.metrics, slots=2)
    from safetensors.torch import save_file
    from torch import zeros

    path = Path(tmp_path / "weights.safetensors")
    save_file({"a": zeros(1)}, path)
    assert await engine.update_weights(path, 4, InFlight.KEEP, 60.0) == 0.125
    assert (value("update_pause_seconds_count"), value("update_pause_seconds_sum")) == (1, 0.125)
    assert (engine.name, engine.vocab_size, inner.updates[0].version) == ("inner", 77, 4)
    await engine.check()


@pytest.mark.parametrize("work", ["completion", "update"])
async def test_an_engine_that_has_work_and_does_nothing_hangs(value, tmp_path, work):
    inner = ScriptedEngine()
    engine = watched(inner, value.metrics, slots=2, timeout_s=0.3)
    for _ in range(2):  # Without work it has nothing to do.
        await asyncio.sleep(0.4)
        await engine.check()
    inner.gate.clear()
    inner.update_gate.clear()
    if work == "completion":
        begun: asyncio.Task[object] = asyncio.create_task(engine.generate(task()))
        await until(lambda: inner.running == 1)
    else:
        begun = asyncio.create_task(engine.update_weights(tmp_path / "w", 1, InFlight.KEEP, 60.0))
        await inner.update_begun.wait()
    for step in range(3):  # With work it has all the time that it wants, as long as it gets on.
        await asyncio.sleep(0.4)
        inner.progress = step + 1
        await engine.check()
    await asyncio.sleep(0.4)
    assert value("engine_silent_seconds") > 0.3
    reason = "the engine hangs: it has done nothing for more than 0.3 s (engine_timeout_s)"
    with pytest.raises(EngineFailedError, match=re.escape(reason)):
        await engine.check()
    assert inner.given_up == reason
    begun.cancel()
    await asyncio.gather(begun, return_exceptions=True)
    assert value("engine_silent_seconds") == 0


async def test_an_engine_may_take_as_long_as_it_likes_where_nobody_set_a_limit(value):
    inner = ScriptedEngine()
    inner.gate.clear()
    engine = watched(inner, value.metrics, slots=2)
    begun = asyncio.create_task(engine.generate(task()))
    await until(lambda: inner.running == 1)
    for _ in range(3):
        await asyncio.sleep(0.1)
        await engine.check()
    inner.gate.set()
    await begun

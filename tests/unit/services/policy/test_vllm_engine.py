"""A weight update of the vLLM engine before a stand-in for AsyncLLM: what is fatal, and what only took too long."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from services.policy import vllm_engine
from services.policy.config import PolicySettings
from services.policy.engine import EngineFailedError, InFlight, StillRunningError
from services.policy.vllm_engine import VllmEngine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


class Llm:
    """Notes what it is told; methods named in ``wrong`` fail, and ``at_rest`` says when a pause is over."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.wrong: set[str] = set()
        self.at_rest = asyncio.Event()
        self.errored = False

    def __getattr__(self, name: str) -> Any:
        async def called(*_: Any, **options: Any) -> None:
            self.told.append(name)
            if name in self.wrong:
                raise RuntimeError(f"{name} went wrong")
            if name == "pause_generation":
                await self.at_rest.wait()

        return called


@pytest.fixture
def engine(monkeypatch, tmp_path) -> VllmEngine:
    monkeypatch.setattr(vllm_engine, "_set_environment", lambda settings: None)
    engine = VllmEngine(tmp_path, PolicySettings(model=str(tmp_path)))
    engine._llm = Llm()
    return engine


WEIGHTS = Path("weights.safetensors")


async def test_requests_that_do_not_finish_in_time_leave_the_old_weights_serving_and_the_next_update_is_taken(engine):
    with pytest.raises(StillRunningError, match="did not come to rest within 0 s"):
        await engine.update_weights(WEIGHTS, 4, InFlight.FINISH, 0.05)
    assert engine._llm.told == ["pause_generation", "resume_generation"]
    await engine.check()
    assert engine.version == 0
    engine._llm.at_rest.set()
    assert await engine.update_weights(WEIGHTS, 4, InFlight.FINISH, 5.0) < 5
    assert engine._llm.told[2:] == [
        "pause_generation",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "resume_generation",
    ]
    assert engine.version == 4


async def test_an_adapter_that_takes_long_is_waited_for_no_longer_than_asked(engine):
    async with engine._control:
        with pytest.raises(StillRunningError, match="an adapter was still being loaded"):
            await engine.update_weights(WEIGHTS, 4, InFlight.KEEP, 0.05)
    assert engine._llm.told == []
    engine._llm.at_rest.set()
    await engine.update_weights(WEIGHTS, 4, InFlight.KEEP, 5.0)


@pytest.mark.parametrize("wrong", ["start_weight_update", "update_weights", "finish_weight_update"])
async def test_what_breaks_once_the_weights_change_is_fatal(engine, wrong):
    engine._llm.at_rest.set()
    engine._llm.wrong = {wrong}
    with pytest.raises(EngineFailedError, match=f"the update to version 4 broke off: RuntimeError: {wrong} went wrong"):
        await engine.update_weights(WEIGHTS, 4, InFlight.KEEP, 5.0)
    with pytest.raises(EngineFailedError):
        await engine.check()


async def test_an_engine_that_can_neither_pause_nor_go_on_is_dead(engine):
    engine._llm.wrong = {"pause_generation", "resume_generation"}
    with pytest.raises(EngineFailedError, match="died, or does not answer"):
        await engine.update_weights(WEIGHTS, 4, InFlight.KEEP, 5.0)
    with pytest.raises(EngineFailedError):
        await engine.check()

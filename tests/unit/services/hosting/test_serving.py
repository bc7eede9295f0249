"""What both forward-pass services do with threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from services.hosting.serving import in_own_thread


async def test_what_loads_a_model_has_a_thread_that_ends_with_it() -> None:
    def load(name: str) -> tuple[str, threading.Thread]:
        return f"{name} is loaded", threading.current_thread()

    said, thread = await in_own_thread(load, "it")
    assert said == "it is loaded"
    assert thread is not threading.current_thread()
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()


async def test_what_goes_wrong_in_it_is_told() -> None:
    def load() -> None:
        raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        await in_own_thread(load)

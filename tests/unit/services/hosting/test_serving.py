"""What both forward-pass services do with threads and with messages."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from quartet.common.v1 import common_pb2
from services.hosting import serving
from services.hosting.serving import ItemRefusedError, chat_text, in_own_thread, turns_of


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


class ExitError(Exception):
    """Instead of the end of the process."""


@pytest.fixture
def exits(monkeypatch):
    def exit_at_once(code: int) -> None:
        raise ExitError(code)

    monkeypatch.setattr(serving.os, "_exit", exit_at_once)


async def test_threads_that_end_within_the_grace_period_are_waited_for(exits, monkeypatch) -> None:
    monkeypatch.setattr(serving, "_LEAST_END_S", 0.01)
    runtime = SimpleNamespace(name="reward", ends_s=time.monotonic() + 60)
    ended: list[str] = []

    def close() -> None:
        time.sleep(0.3)
        ended.append("model")

    with capture_logs() as logs:
        assert await serving.end_in_grace(runtime, asyncio.to_thread(close), 1) == 1
    assert (ended, logs) == (["model"], [])


async def test_a_thread_that_does_not_end_is_left_behind_with_the_code_of_the_service(exits, monkeypatch) -> None:
    monkeypatch.setattr(serving, "_LEAST_END_S", 0.2)
    runtime = SimpleNamespace(name="reward", ends_s=time.monotonic() - 1)
    stuck = threading.Event()
    try:
        with capture_logs() as logs, pytest.raises(ExitError, match="7"):
            await serving.end_in_grace(runtime, asyncio.to_thread(stuck.wait, 60), 7)
    finally:
        stuck.set()
    assert logs == [{"event": "thread_left_hanging", "log_level": "error", "service": "reward", "exit_code": 7}]


def test_a_chat_of_too_many_messages_is_refused_before_anything_is_made_of_them(tokenizer) -> None:
    message = common_pb2.ChatMessage(role="user", content="a")
    assert turns_of([message] * 16_384) == [{"role": "user", "content": "a"}] * 16_384
    many = common_pb2.ChatMessages(messages=[common_pb2.ChatMessage()] * 16_385).messages
    for make in (turns_of, lambda messages: chat_text(tokenizer, messages)):
        with pytest.raises(ItemRefusedError, match="prompt has 16385 messages, at most 16384 are taken"):
            make(many)

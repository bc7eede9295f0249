"""An engine without a model: a test says when and how each completion and each weight update ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from services.policy.adapter_config import AdapterConfig
from services.policy.engine import EngineFailedError, Finish, Generated, GenerationTask, InFlight, Piece


def generated(
    task: GenerationTask,
    *,
    token_ids: list[int] | None = None,
    logprobs: list[float] | None = None,
    finish: Finish = Finish.LENGTH,
    version_spans: list[tuple[int, int]] | None = None,
) -> Generated:
    """What the engine answers unless told otherwise: tokens by which prompt and seed can be told again."""
    token_ids = [task.seed % 293, sum(task.prompt_ids) % 293] if token_ids is None else token_ids
    return Generated(
        token_ids=token_ids,
        logprobs=[-0.25 * (i + 1) for i in range(len(token_ids))] if logprobs is None else logprobs,
        finish=finish,
        version_spans=[(0, len(token_ids))] if version_spans is None else version_spans,
        start_unix_ns=1_000,
        end_unix_ns=2_000,
    )


async def at_once(task: GenerationTask) -> Generated:
    return generated(task)


@dataclass
class AppliedUpdate:
    """What the engine was told to load, read from the staged file at the moment it was told."""

    version: int
    in_flight: InFlight
    folder: Path
    tensors: dict[str, torch.Tensor]


@dataclass
class LoadedAdapter:
    """What the engine was told to hold ready, and PEFT's configuration that lay beside it."""

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    written: dict[str, Any]


@dataclass
class ScriptedEngine:
    """Implements services.policy.engine.Engine. ``gate`` closed holds every completion; ``update_gate``, updates."""

    name: str = "scripted"
    vocab_size: int = 300
    max_sequence_tokens: int = 128
    max_temperature: float = 2.0
    dtype: str = "float32"
    answer: Callable[[GenerationTask], Awaitable[Generated]] = at_once
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    update_gate: asyncio.Event = field(default_factory=asyncio.Event)
    update_begun: asyncio.Event = field(default_factory=asyncio.Event)
    update_error: Exception | None = None
    update_wait_s: float = 0.0
    pieces: Callable[[GenerationTask], AsyncGenerator[Piece, None]] | None = None
    progress: object = 0
    given_up: str = ""
    tasks: list[GenerationTask] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    updates: list[AppliedUpdate] = field(default_factory=list)
    adapter_modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    adapters: dict[int, LoadedAdapter] = field(default_factory=dict)
    adapter_gate: asyncio.Event = field(default_factory=asyncio.Event)
    adapter_error: Exception | None = None

    def __post_init__(self) -> None:
        self.gate.set()
        self.update_gate.set()
        self.adapter_gate.set()

    async def start(self) -> None:
        """There is nothing to load."""

    async def generate(self, task: GenerationTask) -> Generated:
        self.tasks.append(task)
        self.running += 1
        try:
            await self.gate.wait()
            return await self.answer(task)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def stream(self, task: GenerationTask) -> AsyncGenerator[Piece, None]:
        """What ``pieces`` yields, or else the answer token by token."""
        self.tasks.append(task)
        self.running += 1
        ended = False
        try:
            await self.gate.wait()
            async for piece in self.pieces(task) if self.pieces is not None else self._by_token(task):
                ended = piece.finish is not None
                yield piece
        finally:
            self.running -= 1
            self.cancelled += not ended

    async def _by_token(self, task: GenerationTask) -> AsyncGenerator[Piece, None]:
        whole = await self.answer(task)
        for token, logprob in zip(whole.token_ids, whole.logprobs, strict=True):
            yield Piece(token_ids=[token], logprobs=[logprob], version_spans=[(0, 1)])
        yield Piece(token_ids=[], logprobs=[], version_spans=[], finish=whole.finish)

    async def update_weights(self, safetensors: Path, version: int, in_flight: InFlight, wait_s: float) -> float:
        self.update_wait_s = wait_s
        self.update_begun.set()
        await self.update_gate.wait()
        if self.update_error is not None:
            raise self.update_error
        # Read now and not before, as an engine does: the file must still be there.
        self.updates.append(AppliedUpdate(version, in_flight, safetensors.parent, load_file(safetensors)))
        return 0.125

    async def load_adapter(self, number: int, safetensors: Path, config: AdapterConfig) -> None:
        await self.adapter_gate.wait()
        if self.adapter_error is not None:
            raise self.adapter_error
        written = json.loads((safetensors.parent / "adapter_config.json").read_text())
        self.adapters[number] = LoadedAdapter(config, load_file(safetensors), written)

    async def unload_adapter(self, number: int) -> None:
        await self.adapter_gate.wait()
        del self.adapters[number]

    async def check(self) -> None:
        if isinstance(self.update_error, EngineFailedError):
            raise self.update_error

    def give_up(self, reason: str) -> None:
        self.given_up = reason

    async def stop(self) -> None:
        """There is nothing to end."""


async def until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Returns when it is true, and fails when it does not become so."""
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.005)

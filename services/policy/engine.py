"""What the service needs of a generation engine. Knows no model library."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from services.policy.adapter_config import AdapterConfig


class Finish(StrEnum):
    """Why a completion ended: an end or stop token, the length, or a weight update that aborted it."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


class InFlight(StrEnum):
    """What a weight update does to requests in flight."""

    KEEP = "keep"
    FINISH = "finish"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy, ``top_k`` 0 keeps all, ``stop_token_ids`` include the model's own.

    ``logit_bias``: (token, what is added to its logit) before anything else. Stop strings are not here: the engine
    knows no text, and the service looks for them in what ``stream`` yields.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    min_new_tokens: int
    stop_token_ids: tuple[int, ...]
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTask:
    """One completion to sample. The same seed gives the same draws, whatever else is in flight.

    ``adapter``: number of the loaded adapter to sample with, 0 for the base model alone. ``trace``: headers that name
    the place in a trace where it belongs.
    """

    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    request_id: str
    adapter: int = 0
    trace: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One finished completion: T token ids, their T natural-log probabilities under the distribution sampled from,
    and (version, tokens) spans that add up to T."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish
    version_spans: list[tuple[int, int]]
    start_unix_ns: int
    end_unix_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next tokens of a completion, with what ``Generated`` says of tokens; ``finish`` is set in the last piece."""

    token_ids: list[int]
    logprobs: list[float]
    version_spans: list[tuple[int, int]]
    finish: Finish | None = None


def cut_spans(spans: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The (version, tokens) spans of the tokens [start, end) of a completion with these ``spans``."""
    cut: list[tuple[int, int]] = []
    position = 0
    for version, count in spans:
        inside = min(end, position + count) - max(start, position)
        if inside > 0:
            cut.append((version, inside))
        position += count
    return cut


class EngineFailedError(Exception):
    """The engine died or holds mixed weights: it must not answer again, the process has to be started anew."""


class StillRunningError(Exception):
    """A weight update waited in vain for the requests in flight: nothing has changed, the old weights go on serving."""


class GenerationFailedError(Exception):
    """One completion failed; the engine goes on, and the same task may succeed later."""


class GenerationRefusedError(Exception):
    """The engine takes no such task, now or later; the message says why."""


class AdapterRefusedError(Exception):
    """The engine does not take this adapter; the message says why. Nothing of it stays loaded."""


class Engine(Protocol):
    """A generation engine. All coroutines run on one event loop."""

    name: str
    vocab_size: int
    max_sequence_tokens: int
    max_temperature: float
    dtype: str
    adapter_modules: Mapping[str, tuple[int, int]]
    """(in, out) features of the linear layers that an adapter may change; empty while LoRA is off."""

    @property
    def progress(self) -> object:
        """Unequal to what it was when a token has been sampled since, or the weights replaced."""
        ...

    async def start(self) -> None:
        """Loads the model and warms up, so that the first request is as fast as the next.

        Raises:
            StartError: it cannot; the message says why.
        """
        ...

    async def generate(self, task: GenerationTask) -> Generated:
        """One completion. Cancelling the coroutine frees its slot at once.

        Raises:
            GenerationFailedError: this one failed.
            GenerationRefusedError: no such task is taken.
            EngineFailedError: the engine died.
        """
        ...

    def stream(self, task: GenerationTask) -> AsyncGenerator[Piece, None]:
        """The same completion in pieces as its tokens are sampled; the last one has ``finish``, and may have no tokens.

        Who reads slower than the engine samples gets larger pieces. Closing the generator frees the slot at once.

        Raises:
            GenerationFailedError: this one failed.
            GenerationRefusedError: no such task is taken.
            EngineFailedError: the engine died.
        """
        ...

    async def update_weights(self, safetensors: Path, version: int, in_flight: InFlight, wait_s: float) -> float:
        """Replaces all weights by those of the file, whose names and shapes were checked; returns the pause in seconds.

        ``wait_s``: longest that it waits for requests in flight to finish or pause.

        Raises:
            StillRunningError: they had not by then.
            EngineFailedError: it went wrong in the middle; the weights are no longer known.
        """
        ...

    async def load_adapter(self, number: int, safetensors: Path, config: AdapterConfig) -> None:
        """Holds an adapter ready under a positive number that was never used; the file may go afterwards.

        Names and shapes of its tensors were checked against ``adapter_modules``; ``adapter_config.json`` in PEFT's form
        lies beside it.

        Raises:
            AdapterRefusedError: it does not fit.
            EngineFailedError: the engine died.
        """
        ...

    async def unload_adapter(self, number: int) -> None:
        """Forgets an adapter that no new task names, once the tasks that run with it have left.

        Raises:
            EngineFailedError: the engine died.
        """
        ...

    async def check(self) -> None:
        """Raises EngineFailedError when the engine is dead."""
        ...

    def give_up(self, reason: str) -> None:
        """The engine hangs: whoever waits for a completion gets EngineFailedError with ``reason``, and who comes."""
        ...

    async def stop(self) -> None:
        """Ends the engine and its processes. Returns when they have ended: a thread that hangs never does."""
        ...

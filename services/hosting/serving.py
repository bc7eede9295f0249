"""The life of a forward-pass service, from settings to exit code; and pieces of its servicers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jinja2
import structlog
from pydantic import Field

from quartet import tracing
from quartet.common.v1 import common_pb2
from quartet.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from services.runtime import calls
from services.runtime.batcher import BatchLimits
from services.runtime.config import ServiceSettings
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError
from services.runtime.server import ServiceRuntime
from services.runtime.telemetry import ServiceMetrics

log = structlog.get_logger()

# What threads have to end in, however much of the grace period was used.
_LEAST_END_S = 3.0
# Most items of a request, unless told otherwise.
MAX_REQUEST_ITEMS = 16_384
# Most messages of a chat: each becomes a dict, which takes a hundred times as much as an empty one on the wire.
_MOST_MESSAGES = 16_384
# Replies of fewer items take less time than to hand them to a thread and back may.
_SHORT_REPLY = 256
# Sizes of requests up to, in bytes, and the threads that read them. A MiB of text may take a second.
_READERS = ((2**18, 4), (2**22, 2), (math.inf, 1))

Made = TypeVar("Made")

_OK = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)


class ForwardSettings(ServiceSettings):
    """Settings of a service that runs forward passes."""

    max_batch_tokens: NonNegativeInt = Field(
        0,
        description="most tokens of a model batch, with its padding where the model needs any; "
        "0: 4,096 on a processor, 16,384 on a GPU",
    )
    max_batch_items: PositiveInt = Field(256, description="most sequences of a model batch")
    max_queued_tokens: PositiveInt = Field(
        4_000_000, description="most tokens waiting; a request that would exceed it is refused whole"
    )
    max_held_mib: PositiveInt = Field(
        256, description="most MiB of requests in hand; a request that would exceed it is refused before any work"
    )
    max_queue_s: PositiveFloat = Field(
        120.0,
        description="most seconds of work that may wait, by the speed measured so far; a request that would exceed it "
        "is refused whole and told when to come back. Online: what a caller may wait",
    )
    max_request_items: PositiveInt = Field(
        MAX_REQUEST_ITEMS, description="most items of a request; a longer one is refused before any work"
    )
    max_wait_s: NonNegativeFloat = Field(
        2.0, description="seconds after which the oldest item waiting begins every second batch, out of turn"
    )
    batch_timeout_s: NonNegativeFloat = Field(
        300.0,
        description="seconds after which a batch that is not done never will be: who waits is told, and the service "
        "exits 1 to be started anew; 0: no limit",
    )
    threads: NonNegativeInt = Field(0, description="processor threads of the model; 0: as many as torch chooses")

    def batch_limits(self, device: str, *, padded: bool) -> BatchLimits:
        """Budgets of the batcher; in deterministic mode every item is a batch of its own.

        Args:
            device: type of the model's device. A processor is as fast with a few thousand tokens as with many, and
                who comes while a batch is in hand waits the less for it the smaller it is.
            padded: whether the model's batches are.
        """
        return BatchLimits(
            padded=padded,
            max_batch_tokens=self.max_batch_tokens or (4096 if device == "cpu" else 16384),
            max_batch_items=1 if self.deterministic else self.max_batch_items,
            max_queued_tokens=self.max_queued_tokens,
            max_held_bytes=self.max_held_mib * 2**20,
            max_queue_s=self.max_queue_s,
            max_wait_s=self.max_wait_s,
            max_batch_s=self.batch_timeout_s or math.inf,
        )


def ok() -> common_pb2.ItemStatus:
    return _OK


def invalid(reason: str) -> common_pb2.ItemStatus:
    return common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_INVALID, reason=reason)


def failed(reason: str, retryable: bool) -> common_pb2.ItemStatus:
    if not retryable:
        return invalid(reason)
    return common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_RETRYABLE, reason=reason)


class ItemRefusedError(Exception):
    """One item can't be used; the message says why and becomes its status."""


def chat_text(tokenizer: Any, messages: Sequence[common_pb2.ChatMessage]) -> str:
    """The prompt that the model's own chat template makes of ``messages``.

    Raises:
        ItemRefusedError: there is no template, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ItemRefusedError("prompt is messages, but the model's tokenizer has no chat template: send text")
    try:
        text: str = tokenizer.apply_chat_template(turns_of(messages), tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise ItemRefusedError(f"the model's chat template refuses the messages of prompt: {error}") from error
    return text


def turns_of(messages: Sequence[common_pb2.ChatMessage]) -> list[dict[str, str]]:
    """``messages`` as chat templates and Python functions want them.

    Raises:
        ItemRefusedError: there are too many.
    """
    if len(messages) > _MOST_MESSAGES:
        raise ItemRefusedError(f"prompt has {len(messages)} messages, at most {_MOST_MESSAGES} are taken")
    return [{"role": message.role, "content": message.content} for message in messages]


def require_items(count: int, most: int) -> None:
    """Refuses an empty list, and one of more than ``most`` items: an item of two bytes costs us hundreds."""
    if count == 0:
        raise InvalidArgumentError("items is empty: send at least one", field="items")
    if count > most:
        raise InvalidArgumentError(
            f"items has {count} items, a request may have {most} (max_request_items); split it",
            field="items",
            refused_as="too_large",
        )


def require_same_tokenizer(sent: str, ours: str) -> None:
    """Refuses token ids of another tokenizer, and token ids that do not say whose they are."""
    if not sent:
        raise InvalidArgumentError(
            "tokenizer_fingerprint is empty: token ids are accepted only with the fingerprint of the tokenizer that "
            "made them (GetModelInfo tells this service's)",
            field="tokenizer_fingerprint",
        )
    if sent != ours:
        raise FailedPreconditionError(
            f"tokenizer_fingerprint is {sent[:12]}..., this service's tokenizer is {ours[:12]}...: "
            "the token ids mean something else here; send text instead",
            field="tokenizer_fingerprint",
        )


async def make_reply(make: Callable[[], Made], *, items: int) -> Made:
    """What ``make`` gives for so many items, without holding up the event loop, and with it every health check."""
    return make() if items <= _SHORT_REPLY else await asyncio.to_thread(make)


def count_items(metrics: ServiceMetrics, statuses: Iterable[common_pb2.ItemStatus]) -> None:
    """Counts the items of a reply by status."""
    for code, count in Counter(status.code for status in statuses).items():
        metrics.items.labels(common_pb2.ItemStatusCode.Name(code)).inc(count)


class Readers:
    """Threads in which requests are read: made into tokens, and checked. Tokenising holds no lock of the interpreter.

    Large requests have threads of their own, and so do very large ones: they don't hold up the small.
    """

    def __init__(self) -> None:
        self._pools = [(most, ThreadPoolExecutor(threads, "read")) for most, threads in _READERS]

    async def read(self, work: Callable[[], Made], *, size_bytes: int) -> Made:
        """What ``work`` gives, for a request of ``size_bytes``."""
        pool = next(pool for most, pool in self._pools if size_bytes <= most)
        return await asyncio.get_running_loop().run_in_executor(pool, work)


async def in_own_thread(work: Callable[..., Made], *arguments: Any) -> Made:
    """What ``work`` gives, in a thread that ends with it: so is a model loaded and warmed up.

    OpenMP gives each thread that computes a team, which stays as long as the thread, and lets teams wait for their next
    work the less readily the more of them there are: one left behind by a pool's thread slows the model's own for good.
    """
    # Not asyncio's: a loop that ends waits for the threads of that one, and loading can't be interrupted.
    pool = ThreadPoolExecutor(1, "load")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
    finally:
        pool.shutdown(wait=False)


def ending(runtime: ServiceRuntime) -> Callable[[str], None]:
    """What ends the service when its model is dead, from any thread: a supervisor starts it anew, its port is free."""
    loop = asyncio.get_running_loop()

    def end(reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: the service has ended.
            loop.call_soon_threadsafe(runtime.stop, reason)

    return end


async def end_in_grace(runtime: ServiceRuntime, closing: Awaitable[None], code: int) -> int:
    """Waits until ``closing`` has ended the service's threads, for what is left of its grace period; then ``code``.

    Exits with it at once where one does not end: no thread can be ended from outside, and Python, as it ends, waits for
    some and crashes in others.
    """
    try:
        async with asyncio.timeout(max(_LEAST_END_S, runtime.ends_s - time.monotonic())):
            await closing
    except TimeoutError:
        log.error("thread_left_hanging", service=runtime.name, exit_code=code)
        tracing.stop()
        sys.stderr.flush()
        os._exit(code)
    return code


class WorkClock:
    """Measures when the model worked for a reply: from queueing to result."""

    def __init__(self) -> None:
        self.start_unix_ns = time.time_ns()

    def stop(self) -> common_pb2.WorkInterval:
        return common_pb2.WorkInterval(start_unix_ns=self.start_unix_ns, end_unix_ns=time.time_ns())


def caller(context: Any) -> Hashable:
    """Whose turns a call takes, and whose share of the queue: who shows a certificate or token, else a connection."""
    identity = calls.identity_of(context)
    peer: str = context.peer()
    return identity if any(identity) else peer


def time_remaining_s(context: Any) -> float | None:
    """Seconds until the client's deadline, None without one."""
    remaining: float | None = context.time_remaining()
    return remaining

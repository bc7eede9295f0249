"""Many requests with one item each, sent to the reward service as few calls with many.

There is no timer: what comes while calls are under way waits, and goes with the next one as soon as one of them is
back. A lone request is sent at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from quartet.client import ItemFailure, Score, ScoreItem, Scores, ServedBy, Truncation
from quartet.client.channel import request_ids
from quartet.client.errors import InvalidInputError
from services.gateway.metrics import GatewayMetrics

log = structlog.get_logger()

# So that one call is being read or written while the service works on another.
_CALLS = 2
_MOST_ITEMS = 256
_MOST_CHARACTERS = 2**20


@dataclass(frozen=True)
class Options:
    """What all items of a call have in common."""

    normalise: bool = False
    truncation: Truncation = Truncation.REFUSE
    head_weights: tuple[tuple[str, float], ...] = ()


Send = Callable[[Sequence[ScoreItem], Options], Awaitable[Scores]]


@dataclass(eq=False)
class _Waiting:
    item: ScoreItem
    request_id: str
    answer: asyncio.Future[tuple[Score | ItemFailure, ServedBy]]


class Coalescer:
    """Scores single items."""

    def __init__(self, send: Send, metrics: GatewayMetrics) -> None:
        self._send = send
        self._metrics = metrics
        self._waiting: dict[Options, deque[_Waiting]] = {}
        self._calls: dict[Options, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def score(self, item: ScoreItem, options: Options, request_id: str) -> tuple[Score | ItemFailure, ServedBy]:
        """The item's result, and who gave it. Whoever is cancelled while it waits takes its item back.

        Raises:
            QuartetError: the call that it was sent with failed.
        """
        waiting = _Waiting(item, request_id, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(options, deque()).append(waiting)
        self._count()
        if self._calls.get(options, 0) < _CALLS:
            self._calls[options] = self._calls.get(options, 0) + 1
            task = asyncio.create_task(self._work(options))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            return await waiting.answer
        finally:
            if not waiting.answer.done():
                waiting.answer.cancel()

    @property
    def waiting(self) -> int:
        """Items that are not sent yet."""
        return sum(map(len, self._waiting.values()))

    async def _work(self, options: Options) -> None:
        """Sends what waits, call after call, until nothing does."""
        try:
            while batch := self._take(options):
                await self._call(batch, options)
        finally:
            self._calls[options] -= 1
            if not self._calls[options]:
                del self._calls[options]
            if not self._waiting.get(options):
                self._waiting.pop(options, None)
            self._count()

    def _take(self, options: Options) -> list[_Waiting]:
        queue, batch, characters = self._waiting.get(options, deque()), list[_Waiting](), 0
        while queue and len(batch) < _MOST_ITEMS and characters < _MOST_CHARACTERS:
            waiting = queue.popleft()
            if not waiting.answer.done():  # Else its caller has left.
                batch.append(waiting)
                characters += _characters(waiting.item)
        self._count()
        return batch

    async def _call(self, batch: Sequence[_Waiting], options: Options) -> None:
        call = asyncio.create_task(self._scores(batch, options))
        left = len(batch)

        def leave(answer: asyncio.Future[Any]) -> None:
            nonlocal left
            left -= 1
            if not left:  # Nobody waits for it any more, or all have their answers.
                call.cancel()

        for waiting in batch:
            waiting.answer.add_done_callback(leave)
        try:
            await asyncio.wait({call})
        finally:
            call.cancel()
        if call.cancelled():
            return
        error = call.exception()
        if error is None:
            scores = call.result()
            for waiting, result in zip(batch, scores.results, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result((result, scores.served_by))
        elif isinstance(error, InvalidInputError) and len(batch) > 1:
            # One of them may be to blame, and the others are not to suffer for it.
            for waiting in batch:
                if not waiting.answer.done():
                    await self._call([waiting], options)
        else:
            # Whatever it is: its callers are told, and others wait for this task to go on.
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)

    async def _scores(self, batch: Sequence[_Waiting], options: Options) -> Scores:
        self._metrics.joined_items.observe(len(batch))
        if len(batch) > 1:
            log.debug("requests_joined", request_ids=[waiting.request_id for waiting in batch])
        # The service's log names the first; the line above says who came along.
        with request_ids(batch[0].request_id):
            return await self._send([waiting.item for waiting in batch], options)

    def _count(self) -> None:
        self._metrics.waiting_items.set(self.waiting)


def _characters(item: ScoreItem) -> int:
    prompt = item.prompt
    size = len(prompt) if isinstance(prompt, str) else sum(len(str(turn)) for turn in prompt)
    return size + len(item.response)

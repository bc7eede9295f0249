"""Requests by the name that the client gave them, so that one that is tried again does not run twice."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.runtime.errors import InvalidArgumentError

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class KeepLimits:
    """Bounds of what is kept for a retry: how many requests that nobody waits for, bytes of results of all, and seconds
    since the last call left. ``count`` 0 keeps nothing, and does not tell a retry from a new request."""

    count: int = 1024
    max_bytes: int = 64 * 2**20
    age_s: float = 300.0


@dataclass
class _Entry(Generic[R]):
    request: R
    content: bytes
    held_bytes: int = 0
    left_s: float | None = None  # When the last call left; None while there is one.


class KeptRequests(Generic[R]):
    """What was done for each request id. Forgets the longest unused first; one that a call waits for is never
    forgotten, unless it alone outgrows the bytes."""

    def __init__(self, limits: KeepLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        # Those that nobody waits for stand in the order in which they were left.
        self._entries: OrderedDict[str, _Entry[R]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_bytes(self) -> int:
        """Bytes of everything kept."""
        return self._bytes

    def find(self, request_id: str, content: bytes) -> R | None:
        """The request of that id, in use again until ``leave``; None when it is new.

        Raises:
            InvalidArgumentError: the id stands for other content.
        """
        self._forget_old()
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        if entry.content != content:
            raise InvalidArgumentError(
                f"request_id is {request_id!r}, which stands for a request of other content: a retry repeats its "
                "request exactly, and a new request takes a new id",
                field="request_id",
            )
        entry.left_s = None
        return entry.request

    def add(self, request_id: str, content: bytes, request: R) -> None:
        """Keeps a new request; the id is free, as ``find`` has said."""
        if self.limits.count:
            self._entries[request_id] = _Entry(request, content)
            self._forget_old()

    def grow(self, request_id: str, request: R, count: int) -> bool:
        """Counts bytes of results. False when the request is not kept any more, such as for these bytes."""
        entry = self._entries.get(request_id)
        if entry is None or entry.request is not request:
            return False
        entry.held_bytes += count
        self._bytes += count
        if entry.held_bytes > self.limits.max_bytes:
            self._drop(request_id)
            return False
        self._forget_old()
        return True

    def leave(self, request_id: str, request: R) -> None:
        """The last call left: from now on it grows old."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.request is request:
            entry.left_s = self._clock()
            self._entries.move_to_end(request_id)
            self._forget_old()

    def forget(self, request_id: str, request: R) -> None:
        """As if it had never been."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.request is request:
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self._bytes -= self._entries.pop(request_id).held_bytes

    def _forget_old(self) -> None:
        oldest_s = self._clock() - self.limits.age_s
        left = [(name, entry.left_s) for name, entry in self._entries.items() if entry.left_s is not None]
        over = len(left) - self.limits.count
        for place, (name, left_s) in enumerate(left):
            if left_s > oldest_s and place >= over and self._bytes <= self.limits.max_bytes:
                return
            self._drop(name)

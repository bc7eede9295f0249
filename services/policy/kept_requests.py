"""Requests by caller and the name that it gave them, so that one that is tried again does not run twice."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from services.runtime.calls import Identity
from services.runtime.errors import InvalidArgumentError

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class KeepLimits:
    """Bounds of what is kept for a retry: how many requests that nobody waits for, bytes of results of all, and seconds
    since the last call left. ``count`` 0 keeps nothing, and does not tell a retry from a new request."""

    count: int = 1024
    max_bytes: int = 64 * 2**20
    age_s: float = 300.0


class RequestName(NamedTuple):
    """The id of a request among those of its caller; nobody meets another's. See ``calls.identity_of``."""

    caller: Identity
    request_id: str


@dataclass
class _Entry(Generic[R]):
    request: R
    content: bytes
    held_bytes: int = 0
    left_s: float = 0.0  # When the last call left.


class KeptRequests(Generic[R]):
    """What was done for each name. Forgets the longest unused first; one that a call waits for is never
    forgotten, unless it alone outgrows the bytes."""

    def __init__(self, limits: KeepLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._used: dict[RequestName, _Entry[R]] = {}
        # Those that no call waits for, in the order in which they were left.
        self._left: OrderedDict[RequestName, _Entry[R]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._used) + len(self._left)

    def __contains__(self, name: RequestName) -> bool:
        return name in self._used or name in self._left

    @property
    def held_bytes(self) -> int:
        """Bytes of everything kept."""
        return self._bytes

    def find(self, name: RequestName, content: bytes) -> R | None:
        """The request of that name, in use again until ``leave``; None when it is new.

        Raises:
            InvalidArgumentError: the id stands for other content.
        """
        self._forget_old()
        entry = self._used.get(name) or self._left.get(name)
        if entry is None:
            return None
        if entry.content != content:
            raise InvalidArgumentError(
                f"request_id is {name.request_id!r}, which stands for a request of other content: a retry repeats its "
                "request exactly, and a new request takes a new id",
                field="request_id",
            )
        self._left.pop(name, None)
        self._used[name] = entry
        return entry.request

    def add(self, name: RequestName, content: bytes, request: R) -> None:
        """Keeps a new request, in use until ``leave``; the name is free, as ``find`` has said."""
        if self.limits.count:
            self._used[name] = _Entry(request, content)

    def grow(self, name: RequestName, request: R, count: int) -> bool:
        """Counts bytes of results. False when the request is not kept any more, such as for these bytes."""
        entry = self._entry(name, request)
        if entry is None:
            return False
        entry.held_bytes += count
        self._bytes += count
        if entry.held_bytes > self.limits.max_bytes:
            self.forget(name, request)
            return False
        self._forget_old()
        return True

    def leave(self, name: RequestName, request: R) -> None:
        """The last call left: from now on it grows old."""
        entry = self._entry(name, request)
        if entry is not None:
            self._used.pop(name, None)
            entry.left_s = self._clock()
            self._left[name] = entry
            self._left.move_to_end(name)
            self._forget_old()

    def forget(self, name: RequestName, request: R) -> None:
        """As if it had never been."""
        entry = self._entry(name, request)
        if entry is not None:
            self._used.pop(name, None)
            self._left.pop(name, None)
            self._bytes -= entry.held_bytes

    def _entry(self, name: RequestName, request: R) -> _Entry[R] | None:
        """The entry of this very request, and not of a later one with its name."""
        entry = self._used.get(name) or self._left.get(name)
        return entry if entry is not None and entry.request is request else None

    def _forget_old(self) -> None:
        oldest_s = self._clock() - self.limits.age_s
        while self._left:
            first = next(iter(self._left.values()))
            too_many = len(self._left) > self.limits.count or self._bytes > self.limits.max_bytes
            if not too_many and first.left_s > oldest_s:
                return
            self._left.popitem(last=False)
            self._bytes -= first.held_bytes

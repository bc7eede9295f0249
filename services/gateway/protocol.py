"""uvicorn's HTTP protocol, which waits for ever for the head of a request and reads heads of any size, with bounds."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_HEAD_BYTES = 64 * 1024
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """Of one connection. Bounds are the class's: ``bounded`` makes one with others."""

    arrival_s: ClassVar[float] = 20.0
    most_connections: ClassVar[int] = 4096

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes: int | None = 0
    """Of a head that has not arrived whole; None: none is on its way."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self.logger.warning("a connection was closed: there are as many as may be (--max-connections)")
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        if self._head_timer is None:  # Not the first of the connection, whose head is awaited since it began.
            self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.arrival_s, self._give_up)

    def _head_arrived(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def bounded(arrival_s: float, most_connections: int) -> type[BoundedProtocol]:
    """The protocol with these bounds: seconds that a head may take to arrive, and connections."""
    return type("Protocol", (BoundedProtocol,), {"arrival_s": arrival_s, "most_connections": most_connections})

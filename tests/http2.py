"""Frames of HTTP/2 (RFC 9113) as bytes, for clients that behave as no library lets them."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_HEADERS, ACK = 4, 1
INITIAL_WINDOW_SIZE = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Section 4.1."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def settings(**values: int) -> bytes:
    """Our settings by their names above, and a yes to those of the other side."""
    content = b"".join(struct.pack(">HI", globals()[name], value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, content) + frame(SETTINGS, ACK, 0, b"")


def call_headers(path: str, stream: int = 1, **more: str) -> bytes:
    """The headers of a gRPC call; ``more``: further ones. Not indexed and not packed (RFC 7541, section 6.2.2)."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **more,
    }
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    return frame(HEADERS, END_HEADERS, stream, block)


def message(content: bytes, stream: int = 1) -> bytes:
    """A gRPC message in a frame."""
    return frame(DATA, 0, stream, b"\x00" + struct.pack(">I", len(content)) + content)

"""Bearer tokens in a file, for both ends of the wire: one a line, read again when the file changes.

A service accepts every token of its file, a client sends the first of its own. So a token is rotated without a
restart: the service's file gets the new one beside the old, the clients' files change to it, the old one goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# One tells of a change soon enough, and costs nothing beside the calls that go between.
LOOK_EVERY_S = 1.0
_LARGEST_FILE_BYTES = 1024 * 1024
_LONGEST_TOKEN = 4096

Stamp = tuple[tuple[int, int, int], ...]


class TokenFileError(Exception):
    """A token file cannot be used. The message names the file, the line and what is wrong, never a token."""


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens in the file: one a line, spaces around it, empty lines and lines that begin with # left out.

    Raises:
        TokenFileError: the file cannot be read, is no text, has no token, or a line is not one token of visible ASCII.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise TokenFileError(f"token file {str(path)!r}: {error.strerror}") from error
    if len(content) > _LARGEST_FILE_BYTES:
        raise TokenFileError(
            f"token file {str(path)!r}: larger than {_LARGEST_FILE_BYTES} bytes, so it holds no tokens"
        )
    tokens = []
    for number, raw in enumerate(content.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith(b"#"):
            continue
        if any(byte <= 0x20 or byte >= 0x7F for byte in line):
            raise TokenFileError(
                f"token file {str(path)!r}, line {number}: a token is visible ASCII characters without a space"
            )
        if len(line) > _LONGEST_TOKEN:
            raise TokenFileError(
                f"token file {str(path)!r}, line {number}: {len(line)} characters long, at most {_LONGEST_TOKEN} go "
                "with every call"
            )
        tokens.append(line.decode("ascii"))
    if not tokens:
        raise TokenFileError(
            f"token file {str(path)!r} is empty: write a token into it, for example of `openssl rand -hex 32`"
        )
    return tuple(tokens)


def stamp_of(paths: Sequence[Path]) -> Stamp | None:
    """What changes when the content of one of the files does; None where one is missing. Follows links."""
    try:
        stats = [os.stat(path) for path in paths]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


class TokenFile:
    """The tokens of a file as it is now, looked at once a second at most.

    A file that becomes unusable leaves the last tokens in force, so that a half-written file locks nobody out; the
    reason is told once for each state of the file. The same goes for tokens that ``check`` raises TokenFileError for,
    but that may come to like them without a change of the file: it is asked again at every look.
    """

    def __init__(self, path: Path, *, on_problem: Callable[[str], None]) -> None:
        """
        Raises:
            TokenFileError: see :func:`read_tokens`.
        """
        self.path = path
        self.check: Callable[[tuple[str, ...]], None] = lambda tokens: None
        self._on_problem = on_problem
        self._unliked = False
        self._looking = False
        self._stamp = stamp_of([path])
        self._tokens = read_tokens(path)
        self._looked_s = time.monotonic()

    @property
    def tokens(self) -> tuple[str, ...]:
        """In the order of the file; the same object until they change."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_EVERY_S and not self._looking:
            self._looked_s = now_s
            self._looking = True  # The check may ask for the tokens that are in force.
            try:
                self._look()
            finally:
                self._looking = False
        return self._tokens

    def _look(self) -> None:
        stamp = stamp_of([self.path])
        changed = stamp != self._stamp
        if not changed and not self._unliked:
            return
        self._stamp = stamp
        self._unliked = False
        try:
            tokens = read_tokens(self.path)
            self._unliked = True
            self.check(tokens)
        except TokenFileError as error:
            if changed:
                self._on_problem(f"{error}; the tokens read before stay in force")
            return
        self._unliked = False
        self._tokens = tokens

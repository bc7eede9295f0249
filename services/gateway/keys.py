"""Who may call: keys in a TOML file, hashed, with scopes and limits; and a command that makes them.

A key is 256 random bits, so one SHA-256 of it is as hard to turn back as any slower hash would be. The file is read
again when it changes: a key is rotated by a second entry of the same name, and revoked by deleting its entry. A file
that becomes unusable changes nothing and is logged as an error.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
import time
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quartet.settings import PositiveInt, Settings
from quartet.token_file import LOOK_EVERY_S, stamp_of
from services.runtime.errors import StartError

log = structlog.get_logger()

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
OPEN = "open"
"""Name of all callers where there are no keys."""


class Scope(StrEnum):
    """What a key is good for: scores, rankings and log-probabilities; completions; what all keys have used."""

    SCORE = "score"
    GENERATE = "generate"
    ADMIN = "admin"


class Entry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=f"^{_NAME}$", description="whose it is: for logs and metrics")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the key, hexadecimal")
    scopes: frozenset[Scope] = Field(min_length=1, description="what it is good for")
    requests_per_minute: PositiveInt | None = Field(None, description="most requests; default no limit")
    tokens_per_minute: PositiveInt | None = Field(None, description="most tokens, scored and generated")
    tokens_per_day: PositiveInt | None = Field(None, description="most tokens from midnight to midnight, UTC")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who calls, what it may do, and how much of it."""

    name: str = OPEN
    scopes: frozenset[Scope] = frozenset(Scope)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


ANYBODY = Caller()


class KeyFileError(Exception):
    """A file of keys cannot be used; the message never has a key."""


def read_keys(path: Path) -> tuple[Entry, ...]:
    """
    Raises:
        KeyFileError: the file can't be read, is not TOML, or an entry is wrong: names entry, field and bound.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeyFileError(f"key file {str(path)!r}: {error.strerror}") from error
    except ValueError as error:  # Of TOML, or of UTF-8.
        raise KeyFileError(f"key file {str(path)!r}: not valid TOML: {error}") from error
    try:
        entries = _File.model_validate(content).keys
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        # Without the value: it may be a key in clear, put where its hash belongs.
        raise KeyFileError(f"key file {str(path)!r}: {where}: {problem['msg']}") from error
    if not entries:
        raise KeyFileError(f"key file {str(path)!r} has no keys: make one with quartet-gateway new-key")
    for entry in entries:
        same = next(other for other in entries if other.name == entry.name)
        if same.model_copy(update={"sha256": entry.sha256}) != entry:
            raise KeyFileError(
                f"key file {str(path)!r}: keys named {entry.name!r} differ in scopes or limits: what goes by one name "
                "is one caller"
            )
    return entries


class Keys:
    """The keys that are accepted, as the file is now."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            StartError: the file can't be used.
        """
        self._path = path
        self._stamp = stamp_of([path])
        self._looked_s = time.monotonic()
        try:
            self._known = _callers(read_keys(path))
        except KeyFileError as error:
            raise StartError(f"--keys: {error}") from error

    def caller_of(self, key: str) -> Caller | None:
        """Whose ``key`` it is; None: nobody's. How long it takes says nothing about any key."""
        self._look()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, caller in self._known:
            if hmac.compare_digest(digest, known):
                found = caller
        return found

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        stamp = stamp_of([self._path])
        if stamp is None or stamp == self._stamp:  # None: it is being replaced.
            return
        self._stamp = stamp
        try:
            entries = read_keys(self._path)
        except KeyFileError as error:
            log.error("keys_not_rotated", reason=str(error), accepting="those read before")
            return
        self._known = _callers(entries)
        log.info("keys_rotated", keys=len(entries))


def _callers(entries: tuple[Entry, ...]) -> list[tuple[bytes, Caller]]:
    return [(bytes.fromhex(entry.sha256), Caller(**entry.model_dump(exclude={"sha256"}))) for entry in entries]


# Limits ------------------------------------------------------------------------------------------------------------


@dataclass
class Bucket:
    """So much a minute, at most a minute's worth at once; what was taken too much is owed."""

    per_minute: int
    level: float = field(init=False)
    at_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.at_s = float(self.per_minute), time.monotonic()

    def wait_s(self, amount: float) -> float:
        """Seconds until ``amount`` can be had, or all of it where it is more; 0: now."""
        now_s = time.monotonic()
        self.level = min(float(self.per_minute), self.level + (now_s - self.at_s) * self.per_minute / 60)
        self.at_s = now_s
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        self.level -= amount


@dataclass
class Usage:
    """What one caller has used since the gateway started, and may use yet."""

    requests: int = 0
    tokens: int = 0
    tokens_today: int = 0
    day: int = 0
    of_requests: Bucket | None = None
    of_tokens: Bucket | None = None


@dataclass(frozen=True)
class Refused:
    """Which limit, and when to come back."""

    detail: str
    retry_after_s: float


class Limits:
    """Rates and quotas by the name of the caller. They are of this process, and begin anew when it does."""

    def __init__(self) -> None:
        self.usage: dict[str, Usage] = {}

    def admit(self, caller: Caller, tokens: int) -> Refused | None:
        """Takes one request and about so many ``tokens``, or says why not.

        A request may be larger than what is left: it is let in when a minute's worth, or less where it is smaller, is
        there, and what it takes beyond is owed.
        """
        usage = self._of(caller)
        if usage.of_requests and (wait_s := usage.of_requests.wait_s(1)) > 0:
            return Refused(f"key {caller.name!r} may send {caller.requests_per_minute} requests a minute", wait_s)
        if usage.of_tokens and (wait_s := usage.of_tokens.wait_s(tokens)) > 0:
            return Refused(f"key {caller.name!r} may use {caller.tokens_per_minute} tokens a minute", wait_s)
        if caller.tokens_per_day is not None and usage.tokens_today + tokens > caller.tokens_per_day:
            left = max(0, caller.tokens_per_day - usage.tokens_today)
            return Refused(
                f"key {caller.name!r} may use {caller.tokens_per_day} tokens a day (UTC), and {left} are left: this "
                f"request takes about {tokens}",
                86_400 - time.time() % 86_400,
            )
        if usage.of_requests:
            usage.of_requests.take(1)
        usage.requests += 1
        self.settle(caller, tokens)
        return None

    def settle(self, caller: Caller, tokens: int) -> None:
        """Takes ``tokens`` more, or gives back what was taken too much."""
        usage = self._of(caller)
        usage.tokens += tokens
        usage.tokens_today += tokens
        if usage.of_tokens:
            usage.of_tokens.take(tokens)

    def _of(self, caller: Caller) -> Usage:
        usage = self.usage.setdefault(caller.name, Usage())
        if (today := int(time.time() // 86_400)) != usage.day:
            usage.day, usage.tokens_today = today, 0
        usage.of_requests = _bucket(usage.of_requests, caller.requests_per_minute)
        usage.of_tokens = _bucket(usage.of_tokens, caller.tokens_per_minute)
        return usage


def _bucket(current: Bucket | None, per_minute: int | None) -> Bucket | None:
    if per_minute is None:
        return None
    return current if current is not None and current.per_minute == per_minute else Bucket(per_minute)


# The command -------------------------------------------------------------------------------------------------------


class NewKeySettings(Settings):
    """Makes a key, prints it once, and adds its hash to the file of keys, which the gateway then accepts."""

    command: ClassVar[str] = "quartet-gateway new-key"

    keys: Path = Field(description="TOML file of keys; made where it is not there")
    name: str = Field(
        pattern=f"^{_NAME}$", description="whose it is; a second key of a name has the first one's limits"
    )
    scopes: tuple[Scope, ...] = Field((Scope.SCORE,), min_length=1, description="score, generate, admin")
    requests_per_minute: PositiveInt | None = Field(None, description="most requests; default no limit")
    tokens_per_minute: PositiveInt | None = Field(None, description="most tokens; default no limit")
    tokens_per_day: PositiveInt | None = Field(None, description="most tokens a day, UTC; default no limit")


def main(argv: list[str]) -> None:
    """``quartet-gateway new-key``."""
    settings = NewKeySettings.from_command_line(argv)
    key = "qk_" + secrets.token_urlsafe(32)
    lines = [
        "[[keys]]",
        f'name = "{settings.name}"',
        f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"',
        "scopes = [" + ", ".join(f'"{scope}"' for scope in settings.scopes) + "]",
    ]
    for limit in ("requests_per_minute", "tokens_per_minute", "tokens_per_day"):
        value = getattr(settings, limit)
        lines += [] if value is None else [f"{limit} = {value}"]
    staged = settings.keys.with_name(settings.keys.name + ".new")
    try:
        before = settings.keys.read_text(encoding="utf-8") if settings.keys.exists() else ""
        after = (before.rstrip("\n") + "\n\n" if before.strip() else "") + "\n".join(lines) + "\n"
        staged.touch(mode=0o600)
        staged.write_text(after, encoding="utf-8")
        read_keys(staged)
        staged.replace(settings.keys)
    except (OSError, KeyFileError) as error:
        sys.exit(f"quartet-gateway new-key: {error}")
    finally:
        staged.unlink(missing_ok=True)
    sys.stdout.write(f"{key}\n")

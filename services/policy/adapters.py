"""Which LoRA adapters are loaded, under which names, and who runs with them. Knows no model library.

All methods run on the service's event loop. A name means one content for as long as the service runs: also after it was
unloaded it comes back with the same fingerprint or not at all, so that whoever noted a name knows what generated.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from services.policy.adapter_config import AdapterConfig
from services.policy.engine import AdapterRefusedError, Engine
from services.runtime.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
)

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A loaded adapter. ``number`` names it to the engine and is never used again."""

    name: str
    number: int
    fingerprint: str
    config: AdapterConfig


@dataclass(kw_only=True)
class AdapterState:
    """An adapter and its use: how many calls run with it, and whether it waits for their end."""

    adapter: Adapter
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    unloading: asyncio.Task[None] | None = None


class AdapterRegistry:
    """The adapters of one engine. With ``max_adapters`` 0 LoRA is off."""

    def __init__(self, *, max_adapters: int = 0, max_rank: int = 0) -> None:
        self.max_adapters = max_adapters
        self.max_rank = max_rank
        self._states: dict[str, AdapterState] = {}
        self._fingerprints: dict[str, str] = {}
        self._loading: set[str] = set()
        self._numbers = itertools.count(1)

    @property
    def states(self) -> Mapping[str, AdapterState]:
        """By name, in the order of loading; one that is being unloaded still counts."""
        return self._states

    def require_on(self) -> None:
        """Refuses where LoRA is off.

        Raises:
            FailedPreconditionError: names the flag.
        """
        if self.max_adapters == 0:
            raise FailedPreconditionError(
                "LoRA is off in this service: start it with --max-adapters, the number of adapters to keep room for"
            )

    def take(self, name: str) -> Adapter | None:
        """The adapter of that name, held until ``give_back``; None, the base model, for the empty name.

        Raises:
            FailedPreconditionError: LoRA is off.
            NotFoundError: no such adapter is loaded, or it is being unloaded.
        """
        if not name:
            return None
        if self.max_adapters == 0:
            raise FailedPreconditionError(
                f"adapter is {name[:160]!r}, but LoRA is off in this service: start it with --max-adapters",
                field="adapter",
            )
        state = self._states.get(name)
        if state is None or state.unloading is not None:
            loaded = sum(other.unloading is None for other in self._states.values())
            why = "is being unloaded" if state is not None else "is not loaded"
            raise NotFoundError(
                f"adapter {name[:160]!r} {why}; {loaded} adapters are (ListAdapters on the admin port names them)",
                field="adapter",
            )
        state.running += 1
        return state.adapter

    def give_back(self, adapter: Adapter | None) -> None:
        """Ends what ``take`` began."""
        if adapter is None:
            return
        state = self._states[adapter.name]
        state.running -= 1
        if state.running == 0:
            state.idle.set()

    @contextlib.contextmanager
    def reserve(self, name: str) -> Iterator[None]:
        """Keeps name and room for an adapter that is on its way.

        Raises:
            AbortedError: the name is being loaded or unloaded by somebody else.
            OverloadedError: there is no room.
        """
        state = self._states.get(name)
        if name in self._loading or (state is not None and state.unloading is not None):
            doing = "loaded" if name in self._loading else "unloaded"
            raise AbortedError(f"adapter {name!r} is being {doing} by another call; try again when it is done")
        taken = len(self._states.keys() | self._loading)
        if state is None and taken >= self.max_adapters:
            raise OverloadedError(
                f"{taken} adapters are loaded or on their way, at most {self.max_adapters} may be (--max-adapters): "
                "unload one first"
            )
        self._loading.add(name)
        try:
            yield
        finally:
            self._loading.discard(name)

    async def load(
        self, engine: Engine, name: str, config: AdapterConfig, fingerprint: str, safetensors: Path
    ) -> tuple[Adapter, bool]:
        """Loads a staged and checked adapter whose name is reserved; returns it and whether it was there already.

        Raises:
            AlreadyExistsError: the name means other content.
            AbortedError: it is there, but not for long: somebody unloads it.
            InvalidArgumentError: the engine does not take it.
            EngineFailedError: the engine died.
        """
        known = self._fingerprints.get(name, fingerprint)
        if known != fingerprint:
            raise AlreadyExistsError(
                f"adapter {name!r} is {known[:12]}..., what was sent is {fingerprint[:12]}...: names are immutable, "
                f"take another, such as {_next_name(name)!r}",
                field="begin.name",
            )
        if (state := self._states.get(name)) is not None:
            if state.unloading is not None:
                raise AbortedError(f"adapter {name!r} is being unloaded by another call; try again when it is done")
            return state.adapter, True
        adapter = Adapter(name=name, number=next(self._numbers), fingerprint=fingerprint, config=config)
        try:
            await engine.load_adapter(adapter.number, safetensors, config)
        except AdapterRefusedError as error:
            raise InvalidArgumentError(f"the engine does not take adapter {name!r}: {error}", field="begin") from error
        self._states[name] = AdapterState(adapter=adapter)
        self._fingerprints[name] = fingerprint
        log.info("adapter_loaded", adapter=name, fingerprint=fingerprint[:12], rank=config.rank)
        return adapter, False

    async def unload(self, engine: Engine, name: str) -> Adapter:
        """Refuses new calls for the adapter, waits for the running ones and frees it, though the caller leaves.

        Raises:
            NotFoundError: no such adapter is loaded.
            EngineFailedError: the engine died.
        """
        state = self._states.get(name)
        if state is None:
            raise NotFoundError(f"adapter {name[:160]!r} is not loaded; {len(self._states)} adapters are", field="name")
        if state.unloading is None:
            state.unloading = asyncio.create_task(self._unload(engine, state))
        await asyncio.shield(state.unloading)
        return state.adapter

    async def _unload(self, engine: Engine, state: AdapterState) -> None:
        while state.running:
            state.idle.clear()
            await state.idle.wait()
        await engine.unload_adapter(state.adapter.number)
        del self._states[state.adapter.name]
        log.info("adapter_unloaded", adapter=state.adapter.name)


def _next_name(name: str) -> str:
    """A name for the next version: "helpful@3" after "helpful@2"."""
    stem, _, version = name.rpartition("@")
    return f"{stem}@{int(version) + 1}" if stem and version.isdecimal() else f"{name}@2"

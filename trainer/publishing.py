"""Bringing the trainer's weights to every replica of the policy service."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.client import (
    CallPolicy,
    OverloadedError,
    PreconditionError,
    QuartetError,
    Security,
    ServedBy,
    ServiceFailedError,
    UnavailableError,
    WeightsClient,
)
from quartet.client.policy import WireTensor
from quartet.fingerprint import TensorDigest, weights_fingerprint

_PAUSE_S = 0.5
# So often may a replica refuse or fail an update: another may be under way, but a full disk stays full.
_TRIES = 4


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A whole checkpoint as it goes over the wire, and its fingerprint."""

    tensors: tuple[WireTensor, ...]
    fingerprint: str

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, Tensor]]) -> Weights:
        """A snapshot: later changes of the tensors don't reach it.

        Args:
            tensors: by checkpoint name, as ``trainer.models.export_tensors`` gives them.
        """
        wire, digests = [], []
        for name, tensor in tensors:
            data = tensor.detach().to("cpu", copy=True).contiguous()
            content = memoryview(data.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            dtype, shape = str(data.dtype).removeprefix("torch."), tuple(data.shape)
            wire.append(WireTensor(name=name, dtype=dtype, shape=shape, data=content))
            sha256 = hashlib.sha256(content).hexdigest()
            digests.append(TensorDigest(name=name, dtype=dtype, shape=shape, sha256=sha256))
        return cls(tensors=tuple(wire), fingerprint=weights_fingerprint(digests))


class Publisher:
    """Keeps every replica at the weights published last, under one version."""

    def __init__(
        self,
        addresses: Sequence[str],
        call_policy: CallPolicy,
        ready_timeout_s: float,
        security: Security | None = None,
    ) -> None:
        """``addresses``: admin address of each replica; ``security``: the admin port's."""
        self._clients = [WeightsClient(address, policy=call_policy, security=security) for address in addresses]
        self._ready_timeout_s = ready_timeout_s
        self._weights: Weights | None = None
        self.version = 0
        self.updates = 0
        """How often a replica was given weights."""
        # Whether ``version`` is already that of ``_weights``.
        self._numbered = False
        self._lock = asyncio.Lock()

    @property
    def fingerprint(self) -> str:
        """Of the weights published last; empty before the first."""
        return self._weights.fingerprint if self._weights else ""

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def wait_ready(self) -> None:
        """
        Raises:
            NotReadyError: a replica did not become ready in time; names its address.
        """
        await asyncio.gather(*(client.wait_ready(self._ready_timeout_s) for client in self._clients))

    async def publish(self, weights: Weights) -> int:
        """Makes every replica serve ``weights`` and returns their version.

        Raises:
            QuartetError: a replica refused them, or stayed away for longer than it may take to be ready.
        """
        self._weights, self._numbered = weights, False
        await self.ensure()
        return self.version

    async def ensure(self) -> None:
        """Brings replicas that serve something else, such as one that was restarted, to the weights published last.

        Raises:
            QuartetError: as ``publish``.
        """
        # Several streams of a rollout may find at the same time that a replica has to be brought up to date.
        async with self._lock:
            await self._ensure()

    async def _ensure(self) -> None:
        if self._weights is None:
            return
        refusals, told = 0, False
        updates, end_s = -1, 0.0
        while True:
            await self.wait_ready()
            try:
                await self._bring_up_to_date()
                return
            except (OverloadedError, PreconditionError, ServiceFailedError) as error:
                failed: QuartetError = error
                refusals += 1
                given_up = refusals == _TRIES
            except UnavailableError as error:
                # It died on the way: whoever comes back in its place is asked what it has, and given the rest.
                failed = error
                if self.updates > updates:
                    updates, end_s = self.updates, time.monotonic() + self._ready_timeout_s
                given_up = time.monotonic() > end_s
            if given_up:
                raise failed
            if not told:
                told = True
                sys.stderr.write(f"the weights could not be published, trying again: {failed}\n")
            await asyncio.sleep(_PAUSE_S)

    async def _bring_up_to_date(self) -> None:
        served = await asyncio.gather(*(client.get_info() for client in self._clients))
        stale = [info for info in served if not self._is_current(info)]
        if not self._numbered and len({info.weights_version for info in served}) == 1 and not stale:
            self.version = served[0].weights_version  # They were started with these very weights.
        elif not self._numbered or any(info.weights_version >= self.version for info in stale):
            # Versions only rise: above all that any replica has had.
            self.version = max(self.version, *(info.weights_version for info in served)) + 1
        self._numbered = True
        # All of them to their end: while one of them is still being updated it would refuse another update.
        outcomes = await asyncio.gather(
            *(self._update(client, info) for client, info in zip(self._clients, served, strict=True)),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def _is_current(self, served: ServedBy) -> bool:
        same = served.weights_fingerprint == self.fingerprint
        return same and (not self._numbered or served.weights_version == self.version)

    async def _update(self, client: WeightsClient, served: ServedBy) -> None:
        if self._weights is None or self._is_current(served):
            return
        await client.update(self._weights.tensors, weights_version=self.version, fingerprint=self._weights.fingerprint)
        self.updates += 1

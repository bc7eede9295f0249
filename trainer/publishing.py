"""Bringing the trainer's weights, or its adapter alone, to every replica of the policy service."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quartet.client import (
    AdapterClient,
    CallPolicy,
    Completion,
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
from trainer.adapter_weights import AdapterWeights, load_as_the_only_version
from trainer.errors import ServicesError

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
            tensors: by checkpoint name, as ``trainer.saving.export_tensors`` gives them.
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


Published = Weights | AdapterWeights


@dataclass(frozen=True, kw_only=True)
class SampledBy:
    """What samples: weights by version and fingerprint, or an adapter above them, whose ``version`` it is then."""

    version: int
    weights: str
    adapter: str = ""
    adapter_fingerprint: str = ""

    def has_sampled(self, completion: Completion) -> bool:
        """Whether every token of ``completion`` is of these."""
        versions = {version for version, _ in completion.version_spans}
        return (
            completion.served_by.weights_fingerprint == self.weights
            and (completion.adapter, completion.adapter_fingerprint) == (self.adapter, self.adapter_fingerprint)
            # Below an adapter any one version will do: a replica that was restarted counts anew.
            and (len(versions) <= 1 if self.adapter else versions <= {self.version})
        )


class Publisher:
    """Keeps every replica at what was published last, under one version."""

    def __init__(
        self,
        addresses: Sequence[str],
        call_policy: CallPolicy,
        ready_timeout_s: float,
        security: Security | None = None,
    ) -> None:
        """``addresses``: admin address of each replica; ``security``: the admin port's."""
        self._clients = [WeightsClient(address, policy=call_policy, security=security) for address in addresses]
        self._adapters = [AdapterClient(address, policy=call_policy, security=security) for address in addresses]
        self._ready_timeout_s = ready_timeout_s
        self._weights: Published | None = None
        self.version = 0
        self.updates = 0
        """How often a replica was given weights or an adapter."""
        # Whether ``version`` is already that of ``_weights``.
        self._numbered = False
        self._lock = asyncio.Lock()

    @property
    def sampled_by(self) -> SampledBy | None:
        """What every replica samples with since the last publication; None before the first."""
        published = self._weights
        if published is None:
            return None
        if isinstance(published, Weights):
            return SampledBy(version=self.version, weights=published.fingerprint)
        return SampledBy(
            version=self.version,
            weights=published.base,
            adapter=published.name,
            adapter_fingerprint=published.fingerprint,
        )

    async def close(self) -> None:
        for client in (*self._clients, *self._adapters):
            await client.close()

    async def wait_ready(self) -> None:
        """
        Raises:
            NotReadyError: a replica did not become ready in time; names its address.
        """
        await asyncio.gather(*(client.wait_ready(self._ready_timeout_s) for client in self._clients))

    async def publish(self, weights: Published) -> int:
        """Makes every replica serve ``weights`` and returns their version.

        Raises:
            QuartetError: a replica refused them, or stayed away for longer than it may take to be ready.
            ServicesError: an adapter does not belong to the weights that a replica serves, or has no room there.
        """
        self._weights, self._numbered = weights, False
        await self.ensure()
        return self.version

    async def ensure(self) -> None:
        """Brings replicas that serve something else, such as one that was restarted, to the weights published last.

        Raises:
            QuartetError, ServicesError: as ``publish``.
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
        if isinstance(self._weights, AdapterWeights):
            await self._bring_adapter(self._weights, served)
            return
        stale = [info for info in served if not self._is_current(info)]
        if not self._numbered and len({info.weights_version for info in served}) == 1 and not stale:
            self.version = served[0].weights_version  # They were started with these very weights.
        elif not self._numbered or any(info.weights_version >= self.version for info in stale):
            # Versions only rise: above all that any replica has had.
            self.version = max(self.version, *(info.weights_version for info in served)) + 1
        self._numbered = True
        await _all_to_their_end(self._update(client, info) for client, info in zip(self._clients, served, strict=True))

    def _is_current(self, served: ServedBy) -> bool:
        same = self._weights is not None and served.weights_fingerprint == self._weights.fingerprint
        return same and (not self._numbered or served.weights_version == self.version)

    async def _update(self, client: WeightsClient, served: ServedBy) -> None:
        if not isinstance(self._weights, Weights) or self._is_current(served):
            return
        await client.update(self._weights.tensors, weights_version=self.version, fingerprint=self._weights.fingerprint)
        self.updates += 1

    async def _bring_adapter(self, weights: AdapterWeights, served: Sequence[ServedBy]) -> None:
        for info in served:
            if info.weights_fingerprint != weights.base:
                raise ServicesError(
                    f"the policy service serves {info.model_id!r} with weights {info.weights_fingerprint[:12]}..., and "
                    f"the adapter that is trained belongs to those of --model, {weights.base[:12]}...: start it with "
                    "that model (after a run without --lora-rank it has other weights until it is restarted)"
                )
        self.version = weights.version

        async def load(client: AdapterClient) -> None:
            self.updates += await load_as_the_only_version(client, weights)

        await _all_to_their_end(map(load, self._adapters))


async def _all_to_their_end(updates: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Raises what the first of them raised once none is under way: a replica that is being updated refuses another."""
    for outcome in await asyncio.gather(*updates, return_exceptions=True):
        if outcome is not None:
            raise outcome

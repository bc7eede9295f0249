"""One version of an adapter as the policy service gets it: above weights that stay as they are, under its own name.

A name means one content for good, so every version has another; what samples is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from quartet.client import AdapterClient, NotFoundError
from quartet.client.adapters import AdapterConfig, read_adapter
from quartet.client.policy import WireTensor
from quartet.fingerprint import adapter_fingerprint
from trainer.errors import ServicesError
from trainer.lora import Adapter

_SHORT = 12  # Characters of a fingerprint that stand in a name.


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """A snapshot of an adapter, ready to be sent: later changes of its tensors don't reach it.

    ``stem``: what the names of all versions of a run begin with, and those of no other run. ``version``: the step that
    it was learned in. ``base``: fingerprint of the weights that it belongs to.
    """

    stem: str
    version: int
    base: str
    config: AdapterConfig
    tensors: tuple[WireTensor, ...]
    fingerprint: str

    @classmethod
    def of(cls, adapter: Adapter, *, stem: str, version: int, base: str) -> Self:
        arrays = {name: tensor.cpu().numpy() for name, tensor in adapter.tensors()}
        config, tensors = read_adapter((adapter.config, arrays))  # Copies them.
        fingerprint = adapter_fingerprint([tensor.digest() for tensor in tensors], **vars(config))
        return cls(
            stem=stem, version=version, base=base, config=config, tensors=tuple(tensors), fingerprint=fingerprint
        )

    @property
    def name(self) -> str:
        """With its content in it: a step that is learned again after a break need not end with the same bits."""
        return f"{self.stem}.{self.fingerprint[:_SHORT]}@{self.version}"


async def load_as_the_only_version(client: AdapterClient, weights: AdapterWeights) -> bool:
    """Makes one replica serve ``weights`` and takes out all other versions of the run, which nobody samples with now.

    Returns:
        Whether it had to be loaded.

    Raises:
        ServicesError: the replica has no room for adapters, or none for one of this rank.
        QuartetError: it refused, or went away.
    """
    found = await client.list_adapters()
    rank = max([weights.config.rank, *weights.config.module_ranks.values()])
    if found.max_adapters == 0 or found.max_rank < rank:
        has = "LoRA is off" if found.max_adapters == 0 else f"adapters may have rank {found.max_rank} (--max-lora-rank)"
        raise ServicesError(
            f"--lora-rank is {rank}, and in the policy service {has}: start it with --max-adapters 2 --max-lora-rank "
            f"{rank} (quartet-local: --policy-args='--max-adapters 2 --max-lora-rank {rank}')"
        )
    others = [info.name for info in found.adapters if info.name != weights.name and _is_of(weights.stem, info.name)]
    is_there = any(info.name == weights.name and not info.unloading for info in found.adapters)
    if not is_there and len(found.adapters) >= found.max_adapters:
        await _unload(client, others)
        others = []
    if not is_there:
        await client.load_adapter(weights.name, (weights.config, weights.tensors))
    await _unload(client, others)
    return not is_there


def _is_of(stem: str, name: str) -> bool:
    return name.startswith(f"{stem}.")


async def _unload(client: AdapterClient, names: Iterable[str]) -> None:
    for name in names:
        try:
            await client.unload_adapter(name)
        except NotFoundError:
            continue  # It is gone already, which is all that is wanted.

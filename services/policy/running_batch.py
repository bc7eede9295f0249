"""What the transformers engine is decoding: requests, and their keys and values in one left-padded cache.

Shapes: B requests in the batch, H heads, S cached positions, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from services.policy.engine import Generated, GenerationTask, Sampling
from services.policy.low_rank import LowRankAdapter


@dataclass(eq=False, kw_only=True)
class Row:
    """A request from admission to answer."""

    task: GenerationTask
    # Held here, so that unloading it does not pull it away from a request that has not left yet.
    adapter: LowRankAdapter | None
    future: Future[Generated]
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    start_unix_ns: int
    # Called in the engine's thread after each token, when somebody reads along.
    on_token: Callable[[], None] | None = None

    @property
    def sampling(self) -> Sampling:
        return self.task.sampling

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's and its own."""
        return len(self.task.prompt_ids) + len(self.token_ids)


@dataclass(kw_only=True)
class Batch:
    """Requests being decoded: row i of ``cache`` and ``mask_BS`` belongs to ``rows[i]``; padding stands on the left.

    The newest token of each row is not in the cache yet.
    """

    rows: list[Row]
    cache: Any
    mask_BS: Tensor


def positions(mask_BS: Tensor) -> Tensor:
    """(B, S) of each token in its own request; 0 on padding."""
    return (mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)


def is_plain(cache: Any) -> bool:
    """Whether keys and values are tensors of all positions, which rows can be taken out of and put into."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _cache_of(layers: list[tuple[Tensor, Tensor]]) -> Any:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def join(first: Batch, second: Batch) -> Batch:
    """Both batches as one, the shorter cache padded on the left."""
    length = max(first.mask_BS.shape[1], second.mask_BS.shape[1])

    def wide(tensor: Tensor) -> Tensor:
        """(B, H, S, D) with ``length`` positions."""
        return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[2], 0))

    masks = [torch.nn.functional.pad(batch.mask_BS, (length - batch.mask_BS.shape[1], 0)) for batch in (first, second)]
    layers = [
        (torch.cat([wide(a.keys), wide(b.keys)]), torch.cat([wide(a.values), wide(b.values)]))
        for a, b in zip(first.cache.layers, second.cache.layers, strict=True)
    ]
    return Batch(rows=first.rows + second.rows, cache=_cache_of(layers), mask_BS=torch.cat(masks))


def keep(batch: Batch, wanted: Callable[[Row], bool]) -> Batch | None:
    """The batch without the rows that are not ``wanted``, no wider than those that stay need; None without any."""
    kept = [index for index, row in enumerate(batch.rows) if wanted(row)]
    if len(kept) == len(batch.rows):
        return batch
    if not kept:
        return None
    index_B = torch.tensor(kept, device=batch.mask_BS.device)
    mask_BS = batch.mask_BS[index_B]
    first = int(mask_BS.any(dim=0).long().argmax())  # Columns that are padding for everybody who stays.
    layers = [(layer.keys[index_B][:, :, first:], layer.values[index_B][:, :, first:]) for layer in batch.cache.layers]
    return Batch(rows=[batch.rows[index] for index in kept], cache=_cache_of(layers), mask_BS=mask_BS[:, first:])

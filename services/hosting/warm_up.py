"""The first forward pass of a hosted model, before anybody waits for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from services.runtime.batcher import BatchLimits
from services.runtime.errors import StartError

_SMALL = 3


def warm_up(
    run: Callable[[list[list[int]]], object], *, device: str, limits: BatchLimits, longest: int, vocabulary: int
) -> None:
    """Runs one batch: on a GPU the fullest there may be, so that its memory is taken now and not found lacking later.

    On a processor memory is taken and given back batch by batch, and a small one does.

    Args:
        run: the forward pass of token ids.
        device: type of the model's device.
        longest: tokens of a sequence that the model takes.

    Raises:
        StartError: the GPU's memory does not hold it.
    """
    lengths = fullest_batch(limits, longest) if device == "cuda" else [min(_SMALL, longest)] * 2
    try:
        # They begin unlike, so that none shares what another computed.
        run([[index % vocabulary] * length for index, length in enumerate(lengths)])
    except torch.OutOfMemoryError as error:
        raise StartError(
            f"a batch of {sum(lengths)} tokens does not fit into the GPU's memory beside the model: "
            f"lower --max-batch-tokens (now {limits.max_batch_tokens}), or give the service a larger GPU"
        ) from error


def fullest_batch(limits: BatchLimits, longest: int) -> list[int]:
    """Lengths of a batch as large as the budget allows, of few long sequences: attention costs the most for them."""
    length = min(longest, limits.max_batch_tokens)
    return [length] * max(1, min(limits.max_batch_items, limits.max_batch_tokens // length))

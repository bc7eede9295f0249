"""The first forward pass of a hosted model, before anybody waits for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from services.runtime.batcher import BatchLimits
from services.runtime.errors import StartError

_SMALL = 3


def warm_up(
    run: Callable[[list[list[int]]], object],
    *,
    device: str,
    limits: BatchLimits,
    longest: int,
    vocabulary: int,
    together: int = 1,
) -> None:
    """Runs one batch: on a GPU the fullest there may be, so that its memory is taken now and not found lacking later.

    On a processor memory is taken and given back batch by batch, and a small one does.

    Args:
        run: the forward pass of token ids.
        device: type of the model's device.
        longest: tokens of a sequence that the model takes.
        together: most sequences of an item, which is never split: two where responses are compared in one pass.

    Raises:
        StartError: the GPU's memory does not hold it.
    """
    lengths = fullest_batch(limits, longest, together) if device == "cuda" else [min(_SMALL, longest)] * 2
    try:
        # They begin unlike, so that none shares what another computed.
        run([[index % vocabulary] * length for index, length in enumerate(lengths)])
    except torch.OutOfMemoryError as error:
        total = sum(lengths)
        if total <= limits.max_batch_tokens:
            lower = f"--max-batch-tokens (now {limits.max_batch_tokens})"
        else:  # One item: the batch's budget is no bound of it.
            lower = f"--max-queued-tokens (now {limits.max_queued_tokens}), and longer requests are refused"
        raise StartError(
            f"a batch of {total} tokens does not fit into the GPU's memory beside the model: "
            f"lower {lower}, or give the service a larger GPU"
        ) from error


def fullest_batch(limits: BatchLimits, longest: int, together: int = 1) -> list[int]:
    """Lengths of a batch as large as any that may come, of few long sequences: attention costs the most for them.

    An item beyond the batch's budget is a batch of its own; none is longer than the queue.

    Args:
        longest, together: see ``warm_up``.
    """
    length = max(1, min(longest, limits.max_queued_tokens // together))
    most = together * limits.max_batch_items
    full = max(together, min(most, limits.max_batch_tokens // length))
    rest = 0 if limits.padded or full == most else max(0, limits.max_batch_tokens - full * length)
    return [length] * full + [rest] * bool(rest)

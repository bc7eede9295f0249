"""A model's first batch: the fullest on a GPU, and a clear word when it does not fit."""

from __future__ import annotations

import pytest
import torch

from services.hosting.warm_up import fullest_batch, warm_up
from services.runtime.batcher import BatchLimits
from services.runtime.errors import StartError


def limits(tokens: int, items: int = 256, queued: int = 10**6, padded: bool = True) -> BatchLimits:
    return BatchLimits(max_batch_tokens=tokens, max_batch_items=items, max_queued_tokens=queued, padded=padded)


@pytest.mark.parametrize(
    ("tokens", "items", "longest", "together", "expected"),
    [
        (16384, 256, 4096, 1, [4096] * 4),
        (16384, 3, 4096, 1, [4096] * 3),
        (1000, 256, 300, 1, [300] * 3),
        # Longer than the budget: a batch of its own.
        (1000, 256, 4096, 1, [4096]),
        # Two responses that are compared: both, even where the budget has room for one alone.
        (1000, 256, 4096, 2, [4096] * 2),
        (5000, 256, 4096, 2, [4096] * 2),
        (16384, 256, 4096, 2, [4096] * 4),
        (16384, 1, 4096, 2, [4096] * 2),
    ],
)
def test_the_fullest_batch_is_of_the_longest_sequences_that_may_come_together(
    tokens, items, longest, together, expected
):
    assert fullest_batch(limits(tokens, items), longest, together) == expected


def test_a_batch_without_padding_is_filled_to_its_last_token():
    assert fullest_batch(limits(1000, padded=False), 300) == [300, 300, 300, 100]
    assert fullest_batch(limits(1000, 3, padded=False), 300) == [300, 300, 300]


def test_no_sequence_is_longer_than_the_queue():
    assert fullest_batch(limits(1000, queued=5000), 10**6) == [5000]
    assert fullest_batch(limits(1000, queued=5000), 10**6, 2) == [2500] * 2


@pytest.mark.parametrize(("device", "lengths"), [("cuda", [40, 40]), ("cpu", [3, 3])])
def test_only_a_gpu_is_filled_and_no_two_sequences_begin_alike(device, lengths):
    batches = []
    warm_up(batches.append, device=device, limits=limits(100), longest=40, vocabulary=10)
    (batch,) = batches
    assert [len(ids) for ids in batch] == lengths
    assert len({ids[0] for ids in batch}) == len(batch)


@pytest.mark.parametrize(
    ("longest", "together", "message"),
    [
        (40, 1, r"80 tokens does not fit .* lower --max-batch-tokens \(now 100\)"),
        (400, 1, r"400 tokens does not fit .* lower --max-queued-tokens \(now 1000000\), and longer requests"),
        (400, 2, r"800 tokens does not fit .* lower --max-queued-tokens"),
    ],
)
def test_a_gpu_that_is_too_small_is_told_what_to_do(longest, together, message):
    def run(sequences):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(StartError, match=message):
        warm_up(run, device="cuda", limits=limits(100), longest=longest, vocabulary=10, together=together)

"""A model's first batch: the fullest on a GPU, and a clear word when it does not fit."""

from __future__ import annotations

import pytest
import torch

from services.hosting.warm_up import fullest_batch, warm_up
from services.runtime.batcher import BatchLimits
from services.runtime.errors import StartError


def limits(tokens: int, items: int = 256) -> BatchLimits:
    return BatchLimits(max_batch_tokens=tokens, max_batch_items=items, max_queued_tokens=10**6)


@pytest.mark.parametrize(
    ("tokens", "items", "longest", "expected"),
    [
        (16384, 256, 4096, [4096] * 4),
        (16384, 3, 4096, [4096] * 3),
        (1000, 256, 4096, [1000]),
        (1000, 256, 300, [300] * 3),
    ],
)
def test_the_fullest_batch_is_of_the_longest_sequences_that_the_budget_holds(tokens, items, longest, expected):
    assert fullest_batch(limits(tokens, items), longest) == expected


@pytest.mark.parametrize(("device", "lengths"), [("cuda", [40, 40]), ("cpu", [3, 3])])
def test_only_a_gpu_is_filled_and_no_two_sequences_begin_alike(device, lengths):
    batches = []
    warm_up(batches.append, device=device, limits=limits(100), longest=40, vocabulary=10)
    (batch,) = batches
    assert [len(ids) for ids in batch] == lengths
    assert len({ids[0] for ids in batch}) == len(batch)


def test_a_gpu_that_is_too_small_is_told_what_to_do():
    def run(sequences):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(StartError, match=r"80 tokens does not fit .* lower --max-batch-tokens \(now 100\)"):
        warm_up(run, device="cuda", limits=limits(100), longest=40, vocabulary=10)

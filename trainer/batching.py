"""Which rows form a batch, in which order, and how they become tensors. All of it follows from seed and position.

Shapes: B sequences, S tokens of prompt and response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from quartet.fingerprint import derive_seed
from trainer.encoding import Ids


def epoch_batches(rows: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: each row once, in random order; the last rows that fill no batch form a smaller one.

    Rows of like length never stand together on purpose. A step is a mean over its own tokens, so a token would count
    the more, the shorter the rows of its batch are, and SFT would learn the mean over rows instead of that over tokens.
    Only ``micro_batches``, whose sum is the step, are sorted.

    Args:
        rows: how many there are.
        batch_size: rows a batch.
        seed, epoch: all that the order depends on.
    """
    order = np.random.default_rng(derive_seed("epoch", seed, epoch)).permutation(rows).tolist()
    return [order[start : start + batch_size] for start in range(0, rows, batch_size)]


class BatchPlan:
    """The batches of a run, by step: a pure function of seed and step, so a step number is the data's position."""

    def __init__(self, rows: int, batch_size: int, *, seed: int) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []
        self.steps_per_epoch = -(-rows // batch_size)

    def rows(self, step: int) -> list[int]:
        """The rows of ``step``, counted from 0 through all epochs."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = epoch_batches(self._rows, self._batch_size, seed=self._seed, epoch=epoch)
            self._epoch = epoch
        return self._batches[at]


class RowStream:
    """Rows in random order without end: one permutation after the other, so each row comes once before any repeats.

    ``position``, the number of rows drawn so far, is all that a checkpoint needs; set it to go on from there.
    """

    def __init__(self, count: int, *, seed: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}: a stream needs at least 1 row")
        self._count = count
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []
        self.position = 0

    def draw(self, number: int) -> list[int]:
        """The next ``number`` rows; across the end of an epoch the next permutation follows."""
        drawn = []
        for position in range(self.position, self.position + number):
            epoch, at = divmod(position, self._count)
            if epoch != self._epoch:
                random = np.random.default_rng(derive_seed("stream", self._seed, epoch))
                self._order = random.permutation(self._count).tolist()
                self._epoch = epoch
            drawn.append(self._order[at])
        self.position += number
        return drawn


def minibatches(count: int, *, epochs: int, parts: int, seed: int, step: int) -> Iterator[list[int]]:
    """Rows of each optimiser step on one rollout: every row once an epoch, in a fresh permutation each.

    Of one step an epoch the order is left as it is: it would mean nothing.

    Args:
        count: rows of the rollout.
        epochs: passes over them.
        parts: optimiser steps an epoch; as many as there are rows where those are fewer.
        seed, step: all that the order depends on, beside the epoch.
    """
    for epoch in range(epochs):
        if parts == 1:
            yield list(range(count))
            continue
        random = np.random.default_rng(derive_seed("minibatches", seed, step, epoch))
        yield from (part.tolist() for part in np.array_split(random.permutation(count), min(parts, count)))


def micro_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Cuts a batch into parts of at most ``max_tokens`` tokens, padding counted unless ``packed``, sorted by length.

    A sequence that is longer by itself forms a part of its own. Indices refer to ``lengths``.
    """
    parts: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        # Longest first, so the first of a part is what its others are padded to.
        tokens += lengths[index] if packed or not parts else lengths[parts[-1][0]]
        if parts and tokens <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
            tokens = lengths[index]
    return parts


def pad_right(sequences: Sequence[Ids | Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, S) int64 padded on the right, and their mask (B, S), True on real tokens."""
    lengths = [len(sequence) for sequence in sequences]
    ids = np.full((len(sequences), max(lengths)), pad_id, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : lengths[row]] = sequence
    mask_BS = torch.arange(ids.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    return torch.from_numpy(ids).to(device), mask_BS.to(device)


def learned_mask(mask_BS: Tensor, learned: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """(B, S) True where a row is learned: its stretches are given by their first place and the one after their last."""
    wanted = np.zeros(mask_BS.shape, dtype=bool)
    for row, stretches in enumerate(learned):
        for start, end in stretches:
            wanted[row, start:end] = True
    return mask_BS & torch.from_numpy(wanted).to(mask_BS.device)

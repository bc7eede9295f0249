"""A batch of sequences laid out as one row of tokens, and cut into parts that still hold what they look at.

Shapes: N tokens of the row, M of them asked for, S tokens of one sequence.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Fewer common tokens are not worth a piece of their own.
MIN_SHARED = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of the row that attend, causally, to a prefix (which may be empty) and to themselves.

    The first ``seen_only`` of them don't attend: nobody asks for what they would find.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0
    seen_only: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class Row:
    """A batch laid out as one row.

    ``places``: where in the row each sequence's tokens are, (S,) each. ``asked_M``: places whose last hidden states are
    asked for, in order; None for all.
    """

    ids_N: Tensor
    positions_N: Tensor
    pieces: tuple[Piece, ...]
    places: tuple[Tensor, ...] = ()
    asked_M: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    """What attention needs in every layer alike and makes in the first."""


def lay_out(sequences: Sequence[Sequence[int]], *, share: bool) -> Row:
    """``sequences`` as one row; with ``share`` those that begin alike share their beginning. None may be empty."""
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    groups = _groups(arrays) if share else [(0, [index]) for index in range(len(arrays))]
    ids: list[np.ndarray[Any, Any]] = []
    positions: list[np.ndarray[Any, Any]] = []
    pieces: list[Piece] = []
    places: list[np.ndarray[Any, Any]] = [np.empty(0)] * len(arrays)
    end = 0

    def add(tokens: np.ndarray[Any, Any], first_position: int, prefix: tuple[int, int]) -> np.ndarray[Any, Any]:
        nonlocal end
        ids.append(tokens)
        positions.append(np.arange(first_position, first_position + len(tokens)))
        pieces.append(Piece(end, len(tokens), *prefix))
        end += len(tokens)
        return np.arange(end - len(tokens), end)

    for shared, members in groups:
        prefix_place = add(arrays[members[0]][:shared], 0, (0, 0)) if shared else np.empty(0, dtype=np.int64)
        prefix = (int(prefix_place[0]), shared) if shared else (0, 0)
        for index in members:
            places[index] = np.concatenate([prefix_place, add(arrays[index][shared:], shared, prefix)])
    return Row(
        ids_N=torch.from_numpy(np.concatenate(ids)),
        positions_N=torch.from_numpy(np.concatenate(positions)),
        pieces=tuple(pieces),
        places=tuple(torch.from_numpy(place) for place in places),
    )


def _groups(arrays: Sequence[np.ndarray[Any, Any]]) -> list[tuple[int, list[int]]]:
    """(shared tokens, indices of the sequences that share them); every sequence keeps at least one token of its own."""
    order = sorted(range(len(arrays)), key=lambda index: arrays[index].tolist())
    groups: list[tuple[int, list[int]]] = []
    for index in order:
        if groups:
            shared, members = groups[-1]
            first, own = arrays[members[0]], arrays[index]
            most = shared if len(members) > 1 else len(first) - 1
            common = _common(first[:most], own[: len(own) - 1])
            # Joining must save more than it costs those who share more already.
            if common >= MIN_SHARED and common * len(members) >= shared * (len(members) - 1):
                groups[-1] = (common, [*members, index])
                continue
        groups.append((0, [index]))
    return groups


def _common(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> int:
    """Length of the common beginning."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def cut(row: Row, asked_M: Tensor, limit: int) -> Iterator[Row]:
    """The row in parts of about ``limit`` tokens, cut where no prefix is cut off from those who share it."""
    pending: list[Piece] = []

    def part() -> Row:
        start, end = pending[0].start, pending[-1].end
        first, last = torch.searchsorted(asked_M, torch.tensor([start, end])).tolist()
        moved = [replace(p, start=p.start - start, prefix_start=max(0, p.prefix_start - start)) for p in pending]
        pending.clear()
        return Row(
            ids_N=row.ids_N[start:end],
            positions_N=row.positions_N[start:end],
            pieces=tuple(moved),
            asked_M=asked_M[first:last] - start,
        )

    for group in _families(row.pieces):
        if pending and group[-1].end - pending[0].start > limit:
            yield part()
        pending.extend(group)
    yield part()


def attending(pieces: Sequence[Piece], asked_M: Tensor) -> tuple[Piece, ...]:
    """Pieces without the tokens at either end that are not asked for, and that none that is asked for looks at."""
    places_M = asked_M.tolist()
    found = []
    for piece in pieces:
        first, end = (bisect.bisect_left(places_M, place) for place in (piece.start, piece.end))
        if first < end:
            length = places_M[end - 1] + 1 - piece.start
            found.append(replace(piece, length=length, seen_only=places_M[first] - piece.start))
    return tuple(found)


def _families(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that hang together, in order: a prefix and its tails, or one alone."""
    families: list[list[Piece]] = []
    for piece in pieces:
        if piece.prefix_length:
            families[-1].append(piece)
        else:
            families.append([piece])
    return families

"""Reductions over the valid tokens of right-padded batches.

Shapes: B sequences, T response tokens. A mask is boolean, (B, T), True on the response's own tokens (its EOS among
them) and False on padding.

Padding may hold anything, NaN included. Multiplying by the mask does not silence it, since NaN * 0 is NaN, and
selecting after the arithmetic silences the value alone: the backward pass still multiplies a zero gradient by an
infinite derivative. So every function here and beside it replaces padding first and computes afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Refuses tensors whose shapes differ, naming the first and the one that departs from it.

    Raises:
        ValueError: two shapes differ.
    """
    (first, expected), *others = ((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    for name, shape in others:
        if shape != expected:
            raise ValueError(f"{name} has shape {shape}, {first} has {expected}: they must be the same")


def check_batch(mask_BT: Tensor, **tensors_BT: Tensor) -> None:
    """Refuses a mask that is not a boolean (B, T) tensor of at least one cell, and tensors of another shape than it.

    Raises:
        ValueError: names the tensor, its shape or type, and what is expected.
    """
    if mask_BT.dtype != torch.bool:
        raise ValueError(f"mask_BT has dtype {mask_BT.dtype}: it must be torch.bool, True on valid tokens")
    if mask_BT.dim() != 2 or mask_BT.numel() == 0:
        raise ValueError(f"mask_BT has shape {tuple(mask_BT.shape)}: it must be (sequences, tokens), both at least 1")
    check_same_shape(mask_BT=mask_BT, **tensors_BT)


def check_right_padded(mask_BT: Tensor) -> None:
    """Refuses a mask in which a valid token follows padding. Costs one device synchronisation.

    Raises:
        ValueError: names the first rows that are not right-padded.
    """
    broken_B = (mask_BT[:, 1:] & ~mask_BT[:, :-1]).any(dim=1)
    if broken_B.any():
        raise ValueError(f"responses must be right-padded: in {rows(broken_B)} a valid token follows padding")


def rows(selected_B: Tensor) -> str:
    """The selected rows in words, for messages: ``rows 0, 3, 4`` or, of many, the first eight and their number."""
    found = [int(row) for row in selected_B.nonzero()[:, 0]]
    shown = ", ".join(map(str, found[:8]))
    return f"rows {shown}" + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def fill_padding(x_BT: Tensor, mask_BT: Tensor, value: float = 0.0) -> Tensor:
    """``x_BT`` with padding replaced by ``value``; padded cells receive a gradient of exactly 0."""
    return x_BT.masked_fill(~mask_BT, value)


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over valid tokens: a 0-dimensional tensor, 0 where there is none."""
    check_batch(mask_BT, x_BT=x_BT)
    return fill_padding(x_BT, mask_BT).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the valid tokens of the whole batch (not a mean of per-sequence means): a 0-dimensional tensor.

    Raises:
        ValueError: no token is valid.
    """
    count = int(mask_BT.sum())
    if count == 0:
        raise ValueError("the mean over 0 valid tokens is undefined: mask_BT is False everywhere")
    return masked_sum(x_BT, mask_BT) / count


def masked_var(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Bessel's variance (divisor n - 1) over the valid tokens of the whole batch: a 0-dimensional tensor.

    Raises:
        ValueError: fewer than 2 tokens are valid.
    """
    count = int(mask_BT.sum())
    if count < 2:
        raise ValueError(f"a variance needs at least 2 valid tokens, mask_BT has {count}")
    # Filled once more before the square: its derivative at a NaN is NaN, even for a gradient of 0.
    return fill_padding(x_BT - masked_mean(x_BT, mask_BT), mask_BT).square().sum() / (count - 1)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations of some numbers: what processes exchange to whiten over all of them."""

    count: int
    mean: float
    squared_deviations: float

    @property
    def variance(self) -> float:
        """Bessel's variance (divisor n - 1).

        Raises:
            ValueError: fewer than 2 numbers.
        """
        if self.count < 2:
            raise ValueError(f"a variance needs at least 2 numbers, there are {self.count}")
        return self.squared_deviations / (self.count - 1)


def masked_moments(x_BT: Tensor, mask_BT: Tensor) -> Moments:
    """Moments of the valid tokens of this process; of none, count 0 and zeros, which ``combine_moments`` ignores."""
    count = int(mask_BT.sum())
    if count == 0:
        check_batch(mask_BT, x_BT=x_BT)
        return Moments(count=0, mean=0.0, squared_deviations=0.0)
    mean = masked_mean(x_BT.detach(), mask_BT)
    squared_deviations = fill_padding(x_BT.detach() - mean, mask_BT).square().sum()
    return Moments(count=count, mean=float(mean), squared_deviations=float(squared_deviations))


def combine_moments(parts: Sequence[Moments]) -> Moments:
    """Moments of the union of disjoint samples, such as the tokens of every process: of one, there is no need.

    Source: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances";
    stable where sums of squares would cancel.
    """
    count = sum(part.count for part in parts)
    if count == 0:
        return Moments(count=0, mean=0.0, squared_deviations=0.0)
    mean = math.fsum(part.count * part.mean for part in parts) / count
    within = math.fsum(part.squared_deviations for part in parts)
    between = math.fsum(part.count * (part.mean - mean) ** 2 for part in parts)
    return Moments(count=count, mean=mean, squared_deviations=within + between)

"""Random batches of responses, and what it means to agree. Shapes: B sequences, T response tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

T = 8
SEEDS = st.integers(0, 2**31)


@dataclass
class Batch:
    """Right-padded responses of given lengths, and float64 numbers for them. Padding holds numbers like any cell."""

    seed: int
    lengths: list[int]
    generator: torch.Generator = field(init=False, repr=False)
    mask_BT: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.mask_BT = torch.arange(T) < torch.tensor(self.lengths)[:, None]

    def normal(self, scale: float = 1.0) -> Tensor:
        """(B, T), others at every call."""
        return scale * torch.randn(len(self.lengths), T, generator=self.generator, dtype=torch.float64)

    def scores(self) -> Tensor:
        """(B,)"""
        return torch.randn(len(self.lengths), generator=self.generator, dtype=torch.float64)

    def logprobs(self) -> Tensor:
        """(B, T), all below 0."""
        return -self.normal(2.0).abs()


# At least the 8 tokens that whitening wants.
BATCHES = st.builds(
    Batch, SEEDS, st.lists(st.integers(1, T), min_size=2, max_size=6).filter(lambda lengths: sum(lengths) >= 8)
)
FULL_BATCHES = st.builds(Batch, SEEDS, st.lists(st.just(T), min_size=1, max_size=6))


def assert_agree(found: Tensor | float, expected: Tensor | float) -> None:
    """To 1e-6, absolute or relative, whichever is more: some libraries count in float32 or add 1e-8 to a count."""
    found, expected = (torch.as_tensor(x).detach().to(torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, of)
    return result

"""Log-probabilities of whole answers under a policy: what SFT, DPO and their references have in common.

Shapes: B answers, S tokens of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.batching import learned_mask, pad_right
from trainer.config import Packing
from trainer.distributed import collected, own_micro_batches
from trainer.encoding import EncodedResponse
from trainer.models import TokenLogprobs, padding_id
from trainer.optimisation import Precision, autocast
from trainer.packing import pack


class Answers:
    """A policy that is asked how likely given answers are."""

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        precision: Precision,
        packing: Packing = "auto",
        temperature: float = 1.0,
    ) -> None:
        """``temperature``: divides the logits, as it does where answers are sampled."""
        self.policy = policy
        self.device = policy.device
        self.pad_id = padding_id(tokenizer)
        self.precision: Precision = precision
        self.packed = pack(policy, packing, precision)
        self.temperature = temperature
        self.logprobs = TokenLogprobs(policy)

    def sums(self, rows: Sequence[EncodedResponse]) -> Tensor:
        """(B,) float64 log-probability of each answer, end token included, of all its turns where a row has several.

        In one forward pass; differentiable.
        """
        ids_BS, mask_BS = pad_right([row.ids for row in rows], self.pad_id, self.device)
        wanted_BS = learned_mask(mask_BS, [row.learned for row in rows])
        with autocast(self.device, self.precision):
            logprobs_BS, _ = self.logprobs(ids_BS, mask_BS, wanted_BS, self.temperature)
        sums_B: Tensor = logprobs_BS.sum(dim=1, dtype=torch.float64)
        return sums_B

    @torch.no_grad()
    def all_sums(self, rows: Sequence[EncodedResponse], micro_batch_tokens: int) -> Tensor:
        """(B,) the same of any number of answers, on the CPU, in evaluation mode, batch by batch.

        Of several processes each asks about its share, and all have the whole.
        """
        self.policy.eval()
        found: dict[int, float] = {}
        for part, weight in self.parts(rows, micro_batch_tokens):
            sums_B = self.sums([rows[index] for index in part]).cpu()
            found |= dict(zip(part, sums_B.tolist(), strict=True)) if weight else {}
        found = collected(found)
        return torch.tensor([found[index] for index in range(len(rows))], dtype=torch.float64)

    def parts(self, rows: Sequence[EncodedResponse], micro_batch_tokens: int) -> list[tuple[list[int], float]]:
        """Micro-batches of this process, and their weights, as ``distributed.own_parts`` has them."""
        return own_micro_batches([len(row) for row in rows], micro_batch_tokens, packed=self.packed)


def answer_tokens(row: EncodedResponse) -> int:
    """Tokens that are learned: of the answer, less the very first of the sequence, which nothing predicts."""
    return sum(end - start for start, end in row.learned)

"""Drawing the next token of each request from a model's logits.

Shapes: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from services.policy.running_batch import Row


def draw(logits_BV: Tensor, rows: Sequence[Row], vocab_size: int) -> tuple[list[int], list[float]]:
    """A token of each row, and its log-probability in the distribution that is sampled."""
    scores_BV = _processed(logits_BV.float(), rows)
    logprobs_BV = torch.log_softmax(scores_BV, dim=-1)
    greedy_B = scores_BV.argmax(dim=-1).tolist()
    # Inverse of the cumulative distribution at one uniform draw of the row's own generator: whatever else is in the
    # batch, the same seed draws the same token from the same distribution.
    cumulative_BV = logprobs_BV.double().exp().cumsum(dim=-1)
    draws_B1 = torch.stack([torch.rand(1, generator=row.generator, dtype=torch.float64) for row in rows])
    targets_B1 = draws_B1.to(cumulative_BV.device) * cumulative_BV[:, -1:]
    drawn_B = torch.searchsorted(cumulative_BV, targets_B1, right=True)[:, 0].clamp(max=vocab_size - 1).tolist()
    chosen = [g if row.sampling.temperature == 0 else d for row, g, d in zip(rows, greedy_B, drawn_B, strict=True)]
    index_B1 = torch.tensor(chosen, device=logprobs_BV.device)[:, None]
    return chosen, logprobs_BV.gather(1, index_B1)[:, 0].tolist()


def _processed(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """(B, V) logits of the distribution that is sampled: bias, end tokens held back, temperature, top-k, then top-p."""
    for index, row in enumerate(rows):
        if row.sampling.logit_bias:
            tokens, biases = zip(*row.sampling.logit_bias, strict=True)
            logits_BV[index, list(tokens)] += torch.tensor(biases, device=logits_BV.device)
        if len(row.token_ids) < row.sampling.min_new_tokens:
            logits_BV[index, list(row.sampling.stop_token_ids)] = -torch.inf
    temperatures_B = torch.tensor([row.sampling.temperature or 1.0 for row in rows], device=logits_BV.device)
    logits_BV = logits_BV / temperatures_B[:, None]
    for index, row in enumerate(rows):
        if 0 < row.sampling.top_k < logits_BV.shape[1]:
            smallest = logits_BV[index].topk(row.sampling.top_k).values[-1]
            logits_BV[index].masked_fill_(logits_BV[index] < smallest, -torch.inf)
        if row.sampling.top_p < 1.0:
            ordered_V, places_V = logits_BV[index].sort(descending=True)
            probabilities_V = ordered_V.softmax(dim=-1)
            # The token that crosses the threshold is still in.
            outside_V = probabilities_V.cumsum(dim=-1) - probabilities_V >= row.sampling.top_p
            logits_BV[index, places_V[outside_V]] = -torch.inf
    return logits_BV

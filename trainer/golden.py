"""Golden items: held-out texts and what the trained reward model says of them, kept with it for whoever serves it.

A service that encodes them to another number of tokens, or scores them otherwise, does not serve this model as it was
trained: another end token, template, tokenizer, truncation or precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer.batching import pad_right
from trainer.data import Preference
from trainer.encoding import EncodedPreference
from trainer.models import score_tokens


@torch.no_grad()
def golden_items(
    model: Any, rows: Sequence[Preference], encoded: Sequence[EncodedPreference], count: int
) -> list[dict[str, Any]]:
    """``count`` of the rows, or all if there are fewer, from the shortest to the longest, scored one by one in float32.

    Args:
        model: a reward model of ``load_reward_model``; it is left in evaluation mode.
        rows: held-out rows, with the prompts as they came: text, or messages for the chat template.
        encoded: their token ids, in the same order.
        count: how many; every second one is a rejected answer.
    """
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda index: len(encoded[index]))
    count = min(count, len(rows))
    chosen = [by_length[round(place * (len(rows) - 1) / max(1, count - 1))] for place in range(count)]
    items = []
    for place, index in enumerate(chosen):
        row, pair = rows[index], encoded[index]
        response, sequence = (row.rejected, pair.rejected) if place % 2 else (row.chosen, pair.chosen)
        # Alone, without padding, and without the autocast of training.
        score_1 = score_tokens(model, *pad_right([sequence.ids], 0, model.device))
        items.append(
            {"prompt": row.prompt, "response": response, "token_count": len(sequence), "score": float(score_1[0])}
        )
    return items

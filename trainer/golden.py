"""Golden items: held-out texts and what the trained reward model says of them, kept with it for whoever serves it.

A service that encodes them to another number of tokens, or scores them otherwise, does not serve this model as it was
trained: another end token, template, tokenizer, truncation or precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainer.batching import pad_right
from trainer.comparisons import Comparison
from trainer.data import Demonstration
from trainer.encoding import EncodedComparison, Encoder
from trainer.models import score_heads


@torch.no_grad()
def golden_items(
    model: Any,
    rows: Sequence[Comparison],
    encoded: Sequence[EncodedComparison],
    encoder: Encoder,
    count: int,
    heads: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """``count`` of the rows, or all if there are fewer, from the shortest to the longest, scored one by one in float32.

    Args:
        model: a reward model of ``load_reward_model``; it is left in evaluation mode.
        rows: held-out rows, with the prompts as they came: text, or messages for the chat template.
        encoded: their token ids, in the same order.
        encoder: of the same rows: by itself, as the service sees it, an answer may be cut less than beside others.
        count: how many; of every second one it is the worse answer of its first pair, else the better one.
        heads: weights of the heads in the score, by name; none for one head without a name.
    """
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda index: len(encoded[index]))
    count = min(count, len(rows))
    chosen = [by_length[round(place * (len(rows) - 1) / max(1, count - 1))] for place in range(count)]
    items = []
    for place, index in enumerate(chosen):
        pair = rows[index].judgements[0]
        answer = pair.second if place % 2 else pair.first
        row = rows[index]
        (sequence,) = encoder.demonstrations([Demonstration(prompt=row.prompt, completion=row.answers[answer])])
        # Alone, without padding, and without the autocast of training.
        scores_H = score_heads(model, *pad_right([sequence.ids], 0, model.device))[0].tolist()
        item = {
            "prompt": rows[index].prompt,
            "response": rows[index].answers[answer],
            "token_count": len(sequence),
            "score": scores_H[0],
        }
        if heads:
            item["attributes"] = dict(zip(heads, scores_H, strict=True))
            item["score"] = sum(weight * score for weight, score in zip(heads.values(), scores_H, strict=True))
        items.append(item)
    return items

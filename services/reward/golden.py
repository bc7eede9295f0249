"""Are the hosted model's scores those of the trainer? Golden items, kept with the model, are encoded and scored anew.

A reward model that is served with another end token, chat template, tokenizer or truncation than it was trained with
answers like any other, and wrongly. This is how it is found out before anybody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2
from services.reward.combining import Weights
from services.reward.hosted import LoadedReward, Trained
from services.reward.metadata import Golden, GoldenItem
from services.reward.preparing import Cut, Prepared, prepare
from services.reward.scorer import Scorer
from services.runtime.errors import StartError

# Largest difference that is rounding, by precision: share of the standard deviation of scores, share of the score.
_TOLERANCES = {"float32": (1e-4, 1e-5), "float16": (0.02, 0.005), "bfloat16": (0.1, 0.03)}


@dataclass(frozen=True, kw_only=True)
class GoldenReport:
    """What the check found: how many items, and the largest difference in standard deviations of the scores."""

    items: int
    worst: float


def check_golden(
    hosted: LoadedReward,
    scorer: Scorer,
    golden: Golden,
    *,
    name: str,
    trained: Trained,
    weights: Weights,
    dtype: str,
) -> GoldenReport:
    """Encodes the golden items as requests are, and compares lengths and scores with what the trainer kept.

    Args:
        hosted: for its encoding.
        scorer: of the model that the items are of.
        name: of the model, for messages.
        trained: how that model was trained.
        weights: of its heads, as kept.

    Raises:
        StartError: an item differs; names it, what was expected, what came, and what may be the cause.
    """
    limit = hosted.panel.max_sequence_tokens
    cut = Cut(trained.truncation or "refuse", min(limit, trained.max_tokens or limit))
    prepared = [_prepare(hosted, item, cut, _where(name, index)) for index, item in enumerate(golden.items)]
    rows = scorer.score([item.candidate.tokens for item in prepared])
    relative, rounding = _TOLERANCES[dtype]
    heads = [head.name for head in hosted.combination.heads]
    worst = 0.0
    for index, (item, row) in enumerate(zip(golden.items, rows, strict=True)):
        found = {"score": weights.of_model(row)} | {f"attributes.{k}": x for k, x in zip(heads, row, strict=False)}
        kept = {"score": item.score} | {f"attributes.{k}": x for k, x in item.attributes.items()}
        for what, expected in kept.items():
            if what not in found:
                raise StartError(f"{_where(name, index)}: {what} is kept, but the model has no such head")
            difference = abs(found[what] - expected)
            if not difference <= relative * golden.score_std + rounding * abs(expected):
                raise StartError(
                    f"{_where(name, index)}: {what} was {expected:.6g} in training, is {found[what]:.6g} here, of the "
                    f"same number of tokens ({item.token_count}), in {dtype}. Probable causes: the weights are of "
                    "another run than quartet.json, the tokenizer or its chat template was changed, or the precision "
                    f"is too low (--dtype). {_SKIP}"
                )
            worst = max(worst, difference / golden.score_std)
    return GoldenReport(items=len(prepared), worst=worst)


_SKIP = "If it is meant to be so, start with --golden-check off"


def _where(name: str, index: int) -> str:
    return f"model {name!r} is not served as it was trained: golden item {index}"


def _prepare(hosted: LoadedReward, item: GoldenItem, cut: Cut, where: str) -> Prepared:
    prepared = prepare(hosted, _as_request(item), cut)
    if isinstance(prepared, str):
        raise StartError(f"{where} is refused: {prepared}. {_SKIP}")
    if prepared.count != item.token_count:
        causes: Sequence[str] = ("the tokenizer or its chat template was changed", "truncation or max_tokens was")
        if abs(prepared.count - item.token_count) == 1:
            causes = ("the end token (append_eos) is appended in one of the two alone", *causes)
        raise StartError(
            f"{where} had {item.token_count} tokens in training, has {prepared.count} here. "
            f"Probable causes: {'; '.join(causes)}. {_SKIP}"
        )
    return prepared


def _as_request(item: GoldenItem) -> reward_pb2.ScoreItem:
    """What a client would send: the check goes the way of every request."""
    if isinstance(item.prompt, str):
        prompt = common_pb2.Prompt(text=item.prompt)
    else:
        turns = [common_pb2.ChatMessage(role=turn["role"], content=turn["content"]) for turn in item.prompt]
        prompt = common_pb2.Prompt(messages=common_pb2.ChatMessages(messages=turns))
    return reward_pb2.ScoreItem(prompt=prompt, response_text=item.response)

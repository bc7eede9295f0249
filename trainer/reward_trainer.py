"""A reward model's loss over comparisons, its gradient, and what is measured on held-out ones.

Shapes: N answers, P judged pairs of them, H heads, K answers to one prompt, S tokens of prompt and response.
Source: Stiennon et al. 2020, "Learning to summarize from human feedback"; Ouyang et al. 2022 (InstructGPT): all pairs
of one prompt are in one batch element, and their losses are averaged, whose answers are scored once each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batching import pad_right
from trainer.calibration import Array
from trainer.config import RewardSettings
from trainer.distributed import collected, own_micro_batches, own_parts, total
from trainer.encoding import EncodedComparison, EncodedResponse
from trainer.errors import CollapsedError
from trainer.losses import bradley_terry, centering, plackett_luce, score_l2
from trainer.models import padding_id, score_heads
from trainer.optimisation import autocast, clip_weights
from trainer.packing import group_micro_batches, pack
from trainer.reward_evaluation import judged_pairs, pair_figures
from trainer.sharding import in_turn


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The judged pairs of some rows. ``first_P`` and ``second_P``: (P,) scores; ``weights_P``: 1 / pairs of the row."""

    first_P: Tensor
    second_P: Tensor
    probability_P: Tensor
    margin_P: Tensor
    weights_P: Tensor


class RewardTrainer:
    """The loss, its gradient, and what is measured on held-out rows."""

    def __init__(self, model: Any, tokenizer: Any, settings: RewardSettings) -> None:
        self.settings = settings
        self.device = model.device
        self.pad_id = padding_id(tokenizer)
        self.model = model
        self.packed = pack(model, settings.packing, settings.precision)
        self.heads = list(settings.head_weights)
        self.weights_H = np.array(list(settings.head_weights.values()) or [1.0])

    def accumulate(self, rows: Sequence[EncodedComparison]) -> dict[str, float]:
        """Adds the gradient of the mean loss over ``rows``, however they are cut."""
        loss_sum = right = decided = margin = 0.0
        for part, weight in in_turn(self._parts(rows), self.settings.gradient_sync, self.model):
            some = [rows[index] for index in part]
            scores_NH = self.answer_scores([answer for row in some for answer in row.answers])
            loss = weight * self.loss(some, scores_NH) / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach())
            if not weight:
                continue
            pairs = self._pairs(some, scores_NH.detach())
            is_decided_P = pairs.probability_P > 0.5
            difference_P = (pairs.first_P - pairs.second_P)[is_decided_P]
            right += float((difference_P > 0).sum()) + 0.5 * float((difference_P == 0).sum())
            margin += float(difference_P.sum())
            decided += len(difference_P)
        sums = total({"loss": loss_sum, "right": right, "decided": decided, "margin": margin})
        decided = sums["decided"]
        return {
            "loss": sums["loss"],
            # Of a step with nothing but ties nothing is said.
            **({"accuracy": sums["right"] / decided, "margin_mean": sums["margin"] / decided} if decided else {}),
            "tokens": sum(len(answer) for row in rows for answer in row.answers),
        }

    def loss(self, rows: Sequence[EncodedComparison], scores_NH: Tensor) -> Tensor:
        """Sum over ``rows`` of their losses, each the mean over its judged pairs or, of a ranking, as it is asked for.

        Args:
            rows: with N answers together.
            scores_NH: (N, H) of the answers, row after row.
        """
        settings = self.settings
        pairs = self._pairs(rows, scores_NH)
        whole_order = settings.ranking_loss == "plackett-luce"
        # Two that are ranked are a pair: their likelihood is Bradley-Terry's.
        by_pairs = [not (whole_order and row.ranked and len(row.answers) > 2) for row in rows]
        per_pair = [flag for row, flag in zip(rows, by_pairs, strict=True) for _ in row.judgements]
        loss = bradley_terry(
            pairs.first_P,
            pairs.second_P,
            pairs.margin_P,
            settings.label_smoothing,
            settings.robust,
            pairs.probability_P,
            pairs.weights_P * pairs.weights_P.new_tensor(per_pair),
        )
        start = 0
        for row, flag in zip(rows, by_pairs, strict=True):
            if not flag:
                scores_K = scores_NH[start : start + len(row.answers), self._head(row.judgements[0].attribute)]
                loss = loss + plackett_luce(scores_K)
            start += len(row.answers)
        if settings.centering:
            loss = loss + settings.centering * centering(pairs.first_P, pairs.second_P, pairs.weights_P)
        if settings.score_l2:
            loss = loss + settings.score_l2 * score_l2(pairs.first_P, pairs.second_P, pairs.weights_P)
        return loss

    def after_step(self) -> None:
        """Weight clipping, where it is asked for."""
        if self.settings.weight_clip is not None:
            clip_weights(self.model.parameters(), self.settings.weight_clip)

    def answer_scores(self, answers: Sequence[EncodedResponse]) -> Tensor:
        """(N, H) scores in one forward pass, each read at the answer's last token."""
        ids_NS, mask_NS = pad_right([answer.ids for answer in answers], self.pad_id, self.device)
        with autocast(self.device, self.settings.precision):
            return score_heads(self.model, ids_NS, mask_NS)

    def evaluate(self, rows: Sequence[EncodedComparison], scores: Sequence[Array] | None = None) -> dict[str, float]:
        """Held-out figures; the loss is Bradley-Terry's, whatever was trained with. Equal scores count .5.

        ``scores``: as ``all_scores`` gives them, where they are known already.
        """
        known = self.all_scores(rows) if scores is None else scores
        pairs = judged_pairs(rows, [""] * len(rows), known, self.heads)
        figures = pair_figures(pairs.first_N, pairs.second_N, pairs.label_N)
        for place, name in enumerate(self.heads if len(self.heads) > 1 else ()):
            own = pairs.where(pairs.heads_N == place)
            if own.decided_N.sum() >= 2:
                own_figures = pair_figures(own.first_N, own.second_N, own.label_N)
                figures |= {f"{key}_{name}": own_figures[key] for key in ("eval_loss", "eval_accuracy")}
        return figures

    @torch.no_grad()
    def all_scores(self, rows: Sequence[EncodedComparison]) -> list[Array]:
        """(K, H) scores of each row's answers, in evaluation mode, batch by batch."""
        self.model.eval()
        found: dict[int, Array] = {}
        for part, weight in self._parts(rows):
            scores_NH = self.answer_scores([answer for index in part for answer in rows[index].answers])
            start = 0
            for index in part if weight else ():
                count = len(rows[index].answers)
                found[index] = scores_NH[start : start + count].double().cpu().numpy()
                start += count
        found = collected(found)
        return [found[index] for index in range(len(rows))]

    def combined(self, scores: Sequence[Array]) -> Array:
        """The model's one score of each answer, the weighted sum of its heads, row after row."""
        result: Array = np.concatenate([scores_KH @ self.weights_H for scores_KH in scores])
        return result

    @torch.no_grad()
    def calibrate(self, samples: Sequence[EncodedResponse]) -> dict[str, float] | None:
        """Mean and standard deviation of the combined scores of ``samples``; None without any.

        Raises:
            CollapsedError: all of them score the same.
        """
        if not samples:
            return None
        self.model.eval()
        found: dict[int, float] = {}
        lengths = [len(sample) for sample in samples]
        for part, weight in own_micro_batches(lengths, self.settings.micro_batch_tokens, packed=self.packed):
            scores_NH = self.answer_scores([samples[index] for index in part])
            if weight:
                found |= dict(zip(part, scores_NH.double().cpu().numpy() @ self.weights_H, strict=True))
        found = collected(found)
        scores = np.array([found[index] for index in range(len(samples))])
        std = float(scores.std(ddof=1))
        if not std > 0:
            raise CollapsedError("the reward model gives all calibration samples the same score")
        return {"mean": float(scores.mean()), "std": std, "count": len(scores)}

    def _parts(self, rows: Sequence[EncodedComparison]) -> list[tuple[list[int], float]]:
        def cut(mine: list[int]) -> list[list[int]]:
            groups = [[answer.ids for answer in rows[index].answers] for index in mine]
            return group_micro_batches(groups, self.settings.micro_batch_tokens, packed=self.packed)

        return own_parts([sum(map(len, row.answers)) for row in rows], cut)

    def _head(self, attribute: str | None) -> int:
        return self.heads.index(attribute) if attribute is not None else 0

    def _pairs(self, rows: Sequence[EncodedComparison], scores_NH: Tensor) -> _Pairs:
        first, second, heads, probability, margin, weights = [], [], [], [], [], []
        start = 0
        for row in rows:
            for judgement in row.judgements:
                first.append(start + judgement.first)
                second.append(start + judgement.second)
                heads.append(self._head(judgement.attribute))
                probability.append(judgement.probability)
                own = self.settings.margin if judgement.margin is None else judgement.margin
                # Nothing wins a tie.
                margin.append(own if judgement.decided else 0.0)
                weights.append(1.0 / len(row.judgements))
            start += len(row.answers)
        return _Pairs(
            first_P=scores_NH[first, heads],
            second_P=scores_NH[second, heads],
            probability_P=scores_NH.new_tensor(probability),
            margin_P=scores_NH.new_tensor(margin),
            weights_P=scores_NH.new_tensor(weights),
        )

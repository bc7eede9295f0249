"""Ensembles of reward models: which rows each member sees, what they say together, and one folder to serve.

Shapes: M members, N judged pairs, K answers to one prompt, H heads.
Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quartet.fingerprint import derive_seed
from quartet.model_folder import METADATA_FILE, read_metadata
from trainer.calibration import Array, brier, expected_calibration_error, log_loss, sigmoid
from trainer.comparisons import Comparison
from trainer.config import RewardSettings
from trainer.encoding import EncodedComparison
from trainer.errors import DataError
from trainer.label_noise import Disagreement, pair_key
from trainer.reward_evaluation import accuracy, calibration, describe, judged_pairs
from trainer.runs import write_json

ENSEMBLE_KIND = "reward-ensemble"
# The price of a unit of variance that the reward service has by default.
_PENALTY = 0.5

REDUCTIONS: dict[str, Callable[[Array], Array]] = {
    "mean": lambda scores_MK: scores_MK.mean(axis=0),
    "worst_case": lambda scores_MK: scores_MK.min(axis=0),
    "uncertainty": lambda scores_MK: scores_MK.mean(axis=0) - _PENALTY * scores_MK.var(axis=0),
}
"""From (M, K) normalised scores to (K,), as the reward service has them."""


def member_name(number: int) -> str:
    return f"member-{number}"


def member_settings(settings: RewardSettings, number: int) -> RewardSettings:
    """Of one member: a folder of its own in OUTPUT, and a seed of its own for new weights, dropout and order."""
    return settings.model_copy(
        update={
            "output": settings.output / member_name(number),
            "seed": derive_seed("member", settings.seed, number),
            "baselines": False,
        }
    )


def unseen_by(rows: Sequence[Comparison], settings: RewardSettings) -> list[set[str]]:
    """Of each member the prompts (groups) that it does not train on: all but ``member_fraction`` of them, or one off.

    The prompts lie in a circle, in an order that is drawn, and each member leaves out those that stand together from a
    point of its own on, the points being equally far from each other. So every prompt is left out by as many members
    as any other, give or take one.

    Raises:
        DataError: nothing would be left to train on.
    """
    groups = sorted({row.group_key for row in rows})
    random.Random(derive_seed("subset", settings.seed)).shuffle(groups)
    count = len(groups)
    seen = round(settings.member_fraction * count)
    if not seen:
        raise DataError(
            f"--member-fraction is {settings.member_fraction:g}: of {count} prompts to train on that is none; raise it"
        )
    starts = [number * count // settings.members for number in range(settings.members)]
    return [{groups[(start + place) % count] for place in range(count - seen)} for start in starts]


def rows_of_member(rows: Sequence[Comparison], settings: RewardSettings, number: int) -> list[Comparison]:
    """Those that member ``number`` trains on."""
    unseen = unseen_by(rows, settings)[number]
    return [row for row in rows if row.group_key not in unseen]


@dataclass(frozen=True, kw_only=True)
class MemberScores:
    """What one member says: (K, H) scores of each row's answers, held out and trained on, and what is kept with it."""

    held_out: Sequence[Array]
    trained: Sequence[Array]
    weights_H: Array
    mean: float
    std: float
    temperature: float

    @classmethod
    def of(cls, folder: Path, *, held_out: Sequence[Array], trained: Sequence[Array], weights_H: Array) -> MemberScores:
        """With the statistics and temperature of the model in ``folder``."""
        kept = read_metadata(folder)
        return cls(
            held_out=held_out,
            trained=trained,
            weights_H=weights_H,
            mean=kept["normalisation"]["mean"],
            std=kept["normalisation"]["std"],
            temperature=kept.get("calibration", {}).get("temperature", 1.0),
        )

    def normalised(self, scores_KH: Array) -> Array:
        """(K,) combined scores in standard deviations of the calibration samples."""
        result: Array = (scores_KH @ self.weights_H - self.mean) / self.std
        return result


def disagreements(
    rows: Sequence[Comparison],
    encoded: Sequence[EncodedComparison],
    members: Sequence[MemberScores],
    settings: RewardSettings,
    unseen_rows: int,
) -> list[Disagreement]:
    """Of each judged pair, what the members say that have not seen it, or all of them where all have.

    Args:
        rows: training rows and, at their end, ``unseen_rows`` that no member trained on.
        encoded: the same.
        members: with ``trained`` scores of these rows.
    """
    heads = list(settings.head_weights)
    pairs = [judged_pairs(encoded, [""] * len(encoded), member.trained, heads) for member in members]
    # Of each head by itself: the statistics kept with a model are of the sum of its heads.
    stds = [np.concatenate(list(member.trained)).std(axis=0, ddof=1) for member in members]
    scaled_MN = np.array([pair.difference_N / std_H[pair.heads_N] for pair, std_H in zip(pairs, stds, strict=True)])
    right_MN = np.array(
        [sigmoid(pair.difference_N / m.temperature) for pair, m in zip(pairs, members, strict=True)], dtype=np.float64
    )
    found = []
    number = 0
    trained = len(rows) - unseen_rows
    left_out = unseen_by(rows[:trained], settings)
    for index, row in enumerate(rows):
        unseen = [m for m in range(len(members)) if index >= trained or row.group_key in left_out[m]]
        asked = unseen or list(range(len(members)))
        for judgement in row.judgements:
            values_M = scaled_MN[asked, number]
            found.append(
                Disagreement(
                    where=row.where,
                    key=pair_key(row, judgement),
                    label=judgement.probability,
                    mean=float(values_M.mean()),
                    std=float(values_M.std(ddof=1)) if len(asked) > 1 else None,
                    probability=float(right_MN[asked, number].mean()),
                    members=len(asked),
                    unseen=bool(unseen),
                )
            )
            number += 1
    return found


def evaluate_ensemble(
    held_out: Sequence[EncodedComparison],
    groups: Sequence[str],
    members: Sequence[MemberScores],
    heads: Sequence[str],
) -> dict[str, Any]:
    """What the members say together of held-out pairs, for evaluation.json.

    Several heads: each head's mean over members, as the service tells it. One: the score by every reduction, members
    normalised first, and the probability that ``Compare`` gives, the mean of the members' own.
    """
    own = [judged_pairs(held_out, groups, member.held_out, heads) for member in members]
    alone = [accuracy(pairs.difference_N, pairs).as_json() for pairs in own]
    if len(heads) > 1:
        mean = [np.mean(scores_MKH, axis=0) for scores_MKH in zip(*(m.held_out for m in members), strict=True)]
        pairs = judged_pairs(held_out, groups, mean, heads)
        by_head = {
            name: describe(part, None)
            for place, name in enumerate(heads)
            if (part := pairs.where(pairs.heads_N == place)).decided_N.sum() >= 2
        }
        return {**describe(pairs, None), "heads": by_head, "members": alone}
    rows_MK = [
        np.array([member.normalised(scores_KH) for member, scores_KH in zip(members, row, strict=True)])
        for row in zip(*(member.held_out for member in members), strict=True)
    ]
    reduced = {
        name: judged_pairs(held_out, groups, [reduce(scores_MK)[:, None] for scores_MK in rows_MK], heads)
        for name, reduce in REDUCTIONS.items()
    }
    pairs = reduced["mean"]
    before_N = np.mean([sigmoid(p.difference_N) for p in own], axis=0)
    after_N = np.mean([sigmoid(p.difference_N / m.temperature) for p, m in zip(own, members, strict=True)], axis=0)
    return {
        **describe(pairs, None),
        "eval_loss": float(log_loss(before_N, pairs.label_N).mean()),
        "eval_brier": float(brier(before_N, pairs.label_N).mean()),
        "eval_ece": expected_calibration_error(before_N, pairs.label_N),
        "calibration": calibration(before_N, after_N, pairs),
        "reductions": {name: accuracy(p.difference_N, p).as_json() for name, p in reduced.items()},
        "spread_mean": float(np.concatenate([scores_MK.std(axis=0) for scores_MK in rows_MK]).mean()),
        "members": alone,
    }


def save_ensemble(folder: Path, members: int) -> None:
    """Makes the models in ``folder`` one that the reward service serves as an ensemble.

    Raises:
        OutputError: it can't be written.
    """
    content = {"kind": ENSEMBLE_KIND, "members": [member_name(number) for number in range(members)]}
    write_json(folder / METADATA_FILE, content)

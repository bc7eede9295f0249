"""Which rows form a step, and what a mean over tokens learns from them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from trainer.batching import BatchPlan, epoch_batches
from trainer.config import SftSettings
from trainer.errors import ModelError
from trainer.runs import Stage, fit


@pytest.mark.parametrize(("rows", "size"), [(64, 16), (70, 16), (5, 16), (1, 1)])
def test_every_row_comes_once_an_epoch_and_the_last_batch_may_be_smaller(rows, size):
    batches = epoch_batches(rows, size, seed=3, epoch=2)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert [len(batch) for batch in batches] == [size] * (rows // size) + [rows % size] * (rows % size > 0)
    assert batches == epoch_batches(rows, size, seed=3, epoch=2)
    plan = BatchPlan(rows, size, seed=3)
    assert [plan.rows(2 * plan.steps_per_epoch + at) for at in range(len(batches))] == batches


def test_rows_that_stand_together_in_a_batch_are_as_chance_has_it():
    """Neighbours in a file, or rows of one length: of 16 rows of 2 kinds, how many are of the first is binomial."""
    found = Counter(sum(row < 8_000 for row in batch) for batch in epoch_batches(16_000, 16, seed=0, epoch=0))
    expected = [1_000 * math.comb(16, k) / 2**16 for k in range(17)]
    assert sum((found[k] - e) ** 2 / e for k, e in enumerate(expected) if e > 5) < 30  # Chi-squared, 8 degrees.


class Coin(nn.Module):
    """One parameter: the logarithm of the odds of a token."""

    def __init__(self) -> None:
        super().__init__()
        self.odds = nn.Parameter(torch.zeros(()))


LENGTHS, CHANCES = (8, 200), (0.9, 0.1)


def coin_stage(rows: int) -> Stage:
    """Short rows say 1 nine times of ten, long rows once; a step is the mean over its tokens, as SFT's."""
    kinds = [row % 2 for row in range(rows)]
    model = Coin()

    def accumulate(batch: list[int]) -> dict[str, float]:
        tokens = torch.tensor([float(LENGTHS[kinds[row]]) for row in batch])
        said = torch.tensor([CHANCES[kinds[row]] for row in batch])
        odds = model.odds.expand(len(batch))
        loss = functional.binary_cross_entropy_with_logits(odds, said, weight=tokens, reduction="sum") / tokens.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach()), "tokens": float(tokens.sum())}

    return Stage(
        name="coin", model=model, data="", where=[f"row {row}" for row in range(rows)],
        accumulate=accumulate, evaluate=dict, watch=(),
    )  # fmt: skip


def settings_of(output: Path, **changes: object) -> SftSettings:
    values = {
        "batch_size": 16,
        "learning_rate": 0.02,
        "weight_decay": 0.0,
        "held_out_fraction": 0.0,
        "track": ("none",),
    }
    return SftSettings(model="m", data=("d",), output=output, **(values | changes))  # type: ignore[arg-type]


def test_a_run_learns_the_mean_over_tokens_and_not_that_over_rows(tmp_path):
    """Closed form: the gradient vanishes at the mean, over batches, of the share that a batch's tokens have of 1s.

    With 16 rows, of which k are short with the probability of a binomial distribution, that is .135; the mean over all
    tokens is .131, that over rows .5, and batches of rows of one length, such as sorted ones, learn the latter.
    """
    stage = coin_stage(3_200)
    fit(settings_of(tmp_path, epochs=20), stage, None)
    learned = float(torch.sigmoid(stage.model.odds.detach()))
    (short, long), (often, seldom) = LENGTHS, CHANCES
    share = [(k * short * often + (16 - k) * long * seldom) / (k * short + (16 - k) * long) for k in range(17)]
    fixed_point = float(np.dot(share, [math.comb(16, k) / 2**16 for k in range(17)]))
    of_all_tokens = (short * often + long * seldom) / (short + long)
    assert fixed_point == pytest.approx(0.1349, abs=1e-4)
    assert of_all_tokens == pytest.approx(0.1308, abs=1e-4)
    assert learned == pytest.approx(fixed_point, abs=0.004)


def test_dropout_of_a_model_that_has_none_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match=r"--dropout is 0\.1, and Coin has no dropout anywhere, so it would do nothing"
    ):
        fit(settings_of(tmp_path, dropout=0.1), coin_stage(32), None)

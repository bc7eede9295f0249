"""Facts about the losses of direct preference optimisation. Shapes: B pairs, N answers, A actions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.dpo_losses import AnswerLogprobs, DpoLoss, dpo_loss, kto_loss

LOGPROBS = st.floats(-60, -0.01)
PAIRS = st.lists(st.tuples(*[LOGPROBS] * 4, st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)
BETAS = st.floats(0.01, 2.0)


def sides(rows: list[tuple[float, ...]]) -> tuple[AnswerLogprobs, AnswerLogprobs]:
    """Chosen and rejected of (pi chosen, pi rejected, ref chosen, ref rejected, tokens chosen, tokens rejected)."""
    columns = torch.tensor(rows, dtype=torch.float64).T
    return (
        AnswerLogprobs(policy_B=columns[0], reference_B=columns[2], tokens_B=columns[4]),
        AnswerLogprobs(policy_B=columns[1], reference_B=columns[3], tokens_B=columns[5]),
    )


VECTOR = sides([(-10, -12, -11, -11.5, 3, 4), (-20, -18, -19, -19.5, 7, 5)])


@pytest.mark.parametrize(
    ("kind", "smoothing", "expected"),
    [(DpoLoss.SIGMOID, 0.0, 0.7234483), (DpoLoss.SIGMOID, 0.1, 0.7184482), (DpoLoss.IPO_SUM, 0.0, 34.25)],
)
def test_losses_of_the_reference_vector(kind, smoothing, expected):
    found = dpo_loss(*VECTOR, beta=0.1, kind=kind, label_smoothing=smoothing)
    assert found.item() == pytest.approx(expected, abs=1e-6)


@given(rows=PAIRS, beta=BETAS, e=st.floats(0.01, 0.45))
def test_every_loss_equals_its_definition(rows, beta, e):
    def of(kind: DpoLoss, smoothing: float = 0.0) -> float:
        return dpo_loss(*sides(rows), beta=beta, kind=kind, label_smoothing=smoothing).item()

    def nll(x: float) -> float:  # -log sigmoid(x), where it would overflow, too.
        return max(0.0, -x) + math.log1p(math.exp(-abs(x)))

    h = [(pc - rc) - (pr - rr) for pc, pr, rc, rr, _, _ in rows]
    means = [(pc - rc) / tc - (pr - rr) / tr for pc, pr, rc, rr, tc, tr in rows]
    right, flipped = [nll(beta * x) for x in h], [nll(-beta * x) for x in h]
    both = list(zip(right, flipped, strict=True))
    count = len(rows)
    assert of(DpoLoss.SIGMOID) == pytest.approx(sum(right) / count)
    assert of(DpoLoss.SIGMOID, e) == pytest.approx(sum((1 - e) * r + e * f for r, f in both) / count)
    robust = sum(((1 - e) * r - e * f) / (1 - 2 * e) for r, f in both) / count
    assert of(DpoLoss.ROBUST, e) == pytest.approx(robust, rel=1e-6, abs=1e-9)
    assert of(DpoLoss.IPO_SUM) == pytest.approx(sum((x - 0.5 / beta) ** 2 for x in h) / count)
    assert of(DpoLoss.IPO_MEAN) == pytest.approx(sum((x - 0.5 / beta) ** 2 for x in means) / count)
    # In expectation over labels flipped with probability e, the robust loss is that of the true labels.
    swapped = [(pr, pc, rr, rc, tr, tc) for pc, pr, rc, rr, tc, tr in rows]
    wrong = dpo_loss(*sides(swapped), beta=beta, kind=DpoLoss.ROBUST, label_smoothing=e).item()
    assert (1 - e) * of(DpoLoss.ROBUST, e) + e * wrong == pytest.approx(of(DpoLoss.SIGMOID), rel=1e-6, abs=1e-9)


@given(rows=PAIRS, beta=BETAS)
def test_a_policy_that_is_its_reference_has_the_loss_of_a_coin(rows, beta):
    same = sides([(pc, pr, pc, pr, tc, tr) for pc, pr, _, _, tc, tr in rows])
    assert dpo_loss(*same, beta=beta).item() == pytest.approx(math.log(2))
    assert same[0].gain_B.abs().max() == 0


@given(rows=PAIRS, beta=BETAS)
def test_the_gradient_of_the_difference_is_minus_beta_sigmoid_of_minus_beta_h(rows, beta):
    chosen, rejected = sides(rows)
    chosen.policy_B.requires_grad_()
    rejected.policy_B.requires_grad_()
    chosen.reference_B.requires_grad_()
    dpo_loss(chosen, rejected, beta=beta).backward()
    h_B = (chosen.gain_B - rejected.gain_B).detach()
    expected_B = -beta * torch.sigmoid(-beta * h_B) / len(rows)
    torch.testing.assert_close(chosen.policy_B.grad, expected_B)
    torch.testing.assert_close(rejected.policy_B.grad, -expected_B)
    assert chosen.reference_B.grad is None


@pytest.mark.parametrize("kind", [DpoLoss.IPO_MEAN, DpoLoss.IPO_SUM])
def test_the_optimum_of_ipo_is_at_one_over_two_beta(kind):
    beta = 0.25
    h = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    zero, tokens = torch.zeros(1, dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    optimiser = torch.optim.LBFGS([h], max_iter=50)

    def closure() -> Tensor:
        optimiser.zero_grad()
        chosen = AnswerLogprobs(policy_B=h, reference_B=zero, tokens_B=tokens)
        loss = dpo_loss(chosen, AnswerLogprobs(policy_B=zero, reference_B=zero, tokens_B=tokens), beta=beta, kind=kind)
        loss.backward()
        return loss

    optimiser.step(closure)
    per_token = 4 if kind is DpoLoss.IPO_MEAN else 1
    assert h.item() / per_token == pytest.approx(1 / (2 * beta), abs=1e-6)


def test_a_tabular_fit_recovers_the_reference_times_the_exponential_of_the_reward():
    """The theorem behind DPO: on all pairs of Bradley-Terry preferences its optimum is ref exp(r / beta) / Z."""
    generator = torch.Generator().manual_seed(0)
    beta, actions = 0.5, 6
    reward_A = torch.randn(actions, generator=generator, dtype=torch.float64)
    reference_A = torch.randn(actions, generator=generator, dtype=torch.float64).log_softmax(0)
    pairs = [(i, j, float(torch.sigmoid(reward_A[i] - reward_A[j]))) for i, j in itertools.permutations(range(6), 2)]
    logits_A = reference_A.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits_A], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    one = torch.ones(1, dtype=torch.float64)

    def closure() -> Tensor:
        optimiser.zero_grad()
        policy_A = logits_A.log_softmax(0)

        def answer(a: int) -> AnswerLogprobs:
            return AnswerLogprobs(policy_B=policy_A[a : a + 1], reference_B=reference_A[a : a + 1], tokens_B=one)

        terms = [weight * dpo_loss(answer(i), answer(j), beta=beta) for i, j, weight in pairs]
        loss = torch.stack(terms).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    expected_A = (reference_A + reward_A / beta).softmax(0)
    torch.testing.assert_close(logits_A.detach().softmax(0), expected_A, atol=1e-6, rtol=0)


@given(
    answers=st.lists(st.tuples(st.floats(-30, 30), st.booleans()), min_size=1, max_size=6),
    kl=st.floats(-5, 5),
    beta=BETAS,
    weights=st.tuples(st.floats(0, 3), st.floats(0, 3)),
)
def test_kto_equals_its_definition(answers, kl, beta, weights):
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))

    point = max(0.0, kl)
    expected = [
        weights[0] * (1 - sigmoid(beta * (gain - point))) if good else weights[1] * (1 - sigmoid(beta * (point - gain)))
        for gain, good in answers
    ]
    gains, good = zip(*answers, strict=True)
    found = kto_loss(
        torch.tensor(gains, dtype=torch.float64),
        torch.tensor(good),
        torch.tensor(kl, dtype=torch.float64, requires_grad=True),
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    assert found.item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    assert not found.requires_grad  # The estimate of KL receives none.


@pytest.mark.parametrize(("weights", "expected"), [((1.0, 1.0), 0.4626631), ((1.0, 2.0), 0.6815748)])
def test_kto_of_two_answers_by_hand(weights, expected):
    """1 - sigmoid(.1 (1 - .5)) = .4875026 of the good one, 1 - sigmoid(.1 (.5 + 2)) = .4378235 of the bad one."""
    found = kto_loss(
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.tensor([True, False]),
        0.5,
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_what_can_not_be_a_loss_is_refused():
    chosen, rejected = VECTOR
    one = AnswerLogprobs(policy_B=torch.zeros(1), reference_B=torch.zeros(1), tokens_B=torch.ones(1))
    table = AnswerLogprobs(policy_B=torch.zeros(1, 1), reference_B=torch.zeros(1, 1), tokens_B=torch.ones(1, 1))
    with pytest.raises(ValueError, match="beta is 0"):
        dpo_loss(chosen, rejected, beta=0.0)
    with pytest.raises(ValueError, match=r"rejected has shape \(1,\)"):
        dpo_loss(chosen, one, beta=0.1)
    with pytest.raises(ValueError, match="one number an answer"):
        dpo_loss(table, table, beta=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing is 0.1: ipo-sum has none"):
        dpo_loss(chosen, rejected, beta=0.1, kind=DpoLoss.IPO_SUM, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"must be torch.bool"):
        kto_loss(torch.zeros(2), torch.zeros(2), 0.0, beta=0.1)
    with pytest.raises(ValueError, match="undesirable_weight is -1"):
        kto_loss(torch.zeros(2), torch.ones(2, dtype=torch.bool), 0.0, beta=0.1, undesirable_weight=-1)

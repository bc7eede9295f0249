"""Facts about the reward model's losses. Shapes: B pairs, K ranked answers of one prompt."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.losses import bradley_terry, centering, pairwise_ranking, plackett_luce, score_l2

CHOSEN = torch.tensor([1.0, 0.0], dtype=torch.float64)
REJECTED = torch.tensor([0.0, 2.0], dtype=torch.float64)
RANKING = torch.tensor([2, 1, 0.5, -1], dtype=torch.float64)
SCORES = st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=1, max_size=6)
FORMS: list[dict[str, Any]] = [
    {},
    {"margin": 0.5},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "robust": True},
    {"margin": 0.5, "label_smoothing": 0.2},
]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _columns(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    chosen, rejected = zip(*pairs, strict=True)
    return torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)


# Pairs


def test_bradley_terry_of_the_reference_vector() -> None:
    assert bradley_terry(CHOSEN, REJECTED).item() == pytest.approx(1.2200949, abs=1e-6)


def test_bradley_terry_with_a_margin_of_the_reference_vector() -> None:
    assert bradley_terry(CHOSEN, REJECTED, margin=1).item() == pytest.approx(1.8708673, abs=1e-6)


@given(pairs=SCORES, margin=st.floats(0, 3), e=st.floats(0, 0.45), robust=st.booleans())
def test_bradley_terry_equals_its_definition(
    pairs: list[tuple[float, float]], margin: float, e: float, robust: bool
) -> None:
    expected = []
    for chosen, rejected in pairs:
        right = -math.log(_sigmoid(chosen - rejected - margin))
        flipped = -math.log(_sigmoid(rejected - chosen - margin))
        if robust:
            expected.append(((1 - e) * right - e * flipped) / (1 - 2 * e))
        else:
            expected.append((1 - e) * right + e * flipped)
    result = bradley_terry(*_columns(pairs), margin=margin, label_smoothing=e, robust=robust)
    assert result.item() == pytest.approx(sum(expected) / len(pairs), rel=1e-9, abs=1e-9)


def test_a_margin_of_each_pair_enters_its_own_term() -> None:
    result = bradley_terry(CHOSEN, REJECTED, margin=torch.tensor([0.0, 3.0], dtype=torch.float64))
    assert result.item() == pytest.approx(-(math.log(_sigmoid(1)) + math.log(_sigmoid(-5))) / 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_on_all_scores_of_a_prompt_leaves_the_loss(form: dict[str, Any]) -> None:
    of_prompt = torch.tensor([3.7, -12.0], dtype=torch.float64)
    shifted = bradley_terry(CHOSEN + of_prompt, REJECTED + of_prompt, **form)
    assert shifted.item() == pytest.approx(bradley_terry(CHOSEN, REJECTED, **form).item(), abs=1e-12)
    for loss in (plackett_luce, pairwise_ranking):
        assert loss(RANKING + 3.7).item() == pytest.approx(loss(RANKING).item(), abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_swapping_chosen_and_rejected_negates_the_gradient_of_each_score(form: dict[str, Any]) -> None:
    """The answer that was pulled up is pulled down exactly as the other one was."""
    a_B, b_B = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    grad_a_B, grad_b_B = torch.autograd.grad(bradley_terry(a_B, b_B, **form), (a_B, b_B))
    torch.testing.assert_close(grad_a_B, -grad_b_B)
    # At equal scores the swap has the same difference, 0, so each score's own gradient turns round.
    tie_a_B, tie_b_B = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    (as_chosen_B,) = torch.autograd.grad(bradley_terry(tie_a_B, tie_b_B, **form), tie_a_B)
    (as_rejected_B,) = torch.autograd.grad(bradley_terry(tie_b_B, tie_a_B, **form), tie_a_B)
    torch.testing.assert_close(as_chosen_B, -as_rejected_B)
    assert (as_chosen_B < 0).all()


def test_gradient_is_minus_sigmoid_of_the_negated_difference() -> None:
    chosen_B = CHOSEN.clone().requires_grad_()
    (gradient_B,) = torch.autograd.grad(bradley_terry(chosen_B, REJECTED), chosen_B)
    assert gradient_B.tolist() == pytest.approx([-_sigmoid(-1) / 2, -_sigmoid(2) / 2])


@pytest.mark.parametrize("e", [0.05, 0.1, 0.3])
def test_label_smoothing_is_least_at_log_of_one_minus_e_over_e(e: float) -> None:
    difference = torch.tensor([math.log((1 - e) / e)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss = bradley_terry(difference, zero, label_smoothing=e)
    (gradient,) = torch.autograd.grad(loss, difference)
    assert gradient.item() == pytest.approx(0, abs=1e-12)
    for step in (-0.1, 0.1):
        assert bradley_terry(difference.detach() + step, zero, label_smoothing=e) > loss


@pytest.mark.parametrize("e", [0.1, 0.3])
@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("difference", [-2.0, 0.3, 4.0])
def test_robust_loss_on_flipped_labels_is_in_expectation_the_plain_one_on_true_labels(
    e: float, margin: float, difference: float
) -> None:
    better, worse = torch.tensor([difference], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    robust = [
        bradley_terry(*pair, margin=margin, label_smoothing=e, robust=True).item()
        for pair in ((better, worse), (worse, better))
    ]
    assert (1 - e) * robust[0] + e * robust[1] == pytest.approx(bradley_terry(better, worse, margin=margin).item())


def test_robust_estimate_recovers_the_true_preference_from_flipped_labels_and_plain_does_not() -> None:
    """Of 10,000 comparisons of one pair, true P = sigma(2), 20 % flipped: the optimum of the robust form is 2."""
    e, truth = 0.2, 2.0
    observed = (1 - e) * _sigmoid(truth) + e * _sigmoid(-truth)
    ones = torch.ones(round(10_000 * observed), dtype=torch.float64)
    zeros = torch.ones(10_000 - len(ones), dtype=torch.float64)

    def optimum(**form: Any) -> float:
        difference = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([difference], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            # The pair's better answer won in `ones`, its worse one in `zeros`.
            won = torch.cat([difference * ones, 0 * zeros])
            lost = torch.cat([0 * ones, difference * zeros])
            loss = bradley_terry(won, lost, **form)
            loss.backward()
            return loss

        optimiser.step(closure)
        return difference.item()

    assert optimum(label_smoothing=e, robust=True) == pytest.approx(truth, abs=1e-2)
    assert optimum() == pytest.approx(math.log(observed / (1 - observed)), abs=1e-2)
    assert optimum() < 0.6 * truth


def test_scores_of_single_tokens_are_refused() -> None:
    """Historical: DeepSpeedExamples#316, the loss spanned pads of the shorter answer."""
    with pytest.raises(ValueError, match=r"chosen_B has shape \(2, 5\): it must be one score a sequence"):
        bradley_terry(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"chosen_B has shape \(2, 1\)"):
        bradley_terry(torch.zeros(2, 1), torch.zeros(2, 1))


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rejected_B has shape \(3,\), chosen_B has \(2,\)"):
        bradley_terry(CHOSEN, torch.zeros(3))
    with pytest.raises(ValueError, match="B at least 1"):
        centering(torch.zeros(0), torch.zeros(0))
    for e in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match="label_smoothing is"):
            bradley_terry(CHOSEN, REJECTED, label_smoothing=e)
    for margin in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin holds"):
            bradley_terry(CHOSEN, REJECTED, margin=margin)
    with pytest.raises(ValueError, match=r"margin has shape \(3,\)"):
        bradley_terry(CHOSEN, REJECTED, margin=torch.zeros(3))


def test_far_scores_have_a_finite_loss_and_gradient_in_float32() -> None:
    chosen_B = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry(chosen_B, torch.zeros(2))
    loss.backward()
    assert loss.item() == pytest.approx(5e3)
    assert chosen_B.grad is not None
    assert chosen_B.grad.tolist() == [-0.5, 0]


# Soft labels, ties, weights


@given(
    pairs=SCORES,
    margin=st.floats(0, 3),
    e=st.floats(0, 0.45),
    robust=st.booleans(),
    probability=st.floats(0, 1),
)
def test_a_soft_label_is_the_loss_in_expectation_over_who_won(
    pairs: list[tuple[float, float]], margin: float, e: float, robust: bool, probability: float
) -> None:
    chosen_B, rejected_B = _columns(pairs)
    form: dict[str, Any] = {"margin": margin, "label_smoothing": e, "robust": robust}
    won, lost = bradley_terry(chosen_B, rejected_B, **form), bradley_terry(rejected_B, chosen_B, **form)
    expected = probability * won.item() + (1 - probability) * lost.item()
    result = bradley_terry(chosen_B, rejected_B, probability=probability, **form)
    assert result.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_tie_pulls_two_scores_together_however_it_is_smoothed(form: dict[str, Any]) -> None:
    difference = torch.tensor([0.0, 1.5], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(bradley_terry(difference, zeros, probability=0.5, **form), difference)
    assert gradient[0].item() == pytest.approx(0, abs=1e-12)
    assert gradient[1].item() > 0


def test_weighted_losses_are_the_sums_of_the_pairs_own() -> None:
    weights_B = torch.tensor([0.25, 2.0], dtype=torch.float64)
    for loss in (bradley_terry, centering, score_l2):
        single = [loss(CHOSEN[i : i + 1], REJECTED[i : i + 1]).item() for i in range(2)]
        assert loss(CHOSEN, REJECTED).item() == pytest.approx(sum(single) / 2)
        expected = 0.25 * single[0] + 2.0 * single[1]
        assert loss(CHOSEN, REJECTED, weights_B=weights_B).item() == pytest.approx(expected)
    assert score_l2(CHOSEN, REJECTED).item() == pytest.approx((1 + 0 + 0 + 4) / 4)


def test_labels_that_are_no_probabilities_are_refused() -> None:
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"probability holds a value outside \[0, 1\]"):
            bradley_terry(CHOSEN, REJECTED, probability=p)
    with pytest.raises(ValueError, match=r"probability has shape \(3,\)"):
        bradley_terry(CHOSEN, REJECTED, probability=torch.zeros(3))
    with pytest.raises(ValueError, match=r"weights_B has shape \(3,\)"):
        bradley_terry(CHOSEN, REJECTED, weights_B=torch.zeros(3))


# Rankings


def test_plackett_luce_and_the_pairwise_mean_of_the_reference_vector() -> None:
    assert plackett_luce(RANKING).item() == pytest.approx(1.251552, abs=1e-6)
    assert pairwise_ranking(RANKING).item() == pytest.approx(0.227613, abs=1e-6)


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=6))
def test_rankings_equal_their_definitions(scores: list[float]) -> None:
    tensor = torch.tensor(scores, dtype=torch.float64)
    likelihood = 1.0
    for place in range(len(scores)):
        likelihood *= math.exp(scores[place]) / sum(math.exp(s) for s in scores[place:])
    assert plackett_luce(tensor).item() == pytest.approx(-math.log(likelihood), abs=1e-9)
    pairs = [-math.log(_sigmoid(a - b)) for a, b in itertools.combinations(scores, 2)]
    assert pairwise_ranking(tensor).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)


def test_plackett_luce_is_a_distribution_over_all_rankings() -> None:
    total = sum(math.exp(-plackett_luce(RANKING[list(order)]).item()) for order in itertools.permutations(range(4)))
    assert total == pytest.approx(1)


@given(pairs=SCORES)
def test_rankings_of_two_are_bradley_terry(pairs: list[tuple[float, float]]) -> None:
    chosen_B, rejected_B = _columns(pairs)
    scores_BK = torch.stack([chosen_B, rejected_B], dim=-1)
    expected = bradley_terry(chosen_B, rejected_B).item()
    assert plackett_luce(scores_BK).item() == pytest.approx(expected, abs=1e-9)
    assert pairwise_ranking(scores_BK).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("loss", [plackett_luce, pairwise_ranking])
def test_a_ranking_of_one_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"scores_K has shape \(3, 1\): a ranking needs at least 2 answers"):
        loss(torch.zeros(3, 1))


# Centring


@given(pairs=SCORES)
def test_centring_is_the_mean_square_of_the_sum(pairs: list[tuple[float, float]]) -> None:
    expected = sum((chosen + rejected) ** 2 for chosen, rejected in pairs) / len(pairs)
    assert centering(*_columns(pairs)).item() == pytest.approx(expected)


def test_centring_moves_the_free_constant_of_bradley_terry_to_zero() -> None:
    chosen_B, rejected_B = (CHOSEN + 9).requires_grad_(), (REJECTED + 9).requires_grad_()
    optimiser = torch.optim.SGD([chosen_B, rejected_B], lr=0.1)
    differences_B = (chosen_B - rejected_B).detach().clone()
    for _ in range(500):
        optimiser.zero_grad()
        centering(chosen_B, rejected_B).backward()
        optimiser.step()
    assert (chosen_B + rejected_B).abs().max().item() < 1e-6
    torch.testing.assert_close((chosen_B - rejected_B).detach(), differences_B)

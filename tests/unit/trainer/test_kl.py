"""Facts about KL estimators, their placement, and the controllers of its price.

Shapes: B sequences, T response tokens, V vocabulary, A actions.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.kl import (
    AdaptiveKlController,
    FixedKlController,
    KlEstimator,
    check_kl_placement,
    exact_kl,
    k1,
    k2,
    k3,
    kl_loss,
    sequence_kl,
)

ESTIMATORS = {KlEstimator.K1: k1, KlEstimator.K2: k2, KlEstimator.K3: k3}
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
LOGPROBS = torch.tensor([[-1, -0.5, -2, -0.3, -0.7], [-0.9, -1.5, -0.2, 0, 0]], dtype=torch.float64)
REF = torch.tensor([[-1.2, -0.4, -1.5, -0.3, -1], [-0.8, -2, -0.6, 0, 0]], dtype=torch.float64)


# Estimators


def test_k3_of_the_reference_vector() -> None:
    expected = torch.tensor([0.018731, 0.005171, 0.148721, 0, 0.040818], dtype=torch.float64)
    torch.testing.assert_close(k3(LOGPROBS, REF)[0], expected, atol=1e-6, rtol=0)


@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=8))
def test_estimators_equal_their_definitions(pairs: list[tuple[float, float]]) -> None:
    lp, ref = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    for i, (p, q) in enumerate(pairs):
        assert k1(lp, ref)[i].item() == p - q
        assert k2(lp, ref)[i].item() == pytest.approx((p - q) ** 2 / 2)
        assert k3(lp, ref)[i].item() == pytest.approx(math.exp(q - p) - 1 - (q - p), rel=1e-9, abs=1e-9)
        assert k3(lp, ref)[i].item() >= 0


def test_k3_keeps_its_digits_in_float32_next_to_the_reference() -> None:
    """exp(x) - 1 - x in float32 would be 0 or noise of 1e-7 where the truth is 5e-9."""
    lp = torch.tensor([-1e-4], dtype=torch.float32)
    truth = math.expm1(1e-4) - 1e-4
    assert k3(lp, torch.zeros(1)).item() == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize(
    ("mean", "estimator", "bias", "std"),
    [
        (0.1, k1, 0.0, 20.0),
        (0.1, k2, 0.002, 1.42),
        (0.1, k3, 0.0, 1.42),
        (1.0, k1, 0.0, 2.0),
        (1.0, k2, 0.25, 1.73),
        (1.0, k3, 0.0, 1.7),
    ],
)
def test_estimators_have_schulmans_bias_and_deviation(mean: float, estimator: Any, bias: float, std: float) -> None:
    """Row 3. q = N(0, 1) samples, p = N(mean, 1) is the reference: relative to KL = mean^2 / 2, within 2 %."""
    truth = mean**2 / 2
    x = torch.randn(6_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimates = estimator(-(x**2) / 2, -((x - mean) ** 2) / 2)
    assert estimates.mean().item() / truth - 1 == pytest.approx(bias, abs=0.02)
    assert estimates.std().item() / truth == pytest.approx(std, rel=0.02)


def test_k1_is_not_clamped_so_equal_policies_report_no_kl() -> None:
    """Row 4. AlpacaFarm clamped each token at 0: rounding noise between two equal policies then reads as drift."""
    noise = 0.01 * torch.randn(100, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    estimates = k1(LOGPROBS[0, 0] + noise, LOGPROBS[0, 0].expand_as(noise))
    error = (estimates.std() / estimates.numel() ** 0.5).item()
    assert abs(estimates.mean().item()) < 3 * error
    assert estimates.clamp(min=0).mean().item() > 20 * error


def test_kl_is_positive_where_the_policy_is_surer_than_the_reference() -> None:
    """Historical: verl a65c9157, the sign of the KL."""
    assert k1(torch.tensor([-0.1]), torch.tensor([-2.0])).item() == pytest.approx(1.9)


def test_shapes_that_broadcast_are_refused_with_both_names() -> None:
    with pytest.raises(ValueError, match=r"ref_logprobs_BT has shape \(2,\), logprobs_BT has \(2, 2\)"):
        k1(torch.zeros(2, 2), torch.zeros(2))


# Placement, by enumeration of 8 actions


def _near_policies(distance: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ref_A = torch.log_softmax(torch.randn(8, generator=generator, dtype=torch.float64), dim=0)
    theta_A = ref_A + distance * torch.randn(8, generator=generator, dtype=torch.float64)
    return theta_A.requires_grad_(), ref_A


def _gradient(objective: Tensor, theta_A: Tensor) -> Tensor:
    (gradient_A,) = torch.autograd.grad(objective, theta_A, retain_graph=True)
    return gradient_A


def _as_reward(estimator: Any, theta_A: Tensor, ref_A: Tensor) -> Tensor:
    """Expected policy gradient E[estimate * grad log pi] with the estimate detached."""
    log_pi_A = torch.log_softmax(theta_A, dim=0)
    return _gradient((log_pi_A.exp().detach() * estimator(log_pi_A, ref_A).detach() * log_pi_A).sum(), theta_A)


def _as_loss(estimator: Any, theta_A: Tensor, ref_A: Tensor) -> Tensor:
    """Expected gradient of the differentiable estimate at samples of pi, which carry no gradient themselves."""
    log_pi_A = torch.log_softmax(theta_A, dim=0)
    return _gradient((log_pi_A.exp().detach() * estimator(log_pi_A, ref_A)).sum(), theta_A)


def _kl_gradient(theta_A: Tensor, ref_A: Tensor) -> Tensor:
    log_pi_A = torch.log_softmax(theta_A, dim=0)
    return _gradient((log_pi_A.exp() * (log_pi_A - ref_A)).sum(), theta_A)


def test_the_enumerated_policies_are_at_a_kl_of_3e_4() -> None:
    assert exact_kl(*_near_policies(0.03)).item() == pytest.approx(3e-4, rel=0.3)


def test_k1_as_reward_has_the_gradient_of_the_kl() -> None:
    theta_A, ref_A = _near_policies(0.03)
    torch.testing.assert_close(_as_reward(k1, theta_A, ref_A), _kl_gradient(theta_A, ref_A), atol=1e-15, rtol=1e-9)


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_as_reward_have_about_a_hundredth_of_it(estimator: Any) -> None:
    """Row 2."""
    theta_A, ref_A = _near_policies(0.03)
    share = _as_reward(estimator, theta_A, ref_A).norm() / _kl_gradient(theta_A, ref_A).norm()
    assert 0.003 < share.item() < 0.03


def test_k1_as_loss_has_no_gradient_at_all() -> None:
    """Row 2."""
    theta_A, ref_A = _near_policies(0.5)
    torch.testing.assert_close(_as_loss(k1, theta_A, ref_A), torch.zeros(8, dtype=torch.float64), atol=1e-15, rtol=0)


def test_k2_as_loss_has_the_gradient_of_the_kl_on_policy() -> None:
    """Row 2."""
    theta_A, ref_A = _near_policies(0.5)
    torch.testing.assert_close(_as_loss(k2, theta_A, ref_A), _kl_gradient(theta_A, ref_A), atol=1e-15, rtol=1e-9)


def test_k3_as_loss_follows_the_forward_kl() -> None:
    """Row 2."""
    theta_A, ref_A = _near_policies(0.5)
    log_pi_A = torch.log_softmax(theta_A, dim=0)
    forward_A = _gradient((ref_A.exp() * (ref_A - log_pi_A)).sum(), theta_A)
    torch.testing.assert_close(_as_loss(k3, theta_A, ref_A), forward_A, atol=1e-15, rtol=1e-9)
    assert (forward_A - _kl_gradient(theta_A, ref_A)).norm() > 0.05 * forward_A.norm()


def _expected_loss_gradient(estimator: str, *, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``kl_loss`` over samples of an older policy, half of them at a weight of 3 and half at one of -1 (mean 1)."""
    theta_A, ref_A = _near_policies(0.5)
    random = torch.Generator().manual_seed(8)
    old_A = torch.log_softmax(theta_A.detach() + 0.4 * torch.randn(8, generator=random, dtype=torch.float64), dim=0)
    log_pi_A = torch.log_softmax(theta_A, dim=0)
    mask_B1, total = torch.ones(8, 1, dtype=torch.bool), torch.zeros((), dtype=torch.float64)
    for weight in (3.0, -1.0):
        for action, probability in enumerate(old_A.exp().tolist()):
            chosen = slice(action, action + 1)
            loss = kl_loss(
                KlEstimator(estimator),
                log_pi_A[chosen, None],
                ref_A[chosen, None],
                old_A[chosen, None],
                mask_B1[chosen],
                denominator=1.0,
                weights_BT=torch.full((1, 1), weight, dtype=torch.float64),
                ratio_cap=cap,
            )
            total = total + 0.5 * probability * loss
    return _gradient(total, theta_A), theta_A, ref_A


def test_k2_in_the_loss_keeps_its_gradient_when_the_policy_has_moved_on_from_what_sampled() -> None:
    found_A, theta_A, ref_A = _expected_loss_gradient("k2", cap=100.0)
    torch.testing.assert_close(found_A, _kl_gradient(theta_A, ref_A), atol=1e-14, rtol=1e-9)
    capped_A, _, _ = _expected_loss_gradient("k2", cap=1.0)
    assert (capped_A - found_A).norm() > 0.01 * found_A.norm()


def test_k3_in_the_loss_keeps_its_gradient_when_the_policy_has_moved_on_from_what_sampled() -> None:
    found_A, theta_A, ref_A = _expected_loss_gradient("k3", cap=100.0)
    forward_A = _gradient((ref_A.exp() * (ref_A - torch.log_softmax(theta_A, dim=0))).sum(), theta_A)
    torch.testing.assert_close(found_A, forward_A, atol=1e-14, rtol=1e-9)


@pytest.mark.parametrize("padding", [0.0, 1e30, math.nan])
def test_what_padding_holds_reaches_neither_the_kl_loss_nor_its_gradient(padding: float) -> None:
    mask_BT = torch.tensor([[True, True, False]])
    new_BT = torch.tensor([[-1.0, -2.0, padding]]).requires_grad_()
    ref_BT, old_BT = torch.tensor([[-1.5, -1.0, padding]]), torch.tensor([[-1.0, -2.5, padding]])
    loss = kl_loss(KlEstimator.K2, new_BT, ref_BT, old_BT, mask_BT, denominator=4.0)
    # Ratios 1 and e^.5; differences .5 and -1.
    assert loss.item() == pytest.approx((0.125 + 0.5 * math.exp(0.5)) / 4)
    (gradient_BT,) = torch.autograd.grad(loss, new_BT)
    assert gradient_BT.tolist()[0] == pytest.approx([0.125, -math.exp(0.5) / 4, 0.0])


@pytest.mark.parametrize(
    ("estimator", "placement", "advice"),
    [
        ("k2", "reward", "use k1 in the reward"),
        ("k3", "reward", "use k1 in the reward"),
        ("k1", "loss", "use k2 or k3"),
    ],
)
def test_wrong_pairings_are_refused_with_advice(
    estimator: str, placement: Literal["reward", "loss"], advice: str
) -> None:
    """Row 2."""
    with pytest.raises(ValueError, match=advice):
        check_kl_placement(KlEstimator(estimator), placement)


@pytest.mark.parametrize(("estimator", "placement"), [("k1", "reward"), ("k2", "loss"), ("k3", "loss")])
def test_right_pairings_pass(estimator: str, placement: Literal["reward", "loss"]) -> None:
    check_kl_placement(KlEstimator(estimator), placement)


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="kl placement is 'advantage'"):
        check_kl_placement(KlEstimator.K1, "advantage")  # type: ignore[arg-type]


# Sums and the exact KL


@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_sequence_kl_is_the_sum_over_each_rows_valid_tokens(seed: int, lengths: list[int]) -> None:
    kl_BT = torch.randn(len(lengths), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    kl_BT[~mask_BT] = math.nan
    for b, total in enumerate(sequence_kl(kl_BT, mask_BT).tolist()):
        assert total == pytest.approx(sum(kl_BT[b, t].item() for t in range(lengths[b])), abs=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 8))
def test_exact_kl_equals_the_sum_over_the_vocabulary(seed: int, scale: float) -> None:
    logits_p, logits_q = scale * torch.randn(
        2, 3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    result = exact_kl(logits_p, logits_q)
    for row in range(3):
        p = [math.exp(x) for x in logits_p[row].tolist()]
        q = [math.exp(x) for x in logits_q[row].tolist()]
        expected = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        assert result[row].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_exact_kl_is_the_mean_of_k1_at_samples_of_the_policy() -> None:
    generator = torch.Generator().manual_seed(4)
    logits_p, logits_q = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    ids = torch.multinomial(log_p.exp(), 200_000, replacement=True, generator=generator)
    estimates = k1(log_p[ids], log_q[ids])
    error = (estimates.std() / 200_000**0.5).item()
    assert estimates.mean().item() == pytest.approx(exact_kl(logits_p, logits_q).item(), abs=4 * error)


def test_exact_kl_counts_excluded_tokens_as_nothing_in_value_and_gradient() -> None:
    logits_p = torch.tensor([0.3, -math.inf, 1.0], dtype=torch.float64, requires_grad=True)
    logits_q = torch.tensor([0.5, 0.1, -0.2], dtype=torch.float64)
    p = torch.tensor([0.3, 1.0], dtype=torch.float64).softmax(0)
    q = logits_q.softmax(0)[[0, 2]]
    result = exact_kl(logits_p, logits_q)
    assert result.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)
    result.backward()
    assert logits_p.grad is not None
    assert logits_p.grad.isfinite().all()
    assert logits_p.grad[1] == 0


def test_exact_kl_is_infinite_where_the_reference_excludes_what_the_policy_says() -> None:
    assert exact_kl(torch.zeros(3), torch.tensor([0.0, 0.0, -math.inf])).item() == math.inf


def test_exact_kl_of_bfloat16_logits_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(5)
    p, q = torch.randn(2, 1000, generator=generator).bfloat16()
    assert exact_kl(p, q).dtype == torch.float32
    assert exact_kl(p, q).item() == pytest.approx(exact_kl(p.double(), q.double()).item(), rel=1e-5)


# Controllers


def test_adaptive_controller_follows_the_reference_vector() -> None:
    """Row 20."""
    controller = AdaptiveKlController(0.15, target=6, horizon=10_000)
    betas = []
    for kl in (0, 3, 6, 6.6, 12, 100):
        controller.update(kl, n_episodes=512)
        betas.append(controller.beta)
    assert betas == pytest.approx([0.148464, 0.14694373, 0.14694373, 0.14769608, 0.14920849, 0.15073638], abs=5e-9)


def test_adaptive_controller_is_fed_the_sum_over_tokens_and_not_their_mean() -> None:
    """Historical: trlx#361. At .08 nats a token, 100 tokens make 8 nats: above a target of 6, so beta rises."""
    mask_BT = torch.ones(4, 100, dtype=torch.bool)
    kl_BT = torch.full((4, 100), 0.08)
    controller = AdaptiveKlController(0.1, target=6, horizon=10_000)
    controller.update(sequence_kl(kl_BT, mask_BT).mean().item(), n_episodes=4)
    assert controller.beta == pytest.approx(0.1 * (1 + 0.2 * 4 / 10_000), rel=1e-12)
    assert kl_BT.mean() < 6


def test_adaptive_controller_takes_a_slightly_negative_estimate_for_the_clipped_error() -> None:
    controller = AdaptiveKlController(0.15, target=6, horizon=10_000)
    controller.update(-0.03, n_episodes=512)
    assert controller.beta == pytest.approx(0.148464)


def test_adaptive_controller_in_closed_loop_settles_on_its_target() -> None:
    """On a system whose KL is 1 / beta, the price that gives the target is 1 / target."""
    controller = AdaptiveKlController(1.0, target=6, horizon=10_000)
    for _ in range(600):
        controller.update(1 / controller.beta, n_episodes=512)
    assert 1 / controller.beta == pytest.approx(6, rel=1e-3)


def test_fixed_controller_never_moves() -> None:
    controller = FixedKlController(0.05)
    controller.update(100.0, n_episodes=512)
    assert controller.beta == 0.05


@pytest.mark.parametrize("controller", [FixedKlController(0.05), AdaptiveKlController(0.05, target=6, horizon=10_000)])
@pytest.mark.parametrize(
    ("kl", "episodes", "message"),
    [
        (math.nan, 8, "sequence_kl_mean is nan"),
        (math.inf, 8, "sequence_kl_mean is inf"),
        (1.0, 0, "n_episodes is 0"),
        (1.0, -3, "n_episodes is -3"),
    ],
)
def test_controllers_refuse_a_measurement_that_is_none(
    controller: FixedKlController | AdaptiveKlController, kl: float, episodes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        controller.update(kl, episodes)
    assert controller.beta == 0.05


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_fixed_controller_refuses_an_impossible_price(beta: float) -> None:
    with pytest.raises(ValueError, match="beta is"):
        FixedKlController(beta)


@pytest.mark.parametrize("name", ["initial_beta", "target", "horizon", "clip"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_adaptive_controller_refuses_impossible_settings(name: str, value: float) -> None:
    settings = {"initial_beta": 0.1, "target": 6.0, "horizon": 1e4, "clip": 0.2, name: value}
    with pytest.raises(ValueError, match=f"{name} is"):
        AdaptiveKlController(**settings)


def test_adaptive_controller_refuses_a_step_that_could_turn_beta_negative() -> None:
    controller = AdaptiveKlController(0.1, target=6, horizon=100)
    with pytest.raises(ValueError, match=r"n_episodes is 500: .* must be above clip \* n_episodes = 100"):
        controller.update(0.0, n_episodes=500)


def test_a_restored_adaptive_controller_goes_on_as_the_unbroken_one() -> None:
    unbroken = AdaptiveKlController(0.15, target=6, horizon=10_000)
    for kl in (0.0, 20.0, 7.0):
        unbroken.update(kl, 512)
    resumed = AdaptiveKlController(0.15, target=6, horizon=10_000)
    resumed.load_state_dict(unbroken.state_dict())
    for controller in (unbroken, resumed):
        controller.update(6.3, 512)
    assert resumed.beta == unbroken.beta != 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "fixed"}, "is 'fixed', the settings ask for 'adaptive'"),
        ({"target": 7.0}, "has target 7.0, the settings say 6.0"),
        ({"horizon": 5.0}, "has horizon 5.0"),
        ({"beta": math.nan}, "saved beta of the KL controller is nan"),
        ({"beta": -1.0}, "saved beta of the KL controller is -1.0"),
    ],
)
def test_adaptive_controller_refuses_a_state_it_could_not_have_saved(change: dict[str, Any], message: str) -> None:
    controller = AdaptiveKlController(0.15, target=6, horizon=10_000)
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(controller.state_dict() | change)
    assert controller.beta == 0.15


def test_a_state_that_lacks_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="it must hold"):
        AdaptiveKlController(0.15, target=6, horizon=1e4).load_state_dict({"kind": "adaptive", "beta": 0.1})


def test_fixed_controller_refuses_a_checkpoint_of_another_price() -> None:
    controller = FixedKlController(0.05)
    controller.load_state_dict(FixedKlController(0.05).state_dict())
    with pytest.raises(ValueError, match=r"has beta 0\.1, the settings say 0\.05"):
        controller.load_state_dict(FixedKlController(0.1).state_dict())

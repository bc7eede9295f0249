"""PPO through live services, and DPO, against the optimum that theory gives, on a task whose responses are all listed.

For J(pi) = E[r] - beta KL(pi, ref) the best policy is pi*(y) = ref(y) exp(r(y) / beta) / Z, of value beta log Z.
Values and distributions are sums over the responses: see ``bench.enumerable``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainer.dpo
import trainer.ppo
from bench.enumerable import MODEL, REWARDS, Array, Task, gap_closed, optimum, total_variation, value, write_rows
from bench.optimum import PPO_LEARNING_RATES, dpo_settings, log_distribution, ppo_settings
from trainer.evaluate import Evaluation
from trainer.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
BETAS = (0.5, 1.0, 2.0)
TASK = Task(words=4, longest=2, seed=1)
PPO = {
    "samples_per_prompt": 128,
    "critic_learning_rate": 1.5e-3,
    "eval_samples": 256,
}
# The larger beta is, the smaller is the gap, and the same distance to its end the more of it.
STEPS = {0.5: 40, 1.0: 40, 2.0: 80}
DPO = {"batch_size": 256, "learning_rate": 1e-3}
VOTES = 60
DPO_EPOCHS = {0.5: 6, 1.0: 5, 2.0: 4}

pytestmark = pytest.mark.timeout(1200)  # Hundreds of steps against three services.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task")
    TASK.write(path, width=64, layers=2)
    return path


@pytest.fixture(scope="module")
def ref_PY(folder: Path) -> Array:
    return log_distribution(TASK, folder / MODEL)


@pytest.fixture(scope="module")
def services(start_service, folder: Path) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """Policy, reward and reference service, as the trainer's settings name them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUARTET_REWARDS", str(folder / REWARDS))
        patch.chdir(ROOT)
        reward = start_service("reward", "", "--scorer", "bench.enumerable:score")
    policy = start_service("policy", folder / MODEL, "--engine", "transformers", "--threads", "1")
    reference = start_service("reference", folder / MODEL, "--threads", "1")
    addresses = {"policy": policy.address, "reward": reward.address, "reference": reference.address}
    return addresses | {"policy_admin": (policy.admin_address,)}


@pytest.fixture(scope="module")
def by_ppo(services: dict[str, Any], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """by_ppo(beta): folder of the run, which is made once."""
    made: dict[float, Path] = {}

    def run(beta: float) -> Path:
        if beta not in made:
            output = tmp_path_factory.mktemp("ppo") / "run"
            how = PPO | {"learning_rate": PPO_LEARNING_RATES[beta], "steps": STEPS[beta]}
            trainer.ppo.main(ppo_settings(TASK, folder, beta, output, services, **how))
            made[beta] = output
        return made[beta]

    return run


@pytest.mark.parametrize("beta", BETAS)
def test_ppo_through_live_services_closes_the_gap_to_beta_log_z(
    by_ppo: Callable[[float], Path], ref_PY: Array, beta: float
) -> None:
    output = by_ppo(beta)
    logp_PY = log_distribution(TASK, output / "model")
    closed = gap_closed(logp_PY, ref_PY, TASK.rewards_PY, beta)
    best_PY, _ = optimum(ref_PY, TASK.rewards_PY, beta)
    print(f"beta {beta:g}: PPO closes {closed:.3f} of the gap, TV to pi* {total_variation(logp_PY, best_PY):.3f}")
    assert 0.98 <= closed < 1
    records = read_metrics(output)
    assert [record["step"] for record in records] == list(range(1, 1 + STEPS[beta]))
    assert {record["samples/failed"] for record in records} == {0}
    assert max(record["rollout/logprob_max_abs_difference"] for record in records) < 1e-4
    # What the services said of the trained policy in the last evaluation is what the sums say, to its standard errors.
    found = Evaluation.read(output / "evaluation_after.json")
    p_PY, kl_PY = np.exp(logp_PY), logp_PY - ref_PY
    for said, x_PY in ((found.score_mean, TASK.rewards_PY), (found.kl_sequence_mean, kl_PY)):
        mean_P = (p_PY * x_PY).sum(axis=1)
        variance = (p_PY * (x_PY - mean_P[:, None]) ** 2).sum(axis=1).mean()
        assert abs(said - mean_P.mean()) < 4 * (variance / found.n) ** 0.5
    exact = value(logp_PY, ref_PY, TASK.rewards_PY, beta).mean()
    assert found.score_mean - beta * found.kl_sequence_mean == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_on_preferences_of_the_same_rewards_reaches_the_policy_that_ppo_does(
    by_ppo: Callable[[float], Path], folder: Path, ref_PY: Array, tmp_path: Path, beta: float
) -> None:
    data = tmp_path / "preferences.jsonl"
    write_rows(data, TASK.preferences(VOTES))
    trainer.dpo.main(dpo_settings(TASK, folder, beta, data, tmp_path / "run", epochs=DPO_EPOCHS[beta], **DPO))
    by_dpo_PY = log_distribution(TASK, tmp_path / "run" / "model")
    best_PY, _ = optimum(ref_PY, TASK.rewards_PY, beta)
    assert total_variation(ref_PY, best_PY) > 0.1
    by_ppo_PY = log_distribution(TASK, by_ppo(beta) / "model")
    to_best, to_ppo = total_variation(by_dpo_PY, best_PY), total_variation(by_ppo_PY, by_dpo_PY)
    print(f"beta {beta:g}: TV of DPO to pi* {to_best:.3f}, to PPO {to_ppo:.3f}")
    assert to_best < 0.05
    assert to_ppo < 0.1

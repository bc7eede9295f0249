"""Online DPO: which responses are paired, one step against the same step done naively in float64, and ties.

Shapes: N samples.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import llama_config
from trainer.errors import RolloutError
from trainer.models import disable_dropout
from trainer.online_dpo import OnlineDpoLearner, best_and_worst
from trainer.online_dpo_config import OnlineDpoSettings
from trainer.report import write_report
from trainer.rollout import Rollout, Sample


def settings(**changes: Any) -> OnlineDpoSettings:
    values = {"model": "m", "prompts": ("p",), "output": "o", "samples_per_prompt": 3, "max_grad_norm": 1e9}
    return OnlineDpoSettings(**(values | changes))


def make_learner(options: OnlineDpoSettings, normalisation: Any = None) -> OnlineDpoLearner:
    torch.manual_seed(0)
    policy = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    disable_dropout(policy)
    run = SimpleNamespace(
        settings=options,
        device=torch.device("cpu"),
        tokenizer=SimpleNamespace(eos_token_id=1, pad_token_id=0),
        normalisation=normalisation,
        policy=policy,
    )
    return OnlineDpoLearner(run)  # type: ignore[arg-type]


def make_samples(scores: list[list[float]], seed: int = 1) -> tuple[Sample, ...]:
    """Responses to prompts by their scores, of uneven length; every other one is finished."""
    random = np.random.default_rng(seed)
    samples = []
    for prompt, own in enumerate(scores):
        prompt_ids = tuple(random.integers(3, 300, 2 + prompt).tolist())
        for number, score in enumerate(own):
            response = random.integers(3, 300, 2 + (prompt + 2 * number) % 5)
            finished = number % 2 == 0
            if finished:
                response[-1] = 1
            samples.append(
                Sample(
                    index=3 * prompt + number,
                    prompt_ids=prompt_ids,
                    response_ids=tuple(response.tolist()),
                    logprobs=tuple(random.normal(-6, 1.5, len(response)).tolist()),
                    ref_logprobs=tuple(random.normal(-6, 1.5, len(response)).tolist()),
                    score=score,
                    finished=finished,
                )
            )
    return tuple(samples)


def rollout_of(*samples: Sample) -> Rollout:
    return Rollout(samples=samples, failures=(), weights_version=0, duration_s=1.0, service_work_s=1.0)


def test_the_best_and_the_worst_response_to_each_prompt_are_paired() -> None:
    prompts = [4, 4, 4, 0, 0, 7, 2, 2, 2]
    scores = [0.1, 0.5, -1.0, 2.0, 2.0, 9.0, 1.0, 1.0, 0.0]
    assert best_and_worst(prompts, scores) == ([(1, 2), (6, 8)], 1, 1)
    assert best_and_worst([0, 0, 1, 1], [1.0, 1.0, 2.0, 2.0]) == ([], 2, 0)
    assert best_and_worst([0, 1], [1.0, 2.0]) == ([], 0, 2)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ipo-mean", "ipo-sum"])
def test_a_step_is_the_naive_one(loss: str) -> None:
    """Log-probabilities at the temperature that sampled; an unfinished response pays, which here decides the pair."""
    smoothing = {"label_smoothing": 0.2} if loss == "robust" else {}
    beta, temperature, e = 0.3, 0.7, 0.2
    options = settings(loss=loss, beta=beta, temperature=temperature, missing_eos_value=5.0, **smoothing)
    # Normalised by 2: unfinished ones, the second of each prompt, lose 5 of what is then 2, 2.1 or 1.
    samples = make_samples([[1.0, 9.0, 2.0], [3.0, 3.0, 3.0], [1.0, 1.0, 0.0], [0.5]])
    pairs = [(2, 1), (3, 4), (6, 7)]
    naive = copy.deepcopy(make_learner(options).policy).double()

    def logprob(sample: Sample) -> torch.Tensor:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        table = (naive(ids).logits[0] / temperature).log_softmax(-1)
        start = len(sample.prompt_ids)
        return torch.stack([table[start + t - 1, token] for t, token in enumerate(sample.response_ids)]).sum()

    losses = []
    for best, worst in pairs:
        gains = [logprob(samples[i]) - sum(samples[i].ref_logprobs) for i in (best, worst)]
        if loss == "ipo-mean":
            gains = [gain / len(samples[i].response_ids) for gain, i in zip(gains, (best, worst), strict=True)]
        h = gains[0] - gains[1]
        nll, flipped = (-torch.nn.functional.logsigmoid(sign * beta * h) for sign in (1, -1))
        losses.append(
            {
                "sigmoid": nll,
                "robust": ((1 - e) * nll - e * flipped) / (1 - 2 * e),
                "ipo-mean": (h - 1 / (2 * beta)) ** 2,
                "ipo-sum": (h - 1 / (2 * beta)) ** 2,
            }[loss]
        )
    expected = torch.stack(losses).mean()
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in naive.parameters()))
    steps = []
    for micro_batch_tokens in (1, 30, 10_000):
        learner = make_learner(
            options.model_copy(update={"micro_batch_tokens": micro_batch_tokens, "learning_rate": 1e-3}),
            normalisation=SimpleNamespace(mean=0.0, std=2.0),
        )
        before = learner.policy.lm_head.weight.detach().clone()
        metrics = learner.step(rollout_of(*samples), 0)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert metrics["policy/optimiser_steps"] == 1
        assert (metrics["pairs/count"], metrics["pairs/tied"], metrics["pairs/alone"]) == (3, 0, 1)
        assert not learner.policy.lm_head.weight.equal(before)
        steps.append(learner.policy.lm_head.weight.detach() - before)
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], rtol=0, atol=0.05 * float(steps[0].abs().max()))
    engine = np.mean([[sum(samples[i].logprobs) for i in pair] for pair in pairs], axis=0)
    ours = np.mean([[logprob(samples[i]).item() for i in pair] for pair in pairs], axis=0)
    assert metrics["rollout/logprob_difference"] == pytest.approx(np.abs(engine - ours).max(), rel=1e-4)
    kl = np.mean([sum(sample.logprobs) - sum(sample.ref_logprobs) for sample in samples])
    assert metrics["kl/sequence_mean"] == pytest.approx(kl)
    assert metrics["reward/score_mean"] == pytest.approx(np.mean([4.0, 3.0, 2 / 3, 0.5]), rel=1e-6)  # Over prompts.
    final = [sample.score / 2 - (0 if sample.finished else 5) for sample in samples]
    assert metrics["reward/final_mean"] == pytest.approx(np.mean(final), rel=1e-6)


def test_every_pair_is_learned_once_an_epoch_from_its_own_order() -> None:
    options = settings(epochs=3, minibatches=2, missing_eos="none")
    learner = make_learner(options)
    seen: list[list[tuple[int, ...]]] = []
    accumulate = learner.dpo.accumulate
    learner.dpo.accumulate = lambda pairs: (  # type: ignore[method-assign]
        seen.append([tuple(pair.chosen.ids.tolist()) for pair in pairs]),
        accumulate(pairs),
    )[1]
    metrics = learner.step(rollout_of(*make_samples([[0.0, 1.0, 2.0]] * 5)), 4)
    assert metrics["policy/optimiser_steps"] == 6
    epochs = [seen[0] + seen[1], seen[2] + seen[3], seen[4] + seen[5]]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_steps_whose_prompts_are_all_tied_teach_nothing_are_told_and_end_the_run(capsys) -> None:
    learner = make_learner(settings(missing_eos="none", max_tied_steps=3))
    before = copy.deepcopy(learner.policy.state_dict())
    tied = rollout_of(*make_samples([[1.0, 1.0, 1.0], [2.0, 2.0], [0.0]]))
    metrics = learner.step(tied, 0)
    assert (metrics["pairs/count"], metrics["pairs/tied"], metrics["pairs/tied_share"]) == (0, 2, 1.0)
    assert "loss" not in metrics
    assert "warning: step 1 teaches nothing: to each of its prompts all responses have one score (2 are tied" in (
        capsys.readouterr().err
    )
    learner.step(tied, 1)
    # A resumed run goes on counting.
    other = make_learner(settings(missing_eos="none", max_tied_steps=3))
    other.trained.states["ties"].load_state_dict(learner.trained.states["ties"].state_dict())
    for one in (learner, other):
        with pytest.raises(RolloutError, match=r"step 3 teaches nothing: .* that is 3 steps in a row"):
            one.step(tied, 2)
        assert one.ties.steps == 2  # That step is not done: it will be tried again.
    assert all(value.equal(before[name]) for name, value in learner.policy.state_dict().items())
    learner.step(rollout_of(*make_samples([[1.0, 0.0, 1.0], [2.0, 2.0, 2.0]])), 2)
    assert learner.ties.steps == 0
    learner.step(tied, 3)
    with pytest.raises(ValueError, match="number of tied steps can't be read"):
        learner.ties.load_state_dict({})


def test_the_score_trained_on_and_not_a_failed_sample_makes_the_pair() -> None:
    """A sample that failed is missing: the pair is of those that are left."""
    samples = make_samples([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    left = [replace(sample) for sample in samples if sample.index not in (2, 3)]
    learner = make_learner(settings(missing_eos="none"))
    metrics = learner.step(rollout_of(*left), 0)
    assert metrics["pairs/count"] == 2
    assert metrics["pairs/score_difference_mean"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_prompt": 1}, "greater than or equal to 2"),
        ({"minibatches": 9, "prompts_per_step": 8}, "--minibatches is 9: a rollout of 8 prompts has at most as many"),
        ({"loss": "robust"}, "--loss is robust and --label-smoothing 0"),
        ({"top_p": 0.9}, "--top-p is 0.9"),
        ({"clip_range": 0.1}, "clip_range"),
        ({"max_tied_steps": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_when_to_give_up_is_no_other_run() -> None:
    assert settings(max_tied_steps=9).decisive == settings().decisive
    assert settings(beta=0.2).decisive != settings().decisive
    assert settings().stage == "online-dpo"


def test_the_report_says_what_it_is_of(tmp_path) -> None:
    records = [
        {"step": step, "reward/score_mean": 0.1 * step, "chosen_logprob_mean": -9.0, "pairs/tied_share": 0.95}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = write_report(tmp_path)
    assert "online DPO run" in files.page.read_text()
    figures = json.loads(files.figures.read_text())
    assert figures["header"]["kind"] == "online-dpo"
    assert "pairs/tied_share" in [alarm["key"] for alarm in figures["alarms"]]

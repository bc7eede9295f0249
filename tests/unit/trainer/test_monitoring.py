"""The monitor of a run: what it looks at, what it compares with, what it says, and what survives a resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from trainer.encoding import Encoder
from trainer.evaluate import EvaluatedSample, Evaluation, summarise
from trainer.models import load_policy, load_tokenizer
from trainer.monitoring import EVALUATIONS_FOLDER, PolicyMonitor
from trainer.ppo_config import PPOSettings
from trainer.rollout import Rollout, Sample


def settings(output: Path, **changes: Any) -> PPOSettings:
    return PPOSettings(model="m", prompts=("p",), output=output, track=("none",), **changes)


def monitor(output: Path, policy: Any = None, tokenizer: Any = None, **changes: Any) -> PolicyMonitor:
    reference, resumed_step = changes.pop("reference", None), changes.pop("resumed_step", 0)
    return PolicyMonitor(
        settings(output, **changes),
        policy,
        tokenizer,
        max_tokens=64,
        reference=reference,
        before=output / "evaluation_before.json",
        resumed_step=resumed_step,
    )


def evaluation(scores: list[float], judges: list[float | None], **changes: Any) -> Evaluation:
    known = [judge for judge in judges if judge is not None]
    values: dict[str, Any] = {
        "n": len(scores), "failed": 0, "weights_version": 1, "score_mean": float(np.mean(scores)), "score_ci95": 0.1,
        "score_std": 1.0, "kl_sequence_mean": 1.0, "kl_ci95": 0.1, "length_mean": 9.0, "finished_share": 1.0,
        "distinct_2": 0.5, "unique_share": 1.0, "tokens_per_s": 100.0,
        "judge_mean": float(np.mean(known)) if known else None,
        "samples": tuple(
            EvaluatedSample(index=i, prompt=f"p{i}", response="r", score=s, kl=1.0, finished=True, judge=j)
            for i, (s, j) in enumerate(zip(scores, judges, strict=True))
        ),
    }  # fmt: skip
    return Evaluation(**(values | changes))


NOISE = [0.1, -0.1, 0.05, -0.05, 0.0, 0.02]


def shifted(by: float) -> list[float]:
    return [by + noise for noise in NOISE]


def test_changes_are_paired_with_the_evaluation_that_the_judge_liked_best(tmp_path, capsys):
    watched = monitor(tmp_path)
    first, figures = watched.watch(0, evaluation(shifted(0), shifted(0)), tmp_path / "evaluation_before.json")
    assert first.best_step is None
    assert not any(key.startswith("alarm/") for key in figures)  # Nothing is trained yet.
    watched.watch(5, evaluation(shifted(1), shifted(2)))
    capsys.readouterr()
    gold = [2.0 - 1.5 + 0.2 * i for i in range(6)]
    found, figures = watched.watch(10, evaluation(shifted(3), gold))
    changes = np.array(gold) - np.array(shifted(2))
    half = stats.t.ppf(0.975, 5) * changes.std(ddof=1) / math.sqrt(6)
    assert (found.best_step, found.judge_since_best) == (5, pytest.approx(changes.mean()))
    assert found.judge_since_best_ci95 == pytest.approx(half, rel=1e-6)
    assert (found.score_since_best, found.score_since_best_ci95) == (pytest.approx(2.0), pytest.approx(0, abs=1e-9))
    assert (figures["alarm/judge"], figures["alarm/count"], figures["alarm/kl"]) == (1.0, 1.0, 0.0)
    assert figures["eval/judge_since_best"] == found.judge_since_best
    err = capsys.readouterr().err
    assert err.startswith("alarm: The change of the judge's score: -1.00 in the held-out evaluation at step 10, below ")
    assert "since step 5, which it liked best, while the reward rose by 2.00" in err
    watched.watch(15, evaluation(shifted(3.5), gold))
    assert capsys.readouterr().err == ""  # It is said when it arises, and logged for as long as it lasts.
    assert [path.name for path in sorted((tmp_path / EVALUATIONS_FOLDER).iterdir())] == [
        "000005.json",
        "000010.json",
        "000015.json",
    ]
    assert Evaluation.read(tmp_path / EVALUATIONS_FOLDER / "000010.json") == found


def test_a_resumed_run_compares_with_what_it_had_and_forgets_what_it_will_do_again(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = [
        (0, evaluation(shifted(0), shifted(0))),
        (5, evaluation(shifted(1), shifted(2))),
        (10, evaluation(shifted(2), shifted(1))),
        (15, evaluation(shifted(3), shifted(0.5))),
    ]

    def watch(output: Path, watched: PolicyMonitor, chosen: list[tuple[int, Evaluation]]) -> list[dict[str, float]]:
        before = output / "evaluation_before.json"
        return [watched.watch(step, found, before if step == 0 else None)[1] for step, found in chosen]

    expected = watch(whole, monitor(whole), steps)
    watch(broken, monitor(broken), [*steps[:2], (10, evaluation(shifted(9), shifted(9)))])
    found = watch(broken, monitor(broken, resumed_step=5), steps[2:])
    assert found == expected[2:]
    assert monitor(broken, resumed_step=0)._past[0][1].score_mean == pytest.approx(steps[0][1].score_mean)
    assert list((broken / EVALUATIONS_FOLDER).iterdir()) == []


def test_without_a_judge_or_with_one_that_failed_everywhere_there_is_nothing_to_compare(tmp_path):
    watched = monitor(tmp_path)
    for step, judges in ((0, [None] * 6), (5, shifted(0)), (10, [None] * 6)):
        found, figures = watched.watch(step, evaluation(shifted(0), judges))
        assert found.judge_since_best is None
        assert "eval/judge_since_best" not in figures


def rollout(samples: list[Sample]) -> Rollout:
    return Rollout(samples=tuple(samples), failures=(), weights_version=0, duration_s=1.0, service_work_s=1.0)


def sample(index: int, prompt: tuple[int, ...], response: tuple[int, ...], **changes: Any) -> Sample:
    values = {"logprobs": (-1.0,) * len(response), "ref_logprobs": (-2.0,) * len(response), "score": float(index)}
    return Sample(index=index, prompt_ids=prompt, response_ids=response, finished=True, **(values | changes))


def test_the_policy_is_looked_at_as_it_is_now_beside_the_reference_from_its_folder(make_policy, tmp_path):
    folder = make_policy(seed=21, scale=0.5)
    tokenizer = load_tokenizer(folder)
    policy = load_policy(folder, tokenizer)
    demonstrations = tmp_path / "demonstrations.jsonl"
    texts = [{"prompt": f"hello {i}", "completion": f" thanks {i}"} for i in range(5)]
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in texts))
    watched = monitor(
        tmp_path,
        policy,
        tokenizer,
        reference=folder,
        monitor_demonstrations=(str(demonstrations),),
        max_monitor_demonstrations=3,
        temperature=0.8,
        precision="float32",
    )
    samples = [sample(0, (5, 6), (7, 8, 9)), sample(1, (6,), (11, 12)), sample(2, (9, 9), (4,))]
    state = torch.get_rng_state()
    first = watched.observe(samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.kl == pytest.approx((0.0, 0.0, 0.0), abs=1e-5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    second = watched.observe(samples)
    assert policy.training
    reference = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    now = policy.double().eval()
    for index, each in enumerate(samples):
        ids = torch.tensor([[*each.prompt_ids, *each.response_ids]])
        with torch.no_grad():
            p, q = ((model(ids).logits[0] / 0.8).log_softmax(-1) for model in (now, reference))
        states = slice(len(each.prompt_ids) - 1, ids.shape[1] - 1)
        assert second.kl[index] == pytest.approx(float((p.exp() * (p - q))[states].sum()), rel=1e-3)
        assert second.entropy[index] == pytest.approx(-float((p.exp() * p)[states].sum()), rel=1e-3)
    from trainer.data import load_demonstrations

    rows = Encoder(tokenizer, max_tokens=64).demonstrations(load_demonstrations([str(demonstrations)])[:3])
    nats = tokens = 0.0
    for row in rows:
        ids = torch.tensor([row.ids.tolist()])
        with torch.no_grad():
            table = now(ids).logits[0].log_softmax(-1)
        nats -= sum(float(table[t - 1, ids[0, t]]) for t in range(row.prompt_tokens, len(row)))
        tokens += len(row) - row.prompt_tokens
    assert second.demonstration_perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    assert second.demonstration_perplexity != first.demonstration_perplexity
    alone = monitor(tmp_path, policy.float(), tokenizer).observe(samples)
    assert (alone.kl, alone.demonstration_perplexity) == (None, None)


def test_an_evaluation_has_every_figure_that_is_watched(tmp_path):
    samples = [
        sample(0, (5,), (1, 2, 3, 4), score=1.0, spread=0.2),
        sample(1, (5,), (1, 2, 3, 4, 1, 2, 3, 4), score=2.0, spread=0.4),
        sample(2, (6,), (9, 8), score=3.0, spread=0.6),
        sample(3, (6,), (9, 8, 7), score=5.0, spread=0.0),
    ]
    policy = SimpleNamespace(kl=(1.0, 2.0, 3.0, 6.0), entropy=(4.0, 8.0, 2.0, 3.0), demonstration_perplexity=7.0)
    decode = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    found = summarise(rollout(samples), decode, judged=[1.0, None, 2.0, 3.0], policy=policy)
    lengths, scores = [4, 8, 2, 3], [1.0, 2.0, 3.0, 5.0]
    assert (found.n, found.prompts, found.unique_share) == (4, 2, 1.0)
    assert found.kl_exact_mean == pytest.approx(3.0)  # Of the prompts' means 1.5 and 4.5.
    assert found.kl_exact_ci95 == pytest.approx(stats.t.ppf(0.975, 1) * 3.0 / math.sqrt(2) / math.sqrt(2), rel=1e-6)
    assert found.entropy_mean == pytest.approx(17 / 17)
    assert summarise(rollout(samples), decode).entropy_mean == pytest.approx(1.0)  # -log pi of every token is 1.
    assert found.judge_mean == pytest.approx((1.0 + 2.5) / 2)
    assert found.spread_mean == pytest.approx(0.3)
    assert found.length_correlation == pytest.approx(stats.pearsonr(scores, lengths).statistic)
    assert found.length_correlation_within == pytest.approx(
        stats.pearsonr([-0.5, 0.5, -1, 1], [-2, 2, -0.5, 0.5]).statistic
    )
    assert [found.length_p05, found.length_p50, found.length_p95] == pytest.approx(
        np.quantile(lengths, [0.05, 0.5, 0.95]).tolist()
    )
    # 17 tokens of 7 kinds; in the second response one of five 4-grams came before.
    assert (found.distinct_1, found.distinct_3) == (pytest.approx(7 / 17), pytest.approx(5 / 9))
    assert found.repeated_4_share == pytest.approx((0 + 1 / 5) / 2)
    assert 0 < found.self_bleu_4 < 1
    assert found.demonstration_perplexity == 7.0
    assert [(s.length, s.judge, s.spread) for s in found.samples] == [
        (4, 1.0, 0.2), (8, None, 0.4), (2, 2.0, 0.6), (3, 3.0, 0.0),
    ]  # fmt: skip
    found.write(tmp_path / "e.json")
    assert Evaluation.read(tmp_path / "e.json") == found
    assert "samples" not in found.figures()
    assert found.figures()["judge_mean"] == found.judge_mean
    assert "best_step" not in replace(found, best_step=None).figures()

"""The over-optimisation study: its world against enumeration and plain formulas, its runs, its lines, its verdicts.

Shapes: N sequences, P prompt tokens, T response tokens, S of both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.overoptimisation import (
    ARMS,
    Arm,
    Run,
    _changed,
    append,
    finish,
    gain,
    main,
    read_runs,
    train,
    verdicts,
    whole_seeds,
)
from bench.small_world import (
    Corpus,
    Protocol,
    World,
    exact_kl,
    generator,
    make_world,
    new_policy,
    prefer,
    response_logprobs,
    sample,
    scores,
)
from services.reward.combining import Reduction
from trainer.models import TokenLogprobs

TINY = Protocol(
    vocabulary=6,
    prompt_tokens=2,
    response_tokens=3,
    width=16,
    inner_width=32,
    reward_inner_width=32,
    heads=2,
    weight_std=0.3,
    gold_scale=1.0,
    sft_steps=60,
    sft_batch=32,
    pairs=200,
    reward_epochs=1,
    members=3,
    test_pairs=100,
    normalised_on=500,
    updates=4,
    batch=32,
    learning_rate=1e-2,
    held_out=64,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(TINY, seed=3)


def other_policy(seed: int = 0) -> Any:
    return new_policy(TINY, 3.0, "another", seed).eval()


def weights_of(world: World) -> list[Tensor]:
    models = [world.policy, world.gold.network.model, *(member.model for member in world.members)]
    return [parameter.clone() for model in models for parameter in model.parameters()]


# The world ---------------------------------------------------------------------------------------------------------


def test_log_probabilities_of_the_sampler_that_keeps_keys_are_those_of_a_whole_forward_pass() -> None:
    policy = other_policy()
    prompts_NP = Corpus(TINY, 0).sample(80, 2, generator("test"))
    ids_NS, logprobs_NT = sample(policy, prompts_NP, 6, generator("draws"))
    assert torch.equal(ids_NS[:, :2], prompts_NP)
    assert ids_NS.shape == (80, 8)
    table_NSV = policy(ids_NS).logits.log_softmax(-1)[:, 1:-1]
    expected_NT = table_NSV.gather(2, ids_NS[:, 2:, None])[..., 0]
    torch.testing.assert_close(logprobs_NT, expected_NT, atol=5e-5, rtol=0)
    torch.testing.assert_close(response_logprobs(TokenLogprobs(policy), ids_NS, 2), expected_NT, atol=5e-5, rtol=0)


def test_responses_are_drawn_with_the_policys_probabilities_and_are_the_same_for_the_same_source() -> None:
    policy = other_policy()
    prompts_NP = torch.tensor([[1, 4]]).expand(20_000, 2)
    ids_NS, _ = sample(policy, prompts_NP, 1, generator("many"))
    share_V = torch.bincount(ids_NS[:, 2], minlength=6) / 20_000
    expected_V = policy(prompts_NP[:1]).logits[0, -1].softmax(-1)
    deviation_V = (expected_V * (1 - expected_V) / 20_000).sqrt()
    assert ((share_V - expected_V).abs() < 4.5 * deviation_V).all()
    assert torch.equal(ids_NS, sample(policy, prompts_NP, 1, generator("many"))[0])
    assert not torch.equal(ids_NS, sample(policy, prompts_NP, 1, generator("others"))[0])


def test_kl_of_responses_is_that_of_enumerating_all_of_them_and_of_sampling() -> None:
    policy, reference = other_policy(0), other_policy(1)
    prompt = [3, 0]
    every_NS = torch.tensor([[*prompt, *response] for response in itertools.product(range(6), repeat=3)])
    with torch.no_grad():
        log_p_N, log_q_N = (
            response_logprobs(TokenLogprobs(model), every_NS, 2).double().sum(dim=1) for model in (policy, reference)
        )
    p_N = log_p_N.exp()
    assert float(p_N.sum()) == pytest.approx(1.0, abs=1e-5)
    expected = float((p_N * (log_p_N - log_q_N)).sum())
    by_token_N = exact_kl(policy, reference, every_NS, 2).double()
    assert float((p_N * by_token_N).sum()) == pytest.approx(expected, abs=1e-4)
    assert expected > 0.1

    ids_NS, logprobs_NT = sample(policy, torch.tensor([prompt]).expand(4000, 2), 3, generator("kl"))
    with torch.no_grad():
        k1_N = (logprobs_NT - response_logprobs(TokenLogprobs(reference), ids_NS, 2)).sum(dim=1)
    for estimate_N in (k1_N, exact_kl(policy, reference, ids_NS, 2)):
        assert abs(float(estimate_N.mean()) - expected) < 4 * float(estimate_N.std()) / 4000**0.5
    assert float(exact_kl(policy, policy, ids_NS[:50], 2).abs().max()) < 1e-5


def test_the_corpus_has_the_transitions_that_were_drawn_and_the_policy_has_learned_them(world: World) -> None:
    corpus = world.corpus
    torch.testing.assert_close(corpus.transitions_VV.sum(dim=1), torch.ones(6))
    ids_NS = corpus.sample(4000, 5, generator("corpus"))
    counts_VV = torch.zeros(6, 6)
    counts_VV.index_put_((ids_NS[:, :-1].flatten(), ids_NS[:, 1:].flatten()), torch.ones(16_000), accumulate=True)
    totals_V1 = counts_VV.sum(dim=1, keepdim=True).clamp(min=1)
    deviation_VV = (corpus.transitions_VV * (1 - corpus.transitions_VV) / totals_V1).sqrt()
    assert ((counts_VV / totals_V1 - corpus.transitions_VV).abs() < 4.5 * deviation_VV + 1e-3).all()

    entropy_V = -(corpus.transitions_VV * corpus.transitions_VV.clamp(min=1e-12).log()).sum(dim=1)
    expected = float(entropy_V[ids_NS[:, 1:4]].mean())
    with torch.no_grad():
        loss = -float(response_logprobs(TokenLogprobs(world.policy), ids_NS, 2).mean())
    assert loss < expected + 0.15
    assert not torch.equal(corpus.transitions_VV, Corpus(TINY, 4).transitions_VV)


def test_rewards_are_frozen_and_standard_on_what_the_policy_says(world: World) -> None:
    ids_NS, _ = world.respond(world.policy, world.prompts(1000, "fresh"), "fresh")
    for reward in (world.gold, world.gold.network, *world.members):
        assert abs(float(reward(ids_NS).mean())) < 0.25
        assert abs(float(reward(ids_NS).std()) - 1) < 0.15
    for scorer in (world.gold.network, *world.members):
        assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
        with torch.no_grad():
            expected_N = (scores(scorer.model, ids_NS) - scorer.mean) / scorer.std
        torch.testing.assert_close(scorer(ids_NS), expected_N)
    assert len({scorer.mean for scorer in world.members}) == TINY.members  # They are different models.


def test_the_gold_is_a_network_and_likeness_to_the_corpus_each_in_its_own_deviations(world: World) -> None:
    gold, table = world.gold, world.corpus.transitions_VV.double()
    ids_NS = torch.randint(6, (300, 5), generator=generator("any tokens at all"))
    likeness_N = torch.zeros(300, dtype=torch.float64)
    for row, ids in enumerate(ids_NS.tolist()):
        for before, after in itertools.pairwise(ids):
            likeness_N[row] += math.log(max(float(table[before, after]), 1e-4))
    mean, deviation = gold.usual
    expected_N = gold.network(ids_NS).double() + TINY.fluency * (likeness_N - mean) / deviation
    torch.testing.assert_close(gold(ids_NS).double(), (expected_N - gold.mean) / gold.std, atol=1e-4, rtol=0)
    # What is unlike the corpus is worth less than what the policy says, whatever the network says on the average.
    assert float(gold(ids_NS).mean()) < float(gold.network(ids_NS).mean()) / gold.std - 0.3


def test_labels_are_the_golds_but_for_the_share_that_is_turned_round(world: World) -> None:
    prompts_NP = world.prompts(3000, "labels")
    first_NS, second_NS = (world.respond(world.policy, prompts_NP, place)[0] for place in ("one", "two"))
    for share in (0.0, 0.25):
        chosen_NS, rejected_NS = prefer(first_NS, second_NS, world.gold, share, generator("flips"))
        same_N = (chosen_NS == rejected_NS).all(dim=1)
        right_N = (world.gold(chosen_NS) > world.gold(rejected_NS))[~same_N]
        deviation = (share * (1 - share) / len(right_N)) ** 0.5
        assert abs(1 - float(right_N.double().mean()) - share) <= 4 * deviation
        is_first_N1 = (chosen_NS == first_NS).all(dim=1, keepdim=True)
        assert torch.equal(torch.where(is_first_N1, second_NS, first_NS), rejected_NS)


def test_an_ensembles_reward_is_the_least_of_its_members_or_their_mean_less_their_variance(world: World) -> None:
    ids_NS, _ = world.respond(world.policy, world.prompts(50, "ensemble"), "ensemble")
    members_MN = torch.stack([member(ids_NS) for member in world.members])
    worst_N = Arm(reduction=Reduction.WORST_CASE).reward(world, ids_NS)
    torch.testing.assert_close(worst_N, members_MN.min(dim=0).values)
    careful_N = Arm(reduction=Reduction.UNCERTAINTY).reward(world, ids_NS)
    expected_N = members_MN.mean(dim=0) - 0.5 * members_MN.var(dim=0, correction=0)
    torch.testing.assert_close(careful_N, expected_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Arm().reward(world, ids_NS), members_MN[0])
    torch.testing.assert_close(Arm(gold=True).reward(world, ids_NS), world.gold(ids_NS))


# Runs --------------------------------------------------------------------------------------------------------------


def test_a_run_changes_nothing_but_its_policy_and_is_the_same_when_it_is_done_again(world: World) -> None:
    before = weights_of(world)
    first, again = (train(world, "beta .05") for _ in range(2))
    assert all(map(torch.equal, before, weights_of(world)))
    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
    assert first.kl > 1e-3  # It has moved.
    assert first.sampler_difference < 1e-4
    assert len(first.curve) == 1  # Of four updates.
    assert first.accuracies == tuple(round(share, 4) for share in world.accuracies)


def test_ppo_on_the_gold_raises_the_gold_and_a_price_of_kl_keeps_the_policy_nearer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARMS, "beta .2", Arm(gold=True, beta=2.0))
    longer = replace(world, protocol=replace(TINY, updates=12))
    free, priced = train(longer, "gold, beta 0"), train(longer, "beta .2")
    assert free.gold > 0.7
    assert free.reward == free.gold
    assert free.curve[-1][2] > free.curve[0][2]
    assert priced.kl < 0.5 * free.kl


# Lines and verdicts ------------------------------------------------------------------------------------------------


def made_up(seeds: int, **gold: float) -> dict[str, dict[int, Run]]:
    """Runs whose gold differs by arm, and by seed a little, and whose KL falls with beta."""
    kl = {"beta 0": 60.0, "beta .05": 15.0, "beta .2": 4.0}
    by_arm = {"beta 0": 1.0, "beta .05": 1.5, "beta .2": 1.2, "gold, beta 0": 3.0} | gold
    return {
        name: {
            seed: Run(
                protocol=TINY.digest,
                seed=seed,
                arm=name,
                accuracies=(0.65, 0.64, 0.66),
                kl=kl.get(name, 40.0) + seed,
                gold=by_arm.get(name, 1.1) + 0.01 * ((seed * 7 + len(name)) % 5),
                reward=2.0,
                curve=((0.5, 0.1, 0.1), (2.0, 0.9, 0.7)),
                sampler_difference=1e-6,
                seconds=1.0,
            )
            for seed in range(seeds)
        }
        for name in ARMS
    }


def test_lines_are_read_as_they_were_written_and_broken_or_foreign_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "runs.jsonl"
    assert whole_seeds(read_runs(path, TINY)) == []
    runs = made_up(2)
    written = [runs[name][seed] for seed in range(2) for name in ARMS]
    for run in written[:-1]:
        append(path, run)
    path.write_text(path.read_text() + json.dumps(asdict(written[-1]))[:40])  # Killed while it wrote.
    assert whole_seeds(read_runs(path, TINY)) == [0]
    assert "line 12: is no JSON" in capsys.readouterr().out
    append(path, replace(written[0], protocol="another"))
    append(path, written[-1])
    assert read_runs(path, TINY) == runs
    assert "line 13: is of protocol another" in capsys.readouterr().out


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "runs.jsonl", made_up(2)
    made: list[tuple[int, str]] = []
    worlds: list[int] = []

    def make(protocol: Protocol, seed: int) -> Any:
        worlds.append(seed)
        return type("Made", (), {"seed": seed, "accuracies": (0.6,)})

    def trained(world: Any, name: str) -> Run:
        made.append((world.seed, name))
        return done[name][world.seed]

    monkeypatch.setattr("bench.overoptimisation.make_world", make)
    monkeypatch.setattr("bench.overoptimisation.train", trained)
    for name in list(ARMS)[:4]:
        append(path, done[name][1])
    finish(path, TINY, [0, 1], list(ARMS))
    assert made == [(0, name) for name in ARMS] + [(1, name) for name in list(ARMS)[4:]]
    finish(path, TINY, [0, 1], list(ARMS))
    assert worlds == [0, 1]
    assert read_runs(path, TINY) == done


def test_verdicts_hold_where_the_claims_do_and_miss_where_they_do_not() -> None:
    runs = made_up(8)
    assert [verdict.held for verdict in verdicts(runs)] == [True, True, True, True]
    assert gain(runs, "beta .05", "beta 0").value == pytest.approx(0.5, abs=0.03)
    assert [verdict.held for verdict in verdicts(made_up(7))] == [False, True, True, True]

    for seed in (2, 5):
        runs["beta .2"][seed] = replace(runs["beta .2"][seed], kl=30.0)
        assert verdicts(runs)[1].held == (seed == 2)  # One seed may be out of order.
    assert not verdicts(made_up(8, **{"beta .05": 1.0, "beta .2": 0.9}))[2].held
    nearest = verdicts(made_up(8, **{"worst case, beta 0": 3.0}))[3]
    assert not nearest.held
    assert "worst case" in nearest.text
    # Seeds without every arm count for nothing.
    del runs["gold, beta 0"][7]
    assert whole_seeds(runs) == list(range(7))


def test_tables_and_figure_are_made_of_finished_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    runs = made_up(8)
    for name in ARMS:
        for run in runs[name].values():
            append(rows, run)
    for module in ("bench.overoptimisation", "bench.outcome"):
        monkeypatch.setattr(f"{module}.OUTPUT", tmp_path / "out")
    monkeypatch.setattr("bench.overoptimisation.Protocol", lambda: TINY)
    monkeypatch.setattr("bench.overoptimisation.finish", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # Of this process, other tests' too.
    monkeypatch.setattr("sys.argv", ["bench.overoptimisation", "--plot-only", "--rows", str(rows)])
    main()
    told = capsys.readouterr().out
    assert told.count("PASS") == 4
    assert "8 seeds; the proxy is right on 0.650 [0.650, 0.650] of pairs" in told
    figures = json.loads((tmp_path / "out" / "overoptimisation.json").read_text())
    expected = sum(run.gold for run in runs["beta .2"].values()) / 8
    assert figures["arms"]["beta .2"]["gold"]["value"] == pytest.approx(expected)
    difference = figures["differences"]["beta .05 less beta 0"]
    assert difference["above_0"] == 8
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert (tmp_path / "out" / "overoptimisation.png").read_bytes().startswith(b"\x89PNG")
    rows.write_text("")
    with pytest.raises(SystemExit, match="fewer than 2 seeds"):
        main()


def test_a_pilot_has_another_protocol_and_what_is_none_is_refused_by_name():
    assert [_changed("updates=300"), _changed("gold_scale=2")] == [("updates", 300), ("gold_scale", 2.0)]
    for text, problem in (("update=300", "must be NAME=VALUE of one of vocabulary"), ("updates=2.5", "is no int")):
        with pytest.raises(argparse.ArgumentTypeError, match=problem):
            _changed(text)

"""The enumerated task of ``make study-optimum`` against brute force in float64: loops, scipy's optimiser, counts."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.enumerable import (
    MODEL,
    PROMPTS,
    REWARDS,
    Array,
    Task,
    gap_closed,
    optimum,
    score,
    total_variation,
    value,
    write_rows,
)
from trainer.data import load_preferences, load_prompts
from trainer.encoding import Encoder

BETA = 0.7
TASK = Task(words=4, longest=2, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task")
    TASK.write(path, width=32, layers=1)
    return path


@pytest.fixture(scope="module")
def ref_PY(folder: Path) -> Array:
    return TASK.log_distribution(AutoModelForCausalLM.from_pretrained(folder / MODEL).double().eval())


@torch.no_grad()
def walk(model: torch.nn.Module, prompt: tuple[int, ...], longest: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every response that sampling token by token can give, and the product of its tokens' probabilities."""

    def further(said: tuple[int, ...], probability: float) -> Iterator[tuple[tuple[int, ...], float]]:
        logits = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0, -1].double()
        powers = [math.exp(x) for x in logits.tolist()]
        for token, power in enumerate(powers):
            following = ((*said, token), probability * power / math.fsum(powers))
            if token == len(powers) - 1 or len(said) + 1 == longest:
                yield following
            else:
                yield from further(*following)

    yield from further((), 1.0)


def test_responses_and_their_probabilities_are_those_of_sampling_token_by_token(folder: Path, ref_PY: Array) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / MODEL).eval()
    served_PY = TASK.log_distribution(model)
    assert ref_PY.shape == (2, 1 + 4 + 16)
    for prompt, logp_Y, served_Y in zip(TASK.prompt_ids, ref_PY, served_PY, strict=True):
        sampled = dict(walk(model.double(), prompt, TASK.longest))
        assert sampled.keys() == set(TASK.responses)
        assert len(TASK.responses) == len(sampled)
        assert np.exp(logp_Y) == pytest.approx([sampled[y] for y in TASK.responses], rel=1e-9)
        assert served_Y == pytest.approx(logp_Y, abs=1e-5)
        assert np.exp(logp_Y).sum() == pytest.approx(1, abs=1e-12)
        model.float()
    assert np.abs(np.exp(ref_PY[0]) - np.exp(ref_PY[1])).max() > 0.01  # The prompts are told apart.


def test_three_tokens_of_six_words_are_259_responses() -> None:
    responses = Task(words=6, longest=3).responses
    assert len(set(responses)) == len(responses) == 1 + 6 + 36 + 216
    assert Counter(response[-1] == 6 for response in responses) == {True: 43, False: 216}
    assert all(6 not in response[:-1] for response in responses)


def test_no_policy_is_better_than_the_optimum_and_an_optimiser_finds_it(ref_PY: Array) -> None:
    best_PY, largest_P = optimum(ref_PY, TASK.rewards_PY, BETA)
    assert np.exp(best_PY).sum(axis=1) == pytest.approx(1)
    assert value(best_PY, ref_PY, TASK.rewards_PY, BETA) == pytest.approx(largest_P)
    for ref_Y, reward_Y, best_Y, largest in zip(ref_PY, TASK.rewards_PY, best_PY, largest_P, strict=True):

        def loss(logits_Y: Array, ref_Y: Array = ref_Y, reward_Y: Array = reward_Y) -> float:
            p_Y = special.softmax(logits_Y)
            return -math.fsum(
                p * (r - BETA * math.log(p / math.exp(q))) for p, r, q in zip(p_Y, reward_Y, ref_Y, strict=True)
            )

        found = optimize.minimize(loss, np.zeros_like(ref_Y), method="BFGS", options={"gtol": 1e-6})
        assert -found.fun == pytest.approx(largest, abs=1e-8)
        assert special.softmax(found.x) == pytest.approx(np.exp(best_Y), abs=1e-4)
        assert largest == pytest.approx(BETA * math.log(np.exp(ref_Y + reward_Y / BETA).sum()))


def test_what_a_policy_lacks_is_beta_times_its_kl_to_the_optimum(ref_PY: Array) -> None:
    random = np.random.default_rng(0)
    best_PY, largest_P = optimum(ref_PY, TASK.rewards_PY, BETA)
    for scale in (0.1, 1.0, 5.0):
        logp_PY = special.log_softmax(random.normal(size=ref_PY.shape) * scale, axis=1)
        kl_P = [stats.entropy(np.exp(p_Y), np.exp(q_Y)) for p_Y, q_Y in zip(logp_PY, best_PY, strict=True)]
        assert largest_P - value(logp_PY, ref_PY, TASK.rewards_PY, BETA) == pytest.approx(BETA * np.array(kl_P))
        assert gap_closed(logp_PY, ref_PY, TASK.rewards_PY, BETA) < 1
        # Pinsker's inequality.
        assert total_variation(logp_PY, best_PY) <= math.sqrt(np.mean(kl_P) / 2)
    assert gap_closed(ref_PY, ref_PY, TASK.rewards_PY, BETA) == 0
    assert gap_closed(best_PY, ref_PY, TASK.rewards_PY, BETA) == pytest.approx(1)
    assert value(ref_PY, ref_PY, TASK.rewards_PY, BETA) == pytest.approx((np.exp(ref_PY) * TASK.rewards_PY).sum(axis=1))


def test_total_variation_is_the_largest_difference_of_any_event() -> None:
    p, q = np.log([[0.5, 0.25, 0.25], [1.0, 1e-12, 1e-12]]), np.log([[0.25, 0.5, 0.25], [1e-12, 1e-12, 1.0]])
    assert total_variation(p, q) == pytest.approx((0.25 + 1.0) / 2)
    assert total_variation(p, p) == 0


def test_dpo_on_all_bradley_terry_preferences_has_the_same_optimum(ref_PY: Array) -> None:
    best_PY, _ = optimum(ref_PY, TASK.rewards_PY, BETA)
    for ref_Y, reward_Y, best_Y in zip(ref_PY, TASK.rewards_PY, best_PY, strict=True):
        p_Y, ref, reward = (torch.tensor(values) for values in (np.exp(ref_Y), ref_Y, reward_Y))
        # How often each pair is drawn, and how often the first of it wins.
        weight_YY = p_Y[:, None] * p_Y[None, :] * torch.sigmoid(reward[:, None] - reward[None, :])
        weight_YY.fill_diagonal_(0)
        logits = torch.zeros_like(ref, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [logits], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss(logits=logits, ref=ref, weight_YY=weight_YY, optimiser=optimiser):  # type: ignore[no-untyped-def]
            optimiser.zero_grad()
            gain_Y = BETA * (logits.log_softmax(0) - ref)
            total = -(weight_YY * torch.nn.functional.logsigmoid(gain_Y[:, None] - gain_Y[None, :])).sum()
            total.backward()
            return total

        optimiser.step(loss)
        assert logits.detach().softmax(0).numpy() == pytest.approx(np.exp(best_Y), abs=1e-4)


def test_preferences_compare_any_two_responses_as_often_as_bradley_terry_says() -> None:
    votes = 50
    counts = Counter((row["prompt"], row["chosen"], row["rejected"]) for row in TASK.preferences(votes))
    texts = [TASK.text(response) or "." for response in TASK.responses]
    assert len(set(texts)) == len(texts)
    assert counts.total() == TASK.prompts * math.comb(len(texts), 2) * votes
    for prompt, reward_Y in zip(TASK.prompt_ids, TASK.rewards_PY, strict=True):
        for (first, r), (second, s) in itertools.permutations(zip(texts, reward_Y, strict=True), 2):
            assert abs(counts[TASK.text(prompt), first, second] - votes / (1 + math.exp(s - r))) <= 0.5


def test_texts_are_read_as_the_tokens_that_they_were_written_for(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    data = tmp_path / "rows.jsonl"
    texts = [TASK.text(response) or "." for response in TASK.responses]
    write_rows(data, [{"prompt": "c d", "chosen": text, "rejected": "a"} for text in texts])
    encoder = Encoder(tokenizer, max_tokens=TASK.max_tokens, truncation="right")
    pairs = encoder.preferences(load_preferences([str(data)]))
    for response, text, pair in zip(TASK.responses, texts, pairs, strict=True):
        assert pair.chosen.ids.tolist() == [2, 3, *response]
        assert pair.chosen.prompt_tokens == 2
        assert tokenizer.decode(response, skip_special_tokens=True) == text.replace(".", "")
    assert tokenizer.pad_token_id is None
    assert tokenizer.eos_token_id == TASK.end == 4
    prompts = encoder.prompts(load_prompts([str(folder / PROMPTS)]))
    assert [tuple(ids.tolist()) for ids in prompts] == list(TASK.prompt_ids)


def test_the_scorer_gives_the_rewards_and_none_for_what_it_does_not_know(folder, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("QUARTET_REWARDS", str(folder / REWARDS))
    pairs = [(TASK.text(prompt), TASK.text(response)) for prompt in TASK.prompt_ids for response in TASK.responses]
    assert score(pairs) == TASK.rewards_PY.ravel().tolist()
    assert score([("a b", "a b c"), ("a c", "a")]) == [None, None]
    assert len(json.loads((folder / REWARDS).read_text())) == 2


@pytest.mark.parametrize("words", [3, 27])
def test_a_language_with_too_few_or_too_many_words_is_refused(words: int) -> None:
    with pytest.raises(ValueError, match=rf"words is {words}, must be from 4, 2 for each of the 2 prompts, to 26"):
        Task(words=words, longest=2)

"""Figures of an evaluation, by hand."""

from __future__ import annotations

import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
from scipy import stats

from trainer.data import PromptRow
from trainer.errors import DataError, OutputError
from trainer.evaluate import Evaluation, difference, different_prompts, longest_prompt, summarise
from trainer.monitors import distinct_n
from trainer.rollout import Rollout, Sample
from trainer.statistics import mean_interval_of_groups


def sample(index: int, response: tuple[int, ...], score: float, kl: float, finished: bool = True) -> Sample:
    return Sample(
        index=index,
        prompt_ids=(50 + index,),
        response_ids=response,
        logprobs=tuple([0.0] * len(response)),
        ref_logprobs=tuple([-kl / len(response)] * len(response)),
        score=score,
        finished=finished,
    )


def evaluate(*samples: Sample) -> Evaluation:
    rollout = Rollout(samples=samples, failures=("x",), weights_version=3, duration_s=2.0, service_work_s=1.0)
    return summarise(rollout, SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids))))


SAMPLES = (
    sample(0, (5, 6, 5, 6), 1.0, 2.0),
    sample(1, (5, 6, 1), 3.0, 4.0),
    sample(2, (5, 6, 1), 5.0, 9.0, finished=False),
)


def test_means_intervals_and_diversity_are_those_computed_by_hand():
    found = evaluate(*SAMPLES)
    scores, kls = [1.0, 3.0, 5.0], [2.0, 4.0, 9.0]
    half = stats.t.ppf(0.975, 2) / 3**0.5
    assert (found.n, found.failed, found.weights_version) == (3, 1, 3)
    assert found.score_mean == 3.0
    assert found.score_std == statistics.stdev(scores)
    assert found.score_ci95 == pytest.approx(half * statistics.stdev(scores), rel=1e-6)
    assert found.kl_sequence_mean == pytest.approx(5.0)
    assert found.kl_ci95 == pytest.approx(half * statistics.stdev(kls), rel=1e-6)
    assert found.length_mean == pytest.approx(10 / 3)
    assert found.finished_share == pytest.approx(2 / 3)
    # Bigrams 56 65 56, 56 61, 56 61: three kinds of seven.
    assert found.distinct_2 == pytest.approx(3 / 7)
    assert found.unique_share == pytest.approx(2 / 3)
    assert found.tokens_per_s == 5.0
    assert [(s.prompt, s.response, s.score) for s in found.samples][1] == ("51", "5 6 1", 3.0)
    assert distinct_n([(1,), (2,)], 2) == 1.0


def test_an_interval_is_over_prompts_and_not_over_answers():
    """Answers to one prompt resemble each other: counted as independent they would halve the interval here."""
    of_prompt = [[1.0, 1.2, 0.8, 1.0], [3.0, 3.2, 2.8, 3.0], [5.0, 5.2, 4.8, 5.0]]
    samples = [replace(SAMPLES[i], score=score) for i, scores in enumerate(of_prompt) for score in scores]
    found = evaluate(*samples)
    means = [statistics.mean(scores) for scores in of_prompt]
    assert found.score_mean == pytest.approx(3.0)
    assert found.score_ci95 == pytest.approx(stats.t.ppf(0.975, 2) * statistics.stdev(means) / 3**0.5, rel=1e-6)
    alone = mean_interval_of_groups(of_prompt[0], ["p"] * 4)
    assert (alone.value, alone.count) == (1.0, 4)
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval_of_groups([1.0], ["p"])


def test_a_prompt_that_is_repeated_is_asked_once_and_its_repetitions_are_counted(capsys):
    user = [{"role": "user", "content": "a"}]
    rows = [PromptRow(prompt=prompt, where=str(i)) for i, prompt in enumerate(["a", "b", "a", user, user, "c", "b"])]
    found = different_prompts(rows, 3)
    assert [row.where for row in found] == ["0", "1", "3"]
    assert capsys.readouterr().err == "3 of the 7 held-out prompts repeat another one and are left out\n"
    assert different_prompts(found, 256) == found
    assert capsys.readouterr().err == ""


def test_an_evaluation_is_read_back_as_it_was_written(tmp_path):
    found = evaluate(*SAMPLES)
    found.write(tmp_path / "e.json")
    assert Evaluation.read(tmp_path / "e.json") == found
    (tmp_path / "e.json").write_text("{}")
    with pytest.raises(OutputError, match=r"e\.json is not an evaluation"):
        Evaluation.read(tmp_path / "e.json")


def test_a_difference_is_paired_by_prompt_and_leaves_out_what_failed_in_one():
    before = evaluate(*SAMPLES)
    after = evaluate(*(sample(i, (5, 1), score, 0.0) for i, score in ((0, 2.0), (1, 3.5), (7, 100.0))))
    change = difference(before, after)
    assert (change.value, change.count) == (0.75, 2)
    with pytest.raises(DataError, match="have 0 prompts in common"):
        difference(before, evaluate(sample(8, (5,), 0.0, 0.0), sample(9, (5,), 0.0, 0.0)))


def test_prompts_must_leave_room_for_the_response_in_every_model_that_sees_them():
    def info(policy: int, reward: int, reference: int, tokens: bool) -> SimpleNamespace:
        hosts = [SimpleNamespace(max_sequence_tokens=length) for length in (policy, reference)]
        limits = [reward, 90] if tokens else []
        return SimpleNamespace(policy=hosts[0], reference=hosts[1], reward_token_limits=limits)

    assert longest_prompt(info(100, 60, 80, True), 20) == 40
    assert longest_prompt(info(100, 60, 80, False), 20) == 60  # Text is measured by the reward service itself.
    assert longest_prompt(info(100, 60, 80, True), 20, 50) == 30
    with pytest.raises(DataError, match="--max-new-tokens is 60, and the models take 60 tokens"):
        longest_prompt(info(100, 60, 80, True), 60)

"""A user's function as a scorer: what it may return, and what becomes of everything else."""

from __future__ import annotations

import asyncio
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.reward import python_scorer
from services.reward.combining import Head
from services.reward.python_scorer import Exchange, PythonScorer, load_python_scorer
from services.runtime.batcher import ItemError
from services.runtime.errors import StartError

SPEC = "rules.kind:score"
PAIRS = [Exchange("q", "one two"), Exchange([{"role": "user", "content": "hi"}], "three"), Exchange("", "")]


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """What is logged; to draw all of these tracebacks would take longer than all the rest."""
    with capture_logs() as logs:
        yield logs  # type: ignore[misc]


def scorer(*values: Any) -> PythonScorer:
    return PythonScorer(SPEC, lambda pairs: list(values))


def test_it_sees_prompts_as_they_came_and_its_numbers_have_its_name():
    seen = []

    def count(pairs: list[tuple[Any, str]]) -> list[int]:
        seen.extend(pairs)
        return [len(response.split()) for _, response in pairs]

    assert PythonScorer(SPEC, count).score(PAIRS) == [{"score": 2.0}, {"score": 1.0}, {"score": 0.0}]
    assert seen == [("q", "one two"), ([{"role": "user", "content": "hi"}], "three"), ("", "")]


def test_it_may_be_async_and_keeps_one_event_loop():
    loops, threads = [], []

    async def slow(pairs: list[tuple[Any, str]]) -> list[bool]:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        threads.append(threading.current_thread())
        return [bool(response) for _, response in pairs]

    rule = PythonScorer(SPEC, slow)
    for _ in range(2):
        assert rule.score(PAIRS) == [{"score": 1.0}, {"score": 1.0}, {"score": 0.0}]
    assert loops[0] is loops[1]
    assert len(set(threads)) == 1
    rule.close()
    assert loops[0].is_closed()
    assert not threads[0].is_alive()


def test_models_that_serve_at_once_share_it_and_it_runs_in_one_thread_one_batch_at_a_time():
    threads, running, most = set(), 0, 0

    def rule(pairs: list[tuple[Any, str]]) -> list[float]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threads.add(threading.get_ident())
        time.sleep(0.002)
        running -= 1
        return [float(response) for _, response in pairs]

    shared, found = PythonScorer(SPEC, rule), {}

    def ask(number: int) -> None:
        found[number] = [shared.score([Exchange("", str(number))]) for _ in range(20)]

    models = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for model in models:
        model.start()
    for model in models:
        model.join()
    assert found == {number: [[{"score": float(number)}]] * 20 for number in range(3)}
    assert (len(threads), most) == (1, 1)
    shared.close()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "gave no score"),
        ({}, "gave no score"),
        (math.nan, "gave nan for 'score', not a finite number"),
        ({"a": 1.0, "b": -math.inf}, "gave -inf for 'b', not a finite number"),
        ("0.5", "gave '0.5' for 'score', a str: must be a number, a dict of numbers, or None"),
        ({"a": None}, "gave None for 'a', a NoneType: must be a number"),
        ({3: 1.0}, "named a score 3, must be text"),
    ],
)
def test_what_is_no_score_is_invalid_alone(value, reason):
    first, bad, last = scorer(1.0, value, 2).score(PAIRS)
    assert (first, last) == ({"score": 1.0}, {"score": 2.0})
    assert isinstance(bad, ItemError)
    assert not bad.retryable
    assert f"the scorer {SPEC} {reason}" in bad.reason


def test_an_exception_may_pass_and_its_message_reaches_the_log_alone(logs):
    def broken(pairs: list[tuple[Any, str]]) -> list[float]:
        raise ConnectionError(f"the judge is away from {pairs[0][1]!r}")

    async def broken_too(pairs: list[tuple[Any, str]]) -> list[float]:
        return broken(pairs)

    expected = ItemError(f"the scorer {SPEC} failed: ConnectionError", retryable=True)
    for function in (broken, broken_too):
        logs.clear()
        assert PythonScorer(SPEC, function).score(PAIRS) == [expected] * 3
        assert (logs[0]["event"], logs[0]["items"]) == ("scorer_failed", 3)
        assert str(logs[0]["exc_info"]) == "the judge is away from 'one two'"


@pytest.mark.parametrize("bad", [{0}, {77}, {255}, {130, 131}])
def test_a_pair_that_it_cannot_score_fails_alone(bad):
    failed: list[int] = []

    def rule(pairs: list[tuple[Any, str]]) -> list[float]:
        try:
            return [float(response) for _, response in pairs]
        except ValueError:
            failed.append(len(pairs))
            raise

    exchanges = [Exchange("", "4111-1111" if i in bad else str(i)) for i in range(256)]
    scorer = PythonScorer(SPEC, rule)
    expected = ItemError(f"the scorer {SPEC} failed: ValueError", retryable=True)
    assert scorer.score(exchanges) == [expected if i in bad else {"score": float(i)} for i in range(256)]
    assert failed == sorted(failed, reverse=True)
    assert len(failed) == 8 + len(bad)
    # Of any length, also of those that do not halve.
    for count in (1, 3, 7):
        alone = scorer.score([*exchanges[1 : count + 1], Exchange("", "x")])
        assert alone == [*({"score": float(i)} if i not in bad else expected for i in range(1, count + 1)), expected]


def test_it_is_not_asked_for_ever_where_all_fails():
    calls: list[int] = []

    def away(pairs: list[tuple[Any, str]]) -> list[float]:
        calls.append(len(pairs))
        raise ConnectionError if len(calls) < 16 else TimeoutError

    found = PythonScorer(SPEC, away).score([Exchange("", "")] * 256)
    assert calls == [256, 128, 128, *[64] * 4, *[32] * 8, 16]
    reasons = [x.reason for x in found if isinstance(x, ItemError) and x.retryable]
    away_, late = (f"the scorer {SPEC} failed: {error}" for error in ("ConnectionError", "TimeoutError"))
    assert reasons == [late] * 16 + [away_] * 240
    # The next batch has as many.
    assert len(PythonScorer(SPEC, away).score([Exchange("", "")] * 256)) == 256
    assert len(calls) == 32


def test_one_that_never_returns_fails_its_pairs_once_and_for_all_and_says_so(logs, monkeypatch):
    monkeypatch.setattr(python_scorer, "_CANCEL_S", 0.2)
    stuck, told = threading.Event(), []

    def rule(pairs: list[tuple[Any, str]]) -> list[float]:
        stuck.wait(60)
        return [1.0] * len(pairs)

    hanging = PythonScorer(SPEC, rule, timeout_s=0.2, on_hang=told.append)
    late = "it has not returned within 0.2 s (scorer_timeout_s)"
    failed = [ItemError(f"the scorer {SPEC} failed: {late}", retryable=True)] * len(PAIRS)
    assert hanging.score(PAIRS) == failed
    assert told == [f"the scorer {SPEC} hangs: {late}"]
    assert hanging.score(PAIRS) == failed  # At once: its thread is not to be had any more.
    assert len(told) == 1
    (hang,) = [entry for entry in logs if entry["event"] == "scorer_hangs"]
    assert "stuck.wait" in hang["stack"]
    stuck.set()
    hanging.close()


def test_an_async_one_that_takes_too_long_is_cancelled_and_scores_the_next_batch():
    told, cancelled = [], []
    slow = True

    async def rule(pairs: list[tuple[Any, str]]) -> list[float]:
        if slow:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(len(pairs))
                raise
        return [1.0] * len(pairs)

    scorer = PythonScorer(SPEC, rule, timeout_s=0.2, on_hang=told.append)
    reason = "it has not returned within 0.2 s (scorer_timeout_s) and was cancelled"
    assert scorer.score(PAIRS) == [ItemError(f"the scorer {SPEC} failed: {reason}", retryable=True)] * len(PAIRS)
    assert cancelled == [len(PAIRS)]
    slow = False
    assert scorer.score(PAIRS) == [{"score": 1.0}] * len(PAIRS)
    assert told == []
    scorer.close()


def test_where_the_calls_run_out_what_was_scored_stays_scored():
    def rule(pairs: list[tuple[Any, str]]) -> list[float]:
        if any(int(response) >= 128 for _, response in pairs):
            raise ValueError
        return [1.0] * len(pairs)

    found = PythonScorer(SPEC, rule).score([Exchange("", str(i)) for i in range(256)])
    assert found[:128] == [{"score": 1.0}] * 128
    assert all(isinstance(x, ItemError) and x.reason.endswith("failed: ValueError") for x in found[128:])


@pytest.mark.parametrize("end", [asyncio.CancelledError("judge"), SystemExit("judge"), KeyboardInterrupt("judge")])
def test_a_rule_that_exits_or_is_cancelled_fails_like_any_other_and_scores_the_next_batch(end):
    calls = 0

    def rule(pairs: list[tuple[Any, str]]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise end
        return [1.0] * len(pairs)

    async def rule_too(pairs: list[tuple[Any, str]]) -> list[float]:
        return rule(pairs)

    expected = ItemError(f"the scorer {SPEC} failed: {type(end).__name__}", retryable=True)
    for function in (rule, rule_too):
        calls = 0
        scorer = PythonScorer(SPEC, function)
        assert scorer.score(PAIRS) == [expected] * 3
        assert calls == 1  # It wants to end: it is not asked again for the parts of this batch.
        assert scorer.score(PAIRS) == [{"score": 1.0}] * 3
        scorer.close()


def test_a_rule_whose_own_task_is_cancelled_fails_and_scores_the_next_batch():
    calls = 0

    async def rule(pairs: list[tuple[Any, str]]) -> list[float]:
        nonlocal calls
        calls += 1
        task = asyncio.current_task()
        assert task is not None
        if calls == 1:
            task.cancel()
        await asyncio.sleep(0)
        return [1.0] * len(pairs)

    scorer = PythonScorer(SPEC, rule)
    first = scorer.score(PAIRS)
    assert all(isinstance(x, ItemError) and x.retryable and "CancelledError" in x.reason for x in first)
    assert scorer.score(PAIRS) == [{"score": 1.0}] * 3
    scorer.close()


def test_a_number_that_cannot_be_read_is_refused_alone():
    first, large, last = scorer(1.0, 10**400, 2).score(PAIRS)
    assert (first, last) == ({"score": 1.0}, {"score": 2.0})
    assert large == ItemError(f"the scorer {SPEC} gave what can't be read, a int: OverflowError", retryable=False)


@pytest.mark.parametrize(
    ("returns", "problem"),
    [
        (lambda pairs: [1.0] * (len(pairs) - 1), "it returned 0 scores for 1 pairs"),
        (lambda pairs: [1.0] * (len(pairs) + 1), "it returned 2 scores for 1 pairs"),
        (lambda pairs: None, "TypeError"),
    ],
)
def test_another_number_of_scores_is_never_given_to_the_wrong_items(returns, problem):
    found = PythonScorer(SPEC, returns).score(PAIRS)
    assert found == [ItemError(f"the scorer {SPEC} failed: {problem}", retryable=True)] * 3


def test_a_pair_that_it_leaves_out_fails_alone():
    found = PythonScorer(SPEC, lambda pairs: [float(len(r)) for _, r in pairs if r]).score(PAIRS)
    left_out = ItemError(f"the scorer {SPEC} failed: it returned 0 scores for 1 pairs", retryable=True)
    assert found == [{"score": 7.0}, {"score": 5.0}, left_out]


def test_weights_that_it_declares_are_names_that_it_must_give():
    def rule(pairs: Any) -> list[Any]:
        return [{"correct": 1, "format": 0.5}, {"correct": 1}, 1.0]

    rule.weights = {"correct": 1.0, "format": 0.2}  # type: ignore[attr-defined]
    found = PythonScorer(SPEC, rule)
    assert found.declared == (Head(name="correct", weight=1.0), Head(name="format", weight=0.2))
    first, *others = found.score(PAIRS)
    assert first == {"correct": 1.0, "format": 0.5}
    assert [x.reason for x in others if isinstance(x, ItemError)] == [
        f"the scorer {SPEC} gave 'correct', but declares weights of correct, format",
        f"the scorer {SPEC} gave 1.0, but declares weights of correct, format: it must give a dict of these",
    ]
    rule.weights = {"correct": math.inf}  # type: ignore[attr-defined]
    with pytest.raises(StartError, match="its weight of 'correct' is inf, must be a finite number"):
        PythonScorer(SPEC, rule)


def test_it_may_not_take_the_name_of_a_head_of_the_model_that_asks():
    rule = scorer({"safety": 1.0}, {"exact": 1.0}, 0.5)
    rule.require_other_names(["safety"])
    taken, *others = rule.score(PAIRS, taken={"safety"})
    assert isinstance(taken, ItemError)
    assert "named a score 'safety', which is the name of a head of the model" in taken.reason
    assert others == [{"exact": 1.0}, {"score": 0.5}]
    assert rule.score(PAIRS, taken={"length"})[0] == {"safety": 1.0}
    with pytest.raises(StartError, match="its 'score' is the name of a head of the model; give it another"):
        rule.require_other_names(["safety", "score"])


def test_it_is_found_in_the_working_directory_and_known_by_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rules_1.py").write_text("def score(pairs):\n    return [2.0 for _ in pairs]\n")
    (tmp_path / "my_rules_2.py").write_text("def score(pairs):\n    return [3.0 for _ in pairs]\n")
    first, second = load_python_scorer("my_rules_1:score"), load_python_scorer("my_rules_2:score")
    assert first.score(PAIRS[:1]) == [{"score": 2.0}]
    assert len({first.fingerprint, second.fingerprint, load_python_scorer("my_rules_1:score").fingerprint}) == 2
    # By the source that runs, whatever becomes of the file.
    imported = first.fingerprint
    (tmp_path / "my_rules_1.py").write_text("def score(pairs):\n    return [9.0 for _ in pairs]\n")
    assert first.fingerprint == imported
    (tmp_path / "my_rules_3.py").write_text("weights = [1]\ndef broken(:\n")
    (tmp_path / "my_rules_4.py").write_text("import not_installed_anywhere\n")
    for spec, message in {
        "my_rules_1": "must be package.module:function",
        ":score": "must be package.module:function",
        "my_rules_1:other": "has no attribute 'other'",
        "my_rules_1:__name__": "it is a str, must be a function",
        "my_rules_0:score": "No module named 'my_rules_0'",
        "my_rules_3:score": "cannot be loaded: invalid syntax",
        "my_rules_4:score": "No module named 'not_installed_anywhere'",
    }.items():
        with pytest.raises(StartError, match=re.escape(f"--scorer is {spec!r}") + ".*" + re.escape(message)):
            load_python_scorer(spec)

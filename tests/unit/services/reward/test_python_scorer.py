"""A user's function as a scorer: what it may return, and what becomes of everything else."""

from __future__ import annotations

import asyncio
import math
import re
import sys
import threading
from typing import Any

import pytest

from services.reward.combining import Head
from services.reward.python_scorer import Exchange, PythonScorer, load_python_scorer
from services.runtime.batcher import ItemError
from services.runtime.errors import StartError

SPEC = "rules.kind:score"
PAIRS = [Exchange("q", "one two"), Exchange([{"role": "user", "content": "hi"}], "three"), Exchange("", "")]


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
    assert set(threads) == {threading.current_thread()}
    rule.close()
    assert loops[0].is_closed()


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


def test_an_exception_is_of_the_whole_batch_and_may_pass():
    def broken(pairs: list[tuple[Any, str]]) -> list[float]:
        raise ConnectionError("the judge is away")

    async def broken_too(pairs: list[tuple[Any, str]]) -> list[float]:
        raise ConnectionError("the judge is away")

    expected = ItemError(f"the scorer {SPEC} failed: ConnectionError: the judge is away", retryable=True)
    assert PythonScorer(SPEC, broken).score(PAIRS) == [expected] * 3
    assert PythonScorer(SPEC, broken_too).score(PAIRS) == [expected] * 3


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

    expected = ItemError(f"the scorer {SPEC} failed: {type(end).__name__}: judge", retryable=True)
    for function in (rule, rule_too):
        calls = 0
        scorer = PythonScorer(SPEC, function)
        assert scorer.score(PAIRS) == [expected] * 3
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
    ("values", "problem"),
    [([1.0], "it returned 1 scores for 3 pairs"), ([1.0] * 4, "it returned 4 scores for 3 pairs"), (None, "TypeError")],
)
def test_another_number_of_scores_is_never_given_to_the_wrong_items(values, problem):
    found = PythonScorer(SPEC, lambda pairs: values).score(PAIRS)
    assert len(found) == 3
    assert all(isinstance(x, ItemError) and problem in x.reason for x in found)


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


def test_it_may_not_take_the_name_of_a_head():
    rule = scorer({"safety": 1.0}, {"exact": 1.0}, 0.5)
    rule.reserve(["safety"])
    taken, *others = rule.score(PAIRS)
    assert isinstance(taken, ItemError)
    assert "named a score 'safety', which is the name of a head of the model" in taken.reason
    assert others == [{"exact": 1.0}, {"score": 0.5}]
    with pytest.raises(StartError, match="its 'score' is the name of a head of the model; give it another"):
        scorer().reserve(["safety", "score"])


def test_it_is_found_in_the_working_directory_and_known_by_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rules_1.py").write_text("def score(pairs):\n    return [2.0 for _ in pairs]\n")
    (tmp_path / "my_rules_2.py").write_text("def score(pairs):\n    return [3.0 for _ in pairs]\n")
    first, second = load_python_scorer("my_rules_1:score"), load_python_scorer("my_rules_2:score")
    assert first.score(PAIRS[:1]) == [{"score": 2.0}]
    assert len({first.fingerprint, second.fingerprint, load_python_scorer("my_rules_1:score").fingerprint}) == 2
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

"""Weights, pairs, rules and truncation as a client asks for them, over the wire."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from quartet.client.errors import translate
from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.reward.combining import Combination, Head, Member, Statistics
from services.reward.hosted import Trained
from services.reward.panel import Candidate, Panel
from services.reward.python_scorer import PythonScorer
from services.reward.scorer import Encoding, ScorerItem
from services.reward.servicer import HostedReward, RewardServicer
from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.telemetry import ServiceMetrics

OK = common_pb2.ITEM_STATUS_CODE_OK
INVALID = common_pb2.ITEM_STATUS_CODE_INVALID
RETRYABLE = common_pb2.ITEM_STATUS_CODE_RETRYABLE
LONGEST = 12
FINGERPRINT = "f" * 64
HEADS = (Head(name="sum", weight=0.5), Head(name="last", weight=2.0))


@dataclass
class TwoHeads:
    """Its heads are the sum of the token ids and the last of them, times ``scale``."""

    vocab_size: int = 300
    max_sequence_tokens: int = LONGEST
    scale: float = 1.0
    calls: list[list[list[int]]] = field(default_factory=list)

    def score(self, items: Sequence[ScorerItem]) -> list[list[float]]:
        self.calls.append([list(item.token_ids) for item in items])
        return [[self.scale * sum(item.token_ids), self.scale * item.token_ids[-1]] for item in items]


def ids(*token_ids: int) -> common_pb2.TokenIds:
    return common_pb2.TokenIds(ids=token_ids)


def item(prompt: Sequence[int], response: Sequence[int]) -> reward_pb2.ScoreItem:
    return reward_pb2.ScoreItem(prompt=common_pb2.Prompt(token_ids=ids(*prompt)), response_token_ids=ids(*response))


def pair(prompt: Sequence[int], first: Sequence[int], second: Sequence[int]) -> reward_pb2.Comparison:
    return reward_pb2.Comparison(
        prompt=common_pb2.Prompt(token_ids=ids(*prompt)),
        first=reward_pb2.Response(token_ids=ids(*first)),
        second=reward_pb2.Response(token_ids=ids(*second)),
    )


def text(prompt: str, response: str) -> reward_pb2.ScoreItem:
    return reward_pb2.ScoreItem(prompt=common_pb2.Prompt(text=prompt), response_text=response)


@pytest.fixture
async def serve_reward(serve, tokenizer) -> AsyncIterator[Callable[..., Any]]:
    """await serve_reward(members, rule=..., ...) gives a stub; parts of HostedReward may be given."""
    hosted: list[HostedReward] = []

    async def start(members: Sequence[Any], rule: PythonScorer | None = None, alone: bool = False, **parts: Any) -> Any:
        servicer = RewardServicer(ServiceMetrics("reward"))
        panel = Panel(members, rule, alone=alone)
        served_by = common_pb2.ServedBy(model_id="m", tokenizer_fingerprint=FINGERPRINT)
        limits = BatchLimits(max_batch_tokens=1000, max_batch_items=1 if alone else 50, max_queued_tokens=10_000)
        made = HostedReward(
            panel=panel,
            encoding=Encoding(pair=False, end_token_id=1) if members else None,
            tokenizer=tokenizer if members else None,
            model=common_pb2.ModelInfo(served_by=served_by, eos_token_ids=[1]),
            batcher=Batcher(panel, limits=limits, metrics=servicer.metrics),
            **parts,
        )
        hosted.append(made)
        servicer.hosted = made
        channel = await serve(
            servicer.metrics, lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
        )
        return reward_pb2_grpc.RewardServiceStub(channel)

    yield start
    for one in hosted:
        one.close()


def ask(*items: reward_pb2.ScoreItem, **fields: Any) -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(items=items, **{"tokenizer_fingerprint": FINGERPRINT, **fields})


def compare(*items: reward_pb2.Comparison, **fields: Any) -> reward_pb2.CompareRequest:
    return reward_pb2.CompareRequest(items=items, **{"tokenizer_fingerprint": FINGERPRINT, **fields})


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Status, field and message of a refused request."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), translate(refused.value, "").field, refused.value.details() or ""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Weights ----------------------------------------------------------------------------------------------------------


async def test_heads_are_told_one_by_one_and_weighed_as_asked(serve_reward):
    stub = await serve_reward([TwoHeads()], combination=Combination(heads=HEADS))
    (kept,) = (await stub.Score(ask(item([5], [6, 7])))).results
    assert [(x.name, x.score) for x in kept.attributes] == [("sum", 18.0), ("last", 7.0)]
    assert kept.score == 0.5 * 18 + 2 * 7
    (other,) = (await stub.Score(ask(item([5], [6, 7]), head_weights={"last": -1.0}))).results
    assert other.score == 0.5 * 18 - 7
    assert other.attributes == kept.attributes


async def test_weights_that_cannot_be_used_refuse_the_request_with_their_field(serve_reward):
    scorer = TwoHeads()
    members = (Member(statistics=Statistics(mean=0, std=1, count=9)),)
    stub = await serve_reward([scorer], combination=Combination(heads=HEADS, members=members))
    for weights, message in (
        ({"kindness": 1.0}, "head_weights names 'kindness', which there is not; there is 'sum', 'last'"),
        (
            {"x" * 1_000_000: 1.0},
            f"head_weights names '{'x' * 100}...', which there is not; there is 'sum', 'last'",
        ),
        ({"sum": math.nan}, "head_weights gives 'sum' the weight nan, must be a finite number"),
    ):
        expected = (grpc.StatusCode.INVALID_ARGUMENT, "head_weights", message)
        assert await refusal(stub.Score(ask(item([5], [6]), head_weights=weights))) == expected
        assert await refusal(stub.Compare(compare(pair([5], [6], [7]), head_weights=weights))) == expected
    code, where, message = await refusal(stub.Score(ask(item([5], [6]), head_weights={"sum": 1.0}, normalise=True)))
    assert (code, where) == (grpc.StatusCode.FAILED_PRECONDITION, "head_weights")
    assert "ask for raw scores" in message
    assert scorer.calls == []


async def test_a_weighted_score_beyond_float32_is_invalid_and_never_an_infinity(serve_reward):
    stub = await serve_reward([TwoHeads()], combination=Combination(heads=HEADS))
    for weights in ({"sum": 1e300}, {"sum": 1e308, "last": -1e308}, {"sum": 1e38, "last": 1e308}):
        (result,) = (await stub.Score(ask(item([5], [6]), head_weights=weights))).results
        assert result.status.code == INVALID
        assert "more than float32 holds" in result.status.reason
        assert result.score == 0.0
        (compared,) = (await stub.Compare(compare(pair([5], [6], [7]), head_weights=weights))).results
        assert compared.status.code == INVALID


# Pairs ------------------------------------------------------------------------------------------------------------


async def test_a_pair_is_one_batch_and_its_probability_the_sigmoid_of_the_scores(serve_reward):
    scorer = TwoHeads()
    combination = Combination(heads=HEADS, members=(Member(temperature=4.0),))
    stub = await serve_reward([scorer], combination=combination)
    reply = await stub.Compare(compare(pair([5], [6, 7], [9]), pair([5], [9], [6, 7])))
    (first, second) = reply.results
    assert [first.first.score, first.second.score] == [23.0, 25.0]
    assert first.probability == pytest.approx(sigmoid(-0.5), rel=1e-12)
    assert first.probability + second.probability == pytest.approx(1.0, rel=1e-12)
    assert (first.first.token_count, first.second.token_count) == (3, 2)
    assert list(first.member_probabilities) == []
    assert reply.served_by.model_id == "m"
    assert reply.work.end_unix_ns >= reply.work.start_unix_ns > 0
    # Each pair stands side by side in one call of the model, whatever else is in it.
    for one, other in (([5, 6, 7], [5, 9]), ([5, 9], [5, 6, 7])):
        assert any([one, other] == call[at : at + 2] for call in scorer.calls for at in range(len(call)))


async def test_a_pair_is_never_split_by_the_budget():
    """Of 24 tokens, where a batch takes 20: it goes alone, but together."""
    scorer = TwoHeads()
    panel = Panel([scorer])
    limits = BatchLimits(max_batch_tokens=20, max_batch_items=50, max_queued_tokens=10_000)
    batcher = Batcher(panel, limits=limits, metrics=ServiceMetrics("reward"))
    both = tuple(Candidate(ScorerItem([7 + i] * 12)) for i in range(2))
    (answers,) = await batcher.submit([both], [24])
    batcher.close()
    assert scorer.calls == [[[7] * 12, [8] * 12]]
    assert [x.members for x in answers] == [([84.0, 7.0],), ([96.0, 8.0],)]


async def test_in_deterministic_mode_each_of_a_pair_is_a_batch_of_its_own(serve_reward):
    scorer = TwoHeads()
    stub = await serve_reward([scorer], alone=True, combination=Combination(heads=HEADS))
    await stub.Compare(compare(pair([5], [6, 7], [9])))
    assert scorer.calls == [[[5, 6, 7]], [[5, 9]]]


async def test_an_ensemble_prefers_as_the_mean_of_its_members(serve_reward):
    members = (Member(temperature=4.0), Member(temperature=0.5))
    combination = Combination(heads=HEADS, members=members)
    stub = await serve_reward([TwoHeads(), TwoHeads(scale=-1.0)], combination=combination)
    (found,) = (await stub.Compare(compare(pair([5], [6, 7], [9])))).results
    assert list(found.member_probabilities) == pytest.approx([sigmoid(-2 / 4), sigmoid(2 / 0.5)])
    assert found.probability == pytest.approx((sigmoid(-0.5) + sigmoid(4)) / 2)
    assert list(found.first.member_scores) == [23.0, -23.0]
    assert (found.first.score, found.first.spread) == (0.0, 23.0)


async def test_a_pair_with_a_bad_response_is_refused_alone_and_says_which(serve_reward):
    stub = await serve_reward([TwoHeads()], combination=Combination(heads=HEADS))
    missing = reward_pb2.Comparison(prompt=common_pb2.Prompt(text="a"), first=reward_pb2.Response(text="b"))
    mixed = pair([5], [6], [7])
    mixed.second.text = "b"
    reply = await stub.Compare(
        compare(pair([5], [6], [7]), pair([5], [300], [7]), pair([5], [6], [7] * LONGEST), missing, mixed)
    )
    assert [x.status.code for x in reply.results] == [OK, *[INVALID] * 4]
    assert [x.status.reason for x in reply.results[1:]] == [
        "first: token id 300 lies outside the vocabulary, [0, 300)",
        "second: prompt and response have 13 tokens, the model takes 12; shorten them, or ask for truncation LEFT",
        "second: response is not set: give response_text or response_token_ids",
        "second: prompt is token_ids but response is response_text: both must be token ids, or neither",
    ]
    assert not reply.results[1].HasField("first")
    assert (await refusal(stub.Compare(compare())))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "items")
    code, where, _ = await refusal(stub.Compare(compare(pair([5], [6], [7]), tokenizer_fingerprint="0" * 64)))
    assert (code, where) == (grpc.StatusCode.FAILED_PRECONDITION, "tokenizer_fingerprint")


async def test_a_pair_of_texts_has_the_scores_that_each_has_alone(serve_reward):
    stub = await serve_reward([TwoHeads()], combination=Combination(heads=HEADS))
    scores = (await stub.Score(ask(text("hello", " good"), text("hello", " bad")))).results
    texts = reward_pb2.Comparison(
        prompt=common_pb2.Prompt(text="hello"),
        first=reward_pb2.Response(text=" good"),
        second=reward_pb2.Response(text=" bad"),
    )
    (found,) = (await stub.Compare(compare(texts))).results
    assert [found.first, found.second] == list(scores)
    texts.first.unfinished = True
    (open_end,) = (await stub.Compare(compare(texts))).results
    assert open_end.first.token_count == scores[0].token_count - 1
    assert open_end.second == scores[1]


# Truncation -------------------------------------------------------------------------------------------------------


async def test_truncation_right_drops_the_end_but_never_all_of_the_response(serve_reward):
    scorer = TwoHeads()
    stub = await serve_reward([scorer], combination=Combination(heads=HEADS))
    tokens = list(range(20, 40))
    results = (
        await stub.Score(
            ask(
                item(tokens[:5], tokens[5:]),
                item(tokens[: LONGEST - 1], tokens[LONGEST - 1 :]),
                item(tokens[:LONGEST], tokens[LONGEST:]),
                truncation=reward_pb2.TRUNCATION_POLICY_RIGHT,
            )
        )
    ).results
    assert [x.status.code for x in results] == [OK, OK, INVALID]
    assert [(x.truncated, x.token_count) for x in results[:2]] == [(True, LONGEST)] * 2
    assert scorer.calls == [[tokens[:LONGEST]] * 2]
    assert results[2].status.reason == (
        "prompt has 12 tokens, at most 12 are scored: truncation RIGHT would leave nothing of the response"
    )


@pytest.mark.parametrize(
    ("trained", "kept"),
    [
        (Trained(truncation="left", max_tokens=8), slice(-8, None)),
        (Trained(truncation="right", max_tokens=8), slice(None, 8)),
        (Trained(truncation="right", max_tokens=500), slice(None, LONGEST)),  # No more than the model takes.
        (Trained(truncation="left"), slice(-LONGEST, None)),
        (Trained(truncation="refuse", max_tokens=8), None),
    ],
)
async def test_as_trained_is_the_side_and_the_length_of_training(trained, kept, serve_reward):
    scorer = TwoHeads()
    stub = await serve_reward([scorer], combination=Combination(heads=HEADS), trained=trained)
    tokens = list(range(20, 40))
    policy = reward_pb2.TRUNCATION_POLICY_AS_TRAINED
    short, long = (await stub.Score(ask(item([5], [6]), item(tokens[:3], tokens[3:]), truncation=policy))).results
    assert (short.status.code, short.truncated) == (OK, False)
    if kept is None:
        assert "prompt and response have 20 tokens, the model was trained with at most 8" in long.status.reason
    else:
        assert (long.status.code, long.truncated) == (OK, True)
        assert tokens[kept] in [sequence for call in scorer.calls for sequence in call]
    info = await stub.GetModelInfo(reward_pb2.GetModelInfoRequest())
    told = reward_pb2.TruncationPolicy.Name(info.trained_truncation)
    assert told == f"TRUNCATION_POLICY_{trained.truncation.upper()}"
    assert info.trained_max_tokens == (trained.max_tokens or 0)


async def test_as_trained_is_refused_where_nobody_knows(serve_reward):
    stub = await serve_reward([TwoHeads()], combination=Combination(heads=HEADS))
    request = ask(item([5], [6]), truncation=reward_pb2.TRUNCATION_POLICY_AS_TRAINED)
    code, where, message = await refusal(stub.Score(request))
    assert (code, where) == (grpc.StatusCode.FAILED_PRECONDITION, "truncation")
    assert "ask for REFUSE, LEFT or RIGHT" in message
    info = await stub.GetModelInfo(reward_pb2.GetModelInfoRequest())
    assert info.trained_truncation == reward_pb2.TRUNCATION_POLICY_UNSPECIFIED


async def test_a_policy_of_a_newer_contract_drops_nothing(serve_reward):
    stub = await serve_reward([TwoHeads()], combination=Combination(heads=HEADS))
    (result,) = (await stub.Score(ask(item([5] * 9, [6] * 9), truncation=17))).results
    assert (result.status.code, result.truncated) == (INVALID, False)


# Rules ------------------------------------------------------------------------------------------------------------


def words(pairs: list[tuple[Any, str]]) -> list[Any]:
    special: dict[str, Any] = {"none": None, "nan": math.nan, "huge": 1e300}
    if any(response == "boom" for _, response in pairs):
        raise RuntimeError("no judge today")
    return [special.get(response, len(response.split())) for _, response in pairs]


RULE = PythonScorer("rules:words", words)


async def test_a_rule_alone_scores_text_and_refuses_token_ids(serve_reward):
    stub = await serve_reward([], RULE, combination=Combination(members=(), rule_name="words", rule_weight=2.0))
    messages = reward_pb2.ScoreItem(response_text="a b c")
    messages.prompt.messages.messages.add(role="user", content="hi")
    # No chat template is needed: nothing is made of the messages.
    results = (await stub.Score(ask(text("q", "one two"), messages, text("", "")))).results
    assert [x.score for x in results] == [4.0, 6.0, 0.0]
    assert [(x.name, x.score) for x in results[0].attributes] == [("words", 2.0)]
    assert {x.token_count for x in results} == {0}
    code, where, message = await refusal(stub.Score(ask(item([5], [6]))))
    assert (code, where) == (grpc.StatusCode.FAILED_PRECONDITION, "tokenizer_fingerprint")
    assert "without a tokenizer to read them: send text" in message
    assert (await refusal(stub.Score(ask(text("a", "b"), normalise=True))))[1] == "normalise"
    texts = reward_pb2.Comparison(
        prompt=common_pb2.Prompt(text="q"),
        first=reward_pb2.Response(text="a b"),
        second=reward_pb2.Response(text="a"),
    )
    (found,) = (await stub.Compare(compare(texts))).results
    assert found.probability == pytest.approx(sigmoid(2.0))


async def test_what_a_rule_has_no_score_for_is_invalid_alone_and_costs_no_forward_pass(serve_reward):
    scorer = TwoHeads(max_sequence_tokens=64)
    stub = await serve_reward([scorer], RULE, combination=Combination(heads=HEADS, rule_name="words"))
    items = [text("q", response) for response in ("a b", "none", "nan", "huge", "a b")]
    results = (await stub.Score(ask(*items))).results
    assert [x.status.code for x in results] == [OK, INVALID, INVALID, INVALID, OK]
    assert results[1].status.reason == "the scorer rules:words gave no score"
    assert results[2].status.reason == "the scorer rules:words gave nan for 'words', not a finite number"
    assert "more than float32 holds" in results[3].status.reason
    assert results[0].score == results[4].score
    assert sum(map(len, scorer.calls)) == 3
    (alone,) = (await stub.Score(ask(text("q", "none")))).results
    assert alone.status.code == INVALID


async def test_a_rule_that_fails_may_be_asked_again(serve_reward):
    stub = await serve_reward([], RULE, combination=Combination(members=(), rule_name="words"))
    result, neighbour = (await stub.Score(ask(text("q", "boom"), text("q", "a b")))).results
    assert (neighbour.status.code, neighbour.score) == (OK, 2.0)
    assert result.status.code == RETRYABLE
    assert result.status.reason == "the scorer rules:words failed: RuntimeError"
    texts = reward_pb2.Comparison(
        prompt=common_pb2.Prompt(text="q"), first=reward_pb2.Response(text="a"), second=reward_pb2.Response(text="boom")
    )
    (compared,) = (await stub.Compare(compare(texts))).results
    assert compared.status.code == RETRYABLE


async def test_a_model_that_breaks_fails_both_of_a_pair(serve_reward):
    class Broken(TwoHeads):
        def score(self, items: Sequence[ScorerItem]) -> list[list[float]]:
            raise RuntimeError("a secret")

    stub = await serve_reward([Broken()], combination=Combination(heads=HEADS))
    (compared,) = (await stub.Compare(compare(pair([5], [6], [7])))).results
    assert compared.status.code == RETRYABLE
    assert compared.status.reason == "first: the model failed: RuntimeError"

"""Scores over the wire: the form of an item, its refusals, its end, its truncation and its normalisation."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from quartet.client.errors import translate
from quartet.common.v1 import common_pb2
from quartet.fingerprint import tokenizer_fingerprint
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.hosting.model import Hosting
from services.hosting.token_length import characters_per_token
from services.reward.combining import Combination, Member, Statistics
from services.reward.panel import Panel
from services.reward.scorer import Encoding, ScorerItem, TransformersScorer
from services.reward.servicer import HostedReward, RewardServicer
from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.telemetry import ServiceMetrics

OK = common_pb2.ITEM_STATUS_CODE_OK
INVALID = common_pb2.ITEM_STATUS_CODE_INVALID
RETRYABLE = common_pb2.ITEM_STATUS_CODE_RETRYABLE
LIMITS = BatchLimits(max_batch_tokens=1000, max_batch_items=5, max_queued_tokens=100_000)
LONGEST = 12


def exact(token_ids: Sequence[int]) -> float:
    """A score that tells every sequence from every other, and that float32 holds exactly."""
    return float(sum((i + 1) * token for i, token in enumerate(token_ids))) / 8


@dataclass
class ScriptedScorer:
    """Implements services.reward.scorer.Scorer; ``answer`` may be replaced."""

    vocab_size: int = 300
    max_sequence_tokens: int = LONGEST
    answer: Callable[[Sequence[int]], float] = exact
    seen: list[list[int]] = field(default_factory=list)

    def score(self, items: Sequence[ScorerItem]) -> list[list[float]]:
        self.seen += [list(item.token_ids) for item in items]
        return [[self.answer(item.token_ids)] for item in items]


def of_ids(prompt: Sequence[int], response: Sequence[int]) -> reward_pb2.ScoreItem:
    ids = common_pb2.TokenIds
    return reward_pb2.ScoreItem(
        prompt=common_pb2.Prompt(token_ids=ids(ids=prompt)), response_token_ids=ids(ids=response)
    )


def of_text(prompt: str, response: str, *, unfinished: bool = False) -> reward_pb2.ScoreItem:
    return reward_pb2.ScoreItem(
        prompt=common_pb2.Prompt(text=prompt), response_text=response, response_unfinished=unfinished
    )


@dataclass
class House:
    """The servicer on a real server; ``hosted`` is what a test may replace a part of."""

    servicer: RewardServicer
    scorer: Any
    stub: Any
    fingerprint: str

    async def score(self, items: Sequence[reward_pb2.ScoreItem], **fields: Any) -> reward_pb2.ScoreResponse:
        request = reward_pb2.ScoreRequest(items=items, **{"tokenizer_fingerprint": self.fingerprint, **fields})
        return await self.stub.Score(request, timeout=20)

    async def refusal(self, items: Sequence[reward_pb2.ScoreItem], **fields: Any) -> tuple[grpc.StatusCode, str]:
        """Status and field of a refused request."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.score(items, **fields)
        return refused.value.code(), translate(refused.value, "").field

    def change(self, **parts: Any) -> None:
        assert self.servicer.hosted is not None
        self.servicer.hosted = replace(self.servicer.hosted, **parts)

    def metric(self, name: str, **labels: str) -> float:
        return self.servicer.metrics.registry.get_sample_value(f"quartet_reward_{name}", labels) or 0.0


@pytest.fixture
async def make_house(serve, tokenizer) -> AsyncIterator[Callable[..., Any]]:
    """await make_house(scorer) serves it, with end tokens appended and scores normalised by mean 2 and deviation 4."""
    batchers = []

    async def make(scorer: Any, encoding: Encoding | None = None) -> House:
        servicer = RewardServicer(ServiceMetrics("reward"))
        fingerprint = tokenizer_fingerprint(tokenizer)
        panel = Panel([scorer])
        batchers.append(Batcher(panel, limits=LIMITS, metrics=servicer.metrics))
        servicer.hosted = HostedReward(
            panel=panel,
            encoding=encoding or Encoding(pair=False, end_token_id=1),
            tokenizer=tokenizer,
            model=common_pb2.ModelInfo(
                served_by=common_pb2.ServedBy(model_id="m", tokenizer_fingerprint=fingerprint), vocab_size=300
            ),
            batcher=batchers[-1],
            combination=Combination(members=(Member(statistics=Statistics(mean=2.0, std=4.0, count=10)),)),
        )
        channel = await serve(
            servicer.metrics, lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
        )
        return House(servicer, scorer, reward_pb2_grpc.RewardServiceStub(channel), fingerprint)

    yield make
    for batcher in batchers:
        batcher.close()


@pytest.fixture
async def house(make_house) -> House:
    return await make_house(ScriptedScorer())


# Items ------------------------------------------------------------------------------------------------------------


async def test_results_stand_in_the_order_of_the_items_whatever_the_batches(house):
    items = [of_ids([5], list(range(10, 10 + length))) for length in (3, 9, 1, 11, 2, 7, 3, 8, 5, 1, 6)]
    reply = await house.score(items)
    expected = [exact([5, *item.response_token_ids.ids]) for item in items]
    assert [result.score for result in reply.results] == expected
    assert [result.token_count for result in reply.results] == [1 + len(i.response_token_ids.ids) for i in items]
    assert {result.status.code for result in reply.results} == {OK}
    assert not any(result.truncated or result.HasField("normalised_score") for result in reply.results)
    assert reply.served_by == house.servicer.hosted.model.served_by
    assert 0 < reply.work.start_unix_ns <= reply.work.end_unix_ns
    assert house.metric("items_total", status="ITEM_STATUS_CODE_OK") == 11
    assert house.metric("tokens_total", kind="scored") == sum(map(len, house.scorer.seen)) == 11 + 56


async def test_text_and_the_token_ids_that_it_stands_for_have_the_same_score(house, tokenizer):
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    pairs = [("hello", " thanks"), ("my phone", " is"), ("", "great"), ("sorry", "")]
    for prompt, response in pairs:
        for unfinished in (False, True):
            if not response and unfinished:
                continue
            end = [] if unfinished else [1]
            ids = [*encode(prompt), *encode(response), *end]
            by_text, by_ids = (
                await house.score([of_text(prompt, response, unfinished=unfinished), of_ids(ids[:-1], ids[-1:])])
            ).results
            assert by_text == by_ids
            assert by_text.score == exact(ids)
    # Encoded apart: together they might be other tokens, which no policy has sampled.
    assert encode("refund") != encode("ref") + encode("und")
    (apart,) = (await house.score([of_text("ref", "und")])).results
    assert apart.score == exact([*encode("ref"), *encode("und"), 1])


async def test_text_needs_no_fingerprint_of_a_tokenizer_and_token_ids_do(house):
    assert (await house.score([of_text("hello", "please")], tokenizer_fingerprint="")).results[0].status.code == OK
    mixed = [of_text("hello", "please"), of_ids([5], [6])]
    assert await house.refusal(mixed, tokenizer_fingerprint="") == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "tokenizer_fingerprint",
    )
    other = "0" * 64
    assert await house.refusal(mixed, tokenizer_fingerprint=other) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "tokenizer_fingerprint",
    )
    assert len(house.scorer.seen) == 1


async def test_a_model_trained_without_end_tokens_is_given_none(house, tokenizer):
    house.change(encoding=Encoding(pair=False, end_token_id=None))
    reply = await house.score([of_text("hello", " thanks"), of_text("", "")])
    expected = tokenizer("hello").input_ids + tokenizer(" thanks").input_ids
    assert house.scorer.seen == [expected]
    assert reply.results[1].status.reason == "prompt and response have no tokens: there is nothing to score"


async def test_text_begins_as_the_tokenizer_begins_it_and_answers_to_messages_end_as_their_template_does(
    house, tokenizer, monkeypatch
):
    # Short enough for the model.
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}:{% endfor %}")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    chat = common_pb2.Prompt(messages={"messages": [{"role": "user", "content": "hello"}]})
    items = [
        of_text("hello", " thanks"),
        of_text("<bos>hello", " thanks"),
        of_text("", " thanks"),
        of_text("hello", " thanks", unfinished=True),
        reward_pb2.ScoreItem(prompt=chat, response_text=" thanks"),
        reward_pb2.ScoreItem(prompt=chat, response_text=" thanks", response_unfinished=True),
    ]
    plain, rendered, said = encode("hello"), encode("hello:"), encode(" thanks")
    expected = [
        [2, *plain, *said, 1],
        [2, *plain, *said, 1],
        [2, *said, 1],
        [2, *plain, *said],
        [*rendered, *said, 0],
        [*rendered, *said],
    ]
    house.change(encoding=Encoding(pair=False, end_token_id=1, opening=(2,), turn_end_id=0))
    assert [result.score for result in (await house.score(items)).results] == [exact(ids) for ids in expected]
    # A model that was trained without end tokens is given none, whatever the template says.
    house.change(encoding=Encoding(pair=False, end_token_id=None, opening=(2,), turn_end_id=0))
    (result,) = (await house.score(items[4:5])).results
    assert result.score == exact([*rendered, *said])


def pair_tokenizer() -> Any:
    """As an encoder has it: [CLS] first [SEP] second [SEP], the two told apart by their segments, too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(296))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


async def test_an_encoder_scores_a_pair_as_transformers_does_segments_included(make_house, tmp_path):
    torch.manual_seed(1)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LONGEST,
            num_labels=1,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    tokenizer = pair_tokenizer()
    hosting = Hosting(device=torch.device("cpu"), dtype=torch.float32)
    scorer = TransformersScorer(tmp_path, hosting=hosting, tokenizer=tokenizer)
    house = await make_house(scorer, scorer.encoding(tmp_path, tokenizer))
    house.change(tokenizer=tokenizer)
    exact_model = model.double()

    @torch.inference_mode()
    def direct(first: str, second: str) -> float:
        return exact_model(**tokenizer(first, second, return_tensors="pt")).logits.item()

    pairs = [("w1", "w2"), ("w1 w2", "w3 w4 w5"), ("w9 w8 w7", "w6"), ("", "w1 w2"), ("w5", "")]
    results = (await house.score([of_text(*pair) for pair in pairs])).results
    expected = [direct(*pair) for pair in pairs]
    assert [r.score for r in results] == pytest.approx(expected, abs=2e-5)
    without = [
        exact_model(input_ids=tokenizer(*pair, return_tensors="pt").input_ids).logits.item() for pair in pairs[:4]
    ]
    assert min(abs(x - y) for x, y in zip(expected, without, strict=False)) > 1e-3  # The segments matter.
    # Whether the response ended by itself is nothing that a pair can say.
    unfinished = (await house.score([of_text(*pairs[1], unfinished=True)])).results
    assert unfinished[0].score == pytest.approx(expected[1], abs=2e-5)
    # Dropped are the oldest words of the prompt: the token that the score is read off stays in front.
    long = of_text("w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10 w11")
    refused, (cut,) = (
        (await house.score([long])).results,
        (await house.score([long], truncation=reward_pb2.TRUNCATION_POLICY_LEFT)).results,
    )
    assert "prompt and response have 14 tokens, the model takes 12" in refused[0].status.reason
    assert (cut.truncated, cut.token_count) == (True, LONGEST)
    assert cut.score == pytest.approx(direct("w3 w4 w5 w6 w7 w8", "w9 w10 w11"), abs=2e-5)
    # From the right it is the newest words of the response, and the last separator stays.
    full = of_text("w1 w2 w3 w4 w5 w6 w7 w8 w9", "w10 w11")
    cut, none_left = (await house.score([long, full], truncation=reward_pb2.TRUNCATION_POLICY_RIGHT)).results
    assert cut.score == pytest.approx(direct("w1 w2 w3 w4 w5 w6 w7 w8", "w9"), abs=2e-5)
    assert "truncation RIGHT would leave nothing of the response" in none_left.status.reason


async def test_each_refused_item_says_why_and_never_reaches_the_model(house):
    prompt = common_pb2.Prompt
    items = [
        of_ids([5], [6]),
        reward_pb2.ScoreItem(response_text="hello"),
        reward_pb2.ScoreItem(prompt=prompt(text="hello")),
        reward_pb2.ScoreItem(prompt=prompt(text="hello"), response_token_ids=common_pb2.TokenIds(ids=[5])),
        reward_pb2.ScoreItem(prompt=prompt(token_ids=common_pb2.TokenIds(ids=[5])), response_text="hello"),
        of_ids([5], []),
        of_text("hello", "", unfinished=True),
        of_ids([5, 300], [6]),
        of_ids([5], [-1]),
        of_ids([5] * LONGEST, [6]),
        of_ids([], [6]),
    ]
    results = (await house.score(items)).results
    assert [r.status.code for r in results] == [OK, *[INVALID] * 9, OK]
    assert [r.status.reason for r in results] == [
        "",
        "prompt is not set: give text, token_ids or messages",
        "response is not set: give response_text or response_token_ids",
        "prompt is text but response is response_token_ids: both must be token ids, or neither",
        "prompt is token_ids but response is response_text: both must be token ids, or neither",
        "response_token_ids is empty: there is nothing to score",
        "response_text is empty and unfinished: there is nothing to score",
        "token id 300 lies outside the vocabulary, [0, 300)",
        "token id -1 lies outside the vocabulary, [0, 300)",
        "prompt and response have 13 tokens, the model takes 12; shorten them, or ask for truncation LEFT",
        "",
    ]
    assert sorted(house.scorer.seen) == [[5, 6], [6]]
    assert house.metric("items_total", status="ITEM_STATUS_CODE_INVALID") == 9
    # A request of nothing but refused items is answered all the same.
    (alone,) = (await house.score([of_ids([5], [])])).results
    assert alone.status.code == INVALID


async def test_a_request_without_items_is_refused(house):
    assert await house.refusal([]) == (grpc.StatusCode.INVALID_ARGUMENT, "items")


async def test_a_request_of_more_items_than_are_taken_is_refused_before_any_of_them_is_looked_at(house):
    assert house.servicer.max_request_items == 16_384
    empty = reward_pb2.ScoreItem()
    assert await house.refusal([empty] * 16_385) == (grpc.StatusCode.INVALID_ARGUMENT, "items")
    assert house.metric("refused_total", reason="too_large") == 1
    house.servicer.max_request_items = 3
    for call in (
        house.stub.Score(reward_pb2.ScoreRequest(items=[empty] * 4)),
        house.stub.Compare(reward_pb2.CompareRequest(items=[reward_pb2.Comparison()] * 4)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        message = "items has 4 items, a request may have 3 (max_request_items); split it"
        assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)
    assert house.metric("items_total", status="ITEM_STATUS_CODE_INVALID") == 0
    assert len((await house.score([empty] * 3)).results) == 3


async def test_the_longest_request_is_answered_in_order_and_its_items_counted(house):
    items = [of_ids([n % 300], [n // 300]) for n in range(16_384)]
    items[77] = of_ids([5], [])
    results = (await house.score(items)).results
    assert [r.status.code for r in results] == [INVALID if n == 77 else OK for n in range(16_384)]
    scores = [exact([n % 300, n // 300]) for n in range(16_384) if n != 77]
    assert [r.score for r in results if r.status.code == OK] == scores
    assert house.metric("items_total", status="ITEM_STATUS_CODE_OK") == 16_383
    assert house.metric("items_total", status="ITEM_STATUS_CODE_INVALID") == 1


# Truncation -------------------------------------------------------------------------------------------------------


async def test_truncation_drops_tokens_on_the_left_as_few_as_needed_and_says_so(house, tokenizer):
    ids = list(range(20, 40))
    left = reward_pb2.TRUNCATION_POLICY_LEFT
    items = [
        of_ids(ids[:5], ids[5:LONGEST]),  # Just fits.
        of_ids(ids[:5], ids[5 : LONGEST + 1]),
        of_ids(ids[:3], ids[3:20]),  # The response alone is too long.
        of_text("hello thanks please sorry help order refund broken phone screen", " router delay"),
    ]
    results = (await house.score(items, truncation=left)).results
    assert [r.truncated for r in results] == [False, True, True, True]
    assert [r.token_count for r in results] == [LONGEST] * 4
    text = tokenizer(items[3].prompt.text).input_ids + tokenizer(items[3].response_text).input_ids + [1]
    assert len(text) > LONGEST
    kept = [ids[:LONGEST], ids[1 : LONGEST + 1], ids[20 - LONGEST : 20], text[-LONGEST:]]
    assert [r.score for r in results] == [exact(k) for k in kept]


async def test_text_that_cannot_fit_is_refused_by_its_characters_and_never_tokenised(house, tokenizer):
    read: list[str] = []

    def note(text: str, **options: Any) -> Any:
        read.append(text)
        return tokenizer(text, **options)

    longest = characters_per_token(tokenizer)
    assert longest == max(len(tokenizer.decode([token])) for token in range(300)) == len("<bos>")
    house.change(tokenizer=note, encoding=Encoding(pair=False, end_token_id=1, characters_per_token=longest))
    fits = "<bos>" * (LONGEST - 1)
    results = (await house.score([of_text(fits, ""), of_text(fits + "!" * 5, "!"), of_text("", "a" * 10**6)])).results
    assert (results[0].status.code, results[0].token_count) == (OK, LONGEST)
    assert [r.status.reason for r in results[1:]] == [
        f"prompt and response have {size} characters, which are {least} tokens or more, the model takes 12; "
        "shorten them, or ask for truncation LEFT"
        for size, least in ((61, 13), (10**6, 200_000))
    ]
    assert read == [fits]
    # What is to be cut has to be read.
    (cut,) = (await house.score([of_text(fits * 2, "!")], truncation=reward_pb2.TRUNCATION_POLICY_LEFT)).results
    assert (cut.status.code, cut.token_count, cut.truncated) == (OK, LONGEST, True)


async def test_large_texts_do_not_hold_up_small_ones(house, tokenizer):
    """Of those that are read, each size has threads of its own."""
    release = threading.Event()

    def slow(text: str, **options: Any) -> Any:
        if len(text) > 1000:
            assert release.wait(20)
        return tokenizer(text[:50], **options)

    house.change(tokenizer=slow)
    large = [asyncio.create_task(house.score([of_text("a" * size, "b")])) for size in [2**19] * 40]
    await asyncio.sleep(0.2)
    (small,) = (await asyncio.wait_for(house.score([of_text("hello", " thanks")]), 10)).results
    assert small.status.code == OK
    assert not any(task.done() for task in large)
    release.set()
    assert {reply.results[0].status.code for reply in await asyncio.gather(*large)} == {INVALID}


@pytest.mark.parametrize("policy", [reward_pb2.TRUNCATION_POLICY_UNSPECIFIED, reward_pb2.TRUNCATION_POLICY_REFUSE])
async def test_without_being_told_to_nothing_is_dropped(house, policy):
    short, long = (await house.score([of_ids([5], [6]), of_ids([5] * 9, [6] * 9)], truncation=policy)).results
    assert (short.status.code, long.status.code) == (OK, INVALID)
    assert house.scorer.seen == [[5, 6]]


# Scores -----------------------------------------------------------------------------------------------------------


async def test_normalised_scores_are_given_beside_the_raw_ones_exactly_when_asked_for(house):
    items = [of_ids([5], [6]), of_ids([], [16]), of_ids([5], [])]
    results = (await house.score(items, normalise=True)).results
    assert [r.score for r in results[:2]] == [17 / 8, 2.0]
    assert [r.normalised_score for r in results[:2]] == [(17 / 8 - 2.0) / 4.0, 0.0]
    assert results[1].HasField("normalised_score")  # Zero is a score, and not none.
    assert not results[2].HasField("normalised_score")
    info = await house.stub.GetModelInfo(reward_pb2.GetModelInfoRequest())
    assert (info.normalisation.mean, info.normalisation.std, info.normalisation.count) == (2.0, 4.0, 10)


async def test_a_model_without_statistics_refuses_to_normalise_before_it_scores(house):
    house.change(combination=Combination())
    assert await house.refusal([of_ids([5], [6])], normalise=True) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "normalise",
    )
    assert house.scorer.seen == []
    assert (await house.score([of_ids([5], [6])])).results[0].score == 17 / 8
    assert not (await house.stub.GetModelInfo(reward_pb2.GetModelInfoRequest())).HasField("normalisation")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
async def test_a_score_that_is_no_number_is_invalid_alone(house, wrong):
    house.scorer.answer = lambda ids: wrong if 66 in ids else exact(ids)
    first, bad, last = (await house.score([of_ids([5], [6]), of_ids([5], [66]), of_ids([7], [8])])).results
    assert (first.score, last.score) == (17 / 8, 23 / 8)
    assert (bad.status.code, bad.status.reason) == (INVALID, f"the model's score is {wrong}, not a finite number")
    assert bad.score == 0.0


async def test_a_batch_that_failed_may_be_asked_again_and_the_other_batches_are_answered(house):
    def answer(ids: Sequence[int]) -> float:
        if 66 in ids:
            raise RuntimeError("a secret")
        return exact(ids)

    house.scorer.answer = answer
    # Batches have five items at most, neighbours in length.
    items = [*[of_ids([5], [6])] * 5, *[of_ids([5, 5, 5], [66])] * 5]
    results = (await house.score(items)).results
    assert [r.status.code for r in results] == [*[OK] * 5, *[RETRYABLE] * 5]
    assert {r.status.reason for r in results[5:]} == {"the model failed: RuntimeError"}
    house.scorer.answer = exact
    assert {r.status.code for r in (await house.score(items)).results} == {OK}


async def test_before_the_model_is_loaded_the_service_says_so(house):
    house.servicer.hosted = None
    assert await house.refusal([of_ids([5], [6])]) == (grpc.StatusCode.UNAVAILABLE, "")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.stub.GetModelInfo(reward_pb2.GetModelInfoRequest())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_real_models_scores_are_those_of_transformers_in_float64_by_text_and_by_ids(
    make_house, make_reward_model, tokenizer
):
    folder = make_reward_model(seed=4)
    hosting = Hosting(device=torch.device("cpu"), dtype=torch.float32)
    house = await make_house(TransformersScorer(folder, hosting=hosting, tokenizer=tokenizer))
    pairs = [("hello", " thanks"), ("my phone screen is broken", " sorry we can help"), ("", "great"), ("refund", "")]
    ids = [
        [*tokenizer(p).input_ids, *tokenizer(r).input_ids, 1] if r else [*tokenizer(p).input_ids, 1] for p, r in pairs
    ]
    ids = [[int(token) for token in sequence] for sequence in ids]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([sequence])).logits[0, 0].item() for sequence in ids]
    items = [*[of_text(p, r) for p, r in pairs], *[of_ids(sequence[:-1], sequence[-1:]) for sequence in ids]]
    results = (await house.score(items, normalise=True)).results
    assert [r.score for r in results] == pytest.approx([*expected, *expected], abs=2e-5)
    normalised = [(x - 2.0) / 4.0 for x in expected]
    assert [r.normalised_score for r in results] == pytest.approx([*normalised, *normalised], abs=2e-5)

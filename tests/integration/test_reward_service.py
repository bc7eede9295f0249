"""The reward service, live, against transformers called directly."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.request

import grpc
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from quartet.client import InvalidInputError, ItemFailure, PreconditionError, RewardClient, Score, ScoreItem, Truncation
from quartet.client.errors import pushback_s
from quartet.fingerprint import safetensors_fingerprint, tokenizer_fingerprint
from quartet.model_folder import write_metadata
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc


@pytest.fixture(scope="module")
def reward_folder(make_reward_model):
    folder = make_reward_model()
    write_metadata(folder, kind="reward", append_eos=True, normalisation={"mean": 0.5, "std": 2.0, "count": 10})
    return folder


@pytest.fixture(scope="module")
def service(start_service, reward_folder):
    return start_service("reward", reward_folder)


def direct_scores(folder, sequences):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in sequences]


def read_metrics(service) -> str:
    return urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=5).read().decode()


PAIRS = [("hello", " thanks"), ("my phone screen is broken", " sorry we can help"), ("refund", " no"), ("", "great")]


async def test_text_scores_equal_transformers_called_one_by_one(service, reward_folder, tokenizer):
    async with RewardClient(service.address) as client:
        reply = await client.score([ScoreItem(prompt=p, response=r) for p, r in PAIRS])
    ids = [
        tokenizer(p, add_special_tokens=False).input_ids + tokenizer(r, add_special_tokens=False).input_ids + [1]
        for p, r in PAIRS
    ]
    ids = [[int(i) for i in row] for row in ids]
    expected = direct_scores(reward_folder, ids)
    assert [r.score for r in reply.results] == pytest.approx(expected, abs=1e-5)
    assert [r.token_count for r in reply.results] == [len(row) for row in ids]
    assert len({round(x, 4) for x in expected}) == len(expected)  # The scores tell the texts apart.
    assert reply.served_by.weights_fingerprint == safetensors_fingerprint(reward_folder)
    assert reply.work.end_unix_ns > reply.work.start_unix_ns


async def test_unfinished_text_gets_no_end_token_and_messages_go_through_the_template(
    service, reward_folder, tokenizer
):
    messages = [{"role": "user", "content": "my phone is broken"}]
    async with RewardClient(service.address) as client:
        reply = await client.score(
            [ScoreItem(prompt="hello", response=" we", finished=False), ScoreItem(prompt=messages, response="sorry")]
        )
    first = tokenizer("hello").input_ids + tokenizer(" we").input_ids
    second = tokenizer("user: my phone is broken\nassistant: ").input_ids + tokenizer("sorry").input_ids + [1]
    assert [r.score for r in reply.results] == pytest.approx(direct_scores(reward_folder, [first, second]), abs=1e-5)


async def test_token_ids_are_scored_exactly_as_sent(service, reward_folder, tokenizer):
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (2, 7, 40, 128, 15, 3)]
    async with RewardClient(service.address) as client:
        reply = await client.score(
            [ScoreItem(prompt=ids[:1], response=ids[1:]) for ids in sequences],
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            normalise=True,
        )
    expected = direct_scores(reward_folder, sequences)
    assert [r.score for r in reply.results] == pytest.approx(expected, abs=1e-5)
    assert [r.normalised_score for r in reply.results] == pytest.approx([(x - 0.5) / 2 for x in expected], abs=1e-5)


async def test_a_bad_item_is_refused_alone_and_says_why(service, tokenizer):
    items = [
        ScoreItem(prompt=[5, 6], response=[7]),
        ScoreItem(prompt=[5, 300], response=[7]),
        ScoreItem(prompt=[5] * 100, response=[7] * 29),
        ScoreItem(prompt=[5], response=[]),
        ScoreItem(prompt="hello", response=[7]),
    ]
    async with RewardClient(service.address) as client:
        reply = await client.score(items, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    assert isinstance(reply.results[0], Score)
    reasons = [r.reason for r in reply.results[1:] if isinstance(r, ItemFailure)]
    assert "token id 300 lies outside the vocabulary, [0, 300)" in reasons[0]
    assert "129 tokens, the model takes 128" in reasons[1]
    assert "response_token_ids is empty" in reasons[2]
    assert "prompt is text but response is response_token_ids" in reasons[3]
    assert len(reasons) == 4


async def test_left_truncation_keeps_the_end_and_says_so(service, reward_folder, tokenizer):
    ids = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    async with RewardClient(service.address) as client:
        reply = await client.score(
            [ScoreItem(prompt=ids[:150], response=ids[150:])],
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            truncation=Truncation.LEFT,
        )
    (result,) = reply.results
    assert result.truncated
    assert result.token_count == 128
    assert result.score == pytest.approx(direct_scores(reward_folder, [ids[-128:]])[0], abs=1e-5)


async def test_whole_requests_are_refused_with_the_field(service, tokenizer):
    async with RewardClient(service.address) as client:
        with pytest.raises(InvalidInputError, match="items is empty") as empty:
            await client.score([])
        assert empty.value.field == "items"
        with pytest.raises(PreconditionError, match="the token ids mean something else here") as other:
            await client.score([ScoreItem(prompt=[3], response=[4])], tokenizer_fingerprint="0" * 64)
        assert other.value.field == "tokenizer_fingerprint"
        with pytest.raises(InvalidInputError, match="tokenizer_fingerprint is empty"):
            await client.score([ScoreItem(prompt=[3], response=[4])])


async def test_encoder_classifiers_score_sentence_pairs_as_transformers_does(
    start_service, make_reward_model, tokenizer
):
    folder = make_reward_model(architecture="bert")
    live = start_service("reward", folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    async with RewardClient(live.address) as client:
        reply = await client.score([ScoreItem(prompt=p, response=r) for p, r in PAIRS])
    with torch.inference_mode():
        expected = [model(**tokenizer(p, r, return_tensors="pt")).logits.item() for p, r in PAIRS]
    assert [r.score for r in reply.results] == pytest.approx(expected, abs=1e-5)
    assert live.stop() == 0


async def test_deterministic_mode_gives_the_same_bits_alone_and_in_company(start_service, reward_folder, tokenizer):
    live = start_service("reward", reward_folder, "--deterministic")
    fingerprint = tokenizer_fingerprint(tokenizer)
    items = [ScoreItem(prompt=[5 + i], response=[7 + j for j in range(i + 1)]) for i in range(20)]
    async with RewardClient(live.address) as client:
        together = (await client.score(items, tokenizer_fingerprint=fingerprint)).results
        alone = [(await client.score([item], tokenizer_fingerprint=fingerprint)).results[0] for item in items]
    assert [r.score for r in together] == [r.score for r in alone]
    assert live.stop() == 0


async def test_a_full_service_refuses_whole_requests_with_a_pushback_and_retries_are_answered(
    start_service, reward_folder, tokenizer
):
    live = start_service("reward", reward_folder, "--max-queued-tokens", "600", "--max-held-mib", "1")
    fingerprint = tokenizer_fingerprint(tokenizer)
    request = reward_pb2.ScoreRequest(tokenizer_fingerprint=fingerprint)
    for _ in range(4):
        item = request.items.add()
        item.prompt.token_ids.ids.extend([5] * 100)
        item.response_token_ids.ids.extend([7] * 25)
    async with grpc.aio.insecure_channel(live.address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        await stub.Score(request)  # Its rate is known now.
        calls = [stub.Score(request) for _ in range(200)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [error for error in outcomes if isinstance(error, grpc.aio.AioRpcError)]
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert 0 < len(refused) < 200
    assert all(0.01 <= pushback_s(error) < 10 for error in refused)
    assert all("would exceed 600; try again later" in (error.details() or "") for error in refused)
    scores = {result.score for reply in outcomes if not isinstance(reply, Exception) for result in reply.results}
    assert len({round(score, 4) for score in scores}) == 1

    items = [ScoreItem(prompt=[5] * 100, response=[7] * 25)] * 4
    async with RewardClient(live.address) as client:
        replies = await asyncio.gather(*(client.score(items, tokenizer_fingerprint=fingerprint) for _ in range(20)))
        assert all(isinstance(result, Score) for reply in replies for result in reply.results)
        with pytest.raises(
            InvalidInputError, match=r"625 tokens, at most 600 may wait at a time \(max_queued_tokens\)"
        ):
            await client.score(items[:1] * 5, tokenizer_fingerprint=fingerprint)
        with pytest.raises(InvalidInputError, match=r"bytes, at most 1048576 are held at a time \(max_held_mib\)"):
            await client.score([ScoreItem(prompt="a" * 2**20, response="b")])
    text = await asyncio.to_thread(read_metrics, live)
    assert 'quartet_reward_refused_total{reason="queue_tokens"}' in text
    assert 'quartet_reward_refused_total{reason="too_large"} 2.0' in text
    for gauge in ("queue_tokens", "queue_items", "held_bytes", "queue_oldest_seconds", "batch_age_seconds"):
        assert f"quartet_reward_{gauge} 0.0" in text
    assert live.stop() == 0


def test_metrics_count_items_and_tokens(service):
    text = read_metrics(service)
    assert 'quartet_reward_items_total{status="ITEM_STATUS_CODE_OK"}' in text
    assert 'quartet_reward_calls_total{code="INVALID_ARGUMENT",method="Score"}' in text
    assert "quartet_reward_queue_tokens 0.0" in text


def refused(*arguments: str) -> str:
    command = [sys.executable, "-m", "services.reward", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_wrong_start_is_one_clear_line(service, reward_folder, make_reward_model, make_policy, tmp_path):
    free = ("--port", "0", "--metrics-port", "0", "--admin-port", "0")
    assert "there is no such folder" in refused("--model", str(tmp_path / "nothing"), *free)
    bare = make_policy(seed=3, with_tokenizer=False)
    assert "the folder has no tokenizer" in refused("--model", str(bare), *free)
    assert "is not a reward model" in refused("--model", str(make_policy(seed=3)), *free)
    assert "num_labels is 2, must be 1" in refused("--model", str(make_reward_model(num_labels=2)), *free)
    port = service.address.rpartition(":")[2]
    taken = refused("--model", str(reward_folder), "--port", port, "--metrics-port", "0", "--admin-port", "0")
    assert f"cannot listen on 127.0.0.1:{port}" in taken
    ours = ("--model", str(reward_folder), *free)
    elsewhere = "cannot listen on 192.0.2.1:0 for model swaps (--admin-port): Cannot assign requested address"
    assert elsewhere in refused(*ours, "--admin-host", "192.0.2.1")
    elsewhere = "cannot listen on 192.0.2.1:0 for metrics: Cannot assign requested address"
    assert elsewhere in refused(*ours, "--metrics-host", "192.0.2.1")
    assert "--max-batch-tokens is '-5'" in refused("--model", "x", "--max-batch-tokens", "-5")
    assert "--grace-s is 'nan'" in refused("--model", "x", "--grace-s", "nan")

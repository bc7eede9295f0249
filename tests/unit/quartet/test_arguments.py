"""What does not fit the wire is refused before anything is sent, by field, value and bound."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy as np
import pytest

from quartet.client import (
    AdapterClient,
    AdapterConfig,
    ComparisonItem,
    InvalidInputError,
    PolicyClient,
    ReferenceClient,
    RewardAdminClient,
    RewardClient,
    Sampling,
    ScoreItem,
    TokenSequence,
    WeightsClient,
    WireTensor,
    types,
)
from quartet.client.arguments import message
from quartet.common.v1 import common_pb2

NOWHERE = "127.0.0.1:1"
FINE = ScoreItem(prompt="a", response="b")
HALF = "hello\ud83d"  # The first half of a pair that was cut.
INT32 = "an integer from -2147483648 to 2147483647"
INT64 = "an integer from -9223372036854775808 to 9223372036854775807"


async def score(items: Any, **options: Any) -> None:
    async with RewardClient(NOWHERE) as client:
        await client.score(items, **options)


async def compare(*items: ComparisonItem, **options: Any) -> None:
    async with RewardClient(NOWHERE) as client:
        await client.compare(items, **options)


async def generate(prompts: Any = (), *, ask: str = "generate", **options: Any) -> None:
    async with PolicyClient(NOWHERE) as client:
        sampled = {"max_new_tokens": 4} | options.pop("sampling", {})
        await anext(getattr(client, ask)(prompts, Sampling(**sampled), **options))


async def logprobs(*items: TokenSequence, **options: Any) -> None:
    async with ReferenceClient(NOWHERE) as client:
        await client.logprobs(items, **{"tokenizer_fingerprint": "f"} | options)


async def update(tensor: str = "w", **options: Any) -> None:
    tensors = [WireTensor(name=tensor, dtype="float32", shape=(1,), data=memoryview(b"abcd"))]
    async with WeightsClient(NOWHERE) as client:
        await client.update(tensors, **{"weights_version": 1} | options)


async def load_adapter(name: str, rank: int) -> None:
    async with AdapterClient(NOWHERE) as client:
        await client.load_adapter(name, (AdapterConfig(rank=rank, alpha=1.0, target_modules=()), []))


async def unload_adapter(name: str) -> None:
    async with AdapterClient(NOWHERE) as client:
        await client.unload_adapter(name)


async def swap_model(model: Any) -> None:
    async with RewardAdminClient(NOWHERE) as client:
        await client.swap_model(model)


@pytest.mark.parametrize(
    ("call", "field", "said"),
    [
        (
            lambda: score([FINE], truncation="middle"),
            "truncation",
            "truncation is 'middle', must be one of refuse, left, right, as_trained",
        ),
        (lambda: score([FINE], truncation=["left"]), "truncation", "truncation is ['left'], must be one of refuse"),
        (
            lambda: score([FINE] * 3 + [ScoreItem(prompt=[1], response=[5] * 7 + [2**40])]),
            "items[3].response",
            f"items[3].response[7] is 1099511627776, must be {INT32}",
        ),
        (
            lambda: score([FINE, ScoreItem(prompt="a", response=HALF)]),
            "items[1].response",
            r"items[1].response has '\ud83d' at 5, must be text that UTF-8 can encode",
        ),
        (lambda: score([ScoreItem(prompt=HALF, response="b")]), "items[0].prompt", r"items[0].prompt has '\ud83d' at"),
        (
            lambda: score([ScoreItem(prompt=[1], response=[1.5])]),
            "items[0].response",
            f"items[0].response[0] is 1.5, must be {INT32}",
        ),
        (
            lambda: score([ScoreItem(prompt=[1], response=5)]),
            "items[0].response",
            "items[0].response is 5, must be a sequence",
        ),
        (
            lambda: score([ScoreItem(prompt=np.array([[1, 2]]), response=[1])]),
            "items[0].prompt",
            f"items[0].prompt[0] is array([1, 2]), must be {INT32}",
        ),
        (
            lambda: score([FINE], head_weights={"a": 1.0, "b": "much"}),
            "head_weights",
            "head_weights['b'] is 'much', must be a number",
        ),
        (
            lambda: score([FINE], head_weights={HALF: 1.0}),
            "head_weights",
            r"a key of head_weights has '\ud83d' at 5",
        ),
        (lambda: score([FINE], head_weights=5), "head_weights", "head_weights is 5, must be a mapping"),
        (lambda: score([FINE], normalise="yes"), "normalise", "normalise is 'yes', must be true or false"),
        (
            lambda: score([FINE], tokenizer_fingerprint=5),
            "tokenizer_fingerprint",
            "tokenizer_fingerprint is 5, must be text",
        ),
        (
            lambda: compare(ComparisonItem(prompt="a", first="b", second=HALF)),
            "items[0].second",
            r"items[0].second has '\ud83d' at 5",
        ),
        (
            lambda: compare(ComparisonItem(prompt=[1], first=[-(2**31) - 1], second=[1])),
            "items[0].first",
            f"items[0].first[0] is -2147483649, must be {INT32}",
        ),
        (lambda: compare(truncation="middle"), "truncation", "truncation is 'middle', must be one of"),
        (lambda: generate(["a", [1, 2**40]]), "prompts[1]", f"prompts[1][1] is 1099511627776, must be {INT32}"),
        (lambda: generate([5]), "prompts[0]", "prompts[0] is 5, must be text, chat messages or token ids"),
        (lambda: generate([["a"]]), "prompts[0]", "prompts[0] is a list of str, must be text, chat messages or"),
        (
            lambda: generate([[{"role": "user", "content": "a"}, {"role": "user", "content": HALF}]]),
            "prompts[0][1].content",
            r"prompts[0][1].content has '\ud83d' at 5",
        ),
        (
            lambda: generate([[{"role": "user"}]]),
            "prompts[0][0]",
            "prompts[0][0] has no 'content', must have role and content",
        ),
        (lambda: generate(n=2**31), "n", f"n is 2147483648, must be {INT32}"),
        (lambda: generate(ask="generate_stream", n=2**31), "n", "n is 2147483648"),
        (lambda: generate(adapter=HALF), "adapter", r"adapter has '\ud83d' at 5"),
        (lambda: generate(request_id=5), "request_id", "request_id is 5, must be printable ASCII"),
        (lambda: generate(sampling={"top_k": 2**31}), "sampling.top_k", "sampling.top_k is 2147483648, must be an"),
        (lambda: generate(sampling={"seed": 2**63}), "sampling.seed", f"sampling.seed is {2**63}, must be {INT64}"),
        (
            lambda: generate(prompt_seeds=[0, 2**64]),
            "sampling.prompt_seeds",
            f"sampling.prompt_seeds[1] is {2**64}, must be {INT64}",
        ),
        (
            lambda: generate(sampling={"temperature": 10**400}),
            "sampling.temperature",
            "sampling.temperature is 10000",
        ),
        (
            lambda: generate(sampling={"stop_strings": ("a", HALF)}),
            "sampling.stop_strings",
            r"sampling.stop_strings[1] has '\ud83d' at 5",
        ),
        (
            lambda: generate(sampling={"logit_bias": {3: 1.0, 2**40: 1.0}}),
            "sampling.logit_bias",
            f"a key of sampling.logit_bias is 1099511627776, must be {INT32}",
        ),
        (
            lambda: logprobs(TokenSequence(token_ids=[1, "a"], response_start=1)),
            "items[0].token_ids",
            f"items[0].token_ids[1] is 'a', must be {INT32}",
        ),
        (
            lambda: logprobs(TokenSequence(token_ids=[1, 2], response_start=2**40)),
            "items[0].response_start",
            f"items[0].response_start is 1099511627776, must be {INT32}",
        ),
        (lambda: logprobs(temperature="hot"), "temperature", "temperature is 'hot', must be a number"),
        (lambda: update(weights_version=2**63), "begin.weights_version", f"begin.weights_version is {2**63}, must be"),
        (lambda: update(HALF), "begin.tensors[0].name", r"begin.tensors[0].name has '\ud83d' at 5"),
        (
            lambda: update(in_flight="stop"),
            "begin.in_flight",
            "in_flight is 'stop', must be one of keep, finish, abort",
        ),
        (lambda: load_adapter(HALF, 1), "begin.name", r"begin.name has '\ud83d' at 5"),
        (lambda: load_adapter("a", 2**31), "begin.config.rank", "begin.config.rank is 2147483648, must be"),
        (lambda: unload_adapter(HALF), "name", r"name has '\ud83d' at 5"),
        (lambda: swap_model(5), "model", "model is 5, must be text"),
    ],
)
async def test_an_argument_that_does_not_fit_is_named_with_its_value_and_bound(call, field, said):
    async with asyncio.timeout(5):
        with pytest.raises(InvalidInputError, match=re.escape(said)) as refused:
            await call()
    assert refused.value.field == field


async def test_a_large_value_is_not_repeated_whole():
    with pytest.raises(InvalidInputError, match=r"prompts\[0\] is a list of str") as refused:
        await generate([["x" * 10**6]])
    assert len(str(refused.value)) < 200
    with pytest.raises(InvalidInputError, match="tokenizer_fingerprint is") as refused:
        await score([FINE], tokenizer_fingerprint=[1] * 10**6)
    assert len(str(refused.value)) < 200


def test_what_fits_is_the_message_itself():
    for ids in ([1, 2], (1, 2), range(1, 3), np.array([1, 2])):
        assert types.prompt_message(ids, "p") == common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=[1, 2]))
    assert types.prompt_message([], "p").WhichOneof("content") == "token_ids"
    turn = {"role": "user", "content": "a", "name": "more is ignored"}
    assert types.prompt_message([turn], "p").messages.messages[0].content == "a"
    assert message("", common_pb2.ChatMessage, role="user", content="a").role == "user"

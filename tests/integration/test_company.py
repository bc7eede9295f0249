"""What stands beside an item in a batch changes its result by rounding alone, and in deterministic mode not in one bit.

Live services, several clients at a time, and sequences that begin alike, which a batch computes once.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from quartet.client import (
    Comparison,
    ComparisonItem,
    LogProbs,
    ReferenceClient,
    RewardClient,
    Score,
    ScoreItem,
    TokenSequence,
)
from quartet.fingerprint import tokenizer_fingerprint

CLIENTS = 6
# Beginnings longer than the 16 tokens from which on they are shared, and two that are shorter.
PROMPTS = (3, 15, 16, 17, 40, 90)


def sequences() -> list[tuple[list[int], list[int]]]:
    """Four responses to each prompt, and prompts that are the beginnings of others; at most 128 tokens together."""
    draw = random.Random(7)
    longest = [draw.randrange(3, 300) for _ in range(90)]
    prompts = [longest[:length] for length in PROMPTS] + [[draw.randrange(3, 300) for _ in range(50)]]
    return [
        (prompt, [draw.randrange(3, 300) for _ in range(draw.choice((1, 2, 9, 30)))])
        for prompt in prompts
        for _ in "1234"
    ]


async def in_company(ask: Callable[[int, Sequence[int]], Awaitable[list[Any]]], count: int) -> list[tuple[int, Any]]:
    """(item, answer) of lists of all sizes and orders, which ``ask(client, items)`` sends, all clients at once."""

    async def client(number: int) -> list[tuple[int, Any]]:
        draw = random.Random(number)
        found: list[tuple[int, Any]] = []
        for size in (1, 2, 5, count, 3, count):
            items = draw.sample(range(count), size)
            found += zip(items, await ask(number, items), strict=True)
        return found

    return list(itertools.chain(*await asyncio.gather(*map(client, range(CLIENTS)))))


def mean_batch(live: Any) -> float:
    """Mean number of items of a batch."""
    text = urllib.request.urlopen(f"http://{live.metrics_address}/metrics", timeout=5).read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if "_batch_items_" in line)
    total, count = (next(float(v) for k, v in values.items() if k.endswith(end)) for end in ("_sum", "_count"))
    return total / count


@pytest.mark.parametrize("deterministic", [True, False])
async def test_scores_and_preferences(deterministic, start_service, make_reward_model, tokenizer):
    live = start_service("reward", make_reward_model(seed=71), *(["--deterministic"] if deterministic else []))
    pairs = sequences()
    fingerprint = tokenizer_fingerprint(tokenizer)
    items = [ScoreItem(prompt=prompt, response=response) for prompt, response in pairs]
    # The first and the second response to each prompt, and so on.
    compared = [
        ComparisonItem(prompt=pairs[n][0], first=pairs[n][1], second=pairs[n + 1][1]) for n in range(0, len(pairs), 2)
    ]
    clients = [RewardClient(live.address) for _ in range(CLIENTS)]

    async def score(client: int, chosen: Sequence[int]) -> list[float]:
        reply = await clients[client].score([items[n] for n in chosen], tokenizer_fingerprint=fingerprint)
        return [result.score for result in reply.results if isinstance(result, Score)]

    async def prefer(client: int, chosen: Sequence[int]) -> list[float]:
        reply = await clients[client].compare([compared[n] for n in chosen], tokenizer_fingerprint=fingerprint)
        return [result.probability for result in reply.results if isinstance(result, Comparison)]

    for ask, count in ((score, len(items)), (prefer, len(compared))):
        alone = [(await ask(0, [n]))[0] for n in range(count)]
        assert len(set(alone)) > 0.9 * count  # They can be told apart.
        found = await in_company(ask, count)
        assert len(found) == CLIENTS * (11 + 2 * count)
        if deterministic:
            assert all(value == alone[n] for n, value in found)
        else:
            assert max(abs(value - alone[n]) for n, value in found) < 1e-5
    assert (mean_batch(live) == 1) is deterministic
    for client in clients:
        await client.close()
    assert live.stop() == 0


@pytest.mark.parametrize("deterministic", [True, False])
async def test_log_probabilities_and_entropies(deterministic, start_service, make_policy, tokenizer):
    live = start_service("reference", make_policy(seed=72), *(["--deterministic"] if deterministic else []))
    fingerprint = tokenizer_fingerprint(tokenizer)
    items = [TokenSequence(token_ids=prompt + response, response_start=len(prompt)) for prompt, response in sequences()]
    clients = [ReferenceClient(live.address) for _ in range(CLIENTS)]

    async def logprobs(client: int, chosen: Sequence[int]) -> list[list[float]]:
        reply = await clients[client].logprobs(
            [items[n] for n in chosen], tokenizer_fingerprint=fingerprint, return_entropy=True, temperature=0.8
        )
        assert all(isinstance(result, LogProbs) for result in reply.results)
        return [[*result.logprobs, *result.entropies] for result in reply.results]

    alone = [(await logprobs(0, [n]))[0] for n in range(len(items))]
    assert [len(values) for values in alone] == [2 * (len(i.token_ids) - i.response_start) for i in items]
    found = await in_company(logprobs, len(items))
    assert len(found) == CLIENTS * (11 + 2 * len(items))
    if deterministic:
        assert all(values == alone[n] for n, values in found)
    else:
        differences = [abs(x - y) for n, values in found for x, y in zip(values, alone[n], strict=True)]
        assert max(differences) < 1e-5
    assert (mean_batch(live) == 1) is deterministic
    for client in clients:
        await client.close()
    assert live.stop() == 0

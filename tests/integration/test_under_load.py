"""Services under more load than they bear, left by thousands of callers, ended and killed amid their work."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import random
import re
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bench import overload
from quartet.client import (
    CallPolicy,
    Completion,
    FailedCompletion,
    PolicyClient,
    ReferenceClient,
    RewardClient,
    Sampling,
    Score,
    ScoreItem,
    UnavailableError,
)
from quartet.client.reference import LogProbs, TokenSequence
from quartet.fingerprint import tokenizer_fingerprint
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc
from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from tests.conftest import LiveService
from tests.integration.policy_oracle import naive_logprobs

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
FLAGS = {"policy": ["--engine", "transformers"], "reward": [], "reference": []}
# Lenient: figures of seconds, on a machine that others use too. make bench-overload asks for more, and of vLLM. The
# transformers engine takes its steps, of hundreds of short operations each, under the interpreter's lock, of which
# refusing takes a part that grows as the model gets smaller: of it this shows that it goes on serving, not how fast.
TARGETS = dict.fromkeys(FLAGS, overload.ON_A_BUSY_MACHINE) | {"policy": replace(overload.ON_A_BUSY_MACHINE, served=0.6)}
RACES = 3000
CALLERS = 100


def gauges(service: LiveService, name: str) -> dict[str, float]:
    """What the service says of its queue and its calls."""
    text = urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=5).read().decode()
    wanted = ["queue_tokens", "queue_items", "held_bytes", "queue_oldest_seconds", "calls_in_flight"]
    wanted += ["completions_in_hand", "tokens_in_hand", "engine_running"] if name == "policy" else []
    found = {}
    for gauge in wanted:
        (found[gauge],) = map(float, re.findall(rf"^quartet_{name}_{gauge} (\S+)$", text, flags=re.MULTILINE))
    return found


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "did not come to pass in time"
        await asyncio.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


# Overload


@pytest.mark.timeout(900)  # Of the best of three on a busy machine.
@pytest.mark.parametrize("name", ["policy", "reward", "reference"])
def test_five_times_the_load_is_served_as_capacity_allows_and_the_rest_told_to_come_back(name):
    seen = []
    for _ in range(3):
        found = overload.measure(name, seconds=6.0, flags=FLAGS[name])
        assert set(found.codes) == {"OK", "RESOURCE_EXHAUSTED"}
        assert json.loads(json.dumps(found.figures()))["codes"] == found.codes
        seen.append(found.verdicts(TARGETS[name]))
        if all(verdict.held for verdict in seen[-1]):
            return
    pytest.fail("\n".join(str(verdict) for verdicts in seen for verdict in verdicts))


# Races


def reward_call(channel: grpc.aio.Channel, fingerprint: str) -> Callable[..., Awaitable[Any]]:
    request = reward_pb2.ScoreRequest(tokenizer_fingerprint=fingerprint)
    for index in range(3):
        item = request.items.add()
        item.prompt.token_ids.ids.extend([5 + index] * 30)
        item.response_token_ids.ids.extend([7] * 10)
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    return lambda timeout: stub.Score(request, timeout=timeout)


def reference_call(channel: grpc.aio.Channel, fingerprint: str) -> Callable[..., Awaitable[Any]]:
    request = reference_pb2.LogProbsRequest(tokenizer_fingerprint=fingerprint)
    for index in range(3):
        request.items.add(token_ids=[5 + index] * 40, response_start=30)
    stub = reference_pb2_grpc.ReferenceServiceStub(channel)
    return lambda timeout: stub.LogProbs(request, timeout=timeout)


def policy_call(channel: grpc.aio.Channel, fingerprint: str) -> Callable[..., Awaitable[Any]]:
    sampling = policy_pb2.SamplingParams(max_new_tokens=8, min_new_tokens=8, seed=3)
    request = policy_pb2.GenerateRequest(tokenizer_fingerprint=fingerprint, sampling=sampling, n=2)
    for index in range(3):
        request.prompts.add().token_ids.ids.extend([5 + index] * 30)
    stub = policy_pb2_grpc.PolicyServiceStub(channel)

    async def generate(timeout: float) -> list[Any]:
        replies = [reply async for reply in stub.Generate(request, timeout=timeout)]
        assert len(replies) == 6
        return sorted(replies, key=lambda reply: (reply.prompt_index, reply.sample_index))

    return generate


@pytest.mark.parametrize(
    ("name", "flags", "make_call"),
    [
        pytest.param("policy", ["--engine", "vllm"], policy_call, marks=needs_vllm),
        ("policy", FLAGS["policy"], policy_call),
        ("reward", FLAGS["reward"], reward_call),
        ("reference", FLAGS["reference"], reference_call),
    ],
    ids=["policy, vllm", "policy, transformers", "reward", "reference"],
)
async def test_thousands_who_leave_or_run_out_of_time_leave_nothing_behind(
    start_service, make_reward_model, make_policy, tokenizer, name, flags, make_call
):
    folder = make_reward_model() if name == "reward" else make_policy()
    service = start_service(name, folder, "--log-level", "warning", *flags, timeout_s=240)
    draw = random.Random(0)
    outcomes: Counter[str] = Counter()
    numbers = itertools.count()
    async with grpc.aio.insecure_channel(service.address) as channel:
        call = make_call(channel, tokenizer_fingerprint(tokenizer))
        start_s = time.perf_counter()
        alone = [await call(30) for _ in range(5)]
        usual_s = (time.perf_counter() - start_s) / 5

        async def one(number: int) -> str:
            # Somewhere between at once and well after it would be answered in this company.
            moment_s = draw.expovariate(1 / (CALLERS * usual_s / 4))
            if number % 3 == 0:
                work = asyncio.ensure_future(_awaited(call(30)))
                await asyncio.sleep(moment_s)
                work.cancel()
                try:
                    await work
                except asyncio.CancelledError:
                    return "LEFT"
                return "OK"
            try:
                await call(moment_s if number % 3 == 1 else 30)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        async def caller() -> None:
            while (number := next(numbers)) < RACES:
                outcomes[await one(number)] += 1

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        assert set(outcomes) == {"OK", "LEFT", "DEADLINE_EXCEEDED"}
        assert outcomes.total() == RACES
        assert min(outcomes.values()) > RACES / 30  # All of it happened, and often.
        await until(lambda: not any(gauges(service, name).values()), 10.0)
        again = await call(30)
        assert values(again) == pytest.approx(values(alone[0]), abs=1e-5)
    assert service.stop() == 0


def values(reply: Any) -> list[float]:
    if isinstance(reply, reward_pb2.ScoreResponse):
        return [result.score for result in reply.results]
    if isinstance(reply, list):
        return [number for item in reply for number in (*item.completion.token_ids, *item.completion.logprobs)]
    return [logprob for result in reply.results for logprob in result.logprobs]


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


# The end of a process


PROMPTS = [[5 + n % 200, 6 + n % 90] * 8 for n in range(40)]
Ask = Callable[[list[int]], Awaitable[list[Any]]]
"""Asks about some of PROMPTS; returns what was wrong with the answers."""


def ask_reward(client: RewardClient, folder: Path, fingerprint: str) -> Ask:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [float(model(input_ids=torch.tensor([[*p, 7, 1]])).logits[0, 0]) for p in PROMPTS]

    async def ask(which: list[int]) -> list[Any]:
        items = [ScoreItem(prompt=PROMPTS[n], response=[7, 1]) for n in which]
        found = await client.score(items, tokenizer_fingerprint=fingerprint)
        return [
            (n, result)
            for n, result in zip(which, found.results, strict=True)
            if not isinstance(result, Score) or abs(result.score - expected[n]) > 1e-4
        ]

    return ask


def ask_reference(client: ReferenceClient, folder: Path, fingerprint: str) -> Ask:
    response = [7, 30, 31, 1]
    expected = [naive_logprobs(folder, prompt, response, 1.0) for prompt in PROMPTS]

    async def ask(which: list[int]) -> list[Any]:
        items = [TokenSequence(token_ids=[*PROMPTS[n], *response], response_start=len(PROMPTS[n])) for n in which]
        found = await client.logprobs(items, tokenizer_fingerprint=fingerprint)
        return [
            (n, result)
            for n, result in zip(which, found.results, strict=True)
            if not isinstance(result, LogProbs) or result.logprobs != pytest.approx(expected[n], abs=1e-4)
        ]

    return ask


def ask_policy(client: PolicyClient, folder: Path, fingerprint: str) -> Ask:
    sampling = Sampling(max_new_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def is_right(n: int, item: Completion | FailedCompletion) -> bool:
        """Whether these tokens have these log-probabilities."""
        if not isinstance(item, Completion) or not item.token_ids:
            return False
        whole = torch.tensor([[*PROMPTS[n], *item.token_ids]])
        with torch.inference_mode():
            table = model(input_ids=whole).logits[0].log_softmax(-1)
        start = len(PROMPTS[n])
        expected = [float(table[start - 1 + i, token]) for i, token in enumerate(item.token_ids)]
        return item.logprobs == pytest.approx(expected, abs=1e-4)

    async def ask(which: list[int]) -> list[Any]:
        stream = client.generate(
            [PROMPTS[n] for n in which],
            sampling,
            n=2,
            tokenizer_fingerprint=fingerprint,
            prompt_seeds=which,
            patience_s=240.0,
        )
        found = {(item.prompt_index, item.sample_index): item async for item in stream}
        assert found.keys() == {(p, s) for p in range(len(which)) for s in range(2)}
        return [(which[p], item) for (p, _), item in found.items() if not is_right(which[p], item)]

    return ask


@pytest.mark.timeout(600)  # Up to five processes load a model.
@pytest.mark.parametrize(
    ("name", "flags", "rounds", "make_client", "make_ask"),
    [
        pytest.param("policy", ["--engine", "vllm"], 1, PolicyClient, ask_policy, marks=needs_vllm),
        ("policy", FLAGS["policy"], 2, PolicyClient, ask_policy),
        ("reward", FLAGS["reward"], 2, RewardClient, ask_reward),
        ("reference", FLAGS["reference"], 2, ReferenceClient, ask_reference),
    ],
    ids=["policy, vllm", "policy, transformers", "reward", "reference"],
)
async def test_callers_of_a_service_that_is_ended_and_killed_and_started_again_are_all_answered_rightly(
    start_service, make_reward_model, make_policy, tokenizer, name, flags, rounds, make_client, make_ask
):
    """SIGTERM answers what is in hand; SIGKILL loses it, and the client asks again. None is lost, none is wrong."""
    folder = make_reward_model(seed=4) if name == "reward" else make_policy(seed=4)
    service = start_service(name, folder, *flags, timeout_s=240)
    wrong, answered, done = [], Counter[int](), asyncio.Event()

    async def caller(ask: Ask, number: int) -> None:
        while not done.is_set():
            wrong.extend(await ask([(number + k) % 40 for k in range(4)]))
            answered[number] += 1

    async def all_are_answered() -> None:
        """By the process that serves now."""
        before = answered.copy()
        await until(lambda: all(answered[n] >= before[n] + 3 for n in range(12)))

    async with make_client(service.address, policy=CallPolicy(patience_s=240.0, deadline_s=60.0)) as client:
        ask = make_ask(client, folder, tokenizer_fingerprint(tokenizer))
        callers = [asyncio.create_task(caller(ask, n)) for n in range(12)]
        for end in (signal.SIGTERM, signal.SIGKILL) * rounds:
            await all_are_answered()
            family = psutil.Process(service.process.pid).children(recursive=True)  # vLLM's engine and worker.
            service.process.send_signal(end)
            code = await asyncio.to_thread(service.process.wait, 60)
            assert code == (0 if end is signal.SIGTERM else -signal.SIGKILL)
            await until(lambda family=family: not any(map(is_alive, family)), 10.0)
            service = await asyncio.to_thread(
                lambda old=service: start_service(name, folder, *flags, like=old, timeout_s=240)
            )
        await all_are_answered()
        done.set()
        await asyncio.gather(*callers)  # Raises what any of them was told.
    assert wrong == []
    assert service.stop() == 0


async def test_a_caller_without_patience_is_told_at_once_that_the_service_is_away(start_service, make_reward_model):
    service = start_service("reward", make_reward_model())
    async with RewardClient(service.address, policy=CallPolicy(patience_s=0.0)) as client:
        await client.score([ScoreItem(prompt="hello", response="thanks")])
        service.process.kill()
        await asyncio.to_thread(service.process.wait, 60)
        start_s = time.monotonic()
        with pytest.raises(UnavailableError, match="reward service"):
            await client.score([ScoreItem(prompt="hello", response="thanks")])
        assert time.monotonic() - start_s < 5

"""Generation live, with both engines: tokens as they come, what ends a completion, bias, retries, and who leaves.

The truth is transformers in float64, one sequence at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import random
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from quartet.client import (
    CallPolicy,
    Completion,
    InFlightPolicy,
    PolicyClient,
    QuartetError,
    Sampling,
    TokenDelta,
    WeightsClient,
)
from quartet.fingerprint import tokenizer_fingerprint
from services.policy.config import PolicySettings
from services.policy.engine import GenerationTask
from services.policy.engine import Sampling as EngineSampling
from services.policy.text_stream import decode
from tests.integration.policy_oracle import naive_logprobs, wire_tensors

PROMPTS = [[5, 6, 7 + i] for i in range(8)]
TOLERANCE = 1e-4
VLLM_IS_HERE = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def service(request, start_service, make_policy):
    if request.param == "vllm" and not VLLM_IS_HERE:
        pytest.skip("vLLM is not installed here")
    live = start_service("policy", make_policy(), "--engine", request.param, "--max-concurrent", "16", timeout_s=240)
    yield live
    assert live.stop() == 0


@pytest.fixture
async def client(service):
    async with PolicyClient(service.address) as client:
        yield client


@pytest.fixture(scope="module")
def ours(tokenizer) -> dict[str, Any]:
    return {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}


async def collect(client: PolicyClient, prompts: Sequence[Any], sampling: Sampling, **options: Any) -> list[Completion]:
    found = [item async for item in client.generate(prompts, sampling, **options)]
    assert all(isinstance(item, Completion) for item in found)
    return sorted(found, key=lambda item: (item.prompt_index, item.sample_index))


async def streamed(
    client: PolicyClient, prompts: Sequence[Any], sampling: Sampling, **options: Any
) -> tuple[list[Completion], int]:
    """The completions, which are the sums of the deltas before them, and how many deltas there were."""
    parts: dict[tuple[int, int], list[TokenDelta]] = defaultdict(list)
    found = []
    async for item in client.generate_stream(prompts, sampling, **options):
        key = (item.prompt_index, item.sample_index)
        if isinstance(item, TokenDelta):
            parts[key].append(item)
            continue
        assert isinstance(item, Completion)
        assert tuple(token for part in parts[key] for token in part.token_ids) == item.token_ids
        assert tuple(x for part in parts[key] for x in part.logprobs) == item.logprobs
        assert "".join(part.text for part in parts[key]) == item.text
        found.append(item)
    return sorted(found, key=lambda item: (item.prompt_index, item.sample_index)), sum(map(len, parts.values()))


def biased_logprobs(
    folder: Path, prompt: Sequence[int], response: Sequence[int], bias: Mapping[int, float], temperature: float = 1.0
) -> list[float]:
    """Natural-log probability of each response token where ``bias`` is added to the logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    for token, value in bias.items():
        logits[:, token] += value
    table = (logits / temperature).log_softmax(-1)
    return [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


def metric(service: Any, name: str) -> float:
    with urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"quartet_policy_{name} ")).split()[-1])


async def test_tokens_come_as_they_are_sampled_and_are_those_of_the_whole(client, make_policy, tokenizer, ours):
    sampling = Sampling(max_new_tokens=40, temperature=0.8, seed=5)
    whole = await collect(client, PROMPTS, sampling, n=2, return_text=True, **ours)
    found, deltas = await streamed(client, PROMPTS, sampling, n=2, **ours)
    assert [(c.token_ids, c.text, c.finish_reason, c.version_spans, c.stop_token_id) for c in found] == [
        (c.token_ids, c.text, c.finish_reason, c.version_spans, c.stop_token_id) for c in whole
    ]
    assert all(c.text == decode(tokenizer, c.token_ids) for c in found)
    assert deltas > 5 * len(found)  # Not all at the end.
    for completion in found:
        naive = naive_logprobs(make_policy(), PROMPTS[completion.prompt_index], completion.token_ids, 0.8)
        assert completion.logprobs == pytest.approx(naive, abs=TOLERANCE)
    assert {c.stop_token_id for c in found} <= {1, None}
    assert all((c.stop_token_id == 1) == (c.finish_reason == "stop") for c in found)


async def test_a_stop_string_ends_the_greedy_text_where_it_stands_and_frees_the_slot(client, service, tokenizer, ours):
    free = await collect(client, PROMPTS, Sampling(max_new_tokens=60, temperature=0.0), return_text=True, **ours)
    tried = 0
    for completion in free:
        ids = completion.token_ids
        # Two characters out of the middle of the text that are characters.
        ends = (decode(tokenizer, ids[:i])[-2:] for i in range(8, len(ids)))
        stop = next((end for end in ends if len(end) == 2 and "\N{REPLACEMENT CHARACTER}" not in end), None)
        if stop is None:
            continue
        tried += 1
        count = next(
            i
            for i in range(1, len(ids) + 1)
            if stop in (text := decode(tokenizer, ids[:i])) and not text.endswith("\N{REPLACEMENT CHARACTER}")
        )
        sampling = Sampling(max_new_tokens=60, temperature=0.0, stop_strings=("nowhere to be found", stop))
        prompt = PROMPTS[completion.prompt_index]
        (plain,) = await collect(client, [prompt], sampling, return_text=True, **ours)
        (along,), _ = await streamed(client, [prompt], sampling, **ours)
        for cut in (plain, along):
            assert cut.token_ids == ids[:count]
            assert cut.logprobs == pytest.approx(completion.logprobs[:count], abs=TOLERANCE)
            assert cut.text == decode(tokenizer, ids[:count]).partition(stop)[0]
            assert (cut.finish_reason, cut.stop_string, cut.stop_token_id) == ("stop", stop, None)
            assert cut.version_spans == ((0, count),)
    assert tried >= 3
    assert metric(service, "completions_in_hand") == 0


async def test_a_bias_moves_the_distribution_and_the_log_probabilities_are_of_the_moved_one(client, make_policy, ours):
    bias = {7: 3.0, 40: 2.5, 41: -100.0, 1: 1.0}
    sampling = Sampling(max_new_tokens=30, temperature=0.7, seed=2, logit_bias=bias)
    found = await collect(client, PROMPTS, sampling, **ours)
    for completion in found:
        naive = biased_logprobs(make_policy(), PROMPTS[completion.prompt_index], completion.token_ids, bias, 0.7)
        assert completion.logprobs == pytest.approx(naive, abs=TOLERANCE)
        assert 41 not in completion.token_ids
    sure = Sampling(max_new_tokens=6, temperature=0.0, logit_bias={9: 100.0})
    (only,) = await collect(client, PROMPTS[:1], sure, **ours)
    assert only.token_ids == (9,) * 6
    # An end token that everything speaks for waits for its time.
    late = Sampling(max_new_tokens=20, min_new_tokens=7, logit_bias={1: 100.0})
    for completion in await collect(client, PROMPTS, late, **ours):
        assert len(completion.token_ids) == 8
        assert (completion.finish_reason, completion.stop_token_id) == ("stop", 1)
        assert all(math.isfinite(x) for x in completion.logprobs)


async def test_a_retry_under_the_same_id_is_answered_alike_and_runs_nothing_again(client, service, ours):
    before = metric(service, "rejoined_total")
    options = {**ours, "request_id": f"retry-{random.getrandbits(64)}"}
    first = await collect(client, PROMPTS, Sampling(max_new_tokens=20), n=2, **options)
    again = await collect(client, PROMPTS, Sampling(max_new_tokens=20), n=2, **options)
    assert again == first  # The work intervals too.
    assert metric(service, "rejoined_total") == before + 1
    assert metric(service, "kept_bytes") > 0


async def test_many_that_leave_at_any_moment_free_everything_at_once(service, client, ours):
    draw = random.Random(9)
    endless = Sampling(max_new_tokens=120, min_new_tokens=120, stop_strings=("nowhere to be found",))

    async def leave(number: int) -> None:
        policy = CallPolicy(deadline_s=draw.uniform(0.01, 0.6))  # Some by their deadline ...
        async with PolicyClient(service.address, policy=policy if number % 2 else None) as mine:
            ask = mine.generate_stream if number % 3 else mine.generate
            stream = ask([PROMPTS[number % 8]] * 4, endless, n=4, **ours)
            with contextlib.suppress(QuartetError, TimeoutError, grpc.aio.AioRpcError):
                async with asyncio.timeout(draw.uniform(0.01, 0.6)):  # ... and some by leaving.
                    async for _ in stream:
                        pass
            await stream.aclose()

    await asyncio.gather(*(leave(number) for number in range(60)))
    end_s = time.monotonic() + 10
    while metric(service, "completions_in_hand") or metric(service, "calls_in_flight"):
        assert time.monotonic() < end_s
        await asyncio.sleep(0.05)
    start_s = time.monotonic()
    await collect(client, PROMPTS[:1], Sampling(max_new_tokens=5), **ours)
    assert time.monotonic() - start_s < 10  # Those that left had minutes of work before them.


async def test_pieces_of_a_completion_cut_after_an_update_say_which_weights_sampled_them(
    service, make_policy, tokenizer, ours
):
    first, second = make_policy(seed=11), make_policy(seed=12)
    async with PolicyClient(service.address) as client, WeightsClient(service.admin_address) as weights:
        version = (await weights.get_info()).weights_version
        await weights.update(wire_tensors(first), weights_version=version + 1)
        # Among 64 there are some that end by a stop string after the update, and not by the engine.
        stops = tuple("abcdefghijklmnop")
        bias = {1: -100.0}
        sampling = Sampling(max_new_tokens=120, min_new_tokens=60, seed=1, stop_strings=stops, logit_bias=bias)
        task = asyncio.create_task(streamed(client, PROMPTS * 8, sampling, **ours))
        await asyncio.sleep(0.25)
        await weights.update(wire_tensors(second), weights_version=version + 2)
        found, _ = await task
    assert all(sum(count for _, count in c.version_spans) == len(c.token_ids) for c in found)
    both = [c for c in found if len(c.version_spans) == 2]
    assert len(both) >= 2
    assert any(c.stop_string for c in both)
    for completion in both[:8]:
        prompt = PROMPTS[completion.prompt_index % len(PROMPTS)]
        before = completion.version_spans[0][1]
        old, new = (biased_logprobs(folder, prompt, completion.token_ids, bias) for folder in (first, second))
        assert completion.logprobs[:before] == pytest.approx(old[:before], abs=TOLERANCE)
        assert completion.logprobs[before:] == pytest.approx(new[before:], abs=TOLERANCE)


async def test_streams_that_an_update_aborts_end_with_what_was_sent(service, make_policy, ours):
    async with PolicyClient(service.address) as client, WeightsClient(service.admin_address) as weights:
        version = (await weights.get_info()).weights_version
        sampling = Sampling(max_new_tokens=120, min_new_tokens=120, seed=1)
        task = asyncio.create_task(streamed(client, PROMPTS * 8, sampling, **ours))
        await asyncio.sleep(0.1)
        await weights.update(
            wire_tensors(make_policy(seed=13)), weights_version=version + 1, in_flight=InFlightPolicy.ABORT
        )
        found, _ = await asyncio.wait_for(task, 30)
    aborted = [completion for completion in found if completion.finish_reason == "aborted"]
    assert len(aborted) >= 8
    assert any(completion.token_ids for completion in aborted)
    for completion in found:
        assert sum(count for _, count in completion.version_spans) == len(completion.token_ids)
        assert (len(completion.token_ids) < 120) == (completion.finish_reason == "aborted")
        assert (completion.stop_token_id, completion.stop_string) == (None, "")


@pytest.mark.skipif(not VLLM_IS_HERE, reason="vLLM is not installed here")
async def test_vllm_itself_holds_nothing_of_those_that_left(make_policy: Any) -> None:
    from services.policy.vllm_engine import VllmEngine

    folder: Path = make_policy()
    engine = VllmEngine(folder, PolicySettings(model=str(folder), max_concurrent=16))
    await engine.start()
    try:
        core = engine._llm.engine_core
        draw = random.Random(4)
        sampling = EngineSampling(
            temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=110, min_new_tokens=110, stop_token_ids=(1,)
        )

        async def leave(number: int) -> None:
            task = GenerationTask(
                prompt_ids=[5, 6, 7 + number % 50], sampling=sampling, seed=number, request_id=f"storm-{number}"
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.uniform(0.0, 0.8)):
                    if number % 2:
                        await engine.generate(task)
                    else:
                        async with contextlib.aclosing(engine.stream(task)) as pieces:
                            async for _ in pieces:
                                if draw.random() < 0.05:
                                    break

        for wave in range(3):
            storm = asyncio.gather(*(leave(400 * wave + i) for i in range(400)))
            while not await core.call_utility_async("has_work"):
                assert not storm.done(), "nothing of the storm reached vLLM"
                await asyncio.sleep(0.01)
            await storm
            end_s = time.monotonic() + 10
            # Nothing runs or waits in the scheduler, and no block of keys and values is held.
            while await core.call_utility_async("has_work"):
                assert time.monotonic() < end_s
                await asyncio.sleep(0.02)
            assert await engine._llm.reset_prefix_cache()
            assert engine._llm.output_processor.get_num_unfinished_requests() == 0
            short = EngineSampling(
                temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=3, min_new_tokens=3, stop_token_ids=()
            )
            start_s = time.monotonic()
            await engine.generate(GenerationTask(prompt_ids=[5], sampling=short, seed=0, request_id=f"after-{wave}"))
            assert time.monotonic() - start_s < 10  # No work of those that left comes before it.
    finally:
        await engine.stop()

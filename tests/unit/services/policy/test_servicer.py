"""Generation over the wire: every (prompt, sample) once, refusals with their reason, nothing held by who left."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import grpc
import pytest

from quartet.client.errors import pushback_s, translate
from quartet.common.v1 import common_pb2
from quartet.fingerprint import derive_seed
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc
from services.hosting.token_length import characters_per_token
from services.policy.budget import Budget, BudgetLimits
from services.policy.config import PolicySettings
from services.policy.engine import EngineFailedError, Finish, Generated, GenerationTask
from services.runtime.server import Listener, ServiceRuntime
from tests.unit.services.policy.scripted_engine import at_once, generated, until
from tests.unit.services.policy.served import MOST, House, hold, params

OK, INVALID = common_pb2.ITEM_STATUS_CODE_OK, common_pb2.ITEM_STATUS_CODE_INVALID
PROMPTS = [[5, 6, 7], [9], [20, 21]]


# Answers ----------------------------------------------------------------------------------------------------------


async def test_every_prompt_and_sample_is_answered_once_as_it_finishes_and_with_its_own_tokens(house):
    turns = {f"{p}-{s}": asyncio.Event() for p in range(3) for s in range(2)}

    async def when_told(task: GenerationTask) -> Generated:
        await turns[task.request_id.partition("-")[2]].wait()
        return generated(task)

    house.engine.answer = when_told
    call = house.call(PROMPTS, n=2)
    order = [(2, 1), (0, 0), (1, 1), (2, 0), (0, 1), (1, 0)]
    for p, s in order:
        turns[f"{p}-{s}"].set()
        reply = await asyncio.wait_for(call.read(), 5)
        assert (reply.prompt_index, reply.sample_index, reply.status.code) == (p, s, OK)
        task = next(t for t in house.engine.tasks if t.request_id.endswith(f"-{p}-{s}"))
        assert task.prompt_ids == PROMPTS[p]
        assert list(reply.completion.token_ids) == generated(task).token_ids
        assert list(reply.completion.logprobs) == [-0.25, -0.5]
        assert (reply.work.start_unix_ns, reply.work.end_unix_ns) == (1_000, 2_000)
        assert reply.served_by == house.servicer.hosted.model.served_by
    assert await call.read() is grpc.aio.EOF
    assert len({t.request_id for t in house.engine.tasks}) == len(house.engine.tasks) == 6
    assert house.metric("items_total", status="ITEM_STATUS_CODE_OK") == 6
    assert house.metric("tokens_total", kind="generated") == 12
    assert house.metric("tokens_total", kind="prompt") == 2 * 6


async def test_two_requests_at_once_get_their_own_answers(house):
    first, second = await asyncio.gather(house.generate([[5], [6]]), house.generate([[7], [8]], params(seed=99)))
    for replies, seed, prompts in ((first, 11, (5, 6)), (second, 99, (7, 8))):
        found = {reply.prompt_index: list(reply.completion.token_ids) for reply in replies}
        assert found == {p: [derive_seed("request", seed, p, 0) % 293, prompts[p]] for p in range(2)}


async def test_how_a_completion_ended_and_whose_its_tokens_are_is_told(house):
    ends = {
        5: (Finish.STOP, [(3, 2), (4, 1)], policy_pb2.FINISH_REASON_STOP),
        6: (Finish.LENGTH, [(3, 3)], policy_pb2.FINISH_REASON_LENGTH),
        7: (Finish.ABORTED, [], policy_pb2.FINISH_REASON_ABORTED),
    }

    async def answer(task: GenerationTask) -> Generated:
        finish, spans, _ = ends[task.prompt_ids[0]]
        tokens = [8, 9, 1][: sum(count for _, count in spans)]
        return generated(task, token_ids=tokens, finish=finish, version_spans=spans)

    house.engine.answer = answer
    for reply in await house.generate([[5], [6], [7]]):
        _, spans, reason = ends[5 + reply.prompt_index]
        assert reply.status.code == OK
        assert reply.completion.finish_reason == reason
        assert [(s.weights_version, s.token_count) for s in reply.completion.version_spans] == spans


async def test_text_is_encoded_without_special_tokens_and_told_back_and_token_ids_are_not(house, tokenizer):
    expected = tokenizer("my phone is broken", add_special_tokens=False).input_ids
    replies = await house.generate([common_pb2.Prompt(text="my phone is broken"), [5, 6]], n=2)
    told = {(r.prompt_index, r.sample_index): list(r.completion.prompt_token_ids) for r in replies}
    assert told == {(0, 0): expected, (0, 1): expected, (1, 0): [], (1, 1): []}
    assert sorted(t.prompt_ids for t in house.engine.tasks) == sorted([expected, expected, [5, 6], [5, 6]])
    assert [r.completion.text for r in replies] == [""] * 4


async def test_a_plain_text_begins_as_the_models_tokenizer_begins_it_and_nothing_else_does(house, tokenizer):
    house.servicer.hosted = replace(house.servicer.hosted, opening=(2,))
    words = tokenizer("my phone", add_special_tokens=False).input_ids
    chat = common_pb2.ChatMessages(messages=[common_pb2.ChatMessage(role="user", content="my phone")])
    rendered = tokenizer("user: my phone\nassistant: ", add_special_tokens=False).input_ids
    asked = [
        (common_pb2.Prompt(text="my phone"), [2, *words]),
        (common_pb2.Prompt(text="<bos>my phone"), [2, *words]),
        (common_pb2.Prompt(text=""), [2]),
        (common_pb2.Prompt(messages=chat), rendered),
        (words, words),
    ]
    await house.generate([prompt for prompt, _ in asked])
    assert sorted(task.prompt_ids for task in house.engine.tasks) == sorted(ids for _, ids in asked)


async def test_text_comes_back_without_special_tokens_exactly_when_asked_for(house, tokenizer):
    words = tokenizer(" sorry please", add_special_tokens=False).input_ids

    async def answer(task: GenerationTask) -> Generated:
        return generated(task, token_ids=[*words, 1])

    house.engine.answer = answer
    (reply,) = await house.generate([[5]], return_text=True)
    assert reply.completion.text == " sorry please"
    assert list(reply.completion.token_ids) == [*words, 1]


# Refused prompts --------------------------------------------------------------------------------------------------


async def test_each_refused_prompt_says_why_and_the_others_are_generated(house):
    prompts = [
        [5, 6],
        common_pb2.Prompt(),
        [],
        common_pb2.Prompt(text=""),
        [5, 300],
        [-1, 5],
        [7] * 125,  # One too long with four new tokens ...
        [8] * 124,  # ... and one that just fits.
    ]
    replies = {reply.prompt_index: reply for reply in await house.generate(prompts)}
    assert [replies[p].status.code for p in range(8)] == [OK, *[INVALID] * 6, OK]
    for p, reason in {
        0: "",
        1: "prompt is not set: give text, token_ids or messages",
        2: "prompt has no tokens: there is nothing to continue",
        3: "prompt has no tokens: there is nothing to continue",
        4: "token id 300 lies outside the vocabulary, [0, 300)",
        5: "token id -1 lies outside the vocabulary, [0, 300)",
        6: "prompt has 125 tokens and max_new_tokens is 4, together more than the 128 that the model takes",
    }.items():
        assert replies[p].status.reason == reason
        assert replies[p].HasField("completion") is (reason == "")
    assert sorted(len(t.prompt_ids) for t in house.engine.tasks) == [2, 124]
    assert house.metric("items_total", status="ITEM_STATUS_CODE_INVALID") == 6


async def test_text_that_cannot_fit_is_refused_unread_and_what_may_fit_is_read(house, tokenizer, monkeypatch):
    longest = characters_per_token(tokenizer)
    house.servicer.hosted = replace(house.servicer.hosted, characters_per_token=longest)
    read: list[int] = []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, t, **o: read.append(len(t)) or encode(self, t, **o))
    token = max(map(tokenizer.decode, range(3, 300)), key=len)
    fits = common_pb2.Prompt(text=token * 124)  # With four new tokens just what the model takes.
    (reply,) = await house.generate([fits])
    assert (reply.status.code, len(house.engine.tasks[0].prompt_ids), read) == (OK, 124, [124 * len(token)])
    turn = common_pb2.ChatMessage(role="user", content="x" * 124 * longest)
    chat = common_pb2.Prompt(messages=common_pb2.ChatMessages(messages=[turn]))
    read.clear()
    for reply in await house.generate([common_pb2.Prompt(text="x" * (124 * longest + 1)), chat]):
        assert reply.status.code == INVALID
        assert "characters, more than 124 tokens and max_new_tokens is 4, together more than the 128" in (
            reply.status.reason
        )
    assert read == []


async def test_a_refused_prompt_is_refused_once_a_sample_and_moves_no_seeds(house):
    replies = await house.generate([[5], [], [6]], params(seed=4), n=2)
    assert sorted((r.prompt_index, r.sample_index) for r in replies) == [(p, s) for p in range(3) for s in range(2)]
    assert [r.status.code for r in sorted(replies, key=lambda r: r.prompt_index)] == [OK, OK, INVALID, INVALID, OK, OK]
    assert {(t.prompt_ids[0], t.seed) for t in house.engine.tasks} == {
        (prompt, derive_seed("request", 4, p, s)) for p, prompt in ((0, 5), (2, 6)) for s in range(2)
    }


@pytest.mark.parametrize(
    "logprobs", [[-1.0, math.nan], [math.inf, -1.0], [-math.inf, -1.0], [-1.0], [-1.0, -1.0, -1.0]], ids=str
)
async def test_a_completion_whose_log_probabilities_are_no_numbers_is_invalid_alone(house, logprobs):
    async def answer(task: GenerationTask) -> Generated:
        return generated(task, token_ids=[8, 9], logprobs=logprobs if task.prompt_ids == [6] else [-1.0, -2.0])

    house.engine.answer = answer
    replies = {r.prompt_index: r for r in await house.generate([[5], [6], [7]])}
    assert [replies[p].status.code for p in range(3)] == [OK, INVALID, OK]
    assert "a log-probability that is not a finite number: its weights are broken" in replies[1].status.reason
    assert not replies[1].HasField("completion")
    assert house.metric("tokens_total", kind="generated") == 4


# Refused requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": -0.5}, "sampling.temperature is -0.5, must be a finite number, at least 0"),
        ({"temperature": math.inf}, "sampling.temperature is inf, must be a finite number"),
        ({"top_p": 1.5}, "sampling.top_p is 1.5, must be in (0, 1]"),
        ({"top_p": math.nan}, "sampling.top_p is nan, must be in (0, 1]"),
        ({"top_k": -1}, "sampling.top_k is -1, must be at least 0 (0 keeps all)"),
        ({"max_new_tokens": -1}, "sampling.max_new_tokens is -1, must be in [1, 127]"),
        ({"max_new_tokens": 128}, "sampling.max_new_tokens is 128, must be in [1, 127]"),
        ({"min_new_tokens": -1}, "sampling.min_new_tokens is -1, must be in [0, max_new_tokens 4]"),
        ({"min_new_tokens": 5}, "sampling.min_new_tokens is 5, must be in [0, max_new_tokens 4]"),
        ({"stop_token_ids": [5, -1, 300]}, "sampling.stop_token_ids is [-1, 300], must be in the vocabulary, [0, 300)"),
        ({"stop_token_ids": range(300, 400)}, f"sampling.stop_token_ids is {[*range(300, 308)]}, must be in"),
        ({"prompt_seeds": [1, 2, 3]}, "sampling.prompt_seeds has 3 values, must have none or 2, one a prompt"),
    ],
)
async def test_a_setting_out_of_bounds_refuses_the_request_by_name(house, changes, said):
    error = await house.refusal([[5], [6]], params(**changes))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in error.details()
    assert translate(error, "").field == said.split()[0]
    assert house.engine.tasks == []
    assert len(await house.generate([[5]] * MOST)) == MOST  # And holds no place.


async def test_token_ids_need_the_fingerprint_of_their_tokenizer_and_text_needs_none(house):
    text = common_pb2.Prompt(text="hello")
    assert len(await house.generate([text], tokenizer_fingerprint="")) == 1
    error = await house.refusal([text, [5]], tokenizer_fingerprint="")
    assert (error.code(), translate(error, "").field) == (grpc.StatusCode.INVALID_ARGUMENT, "tokenizer_fingerprint")
    error = await house.refusal([text, [5]], tokenizer_fingerprint="0" * 64)
    assert (error.code(), translate(error, "").field) == (grpc.StatusCode.FAILED_PRECONDITION, "tokenizer_fingerprint")
    assert len(house.engine.tasks) == 1


async def test_before_the_policy_is_loaded_the_service_says_so(house):
    house.servicer.hosted = None
    error = await house.refusal([[5]])
    assert (error.code(), error.details()) == (
        grpc.StatusCode.UNAVAILABLE,
        "the policy is still loading; try again later",
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.stub.GetModelInfo(policy_pb2.GetModelInfoRequest())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


# Sampling ---------------------------------------------------------------------------------------------------------


async def test_the_engine_is_told_what_was_asked_for_with_the_models_own_end_tokens(house):
    await house.generate(
        [[5]],
        params(temperature=0.5, top_p=0.75, top_k=9, max_new_tokens=7, min_new_tokens=2, stop_token_ids=[30, 2, 30]),
    )
    (told,) = (t.sampling for t in house.engine.tasks)
    assert (told.temperature, told.top_p, told.top_k) == (0.5, 0.75, 9)
    assert (told.max_new_tokens, told.min_new_tokens) == (7, 2)
    assert told.stop_token_ids == (1, 2, 30)


async def test_what_is_not_said_is_plain_sampling_and_a_temperature_of_zero_is_not_unsaid(house):
    await house.generate([[5]], policy_pb2.SamplingParams(max_new_tokens=1))
    await house.generate([[5]], policy_pb2.SamplingParams(max_new_tokens=127 - 1, temperature=0.0))
    plain, greedy = (t.sampling for t in house.engine.tasks)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_new_tokens) == (1.0, 1.0, 0, 0)
    assert plain.stop_token_ids == (1, 2)
    assert greedy.temperature == 0.0


async def test_a_prompts_seed_gives_its_draws_wherever_it_stands_and_whoever_is_with_it(house):
    def seeds_of(prompt: int) -> set[int]:
        return {t.seed for t in house.engine.tasks if t.prompt_ids == [prompt]}

    expected = {prompt: {derive_seed("prompt", seed, s) for s in range(2)} for prompt, seed in ((5, 50), (6, -60))}
    for prompts, seeds in (([5, 6], [50, -60]), ([9, 6, 5], [1, -60, 50]), ([6], [-60]), ([5], [50])):
        house.engine.tasks.clear()
        # The seed of the request makes no difference then.
        await house.generate([[p] for p in prompts], params(prompt_seeds=seeds, seed=len(prompts)), n=2)
        for prompt in {5, 6} & set(prompts):
            assert seeds_of(prompt) == expected[prompt]
    house.engine.tasks.clear()
    await house.generate([[5]], params(prompt_seeds=[50]), n=1)
    assert seeds_of(5) == {derive_seed("prompt", 50, 0)}  # Fewer samples are the first ones.


async def test_a_requests_seed_gives_each_sample_its_own_and_none_is_a_fresh_one(house):
    await house.generate([[5], [6]], params(seed=7), n=2)
    assert [t.seed for t in house.engine.tasks] == [derive_seed("request", 7, p, s) for p in range(2) for s in range(2)]
    house.engine.tasks.clear()
    for _ in range(2):
        await house.generate([[5]], policy_pb2.SamplingParams(max_new_tokens=2), n=4)
    assert len({t.seed for t in house.engine.tasks}) == 8
    house.engine.tasks.clear()
    await house.generate([[5]], params(seed=0), n=2)  # Zero is a seed, and not none.
    assert [t.seed for t in house.engine.tasks] == [derive_seed("request", 0, 0, s) for s in range(2)]


async def test_no_n_is_one_and_a_negative_one_is_refused(house):
    assert len(await house.generate([[5], [6]], n=0)) == 2
    error = await house.refusal([[5]], n=-2)
    assert (error.code(), error.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "n is -2, must be at least 1 (0 means 1)",
    )


# Admission --------------------------------------------------------------------------------------------------------


async def test_a_request_that_does_not_fit_is_refused_whole_and_told_when_to_come_again(house):
    house.engine.gate.clear()
    first = asyncio.create_task(house.generate([[5]], n=6))
    await until(lambda: house.engine.running == 6)
    error = await house.refusal([[6], [7], [8]])
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == (
        "6 completions are in hand and 3 more were asked for, at most 8 are taken; try again later"
    )
    assert pushback_s(error) == 1.0
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    assert len(house.engine.tasks) == 6  # Nothing of it was begun.
    fits = asyncio.create_task(house.generate([[6], [7]]))
    await until(lambda: house.engine.running == 8)
    # A refused prompt takes a place until it is answered, and no more.
    assert (await house.refusal([[]])).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    house.engine.gate.set()
    assert (len(await first), len(await fits)) == (6, 2)
    assert len(await house.generate([[6], [7]], n=4)) == 8


async def test_a_request_that_could_never_fit_is_invalid_and_not_told_to_come_again(house):
    error = await house.refusal([[5], [6], [7]], n=3)
    assert (error.code(), translate(error, "").field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompts")
    assert error.details() == "prompts times n is 9, at most 8 completions may be asked for at once"
    assert pushback_s(error) == 0.0
    assert house.engine.tasks == []


def give(house: House, **limits: int) -> None:
    """Another budget than the house was opened with."""
    house.servicer.budget = Budget(BudgetLimits(**{"max_completions": 100, **limits}), house.servicer.metrics)


async def test_a_request_counts_its_prompts_and_all_that_it_may_generate_until_each_is_finished(house):
    give(house, max_tokens=100)
    house.engine.gate.clear()
    free = hold(house, lambda task: task.prompt_ids != [9])
    first = house.call([[5, 6, 7], [9]], params(max_new_tokens=10), n=3)
    await until(lambda: house.engine.running == 6)
    assert house.metric("tokens_in_hand") == 3 * (3 + 10) + 3 * (1 + 10)
    error = await house.refusal([[5] * 19], params(max_new_tokens=10))
    assert (error.code(), pushback_s(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0)
    assert error.details() == "72 tokens are waiting, 29 more would exceed 100; try again later"
    assert house.metric("refused_total", reason="queue_tokens") == 1
    house.engine.gate.set()
    for _ in range(3):
        assert (await first.read()).prompt_index == 1
    assert (house.metric("tokens_in_hand"), house.metric("completions_in_hand")) == (39, 6)
    free.set()
    assert {(await first.read()).prompt_index for _ in range(3)} == {0}
    assert house.metric("tokens_in_hand") == 0
    error = await house.refusal([[5, 6]], params(max_new_tokens=99))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the request has 101 tokens, at most 100 may wait at a time (max_queued_tokens)" in error.details()


async def test_a_request_is_refused_by_its_bytes_before_anything_is_read_of_it(house):
    give(house, max_bytes=1000)
    house.engine.gate.clear()
    first = house.call([common_pb2.Prompt(text="hello " * 20)], params(max_new_tokens=2))
    await until(lambda: house.engine.running == 1)
    assert 120 < house.metric("held_bytes") < 250
    wrong = params(temperature=-1.0)  # Nobody looked.
    error = await house.refusal([common_pb2.Prompt(text="hello " * 145)], wrong)
    assert (error.code(), pushback_s(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0)
    assert "bytes are in hand, " in error.details()
    error = await house.refusal([common_pb2.Prompt(text="hello " * 200)], wrong)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 1000 are held at a time (max_held_mib); split it" in error.details()
    house.engine.gate.set()
    assert len([reply async for reply in first]) == 1
    assert house.metric("held_bytes") == 0


async def test_text_counts_by_the_tokens_of_texts_before_it_and_by_its_own_once_they_are_known(house, tokenizer):
    give(house, max_tokens=200)
    words = common_pb2.Prompt(text="my phone is broken " * 8)
    count = len(tokenizer(words.text, add_special_tokens=False).input_ids)
    house.engine.gate.clear()
    first = house.call([words], params(max_new_tokens=3), n=2)
    await until(lambda: house.engine.running == 2)
    assert house.metric("tokens_in_hand") == 2 * (count + 3)
    # Nothing of the guess makes a difference while nothing else is in hand, or once it is known to be wrong.
    house.engine.gate.set()
    assert len([reply async for reply in first]) == 2
    dense = common_pb2.Prompt(text="\N{SNOWMAN}" * 30)  # Of more tokens than its bytes made one expect.
    house.engine.gate.clear()
    second = house.call([[5] * 50], params(max_new_tokens=50))
    await until(lambda: house.engine.running == 1)
    error = await house.refusal([dense], params(max_new_tokens=38))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(house.engine.tasks) == 3  # Nothing of it was begun.
    assert house.metric("tokens_in_hand") == 100
    second.cancel()
    await until(lambda: house.metric("tokens_in_hand") == 0)


@pytest.mark.parametrize("received", [0, 1])
async def test_a_client_that_leaves_frees_its_places_at_once(house, received):
    free = asyncio.Event()
    free.set()

    async def only_one(task: GenerationTask) -> Generated:
        if free.is_set() and received:
            free.clear()
            return generated(task)
        await asyncio.sleep(60)
        raise AssertionError

    house.engine.answer = only_one
    call = house.call(PROMPTS[:2], n=4)
    if received:
        assert (await call.read()).status.code == OK
    await until(lambda: house.engine.running == MOST - received)
    call.cancel()
    await until(lambda: house.engine.running == 0)
    assert house.engine.cancelled == MOST - received
    await until(lambda: house.metric("calls_total", method="Generate", code="CANCELLED") == 1)
    house.engine.answer = at_once
    assert len(await house.generate(PROMPTS[:2], n=4)) == MOST


async def test_a_deadline_that_passes_frees_its_places_too(house):
    house.engine.gate.clear()
    request = policy_pb2.GenerateRequest(prompts=[common_pb2.Prompt(text="hello")], n=8, sampling=params())
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await house.stub.Generate(request, timeout=0.2).read()
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: house.engine.cancelled == 8)
    house.engine.gate.set()
    assert len(await house.generate([[5]], n=8)) == 8


async def test_what_the_engine_has_not_finished_at_the_end_is_told_to_try_again_and_frees_everything(house):
    free = "--model m --port 0 --admin-port 0 --metrics-port 0"
    settings = PolicySettings.from_command_line(free.split())
    runtime = ServiceRuntime(name="policy", settings=settings, metrics=house.servicer.metrics)
    listener = Listener(
        name="policy",
        port=0,
        services=("policy",),
        add=lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(house.servicer, server),
    )
    await runtime.bind(listener)
    hold(house, lambda task: task.prompt_ids == [6])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
        house.stub = policy_pb2_grpc.PolicyServiceStub(channel)
        call = house.call([[5], [6]])
        assert (await call.read()).prompt_index == 0
        await runtime.close(grace_s=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await call.read()
    assert told.value.code() is grpc.StatusCode.UNAVAILABLE
    assert told.value.details() == "the service is ending and could not finish this call in time; try again"
    assert [house.metric(name) for name in ("completions_in_hand", "tokens_in_hand", "held_bytes")] == [0] * 3


async def test_an_engine_that_died_ends_the_service_and_frees_everything(house):
    async def answer(task: GenerationTask) -> Generated:
        if task.prompt_ids == [6]:
            raise EngineFailedError("the worker died")
        await asyncio.sleep(60)
        raise AssertionError

    house.engine.answer = answer
    error = await house.refusal([[5], [6], [7]])
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the worker died; the service is restarted"
    assert house.stopped == ["the worker died"]
    await until(lambda: house.engine.running == 0)
    assert house.engine.cancelled == 2

"""A request that is tried again: what the engine runs is counted, by the wire and through the typed client."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest

from quartet.client import CallPolicy, Completion, FailedCompletion, PolicyClient, Sampling, TokenDelta
from quartet.client.errors import InvalidInputError, OverloadedError, UnavailableError, translate
from quartet.common.v1 import common_pb2
from quartet.fingerprint import derive_seed
from quartet.policy.v1 import policy_pb2_grpc
from services.policy.budget import BudgetLimits
from services.policy.engine import EngineFailedError, Finish, Generated, GenerationFailedError, GenerationTask, Piece
from services.policy.kept_requests import KeepLimits
from services.policy.run import GenerationRun
from services.policy.servicer import PolicyServicer
from services.runtime.gate import Gate
from services.runtime.interceptors import CallInterceptor
from services.runtime.security import TokenCheck
from tests.unit.services.policy.scripted_engine import generated, until
from tests.unit.services.policy.served import MOST, hold, params

PROMPTS = [[5, 6, 7], [9], [20, 21]]
UNSEEDED = {"sampling": params()}
UNSEEDED["sampling"].ClearField("seed")


def answers(replies: list[Any]) -> dict[tuple[int, int], Any]:
    found = {(reply.prompt_index, reply.sample_index): reply for reply in replies}
    assert len(found) == len(replies)
    return found


async def test_the_same_request_again_gets_what_is_finished_and_runs_nothing(house):
    first = answers(await house.generate(PROMPTS, n=2, request_id="one", **UNSEEDED))
    assert len(house.engine.tasks) == 6
    again = answers(await house.generate(PROMPTS, n=2, request_id="one", **UNSEEDED))
    assert again == first
    assert len(house.engine.tasks) == 6
    assert house.metric("rejoined_total") == 1
    assert house.metric("tokens_total", kind="generated") == 12  # Generated once.
    assert house.metric("completions_in_hand") == 0
    # Another id, and none, run anew: with fresh seeds, as nothing else was asked for.
    for request_id in ("two", "", ""):
        other = answers(await house.generate(PROMPTS, n=2, request_id=request_id, **UNSEEDED))
        assert {key: r.completion.token_ids[:1] for key, r in other.items()} != {
            key: r.completion.token_ids[:1] for key, r in first.items()
        }
    assert len(house.engine.tasks) == 24


async def test_a_retry_joins_the_work_that_goes_on_and_both_are_answered(house):
    free = hold(house, lambda task: task.prompt_ids == [9])
    first = house.call(PROMPTS, n=2, request_id="one", **UNSEEDED)
    early = [await first.read() for _ in range(4)]
    second = asyncio.create_task(house.generate(PROMPTS, n=2, request_id="one", **UNSEEDED))
    await until(lambda: house.metric("rejoined_total") == 1)
    assert house.metric("completions_in_hand") == 6  # Both together.
    free.set()
    late = [await first.read() for _ in range(2)]
    assert answers([*early, *late]) == answers(await second)
    assert len(house.engine.tasks) == 6


async def test_the_first_call_may_leave_and_the_work_goes_on_for_the_second(house):
    free = hold(house, lambda task: True)
    first = house.call(PROMPTS, request_id="one")
    reading = asyncio.ensure_future(first.read())
    await until(lambda: house.engine.running == 3)
    second = asyncio.create_task(house.generate(PROMPTS, request_id="one"))
    await until(lambda: house.metric("rejoined_total") == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: house.metric("calls_total", method="Generate", code="CANCELLED") == 1)
    assert (house.engine.running, house.engine.cancelled) == (3, 0)
    free.set()
    assert len(await second) == 3
    assert len(house.engine.tasks) == 3


async def test_when_the_last_call_leaves_slots_are_free_at_once_and_a_retry_runs_the_rest_with_the_same_seeds(house):
    hold(house, lambda task: task.prompt_ids == [9])
    call = house.call(PROMPTS, n=2, request_id="one", **UNSEEDED)
    done = [await call.read() for _ in range(4)]
    call.cancel()
    await until(lambda: house.engine.running == 0 and house.metric("completions_in_hand") == 0)
    cut = {task.seed for task in house.engine.tasks if task.prompt_ids == [9]}
    house.engine.tasks.clear()
    hold(house, lambda task: False)
    again = answers(await house.generate(PROMPTS, n=2, request_id="one", **UNSEEDED))
    assert len(again) == 6
    assert {key: again[key] for key in answers(done)} == answers(done)
    assert {task.seed for task in house.engine.tasks} == cut
    assert {tuple(task.prompt_ids) for task in house.engine.tasks} == {(9,)}


async def test_within_its_grace_the_work_goes_on_for_who_comes_back_and_no_longer(house):
    house.servicer.retry_grace_s = 0.3
    free = hold(house, lambda task: True)
    for comes_back in (True, False):
        house.engine.tasks.clear()
        house.engine.cancelled = 0
        free.clear()
        call = house.call(PROMPTS, request_id=f"one-{comes_back}")
        await until(lambda: house.engine.running == 3)
        held_bytes = house.metric("held_bytes")
        call.cancel()
        await asyncio.sleep(0.1)
        assert (house.engine.running, house.metric("completions_in_hand")) == (3, 3)
        assert house.metric("held_bytes") == held_bytes > 0  # The request outlives its call.
        if comes_back:
            second = asyncio.create_task(house.generate(PROMPTS, request_id="one-True"))
            await asyncio.sleep(0.4)
            free.set()
            assert len(await second) == 3
            assert (len(house.engine.tasks), house.engine.cancelled) == (3, 0)
        else:
            await until(lambda: house.engine.running == 0)
            assert house.engine.cancelled == 3
        assert [house.metric(name) for name in ("completions_in_hand", "tokens_in_hand", "held_bytes")] == [0] * 3
    # A request without an id has no retry to wait for.
    house.servicer.retry_grace_s = 60.0
    free.clear()
    call = house.call(PROMPTS)
    await until(lambda: house.engine.running == 3)
    call.cancel()
    await until(lambda: house.engine.running == 0)


async def test_each_time_the_last_call_leaves_the_grace_begins_anew(house):
    house.servicer.retry_grace_s = 0.6
    hold(house, lambda task: True)
    for times in range(4):
        call = house.call(PROMPTS, request_id="one")
        await until(lambda times=times: house.metric("rejoined_total") == times and house.engine.running == 3)
        call.cancel()
        await until(lambda times=times: house.metric("calls_total", method="Generate", code="CANCELLED") == times + 1)
        await asyncio.sleep(0.25)
    assert (house.engine.running, len(house.engine.tasks)) == (3, 3)
    await until(lambda: house.engine.running == 0)


async def test_work_that_ends_within_its_grace_is_kept_and_its_places_are_given_back(house):
    house.servicer.retry_grace_s = 0.2
    free = hold(house, lambda task: True)
    call = house.call(PROMPTS, request_id="one")
    await until(lambda: house.engine.running == 3)
    call.cancel()
    await asyncio.sleep(0.05)
    free.set()
    await until(lambda: house.metric("completions_in_hand") == 0)
    assert len(await house.generate(PROMPTS, request_id="one")) == 3
    assert len(house.engine.tasks) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": [[5, 6, 7], [9]]},
        {"n": 1},
        {"sampling": params(seed=12)},
        {"sampling": params(logit_bias={5: 1.0})},
        {"return_text": True},
        {"stream_tokens": True},
    ],
    ids=str,
)
async def test_the_same_id_with_other_content_is_refused(house, changes):
    fields = {"prompts": PROMPTS, "n": 2, "sampling": params(logit_bias={5: 1.0, 6: 2.0}), "request_id": "one"}
    await house.generate(**fields)
    error = await house.refusal(**{**fields, **changes})
    assert (error.code(), translate(error, "").field) == (grpc.StatusCode.INVALID_ARGUMENT, "request_id")
    assert error.details().startswith("request_id is 'one', which stands for a request of other content")
    assert len(house.engine.tasks) == 6
    assert len(await house.generate(**fields)) == 6  # A map has no order that could make a difference.
    assert len(house.engine.tasks) == 6


async def test_a_request_id_is_its_callers_alone_by_the_token_that_was_checked(house, serve, tmp_path):
    (tmp_path / "tokens").write_text("of-alice\nof-bob\nof-carol\n")
    gate = Gate(
        tokens=TokenCheck(tmp_path / "tokens", "--token-file"), max_calls=32, max_slow_requests=8, request_timeout_s=20
    )
    channel = await serve(
        house.servicer.metrics,
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(house.servicer, server),
        gate,
    )
    house.stub = policy_pb2_grpc.PolicyServiceStub(channel)
    asked = {"request_id": "one", **UNSEEDED}
    first = answers(await house.generate(PROMPTS, token="of-alice", **asked))
    other = answers(await house.generate(PROMPTS, token="of-bob", **asked))
    assert {key: r.completion.token_ids for key, r in other.items()} != {
        key: r.completion.token_ids for key, r in first.items()
    }
    # With other content it is his own request that refuses, and not hers.
    error = await house.refusal(PROMPTS[:1], token="of-bob", **asked)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(await house.generate(PROMPTS[:1], token="of-carol", **asked)) == 1
    assert house.metric("rejoined_total") == 0
    assert answers(await house.generate(PROMPTS, token="of-alice", **asked)) == first
    assert house.metric("rejoined_total") == 1


async def test_where_no_token_is_checked_all_callers_share_one_space_of_request_ids_whatever_they_send(house):
    asked = {"request_id": "one", **UNSEEDED}
    first = answers(await house.generate(PROMPTS, **asked))
    for token in ("forged", "another"):
        assert answers(await house.generate(PROMPTS, token=token, **asked)) == first
    assert house.metric("rejoined_total") == 2


async def test_an_id_too_long_and_indices_that_are_none_are_refused_by_name(house):
    error = await house.refusal(PROMPTS, request_id="x" * 129)
    assert error.details() == "request_id is 129 characters long, must be at most 128 long"
    error = await house.refusal(PROMPTS, request_id="line\n")
    assert error.details() == "request_id is 'line\\n', must be printable ASCII"
    for bad in (-1, 6):
        error = await house.refusal(PROMPTS, n=2, received=[0, bad])
        assert error.details() == f"received is [{bad}], must be in [0, prompts times n 6)"
        assert translate(error, "").field == "received"
    error = await house.refusal(PROMPTS, n=2, received=[0] * 7)
    assert error.details() == "received is 7 long, must be at most 6 long"
    assert house.engine.tasks == []


async def test_what_the_client_has_received_is_neither_sent_nor_run(house):
    first = answers(await house.generate(PROMPTS, n=2, request_id="one"))
    part = answers(await house.generate(PROMPTS, n=2, request_id="one", received=[0, 3, 3]))
    assert part == {key: reply for key, reply in first.items() if key not in {(0, 0), (1, 1)}}
    assert len(house.engine.tasks) == 6
    house.engine.tasks.clear()
    # Another replica, which does not know the id, runs what is missing alone, with the seeds that it would have had.
    part = answers(await house.generate(PROMPTS, n=2, request_id="elsewhere", received=[0, 1, 2, 3]))
    assert part.keys() == {(2, 0), (2, 1)}
    assert {key: reply.completion for key, reply in part.items()} == {key: first[key].completion for key in part}
    assert len(house.engine.tasks) == 2
    assert await house.generate(PROMPTS, n=2, received=range(6)) == []


async def test_a_passing_failure_is_tried_again_and_a_refusal_is_not(house):
    fails = [True]

    async def answer(task: GenerationTask) -> Generated:
        if task.prompt_ids == [9] and fails:
            raise GenerationFailedError("out of luck")
        return generated(task)

    house.engine.answer = answer
    first = answers(await house.generate([*PROMPTS, []], request_id="one"))
    assert [first[p, 0].status.code for p in range(4)] == [1, 3, 1, 2]
    fails.clear()
    again = answers(await house.generate([*PROMPTS, []], request_id="one"))
    assert [again[p, 0].status.code for p in range(4)] == [1, 1, 1, 2]
    assert len(house.engine.tasks) == 4


async def test_a_request_whose_engine_died_is_not_kept(house):
    async def die(task: GenerationTask) -> Generated:
        raise EngineFailedError("the worker died")

    house.engine.answer = die
    for _ in range(2):
        error = await house.refusal(PROMPTS, request_id="one")
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert len(house.engine.tasks) == 6
    assert house.metric("kept_requests") == 0


async def test_a_retry_that_has_to_run_is_refused_when_there_is_no_room_and_what_is_kept_is_always_given(house):
    hold(house, lambda task: task.prompt_ids == [20, 21])
    call = house.call(PROMPTS, request_id="one")
    for _ in range(2):
        await call.read()
    call.cancel()
    await until(lambda: house.metric("completions_in_hand") == 0)
    filling = house.call([[20, 21]], n=MOST)
    await until(lambda: house.metric("completions_in_hand") == MOST)
    error = await house.refusal(PROMPTS, request_id="one")
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(await house.generate(PROMPTS, request_id="one", received=[2])) == 2
    filling.cancel()
    hold(house, lambda task: False)
    await until(lambda: house.metric("completions_in_hand") == 0)
    assert len(await house.generate(PROMPTS, request_id="one")) == 3


async def test_results_beyond_the_bytes_are_sent_and_not_kept(house):
    (reply,) = await house.generate([[5]])
    size = reply.ByteSize()
    house.servicer._kept.limits = KeepLimits(max_bytes=3 * size)
    assert len(await house.generate(PROMPTS[1:2], n=6, request_id="large")) == 6
    assert (house.metric("kept_requests"), house.metric("kept_bytes")) == (0, 0)
    assert len(await house.generate(PROMPTS[1:2], n=6, request_id="large")) == 6
    assert len(house.engine.tasks) == 1 + 12
    assert len(await house.generate([[5]], request_id="small")) == 1
    assert house.metric("kept_requests") == 1
    assert abs(house.metric("kept_bytes") - size) < 16


async def test_a_call_that_joins_a_stream_gets_its_tokens_from_the_beginning(house):
    first = await house.generate(PROMPTS, request_id="one", stream_tokens=True)
    again = await house.generate(PROMPTS, request_id="one", stream_tokens=True)
    for replies in (first, again):
        for p in range(3):
            *deltas, last = [reply for reply in replies if reply.prompt_index == p]
            tokens = [token for reply in deltas for token in reply.delta.token_ids]
            assert tokens == list(last.completion.token_ids)
    assert len(house.engine.tasks) == 3


async def test_a_call_that_joins_in_the_middle_of_a_completion_gets_its_tokens_from_the_beginning_too(house):
    turns: asyncio.Queue[int] = asyncio.Queue()

    async def give(task: GenerationTask) -> AsyncGenerator[Piece, None]:
        for token in (8, 9, 10, 11):
            await turns.get()
            yield Piece(token_ids=[token], logprobs=[-0.5], version_spans=[(0, 1)])
        yield Piece(token_ids=[], logprobs=[], version_spans=[], finish=Finish.LENGTH)

    house.engine.pieces = give
    first = house.call([[5]], request_id="one", stream_tokens=True)
    for token in (8, 9):
        turns.put_nowait(0)
        assert list((await first.read()).delta.token_ids) == [token]
    second = house.call([[5]], request_id="one", stream_tokens=True)
    assert list((await second.read()).delta.token_ids) == [8, 9]
    for token in (10, 11):
        turns.put_nowait(0)
        for call in (first, second):
            assert list((await call.read()).delta.token_ids) == [token]
    assert await first.read() == await second.read()
    assert len(house.engine.tasks) == 1


async def test_requests_that_were_refused_at_the_door_take_no_room_from_what_is_kept(house):
    house.servicer._kept.limits = KeepLimits(count=2)
    await house.generate(PROMPTS, request_id="one")
    hold(house, lambda task: True)
    filling = house.call([[5]], n=MOST)
    await until(lambda: house.metric("completions_in_hand") == MOST)
    for number in range(5):
        error = await house.refusal([[5]], request_id=f"refused-{number}")
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert house.metric("kept_requests") == 1
    assert len(await house.generate(PROMPTS, request_id="one")) == 3
    filling.cancel()


async def test_the_adapter_is_held_while_work_runs_and_not_by_what_is_kept(house, monkeypatch):
    held: list[str] = []
    adapters = house.servicer.hosted.adapters
    monkeypatch.setattr(type(adapters), "take", lambda self, name: held.append(name))
    monkeypatch.setattr(type(adapters), "give_back", lambda self, adapter: None)
    await house.generate(PROMPTS, request_id="one")
    await house.generate(PROMPTS, request_id="one")
    assert held == [""]  # The second call needed none.


# Through the client -----------------------------------------------------------------------------------------------


@pytest.fixture
async def client(house) -> AsyncIterator[PolicyClient]:
    """The typed client, before the house's servicer."""
    server = grpc.aio.server(interceptors=[CallInterceptor(house.servicer.metrics)])
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(_Late(house.servicer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with PolicyClient(f"127.0.0.1:{port}", policy=CallPolicy(first_backoff_s=0.02, deadline_s=20)) as client:
        yield client
    await server.stop(0)


class _Late(policy_pb2_grpc.PolicyServiceServicer):
    """Looks its method up at every call, so that a test may break it."""

    def __init__(self, servicer: PolicyServicer) -> None:
        self.servicer = servicer

    async def Generate(self, request: Any, context: Any) -> Any:
        async with contextlib.aclosing(self.servicer.Generate(request, context)) as replies:
            async for reply in replies:
                yield reply


async def test_the_client_keeps_its_id_over_retries_and_gets_every_completion_once(house, client, monkeypatch):
    breaks = [2, 1]  # After so many replies, each time.
    follow = GenerationRun.follow

    async def broken(self: GenerationRun, *arguments: Any) -> Any:
        left = breaks.pop(0) if breaks else None
        async for reply in follow(self, *arguments):
            if left == 0:
                raise OSError  # Nothing that the service answers with on purpose ...
            left = None if left is None else left - 1
            yield reply

    async def gone(self: Any, request: Any, context: Any) -> Any:
        try:
            async for reply in generate(self, request, context):
                yield reply
        except OSError:  # ... but what a broken connection looks like.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")

    generate = type(house.servicer).Generate
    monkeypatch.setattr(GenerationRun, "follow", broken)
    monkeypatch.setattr(type(house.servicer), "Generate", gone)
    sampling = Sampling(max_new_tokens=4)
    stream = client.generate(PROMPTS, sampling, n=2, tokenizer_fingerprint=house.fingerprint, patience_s=10.0)
    found = [(item.prompt_index, item.sample_index) async for item in stream]
    assert sorted(found) == [(p, s) for p in range(3) for s in range(2)]
    assert breaks == []
    assert house.metric("rejoined_total") == 2
    assert len(house.engine.tasks) == 6
    # Without patience it is the caller who asks again, under an id of his own.
    breaks.append(2)
    house.engine.tasks.clear()
    asked = {"n": 2, "tokenizer_fingerprint": house.fingerprint, "request_id": "mine", "patience_s": 0.0}
    stream = client.generate(PROMPTS, sampling, **asked)
    received = [await anext(stream), await anext(stream)]
    with pytest.raises(UnavailableError, match="connection reset"):
        await anext(stream)
    again = [item async for item in client.generate(PROMPTS, sampling, **asked)]
    assert len(again) == 6
    assert all(item in again for item in received)
    assert len(house.engine.tasks) == 6
    with pytest.raises(InvalidInputError, match="request_id is 'mine'"):
        await anext(client.generate(PROMPTS[:1], sampling, **asked))


async def test_the_client_refuses_a_name_that_metadata_cannot_carry(house, client):
    with pytest.raises(InvalidInputError, match="request_id is 'né', must be printable ASCII"):
        await anext(client.generate(PROMPTS, Sampling(max_new_tokens=4), request_id="né"))


async def test_the_client_waits_as_the_service_asks_when_it_is_full_and_gives_up_in_time(house, client):
    house.engine.gate.clear()
    filling = house.call([[5]], n=MOST)
    await until(lambda: house.engine.running == MOST)
    sampling, mine = Sampling(max_new_tokens=4), {"tokenizer_fingerprint": house.fingerprint}
    with pytest.raises(OverloadedError):  # The service asks for a second.
        await anext(client.generate([[6]], sampling, patience_s=0.5, **mine))
    waiting = asyncio.ensure_future(anext(client.generate([[6]], sampling, patience_s=10.0, **mine)))
    await asyncio.sleep(0.2)
    house.engine.gate.set()
    filling.cancel()
    assert isinstance(await asyncio.wait_for(waiting, 5), Completion)


async def test_the_client_gives_tokens_as_they_come_and_then_the_completion(house, client, tokenizer):
    ids = tokenizer(" sorry please", add_special_tokens=False).input_ids

    async def answer(task: GenerationTask) -> Generated:
        return generated(task, token_ids=ids)

    house.engine.answer = answer
    sampling = Sampling(max_new_tokens=20, stop_strings=("please",), logit_bias={5: 1.5})
    items = [i async for i in client.generate_stream([[5], [300]], sampling, tokenizer_fingerprint=house.fingerprint)]
    ends = {item.prompt_index: item for item in items if not isinstance(item, TokenDelta)}
    deltas = [item for item in items if isinstance(item, TokenDelta)]
    done, refused = ends[0], ends[1]
    assert isinstance(refused, FailedCompletion)
    assert isinstance(done, Completion)
    assert (done.text, done.stop_string, done.stop_token_id) == (" sorry ", "please", None)
    assert "".join(delta.text for delta in deltas) == done.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == done.token_ids == tuple(ids)
    assert tuple(x for delta in deltas for x in delta.logprobs) == done.logprobs
    assert items.index(done) > max(map(items.index, deltas))
    assert [task.sampling.logit_bias for task in house.engine.tasks] == [((5, 1.5),)]


async def test_a_stream_of_tokens_that_has_begun_is_not_tried_again_by_itself(house, client):
    async def die(task: GenerationTask) -> Any:
        yield Piece(token_ids=[8], logprobs=[-1.0], version_spans=[(0, 1)])
        await asyncio.sleep(0.05)
        raise EngineFailedError("the worker died")

    house.engine.pieces = die
    stream = client.generate_stream(
        [[5]], Sampling(max_new_tokens=4), tokenizer_fingerprint=house.fingerprint, patience_s=10.0
    )
    assert (await anext(stream)).token_ids == (8,)
    with pytest.raises(UnavailableError, match="the worker died"):
        await anext(stream)
    assert len(house.engine.tasks) == 1


# Races ------------------------------------------------------------------------------------------------------------


async def test_thousands_that_join_leave_and_come_back_at_any_moment_are_answered_rightly_and_leave_nothing(house):
    """Few ids for many calls, which leave at random; the engine answers, fails and streams at its own pace."""
    house.servicer.budget.limits = BudgetLimits(max_completions=400)
    house.servicer._kept.limits = KeepLimits(count=3)
    draw = random.Random(2)
    outcomes: Counter[str] = Counter()

    async def answer(task: GenerationTask) -> Generated:
        await asyncio.sleep(draw.random() * 0.03)
        if draw.random() < 0.05:
            raise GenerationFailedError("out of luck")
        return generated(task)

    house.engine.answer = answer

    def check(name: int, replies: list[Any], whole: bool) -> None:
        """Each completion once and of its own seed, and where it was streamed the sum of its deltas."""
        tokens: dict[tuple[int, int], list[int]] = {}
        done = set()
        for reply in replies:
            key = (reply.prompt_index, reply.sample_index)
            assert key not in done
            if reply.HasField("delta"):
                tokens.setdefault(key, []).extend(reply.delta.token_ids)
                continue
            done.add(key)
            if reply.status.code == common_pb2.ITEM_STATUS_CODE_OK:
                p, s = key
                seed = derive_seed("request", name, p, s)
                expected = [seed % 293, sum(PROMPTS[p]) % 293]
                assert list(reply.completion.token_ids) == expected
                assert tokens.get(key, expected) == expected
            else:
                assert reply.status.code == common_pb2.ITEM_STATUS_CODE_RETRYABLE
        assert not whole or len(done) == 6

    # Of more than a thousand calls that nobody has accepted yet, gRPC itself cancels some at random.
    at_once = asyncio.Semaphore(300)

    async def call() -> None:
        async with at_once:
            await asyncio.sleep(draw.random() * 0.3)
            await ask()

    async def ask() -> None:
        name = draw.randrange(12)
        stream = name % 2 == 0
        asked = house.call(PROMPTS, params(seed=name), n=2, request_id=str(name), stream_tokens=stream)
        replies, stay = [], draw.choice((0, 1, 3, 100, 100))
        try:
            while len(replies) < stay and (reply := await asked.read()) is not grpc.aio.EOF:
                replies.append(reply)
        except grpc.aio.AioRpcError as error:
            outcomes[error.code().name] += 1
            return
        asked.cancel()
        check(name, replies, whole=stay == 100)
        outcomes["stayed" if stay == 100 else "left"] += 1

    await asyncio.gather(*(call() for _ in range(2000)))
    assert set(outcomes) <= {"stayed", "left", "RESOURCE_EXHAUSTED"}
    assert outcomes["stayed"] > 500
    assert outcomes["left"] > 500
    await until(lambda: house.engine.running == 0 and house.metric("completions_in_hand") == 0)
    await until(lambda: house.metric("calls_in_flight") == 0)
    assert (house.metric("tokens_in_hand"), house.metric("held_bytes")) == (0, 0)
    assert house.metric("kept_requests") <= 3
    # Of the six completions of each call, those that were kept or joined were not run. How many calls came while
    # another of their name was in hand or kept is the machine's matter.
    assert (rejoined := house.metric("rejoined_total")) > 500
    assert len(house.engine.tasks) <= 6 * (2000 - rejoined)
    house.servicer._kept.limits = KeepLimits(count=3, age_s=-1.0)
    assert len(await house.generate(PROMPTS, request_id="last")) == 3
    await until(lambda: (house.metric("kept_requests"), house.metric("kept_bytes")) == (0, 0))

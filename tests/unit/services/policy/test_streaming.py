"""Tokens as they come, and what ends a completion: by the wire, whatever pieces the engine makes."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from quartet.common.v1 import common_pb2
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc
from services.policy.engine import (
    EngineFailedError,
    Finish,
    Generated,
    GenerationFailedError,
    GenerationRefusedError,
    GenerationTask,
    Piece,
)
from services.policy.text_stream import decode
from services.runtime.interceptors import CallInterceptor
from tests.unit.services.policy.scripted_engine import at_once, generated, until
from tests.unit.services.policy.served import MOST, House, params

STOP, LENGTH = policy_pb2.FINISH_REASON_STOP, policy_pb2.FINISH_REASON_LENGTH


def piece(token_ids: Sequence[int], finish: Finish | None = None, version: int = 0, logprob: float = -0.5) -> Piece:
    spans = [(version, len(token_ids))] if token_ids else []
    return Piece(token_ids=list(token_ids), logprobs=[logprob] * len(token_ids), version_spans=spans, finish=finish)


def scripted(house: House, *pieces: Piece, wait: bool = False) -> None:
    """The engine gives these pieces to everybody, and after them nothing for long."""

    async def give(task: GenerationTask) -> AsyncGenerator[Piece, None]:
        for one in pieces:
            yield one
            await asyncio.sleep(0)
        if wait:
            await asyncio.sleep(60)

    house.engine.pieces = give


def encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def told(replies: Sequence[Any]) -> tuple[list[int], list[float], str, Any]:
    """Deltas of one completion joined, and the completion itself, which comes last."""
    *deltas, last = replies
    assert all(reply.HasField("delta") and not reply.HasField("status") for reply in deltas)
    assert not last.HasField("delta")
    tokens = [token for reply in deltas for token in reply.delta.token_ids]
    logprobs = [logprob for reply in deltas for logprob in reply.delta.logprobs]
    return tokens, logprobs, "".join(reply.delta.text for reply in deltas), last


def assert_joined(replies: Sequence[Any]) -> Any:
    """The completion, whose deltas before it are it in parts."""
    tokens, logprobs, text, last = told(replies)
    completion = last.completion
    assert tokens == list(completion.token_ids)
    assert logprobs == list(completion.logprobs)
    assert text == completion.text
    return completion


async def test_each_token_is_sent_before_the_next_is_there_and_joined_they_are_the_completion(house, tokenizer):
    ids = [*encoded(tokenizer, "héé 🙂 ok"), 1]
    turns: asyncio.Queue[int] = asyncio.Queue()

    async def give(task: GenerationTask) -> AsyncGenerator[Piece, None]:
        for place in range(len(ids)):
            await turns.get()
            yield piece(ids[place : place + 1], Finish.STOP if place == len(ids) - 1 else None)

    house.engine.pieces = give
    call = house.call([[5]], stream_tokens=True, return_text=True)
    replies = []
    for place in range(len(ids)):
        turns.put_nowait(place)
        replies.append(await asyncio.wait_for(call.read(), 5))
        assert list(replies[-1].delta.token_ids) == [ids[place]]
    replies.append(await asyncio.wait_for(call.read(), 5))
    completion = assert_joined(replies)
    assert completion.text == "héé 🙂 ok"
    assert [reply.delta.text for reply in replies[:8]] == ["h", "", "é", "", "é", " ", "", ""]
    assert (completion.finish_reason, completion.stop_token_id) == (STOP, 1)
    assert list(map(str, completion.version_spans)) == [f"token_count: {len(ids)}\n"]
    assert house.metric("items_total", status="ITEM_STATUS_CODE_OK") == 1


async def test_with_many_at_once_every_completion_is_the_sum_of_its_own_deltas(house):
    whole = {r.prompt_index * 2 + r.sample_index: r for r in await house.generate([[5], [6], [7]], n=2)}
    by_index = defaultdict(list)
    for reply in await house.generate([[5], [6], [7]], n=2, stream_tokens=True):
        by_index[reply.prompt_index * 2 + reply.sample_index].append(reply)
    assert by_index.keys() == whole.keys()
    for index, replies in by_index.items():
        assert_joined(replies)
        assert replies[-1].completion.token_ids == whole[index].completion.token_ids
        assert replies[-1].completion.version_spans == whole[index].completion.version_spans


async def test_who_reads_slowly_gets_more_at_a_time_and_the_service_keeps_no_queue(house):
    count = 5000
    scripted(house, *(piece([token % 250]) for token in range(count)), piece([], Finish.LENGTH))
    request = policy_pb2.GenerateRequest(
        prompts=[common_pb2.Prompt(text="hello")], sampling=params(), stream_tokens=True
    )
    # The servicer itself, as a connection whose buffers are full reads it.
    nobody = SimpleNamespace(peer_identities=lambda: None, invocation_metadata=lambda: ())
    reading = house.servicer.Generate(request, nobody)
    first = await anext(reading)
    await until(lambda: house.engine.running == 0)
    rest, last = [reply async for reply in reading]
    tokens = [*first.delta.token_ids, *rest.delta.token_ids]
    assert tokens == [token % 250 for token in range(count)] == list(last.completion.token_ids)
    assert len(rest.delta.token_ids) > count // 2


async def test_without_text_asked_for_deltas_have_none_also_where_a_stop_string_is_looked_for(house, tokenizer):
    scripted(house, piece(encoded(tokenizer, "one. two")), piece([], Finish.LENGTH))
    replies = await house.generate([[5]], params(stop_strings=[". "]), stream_tokens=True)
    completion = assert_joined(replies)
    assert completion.text == ""
    assert completion.stop_string == ". "


async def test_refused_prompts_and_failures_have_no_deltas_and_take_back_what_was_sent(house):
    async def give(task: GenerationTask) -> AsyncGenerator[Piece, None]:
        yield piece([8, 9])
        await asyncio.sleep(0.05)
        if task.prompt_ids == [6]:
            raise GenerationFailedError("out of luck")
        if task.prompt_ids == [4]:
            raise GenerationRefusedError("no such request is taken")
        yield piece([10], Finish.LENGTH, logprob=math.nan if task.prompt_ids == [7] else -1.0)

    house.engine.pieces = give
    replies = await house.generate([[5], [6], [7], [], [4]], stream_tokens=True)
    by_prompt = {p: [r for r in replies if r.prompt_index == p] for p in range(5)}
    assert assert_joined(by_prompt[0]).token_ids == [8, 9, 10]
    assert [told(by_prompt[p])[0] for p in (1, 2, 3, 4)] == [[8, 9], [8, 9], [], [8, 9]]
    reasons = [by_prompt[p][-1].status for p in (1, 2, 3, 4)]
    assert [status.code for status in reasons] == [3, 2, 2, 2]
    assert reasons[3].reason == "no such request is taken"
    assert reasons[0].reason == "out of luck"
    assert "not a finite number" in reasons[1].reason


async def test_an_engine_that_dies_while_streaming_ends_the_service(house):
    async def give(task: GenerationTask) -> AsyncGenerator[Piece, None]:
        yield piece([8])
        raise EngineFailedError("the worker died")

    house.engine.pieces = give
    error = await house.refusal([[5]], stream_tokens=True)
    assert error.details() == "the worker died; the service is restarted"
    assert house.stopped == ["the worker died"]


@pytest.mark.parametrize("received", [0, 1])
async def test_a_client_that_leaves_a_stream_frees_its_places_at_once(house, received):
    scripted(house, piece([8]), wait=True)
    call = house.call([[5], [6]], n=4, stream_tokens=True)
    await until(lambda: house.engine.running == MOST)
    for _ in range(received):
        await call.read()
    call.cancel()
    await until(lambda: house.engine.running == 0 and house.metric("completions_in_hand") == 0)
    assert house.engine.cancelled == MOST


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("stream_tokens", [False, True])
async def test_a_reader_that_stops_is_given_up_and_its_places_go_to_others(house, stream_tokens):
    """Over a socket whose windows stay at 64 KiB: what is sent beyond waits for the reader."""

    async def large(task: GenerationTask) -> Generated:
        if task.prompt_ids == [9]:
            await asyncio.Event().wait()
        return generated(task, token_ids=[7] * 100_000, logprobs=[-1.0] * 100_000)

    async def endless(task: GenerationTask) -> AsyncGenerator[Piece, None]:
        while True:
            yield Piece(token_ids=[7] * 1000, logprobs=[-1.0] * 1000, version_spans=[(0, 1000)])
            await asyncio.sleep(0.01)

    house.engine.answer, house.engine.pieces = large, endless
    server = grpc.aio.server(interceptors=[CallInterceptor(house.servicer.metrics, reader_timeout_s=1.0)])
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(house.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    windows = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=windows) as channel:
        patient = replace(house, stub=policy_pb2_grpc.PolicyServiceStub(channel))
        call = patient.call([[5]] * (MOST - 1) + [[9]], stream_tokens=stream_tokens)
        await call.read()
        await until(lambda: house.metric("calls_total", method="Generate", code="DEADLINE_EXCEEDED") == 1, 15)
        assert [house.metric(name) for name in ("completions_in_hand", "tokens_in_hand", "held_bytes")] == [0, 0, 0]
        assert (house.engine.running, house.engine.cancelled) == (0, MOST if stream_tokens else 1)
        # All places are free, on the same connection as well.
        house.engine.answer, house.engine.pieces = at_once, None
        assert len(await patient.generate([[1]] * MOST)) == MOST
        # Who goes on reading after all is told.
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await drain(call)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert ended.value.details().startswith("a reply was not read within 1 s (reader_timeout_s)")
    await server.stop(0)


# What ends a completion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream_tokens", [False, True])
async def test_a_stop_string_ends_it_at_the_same_token_however_the_engine_cuts_its_pieces(
    house, tokenizer, stream_tokens
):
    ids = encoded(tokenizer, "my phone. It is broken. please")
    draw = random.Random(3)
    # Where it has to end: after the first beginning whose text has the stop string.
    end = next(i for i in range(1, len(ids) + 1) if ". " in decode(tokenizer, ids[:i]))
    for _ in range(12):
        cuts = sorted(draw.sample(range(1, len(ids)), k=draw.randrange(len(ids) - 1)))
        parts = [ids[a:b] for a, b in itertools.pairwise([0, *cuts, len(ids)])]
        versions = [3 if place < end else 4 for place in range(len(ids))]
        pieces, place = [], 0
        for part in parts:
            spans = [(v, len(list(group))) for v, group in itertools.groupby(versions[place : place + len(part)])]
            place += len(part)
            pieces.append(Piece(token_ids=part, logprobs=[-0.25] * len(part), version_spans=spans))
        # After them the engine would go on: only leaving frees its slot.
        scripted(house, *pieces, wait=True)
        replies = await house.generate(
            [[5]], params(stop_strings=["never", ". "]), stream_tokens=stream_tokens, return_text=True
        )
        completion = assert_joined(replies) if stream_tokens else replies[-1].completion
        assert list(completion.token_ids) == ids[:end]
        assert list(completion.logprobs) == [-0.25] * end
        assert completion.text == "my phone"
        assert (completion.finish_reason, completion.stop_string) == (STOP, ". ")
        assert completion.WhichOneof("stop") == "stop_string"
        assert [(s.weights_version, s.token_count) for s in completion.version_spans] == [(3, end)]
        await until(lambda: house.engine.running == 0)


async def test_what_ended_it_is_told_and_the_length_is_nothing_that_stopped_it(house, tokenizer):
    ids = encoded(tokenizer, "abc")
    for last, said, reason in (
        (piece([1], Finish.STOP), {"stop_token_id": 1}, STOP),
        (piece([0], Finish.STOP), {"stop_token_id": 0}, STOP),  # Zero is a token, and not none.
        (piece([], Finish.LENGTH), {}, LENGTH),
        (piece([], Finish.ABORTED), {}, policy_pb2.FINISH_REASON_ABORTED),
    ):
        scripted(house, piece(ids), last)
        (reply,) = await house.generate([[5]], params(stop_strings=["abcd"]), return_text=True)
        assert reply.completion.finish_reason == reason
        assert {f.name: v for f, v in reply.completion.ListFields() if f.name.startswith("stop")} == said
        assert reply.completion.text == "abc"  # Held back as the beginning of the stop string, and given out.


async def test_a_stop_token_that_completes_a_stop_string_ends_it_itself_and_its_text_stays(house, tokenizer):
    a, b = encoded(tokenizer, "a")[0], encoded(tokenizer, "b")[0]
    scripted(house, piece([a, b], Finish.STOP))
    (reply,) = await house.generate([[5]], params(stop_strings=["ab"], stop_token_ids=[b]), return_text=True)
    assert (reply.completion.stop_token_id, reply.completion.text) == (b, "ab")


async def test_a_stop_string_that_only_the_end_makes_certain_counts_when_the_length_ended_it(house, tokenizer):
    # The last token is half a character, so the text before it was not certain until nothing could follow.
    half = encoded(tokenizer, "é")[0]
    scripted(house, piece([*encoded(tokenizer, "ab"), half], Finish.LENGTH))
    (reply,) = await house.generate([[5]], params(stop_strings=["b\N{REPLACEMENT CHARACTER}"]), return_text=True)
    assert (reply.completion.text, reply.completion.finish_reason) == ("a", STOP)


async def test_stop_strings_are_not_looked_for_among_the_first_tokens(house, tokenizer):
    ids = encoded(tokenizer, "a.b.c.d")
    scripted(house, *(piece([token]) for token in ids), piece([], Finish.LENGTH))
    asked = params(stop_strings=["."], min_new_tokens=4, max_new_tokens=20)
    (reply,) = await house.generate([[5]], asked, return_text=True)
    assert (reply.completion.text, len(reply.completion.token_ids)) == ("a.b.c", 6)


# Bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"stop_strings": ["x"] * 17}, "stop_strings", "is 17 strings, must be at most 16"),
        ({"stop_strings": ["x", ""]}, "stop_strings", "[1] is 0 characters long, must be 1 to 256 long"),
        ({"stop_strings": ["x" * 257]}, "stop_strings", "[0] is 257 characters long, must be 1 to 256 long"),
        (
            {"stop_strings": ["<eos>"]},
            "stop_strings",
            "[0] is '<eos>', but the special token '<eos>' never stands in the text: give its id, 1, in",
        ),
        (
            {"stop_strings": ["x", "\n<pad>"]},
            "stop_strings",
            "[1] is '\\n<pad>', but the special token '<pad>' never stands in the text: give its id, 0, in",
        ),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids", "is 1025 tokens, must be at most 1024"),
        (
            {"stop_token_ids": range(300), "min_new_tokens": 1},
            "stop_token_ids",
            "is the whole vocabulary and min_new_tokens is 1: no token is left to sample",
        ),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias", "is 1025 tokens, must be at most 1024"),
        ({"logit_bias": {300: 1.0}}, "logit_bias", "is of token 300, must be of one in the vocabulary, [0, 300)"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias", "is of token -1, must be of one in the vocabulary"),
        ({"logit_bias": {7: 101.0}}, "logit_bias", "[7] is 101.0, must be in [-100, 100]"),
        ({"logit_bias": {7: math.nan}}, "logit_bias", "[7] is nan, must be in [-100, 100]"),
        ({"temperature": 0.009}, "temperature", "must be 0 (greedy), or at least 0.01"),
    ],
)
async def test_a_setting_out_of_bounds_refuses_the_request_by_name(house, changes, field, said):
    error = await house.refusal([[5]], params(**changes))
    assert error.code().name == "INVALID_ARGUMENT"
    assert error.details().startswith(f"sampling.{field}")
    assert said in error.details()
    assert house.engine.tasks == []


async def test_what_lies_on_the_bounds_is_taken_and_told_to_the_engine(house):
    stops = [chr(97 + i) * 256 for i in range(16)]
    asked = params(stop_strings=stops, logit_bias={0: -100.0, 299: 100.0}, stop_token_ids=range(299), temperature=0.01)
    assert len(await house.generate([[5]], asked)) == 1
    (told_engine,) = (task.sampling for task in house.engine.tasks)
    assert told_engine.logit_bias == ((0, -100.0), (299, 100.0))
    assert told_engine.temperature == pytest.approx(0.01)
    house.engine.tasks.clear()
    await house.generate([[5]], params(temperature=0.0, top_k=1, top_p=0.1))
    # Greedy takes the likeliest anyway; cut off, its log-probability would be another one.
    assert [(task.sampling.top_k, task.sampling.top_p) for task in house.engine.tasks] == [(0, 1.0)]


async def test_messages_need_a_template_and_at_least_one_turn(house, tokenizer, monkeypatch):
    def messages(*turns: tuple[str, str]) -> common_pb2.Prompt:
        listed = [common_pb2.ChatMessage(role=role, content=content) for role, content in turns]
        return common_pb2.Prompt(messages=common_pb2.ChatMessages(messages=listed))

    conversation = messages(("user", "hello"), ("assistant", "hi"), ("user", "my phone"))
    replies = await house.generate([conversation, messages()])
    by_prompt = {reply.prompt_index: reply for reply in replies}
    rendered = encoded(tokenizer, "user: hello\nassistant: hi\nuser: my phone\nassistant: ")
    assert list(by_prompt[0].completion.prompt_token_ids) == rendered
    assert [task.prompt_ids for task in house.engine.tasks] == [rendered]
    assert by_prompt[1].status.reason == "prompt.messages is empty: give at least one message"
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (reply,) = await house.generate([conversation])
    assert reply.status.code == common_pb2.ITEM_STATUS_CODE_INVALID
    assert reply.status.reason == "prompt is messages, but the model's tokenizer has no chat template: send text"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    (reply,) = await house.generate([conversation])
    assert "the model's chat template refuses the messages of prompt: roles must alternate" in reply.status.reason

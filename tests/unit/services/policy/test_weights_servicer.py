"""Weight updates over the wire: all or nothing, one at a time, whoever leaves and whatever breaks."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from quartet.client.errors import translate
from quartet.client.policy import UPDATE_ACCEPTED, upload
from quartet.common.v1 import common_pb2
from quartet.fingerprint import TensorDigest, weights_fingerprint
from quartet.policy.v1 import weights_pb2, weights_pb2_grpc
from services.policy import weights_servicer
from services.policy.engine import EngineFailedError, InFlight, StillRunningError
from services.policy.hosted import HostedPolicy
from services.policy.staging import Layout, StagedCheckpoint
from services.policy.weights_servicer import WeightsServicer
from services.runtime.telemetry import ServiceMetrics
from tests.unit.services.policy.scripted_engine import ScriptedEngine, until

LAYOUT = Layout(shapes={"embed": (40, 25), "norm": (25,)}, optional=frozenset())
Step = weights_pb2.UpdateWeightsRequest


def tensors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in LAYOUT.shapes.items()}


def begin(version: int, sent: dict[str, Tensor], in_flight: int = weights_pb2.IN_FLIGHT_POLICY_UNSPECIFIED) -> Step:
    specs = [weights_pb2.TensorSpec(name=name, dtype="float32", shape=t.shape) for name, t in sent.items()]
    return Step(begin=weights_pb2.BeginUpdate(weights_version=version, tensors=specs, in_flight=in_flight))


def chunks(sent: dict[str, Tensor], size: int = 1000) -> list[Step]:
    return [
        Step(chunk=weights_pb2.TensorChunk(tensor_index=index, data=data[start : start + size]))
        for index, data in enumerate(t.numpy().tobytes() for t in sent.values())
        for start in range(0, len(data), size)
    ]


def fingerprint_of(sent: dict[str, Tensor]) -> str:
    return weights_fingerprint(
        TensorDigest(
            name=name, dtype="float32", shape=tuple(t.shape), sha256=hashlib.sha256(t.numpy().tobytes()).hexdigest()
        )
        for name, t in sent.items()
    )


def commit(sent: dict[str, Tensor]) -> Step:
    return Step(commit=weights_pb2.CommitUpdate(weights_fingerprint=fingerprint_of(sent)))


def whole(version: int, sent: dict[str, Tensor], **options: int) -> list[Step]:
    return [begin(version, sent, **options), *chunks(sent), commit(sent)]


@dataclass
class House:
    """The servicer on a real server, its engine, and what it left in the staging folder."""

    servicer: WeightsServicer
    engine: ScriptedEngine
    staging: Path
    stub: Any
    stopped: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        return [path.name for path in self.staging.iterdir()]

    async def update(self, steps: Sequence[Step]) -> weights_pb2.UpdateWeightsResponse:
        return await upload(self.stub.UpdateWeights(timeout=20), iter(steps))

    async def refusal(self, steps: Sequence[Step]) -> tuple[grpc.StatusCode, str, str]:
        """Status, message and field of a refused update."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.update(steps)
        typed = translate(refused.value, "")
        assert typed.code is not None
        return typed.code, typed.message, typed.field

    async def serving(self) -> common_pb2.ServedBy:
        return (await self.stub.GetWeightsInfo(weights_pb2.GetWeightsInfoRequest())).served_by

    def counted(self, code: str) -> float:
        labels = {"method": "UpdateWeights", "code": code}
        return self.servicer.metrics.registry.get_sample_value("quartet_policy_calls_total", labels) or 0.0


@pytest.fixture
async def house(serve, tmp_path) -> AsyncIterator[House]:
    """Serves version 3 of some weights, and takes updates of at most 1 MiB."""
    engine, stopped = ScriptedEngine(), []
    served_by = common_pb2.ServedBy(model_id="m", weights_version=3, weights_fingerprint="of version 3")
    servicer = WeightsServicer(
        ServiceMetrics("policy", batches=False),
        staging=tmp_path,
        max_bytes=2**20,
        stop=lambda reason: stopped.append(reason),
    )
    servicer.hosted = HostedPolicy(
        engine=engine, tokenizer=None, model=common_pb2.ModelInfo(served_by=served_by), layout=LAYOUT
    )
    channel = await serve(
        servicer.metrics, lambda server: weights_pb2_grpc.add_WeightsServiceServicer_to_server(servicer, server)
    )
    yield House(servicer, engine, tmp_path, weights_pb2_grpc.WeightsServiceStub(channel), stopped)
    engine.update_gate.set()


async def test_an_update_reaches_the_engine_exactly_and_is_told_of(house):
    sent = tensors(1)
    reply = await house.update(whole(7, sent))
    (applied,) = house.engine.updates
    assert applied.version == 7
    assert {name: t.tolist() for name, t in applied.tensors.items()} == {n: t.tolist() for n, t in sent.items()}
    expected = common_pb2.ServedBy(model_id="m", weights_version=7, weights_fingerprint=fingerprint_of(sent))
    assert reply.served_by == expected == await house.serving()
    assert (reply.received_bytes, reply.pause_seconds) == (4 * (40 * 25 + 25), 0.125)
    assert house.servicer.metrics.registry.get_sample_value("quartet_policy_weights_version") == 7
    assert (house.left, house.stopped) == ([], [])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (weights_pb2.IN_FLIGHT_POLICY_UNSPECIFIED, InFlight.KEEP),
        (weights_pb2.IN_FLIGHT_POLICY_KEEP, InFlight.KEEP),
        (weights_pb2.IN_FLIGHT_POLICY_FINISH, InFlight.FINISH),
        (weights_pb2.IN_FLIGHT_POLICY_ABORT, InFlight.ABORT),
    ],
)
async def test_the_engine_is_told_what_to_do_with_requests_in_flight(house, asked, told):
    await house.update(whole(4, tensors(1), in_flight=asked))
    assert [update.in_flight for update in house.engine.updates] == [told]


async def test_the_version_must_rise(house):
    sent = tensors(1)
    for version in (3, 2, 0, -1):
        assert await house.refusal(whole(version, sent)) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            f"begin.weights_version is {version}, must be greater than 3, which serves now",
            "begin.weights_version",
        )
    await house.update(whole(10, sent))
    assert (await house.refusal(whole(10, sent)))[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert [update.version for update in house.engine.updates] == [10]


@pytest.mark.parametrize(
    ("steps", "said", "wrong"),
    [
        ([chunks(tensors(1))[0]], "step is chunk: an update is one begin, then chunks, then one commit", "step"),
        ([commit(tensors(1))], "step is commit: an update is one begin, then chunks, then one commit", "step"),
        ([begin(4, tensors(1)), begin(5, tensors(1))], "step is begin: an update is one begin, then chunks", "step"),
        ([Step()], "step is not set: an update is one begin", "step"),
        ([begin(4, tensors(1)), Step()], "step is not set: give begin, chunk or commit", "step"),
        ([begin(4, tensors(1), 9), *chunks(tensors(1))], "begin.in_flight is 9, must be one of [0, 1, 2, 3]", ""),
        ([begin(4, {"norm": torch.zeros(25)})], "1 tensors of the served model are missing, such as 'embed'", ""),
        ([begin(4, tensors(1)), chunks(tensors(1))[-1], chunks(tensors(1))[0]], "'embed' has 4000 bytes, only 0", None),
        (
            [begin(4, tensors(1)), *chunks(tensors(1)), chunks(tensors(1))[0]],
            "chunk.tensor_index is 0 after 1",
            "chunk.tensor_index",
        ),
        (
            [begin(4, tensors(1)), *chunks(tensors(1)), chunks(tensors(1))[-1]],
            "'norm' has 100 bytes, 200",
            "chunk.data",
        ),
    ],
)
async def test_wrong_steps_are_refused_and_change_nothing(house, steps, said, wrong):
    # And then goes on sending: the refusal must arrive all the same, and not a broken pipe.
    code, message, wrong_field = await house.refusal([*steps, *chunks(tensors(1)) * 50])
    assert said in message
    if wrong is None:
        assert code is grpc.StatusCode.DATA_LOSS
    else:
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert wrong_field == (wrong or message.partition(" ")[0].rstrip(":"))
    assert (house.left, house.engine.updates) == ([], [])
    assert (await house.serving()).weights_fingerprint == "of version 3"
    await house.update(whole(4, tensors(2)))  # It holds nothing: the next one is taken.


async def test_more_bytes_than_allowed_are_refused_at_begin(house):
    house.servicer.max_bytes = 4099
    code, message, wrong_field = await house.refusal(whole(4, tensors(1)))
    assert (code, wrong_field) == (grpc.StatusCode.INVALID_ARGUMENT, "begin.tensors")
    assert "the tensors have 4100 bytes, at most 4099 are accepted" in message


async def test_a_stream_that_ends_without_its_commit_is_data_loss(house):
    for steps in ([], [begin(4, tensors(1))], [begin(4, tensors(1)), *chunks(tensors(1))]):
        code, message, _ = await house.refusal(steps)
        assert code is grpc.StatusCode.DATA_LOSS
        assert message == "the stream ended before its commit; the old weights go on serving"
    assert (house.left, house.engine.updates) == ([], [])
    await house.update(whole(4, tensors(1)))


async def test_what_arrived_damaged_never_reaches_the_engine(house):
    sent, other = tensors(1), tensors(2)
    code, message, wrong_field = await house.refusal([begin(4, sent), *chunks(sent), commit(other)])
    assert (code, wrong_field) == (grpc.StatusCode.DATA_LOSS, "commit.weights_fingerprint")
    assert fingerprint_of(other)[:16] in message
    assert fingerprint_of(sent)[:16] in message
    code, message, _ = await house.refusal([begin(4, sent), *chunks(sent)[:-1], commit(sent)])
    assert code is grpc.StatusCode.DATA_LOSS
    assert "'norm' has 100 bytes, only 0 came" in message
    assert (house.left, house.engine.updates) == ([], [])
    assert (await house.serving()).weights_version == 3


async def test_begin_is_answered_at_once_so_that_nothing_is_sent_in_vain(house):
    call = house.stub.UpdateWeights()
    await call.write(begin(4, tensors(1)))
    metadata = await asyncio.wait_for(call.initial_metadata(), 5)
    assert metadata[UPDATE_ACCEPTED] == "1"
    assert len(house.left) == 1
    refused = house.stub.UpdateWeights()
    await refused.write(begin(4, tensors(1)))
    assert UPDATE_ACCEPTED not in await asyncio.wait_for(refused.initial_metadata(), 5)
    assert await refused.code() is grpc.StatusCode.ABORTED
    call.cancel()


async def test_a_second_update_at_the_same_time_is_aborted_and_the_first_is_none_the_worse(house):
    first = house.stub.UpdateWeights()
    await first.write(begin(4, tensors(1)))
    await first.initial_metadata()
    expected = (grpc.StatusCode.ABORTED, "another weight update is under way; try again when it is done", "")
    assert await house.refusal(whole(5, tensors(2))) == expected  # While the first one sends ...
    house.engine.update_gate.clear()
    for step in [*chunks(tensors(1)), commit(tensors(1))]:
        await first.write(step)
    await first.done_writing()
    await house.engine.update_begun.wait()
    assert await house.refusal(whole(5, tensors(2))) == expected  # ... and while it is applied.
    house.engine.update_gate.set()
    assert (await first).served_by.weights_version == 4
    assert (await house.update(whole(5, tensors(2)))).served_by.weights_version == 5
    assert [update.version for update in house.engine.updates] == [4, 5]
    assert house.left == []


async def test_a_client_that_leaves_before_its_commit_leaves_the_old_weights_and_nothing_staged(house):
    call = house.stub.UpdateWeights()
    await call.write(begin(4, tensors(1)))
    await call.initial_metadata()
    await call.write(chunks(tensors(1))[0])
    assert len(house.left) == 1
    call.cancel()
    await until(lambda: house.counted("CANCELLED") == 1)
    assert (house.left, house.engine.updates) == ([], [])
    assert (await house.serving()).weights_fingerprint == "of version 3"
    await house.update(whole(4, tensors(2)))


async def test_a_client_that_leaves_after_its_commit_does_not_end_the_update_and_the_next_one_waits_for_it(house):
    house.engine.update_gate.clear()
    call = house.stub.UpdateWeights()
    for step in whole(4, tensors(1)):
        await call.write(step)
    await call.done_writing()
    await house.engine.update_begun.wait()
    call.cancel()
    await until(lambda: house.counted("CANCELLED") == 1)
    # The file is still the engine's, and nothing is said of the new weights before they serve.
    assert len(house.left) == 1
    assert (await house.serving()).weights_version == 3
    assert (await house.refusal(whole(5, tensors(2))))[0] is grpc.StatusCode.ABORTED
    house.engine.update_gate.set()
    await until(lambda: house.left == [])
    (applied,) = house.engine.updates
    assert torch.equal(applied.tensors["embed"], tensors(1)["embed"])
    assert (await house.serving()).weights_fingerprint == fingerprint_of(tensors(1))
    assert (await house.update(whole(5, tensors(2)))).served_by.weights_version == 5
    assert house.stopped == []


async def test_a_client_that_leaves_while_its_folder_is_made_leaves_no_folder(house, monkeypatch):
    begun = []

    class Slow(StagedCheckpoint):
        def __init__(self, *arguments: Any) -> None:
            begun.append(True)
            time.sleep(0.3)
            super().__init__(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(weights_servicer, "StagedCheckpoint", Slow)
        call = house.stub.UpdateWeights()
        await call.write(begin(4, tensors(1)))
        await until(lambda: bool(begun))
        call.cancel()
        await until(lambda: house.counted("CANCELLED") == 1)
        await asyncio.sleep(0.4)
    assert house.left == []
    await house.update(whole(4, tensors(2)))


async def test_a_client_that_leaves_while_a_chunk_is_written_does_not_close_the_file_below_it(house, monkeypatch):
    events = []

    class Slow(StagedCheckpoint):
        def write(self, tensor_index: int, data: bytes) -> None:
            events.append("begun")
            time.sleep(0.3)
            super().write(tensor_index, data)
            events.append("written")

        def __exit__(self, *exception: object) -> None:
            events.append("closed")
            super().__exit__(*exception)

    monkeypatch.setattr(weights_servicer, "StagedCheckpoint", Slow)
    call = house.stub.UpdateWeights()
    await call.write(begin(4, tensors(1)))
    await call.write(chunks(tensors(1))[0])
    await until(lambda: events == ["begun"])
    call.cancel()
    await until(lambda: "closed" in events)
    # A closed descriptor's number may be another file's by the time the bytes are written.
    await asyncio.sleep(0.4)
    assert events == ["begun", "written", "closed"]
    assert house.left == []


async def test_an_engine_that_fails_in_the_middle_ends_the_service(house):
    house.engine.update_error = EngineFailedError("the worker died")
    code, message, _ = await house.refusal(whole(4, tensors(1)))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert message == "the worker died; the service restarts with the weights of its model folder"
    assert house.stopped == ["the worker died"]
    assert house.left == []
    assert (await house.serving()).weights_version == 3


async def test_an_update_that_waits_in_vain_is_a_deadline_and_the_old_weights_go_on_serving(house):
    house.engine.update_error = StillRunningError("requests in flight did not come to rest within 600 s")
    code, message, _ = await house.refusal(whole(7, tensors(1)))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert message == (
        "requests in flight did not come to rest within 600 s (--update-wait-s, or the deadline of the call); "
        "version 3 goes on serving"
    )
    assert 15 < house.engine.update_wait_s < 21  # The call's own deadline, 20 s by gRPC's clock, is the sooner one.
    assert (house.stopped, house.left, (await house.serving()).weights_version) == ([], [], 3)
    house.engine.update_error = None
    house.servicer.wait_s = 5.0
    assert (await house.update(whole(7, tensors(1)))).served_by.weights_version == 7
    assert house.engine.update_wait_s == 5.0


async def test_an_engine_that_fails_after_the_client_left_ends_the_service_too(house):
    house.engine.update_gate.clear()
    call = house.stub.UpdateWeights()
    for step in whole(4, tensors(1)):
        await call.write(step)
    await call.done_writing()
    await house.engine.update_begun.wait()
    call.cancel()
    await until(lambda: house.counted("CANCELLED") == 1)
    house.engine.update_error = EngineFailedError("the worker died")
    house.engine.update_gate.set()
    await until(lambda: house.stopped == ["the worker died"])
    await until(lambda: house.left == [])
    assert (await house.serving()).weights_version == 3


async def test_an_error_nobody_foresaw_is_internal_and_the_next_update_is_taken(house):
    house.engine.update_error = ZeroDivisionError("a secret")
    code, message, _ = await house.refusal(whole(4, tensors(1)))
    assert code is grpc.StatusCode.INTERNAL
    assert "a secret" not in message
    assert (house.left, house.stopped) == ([], [])
    house.engine.update_error = None
    assert (await house.update(whole(4, tensors(1)))).served_by.weights_version == 4


async def test_before_the_policy_is_loaded_nothing_is_taken(house):
    house.servicer.hosted = None
    expected = (grpc.StatusCode.UNAVAILABLE, "the policy is still loading; try again later", "")
    assert await house.refusal(whole(4, tensors(1))) == expected
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.serving()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

"""Whatever is sent to whichever RPC of whichever service: a clear status, never INTERNAL, and the service serves on.

Messages are drawn from the contract's own descriptors: every field of every message, with values at and beyond what is
sensible, alone or over a request that would be served; and bytes that are no message at all. QUARTET_FUZZ_EXAMPLES sets
how many a method gets.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quartet.fingerprint import tokenizer_fingerprint
from quartet.policy.v1 import adapters_pb2, policy_pb2, weights_pb2
from quartet.reference.v1 import reference_pb2
from quartet.reward.v1 import admin_pb2, reward_pb2
from tests.conftest import LiveService

EXAMPLES = int(os.environ.get("QUARTET_FUZZ_EXAMPLES", "60"))
# A random request may ask for work that takes long; that it is given up in time is a right answer.
DEADLINE_S = 20.0
WRONG = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
MOST_GROWTH_MIB = 96

TEXT = st.text(max_size=20) | st.sampled_from(
    ["", " ", "hello", "a" * 3000, "\0", "\u00e9", "\U0001d518", "\u202e", "<eos>", "../..", "/etc/passwd", "user"]
)
FLOATS = st.floats(width=32) | st.sampled_from(
    [0.0, -1.0, 0.5, 1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")]
)


def _integers(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    small = [n for n in (-1, 0, 1, 2, 5, 127, 128, 299, 300, 301) if low <= n <= high]
    return st.sampled_from([*small, low, high]) | st.integers(low, high)


_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXT,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=40),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_FLOAT: FLOATS,
    FieldDescriptor.TYPE_DOUBLE: FLOATS,
    FieldDescriptor.TYPE_ENUM: st.integers(-1, 9),
    FieldDescriptor.TYPE_INT32: _integers(32, signed=True),
    FieldDescriptor.TYPE_INT64: _integers(64, signed=True),
    FieldDescriptor.TYPE_UINT32: _integers(32, signed=False),
    FieldDescriptor.TYPE_UINT64: _integers(64, signed=False),
    FieldDescriptor.TYPE_FIXED64: _integers(64, signed=False),
}


def _fill(draw: st.DrawFn, message: Any, descriptor: Descriptor, depth: int) -> None:
    """Sets some fields of ``message`` at random."""
    for field in descriptor.fields:
        if not draw(st.integers(0, 2)) or depth > 4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = (_SCALARS[f.type] for f in field.message_type.fields)
            for k, v in draw(st.dictionaries(key, value, max_size=3)).items():
                getattr(message, field.name)[k] = v
        elif field.message_type is not None:
            if field.is_repeated:
                for _ in range(draw(st.integers(0, 3))):
                    _fill(draw, getattr(message, field.name).add(), field.message_type, depth + 1)
            else:
                own = getattr(message, field.name)
                own.SetInParent()
                _fill(draw, own, field.message_type, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_SCALARS[field.type], max_size=4)))
        else:
            setattr(message, field.name, draw(_SCALARS[field.type]))


@st.composite
def requests(draw: st.DrawFn, valid: Message) -> bytes:
    """A serialised request: random, random over a valid one, or no message."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=60))
    message = type(valid)()
    if kind > 3:
        message.CopyFrom(valid)
    _fill(draw, message, message.DESCRIPTOR, 0)
    return message.SerializeToString()


@dataclass(frozen=True)
class Method:
    """An RPC, and a request that it would serve or take for the beginning of one; ``admin``: on the admin port."""

    name: str
    valid: Message
    admin: bool = False

    @property
    def path(self) -> str:
        return f"quartet.{self.name}"

    @property
    def service(self) -> str:
        return self.name.partition(".")[0]

    @property
    def streams_requests(self) -> bool:
        return self.path.endswith(("UpdateWeights", "LoadAdapter"))

    @property
    def streams_replies(self) -> bool:
        return self.path.endswith("/Generate")


def _methods(fingerprint: str) -> list[Method]:
    scored = reward_pb2.ScoreRequest(
        tokenizer_fingerprint=fingerprint,
        items=[reward_pb2.ScoreItem(prompt={"text": "hello"}, response_text=" thanks")],
    )
    compared = reward_pb2.CompareRequest(tokenizer_fingerprint=fingerprint)
    item = compared.items.add()
    item.prompt.text = "hello"
    known = reference_pb2.LogProbsRequest(tokenizer_fingerprint=fingerprint)
    known.items.add(token_ids=[5, 6, 7], response_start=1)
    generated = policy_pb2.GenerateRequest(tokenizer_fingerprint=fingerprint)
    generated.prompts.add().text = "hello"
    generated.sampling.max_new_tokens = 4
    update = weights_pb2.UpdateWeightsRequest()
    update.begin.weights_version = 1
    adapter = adapters_pb2.LoadAdapterRequest()
    adapter.begin.name = "a"
    return [
        Method("reward.v1.RewardService/Score", scored),
        Method("reward.v1.RewardService/Compare", compared),
        Method("reward.v1.RewardService/GetModelInfo", reward_pb2.GetModelInfoRequest()),
        Method("reward.v1.RewardAdminService/SwapModel", admin_pb2.SwapModelRequest(), True),
        Method("reward.v1.RewardAdminService/GetDrift", admin_pb2.GetDriftRequest(), True),
        Method("reference.v1.ReferenceService/LogProbs", known),
        Method("reference.v1.ReferenceService/GetModelInfo", reference_pb2.GetModelInfoRequest()),
        Method("policy.v1.PolicyService/Generate", generated),
        Method("policy.v1.PolicyService/GetModelInfo", policy_pb2.GetModelInfoRequest()),
        Method("policy.v1.WeightsService/UpdateWeights", update, True),
        Method("policy.v1.WeightsService/GetWeightsInfo", weights_pb2.GetWeightsInfoRequest(), True),
        Method("policy.v1.AdapterService/LoadAdapter", adapter, True),
        Method("policy.v1.AdapterService/UnloadAdapter", adapters_pb2.UnloadAdapterRequest(), True),
        Method("policy.v1.AdapterService/ListAdapters", adapters_pb2.ListAdaptersRequest(), True),
    ]


PATHS = [method.path for method in _methods("")]


@pytest.fixture(scope="module")
def live(start_service, make_reward_model, make_policy, tmp_path_factory) -> dict[str, LiveService]:
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(make_reward_model(), models / "a")
    return {
        "reward": start_service("reward", models / "a", "--models-dir", str(models)),
        "reference": start_service("reference", make_policy()),
        "policy": start_service("policy", make_policy(), "--engine", "transformers", "--max-adapters", "2"),
    }


def _caller(channel: grpc.Channel, method: Method) -> Callable[[list[bytes]], grpc.StatusCode]:
    """Sends serialised requests and returns the status."""
    path = f"/{method.path}"
    if method.streams_requests:
        stream = channel.stream_unary(path)
        send: Callable[[list[bytes]], Any] = lambda messages: stream(iter(messages), timeout=DEADLINE_S)  # noqa: E731
    elif method.streams_replies:
        replies = channel.unary_stream(path)
        send = lambda messages: list(replies(messages[0], timeout=DEADLINE_S))  # noqa: E731
    else:
        unary = channel.unary_unary(path)
        send = lambda messages: unary(messages[0], timeout=DEADLINE_S)  # noqa: E731

    def call(messages: list[bytes]) -> grpc.StatusCode:
        try:
            send(messages)
        except grpc.RpcError as error:
            refused: Any = error
            if refused.code() in WRONG:
                raise
            return refused.code()
        return grpc.StatusCode.OK

    return call


@pytest.fixture
def method(request, tokenizer) -> Method:
    return next(m for m in _methods(tokenizer_fingerprint(tokenizer)) if m.path == request.param)


@pytest.fixture
def call(live, method) -> Iterator[Callable[[list[bytes]], grpc.StatusCode]]:
    service = live[method.service]
    with grpc.insecure_channel(service.admin_address if method.admin else service.address) as channel:
        yield _caller(channel, method)


@pytest.mark.parametrize("method", PATHS, indirect=True)
def test_whatever_is_sent_gets_a_clear_status_and_the_service_serves_on(live, method, call):
    process = psutil.Process(live[method.service].process.pid)
    seen: Counter[str] = Counter()
    sizes_mib: list[float] = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(messages=st.lists(requests(method.valid), min_size=1, max_size=4 if method.streams_requests else 1))
    def attack(messages: list[bytes]) -> None:
        seen[call(messages).name] += 1
        sizes_mib.append(process.memory_info().rss / 2**20)

    attack()
    assert process.is_running()
    assert sizes_mib[-1] - sizes_mib[len(sizes_mib) // 5] < MOST_GROWTH_MIB
    if method.path.endswith(("Info", "ListAdapters", "GetDrift")):
        assert call([method.valid.SerializeToString()]) is grpc.StatusCode.OK
    else:
        assert seen["INVALID_ARGUMENT"]


def test_after_all_of_it_every_service_does_its_work(live, tokenizer):
    for method in _methods(tokenizer_fingerprint(tokenizer)):
        if method.path.endswith(("/Score", "/LogProbs", "/Generate")):
            with grpc.insecure_channel(live[method.service].address) as channel:
                assert _caller(channel, method)([method.valid.SerializeToString()]) is grpc.StatusCode.OK
    for service in live.values():
        assert '"level": "error"' not in service.log.read_text()
        assert service.stop() == 0

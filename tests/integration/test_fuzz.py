"""Whatever is sent to whichever RPC of whichever service: a clear status, never INTERNAL, and the service serves on.

Messages are drawn from the contract's own descriptors: every field of every message, with values at and beyond what is
sensible, alone or over a request that would be served; thousands of items or ids, long texts and names; whole uploads
with steps changed, left out, doubled and swapped; and bytes that are no message at all. With them come strange headers
(request ids, tokens that nobody asked for, traces, bytes, more than is taken), and deadlines, which alone may pass.
Health and reflection are asked as well. QUARTET_FUZZ_EXAMPLES sets how many a method gets.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quartet.client.adapters import _file_tensors, _load_steps, read_adapter
from quartet.client.policy import _update_steps
from quartet.fingerprint import tokenizer_fingerprint
from quartet.policy.v1 import adapters_pb2, adapters_pb2_grpc, policy_pb2, weights_pb2, weights_pb2_grpc
from quartet.reference.v1 import reference_pb2
from quartet.reward.v1 import admin_pb2, reward_pb2
from tests.conftest import LiveService
from tests.lora import make_lora

EXAMPLES = int(os.environ.get("QUARTET_FUZZ_EXAMPLES", "100"))
# No answer takes as long, on the slowest machine: what runs into it hangs.
DEADLINE_S = 240.0
WRONG = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
MOST_GROWTH_MIB = 96
# No overload, which passes: somebody has to do something first.
FULL = ("unload one first", "--staging-dir", "could not be staged")
# gRPC takes no more headers, and from half of it on by chance not all; see _size_bytes.
MOST_HEADERS_BYTES = 16 * 1024
# Of items and ids in a message, and of repetitions of a text.
MANY = 1500

TEXT = st.text(max_size=20) | st.sampled_from(
    ["", " ", "hello", "a" * 3000, "\0", "\u00e9", "\U0001d518", "\u202e", "<eos>", "../..", "/etc/passwd", "user"]
)
FLOATS = st.floats(width=32) | st.sampled_from(
    [0.0, -1.0, 0.5, 1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")]
)


# gRPC itself reads those that begin with "grpc-".
HEADERS = st.tuples(
    st.sampled_from(["quartet-request-id", "authorization", "traceparent", "tracestate", "baggage", "x.strange_-0"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)
    | st.sampled_from(
        ["", " ", ",", "Bearer", "Bearer ", "Bearer " + "x" * 3000, "Basic =", "%00%0A", "a" * 3000, '"\\', "00-1-1-1"]
    ),
) | st.tuples(
    st.sampled_from(["strange-bin", "quartet-request-id-bin", "authorization-bin"]),
    st.binary(max_size=200) | st.sampled_from([b"\0" * 3000, bytes(range(256))]),
)
METADATA = st.just([]) | st.lists(HEADERS, max_size=4) | st.lists(HEADERS, max_size=2).map(lambda some: some * 100)
DEADLINES_S = st.none() | st.none() | st.none() | st.floats(0.0, 0.5)


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


def _fill(draw: st.DrawFn, message: Any, descriptor: Descriptor, depth: int, large: str) -> None:
    """Sets some fields of ``message`` at random; ``large``: what there is much of, items, ids or text."""
    for field in descriptor.fields:
        if draw(st.integers(0, 2)) and depth <= 4:
            _fill_field(draw, message, field, depth, large)


def _fill_field(draw: st.DrawFn, message: Any, field: FieldDescriptor, depth: int = 0, large: str = "") -> None:
    """Sets one field."""

    def scalar(field: FieldDescriptor) -> Any:
        value = draw(_SCALARS[field.type])
        return value * MANY if large == "text" and isinstance(value, str | bytes) else value

    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        for _ in range(draw(st.integers(0, 3))):
            getattr(message, field.name)[scalar(key)] = scalar(value)
    elif field.message_type is not None:
        if field.is_repeated:
            own = getattr(message, field.name)
            for _ in range(draw(st.integers(0, 3))):
                _fill(draw, own.add(), field.message_type, depth + 1, large)
            if large == "items" and depth == 0 and own:
                own.extend([own[0]] * MANY)
        else:
            own = getattr(message, field.name)
            own.SetInParent()
            _fill(draw, own, field.message_type, depth + 1, large)
    elif field.is_repeated:
        values = [scalar(field) for _ in range(draw(st.integers(0, 4)))]
        getattr(message, field.name).extend(values * (MANY if large == "ids" else 1))
    else:
        setattr(message, field.name, scalar(field))


@st.composite
def requests(draw: st.DrawFn, valid: Message) -> bytes:
    """A serialised request: random, random over a valid one, or no message."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=60))
    message = type(valid)()
    if kind > 3:
        message.CopyFrom(valid)
    large = draw(st.sampled_from(["", "", "", "", "items", "ids", "text"]))
    _fill(draw, message, message.DESCRIPTOR, 0, large)
    return message.SerializeToString()


@st.composite
def uploads(draw: st.DrawFn, valid: Sequence[Message]) -> list[bytes]:
    """The messages of a stream: of a whole one with something wrong, or any."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.lists(requests(valid[0]), min_size=1, max_size=4))
    messages = [message.SerializeToString() for message in valid]
    for _ in range(draw(st.integers(0, 3))):
        one, other = (draw(st.integers(0, len(messages) - 1)) for _ in range(2))
        match draw(st.sampled_from(["change", "change", "leave out", "double", "swap", "end"])):
            case "change":
                messages[one] = draw(requests(valid[min(one, len(valid) - 1)]))
            case "leave out" if len(messages) > 1:
                del messages[one]
            case "double":
                messages.insert(one, messages[one])
            case "swap":
                messages[one], messages[other] = messages[other], messages[one]
            case "end":
                messages = messages[: one + 1]
    return messages


@dataclass(frozen=True)
class Method:
    """An RPC, and the messages of a call that it would serve; ``admin``: on the admin port."""

    path: str
    valid: Sequence[Message]
    admin: bool = False

    @property
    def service(self) -> str:
        """Whose process is asked; of what all have, the reward service's."""
        return self.path.split(".")[1] if self.path.startswith("quartet.") else "reward"

    @property
    def streams_requests(self) -> bool:
        return self.path.endswith(("UpdateWeights", "LoadAdapter", "ServerReflectionInfo"))

    @property
    def streams_replies(self) -> bool:
        return self.path.endswith(("/Generate", "/Watch"))

    def calls(self) -> st.SearchStrategy[list[bytes]]:
        if self.streams_requests:
            return uploads(self.valid)
        return st.lists(requests(self.valid[0]), min_size=1, max_size=1)


def _methods(fingerprint: str, weights: Sequence[Message] = (), adapter: Sequence[Message] = ()) -> list[Method]:
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
    health = health_pb2.HealthCheckRequest(service="quartet.reward.v1.RewardService")
    listed = reflection_pb2.ServerReflectionRequest(list_services="")
    named = reflection_pb2.ServerReflectionRequest(file_containing_symbol="quartet.reward.v1.RewardService")
    return [
        Method("quartet.reward.v1.RewardService/Score", [scored]),
        Method("quartet.reward.v1.RewardService/Compare", [compared]),
        Method("quartet.reward.v1.RewardService/GetModelInfo", [reward_pb2.GetModelInfoRequest()]),
        Method("quartet.reward.v1.RewardAdminService/SwapModel", [admin_pb2.SwapModelRequest(model="a")], True),
        Method("quartet.reward.v1.RewardAdminService/GetDrift", [admin_pb2.GetDriftRequest()], True),
        Method("quartet.reference.v1.ReferenceService/LogProbs", [known]),
        Method("quartet.reference.v1.ReferenceService/GetModelInfo", [reference_pb2.GetModelInfoRequest()]),
        Method("quartet.policy.v1.PolicyService/Generate", [generated]),
        Method("quartet.policy.v1.PolicyService/GetModelInfo", [policy_pb2.GetModelInfoRequest()]),
        Method("quartet.policy.v1.WeightsService/UpdateWeights", weights, True),
        Method("quartet.policy.v1.WeightsService/GetWeightsInfo", [weights_pb2.GetWeightsInfoRequest()], True),
        Method("quartet.policy.v1.AdapterService/LoadAdapter", adapter, True),
        Method("quartet.policy.v1.AdapterService/UnloadAdapter", [adapters_pb2.UnloadAdapterRequest(name="a")], True),
        Method("quartet.policy.v1.AdapterService/ListAdapters", [adapters_pb2.ListAdaptersRequest()], True),
        Method("grpc.health.v1.Health/Check", [health]),
        Method("grpc.health.v1.Health/Watch", [health]),
        Method("grpc.health.v1.Health/List", [health_pb2.HealthListRequest()]),
        Method(f"{reflection.SERVICE_NAME}/ServerReflectionInfo", [listed, named]),
    ]


PATHS = [method.path for method in _methods("")]


@pytest.fixture(scope="module")
def live(start_service, make_reward_model, make_policy, tmp_path_factory) -> dict[str, LiveService]:
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(make_reward_model(), models / "a")
    return {
        "reward": start_service("reward", models / "a", "--models-dir", str(models), "--reflection"),
        "reference": start_service("reference", make_policy()),
        # As much as is generated long before DEADLINE_S, and more is refused.
        "policy": start_service(
            *("policy", make_policy(), "--engine", "transformers", "--max-adapters", "2"),
            *("--max-queued-tokens", "50000"),
        ),
    }


def _next_version(channel: grpc.Channel, messages: list[bytes]) -> list[bytes]:
    """Version 1 stands for the one after that which serves: else one success would end all that follow at once."""
    info = weights_pb2_grpc.WeightsServiceStub(channel).GetWeightsInfo(weights_pb2.GetWeightsInfoRequest())
    with contextlib.suppress(DecodeError):
        first = weights_pb2.UpdateWeightsRequest.FromString(messages[0])
        if first.begin.weights_version == 1 and info.served_by.weights_version < 2**62:
            first.begin.weights_version = info.served_by.weights_version + 1
            return [first.SerializeToString(), *messages[1:]]
    return messages


def _make_room(channel: grpc.Channel, messages: list[bytes]) -> list[bytes]:
    """For the same reason no adapter is loaded yet."""
    stub = adapters_pb2_grpc.AdapterServiceStub(channel)
    for loaded in stub.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters:
        stub.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=loaded.name))
    return messages


def _open(address: str) -> grpc.Channel:
    """Takes replies of any size: reflection sends back what it was asked, which may be longer than clients take."""
    return grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])


Call = Callable[..., grpc.StatusCode]
"""Of serialised requests, ``metadata`` and ``deadline_s``, None for none."""


def _size_bytes(metadata: Sequence[tuple[str, str | bytes]]) -> int:
    """Of headers as HTTP/2 counts them, those that gRPC adds included, of which there are less than 700 bytes."""
    sizes = (len(name) + 32 + len(value) * (4 / 3 if isinstance(value, bytes) else 1) for name, value in metadata)
    return 700 + int(sum(sizes))


def _caller(channel: grpc.Channel, method: Method) -> Call:
    """Sends serialised requests and returns the status."""
    path = f"/{method.path}"
    if method.path.endswith("/ServerReflectionInfo"):
        both = channel.stream_stream(path)
        send: Callable[..., Any] = lambda messages, **options: list(both(iter(messages), **options))  # noqa: E731
    elif method.streams_requests:
        stream = channel.stream_unary(path)
        prepare = _next_version if method.path.endswith("UpdateWeights") else _make_room
        send = lambda messages, **options: stream(iter(prepare(channel, messages)), **options)  # noqa: E731
    elif method.path.endswith("/Watch"):
        statuses = channel.unary_stream(path)

        def send(messages: list[bytes], **options: Any) -> Any:
            watch = statuses(messages[0], **options)
            next(watch)  # It never ends by itself.
            watch.cancel()

    elif method.streams_replies:
        replies = channel.unary_stream(path)
        send = lambda messages, **options: list(replies(messages[0], **options))  # noqa: E731
    else:
        unary = channel.unary_unary(path)
        send = lambda messages, **options: unary(messages[0], **options)  # noqa: E731

    def call(
        messages: list[bytes], metadata: Sequence[tuple[str, str | bytes]] = (), deadline_s: float | None = None
    ) -> grpc.StatusCode:
        try:
            send(messages, metadata=metadata, timeout=DEADLINE_S if deadline_s is None else deadline_s)
        except grpc.RpcError as error:
            refused: Any = error
            if refused.code() in WRONG:
                raise
            if refused.code() is grpc.StatusCode.DEADLINE_EXCEEDED and deadline_s is None:
                raise
            if refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and _size_bytes(metadata) > MOST_HEADERS_BYTES / 2:
                return refused.code()  # gRPC's own word, with or without a reason; the service has not seen the call.
            if refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not any(x in refused.details() for x in FULL):
                assert "grpc-retry-pushback-ms" in dict(refused.trailing_metadata())
            assert len(refused.details().encode()) <= 1024
            return refused.code()
        return grpc.StatusCode.OK

    return call


@pytest.fixture(scope="module")
def methods(tokenizer, make_policy, tmp_path_factory) -> list[Method]:
    folder = make_policy()
    weights = _update_steps(_file_tensors((folder / "model.safetensors").read_bytes()), 1, None, "keep")
    config, tensors = read_adapter(make_lora(folder, 1).save(tmp_path_factory.mktemp("adapter")))
    return _methods(tokenizer_fingerprint(tokenizer), list(weights), list(_load_steps("a", config, tensors)))


@pytest.fixture
def method(request, methods) -> Method:
    return next(m for m in methods if m.path == request.param)


@pytest.fixture
def call(live, method) -> Iterator[Call]:
    service = live[method.service]
    with _open(service.admin_address if method.admin else service.address) as channel:
        yield _caller(channel, method)


@pytest.mark.parametrize("method", PATHS, indirect=True)
def test_whatever_is_sent_gets_a_clear_status_and_the_service_serves_on(live, method, call):
    process = psutil.Process(live[method.service].process.pid)
    seen: Counter[str] = Counter()
    sizes_mib: list[float] = []

    @settings(
        # A swap that succeeds loads a model.
        max_examples=max(1, EXAMPLES // 5) if method.path.endswith("/SwapModel") else EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(messages=method.calls(), metadata=METADATA, deadline_s=DEADLINES_S)
    def attack(messages: list[bytes], metadata: list[tuple[str, str | bytes]], deadline_s: float | None) -> None:
        seen[call(messages, metadata, deadline_s).name] += 1
        sizes_mib.append(process.memory_info().rss / 2**20)

    attack()
    assert process.is_running()
    assert sizes_mib[-1] - sizes_mib[len(sizes_mib) // 5] < MOST_GROWTH_MIB
    asks_nothing = method.path.endswith(("Info", "ListAdapters", "GetDrift", "/List"))
    if asks_nothing or method.streams_requests or method.path.endswith(("/Check", "/Watch")):
        assert call([message.SerializeToString() for message in method.valid]) is grpc.StatusCode.OK
    if not asks_nothing:
        assert seen["INVALID_ARGUMENT"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_whatever_sampling_is_asked_of_vllm_gets_a_clear_status_and_it_serves_on(start_service, make_policy, tokenizer):
    """What the service lets through, vLLM takes; only requests that are right in all else come so far."""
    service = start_service("policy", make_policy(), "--engine", "vllm", "--log-level", "warning", timeout_s=240)
    (method,) = (m for m in _methods(tokenizer_fingerprint(tokenizer)) if m.path.endswith("PolicyService/Generate"))
    seen: Counter[str] = Counter()

    @st.composite
    def sampled(draw: st.DrawFn) -> list[bytes]:
        request = policy_pb2.GenerateRequest()
        request.CopyFrom(method.valid[0])
        for field in policy_pb2.SamplingParams.DESCRIPTOR.fields:
            # One or two at a time: of all at once one is always refused before it gets to the engine.
            if draw(st.integers(0, 9)) == 0:
                part = policy_pb2.SamplingParams()
                _fill_field(draw, part, field)
                request.sampling.MergeFrom(part)
        return [request.SerializeToString()]

    with _open(service.address) as channel:
        call = _caller(channel, method)

        @settings(
            max_examples=2 * EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        )
        @given(messages=sampled())
        def attack(messages: list[bytes]) -> None:
            seen[call(messages).name] += 1

        attack()
        assert seen["OK"] > EXAMPLES / 5
        assert seen["INVALID_ARGUMENT"]
        assert call([method.valid[0].SerializeToString()]) is grpc.StatusCode.OK
    assert '"level": "error"' not in service.log.read_text()
    assert service.stop() == 0


def test_after_all_of_it_every_service_does_its_work(live, methods):
    for method in methods:
        if method.path.endswith(("/Score", "/LogProbs", "/Generate")):
            with _open(live[method.service].address) as channel:
                assert _caller(channel, method)([method.valid[0].SerializeToString()]) is grpc.StatusCode.OK
    for service in live.values():
        assert '"level": "error"' not in service.log.read_text()
        assert service.stop() == 0

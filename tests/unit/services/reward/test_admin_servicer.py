"""Swaps of scripted models on a real server: who answers what, what is refused, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from quartet.client.errors import translate
from quartet.common.v1 import common_pb2
from quartet.reward.v1 import admin_pb2, admin_pb2_grpc, reward_pb2, reward_pb2_grpc
from services.hosting import memory
from services.reward.admin_servicer import RewardAdminServicer
from services.reward.combining import Combination, Member, Statistics
from services.reward.config import RewardSettings
from services.reward.drift import Baseline, compare
from services.reward.panel import Panel
from services.reward.score_watch import ScoreWatch
from services.reward.scorer import Encoding, ScorerItem
from services.reward.servicer import HostedReward, RewardServicer
from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.errors import StartError
from services.runtime.telemetry import ServiceMetrics

LIMITS = BatchLimits(max_batch_tokens=1000, max_batch_items=5, max_queued_tokens=100_000)
NAMES = ("one", "two", "three")


@dataclass(eq=False)
class ScriptedModel:
    """Scores every text by the number of the model; ``gate`` holds its thread up, ``reading`` its tokenizer."""

    number: int
    gate: threading.Event = field(default_factory=threading.Event)
    reading: threading.Event = field(default_factory=threading.Event)
    vocab_size: int = 300
    max_sequence_tokens: int = 100
    chat_template: str | None = None

    def __post_init__(self) -> None:
        self.gate.set()
        self.reading.set()

    def score(self, items: Sequence[ScorerItem]) -> list[list[float]]:
        self.gate.wait(10)
        return [[float(self.number)]] * len(items)

    def __call__(self, text: str, **_: Any) -> Any:
        self.reading.wait(10)
        return type("Encoded", (), {"input_ids": [5] * len(text)})()


@dataclass
class House:
    """The two servicers on a real server, and the models that were made."""

    reward: RewardServicer
    admin: RewardAdminServicer
    scores: Any
    swaps: Any
    made: list[weakref.ref[ScriptedModel]] = field(default_factory=list)
    loads: Callable[[str], None] = lambda model: None
    baseline: Baseline | str = "none kept"

    def load(self, settings: RewardSettings) -> HostedReward:
        self.loads(settings.model)
        model = ScriptedModel(number=1 + NAMES.index(Path(settings.model).name))
        self.made.append(weakref.ref(model))
        panel = Panel([model])
        statistics = Statistics(mean=0.0, std=2.0, count=10) if model.number == 2 else None
        return HostedReward(
            panel=panel,
            encoding=Encoding(pair=False, end_token_id=1),
            tokenizer=model,
            model=common_pb2.ModelInfo(served_by=common_pb2.ServedBy(model_id=settings.model), vocab_size=300),
            combination=Combination(members=(Member(statistics=statistics),)),
            batcher=Batcher(panel, limits=LIMITS, metrics=self.reward.metrics),
            baseline=self.baseline,
        )

    @property
    def serving(self) -> ScriptedModel:
        assert self.reward.hosted is not None
        return self.reward.hosted.panel.members[0]  # type: ignore[return-value]

    @property
    def version(self) -> int:
        assert self.reward.hosted is not None
        return self.reward.hosted.model.served_by.weights_version

    def living(self) -> int:
        gc.collect()
        return sum(made() is not None for made in self.made)

    async def score(self, count: int = 3) -> tuple[set[float], int]:
        """The scores of one request, and the version that it names."""
        item = reward_pb2.ScoreItem(prompt=common_pb2.Prompt(text="hello"), response_text="there")
        reply = await self.scores.Score(reward_pb2.ScoreRequest(items=[item] * count), timeout=20)
        assert len(reply.results) == count
        return {result.score for result in reply.results}, reply.served_by.weights_version

    def swap(self, model: str, timeout: float = 20) -> Any:
        return self.swaps.SwapModel(admin_pb2.SwapModelRequest(model=model), timeout=timeout)

    async def refusal(self, call: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        return refused.value.code(), translate(refused.value, "").message

    async def settled(self) -> None:
        """Until the former models are gone."""
        await until(lambda: not self.admin.loading and (self.admin._retiring is None or self.admin._retiring.done()))


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "did not come to pass in time"
        await asyncio.sleep(0.01)


def model_threads() -> int:
    return sum(thread.name == "model" for thread in threading.enumerate())


@pytest.fixture
def models(tmp_path: Path, make_reward_model: Callable[..., Path]) -> Path:
    source = make_reward_model()
    for name in NAMES:
        shutil.copytree(source, tmp_path / name)
    return tmp_path


@pytest.fixture
async def house(serve, models) -> AsyncIterator[House]:
    before = model_threads()
    flags = ["--model", str(models / "one"), "--models-dir", str(models)]
    metrics = ServiceMetrics("reward")
    reward = RewardServicer(metrics, ScoreWatch(metrics, window=200, every=100))
    holder: list[House] = []
    admin = RewardAdminServicer(
        reward, RewardSettings.from_command_line(flags), load=lambda settings: holder[0].load(settings)
    )

    def add(server: grpc.aio.Server) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(reward, server)
        admin_pb2_grpc.add_RewardAdminServiceServicer_to_server(admin, server)

    channel = await serve(metrics, add)
    house = House(
        reward, admin, reward_pb2_grpc.RewardServiceStub(channel), admin_pb2_grpc.RewardAdminServiceStub(channel)
    )
    holder.append(house)
    reward.host(house.load(admin.settings))
    yield house
    await admin.close()
    assert model_threads() == before


async def test_a_swap_says_what_serves_now_and_what_served_before(house, models):
    assert await house.score() == ({1.0}, 0)
    reply = await house.swap("two")
    assert (reply.model.served_by.weights_version, reply.replaced.weights_version) == (1, 0)
    assert reply.model.served_by.model_id == str(models / "two")
    assert reply.replaced.model_id == str(models / "one")
    assert (reply.normalisation.std, reply.normalisation.count) == (2.0, 10)
    assert await house.score() == ({2.0}, 1)
    assert house.reward.metrics.registry.get_sample_value("quartet_reward_weights_version") == 1
    third = await house.swap("three")
    assert not third.HasField("normalisation")
    assert await house.score() == ({3.0}, 2)


async def test_requests_in_hand_are_answered_by_the_model_they_began_with_wherever_they_are(house):
    first = house.serving
    first.reading.clear()
    read = asyncio.create_task(house.score())  # With the tokenizer.
    first.gate.clear()
    await until(lambda: house.reward.hosted.batcher.admission.holds == 1)
    await house.swap("two")
    assert await house.score() == ({2.0}, 1)
    assert not house.admin._retiring.done()
    # What waits shows for both models together.
    value = house.reward.metrics.registry.get_sample_value
    assert value("quartet_reward_held_bytes") > 0
    first.reading.set()
    await until(lambda: value("quartet_reward_queue_items") or value("quartet_reward_calls_in_flight") == 1)
    await asyncio.sleep(0.1)
    assert not read.done()  # Now in the model's thread.
    first.gate.set()
    assert await read == ({1.0}, 0)
    await house.settled()
    del first, read
    assert house.living() == 1
    assert value("quartet_reward_held_bytes") == 0


async def test_there_are_never_three_models_a_swap_waits_for_the_last_answer_of_the_former_one(house):
    first = house.serving
    first.gate.clear()
    slow = asyncio.create_task(house.score())
    await until(lambda: house.reward.hosted.batcher.admission.holds == 1)
    await house.swap("two")
    third = house.swap("three")
    await asyncio.sleep(0.3)
    assert not third.done()
    assert len(house.made) == 2
    first.gate.set()
    assert (await third).model.served_by.weights_version == 2
    assert await slow == ({1.0}, 0)


async def test_clients_that_leave_at_any_moment_leave_one_whole_model_and_nothing_else(house, monkeypatch):
    """Races of a cancelled call with a model that is just being taken: hundreds of them."""
    monkeypatch.setattr(memory, "release", lambda: None)  # It takes far longer than all the rest of a swap here.
    threads = model_threads()
    draw = random.Random(0)
    for number in range(400):
        before = house.version
        call = house.swap(NAMES[number % 3])
        await asyncio.sleep(draw.uniform(0, 0.01))
        call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            pass
        except grpc.aio.AioRpcError as error:  # The one before was given up and is still ending.
            assert error.code() is grpc.StatusCode.ABORTED  # noqa: PT017
        await house.settled()
        assert house.version - before in (0, 1, 2)  # The one before may have been taken only now.
        scores, version = await house.score()
        assert scores == {float(house.serving.number)}
        assert version == house.version
    assert 0 < house.version < 400  # Some were taken and some were not: the race was run.
    await house.settled()
    assert house.living() == 1
    assert model_threads() == threads


async def test_a_model_that_cannot_be_hosted_is_refused_with_the_reason(house, models):
    goes_on = "; the model that served goes on serving"
    for error, reason in (
        (StartError("its head is missing"), f"its head is missing{goes_on}"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "RuntimeError: DefaultCPUAllocator: can't"),
        (MemoryError(), "MemoryError: "),
    ):

        def fail(model: str, error: BaseException = error) -> None:
            raise error

        house.loads = fail
        code, said = await house.refusal(house.swap("two"))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert reason in said
        assert said.endswith(goes_on)
        assert await house.score() == ({1.0}, 0)
    # What nobody foresaw is our fault, and changes as little.
    house.loads = lambda model: {}[model]
    assert (await house.refusal(house.swap("two")))[0] is grpc.StatusCode.INTERNAL
    house.loads = lambda model: None
    assert (await house.swap("two")).model.served_by.weights_version == 1


async def test_an_endless_reason_still_reaches_the_client(house):
    def fail(model: str) -> None:
        raise StartError("x" * 100_000)

    house.loads = fail
    code, said = await house.refusal(house.swap("two"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "xxx...; the model that served goes on serving" in said


async def test_without_memory_for_both_models_it_is_refused_before_it_is_loaded(house, monkeypatch, models):
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 1000)
    code, said = await house.refusal(house.swap("two"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "GiB beside those that serve, and 0.00 GiB are free: both are in memory during a swap" in said
    assert len(house.made) == 1


async def test_a_service_that_ends_gives_a_swap_up(house):
    begun, gate = threading.Event(), threading.Event()

    def slow(model: str) -> None:
        begun.set()
        gate.wait(10)

    house.loads = slow
    call = asyncio.create_task(house.refusal(house.swap("two")))
    await until(begun.is_set)
    house.admin.give_up()
    said = (grpc.StatusCode.UNAVAILABLE, "the service is ending; the model was not swapped")
    assert await call == said
    assert house.admin.loading
    assert await house.refusal(house.swap("two")) == said
    gate.set()
    await house.settled()
    assert house.version == 0


async def test_before_the_first_model_is_loaded_there_is_nothing_to_swap(house):
    hosted, house.reward.hosted = house.reward.hosted, None
    assert (await house.refusal(house.swap("two")))[0] is grpc.StatusCode.UNAVAILABLE
    drift = house.swaps.GetDrift(admin_pb2.GetDriftRequest())
    assert (await house.refusal(drift))[0] is grpc.StatusCode.UNAVAILABLE
    house.reward.hosted = hosted


async def test_drift_is_reported_with_the_figures_of_the_comparison(house):
    reply = await house.swaps.GetDrift(admin_pb2.GetDriftRequest())
    assert reply.window == admin_pb2.ScoreWindow()
    assert reply.not_compared == "none kept"
    house.baseline = Baseline(np.random.default_rng(0).normal(2.1, 0.5, 400))
    await house.swap("two")
    for _ in range(10):
        await house.score(10)
    await until(lambda: house.reward.watch.state().drift is not None)
    reply = await house.swaps.GetDrift(admin_pb2.GetDriftRequest())
    expected = compare(house.baseline, np.full(100, 2.0), alpha=0.01)
    assert expected.drifted
    report = reply.report
    assert (report.drifted, report.alpha, report.score_count, report.baseline_count) == (True, 0.01, 100, 400)
    assert (report.p_value, report.psi, report.psi_p_value) == (expected.p, expected.psi, expected.psi_p)
    assert (report.ks, report.ks_p_value, report.z, report.z_p_value) == (
        expected.ks,
        expected.ks_p,
        expected.z,
        expected.z_p,
    )
    assert report.shift_stds == expected.shift_stds
    assert abs(time.time_ns() - report.compared_unix_ns) < 60e9
    assert (reply.window.score_count, reply.window.mean, reply.window.std) == (100, 2.0, 0.0)
    assert (reply.served_by.weights_version, reply.not_compared) == (1, "")


def test_a_models_dir_that_is_none_is_refused_at_the_start(tmp_path):
    settings = RewardSettings.from_command_line(["--model", "m", "--models-dir", str(tmp_path / "nothing")])
    with pytest.raises(StartError, match=r"--models-dir is '.*nothing': there is no such folder"):
        RewardAdminServicer(None, settings, load=lambda settings: None)  # type: ignore[arg-type, return-value]

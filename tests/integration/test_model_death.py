"""A service whose model is dead ends with exit code 1, so that a supervisor starts it anew."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal

import grpc
import psutil
import pytest

from quartet.client import CallPolicy, PolicyClient, Sampling, UnavailableError
from quartet.common.v1 import common_pb2
from quartet.fingerprint import tokenizer_fingerprint
from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.runtime.batcher import MOST_FAILURES

RETRYABLE = common_pb2.ITEM_STATUS_CODE_RETRYABLE

# Python runs it before the service: from when the file is there, every batch ends as the file says.
BREAKS = """
import os
import threading
from services.runtime import batcher

plain = batcher.Batcher.__init__

def init(self, process, **others):
    def breaks(items):
        if os.path.exists({path!r}):
            how = open({path!r}).read()
            if how == "hang":
                threading.Event().wait()
            raise {{"exit": SystemExit, "gpu": RuntimeError}}[how]("illegal memory access")
        return process(items)
    plain(self, breaks, **others)

batcher.Batcher.__init__ = init
"""


@pytest.mark.parametrize(("name", "how"), [("reward", "gpu"), ("reward", "exit"), ("reference", "gpu")])
async def test_a_service_whose_model_is_dead_exits_1(
    name, how, start_service, make_policy, make_reward_model, tokenizer, tmp_path, monkeypatch
):
    broken = tmp_path / "broken"
    (tmp_path / "sitecustomize.py").write_text(BREAKS.format(path=str(broken)))
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    live = start_service(name, make_reward_model(seed=70) if name == "reward" else make_policy(seed=70))
    fingerprint = tokenizer_fingerprint(tokenizer)

    async with grpc.aio.insecure_channel(live.address) as channel:

        async def ask() -> int:
            """The status of one item."""
            if name == "reward":
                item = reward_pb2.ScoreItem(prompt=common_pb2.Prompt(text="hello"), response_text=" thanks")
                request = reward_pb2.ScoreRequest(items=[item])
                reply = await reward_pb2_grpc.RewardServiceStub(channel).Score(request, timeout=20)
            else:
                asked = reference_pb2.LogProbsItem(token_ids=[5, 6, 7], response_start=1)
                ids = reference_pb2.LogProbsRequest(items=[asked], tokenizer_fingerprint=fingerprint)
                reply = await reference_pb2_grpc.ReferenceServiceStub(channel).LogProbs(ids, timeout=20)
            return reply.results[0].status.code

        assert await ask() == common_pb2.ITEM_STATUS_CODE_OK
        broken.write_text(how)
        if how == "gpu":
            # One bad batch, and a few more, end nothing.
            assert [await ask() for _ in range(MOST_FAILURES - 1)] == [RETRYABLE] * (MOST_FAILURES - 1)
            assert live.process.poll() is None
        with contextlib.suppress(grpc.aio.AioRpcError):  # It may be gone before it has answered.
            assert await ask() == RETRYABLE
    assert await asyncio.to_thread(live.process.wait, 30) == 1
    reason = f"{MOST_FAILURES} model batches on end have failed" if how == "gpu" else "was ended by SystemExit"
    assert reason in live.log.read_text()


RULE = """
import os, time

def score(pairs):
    while os.path.exists({path!r}):
        time.sleep(0.05)
    return [1.0] * len(pairs)
"""


@pytest.fixture
def start_hanging(start_service, tmp_path, monkeypatch):
    """Starts a reward service whose scorer hangs as soon as the file is there; gives the service and the file."""
    hangs = tmp_path / "hangs"
    (tmp_path / "hanging_rule.py").write_text(RULE.format(path=str(hangs)))
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return lambda *flags: (start_service("reward", "", "--scorer", "hanging_rule:score", *flags), hangs)


def ask_for_a_score(channel):
    item = reward_pb2.ScoreItem(prompt=common_pb2.Prompt(text="hello"), response_text=" thanks")
    return reward_pb2_grpc.RewardServiceStub(channel).Score(reward_pb2.ScoreRequest(items=[item]), timeout=60)


@pytest.mark.parametrize("calls_before", [0, 1])
async def test_a_service_whose_scorer_hangs_says_so_and_exits_1(start_hanging, calls_before):
    live, hangs = start_hanging("--scorer-timeout-s", "1")
    async with grpc.aio.insecure_channel(live.address) as channel:
        for _ in range(calls_before):
            assert (await ask_for_a_score(channel)).results[0].status.code == common_pb2.ITEM_STATUS_CODE_OK
        hangs.touch()
        # Who waited behind the one that hangs is told so as well, and not cut off.
        for call in [ask_for_a_score(channel) for _ in range(3)]:
            status = (await call).results[0].status
            reason = "the scorer hanging_rule:score failed: it has not returned within 1 s (scorer_timeout_s)"
            assert (status.code, status.reason) == (RETRYABLE, reason)
    assert await asyncio.to_thread(live.process.wait, 30) == 1
    assert "the scorer hanging_rule:score hangs" in live.log.read_text()


async def test_a_service_whose_batch_hangs_tells_all_who_wait_and_exits_1(start_hanging):
    live, hangs = start_hanging("--scorer-timeout-s", "0", "--batch-timeout-s", "3")
    async with grpc.aio.insecure_channel(live.address) as channel:
        assert (await ask_for_a_score(channel)).results[0].status.code == common_pb2.ITEM_STATUS_CODE_OK
        hangs.touch()
        for call in [ask_for_a_score(channel) for _ in range(3)]:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "a batch has taken more than 3 s (batch_timeout_s)" in failed.value.details()
    assert await asyncio.to_thread(live.process.wait, 30) == 1
    assert "a batch has taken more than 3 s (batch_timeout_s)" in live.log.read_text()


async def test_a_signal_ends_a_service_whose_model_hangs_when_its_grace_is_over(start_hanging):
    live, hangs = start_hanging("--scorer-timeout-s", "0", "--batch-timeout-s", "0", "--grace-s", "1")
    async with grpc.aio.insecure_channel(live.address) as channel:
        assert (await ask_for_a_score(channel)).results[0].status.code == common_pb2.ITEM_STATUS_CODE_OK
        hangs.touch()
        call = ask_for_a_score(channel)
        await asyncio.sleep(0.5)
        live.process.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    assert await asyncio.to_thread(live.process.wait, 30) == 0
    assert "thread_left_hanging" in live.log.read_text()


async def test_a_service_whose_forward_pass_hangs_tells_all_who_wait_and_exits_1(
    start_service, make_policy, tokenizer, tmp_path, monkeypatch
):
    hangs = tmp_path / "hangs"
    (tmp_path / "sitecustomize.py").write_text(BREAKS.format(path=str(hangs)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    live = start_service("reference", make_policy(seed=70), "--batch-timeout-s", "3")
    asked = reference_pb2.LogProbsItem(token_ids=[5, 6, 7], response_start=1)
    ids = reference_pb2.LogProbsRequest(items=[asked], tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    async with grpc.aio.insecure_channel(live.address) as channel:
        stub = reference_pb2_grpc.ReferenceServiceStub(channel)
        assert (await stub.LogProbs(ids, timeout=60)).results[0].status.code == common_pb2.ITEM_STATUS_CODE_OK
        hangs.write_text("hang")
        for call in [stub.LogProbs(ids, timeout=60) for _ in range(3)]:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
            assert failed.value.details() == (
                "the model hangs: a batch has taken more than 3 s (batch_timeout_s); the service is restarted, "
                "try again later"
            )
    assert await asyncio.to_thread(live.process.wait, 30) == 1
    said = live.log.read_text()
    assert "in breaks" in said  # Where it hangs.
    assert "thread_left_hanging" in said


ENGINE_HANGS = """
import os
import threading
from services.policy import transformers_engine

plain = transformers_engine.TransformersEngine._forward

def forward(self, batch):
    if os.path.exists({path!r}):
        threading.Event().wait()
    return plain(self, batch)

transformers_engine.TransformersEngine._forward = forward
"""
NO_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=NO_VLLM)])
def start_policy(request, start_service, make_policy, tmp_path, monkeypatch):
    """Starts a policy service; gives it, and what lets its engine hang from then on."""
    hangs = tmp_path / "hangs"
    if request.param == "transformers":
        (tmp_path / "sitecustomize.py").write_text(ENGINE_HANGS.format(path=str(hangs)))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def start(*flags):
        live = start_service("policy", make_policy(seed=71), "--engine", request.param, *flags)

        def hang():
            hangs.touch()
            if request.param == "vllm":
                # Its processes are alive and do nothing, as where a GPU does not come back.
                for child in psutil.Process(live.process.pid).children(recursive=True):
                    child.send_signal(signal.SIGSTOP)

        return live, hang

    return start


async def completions(client):
    """Of two prompts."""
    sampling = Sampling(max_new_tokens=32, min_new_tokens=32)
    return [answer async for answer in client.generate(["hello", "thanks"], sampling)]


async def test_a_policy_whose_engine_hangs_tells_all_who_wait_and_exits_1(start_policy):
    live, hang = start_policy("--engine-timeout-s", "5")
    async with PolicyClient(live.address, policy=CallPolicy(patience_s=0.0)) as client:
        assert len(await completions(client)) == 2
        hang()
        calls = [asyncio.create_task(completions(client)) for _ in range(2)]
        for call in calls:
            with pytest.raises(UnavailableError, match=r"nothing for more than 5 s \(engine_timeout_s\)"):
                await call
    assert await asyncio.to_thread(live.process.wait, 60) == 1
    assert "engine_hangs" in live.log.read_text()


async def test_a_signal_ends_a_policy_whose_engine_hangs_when_its_grace_is_over(start_policy):
    live, hang = start_policy("--engine-timeout-s", "0", "--grace-s", "1")
    async with PolicyClient(live.address, policy=CallPolicy(patience_s=0.0)) as client:
        assert len(await completions(client)) == 2
        hang()
        call = asyncio.create_task(completions(client))
        await asyncio.sleep(1)
        live.process.terminate()
        with pytest.raises(UnavailableError, match="the service is ending"):
            await call
    assert await asyncio.to_thread(live.process.wait, 60) == 0

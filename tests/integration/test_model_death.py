"""A service whose model is dead ends with exit code 1, so that a supervisor starts it anew."""

from __future__ import annotations

import asyncio
import contextlib
import os

import grpc
import pytest

from quartet.common.v1 import common_pb2
from quartet.fingerprint import tokenizer_fingerprint
from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.runtime.batcher import MOST_FAILURES

RETRYABLE = common_pb2.ITEM_STATUS_CODE_RETRYABLE

# Python runs it before the service: from when the file is there, every batch ends as the file says.
BREAKS = """
import os
from services.runtime import batcher

plain = batcher.Batcher.__init__

def init(self, process, **others):
    def breaks(items):
        if os.path.exists({path!r}):
            raise {{"exit": SystemExit, "gpu": RuntimeError}}[open({path!r}).read()]("illegal memory access")
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


async def test_a_service_whose_scorer_hangs_says_so_and_exits_1(start_hanging):
    live, hangs = start_hanging("--scorer-timeout-s", "1")
    async with grpc.aio.insecure_channel(live.address) as channel:
        assert (await ask_for_a_score(channel)).results[0].status.code == common_pb2.ITEM_STATUS_CODE_OK
        hangs.touch()
        call = ask_for_a_score(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):  # The end of the service may be faster than the answer.
            status = (await call).results[0].status
            assert (status.code, "scorer_timeout_s" in status.reason) == (RETRYABLE, True)
        assert await call.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
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

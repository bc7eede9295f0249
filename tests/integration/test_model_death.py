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

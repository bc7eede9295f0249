"""Publishing to replicas that refuse, go away, or lack room: it ends, and says why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quartet.client import CallPolicy, DeadlineError, OverloadedError, QuartetError, UnavailableError
from quartet.client.types import ServedBy
from trainer.publishing import Publisher, Weights

WEIGHTS = Weights.of([("w", torch.zeros(2))])


class Replica:
    """A weights client whose updates fail as ``script`` says, and then succeed."""

    def __init__(self, script: Callable[[int], QuartetError | None]) -> None:
        self.script = script
        self.asked = 0
        self.served = ServedBy(model_id="m", weights_version=0, weights_fingerprint="x", tokenizer_fingerprint="t")

    async def wait_ready(self, timeout_s: float) -> None: ...

    async def close(self) -> None: ...

    async def get_info(self) -> ServedBy:
        return self.served

    async def update(self, tensors: Any, *, weights_version: int, fingerprint: str) -> None:
        self.asked += 1
        await asyncio.sleep(0.01)
        if (error := self.script(self.asked)) is not None:
            raise error
        self.served = ServedBy(
            **(vars(self.served) | {"weights_version": weights_version, "weights_fingerprint": fingerprint})
        )


def publisher(*replicas: Replica, ready_timeout_s: float = 2.0) -> Publisher:
    made = Publisher([], CallPolicy(), ready_timeout_s)
    made._clients = list(replicas)  # type: ignore[arg-type]
    return made


async def test_a_replica_without_room_is_raised_soon_with_what_it_said(capsys):
    full = Replica(lambda _: OverloadedError("0.06 GiB free: give it more room", service="policy weights service"))
    start_s = time.monotonic()
    with pytest.raises(OverloadedError, match=r"policy weights service: 0\.06 GiB free"):
        await publisher(full, ready_timeout_s=300.0).publish(WEIGHTS)
    assert time.monotonic() - start_s < 5
    assert full.asked == 4
    told = capsys.readouterr().err
    assert told.startswith("the weights could not be published, trying again: policy weights service: 0.06 GiB free")
    assert told.count("\n") == 1


async def test_a_replica_that_goes_away_again_and_again_is_given_up_after_the_set_wait(capsys):
    dying = Replica(lambda _: UnavailableError("gone"))
    start_s = time.monotonic()
    with pytest.raises(UnavailableError, match="gone"):
        await publisher(dying).publish(WEIGHTS)
    assert 2 <= time.monotonic() - start_s < 6
    assert capsys.readouterr().err.count("trying again") == 1


async def test_a_replica_that_comes_back_is_brought_up_to_date_while_others_keep_what_they_got():
    well, back = Replica(lambda _: None), Replica(lambda asked: UnavailableError("gone") if asked < 3 else None)
    of_both = publisher(well, back)
    assert await of_both.publish(WEIGHTS) == 1
    assert (well.asked, back.asked) == (1, 3)
    assert well.served == back.served
    assert of_both.updates == 2


async def test_an_update_that_takes_longer_than_a_call_may_is_not_sent_again():
    slow = Replica(lambda _: DeadlineError("Deadline Exceeded"))
    with pytest.raises(DeadlineError):
        await publisher(slow).publish(WEIGHTS)
    assert slow.asked == 1

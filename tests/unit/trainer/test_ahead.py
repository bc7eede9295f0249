"""Rollouts ahead of training: in which order, of which weights, and kept to the last bit."""

from __future__ import annotations

import asyncio
import contextvars
import json
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from trainer.ahead import RolloutsAhead, pack, unpack
from trainer.loop_thread import LoopThread
from trainer.rollout import Rollout, Sample


def rollout(step: int, weights_step: int = 0, samples: tuple[Sample, ...] = ()) -> Rollout:
    return Rollout(
        samples=samples,
        failures=(f"of step {step}",),
        weights_version=step,
        duration_s=0.1,
        service_work_s=0.05,
        weights_step=weights_step,
    )


class Trainer:
    """The order of the loop in ``trainer.ppo.train``; notes when each rollout is begun and with which weights."""

    def __init__(self, steps: int, staleness: int, *, step: int = 0) -> None:
        self.step, self.steps = step, steps
        self.published = step
        self.learned: list[tuple[str, int]] = []
        self.under_way = 0
        self.ahead = RolloutsAhead(self.begin, steps=steps, staleness=staleness)

    def begin(self, step: int) -> Future[Rollout]:
        assert self.under_way == 0
        self.under_way += 1
        trainer, found = self, rollout(step, self.published)

        class Late(Future[Rollout]):
            def result(self, timeout: float | None = None) -> Rollout:
                trainer.under_way -= 1
                return found

        return Late()

    def run(self, until: int) -> None:
        while self.step < until:
            found = self.ahead.next(self.step)
            self.learned.append((found.failures[0], found.weights_step))
            self.step += 1
            self.ahead.finish()
            assert self.under_way == 0  # Nothing is sampled while weights are exchanged.
            assert self.ahead.complete(self.step)
            self.published = self.step


@pytest.mark.parametrize("staleness", [0, 1, 2, 5, 9])
def test_the_weights_of_a_rollout_follow_from_its_step_alone(staleness: int) -> None:
    trainer = Trainer(7, staleness)
    trainer.run(7)
    assert trainer.learned == [(f"of step {step}", max(0, step - staleness)) for step in range(7)]
    assert not trainer.ahead.waiting  # None was sampled that nobody learned from.


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("stopped_at", [1, 4, 6])
def test_a_run_that_goes_on_from_what_was_waiting_is_the_unbroken_one(staleness: int, stopped_at: int) -> None:
    whole, first = Trainer(7, staleness), Trainer(7, staleness)
    whole.run(7)
    first.run(stopped_at)
    described, tensors = pack(list(first.ahead.waiting))
    second = Trainer(7, staleness, step=stopped_at)
    second.ahead.waiting.extend(unpack(json.loads(json.dumps(described)), tensors))
    second.run(7)
    assert first.learned + second.learned == whole.learned


def test_the_next_rollout_is_sampled_while_this_one_is_learned_from() -> None:
    async def sample(step: int) -> Rollout:
        began.append(step)
        await asyncio.sleep(0.2)
        return rollout(step)

    began: list[int] = []
    with LoopThread() as loop:
        ahead = RolloutsAhead(lambda step: loop.start(sample(step)), steps=5, staleness=1)
        ahead.next(0)  # Rollouts 0 and, not waited for, 1.
        time.sleep(0.25)  # What learning takes.
        assert began == [0, 1]
        assert ahead.finish() < 0.15
        ahead.next(1)
        assert ahead.finish() > 0.15


def test_what_is_missing_after_a_failure_is_known() -> None:
    async def sample(step: int) -> Rollout:
        if step == 2:
            raise ConnectionError("gone")
        return rollout(step)

    with LoopThread() as loop:
        ahead = RolloutsAhead(lambda step: loop.start(sample(step)), steps=5, staleness=1)
        ahead.next(0)
        ahead.finish()
        assert ahead.complete(1)
        ahead.next(1)
        with pytest.raises(ConnectionError):
            ahead.finish()
        assert not ahead.complete(2)
        # On-policy nothing is lost by it: the same weights sample it again.
        alone = RolloutsAhead(lambda step: loop.start(sample(step)), steps=5, staleness=0)
        with pytest.raises(ConnectionError):
            alone.next(2)
        assert alone.complete(2)


def test_rollouts_are_packed_without_the_loss_of_a_bit() -> None:
    def sample(index: int, length: int, **more: object) -> Sample:
        values = torch.randn(2, length, generator=torch.Generator().manual_seed(index)).tolist()
        return Sample(
            index=index,
            prompt_ids=tuple(range(3, 4 + index)),
            response_ids=tuple(range(100, 100 + length)),
            logprobs=tuple(values[0]),
            ref_logprobs=tuple(values[1]),
            score=math.pi * index,
            finished=index % 2 == 0,
            weights_version=7 + index,
            **more,  # type: ignore[arg-type]
        )

    named = rollout(3, 2, (sample(0, 4, scores={"a": 0.1, "b": -3.0}), sample(5, 1, scores={"a": 1 / 3, "b": 0.0})))
    plain = rollout(4, 3, (sample(1, 2, spread=0.3), sample(2, 1, spread=0.0), sample(3, 1)))
    for kept in ([named, plain], [plain], [rollout(1)], []):
        described, tensors = pack(kept)
        assert unpack(json.loads(json.dumps(described)), tensors) == kept
    described, tensors = pack([replace(plain, samples=(replace(plain.samples[0], score=math.inf),))])
    assert unpack(described, tensors)[0].samples[0].score == math.inf  # Refused when its turn comes, and not before.


def test_coroutines_run_beside_the_caller_with_its_context_and_are_cancelled_at_the_end() -> None:
    place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="nowhere")
    ended = []

    async def where() -> tuple[str, str]:
        return place.get(), threading.current_thread().name

    async def forever() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def failing() -> None:
        raise KeyError("inside")

    with LoopThread() as loop:
        place.set("here")
        started = loop.start(where())
        place.set("elsewhere")
        assert started.result() == ("here", "services")
        with pytest.raises(KeyError, match="inside"):
            loop.run(failing())
        left = loop.start(forever())
        loop.run(asyncio.sleep(0))
    assert left.cancelled()
    assert ended == [True]

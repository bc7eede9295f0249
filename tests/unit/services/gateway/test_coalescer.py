"""Single items go to the service together, in few calls, and each caller gets its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from quartet.client import InvalidInputError, Score, ScoreItem, Scores, ServedBy, UnavailableError, WorkInterval
from services.gateway.coalescer import Coalescer, Options
from services.gateway.metrics import GatewayMetrics

PLAIN = Options()
BY = ServedBy(model_id="m", weights_version=3, weights_fingerprint="w", tokenizer_fingerprint="t")


def item(text: str) -> ScoreItem:
    return ScoreItem(prompt="p", response=text)


class Service:
    """Scores the length of a response, when it is let go on."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], Options]] = []
        self.cancelled = 0
        self.go_on = asyncio.Event()
        self.bad: set[str] = set()
        self.error: Exception | None = None

    async def send(self, items: Sequence[ScoreItem], options: Options) -> Scores:
        texts = [str(one.response) for one in items]
        self.calls.append((texts, options))
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        if self.bad.intersection(texts):
            raise InvalidInputError("items[0].response is bad", field="items[0].response")
        results = tuple(
            Score(score=float(len(text)), normalised_score=None, token_count=1, truncated=False) for text in texts
        )
        return Scores(results=results, served_by=BY, work=WorkInterval(start_unix_ns=0, end_unix_ns=0))


@pytest.fixture
async def service() -> Service:
    return Service()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def started(coalescer: Coalescer, texts: Sequence[str], options: Options = PLAIN) -> list[asyncio.Task]:
    return [asyncio.create_task(coalescer.score(item(text), options, f"r{len(text)}")) for text in texts]


async def test_what_comes_while_two_calls_are_under_way_goes_with_the_next_one(service: Service) -> None:
    coalescer = Coalescer(service.send, GatewayMetrics())
    tasks = started(coalescer, ["a"])
    await settled()
    tasks += started(coalescer, ["bb"])
    await settled()
    assert [texts for texts, _ in service.calls] == [["a"], ["bb"]]
    tasks += started(coalescer, ["c" * n for n in range(3, 300)])
    await settled()
    assert len(service.calls) == 2
    assert coalescer.waiting == 297
    service.go_on.set()
    answers = await asyncio.gather(*tasks)
    assert [result.score for result, _ in answers] == [float(n) for n in range(1, 300)]
    assert {by for _, by in answers} == {BY}
    # 256 at most of a call.
    assert [len(texts) for texts, _ in service.calls] == [1, 1, 256, 41]
    assert coalescer.waiting == 0


async def test_items_with_other_options_go_apart(service: Service) -> None:
    coalescer = Coalescer(service.send, GatewayMetrics())
    service.go_on.set()
    other = Options(normalise=True)
    await asyncio.gather(*started(coalescer, ["a", "b"]), *started(coalescer, ["c"], other))
    assert {(text, options) for texts, options in service.calls for text in texts} == {
        ("a", Options()),
        ("b", Options()),
        ("c", other),
    }


async def test_who_leaves_takes_back_what_waits_and_a_call_for_nobody_is_ended(service: Service) -> None:
    coalescer = Coalescer(service.send, GatewayMetrics())
    tasks = started(coalescer, ["a"])
    await settled()
    tasks += started(coalescer, ["b"])
    await settled()
    waits = started(coalescer, ["c", "d"])
    await settled()
    waits[0].cancel()
    tasks[1].cancel()
    await settled()
    assert service.cancelled == 1  # The call of "b" alone: "a" is waited for. In its place "d" went.
    assert [texts for texts, _ in service.calls] == [["a"], ["b"], ["d"]]
    service.go_on.set()
    assert (await tasks[0])[0].score == 1.0
    assert (await waits[1])[0].score == 1.0
    assert "c" not in {text for texts, _ in service.calls for text in texts}


async def test_one_that_is_refused_fails_alone(service: Service) -> None:
    coalescer = Coalescer(service.send, GatewayMetrics())
    first = started(coalescer, ["a", "b"])
    await settled()
    service.bad = {"y"}
    tasks = started(coalescer, ["x", "y", "zz"])
    await settled()
    service.go_on.set()
    answers = await asyncio.gather(*first, *tasks, return_exceptions=True)
    assert [answers[index][0].score for index in (0, 1, 2, 4)] == [1.0, 1.0, 1.0, 2.0]
    assert isinstance(answers[3], InvalidInputError)


@pytest.mark.parametrize("error", [UnavailableError("away", service="reward service"), ValueError("a bug")])
async def test_a_call_that_fails_fails_all_that_went_with_it_and_the_next_one_is_made(
    service: Service, error: Exception
) -> None:
    coalescer = Coalescer(service.send, GatewayMetrics())
    service.error = error
    tasks = started(coalescer, ["a", "b", "c"])
    await settled()
    service.go_on.set()
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert answer is error
    service.go_on.clear()
    first = started(coalescer, ["a"])
    await settled()
    first += started(coalescer, ["b"])
    await settled()
    waits = started(coalescer, ["c"])  # Behind both, and nobody comes after it.
    await settled()
    service.go_on.set()
    assert await asyncio.gather(*first, *waits, return_exceptions=True) == [error] * 3
    service.error = None
    assert (await coalescer.score(item("dd"), Options(), "r"))[0].score == 2.0


async def test_thousands_of_callers_who_come_and_go_leave_nothing_behind() -> None:
    service = Service()
    service.go_on.set()
    coalescer = Coalescer(service.send, GatewayMetrics())

    async def come_and_go(number: int) -> float | None:
        task = asyncio.create_task(coalescer.score(item("x" * (number % 7 + 1)), Options(), f"r{number}"))
        if number % 3 == 0:
            for _ in range(number % 5):
                await asyncio.sleep(0)
            task.cancel()
        try:
            return (await task)[0].score
        except asyncio.CancelledError:
            return None

    found = await asyncio.gather(*(come_and_go(number) for number in range(5000)))
    assert all(score == number % 7 + 1 for number, score in enumerate(found) if score is not None or number % 3)
    await settled()
    assert (coalescer.waiting, coalescer._calls, coalescer._waiting, coalescer._tasks) == (0, {}, {}, set())

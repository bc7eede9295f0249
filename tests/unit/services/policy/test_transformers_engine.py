"""The transformers engine against one full forward pass a token, in float64.

Shapes: V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from services.policy import transformers_engine
from services.policy.config import PolicySettings
from services.policy.engine import (
    EngineFailedError,
    Finish,
    Generated,
    GenerationTask,
    InFlight,
    Piece,
    Sampling,
    StillRunningError,
)
from services.policy.transformers_engine import TransformersEngine
from services.runtime.errors import StartError

TOLERANCE = 2e-5
# What ends the engine's thread is raised on, so that the log has it.
LOGGED = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
PROMPTS = [[5, 6, 7], [9], [20 + i for i in range(11)], [4, 4], [30, 8, 30, 8, 30], [77, 99, 250, 3, 17, 60], [299]]
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=12, min_new_tokens=0, stop_token_ids=())


def sampling(**changes: Any) -> Sampling:
    fields = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "min_new_tokens": 0}
    return Sampling(**{"stop_token_ids": (), **fields, **changes})


def task(prompt: Sequence[int], chosen: Sampling = GREEDY, seed: int = 0) -> GenerationTask:
    return GenerationTask(prompt_ids=list(prompt), sampling=chosen, seed=seed, request_id=f"{prompt}-{seed}")


class SteppedEngine(TransformersEngine):
    """Takes its steps when told to, after ``hold``; a step is one token for everybody (and one more on joining)."""

    def __init__(self, folder: Path, settings: PolicySettings) -> None:
        super().__init__(folder, settings)
        self.held = threading.Event()
        self.permits = threading.Semaphore(0)
        self.taken = threading.Semaphore(0)

    def _step(self) -> None:
        stepped = self.held.is_set()
        if stepped:
            self.permits.acquire()
        super()._step()
        if stepped:
            self.taken.release()

    def hold(self) -> None:
        self.held.set()

    async def let_go(self) -> None:
        """Steps freely from here on; what a test has begun before is in the engine by then."""
        await asyncio.sleep(0)
        self.held.clear()
        self.permits.release()

    async def step(self, count: int) -> None:
        """Returns after exactly so many steps. What a test has begun before is in the engine by then."""
        await asyncio.sleep(0)
        for _ in range(count):
            self.permits.release()
            assert await asyncio.to_thread(self.taken.acquire, timeout=10)


Start = Callable[..., Awaitable[SteppedEngine]]


@pytest.fixture
async def start(make_policy) -> AsyncIterator[Start]:
    """await start(folder=..., **settings) loads an engine, which ends with the test."""
    started = []

    async def load(folder: Path | None = None, **settings: Any) -> SteppedEngine:
        folder = folder or policy(make_policy)
        engine = SteppedEngine(folder, PolicySettings(model=str(folder), threads=1, **settings))
        await engine.start()
        started.append(engine)
        return engine

    yield load
    for engine in started:
        await engine.let_go()
        await engine.stop()


_FOLDERS: dict[tuple[int, bool], Path] = {}


def policy(make_policy: Callable[..., Path], seed: int = 0, tied: bool = False) -> Path:
    """The folder of a policy that is made once for the whole file."""
    if (seed, tied) not in _FOLDERS:
        _FOLDERS[seed, tied] = make_policy(seed, tied=tied)
    return _FOLDERS[seed, tied]


# The truth --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def exact_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.inference_mode()
def exact_logits(folder: Path, token_ids: Sequence[int]) -> Tensor:
    """(V,) float64 logits after ``token_ids``, by a full forward pass of them alone."""
    logits_V: Tensor = exact_model(folder)(torch.tensor([list(token_ids)])).logits[0, -1]
    return logits_V


def restricted(logits: Sequence[float], chosen: Sampling, held_back: Sequence[int] = ()) -> list[float]:
    """Probability of every token, in plain Python and in the order of the contract: bias, temperature, top-k, top-p."""
    biases = dict(chosen.logit_bias)
    scaled = [(x + biases.get(v, 0.0)) / (chosen.temperature or 1.0) for v, x in enumerate(logits)]
    kept = sorted((v for v in range(len(scaled)) if v not in held_back), key=lambda v: -scaled[v])
    if chosen.top_k:
        kept = kept[: chosen.top_k]
    weights = [math.exp(scaled[v] - scaled[kept[0]]) for v in kept]
    before = [0.0, *itertools.accumulate(w / sum(weights) for w in weights)]
    nucleus = [v for v, mass in zip(kept, before, strict=False) if mass < chosen.top_p]
    total = sum(weights[: len(nucleus)])
    probabilities = dict(zip(nucleus, (w / total for w in weights), strict=False))
    return [probabilities.get(v, 0.0) for v in range(len(scaled))]


def naive_greedy(folders: Sequence[Path], prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and log-probabilities of len(folders) steps, the i-th by the weights in the i-th folder."""
    tokens: list[int] = []
    logprobs = []
    for folder in folders:
        table_V = exact_logits(folder, [*prompt, *tokens]).log_softmax(-1)
        tokens.append(int(table_V.argmax()))
        logprobs.append(table_V[tokens[-1]].item())
    return tokens, logprobs


def exact_logprobs(folder: Path, prompt: Sequence[int], found: Generated, chosen: Sampling) -> list[float]:
    """Log-probabilities of ``found`` under the distributions that ``chosen`` describes."""
    exact = []
    for i, token in enumerate(found.token_ids):
        held_back = chosen.stop_token_ids if i < chosen.min_new_tokens else ()
        logits = exact_logits(folder, [*prompt, *found.token_ids[:i]]).tolist()
        probability = restricted(logits, chosen, held_back)[token]
        assert probability > 0, f"token {token} lies outside of what may be sampled"
        exact.append(math.log(probability))
    return exact


def assert_greedy(found: Generated, folder: Path, prompt: Sequence[int], length: int) -> None:
    tokens, logprobs = naive_greedy([folder] * length, prompt)
    assert found.token_ids == tokens
    assert found.logprobs == pytest.approx(logprobs, abs=TOLERANCE)


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
async def test_ragged_prompts_that_join_and_leave_at_any_time_are_continued_as_if_alone(start, make_policy, tied):
    folder = policy(make_policy, tied=tied)
    engine = await start(folder, max_concurrent=4)
    engine.hold()
    lengths = [12, 3, 7, 1, 9, 2, 5]
    tasks = []
    # They come two steps apart, one by one and more at a time, and each leaves when it is done; one has to wait.
    for together in ([0], [1, 2], [3], [4, 5, 6]):
        tasks += [
            asyncio.create_task(engine.generate(task(PROMPTS[i], sampling(temperature=0.0, max_new_tokens=lengths[i]))))
            for i in together
        ]
        await engine.step(2)
    await engine.let_go()
    for prompt, length, found in zip(PROMPTS, lengths, await asyncio.gather(*tasks), strict=True):
        assert_greedy(found, folder, prompt, length)
        assert (found.finish, found.version_spans) == (Finish.LENGTH, [(0, length)])
        assert 0 < found.start_unix_ns < found.end_unix_ns


async def test_more_requests_than_slots_are_all_answered(start, make_policy):
    engine = await start(max_concurrent=2)
    found = await asyncio.gather(*(engine.generate(task(prompt)) for prompt in PROMPTS))
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert_greedy(one, policy(make_policy), prompt, 12)


async def test_no_pass_reads_more_prompt_tokens_than_it_may_and_who_runs_gets_a_token_between_two(start, make_policy):
    engine = await start(max_concurrent=16, max_batch_tokens=24)
    shapes: list[tuple[int, int]] = []

    def note(_: Any, inputs: Any, named: dict[str, Any]) -> None:
        shapes.append(tuple(named["input_ids"].shape))

    engine._model.register_forward_pre_hook(note, with_kwargs=True)
    engine.hold()
    running = asyncio.create_task(engine.generate(task([8, 8])))
    await engine.step(1)
    assert shapes == [(1, 2), (1, 1)]
    shapes.clear()
    # Of 3, 1, 11, 2, 5, 6, 1, 30 and four times 3 tokens. A pass costs its longest prompt, times its prompts.
    burst = [*PROMPTS, list(range(100, 130)), [7, 7, 1], [7, 7, 2], [7, 7, 3], [7, 7, 4]]
    tasks = [asyncio.create_task(engine.generate(task(prompt))) for prompt in burst]
    for count in range(1, 6):
        await engine.step(1)
        assert len(shapes) == 2 * count
    # A prompt that is too long by itself is read alone. After each pass everybody who runs gets a token.
    assert shapes[::2] == [(2, 3), (2, 11), (3, 6), (1, 30), (4, 3)]
    assert shapes[1::2] == [(3, 1), (5, 1), (8, 1), (9, 1), (13, 1)]
    assert engine.counts == (13, 0)
    await engine.let_go()
    for prompt, found in zip([[8, 8], *burst], await asyncio.gather(running, *tasks), strict=True):
        assert_greedy(found, policy(make_policy), prompt, 12)


async def test_a_stop_token_ends_a_response_and_is_its_last_token(start, make_policy):
    engine = await start()
    free, _ = naive_greedy([policy(make_policy)] * 12, PROMPTS[0])
    stop = next(token for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    cut = await engine.generate(task(PROMPTS[0], sampling(temperature=0.0, stop_token_ids=(299, stop))))
    assert cut.token_ids == free[: free.index(stop) + 1]
    assert cut.finish is Finish.STOP
    # A stop token that is the last one allowed is a stop all the same.
    exact = sampling(temperature=0.0, stop_token_ids=(stop,), max_new_tokens=free.index(stop) + 1)
    assert (await engine.generate(task(PROMPTS[0], exact))).finish is Finish.STOP


async def test_a_cancelled_request_frees_its_slot_and_one_that_waits_is_never_begun(start, make_policy):
    engine = await start(max_concurrent=1)
    engine.hold()
    long = sampling(temperature=0.0, max_new_tokens=100)
    first, second = (asyncio.create_task(engine.generate(task(prompt, long))) for prompt in PROMPTS[:2])
    third = asyncio.create_task(engine.generate(task(PROMPTS[2], sampling(temperature=0.0, max_new_tokens=4))))
    await engine.step(3)
    assert not any(t.done() for t in (first, second, third))
    first.cancel()
    second.cancel()
    # The step that drops the first one admits the third, which has two tokens by its end, and a token more each step.
    await engine.step(3)
    assert_greedy(await asyncio.wait_for(third, 5), policy(make_policy), PROMPTS[2], 4)
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(asyncio.CancelledError):
        await second


async def test_cancelling_one_of_a_batch_leaves_the_others_as_they_were(start, make_policy):
    engine = await start()
    engine.hold()
    # The longest prompt goes: columns that were padding for everybody else go with it.
    tasks = [asyncio.create_task(engine.generate(task(prompt))) for prompt in PROMPTS[:4]]
    await engine.step(3)
    tasks[2].cancel()
    await engine.let_go()
    for i in (0, 1, 3):
        assert_greedy(await tasks[i], policy(make_policy), PROMPTS[i], 12)


# Sampling ---------------------------------------------------------------------------------------------------------


async def test_a_seed_draws_the_same_tokens_alone_and_in_any_company(start):
    engine = await start(max_concurrent=3)
    chosen = sampling(temperature=0.9)
    alone = [await engine.generate(task(prompt, chosen, seed)) for seed, prompt in enumerate(PROMPTS)]
    others = [engine.generate(task(PROMPTS[i % 7], chosen, 100 + i)) for i in range(4)]
    backwards = [engine.generate(task(PROMPTS[seed], chosen, seed)) for seed in reversed(range(7))]
    together = (await asyncio.gather(*others, *backwards))[4:]
    assert [found.token_ids for found in reversed(together)] == [found.token_ids for found in alone]
    # And another seed, others.
    other = await engine.generate(task(PROMPTS[0], chosen, 55))
    assert other.token_ids != alone[0].token_ids


@pytest.mark.parametrize(
    "chosen",
    [
        sampling(max_new_tokens=1),
        sampling(max_new_tokens=1, temperature=0.6),
        sampling(max_new_tokens=1, temperature=1.7),
        sampling(max_new_tokens=1, top_k=7),
        sampling(max_new_tokens=1, top_p=0.6),
        sampling(max_new_tokens=1, temperature=1.5, top_k=40, top_p=0.8),
        sampling(max_new_tokens=1, min_new_tokens=1, stop_token_ids=tuple(range(0, 300, 2))),
        sampling(max_new_tokens=1, temperature=1.5, top_k=60, logit_bias=((7, 4.0), (9, 3.5), (200, -100.0))),
    ],
    ids=["plain", "cold", "hot", "top-k", "top-p", "all", "held back", "biased"],
)
async def test_tokens_are_drawn_as_often_as_their_probability_says(start, make_policy, chosen):
    engine = await start()
    count = 3000
    found = await asyncio.gather(*(engine.generate(task(PROMPTS[0], chosen, seed)) for seed in range(count)))
    held_back = chosen.stop_token_ids if chosen.min_new_tokens else ()
    exact = restricted(exact_logits(policy(make_policy), PROMPTS[0]).tolist(), chosen, held_back)
    counts = Counter(one.token_ids[0] for one in found)
    assert {v for v in counts if exact[v] == 0.0} == set()
    for one in found:
        assert one.logprobs == pytest.approx([math.log(exact[one.token_ids[0]])], abs=TOLERANCE)
    # Chi-square over the tokens that are expected five times at least; the rest count as one.
    often = [v for v, p in enumerate(exact) if p * count >= 5]
    assert len(often) >= 5
    observed, expected = [counts[v] for v in often], [exact[v] * count for v in often]
    if count - sum(expected) > 1:
        observed, expected = [*observed, count - sum(observed)], [*expected, count - sum(expected)]
    else:
        expected = [e * sum(observed) / sum(expected) for e in expected]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


async def test_each_of_a_batch_reports_the_distribution_that_it_was_drawn_from_itself(start, make_policy):
    engine = await start()
    stops = tuple(range(1, 300, 3))
    wishes = [
        sampling(temperature=0.5),
        sampling(temperature=2.0, top_k=5),
        sampling(top_p=0.3),
        sampling(top_p=1e-9),  # The likeliest one is always in.
        sampling(top_k=300),  # As many as there are: no restriction.
        sampling(temperature=0.0, top_k=3),
        # A bias does not bring back what is held back.
        sampling(
            temperature=1.3,
            top_k=20,
            top_p=0.7,
            min_new_tokens=6,
            stop_token_ids=stops,
            logit_bias=((1, 100.0), (5, 2.0)),
        ),
    ]
    found = await asyncio.gather(
        *(engine.generate(task(prompt, chosen, 9)) for prompt, chosen in zip(PROMPTS, wishes, strict=True))
    )
    for prompt, chosen, one in zip(PROMPTS, wishes, found, strict=True):
        exact = exact_logprobs(policy(make_policy), prompt, one, chosen)
        assert one.logprobs == pytest.approx(exact, abs=5 * TOLERANCE)
    assert found[3].token_ids == naive_greedy([policy(make_policy)] * 12, PROMPTS[3])[0]
    assert found[3].logprobs == pytest.approx([0.0] * 12, abs=TOLERANCE)
    assert found[5].token_ids == naive_greedy([policy(make_policy)] * 12, PROMPTS[5])[0]


async def test_no_stop_token_comes_before_its_time_and_one_may_come_right_then(start, make_policy):
    engine = await start()
    folder = policy(make_policy)
    first = naive_greedy([folder], PROMPTS[1])[0][0]
    # What would be taken first is a stop token, and so is whatever would be taken after it is held back.
    tokens: list[int] = []
    for _ in range(4):
        table_V = exact_logits(folder, [*PROMPTS[1], *tokens])
        table_V = table_V.index_fill(0, torch.tensor([first]), -torch.inf)
        tokens.append(int(table_V.argmax()))
    chosen = sampling(temperature=0.0, min_new_tokens=4, max_new_tokens=60, stop_token_ids=(first,))
    found = await engine.generate(task(PROMPTS[1], chosen))
    assert found.token_ids[:4] == tokens
    assert first not in found.token_ids[:-1]
    assert found.logprobs == pytest.approx(exact_logprobs(folder, PROMPTS[1], found, chosen), abs=TOLERANCE)
    free = sampling(temperature=0.0, max_new_tokens=60, stop_token_ids=(first,))
    at_once = await engine.generate(task(PROMPTS[1], free))
    assert (at_once.token_ids, at_once.finish) == ([first], Finish.STOP)


# Tokens as they come ----------------------------------------------------------------------------------------------


async def pieces_of(engine: TransformersEngine, asked: GenerationTask) -> list[Piece]:
    return [piece async for piece in engine.stream(asked)]


def joined(pieces: Sequence[Piece]) -> tuple[list[int], list[float], Finish | None]:
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    tokens = [token for piece in pieces for token in piece.token_ids]
    return tokens, [logprob for piece in pieces for logprob in piece.logprobs], pieces[-1].finish


async def test_pieces_joined_are_the_completion_and_come_while_it_is_generated(start, make_policy):
    engine = await start(max_concurrent=3)
    chosen = sampling(stop_token_ids=tuple(range(100, 120)))
    whole = [await engine.generate(task(prompt, chosen, 4)) for prompt in PROMPTS]
    streams = await asyncio.gather(*(pieces_of(engine, task(prompt, chosen, 4)) for prompt in PROMPTS))
    assert {one.finish for one in whole} == {Finish.STOP, Finish.LENGTH}
    for one, pieces in zip(whole, streams, strict=True):
        tokens, logprobs, finish = joined(pieces)
        assert (tokens, finish) == (one.token_ids, one.finish)
        assert logprobs == pytest.approx(one.logprobs, abs=TOLERANCE)
        assert [span for piece in pieces for span in piece.version_spans if span[0] != 0] == []
        assert all(sum(count for _, count in piece.version_spans) == len(piece.token_ids) for piece in pieces)
    engine.hold()
    stream = engine.stream(task(PROMPTS[0]))
    expected, _ = naive_greedy([policy(make_policy)] * 12, PROMPTS[0])
    first = asyncio.ensure_future(anext(stream))
    await engine.step(1)
    # The prompt's own token may come alone, before the step's, or together with it.
    begun = (await asyncio.wait_for(first, 5)).token_ids
    while len(begun) < 2:
        begun += (await asyncio.wait_for(anext(stream), 5)).token_ids
    assert begun == expected[:2]
    # Who reads slower than the tokens come finds them in one piece.
    await engine.step(3)
    assert (await asyncio.wait_for(anext(stream), 5)).token_ids == expected[2:5]
    await stream.aclose()
    await engine.step(1)
    assert engine.counts == (0, 0)
    await engine.let_go()


async def test_pieces_say_which_weights_sampled_them(start, make_policy, tmp_path):
    old, new = policy(make_policy), policy(make_policy, seed=1)
    engine = await start()
    engine.hold()
    reading = asyncio.create_task(pieces_of(engine, task(PROMPTS[0])))
    await engine.step(4)
    updating = asyncio.create_task(update(engine, new, tmp_path / "update", 7, InFlight.KEEP))
    await engine.let_go()
    await updating
    pieces = await reading
    assert joined(pieces)[0] == naive_greedy([old] * 5 + [new] * 7, PROMPTS[0])[0]
    versions = [version for piece in pieces for version, count in piece.version_spans for _ in range(count)]
    assert versions == [0] * 5 + [7] * 7


@LOGGED
async def test_an_engine_that_dies_ends_its_streams_with_the_reason(start, monkeypatch):
    engine = await start()
    engine.hold()
    reading = asyncio.create_task(pieces_of(engine, task(PROMPTS[0])))
    await engine.step(2)

    def no_room(**_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(engine, "_model", no_room)
    await engine.let_go()
    with pytest.raises(EngineFailedError, match=r"generation failed: MemoryError\(\)"):
        await asyncio.wait_for(reading, 5)


async def test_thousands_that_leave_at_any_moment_leave_nothing_behind(start, make_policy):
    engine = await start(max_concurrent=8)
    draw = random.Random(1)
    long = sampling(temperature=0.0, max_new_tokens=100)

    async def leave() -> None:
        asked = task(draw.choice(PROMPTS), long)
        running = pieces_of(engine, asked) if draw.random() < 0.5 else engine.generate(asked)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running, draw.random() * 0.4)

    for _ in range(4):
        await asyncio.gather(*(leave() for _ in range(500)))
        # Those that waited are gone at once, those that ran after the token that was being computed.
        for _ in range(100):
            if engine.counts == (0, 0):
                break
            await asyncio.sleep(0.01)
        assert engine.counts == (0, 0)
        assert_greedy(await asyncio.wait_for(engine.generate(task(PROMPTS[1])), 2), policy(make_policy), PROMPTS[1], 12)


# Weight updates ---------------------------------------------------------------------------------------------------


async def update(
    engine: TransformersEngine, to: Path, folder: Path, version: int, mode: InFlight, wait_s: float = 60.0
) -> float:
    """As the servicer does it: the file is gone when the engine has answered."""
    shutil.copytree(to, folder, ignore=shutil.ignore_patterns("*.json"))
    try:
        return await engine.update_weights(folder / "model.safetensors", version, mode, wait_s)
    finally:
        shutil.rmtree(folder)


async def test_kept_requests_go_on_with_the_new_weights_from_the_tokens_they_have(start, make_policy, tmp_path):
    old, new = policy(make_policy), policy(make_policy, seed=1)
    engine = await start(max_concurrent=3)
    engine.hold()
    tasks = [asyncio.create_task(engine.generate(task(prompt))) for prompt in PROMPTS[:2]]
    await engine.step(2)
    tasks.append(asyncio.create_task(engine.generate(task(PROMPTS[2]))))
    tasks.append(asyncio.create_task(engine.generate(task(PROMPTS[3]))))  # Waits for a slot.
    await engine.step(2)
    updating = asyncio.create_task(update(engine, new, tmp_path / "update", 7, InFlight.KEEP))
    await engine.let_go()
    assert 0 < await updating < 10
    # The first step gives two tokens, each further one a token more.
    for prompt, before, found in zip(PROMPTS, (5, 5, 3, 0), await asyncio.gather(*tasks), strict=False):
        tokens, logprobs = naive_greedy([old] * before + [new] * (12 - before), prompt)
        assert found.token_ids == tokens
        assert found.logprobs == pytest.approx(logprobs, abs=TOLERANCE)
        assert found.version_spans == [span for span in [(0, before), (7, 12 - before)] if span[1]]
    assert_greedy(await engine.generate(task(PROMPTS[4])), new, PROMPTS[4], 12)


async def test_requests_that_an_update_has_kept_are_finished_before_the_next_one_that_waits(
    start, make_policy, tmp_path
):
    """Also those whose turn to be read again has not come yet."""
    old, new, newest = (policy(make_policy, seed=seed) for seed in range(3))
    engine = await start(max_concurrent=4, max_batch_tokens=1)
    engine.hold()
    tasks = [asyncio.create_task(engine.generate(task(prompt))) for prompt in PROMPTS[:3]]
    await engine.step(3)
    keeping = asyncio.create_task(update(engine, new, tmp_path / "first", 1, InFlight.KEEP))
    await engine.step(1)
    await keeping
    assert engine.counts == (1, 2)
    finishing = asyncio.create_task(update(engine, newest, tmp_path / "second", 2, InFlight.FINISH))
    await engine.step(1)
    late = asyncio.create_task(engine.generate(task(PROMPTS[3])))
    await engine.let_go()
    await finishing
    # One pass reads one prompt: each step gives the newcomer two tokens, and those before it one.
    for prompt, before, found in zip(PROMPTS, (4, 3, 2), await asyncio.gather(*tasks), strict=False):
        tokens, _ = naive_greedy([old] * before + [new] * (12 - before), prompt)
        assert (found.token_ids, found.version_spans) == (tokens, [(0, before), (1, 12 - before)])
    assert (await late).version_spans == [(2, 12)]


async def test_kept_draws_go_on_where_they_were(start, make_policy, tmp_path):
    """The same weights again change nothing: a seed's draws do not begin anew."""
    engine = await start()
    chosen = sampling(max_new_tokens=10)
    alone = await engine.generate(task(PROMPTS[0], chosen, 3))
    engine.hold()
    kept = asyncio.create_task(engine.generate(task(PROMPTS[0], chosen, 3)))
    await engine.step(2)
    updating = asyncio.create_task(update(engine, policy(make_policy), tmp_path / "update", 1, InFlight.KEEP, 60.0))
    await engine.let_go()
    await updating
    assert (await kept).token_ids == alone.token_ids
    assert (await kept).version_spans == [(0, 3), (1, 7)]


async def test_requests_in_flight_finish_with_the_old_weights_and_those_that_wait_begin_with_the_new(
    start, make_policy, tmp_path
):
    old, new = policy(make_policy), policy(make_policy, seed=1)
    engine = await start(max_concurrent=3)
    engine.hold()
    running = [asyncio.create_task(engine.generate(task(prompt))) for prompt in PROMPTS[:2]]
    await engine.step(2)
    updating = asyncio.create_task(update(engine, new, tmp_path / "update", 1, InFlight.FINISH))
    await engine.step(1)
    # There is a free slot, but who comes now must not put the update off.
    late = asyncio.create_task(engine.generate(task(PROMPTS[2])))
    await engine.step(3)
    assert not updating.done()
    await engine.let_go()
    await updating
    for prompt, found in zip(PROMPTS, await asyncio.gather(*running), strict=False):
        assert_greedy(found, old, prompt, 12)
        assert found.version_spans == [(0, 12)]
    found = await late
    assert_greedy(found, new, PROMPTS[2], 12)
    assert found.version_spans == [(1, 12)]


async def test_an_update_that_waits_in_vain_changes_nothing_and_the_next_one_is_taken(start, make_policy, tmp_path):
    old, new = policy(make_policy), policy(make_policy, seed=1)
    engine = await start(max_concurrent=2)
    engine.hold()
    running = asyncio.create_task(engine.generate(task(PROMPTS[0])))
    await engine.step(2)
    with pytest.raises(StillRunningError, match="did not come to rest within 0 s"):
        await update(engine, new, tmp_path / "first", 1, InFlight.FINISH, wait_s=0.05)
    # Who comes now is not kept waiting any more, beside the one that runs on.
    late = asyncio.create_task(engine.generate(task(PROMPTS[1])))
    await engine.step(1)
    assert engine.counts == (2, 0)
    updating = asyncio.create_task(update(engine, new, tmp_path / "second", 1, InFlight.FINISH))
    await engine.let_go()
    await updating
    for prompt, found in zip(PROMPTS, (await running, await late), strict=False):
        assert_greedy(found, old, prompt, 12)
    assert_greedy(await engine.generate(task(PROMPTS[2])), new, PROMPTS[2], 12)


async def test_an_update_that_has_begun_is_waited_for_however_long_it_takes(start, make_policy, tmp_path, monkeypatch):
    engine = await start()
    read = engine._read_model

    def slow(folder: Path) -> Any:
        time.sleep(0.5)
        return read(folder)

    monkeypatch.setattr(engine, "_read_model", slow)
    new = policy(make_policy, seed=1)
    assert await update(engine, new, tmp_path / "update", 1, InFlight.FINISH, wait_s=0.2) > 0.4
    assert_greedy(await engine.generate(task(PROMPTS[2])), new, PROMPTS[2], 12)


async def test_aborted_requests_come_back_with_what_they_have(start, make_policy, tmp_path):
    old, new = policy(make_policy), policy(make_policy, seed=1)
    engine = await start(max_concurrent=2)
    engine.hold()
    tasks = [asyncio.create_task(engine.generate(task(prompt))) for prompt in PROMPTS[:3]]
    await engine.step(3)
    updating = asyncio.create_task(update(engine, new, tmp_path / "update", 1, InFlight.ABORT))
    await engine.let_go()
    await updating
    for prompt, length, found in zip(PROMPTS, (4, 4, 0), await asyncio.gather(*tasks), strict=False):
        assert_greedy(found, old, prompt, length)
        assert (found.finish, found.version_spans) == (Finish.ABORTED, [(0, length)] if length else [])
    assert_greedy(await engine.generate(task(PROMPTS[0])), new, PROMPTS[0], 12)


async def test_who_comes_while_others_are_aborted_is_answered_too(start, make_policy, tmp_path, monkeypatch):
    engine = await start()
    engine.hold()
    running = asyncio.create_task(engine.generate(task(PROMPTS[0])))
    await engine.step(1)
    loop, came = asyncio.get_running_loop(), []
    answer = transformers_engine._answer

    def slowly(row: Any, finish: Finish) -> None:
        """While the engine's thread answers those in flight, the loop takes a newcomer."""
        if finish is Finish.ABORTED:
            came.append(asyncio.run_coroutine_threadsafe(engine.generate(task(PROMPTS[1])), loop))
            threading.Event().wait(0.2)
        answer(row, finish)

    monkeypatch.setattr(transformers_engine, "_answer", slowly)
    new = policy(make_policy, seed=1)
    updating = asyncio.create_task(update(engine, new, tmp_path / "update", 1, InFlight.ABORT))
    await engine.let_go()
    await updating
    assert (await running).finish is Finish.ABORTED
    assert_greedy(await asyncio.wait_for(asyncio.wrap_future(came[0]), 5), new, PROMPTS[1], 12)


@pytest.mark.parametrize("mode", InFlight)
async def test_an_update_of_an_idle_engine_is_in_force_at_once(start, make_policy, tmp_path, mode):
    engine = await start()
    for version, seed in ((1, 1), (2, 2)):
        folder = policy(make_policy, seed=seed)
        await update(engine, folder, tmp_path / "update", version, mode)
        found = await engine.generate(task(PROMPTS[0]))
        assert_greedy(found, folder, PROMPTS[0], 12)
        assert found.version_spans == [(version, 12)]


@LOGGED
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("damaged", "the update to version 1 failed: .*header"),
        ("absent", "the update to version 1 failed: .*no file named model.safetensors"),
        ("memory", r"generation failed: MemoryError\(\)"),
    ],
)
async def test_weights_that_do_not_load_end_the_engine_and_everybody_is_told(start, tmp_path, monkeypatch, wrong, said):
    engine = await start(max_concurrent=1)
    engine.hold()
    tasks = [asyncio.create_task(engine.generate(task(prompt))) for prompt in PROMPTS[:2]]
    await engine.step(2)
    if wrong != "absent":
        (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    if wrong == "memory":

        def no_room(folder: Path) -> Any:
            raise MemoryError

        monkeypatch.setattr(engine, "_read_model", no_room)
    tasks.append(asyncio.create_task(engine.update_weights(tmp_path / "model.safetensors", 1, InFlight.KEEP, 60.0)))
    await engine.let_go()
    for outcome in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5):
        assert isinstance(outcome, EngineFailedError)
        assert re.search(said, str(outcome))
    for call in (
        engine.check(),
        engine.generate(task(PROMPTS[0])),
        engine.update_weights(tmp_path / "model.safetensors", 2, InFlight.KEEP, 60.0),
    ):
        with pytest.raises(EngineFailedError, match=said):
            await call


@LOGGED
async def test_a_model_that_fails_while_some_join_ends_the_engine_and_everybody_is_told(start, monkeypatch):
    engine = await start(max_concurrent=2)
    engine.hold()
    tasks = [asyncio.create_task(engine.generate(task(PROMPTS[0])))]
    await engine.step(2)

    def no_room(**_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(engine, "_model", no_room)
    # One is being continued, one joins, and one waits.
    tasks += [asyncio.create_task(engine.generate(task(prompt))) for prompt in PROMPTS[1:3]]
    await engine.let_go()
    for outcome in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5):
        assert isinstance(outcome, EngineFailedError)
        assert str(outcome) == "generation failed: MemoryError()"


class LeftFuture(Future[Any]):
    """Its caller leaves at the very moment at which it is answered."""

    def set_result(self, result: Any) -> None:
        self.cancel()
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        self.cancel()
        super().set_exception(exception)


async def test_who_leaves_while_his_update_is_answered_does_not_end_the_engine(
    start, make_policy, tmp_path, monkeypatch
):
    engine = await start()
    new = policy(make_policy, seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(transformers_engine, "Future", LeftFuture)
        with pytest.raises(asyncio.CancelledError):
            await update(engine, new, tmp_path / "update", 1, InFlight.KEEP)
    found = await engine.generate(task(PROMPTS[0]))
    assert_greedy(found, new, PROMPTS[0], 12)
    assert found.version_spans == [(1, 12)]


@LOGGED
async def test_who_leaves_while_everybody_is_told_that_the_engine_died_keeps_it_from_nobody(start, monkeypatch):
    engine = await start(max_concurrent=1)
    engine.hold()
    stayed = asyncio.create_task(engine.generate(task(PROMPTS[0])))
    await engine.step(1)
    with monkeypatch.context() as patched:  # Who waits is told first.
        patched.setattr(transformers_engine, "Future", LeftFuture)
        left = asyncio.create_task(engine.generate(task(PROMPTS[1])))
        await engine.step(1)
    monkeypatch.setattr(engine, "_model", None)
    await engine.let_go()
    with pytest.raises(EngineFailedError, match="generation failed"):
        await asyncio.wait_for(stayed, 5)
    with pytest.raises(asyncio.CancelledError):
        await left


# Beginning and end ------------------------------------------------------------------------------------------------


async def test_stopping_answers_whoever_waits(start):
    engine = await start(max_concurrent=1)
    await engine.check()
    engine.hold()
    tasks = [asyncio.create_task(engine.generate(task(prompt))) for prompt in PROMPTS[:2]]
    await engine.step(2)
    await engine.let_go()
    await engine.stop()
    for outcome in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5):
        assert isinstance(outcome, EngineFailedError)
        assert str(outcome) == "the engine was stopped"
    with pytest.raises(EngineFailedError, match="the engine was stopped"):
        await engine.check()


async def test_what_is_loaded_is_known_after_the_start(start):
    engine = await start()
    assert (engine.vocab_size, engine.max_sequence_tokens, engine.dtype) == (300, 128, "float32")
    assert (await start(max_sequence_tokens=40)).max_sequence_tokens == 40


async def test_models_that_cannot_be_batched_or_loaded_are_refused_at_the_start(tmp_path):
    config = MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "window")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "nothing-known"}')
    for name, said in (
        ("window", "MistralForCausalLM keeps something else than the keys and values of all positions"),
        ("unknown", "transformers does not load .*unknown"),
    ):
        engine = TransformersEngine(tmp_path / name, PolicySettings(model=name, threads=1))
        with pytest.raises(StartError, match=said):
            await engine.start()
        await engine.stop()  # As a service does that could not start.

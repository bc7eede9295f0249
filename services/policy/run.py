"""The work of one request: its completions, and the calls that follow it.

Work and call are apart, so that a call that is tried again joins the work of the one before. Indices count completions:
prompt_index * n + sample_index.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from quartet.common.v1 import common_pb2
from quartet.policy.v1 import policy_pb2
from services.hosting import serving
from services.policy import asked
from services.policy.adapters import Adapter
from services.policy.budget import Budget
from services.policy.engine import (
    EngineFailedError,
    Finish,
    Generated,
    GenerationFailedError,
    GenerationRefusedError,
    GenerationTask,
    Sampling,
    cut_spans,
)
from services.policy.hosted import HostedPolicy
from services.policy.text_stream import TextStream, decode
from services.runtime import calls
from services.runtime.errors import UnavailableError

_FINISH = {
    Finish.STOP: policy_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: policy_pb2.FINISH_REASON_LENGTH,
    Finish.ABORTED: policy_pb2.FINISH_REASON_ABORTED,
}
_BROKEN = "the model gives a log-probability that is not a finite number: its weights are broken"


class House(Protocol):
    """What a run needs of the service around it."""

    budget: Budget

    def count_tokens(self, prompt: int, generated: int) -> None:
        """Of a completion that was generated."""

    def stop(self, reason: str) -> None:
        """Ends the service: its engine died."""


@dataclass(kw_only=True)
class _Progress:
    """What is there of a completion that is not finished."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""


@dataclass(eq=False)
class _Follower:
    """A call that follows the work. What it has yet to send, each index once: so a slow client holds no queue."""

    sent: dict[int, tuple[int, int]] = field(default_factory=dict)  # Tokens and characters of it, by index.
    finished: deque[int] = field(default_factory=deque)
    moved: dict[int, None] = field(default_factory=dict)  # In order.
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Keep(Protocol):
    """Where results are kept for a retry."""

    def grow(self, count: int) -> bool:
        """Told the bytes of a result; False when the run is not kept any more."""

    def rest(self) -> None:
        """Told that nobody follows any more and nothing runs."""


class GenerationRun:
    """All completions of one request. Runs while somebody follows; stops at once when the last call has left."""

    def __init__(
        self, house: House, hosted: HostedPolicy, n: int, *, keep: Keep | None = None, grace_s: float = 0.0
    ) -> None:
        """
        Args:
            house: the service around it.
            hosted: what generates.
            n: completions a prompt.
            keep: keeps the results for a retry; without one they are let go as soon as they are sent.
            grace_s: seconds that the work goes on after the last call has left.
        """
        self.hosted = hosted
        self.n = n
        self._house = house
        self._keep = keep
        self._grace_s = grace_s if keep is not None else 0.0
        self._seed = asked.draw_seed()
        self._replies: dict[int, policy_pb2.GenerateResponse] = {}
        self._progress: dict[int, _Progress] = {}
        self._tasks: dict[int, asyncio.Task[policy_pb2.GenerateResponse]] = {}
        self._followers: set[_Follower] = set()
        self._error: BaseException | None = None
        self._places = 0
        self._tokens: dict[int, int] = {}  # What each completion counts that is not finished.
        self._prompt_tokens: list[int] = []
        self._begun = False
        self._grace: asyncio.TimerHandle | None = None
        self._held = contextlib.ExitStack()
        self._adapter: Adapter | None = None
        self._prompts: asyncio.Task[list[list[int] | str]] | None = None

    async def follow(
        self,
        request: policy_pb2.GenerateRequest,
        sampling: Sampling,
        stop_strings: Sequence[str],
        indices: Sequence[int],
        held: contextlib.ExitStack,
    ) -> AsyncGenerator[policy_pb2.GenerateResponse, None]:
        """Begins what of ``indices`` is neither finished nor running; yields each once, and its tokens when asked for.

        ``held``: what the call holds of the budget; the run takes it over when it outlives the call.

        Raises:
            InvalidArgumentError: what would have to begin is more than may ever be in hand.
            OverloadedError: there is no room for it now.
            UnavailableError: the engine died.
        """
        follower = _Follower()
        self._followers.add(follower)
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        waiting = set(indices)
        try:
            self._begin(request, sampling, stop_strings, indices)
            follower.finished.extend(index for index in self._replies if index in waiting)
            follower.moved.update(dict.fromkeys(index for index in self._progress if index in waiting))
            while waiting:
                if follower.finished:
                    index = follower.finished.popleft()
                    if index not in waiting:
                        continue
                    reply = self._replies[index]
                    if request.stream_tokens and (delta := self._last_delta(follower, index, reply)) is not None:
                        yield delta
                    waiting.discard(index)
                    follower.sent.pop(index, None)
                    follower.moved.pop(index, None)
                    if self._keep is None and len(self._followers) == 1:
                        del self._replies[index]  # Nobody else can come for it.
                    yield reply
                elif follower.moved:
                    index = next(iter(follower.moved))
                    del follower.moved[index]
                    if index in waiting and (progress := self._progress.get(index)) is not None:
                        yield self._delta(follower, index, progress.token_ids, progress.logprobs, progress.text)
                elif self._error is not None:
                    raise self._error
                else:
                    await follower.news.wait()
                    follower.news.clear()
        finally:
            self._followers.discard(follower)
            if not self._followers:
                if self._grace_s and self._tasks:
                    self._held.close()
                    self._held = held.pop_all()
                    self._grace = asyncio.get_running_loop().call_later(self._grace_s, self._rest)
                else:
                    self._rest()

    @property
    def failed(self) -> bool:
        """It cannot go on; a retry needs a new one."""
        return self._error is not None

    @property
    def begun(self) -> bool:
        """Whether it ever had room: what was refused at the door leaves nothing to come back for."""
        return self._begun

    def _begin(
        self,
        request: policy_pb2.GenerateRequest,
        sampling: Sampling,
        stop_strings: Sequence[str],
        indices: Sequence[int],
    ) -> None:
        missing = [index for index in indices if index not in self._replies and index not in self._tasks]
        if not missing:
            return
        if self._adapter is None:
            self._adapter = self.hosted.adapters.take(request.adapter)
        budget, most_new = self._house.budget, sampling.max_new_tokens
        if self._prompts is None:
            longest = self.hosted.engine.max_sequence_tokens
            self._prompt_tokens = budget.expect(request.prompts, samples=self.n, new_tokens=most_new, longest=longest)
        tokens = {index: self._prompt_tokens[index // self.n] + most_new for index in missing}
        budget.admit(len(missing), sum(tokens.values()))
        self._tokens |= tokens
        self._places += len(missing)
        self._begun = True
        if self._prompts is None:
            self._prompts = asyncio.create_task(self._read(request, sampling))
        seeds = asked.seeds_of(request.sampling, len(request.prompts), self.n, self._seed)
        call_id = f"{calls.current_request_id()}.{secrets.token_hex(4)}"
        for index in missing:
            work = GenerationTask(
                prompt_ids=[],
                sampling=sampling,
                seed=seeds[index],
                request_id=f"{call_id}-{index // self.n}-{index % self.n}",
                adapter=self._adapter.number if self._adapter is not None else 0,
            )
            task = asyncio.create_task(self._complete(request, work, stop_strings, index, self._prompts))
            self._tasks[index] = task
            task.add_done_callback(functools.partial(self._done, index))

    async def _read(self, request: policy_pb2.GenerateRequest, sampling: Sampling) -> list[list[int] | str]:
        """The token ids of each prompt, or why it is refused; from now on these count, and not what was expected."""
        # Tokenising holds no lock of the interpreter, so it may run beside the event loop.
        prompts = await asyncio.to_thread(
            lambda: [asked.prompt_ids(self.hosted, prompt, sampling) for prompt in request.prompts]
        )
        budget = self._house.budget
        for prompt, ids in zip(request.prompts, prompts, strict=True):
            if not isinstance(ids, str) and prompt.WhichOneof("content") != "token_ids":
                budget.learn(len(ids), prompt.ByteSize())
        self._prompt_tokens = [0 if isinstance(ids, str) else len(ids) for ids in prompts]
        expected, self._tokens = self._tokens, {}
        tokens = {index: self._prompt_tokens[index // self.n] + sampling.max_new_tokens for index in expected}
        budget.recount(sum(expected.values()), sum(tokens.values()))
        self._tokens = tokens
        return prompts

    def _rest(self) -> None:
        """Nobody follows any more: what runs is stopped and its slots are free at once."""
        tasks, self._tasks = self._tasks, {}
        for task in tasks.values():
            task.cancel()
        self._progress.clear()
        self._prompts = None
        budget = self._house.budget
        budget.dropped(sum(self._tokens.values()))
        self._tokens.clear()
        budget.release(self._places)
        self._places = 0
        self._held.close()
        self.hosted.adapters.give_back(self._adapter)
        self._adapter = None
        # What failed for a passing reason is tried again.
        retryable = common_pb2.ITEM_STATUS_CODE_RETRYABLE
        self._replies = {i: reply for i, reply in self._replies.items() if reply.status.code != retryable}
        if self._keep is not None:
            self._keep.rest()

    def _done(self, index: int, task: asyncio.Task[policy_pb2.GenerateResponse]) -> None:
        if self._tasks.get(index) is not task:
            return  # Stopped before.
        del self._tasks[index]
        tokens = self._tokens.pop(index, 0)
        generated = not task.cancelled() and task.exception() is None and task.result().HasField("completion")
        (self._house.budget.finished if generated else self._house.budget.dropped)(tokens)
        if task.cancelled():
            error: BaseException | None = UnavailableError("the service is ending")
        else:
            error = task.exception()
        if error is None:
            reply = task.result()
            self._replies[index] = reply
            self._progress.pop(index, None)
            if self._keep is not None and not self._keep.grow(reply.ByteSize()):
                self._keep = None
            for follower in self._followers:
                follower.finished.append(index)
        elif self._error is None:
            self._error = error
            if isinstance(error, EngineFailedError):
                self._house.stop(str(error))
                self._error = UnavailableError(f"{error}; the service is restarted")
                self._error.__cause__ = error
        for follower in self._followers:
            follower.news.set()

    def _moved(self, index: int) -> None:
        for follower in self._followers:
            follower.moved[index] = None
            follower.news.set()

    # One completion -------------------------------------------------------------------------------------------------

    async def _complete(
        self,
        request: policy_pb2.GenerateRequest,
        work: GenerationTask,
        stop_strings: Sequence[str],
        index: int,
        prompts: asyncio.Task[list[list[int] | str]],
    ) -> policy_pb2.GenerateResponse:
        prompt = (await asyncio.shield(prompts))[index // self.n]
        reply = policy_pb2.GenerateResponse(prompt_index=index // self.n, sample_index=index % self.n)
        if isinstance(prompt, str):
            reply.status.CopyFrom(serving.invalid(prompt))
            reply.served_by.CopyFrom(self.hosted.model.served_by)
            return self._signed(reply)
        work = replace(work, prompt_ids=prompt)
        try:
            if stop_strings or request.stream_tokens:
                generated, stop, text = await self._read_along(request, work, stop_strings, index)
            else:
                generated, stop, text = await self.hosted.engine.generate(work), "", None
        except GenerationFailedError as error:
            reply.status.CopyFrom(serving.failed(str(error), retryable=True))
        except GenerationRefusedError as error:
            reply.status.CopyFrom(serving.invalid(str(error)))
        else:
            if text is None and request.return_text:
                text = decode(self.hosted.tokenizer, generated.token_ids)
            _fill(reply, generated, stop, (text or "") if request.return_text else "")
            if reply.HasField("completion"):
                self._house.count_tokens(len(prompt), len(generated.token_ids))
                if request.prompts[index // self.n].WhichOneof("content") != "token_ids":
                    reply.completion.prompt_token_ids.extend(prompt)
        reply.served_by.CopyFrom(self.hosted.model.served_by)
        return self._signed(reply)

    def _signed(self, reply: policy_pb2.GenerateResponse) -> policy_pb2.GenerateResponse:
        if self._adapter is not None:
            reply.adapter, reply.adapter_fingerprint = self._adapter.name, self._adapter.fingerprint
        return reply

    async def _read_along(
        self, request: policy_pb2.GenerateRequest, work: GenerationTask, stop_strings: Sequence[str], index: int
    ) -> tuple[Generated, str, str | None]:
        """The completion, the stop string that ended it, and its text where that had to be known.

        The pieces that an engine makes differ from run to run; tokens are looked at one by one, so the end does not.
        """
        watch: TextStream | None = None
        if stop_strings or request.return_text:
            watch = TextStream(
                self.hosted.tokenizer, stop_strings=stop_strings, min_tokens=work.sampling.min_new_tokens
            )
        whole = Generated(
            token_ids=[], logprobs=[], finish=Finish.ABORTED, version_spans=[], start_unix_ns=0, end_unix_ns=0
        )
        start_unix_ns = time.time_ns()
        progress = _Progress(token_ids=whole.token_ids, logprobs=whole.logprobs)
        finish: Finish | None = None
        async with contextlib.aclosing(self.hosted.engine.stream(work)) as pieces:
            async for piece in pieces:
                finish, taken = piece.finish, len(piece.token_ids)
                if watch is not None:
                    for place, token in enumerate(piece.token_ids):
                        ends = finish is Finish.STOP and place == taken - 1
                        said = watch.push(token, search=not ends)
                        progress.text += said if request.return_text else ""
                        if watch.stop:
                            finish, taken = Finish.STOP, place + 1
                            break
                whole.token_ids.extend(piece.token_ids[:taken])
                whole.logprobs.extend(piece.logprobs[:taken])
                whole.version_spans.extend(cut_spans(piece.version_spans, 0, taken))
                if finish is not None or not all(map(math.isfinite, piece.logprobs)):
                    break  # Leaving frees its slot, also where a stop string ended it and the engine would go on.
                if request.stream_tokens:
                    self._progress[index] = progress
                    self._moved(index)
        if watch is not None and finish is not None and not watch.stop:
            watch.end(search=finish is Finish.LENGTH)
            finish = Finish.STOP if watch.stop else finish
        generated = replace(
            whole,
            finish=finish or Finish.ABORTED,
            version_spans=_merged(whole.version_spans),
            start_unix_ns=start_unix_ns,
            end_unix_ns=time.time_ns(),
        )
        return generated, watch.stop if watch is not None else "", watch.text if watch is not None else None

    # Deltas ---------------------------------------------------------------------------------------------------------

    def _delta(
        self, follower: _Follower, index: int, token_ids: Sequence[int], logprobs: Sequence[float], text: str
    ) -> policy_pb2.GenerateResponse:
        tokens, characters = follower.sent.get(index, (0, 0))
        follower.sent[index] = (len(token_ids), len(text))
        return policy_pb2.GenerateResponse(
            prompt_index=index // self.n,
            sample_index=index % self.n,
            delta=policy_pb2.TokenDelta(
                token_ids=token_ids[tokens:], logprobs=logprobs[tokens:], text=text[characters:]
            ),
        )

    def _last_delta(
        self, follower: _Follower, index: int, reply: policy_pb2.GenerateResponse
    ) -> policy_pb2.GenerateResponse | None:
        """What of a finished completion the call has not been sent as deltas."""
        done = reply.completion
        if not reply.HasField("completion"):
            return None
        sent = follower.sent.get(index, (0, 0))
        if sent == (len(done.token_ids), len(done.text)):
            return None
        return self._delta(follower, index, done.token_ids, done.logprobs, done.text)


def _fill(reply: policy_pb2.GenerateResponse, generated: Generated, stop: str, text: str) -> None:
    """Status, and the completion where its numbers are numbers."""
    reply.work.start_unix_ns, reply.work.end_unix_ns = generated.start_unix_ns, generated.end_unix_ns
    if not all(map(math.isfinite, generated.logprobs)) or len(generated.logprobs) != len(generated.token_ids):
        reply.status.CopyFrom(serving.invalid(_BROKEN))
        return
    reply.status.CopyFrom(serving.ok())
    completion = reply.completion
    completion.token_ids.extend(generated.token_ids)
    completion.logprobs.extend(generated.logprobs)
    completion.finish_reason = _FINISH[generated.finish]
    completion.text = text
    for version, count in generated.version_spans:
        completion.version_spans.add(weights_version=version, token_count=count)
    if stop:
        completion.stop_string = stop
    elif generated.finish is Finish.STOP and generated.token_ids:
        completion.stop_token_id = generated.token_ids[-1]


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours of one version as one."""
    merged: list[tuple[int, int]] = []
    for version, count in spans:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        else:
            merged.append((version, count))
    return merged

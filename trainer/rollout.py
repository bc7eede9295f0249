"""A rollout: what the services make of a batch of prompts.

Completions stream in from the policy service; as each arrives, the reward and the reference service are asked for it,
so that all three work at the same time. What a service could not do is a failure with a reason, never a number.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from quartet.client import (
    CallPolicy,
    Completion,
    DeadlineError,
    FailedCompletion,
    FinishReason,
    ItemFailure,
    ModelInfo,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    PolicyClient,
    ReferenceClient,
    RewardClient,
    Sampling,
    ScoreItem,
    Security,
    ServedBy,
    TokenSequence,
    Truncation,
    UnavailableError,
)
from quartet.client.channel import split_addresses
from quartet.client.types import WorkInterval
from quartet.fingerprint import derive_seed, tokenizer_fingerprint
from trainer.errors import ServicesError
from trainer.ppo_config import SamplingSettings, ServiceAddresses
from trainer.publishing import Published, Publisher, SampledBy
from trainer.reward_services import HostedReward, ask_rewards, combined, service_title
from trainer.rows import Prompt
from trainer.service_checks import deadline_explained, require_same_tokenizer
from trainer.service_time import covered_s, within_call

T = TypeVar("T")

# So often is a service asked about an item that failed for a passing reason.
_ITEM_TRIES = 3
# So often in a row may the policy service go away without having finished a single completion.
_FRUITLESS_TRIES = 5
# Least pause before a policy service that has no room is asked again.
_PAUSE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class PromptTask:
    """One response to sample: the prompt as the caller has it and as token ids, and the seed of the draw."""

    prompt: Prompt
    ids: tuple[int, ...]
    seed: int
    where: str = ""
    """File and line of the prompt, for messages."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response and what was said about it. T response tokens, the end token among them when there is one."""

    index: int
    """Of its task."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """T natural-log probabilities under the distribution that sampled."""
    ref_logprobs: tuple[float, ...]
    """T of the reference, at the same temperature."""
    score: float
    """As the reward model gives it, neither normalised nor penalised; of several, the weighted sum."""
    finished: bool
    """Whether a stop token ended it."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Raw score of each of several reward services, by name; empty where there is one."""
    weights_version: int = 0
    """Of the policy that sampled it."""
    spread: float | None = None
    """Of the scores of an ensemble's members; None: the reward service hosts none."""
    where: str = ""
    """File and line of its prompt, for messages."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The samples in the order of their tasks, and how they came about."""

    samples: tuple[Sample, ...]
    failures: tuple[str, ...]
    """Why each missing sample is missing."""
    weights_version: int
    duration_s: float
    service_work_s: float
    """Time in which at least one service had our work; the rest of ``duration_s`` is transport and bookkeeping."""
    weights_step: int = 0
    """Steps that had been learned when it was sampled."""

    @property
    def generated_tokens(self) -> int:
        return sum(len(sample.response_ids) for sample in self.samples)


@dataclass(frozen=True, kw_only=True)
class ServiceInfo:
    """What the services host, as they said when they were first asked."""

    policy: ModelInfo
    rewards: tuple[HostedReward, ...]
    reference: ModelInfo

    @property
    def reward(self) -> HostedReward:
        """The reward service; of several, the first."""
        return self.rewards[0]

    @property
    def reward_token_limits(self) -> list[int]:
        """Longest sequence of each reward model that reads the policy's tokens."""
        return [reward.model.max_sequence_tokens for reward in self.rewards if reward.takes_tokens]


class Services:
    """The services as the trainer uses them. Use it as an async context manager."""

    def __init__(
        self,
        addresses: ServiceAddresses,
        tokenizer: Any,
        *,
        policy_admin: Sequence[str] = (),
        admin_security: Security | None = None,
    ) -> None:
        """
        Args:
            addresses: of the services, and how long to wait for them.
            tokenizer: the policy's.
            policy_admin: admin address of every policy replica; without any nothing can be published.
            admin_security: what is shown to them; the services' own is part of ``addresses``.
        """
        call_policy = CallPolicy(deadline_s=addresses.call_deadline_s, patience_s=addresses.ready_timeout_s)
        self._ready_timeout_s = addresses.ready_timeout_s
        self._call_deadline_s = addresses.call_deadline_s
        self._addresses = addresses
        self.tokenizer = tokenizer
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        security = addresses.security
        self.policy = PolicyClient(addresses.policy, policy=call_policy, security=security)
        self.rewards = {
            name: RewardClient(address, policy=call_policy, security=security)
            for name, address in addresses.addresses_of_rewards.items()
        }
        for name, client in self.rewards.items():
            client.name = service_title(name)
        self.reference = ReferenceClient(addresses.reference, policy=call_policy, security=security)
        self._publisher = Publisher(policy_admin, call_policy, addresses.ready_timeout_s, admin_security)
        # A stream is answered by one replica, so there are as many streams.
        self._streams = max(len(policy_admin), len(split_addresses(addresses.policy)))
        self._info: ServiceInfo | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._publisher.close()
        for client in (self.policy, *self.rewards.values(), self.reference):
            await client.close()

    @property
    def info(self) -> ServiceInfo:
        if self._info is None:
            raise RuntimeError("the services were not connected to")
        return self._info

    async def connect(self) -> ServiceInfo:
        """Waits until all services are ready and checks that they fit together.

        Raises:
            NotReadyError: one did not become ready in time; names it.
            ServicesError: a tokenizer is another one than the trainer's, or statistics that were asked for are missing.
        """
        clients = (self.policy, *self.rewards.values(), self.reference)
        await asyncio.gather(*(client.wait_ready(self._ready_timeout_s) for client in clients))
        await self._publisher.wait_ready()
        policy = await self.policy.get_model_info()
        rewards = await ask_rewards(self._addresses, self.rewards, policy.served_by.tokenizer_fingerprint)
        reference = await self.reference.get_model_info()
        for name, info in (("policy", policy), ("reference", reference)):
            require_same_tokenizer(name, info, self.tokenizer_fingerprint)
        self._info = ServiceInfo(policy=policy, rewards=rewards, reference=reference)
        return self._info

    async def publish(self, weights: Published) -> int:
        """Makes every policy replica serve ``weights``; returns their version. Nothing is sent to one that has them.

        Raises:
            QuartetError: a replica refused them or stayed away.
            ServicesError: it took longer than a call may, or an adapter can't be served there.
        """
        with deadline_explained(self._call_deadline_s):
            return await self._publisher.publish(weights)

    async def collect(
        self, tasks: Sequence[PromptTask], settings: SamplingSettings, *, top_p: float = 1.0, top_k: int = 0
    ) -> Rollout:
        """Samples, scores and references every task with the weights published last.

        Raises:
            QuartetError: a service stayed away or refused the request as a whole.
            ServicesError: a service answers with other weights than it should, or took longer than a call may.
        """
        with deadline_explained(self._call_deadline_s):
            return await self._collect(tasks, settings, top_p, top_k)

    async def _collect(
        self, tasks: Sequence[PromptTask], settings: SamplingSettings, top_p: float, top_k: int
    ) -> Rollout:
        start_s, start_ns = time.perf_counter(), time.time_ns()
        await self._publisher.ensure()
        judge = _Judge(self, tasks, settings)
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=top_p,
            top_k=top_k,
            stop_token_ids=settings.stop_token_ids,
        )
        try:
            async with asyncio.TaskGroup() as group:
                judge.start(group)
                try:
                    async with asyncio.TaskGroup() as streams:
                        for part in range(min(self._streams, len(tasks))):
                            indices = range(part, len(tasks), self._streams)
                            streams.create_task(self._generate(tasks, indices, sampling, judge))
                finally:
                    judge.no_more()
        except BaseExceptionGroup as failures_of_tasks:
            raise _first(failures_of_tasks) from failures_of_tasks
        samples, failures = judge.results()
        return Rollout(
            samples=samples,
            failures=failures,
            weights_version=self._expected.version,
            duration_s=time.perf_counter() - start_s,
            service_work_s=covered_s(judge.work, start_ns, time.time_ns()),
        )

    async def _generate(
        self, tasks: Sequence[PromptTask], indices: Sequence[int], sampling: Sampling, judge: _Judge
    ) -> None:
        """Streams completions to the judge; what a policy service that went away, or a call that took too long, has not
        finished is asked again."""
        missing = dict.fromkeys(indices, _ITEM_TRIES)  # Tries left.
        fruitless = 0
        progress_s = time.monotonic()
        while missing:
            asked = list(missing)
            asked_ns = time.time_ns()
            before, updates = len(missing), self._publisher.updates
            stale: Completion | None = None
            try:
                async with contextlib.aclosing(self._stream([tasks[i] for i in asked], sampling)) as stream:
                    async for item in stream:
                        index = asked[item.prompt_index]
                        if isinstance(item, Completion) and not self._expected.has_sampled(item):
                            stale = item
                            break
                        if isinstance(item, FailedCompletion) and item.failure.retryable and missing[index] > 1:
                            missing[index] -= 1
                            continue
                        del missing[index]
                        judge.put(index, item, asked_ns)
            except DeadlineError:
                if len(missing) == before:
                    raise
            except NotFoundError:
                # Of the adapter: a replica came back between two calls, without it.
                await self._publisher.ensure()
                if self._publisher.updates == updates:
                    raise
            except OverloadedError as error:
                # It has others to serve, too: come back when it says, for as long as it might take to be ready.
                if len(missing) < before:
                    progress_s = time.monotonic()
                if time.monotonic() - progress_s > self._ready_timeout_s:
                    raise
                await asyncio.sleep(max(_PAUSE_S, error.retry_after_s))
            except UnavailableError as error:
                fruitless = fruitless + 1 if len(missing) == before else 0
                if fruitless == _FRUITLESS_TRIES:
                    raise NotReadyError(
                        f"went away {fruitless} times in a row without finishing anything, at last: {error.message}",
                        service="policy service",
                    ) from error
                await self.policy.wait_ready(self._ready_timeout_s)
                await self._publisher.ensure()
            if stale is not None:
                # It came back between two calls, with the weights it was started with. All known replicas were current
                # before this call, so one of them has been given weights since.
                await self._publisher.ensure()
                if self._publisher.updates == updates:
                    raise ServicesError(self._why_stale(stale))

    def _why_stale(self, completion: Completion) -> str:
        found, expected = completion.served_by, self._expected
        above = f"adapter {completion.adapter!r} above " if completion.adapter else ""
        answer = (
            f"a replica of the policy service answers with {above}weights version {found.weights_version} "
            f"({found.weights_fingerprint[:12]}...)"
        )
        if self._publisher.sampled_by is None:
            return (
                f"{answer}, the first one that was asked had version {expected.version} ({expected.weights[:12]}...): "
                "the replicas serve different weights, or one of them was restarted"
            )
        published = expected.adapter or f"version {expected.version} ({expected.weights[:12]}...)"
        return (
            f"{answer} instead of the published {published}, and no --policy-admin "
            "address leads to it: name the admin address of every replica"
        )

    def _stream(
        self, tasks: Sequence[PromptTask], sampling: Sampling
    ) -> AsyncGenerator[Completion | FailedCompletion, None]:
        return self.policy.generate(
            [task.ids for task in tasks],
            sampling,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            prompt_seeds=[task.seed for task in tasks],
            adapter=self._expected.adapter,
            patience_s=0.0,  # A service that comes back is first given the current weights.
        )

    @property
    def _expected(self) -> SampledBy:
        """What is to sample: what was published last, or else the weights found at the start."""
        found = self.info.policy.served_by
        return self._publisher.sampled_by or SampledBy(version=found.weights_version, weights=found.weights_fingerprint)

    def version_of(self, completion: Completion) -> int:
        """Of what sampled it; all its tokens have the same, or it would have been sampled again."""
        if completion.adapter:
            return self._expected.version
        spans = completion.version_spans
        return spans[0][0] if spans else completion.served_by.weights_version


_Item = tuple[int, Completion]
_Ask = Callable[[Sequence[_Item]], Awaitable[Sequence[T | ItemFailure]]]


class _Judge:
    """Asks the reward and the reference service about completions while others are still being generated."""

    def __init__(self, services: Services, tasks: Sequence[PromptTask], settings: SamplingSettings) -> None:
        self._services = services
        self._tasks = tasks
        self._temperature = settings.temperature
        self._truncation = Truncation(settings.truncation)
        self._stop_ids = frozenset((*services.info.policy.eos_token_ids, *settings.stop_token_ids))
        self._arrived: asyncio.Queue[tuple[int, Completion] | None] = asyncio.Queue()
        self._responses: dict[int, Completion] = {}
        self._scores: dict[str, dict[int, float]] = {reward.name: {} for reward in services.info.rewards}
        self._spreads: dict[int, float | None] = {}
        self._references: dict[int, tuple[float, ...]] = {}
        self._failures: dict[int, str] = {}
        self.work: list[WorkInterval] = []

    def start(self, group: asyncio.TaskGroup) -> None:
        group.create_task(self._run(group))

    def put(self, index: int, item: Completion | FailedCompletion, asked_ns: int) -> None:
        """Takes what became of a task that the policy service was asked for at ``asked_ns``."""
        if isinstance(item, FailedCompletion):
            self._failures[index] = f"policy service: {item.failure.reason}"
        elif item.finish_reason is FinishReason.ABORTED or not item.token_ids:
            self._failures[index] = f"policy service: a response of {len(item.token_ids)} tokens, {item.finish_reason}"
        else:
            completion = cut_at_stop(item, self._stop_ids)
            self.work.append(within_call(item.work, asked_ns, time.time_ns()))
            self._responses[index] = completion
            self._arrived.put_nowait((index, completion))

    def no_more(self) -> None:
        self._arrived.put_nowait(None)

    async def _run(self, group: asyncio.TaskGroup) -> None:
        open_ = True
        while open_:
            # Without a timer: whatever came while the last batch was sent goes together.
            batch = [await self._arrived.get()]
            while not self._arrived.empty():
                batch.append(self._arrived.get_nowait())
            open_ = None not in batch
            items = [item for item in batch if item is not None]
            if items:
                for reward in self._services.info.rewards:
                    ask = functools.partial(self._score, reward)
                    group.create_task(self._settle(reward.title, items, ask, self._scores[reward.name]))
                group.create_task(self._settle("reference service", items, self._reference, self._references))

    async def _settle(self, name: str, items: Sequence[_Item], ask: _Ask[T], into: dict[int, T]) -> None:
        """Asks about ``items`` until each has a result or a failure; passing failures are tried again."""
        for tries_left in reversed(range(_ITEM_TRIES)):
            again: list[_Item] = []
            for item, result in zip(items, await ask(items), strict=True):
                if not isinstance(result, ItemFailure):
                    into[item[0]] = result
                elif result.retryable and tries_left:
                    again.append(item)
                else:
                    self._failures.setdefault(item[0], f"{name}: {result.reason}")
            if not again:
                return
            items = again

    async def _score(self, reward: HostedReward, items: Sequence[_Item]) -> list[float | ItemFailure]:
        services = self._services
        asked_ns = time.time_ns()
        scores = await services.rewards[reward.name].score(
            [self._score_item(index, completion, reward.takes_tokens) for index, completion in items],
            tokenizer_fingerprint=services.tokenizer_fingerprint if reward.takes_tokens else "",
            # Token ids fit: prompts were cut to the shortest model's length. How long text is, the service alone knows.
            truncation=Truncation.REFUSE if reward.takes_tokens else self._truncation,
        )
        require_same_judge(reward.title, scores.served_by, reward.model.served_by)
        self.work.append(within_call(scores.work, asked_ns, time.time_ns()))
        if not reward.name:  # Those of several services have no unit in common.
            for (index, _), result in zip(items, scores.results, strict=True):
                self._spreads[index] = None if isinstance(result, ItemFailure) else result.spread
        return [result if isinstance(result, ItemFailure) else result.score for result in scores.results]

    def _score_item(self, index: int, completion: Completion, takes_tokens: bool) -> ScoreItem:
        finished = completion.token_ids[-1] in self._stop_ids
        return score_item(self._tasks[index], completion.token_ids, finished, self._services.tokenizer, takes_tokens)

    async def _reference(self, items: Sequence[_Item]) -> list[tuple[float, ...] | ItemFailure]:
        services = self._services
        sequences = [
            TokenSequence(
                token_ids=(*self._tasks[index].ids, *completion.token_ids), response_start=len(self._tasks[index].ids)
            )
            for index, completion in items
        ]
        asked_ns = time.time_ns()
        batch = await services.reference.logprobs(
            sequences, tokenizer_fingerprint=services.tokenizer_fingerprint, temperature=self._temperature
        )
        require_same_judge("reference service", batch.served_by, services.info.reference.served_by)
        self.work.append(within_call(batch.work, asked_ns, time.time_ns()))
        return [result if isinstance(result, ItemFailure) else result.logprobs for result in batch.results]

    def results(self) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
        """Samples and failures in the order of the tasks, whatever order they arrived in."""
        rewards = self._services.info.rewards
        samples = []
        for index, completion in sorted(self._responses.items()):
            if index in self._failures:  # Of any service: a part of a score is none.
                continue
            scores = {name: found[index] for name, found in self._scores.items()}
            samples.append(
                Sample(
                    index=index,
                    prompt_ids=self._tasks[index].ids,
                    response_ids=completion.token_ids,
                    logprobs=completion.logprobs,
                    ref_logprobs=self._references[index],
                    score=combined(rewards, scores),
                    finished=completion.token_ids[-1] in self._stop_ids,
                    scores=scores if rewards[0].name else {},
                    spread=self._spreads.get(index),
                    weights_version=self._services.version_of(completion),
                    where=self._tasks[index].where,
                )
            )
        named = [(self._tasks[index].where, reason) for index, reason in sorted(self._failures.items())]
        return tuple(samples), tuple(f"{where}: {reason}" if where else reason for where, reason in named)


def prompt_seed(seed: int, purpose: str, step: int, prompt: int, sample: int) -> int:
    """The seed of one draw: the same in a resumed run, another for every step, prompt and sample."""
    return derive_seed(purpose, seed, step, prompt, sample)


def score_item(
    task: PromptTask, response_ids: Sequence[int], finished: bool, tokenizer: Any, takes_tokens: bool
) -> ScoreItem:
    """A response as a reward model is asked about it: token ids where it reads the policy's, else text."""
    if takes_tokens:
        return ScoreItem(prompt=task.ids, response=response_ids)
    text_ids = response_ids[:-1] if finished else response_ids
    text = tokenizer.decode(text_ids, skip_special_tokens=True)
    return ScoreItem(prompt=task.prompt, response=text, finished=finished)


def cut_at_stop(completion: Completion, stop_ids: frozenset[int]) -> Completion:
    """Up to and including the first stop token, so that the reward model sees what a reader would."""
    end = next((i for i, token in enumerate(completion.token_ids) if token in stop_ids), None)
    if end is None or end + 1 == len(completion.token_ids):
        return completion
    values = completion.__dict__ | {
        "token_ids": completion.token_ids[: end + 1],
        "logprobs": completion.logprobs[: end + 1],
    }
    return Completion(**values)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def require_same_judge(name: str, answered: ServedBy, expected: ServedBy) -> None:
    """The reward and the reference model are frozen for a run.

    Raises:
        ServicesError: another model answers under the same address.
    """
    if answered.result_fingerprint != expected.result_fingerprint:
        raise ServicesError(
            f"the {name} now serves {answered.model_id!r} ({answered.result_fingerprint[:12]}...), "
            f"at the start of the run it was {expected.model_id!r} ({expected.result_fingerprint[:12]}...): figures of "
            "the two can't be compared; start it with the former model and settings and resume the run"
        )

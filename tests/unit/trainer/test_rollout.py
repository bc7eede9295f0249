"""Rollouts against scripted services: real gRPC servers on loopback that fail on cue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from hypothesis import given
from hypothesis import strategies as st

from quartet.client import Completion, NotReadyError, OverloadedError
from quartet.client.policy import UPDATE_ACCEPTED, FinishReason
from quartet.client.types import ServedBy, WorkInterval
from quartet.common.v1 import common_pb2
from quartet.fingerprint import tokenizer_fingerprint
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc, weights_pb2, weights_pb2_grpc
from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from trainer.errors import ServicesError
from trainer.experience import make_experience
from trainer.ppo_config import SamplingSettings, ServiceAddresses
from trainer.publishing import Weights
from trainer.reward_services import means_by_name
from trainer.rollout import PromptTask, Services, cut_at_stop, prompt_seed

OK = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)
END = 1


class ScriptedPolicy(policy_pb2_grpc.PolicyServiceServicer, weights_pb2_grpc.WeightsServiceServicer):
    """Answers prompt p with the tokens (p, p, END), or what ``answers`` has for p, at log-probability -p each;
    ``script`` may break a call."""

    def __init__(self, fingerprint: str) -> None:
        self.model = common_pb2.ModelInfo(
            served_by=common_pb2.ServedBy(model_id="p", weights_fingerprint="start", tokenizer_fingerprint=fingerprint),
            vocab_size=1000,
            max_sequence_tokens=100,
            eos_token_ids=[END],
        )
        self.script: list[Callable[[int], None]] = []
        self.asked: list[list[int]] = []
        self.updates: list[int] = []
        self.busy: dict[int, int] = {}
        self.answers: dict[int, list[int]] = {}
        self.requests: list[policy_pb2.GenerateRequest] = []
        self.stall_after: int | None = None
        """So many completions of a call are finished, then nothing happens."""

    async def GetModelInfo(self, request: Any, context: Any) -> policy_pb2.GetModelInfoResponse:
        return policy_pb2.GetModelInfoResponse(model=self.model)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[policy_pb2.GenerateResponse]:
        first_ids = [prompt.token_ids.ids[0] for prompt in request.prompts]
        self.asked.append(first_ids)
        self.requests.append(request)
        on_answer = self.script.pop(0) if self.script else None
        for index, first in enumerate(first_ids):
            if index == self.stall_after:
                await asyncio.sleep(60.0)
            if on_answer is not None:
                try:
                    on_answer(index)
                except ConnectionError:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                except BlockingIOError:
                    pushback = (("grpc-retry-pushback-ms", "10"),)
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", trailing_metadata=pushback)
            reply = policy_pb2.GenerateResponse(prompt_index=index, status=OK, served_by=self.model.served_by)
            if self.busy.get(first, 0) > 0:
                self.busy[first] -= 1
                reply.status.CopyFrom(
                    common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_RETRYABLE, reason="the engine hiccuped")
                )
            elif first == 999:
                reply.status.CopyFrom(
                    common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_INVALID, reason="prompt is bad")
                )
            else:
                tokens = self.answers.get(first, [first, first, END])
                reply.completion.token_ids.extend(tokens)
                reply.completion.logprobs.extend([-float(first)] * len(tokens))
                # What an engine says of the end does not count: the stop ids may be ours alone.
                reply.completion.finish_reason = policy_pb2.FINISH_REASON_STOP
                version = self.model.served_by.weights_version
                reply.completion.version_spans.add(weights_version=version, token_count=len(tokens))
            yield reply

    async def GetWeightsInfo(self, request: Any, context: Any) -> weights_pb2.GetWeightsInfoResponse:
        return weights_pb2.GetWeightsInfoResponse(served_by=self.model.served_by)

    async def UpdateWeights(self, steps: Any, context: Any) -> weights_pb2.UpdateWeightsResponse:
        async for step in steps:
            if step.WhichOneof("step") == "begin":
                version = step.begin.weights_version
                await context.send_initial_metadata(((UPDATE_ACCEPTED, "1"),))
            elif step.WhichOneof("step") == "commit":
                self.updates.append(version)
                self.model.served_by.weights_version = version
                self.model.served_by.weights_fingerprint = step.commit.weights_fingerprint
        return weights_pb2.UpdateWeightsResponse(served_by=self.model.served_by)

    def restart(self) -> None:
        """As a new process: the weights of its folder, version 0."""
        self.model.served_by.weights_version = 0
        self.model.served_by.weights_fingerprint = "start"


class ScriptedReward(reward_pb2_grpc.RewardServiceServicer):
    """The score is the first token's id times ``factor``; ids in ``failing`` fail that often, in ``refused`` always.

    ``statistics``: mean, standard deviation and count that are kept with the model.
    """

    def __init__(self, fingerprint: str) -> None:
        served_by = common_pb2.ServedBy(model_id="r", weights_fingerprint="r0", tokenizer_fingerprint=fingerprint)
        self.model = common_pb2.ModelInfo(served_by=served_by, max_sequence_tokens=100)
        self.failing: dict[int, int] = {}
        self.refused: set[int] = set()
        self.truncations: set[int] = set()
        self.items: list[reward_pb2.ScoreItem] = []
        self.works_s, self.clock_ahead_s = 0.0, 0.0
        self.factor, self.statistics = 1.0, None

    async def GetModelInfo(self, request: Any, context: Any) -> reward_pb2.GetModelInfoResponse:
        return reward_pb2.GetModelInfoResponse(model=self.model, normalisation=self.statistics)

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        reply = reward_pb2.ScoreResponse(served_by=self.model.served_by)
        reply.work.start_unix_ns = time.time_ns() + int(self.clock_ahead_s * 1e9)
        await asyncio.sleep(self.works_s)
        reply.work.end_unix_ns = time.time_ns() + int(self.clock_ahead_s * 1e9)
        self.truncations.add(request.truncation)
        self.items.extend(request.items)
        for item in request.items:
            first = item.prompt.token_ids.ids[0] if item.prompt.token_ids.ids else int(item.prompt.text.split()[-1])
            if self.failing.get(first, 0) > 0:
                self.failing[first] -= 1
                status = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_RETRYABLE, reason="busy")
                reply.results.add(status=status)
            elif first in self.refused:
                status = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_INVALID, reason="too long for me")
                reply.results.add(status=status)
            else:
                reply.results.add(status=OK, score=self.factor * first, token_count=3)
        return reply


class ScriptedReference(reference_pb2_grpc.ReferenceServiceServicer):
    """Log-probabilities -1, -2, -3, ... times the temperature."""

    def __init__(self, fingerprint: str) -> None:
        served_by = common_pb2.ServedBy(model_id="f", weights_fingerprint="f0", tokenizer_fingerprint=fingerprint)
        self.model = common_pb2.ModelInfo(served_by=served_by, max_sequence_tokens=100)
        self.requests: list[reference_pb2.LogProbsRequest] = []

    async def GetModelInfo(self, request: Any, context: Any) -> reference_pb2.GetModelInfoResponse:
        return reference_pb2.GetModelInfoResponse(model=self.model)

    async def LogProbs(self, request: Any, context: Any) -> reference_pb2.LogProbsResponse:
        reply = reference_pb2.LogProbsResponse(served_by=self.model.served_by)
        self.requests.append(request)
        for item in request.items:
            count = len(item.token_ids) - item.response_start
            logprobs = [-(i + 1.0) * request.temperature for i in range(count)]
            reply.results.add(status=OK, logprobs=logprobs)
        return reply


@contextlib.asynccontextmanager
async def serve(*servicers: Any) -> AsyncIterator[str]:
    """One server of all ``servicers`` on loopback; yields its address."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health = HealthServicer()
    for servicer in servicers:
        if isinstance(servicer, ScriptedPolicy):
            policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server)
            weights_pb2_grpc.add_WeightsServiceServicer_to_server(servicer, server)
        elif isinstance(servicer, ScriptedReward):
            reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
        else:
            reference_pb2_grpc.add_ReferenceServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    for name in ("policy.v1.PolicyService", "policy.v1.WeightsService", "reward.v1.RewardService"):
        await health.set(f"quartet.{name}", health_pb2.HealthCheckResponse.SERVING)
    await health.set("quartet.reference.v1.ReferenceService", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def scripted(
    tokenizer: Any, *, reward_tokenizer: str | None = None, **waiting: float
) -> AsyncIterator[tuple[ScriptedPolicy, ScriptedReward, ScriptedReference, Services]]:
    fingerprint = tokenizer_fingerprint(tokenizer)
    policy, reference = ScriptedPolicy(fingerprint), ScriptedReference(fingerprint)
    reward = ScriptedReward(reward_tokenizer or fingerprint)
    async with serve(policy, reward, reference) as address:
        waiting = {"ready_timeout_s": 5.0} | waiting
        where = ServiceAddresses(policy=address, reward=address, reference=address, **waiting)
        async with Services(where, tokenizer, policy_admin=(address,)) as services:
            await services.connect()
            yield policy, reward, reference, services


def tasks(*firsts: int) -> list[PromptTask]:
    return [PromptTask(prompt=f"prompt {first}", ids=(first, 7), seed=first) for first in firsts]


SAMPLING = SamplingSettings(max_new_tokens=10, temperature=0.5)
WEIGHTS = Weights.of([("w", torch.arange(6.0).view(2, 3))])


async def test_every_sample_carries_what_was_said_about_it_in_the_order_of_the_tasks(tokenizer):
    async with scripted(tokenizer) as (_, _, _, services):
        await services.publish(WEIGHTS)
        rollout = await services.collect(tasks(5, 3, 9), SAMPLING)
    assert [sample.prompt_ids for sample in rollout.samples] == [(5, 7), (3, 7), (9, 7)]
    assert [sample.response_ids for sample in rollout.samples] == [(5, 5, END), (3, 3, END), (9, 9, END)]
    assert [sample.score for sample in rollout.samples] == [5.0, 3.0, 9.0]
    assert rollout.samples[0].logprobs == (-5.0, -5.0, -5.0)
    assert rollout.samples[0].ref_logprobs == (-0.5, -1.0, -1.5)
    assert all(sample.finished for sample in rollout.samples)
    assert rollout.weights_version == 1
    assert rollout.failures == ()


async def test_policy_and_reference_are_asked_for_the_temperature_of_the_settings_and_all_of_the_distribution(
    tokenizer,
):
    """Row 8."""
    async with scripted(tokenizer) as (policy, _, reference, services):
        await services.publish(WEIGHTS)
        for temperature in (0.7, 1.5):
            await services.collect(tasks(2, 3), SamplingSettings(max_new_tokens=10, temperature=temperature))
    asked = [request.sampling for request in policy.requests]
    assert [sampling.temperature for sampling in asked] == pytest.approx([0.7, 1.5])
    assert {(sampling.top_p, sampling.top_k, sampling.max_new_tokens) for sampling in asked} == {(1.0, 0, 10)}
    found = [request.temperature for request in reference.requests]
    assert found == pytest.approx(sorted(found))
    assert {round(temperature, 6) for temperature in found} == {0.7, 1.5}


# Where a response ends, and whether by itself.


async def test_an_end_token_in_the_prompt_does_not_excuse_a_response_without_one(tokenizer):
    """Row 6. Historical: trl#6805. Templates end each turn with EOS: a check on prompt + response always finds one."""
    asked = [PromptTask(prompt=f"prompt {first}", ids=(first, END, 7), seed=first) for first in (3, 4, 5)]
    async with scripted(tokenizer) as (policy, _, _, services):
        await services.publish(WEIGHTS)
        policy.answers = {3: [8, 9, 8], 5: [END]}
        rollout = await services.collect(asked, SAMPLING)
    assert [sample.response_ids for sample in rollout.samples] == [(8, 9, 8), (4, 4, END), (END,)]
    assert [sample.finished for sample in rollout.samples] == [False, True, True]
    # And so it is only the first of them that pays.
    assert make_experience(rollout.samples, torch.device("cpu")).finished_N.tolist() == [False, True, True]


async def test_only_the_text_up_to_the_first_stop_token_is_judged(tokenizer):
    """Row 21."""
    settings = SamplingSettings(max_new_tokens=10, temperature=0.5, stop_token_ids=(9,))
    async with scripted(tokenizer) as (policy, reward, reference, services):
        await services.publish(WEIGHTS)
        policy.answers = {3: [8, 9, 8, END], 4: [8, 8, END, 9], 5: [8, 8, 8]}
        rollout = await services.collect(tasks(3, 4, 5), settings)
    expected = [(8, 9), (8, 8, END), (8, 8, 8)]
    assert [sample.response_ids for sample in rollout.samples] == expected
    assert [sample.finished for sample in rollout.samples] == [True, True, False]
    assert [len(sample.logprobs) for sample in rollout.samples] == [2, 3, 3]
    assert [len(sample.ref_logprobs) for sample in rollout.samples] == [2, 3, 3]
    assert sorted(tuple(item.response_token_ids.ids) for item in reward.items) == sorted(expected)
    assert sorted(tuple(item.token_ids) for request in reference.requests for item in request.items) == [
        (3, 7, 8, 9),
        (4, 7, 8, 8, END),
        (5, 7, 8, 8, 8),
    ]
    assert {tuple(request.sampling.stop_token_ids) for request in policy.requests} == {(9,)}


async def test_a_reward_model_that_reads_text_is_told_whether_the_response_ended(tokenizer):
    async with scripted(tokenizer, reward_tokenizer="0" * 64) as (policy, reward, _, services):
        await services.publish(WEIGHTS)
        a, b = tokenizer.encode("hello thanks", add_special_tokens=False)[:2]
        policy.answers = {3: [a, b, END, a], 4: [a, b]}
        await services.collect(tasks(3, 4), SAMPLING)
    text = tokenizer.decode([a, b])
    judged = sorted((item.prompt.text, item.response_text, not item.response_unfinished) for item in reward.items)
    assert judged == [("prompt 3", text, True), ("prompt 4", text, False)]


async def test_a_passing_failure_is_asked_again_and_a_lasting_one_is_dropped_and_named(tokenizer):
    async with scripted(tokenizer) as (_, reward, _, services):
        await services.publish(WEIGHTS)
        reward.failing, reward.refused = {3: 2, 4: 99}, {5}
        rollout = await services.collect(tasks(2, 3, 4, 5, 999), SAMPLING)
    assert [sample.score for sample in rollout.samples] == [2.0, 3.0]
    assert rollout.failures == (
        "reward service: busy",
        "reward service: too long for me",
        "policy service: prompt is bad",
    )


@contextlib.asynccontextmanager
async def two_rewards(
    tokenizer: Any, **settings: Any
) -> AsyncIterator[tuple[ScriptedReward, ScriptedReward, ServiceAddresses]]:
    """A helpful one with statistics and a safe one without, which scores the negative of twice the first token."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    helpful, safe = ScriptedReward(fingerprint), ScriptedReward("another")  # The second reads text.
    helpful.statistics = reward_pb2.Normalisation(mean=10.0, std=4.0, count=9)
    safe.factor = -2.0
    safe.model.served_by.weights_fingerprint = "r1"
    others = serve(ScriptedPolicy(fingerprint), helpful, ScriptedReference(fingerprint))
    async with others as address, serve(safe) as address_of_safe:
        rewards = (f"helpful={address}", f"safe={address_of_safe}")
        yield helpful, safe, ServiceAddresses(policy=address, reference=address, rewards=rewards, **settings)


async def test_scores_of_several_services_are_normalised_each_by_its_own_and_summed_by_weight(tokenizer, capsys):
    for more, score in (
        ({"reward_weights": (1.0, 0.5)}, lambda first: (first - 10) / 4 - 0.5 * 2 * first),
        ({"normalise_reward": "off"}, lambda first: first - 2 * first),
        ({"reward_weights": (2.0, 0.0)}, lambda first: 2 * (first - 10) / 4),
    ):
        async with two_rewards(tokenizer, **more) as (_, _, where), Services(where, tokenizer) as services:
            info = await services.connect()
            rollout = await services.collect(tasks(5, 6, 7), SAMPLING)
        assert [sample.score for sample in rollout.samples] == pytest.approx([score(first) for first in (5, 6, 7)])
        assert [dict(sample.scores) for sample in rollout.samples] == [
            {"helpful": first, "safe": -2 * first} for first in (5, 6, 7)
        ]
        assert [reward.takes_tokens for reward in info.rewards] == [True, False]
        assert [judge for reward in info.rewards for judge in reward.as_judge()] == [
            "reward helpful", "normalisation helpful", "reward safe", "normalisation safe"
        ]  # fmt: skip
        assert means_by_name([sample.scores for sample in rollout.samples], "reward") == {
            "reward/helpful_mean": 6.0,
            "reward/safe_mean": -12.0,
        }
    assert "warning: scores of safe are summed up as they are" in capsys.readouterr().err


async def test_a_sample_that_one_of_several_services_failed_fails_as_a_whole_and_names_it(tokenizer):
    async with two_rewards(tokenizer) as (helpful, safe, where), Services(where, tokenizer) as services:
        await services.connect()
        helpful.refused, safe.refused, safe.failing = {5}, {7}, {8: 2}
        rollout = await services.collect(tasks(5, 6, 7, 8), SAMPLING)
    assert [sample.index for sample in rollout.samples] == [1, 3]
    assert rollout.failures == (
        "reward service helpful: too long for me",
        "reward service safe: too long for me",
    )


async def test_one_of_several_services_that_is_exchanged_or_has_no_statistics_is_named(tokenizer):
    async with two_rewards(tokenizer) as (_, safe, where), Services(where, tokenizer) as services:
        await services.connect()
        safe.model.served_by.weights_fingerprint = "r2"
        with pytest.raises(ServicesError, match="the reward service safe now serves 'r'"):
            await services.collect(tasks(5, 6), SAMPLING)
    async with two_rewards(tokenizer, normalise_reward="on") as (_, _, where), Services(where, tokenizer) as services:
        with pytest.raises(
            ServicesError, match="no mean and std are kept with the model 'r' of the reward service safe"
        ):
            await services.connect()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": ("127.0.0.1:1",)}, "must be NAME=host:port"),
        ({"rewards": ("a b=127.0.0.1:1",)}, "must be NAME=host:port"),
        ({"rewards": ("a=foo",)}, "address 'foo' must be host:port"),
        ({"rewards": ("score=127.0.0.1:1",)}, "the name score is that of the sum in the logs"),
        ({"rewards": ("a=127.0.0.1:1", "a=127.0.0.1:2")}, "--rewards names a, a: each service needs a name of its own"),
        ({"rewards": ("a=127.0.0.1:1",), "reward_weights": (1.0, 2.0)}, "--reward-weights has 2 and --rewards 1"),
        ({"reward_weights": (1.0,)}, "--reward-weights has 1 and --rewards 0"),
        ({"rewards": ("a=127.0.0.1:1",), "reward_weights": (0.0,)}, "--reward-weights are all 0"),
    ],
)
def test_rewards_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ServiceAddresses(**settings)


async def test_a_completion_that_failed_for_a_passing_reason_is_asked_again(tokenizer):
    async with scripted(tokenizer) as (policy, _, _, services):
        await services.publish(WEIGHTS)
        policy.busy = {3: 2, 4: 99}
        rollout = await services.collect(tasks(2, 3, 4), SAMPLING)
    assert policy.asked == [[2, 3, 4], [3, 4], [3, 4]]
    assert [sample.score for sample in rollout.samples] == [2.0, 3.0]
    assert rollout.failures == ("policy service: the engine hiccuped",)


async def test_every_replica_of_the_policy_gets_its_share_and_the_weights(tokenizer):
    fingerprint = tokenizer_fingerprint(tokenizer)
    replicas = [ScriptedPolicy(fingerprint) for _ in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serve(replica)) for replica in replicas]
        judges = await stack.enter_async_context(serve(ScriptedReward(fingerprint), ScriptedReference(fingerprint)))
        where = ServiceAddresses(policy=",".join(addresses), reward=judges, reference=judges, ready_timeout_s=5.0)
        services = await stack.enter_async_context(Services(where, tokenizer, policy_admin=addresses))
        await services.connect()
        await services.publish(WEIGHTS)
        rollout = await services.collect(tasks(*range(2, 9)), SAMPLING)
        # One of them comes back with other weights in the middle: only its share is asked again.
        replicas[1].script = [lambda index: replicas[1].restart() if index == 1 else None]
        again = await services.collect(tasks(*range(2, 9)), SAMPLING)
    shares = sorted(len(asked) for replica in replicas for asked in replica.asked[:1])
    assert shares == [2, 2, 3]
    assert [replica.updates for replica in replicas] == [[1], [1, 1], [1]]
    for found in (rollout, again):
        assert [sample.score for sample in found.samples] == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
        assert found.failures == ()


@pytest.mark.parametrize(("truncation", "sent"), [("refuse", 1), ("left", 2)])
async def test_a_reward_model_of_another_tokenizer_gets_text_and_is_told_how_to_cut_it(truncation, sent, tokenizer):
    async with scripted(tokenizer, reward_tokenizer="0" * 64) as (_, reward, _, services):
        await services.publish(WEIGHTS)
        settings = SamplingSettings(max_new_tokens=10, truncation=truncation)
        rollout = await services.collect(tasks(2, 3), settings)
    assert [sample.score for sample in rollout.samples] == [2.0, 3.0]
    assert reward.truncations == {sent}


async def test_only_what_a_dead_policy_service_did_not_finish_is_asked_again_and_not_before_it_is_current(tokenizer):
    async with scripted(tokenizer) as (policy, _, _, services):
        await services.publish(WEIGHTS)

        def die_at_third(index: int) -> None:
            if index == 2:
                policy.restart()
                raise ConnectionError

        policy.script = [die_at_third]
        rollout = await services.collect(tasks(2, 3, 4, 5), SAMPLING)
    assert policy.asked == [[2, 3, 4, 5], [4, 5]]
    assert policy.updates == [1, 1]  # The same version again, for the same weights.
    assert [sample.score for sample in rollout.samples] == [2.0, 3.0, 4.0, 5.0]


async def test_completions_of_other_weights_are_never_used(tokenizer):
    async with scripted(tokenizer) as (policy, _, _, services):
        await services.publish(WEIGHTS)
        # It is back between two calls, so fast that no call ever failed.
        policy.script = [lambda index: policy.restart() if index == 1 else None]
        rollout = await services.collect(tasks(2, 3, 4), SAMPLING)
        assert policy.asked == [[2, 3, 4], [3, 4]]
        assert policy.updates == [1, 1]
        policy.restart()  # Between two rollouts.
        again = await services.collect(tasks(2, 3), SAMPLING)
    assert policy.updates == [1, 1, 1]
    assert len(rollout.samples) == 3
    assert len(again.samples) == 2


async def test_a_service_that_dies_again_and_again_ends_the_wait(tokenizer):
    async with scripted(tokenizer) as (policy, _, _, services):
        await services.publish(WEIGHTS)

        def die(index: int) -> None:
            raise ConnectionError

        policy.script = [die] * 50
        with pytest.raises(NotReadyError, match="policy service: went away 5 times in a row without finishing"):
            await services.collect(tasks(2, 3), SAMPLING)
    assert len(policy.asked) == 5


async def test_a_policy_service_that_has_no_room_is_asked_again_as_long_as_it_may_take_to_be_ready(tokenizer):
    def full(index: int) -> None:
        raise BlockingIOError

    async with scripted(tokenizer) as (policy, _, _, services):
        await services.publish(WEIGHTS)
        policy.script = [full] * 8
        rollout = await services.collect(tasks(2, 3), SAMPLING)
        assert [sample.score for sample in rollout.samples] == [2.0, 3.0]
        assert policy.asked == [[2, 3]] * 9
    async with scripted(tokenizer, ready_timeout_s=1.0) as (policy, _, _, services):
        await services.publish(WEIGHTS)
        policy.script = [full] * 50
        with pytest.raises(OverloadedError, match="policy service: full") as refused:
            await services.collect(tasks(2, 3), SAMPLING)
        assert refused.value.retry_after_s == 0.01
        assert 2 <= len(policy.asked) < 50


@pytest.mark.parametrize(("answered", "message"), [(3, None), (0, r"--call-deadline-s, which is 1; raise it")])
async def test_a_call_that_takes_too_long_is_asked_for_the_rest_as_long_as_it_finishes_something(
    answered, message, tokenizer
):
    async with scripted(tokenizer, call_deadline_s=1.0) as (policy, _, _, services):
        await services.publish(WEIGHTS)
        policy.stall_after = answered
        if message is None:
            rollout = await services.collect(tasks(*range(2, 10)), SAMPLING)
            assert [sample.score for sample in rollout.samples] == [float(first) for first in range(2, 10)]
            assert policy.asked == [[*range(2, 10)], [*range(5, 10)], [8, 9]]
        else:
            with pytest.raises(ServicesError, match=message):
                await services.collect(tasks(2, 3), SAMPLING)
            assert policy.asked == [[2, 3]]


async def test_a_replica_that_no_admin_address_leads_to_is_named_instead_of_throwing_its_work_away(tokenizer):
    fingerprint = tokenizer_fingerprint(tokenizer)
    replicas = [ScriptedPolicy(fingerprint) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serve(replica)) for replica in replicas]
        judges = await stack.enter_async_context(serve(ScriptedReward(fingerprint), ScriptedReference(fingerprint)))
        where = ServiceAddresses(policy=",".join(addresses), reward=judges, reference=judges, ready_timeout_s=5.0)
        services = await stack.enter_async_context(Services(where, tokenizer, policy_admin=addresses[:1]))
        await services.connect()
        await services.publish(WEIGHTS)
        with pytest.raises(ServicesError, match=r"version 0 \(start.* version 1 .* no --policy-admin address"):
            await services.collect(tasks(*range(2, 12)), SAMPLING)
        only = await stack.enter_async_context(Services(where, tokenizer))
        await only.connect()
        with pytest.raises(ServicesError, match="the replicas serve different weights, or one of them was restarted"):
            await only.collect(tasks(*range(2, 12)), SAMPLING)


@pytest.mark.parametrize("what", ["weights_fingerprint", "scoring_fingerprint"])
async def test_a_reward_model_that_was_exchanged_or_scores_otherwise_stops_the_run(tokenizer, what):
    async with scripted(tokenizer) as (_, reward, _, services):
        await services.publish(WEIGHTS)
        setattr(reward.model.served_by, what, "another")
        with pytest.raises(ServicesError, match=r"the reward service now serves 'r' \(another"):
            await services.collect(tasks(2), SAMPLING)


async def test_another_tokenizer_behind_policy_or_reference_is_refused(tokenizer):
    for name in ("policy", "reference"):
        async with scripted(tokenizer) as (policy, _, reference, services):
            {"policy": policy, "reference": reference}[name].model.served_by.tokenizer_fingerprint = "0" * 64
            with pytest.raises(ServicesError, match=f"the {name} service hosts .* another one than that of --model"):
                await services.connect()


async def test_weights_that_serve_already_are_not_sent_and_new_ones_get_a_higher_version(tokenizer):
    other = Weights.of([("w", torch.zeros(2, 3))])
    async with scripted(tokenizer) as (policy, _, _, services):
        policy.model.served_by.weights_fingerprint = WEIGHTS.fingerprint
        policy.model.served_by.weights_version = 7
        assert await services.publish(WEIGHTS) == 7
        assert policy.updates == []
        assert await services.publish(other) == 8
        assert await services.publish(other) == 8
        assert policy.updates == [8]


def test_weights_are_a_snapshot_with_the_fingerprint_of_the_saved_file(make_policy):
    from quartet.fingerprint import safetensors_fingerprint
    from trainer.models import load_policy, load_tokenizer
    from trainer.saving import export_tensors

    for tied in (False, True):
        folder = make_policy(seed=2, tied=tied)
        policy = load_policy(folder, load_tokenizer(folder))
        weights = Weights.of(export_tensors(policy))
        assert weights.fingerprint == safetensors_fingerprint(folder)
        before = bytes(weights.tensors[0].data)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(1.0)
        assert bytes(weights.tensors[0].data) == before
        assert Weights.of(export_tensors(policy)).fingerprint != weights.fingerprint


@pytest.mark.parametrize("clock_ahead_s", [0.0, 3600.0, -3600.0])
async def test_the_work_of_a_service_counts_whatever_its_clock_says(clock_ahead_s, tokenizer):
    async with scripted(tokenizer) as (_, reward, _, services):
        await services.publish(WEIGHTS)
        reward.works_s, reward.clock_ahead_s = 0.3, clock_ahead_s
        rollout = await services.collect(tasks(2), SAMPLING)
    assert 0.29 <= rollout.service_work_s <= rollout.duration_s


@given(response=st.lists(st.integers(0, 4), min_size=1, max_size=7), stops=st.sets(st.integers(0, 4), max_size=2))
def test_a_response_is_cut_behind_its_first_stop_token_and_nowhere_else(response, stops):
    expected = []
    for token in response:
        expected.append(token)
        if token in stops:
            break
    cut = cut_at_stop(completed(response), frozenset(stops))
    assert list(cut.token_ids) == expected
    assert list(cut.logprobs) == [-float(i) for i in range(len(expected))]


def completed(response: list[int]) -> Completion:
    served = ServedBy(model_id="", weights_version=0, weights_fingerprint="", tokenizer_fingerprint="")
    logprobs = tuple(-float(i) for i in range(len(response)))
    return Completion(
        prompt_index=0, sample_index=0, token_ids=tuple(response), logprobs=logprobs,
        finish_reason=FinishReason.LENGTH, version_spans=((0, len(response)),), text="", prompt_token_ids=(),
        served_by=served, work=WorkInterval(start_unix_ns=0, end_unix_ns=1),
    )  # fmt: skip


def test_seeds_differ_by_purpose_step_prompt_and_sample():
    seeds = {
        prompt_seed(0, purpose, step, prompt, sample)
        for purpose in ("rollout", "evaluation")
        for step in range(5)
        for prompt in range(5)
        for sample in range(5)
    }
    assert len(seeds) == 250
    assert prompt_seed(0, "rollout", 1, 2, 3) == prompt_seed(0, "rollout", 1, 2, 3)

"""Live services send their spans to a collector, where they join those of their client."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from quartet import tracing
from quartet.client import PolicyClient, ReferenceClient, RewardClient, Sampling, ScoreItem
from quartet.client.reference import TokenSequence
from tests.conftest import free_port
from tests.otlp_collector import Collector, inside, start_collector

TEXT = "my phone screen is broken"


@pytest.fixture
def collector(monkeypatch) -> Iterator[tuple[Collector, str]]:
    """The collector and its endpoint; this process sends its spans there, too."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # Of services as well, which inherit it.
    with start_collector() as (servicer, endpoint):
        tracing.start("application", endpoint)
        yield servicer, endpoint
        tracing.stop()


async def test_spans_of_client_service_engine_wait_and_batch_join_at_the_collector(
    collector, start_service, make_policy, make_reward_model, monkeypatch
):
    servicer, endpoint = collector
    policy = start_service("policy", make_policy(), "--engine", "transformers", "--otlp-endpoint", endpoint)
    reward = start_service("reward", make_reward_model(), "--otlp-endpoint", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)  # The other way to say it.
    reference = start_service("reference", make_policy())
    with tracing.phase("rollout"):
        async with PolicyClient(policy.address) as client:
            fingerprint = (await client.get_model_info()).served_by.tokenizer_fingerprint
            sampling = Sampling(max_new_tokens=5, min_new_tokens=5, seed=1, temperature=0.5)
            (completion,) = [x async for x in client.generate([TEXT], sampling, return_text=True)]
        async with RewardClient(reward.address) as client:
            await client.score([ScoreItem(prompt=TEXT, response=completion.text)])
        ids = [*completion.prompt_token_ids, *completion.token_ids]
        sequence = TokenSequence(token_ids=ids, response_start=len(completion.prompt_token_ids))
        async with ReferenceClient(reference.address) as client:
            await client.logprobs([sequence], tokenizer_fingerprint=fingerprint)
    generate = "quartet.policy.v1.PolicyService/Generate"
    score = "quartet.reward.v1.RewardService/Score"
    logprobs = "quartet.reference.v1.ReferenceService/LogProbs"
    found = servicer.wait_for(
        ("application", "rollout"),
        *(("application", name) for name in (generate, score, logprobs)),
        *(("quartet-policy", name) for name in (generate, "generate")),
        *(("quartet-reward", name) for name in (score, "queue", "model batch")),
        *(("quartet-reference", name) for name in (logprobs, "queue", "model batch")),
    )
    rollout = found["application", "rollout"]
    for service, name, within in (
        ("quartet-policy", generate, ("generate",)),
        ("quartet-reward", score, ("queue", "model batch")),
        ("quartet-reference", logprobs, ("queue", "model batch")),
    ):
        assert inside(found["application", name], rollout)
        assert inside(found[service, name], found["application", name])
        for part in within:
            assert inside(found[service, part], found[service, name])
    attributes = {x.key: x.value for x in found["quartet-policy", "generate"].attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 5
    assert attributes["gen_ai.usage.input_tokens"].int_value == len(completion.prompt_token_ids)
    assert attributes["gen_ai.request.temperature"].double_value == 0.5
    assert attributes["gen_ai.response.finish_reasons"].array_value.values[0].string_value == "length"
    sent = b"".join(request.SerializeToString() for request in servicer.requests)
    assert TEXT.encode() not in sent
    # What was not sent yet when it ends is sent then.
    before = len(servicer.spans())
    async with RewardClient(reward.address) as client:
        for _ in range(5):
            await client.get_model_info()
    for service in (policy, reward, reference):
        assert service.stop() == 0
    info = [span for service, span in servicer.spans()[before:] if service == "quartet-reward"]
    assert len(info) == 5


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
async def test_vllms_own_spans_join_those_of_the_service(collector, start_service, make_policy):
    servicer, endpoint = collector
    policy = start_service("policy", make_policy(), "--engine", "vllm", "--otlp-endpoint", endpoint, timeout_s=240)
    with tracing.phase("rollout"):
        async with PolicyClient(policy.address) as client:
            sampling = Sampling(max_new_tokens=5, min_new_tokens=5, seed=1)
            assert len([x async for x in client.generate([TEXT], sampling)]) == 1
    assert policy.stop() == 0
    found = servicer.wait_for(("quartet-policy", "generate"), ("vllm", "llm_request"))
    assert inside(found["vllm", "llm_request"], found["quartet-policy", "generate"])
    attributes = {x.key: x.value for x in found["vllm", "llm_request"].attributes}
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 5
    assert attributes["gen_ai.latency.time_in_queue"].double_value >= 0


async def test_a_collector_that_is_away_costs_a_service_nothing_but_a_line_in_its_log(start_service, make_reward_model):
    endpoint = f"http://127.0.0.1:{free_port()}"
    live = start_service("reward", make_reward_model(), "--otlp-endpoint", endpoint)
    async with RewardClient(live.address) as client:
        start_s = time.monotonic()
        for _ in range(20):
            await client.score([ScoreItem(prompt="hello", response="thanks")])
        assert time.monotonic() - start_s < 10
    start_s = time.monotonic()
    assert live.stop() == 0
    assert time.monotonic() - start_s < 15
    assert "Traceback" not in live.log.read_text()


def test_an_endpoint_that_is_none_is_refused_at_start(make_reward_model):
    command = [
        sys.executable,
        "-m",
        "services.reward",
        "--model",
        str(make_reward_model()),
        "--otlp-endpoint",
        "a:4317",
    ]
    run = subprocess.run([*command, "--port", "0", "--metrics-port", "0"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.strip() == (
        "quartet-reward: the endpoint of traces is 'a:4317', must be http://host:port (plain) "
        "or https://host:port (TLS)"
    )

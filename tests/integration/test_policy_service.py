"""The policy service, live: both engines, tied and untied embeddings, against transformers in float64."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from quartet.client import (
    CallPolicy,
    Completion,
    DamagedError,
    DeadlineError,
    FailedCompletion,
    InFlightPolicy,
    InvalidInputError,
    PolicyClient,
    PreconditionError,
    Sampling,
    UnavailableError,
    WeightsClient,
)
from quartet.fingerprint import safetensors_fingerprint, tokenizer_fingerprint
from quartet.policy.v1 import weights_pb2, weights_pb2_grpc
from tests.integration.policy_oracle import largest_difference, naive_logprobs, wire_tensors

PROMPTS = [[5, 6, 7 + i] for i in range(8)]
TOLERANCE = 1e-4

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
ENGINES = [pytest.param("vllm", marks=needs_vllm), "transformers"]


@pytest.fixture(scope="module", params=[(e, t) for e in ("vllm", "transformers") for t in (False, True)], ids=str)
def service(request, start_service, make_policy):
    """A live service of each engine, with untied and with tied embeddings."""
    engine, tied = request.param
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here")
    live = start_service("policy", make_policy(tied=tied), "--engine", engine, timeout_s=240)
    live.tied = tied
    live.engine = engine
    yield live
    assert live.stop() == 0


@pytest.fixture(scope="module")
def fingerprint(tokenizer):
    return tokenizer_fingerprint(tokenizer)


async def collect(client, prompts, sampling, **options):
    found = [item async for item in client.generate(prompts, sampling, **options)]
    return sorted(found, key=lambda item: (item.prompt_index, item.sample_index))


async def test_log_probabilities_are_right_at_start_after_each_update_and_with_a_request_in_flight(
    service, make_policy, fingerprint
):
    folder = make_policy(tied=service.tied)
    async with PolicyClient(service.address) as client, WeightsClient(service.admin_address) as weights:
        for temperature in (1.0, 0.7):
            sampling = Sampling(max_new_tokens=30, temperature=temperature, seed=3)
            found = await collect(client, PROMPTS, sampling, tokenizer_fingerprint=fingerprint)
            assert {c.version_spans for c in found} == {((0, len(c.token_ids)),) for c in found}
            assert largest_difference(folder, PROMPTS, found, temperature) < TOLERANCE
        for version in (1, 5):
            folder = make_policy(seed=version, tied=service.tied)
            long = Sampling(max_new_tokens=120, min_new_tokens=120, seed=1)
            in_flight = asyncio.create_task(collect(client, PROMPTS * 8, long, tokenizer_fingerprint=fingerprint))
            await asyncio.sleep(0.05)
            update = await weights.update(wire_tensors(folder), weights_version=version)
            assert update.served_by.weights_version == version
            assert update.served_by.weights_fingerprint == safetensors_fingerprint(folder)
            assert (await weights.get_info()) == update.served_by
            kept = await in_flight
            assert all(len(c.token_ids) == 120 for c in kept)
            # Some were caught in the middle: their spans say how far the old weights went.
            assert any([v for v, _ in c.version_spans][-1] == version and len(c.version_spans) == 2 for c in kept)
            found = await collect(
                client, PROMPTS, Sampling(max_new_tokens=30, seed=3), tokenizer_fingerprint=fingerprint
            )
            assert {c.served_by.weights_version for c in found} == {version}
            assert {c.version_spans for c in found} == {((version, len(c.token_ids)),) for c in found}
            assert largest_difference(folder, PROMPTS, found, 1.0) < TOLERANCE
            # What tells old weights from new: the old folder's log-probabilities are far off.
            old = make_policy(seed=1 if version == 5 else 0, tied=service.tied)
            assert largest_difference(old, PROMPTS, found, 1.0) > 0.1


async def test_a_kept_request_continues_with_the_new_weights(service, make_policy, fingerprint):
    async with PolicyClient(service.address) as client, WeightsClient(service.admin_address) as weights:
        first, second = make_policy(seed=11, tied=service.tied), make_policy(seed=12, tied=service.tied)
        version = (await weights.get_info()).weights_version
        await weights.update(wire_tensors(first), weights_version=version + 1)
        long = Sampling(max_new_tokens=120, seed=1)
        task = asyncio.create_task(collect(client, PROMPTS * 8, long, tokenizer_fingerprint=fingerprint))
        await asyncio.sleep(0.05)
        await weights.update(wire_tensors(second), weights_version=version + 2, in_flight=InFlightPolicy.KEEP)
        kept = [c for c in await task if len(c.version_spans) == 2]
    assert len(kept) >= 4
    for completion in kept[:12]:
        prompt = PROMPTS[completion.prompt_index % len(PROMPTS)]
        before = completion.version_spans[0][1]
        old, new = (naive_logprobs(folder, prompt, completion.token_ids) for folder in (first, second))
        # Tokens before the update are of the old weights, and those after it of the new ones.
        assert completion.logprobs[:before] == pytest.approx(old[:before], abs=TOLERANCE)
        assert completion.logprobs[before:] == pytest.approx(new[before:], abs=TOLERANCE)


def running(service):
    text = urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=5).read().decode()
    return float(re.findall(r"^quartet_policy_engine_running (\S+)$", text, flags=re.MULTILINE)[0])


async def until_all_run(service, count):
    """Until so many completions are in the engine: before, an update would come before they have begun."""
    while running(service) < count:  # noqa: ASYNC110  # It is in another process.
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)


async def test_finish_lets_requests_end_with_the_old_weights_and_abort_cuts_them(service, make_policy, fingerprint):
    async with PolicyClient(service.address) as client, WeightsClient(service.admin_address) as weights:
        version = (await weights.get_info()).weights_version
        folder = make_policy(seed=21, tied=service.tied)
        long = Sampling(max_new_tokens=120, min_new_tokens=120, seed=1)
        for step, (mode, reason) in enumerate(((InFlightPolicy.FINISH, "length"), (InFlightPolicy.ABORT, "aborted"))):
            tensors = wire_tensors(folder)
            task = asyncio.create_task(collect(client, PROMPTS * 8, long, tokenizer_fingerprint=fingerprint))
            await until_all_run(service, 64)
            await weights.update(tensors, weights_version=version + 1 + step, in_flight=mode)
            found = await task
            assert {c.finish_reason for c in found} == {reason}
            for completion in found:
                assert {v for v, _ in completion.version_spans} <= {version + step}
                assert sum(count for _, count in completion.version_spans) == len(completion.token_ids)
                assert (len(completion.token_ids) < 120) == (reason == "aborted")


async def test_an_update_that_cannot_wait_for_the_end_of_requests_leaves_the_old_weights_serving(
    service, make_policy, fingerprint
):
    async with PolicyClient(service.address) as client, WeightsClient(service.admin_address) as weights:
        version = (await weights.get_info()).weights_version
        tensors = wire_tensors(make_policy(seed=23, tied=service.tied))
        long = Sampling(max_new_tokens=120, min_new_tokens=120, seed=1)
        task = asyncio.create_task(collect(client, PROMPTS * 8, long, n=16, tokenizer_fingerprint=fingerprint))
        await until_all_run(service, 256)
        hasty = CallPolicy(deadline_s=0.3)  # A batch of both engines takes longer.
        async with WeightsClient(service.admin_address, policy=hasty) as in_a_hurry:
            with pytest.raises(DeadlineError):
                await in_a_hurry.update(tensors, weights_version=version + 1, in_flight=InFlightPolicy.FINISH)
        late = await collect(client, PROMPTS[:1], Sampling(max_new_tokens=4), tokenizer_fingerprint=fingerprint)
        for completion in (*(await task), *late):
            assert {v for v, _ in completion.version_spans} == {version}
            assert completion.finish_reason != "aborted"
        assert (await weights.get_info()).weights_version == version
        await weights.update(tensors, weights_version=version + 1, in_flight=InFlightPolicy.FINISH)
        (new,) = await collect(client, PROMPTS[:1], Sampling(max_new_tokens=4), tokenizer_fingerprint=fingerprint)
        assert {v for v, _ in new.version_spans} == {version + 1}


async def test_a_broken_or_damaged_update_leaves_the_old_weights_serving(service, make_policy, fingerprint, tmp_path):
    folder = make_policy(seed=31, tied=service.tied)
    other = wire_tensors(make_policy(seed=32, tied=service.tied))
    async with PolicyClient(service.address) as client, WeightsClient(service.admin_address) as weights:
        version = (await weights.get_info()).weights_version + 1
        before = (await weights.update(wire_tensors(folder), weights_version=version)).served_by
        with pytest.raises(DamagedError, match="damaged on the way; the old weights go on serving"):
            await weights.update(other, weights_version=version + 1, fingerprint="0" * 64)
        with pytest.raises(PreconditionError, match=rf"weights_version is {version}, must be greater than {version}"):
            await weights.update(other, weights_version=version)
        with pytest.raises(InvalidInputError, match="tensors of the served model are missing, such as"):
            await weights.update(other[1:], weights_version=version + 1)
        stub = weights_pb2_grpc.WeightsServiceStub(weights._channel)

        async def half():
            specs = [weights_pb2.TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in other]
            yield weights_pb2.UpdateWeightsRequest(
                begin=weights_pb2.BeginUpdate(weights_version=version + 1, tensors=specs)
            )
            yield weights_pb2.UpdateWeightsRequest(chunk=weights_pb2.TensorChunk(tensor_index=0, data=b"1234"))
            await asyncio.sleep(30)

        call = stub.UpdateWeights(half())
        await asyncio.sleep(0.5)
        call.cancel()
        await asyncio.sleep(0.2)
        assert await weights.get_info() == before
        found = await collect(client, PROMPTS, Sampling(max_new_tokens=20, seed=1), tokenizer_fingerprint=fingerprint)
        assert largest_difference(folder, PROMPTS, found, 1.0) < TOLERANCE
        # The next one is accepted, so the broken one holds nothing; nothing is left where updates are staged.
        await weights.update(other, weights_version=version + 1)
    assert [name for name in os.listdir("/dev/shm") if name.startswith("quartet-weights-")] == []


async def test_a_client_that_leaves_frees_its_slots(service, fingerprint):
    async with PolicyClient(service.address) as client:
        endless = Sampling(max_new_tokens=120, min_new_tokens=120)
        stream = client.generate([PROMPTS[0]] * 4000, endless, tokenizer_fingerprint=fingerprint)
        async for _ in stream:
            break
        await stream.aclose()
        start = time.monotonic()
        await collect(client, PROMPTS[:1], Sampling(max_new_tokens=5), tokenizer_fingerprint=fingerprint)
        alone_s = time.monotonic() - start
    assert alone_s < 10  # All 4,000 would take minutes.


async def test_the_same_seed_gives_the_same_tokens_in_any_company(service, fingerprint):
    async with PolicyClient(service.address) as client:
        sampling = Sampling(max_new_tokens=30, seed=7)
        together = await collect(client, PROMPTS, sampling, n=3, tokenizer_fingerprint=fingerprint)
        again = await collect(client, PROMPTS, sampling, n=3, tokenizer_fingerprint=fingerprint)
        assert [c.token_ids for c in together] == [c.token_ids for c in again]
        assert len({c.token_ids for c in together}) > 20  # Samples differ from each other.
        seeded = Sampling(max_new_tokens=30)
        whole = await collect(client, PROMPTS, seeded, prompt_seeds=range(8), tokenizer_fingerprint=fingerprint)
        part = await collect(client, PROMPTS[5:], seeded, prompt_seeds=[5, 6, 7], tokenizer_fingerprint=fingerprint)
        assert [c.token_ids for c in whole[5:]] == [c.token_ids for c in part]


async def test_many_long_seeded_prompts_at_once_are_all_answered(service, fingerprint):
    prompts = [[3 + (i * 7 + j) % 290 for j in range(100)] for i in range(120)]
    async with PolicyClient(service.address) as client:
        sampling = Sampling(max_new_tokens=5, min_new_tokens=5)
        found = await collect(client, prompts, sampling, prompt_seeds=range(120), tokenizer_fingerprint=fingerprint)
        assert [len(c.token_ids) for c in found] == [5] * 120
        again = await collect(client, prompts[7:8], sampling, prompt_seeds=[7], tokenizer_fingerprint=fingerprint)
    assert again[0].token_ids == found[7].token_ids


async def test_stop_tokens_end_a_response_and_are_its_last_token(service, fingerprint):
    async with PolicyClient(service.address) as client:
        (free,) = await collect(
            client, PROMPTS[:1], Sampling(max_new_tokens=40, temperature=0.0), tokenizer_fingerprint=fingerprint
        )
        stop = free.token_ids[4]
        first = free.token_ids.index(stop)
        (cut,) = await collect(
            client,
            PROMPTS[:1],
            Sampling(max_new_tokens=40, temperature=0.0, stop_token_ids=(stop,)),
            tokenizer_fingerprint=fingerprint,
        )
        assert cut.token_ids == free.token_ids[: first + 1]
        assert cut.finish_reason == "stop"


async def test_restricted_sampling_reports_the_distribution_it_drew_from(service, fingerprint):
    async with PolicyClient(service.address) as client:
        for sampling, kept in (
            (Sampling(max_new_tokens=20, top_k=2, seed=1), 2),
            (Sampling(max_new_tokens=20, top_k=1), 1),
        ):
            found = await collect(client, PROMPTS, sampling, tokenizer_fingerprint=fingerprint)
            # Of two candidates the likelier has at least half; of one, all.
            logprobs = [x for c in found for x in c.logprobs]
            assert (max(logprobs) == pytest.approx(0.0, abs=1e-5)) if kept == 1 else (max(logprobs) > -0.6931472)


async def test_text_and_messages_are_encoded_by_the_service(service, tokenizer):
    messages = [{"role": "user", "content": "my phone is broken"}]
    async with PolicyClient(service.address) as client:
        found = await collect(client, ["hello please", messages], Sampling(max_new_tokens=10, seed=1), return_text=True)
    assert list(found[0].prompt_token_ids) == tokenizer("hello please", add_special_tokens=False).input_ids
    rendered = "user: my phone is broken\nassistant: "
    assert list(found[1].prompt_token_ids) == tokenizer(rendered, add_special_tokens=False).input_ids
    assert found[0].text == tokenizer.decode(found[0].token_ids, skip_special_tokens=True)


async def test_bad_prompts_are_refused_alone_and_bad_requests_whole(service, fingerprint):
    async with PolicyClient(service.address) as client:
        found = await collect(
            client,
            [PROMPTS[0], [5, 300], [5] * 120, []],
            Sampling(max_new_tokens=20),
            tokenizer_fingerprint=fingerprint,
        )
        assert isinstance(found[0], Completion)
        reasons = [f.failure.reason for f in found if isinstance(f, FailedCompletion)]
        assert "token id 300 lies outside the vocabulary, [0, 300)" in reasons[0]
        assert "prompt has 120 tokens and max_new_tokens is 20, together more than the 128" in reasons[1]
        assert "prompt has no tokens" in reasons[2]
        bad = [
            ([], Sampling(max_new_tokens=5), {}, "prompts is empty", "prompts"),
            (
                PROMPTS,
                Sampling(max_new_tokens=0),
                {},
                r"max_new_tokens is 0, must be in \[1, 127\]",
                "sampling.max_new_tokens",
            ),
            (
                PROMPTS,
                Sampling(max_new_tokens=5, temperature=float("nan")),
                {},
                "temperature is nan",
                "sampling.temperature",
            ),
            *(
                [
                    (
                        PROMPTS,
                        Sampling(max_new_tokens=5, temperature=2.5),
                        {},
                        r"temperature is 2\.5, must be at most 2, as the engine has it",
                        "sampling.temperature",
                    )
                ]
                if service.engine == "vllm"
                else []
            ),
            (
                PROMPTS,
                Sampling(max_new_tokens=5, top_p=0.0),
                {},
                r"top_p is 0\.0, must be in \(0, 1\]",
                "sampling.top_p",
            ),
            (PROMPTS, Sampling(max_new_tokens=5), {"n": -1}, "n is -1", "n"),
            (
                PROMPTS,
                Sampling(max_new_tokens=5),
                {"prompt_seeds": [1]},
                "prompt_seeds has 1 values",
                "sampling.prompt_seeds",
            ),
            (
                PROMPTS,
                Sampling(max_new_tokens=5, stop_token_ids=(300,)),
                {},
                "stop_token_ids",
                "sampling.stop_token_ids",
            ),
        ]
        for prompts, sampling, options, message, field in bad:
            with pytest.raises(InvalidInputError, match=message) as refused:
                await collect(client, prompts, sampling, tokenizer_fingerprint=fingerprint, **options)
            assert refused.value.field == field
        with pytest.raises(PreconditionError, match="the token ids mean something else here"):
            await collect(client, PROMPTS, Sampling(max_new_tokens=5), tokenizer_fingerprint="0" * 64)
        with pytest.raises(InvalidInputError, match="at most 16384 completions may be asked for at once"):
            await collect(client, PROMPTS, Sampling(max_new_tokens=5), n=4096, tokenizer_fingerprint=fingerprint)


async def test_model_info_says_what_is_hosted(service, make_policy, fingerprint, tokenizer):
    async with PolicyClient(service.address) as client:
        info = await client.get_model_info()
    assert info.vocab_size == 300
    assert info.max_sequence_tokens == 128
    assert info.eos_token_ids == (1,)
    assert info.dtype == "float32"
    assert info.engine.startswith("vllm" if service.engine == "vllm" else "transformers")
    assert info.served_by.tokenizer_fingerprint == fingerprint


@pytest.mark.parametrize("engine", ENGINES)
async def test_deterministic_mode_gives_the_same_bits_alone_and_in_company(
    engine, start_service, make_policy, fingerprint
):
    live = start_service("policy", make_policy(), "--engine", engine, "--deterministic", timeout_s=240)
    async with PolicyClient(live.address) as client:
        sampling = Sampling(max_new_tokens=24)
        options = {"tokenizer_fingerprint": fingerprint}
        together = await collect(client, PROMPTS, sampling, prompt_seeds=range(8), **options)
        alone = [
            (await collect(client, [prompt], sampling, prompt_seeds=[i], **options))[0]
            for i, prompt in enumerate(PROMPTS)
        ]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.logprobs for c in together] == [c.logprobs for c in alone]
    assert live.stop() == 0


@needs_vllm
async def test_a_dead_engine_ends_the_service_and_a_killed_service_leaves_no_engine(
    start_service, make_policy, fingerprint
):
    def children(pid: int) -> list[int]:
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
        return [int(x) for x in found]

    def alive(pid: int) -> bool:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        return bool(state) and not state.startswith("Z")

    live = start_service("policy", make_policy(), "--engine", "vllm", timeout_s=240)
    below = [pid for child in children(live.process.pid) for pid in (child, *children(child))]
    engines = [pid for pid in below if alive(pid)]
    assert engines
    async with PolicyClient(live.address) as client:
        task = asyncio.create_task(
            collect(
                client,
                PROMPTS * 50,
                Sampling(max_new_tokens=120, min_new_tokens=120),
                tokenizer_fingerprint=fingerprint,
                patience_s=0.0,
            )
        )
        await asyncio.sleep(0.3)
        for pid in engines:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await task
    assert live.process.wait(timeout=60) == 1
    live = start_service("policy", make_policy(), "--engine", "vllm", timeout_s=240)
    below = [pid for child in children(live.process.pid) for pid in (child, *children(child))]
    live.process.kill()
    live.process.wait()
    for _ in range(100):
        if not any(map(alive, below)):
            break
        await asyncio.sleep(0.2)
    assert [pid for pid in below if alive(pid)] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_taken_port_and_a_model_without_tokenizer_are_refused_at_once(engine, make_policy, tmp_path):
    import socket

    command = [sys.executable, "-m", "services.policy", "--engine", engine, "--metrics-port", "0"]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        for flags in (["--port", port, "--admin-port", "0"], ["--port", "0", "--admin-port", port]):
            done = subprocess.run(
                [*command, "--model", str(make_policy()), *flags], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 2
            assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    flags = ["--model", str(make_policy()), "--port", "0", "--admin-port", "0", "--admin-host", "192.0.2.1"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cannot listen on 192.0.2.1:0 for weight updates and adapters (--admin-port): Cannot" in done.stderr
    for model, message in (
        (make_policy(with_tokenizer=False), "the folder has no tokenizer"),
        (tmp_path / "absent", "there is no such folder"),
    ):
        done = subprocess.run(
            [*command, "--model", str(model), "--port", "0", "--admin-port", "0"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert message in done.stderr

"""LoRA adapters in a live policy service, both engines, against models merged in float64."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from quartet.client import (
    AdapterClient,
    AdapterInfo,
    AlreadyExistsError,
    Completion,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PolicyClient,
    PreconditionError,
    Sampling,
    WeightsClient,
)
from quartet.client.adapters import read_adapter
from quartet.client.policy import UPDATE_ACCEPTED
from quartet.fingerprint import tokenizer_fingerprint
from quartet.policy.v1 import adapters_pb2, adapters_pb2_grpc, weights_pb2
from tests.conftest import LiveService
from tests.integration.policy_oracle import wire_tensors
from tests.lora import Lora, furthest, make_lora

PROMPTS = [[5, 6, 7 + i] for i in range(6)]
# Two blocks of vLLM's prefix cache on a CPU, which are of 128 tokens, and some more.
LONG = [3 + (7 * i) % 290 for i in range(300)]
TOLERANCE = 1e-5
ROOM = 3
Step = adapters_pb2.LoadAdapterRequest


@dataclasses.dataclass
class House:
    """A live service, its base model, and clients of both ports."""

    live: LiveService
    folder: Path
    engine: str
    policy: PolicyClient
    adapters: AdapterClient
    fingerprint: str

    async def generate(self, prompts: list[list[int]], adapter: str = "", **sampling: Any) -> list[Completion]:
        options = {"max_new_tokens": 20, "seed": 3} | sampling
        stream = self.policy.generate(
            prompts, Sampling(**options), tokenizer_fingerprint=self.fingerprint, adapter=adapter
        )
        found = [item async for item in stream]
        assert all(isinstance(item, Completion) for item in found)
        return sorted(found, key=lambda item: item.prompt_index)  # type: ignore[arg-type, return-value]

    def off_by(
        self, lora: Lora | None, found: list[Completion], prompts: list[list[int]], folder: Path | None
    ) -> float:
        return max(
            furthest(folder or self.folder, lora, prompts[c.prompt_index], c.token_ids, c.logprobs) for c in found
        )

    async def require(self, lora: Lora | None, adapter: str, folder: Path | None = None, prompts=PROMPTS) -> None:  # type: ignore[no-untyped-def]
        """What is generated with the adapter is exactly the merged model's."""
        found = await self.generate(prompts, adapter)
        assert {c.adapter for c in found} == {adapter}
        assert self.off_by(lora, found, prompts, folder) < TOLERANCE

    async def until(self, adapter: str, true: Callable[[AdapterInfo], bool]) -> None:
        """Returns when it is true of the adapter."""
        async with asyncio.timeout(10):
            while True:
                listed = (await self.adapters.list_adapters()).adapters
                if any(info.name == adapter and true(info) for info in listed):
                    return

    def staged(self) -> list[str]:
        return [name for name in os.listdir("/dev/shm") if name.startswith("quartet-adapter-")]


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def service(request, start_service, make_policy) -> Iterator[tuple[LiveService, Path, str]]:  # type: ignore[no-untyped-def]
    """A live service of each engine with room for 3 adapters of rank 8."""
    if request.param == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here")
    folder = make_policy(seed=3, scale=0.5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    flags = ["--engine", request.param, "--max-adapters", str(ROOM), "--max-lora-rank", "8", "--kv-cache-gib", "1"]
    live = start_service("policy", folder, *flags, timeout_s=240)
    yield live, folder, request.param
    assert live.stop() == 0


@pytest.fixture
async def house(service, tokenizer) -> AsyncIterator[House]:
    """The service without adapters, before and after."""
    live, folder, engine = service
    async with PolicyClient(live.address) as policy, AdapterClient(live.admin_address) as adapters:
        yield House(live, folder, engine, policy, adapters, tokenizer_fingerprint(tokenizer))
        for adapter in (await adapters.list_adapters()).adapters:
            await adapters.unload_adapter(adapter.name)


async def test_base_and_all_adapters_generate_side_by_side_each_exactly_its_own(house, tmp_path):
    loras = {
        "plain@1": make_lora(house.folder, 1, rank=4),
        "stable@1": make_lora(house.folder, 2, rank=8, alpha=4.0, use_rslora=True, targets=["q_proj", "down_proj"]),
        "mixed@1": make_lora(
            house.folder,
            3,
            ranks={"model.layers.1.mlp.up_proj": 7},
            alphas={"model.layers.0.self_attn.v_proj": 3.0},
            rank_pattern={r"layers\.1\.mlp\.up_proj": 7},
            alpha_pattern={"layers.0.self_attn.v_proj": 3.0},
        ),
    }
    for name, lora in loras.items():
        loaded = await house.adapters.load_adapter(name, lora.save(tmp_path / name))
        assert (loaded.adapter.name, loaded.already_loaded) == (name, False)
    listed = await house.adapters.list_adapters()
    assert [adapter.name for adapter in listed.adapters] == list(loras)
    assert (listed.max_adapters, listed.max_rank) == (ROOM, 8)
    fingerprints = {adapter.name: adapter.fingerprint for adapter in listed.adapters}
    everybody = {"": None} | loras
    found = dict(
        zip(everybody, await asyncio.gather(*(house.generate(PROMPTS, name) for name in everybody)), strict=True)
    )
    for name, lora in everybody.items():
        assert house.off_by(lora, found[name], PROMPTS, None) < TOLERANCE
        assert {c.adapter for c in found[name]} == {name}
        assert {c.adapter_fingerprint for c in found[name]} == {fingerprints.get(name, "")}
        assert {c.served_by.weights_version for c in found[name]} == {c.version_spans[0][0] for c in found[name]}
        for other in set(everybody) - {name}:
            assert house.off_by(everybody[other], found[name], PROMPTS, None) > 0.01
    assert house.staged() == []


async def test_the_same_long_prompt_in_turn_gives_base_and_adapters_their_own_numbers(house):
    one, two = make_lora(house.folder, 11), make_lora(house.folder, 12)
    await house.adapters.load_adapter("turn-1", (one.config, one.arrays))
    await house.adapters.load_adapter("turn-2", (two.config, two.arrays))
    for _ in range(2):
        for name, lora in (("", None), ("turn-1", one), ("turn-2", two), ("", None)):
            await house.require(lora, name, prompts=[LONG])


async def test_adapters_stay_on_their_names_when_the_weights_below_are_replaced(house, make_policy):
    lora = make_lora(house.folder, 21)
    await house.adapters.load_adapter("below", (lora.config, lora.arrays))
    async with WeightsClient(house.live.admin_address) as weights:
        start = (await weights.get_info()).weights_version + 1
        for version, folder in enumerate((make_policy(seed=5, scale=0.5), house.folder), start=start):
            tensors = wire_tensors(folder)
            running = asyncio.create_task(house.generate(PROMPTS * 8, "below", max_new_tokens=120))
            await house.until("below", lambda adapter: adapter.running_requests == 1)
            await asyncio.sleep(0.03)
            await weights.update(tensors, weights_version=version)
            kept = [c for c in await running if len(c.version_spans) == 2]
            assert kept
            for c in kept:
                # Before the update the old base below the adapter, after it the new one.
                (old, before), (new, _) = c.version_spans
                assert (old, new) == (version - 1, version)
                prompt = PROMPTS[c.prompt_index % len(PROMPTS)]
                tail = furthest(
                    folder, lora, [*prompt, *c.token_ids[:before]], c.token_ids[before:], c.logprobs[before:]
                )
                assert tail < TOLERANCE
            await asyncio.gather(house.require(lora, "below", folder), house.require(None, "", folder))


async def test_a_name_means_one_content_for_good(house, tmp_path):
    one, two = make_lora(house.folder, 31), make_lora(house.folder, 32)
    first = await house.adapters.load_adapter("good@1", one.save(tmp_path / "one"))
    again = await house.adapters.load_adapter("good@1", (one.config, one.arrays))
    assert again.already_loaded
    assert again.adapter == first.adapter
    for _ in range(2):
        with pytest.raises(AlreadyExistsError, match=r"names are immutable, take another, such as 'good@2'") as refused:
            await house.adapters.load_adapter("good@1", (two.config, two.arrays))
        assert refused.value.field == "begin.name"
        # Not after it was unloaded, either.
        if (await house.adapters.list_adapters()).adapters:
            await house.adapters.unload_adapter("good@1")
    with pytest.raises(AlreadyExistsError):
        await house.adapters.load_adapter("good@1", ({**one.config, "lora_alpha": 9.0}, one.arrays))
    await house.adapters.load_adapter("good@1", (one.config, one.arrays))
    await house.require(one, "good@1")


async def test_unloading_waits_for_those_who_run_and_refuses_who_comes(house):
    lora, other = make_lora(house.folder, 41), make_lora(house.folder, 42)
    await house.adapters.load_adapter("going", (lora.config, lora.arrays))
    await house.adapters.load_adapter("staying", (other.config, other.arrays))
    running = asyncio.create_task(house.generate(PROMPTS * 8, "going", max_new_tokens=120))
    await house.until("going", lambda adapter: adapter.running_requests == 1)
    leaving = asyncio.create_task(house.adapters.unload_adapter("going"))
    await house.until("going", lambda adapter: adapter.unloading)
    with pytest.raises(NotFoundError, match=r"adapter 'going' is being unloaded; 1 adapters are"):
        await house.generate(PROMPTS, "going")
    with pytest.raises(PreconditionError, match="is being unloaded by another call"):
        await house.adapters.load_adapter("going", (lora.config, lora.arrays))
    assert not running.done()
    found = await running
    assert house.off_by(lora, found, PROMPTS * 8, None) < TOLERANCE
    assert (await leaving).name == "going"
    assert [adapter.name for adapter in (await house.adapters.list_adapters()).adapters] == ["staying"]
    with pytest.raises(NotFoundError, match=r"adapter 'going' is not loaded; 1 adapters are") as refused:
        await house.generate(PROMPTS, "going")
    assert (refused.value.field, refused.value.code) == ("adapter", grpc.StatusCode.NOT_FOUND)
    with pytest.raises(NotFoundError, match="'going' is not loaded"):
        await house.adapters.unload_adapter("going")
    await house.require(other, "staying")


async def test_clients_that_leave_while_adapters_come_and_go_leave_an_engine_that_is_right(house):
    """An adapter is unloaded the moment that its requests are cancelled, again and again."""
    for round_ in range(6):
        lora = make_lora(house.folder, 51 + round_)
        await house.adapters.load_adapter(f"churn-{round_}", (lora.config, lora.arrays))
        running = [
            asyncio.create_task(house.generate(PROMPTS * 4, f"churn-{round_}", max_new_tokens=120, min_new_tokens=120))
            for _ in range(3)
        ]
        bystander = asyncio.create_task(house.generate(PROMPTS, max_new_tokens=60))
        await asyncio.sleep(0.05 + 0.02 * round_)
        for call in running:
            call.cancel()
        async with asyncio.timeout(20):
            await house.adapters.unload_adapter(f"churn-{round_}")
        await asyncio.gather(*running, return_exceptions=True)
        assert house.off_by(None, await bystander, PROMPTS, None) < TOLERANCE
    await house.adapters.load_adapter("after", (lora.config, lora.arrays))
    await asyncio.gather(house.require(lora, "after"), house.require(None, ""))


async def test_one_adapter_too_many_is_refused_and_room_is_made_by_unloading(house):
    lora = make_lora(house.folder, 61)
    for number in range(ROOM):
        await house.adapters.load_adapter(f"full-{number}", (lora.config, lora.arrays))
    with pytest.raises(OverloadedError, match=r"at most 3 may be \(--max-adapters\): unload one first"):
        await house.adapters.load_adapter("full-9", (lora.config, lora.arrays))
    assert (await house.adapters.load_adapter("full-1", (lora.config, lora.arrays))).already_loaded
    await house.adapters.unload_adapter("full-1")
    await house.adapters.load_adapter("full-9", (lora.config, lora.arrays))
    await asyncio.gather(house.require(lora, "full-9"), house.require(None, ""))


async def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(house):
    lora = make_lora(house.folder, 71)
    a = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    b = a.replace("lora_A", "lora_B")
    wrong_shape = lora.arrays | {a: lora.arrays[a][:, :-1]}
    strange = lora.arrays | {a.replace("layers.0", "layers.9"): lora.arrays[a]}
    head = {"base_model.model.lm_head.lora_A.weight": lora.arrays[a]}
    alone = {name: array for name, array in lora.arrays.items() if name != b}
    big = make_lora(house.folder, 72, rank=9)
    infinite = lora.arrays | {a: lora.arrays[a] * float("inf")}
    for config, state, message in (
        (lora.config, wrong_shape, rf"'{a}' has shape \[4, 63\], must have \[4, 64\]"),
        (lora.config, strange, r"is of module 'model.layers.9.mlp.up_proj', which can't be adapted here or does not"),
        (lora.config, head, r"is of module 'lm_head', which can't be adapted here"),
        (lora.config, {"weight": lora.arrays[a]}, r"'weight' is no tensor of a LoRA adapter: they are named"),
        (lora.config, alone, r"of 'model.layers.0.mlp.up_proj' lora_A came without lora_B"),
        (lora.config, {}, r"there are none: an adapter has at least one pair"),
        (big.config, big.arrays, r"begin.config.rank is 9, must lie in \[1, 8\] \(--max-lora-rank\)"),
        (lora.config, infinite, r"holds a value that is not a finite number"),
        (lora.config | {"use_dora": True}, lora.arrays, r"use_dora is True in the adapter's configuration"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            await house.adapters.load_adapter("unfit", (config, state))
    for name in ("", "a/b", "../x", "x" * 129, "a b", "a\n", "ä"):
        with pytest.raises(InvalidInputError, match=r"begin\.name is .*, must be 1 to 128 of the characters"):
            await house.adapters.load_adapter(name, (lora.config, lora.arrays))
    assert (await house.adapters.list_adapters()).adapters == ()
    assert house.staged() == []
    # The name is free still, and not tied to what was refused.
    await house.adapters.load_adapter("unfit", (lora.config, lora.arrays))
    await house.require(lora, "unfit")


async def test_a_broken_or_damaged_transfer_loads_nothing_and_leaves_no_files(house):
    lora = make_lora(house.folder, 81)
    config, tensors = read_adapter((lora.config, lora.arrays))
    stub = adapters_pb2_grpc.AdapterServiceStub(house.adapters._channel)
    begin = adapters_pb2.BeginAdapter(
        name="broken",
        config=adapters_pb2.AdapterConfig(rank=config.rank, alpha=config.alpha, target_modules=config.target_modules),
        tensors=[weights_pb2.TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in tensors],
    )
    whole = [Step(chunk=weights_pb2.TensorChunk(tensor_index=i, data=bytes(t.data))) for i, t in enumerate(tensors)]
    commit = Step(commit=adapters_pb2.CommitAdapter(fingerprint="0" * 64))
    for steps, code, message in (
        ([Step(begin=begin), *whole, commit], grpc.StatusCode.DATA_LOSS, "damaged on the way; nothing was loaded"),
        ([Step(begin=begin), *whole[:-1], commit], grpc.StatusCode.DATA_LOSS, "bytes, only 0 came; nothing was loaded"),
        ([Step(begin=begin), *whole], grpc.StatusCode.DATA_LOSS, "the stream ended before its commit"),
        ([whole[0]], grpc.StatusCode.INVALID_ARGUMENT, "an adapter is one begin, then chunks, then one commit"),
        ([Step(begin=begin), Step(begin=begin)], grpc.StatusCode.INVALID_ARGUMENT, "step is begin"),
        ([Step(begin=begin), Step()], grpc.StatusCode.INVALID_ARGUMENT, "step is not set"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.LoadAdapter(iter(steps), timeout=20)
        assert refused.value.code() == code
        assert message in (refused.value.details() or "")
    call = stub.LoadAdapter()
    await call.write(Step(begin=begin))
    assert UPDATE_ACCEPTED in dict(await call.initial_metadata())
    await call.write(whole[0])
    assert len(house.staged()) == 1
    with pytest.raises(PreconditionError, match="adapter 'broken' is being loaded by another call"):
        await house.adapters.load_adapter("broken", (lora.config, lora.arrays))
    call.cancel()
    for _ in range(200):
        if not house.staged():
            break
        await asyncio.sleep(0.02)
    assert house.staged() == []
    assert (await house.adapters.list_adapters()).adapters == ()
    with pytest.raises(NotFoundError, match="adapter 'broken' is not loaded; 0 adapters are"):
        await house.generate(PROMPTS, "broken")
    await house.adapters.load_adapter("broken", (lora.config, lora.arrays))
    await house.require(lora, "broken")


async def test_the_service_that_generates_does_not_load_adapters(house):
    stub = adapters_pb2_grpc.AdapterServiceStub(house.policy._channel)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ListAdapters(adapters_pb2.ListAdaptersRequest(), timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_without_room_for_adapters_every_way_to_them_names_the_flag(start_service, make_policy, tokenizer):
    folder = make_policy(seed=3, scale=0.5)
    live = start_service("policy", folder, "--engine", "transformers")
    lora = make_lora(folder, 1)
    async with PolicyClient(live.address) as policy, AdapterClient(live.admin_address) as adapters:
        with pytest.raises(PreconditionError, match="LoRA is off in this service: start it with --max-adapters"):
            await adapters.load_adapter("a", (lora.config, lora.arrays))
        with pytest.raises(PreconditionError, match="start it with --max-adapters"):
            await adapters.unload_adapter("a")
        listed = await adapters.list_adapters()
        assert (listed.adapters, listed.max_adapters) == ((), 0)
        with pytest.raises(PreconditionError, match="adapter is 'a', but LoRA is off") as refused:
            async for _ in policy.generate(["hello"], Sampling(max_new_tokens=2), adapter="a"):
                pass
        assert refused.value.field == "adapter"
    assert live.stop() == 0

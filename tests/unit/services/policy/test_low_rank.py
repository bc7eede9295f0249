"""Adapters in the transformers engine against models merged in float64, base and adapters in one batch."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from services.policy.adapter_config import AdapterConfig
from services.policy.config import PolicySettings
from services.policy.engine import AdapterRefusedError, Generated, GenerationTask, InFlight, Sampling
from services.policy.low_rank import RowAdapters, linear_modules_of, read_adapter, row_wise_modules
from services.policy.transformers_engine import TransformersEngine
from tests.lora import Lora, furthest, make_lora

TOLERANCE = 1e-5
PROMPTS = [[5, 6, 7], [9], [20 + i for i in range(11)], [4, 4], [30, 8, 30, 8, 30], [77, 99, 250, 3, 17, 60]]
Start = Callable[..., Awaitable[TransformersEngine]]


def task(prompt: list[int], adapter: int = 0, seed: int = 0, tokens: int = 16) -> GenerationTask:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=tokens, min_new_tokens=0, stop_token_ids=())
    name = f"{prompt}-{adapter}-{seed}"
    return GenerationTask(prompt_ids=prompt, sampling=sampling, seed=seed, request_id=name, adapter=adapter)


def config_of(lora: Lora) -> AdapterConfig:
    return AdapterConfig(
        rank=lora.config["r"],
        alpha=lora.config["lora_alpha"],
        target_modules=tuple(lora.config["target_modules"]),
        use_rslora=lora.config.get("use_rslora", False),
        module_ranks=lora.ranks,
        module_alphas=lora.alphas,
    )


@pytest.fixture(scope="module")
def folder(make_policy: Callable[..., Path]) -> Path:
    return make_policy(seed=3, scale=0.5)


@pytest.fixture
async def start(folder: Path) -> AsyncIterator[Start]:
    """await start(**settings) loads an engine with room for 4 adapters, which ends with the test."""
    started = []

    async def load(model: Path = folder, **settings: Any) -> TransformersEngine:
        engine = TransformersEngine(model, PolicySettings(model=str(model), threads=1, max_adapters=4, **settings))
        await engine.start()
        started.append(engine)
        return engine

    yield load
    for engine in started:
        await engine.stop()


async def load(engine: TransformersEngine, number: int, lora: Lora, tmp_path: Path) -> None:
    staged = lora.save(tmp_path / str(number))
    await engine.load_adapter(number, staged / "adapter_model.safetensors", config_of(lora))


def off_by(folder: Path, lora: Lora | None, prompt: list[int], found: Generated) -> float:
    return furthest(folder, lora, prompt, found.token_ids, found.logprobs)


async def test_base_and_two_adapters_in_one_batch_each_get_exactly_their_own(start, folder, tmp_path):
    engine = await start()
    loras: dict[int, Lora | None] = {0: None, 1: make_lora(folder, 1), 2: make_lora(folder, 2, rank=7, alpha=3.0)}
    for number in (1, 2):
        await load(engine, number, loras[number], tmp_path)
    asked = [(prompt, number) for prompt in PROMPTS for number in loras]
    found = await asyncio.gather(*(engine.generate(task(prompt, number)) for prompt, number in asked))
    for (prompt, number), generated in zip(asked, found, strict=True):
        assert off_by(folder, loras[number], prompt, generated) < TOLERANCE
        # What tells them apart: by another adapter the same tokens are far less or more likely.
        for other in set(loras) - {number}:
            assert off_by(folder, loras[other], prompt, generated) > 0.01


async def test_rank_stabilised_scales_single_modules_and_one_kind_of_layer_alone_are_exact(start, folder, tmp_path):
    engine = await start()
    down, query = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
    loras = [
        make_lora(folder, 1, rank=9, alpha=6.0, use_rslora=True),
        make_lora(folder, 2, targets=["v_proj"], alpha=16.0, size=0.3),
        make_lora(folder, 3, ranks={down: 11, query: 1}, alphas={query: 2.5, down: 20.0}),
    ]
    for number, lora in enumerate(loras, start=1):
        await load(engine, number, lora, tmp_path)
    found = await asyncio.gather(*(engine.generate(task(PROMPTS[2], number)) for number in (1, 2, 3)))
    for lora, generated in zip(loras, found, strict=True):
        assert off_by(folder, lora, PROMPTS[2], generated) < TOLERANCE
        assert off_by(folder, None, PROMPTS[2], generated) > 0.01


async def test_base_rows_are_the_same_bit_for_bit_with_and_without_lora(start, folder, tmp_path):
    plain = TransformersEngine(folder, PolicySettings(model=str(folder), threads=1))
    await plain.start()
    engine = await start()
    await load(engine, 1, make_lora(folder, 1), tmp_path)
    try:
        alone = await plain.generate(task(PROMPTS[0]))
        again = await engine.generate(task(PROMPTS[0]))
    finally:
        await plain.stop()
    assert plain.adapter_modules == {}
    assert (again.token_ids, again.logprobs) == (alone.token_ids, alone.logprobs)


async def test_adapters_stay_on_their_names_when_the_weights_below_are_replaced(start, folder, make_policy, tmp_path):
    engine = await start()
    lora = make_lora(folder, 1)
    await load(engine, 1, lora, tmp_path)
    new = make_policy(seed=4, scale=0.5)
    staged = tmp_path / "weights"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes((new / "model.safetensors").read_bytes())
    await engine.update_weights(staged / "model.safetensors", 5, InFlight.KEEP, 60.0)
    adapted, base = await asyncio.gather(engine.generate(task(PROMPTS[0], 1)), engine.generate(task(PROMPTS[0])))
    assert adapted.version_spans == [(5, len(adapted.token_ids))]
    assert off_by(new, lora, PROMPTS[0], adapted) < TOLERANCE
    assert off_by(new, None, PROMPTS[0], base) < TOLERANCE
    assert off_by(folder, lora, PROMPTS[0], adapted) > 0.01


async def test_a_request_in_flight_keeps_an_adapter_that_is_unloaded_under_it(start, folder, tmp_path):
    engine = await start()
    lora = make_lora(folder, 1)
    await load(engine, 1, lora, tmp_path)
    running = asyncio.create_task(engine.generate(task(PROMPTS[0], 1, tokens=60)))
    await asyncio.sleep(0.02)
    await engine.unload_adapter(1)
    assert off_by(folder, lora, PROMPTS[0], await running) < TOLERANCE


async def test_in_deterministic_mode_an_adapted_row_has_the_same_bits_in_any_company(start, folder, tmp_path):
    engine = await start(deterministic=True)
    for number in (1, 2):
        await load(engine, number, make_lora(folder, number), tmp_path)
    alone = [await engine.generate(task(prompt, 1, seed=7)) for prompt in PROMPTS]
    asked = [(prompt, number) for prompt in PROMPTS for number in (0, 1, 2)]
    together = await asyncio.gather(*(engine.generate(task(prompt, number, seed=7)) for prompt, number in asked))
    mine = [generated for (_, number), generated in zip(asked, together, strict=True) if number == 1]
    assert [(g.token_ids, g.logprobs) for g in mine] == [(g.token_ids, g.logprobs) for g in alone]


async def test_numbers_that_are_not_finite_are_refused_by_the_name_of_their_tensor(start, folder, tmp_path):
    engine = await start()
    lora = make_lora(folder, 1)
    name = sorted(lora.state)[3]
    lora.state[name][0, 0] = math.inf
    with pytest.raises(AdapterRefusedError, match=rf"'{name}' holds a value that is not a finite number"):
        await load(engine, 1, lora, tmp_path)


async def test_the_adapted_layers_are_the_same_whether_a_model_runs_or_only_its_configuration_is_read(start, folder):
    engine = await start()
    assert engine.adapter_modules == linear_modules_of(folder, trust_remote_code=False)
    assert len(engine.adapter_modules) == 2 * 7
    assert engine.adapter_modules["model.layers.1.self_attn.k_proj"] == (64, 32)
    assert engine.adapter_modules["model.layers.0.mlp.down_proj"] == (128, 64)
    assert "lm_head" not in engine.adapter_modules


def test_layers_that_see_all_rows_in_one_list_are_left_out():
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, max_position_embeddings=32,
        )
    )  # fmt: skip
    found = row_wise_modules(model.eval(), torch.device("cpu"))
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_model_whose_layers_keep_their_weights_transposed_is_adapted_too(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).double().eval()
    modules = row_wise_modules(model, torch.device("cpu"))
    assert modules["transformer.h.0.attn.c_attn"] == (16, 48)
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 16, generator=draw), torch.randn(48, 3, generator=draw)
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    config = AdapterConfig(rank=3, alpha=6.0, target_modules=("c_attn",))
    adapter = read_adapter(tmp_path / "adapter_model.safetensors", config, torch.device("cpu"))
    rows = RowAdapters()
    rows.attach(model, modules)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.inference_mode():
        base = model(ids).logits
        with rows.applied([None, adapter], torch.device("cpu")):
            mixed = model(ids).logits
        weight = model.transformer.h[0].attn.c_attn.weight
        weight += 2.0 * (b.double() @ a.double()).T
        merged = model(ids).logits
    assert torch.equal(mixed[0], base[0])
    assert (mixed[1] - merged[1]).abs().max() < 1e-5
    assert (mixed[1] - base[1]).abs().max() > 0.01

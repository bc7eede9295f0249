"""Activation checkpointing: the same gradients from less memory; bfloat16 products over float32 masters.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.saved_bytes import kept_bytes
from trainer.models import TokenLogprobs, load_policy, load_reward_model, load_tokenizer, score_tokens
from trainer.optimisation import apply_gradients, autocast, make_adamw
from trainer.runs import training_mode
from trainer.scale_config import ScaleSettings
from trainer.scaling import prepare


def made(folder: Path, kind: str, settings: ScaleSettings) -> tuple[Any, Any]:
    """A model in float64 and its forward pass: a sum over log-probabilities, or over scores."""
    tokenizer = load_tokenizer(folder)
    ids_BS = torch.arange(4 * 60).view(4, 60) % 290 + 3
    mask_BS = torch.arange(60)[None, :] < torch.tensor([60, 41, 7, 2])[:, None]
    if kind == "policy":
        model = prepare(load_policy(folder, tokenizer, dtype=torch.float64), settings, seed=0)
        wanted_BS = mask_BS & (torch.arange(60) > 0)
        logprobs = TokenLogprobs(model)
        return model, lambda: logprobs(ids_BS, mask_BS, wanted_BS)[0].double().sum()
    model = prepare(load_reward_model(folder, tokenizer, dtype=torch.float64, new_head_seed=1), settings, seed=0)
    return model, lambda: score_tokens(model, ids_BS, mask_BS).double().square().sum()


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_are_the_same_and_fewer_bytes_are_kept(kind, rank, make_policy):
    if rank:
        pytest.importorskip("peft")
    folder = make_policy(seed=3)
    gradients, kept = [], []
    for checkpointing in (False, True):
        lora = {"lora_rank": rank, "lora_dropout": 0.2} if rank else {}
        model, forward = made(folder, kind, ScaleSettings(activation_checkpointing=checkpointing, **lora))
        torch.manual_seed(5)
        with training_mode(model, 0.1):
            loss, bytes_kept = kept_bytes(model, forward)
            loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        kept.append(bytes_kept)
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == (2 * 7 * 2 if rank else 2 * 9 + 2) + (kind == "reward") + (
        kind == "policy" and not rank
    )
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        # Float64, dropout and all: what is computed anew draws the same random numbers.
        assert float((gradient - gradients[1][name]).abs().max()) <= 1e-12 * scale, name
    assert kept[1] < 0.4 * kept[0]


def test_with_dropout_and_without_checkpointing_draws_the_same_numbers_after_a_step(make_policy):
    """So a run goes on alike with it and without."""
    draws = []
    for checkpointing in (False, True):
        model, forward = made(make_policy(seed=3), "policy", ScaleSettings(activation_checkpointing=checkpointing))
        torch.manual_seed(5)
        with training_mode(model, 0.1):
            forward().backward()
        draws.append(torch.rand(3))
    assert draws[0].equal(draws[1])


def test_in_bfloat16_weights_gradients_and_optimiser_are_float32_and_small_steps_are_not_lost(make_policy):
    folder = make_policy(seed=3)
    tokenizer = load_tokenizer(folder)
    policy = load_policy(folder, tokenizer)
    logprobs = TokenLogprobs(policy)
    ids_BS = torch.arange(2 * 20).view(2, 20) % 290 + 3
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    wanted_BS = mask_BS & (torch.arange(20) > 0)
    # A thousandth of what bfloat16 could tell from a weight of 1.
    optimiser = make_adamw(policy, learning_rate=2.0**-8 / 1000)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    with autocast(torch.device("cpu"), "bfloat16"):
        found, _ = logprobs(ids_BS, mask_BS, wanted_BS)
        hidden = policy.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state
        assert policy.model.layers[0].mlp.down_proj(hidden.repeat(1, 1, 2)).dtype == torch.bfloat16
    (-found.sum()).backward()
    assert {parameter.grad.dtype for parameter in policy.parameters()} == {torch.float32}
    apply_gradients(optimiser, 1.0)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {v.dtype for s in optimiser.state.values() for v in s.values()} == {torch.float32}
    norm = "model.norm.weight"
    moved = (policy.get_parameter(norm).detach() - before[norm]).abs()
    assert float(moved.max()) == pytest.approx(2.0**-8 / 1000, rel=0.1)
    assert policy.get_parameter(norm).bfloat16().equal(before[norm].bfloat16())

"""Packed forward passes against the plain forward pass of every sequence alone.

Shapes: N tokens of a row, S of a sequence.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from services.hosting import packed
from services.hosting import row as row_
from services.hosting.packed import HiddenStates
from services.hosting.row import lay_out
from services.runtime.errors import StartError

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def make(kind: str, **changes: Any) -> Any:
    """A small model with random weights, far from uniform."""
    config_class = getattr(transformers, f"{kind}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**copy.deepcopy(SMALL | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def sequences() -> list[list[int]]:
    """Lone ones of many lengths, four responses to one prompt, and a pair that differs in its last token."""
    draw = torch.Generator().manual_seed(1)

    def some(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=draw).tolist()

    prompt, pair = some(40), some(30)
    alone = [some(count) for count in (1, 2, 17, 64, 100, 33)]
    return [alone[0], *(prompt + some(5 + 9 * i) for i in range(4)), *alone[1:], [*pair, 7], [*pair, 8], pair]


@torch.inference_mode()
def each_alone(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    return [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"num_key_value_heads": 2}),
        ("Qwen2", {"num_key_value_heads": 2}),
        ("Qwen3", {"num_key_value_heads": 1, "head_dim": 16}),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 12}),
        ("GPTNeoX", {}),
        ("GPT2", {"n_positions": 256}),
    ],
)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tokens_at_once", [50, 10_000])
def test_every_sequence_has_the_hidden_states_that_it_has_alone(kind, changes, share, tokens_at_once, monkeypatch):
    monkeypatch.setattr(packed, "_CPU_TOKENS", tokens_at_once)
    model, rows = make(kind, **changes), sequences()
    expected = each_alone(model, rows)
    hidden_states = HiddenStates(model, pad_id=0)
    assert hidden_states.packed
    # All, the last, the first, an end, a part in the middle; sequences that begin alike want other tokens each.
    parts = [(0, 1), (1, 1), (0, 0), (0.5, 1), (0.3, 0.7)]
    wanted = [range(min(int(len(r) * a), len(r) - 1), max(int(len(r) * b), 1)) for a, b in parts for r in rows]
    with torch.inference_mode():
        agrees(hidden_states(rows, share=share), expected)
        for first in range(len(parts)):
            asked = [wanted[(first + index) % len(parts) * len(rows) + index] for index in range(len(rows))]
            found = hidden_states(rows, asked, share=share)
            agrees(found, [own_SD[a.start : a.stop] for own_SD, a in zip(expected, asked, strict=True)])
    # The prompt of four, and what the three rows of the pair begin with.
    saved = 3 * 40 + 2 * 29 if share else 0
    assert len(lay_out(rows, share=share).ids_N) == sum(map(len, rows)) - saved


def agrees(hidden_MD: torch.Tensor, expected: list[torch.Tensor]) -> None:
    for found_SD, own_SD in zip(hidden_MD.split([len(own) for own in expected]), expected, strict=True):
        if len(own_SD):
            assert found_SD == pytest.approx(own_SD, abs=1e-4 * float(own_SD.abs().max()))


def test_the_last_layer_works_for_the_tokens_alone_that_are_asked_for():
    model, rows = make("Llama"), sequences()
    hidden_states = HiddenStates(model, pad_id=0)
    counts: dict[str, int] = {}
    for name, layer in (("first", model.base_model.layers[0]), ("last", model.base_model.layers[-1].layer)):
        layer.mlp.register_forward_hook(lambda _, __, y, name=name: counts.update({name: y.shape[1]}))
    with torch.inference_mode():
        hidden_states(rows, [range(len(row) - 1, len(row)) for row in rows])
    # The last row ends where two others go on: with what the three have in common.
    assert counts == {"first": len(lay_out(rows, share=True).ids_N), "last": len(rows)}


def test_a_model_whose_attention_needs_more_is_padded_and_right():
    model, rows = make("Gemma2", num_key_value_heads=2, head_dim=16, attn_logit_softcapping=5.0), sequences()
    expected = each_alone(model, rows)
    hidden_states = HiddenStates(model, pad_id=0)
    assert not hidden_states.packed
    with torch.inference_mode():
        agrees(hidden_states(rows), expected)
        agrees(hidden_states(rows, [range(len(row) - 1, len(row)) for row in rows]), [own[-1:] for own in expected])


def test_a_model_that_takes_no_other_attention_is_padded_and_right(monkeypatch):
    model, rows = make("Llama"), sequences()
    expected = each_alone(model, rows)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not supported")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    hidden_states = HiddenStates(model, pad_id=0)
    assert not hidden_states.packed
    with torch.inference_mode():
        agrees(hidden_states(rows), expected)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # The first two tell their window their mask alone, the others attention, too. The check is shorter than it.
        ("Phimoe", {"num_local_experts": 4}),
        ("Qwen2Moe", {"use_sliding_window": True, "max_window_layers": 1, "num_experts": 4}),
        ("Mistral", {}),
        ("Gemma3Text", {"head_dim": 16}),
    ],
)
def test_a_window_holds_for_sequences_that_are_longer_than_those_of_the_check(kind, changes):
    model, rows = make(kind, num_key_value_heads=2, sliding_window=40, **changes), sequences()
    expected = each_alone(model, rows)
    hidden_states = HiddenStates(model, pad_id=0)
    assert hidden_states.packed
    with torch.inference_mode():
        agrees(hidden_states(rows), expected)


def test_a_model_that_makes_its_mask_itself_is_padded():
    model, rows = make("Doge", num_key_value_heads=2), sequences()
    expected = each_alone(model, rows)
    hidden_states = HiddenStates(model, pad_id=0)
    assert not hidden_states.packed
    with torch.inference_mode():
        agrees(hidden_states(rows), expected)


def test_a_model_that_attends_in_chunks_is_padded():
    torch.manual_seed(0)
    chunks = {"attention_chunk_size": 40, "num_local_experts": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Llama4TextConfig(**(SMALL | chunks | {"intermediate_size_mlp": 96, "pad_token_id": 0}))
    model, rows = transformers.Llama4TextModel(config).eval(), sequences()
    expected = each_alone(model, rows)
    hidden_states = HiddenStates(model, pad_id=0)
    assert not hidden_states.packed
    with torch.inference_mode():
        agrees(hidden_states(rows), expected)


LONGROPE = {
    "pad_token_id": 0,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}
DYNAMIC = {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
}
# Each type of layer has frequencies of its own.
BY_LAYER = {
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": DYNAMIC["rope_parameters"],
    },
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Phi3", LONGROPE), ("Llama", DYNAMIC), ("Gemma3Text", BY_LAYER)],
    ids=lambda value: str(value)[:9],
)
@pytest.mark.parametrize("packed_way", [True, False])
def test_neither_companions_nor_those_before_change_frequencies_that_depend_on_the_length(kind, changes, packed_way):
    model = make(kind, **changes)
    draw = torch.Generator().manual_seed(2)
    whole = torch.randint(3, 300, (120,), generator=draw).tolist()
    # On both sides of the original length and at it, all of the same beginning.
    rows = [whole[:length] for length in (64, 120, 63, 20, 65, 100, 120)]
    expected = []
    for row in rows:
        expected += each_alone(make(kind, **changes), [row])  # A model that has seen nothing yet.
    hidden_states = HiddenStates(model, pad_id=0)
    assert hidden_states.packed
    if not packed_way:
        hidden_states.packed = False
        model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        beside = hidden_states(rows).split(list(map(len, rows)))
        for row, own_SD, together_SD in zip(rows, expected, beside, strict=True):
            alone_SD = hidden_states([row])
            scale = float(own_SD.abs().max())
            assert together_SD == pytest.approx(alone_SD, abs=1e-5 * scale)
            assert alone_SD == pytest.approx(own_SD, abs=1e-5 * scale)


def test_sequences_of_the_same_frequencies_still_share_a_row():
    rows, counts = [[5] * length for length in (20, 30, 100, 110)], []
    for kind, changes, passes in (("Phi3", LONGROPE, 2), ("Llama", DYNAMIC, 3), ("Llama", {}, 1)):
        hidden_states = HiddenStates(make(kind, **changes), pad_id=0)
        counts.clear()
        hidden_states.body.register_forward_hook(lambda *_: counts.append(1))
        with torch.inference_mode():
            hidden_states(rows)
        assert len(counts) == passes


def test_a_model_that_gives_no_hidden_states_is_refused():
    changes = {"num_local_experts": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 96}
    model = make("Llama4Text", **changes)
    with pytest.raises(StartError, match="Llama4ForCausalLM gives MoeCausalLMOutputWithPast without last_hidden_state"):
        HiddenStates(model, pad_id=0)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=8), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_row_holds_every_sequence_and_every_piece_sees_what_comes_before_it(rows, share):
    # Few different tokens and a low threshold, so that beginnings are shared all the time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_, "MIN_SHARED", 2)
        row = lay_out(rows, share=share)
    for sequence, place in zip(rows, row.places, strict=True):
        assert row.ids_N[place].tolist() == sequence
        assert row.positions_N[place].tolist() == list(range(len(sequence)))
    covered = list(itertools.chain.from_iterable(range(p.start, p.start + p.length) for p in row.pieces))
    assert covered == list(range(len(row.ids_N)))
    # What a token attends to by its piece are the places of its own sequence up to itself.
    seen = {}
    for piece in row.pieces:
        prefix = list(range(piece.prefix_start, piece.prefix_start + piece.prefix_length))
        for token in range(piece.start, piece.start + piece.length):
            seen[token] = [*prefix, *range(piece.start, token + 1)]
    for place in row.places:
        for index, token in enumerate(place.tolist()):
            assert seen[token] == place[: index + 1].tolist()
    assert len(row.ids_N) <= sum(map(len, rows))
    if not share:
        assert len(row.ids_N) == sum(map(len, rows))

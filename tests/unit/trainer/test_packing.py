"""Packed training against the same sequences padded, and each alone: outputs, losses and gradients.

Shapes: B sequences, S tokens, N tokens of a row.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from tests.unit.trainer.test_ppo import make_learner, settings
from trainer import packed_attention
from trainer.batching import micro_batches, pad_right
from trainer.comparisons import Judgement
from trainer.config import DpoSettings, RewardSettings, SftSettings
from trainer.critic import Critic
from trainer.dpo import DpoTrainer, with_reference
from trainer.encoding import EncodedComparison, EncodedPreference, EncodedResponse
from trainer.errors import ModelError
from trainer.experience import make_experience
from trainer.models import TokenLogprobs, disable_dropout, load_policy, load_tokenizer, score_tokens
from trainer.packing import forward, group_micro_batches, is_packed, lay_out, pack, packed_outputs
from trainer.reward_trainer import RewardTrainer
from trainer.rollout import Sample
from trainer.saving import save_model
from trainer.sft import SftTrainer

TOKENIZER = SimpleNamespace(eos_token_id=1)
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def make(kind: str, auto: Any = transformers.AutoModelForCausalLM, **changes: Any) -> Any:
    """A small model in float64 with random weights, far from uniform."""
    config_class = getattr(transformers, f"{kind}Config")
    torch.manual_seed(0)
    model = auto.from_config(config_class(**copy.deepcopy(SMALL | changes))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    disable_dropout(model)
    return model.train()


def draw_ids(*lengths: int, seed: int = 1) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, 300, length).astype(np.int32) for length in lengths]


def sequences() -> list[np.ndarray]:
    """Lone ones of many lengths, three answers to one prompt, a pair that differs in its last token, and its start."""
    prompt, pair, *alone = draw_ids(40, 30, 1, 2, 17, 64, 100)
    tails = draw_ids(5, 14, 23, seed=2)
    return [alone[0], *(np.concatenate([prompt, tail]) for tail in tails), *alone[1:], *ends(pair, [7], [8]), pair]


def ends(begin: np.ndarray, *tails: list[int]) -> list[np.ndarray]:
    return [np.array([*begin, *tail], dtype=np.int32) for tail in tails]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert ours.keys() == theirs.keys()
    assert scale > 1e-4
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) < tolerance * scale, name


def weights_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# Transformers computes most norms in float32, whatever the precision of the model; not those of GPT-NeoX.
FLOAT32 = 3e-6
ARCHITECTURES = [
    ("Llama", {"num_key_value_heads": 2}),
    ("Qwen3", {"num_key_value_heads": 1, "head_dim": 16}),
    ("Mistral", {"num_key_value_heads": 2, "sliding_window": 12}),
    ("Gemma3Text", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 12}),
    ("GPTNeoX", {}),
    ("GPT2", {"n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4}),
    ("Granite", {"residual_multiplier": 0.3}),
]


@pytest.mark.parametrize(("kind", "changes"), ARCHITECTURES, ids=[kind for kind, _ in ARCHITECTURES])
@pytest.mark.parametrize("queries", [16, 1024])
def test_every_sequence_has_the_states_and_gradients_that_it_has_alone(kind, changes, queries, monkeypatch):
    monkeypatch.setattr(packed_attention, "_MASKED_QUERIES", queries)
    model, rows = make(kind, **changes), sequences()
    # All, the last, the second half, by turns: sequences that begin alike want other tokens of it each.
    wanted = [(0, len(row) - 1, len(row) // 2)[index % 3] for index, row in enumerate(rows)]
    alone = [model.base_model(input_ids=torch.tensor(row[None])).last_hidden_state[0] for row in rows]
    expected_MD = torch.cat([own[start:] for own, start in zip(alone, wanted, strict=True)])
    (expected_MD * weights_like(expected_MD)).sum().backward()
    expected = gradients(model)

    assert pack(model, "on", "float32")
    layout = lay_out(rows)
    # The prompt of three, and what three have of the pair.
    assert len(layout.ids_N) == sum(map(len, rows)) - 2 * 40 - 2 * 29
    asked = np.concatenate([place[start:] for place, start in zip(layout.places, wanted, strict=True)])
    found_MD = forward(model.base_model, layout, asked)
    tolerance = 1e-9 if kind == "GPTNeoX" else FLOAT32
    scale = float(expected_MD.detach().abs().max())
    assert found_MD.detach().numpy() == pytest.approx(expected_MD.detach().numpy(), abs=tolerance * scale)
    (found_MD * weights_like(found_MD)).sum().backward()
    assert_equal(gradients(model), expected, tolerance)
    logits = model(input_ids=torch.tensor(rows[1][None])).logits[0]
    # Its own way of being called stays as it is, and log-probabilities go through its head.
    found_BS, _ = TokenLogprobs(model)(*as_batch(rows[1:2]), torch.arange(len(rows[1]))[None] > 0)
    chosen_S = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(rows[1][1:, None]).long())[:, 0]
    assert found_BS[0, 1:].tolist() == pytest.approx(chosen_S.tolist(), abs=1e-4)


@pytest.mark.parametrize(("kind", "changes"), [ARCHITECTURES[0], ARCHITECTURES[4]], ids=["Llama", "GPTNeoX"])
def test_short_sequences_of_like_length_attend_together_and_are_what_they_are_alone(kind, changes, monkeypatch):
    model, rows = make(kind, **changes), draw_ids(17, 64, 100, 1, 2, 60, 50, 1, 80)
    expected_ND = torch.cat([model.base_model(input_ids=torch.tensor(row[None])).last_hidden_state[0] for row in rows])
    (expected_ND * weights_like(expected_ND)).sum().backward()
    expected = gradients(model)

    assert pack(model, "on", "float32")
    layout, calls = lay_out(rows), []
    attention = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda query, *others, **named: calls.append(query.shape[:3]) or attention(query, *others, **named),
    )
    found_ND = forward(model.base_model, layout, np.concatenate(layout.places))
    # Those within three quarters of the longest of their block, in each of three layers.
    assert calls == 3 * [(2, 4, 100), (3, 4, 64), (1, 4, 17), (1, 4, 2), (2, 4, 1)]
    tolerance = 1e-9 if kind == "GPTNeoX" else FLOAT32
    scale = float(expected_ND.detach().abs().max())
    assert found_ND.detach().numpy() == pytest.approx(expected_ND.detach().numpy(), abs=tolerance * scale)
    (found_ND * weights_like(found_ND)).sum().backward()
    assert_equal(gradients(model), expected, tolerance)


def as_batch(rows: list[np.ndarray], left: int = 0, right: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, each row padded to the longest on the right, or where ``left``, on the left; and ``right`` more."""
    ids_BS, mask_BS = pad_right(rows, 0, torch.device("cpu"))
    if left:
        for index, row in enumerate(rows):
            ids_BS[index], mask_BS[index] = (x[index].roll(ids_BS.shape[1] - len(row)) for x in (ids_BS, mask_BS))
    return tuple(functional.pad(x, (0, right)) for x in (ids_BS, mask_BS))  # type: ignore[return-value]


@pytest.mark.parametrize("packing", ["on", "off"])
def test_padding_on_either_side_changes_neither_outputs_nor_gradients(packing):
    policy = make("Llama", num_key_value_heads=2)
    reward = make("Llama", transformers.AutoModelForSequenceClassification, num_key_value_heads=2, num_labels=1)
    critic = Critic(copy.deepcopy(policy.model), torch.nn.Linear(64, 1)).double()
    rows = [row for row in sequences() if len(row) > 2]

    def outputs(batches: list[list[np.ndarray]], left: int, right: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"logprobs": [], "scores": [], "values": []}
        for batch in batches:
            ids_BS, mask_BS = as_batch(batch, left, right)
            first_B = mask_BS.long().argmax(dim=1)
            wanted_BS = mask_BS & (torch.arange(ids_BS.shape[1]) > first_B[:, None] + 1)
            logprobs_BS, entropy_BS = TokenLogprobs(policy)(ids_BS, mask_BS, wanted_BS, 0.7, want_entropy=True)
            scores_B, values_BS = score_tokens(reward, ids_BS, mask_BS), critic(ids_BS, mask_BS, wanted_BS)
            assert not logprobs_BS[~wanted_BS].any()
            assert not values_BS[~wanted_BS].any()
            sums_B = (logprobs_BS + entropy_BS).sum(dim=1)
            (sums_B.sum() + scores_B.square().sum() + values_BS.square().sum()).backward()
            for name, values in (("logprobs", sums_B), ("scores", scores_B), ("values", values_BS.sum(dim=1))):
                found[name] += values.tolist()
        return found

    models = (policy, reward, critic)
    expected = outputs([[row] for row in rows], 0, 0)
    expected_gradients = [gradients(model) for model in models]
    for model in (policy, reward, critic.body):
        assert pack(model, packing, "float32") == (packing == "on")
    for left, right in ((0, 0), (1, 0), (0, 7), (1, 3)):
        found = outputs([rows], left, right)
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-5)
        for model, theirs in zip(models, expected_gradients, strict=True):
            assert_equal(gradients(model), theirs, FLOAT32)


def test_no_gradient_and_no_number_crosses_from_one_sequence_to_another():
    model = make("Llama", num_key_value_heads=2)
    pack(model, "on", "float32")
    first, second, third = draw_ids(20, 30, 9)
    ids_BS, mask_BS = as_batch([first, second, third])
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, y: embedded.append(y) or y.retain_grad())
    before = packed_outputs(model.base_model, ids_BS, mask_BS, mask_BS).split([20, 30, 9])
    before[1].square().sum().backward()
    place = lay_out([first, second, third]).places
    assert embedded[0].grad is not None
    reached_N = embedded[0].grad[0].abs().sum(dim=1) > 0
    assert reached_N[place[1]].all()
    assert int(reached_N.sum()) == 30
    ids_BS[1, :30] += 1
    after = packed_outputs(model.base_model, ids_BS, mask_BS, mask_BS).split([20, 30, 9])
    assert [a.equal(b) for a, b in zip(before, after, strict=True)] == [True, False, True]


# Losses ------------------------------------------------------------------------------------------------------------


def responses() -> list[EncodedResponse]:
    return [
        EncodedResponse(ids=ids, prompt_tokens=len(ids) // 3, truncated=False)
        for ids in draw_ids(30, 44, 18, 71, 25, 60, 12, 33)
    ]


def pairs() -> list[EncodedPreference]:
    """Prompts of which some are long enough to be shared."""
    found = []
    for number, length in enumerate((40, 3, 25, 17, 60, 20, 9, 30)):
        prompt, chosen, rejected = draw_ids(length, 3 + 2 * number, 20 - 2 * number, seed=number)
        found.append(
            EncodedPreference(
                **{
                    name: EncodedResponse(ids=np.concatenate([prompt, own]), prompt_tokens=length, truncated=False)
                    for name, own in (("chosen", chosen), ("rejected", rejected))
                }
            )
        )
    return found


def common(packing: str, tokens: int, tmp_path: Any) -> dict[str, Any]:
    values = {"model": "m", "data": ("d",), "output": tmp_path, "learning_rate": 1e-3}
    return values | {"packing": packing, "micro_batch_tokens": tokens, "precision": "float32"}


def sft(packing: str, tokens: int, tmp_path: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    policy = make("Llama", num_key_value_heads=2)
    trainer = SftTrainer(policy, TOKENIZER, SftSettings(**common(packing, tokens, tmp_path)))
    return trainer.accumulate(responses()), gradients(policy)


def reward(packing: str, tokens: int, tmp_path: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model = make("Llama", transformers.AutoModelForSequenceClassification, num_key_value_heads=2, num_labels=1)
    options = RewardSettings(**common(packing, tokens, tmp_path), centering=0.1, score_l2=0.01)
    rows = [
        EncodedComparison(
            answers=(pair.chosen, pair.rejected), judgements=(Judgement(first=0, second=1),), ranked=False
        )
        for pair in pairs()
    ]
    return RewardTrainer(model, TOKENIZER, options).accumulate(rows), gradients(model)


def dpo(packing: str, tokens: int, tmp_path: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    policy = make("Llama", num_key_value_heads=2)
    options = DpoSettings(**common(packing, tokens, tmp_path), sft_weight=0.1)
    trainer = DpoTrainer(policy, TOKENIZER, options, SimpleNamespace(identity="none"))  # type: ignore[arg-type]
    known = with_reference(pairs(), np.random.default_rng(0).normal(-200, 5, 16))
    return trainer.accumulate(known), gradients(policy)


def ppo(packing: str, tokens: int, tmp_path: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    learner = make_learner(settings(packing=packing, micro_batch_tokens=tokens, minibatches=1, output=str(tmp_path)))
    draw = np.random.default_rng(5)
    samples = []
    for index, row in enumerate(responses()):
        # Two responses to each prompt.
        prompt, response = responses()[index // 2 * 2].ids[:18], row.ids[-9:]
        numbers = draw.normal(-6, 1.5, (2, len(response)))
        samples.append(
            Sample(
                index=index,
                prompt_ids=tuple(prompt.tolist()),
                response_ids=tuple(response.tolist()),
                logprobs=tuple(numbers[0].tolist()),
                ref_logprobs=tuple(numbers[1].tolist()),
                score=float(draw.normal()),
                finished=True,
            )
        )
    experience = make_experience(samples, learner.device)
    assert learner.packed == (packing == "on")
    targets, metrics = learner.shape(experience, learner.evaluate(experience))
    total = float(experience.mask_NT.sum())
    for rows in micro_batches(experience.lengths, tokens, packed=learner.packed):
        figures, _ = learner.accumulate(experience, targets, rows, total)
        metrics = {name: metrics.get(name, 0.0) + value for name, value in figures.items()} | {
            name: value for name, value in metrics.items() if name not in figures
        }
    both = {"policy": learner.policy, "critic": learner.critic}
    found = {f"{own} {name}": g for own, model in both.items() for name, g in gradients(model).items()}
    return metrics, found


@pytest.mark.parametrize(("stage", "tolerance"), [(sft, FLOAT32), (reward, FLOAT32), (dpo, FLOAT32), (ppo, 3e-5)])
def test_loss_and_gradients_are_the_same_packed_and_padded_in_1_2_and_8_micro_batches(stage, tolerance, tmp_path):
    figures, expected = stage("off", 10_000, tmp_path)
    count = {"tokens": 0}
    forward_pass: Callable[..., Any] = transformers.LlamaModel.forward

    def counted(self: Any, *arguments: Any, **others: Any) -> Any:
        count["tokens"] += others["input_ids"].numel()
        return forward_pass(self, *arguments, **others)

    computed = {}
    for packing in ("off", "on"):
        for tokens in (10_000, 160, 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transformers.LlamaModel, "forward", counted)
                count["tokens"] = 0
                found, ours = stage(packing, tokens, tmp_path)
            computed[packing, tokens] = count["tokens"]
            for name, value in figures.items():
                assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (packing, tokens, name)
            assert_equal(ours, expected, tolerance)
    assert computed["on", 10_000] < computed["off", 10_000]


def test_micro_batches_count_real_tokens_when_packed_and_what_a_group_shares_once():
    assert micro_batches([10, 6, 4, 1], 20) == [[0, 1], [2, 3]]
    assert micro_batches([10, 6, 4, 1], 20, packed=True) == [[0, 1, 2], [3]]
    assert micro_batches([30, 6, 4, 1], 11, packed=True) == [[0], [1, 2, 3]]
    own = [(pair.chosen.ids, pair.rejected.ids) for pair in pairs()]
    for packed in (True, False):
        parts = group_micro_batches(own, 150, packed=packed)
        assert sorted(index for part in parts for index in part) == list(range(8))
        for part in parts:
            rows = [ids for index in part for ids in own[index]]
            tokens = len(lay_out(rows).ids_N) if packed else len(rows) * max(map(len, rows))
            assert tokens <= 150 or len(part) == 1
    assert len(group_micro_batches(own, 150, packed=True)) < len(group_micro_batches(own, 150, packed=False))


# Which models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16, "attn_logit_softcapping": 5.0}, "attention has softcap"),
        ("Mamba", {}, "its hidden states differ by"),
        ("Bloom", {}, "its hidden states differ by"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "frequencies change with the longest sequence",
        ),
    ],
)
def test_a_model_for_which_it_is_not_exact_is_padded_and_refused_where_packing_is_on(kind, changes, reason, capsys):
    model = make(kind, **changes).float()
    before = model.config._attn_implementation
    assert not pack(model, "auto", "float32")
    assert reason in capsys.readouterr().out
    assert not is_packed(model)
    assert model.config._attn_implementation == before
    assert model.training
    with pytest.raises(ModelError, match=f"--packing is on, but {type(model.base_model).__name__} .*{reason}"):
        pack(model, "on", "float32")


def test_checkpointed_layers_compute_the_same_again_in_the_backward_pass(tmp_path):
    figures, expected = sft("on", 160, tmp_path)
    policy = make("Llama", num_key_value_heads=2)
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = SftTrainer(policy, TOKENIZER, SftSettings(**common("on", 160, tmp_path)))
    assert trainer.accumulate(responses()) == figures
    assert_equal(gradients(policy), expected, 1e-12)


def test_a_packed_model_is_saved_as_any_other(make_policy, tmp_path):
    folder = make_policy(seed=2)
    tokenizer = load_tokenizer(folder)
    policy = load_policy(folder, tokenizer)
    pack(policy, "on", "float32")
    save_model(policy, tokenizer, tmp_path / "saved")
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "saved", folder))
    assert ours == theirs
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(a.equal(b) for a, b in zip(saved.parameters(), policy.parameters(), strict=True))


def test_the_gpus_kernel_is_told_what_torchs_attention_computes(monkeypatch):
    """With the kernel written out in its place: causal, aligned to the end of the keys, windows, fewer key heads."""

    def varlen(query, key, value, ends_q, ends_k, longest_q, longest_k, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        found = []
        places = zip(*(itertools.pairwise(ends.tolist()) for ends in (ends_q, ends_k)), strict=True)
        for (first_q, q), (first_k, k) in places:
            own = [x[a:b].transpose(0, 1) for x, a, b in ((query, first_q, q), (key, first_k, k), (value, first_k, k))]
            assert own[0].shape[1] <= longest_q
            assert own[1].shape[1] <= longest_k
            own[1:] = [x.repeat_interleave(len(own[0]) // len(x), dim=0) for x in own[1:]]
            scores = own[0] @ own[1].transpose(1, 2) * scale
            distance = torch.arange(k - first_k)[-(q - first_q) :, None] - torch.arange(k - first_k)
            unseen = (distance < 0) | ((distance > window_size[0]) if window_size[0] >= 0 else False)
            found.append((scores.masked_fill(unseen, -torch.inf).softmax(-1) @ own[2]).transpose(0, 1))
        return torch.cat(found)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    layout = lay_out(sequences())
    row = packed_attention.Row(pieces=layout.pieces, asked_M=torch.empty(0))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(layout.ids_N), 8, dtype=torch.float64) for heads in (4, 2, 2))
    for window in (None, 5):
        ours = packed_attention._varlen(row, query, key, value, 0.3, window)
        theirs = packed_attention._by_piece(row, query, key, value, 0.0, 0.3, window)
        assert ours.numpy() == pytest.approx(theirs.numpy(), abs=1e-12)

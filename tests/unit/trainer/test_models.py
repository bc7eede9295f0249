"""The trainer's models: what padding, dropout, heads and saving must not change.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from quartet.fingerprint import safetensors_fingerprint, tokenizer_fingerprint
from tests.conftest import llama_config, save_stock_tokenizer, train_tokenizer
from trainer.batching import pad_right
from trainer.critic import Critic
from trainer.errors import ModelError
from trainer.models import (
    TokenLogprobs,
    load_policy,
    load_reward_model,
    load_tokenizer,
    longest_sequence,
    padding_id,
    score_tokens,
    set_dropout,
)
from trainer.publishing import Weights
from trainer.saving import export_tensors, save_model

IDS = [5, 9, 33, 7, 120, 1]


def padded(left: int, right: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BS = torch.tensor([[0] * left + IDS + [0] * right])
    mask_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    mask_BS[:, left : left + len(IDS)] = True
    return ids_BS, mask_BS


@pytest.fixture
def gpt2(tmp_path, tokenizer):
    """A model with learned absolute positions, where a forgotten position_ids costs most, and with dropout."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=64))
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(20.0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probabilities_do_not_change_with_padding(kind, make_policy, gpt2, tokenizer):
    """Row 7. Historical: trl#6800, position_ids forgotten under left padding (34 nats on GPT-2)."""
    folder = make_policy(seed=1) if kind == "llama" else gpt2
    policy = load_policy(folder, load_tokenizer(folder))
    logprobs = TokenLogprobs(policy)
    naive = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        table = naive(torch.tensor([IDS])).logits[0].log_softmax(-1)
        expected = [table[t - 1, IDS[t]].item() for t in range(2, len(IDS))]
        for left, right in ((0, 0), (1, 0), (7, 0), (0, 5), (3, 4)):
            ids_BS, mask_BS = padded(left, right)
            wanted_BS = mask_BS.clone()
            wanted_BS[:, : left + 2] = False
            found_BS, entropy_BS = logprobs(ids_BS, mask_BS, wanted_BS, want_entropy=True)
            assert found_BS[wanted_BS].tolist() == pytest.approx(expected, abs=1e-5)
            assert not found_BS[~wanted_BS].any()
            entropies = [-(table[t - 1].exp() * table[t - 1]).sum().item() for t in range(2, len(IDS))]
            assert entropy_BS[wanted_BS].tolist() == pytest.approx(entropies, abs=1e-4)


def test_both_ways_to_log_probabilities_agree(make_policy, tokenizer):
    folder = make_policy(seed=1)
    logprobs = TokenLogprobs(load_policy(folder, load_tokenizer(folder)))
    assert logprobs.plain_head
    ids_BS, mask_BS = padded(2)
    wanted_BS = mask_BS.clone()
    wanted_BS[:, :4] = False
    with torch.no_grad():
        plain = logprobs(ids_BS, mask_BS, wanted_BS, 0.7, want_entropy=True)
        logprobs.plain_head = False
        own = logprobs(ids_BS, mask_BS, wanted_BS, 0.7, want_entropy=True)
    for ours, theirs in zip(plain, own, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_two_train_mode_passes_are_equal_bit_for_bit_without_dropout(gpt2):
    """Row 15."""
    policy = load_policy(gpt2, load_tokenizer(gpt2))
    ids_BS, mask_BS = padded(0)
    assert policy.training
    with torch.no_grad():
        first, second = (policy(ids_BS, attention_mask=mask_BS.long()).logits for _ in range(2))
        assert torch.equal(first, second)
        # By name: two layers' attention and feed-forward parts, and the embeddings.
        assert set_dropout(policy, 0.3) == {"drop": 1, "attn_dropout": 2, "resid_dropout": 2, "dropout": 2}
        assert not torch.equal(policy(ids_BS).logits, policy(ids_BS).logits)


@pytest.mark.parametrize("kind", ["reward model", "critic"])
def test_what_is_loaded_from_a_classifier_with_dropout_gives_the_same_bits_twice_in_train_mode(
    kind, tokenizer, tmp_path
):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=64, num_labels=1, pad_token_id=0,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, summary_first_dropout=0.1,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if kind == "critic":
        model = Critic.from_reward_model(tmp_path, load_tokenizer(tmp_path), head="normal")
    else:
        model = load_reward_model(tmp_path, load_tokenizer(tmp_path))
    ids_BS, mask_BS = padded(0)

    def forward() -> torch.Tensor:
        if kind == "critic":
            return model(ids_BS, mask_BS)
        return model(ids_BS, attention_mask=mask_BS.long()).logits

    assert model.training
    with torch.no_grad():
        assert torch.equal(forward(), forward())
        assert set_dropout(model, 0.1)
        assert not torch.equal(forward(), forward())


def test_scores_stand_at_the_last_real_token_on_either_side_padded(make_reward_model):
    """Historical: trl#2778, left-padded input read as right-padded by the reward model."""
    folder = make_reward_model(seed=2)
    model = load_reward_model(folder, load_tokenizer(folder))
    direct = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = direct(torch.tensor([IDS])).logits[0, 0].item()
        for left, right in ((0, 0), (7, 0), (0, 7), (2, 3)):
            assert score_tokens(model, *padded(left, right)).tolist() == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_model_without_a_pad_token_of_its_own_is_trained_and_saved_in_the_shape_and_tokens_it_has(
    pad, make_policy, tmp_path
):
    folder = make_policy(seed=1, with_tokenizer=False)
    save_stock_tokenizer(folder, pad)
    if pad:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == pad
    served = tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder))
    assert tokenizer_fingerprint(tokenizer) == served
    assert padding_id(tokenizer) == 0 != tokenizer.eos_token_id
    policy = load_policy(folder, tokenizer)
    assert Weights.of(export_tensors(policy)).fingerprint == safetensors_fingerprint(folder)
    # The end token within a sequence, as in chats, learns like any other.
    ids_BS = torch.tensor([[5, 1, 7, 9]])
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    TokenLogprobs(policy)(ids_BS, mask_BS, ids_BS == 9)[0].sum().backward()
    assert policy.get_input_embeddings().weight.grad[1].abs().max() > 0
    save_model(policy, tokenizer, tmp_path / "saved")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "saved")) == served
    assert safetensors_fingerprint(tmp_path / "saved") == safetensors_fingerprint(folder)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_the_end_token_is_scored_where_it_is_the_pad_token_too(pad, make_policy, tmp_path):
    """Historical: trl#5303, pad == eos masks the real EOS."""
    folder = make_policy(seed=2, with_tokenizer=False)
    save_stock_tokenizer(folder, pad)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, tokenizer, new_head_seed=3)
    save_model(model, tokenizer, tmp_path / "saved")
    ended, other = [*IDS[:-1], tokenizer.eos_token_id], [9, 8]
    direct = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        ids_BS, mask_BS = pad_right([ended, other], padding_id(tokenizer), torch.device("cpu"))
        found = score_tokens(model, ids_BS, mask_BS).tolist()
        expected = [direct(torch.tensor([ids])).logits[0, 0].item() for ids in (ended, other)]
        without_end = direct(torch.tensor([ended[:-1]])).logits[0, 0].item()
        critic = Critic.from_reward_model(tmp_path / "saved", tokenizer, head="reward")
        value = critic(ids_BS, mask_BS)[0, len(ended) - 1].item()
    assert found == pytest.approx(expected, abs=1e-5)
    assert value == pytest.approx(found[0], abs=1e-5)
    assert abs(found[0] - without_end) > 1e-2
    # Transformers would look for the last token that is no pad: it refuses a batch rather than score another one.
    with pytest.raises(ValueError, match="no padding token"):
        direct(ids_BS)


def test_a_pad_token_beyond_the_embeddings_does_not_make_them_grow(make_policy):
    folder = make_policy(seed=1)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<new-pad>"})
    assert tokenizer.pad_token_id == 300
    policy = load_policy(folder, tokenizer)
    assert policy.get_input_embeddings().weight.shape[0] == 300
    assert policy.config.pad_token_id is None


def test_the_critic_starts_at_zero_or_from_the_reward_model(make_reward_model, make_policy):
    """Row 16."""
    folder = make_reward_model(seed=3)
    tokenizer = load_tokenizer(folder)
    ids_BS, mask_BS = padded(0)
    with torch.no_grad():
        assert not Critic.from_reward_model(folder, tokenizer)(ids_BS, mask_BS).any()
        reward_head = Critic.from_reward_model(folder, tokenizer, head="reward")
        reward_model = load_reward_model(folder, tokenizer)
        score = score_tokens(reward_model, ids_BS, mask_BS).item()
        assert reward_head(ids_BS, mask_BS)[0, -1].item() == pytest.approx(score, abs=1e-6)
        normal = Critic.from_policy(make_policy(), tokenizer, head="normal", seed=1)
        assert normal.head.weight.std().item() == pytest.approx(1 / 65**0.5, rel=0.3)
        with pytest.raises(ModelError, match="has no reward head to start from"):
            Critic.from_policy(make_policy(), tokenizer, head="reward")


@pytest.mark.parametrize("tied", [False, True])
def test_exported_tensors_are_those_of_the_saved_checkpoint(tied, make_policy, tmp_path):
    folder = make_policy(seed=4, tied=tied)
    tokenizer = load_tokenizer(folder)
    policy = load_policy(folder, tokenizer)
    save_model(policy, tokenizer, tmp_path / "saved", metadata={"kind": "policy"})
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    exported = dict(export_tensors(policy))
    assert exported.keys() == saved.keys()
    assert ("lm_head.weight" in saved) == (not tied)
    assert all(exported[name].equal(saved[name]) for name in saved)


def test_what_is_no_policy_or_no_reward_model_is_refused(make_policy, make_reward_model):
    tokenizer = load_tokenizer(make_policy())
    with pytest.raises(ModelError, match=r"is not a reward model: its checkpoint lacks score\.weight; train one with"):
        load_reward_model(make_policy(), tokenizer)
    with pytest.raises(ModelError, match=r"is not a whole causal language model: its checkpoint lacks lm_head\.weight"):
        load_policy(make_reward_model(), tokenizer)
    assert longest_sequence(load_policy(make_policy(), tokenizer)) == llama_config().max_position_embeddings


def test_a_reward_model_has_one_score_whatever_its_checkpoint_says(make_policy, make_reward_model):
    """Historical: OpenRLHF#1039, a head of two labels, which is what transformers makes where nothing else is said."""
    tokenizer = load_tokenizer(make_policy())
    begun = load_reward_model(make_policy(), tokenizer, new_head_seed=0)
    assert begun.score.out_features == begun.config.num_labels == 1
    with pytest.raises(ModelError, match="does not load"):
        load_reward_model(make_reward_model(num_labels=2), tokenizer)


def test_added_tokens_make_the_embeddings_grow(make_policy):
    folder = make_policy(seed=5)
    larger = train_tokenizer(300)
    larger.add_tokens([f"<extra-{i}>" for i in range(400)])
    policy = load_policy(folder, larger)
    assert policy.get_input_embeddings().weight.shape[0] == len(larger)

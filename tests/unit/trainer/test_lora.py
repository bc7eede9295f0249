"""LoRA: what is trained, exported, kept and gone on from, against peft and against W + s B A in float64.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from quartet.client.adapters import read_adapter
from quartet.model_folder import ModelFolderError, find_model
from tests.conftest import WORDS
from tests.lora import ALL, merged_logprobs, merged_model
from tests.lora import Lora as Given
from trainer import runs
from trainer.answers import Answers
from trainer.config import DpoSettings, RewardSettings, SftSettings
from trainer.data import load_preferences
from trainer.dpo import main as train_dpo
from trainer.encoding import Encoder
from trainer.errors import CheckpointError, ModelError
from trainer.lora import Adapter, adapter_of, add_adapter
from trainer.models import load_policy, load_reward_model, load_tokenizer, set_dropout
from trainer.references import REFERENCE_FILE
from trainer.reward_model import main as train_reward
from trainer.runs import training_mode
from trainer.saving import export_tensors, save_model
from trainer.scale_config import ScaleSettings
from trainer.sft import main as train_sft

pytest.importorskip("peft")

RANK_4 = ScaleSettings(lora_rank=4, lora_alpha=8.0)
IDS_BS = torch.arange(3, 43).view(2, 20) % 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "preferences.jsonl"
    rows = [
        {"prompt": f"{WORDS[i % 9]} {i}", "chosen": f" {WORDS[i % 7]} thanks", "rejected": f" {WORDS[i % 11]} no bad"}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def adapted(folder: Path, settings: ScaleSettings = RANK_4, *, far: bool = True) -> tuple[Any, Adapter]:
    """A policy with an adapter, both of whose factors are ``far`` from zero."""
    policy = load_policy(folder, load_tokenizer(folder)).eval()
    adapter = add_adapter(policy, settings, seed=1)
    if far:
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, tensor in adapter.tensors():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=draw))
    return policy, adapter


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS_BS).logits
    return found


def test_a_fresh_adapter_changes_nothing_and_it_alone_is_trained(make_policy):
    folder = make_policy(seed=3)
    base = load_policy(folder, load_tokenizer(folder)).eval()
    policy, adapter = adapted(folder, far=False)
    assert logits_of(policy).equal(logits_of(base))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    # By hand: rank times (inputs + outputs) of each linear layer but the output's; 32 a head, 1 head of keys.
    assert sum(policy.get_parameter(name).numel() for name in trained) == 2 * 4 * (
        (64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 128) + (128 + 64)
    )
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    again, _ = adapted(folder, far=False)
    assert all(again.get_parameter(name).equal(policy.get_parameter(name)) for name in trained)
    assert {name.split(".")[-3] for name, _ in adapter.tensors()} == set(ALL)


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_w_plus_s_b_a_and_peft_loads_the_adapter_beside_it(tied, make_policy, tmp_path):
    from peft import PeftModel

    folder = make_policy(seed=3, tied=tied)
    policy, adapter = adapted(folder)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    plain = load_policy(folder, load_tokenizer(folder))
    assert [name for name, _ in export_tensors(policy)] == [name for name, _ in export_tensors(plain)]
    save_model(policy, load_tokenizer(folder), tmp_path / "model")
    assert all(parameter.equal(before[name]) for name, parameter in policy.named_parameters())
    given = Given(adapter.config, dict(adapter.tensors()))
    exact = merged_model(folder, given).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for name, tensor in merged.state_dict().items():
        assert float((tensor.double() - exact[name]).abs().max()) < 1e-6, name
    assert find_model(str(tmp_path / "model")) == tmp_path / "model"
    ours = logits_of(policy)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    assert logits_of(theirs).equal(ours) or float((logits_of(theirs) - ours).abs().max()) < 1e-5
    assert float((logits_of(merged) - ours).abs().max()) < 1e-4
    # And as a policy service is sent it: what the client reads of the folder and of the live adapter is the same.
    live = read_adapter((adapter.config, {name: tensor.numpy() for name, tensor in adapter.tensors()}))
    saved = read_adapter(tmp_path / "adapter")
    assert live[0] == saved[0]
    digests = [sorted((t.name, t.digest().sha256) for t in tensors) for _, tensors in (live, saved)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 2 * 7 * 2


def test_layers_whose_weights_lie_transposed_are_merged_as_they_lie(tmp_path, tokenizer):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    policy, _ = adapted(tmp_path / "gpt2")
    save_model(policy, tokenizer, tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert float((logits_of(merged) - logits_of(policy)).abs().max()) < 1e-5
    assert float((logits_of(merged) - logits_of(gpt2.eval())).abs().max()) > 1e-2


def test_a_reward_models_head_is_trained_whole_with_the_adapter(make_policy, data, tmp_path):
    folder = make_policy(seed=6, scale=0.5)
    settings = RewardSettings(
        model=str(folder), data=(data,), output=tmp_path / "run", learning_rate=1e-2, batch_size=8,
        held_out_fraction=0.2, lora_rank=4, baselines=False, epochs=2,
    )  # fmt: skip
    train_reward(settings)
    tokenizer = load_tokenizer(folder)
    fresh = load_reward_model(folder, tokenizer, new_head_seed=0)
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    assert not exported.score.weight.equal(fresh.score.weight)
    metadata = json.loads((tmp_path / "run" / "model" / "quartet.json").read_text())
    item = metadata["golden"]["items"][0]
    ids = tokenizer([item["prompt"], item["response"]], add_special_tokens=False).input_ids
    with torch.no_grad():
        score = exported(torch.tensor([[*ids[0], *ids[1], tokenizer.eos_token_id]])).logits[0, 0].item()
    assert score == pytest.approx(item["score"], abs=1e-4)
    assert any("score" in name for name in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))


def test_dropout_of_the_adapter_is_its_own_and_evaluation_is_without(make_policy):
    policy, _ = adapted(make_policy(seed=3), ScaleSettings(lora_rank=4, lora_dropout=0.5))
    set_dropout(policy, 0.0)
    torch.manual_seed(0)
    assert logits_of(policy).equal(logits_of(policy))
    with training_mode(policy, 0.0):
        assert not logits_of(policy).equal(logits_of(policy))
    assert logits_of(policy).equal(logits_of(policy))


def test_a_broken_run_goes_on_to_the_same_bits_and_its_checkpoints_hold_the_adapter_alone(
    make_policy, data, tmp_path, monkeypatch
):
    folder = make_policy(seed=4)
    copy_of_base = tmp_path / "base"
    values: dict[str, Any] = {"model": str(copy_of_base), "data": (data,), "learning_rate": 1e-2, "batch_size": 8}
    values |= {"epochs": 2, "save_every": 3, "lora_rank": 4, "lora_dropout": 0.2}
    policy = load_policy(folder, load_tokenizer(folder))
    save_model(policy, load_tokenizer(folder), copy_of_base)
    train_sft(SftSettings(**values, output=tmp_path / "whole"))
    kept = load_file(tmp_path / "whole" / "checkpoint-000012" / "model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in kept)
    assert len(kept) == 2 * 2 * 7
    optimiser = torch.load(tmp_path / "whole" / "checkpoint-000012" / "optimiser-adamw.pt", weights_only=True)
    assert len(optimiser["state"]) == len(kept)

    real = runs.save_checkpoint
    saves = 0

    def die_at_the_second(*arguments: Any, **named: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(runs, "save_checkpoint", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_sft(SftSettings(**values, output=tmp_path / "broken"))
    monkeypatch.setattr(runs, "save_checkpoint", real)

    weights = copy_of_base / "model.safetensors"
    content = weights.read_bytes()
    other = load_file(weights)
    other["model.norm.weight"] = other["model.norm.weight"] + 1e-3
    save_file(other, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the weights of model that are not trained are others than they were"):
        train_sft(SftSettings(**values, output=tmp_path / "broken", resume=True))
    weights.write_bytes(content)
    train_sft(SftSettings(**values, output=tmp_path / "broken", resume=True))
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / file) for run in ("broken", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs), file
    with pytest.raises(CheckpointError, match="--lora-rank was 4, is 8"):
        train_sft(SftSettings(**(values | {"lora_rank": 8}), output=tmp_path / "broken", resume=True))


def test_trl_495_the_reference_is_the_sft_model_and_not_the_base_beneath_its_adapter(make_policy, data, tmp_path):
    """Historical: trl#495, the reference was the base of an SFT model that was an adapter itself, switched off."""
    folder = make_policy(seed=4, scale=0.5)
    common: dict[str, Any] = {"data": (data,), "batch_size": 8, "lora_rank": 4, "held_out_fraction": 0.2}
    train_sft(SftSettings(model=str(folder), output=tmp_path / "sft", learning_rate=3e-2, epochs=2, **common))
    refused = DpoSettings(model=str(tmp_path / "sft" / "adapter"), output=tmp_path / "refused", **common)
    with pytest.raises(
        ModelFolderError, match=r"the folder holds a LoRA adapter .*, not a whole model: name the folder"
    ):
        train_dpo(refused)
    sft = tmp_path / "sft" / "model"
    train_dpo(DpoSettings(model=str(sft), output=tmp_path / "dpo", learning_rate=1e-2, **common))
    kept = json.loads((tmp_path / "dpo" / REFERENCE_FILE).read_text())["logprobs"]
    tokenizer = load_tokenizer(folder)
    pairs = Encoder(tokenizer, max_tokens=128).preferences(load_preferences([data]))
    rows = {answer.ids.tobytes(): answer for pair in pairs for answer in (pair.chosen, pair.rejected)}
    sums = {
        name: {
            key: sum(merged_logprobs(model, None, row.ids[: row.prompt_tokens], row.ids[row.prompt_tokens :].tolist()))
            for key, row in rows.items()
        }
        for name, model in (("sft", sft), ("base", folder))
    }
    assert len(kept) == 2 * len(pairs)
    assert sorted(kept) == pytest.approx(sorted(sums["sft"].values()), abs=1e-3)
    moved = [abs(sums["sft"][key] - sums["base"][key]) for key in rows]
    assert sum(moved) / len(moved) > 1.0  # So it is not the base that was asked.
    # Switching the fresh adapter off is the same as asking before the first step; a trained one is not switched off.
    evaluation = json.loads((tmp_path / "dpo" / "evaluation.json").read_text())
    assert evaluation["before"]["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert evaluation["after"]["eval_loss"] < 0.69


def test_the_adapters_answers_are_the_merged_models(make_policy, data):
    folder = make_policy(seed=3, scale=0.5)
    policy, adapter = adapted(folder)
    tokenizer = load_tokenizer(folder)
    rows = [pair.chosen for pair in Encoder(tokenizer, max_tokens=128).preferences(load_preferences([data])[:5])]
    found = Answers(policy, tokenizer, "float32").sums(rows)
    given = Given(adapter.config, {name: tensor.clone() for name, tensor in adapter.tensors()})
    exact = [
        sum(merged_logprobs(folder, given, row.ids[: row.prompt_tokens], row.ids[row.prompt_tokens :].tolist()))
        for row in rows
    ]
    assert found.tolist() == pytest.approx(exact, abs=1e-3)


def test_what_cannot_be_adapted_is_refused_by_name(make_policy, data, tmp_path):
    with pytest.raises(ModelError, match="--lora-targets nothing can't be used with this model"):
        adapted(make_policy(seed=3), ScaleSettings(lora_rank=4, lora_targets=("nothing",)))
    policy, adapter = adapted(make_policy(seed=3), ScaleSettings(lora_rank=2, lora_targets=("q_proj", "v_proj")))
    assert {name.split(".")[-3] for name, _ in adapter.tensors()} == {"q_proj", "v_proj"}
    assert adapter_of(policy) == adapter
    assert adapter_of(copy.deepcopy(policy.lm_head)) is None
    with pytest.raises(ValueError, match=r"--weight-clip is 0\.1 and --lora-rank 4: a bound on an adapter is none"):
        RewardSettings(model="m", data=(data,), output=tmp_path, weight_clip=0.1, lora_rank=4)

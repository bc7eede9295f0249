"""The memory plan against what a real model of the same configuration takes: bytes of its tensors, and of its files.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from quartet.model_folder import write_metadata
from tests.conftest import WORDS, llama_config
from tests.saved_bytes import kept_bytes
from trainer.__main__ import main as command
from trainer.activations import Batch, kept_of_body, of_scores, of_vocabulary, without_content
from trainer.checkpoint import save_checkpoint
from trainer.config import DpoSettings, RewardSettings, SftSettings
from trainer.critic import Critic
from trainer.dry_run import empty_critic, empty_policy, empty_reward_model, make_plan
from trainer.memory_plan import Memory, Plan, Term, Weights, host_memory
from trainer.models import TokenLogprobs, load_policy, load_reward_model, load_tokenizer, score_tokens
from trainer.optimisation import apply_gradients, autocast, make_adamw
from trainer.packing import is_packed, pack
from trainer.ppo_config import PPOSettings
from trainer.runs import training_mode
from trainer.scale_config import ScaleSettings
from trainer.scaling import prepare

CPU = torch.device("cpu")
# Sequences of a batch, and tokens of each.
B, S = 3, 48


@pytest.fixture(scope="module")
def folders(make_policy, make_reward_model, tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Models of two sizes, and a reward model."""
    torch.manual_seed(0)
    large = LlamaForCausalLM(
        llama_config(hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=8)
    )
    folder = tmp_path_factory.mktemp("large")
    large.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reward = make_reward_model()
    write_metadata(reward, kind="reward", append_eos=True)
    return {"small": make_policy(seed=3), "tied": make_policy(seed=3, tied=True), "large": folder, "reward": reward}


def both(folders: dict[str, Path], kind: str, scale: ScaleSettings) -> tuple[Any, Any]:
    """A model with its weights, and the same one without."""
    tokenizer = load_tokenizer(folders["small"])
    real: Any
    empty: Any
    if kind == "critic":
        real = Critic.from_reward_model(folders["reward"], tokenizer)
        options = {"model": "m", "prompts": ("p",), "output": "o", "critic": str(folders["reward"])}
        empty, said = empty_critic(PPOSettings(**options), folders["small"], tokenizer)
        assert said == []
        for critic in (real, empty):
            prepare(critic.body, scale, seed=0)
    elif kind == "reward":
        real = prepare(load_reward_model(folders["reward"], tokenizer), scale, seed=0)
        empty = prepare(empty_reward_model(folders["reward"], tokenizer, 1), scale, seed=0)
    else:
        real = prepare(load_policy(folders[kind], tokenizer), scale, seed=0)
        empty = prepare(empty_policy(folders[kind], tokenizer), scale, seed=0)
    return real, empty


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and the tokens that are asked for; nearly all of them real, so that there is a padding mask."""
    ids_BS = torch.arange(B * S).view(B, S) * 7 % 290 + 3
    mask_BS = torch.ones(B, S, dtype=torch.bool)
    mask_BS[0, -1] = False
    return ids_BS, mask_BS, mask_BS & (torch.arange(S) > 0)


def forward_of(model: Any, kind: str, precision: Any) -> Callable[[], Tensor]:
    ids_BS, mask_BS, wanted_BS = batch()
    logprobs = None if kind in ("critic", "reward") else TokenLogprobs(model)

    def forward() -> Tensor:
        with autocast(CPU, precision):
            if logprobs is not None:
                return logprobs(ids_BS, mask_BS, wanted_BS)[0].sum()
            found: Tensor = score_tokens(model, ids_BS, mask_BS) if kind == "reward" else model(ids_BS, mask_BS)
            return found.sum()

    return forward


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["small", "tied", "large", "reward", "critic"])
def test_weights_gradients_moments_and_files_are_those_of_a_step_and_its_checkpoint(kind, rank, folders, tmp_path):
    if rank:
        pytest.importorskip("peft")
    real, empty = both(folders, kind, ScaleSettings(lora_rank=rank))
    planned = Weights.of(empty)
    assert planned == Weights.of(real)
    optimiser = make_adamw(real, learning_rate=1e-3)
    forward_of(real, kind, "float32")().backward()
    gradients = [parameter.grad for parameter in real.parameters() if parameter.grad is not None]
    assert sum(gradient.nbytes for gradient in gradients) == planned.gradients
    apply_gradients(optimiser, 1.0)
    trained = [parameter for parameter in real.parameters() if parameter.requires_grad]
    assert sum(parameter.nbytes for parameter in trained) == planned.trained
    frozen = [parameter for parameter in real.parameters() if not parameter.requires_grad]
    assert sum(tensor.nbytes for tensor in (*frozen, *real.buffers())) == planned.frozen
    states = [value for state in optimiser.state.values() for value in state.values()]
    assert sum(value.nbytes for value in states) == planned.moments
    path = save_checkpoint(tmp_path, step=1, modules={"m": real}, optimisers={"o": optimiser}, state={})
    files = sum((path / name).stat().st_size for name in ("m.safetensors", "optimiser-o.pt"))
    assert files == pytest.approx(planned.checkpoint, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "rank", "packing", "checkpointing", "precision"),
    [
        *(
            (kind, 0, packing, own, "float32")
            for kind in ("small", "large")
            for packing in ("on", "off")
            for own in (0, 1)
        ),
        ("large", 4, "on", 0, "bfloat16"),
        ("large", 4, "off", 1, "float32"),
        ("large", 0, "off", 1, "bfloat16"),
        ("tied", 4, "on", 1, "float32"),
        ("reward", 0, "on", 0, "float32"),
        ("reward", 0, "off", 1, "bfloat16"),
        ("critic", 4, "on", 0, "float32"),
        ("critic", 4, "off", 1, "bfloat16"),
    ],
)
def test_activations_are_those_that_autograd_keeps(kind, rank, packing, checkpointing, precision, folders):
    if rank:
        pytest.importorskip("peft")
    real, empty = both(folders, kind, ScaleSettings(lora_rank=rank, activation_checkpointing=bool(checkpointing)))
    body, empty_body = (model.body if kind == "critic" else model.base_model for model in (real, empty))
    pack(body, packing, precision)
    forward = forward_of(real, kind, precision)
    with training_mode(real, 0.0):
        _, measured = kept_bytes(real, forward)
    asked = {"reward": 1, "critic": S}.get(kind, S - 1)
    planned_for = Batch(sequences=B, length=S, asked=asked, precision=precision)
    width = body.config.hidden_size
    head = (
        of_scores(width, planned_for) if asked != S - 1 else of_vocabulary(empty, planned_for, CPU, want_entropy=False)
    )
    empty_body.gradient_checkpointing_disable()
    found = kept_of_body(
        empty_body,
        without_content(empty_body, CPU),
        planned_for,
        packed=packing == "on",
        checkpointing=bool(checkpointing),
    )
    assert found.packed == is_packed(body) == (packing == "on")
    assert measured == pytest.approx(found.kept + head.kept, rel=0.03)
    assert (found.anew > 0) == checkpointing


def test_a_micro_batch_of_no_whole_number_of_sequences_lies_between_its_neighbours(folders):
    tokenizer = load_tokenizer(folders["small"])
    found = []
    for sequences in (1, 2.5, 4):
        body = empty_policy(folders["small"], tokenizer).base_model
        planned_for = Batch(sequences=sequences, length=S, asked=4, precision="float32")
        found.append(kept_of_body(body, without_content(body, CPU), planned_for, packed=True, checkpointing=False).kept)
    assert found[1] == pytest.approx((found[0] + found[2]) / 2, rel=1e-6)


# The command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"prompt": f"{WORDS[i % 9]} {i}", "chosen": f" {WORDS[i % 7]} thanks", "rejected": f" {WORDS[i % 11]} no bad"}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_weights(folder: Path, to: Path) -> Path:
    """The same model, whose weights can't be read."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    return to


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo", "online-dpo"])
def test_a_plan_is_printed_without_a_look_at_weights_and_nothing_is_written(stage, folders, data, tmp_path, capsys):
    model = without_weights(folders["small"], tmp_path / "model")
    rows = ["--prompts", str(data)] if stage in ("ppo", "online-dpo") else ["--data", str(data)]
    rows += ["--critic", "policy"] if stage == "ppo" else []
    command([stage, "--model", str(model), *rows, "--output", str(tmp_path / "run"), "--dry-run", "--lora-rank", "4"])
    said = capsys.readouterr().out
    assert f"quartet-train {stage}, planned; no weights were loaded" in said
    assert "it fits" in said
    assert "of them trained" in said
    assert ("critic: activations (update of the critic)" in said) == (stage == "ppo")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_exits_with_1_and_says_what_is_missing_and_what_would_help(
    folders, data, tmp_path, capsys, monkeypatch
):
    memory = {"memory": Memory(free=2**20, total=2**30), "disk": Memory(free=10**6, total=10**9)}
    monkeypatch.setattr("trainer.dry_run.machine", lambda device, output: memory)
    arguments = ["--model", str(folders["small"]), "--data", str(data), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        command(["sft", *arguments, "--max-tokens", "64", "--batch-size", "32", "--dry-run"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "quartet-train sft: it does not fit: memory has 1.00 MiB free of 1.00 GiB, and the run takes " in said.err
    assert "the disk of " in said.err
    assert "model: activations, " in said.out
    assert "--activation-checkpointing; --micro-batch-tokens below 2,048" in said.out
    assert "--lora-rank trains a small adapter in place of all weights" in said.out


def test_the_largest_micro_batch_is_that_of_settings_and_rows(folders, data, tmp_path):
    common: dict[str, Any] = {"model": str(folders["small"]), "output": tmp_path / "run"}

    def fact(settings: Any) -> str:
        return make_plan(settings).facts[-1]

    sft = SftSettings(**common, data=(str(data),), max_tokens=100, micro_batch_tokens=250, batch_size=8)
    assert "at most 250 tokens at once, in sequences of at most 100, packed; products in float32" in fact(sft)
    few = sft.model_copy(update={"batch_size": 2})
    assert "at most 200 tokens at once" in fact(few)
    long = sft.model_copy(update={"micro_batch_tokens": 50, "packing": "off", "activation_checkpointing": True})
    assert "at most 100 tokens at once, in sequences of at most 100, padded" in fact(long)
    assert fact(long).endswith("one activation a layer is kept")
    # Two answers stay together.
    dpo = DpoSettings(**common, data=(str(data),), max_tokens=100, micro_batch_tokens=50, batch_size=8)
    assert "at most 200 tokens at once" in fact(dpo)
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(json.dumps({"prompt": "hello", "ranking": [" a", " the", " is", " my"]}) + "\n")
    reward = RewardSettings(**common, data=(str(ranked),), max_tokens=100, micro_batch_tokens=50)
    assert "at most 400 tokens at once" in fact(reward)
    # The longest prompt and what may follow it.
    prompts = tmp_path / "prompts.jsonl"
    texts = ["hello", "thanks hello please sorry help order refund"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    longest = max(len(ids) for ids in load_tokenizer(folders["small"])(texts)["input_ids"])
    ppo = PPOSettings(**common, prompts=(str(prompts),), max_new_tokens=20, critic="policy", micro_batch_tokens=100)
    assert f"at most 100 tokens at once, in sequences of at most {longest + 20}" in fact(ppo)


def test_ppo_with_an_adapter_takes_no_second_copy_of_the_weights(folders, data, tmp_path):
    common: dict[str, Any] = {"model": str(folders["large"]), "prompts": (str(data),), "output": tmp_path / "run"}
    plans = [make_plan(PPOSettings(**common, critic="policy", lora_rank=rank)) for rank in (0, 4)]
    whole, adapted = ({term.what: term.bytes for term in plan.terms} for plan in plans)
    weights = whole["policy: trained weights, float32 masters"]
    assert whole["reference, for the exact KL"] == pytest.approx(weights, rel=0.01)
    assert whole["weights as published, for replicas that come back"] == pytest.approx(weights, rel=0.01)
    assert "reference, for the exact KL" not in adapted
    assert adapted["adapter as published, for replicas that come back"] < 0.1 * weights
    # The critic has an adapter, too, and a head that is trained whole: 4 layers of 7 linear ones, by hand.
    factors = 4 * 4 * ((128 + 128) + 2 * (128 + 16) + (128 + 128) + 2 * (128 + 320) + (320 + 128))
    assert adapted["critic: trained weights, float32 masters"] == 4 * (factors + 128 + 1)
    assert adapted["policy: trained weights, float32 masters"] == 4 * factors
    assert adapted["policy: frozen weights, float32"] == pytest.approx(weights, rel=0.01)
    assert whole["policy: Adam's moments"] == pytest.approx(2 * weights, rel=0.01)


def test_the_peak_is_of_what_is_there_at_once():
    terms = [
        Term(what="weights", bytes=100),
        Term(what="gradients", bytes=50, phases=("first", "second")),
        Term(what="activations", bytes=30, phases=("first",)),
        Term(what="others", bytes=40, phases=("second",)),
        Term(what="copy", bytes=70, phases=("third",), on_host=True),
    ]
    plan = Plan(title="", facts=[], terms=terms, disk=[], output=Path("o"), device=CPU)
    assert plan.peak(on_host=True) == (190, "second")
    assert plan.peak(on_host=False) == (0, "")
    on_gpu = Plan(title="", facts=[], terms=terms, disk=[], output=Path("o"), device=torch.device("cuda"))
    assert (on_gpu.peak(on_host=False), on_gpu.peak(on_host=True)) == ((190, "second"), (70, "third"))


def test_a_container_has_what_its_control_group_leaves_it(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   800 kB\n")
    assert host_memory(tmp_path) == Memory(free=800 * 1024, total=1000 * 1024)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/box\n")
    box = tmp_path / "sys/fs/cgroup/pod/box"
    box.mkdir(parents=True)
    for folder, limit in ((box, "max"), (box.parent, "500000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("300000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert host_memory(tmp_path) == Memory(free=300_000, total=500_000)

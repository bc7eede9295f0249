"""Where a model comes from, against hashes and versions looked up apart."""

from __future__ import annotations

import hashlib
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainer.lineage
from quartet.fingerprint import safetensors_fingerprint
from tests.conftest import WORDS
from trainer.__main__ import main
from trainer.errors import ModelError
from trainer.lineage import LINEAGE_FILE, Origin, code_version, origin, read_chain, write_lineage
from trainer.models import load_policy, load_tokenizer
from trainer.saving import save_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Any]:
    """init, sft and dpo by the commands a user types."""
    top = tmp_path_factory.mktemp("stages")
    pairs = [
        {"prompt": f"{WORDS[i % 9]} {i}", "chosen": " thanks a lot", "rejected": f" no {WORDS[i % 7]}"}
        for i in range(60)
    ]
    data, held_out = top / "pairs.jsonl", top / "held_out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs[:40]))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in pairs[40:]))
    small = ["--hidden-size", "16", "--layers", "1", "--heads", "2", "--max-positions", "64", "--vocab-size", "300"]
    main(["init", "--data", str(data), "--output", str(top / "init"), *small])
    steps = ["--data", str(data), "--batch-size", "16", "--track", "none"]
    sft = ["--model", str(top / "init"), "--output", str(top / "sft"), "--eval-data", str(held_out)]
    main(["sft", *sft, *steps, "--epochs", "2"])
    main(["dpo", "--model", str(top / "sft" / "model"), "--output", str(top / "dpo"), *steps])
    return {"top": top, "data": data, "held_out": held_out}


def test_the_chain_says_of_every_model_what_made_it(stages):
    top = stages["top"]
    folders = (top / "dpo" / "model", top / "sft" / "model", top / "init")
    chain = read_chain(folders[0])
    assert [record["stage"] for record in chain] == ["dpo", "sft", "init"]
    assert [record["step"] for record in chain] == [3, 6, 0]  # 36 of 40 rows, and twice 40, by 16.
    assert [record["weights"] for record in chain] == [safetensors_fingerprint(folder) for folder in folders]
    assert [record["parent"] for record in chain] == [
        {"model": str(folders[1]), "weights": chain[1]["weights"]},
        {"model": str(folders[2]), "weights": chain[2]["weights"]},
        None,
    ]
    files = [[(file["name"], file["sha256"]) for file in record["data"]["files"]] for record in chain]
    data, held_out = (
        (str(stages[n]), hashlib.sha256(stages[n].read_bytes()).hexdigest()) for n in ("data", "held_out")
    )
    assert files == [[data], [data, held_out], [data]]
    assert (chain[0]["settings"]["beta"], chain[1]["settings"]["epochs"], chain[2]["settings"]["layers"]) == (0.1, 2, 1)
    kept = {name: read_chain(folder)[0]["data"]["rows_sha256"] for name, folder in zip("ds", folders, strict=False)}
    assert len(kept["d"]) == len(kept["s"]) == 64
    assert kept["d"] != kept["s"]
    for record in chain:
        assert record["versions"]["torch"] == torch.__version__
        assert record["versions"]["transformers"] == transformers.__version__
        age_s = (datetime.now(UTC) - datetime.fromisoformat(record["date"])).total_seconds()
        assert 0 <= age_s < 600


def test_the_chain_outlives_the_folders_of_its_parents_and_is_that_of_each_parent(stages):
    top = stages["top"]
    chain = read_chain(top / "dpo" / "model")
    assert chain[1:] == read_chain(top / "sft" / "model")
    assert chain[2:] == read_chain(top / "init")


def test_an_exported_folder_with_its_lineage_is_a_plain_model_folder(stages):
    folder = stages["top"] / "dpo" / "model"
    assert (folder / LINEAGE_FILE).is_file()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|end|>"


def test_the_command_prints_the_chain(stages, capsys):
    top = stages["top"]
    folder = str(top / "dpo" / "model")
    capsys.readouterr()
    main(["lineage", folder])
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    chain = read_chain(Path(folder))
    heads = [line for line in lines if "  weights " in line and not line.startswith(" ")]
    names = (folder, str(top / "sft" / "model"), str(top / "init"))
    assert heads == [f"{n}  weights {r['weights'][:12]}" for n, r in zip(names, chain, strict=True)]
    assert [line.split(",")[0].strip() for line in lines if ", quartet " in line] == ["dpo", "sft", "init"]
    assert f"  dpo, step 3, {chain[0]['date']}, quartet " in shown.out
    digest = hashlib.sha256(stages["data"].read_bytes()).hexdigest()[:12]
    assert f"{stages['data']} ({digest})" in shown.out
    assert "learning_rate=1e-06" in shown.out
    main(["lineage", folder, "--as-json"])
    assert json.loads(capsys.readouterr().out) == chain


def made(folder: Path, **changes: Any) -> Origin:
    values = {"parent": str(folder), "sources": ("org/set:train",), "digest": "d" * 64}
    return origin("sft", {"epochs": 1}, **(values | changes))


def test_two_models_of_one_origin_at_one_time_have_the_same_lineage(make_policy, monkeypatch):
    folder = make_policy(seed=11)
    monkeypatch.setattr(trainer.lineage, "code_version", lambda: {"version": "1", "commit": None, "changed": None})
    monkeypatch.setattr(trainer.lineage, "library_versions", lambda: {"torch": "2"})
    now = datetime(2026, 11, 25, 14, 30, 59, tzinfo=UTC)
    first, second = (made(folder).chain(step=7, weights="w" * 64, now=now) for _ in range(2))
    assert (
        first
        == second
        == [
            {
                "stage": "sft",
                "step": 7,
                "date": "2026-11-25T14:30:59Z",
                "weights": "w" * 64,
                "parent": {"model": str(folder), "weights": safetensors_fingerprint(folder)},
                "data": {"rows_sha256": "d" * 64, "files": [{"name": "org/set:train", "sha256": None}]},
                "judges": {},
                "settings": {"epochs": 1},
                "code": {"version": "1", "commit": None, "changed": None},
                "versions": {"torch": "2"},
            }
        ]
    )


def test_a_parent_that_quartet_did_not_make_is_named_and_ends_the_chain(make_policy, tmp_path, capsys):
    parent = make_policy(seed=12)
    tokenizer = load_tokenizer(parent)
    save_model(load_policy(parent, tokenizer), tokenizer, tmp_path / "model", origin=made(parent), step=2)
    main(["lineage", str(tmp_path / "model")])
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last == [
        f"{parent}  weights {safetensors_fingerprint(parent)[:12]}",
        "  not made by quartet-train, or before it kept a lineage",
    ]
    with pytest.raises(SystemExit):
        main(["lineage", str(parent)])
    assert f"{parent} has no lineage.json: it was not saved by quartet-train" in capsys.readouterr().err


def test_a_lineage_of_other_weights_is_said_and_not_believed(make_policy, tmp_path, capsys):
    parent = make_policy(seed=13)
    tokenizer = load_tokenizer(parent)
    save_model(load_policy(parent, tokenizer), tokenizer, tmp_path / "model", origin=made(parent), step=2)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    main(["lineage", str(tmp_path / "model")])
    assert "are not those that this was written of" in capsys.readouterr().err
    child = made(tmp_path / "model")
    assert "its weights are not those that its lineage.json is of; left out" in capsys.readouterr().err
    assert child.ancestors == []
    assert child.parent["weights"] == safetensors_fingerprint(tmp_path / "model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no lineage: Expecting"),
        ('{"format": 2, "chain": [1]}', "format is 2 with 1 records: it must be 1"),
        ('{"format": 1, "chain": []}', "format is 1 with 0 records"),
        ('{"chain": []}', "'format' is missing"),
        ('{"format": 1, "chain": [{"stage": 3}]}', "stage is 3: it must be of type str"),
        ('{"format": 1, "chain": [{"stage": "sft"}]}', "'step' is missing"),
    ],
)
def test_a_damaged_lineage_is_refused_by_file_and_reason(tmp_path, content, message):
    (tmp_path / LINEAGE_FILE).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_chain(tmp_path)
    assert str(tmp_path / LINEAGE_FILE) in str(caught.value)


def test_the_commit_is_that_of_the_code_and_unknown_where_there_is_no_repository(monkeypatch, tmp_path):
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.returncode == 0:
        assert code_version()["commit"] == done.stdout.strip()
        assert code_version()["changed"] in (True, False)
    # Installed into another project's repository, that one's commit says nothing.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(trainer.lineage, "__file__", str(tmp_path / "lineage.py"))
    found = code_version()
    assert (found["commit"], found["changed"]) == (None, None)


def test_what_a_ppo_model_learned_from_is_in_its_lineage(make_policy, tmp_path):
    folder = make_policy(seed=14)
    judges = {"reward": {"model": "r", "weights": "a" * 64}, "reference": {"model": "p", "weights": "b" * 64}}
    saved = tmp_path / "model"
    tokenizer = load_tokenizer(folder)
    save_model(load_policy(folder, tokenizer), tokenizer, saved)
    write_lineage(saved, made(folder, judges=judges), 40)
    assert read_chain(saved)[0]["judges"] == judges

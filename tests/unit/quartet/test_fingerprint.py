"""Fingerprints are equal exactly when the content is."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from quartet.fingerprint import (
    TensorDigest,
    derive_seed,
    derive_seeds,
    safetensors_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)


def tensors():
    generator = torch.Generator().manual_seed(3)
    return {
        "b.weight": torch.randn(5, 7, generator=generator),
        "a.weight": torch.randn(3, 2, 4, generator=generator).to(torch.bfloat16),
        "c.bias": torch.randn(1, generator=generator).to(torch.float16),
        "d.steps": torch.tensor(4, dtype=torch.int64),
        "e.empty": torch.zeros(0, 3),
    }


def independent_fingerprint(named) -> str:  # type: ignore[no-untyped-def]
    """By torch and hashlib alone, from the documented definition."""
    lines = []
    for name, tensor in named.items():
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines.append(f"{name} {dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def test_weights_fingerprint_of_a_folder_is_the_documented_hash(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    assert safetensors_fingerprint(tmp_path) == independent_fingerprint(tensors())


def test_layout_over_files_order_and_metadata_do_not_matter(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    save_file(tensors(), one / "model.safetensors", metadata={"format": "pt"})
    for number, name in enumerate(reversed(tensors())):
        save_file({name: tensors()[name]}, many / f"model-{number}.safetensors")
    assert safetensors_fingerprint(one) == safetensors_fingerprint(many)


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "missing"])
def test_any_change_of_content_changes_the_fingerprint(tmp_path, change):
    changed = tensors()
    match change:
        case "value":
            changed["b.weight"][4, 6] = torch.nextafter(changed["b.weight"][4, 6], torch.tensor(9.0))
        case "name":
            changed["b.weights"] = changed.pop("b.weight")
        case "shape":
            changed["b.weight"] = changed["b.weight"].reshape(7, 5)
        case "dtype":
            changed["c.bias"] = changed["c.bias"].view(torch.bfloat16)
        case "missing":
            del changed["e.empty"]
    save_file(changed, tmp_path / "model.safetensors")
    assert safetensors_fingerprint(tmp_path) != independent_fingerprint(tensors())
    assert safetensors_fingerprint(tmp_path) == independent_fingerprint(changed)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no .safetensors file"):
        safetensors_fingerprint(tmp_path)


def test_digests_in_any_order_give_one_fingerprint():
    digests = [TensorDigest(name=n, dtype="float32", shape=(2,), sha256=n * 64) for n in "abc"]
    assert weights_fingerprint(digests) == weights_fingerprint(reversed(digests))
    text = "\n".join(f"{n} float32 [2] {n * 64}" for n in "abc")
    assert weights_fingerprint(digests) == hashlib.sha256(text.encode()).hexdigest()


def test_tokenizer_fingerprint_survives_saving_and_settings_of_a_call(tokenizer, tmp_path):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == before
    loaded(["hello", "hello thanks please"], padding=True, truncation=True, max_length=2)
    assert json.loads(loaded.backend_tokenizer.to_str())["truncation"] is not None
    assert tokenizer_fingerprint(loaded) == before


def test_tokenizer_fingerprint_tells_apart_what_encodes_differently(tokenizer, tmp_path):
    from tokenizers import normalizers

    tokenizer.save_pretrained(tmp_path)
    before = tokenizer_fingerprint(tokenizer)
    added = AutoTokenizer.from_pretrained(tmp_path)
    added.add_tokens(["refund please"])
    lower = AutoTokenizer.from_pretrained(tmp_path)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    merged_less = AutoTokenizer.from_pretrained(tmp_path)
    found = {before, *map(tokenizer_fingerprint, (added, lower, merged_less))}
    assert len(found) == 4


def test_seeds_are_the_same_everywhere_and_differ_by_every_part():
    digest = hashlib.sha256(b"7:step:3:1").digest()
    assert derive_seed(7, "step", 3, 1) == int.from_bytes(digest[:4], "little") // 2
    assert derive_seed(1, 23) != derive_seed(12, 3)
    keys = [(run, prompt, sample) for run in range(3) for prompt in range(40) for sample in range(8)]
    seeds = derive_seeds(keys)
    assert seeds == [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**31 for seed in seeds)

"""A checkpoint on its way in: refused unless it is whole and of this model, exact when it is, gone in every end."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quartet.fingerprint import TensorDigest, safetensors_fingerprint, weights_fingerprint
from services.policy.staging import Layout, StagedCheckpoint, TensorSpec, read_layout, staging_parent
from services.runtime.errors import DataLossError, InvalidArgumentError, OverloadedError, StartError

LAYOUT = Layout(
    shapes={"embed.weight": (5, 3), "norm.weight": (3,), "lm_head.weight": (5, 3)},
    optional=frozenset({"lm_head.weight"}),
)
ANY = 10**9


def spec(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


WHOLE = [spec("embed.weight", 5, 3), spec("norm.weight", 3), spec("lm_head.weight", 5, 3)]


def random_tensors() -> dict[str, Tensor]:
    """All wire dtypes, a scalar, an empty one, and odd sizes, so that offsets are not round."""
    draw = torch.Generator().manual_seed(1)
    return {
        "a.weight": torch.randn(5, 3, generator=draw),
        "b.half": torch.randn(7, generator=draw).half(),
        "c.brain": torch.randn(3, 1, 3, generator=draw).bfloat16(),
        "d.scalar": torch.randn((), generator=draw),
        "e.empty": torch.zeros(0, 4),
        "f.last": torch.randn(2, generator=draw),
    }


def wire_specs(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [spec(name, *t.shape, dtype=str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]


def wire_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint_of(tensors: dict[str, Tensor]) -> str:
    return weights_fingerprint(
        TensorDigest(name=s.name, dtype=s.dtype, shape=s.shape, sha256=hashlib.sha256(wire_bytes(t)).hexdigest())
        for s, t in zip(wire_specs(tensors), tensors.values(), strict=True)
    )


def send(staged: StagedCheckpoint, tensors: dict[str, Tensor], chunk_bytes: int = 7) -> None:
    for index, tensor in enumerate(tensors.values()):
        data = wire_bytes(tensor)
        for start in range(0, len(data), chunk_bytes):
            staged.write(index, data[start : start + chunk_bytes])


# The layout -------------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_passes_in_any_order_and_precision_with_and_without_what_is_tied():
    LAYOUT.check(WHOLE, ANY)
    LAYOUT.check([WHOLE[1], spec("embed.weight", 5, 3, dtype="bfloat16")], ANY)


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (WHOLE[1:], r"1 tensors of the served model are missing, such as 'embed\.weight'; send all of them"),
        ([], r"2 tensors of the served model are missing, such as 'embed\.weight'"),
        ([*WHOLE, spec("other", 1)], "'other' is no tensor of the served model's checkpoint"),
        ([WHOLE[0], WHOLE[1], WHOLE[0]], r"'embed\.weight' stands in it twice"),
        ([spec("embed.weight", 3, 5), *WHOLE[1:]], r"has shape \[3, 5\], the served model's is \[5, 3\]"),
        ([spec("embed.weight", 15), *WHOLE[1:]], r"has shape \[15\], the served model's is \[5, 3\]"),
        ([spec("embed.weight", 5, 3, dtype="float64"), *WHOLE[1:]], "has dtype 'float64', must be one of float32, "),
        ([*WHOLE[:2], spec("lm_head.weight", 6, 3)], r"'lm_head\.weight' has shape \[6, 3\]"),
    ],
)
def test_what_is_no_whole_checkpoint_of_the_model_is_refused_by_name(specs, said):
    with pytest.raises(InvalidArgumentError, match=said) as refused:
        LAYOUT.check(specs, ANY)
    assert refused.value.field == "begin.tensors"


def test_as_many_bytes_as_allowed_pass_and_one_more_is_refused():
    size = 4 * (15 + 3 + 15)
    LAYOUT.check(WHOLE, size)
    with pytest.raises(InvalidArgumentError, match=rf"have {size} bytes, at most {size - 1} are accepted \(--max-upd"):
        LAYOUT.check(WHOLE, size - 1)
    # Half the precision is half the bytes.
    LAYOUT.check([spec(s.name, *s.shape, dtype="float16") for s in WHOLE], size // 2)


@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_of_a_folder_is_that_of_its_files_and_a_tied_head_may_be_sent(make_policy, tied):
    folder = make_policy(tied=tied)
    layout = read_layout(folder)
    assert layout.shapes == {name: tuple(t.shape) for name, t in load_file(folder / "model.safetensors").items()}
    # Saved without its copy: then it is no tensor of the checkpoint.
    assert ("lm_head.weight" in layout.shapes) is not tied
    assert layout.optional == frozenset()


@pytest.mark.parametrize(
    "config",
    ['{"tie_word_embeddings": true}', '{"text_config": {"tie_word_embeddings": true}}'],
)
def test_a_tied_head_that_was_saved_all_the_same_may_be_left_out(make_policy, tmp_path, config):
    shutil.copy(make_policy() / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    layout = read_layout(tmp_path)
    assert layout.optional == {"lm_head.weight"}
    specs = [spec(name, *shape) for name, shape in layout.shapes.items()]
    layout.check(specs, ANY)
    layout.check([s for s in specs if s.name != "lm_head.weight"], ANY)


def test_a_layout_is_gathered_from_several_files_and_a_damaged_one_is_named(make_policy, tmp_path):
    shutil.copy(make_policy() / "model.safetensors", tmp_path / "model-1.safetensors")
    shutil.copy(make_policy() / "config.json", tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes((10).to_bytes(8, "little") + b'{"extra":{')
    with pytest.raises(StartError, match=r"model-2\.safetensors is not a readable safetensors file"):
        read_layout(tmp_path)
    header = b'{"extra":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "model-2.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    layout = read_layout(tmp_path)
    assert layout.shapes["extra"] == (1,)
    assert layout.shapes["model.norm.weight"] == (64,)


# The bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1000])
def test_what_was_staged_is_a_safetensors_file_with_exactly_what_was_sent(tmp_path, chunk_bytes):
    tensors = random_tensors()
    with StagedCheckpoint(wire_specs(tensors), tmp_path) as staged:
        send(staged, tensors, chunk_bytes)
        assert staged.finish(fingerprint_of(tensors)) == fingerprint_of(tensors)
        assert staged.received_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
        found = load_file(staged.path)
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
        with safe_open(staged.path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers reads no file without it.
        # The fingerprint does not depend on how it came, so the trainer may take it from its own file.
        assert safetensors_fingerprint(staged.folder) == fingerprint_of(tensors)
        assert staged.path.stat().st_mode & 0o777 == 0o600


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(["float32", "float16", "bfloat16"]), min_size=5, max_size=5),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=8),
)
def test_any_checkpoint_in_any_pieces_arrives_as_it_was(tmp_path_factory, shapes, dtypes, cuts):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randn(shape, generator=draw).to(getattr(torch, dtype))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    with StagedCheckpoint(wire_specs(tensors), tmp_path_factory.getbasetemp()) as staged:
        for index, tensor in enumerate(tensors.values()):
            data, turn = wire_bytes(tensor), 0
            while data:
                staged.write(index, data[: cuts[turn % len(cuts)]])
                data, turn = data[cuts[turn % len(cuts)] :], turn + 1
        staged.finish(fingerprint_of(tensors))
        found = load_file(staged.path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert len(found) == len(tensors)


def test_chunks_out_of_order_and_of_no_tensor_are_refused(tmp_path):
    tensors = random_tensors()
    with StagedCheckpoint(wire_specs(tensors), tmp_path) as staged:
        for index in (-1, 6):
            with pytest.raises(InvalidArgumentError, match=rf"tensor_index is {index}, must lie in \[0, 5\]") as bad:
                staged.write(index, b"1")
            assert bad.value.field == "chunk.tensor_index"
        staged.write(0, wire_bytes(tensors["a.weight"]))
        staged.write(1, b"12")
        with pytest.raises(InvalidArgumentError, match="tensor_index is 0 after 1: tensors must come in the order"):
            staged.write(0, b"1")


def test_a_byte_too_many_is_refused_before_it_is_written_over_the_next_tensor(tmp_path):
    with StagedCheckpoint([spec("a", 2), spec("b", 1)], tmp_path) as staged:
        staged.write(0, b"12345")
        with pytest.raises(InvalidArgumentError, match=r"chunk\.data: 'a' has 8 bytes, 9 came") as refused:
            staged.write(0, b"6789")
        assert refused.value.field == "chunk.data"
        assert staged.path.read_bytes()[-12:] == b"12345" + bytes(7)


def test_a_byte_too_few_is_noticed_at_the_next_tensor_and_at_the_end(tmp_path):
    with StagedCheckpoint([spec("a", 2), spec("b", 1)], tmp_path) as staged:
        staged.write(0, b"1234567")
        with pytest.raises(DataLossError, match="'a' has 8 bytes, only 7 came; the old weights go on serving"):
            staged.write(1, b"1")
    with StagedCheckpoint([spec("a", 2), spec("b", 1)], tmp_path) as staged:
        staged.write(0, b"12345678")
        with pytest.raises(DataLossError, match="'b' has 4 bytes, only 0 came"):
            staged.finish("0" * 64)


def test_a_single_flipped_bit_and_the_same_bytes_under_another_name_differ(tmp_path):
    tensors = random_tensors()
    expected = fingerprint_of(tensors)
    damaged = dict(tensors)
    damaged["f.last"] = tensors["f.last"].view(torch.int32).bitwise_xor(1).view(torch.float32)
    renamed = {name.replace("f.last", "f.first"): tensor for name, tensor in tensors.items()}
    reshaped = {**tensors, "a.weight": tensors["a.weight"].reshape(3, 5)}
    for sent in (damaged, renamed, reshaped):
        with StagedCheckpoint(wire_specs(sent), tmp_path) as staged:
            send(staged, sent)
            with pytest.raises(DataLossError, match=rf"is '{expected[:16]}'\.\.\., what arrived has") as refused:
                staged.finish(expected)
            assert refused.value.field == "commit.weights_fingerprint"
    assert list(tmp_path.iterdir()) == []


# The folder -------------------------------------------------------------------------------------------------------


def test_every_update_has_a_folder_of_its_own_that_only_its_owner_reads_and_that_goes_in_every_end(tmp_path):
    with StagedCheckpoint([spec("a", 2)], tmp_path) as first, StagedCheckpoint([spec("a", 2)], tmp_path) as second:
        assert first.folder != second.folder
        assert first.folder.stat().st_mode & 0o777 == 0o700
        first.write(0, b"12345678")
        assert second.path.read_bytes()[-8:] == bytes(8)
    assert list(tmp_path.iterdir()) == []
    with StagedCheckpoint([spec("a", 2)], tmp_path) as staged:
        (staged.folder / "config.json").write_text("{}")  # What an engine puts beside it goes with it.
        with pytest.raises(InvalidArgumentError):
            staged.write(1, b"")
    assert list(tmp_path.iterdir()) == []
    # Nor does a file stay open.
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with StagedCheckpoint([spec("a", 2)], tmp_path):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 100, 100))
    with pytest.raises(OverloadedError, match=r"the weights have 0\.00 GiB, .* has 0\.00 GiB free: .*--staging-dir"):
        StagedCheckpoint([spec("a", 200)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with StagedCheckpoint([spec("a", 2)], tmp_path) as staged, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OverloadedError, match=r"could not be staged in .*: .*No space left on device"):
            staged.write(0, b"1234")
        patch.setattr(os, "pwrite", lambda *_: 3)
        with pytest.raises(OverloadedError, match=r"could not be staged in .*: no room"):
            staged.write(0, b"1234")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("pwrite", "ftruncate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OverloadedError, match=r"could not be staged in .*: .*No space left on device"):
                StagedCheckpoint([spec("a", 2)], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_staging_goes_where_it_is_told_else_to_memory_else_to_a_temporary_folder(tmp_path, monkeypatch):
    assert staging_parent(tmp_path) == tmp_path
    with pytest.raises(StartError, match=r"--staging-dir is '.*absent': there is no such folder, or it can't be writ"):
        staging_parent(tmp_path / "absent")
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        assert staging_parent(None) == memory
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert staging_parent(None) == tmp_path

"""Compiled layers compute what plain ones do, once for all layers and lengths, and leave no trace in what is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from tests.conftest import llama_config
from tests.gradients import gradients, write_preferences
from trainer import fast_linear, sft
from trainer.compiling import compile_layers, decoder_layers, is_compiled, lacking, require_compiler
from trainer.config import SftSettings
from trainer.errors import ModelError
from trainer.fast_linear import use_fast_linear
from trainer.models import last_hidden
from trainer.packing import pack, packed_outputs
from trainer.runs import training_mode

compiles = pytest.mark.skipif(bool(lacking(torch.device("cpu"))), reason="no C++ compiler, which torch.compile needs")


@pytest.fixture(scope="module")
def folder(make_policy) -> Path:
    return make_policy(seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_preferences(tmp_path_factory.mktemp("rows") / "preferences.jsonl", 24)


# Gradients -----------------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize(
    ("stage", "packing", "checkpointing"),
    [
        *((stage, "on", stage in ("sft", "ppo")) for stage in ("sft", "reward", "dpo", "kto", "ppo", "online-dpo")),
        ("sft", "off", False),
        ("sft", "off", True),
        ("ppo", "off", False),
    ],
)
def test_gradients_are_those_of_plain_layers(stage, packing, checkpointing, folder, data):
    options = {"packing": packing, "activation_checkpointing": checkpointing, "dtype": torch.float32}
    assert_alike(stage, folder, data, 3e-5, **options)


@compiles
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_gradients_of_adapters_are_those_of_plain_layers(stage, folder, data):
    pytest.importorskip("peft")
    assert_alike(stage, folder, data, 3e-5, packing="on", lora_rank=4, dtype=torch.float32)


@compiles
def test_in_bfloat16_they_differ_by_its_rounding(folder, data):
    assert_alike("sft", folder, data, 0.05, packing="on", dtype=torch.float32, precision="bfloat16")


def assert_alike(stage: str, folder: Path, data: str, tolerance: float, **options: Any) -> None:
    (ours, figures), (theirs, expected) = (
        gradients(stage, folder, data, 7, **options, compile=compiled) for compiled in (True, False)
    )
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        # One of an adapter's two factors begins at zero, and so does the other's gradient.
        assert scale > 0 or "lora_rank" in options
        assert float((ours[name] - gradient).abs().max()) <= tolerance * scale, name
    assert figures == pytest.approx(expected, rel=100 * tolerance, abs=100 * tolerance)


@compiles
@pytest.mark.skipif(not fast_linear.available(), reason="no oneDNN products on this machine")
@pytest.mark.parametrize("products", ["oneDNN", "rounded"])
def test_fast_linear_layers_keep_their_products(products, monkeypatch):
    """Bit for bit, so that it is they that multiply: nothing else is in the layer."""
    monkeypatch.setattr(fast_linear, "faster", lambda: products == "oneDNN")
    monkeypatch.setattr(fast_linear, "multiplies_bfloat16", lambda: products == "oneDNN")
    torch.manual_seed(0)
    layer = nn.ModuleList([nn.Linear(96, 160, bias=False)])
    use_fast_linear(layer)
    found = []
    for forward in (layer[0].forward, torch.compile(layer[0].forward, dynamic=True, fullgraph=True)):
        for rows in (100, 77):
            layer.zero_grad()
            x = torch.randn(2, rows, 96, generator=torch.Generator().manual_seed(rows)).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=products == "rounded"):
                y = forward(x)
            y.float().square().sum().backward()
            found.append([y.detach(), x.grad, layer[0].weight.grad.clone()])
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        for expected, own in zip(plain, compiled, strict=True):
            assert own.equal(expected)


# Compilations --------------------------------------------------------------------------------------------------------


def make(layers: int, *, packed: bool, compiled: bool = True) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(num_hidden_layers=layers))
    assert pack(model, "on" if packed else "off", "float32") == packed
    if compiled:
        compile_layers(model)
    return model


def look(model: Any, lengths: list[int], *, packed: bool) -> None:
    """A forward and a backward pass over sequences of these lengths."""
    mask_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids_BS = torch.randint(3, 300, mask_BS.shape, generator=torch.Generator().manual_seed(len(lengths)))
    with training_mode(model, 0.0):
        hidden = (
            packed_outputs(model.base_model, ids_BS, mask_BS, mask_BS)
            if packed
            else last_hidden(model, ids_BS, mask_BS)
        )
        hidden.square().sum().backward()


@compiles
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_one_compilation_serves_all_layers_and_all_lengths(packed):
    graphs = []
    for layers in (3, 5):
        torch._dynamo.reset()
        counters.clear()
        model = make(layers, packed=packed)
        look(model, [9, 30, 4], packed=packed)
        if not packed:
            look(model, [8, 8], packed=packed)  # Nothing is padded, so there is no mask.
        graphs.append(counters["stats"]["unique_graphs"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for lengths in ([9, 31], [50, 2, 7, 7], [64, 64, 3], [5] * 6):
                look(model, lengths, packed=packed)
    assert graphs[0] == graphs[1] > 0


# What is saved -------------------------------------------------------------------------------------------------------


@compiles
def test_runs_go_on_across_it_and_what_they_save_has_plain_names(folder, data, tmp_path):
    whole = {}
    for compiled in (False, True):
        whole[compiled] = run(folder, data, tmp_path / f"whole-{compiled}", compiled)
    for compiled in (False, True):
        output = tmp_path / f"resumed-{compiled}"
        shutil.copytree(tmp_path / f"whole-{not compiled}", output)
        shutil.rmtree(output / "model")
        shutil.rmtree(output / "checkpoint-000004")
        whole[f"resumed-{compiled}"] = run(folder, data, output, compiled, resume=True)
        assert json.loads((output / "settings.json").read_text())["compile"] is compiled
        lineage = json.loads((output / "model" / "lineage.json").read_text())
        assert lineage["chain"][0]["settings"]["compile"] is compiled
    expected = whole[False]
    assert expected.keys() == load_file(folder / "model.safetensors").keys()
    for name, weights in whole.items():
        assert weights.keys() == expected.keys(), name
        # Four steps of 1e-3: Adam's first steps turn the rounding of a gradient near 0 into a part of a step.
        assert max(float((weights[key] - expected[key]).abs().max()) for key in expected) < 1e-4, name


def run(folder: Path, data: str, output: Path, compiled: bool, resume: bool = False) -> dict[str, torch.Tensor]:
    settings = SftSettings(
        model=str(folder),
        data=(data,),
        output=output,
        held_out_fraction=0.1,
        batch_size=5,
        max_steps=4,
        save_every=2,
        keep_checkpoints=9,
        learning_rate=1e-3,
        track=("none",),
        compile=compiled,
        resume=resume,
    )
    sft.main(settings)
    return load_file(output / "model" / "model.safetensors")


# Refusals ------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_says_what_to_install():
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ModelError) as caught,
    ):
        require_compiler(torch.device("cpu"))
    assert "--compile is set, but this machine has no C++ compiler" in str(caught.value)
    assert "apt-get install g++" in str(caught.value)
    assert str(caught.value).endswith(", or leave --compile away")


@compiles
def test_without_pythons_header_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ModelError, match=r"Python\.h is missing.*python3-dev"):
        require_compiler(torch.device("cpu"))


def test_a_model_that_does_not_name_its_layers_is_refused():
    with pytest.raises(ModelError, match="Linear doesn't say which its decoder layers are"):
        compile_layers(nn.Linear(2, 2))


def test_layers_and_names_stay_what_they_are():
    model = make(3, packed=True)
    assert is_compiled(model)
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["LlamaDecoderLayer"] * 3
    assert list(model.state_dict()) == list(make(3, packed=True, compiled=False).state_dict())

"""Fast linear layers are linear layers: the same numbers, names and gradients, and bitwise the same every time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainer import fast_linear
from trainer.fast_linear import FastLinear, available, use_fast_linear

pytestmark = pytest.mark.skipif(not available(), reason="no oneDNN products on this machine")


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Its products, also where they are not the faster ones."""
    monkeypatch.setattr(fast_linear, "faster", lambda: True)


def make(inputs: int = 24, outputs: int = 40, *, bias: bool = True) -> tuple[nn.Linear, FastLinear]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(inputs, outputs, bias=bias)})
    fast = copy.deepcopy(model)
    use_fast_linear(fast)
    assert isinstance(fast["layer"], FastLinear)
    assert fast.state_dict().keys() == model.state_dict().keys()
    return model["layer"], fast["layer"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 24), (4, 50, 24), (2, 3, 24), (0, 24)], ids=str)
def test_values_and_gradients_are_those_of_float64(shape, bias):
    plain, fast = make(bias=bias)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(shape)
    weights = torch.randn(*shape[:-1], 40)
    found = []
    for layer, dtype in ((exact, torch.float64), (fast, torch.float32)):
        own = x.to(dtype).requires_grad_()
        y = layer(own)
        assert y.shape == (*shape[:-1], 40)
        (y * weights.to(dtype)).sum().backward()
        found.append([y, own.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def test_only_the_gradients_that_are_wanted_are_made():
    _, fast = make()
    fast.requires_grad_(False)
    x = torch.randn(100, 24, requires_grad=True)
    fast(x).sum().backward()
    assert x.grad is not None
    assert fast.weight.grad is None


@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_and_gradients_may_lie_in_memory_as_they_like(transposed):
    plain, fast = make()
    x = torch.randn(24, 100).t() if transposed else torch.randn(100, 48)[:, ::2]
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    for layer in (plain, fast):
        layer(x).t().contiguous().sum().backward()  # An expanded gradient.
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-4)


def test_autocast_and_other_precisions_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(fast_linear, "multiplies_bfloat16", lambda: True)
    plain, fast = make()
    x = torch.randn(100, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), plain(x))
    assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))


def test_the_same_batch_gives_the_same_bits():
    _, fast = make(256, 512)
    x = torch.randn(300, 256)
    gradients = []
    for _ in range(3):
        fast.zero_grad()
        fast(x).square().sum().backward()
        gradients.append(fast.weight.grad.clone())
    assert all(torch.equal(gradients[0], other) for other in gradients)


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.bfloat16).double()


@pytest.mark.parametrize("bias", [True, False])
def test_without_bfloat16_in_the_processor_its_products_are_those_of_the_rounded_numbers(bias, monkeypatch):
    monkeypatch.setattr(fast_linear, "multiplies_bfloat16", lambda: False)
    _, fast = make(bias=bias)
    x = torch.randn(3, 40, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fast(x)
    exact = bfloat16(x) @ bfloat16(fast.weight).t() + (bfloat16(fast.bias) if bias else 0.0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)
    grad = torch.randn(3, 40, 40).to(torch.bfloat16)
    y.backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ bfloat16(fast.weight), rtol=1e-5, atol=1e-4)
    expected = grad.double().flatten(0, 1).t() @ bfloat16(x).flatten(0, 1)
    torch.testing.assert_close(fast.weight.grad.double(), expected, rtol=1e-5, atol=1e-4)
    if bias:
        torch.testing.assert_close(fast.bias.grad.double(), grad.double().sum(dim=(0, 1)), rtol=1e-5, atol=1e-4)


def test_what_is_not_bfloat16s_is_not_rounded(monkeypatch):
    monkeypatch.setattr(fast_linear, "multiplies_bfloat16", lambda: False)
    assert not fast_linear.needs_float32(torch.randn(2, 2))
    assert fast_linear.needs_float32(torch.randn(2, 2).to(torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast_linear.needs_float32(torch.randn(2, 2))
        assert not fast_linear.needs_float32(torch.randn(2, 2).double())
    with torch.autocast("cpu", dtype=torch.float16):
        assert not fast_linear.needs_float32(torch.randn(2, 2))

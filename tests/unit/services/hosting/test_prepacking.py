"""Packed products against plain ones in double precision.

Shapes: N rows, C inputs, O outputs.
"""

from __future__ import annotations

import copy

import pytest
import torch

from services.hosting.prepacking import PackedLinear, can_prepack


@pytest.mark.skipif(not can_prepack(torch.float32), reason="no packed products on this processor")
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_the_product_and_no_row_depends_on_another(bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 200, bias=bias)
    x_NC = torch.randn(77, 96)
    layer = PackedLinear(linear.weight, linear.bias)
    with torch.inference_mode():
        y_NO = layer(x_NC)
        exact_NO = copy.deepcopy(linear).double()(x_NC.double())
        assert float((y_NO - exact_NO).abs().max()) < 1e-5
        for count in (1, 2, 9, 64):
            assert torch.equal(layer(x_NC[:count]), y_NO[:count])
    assert layer.weight.dtype == torch.float32

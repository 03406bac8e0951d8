"""How frozen weights are stored: what a CPU can tell; fp8's products are in test_fast_path.py, on a GPU."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import adapted_model, packed_batch, random_documents, tiny_model

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.lora.base_weight import Dense, Fp8, Fp8Linear, base_linear, base_weight_of, quantize_base

BATCH = packed_batch([random_documents(9, 5)], 16)


def fp8_linear(in_features: int = 32, out_features: int = 48) -> tuple[Fp8Linear, torch.Tensor]:
    """A layer in fp8, and the weight that it was."""
    torch.manual_seed(0)
    base = torch.nn.Linear(in_features, out_features, bias=False)
    return Fp8Linear.from_linear(base), base.weight.detach()


def test_a_dense_product_has_a_gradient_for_its_input_alone():
    weight, x = torch.randn(6, 4), torch.randn(2, 3, 4, requires_grad=True)
    y = base_linear(x, Dense(weight))
    torch.testing.assert_close(y, x @ weight.t())
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight)


def test_the_tensors_say_the_format():
    assert isinstance(base_weight_of(torch.nn.Linear(3, 2)), Dense)
    layer, weight = fp8_linear()
    frozen = base_weight_of(layer)
    assert isinstance(frozen, Fp8)
    assert (frozen.dequantize() - weight).norm() < 0.04 * weight.norm()  # e4m3 has 3 bits behind the point


def test_fp8_products_are_those_of_the_rounded_operands_and_near_the_exact_ones():
    layer, weight = fp8_linear()
    x = torch.randn(5, 32, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    for found, exact in ((y, x @ weight.t()), (x.grad, dy @ weight)):
        assert 0 < (found - exact).norm() < 0.06 * exact.norm()
    assert layer.weight.grad is None


def test_an_adapter_on_an_fp8_base_is_itself_exact():
    base, _ = fp8_linear()
    layer = p3.MergedLinear.adapt(base, r=4, segments=(32, 16), enable_lora=[False, True])
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 32, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y - base(x), x @ layer.delta().t())
    y.sum().backward()
    assert layer.lora_A.grad.norm() > 0
    assert layer.lora_B.grad.norm() > 0


def test_an_adapted_fp8_layer_keeps_the_tensors_and_gives_the_layer_back():
    base, _ = fp8_linear()
    layer = p3.Linear.adapt(base, r=4)
    assert layer.weight is base.weight
    assert layer.q_t is base.q_t
    assert layer.lora_A.dtype == torch.float32
    plain = layer.base_layer()
    assert type(plain) is Fp8Linear
    assert plain.weight is base.weight
    assert plain.scale_t is base.scale_t


def test_fp8_where_it_cannot_be_is_left_out_with_one_line(caplog):
    model = tiny_model()
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        quantize_base(model, "fp8")
    assert [r.message for r in caplog.records] == [
        "base_precision='fp8' is not possible here (no CUDA device): the frozen weights stay in 16 bits"
    ]
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float32
    loss, _ = p3.causal_lm_loss(adapted_model(), BATCH)
    assert loss.isfinite()


def test_another_precision_is_refused():
    with pytest.raises(ModelError, match="base_precision='int3'; allowed"):
        quantize_base(tiny_model(), "int3")


def test_a_cast_fp8_layer_is_an_error_instead_of_other_numbers():
    layer, _ = fp8_linear()
    for cast in (layer, p3.Linear.adapt(layer, r=4)):
        with pytest.raises(ModelError, match=r"was cast to torch\.float16"):
            cast.half()(torch.randn(2, 32).half())

"""Storage formats of frozen weights and adapters on them, on a CPU; tests/kernel_tests has fp8 on a GPU."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import randomize_adapters, require_four_bit, tiny_model
from torch import nn

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.lora.base_weight import (
    Dense,
    Fp8,
    Fp8Linear,
    Nf4,
    Nf4Fp8,
    base_format,
    base_linear,
    base_weight_of,
    compute_dtype,
    multiply_in_fp8,
    nf4_linear,
    quantize_base,
)


def linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 96, bias=bias)


def nf4_fp8_linear(base: nn.Linear) -> nn.Linear:
    layer = nf4_linear(base)
    multiply_in_fp8(layer)
    return layer


@pytest.fixture(params=["fp8", "nf4", "nf4-fp8"])
def quantise(request):
    """A function from ``nn.Linear`` to the quantised layer."""
    if request.param != "fp8":
        require_four_bit()
    return {"fp8": Fp8Linear.from_linear, "nf4": nf4_linear, "nf4-fp8": nf4_fp8_linear}[request.param]


def test_the_tensors_say_the_format(quantise):
    base = linear()
    assert isinstance(base_weight_of(base), Dense)
    stored, weight = base_weight_of(quantise(base)), base.weight.detach()
    assert isinstance(stored, (Fp8, Nf4))
    error = (stored.dequantize() - weight).norm() / weight.norm()
    assert error < (0.04 if isinstance(stored, Fp8) else 0.11)  # e4m3 has 3 bits after the point


@pytest.mark.parametrize(("fp8", "least", "most"), [(False, -1, 1e-6), (True, 0, 0.06)], ids=["dense", "fp8"])
def test_products_are_near_the_exact_ones_and_give_the_weight_no_gradient(fp8, least, most):
    base = linear()
    layer, weight = Fp8Linear.from_linear(base) if fp8 else base, base.weight.detach()
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x) if fp8 else base_linear(x, Dense(layer.weight))
    dy = torch.randn_like(y)
    y.backward(dy)
    for found, exact in ((y, x @ weight.t()), (x.grad, dy @ weight)):
        assert least < (found - exact).norm() / exact.norm() < most
    assert layer.weight.grad is None


def test_nf4_in_fp8_multiplies_by_the_nf4_weight_rounded_once_more():
    require_four_bit()
    layer = nf4_fp8_linear(linear())
    weight = base_weight_of(layer)
    assert type(weight) is Nf4Fp8 and base_format(nn.Sequential(layer)) == "nf4-fp8"
    x = torch.randn(5, 64, requires_grad=True)
    y = base_linear(x, weight)
    dy = torch.randn_like(y)
    y.backward(dy)
    for found, exact in ((y, x @ weight.dequantize().t()), (x.grad, dy @ weight.dequantize())):
        assert 0 < (found - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("quantise", ["fp8", "nf4-fp8"], indirect=True)
def test_both_products_of_fp8_read_one_copy_whatever_the_rows_scales(quantise):
    base = linear()
    with torch.no_grad():
        base.weight *= torch.logspace(-3, 3, 96)[:, None]  # the backward folds these scales into dy
    weight = base_weight_of(quantise(base))
    x, dy = torch.randn(5, 64), torch.randn(5, 96) * 1e-9  # far below what e4m3 or the old floor of the scale can hold
    exact = weight.dequantize()
    for found, wanted in ((weight.matmul(x), x @ exact.t()), (weight.matmul_backward(dy), dy @ exact)):
        assert 0 < (found - wanted).norm() / wanted.norm() < 0.06
    fewer = sum(t.numel() for t in weight.tensors())
    assert fewer < 1.2 * base.weight.numel()


def test_a_weight_that_fp8_cannot_decode_is_refused():
    require_four_bit()
    odd = nf4_linear(nn.Linear(96, 64, bias=False))  # rows end inside a block of 64
    with pytest.raises(ModelError, match=r"'nf4-fp8': a weight of \(64, 96\); allowed: nf4 with double"):
        multiply_in_fp8(odd)


@pytest.mark.parametrize("quantise", ["fp8", "nf4"], indirect=True)  # Linear4bit's own forward is never in fp8
@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_on_a_quantised_base_is_itself_exact(quantise, bias):
    base = quantise(linear(bias))
    merged = {"segments": (64, 32), "enable_lora": [False, True]}
    for layer in (p3.Linear.adapt(base, r=4), p3.MergedLinear.adapt(base, r=4, **merged)):
        x = torch.randn(3, 64, requires_grad=True)
        assert torch.equal(layer(x), base(x))  # B is zero
        randomize_adapters(layer)
        y, y_base = layer(x), base(x)
        torch.testing.assert_close(y - y_base, x @ layer.delta().t())
        dy = torch.ones_like(y)
        of_base, of_both = (torch.autograd.grad(out, x, dy, retain_graph=True)[0] for out in (y_base, y))
        torch.testing.assert_close(of_both - of_base, layer.delta().sum(0).expand(3, -1))
        y.sum().backward()
        assert layer.lora_A.grad.any() and layer.lora_B.grad.any()


def test_an_adapted_quantised_layer_shares_its_tensors_and_gives_the_layer_back(quantise):
    base = quantise(linear(bias=True))
    layer = p3.Linear.adapt(base, r=4)
    assert layer.weight is base.weight and layer.lora_A.dtype == torch.float32
    plain = layer.base_layer()
    assert type(plain) is type(base) and plain.weight is base.weight and plain.bias is base.bias
    state = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    assert all(vars(plain)[name] == value for name, value in vars(base).items() if name not in state)
    for name, buffer in base.named_buffers():
        assert getattr(layer, name) is getattr(plain, name) is buffer
    x = torch.randn(3, 64)
    assert torch.equal(plain(x), base(x)) and type(base_weight_of(layer)) is type(base_weight_of(base))


def test_fp8_where_it_is_not_possible_is_left_out_with_one_warning(caplog):
    model = tiny_model()
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        quantize_base(model, "fp8")
    assert len(caplog.records) == 1 and "'fp8' is not possible here (no CUDA device)" in caplog.text
    assert "the frozen weights stay in the dtype of the model" in caplog.text
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float32
    with pytest.raises(ModelError, match="base_precision='int3'; allowed"):
        quantize_base(model, "int3")


def test_nf4_fp8_without_such_a_device_is_nf4_with_one_warning(caplog):
    require_four_bit()
    model = tiny_model()
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        quantize_base(model, "nf4-fp8")
    assert len(caplog.records) == 1 and "are multiplied in 16 bits" in caplog.text and base_format(model) == "nf4"


def test_a_cast_fp8_layer_is_an_error_instead_of_wrong_numbers():
    layer = Fp8Linear.from_linear(linear())
    for cast in (layer, p3.Linear.adapt(layer, r=4)):
        with pytest.raises(ModelError, match=r"was cast to torch\.float16"):
            cast.half()(torch.randn(2, 64).half())


def test_compute_dtype_is_autocasts_where_it_is_on_else_the_weights():
    x, weight = torch.randn(2, 3), nn.Linear(3, 3, dtype=torch.float16).weight
    assert compute_dtype(x, weight) == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x, weight) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert compute_dtype(x, weight) == torch.float16
    assert compute_dtype(x.to("meta"), weight) == torch.float16

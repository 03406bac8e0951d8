"""Adapted layers without gradients: the products of the way with gradients, and factors that are never stale."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from conftest import randomize_adapters, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import phi3lora as p3
from phi3lora.lora.base_weight import Fp8Linear
from phi3lora.lora.product import _FLOAT32_ROWS, factors, keep_factors
from phi3lora.model.forward import eval_mode

ON, OFF = True, False
ENABLED = [(ON,), (ON, ON), (ON, OFF, ON), (OFF, ON, OFF)]
WIDTHS = {1: (24,), 2: (16, 8), 3: (12, 4, 8)}
SEGMENTS = [
    *((WIDTHS[len(enabled)], enabled) for enabled in ENABLED),
    ((12, 12), (ON, ON)), ((8, 8, 8), (ON, ON, ON)), ((8, 8, 8), (ON, OFF, ON)), ((8, 8, 8), (OFF, ON, ON)),
    ((16, 4, 4), (ON, ON, ON)), ((4, 8, 4, 8), (ON, ON, ON, OFF)), ((4, 4, 4, 4, 4, 4), (ON, OFF, ON, OFF, ON, ON)),
]  # fmt: skip
MANY = _FLOAT32_ROWS + 5  # rows, from which on a CPU multiplies 16-bit factors in 16 bits


def make_layer(enable_lora=(True, False, True), dtype=torch.float32, base=None, r=2, widths=None, **more) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Linear(16, 24, dtype=dtype) if base is None else base
    widths = WIDTHS[len(enable_lora)] if widths is None else widths
    layer = p3.MergedLinear.adapt(base, r, 3, segments=widths, enable_lora=list(enable_lora), **more)
    randomize_adapters(layer, std=0.5)
    return layer.eval()


def without_gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs without gradients: outside a block, at its first and at its second call."""
    with torch.no_grad():
        outside = layer(x)
        with keep_factors(layer):
            return [outside, layer(x), layer(x)]


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (MANY, 16), (0, 16), (0, 5, 16), (5, 0, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("widths", "enable_lora"), SEGMENTS, ids=str)
def test_it_equals_the_way_with_gradients(widths, enable_lora, dtype, shape):
    layer = make_layer(enable_lora, dtype, widths=widths)
    layer = layer.double() if dtype == torch.float64 else layer
    x = torch.randn(shape, dtype=dtype)
    want = layer(x)
    assert want.grad_fn is not None
    rounding = {} if dtype.itemsize > 2 else {"rtol": 0.02, "atol": 0.02}
    for got in without_gradients(layer, x):
        torch.testing.assert_close(got, want.detach(), **rounding)


@pytest.mark.parametrize("r", [2, 80])
def test_other_inputs_ranks_and_formats(r):
    x = torch.randn(4, 3, 16).transpose(0, 1)  # not contiguous
    fp8 = make_layer(base=Fp8Linear.from_linear(nn.Linear(16, 24)), r=r)
    transposed = p3.Linear(16, 24, r=r, fan_in_fan_out=True)
    for layer in (fp8, transposed, make_layer(r=r)):
        randomize_adapters(layer, std=0.1)
        for got in without_gradients(layer.eval(), x):
            torch.testing.assert_close(got, layer(x).detach(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        for got in without_gradients(layer, x):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, layer(x).detach(), rtol=0.02, atol=0.02)


def test_dropout_follows_its_own_mode():
    layer, x = make_layer(lora_dropout=0.5), torch.randn(5, 16)
    layer.lora_dropout.train()
    torch.manual_seed(1)
    want = layer(x).detach()
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)


PRODUCTS = [
    ((24,), (ON,), 1), ((8, 8, 8), (ON, ON, ON), 1), ((8, 8, 8), (ON, OFF, ON), 1), ((16, 4, 4), (ON, ON, ON), 2),
    ((4, 4, 4, 4, 4, 4), (ON, OFF, ON, OFF, ON, ON), 2), ((12, 4, 8), (ON, OFF, ON), 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("widths", "enable_lora", "count"), PRODUCTS, ids=str)
def test_segments_of_one_width_at_equal_distances_are_one_product(widths, enable_lora, count, dtype):
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    layer, x = make_layer(enable_lora, dtype, widths=widths), torch.randn(5, 16, dtype=dtype)
    with torch.no_grad(), Recorder():
        layer(x)
    assert len([name for name in seen if "mm" in name]) == 2 + count, seen  # the base's and A's before them
    assert not [name for name in seen if name.startswith("phi3lora")]  # no operator of ours
    casts = 0 if dtype is torch.float32 else 1 if len(widths) == 1 else 1 + count  # x, and each product; never A or B
    assert sum("_to_copy" in name for name in seen) == casts


# --- Kept factors are never stale


def step_of_an_optimizer(layer):
    layer.lora_A.grad = layer.lora_B.grad = None
    with torch.enable_grad():
        layer(torch.randn(2, 16, dtype=layer.bias.dtype)).sum().backward()
    torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1).step()


def loaded(layer, assign):
    state = {name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=assign)


def write_to_another_parameter_of_the_storage(layer):
    layer.lora_B = nn.Parameter(layer.lora_B.data)
    with torch.no_grad():
        for _ in range(3):
            layer.lora_B.add_(1)


def replace_data_twice(layer):
    """Give B new storages; the second could lie where the first was."""
    for _ in range(2):
        layer.lora_B.data = torch.randn_like(layer.lora_B.data)


CHANGES = {
    "optimizer": step_of_an_optimizer,
    "add_": lambda layer: layer.lora_A.detach().add_(1),
    "load_state_dict": lambda layer: loaded(layer, False),
    "load_state_dict, assign": lambda layer: loaded(layer, True),
    "a new Parameter": write_to_another_parameter_of_the_storage,
    "data = ": replace_data_twice,
    "dtype": lambda layer: layer.to(torch.float64),
    "reset": lambda layer: layer.reset_parameters(),
    "scaling": lambda layer: setattr(layer, "scaling", 7.0),
    "disabled": lambda layer: setattr(layer, "enabled", False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("rows", [3, MANY])
def test_a_change_inside_a_block_is_noticed(change, dtype, rows):
    layer, x = make_layer(dtype=dtype), torch.randn(rows, 16, dtype=dtype)
    with torch.no_grad(), keep_factors(layer):
        before = layer(x).float()
        change(layer)
        x = x.to(layer.weight.dtype)
        got, want = layer(x), copy.deepcopy(layer)(x)  # the copy is another layer, for which nothing is kept
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    same = torch.allclose(got.float(), before, rtol=0.02, atol=0.02)
    assert got.dtype == torch.float64 if change is CHANGES["dtype"] else not same


def test_nothing_is_kept_after_a_block_so_data_writes_between_blocks_are_seen():
    layer, x = make_layer(dtype=torch.bfloat16), torch.randn(MANY, 16, dtype=torch.bfloat16)
    with eval_mode(layer):
        before = layer(x)
    layer.lora_B.data.add_(1)
    with eval_mode(layer):
        after = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(after, copy.deepcopy(layer)(x), rtol=0.02, atol=0.02)
    assert not torch.equal(after, before)


def test_only_the_models_own_layers_are_kept_in_its_own_thread():
    layer, stranger, x = make_layer(), make_layer(), torch.randn(MANY, 16, dtype=torch.bfloat16)
    with keep_factors(layer), torch.no_grad():
        assert factors(layer, x)[1] is factors(layer, x)[1]
        assert factors(stranger, x)[1] is not factors(layer, x)[1]
        with keep_factors(stranger):  # of both models
            assert factors(stranger, x)[1] is factors(stranger, x)[1]
            assert factors(layer, x)[1] is factors(layer, x)[1]
        kept, seen = factors(layer, x)[1], []
        thread = threading.Thread(target=lambda: seen.append(factors(layer, x)[1]))
        thread.start()
        thread.join()
        assert seen[0] is not kept
    assert factors(layer, x)[1] is not kept


def test_parameters_made_in_inference_mode_have_no_versions_and_are_not_kept():
    with torch.inference_mode():
        layer, x = make_layer(dtype=torch.bfloat16), torch.randn(MANY, 16, dtype=torch.bfloat16)
        with keep_factors(layer):
            before = layer(x)
            layer.lora_B.add_(1)
            assert not torch.allclose(layer(x), before)


def test_a_block_leaves_nothing_on_the_layer():
    layer, x = make_layer(dtype=torch.bfloat16), torch.randn(MANY, 16, dtype=torch.bfloat16)
    names, state = set(vars(layer)), list(layer.state_dict())
    with torch.no_grad(), keep_factors(layer):
        layer(x)
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        assert set(vars(layer)) == names
        assert list(layer.state_dict()) == state
        for twin in twins:
            twin.lora_A.data.mul_(2)
            assert not torch.allclose(twin(x), layer(x))


def test_switching_merging_and_loading_inside_a_block(tmp_path):
    model, ids = tiny_model(), torch.tensor([[4, 5, 7]])
    p3.inject_lora(model, p3.LoraConfig(r=2))
    randomize_adapters(model, std=0.3)
    path = p3.save_adapter(model, tmp_path / "first.safetensors")

    def logits():
        return model(input_ids=ids, use_cache=False).logits

    first = logits().detach()
    p3.load_adapter(model, path, name="second")
    p3.set_adapter(model, "second")
    randomize_adapters(model, std=0.3, seed=5)
    second = logits().detach()
    with eval_mode(model):
        for name, want in {"second": second, "default": first}.items():
            p3.set_adapter(model, name)
            for _ in range(2):
                torch.testing.assert_close(logits(), want)
            with p3.merged(model):
                torch.testing.assert_close(logits(), want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(logits(), want)
    assert not torch.allclose(first, second)


def test_a_call_without_gradients_sees_writes_through_data_and_replaced_parameters():
    for rows in (3, MANY):
        for dtype in (torch.float32, torch.bfloat16):
            layer, x = make_layer(dtype=dtype), torch.randn(rows, 16, dtype=dtype)
            with torch.no_grad():
                before = layer(x)
                layer.lora_B.data.add_(1)
                after = layer(x)
                torch.testing.assert_close(after, copy.deepcopy(layer)(x))
                assert not torch.equal(before, after)
                layer.lora_A.data = layer.lora_A.data.t().contiguous().t()  # not contiguous
                layer.lora_B.data = layer.lora_B.data.t().contiguous().t()
                torch.testing.assert_close(layer(x), after)

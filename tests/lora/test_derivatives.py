"""Every way in which torch differentiates gives our layers the values of loralib's."""

from __future__ import annotations

import loralib as lora
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import randomize_adapters, tiny_model
from functorch.compile import make_boxed_func
from test_layers import operands
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import phi3lora as p3
from phi3lora.lora.base_weight import Fp8Linear
from phi3lora.lora.product import linear_plus_low_rank

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # raised by torch.func itself

X, IMAGES, TOKENS = torch.randn(3, 6), torch.randn(2, 2, 5, 5), torch.tensor([[1, 2], [3, 1]])
LAYERS = [
    ("Linear", (6, 4), {}, X),
    ("Linear", (6, 4), {"fan_in_fan_out": True, "bias": False}, X),
    ("MergedLinear", (6, 9), {"enable_lora": [True, False, True]}, X),
    ("MergedLinear", (6, 9), {"enable_lora": [False, True, True], "fan_in_fan_out": True}, X),
    ("Conv2d", (2, 4, 3), {}, IMAGES),
    ("Embedding", (10, 6), {}, TOKENS),
]


def parameters_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters()}


def called(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(layer, parameters, (x,))


def tangent_of_the_adapter(layer, x):
    parameters = parameters_of(layer)
    return jvp(lambda p: called(layer, p, x), (parameters,), ({n: 0.1 + p for n, p in parameters.items()},))[1]


def per_sample_gradients(layer, x):
    loss = grad(lambda p, row: called(layer, p, row[None]).pow(2).sum())
    return [*vmap(loss, (None, 0))(parameters_of(layer), x).values()]


def ensemble(layer, x):
    stacked = {n: torch.stack([p, 2 * p]) for n, p in parameters_of(layer).items()}
    return vmap(lambda p: called(layer, p, x))(stacked)


def gradient_of_the_gradients_norm(layer, x):
    adapter = [layer.lora_A, layer.lora_B]
    first = torch.autograd.grad(torch.tanh(layer(x)).sum(), adapter, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in first), adapter)


def several_backwards_at_once(layer, x):
    y = layer(x)
    dy = torch.stack([torch.ones_like(y), y.detach()])
    return torch.autograd.grad(y, [layer.lora_A, layer.lora_B], dy, is_grads_batched=True)


def dual_numbers(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def gradient_penalty(layer, x):
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.tanh(layer(leaf)).sum(), leaf, create_graph=True)
    return torch.autograd.grad(g.pow(2).sum(), [layer.lora_A, layer.lora_B])


OF_PARAMETERS = [
    tangent_of_the_adapter, per_sample_gradients, ensemble, gradient_of_the_gradients_norm, several_backwards_at_once,
]  # fmt: skip
OF_INPUTS = [
    dual_numbers, gradient_penalty,
    lambda layer, x: jvp(layer, (x,), (torch.ones_like(x),))[1],
    lambda layer, x: jacfwd(layer)(x),
    lambda layer, x: jacrev(layer)(x),
    lambda layer, x: hessian(lambda z: torch.tanh(layer(z)).sum())(x),
    lambda layer, x: torch.autograd.functional.jacobian(layer, x, vectorize=True),
    lambda layer, x: torch.autograd.functional.hvp(lambda z: torch.tanh(layer(z)).sum(), x, torch.ones_like(x))[1],
]  # fmt: skip


@pytest.mark.parametrize(("name", "sizes", "kwargs", "x"), LAYERS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(LAYERS)])
def test_all_derivatives_equal_loralibs(name, sizes, kwargs, x):
    torch.manual_seed(0)
    ours = getattr(p3, name)(*sizes, r=2, lora_alpha=3, **kwargs)
    theirs = getattr(lora, name)(*sizes, r=2, lora_alpha=3, merge_weights=False, **kwargs)
    randomize_adapters(ours, std=1)
    theirs.load_state_dict(ours.state_dict())
    for derive in [*OF_PARAMETERS, *(OF_INPUTS if x.is_floating_point() else [])]:
        got, want = derive(ours, x), derive(theirs, x)
        got, want = (value if isinstance(value, (list, tuple)) else [value] for value in (got, want))
        for g, w in zip(got, want, strict=True):
            assert w.any()
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * max(1.0, w.abs().max().item()))


def test_an_fp8_base_passes_tangents_and_second_derivatives_through():
    torch.manual_seed(0)
    layer = p3.Linear.adapt(Fp8Linear.from_linear(nn.Linear(16, 16)), r=2)
    randomize_adapters(layer, std=1)
    matrix = layer.weight.float() * layer.scale + layer.delta()
    torch.testing.assert_close(jacfwd(layer)(torch.randn(16)), matrix)
    x = torch.randn(16, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(second, 2 * (matrix.t() @ matrix).sum(0), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("widths", "enable_lora"), [([7], [True]), ([3, 2, 2], [True, False, True]), ([2, 1, 4], [False, True, False])]
)
def test_the_second_derivative_matches_finite_differences(widths, enable_lora):
    assert torch.autograd.gradgradcheck(linear_plus_low_rank, operands(widths, enable_lora, (3,)))


def test_an_ordinary_backward_takes_the_operators_compiled_too():
    """Plain operations would cost memory and time in training."""
    layer, eager, compiled = p3.Linear(6, 4, r=2), [], []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            eager.append(str(function))
            return function(*args, **(kwargs or {}))

    def record(graph, inputs):
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    with Recorder():
        layer(X).sum().backward()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(layer, backend=backend, fullgraph=True)(X).sum().backward()
    for seen in (eager, compiled):
        names = [name for name in seen if name.startswith("phi3lora")]
        assert names == ["phi3lora.linear_plus_low_rank.default", "phi3lora.low_rank_backward.default"]


def test_a_models_directional_derivative_is_the_bases_while_B_is_zero():
    model, ids = tiny_model(), torch.tensor([[4, 5, 7]])
    model.set_attn_implementation("eager")

    def directional() -> Tensor:
        embedded = model.get_input_embeddings()(ids).detach()

        def forward(z: Tensor) -> Tensor:
            return model.model(inputs_embeds=z, use_cache=False).last_hidden_state

        return jvp(forward, (embedded,), (torch.ones_like(embedded),))[1]

    want = directional()
    p3.inject_lora(model, p3.LoraConfig(r=2))
    torch.testing.assert_close(directional(), want)

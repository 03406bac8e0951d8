"""The four layers against loralib's own, against plain ``nn.functional``, and against what loralib gets wrong."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import loralib as lora
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize_adapters
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loralib.layers import LoRALayer
from torch import Tensor, nn

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.lora.product import Segment, adapted_segments, linear_plus_low_rank, low_rank_backward


def both(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Our layer and loralib's, built alike, with equal random parameters (loralib never merging)."""
    torch.manual_seed(0)
    ours = getattr(p3, name)(*args, **kwargs)
    theirs = getattr(lora, name)(*args, merge_weights=False, **kwargs)
    randomize_adapters(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same_function(ours: nn.Module, reference: nn.Module, x: Tensor) -> None:
    """Equal outputs, and equal gradients of the input and of everything trainable."""
    results = []
    for module in (ours, reference):
        leaf = x.clone().requires_grad_(x.is_floating_point())
        y = module(leaf)
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wanted |= {"x": leaf} if leaf.requires_grad else {}
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        gradients = torch.autograd.grad(y, list(wanted.values()), dy)
        results.append({"y": y.detach(), **dict(zip(wanted, gradients, strict=True))})
    got, want = results
    assert {"lora_A", "lora_B"} <= got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# One of each class, as (name, constructor arguments, an input).
LAYERS = [
    ("Linear", {"in_features": 6, "out_features": 8}, normal(3, 6)),
    ("MergedLinear", {"in_features": 6, "out_features": 9, "enable_lora": [True, False, True]}, normal(3, 6)),
    ("Embedding", {"num_embeddings": 11, "embedding_dim": 5}, torch.tensor([[1, 2], [10, 2]])),
    ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3}, normal(2, 4, 5, 5)),
]
every_layer = pytest.mark.parametrize(("name", "kwargs", "x"), LAYERS, ids=[name for name, _, _ in LAYERS])


def built(name: str, kwargs: dict, r: int = 2, **more) -> nn.Module:
    """Our layer with random adapters."""
    torch.manual_seed(0)
    layer = getattr(p3, name)(**kwargs, r=r, lora_alpha=3, **more)
    randomize_adapters(layer, std=0.5)
    return layer


def plain_base(name: str, kwargs: dict) -> nn.Module:
    """The torch layer that ours extends."""
    torch.manual_seed(0)
    kwargs = {key: value for key, value in kwargs.items() if key != "enable_lora"}
    return getattr(nn, name.removeprefix("Merged"))(**kwargs)


def adapted(name: str, base: nn.Module, **more) -> nn.Module:
    """Our layer around ``base``, built by ``adapt``."""
    if name == "MergedLinear":
        more["enable_lora"] = [True, False, True]
    return getattr(p3, name).adapt(base, 2, 3, **more)


# --- The same function as loralib's layers


VECTORS, IMAGES = normal(2, 3, 6), normal(2, 4, 7, 7)
NOT_CONTIGUOUS = normal(6, 2, 3).permute(1, 2, 0)
TOKENS = torch.tensor([[0, 2, 9, 2], [9, 9, 1, 0]])


@pytest.mark.parametrize(
    ("name", "sizes", "kwargs", "x"),
    [
        *[("Linear", (6, 8), {}, normal(*shape)) for shape in ((6,), (0, 6))],
        ("Linear", (6, 8), {"bias": False}, VECTORS),
        *[("Linear", (6, 8), {"fan_in_fan_out": True, "bias": bias}, VECTORS) for bias in (True, False)],
        *[
            ("MergedLinear", (6, 12), {"enable_lora": enable, **more}, NOT_CONTIGUOUS)
            for enable in ([True], [True, False, True], [True, True, True], [False, True, False])
            for more in ({}, {"bias": False}, {"fan_in_fan_out": True})
        ],
        ("Embedding", (10, 6), {}, TOKENS),
        *[("Embedding", (10, 6), {"padding_idx": index}, TOKENS) for index in (2, -1)],
        ("Embedding", (10, 6), {"scale_grad_by_freq": True}, TOKENS),
        *[("Embedding", (10, 6), {"max_norm": 0.5, "norm_type": norm}, TOKENS) for norm in (1.0, 2.0)],
        ("Conv2d", (4, 8, 3), {"bias": False}, IMAGES),
        ("Conv2d", (4, 8, 3), {"groups": 4, "stride": 2, "padding": 1}, IMAGES),
        ("Conv2d", (4, 8, 3), {"padding": 1, "padding_mode": "reflect"}, IMAGES),
        ("Conv2d", (4, 8, 3), {"dilation": 2, "padding": "same"}, IMAGES),
    ],
)
def test_each_layer_equals_loralibs(name, sizes, kwargs, x):
    ours, theirs = both(name, *sizes, r=3, lora_alpha=5, **kwargs)
    assert_same_function(ours, theirs, x)
    randomize_adapters(theirs, seed=1)
    ours.load_state_dict(theirs.state_dict())  # ``both`` loads ours into theirs
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_trainable_weight_and_bias_get_linears_gradients(bias):
    ours, theirs = both("MergedLinear", 6, 8, r=3, lora_alpha=5, enable_lora=[True, False], bias=bias)
    for layer in (ours, theirs):
        layer.weight.requires_grad = True
    assert_same_function(ours, theirs, torch.randn(2, 3, 6))


@pytest.mark.parametrize("sizes", [(6, 8), (6, 6)])  # of a square weight, a missing transposition shows in the values
@pytest.mark.parametrize(("name", "more"), [("Linear", {}), ("MergedLinear", {"enable_lora": [True, False]})])
def test_a_weight_stored_transposed_stays_so_without_its_adapter_and_merged(name, more, sizes):
    ours, theirs = both(name, *sizes, r=2, lora_alpha=3, fan_in_fan_out=True, **more)
    x = torch.randn(3, 6)
    base = F.linear(x, theirs.weight.t(), theirs.bias)
    torch.testing.assert_close(ours.base_layer()(x), base)
    model = nn.Sequential(ours)
    with p3.merged(model):
        torch.testing.assert_close(model(x), theirs(x))
    with p3.disabled(model):
        torch.testing.assert_close(model(x), base)
    p3.delete_adapter(model, "default")
    torch.testing.assert_close(model(x), base)
    assert model.state_dict().keys() == {"0.weight", "0.bias"}


@every_layer
def test_merge_weights_changes_no_output(name, kwargs, x):
    """loralib merges in ``eval()``; ours never writes weights, and computes the same."""
    torch.manual_seed(0)
    ours, theirs = (getattr(library, name)(**kwargs, r=2, merge_weights=True) for library in (p3, lora))
    randomize_adapters(ours)
    theirs.load_state_dict(ours.state_dict())
    for mode in (False, True, False):
        torch.testing.assert_close(ours.train(mode)(x), (theirs.train(mode), theirs)[1](x), rtol=1e-4, atol=1e-5)


# --- Segments of unequal width


def test_adapted_segments_gives_the_places_in_A_B_and_the_output():
    """Phi-3-medium's q, k and v, the example at the top of the module."""
    assert adapted_segments((5120, 1280, 1280), (True, False, True), 16) == (
        Segment(0, slice(0, 16), slice(0, 5120), slice(0, 5120)),
        Segment(2, slice(16, 32), slice(5120, 6400), slice(6400, 7680)),
    )


class SeparateLinears(nn.Module):
    """The linears that a fused layer stands for: one per segment, each adapted one with an A and a B of its own."""

    def __init__(self, layer: p3.MergedLinear, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(layer.lora_A.detach().clone())
        self.lora_B = nn.Parameter(layer.lora_B.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.weights = layer.weight.detach().split(widths)
        self.widths, self.enable, self.alpha_over_r = widths, layer.enable_lora, layer.lora_alpha / layer.r

    def forward(self, x: Tensor) -> Tensor:
        biases = [None] * len(self.widths) if self.bias is None else self.bias.split(self.widths)
        As = iter(self.lora_A.chunk(sum(self.enable)))
        Bs = iter(self.lora_B.split([w for w, on in zip(self.widths, self.enable, strict=True) if on]))
        parts = []
        for W, b, on in zip(self.weights, biases, self.enable, strict=True):
            y = F.linear(x, W, b)
            parts.append(y + self.alpha_over_r * F.linear(F.linear(x, next(As)), next(Bs)) if on else y)
        return torch.cat(parts, dim=-1)


fused_layers = st.builds(
    SimpleNamespace,
    segments=st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=4).filter(
        lambda segments: any(on for _, on in segments)
    ),
    r=st.integers(1, 4),
    in_features=st.integers(1, 8),
    tokens=st.lists(st.integers(1, 3), min_size=0, max_size=2),
    bias=st.booleans(),
    alpha=st.sampled_from([1, 0.5, 16]),
)


PHI3_MEDIUM = SimpleNamespace(
    segments=[(8, True), (2, False), (2, True)], r=2, in_features=8, tokens=[5], bias=True, alpha=4
)


@settings(max_examples=80, derandomize=True, database=None)
@given(fused_layers)
@example(PHI3_MEDIUM)
def test_any_segments_match_separate_linears(case):
    """Also Phi-3-medium's proportions, where loralib's equal split would adapt half of q and all of k."""
    torch.manual_seed(0)
    widths, enable = zip(*case.segments, strict=True)
    layer = p3.MergedLinear(
        case.in_features, sum(widths), case.r, case.alpha, enable_lora=enable, segments=widths, bias=case.bias
    )
    randomize_adapters(layer, std=1)
    assert_same_function(layer, SeparateLinears(layer, widths), torch.randn(*case.tokens, case.in_features))


@pytest.mark.parametrize("alpha", [7, 0])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_lora_ind_merge_ab_and_zero_pad_are_loralibs(fan_in_fan_out, alpha):
    settings = {"enable_lora": [True, False, True], "fan_in_fan_out": fan_in_fan_out}
    ours, theirs = both("MergedLinear", 6, 12, r=2, lora_alpha=alpha, **settings)
    assert torch.equal(ours.lora_ind, theirs.lora_ind)
    torch.testing.assert_close(ours.merge_AB(), theirs.merge_AB())
    x = torch.randn(8, 6)
    assert torch.equal(ours.zero_pad(x), theirs.zero_pad(x))


# --- The operator


def operands(widths: list[int], enable_lora: list[bool], tokens: tuple[int, ...], bias: bool = True) -> list:
    """x, z, weight, bias and lora_B in float64 with gradients, in 4, out 7, r 2; then the segments and a scaling."""
    torch.manual_seed(0)
    last = adapted_segments(widths, enable_lora, 2)[-1]
    shapes = [(*tokens, 4), (*tokens, last.rows_of_A.stop), (7, 4), (7,), (last.rows_of_B.stop, 2)]
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    values[3] = values[3] if bias else None
    return [*values, widths, enable_lora, 1.7]


@pytest.mark.parametrize(
    ("widths", "enable_lora", "tokens", "bias"),
    [
        ([7], [True], (3,), True),
        ([3, 2, 2], [True, False, True], (2, 3), False),
        ([2, 1, 4], [False, True, False], (3,), True),
        ([2, 2, 3], [True, True, True], (), True),
    ],
)
def test_the_backward_matches_finite_differences(widths, enable_lora, tokens, bias):
    assert torch.autograd.gradcheck(linear_plus_low_rank, operands(widths, enable_lora, tokens, bias))


def test_the_operators_are_registered_as_torch_compile_expects():
    """Shapes, dtypes and strides without data, and the backward, agree with the real run."""
    x, z, weight, bias, lora_B, *rest = operands([3, 2, 2], [True, False, True], (2, 3))
    torch.library.opcheck(linear_plus_low_rank, (x, z, weight, bias, lora_B, *rest))
    dy = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.library.opcheck(low_rank_backward, (dy, z.detach(), lora_B.detach(), *rest))


def test_the_backward_accepts_an_expanded_gradient():
    """``y.sum().backward()`` passes one element with strides 0."""
    given = operands([3, 2, 2], [True, False, True], (2, 3))
    y = linear_plus_low_rank(*given)
    got = torch.autograd.grad(y.sum(), given[:5], retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(y, given[:5], torch.ones_like(y)))


def test_the_input_is_not_kept_for_a_frozen_weight():
    x, z, weight, *others = operands([7], [True], (3,))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_plus_low_rank(x, z, weight.detach(), *others)
    assert kept
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)


# --- loralib's contract


@every_layer
@pytest.mark.parametrize("r", [0, 2])
def test_class_keys_and_shapes_are_loralibs(name, kwargs, x, r):
    ours, theirs = getattr(p3, name)(**kwargs, r=r), getattr(lora, name)(**kwargs, r=r)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert lora.lora_state_dict(ours).keys() == ({"lora_A", "lora_B"} if r else set())  # no lora_ind
    assert isinstance(ours, type(theirs)) and isinstance(ours, LoRALayer)
    assert isinstance(ours, lora.Linear) == (name == "Linear")  # in loralib a MergedLinear is no Linear


@every_layer
def test_initial_values_are_loralibs_and_reset_parameters_restores_them(name, kwargs, x):
    layer = built(name, kwargs)
    layer.reset_parameters()
    for ours in (layer, getattr(p3, name)(**kwargs, r=2)):
        bound = 1 / math.sqrt(ours.lora_A.shape[1])  # kaiming_uniform_(a=sqrt(5)), nn.Linear's own
        if name == "Embedding":
            assert not ours.lora_A.any() and ours.lora_B.abs().max() > 1  # normal
        else:
            assert 0.5 * bound < ours.lora_A.abs().max() <= bound and not ours.lora_B.any()
        assert torch.equal(ours(x), ours.base_layer()(x))


@pytest.mark.parametrize("strict", [False, True])
def test_conv2d_loads_the_weights_it_had_before_the_swap(strict):
    pretrained = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    model = nn.Sequential(p3.Conv2d(2, 4, 3, r=0 if strict else 2), nn.ReLU())
    state = pretrained.state_dict()
    result = model.load_state_dict(state, strict=strict)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == (set() if strict else {"0.lora_A", "0.lora_B"})
    assert all(torch.equal(getattr(model[0].conv, key), getattr(pretrained[0], key)) for key in ("weight", "bias"))
    assert state.keys() == {"0.weight", "0.bias"}  # the caller's dict is left alone


# --- The base layer


@every_layer
def test_adapt_shares_the_pretrained_parameters_and_changes_nothing(name, kwargs, x):
    base = plain_base(name, kwargs)
    want = base(x)
    layer = adapted(name, base)
    assert torch.equal(layer(x), want)
    assert layer.base_layer().weight is base.weight
    assert not base.weight.requires_grad
    assert {n for n, p in layer.named_parameters() if p.requires_grad} - {"bias", "conv.bias"} == {"lora_A", "lora_B"}
    assert name == "Embedding" or layer.base_layer().bias is base.bias


@every_layer
def test_a_released_base_is_the_plain_layer_until_it_is_attached_again(name, kwargs, x):
    layer = built(name, kwargs)
    y, order = layer(x), [name for name, _ in layer.named_parameters()]
    base = layer.release_base()
    assert type(base) is type(plain_base(name, kwargs))
    assert [name for name, _ in layer.named_parameters()] == ["lora_A", "lora_B"]
    layer.attach_base(base.eval())
    assert torch.equal(layer(x), y)
    assert [name for name, _ in layer.named_parameters()] == order
    assert not any(module.training for module in layer.modules())


@pytest.mark.parametrize(
    ("name", "kwargs", "x"),
    [
        *[(name, {**kwargs, "r": 0}, x) for name, kwargs, x in LAYERS],
        ("MergedLinear", {"in_features": 6, "out_features": 8, "r": 2, "enable_lora": [False, False]}, normal(3, 6)),
    ],
)
def test_rank_zero_or_no_enabled_segment_is_the_base_layer(name, kwargs, x):
    layer = getattr(p3, name)(**kwargs)
    base = plain_base(name, {key: value for key, value in kwargs.items() if key != "r"})
    base.load_state_dict({key.removeprefix("conv."): value for key, value in layer.state_dict().items()})
    assert torch.equal(layer(x), base(x))
    assert layer.base_layer().weight.requires_grad  # as in loralib


@every_layer
def test_a_layer_switched_off_is_the_base_layer_and_delta_is_what_it_lacks(name, kwargs, x):
    layer = built(name, kwargs)
    y, delta = layer(x), layer.delta()
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer()(x))
    assert (delta.dtype, delta.shape) == (torch.float32, layer.base_layer().weight.shape)
    with torch.no_grad():
        layer.base_layer().weight.add_(delta)
    torch.testing.assert_close(layer(x), y)


# --- Modes and dropout


@every_layer
def test_train_and_eval_return_self_and_never_change_a_bit(name, kwargs, x):
    layer = built(name, kwargs, merge_weights=True).to(torch.bfloat16)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for _ in range(20):
        assert layer.eval() is layer and not layer.training
        assert layer.train() is layer and layer.training
        assert layer.train(False) is layer and not layer.training
    for key, value in layer.state_dict().items():
        assert torch.equal(value.view(torch.int16), before[key].view(torch.int16)), key


def test_dropout_drops_the_share_and_keeps_the_mean():
    """On layers whose frozen weight is zero and whose adapter passes its input through, on every segment."""
    torch.manual_seed(0)
    settings = {"r": 64, "lora_alpha": 64, "lora_dropout": 0.25, "bias": False}
    for layer in (p3.Linear(64, 64, **settings), p3.MergedLinear(64, 128, enable_lora=[True, True], **settings)):
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.data = torch.eye(64).repeat(parameter.shape[0] // 64, 1)
        layer.weight.data.zero_()
        x = torch.ones(500, 64, requires_grad=True)
        y = layer.train()(x)
        torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.75]))
        assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)  # and so the mean is 1
        y[:, :64].sum().backward()
        assert torch.equal(x.grad, y[:, :64].detach())  # d y / d x is the mask over 1 - p, and so is y
        assert torch.equal(y[:, :64], y[:, -64:])  # all segments see one mask, as in loralib
        assert torch.equal(layer.eval()(torch.ones(5, 64)), torch.ones_like(y[:5]))
        torch.nn.init.normal_(layer.weight)
        layer.lora_B.data.zero_()
        assert torch.equal(layer.train()(x), F.linear(x, layer.weight))  # the base product sees no dropout


@every_layer
def test_rslora_divides_alpha_by_the_root_of_the_rank(name, kwargs, x):
    layer, rslora = built(name, kwargs, r=4), built(name, kwargs, r=4, use_rslora=True)
    assert layer.scaling == 3 / 4
    torch.testing.assert_close(rslora.delta(), layer.delta() * math.sqrt(4))
    base = layer.base_layer()(x)
    torch.testing.assert_close(rslora(x) - base, (layer(x) - base) * math.sqrt(4), rtol=1e-4, atol=1e-5)


# --- Dtypes and devices


@every_layer
def test_adapters_are_float32_on_a_bf16_base_and_the_output_is_bf16(name, kwargs, x):
    base = plain_base(name, kwargs).to(torch.bfloat16)
    layer = adapted(name, base)
    randomize_adapters(layer)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    y = layer(x)
    assert y.dtype == torch.bfloat16
    reference = copy.deepcopy(layer).float()
    wide = x.float() if x.is_floating_point() else x
    torch.testing.assert_close(y.float(), reference(wide), rtol=0.02, atol=0.02)
    y.float().sum().backward()
    reference(wide).sum().backward()
    for parameter in ("lora_A", "lora_B"):  # in float32, which assert_close demands of both
        got, want = getattr(layer, parameter).grad, getattr(reference, parameter).grad
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kwargs", "x"), LAYERS[:2], ids=["Linear", "MergedLinear"])
def test_within_autocast_the_products_run_in_its_dtype(name, kwargs, x, base_dtype):
    layer = adapted(name, plain_base(name, kwargs).to(base_dtype))
    randomize_adapters(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, layer.lora_A.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), copy.deepcopy(layer).float()(x), rtol=0.02, atol=0.02)


@every_layer
def test_a_layer_works_on_the_meta_device(name, kwargs, x):
    with torch.device("meta"):
        fresh = getattr(p3, name)(**kwargs, r=2)
        around = adapted(name, plain_base(name, kwargs))
    want = built(name, kwargs)(x).shape
    for layer in (fresh, around, built(name, kwargs).to("meta")):
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        assert layer(x.to("meta")).shape == want


@every_layer
def test_copies_keep_the_function_and_to_moves_the_adapters_with_the_base(name, kwargs, x):
    layer = built(name, kwargs)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
        twin.lora_A.data.add_(1)
        assert not torch.equal(twin(x), layer(x))  # and share nothing
    assert {p.dtype for p in layer.to(torch.float64).parameters()} == {torch.float64}
    wide = layer(x.double() if x.is_floating_point() else x)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), y)


# --- Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"segments": (4, 4), "enable_lora": [True, True]}, "add up to 8"),
        ({"segments": (10, -1), "enable_lora": [True, True]}, "positive width for each"),
        ({"segments": (4, 5), "enable_lora": [True]}, r"for each of enable_lora=\[True\]"),
        ({"enable_lora": [True, False]}, "equal by default"),
        ({"enable_lora": []}, r"segments=\(\) "),
        ({"enable_lora": [True], "r": -1}, "r=-1"),
        ({"enable_lora": [True], "r": 1.5}, r"r=1\.5"),
        ({"enable_lora": [True], "lora_dropout": 1.0}, r"lora_dropout=1\.0"),
    ],
)
def test_invalid_settings_are_refused(kwargs, message):
    with pytest.raises(ModelError, match=message):
        p3.MergedLinear(6, 9, **{"r": 2, **kwargs})


def test_a_conv2d_whose_kernel_is_not_square_is_refused():
    with pytest.raises(ModelError, match=r"kernel_size=\(3, 1\)"):
        p3.Conv2d.adapt(nn.Conv2d(2, 2, (3, 1)), 2)

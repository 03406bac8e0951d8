"""The hand-written backward against finite differences, and the dtype that products run in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phi3lora.lora.base_weight import compute_dtype
from phi3lora.lora.layers import linear_plus_low_rank, low_rank_backward

SPANS = [(0, 7), (0, 3, 5, 7), (2, 3), (0, 2, 2, 4, 4, 7)]


def flat(spans) -> list[int]:
    return [edge for span in spans for edge in span]


def inputs(spans, tokens: tuple[int, ...], bias: bool) -> list:
    """x, z, weight, bias, lora_B in float64, all with gradients; then the spans and a scaling."""
    torch.manual_seed(0)
    width = sum(spans[1::2]) - sum(spans[::2])
    shapes = [(*tokens, 4), (*tokens, len(spans)), (7, 4), (7,), (width, 2)]  # r = 2, two edges a span
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if not bias:
        values[3] = None
    return [*values, list(spans), 1.7]


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize(("tokens", "bias"), [((3,), True), ((2, 3), False), ((), True)])
def test_backward_matches_finite_differences(spans, tokens, bias):
    assert torch.autograd.gradcheck(linear_plus_low_rank, inputs(spans, tokens, bias))


@pytest.mark.parametrize("tokens", [(3,), (2, 3)])
def test_the_operators_are_registered_as_torch_compile_expects(tokens):
    """Shapes, dtypes and strides without data, and the backward, agree with the real run."""
    x, z, weight, bias, lora_B, spans, scaling = inputs(SPANS[1], tokens, True)
    torch.library.opcheck(linear_plus_low_rank, (x, z, weight, bias, lora_B, spans, scaling))
    dy = torch.randn(*tokens, 7, dtype=torch.float64)
    torch.library.opcheck(low_rank_backward, (dy, z.detach(), lora_B.detach(), spans, scaling))


def test_an_expanded_upstream_gradient_is_taken():
    """``y.sum().backward()`` hands in one element with strides 0."""
    given = inputs(SPANS[1], (2, 3), True)
    y = linear_plus_low_rank(*given)
    got = torch.autograd.grad(y.sum(), given[:5], retain_graph=True)
    want = torch.autograd.grad(y, given[:5], torch.ones_like(y))
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference)


def test_the_input_is_not_kept_for_a_frozen_weight():
    x, z, weight, *others = inputs(SPANS[0], (3,), True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_plus_low_rank(x, z, weight.detach(), *others)
    assert kept
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)


def test_compute_dtype_is_autocasts_where_it_is_on_else_the_weights():
    x, weight = torch.randn(2, 3), nn.Linear(3, 3, dtype=torch.float16).weight
    assert compute_dtype(x, weight) == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x, weight) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert compute_dtype(x, weight) == torch.float16
    assert compute_dtype(x.to("meta"), weight) == torch.float16

"""The hand-written backward against finite differences, and the dtype that products run in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phi3lora.lora.base_weight import compute_dtype
from phi3lora.lora.layers import linear_plus_low_rank, low_rank_backward

SEGMENTS = [([7], [True]), ([3, 2, 2], [True, False, True]), ([2, 1, 4], [False, True, False]), ([2, 2, 3], [True] * 3)]


def inputs(segments, tokens: tuple[int, ...], bias: bool) -> list:
    """x, z, weight, bias, lora_B in float64, all with gradients; then widths, enable_lora and a scaling."""
    torch.manual_seed(0)
    widths, enable_lora = segments
    width = sum(w for w, on in zip(widths, enable_lora, strict=True) if on)
    shapes = [(*tokens, 4), (*tokens, 2 * sum(enable_lora)), (7, 4), (7,), (width, 2)]  # r = 2
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if not bias:
        values[3] = None
    return [*values, widths, enable_lora, 1.7]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("tokens", "bias"), [((3,), True), ((2, 3), False), ((), True)])
def test_backward_matches_finite_differences(segments, tokens, bias):
    assert torch.autograd.gradcheck(linear_plus_low_rank, inputs(segments, tokens, bias))


@pytest.mark.parametrize("tokens", [(3,), (2, 3)])
def test_the_operators_are_registered_as_torch_compile_expects(tokens):
    """Shapes, dtypes and strides without data, and the backward, agree with the real run."""
    x, z, weight, bias, lora_B, *rest = inputs(SEGMENTS[1], tokens, True)
    torch.library.opcheck(linear_plus_low_rank, (x, z, weight, bias, lora_B, *rest))
    dy = torch.randn(*tokens, 7, dtype=torch.float64)
    torch.library.opcheck(low_rank_backward, (dy, z.detach(), lora_B.detach(), *rest))


def test_an_expanded_upstream_gradient_is_taken():
    """``y.sum().backward()`` hands in one element with strides 0."""
    given = inputs(SEGMENTS[1], (2, 3), True)
    y = linear_plus_low_rank(*given)
    got = torch.autograd.grad(y.sum(), given[:5], retain_graph=True)
    want = torch.autograd.grad(y, given[:5], torch.ones_like(y))
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference)


def test_the_input_is_not_kept_for_a_frozen_weight():
    x, z, weight, *others = inputs(SEGMENTS[0], (3,), True)
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

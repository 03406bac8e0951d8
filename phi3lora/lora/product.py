"""The product of an adapted dense layer, given z = dropout(x) A', and where its segments lie.

    y = x W' + b,  y[:, columns_i] += scaling * z_i B_i'

It is one operator: each low-rank product is accumulated into the base product's output, which saves a second (N, out)
buffer, and the backward makes no copy of dy. Registering it with torch lets ``torch.compile`` treat it as one node and
fuse the operations around it.

An operator of ours has no rule for forward-mode AD, for the transforms of ``torch.func`` or for second derivatives.
There the same product is made of torch's own operations (``low_rank_plainly``), which have them all.

Shapes: N tokens, ``in`` and ``out`` features, r rank, k enabled segments, x (..., in), y (..., out). ``widths`` and
``enable_lora`` describe all segments of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base_weight import needs_plain_operations


class Segment(NamedTuple):
    """One adapted segment of a linear layer. In the example of layers.py, v is ``(2, 16:32, 5120:6400, 6400:7680)``."""

    position: int  # in the layer, counting the segments without an adapter too
    rows_of_A: slice  # of lora_A (k*r, in); also the columns of z = x A' (N, k*r)
    rows_of_B: slice  # of lora_B (sum of enabled widths, r)
    columns: slice  # of y (N, out); also the rows of W (out, in)


def adapted_segments(widths: Sequence[int], enable_lora: Sequence[bool], r: int) -> tuple[Segment, ...]:
    """Return the segments that have an adapter of rank ``r``, in order, given every segment's width and switch."""
    segments = []
    a = b = column = 0
    for position, (width, enabled) in enumerate(zip(widths, enable_lora, strict=True)):
        if enabled:
            segments.append(Segment(position, slice(a, a + r), slice(b, b + width), slice(column, column + width)))
            a, b = a + r, b + width
        column += width
    return tuple(segments)


@torch.library.custom_op("phi3lora::linear_plus_low_rank", mutates_args=())
def linear_plus_low_rank(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor,
    widths: list[int], enable_lora: list[bool], scaling: float,
) -> Tensor:  # fmt: skip
    """Return ``x W' + b`` with ``scaling * z_i B_i'`` added to segment i's columns; all tensors have one dtype.

    x (..., in), z (..., k*r), weight (out, in), bias (out,), lora_B (sum of enabled widths, r) -> (..., out).
    """
    y = F.linear(x, weight, bias)
    y2, z2 = y.view(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    for segment in adapted_segments(widths, enable_lora, lora_B.shape[1]):
        y2[:, segment.columns].addmm_(z2[:, segment.rows_of_A], lora_B[segment.rows_of_B].t(), alpha=scaling)
    return y


linear_plus_low_rank.register_fake(lambda x, z, weight, *others: x.new_empty(*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("phi3lora::low_rank_backward", mutates_args=())
def low_rank_backward(
    dy: Tensor, z: Tensor, lora_B: Tensor, widths: list[int], enable_lora: list[bool], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of z and B: (..., k*r) and (sum of enabled widths, r)."""
    dy2, z2 = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    dz, dB = torch.empty_like(z2), torch.empty_like(lora_B)
    for segment in adapted_segments(widths, enable_lora, lora_B.shape[1]):
        dy_i, z_i, B_i = dy2[:, segment.columns], z2[:, segment.rows_of_A], lora_B[segment.rows_of_B]
        dz_i, dB_i = dz[:, segment.rows_of_A], dB[segment.rows_of_B]
        torch.addmm(dz_i, dy_i, B_i, beta=0, alpha=scaling, out=dz_i)
        torch.addmm(dB_i, dy_i.t(), z_i, beta=0, alpha=scaling, out=dB_i)
    return dz.view(z.shape), dB


low_rank_backward.register_fake(
    lambda dy, z, lora_B, *others: (z.new_empty(z.shape), torch.empty_like(lora_B))  # both contiguous
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, z, weight, bias, lora_B, *ctx.segments_and_scaling = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, z, weight, lora_B)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight, lora_B = ctx.saved_tensors
    if torch.is_grad_enabled() or needs_plain_operations():  # the gradients are differentiated in their turn
        dz, dB = _low_rank_backward_plainly(dy, z, lora_B, *ctx.segments_and_scaling)
    else:
        dz, dB = low_rank_backward(dy, z, lora_B, *ctx.segments_and_scaling)
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    dy2 = dy.reshape(-1, dy.shape[-1])  # (N, out)
    dW = dy2.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[2] else None
    db = dy2.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return dx, dz, dW, db, dB, None, None, None


linear_plus_low_rank.register_autograd(_backward, setup_context=_save_for_backward)


def low_rank_plainly(
    z: Tensor, lora_B: Tensor, widths: Sequence[int], enable_lora: Sequence[bool], scaling: float
) -> Tensor:
    """Return ``scaling * z_i B_i'`` in segment i's columns, zero elsewhere: (..., out)."""
    adapted = {segment.position: segment for segment in adapted_segments(widths, enable_lora, lora_B.shape[1])}
    parts = []
    for position, width in enumerate(widths):
        if position in adapted:
            segment = adapted[position]
            parts.append(F.linear(z[..., segment.rows_of_A], lora_B[segment.rows_of_B]) * scaling)
        else:
            parts.append(z.new_zeros(*z.shape[:-1], width))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _low_rank_backward_plainly(
    dy: Tensor, z: Tensor, lora_B: Tensor, widths: list[int], enable_lora: list[bool], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return what :func:`low_rank_backward` does."""
    dy2, z2 = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    dz, dB = [], []
    for segment in adapted_segments(widths, enable_lora, lora_B.shape[1]):
        dy_i = dy2[:, segment.columns] * scaling
        dz.append(dy_i @ lora_B[segment.rows_of_B])
        dB.append(dy_i.t() @ z2[:, segment.rows_of_A])
    return torch.cat(dz, dim=1).view(z.shape), torch.cat(dB)

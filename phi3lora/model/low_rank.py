"""The arithmetic of an adapted linear layer: a frozen product plus low-rank ones, as one operator.

    y = x W' + b,   y[:, span_i] += scaling * z_i B_i'        z = dropout(x) A', made outside

One operator, so that the sum needs no second (N, out) buffer (each low-rank product is accumulated into the frozen
product's own output) and the backward no clone of dy; and registered with torch, so that ``torch.compile`` takes it
as it is and fuses what lies around it.

Shapes: x (..., in), z (..., k*r), W (out, in), b (out,), B (sum of span widths, r), y (..., out); spans is flat:
[start_0, stop_0, start_1, stop_1, ...], ascending columns of y, one pair an adapted segment.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .four_bit import is_four_bit


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that ``x`` times a frozen ``weight`` is computed in: autocast's where it is on, else the weight's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    quantised = weight.dtype.itemsize == 1 or is_four_bit(weight)  # what those are stored in says nothing
    return x.dtype if quantised else weight.dtype


@torch.library.custom_op("phi3lora::linear_plus_low_rank", mutates_args=())
def linear_plus_low_rank(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor, spans: list[int], scaling: float
) -> Tensor:
    """``x W' + b`` with ``scaling * z_i B_i'`` added to the columns of span i; all tensors of one dtype."""
    y = F.linear(x, weight, bias)
    y2, z2 = y.view(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    for columns, rows, ranks in _segments(spans, lora_B.shape[1]):
        y2[:, columns].addmm_(z2[:, ranks], lora_B[rows].t(), alpha=scaling)
    return y


@linear_plus_low_rank.register_fake
def _(x, z, weight, bias, lora_B, spans, scaling):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("phi3lora::low_rank_backward", mutates_args=())
def low_rank_backward(dy: Tensor, z: Tensor, lora_B: Tensor, spans: list[int], scaling: float) -> tuple[Tensor, Tensor]:
    """The gradients of z and B."""
    dy2, z2 = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])
    dz, dB = torch.empty_like(z2), torch.empty_like(lora_B)
    for columns, rows, ranks in _segments(spans, lora_B.shape[1]):
        dy_i = dy2[:, columns]
        torch.addmm(dz[:, ranks], dy_i, lora_B[rows], beta=0, alpha=scaling, out=dz[:, ranks])
        torch.addmm(dB[rows], dy_i.t(), z2[:, ranks], beta=0, alpha=scaling, out=dB[rows])
    return dz.view(z.shape), dB


@low_rank_backward.register_fake
def _(dy, z, lora_B, spans, scaling):
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(lora_B)


def _segments(spans: list[int], r: int) -> list[tuple[slice, slice, slice]]:
    """Of each adapted segment: its columns of y, its rows of B, its columns of z.

    ``_segments([0, 4, 6, 8], r=1)`` is [(0:4, 0:4, 0:1), (6:8, 4:6, 1:2)].
    """
    parts, row = [], 0
    for i in range(len(spans) // 2):
        start, stop = spans[2 * i], spans[2 * i + 1]
        parts.append((slice(start, stop), slice(row, row + stop - start), slice(i * r, (i + 1) * r)))
        row += stop - start
    return parts


def _save_for_backward(ctx, inputs, output):
    x, z, weight, bias, lora_B, spans, scaling = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, z, weight, lora_B)
    ctx.spans, ctx.scaling, ctx.has_bias = spans, scaling, bias is not None


def _backward(ctx, dy):
    x, z, weight, lora_B = ctx.saved_tensors
    dz, dB = low_rank_backward(dy, z, lora_B, ctx.spans, ctx.scaling)
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    dy2 = dy.reshape(-1, dy.shape[-1])
    dW = dy2.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[2] else None
    db = dy2.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return dx, dz, dW, db, dB, None, None


linear_plus_low_rank.register_autograd(_backward, setup_context=_save_for_backward)

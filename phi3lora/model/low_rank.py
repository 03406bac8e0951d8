"""The arithmetic of an adapted linear layer: a frozen product plus low-rank ones, as one autograd function.

    y = x W' + b,   y[:, span_i] += scaling * z_i B_i'        z = dropout(x) A', made outside

Shapes: x (..., in), z (..., k*r), W (out, in), B (sum of span widths, r), y (..., out).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype a product of ``x`` with a frozen ``weight`` runs in: autocast's where it is on, else the weight's."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


class LinearPlusLowRank(torch.autograd.Function):
    """y = x W' + b with scaling * z_i B_i' added in place to each enabled span of columns.

    One function, so that the sum needs no second (N, out) buffer and the backward no clone of dy.
    """

    @staticmethod
    def forward(ctx, x, z, weight, bias, lora_B, spans, scaling):  # type: ignore[override]
        y = F.linear(x, weight, bias)  # (..., out), ours alone: nobody else sees it before the sum
        y2, z2 = y.view(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
        r = lora_B.shape[1]
        row = 0
        for i, (start, stop) in enumerate(spans):
            B = lora_B[row : row + stop - start]  # (width, r)
            y2[:, start:stop].addmm_(z2[:, i * r : (i + 1) * r], B.t(), alpha=scaling)
            row += stop - start
        ctx.save_for_backward(x if weight.requires_grad else None, z, weight, lora_B)
        ctx.spans, ctx.scaling, ctx.has_bias = spans, scaling, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, z, weight, lora_B = ctx.saved_tensors
        dy2, z2 = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])
        r = lora_B.shape[1]
        dz, dB = torch.empty_like(z2), torch.empty_like(lora_B)
        row = 0
        for i, (start, stop) in enumerate(ctx.spans):
            B, dy_i = lora_B[row : row + stop - start], dy2[:, start:stop]
            dz[:, i * r : (i + 1) * r] = dy_i @ B
            dB[row : row + stop - start] = dy_i.t() @ z2[:, i * r : (i + 1) * r]
            row += stop - start
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dW = dy2.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[2] else None
        db = dy2.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
        return dx, dz.view_as(z).mul_(ctx.scaling), dW, db, dB.mul_(ctx.scaling), None, None

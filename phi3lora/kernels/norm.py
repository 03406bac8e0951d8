"""Residual and RMSNorm: h + (y + scaling z B'), its norm, and the low-rank activations of the projection after it.

    sum = h + y + scaling z B'          (the residual stream; y, z come from the projection before)
    x   = weight * sum * rstd           rstd = 1 / sqrt(mean(sum^2) + eps)
    z'  = dropout(x) A'                 (the low-rank activations of the projection after)

A program holds a block of whole rows: one loop over the columns for the sum and its square, a second, from cache, for
x and z'. x is not kept for the backward, which computes it again from the sum.

Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adapter import Adapter, Pending, dot, dropout, keep_mask
from .launch import Block, blocks, cdiv, contiguous, launch, next_power_of_2
from .low_rank import lora_weight_gradient
from .reduce import PartialSums


@triton.jit(do_not_specialize=["n_rows", "seed"])
def _norm_forward(
    h_ptr, y_ptr, z_ptr, B_ptr, weight_ptr, A_ptr, sum_ptr, x_ptr, rstd_ptr, out_z_ptr, n_rows, scaling, eps, seed, p,
    D: tl.constexpr, R: tl.constexpr, Z: tl.constexpr, Z_PADDED: tl.constexpr, ADD: tl.constexpr,
    LOW_RANK: tl.constexpr, NORM: tl.constexpr, PROJECT: tl.constexpr, DROP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < n_rows
    at = row.to(tl.int64)[:, None]
    dtype = h_ptr.dtype.element_ty
    if LOW_RANK:
        rank = tl.arange(0, R)
        z = tl.load(z_ptr + at * R + rank[None, :], mask=live[:, None], other=0.0)
    squares = tl.zeros([BM], tl.float32)
    for start in tl.range(0, D, BN, num_stages=STAGES):
        col = start + tl.arange(0, BN)
        inside = live[:, None] & (col < D)[None, :]
        h = tl.load(h_ptr + at * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if ADD:
            y = tl.load(y_ptr + at * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
            if LOW_RANK:
                B = tl.load(B_ptr + col[None, :] * R + rank[:, None], mask=(col < D)[None, :], other=0.0)
                y += scaling * dot(z, B)
            rounded = (h + y.to(dtype).to(tl.float32)).to(dtype)
            tl.store(sum_ptr + at * D + col[None, :], rounded, mask=inside)
            h = rounded.to(tl.float32)
        squares += tl.sum(h * h, 1)
    if NORM:
        rstd = 1.0 / tl.sqrt(squares / D + eps)
        tl.store(rstd_ptr + row, rstd, mask=live)
        tl.debug_barrier()
        k = tl.arange(0, Z_PADDED)
        out_z = tl.zeros([BM, Z_PADDED], tl.float32)
        for start in tl.range(0, D, BN, num_stages=STAGES):
            col = start + tl.arange(0, BN)
            inside = live[:, None] & (col < D)[None, :]
            h = tl.load((sum_ptr if ADD else h_ptr) + at * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
            x = ((h * rstd[:, None]).to(dtype).to(tl.float32) * weight[None, :]).to(dtype)
            tl.store(x_ptr + at * D + col[None, :], x, mask=inside)
            if PROJECT:
                if DROP:
                    x = dropout(x, seed, at * D + col[None, :], p)
                A_at = A_ptr + k[None, :] * D + col[:, None]
                out_z += dot(x, tl.load(A_at, mask=(k < Z)[None, :] & (col < D)[:, None], other=0.0))
        if PROJECT:
            tl.store(out_z_ptr + at * Z + k[None, :], out_z.to(dtype), mask=live[:, None] & (k < Z)[None, :])


@triton.jit
def _gradient_of_x(dx_ptr, dz, A_ptr, at, col, inside, seed, p, D: tl.constexpr, Z: tl.constexpr,
                   Z_PADDED: tl.constexpr, PROJECT: tl.constexpr, DROP: tl.constexpr):  # fmt: skip
    """Return a tile of dL/dx: the frozen product's, plus the adapter's ``mask(dz A)``."""
    g = tl.load(dx_ptr + at * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if PROJECT:
        k = tl.arange(0, Z_PADDED)
        A = tl.load(A_ptr + k[:, None] * D + col[None, :], mask=(k < Z)[:, None] & (col < D)[None, :], other=0.0)
        back = dot(dz, A)
        if DROP:
            back = tl.where(keep_mask(seed, at * D + col[None, :], p), back / (1.0 - p), 0.0)
        g += back
    return g


@triton.jit(do_not_specialize=["n_rows", "seed"])
def _norm_backward(
    dx_ptr, dz_ptr, dsum_ptr, sum_ptr, rstd_ptr, weight_ptr, A_ptr, B_ptr, out_z_ptr, dh_ptr, in_dz_ptr,
    n_rows, scaling, seed, p,
    D: tl.constexpr, R: tl.constexpr, Z: tl.constexpr, Z_PADDED: tl.constexpr, LOW_RANK: tl.constexpr,
    STREAM: tl.constexpr, PROJECT: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < n_rows
    at = row.to(tl.int64)[:, None]
    dtype = dx_ptr.dtype.element_ty
    rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
    dz = rstd  # not read without PROJECT
    if PROJECT:
        k = tl.arange(0, Z_PADDED)
        dz = tl.load(dz_ptr + at * Z + k[None, :], mask=live[:, None] & (k < Z)[None, :], other=0.0)
    mean = tl.zeros([BM], tl.float32)
    for start in tl.range(0, D, BN, num_stages=STAGES):
        col = start + tl.arange(0, BN)
        inside = live[:, None] & (col < D)[None, :]
        g = tl.load(dx_ptr + at * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
        h = tl.load(sum_ptr + at * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        mean += tl.sum(g * weight[None, :] * h, 1)
    mean = mean * rstd
    if PROJECT:  # the adapter's share: sum over columns of mask(dz A) x is dz . z'
        out_z = tl.load(out_z_ptr + at * Z + k[None, :], mask=live[:, None] & (k < Z)[None, :], other=0.0)
        mean += tl.sum(dz.to(tl.float32) * out_z.to(tl.float32), 1)
    mean /= D
    if LOW_RANK:
        rank = tl.arange(0, R)
        in_dz = tl.zeros([BM, R], tl.float32)
    for start in tl.range(0, D, BN, num_stages=STAGES):
        col = start + tl.arange(0, BN)
        inside = live[:, None] & (col < D)[None, :]
        g = _gradient_of_x(dx_ptr, dz, A_ptr, at, col, inside, seed, p, D, Z, Z_PADDED, PROJECT, DROP)
        h = tl.load(sum_ptr + at * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        dh = rstd[:, None] * (g * weight[None, :] - h * (rstd * mean)[:, None])
        if STREAM:
            dh += tl.load(dsum_ptr + at * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = dh.to(dtype)
        tl.store(dh_ptr + at * D + col[None, :], rounded, mask=inside)
        if LOW_RANK:
            B = tl.load(B_ptr + col[:, None] * R + rank[None, :], mask=(col < D)[:, None], other=0.0)
            in_dz += dot(rounded, B)
    if LOW_RANK:
        tl.store(in_dz_ptr + at * R + rank[None, :], (in_dz * scaling).to(dtype), mask=live[:, None])


FORWARD_BLOCKS: list[Block] = [
    {"BM": 32, "BN": 128, "STAGES": 3, "num_warps": 8}, *blocks((16, 256, 3), (16, 128, 2), (16, 64, 2)),
]  # fmt: skip
BACKWARD_BLOCKS = blocks((64, 64, 5), (64, 64, 3), (64, 64, 2), (32, 64, 2), (32, 32, 2), (32, 16, 2))


def backward_blocks(D: int) -> list[Block]:
    """Return the blocks whose loop over D columns turns twice or more.

    Where it turns once, ptxas 12.8 (Triton 3.6) gives Hopper a kernel that takes an address from a register which
    nothing has written: https://github.com/triton-lang/triton/issues/11366.
    """
    return [block for block in BACKWARD_BLOCKS if block["BN"] < D]


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h, y, z, before_B, after_A, weight, eps, before, after):
        N, D = h.shape
        summed = h if y is None else torch.empty_like(h)
        x, rstd = torch.empty_like(h), h.new_empty(N, dtype=torch.float32)
        out_z = h.new_empty(N, after.width) if after else None
        ctx.sizes = {
            "D": D, "R": before.R, "Z": after.width, "Z_PADDED": next_power_of_2(after.width),
            "LOW_RANK": bool(before), "PROJECT": bool(after), "DROP": after.dropout > 0,
        }  # fmt: skip
        launch(
            _norm_forward, FORWARD_BLOCKS, lambda block: (cdiv(N, block["BM"]),),
            h, y, z, before.B, weight, after.A, summed, x, rstd, out_z, N,
            before.scaling, eps, after.seed, after.dropout, ADD=y is not None, NORM=True, **ctx.sizes,
        )  # fmt: skip
        ctx.save_for_backward(summed, rstd, weight, z, out_z)
        ctx.before, ctx.after, ctx.added = before, after, y is not None
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:4]):  # the first layer: nothing before it learns
            ctx.mark_non_differentiable(x)
        return (h.view_as(h) if y is None else summed), x, out_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum, dx, dz):
        summed, rstd, weight, z, out_z = ctx.saved_tensors
        before, after, dz = ctx.before, ctx.after, contiguous(dz)
        sums = PartialSums()
        dA = lora_weight_gradient(sums, dz, summed, after, rstd, weight) if after else None
        if dx is None:  # nothing before learns
            sums.reduce()
            return None, None, None, None, after.gradient_of_A(dA) if after else None, None, None, None, None
        N, D = summed.shape
        dh = torch.empty_like(summed)
        in_dz = summed.new_empty(N, before.R) if before else None
        launch(
            _norm_backward, backward_blocks(D), lambda block: (cdiv(N, block["BM"]),),
            dx.contiguous(), dz, contiguous(dsum), summed, rstd, weight, after.A, before.B, out_z, dh, in_dz, N,
            before.scaling, after.seed, after.dropout, STREAM=dsum is not None, **ctx.sizes,
        )  # fmt: skip
        dB = lora_weight_gradient(sums, z, dh, scale=before.scaling, wide_first=True) if before else None
        sums.reduce()
        dB, dA = before.gradient_of_B(dB) if before else None, after.gradient_of_A(dA) if after else None
        return dh, dh if ctx.added else None, in_dz, dB, dA, None, None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h, y, z, before_B, before, needed):
        D, summed = h.shape[-1], torch.empty_like(h)
        N = h.numel() // D
        if needed:
            launch(
                _norm_forward, FORWARD_BLOCKS, lambda block: (cdiv(N, block["BM"]),),
                h, y, z, before.B, None, None, summed, None, None, None, N, before.scaling, 0.0, 0, 0.0,
                D=D, R=before.R, Z=16, Z_PADDED=16, ADD=True, LOW_RANK=True, NORM=False, PROJECT=False, DROP=False,
            )  # fmt: skip
        ctx.save_for_backward(z)
        ctx.before = before
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh):
        (z,), before, dh = ctx.saved_tensors, ctx.before, dh.contiguous()
        dy = dh.view(-1, dh.shape[-1])
        sums = PartialSums()
        dB = lora_weight_gradient(sums, z, dy, scale=before.scaling, wide_first=True)
        sums.reduce()
        dB = before.gradient_of_B(dB)
        return dh, dy, (dy @ before.B).mul_(before.scaling), dB, None, None


def add(h: Tensor, pending: Pending, needed: bool = True) -> Tensor:
    """Return ``h + y + scaling z B'``, for where no norm follows that could add it.

    Args:
        h: the residual stream, (N, D) or (B, S, D); the sum has its shape.
        pending: as in :func:`add_norm`.
        needed: False where a recomputation needs the sum's place in the graph but not its values.
    """
    y, z, before = pending
    if y is None:
        return h
    return _Add.apply(h, y, z, before.lora_B, before, needed) if before else h + y.view(h.shape)


def add_norm(
    h: Tensor, pending: Pending, weight: Tensor, eps: float, after: Adapter
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``(sum, x, z')`` as at the top of this file.

    Args:
        h: (N, D), the residual stream.
        pending: the output of the projection before, not yet added to h.
        weight, eps: the norm's.
        after: the adapter of the projection after.
    """
    y, z, before = pending
    return _AddNorm.apply(h, y, z, before.lora_B, after.lora_A, weight, eps, before, after)

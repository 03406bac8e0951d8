"""SwiGLU: from the fused gate/up product to the input of the down projection.

    g, u = (y + scaling z B')[:, :INNER], [:, INNER:]        x = silu(g) u        z' = dropout(x) A'

In the forward a program takes a block of rows and a part of the columns: as many parts as make two programs for each of
the GPU's multiprocessors. z' is then the sum of the parts'. More rows a program would be fewer programs, fewer rows
would read A and B more often.

In the backward a program takes a block of columns and a chunk of rows. The gradients of A and B, which are sums over
tokens, stay in its registers, so neither x nor dy is read again for them. The gradient of z, a sum over columns, is
written as one partial sum for each block of columns.

The backward computes g, u and x again from y and z; none of them is kept.

Shapes: N tokens, INNER intermediate size, y (N, 2 INNER), x (N, INNER).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adapter import Adapter, dot, dropout, keep_mask
from .launch import blocks, cdiv, contiguous, launch
from .reduce import PartialSums, sum_parts


@triton.jit
def _gate_and_up(y_ptr, zg, zu, B_ptr, at, col, inside, scaling, INNER: tl.constexpr, R: tl.constexpr,
                 LOW_RANK: tl.constexpr):  # fmt: skip
    """Return a tile of g and of u, float32 rounded to y's dtype."""
    dtype = y_ptr.dtype.element_ty
    g = tl.load(y_ptr + at * (2 * INNER) + col[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(y_ptr + at * (2 * INNER) + INNER + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if LOW_RANK:
        rank = tl.arange(0, R)
        B_at = B_ptr + col[None, :] * R + rank[:, None]
        g += scaling * dot(zg, tl.load(B_at, mask=(col < INNER)[None, :], other=0.0))
        u += scaling * dot(zu, tl.load(B_at + INNER * R, mask=(col < INNER)[None, :], other=0.0))
    return g.to(dtype).to(tl.float32), u.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "up_offset", "seed"])
def _swiglu_forward(
    y_ptr, z_ptr, B_ptr, A_ptr, x_ptr, out_z_ptr, n_rows, scaling, up_offset, seed, p,
    INNER: tl.constexpr, R: tl.constexpr, Z: tl.constexpr, R_OUT: tl.constexpr, LOW_RANK: tl.constexpr,
    PROJECT: tl.constexpr, DROP: tl.constexpr, PART: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < n_rows
    at = row.to(tl.int64)[:, None]
    dtype = y_ptr.dtype.element_ty
    zg, zu = at, at  # not read without LOW_RANK
    if LOW_RANK:
        rank = tl.arange(0, R)
        zg = tl.load(z_ptr + at * Z + rank[None, :], mask=live[:, None], other=0.0)
        zu = tl.load(z_ptr + at * Z + up_offset + rank[None, :], mask=live[:, None], other=0.0)
    k = tl.arange(0, R_OUT)
    out_z = tl.zeros([BM, R_OUT], tl.float32)
    first = tl.program_id(1) * PART
    for start in tl.range(0, PART, BN, num_stages=STAGES):
        col = first + start + tl.arange(0, BN)
        inside = live[:, None] & (col < INNER)[None, :]
        g, u = _gate_and_up(y_ptr, zg, zu, B_ptr, at, col, inside, scaling, INNER, R, LOW_RANK)
        x = ((g * tl.sigmoid(g)).to(dtype).to(tl.float32) * u).to(dtype)
        tl.store(x_ptr + at * INNER + col[None, :], x, mask=inside)
        if PROJECT:
            if DROP:
                x = dropout(x, seed, at * INNER + col[None, :], p)
            out_z += dot(x, tl.load(A_ptr + k[None, :] * INNER + col[:, None], mask=(col < INNER)[:, None], other=0.0))
    if PROJECT:
        out_at = out_z_ptr + (tl.program_id(1).to(tl.int64) * n_rows + at) * R_OUT + k[None, :]
        tl.store(out_at, out_z.to(out_z_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["n_rows", "chunk", "up_offset", "seed"])
def _swiglu_backward(
    dx_ptr, out_dz_ptr, y_ptr, z_ptr, B_ptr, A_ptr, dy_ptr, dz_ptr, dB_ptr, dA_ptr, n_rows, chunk, scaling, up_offset,
    seed, p, INNER: tl.constexpr, R: tl.constexpr, Z: tl.constexpr, R_OUT: tl.constexpr, LOW_RANK: tl.constexpr,
    PROJECT: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * chunk
    dtype = y_ptr.dtype.element_ty
    if LOW_RANK:
        rank = tl.arange(0, R)
        B_at = B_ptr + col[:, None] * R + rank[None, :]
        Bg = tl.load(B_at, mask=(col < INNER)[:, None], other=0.0)
        Bu = tl.load(B_at + INNER * R, mask=(col < INNER)[:, None], other=0.0)
        dBg, dBu = tl.zeros([BN, R], tl.float32), tl.zeros([BN, R], tl.float32)
    if PROJECT:
        k = tl.arange(0, R_OUT)
        A = tl.load(A_ptr + k[:, None] * INNER + col[None, :], mask=(col < INNER)[None, :], other=0.0)
        dA = tl.zeros([BN, R_OUT], tl.float32)
    for start in tl.range(0, chunk, BM, num_stages=STAGES):
        row = first + start + tl.arange(0, BM)
        live = (row < n_rows) & (row < first + chunk)
        at = row.to(tl.int64)[:, None]
        inside = live[:, None] & (col < INNER)[None, :]
        zg, zu = at, at
        if LOW_RANK:
            zg = tl.load(z_ptr + at * Z + rank[None, :], mask=live[:, None], other=0.0)
            zu = tl.load(z_ptr + at * Z + up_offset + rank[None, :], mask=live[:, None], other=0.0)
        g, u = _gate_and_up(y_ptr, zg, zu, B_ptr, at, col, inside, scaling, INNER, R, LOW_RANK)
        gate = tl.sigmoid(g)
        silu = (g * gate).to(dtype).to(tl.float32)
        dx = tl.load(dx_ptr + at * INNER + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if PROJECT:
            x = (silu * u).to(dtype)
            out_dz = tl.load(out_dz_ptr + at * R_OUT + k[None, :], mask=live[:, None], other=0.0)
            back = dot(out_dz, A)
            if DROP:
                stays = keep_mask(seed, at * INNER + col[None, :], p)
                back = tl.where(stays, back / (1.0 - p), 0.0)
                x = tl.where(stays, x.to(tl.float32) / (1.0 - p), 0.0).to(dtype)
            dx += back
            dA += dot(tl.trans(x), out_dz)
        du = (dx * silu).to(dtype)
        dg = (dx * u * gate * (1.0 + g * (1.0 - gate))).to(dtype)
        tl.store(dy_ptr + at * (2 * INNER) + col[None, :], dg, mask=inside)
        tl.store(dy_ptr + at * (2 * INNER) + INNER + col[None, :], du, mask=inside)
        if LOW_RANK:
            dBg += dot(tl.trans(dg), zg)
            dBu += dot(tl.trans(du), zu)
            dz_at = dz_ptr + (tl.program_id(0).to(tl.int64) * n_rows + at) * (2 * R) + rank[None, :]
            tl.store(dz_at, (dot(dg, Bg) * scaling).to(dtype), mask=live[:, None])
            tl.store(dz_at + R, (dot(du, Bu) * scaling).to(dtype), mask=live[:, None])
    if LOW_RANK:
        dB_at = dB_ptr + (tl.program_id(1) * (2 * INNER) + col)[:, None] * R + rank[None, :]
        tl.store(dB_at, dBg * scaling, mask=(col < INNER)[:, None])
        tl.store(dB_at + INNER * R, dBu * scaling, mask=(col < INNER)[:, None])
    if PROJECT:
        dA_at = dA_ptr + (tl.program_id(1) * R_OUT + k)[None, :] * INNER + col[:, None]
        tl.store(dA_at, dA, mask=(col < INNER)[:, None])


FORWARD_BLOCKS = blocks((64, 64, 4), (64, 64, 2), (64, 64, 1))
BACKWARD_BLOCKS = blocks((64, 64, 3), (64, 64, 2), (32, 64, 2), (32, 64, 1))
ROW_CHUNKS = 8
_PROGRAMS = 264
"""Programs of the forward that keep an H100 busy: two for each of its multiprocessors."""


def part_columns(N: int, INNER: int) -> int:
    """Return the columns of one part: two blocks or more, since ptxas 12.8 miscompiles loops that turn once."""
    rows, columns = FORWARD_BLOCKS[0]["BM"], FORWARD_BLOCKS[0]["BN"]  # the same in all blocks
    parts = max(1, min(_PROGRAMS // cdiv(N, rows), INNER // (2 * columns)))
    parts = 1 << (parts.bit_length() - 1)  # few different ones: each is compiled
    return cdiv(cdiv(INNER, parts), columns) * columns


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y, z, before_B, after_A, before, after, y_is_free):
        N, INNER = y.shape[0], y.shape[1] // 2
        ctx.sizes = {
            "INNER": INNER, "R": before.R, "Z": before.width, "R_OUT": after.R, "LOW_RANK": bool(before),
            "PROJECT": bool(after), "DROP": after.dropout > 0,
        }  # fmt: skip
        x, part = y.new_empty(N, INNER), part_columns(N, INNER)
        parts = cdiv(INNER, part)
        out_z = y.new_empty(parts, N, after.R, dtype=y.dtype if parts == 1 else torch.float32) if after else None
        launch(
            _swiglu_forward, FORWARD_BLOCKS, lambda block: (cdiv(N, block["BM"]), parts),
            y, z, before.B, after.A, x, out_z, N,
            before.scaling, before.offset(INNER), after.seed, after.dropout, PART=part, **ctx.sizes,
        )  # fmt: skip
        if out_z is not None:
            out_z = out_z[0] if parts == 1 else sum_parts(out_z, y.dtype)
        ctx.save_for_backward(y, z)
        ctx.before, ctx.after, ctx.y_is_free = before, after, y_is_free
        return x, out_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx, out_dz):
        (y, z), before, after, sizes = ctx.saved_tensors, ctx.before, ctx.after, ctx.sizes
        N, INNER, R = y.shape[0], sizes["INNER"], sizes["R"]
        columns = BACKWARD_BLOCKS[0]["BN"]  # the same in all blocks, and so are the rows of a chunk
        chunk = cdiv(cdiv(N, ROW_CHUNKS), BACKWARD_BLOCKS[0]["BM"]) * BACKWARD_BLOCKS[0]["BM"]
        parts, chunks, float32 = cdiv(INNER, columns), cdiv(N, chunk), torch.float32
        dy = y if ctx.y_is_free else torch.empty_like(y)  # one program reads a tile of y and writes it to dy
        dz: Any = None
        dB: Any = None
        dA: Any = None
        if before:
            dz, dB = y.new_empty(parts, N, 2, R), y.new_empty(chunks, 2 * INNER, R, dtype=float32)
        if after:
            dA = y.new_empty(chunks, after.R, INNER, dtype=float32)
        launch(
            _swiglu_backward, BACKWARD_BLOCKS, lambda block: (parts, chunks),
            dx.contiguous(), contiguous(out_dz), y, z, before.B, after.A, dy, dz, dB, dA, N, chunk,
            before.scaling, before.offset(INNER), after.seed, after.dropout, **sizes,
        )  # fmt: skip
        sums = PartialSums()
        if before:
            # with one segment gate and up read the same columns of z
            two = before.width == 2 * R
            dz = sums.add(dz.flatten(2), y.new_empty(N, 2 * R)) if two else dz.sum((0, 2))
            dB = sums.add(dB)
        if after:
            dA = sums.add(dA)
        sums.reduce()
        dB, dA = before.gradient_of_B(dB) if before else None, after.gradient_of_A(dA) if after else None
        return dy, dz, dB, dA, None, None, None


def swiglu(
    y: Tensor, z: Tensor | None, before: Adapter, after: Adapter, y_is_free: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return ``(x, z')`` as at the top of this file.

    Args:
        y: (N, 2 INNER), the frozen gate/up product.
        z, before: the projection's low-rank activations (N, k*R), or None, and its adapter.
        after: the adapter of the down projection.
        y_is_free: whether the backward may write y's gradient over y, which was recomputed for it alone.
    """
    return _SwiGLU.apply(y, z, before.lora_B, after.lora_A, before, after, y_is_free)

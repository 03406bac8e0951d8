"""Rotary embedding: add the low-rank part to the fused qkv product and rotate queries and keys.

    t = y + scaling z B'                         all of q, k and v
    q, k:  lo' = lo cos - hi sin                 lo, hi: components 0 .. n/2-1 and n/2 .. n-1 of a head
           hi' = hi cos + lo sin                 components n .. D-1 stay (Phi-4-mini rotates a part of a head)

A program has a few rows of one head. The halves are tiles of their own, since a tile cannot be permuted in
registers. cos and sin are the same numbers for both halves; only the first half's are read.

Layout of y (N, (H + 2 H_kv) * D): the heads of q, then of k, then of v. The output is one buffer with q (N, H, D), then
k (N, H_kv, D), then v, each contiguous, as attention's kernels want them.
Shapes: N tokens, H query heads, H_kv key and value heads, D head_dim, n rotary components.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adapter import Adapter, dot
from .launch import Block, cdiv, launch, next_power_of_2
from .low_rank import low_rank_gradients


@triton.jit
def _adapted_tile(y_at, B_at, z, live, scaling, WIDTH: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr,
                  LOW_RANK: tl.constexpr):  # fmt: skip
    """Return WIDTH columns of ``y + scaling z B'``, float32 rounded to y's dtype; y_at, B_at point to the first."""
    c = tl.arange(0, PADDED)
    t = tl.load(y_at + c[None, :], mask=live[:, None] & (c < WIDTH)[None, :], other=0.0)
    if LOW_RANK:
        rank = tl.arange(0, R)
        B = tl.load(B_at + c[None, :] * R + rank[:, None], mask=(c < WIDTH)[None, :], other=0.0)
        t = (t.to(tl.float32) + scaling * dot(z, B)).to(t.dtype)
    return t.to(tl.float32)


@triton.jit
def _place(head, n_rows, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr):
    """Return where a head begins in the output, and the distance between its rows."""
    before = tl.where(head < H, 0, tl.where(head < H + H_KV, H, H + H_KV))  # heads in the tensors before this head's
    stride = tl.where(head < H, H * D, H_KV * D)
    return before.to(tl.int64) * n_rows * D + (head - before) * D, stride


@triton.jit(do_not_specialize=["n_rows", "q_offset", "k_offset", "v_offset"])
def _rotary_forward(
    y_ptr, z_ptr, B_ptr, cos_ptr, sin_ptr, out_ptr, n_rows, scaling, q_offset, k_offset, v_offset,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr, R: tl.constexpr, Z: tl.constexpr, LOW_RANK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < n_rows
    COLUMNS: tl.constexpr = (H + 2 * H_KV) * D
    REST: tl.constexpr = D - 2 * HALF
    at = row.to(tl.int64)[:, None]
    base = at * COLUMNS + head * D
    start, stride = _place(head, n_rows, H, H_KV, D)
    out_at = out_ptr + tl.multiple_of(start, 16) + at * tl.multiple_of(stride, 16)
    dtype = y_ptr.dtype.element_ty
    z = at
    if LOW_RANK:
        offset = tl.where(head < H, q_offset, tl.where(head < H + H_KV, k_offset, v_offset))
        z = tl.load(z_ptr + at * Z + offset + tl.arange(0, R)[None, :], mask=live[:, None], other=0.0)
    B_at = B_ptr + head * D * R if LOW_RANK else y_ptr
    lo = _adapted_tile(y_ptr + base, B_at, z, live, scaling, HALF, HALF_PADDED, R, LOW_RANK)
    hi = _adapted_tile(y_ptr + base + HALF, B_at + HALF * R, z, live, scaling, HALF, HALF_PADDED, R, LOW_RANK)
    c = tl.arange(0, HALF_PADDED)
    inside = live[:, None] & (c < HALF)[None, :]
    rotates = inside & (head < H + H_KV)
    cos = tl.load(cos_ptr + at * (2 * HALF) + c[None, :], mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at * (2 * HALF) + c[None, :], mask=rotates, other=0.0).to(tl.float32)
    tl.store(out_at + c[None, :], (lo * cos - hi * sin).to(dtype), mask=inside)
    tl.store(out_at + HALF + c[None, :], (hi * cos + lo * sin).to(dtype), mask=inside)
    if REST > 0:
        r = tl.arange(0, REST_PADDED)
        skip: tl.constexpr = 2 * HALF
        rest = _adapted_tile(y_ptr + base + skip, B_at + skip * R, z, live, scaling, REST, REST_PADDED, R, LOW_RANK)
        tl.store(out_at + skip + r[None, :], rest.to(dtype), mask=live[:, None] & (r < REST)[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def _rotary_backward(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dy_ptr, n_rows,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < n_rows
    at = row.to(tl.int64)[:, None]
    SKIP: tl.constexpr = 2 * HALF
    dtype = dy_ptr.dtype.element_ty
    if head < H:
        d_ptr = dq_ptr + head * D
    elif head < H + H_KV:
        d_ptr = dk_ptr + (head - H) * D
    else:
        d_ptr = dv_ptr + (head - H - H_KV) * D
    stride = tl.multiple_of(tl.where(head < H, H * D, H_KV * D), 16)
    d_at = tl.multiple_of(d_ptr, 16) + at * stride  # a choice between pointers hides that each is aligned
    dy_at = dy_ptr + at * ((H + 2 * H_KV) * D) + head * D
    c = tl.arange(0, HALF_PADDED)
    inside = live[:, None] & (c < HALF)[None, :]
    lo = tl.load(d_at + c[None, :], mask=inside, other=0.0).to(tl.float32)
    hi = tl.load(d_at + HALF + c[None, :], mask=inside, other=0.0).to(tl.float32)
    rotates = inside & (head < H + H_KV)
    cos = tl.load(cos_ptr + at * SKIP + c[None, :], mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at * SKIP + c[None, :], mask=rotates, other=0.0).to(tl.float32)
    tl.store(dy_at + c[None, :], (lo * cos + hi * sin).to(dtype), mask=inside)
    tl.store(dy_at + HALF + c[None, :], (hi * cos - lo * sin).to(dtype), mask=inside)
    if D > SKIP:
        c = tl.arange(0, REST_PADDED)
        inside = live[:, None] & (c < D - SKIP)[None, :]
        tl.store(dy_at + SKIP + c[None, :], tl.load(d_at + SKIP + c[None, :], mask=inside), mask=inside)


BLOCKS: list[Block] = [{"BM": 32, "num_warps": 4}]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y, z, before_B, cos, sin, heads, kv_heads, before):
        N, D, half = y.shape[0], y.shape[1] // (heads + 2 * kv_heads), cos.shape[1] // 2
        ctx.sizes = {
            "H": heads, "H_KV": kv_heads, "D": D, "HALF": half, "HALF_PADDED": next_power_of_2(max(16, half)),
            "REST_PADDED": next_power_of_2(max(16, D - 2 * half)),
        }  # fmt: skip
        ctx.edges = (0, heads * D, (heads + kv_heads) * D)  # the first column of q, of k, of v
        out = torch.empty_like(y)
        launch(
            _rotary_forward, BLOCKS, lambda block: (cdiv(N, block["BM"]), heads + 2 * kv_heads),
            y, z, before.B, cos, sin, out, N, before.scaling, *map(before.offset, ctx.edges),
            R=before.R, Z=before.width, LOW_RANK=bool(before), **ctx.sizes,
        )  # fmt: skip
        ctx.save_for_backward(z, cos, sin)
        ctx.before = before
        sizes = [N * heads * D, N * kv_heads * D, N * kv_heads * D]
        return tuple(part.view(N, -1, D) for part in out.view(-1).split(sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq, dk, dv):
        (z, cos, sin), before, sizes = ctx.saved_tensors, ctx.before, ctx.sizes
        N, heads = dq.shape[0], sizes["H"] + 2 * sizes["H_KV"]
        dy = dq.new_empty(N, heads * sizes["D"])
        launch(
            _rotary_backward, BLOCKS, lambda block: (cdiv(N, block["BM"]), heads),
            dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin, dy, N, **sizes,
        )  # fmt: skip
        dz, dB = low_rank_gradients(dy, z, before, ctx.edges) if before else (None, None)
        return dy, dz, dB, None, None, None, None, None


def rotate(
    y: Tensor, z: Tensor | None, before: Adapter, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(q, k, v)``, (N, heads, head_dim) each, contiguous.

    Args:
        y: (N, (heads + 2 kv_heads) * head_dim), the frozen qkv product.
        z, before: the projection's low-rank activations (N, k*R), or None, and its adapter.
        cos, sin: (N, n), for each token's position, in y's dtype.
    """
    return _Rotate.apply(y, z, before.lora_B, cos, sin, heads, kv_heads, before)

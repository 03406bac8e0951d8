"""The low-rank products that no other kernel contains: z = dropout(x) A', dx += mask(dz A), gradients of A and B.

Every gradient of A or B is a narrow matrix transposed times a wide one, summed over the tokens. Each program takes a
block of columns and a chunk of rows and keeps the sum in registers; the few partial sums are added afterwards, in a
fixed order.

Shapes: N tokens, D features of the wide matrix, K columns of the narrow one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapter import NO_ADAPTER, Adapter, dot, dropout, keep_mask
from .launch import Block, blocks, cdiv, launch, next_power_of_2
from .reduce import PartialSums

ROW_CHUNKS = 11
"""Number of chunks that the rows are cut into for a sum over tokens: 24 blocks of 3,072 columns by 11 are two programs
for each of an H100's 132 multiprocessors."""

SUM_BLOCKS = blocks((64, 128, 2), (64, 64, 2), (32, 64, 1))
GRADIENT_BLOCKS: list[Block] = [
    {"BM": m, "STAGES": stages, "num_warps": 4} for m, stages in ((64, 3), (64, 2), (32, 1))
]
_ROWS = 64  # a chunk is a multiple of it, whichever block is taken
_NARROW = 64  # columns of the narrow matrix that one program takes


@triton.jit(do_not_specialize=["n_rows", "chunk", "seed"])
def _lora_weight_gradient(
    narrow_ptr, wide_ptr, rstd_ptr, weight_ptr, out_ptr, n_rows, chunk, seed, p,
    stride: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr,
    NORM: tl.constexpr, DROP: tl.constexpr, WIDE_FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(2) * K_BLOCK + tl.arange(0, K_BLOCK)
    first = tl.program_id(1) * chunk
    total = tl.zeros([BN, K_BLOCK], tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    for start in tl.range(0, chunk, BM, num_stages=STAGES):
        row = first + start + tl.arange(0, BM)
        live = (row < n_rows) & (row < first + chunk)
        at = row.to(tl.int64)[:, None]
        wide = tl.load(wide_ptr + at * D + col[None, :], mask=live[:, None] & (col < D)[None, :], other=0.0)
        if NORM:
            rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
            normed = (wide.to(tl.float32) * rstd[:, None]).to(wide.dtype).to(tl.float32)
            wide = (normed * weight[None, :]).to(wide.dtype)
        if DROP:
            wide = dropout(wide, seed, at * D + col[None, :], p)
        narrow = tl.load(narrow_ptr + at * stride + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        total += dot(tl.trans(wide), narrow)
    at = tl.program_id(1) * D + col
    out = out_ptr + (
        at[:, None] * K + k[None, :] if WIDE_FIRST else (tl.program_id(1) * K + k)[None, :] * D + col[:, None]
    )
    tl.store(out, total, mask=(k < K)[None, :] & (col < D)[:, None])


def lora_weight_gradient(
    sums: PartialSums, narrow: Tensor, wide: Tensor, adapter: Adapter = NO_ADAPTER, rstd: Tensor | None = None,
    weight: Tensor | None = None, scale: float = 1.0, wide_first: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``scale * narrow' f(wide)``, (K, D) float32, or its transpose with ``wide_first``.

    The numbers are there after ``sums.reduce()``.

    Args:
        narrow: (N, K).
        wide: (N, D).
        adapter: f applies its dropout.
        rstd, weight: (N,) and (D,): f applies RMSNorm before dropout; None: no norm.
    """
    (N, D), K, p = wide.shape, narrow.shape[1], adapter.dropout
    chunk = cdiv(cdiv(N, ROW_CHUNKS), _ROWS) * _ROWS
    chunks, at_once = cdiv(N, chunk), min(_NARROW, next_power_of_2(K))
    shape = (D, K) if wide_first else (K, D)
    partial = torch.empty(chunks, *shape, dtype=torch.float32, device=wide.device)
    launch(
        _lora_weight_gradient, SUM_BLOCKS, lambda block: (cdiv(D, block["BN"]), chunks, cdiv(K, at_once)),
        narrow, wide, rstd, weight, partial, N, chunk, adapter.seed, p,
        stride=narrow.stride(0), D=D, K=K, K_BLOCK=at_once, NORM=rstd is not None, DROP=p > 0, WIDE_FIRST=wide_first,
    )  # fmt: skip
    return sums.add(partial, scale=scale)


@triton.jit(do_not_specialize=["n_rows", "chunk", "offset_0", "offset_1", "offset_2"])
def _low_rank_gradients(
    dy_ptr, z_ptr, B_ptr, dz_ptr, dB_ptr, n_rows, chunk, scaling, offset_0, offset_1, offset_2,
    D: tl.constexpr, EDGE_1: tl.constexpr, EDGE_2: tl.constexpr, R: tl.constexpr, Z: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    rank = tl.arange(0, R)
    first_col = tl.program_id(0) * BN
    offset = tl.where(first_col < EDGE_1, offset_0, tl.where(first_col < EDGE_2, offset_1, offset_2))
    z_at = z_ptr + tl.multiple_of(offset, 16) + rank[None, :]
    B = tl.load(B_ptr + col[:, None] * R + rank[None, :])
    dB = tl.zeros([BN, R], tl.float32)
    first = tl.program_id(1) * chunk
    for start in tl.range(0, chunk, BM, num_stages=STAGES):
        row = first + start + tl.arange(0, BM)
        live = (row < n_rows) & (row < first + chunk)
        at = row.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + at * D + col[None, :], mask=live[:, None], other=0.0)
        z = tl.load(z_at + at * Z, mask=live[:, None], other=0.0)
        dB += dot(tl.trans(dy), z)
        dz_at = dz_ptr + (tl.program_id(0).to(tl.int64) * n_rows + at) * R + rank[None, :]
        tl.store(dz_at, dot(dy, B).to(dz_ptr.dtype.element_ty), mask=live[:, None])
    tl.store(dB_ptr + (tl.program_id(1) * D + col)[:, None] * R + rank[None, :], dB * scaling)


def low_rank_gradients(dy: Tensor, z: Tensor, adapter: Adapter, edges: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return ``scaling * dy B`` (N, k*R) and ``scaling * dy' z`` in ``lora_B``'s shape, reading dy (N, out) once.

    Args:
        edges: the first columns of q, k and v in the output. A program takes columns of one of them.
    """
    (N, D), R = dy.shape, adapter.R
    BN = math.gcd(128, D, *edges)
    chunk = cdiv(cdiv(N, ROW_CHUNKS), _ROWS) * _ROWS
    dz = dy.new_empty(D // BN, N, R)
    dB = dy.new_empty(cdiv(N, chunk), D, R, dtype=torch.float32)
    launch(
        _low_rank_gradients, GRADIENT_BLOCKS, lambda block: (D // BN, len(dB)),
        dy, z, adapter.B, dz, dB, N, chunk, adapter.scaling, *map(adapter.offset, edges), D=D, EDGE_1=edges[1],
        EDGE_2=edges[2], R=R, Z=adapter.width, BN=BN,
    )  # fmt: skip
    total, sums = torch.empty_like(z), PartialSums()
    for segment in adapter.segments:
        start, stop = segment.columns.start // BN, segment.columns.stop // BN
        sums.add(dz[start:stop], total[:, segment.rows_of_A], adapter.scaling)
    summed = sums.add(dB)
    sums.reduce()
    return total, adapter.gradient_of_B(summed)


@triton.jit(do_not_specialize=["n_rows", "seed"])
def _project(
    x_ptr, A_ptr, z_ptr, n_rows, seed, p, D: tl.constexpr, Z: tl.constexpr, Z_PADDED: tl.constexpr,
    DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, Z_PADDED)
    at = row.to(tl.int64)[:, None]
    z = tl.zeros([BM, Z_PADDED], tl.float32)
    for start in tl.range(0, D, BN, num_stages=STAGES):
        col = start + tl.arange(0, BN)
        x = tl.load(x_ptr + at * D + col[None, :], mask=(row < n_rows)[:, None] & (col < D)[None, :], other=0.0)
        if DROP:
            x = dropout(x, seed, at * D + col[None, :], p)
        A = tl.load(A_ptr + k[None, :] * D + col[:, None], mask=(k < Z)[None, :] & (col < D)[:, None], other=0.0)
        z += dot(x, A)
    tl.store(z_ptr + at * Z + k[None, :], z.to(z_ptr.dtype.element_ty), mask=(row < n_rows)[:, None] & (k < Z)[None, :])


def project(x: Tensor, adapter: Adapter) -> Tensor:
    """Return z = dropout(x) A' (N, k*R) of x (N, in)."""
    if not adapter.dropout:
        return x @ adapter.A.t()
    N, D = x.shape
    z = x.new_empty(N, adapter.width)
    launch(
        _project, blocks((32, 64, 2)), lambda block: (cdiv(N, block["BM"]),),
        x, adapter.A, z, N, adapter.seed, adapter.dropout, D=D, Z=adapter.width,
        Z_PADDED=next_power_of_2(adapter.width), DROP=True,
    )  # fmt: skip
    return z


@triton.jit(do_not_specialize=["n_rows", "seed"])
def _project_backward(
    dx_ptr, dz_ptr, A_ptr, n_rows, seed, p, D: tl.constexpr, Z: tl.constexpr, Z_PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, Z_PADDED)
    at = row.to(tl.int64)[:, None]
    inside = (row < n_rows)[:, None] & (col < D)[None, :]
    dz = tl.load(dz_ptr + at * Z + k[None, :], mask=(row < n_rows)[:, None] & (k < Z)[None, :], other=0.0)
    A = tl.load(A_ptr + k[:, None] * D + col[None, :], mask=(k < Z)[:, None] & (col < D)[None, :], other=0.0)
    back = tl.where(keep_mask(seed, at * D + col[None, :], p), dot(dz, A) / (1.0 - p), 0.0)
    dx = tl.load(dx_ptr + at * D + col[None, :], mask=inside, other=0.0)
    tl.store(dx_ptr + at * D + col[None, :], (dx.to(tl.float32) + back).to(dx.dtype), mask=inside)


def project_backward_(dx: Tensor, dz: Tensor, adapter: Adapter) -> Tensor:
    """Add mask(dz A) to dx (N, in) in place; dz (N, k*R)."""
    if not adapter.dropout:
        return dx.addmm_(dz, adapter.A)
    N, D = dx.shape
    launch(
        _project_backward, [{"BM": 64, "BN": 128, "num_warps": 4}, {"BM": 32, "BN": 64, "num_warps": 4}],
        lambda block: (cdiv(N, block["BM"]), cdiv(D, block["BN"])),
        dx, dz, adapter.A, N, adapter.seed, adapter.dropout, D=D, Z=adapter.width,
        Z_PADDED=next_power_of_2(adapter.width),
    )  # fmt: skip
    return dx

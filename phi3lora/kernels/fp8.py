"""A matrix rounded to fp8, with a scale for each row: ``x = scale * q``; a row's largest entry becomes e4m3's largest.

Shapes: N rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2

LARGEST = 448.0
"""Largest number of float8_e4m3fn."""
_SCALES_READ = 256  # rows of a tile, whose scales torch._scaled_mm reads even past the last row


@triton.jit
def _quantize(x_ptr, factor_ptr, q_ptr, scale_ptr, D: tl.constexpr, D_PADDED: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, D_PADDED)
    x = tl.load(x_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + col, mask=col < D, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-30) / LARGEST
    tl.store(q_ptr + row * D + col, (x / scale).to(q_ptr.dtype.element_ty), mask=col < D)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``(q, scale)`` of x, or of ``x * factor``: float8_e4m3fn (N, D) and float32 (N, 1).

    A row that is not finite stays so.

    Args:
        x: (N, D), contiguous.
        factor: float32, D numbers, one a column.
    """
    N, D = x.shape
    q = torch.empty(N, D, dtype=torch.float8_e4m3fn, device=x.device)
    # https://github.com/pytorch/pytorch/issues/133334
    scale = torch.empty(cdiv(N, _SCALES_READ) * _SCALES_READ, 1, dtype=torch.float32, device=x.device)[:N]
    launch(
        _quantize, [{"num_warps": 8}], lambda block: (N,),
        x, factor, q, scale, D=D, D_PADDED=next_power_of_2(D), LARGEST=LARGEST,
    )  # fmt: skip
    return q, scale


@triton.jit
def _transpose(q_ptr, out_ptr, M, K, BM: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (row < M)[:, None] & (col < K)[None, :]
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * K + col[None, :], mask=inside, other=0)
    tl.store(out_ptr + col.to(tl.int64)[:, None] * M + row[None, :], tl.trans(q), mask=tl.trans(inside))


def transpose(q: Tensor) -> Tensor:
    """Return q (M, K), of any 8-bit dtype, transposed and contiguous (K, M)."""
    M, K = q.shape
    out = torch.empty(K, M, dtype=q.dtype, device=q.device)
    launch(
        _transpose, [{"BM": 128, "BN": 128, "num_warps": 4}],
        lambda block: (cdiv(M, block["BM"]), cdiv(K, block["BN"])), q.view(torch.uint8), out.view(torch.uint8), M, K,
    )  # fmt: skip
    return out

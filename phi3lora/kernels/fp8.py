"""A matrix rounded to fp8, with a scale for each row: ``x = scale * q``; a row's largest entry becomes e4m3's largest.

Shapes: N rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2

LARGEST = 448.0
"""Largest number of float8_e4m3fn."""


@triton.jit
def _quantize(x_ptr, q_ptr, scale_ptr, D: tl.constexpr, D_PADDED: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, D_PADDED)
    x = tl.load(x_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / LARGEST
    tl.store(q_ptr + row * D + col, (x / scale).to(q_ptr.dtype.element_ty), mask=col < D)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(q, scale)``: float8_e4m3fn (N, D) and float32 (N, 1). A row that is not finite stays so."""
    N, D = x.shape
    q = torch.empty(N, D, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(N, 1, dtype=torch.float32, device=x.device)
    launch(
        _quantize, [{"num_warps": 8}], lambda block: (N,),
        x, q, scale, D=D, D_PADDED=next_power_of_2(D), LARGEST=LARGEST,
    )  # fmt: skip
    return q, scale

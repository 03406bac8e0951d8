"""Dequantisation of an nf4 weight in one kernel; bitsandbytes takes two kernels and six small steps on the host.

    scale of a block of 64   s = code2[absmax] * absmax2[block // 256] + offset       "double quantisation", float32
    weight                   w = code[nibble] * s, rounded once; the high nibble of a byte first

    for fp8 products         q = code[nibble] * (s / row_scale), float8_e4m3fn, or its transpose

The weight is the same as ``bitsandbytes.functional.dequantize_4bit``'s, bit for bit: no product is fused with the sum
after it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch


@triton.jit
def _dequantize(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr, n_blocks,
    BYTES: tl.constexpr, BLOCK2: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BM + tl.arange(0, BM)
    live = block < n_blocks
    at = block.to(tl.int64)[:, None]
    scale = tl.load(code2_ptr + tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32))
    scale = scale * tl.load(absmax2_ptr + block // BLOCK2, mask=live, other=0.0) + tl.load(offset_ptr)
    packed = tl.load(packed_ptr + at * BYTES + tl.arange(0, BYTES)[None, :], mask=live[:, None], other=0).to(tl.int32)
    high = tl.load(code_ptr + (packed >> 4)) * scale[:, None]
    low = tl.load(code_ptr + (packed & 15)) * scale[:, None]
    weight = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :], weight, mask=live[:, None])


@triton.jit
def _dequantize_to_fp8(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, row_scale_ptr, out_ptr, out_rows,
    IN: tl.constexpr, BYTES: tl.constexpr, BLOCK2: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < out_rows
    block = row * (IN // (2 * BYTES)) + tl.program_id(1)
    scale = tl.load(code2_ptr + tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32))
    scale = scale * tl.load(absmax2_ptr + block // BLOCK2, mask=live, other=0.0) + tl.load(offset_ptr)
    scale /= tl.load(row_scale_ptr + row, mask=live, other=1.0)
    at = block.to(tl.int64)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    packed = tl.load(packed_ptr + at, mask=live[:, None], other=0).to(tl.int32)
    high = tl.load(code_ptr + (packed >> 4)) * scale[:, None]
    low = tl.load(code_ptr + (packed & 15)) * scale[:, None]
    q = tl.interleave(high, low).to(out_ptr.dtype.element_ty)  # (BM, 2 * BYTES)
    col = (tl.program_id(1) * (2 * BYTES) + tl.arange(0, 2 * BYTES)).to(tl.int64)
    if TRANSPOSED:
        tl.store(out_ptr + col[:, None] * out_rows + row[None, :], tl.trans(q), mask=live[None, :])
    else:
        tl.store(out_ptr + row.to(tl.int64)[:, None] * IN + col[None, :], q, mask=live[:, None])


def is_supported(packed: Tensor, state: Any) -> bool:
    """Return whether :func:`dequantize` reads this weight: nf4, doubly quantised, in whole blocks of bytes."""
    return bool(
        state.nested
        and state.quant_type == "nf4"
        and packed.dtype == torch.uint8
        and 2 * packed.numel() % state.blocksize == 0
    )


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """Return the weight (out, in) in the dtype it had.

    Args:
        packed: (out * in / 2, 1) uint8, a plain tensor.
        state: its ``bitsandbytes.functional.QuantState``, one that :func:`is_supported`.
    """
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    n_blocks, nested = 2 * packed.numel() // state.blocksize, state.state2
    launch(
        _dequantize, [{"BM": 64, "num_warps": 4, "enable_fp_fusion": False}],
        lambda block: (cdiv(n_blocks, block["BM"]),),
        packed, state.absmax, state.code, nested.code, nested.absmax, state.offset, out, n_blocks,
        BYTES=state.blocksize // 2, BLOCK2=nested.blocksize,
    )  # fmt: skip
    return out


def dequantize_to_fp8(
    packed: Tensor, state: Any, row_scale: Tensor, transposed: bool, dtype: torch.dtype = torch.float8_e4m3fn
) -> Tensor:
    """Return ``W / row_scale`` as float8, (out, in), or its transpose.

    Args:
        packed, state: as in :func:`dequantize`; ``in`` is a multiple of the block size.
        row_scale: float32 (out, 1).
        dtype: float32 in tests on a CPU, where Triton's interpreter rounds float8 in its own way.
    """
    out_rows, width = state.shape
    size = (width, out_rows) if transposed else (out_rows, width)
    out = torch.empty(size, dtype=dtype, device=packed.device)
    nested = state.state2
    launch(
        _dequantize_to_fp8, [{"BM": 128, "num_warps": 4}],
        lambda block: (cdiv(out_rows, block["BM"]), width // state.blocksize),
        packed, state.absmax, state.code, nested.code, nested.absmax, state.offset, row_scale, out, out_rows,
        IN=width, BYTES=state.blocksize // 2, BLOCK2=nested.blocksize, TRANSPOSED=transposed,
    )  # fmt: skip
    return out

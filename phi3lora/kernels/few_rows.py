"""The product of a few rows and a frozen weight, as fast as memory delivers the weight: most of a decoded token's time.

    y = x W'        z = x A'                A (Z, K): the adapter's, in programs of the same launch

A program takes BN rows of W, or of A, and one of SPLITS parts of their K columns. The kernel that reads y and z adds up
the parts. One row of x is multiplied element by element; 2 to 16 rows go through tensor cores. Above that, cuBLAS is as
fast. One row and an nf4 weight go through bitsandbytes' kernel; more rows and other formats through ``matmul``.

Shapes: M rows, K and N columns of x and y, W (N, K), Z rows of A.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora.weight_formats import BaseWeight, Dense, Nf4
from .adapter import NO_ADAPTER, Adapter, dot
from .launch import Block, cdiv, launch

ROW_BLOCKS: list[Block] = [{"BN": 2, "BK": 1024, "num_warps": 4}]
FEW_ROWS_BLOCKS: list[Block] = [{"BN": 64, "BK": 128, "STAGES": stages, "num_warps": 4} for stages in (4, 2, 1)]
_FEW = 16
_MULTIPROCESSORS = 132  # of an H100; with fewer programs the columns are split


@triton.jit
def _rows_of_matrix(w_ptr, A_ptr, N, Z, K: tl.constexpr, BN: tl.constexpr):
    """Return whether a program has rows of A or of W, which ones, which of them exist, and where they begin."""
    programs_of_A = tl.cdiv(Z, BN)
    program = tl.program_id(0)
    of_A = program < programs_of_A
    n = tl.where(of_A, program, program - programs_of_A) * BN + tl.arange(0, BN)
    live = n < tl.where(of_A, Z, N)
    if of_A:  # noqa: SIM108  # a Triton kernel
        matrix = A_ptr
    else:
        matrix = w_ptr
    # A choice between pointers hides that each is aligned.
    at = tl.multiple_of(matrix, 16) + n.to(tl.int64)[:, None] * K
    return of_A, n, live, at


@triton.jit
def _row_product(
    x_ptr, w_ptr, A_ptr, y_ptr, z_ptr, N, Z, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    of_A, n, live_n, w_at = _rows_of_matrix(w_ptr, A_ptr, N, Z, K, BN)
    total = tl.zeros([BN, BK], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(w_at + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    sums = tl.sum(total, 1).to(y_ptr.dtype.element_ty)
    if of_A:
        tl.store(z_ptr + n, sums, mask=live_n)
    else:
        tl.store(y_ptr + n, sums, mask=live_n)


@triton.jit(do_not_specialize=["n_rows"])
def _few_rows_product(
    x_ptr, w_ptr, A_ptr, y_ptr, z_ptr, n_rows, N, Z, K: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = (K + SPLITS - 1) // SPLITS
    part, row = tl.program_id(1), tl.arange(0, BM)
    live_row = row < n_rows
    of_A, n, live_n, w_at = _rows_of_matrix(w_ptr, A_ptr, N, Z, K, BN)
    total = tl.zeros([BM, BN], tl.float32)
    last = tl.minimum((part + 1) * PART, K)
    for start in tl.range(part * PART, last, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        live_k = k < last
        w = tl.load(w_at + k[None, :], mask=live_n[:, None] & live_k[None, :], other=0.0)
        x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=live_row[:, None] & live_k[None, :], other=0.0)
        total += dot(x, tl.trans(w))
    at = (part * n_rows + row)[:, None]
    mask = live_row[:, None] & live_n[None, :]
    sums = total.to(y_ptr.dtype.element_ty)
    if of_A:
        tl.store(z_ptr + at * Z + n[None, :], sums, mask=mask)
    else:
        tl.store(y_ptr + at * N + n[None, :], sums, mask=mask)


def product(x: Tensor, weight: BaseWeight, adapter: Adapter = NO_ADAPTER) -> tuple[Tensor, Tensor | None]:
    """Return ``x W'`` (parts, M, N) and ``x A'`` (parts, M, Z), None without an adapter; their parts are to be added.

    Args:
        x: (M, K), contiguous.
    """
    dense = weight.weight if isinstance(weight, Dense) else None
    if dense is not None and len(x) <= _FEW and dense.dtype == x.dtype and dense.is_contiguous():
        return _launch(x, dense, adapter)
    if isinstance(weight, Nf4) and x.is_cuda and len(x) == 1 and not weight.state.nested:
        s = weight.state
        y = torch.ops.bitsandbytes.gemv_4bit(x, weight.packed, s.shape, s.absmax, s.code, s.blocksize)
        return y[None], _launch(x, adapter.A, NO_ADAPTER)[0] if adapter else None
    return weight.matmul(x)[None], (x @ adapter.A.t())[None] if adapter else None


def _launch(x: Tensor, weight: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
    (M, K), N, Z = x.shape, len(weight), adapter.width if adapter else 0
    splits = 1 if M == 1 or cdiv(N, FEW_ROWS_BLOCKS[0]["BN"]) >= _MULTIPROCESSORS else 2
    dtype = x.dtype if splits == 1 else torch.float32
    y, z = x.new_empty(splits, M, N, dtype=dtype), x.new_empty(splits, M, Z, dtype=dtype) if adapter else None
    tensors = (x, weight, adapter.A if adapter else weight, y, z if adapter else y)

    def grid(block: Block) -> tuple[int, ...]:
        return cdiv(Z, block["BN"]) + cdiv(N, block["BN"]), splits

    if M == 1:
        launch(_row_product, ROW_BLOCKS, grid, *tensors, N, Z, K=K)
    else:
        launch(_few_rows_product, FEW_ROWS_BLOCKS, grid, *tensors, M, N, Z, K=K, BM=_FEW, SPLITS=splits)
    return y, z


def with_plain_scales(weight: BaseWeight) -> BaseWeight:
    """Return an nf4 weight whose scales are plain float32, for :func:`product`; other weights as they are.

    Doubly quantised scales would be written out at every product. It takes 0.06 bytes for each entry of the weight.
    """
    if not isinstance(weight, Nf4) or not weight.state.nested or weight.state.shape[1] % weight.state.blocksize:
        return weight
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    s = weight.state
    absmax = (dequantize_blockwise(s.absmax, s.state2) + s.offset).float()
    options = {"shape": s.shape, "code": s.code, "blocksize": s.blocksize, "quant_type": s.quant_type, "dtype": s.dtype}
    return Nf4(weight.packed, QuantState(absmax=absmax, **options))

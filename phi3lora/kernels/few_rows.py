"""The product of a few rows and a frozen weight, as fast as memory delivers the weight: most of a decoded token's time.

    y = x W'        z = x A'                A (Z, K): the adapter's, in programs of the same launch

A program takes BN rows of W, or of A, and one of SPLITS parts of their K columns. The kernel that reads y and z adds up
the parts. One row of x is multiplied element by element; 2 to 16 rows go through tensor cores. Above that, cuBLAS is as
fast. Other formats go through ``matmul``.

An nf4 weight is multiplied by one 16-bit row from its packed form (nf4.py has the formula). A word of 32 bits holds
eight neighbours of a row of W. Looking each of them up in memory would take longer than reading them. ``prmt`` looks up
four at a time, in registers: it picks four bytes among eight by four selectors of 4 bits. The table in float16 has 16
entries of two bytes, so four lookups (high or low bytes, entries 0-7 or 8-15) and a choice by each nibble's top bit,
also a ``prmt``, give four values. https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-prmt

Shapes: M rows, K and N columns of x and y, W (N, K), Z rows of A.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora.weight_formats import BaseWeight, Dense, Nf4
from .adapter import NO_ADAPTER, Adapter, dot
from .launch import Block, cdiv, launch

NF4_BLOCKS: list[Block] = [{"BN": 4, "WORDS": 128, "num_warps": 4}]
ROW_BLOCKS: list[Block] = [{"BN": 2, "BK": 1024, "num_warps": 4}]
FEW_ROWS_BLOCKS: list[Block] = [{"BN": 64, "BK": 128, "STAGES": stages, "num_warps": 4} for stages in (4, 2, 1)]
_FEW = 16
_MULTIPROCESSORS = 132  # of an H100; with fewer programs the columns are split

_NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _decoding_instructions() -> str:
    """Return PTX that turns a word of eight nf4 nibbles, $8, into float32 values without scale, $0 to $7.

    $9 to $16 are the table, its high bytes first.
    """
    lines = ["and.b32 s, $8, 0x77777777;", "shr.u32 t, $8, 1;", "lop3.b32 t, t, 0x44444444, 0x32103210, 0xEA;"]
    for first in (0, 4):
        for name, (a, b, c, d) in (("hi", ("$9", "$10", "$11", "$12")), ("lo", ("$13", "$14", "$15", "$16"))):
            lines += [f"prmt.b32 a, {a}, {b}, s;", f"prmt.b32 b, {c}, {d}, s;", f"prmt.b32 {name}, a, b, t;"]
        for selector, column in (("0x7351", first), ("0x6240", first + 1)):  # a byte's high half comes first
            lines += [f"prmt.b32 a, lo, hi, {selector};", "mov.b32 {e, f}, a;"]
            lines += [f"cvt.f32.f16 ${column}, e;", f"cvt.f32.f16 ${column + 2}, f;"]
        lines += ["shr.u32 s, s, 16;", "shr.u32 t, t, 16;"]
    return "{ .reg .b32 s, t, a, b, hi, lo; .reg .b16 e, f; " + " ".join(lines) + " }"


_DECODE = tl.constexpr(_decoding_instructions())
_DECODED = tl.constexpr(",".join(8 * ["=&f"] + 9 * ["r"]))  # &: written before all inputs are read
_BYTES = struct.pack("16e", *_NF4_CODE)
_TABLE = struct.unpack("8i", _BYTES[1::2] + _BYTES[::2])
"""The table in float16: the high bytes of its 16 entries in four words, then their low bytes. As arguments of a kernel
they stay in registers; ptxas would load constants again for each word."""


@triton.jit
def _dot_rows(x_ptr, w_at, live_n, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Return the products of a row x and BN rows, float32."""
    total = tl.zeros([BN, BK], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(w_at + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def _pair(x_ptr, at, live):
    """Load two neighbours of a 16-bit row, as float32."""
    dtype = x_ptr.dtype.element_ty
    pair = tl.load(x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + at, mask=live, other=0)
    lo, hi = pair.to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    return lo.to(tl.float32), hi.to(tl.float32)


@triton.jit
def _nf4_row_product(
    x_ptr, packed_ptr, absmax_ptr, A_ptr, y_ptr, z_ptr, Z, t0, t1, t2, t3, t4, t5, t6, t7, N: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Take the same word of BN rows of W in each thread. WORDS is the number of threads: none waits before the sums.

    With several words for a thread, Triton would load them in one layout and the row in another, and exchange both
    through shared memory, with 18 barriers a pass.
    """
    ROW: tl.constexpr = K // 8
    programs_of_A = tl.cdiv(Z, 2)
    if tl.program_id(0) < programs_of_A:
        n = tl.program_id(0) * 2 + tl.arange(0, 2)
        sums = _dot_rows(x_ptr, A_ptr + n[:, None] * K, n < Z, K, 2, 1024)
        tl.store(z_ptr + n, sums.to(z_ptr.dtype.element_ty), mask=n < Z)
        return
    first = (tl.program_id(0) - programs_of_A) * BN
    words = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first.to(tl.int64) * ROW
    scales = absmax_ptr + first.to(tl.int64) * (K // BLOCK)
    totals = (tl.zeros([WORDS], tl.float32),) * BN
    for start in range(0, ROW, WORDS):
        word = start + tl.arange(0, WORDS)
        live = word < ROW
        x0, x1 = _pair(x_ptr, 4 * word, live)
        x2, x3 = _pair(x_ptr, 4 * word + 1, live)
        x4, x5 = _pair(x_ptr, 4 * word + 2, live)
        x6, x7 = _pair(x_ptr, 4 * word + 3, live)
        sums = ()
        for i in tl.static_range(BN):
            inside = live & ((N % BN == 0) | (first + i < N))
            packed = tl.load(words + i * ROW + word, mask=inside, other=0)
            scale = tl.load(scales + i * (K // BLOCK) + word // (BLOCK // 8), mask=inside, other=0.0)
            w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
                _DECODE, _DECODED, [packed, t0, t1, t2, t3, t4, t5, t6, t7], (tl.float32,) * 8, is_pure=True, pack=1
            )  # fmt: skip
            product = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + w4 * x4 + w5 * x5 + w6 * x6 + w7 * x7
            sums += (totals[i] + product * scale,)
        totals = sums
    for i in tl.static_range(BN):
        tl.store(y_ptr + first + i, tl.sum(totals[i], 0).to(y_ptr.dtype.element_ty), mask=first + i < N)


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
    sums = _dot_rows(x_ptr, w_at, live_n, K, BN, BK).to(y_ptr.dtype.element_ty)
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
    if isinstance(weight, Nf4) and x.is_cuda and len(x) == 1:
        return _nf4_row(x, weight, adapter)
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


def _nf4_row(x: Tensor, weight: Nf4, adapter: Adapter = NO_ADAPTER) -> tuple[Tensor, Tensor | None]:
    """Return :func:`product` of one row and an nf4 or fp4 weight.

    Float32 rows, for which the table of the kernel here is too coarse, and fp4 weights go through bitsandbytes' kernel.
    """
    s = weight.state
    N, K = s.shape
    if s.nested or K % s.blocksize:  # what neither kernel reads
        y = weight.matmul(x)[None]
    elif s.quant_type != "nf4" or x.dtype == torch.float32:
        y = torch.ops.bitsandbytes.gemv_4bit(x, weight.packed, s.shape, s.absmax, s.code, s.blocksize)[None]
    else:
        Z, y = adapter.width if adapter else 0, x.new_empty(1, 1, N)
        z = x.new_empty(1, 1, Z) if adapter else None
        launch(
            _nf4_row_product, NF4_BLOCKS, lambda block: (cdiv(Z, 2) + cdiv(N, block["BN"]),),
            x, weight.packed, s.absmax, adapter.A if adapter else x, y, z if adapter else y, Z, *_TABLE,
            N=N, K=K, BLOCK=s.blocksize,
        )  # fmt: skip
        return y, z
    return y, _launch(x, adapter.A, NO_ADAPTER)[0] if adapter else None


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

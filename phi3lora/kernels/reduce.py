"""Partial sums, added up in a fixed order, all those of one backward in one launch.

A sum over the tokens is cut into chunks of rows, so that enough programs work on it, and each writes a partial sum. A
gradient of A or B is the float32 sum of a few float32 parts, a gradient of z of many parts in the compute dtype, which
is its own: in float32 they would be a fifth of what SwiGLU's backward moves.

    out = scale * (parts[0] + parts[1] + ...)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch

_MOST_JOBS = 4  # the gradients of z of three segments, and a gradient of B
_BLOCK = 1024


@triton.jit
def _add_up(parts_ptr, out_ptr, n_parts, size, width, out_stride, scale, BN: tl.constexpr):
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    part = parts_ptr + i
    for _ in tl.range(0, n_parts, num_stages=4):
        total += tl.load(part, mask=i < size, other=0.0).to(tl.float32)
        part += size
    at = (i // width).to(tl.int64) * out_stride + i % width
    tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=i < size)


_COUNTS = [f"{name}_{job}" for job in range(_MOST_JOBS) for name in ("n", "stride")]


@triton.jit(do_not_specialize=_COUNTS)
def _reduce_partial_sums(
    parts_0, out_0, n_0, size_0, width_0, stride_0, scale_0,
    parts_1, out_1, n_1, size_1, width_1, stride_1, scale_1,
    parts_2, out_2, n_2, size_2, width_2, stride_2, scale_2,
    parts_3, out_3, n_3, size_3, width_3, stride_3, scale_3,
    BN: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(1)
    if job == 0:
        _add_up(parts_0, out_0, n_0, size_0, width_0, stride_0, scale_0, BN)
    if job == 1:
        _add_up(parts_1, out_1, n_1, size_1, width_1, stride_1, scale_1, BN)
    if job == 2:
        _add_up(parts_2, out_2, n_2, size_2, width_2, stride_2, scale_2, BN)
    if job == 3:
        _add_up(parts_3, out_3, n_3, size_3, width_3, stride_3, scale_3, BN)


class PartialSums:
    """The partial sums of one backward: :meth:`add` collects them, :meth:`reduce` computes the totals."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Tensor, Tensor, int, int, int, int, float]] = []

    def add(self, parts: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Return the tensor that will hold ``scale * parts.sum(0)`` after :meth:`reduce`.

        Args:
            parts: (P, M, W), contiguous; the sum is float32.
            out: (M, W) of any dtype and row stride; None: a new float32 tensor.
        """
        P, M, W = parts.shape
        out = parts.new_empty(M, W, dtype=torch.float32) if out is None else out
        self._jobs.append((parts, out, P, M * W, W, out.stride(0), scale))
        return out

    def reduce(self) -> None:
        """Compute every total that :meth:`add` has returned."""
        jobs, self._jobs = self._jobs, []
        if not jobs:
            return
        assert len(jobs) <= _MOST_JOBS
        padded = jobs + jobs[:1] * (_MOST_JOBS - len(jobs))  # the grid has no program for the repeated ones
        launch(
            _reduce_partial_sums, [{"BN": _BLOCK, "num_warps": 4}],
            lambda block: (max(cdiv(job[3], block["BN"]) for job in jobs), len(jobs)),
            *(value for job in padded for value in job),
        )  # fmt: skip


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``parts.sum(0)`` (M, W) of parts (P, M, W), contiguous, in another dtype."""
    sums = PartialSums()
    total = sums.add(parts, parts.new_empty(parts.shape[1:], dtype=dtype))
    sums.reduce()
    return total

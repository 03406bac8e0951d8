"""The product of an adapted layer, given z = dropout(x) A', in three forms, and where its segments lie.

    y = x W' + b,  y[:, columns_i] += scaling * z_i B_i'

With gradients it is one operator: each low-rank product is accumulated into the base product's output, which saves a
second (N, out) buffer, and the backward makes no copy of dy. Registering it with torch lets ``torch.compile`` treat it
as one node and fuse the operations around it.

Without gradients the operator's own way through torch costs more than a small product, so its two lines are called
directly (``add_low_rank_``). In a ``keep_factors`` block A and B are cast once, not at each call, and B stands as one
block-diagonal matrix, so that a layer of three segments takes one product, not three:

    qkv_proj, r 16, all segments:  z (N, 48),  B (q + k + v, 48) = | Bq 0  0  |
                                                                   | 0  Bk 0  |
                                                                   | 0  0  Bv |

An operator of ours has no rule for forward-mode AD, for the transforms of ``torch.func`` or for second derivatives.
There the same product is made of torch's own operations (``low_rank_plainly``), which have them all.

Shapes: N tokens, ``in`` and ``out`` features, r rank, k enabled segments, x (..., in), y (..., out). ``widths`` and
``enable_lora`` describe all segments of the output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base_weight import needs_plain_operations


class Segment(NamedTuple):
    """One adapted segment of a linear layer. In the example of layers.py, v is ``(2, 16:32, 5120:6400, 6400:7680)``."""

    position: int  # in the layer, counting the segments without an adapter too
    rows_of_A: slice  # of lora_A (k*r, in); also the columns of z = x A' (N, k*r)
    rows_of_B: slice  # of lora_B (sum of enabled widths, r)
    columns: slice  # of y (N, out); also the rows of W (out, in)


def adapted_segments(widths: Sequence[int], enable_lora: Sequence[bool], r: int) -> tuple[Segment, ...]:
    """Return the segments that have an adapter of rank ``r``, in order, given every segment's width and switch."""
    return _adapted_segments(tuple(widths), tuple(enable_lora), r)


@functools.cache  # the same few in every layer of every forward
def _adapted_segments(widths: tuple[int, ...], enable_lora: tuple[bool, ...], r: int) -> tuple[Segment, ...]:
    segments = []
    a = b = column = 0
    for position, (width, enabled) in enumerate(zip(widths, enable_lora, strict=True)):
        if enabled:
            segments.append(Segment(position, slice(a, a + r), slice(b, b + width), slice(column, column + width)))
            a, b = a + r, b + width
        column += width
    return tuple(segments)


def add_low_rank_(
    y: Tensor, z: Tensor, lora_B: Tensor, widths: Sequence[int], enable_lora: Sequence[bool], scaling: float
) -> Tensor:
    """Add ``scaling * z_i B_i'`` to segment i's columns of y (N, out), in place, and return y.

    z (N, k*r), lora_B (sum of enabled widths, r), or block-diagonal (out, k*r). z and B may be float32 where y is not.
    """
    whole = lora_B.shape == (y.shape[1], z.shape[1])
    if z.dtype is not y.dtype:
        if whole:
            added = F.linear(z, lora_B)
        else:
            added = add_low_rank_(torch.zeros_like(y, dtype=z.dtype), z, lora_B, widths, enable_lora, 1.0)
        y.add_(added.to(y.dtype), alpha=scaling)
    elif whole:
        y.addmm_(z, lora_B.t(), alpha=scaling)
    else:
        columns = [y_i for y_i, on in zip(y.split_with_sizes(list(widths), 1), enable_lora, strict=True) if on]
        rows = lora_B.split_with_sizes([y_i.shape[1] for y_i in columns])
        for y_i, z_i, B_i in zip(columns, z.chunk(len(columns), 1), rows, strict=True):
            y_i.addmm_(z_i, B_i.t(), alpha=scaling)
    return y


@torch.library.custom_op("phi3lora::linear_plus_low_rank", mutates_args=())
def linear_plus_low_rank(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor,
    widths: list[int], enable_lora: list[bool], scaling: float,
) -> Tensor:  # fmt: skip
    """Return ``x W' + b`` with ``scaling * z_i B_i'`` added to segment i's columns; all tensors have one dtype.

    x (..., in), z (..., k*r), weight (out, in), bias (out,), lora_B (sum of enabled widths, r) -> (..., out).
    """
    y = F.linear(x, weight, bias)
    add_low_rank_(y.view(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), lora_B, widths, enable_lora, scaling)
    return y


linear_plus_low_rank.register_fake(lambda x, z, weight, *others: x.new_empty(*x.shape[:-1], weight.shape[0]))


def block_diagonal(lora_B: Tensor, widths: Sequence[int], enable_lora: Sequence[bool]) -> Tensor:
    """Return B as (out, k*r): B_i in segment i's rows and in columns of its own, zero elsewhere."""
    segments = adapted_segments(widths, enable_lora, lora_B.shape[1])
    B = lora_B.new_zeros(sum(widths), segments[-1].rows_of_A.stop)
    for segment in segments:
        B[segment.columns, segment.rows_of_A] = lora_B[segment.rows_of_B]
    return B


@torch.library.custom_op("phi3lora::low_rank_backward", mutates_args=())
def low_rank_backward(
    dy: Tensor, z: Tensor, lora_B: Tensor, widths: list[int], enable_lora: list[bool], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of z and B: (..., k*r) and (sum of enabled widths, r)."""
    dy2, z2 = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    dz, dB = torch.empty_like(z2), torch.empty_like(lora_B)
    for segment in adapted_segments(widths, enable_lora, lora_B.shape[1]):
        dy_i, z_i, B_i = dy2[:, segment.columns], z2[:, segment.rows_of_A], lora_B[segment.rows_of_B]
        dz_i, dB_i = dz[:, segment.rows_of_A], dB[segment.rows_of_B]
        torch.addmm(dz_i, dy_i, B_i, beta=0, alpha=scaling, out=dz_i)
        torch.addmm(dB_i, dy_i.t(), z_i, beta=0, alpha=scaling, out=dB_i)
    return dz.view(z.shape), dB


low_rank_backward.register_fake(
    lambda dy, z, lora_B, *others: (z.new_empty(z.shape), torch.empty_like(lora_B))  # both contiguous
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, z, weight, bias, lora_B, *ctx.segments_and_scaling = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, z, weight, lora_B)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight, lora_B = ctx.saved_tensors
    if torch.is_grad_enabled() or needs_plain_operations():  # the gradients are differentiated in their turn
        dz, dB = _low_rank_backward_plainly(dy, z, lora_B, *ctx.segments_and_scaling)
    else:
        dz, dB = low_rank_backward(dy, z, lora_B, *ctx.segments_and_scaling)
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    dy2 = dy.reshape(-1, dy.shape[-1])  # (N, out)
    dW = dy2.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[2] else None
    db = dy2.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return dx, dz, dW, db, dB, None, None, None


linear_plus_low_rank.register_autograd(_backward, setup_context=_save_for_backward)


def low_rank_plainly(
    z: Tensor, lora_B: Tensor, widths: Sequence[int], enable_lora: Sequence[bool], scaling: float
) -> Tensor:
    """Return ``scaling * z_i B_i'`` in segment i's columns, zero elsewhere: (..., out)."""
    adapted = {segment.position: segment for segment in adapted_segments(widths, enable_lora, lora_B.shape[1])}
    parts = []
    for position, width in enumerate(widths):
        if position in adapted:
            segment = adapted[position]
            parts.append(F.linear(z[..., segment.rows_of_A], lora_B[segment.rows_of_B]) * scaling)
        else:
            parts.append(z.new_zeros(*z.shape[:-1], width))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _low_rank_backward_plainly(
    dy: Tensor, z: Tensor, lora_B: Tensor, widths: list[int], enable_lora: list[bool], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return what :func:`low_rank_backward` does."""
    dy2, z2 = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    dz, dB = [], []
    for segment in adapted_segments(widths, enable_lora, lora_B.shape[1]):
        dy_i = dy2[:, segment.columns] * scaling
        dz.append(dy_i @ lora_B[segment.rows_of_B])
        dB.append(dy_i.t() @ z2[:, segment.rows_of_A])
    return torch.cat(dz, dim=1).view(z.shape), torch.cat(dB)


# ----------------------------------------------------------------------------------------------------
# A and B, laid out once for many calls without gradients

_FLOAT32_ROWS = 32
"""Largest N for which a CPU multiplies float32 factors faster than 16-bit ones."""
_BLOCK_DIAGONAL_COLUMNS = 128
"""Largest k*r of a block-diagonal B, whose zeros are multiplied too."""


class _Kept(NamedTuple):
    """The factors of one layer, and the parameters that they were made from."""

    parameters: tuple[Tensor, Tensor]
    aliases: tuple[Tensor, Tensor]  # of their storages: while these live, no other tensor has their addresses
    versions: tuple[int, int]
    A: Tensor
    B: Tensor

    def is_of(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> bool:
        """Return whether the factors are those of the parameters as they are now."""
        return (
            self.A.dtype is dtype
            and self.parameters[0] is lora_A
            and self.parameters[1] is lora_B
            and self.versions == (lora_A._version, lora_B._version)
            and self.aliases[0].data_ptr() == lora_A.data_ptr()
            and self.aliases[1].data_ptr() == lora_B.data_ptr()
        )


_KEPT: ContextVar[dict[nn.Module, _Kept | None] | None] = ContextVar("kept factors", default=None)
"""Layer -> its factors once it was called, for the layers of the enclosing ``keep_factors`` block."""


@contextmanager
def keep_factors(model: nn.Module) -> Iterator[None]:
    """Keep each layer's factors, cast and laid out for one product, until the block ends; nothing is put on the layer.

    They are made again when A or B was changed in place (by an optimizer or ``load_state_dict``), replaced, or moved to
    another device or dtype. A write through ``.data`` leaves no trace: it belongs before or after the block. A CUDA
    graph of the layers is valid inside the block only: their factors are freed at its end.
    """
    outer = _KEPT.get()
    _KEPT.set({**dict.fromkeys(module for module in model.modules() if hasattr(module, "lora_A")), **(outer or {})})
    try:
        yield
    finally:
        _KEPT.set(outer)


def factors(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (k*r, in) and B of an adapted linear layer for :func:`add_low_rank_`, given its input x (N, in)."""
    in_float32 = x.dtype.itemsize == 2 and x.is_cpu and len(x) <= _FLOAT32_ROWS and not torch.is_autocast_enabled("cpu")
    dtype = torch.float32 if in_float32 else x.dtype
    lora_A, lora_B, kept_layers = layer.lora_A, layer.lora_B, _KEPT.get()
    if kept_layers is not None and layer in kept_layers:
        kept = kept_layers[layer]
        if kept is not None and kept.is_of(lora_A, lora_B, dtype):
            return kept.A, kept.B
        if not (lora_A.is_inference() or lora_B.is_inference()):  # those count no versions
            kept_layers[layer] = kept = _keep(layer, dtype)
            return kept.A, kept.B
    return lora_A.to(dtype), lora_B.to(dtype)


def _keep(layer: Any, dtype: torch.dtype) -> _Kept:
    lora_A, lora_B = layer.lora_A, layer.lora_B
    versions, aliases = (lora_A._version, lora_B._version), (lora_A.detach(), lora_B.detach())
    A, B = (alias.to(dtype) for alias in aliases)
    if A.shape[0] <= _BLOCK_DIAGONAL_COLUMNS:
        B = block_diagonal(B, layer.segments, layer.enable_lora)
    return _Kept((lora_A, lora_B), aliases, versions, A, B)

"""The product of an adapted layer, given z = dropout(x) A', in three forms, and where its segments lie.

    y = x W' + b,  y[:, columns_i] += scaling * z_i B_i'

With gradients it is one operator: each low-rank product is accumulated into the base product's output, which saves a
second (N, out) buffer, and the backward makes no copy of dy. Registering it with torch lets ``torch.compile`` treat it
as one node and fuse the operations around it.

Without gradients, torch takes longer to call the operator than to compute a small product, and a product for each
segment takes as many calls. So segments of one width at equal distances are one batched product, on views of y, z and B
(``with_low_rank``):

    qkv_proj, 3 x 192 columns, r 16, q and v adapted, N tokens:
        y viewed as (2, N, 192), 384 numbers apart  +=  z viewed as (2, N, 16)  x  B viewed as (2, 16, 192)

In a ``keep_factors`` block A and B are cast once, where they need a cast, not at each call.

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

from .base_weight import needs_plain_operations, parameter_of


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

    z (N, k*r), lora_B (sum of enabled widths, r), of y's dtype.
    """
    columns = [y_i for y_i, on in zip(y.split_with_sizes(list(widths), 1), enable_lora, strict=True) if on]
    rows = lora_B.split_with_sizes([y_i.shape[1] for y_i in columns])
    for y_i, z_i, B_i in zip(columns, z.chunk(len(columns), 1), rows, strict=True):
        y_i.addmm_(z_i, B_i.t(), alpha=scaling)
    return y


class _Batch(NamedTuple):
    """Adapted segments of one width whose columns begin at equal distances."""

    number: int
    width: int
    distance: int  # from one segment's first column to the next one's
    column: int  # the first one's first, of y
    column_of_z: int
    row_of_B: int

    def views(self, y: Tensor, z: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y_i (number, N, width), z_i (number, N, r) and B_i' (number, r, width) of contiguous tensors."""
        number, width, distance, column, column_of_z, row_of_B = self
        out, z_row, r = y.shape[-1], z.shape[-1], lora_B.shape[1]
        N = y.numel() // out
        return (
            _view(y, column, (number, N, width), (distance, out, 1)),
            _view(z, column_of_z, (number, N, r), (r, z_row, 1)),
            _view(lora_B, row_of_B * r, (number, r, width), (width * r, 1, r)),
        )


def _view(x: Tensor, first: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return x.as_strided(size, stride, x.storage_offset() + first if first else None)


@functools.cache
def _batches(widths: tuple[int, ...], enable_lora: tuple[bool, ...], r: int) -> tuple[_Batch, ...]:
    """Return the adapted segments in as few batches as possible, in order."""
    batches: list[_Batch] = []
    for segment in _adapted_segments(widths, enable_lora, r):
        column, width = segment.columns.start, widths[segment.position]
        last = batches[-1] if batches else None
        if last is not None and last.width == width:
            distance = column - last.column if last.number == 1 else last.distance
            if column == last.column + last.number * distance:
                batches[-1] = last._replace(number=last.number + 1, distance=distance)
                continue
        batches.append(_Batch(1, width, width, column, segment.rows_of_A.start, segment.rows_of_B.start))
    return tuple(batches)


def with_low_rank(
    y: Tensor, z: Tensor, lora_B: Tensor, widths: Sequence[int], enable_lora: Sequence[bool], scaling: float
) -> Tensor:
    """Return what :func:`add_low_rank_` does, in fewer calls of torch; it may write into y (..., out).

    z (..., k*r) and B may be float32 where y is not. In 16 bits a CPU takes the segments one by one: oneDNN refuses
    some views of the batched product, and torch then turns oneDNN off for good.
    """
    y, z, same_dtype, out = y.contiguous(), z.contiguous(), z.dtype is y.dtype, y.shape[-1]
    if same_dtype and y.is_cpu and y.dtype.itemsize == 2:
        add_low_rank_(y.view(-1, out), z.view(-1, z.shape[-1]), lora_B, widths, enable_lora, scaling)
        return y
    lora_B = lora_B.contiguous()
    for batch in _batches(tuple(widths), tuple(enable_lora), lora_B.shape[1]):
        if not same_dtype and batch.width == out:  # one segment, which needs no views
            return y.add_(F.linear(z, lora_B), alpha=scaling)
        y_i, z_i, B_i = batch.views(y, z, lora_B)
        if same_dtype:
            y_i.baddbmm_(z_i, B_i, alpha=scaling)
        else:
            y_i.add_(torch.bmm(z_i, B_i).to(y.dtype), alpha=scaling)
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
# A and B, cast once for many calls without gradients

_FLOAT32_ROWS = 128
"""Largest N for which a CPU multiplies float32 factors faster than 16-bit ones."""


class _Kept(NamedTuple):
    """The cast factors of one layer, and the parameters that they were made from."""

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
"""Layer -> its cast factors once it was called, for the layers of the enclosing ``keep_factors`` block."""


@contextmanager
def keep_factors(model: nn.Module) -> Iterator[None]:
    """Keep each layer's factors in the dtype of its calls until the block ends; nothing is put on the layer.

    They are cast again when A or B was changed in place (by an optimizer or ``load_state_dict``), replaced, or moved to
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
    """Return A (k*r, in) and B of an adapted linear layer for :func:`with_low_rank`, given its input x."""
    dtype, lora_A, lora_B = x.dtype, parameter_of(layer, "lora_A"), parameter_of(layer, "lora_B")
    if dtype.itemsize == 2 and x.is_cpu and not torch.is_autocast_enabled("cpu"):
        dtype = torch.float32 if x.numel() <= _FLOAT32_ROWS * layer.in_features else dtype
    if lora_A.dtype is dtype and lora_B.dtype is dtype:
        return lora_A, lora_B
    kept_layers = _KEPT.get()
    if kept_layers is None or layer not in kept_layers or lora_A.is_inference() or lora_B.is_inference():
        return lora_A.to(dtype), lora_B.to(dtype)  # tensors made in inference mode count no versions
    kept = kept_layers[layer]
    if kept is None or not kept.is_of(lora_A, lora_B, dtype):
        versions, aliases = (lora_A._version, lora_B._version), (lora_A.detach(), lora_B.detach())
        A, B = (alias.to(dtype) for alias in aliases)
        kept_layers[layer] = kept = _Kept((lora_A, lora_B), aliases, versions, A, B)
    return kept.A, kept.B

"""An adapter as the kernels take it, and the arithmetic that they share.

A kernel stands between two frozen products. It adds the low-rank part of the product before it, does its elementwise
work, and computes the low-rank activations of the product after it, all while a tile is in registers:

    y, z  ->  y + scaling * z B'  ->  x = elementwise(...)  ->  x, dropout(x) A'

So an adapter reads and writes almost no memory of its own. The kernels take its two matrices in the compute dtype and
in one layout, whatever the segments are:

    A (k*R, in)     R: the rank r padded with zeros to a power of two >= 16, what tensor cores take; k adapted segments
    B (out, R)      all rows of the fused output, zero where a segment is not adapted

      qkv of widths 4, 2, 2 with q and v adapted: k = 2, offsets (0, 0, R)
        z (N, 2R): columns 0..R-1 are q's, R..2R-1 v's; k's rows of B are zero, so any columns of z do for k

Gradients are float32, in the shapes of ``lora_A`` and ``lora_B``.

Shapes: N tokens, ``in`` and ``out`` features, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora.product import Segment, adapted_segments
from .launch import next_power_of_2


@dataclass(frozen=True)
class Adapter:
    """One adapted projection, ready for the kernels."""

    lora_A: Tensor  # the parameter, float32 (k*r, in)
    lora_B: Tensor  # the parameter, float32 (sum of adapted widths, r)
    A: Tensor  # (k*R, in) in the compute dtype
    B: Tensor  # (out, R) in the compute dtype
    r: int
    R: int
    segments: tuple[Segment, ...]  # the adapted ones; their rows of lora_A are counted at the padded rank R
    scaling: float
    dropout: float
    seed: int  # of this forward's dropout mask

    def __bool__(self) -> bool:
        """Return False for :data:`NO_ADAPTER` alone."""
        return self.r > 0

    @property
    def width(self) -> int:
        """Number of columns of z: k*R."""
        return self.A.shape[0] if self else self.R

    def offset(self, column: int) -> int:
        """Return the first column of z that belongs to the segment of an output column."""
        starts = (s.rows_of_A.start for s in self.segments if s.columns.start <= column < s.columns.stop)
        return next(starts, 0)

    def gradient_of_A(self, dA: Tensor) -> Tensor:
        """Cut dA (k*R, in) float32 to the shape of ``lora_A``."""
        if self.r == self.R:
            return dA
        return dA.view(-1, self.R, dA.shape[1])[:, : self.r].reshape(self.lora_A.shape)

    def gradient_of_B(self, dB: Tensor) -> Tensor:
        """Cut dB (out, R) float32 to the shape of ``lora_B``."""
        rows = [dB[segment.columns] for segment in self.segments]
        return (rows[0] if len(rows) == 1 else dB if len(dB) == len(self.lora_B) else torch.cat(rows))[:, : self.r]


_NOTHING: Any = None
NO_ADAPTER = Adapter(_NOTHING, _NOTHING, _NOTHING, _NOTHING, 0, 16, (), 1.0, 0.0, 0)
"""Adapter of a projection without one: kernels get None for its tensors and leave its part out."""

Pending = tuple[Tensor | None, Tensor | None, Adapter]
"""A projection's output, not yet added to the residual stream: y (N, D), z (N, R), the projection's adapter."""

NOTHING_PENDING: Pending = (None, None, NO_ADAPTER)


def compute_copies(parameters: Sequence[Tensor], dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Return each parameter's copy in the compute dtype, all from one cast: hundreds would leave the GPU idle."""
    flat = torch.cat([p.detach().flatten() for p in parameters]).to(dtype)
    parts = flat.split([p.numel() for p in parameters])
    return {p: part.view_as(p) for p, part in zip(parameters, parts, strict=True)}


def make_adapter(layer: Any, copies: Mapping[Tensor, Tensor], seed: int) -> Adapter:
    """Return the adapter of a linear layer for the kernels; NO_ADAPTER where it has none or it is switched off.

    Args:
        layer: a ``Linear``, a ``MergedLinear`` or a plain linear layer.
        copies: what :func:`compute_copies` returned for its ``lora_A`` and ``lora_B``.
        seed: the seed of its dropout mask.
    """
    r = getattr(layer, "r", 0)
    if r == 0 or not layer.enabled:
        return NO_ADAPTER
    R, A, B = max(16, next_power_of_2(r)), copies[layer.lora_A], copies[layer.lora_B]
    segments = adapted_segments(layer.segments, layer.enable_lora, R)
    if r != R:
        padded = A.new_zeros((len(segments), R, A.shape[1]))
        padded[:, :r] = A.view(len(segments), r, -1)
        A = padded.flatten(0, 1)
    if r != R or len(B) != layer.out_features:
        padded = B.new_zeros((layer.out_features, R))
        for segment in segments:
            padded[segment.columns, :r] = B[segment.rows_of_B]
        B = padded
    dropout = layer.lora_dropout.p if layer.lora_dropout.training else 0.0
    return Adapter(layer.lora_A, layer.lora_B, A, B, r, R, segments, layer.scaling, dropout, seed)


@triton.jit
def keep_mask(seed, index, p):
    """Return dropout's mask: whether element ``index`` stays, with probability 1 - p.

    A 32-bit hash, so that every kernel makes the same mask: "lowbias32" of https://nullprogram.com/blog/2018/07/31/.
    """
    bits = (index.to(tl.uint32) * 0x9E3779B1) ^ seed.to(tl.uint32)
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return (bits >> 8).to(tl.float32) * (1.0 / 16777216.0) >= p


@triton.jit
def dropout(x, seed, index, p):
    """Apply dropout to a tile, in its own dtype."""
    return tl.where(keep_mask(seed, index, p), x.to(tl.float32) / (1.0 - p), 0.0).to(x.dtype)


@triton.jit
def dot(a, b):
    """Multiply on tensor cores and sum in float32; float32 operands, as in tests, keep all their digits."""
    return tl.dot(a, b, input_precision="ieee")

"""An adapter as the passes take it, and the pieces of arithmetic that their kernels share.

A pass stands between two frozen products. It adds the low-rank part of the product before it, does its elementwise
work, and makes the low-rank activations of the product after it, all while a tile is in registers:

    y, z  ->  y + scaling * z B'  ->  x = elementwise(...)  ->  x, dropout(x) A'

so that an adapter costs hardly a pass over memory of its own. For the kernels its two matrices are kept in the compute
dtype and in one layout whatever the segments are:

    A (k*R, in)     R: the rank r padded with zeros to a power of two >= 16, what tensor cores take; k adapted segments
    B (out, R)      all rows of the fused output, zero where a segment is not adapted

      qkv of widths 4, 2, 2 with q and v adapted: k = 2, offsets (0, 0, R)
        z (N, 2R): columns 0..R-1 are q's, R..2R-1 v's; k's rows of B are zero, so it does not matter what it reads

Gradients leave in float32, in the shapes of ``lora_A`` and ``lora_B``.

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

from ..lora.layers import Segment, adapted_segments
from .launch import next_power_of_2


@dataclass(frozen=True)
class Adapter:
    """One adapted projection, ready for the kernels."""

    lora_A: Tensor
    """float32 (k*r, in), the Parameter."""
    lora_B: Tensor
    """float32 (sum of adapted widths, r), the Parameter."""
    A: Tensor
    """(k*R, in) in the compute dtype."""
    B: Tensor
    """(out, R) in the compute dtype."""
    r: int
    R: int
    segments: tuple[Segment, ...]
    """The adapted segments, their places in ``lora_A`` counted at the padded rank R."""
    scaling: float
    dropout: float
    seed: int
    """Of this forward's dropout mask."""

    @property
    def width(self) -> int:
        """Columns of z."""
        return self.A.shape[0]

    def offset(self, column: int) -> int:
        """Where in z the low-rank activations of an output column start."""
        starts = (s.rows_of_A.start for s in self.segments if s.columns.start <= column < s.columns.stop)
        return next(starts, 0)

    def gradient_of_A(self, dA: Tensor) -> Tensor:
        """(k*R, in) float32 -> the shape of ``lora_A``."""
        if self.r == self.R:
            return dA
        return dA.view(-1, self.R, dA.shape[1])[:, : self.r].reshape(self.lora_A.shape)

    def gradient_of_B(self, dB: Tensor) -> Tensor:
        """(out, R) float32 -> the shape of ``lora_B``."""
        rows = [dB[segment.columns] for segment in self.segments]
        return (rows[0] if len(rows) == 1 else dB if len(dB) == len(self.lora_B) else torch.cat(rows))[:, : self.r]


Pending = tuple[Tensor | None, Tensor | None, Adapter | None]
"""A projection's output that has still to be added to the residual stream: y (N, D), z (N, R), its adapter."""


def padded_rank(r: int) -> int:
    """R: the smallest size a tensor core takes that holds rank r."""
    return max(16, next_power_of_2(r))


def compute_copies(parameters: Sequence[Tensor], dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Each parameter in the compute dtype, cast all at once: hundreds of small casts would leave gaps between them."""
    flat = torch.cat([p.detach().flatten() for p in parameters]).to(dtype)
    parts = flat.split([p.numel() for p in parameters])
    return {p: part.view_as(p) for p, part in zip(parameters, parts, strict=True)}


def make_adapter(layer: Any, copies: Mapping[Tensor, Tensor], seed: int) -> Adapter | None:
    """The adapter of a ``Linear`` or ``MergedLinear``; None where there is none or it is switched off."""
    r = getattr(layer, "r", 0)
    if r == 0 or not layer.enabled:
        return None
    R, A, B = padded_rank(r), copies[layer.lora_A], copies[layer.lora_B]
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
def kept(seed, index, p):
    """Dropout's mask: whether element ``index`` stays, with probability 1 - p. A 32-bit hash, the same in each pass.

    The hash is "lowbias32" of https://nullprogram.com/blog/2018/07/31/.
    """
    bits = (index.to(tl.uint32) * 0x9E3779B1) ^ seed.to(tl.uint32)
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return (bits >> 8).to(tl.float32) * (1.0 / 16777216.0) >= p


@triton.jit
def dropped(x, seed, index, p):
    """Dropout of a tile, in its own dtype."""
    return tl.where(kept(seed, index, p), x.to(tl.float32) / (1.0 - p), 0.0).to(x.dtype)


@triton.jit
def dot(a, b):
    """A product on tensor cores with a float32 sum; float32 operands, in tests, keep all their digits."""
    return tl.dot(a, b, input_precision="ieee")

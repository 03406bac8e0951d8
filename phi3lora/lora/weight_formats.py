"""The formats of a frozen weight and their products: dense, fp8, nf4, nf4-fp8.

    matmul(x) = x W'          matmul_backward(dy) = dy W          dequantize() = W

``Dense`` is the weight as it was loaded.

``Fp8`` is for GPUs that multiply float8 (Hopper, Ada and later), about twice as fast as bf16. The weight never changes,
so it is rounded once, each row with a scale of its own; activations and gradients are rounded row by row at every
product:

    scale of a row   largest absolute entry / 448, which is the largest number of float8_e4m3fn
    W (out, in)      q (out, in), scale (out, 1)
    x W'             x's row scale * (x_q q') * scale'
    dy W             dy * scale' is rounded, row by row: its row scale * ((dy scale')_q q)

So both products read the same q. GPUs multiply float8 only where both operands lie along the sum, so the second first
writes q's transpose, 1.7 % of a training step at Phi-3-mini's shape, for half the memory of two copies.

``Nf4`` is bitsandbytes' format (https://arxiv.org/abs/2305.14314, section 3): 4 bits per entry, an index into 16 fixed
values; a scale for each block of 64 entries, itself in 8 bits ("double quantisation"); 4.13 bits per entry in all.
There is no 4-bit arithmetic: every product first writes the weight out in the compute dtype and drops it again. The
weight is a ``bitsandbytes.nn.Params4bit``: a Parameter with a packed tensor, (out * in / 2, 1) uint8, and a
``QuantState`` with the scales and the shape and dtype that the weight had. bitsandbytes is imported only where a 4-bit
weight is made or multiplied.

``Nf4Fp8`` is an nf4 weight that is multiplied as ``Fp8`` is: each product writes q, or its transpose, instead of the
weight. The scale of a row is that of its largest block.

Shapes: N tokens, ``in`` and ``out`` features, x (N, in), dy (N, out).
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class BaseWeight:
    """A weight (out, in) that does not train. A format with products of its own overrides both."""

    def dequantize(self) -> Tensor:
        """Return the matrix (out, in) that the products multiply by."""
        raise NotImplementedError

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x W'``: (N, in) -> (N, out), in x's dtype."""
        return x @ self.dequantize().to(x.dtype).t()

    def matmul_backward(self, dy: Tensor) -> Tensor:
        """Return ``dy W``, the gradient of x: (N, out) -> (N, in)."""
        return dy @ self.dequantize().to(dy.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every stored tensor."""
        return tuple(vars(self).values())

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(t.nbytes for t in self.tensors())


@dataclass(frozen=True)
class Dense(BaseWeight):
    """The weight as it was loaded."""

    weight: Tensor

    def dequantize(self) -> Tensor:
        return self.weight


# ----------------------------------------------------------------------------------------------------
# fp8


@dataclass(frozen=True)
class Fp8(BaseWeight):
    """float8_e4m3fn with a float32 scale for each row."""

    q: Tensor
    scale: Tensor
    """(out, 1)."""

    def matmul(self, x: Tensor) -> Tensor:
        return _fp8_product(x, self.q, self.scale)

    def matmul_backward(self, dy: Tensor) -> Tensor:
        return _fp8_product_backward(dy, _transposed(self.q), self.scale)

    def dequantize(self) -> Tensor:
        return self.q.float() * self.scale


def quantize_rows_to_fp8(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``(q, scale)``: x (N, D) as float8_e4m3fn (N, D) and float32 (N, 1), with ``x ~ q * scale``.

    ``factor``: D float32 numbers; x's columns are multiplied by them first.
    """
    if x.is_cuda:
        from ..kernels.fp8 import quantize_rows

        return quantize_rows(x, factor)
    x = x.detach().float() if factor is None else x.detach().float() * factor.view(1, -1)
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def _transposed(q: Tensor) -> Tensor:
    if q.is_cuda:
        from ..kernels.fp8 import transpose

        return transpose(q)
    return q.t().contiguous()


def _fp8_product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (q * scale)'``."""
    x_q, x_scale = quantize_rows_to_fp8(x.contiguous())
    return _scaled_product(x_q, x_scale, q, scale, x.dtype)


def _fp8_product_backward(dy: Tensor, q_t: Tensor, scale: Tensor) -> Tensor:
    """Return ``dy (q * scale)``, given q's transpose."""
    dy_q, dy_scale = quantize_rows_to_fp8(dy.contiguous(), scale)
    return _scaled_product(dy_q, dy_scale, q_t, dy_scale.new_ones(len(q_t), 1), dy.dtype)


def _scaled_product(x_q: Tensor, x_scale: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if not x_q.is_cuda:  # the same numbers, summed in float32: for tests, and to inspect a model without its GPU
        return ((x_q.float() @ q.float().t()) * x_scale * scale.t()).to(dtype)
    # bf16 whatever x is: the only output that row scales support on every GPU with fp8.
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(x_q, q.t(), scale_a=x_scale, scale_b=scale.t(), **options).to(dtype)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# ----------------------------------------------------------------------------------------------------
# nf4


@dataclass(frozen=True)
class Nf4(BaseWeight):
    """bitsandbytes' packed 4-bit weight and its ``QuantState``; also the ``fp4`` weights that a checkpoint may hold."""

    packed: Tensor
    """(out * in / 2, 1) uint8."""
    state: Any

    def dequantize(self) -> Tensor:
        if self.packed.is_cuda and has_triton():
            from ..kernels import nf4

            if nf4.is_supported(self.packed, self.state):
                return nf4.dequantize(self.packed, self.state)
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.packed, self.state)  # in the dtype that the weight had
        return weight

    def tensors(self) -> tuple[Tensor, ...]:
        nested = (self.state.offset, self.state.state2.absmax, self.state.state2.code) if self.state.nested else ()
        return (self.packed, self.state.absmax, self.state.code, *nested)


@dataclass(frozen=True)
class Nf4Fp8(Nf4):
    """An nf4 weight that is multiplied in fp8."""

    scale: Tensor
    """(out, 1) float32: a row's largest absolute entry / 448."""

    def matmul(self, x: Tensor) -> Tensor:
        return _fp8_product(x, self._q(), self.scale)

    def matmul_backward(self, dy: Tensor) -> Tensor:
        return _fp8_product_backward(dy, self._q(transposed=True), self.scale)

    def _q(self, transposed: bool = False) -> Tensor:
        if self.packed.is_cuda:
            from ..kernels.nf4 import dequantize_to_fp8

            return dequantize_to_fp8(self.packed, self.state, self.scale, transposed)
        q = (self.dequantize().float() / self.scale).to(torch.float8_e4m3fn)
        return q.t().contiguous() if transposed else q

    def tensors(self) -> tuple[Tensor, ...]:
        return (*super().tensors(), self.scale)

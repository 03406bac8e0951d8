"""How a frozen weight is stored and multiplied. One class a format; nothing else knows the formats.

    matmul(x) = x W'          back(dy) = dy W          dequantize() = W

``Dense`` is the weight as it was loaded. ``Fp8`` is for GPUs that multiply float8 (Hopper, Ada and later), about twice
as fast as bf16: the weight never changes, so it is rounded once, in both orientations, each row with a scale of its
own; activations and gradients are rounded row by row as they come:

    W (out, in)   q (out, in), scale (out, 1)         x W' :  x's row scale * (x_q q') * scale'
    W' (in, out)  q_t (in, out), scale_t (in, 1)      dy W :  dy's row scale * (dy_q q_t') * scale_t'

Two float8 copies take the memory of one bf16 weight.

``Nf4`` is bitsandbytes' (https://arxiv.org/abs/2305.14314, section 3): 4 bits an entry, an index into 16 fixed values;
a scale for each block of 64 entries, itself in 8 bits ("double quantisation"); 4.13 bits an entry in all. There is no
4-bit arithmetic: every product first writes the weight out in the compute dtype, and drops it again.

Shapes: N tokens, ``in`` and ``out`` features, x (N, in), dy (N, out).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ModelError
from .four_bit import bitsandbytes, is_four_bit, keep_packing, nf4_linear, plain_tensor
from .low_rank import compute_dtype

logger = logging.getLogger("phi3lora")


class Frozen(Protocol):
    """A weight (out, in) that does not train."""

    def matmul(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), in x's dtype."""

    def back(self, dy: Tensor) -> Tensor:
        """(N, out) -> (N, in): the gradient of x."""

    def dequantize(self) -> Tensor:
        """(out, in), what the products multiply by."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored."""

    @property
    def nbytes(self) -> int:
        """Of what is stored."""


class _Stored:
    """What follows from the tensors."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored: the fields, unless a format says otherwise."""
        return tuple(vars(self).values())

    @property
    def nbytes(self) -> int:
        """Of what is stored."""
        return sum(t.nbytes for t in self.tensors())


@dataclass(frozen=True)
class Dense(_Stored):
    """The weight as it is."""

    weight: Tensor

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.weight.t().to(x.dtype)

    def back(self, dy: Tensor) -> Tensor:
        return dy @ self.weight.to(dy.dtype)

    def dequantize(self) -> Tensor:
        return self.weight


@dataclass(frozen=True)
class Fp8(_Stored):
    """float8_e4m3fn in both orientations, a float32 scale for each row."""

    q: Tensor
    scale: Tensor
    q_t: Tensor
    scale_t: Tensor

    def matmul(self, x: Tensor) -> Tensor:
        return _scaled_product(x, self.q, self.scale)

    def back(self, dy: Tensor) -> Tensor:
        return _scaled_product(dy, self.q_t, self.scale_t)

    def dequantize(self) -> Tensor:
        return self.q.float() * self.scale


@dataclass(frozen=True)
class Nf4(_Stored):
    """bitsandbytes' packed 4-bit weight and its ``QuantState``; ``fp4`` ones, which a checkpoint may hold, too."""

    packed: Tensor
    """(out * in / 2, 1) uint8."""
    state: Any

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().to(x.dtype).t()

    def back(self, dy: Tensor) -> Tensor:
        return dy @ self.dequantize().to(dy.dtype)

    def dequantize(self) -> Tensor:
        if self.packed.is_cuda and _has_triton():
            from .passes import nf4

            if nf4.is_known(self.packed, self.state):
                return nf4.dequantize(self.packed, self.state)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.state)  # in the dtype that the weight had

    def tensors(self) -> tuple[Tensor, ...]:
        nested = (self.state.offset, self.state.state2.absmax, self.state.state2.code) if self.state.nested else ()
        return (self.packed, self.state.absmax, self.state.code, *nested)


def _scaled_product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    x_q, x_scale = _rows_in_fp8(x.contiguous())
    if not x.is_cuda:  # the same numbers, summed in float32: for tests and for looking at a model without its GPU
        return ((x_q.float() @ q.float().t()) * x_scale * scale.t()).to(x.dtype)
    # bf16 whatever x is: the only output that row scales have on every GPU with fp8.
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(x_q, q.t(), scale_a=x_scale, scale_b=scale.t(), **options).to(x.dtype)


def _rows_in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(q, scale)``: x (N, D) as float8_e4m3fn and float32 (N, 1); a row's largest entry becomes e4m3's largest."""
    if x.is_cuda:
        from .passes.quantize import quantize_rows

        return quantize_rows(x)
    scale = x.detach().float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Linear):
    """A frozen ``nn.Linear`` in fp8: ``weight`` is q; ``scale``, ``q_t`` and ``scale_t`` are buffers beside it."""

    scale: Tensor
    q_t: Tensor
    scale_t: Tensor

    @classmethod
    def of(cls, base: nn.Linear) -> Fp8Linear:
        """``base`` rounded to fp8."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.training = base.in_features, base.out_features, base.training
        weight = base.weight.detach()
        q, scale = _rows_in_fp8(weight)
        q_t, scale_t = _rows_in_fp8(weight.t().contiguous())
        layer.weight = nn.Parameter(q, requires_grad=False)
        layer.register_parameter("bias", base.bias)
        for name, tensor in (("scale", scale), ("q_t", q_t), ("scale_t", scale_t)):
            layer.register_buffer(name, tensor)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = frozen_product(x.to(compute_dtype(x, self.weight)), frozen_of(self))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_base(model: nn.Module, precision: str) -> None:
    """Store the frozen linear weights of a model, but the output head's, in another format, layer by layer.

    Args:
        model: where its weights are to stay, without adapters.
        precision: ``"nf4"``, on any device; ``"fp8"``, on a GPU: where it cannot multiply that, the weights stay as
            they are and one line says so.

    Raises:
        ModelError: another format; a layer that does not fit it; nf4 without bitsandbytes.
    """
    formats: dict[str, Callable[[nn.Linear], nn.Linear]] = {"fp8": Fp8Linear.of, "nf4": nf4_linear}
    if precision not in formats:
        raise ModelError(f"base_precision={precision!r}; allowed: None (as loaded), 'fp8', 'nf4'")
    reason = reason_against_fp8(next(model.parameters()).device) if precision == "fp8" else None
    if reason:
        logger.warning("base_precision='fp8' is not possible here (%s): the frozen weights stay in 16 bits", reason)
        return
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    for path in [p for p, m in model.named_modules() if type(m) is nn.Linear and m is not head]:
        layer: Any = model.get_submodule(path)  # no list of layers: a weight goes when the next one comes
        if precision == "fp8" and (layer.in_features % 16 or layer.out_features % 16):
            raise ModelError(f"base_precision='fp8': {path!r} is {tuple(layer.weight.shape)}; allowed: multiples of 16")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, formats[precision](layer))
    keep_packing(model)


def reason_against_fp8(device: torch.device) -> str | None:
    """Why fp8 products cannot run on ``device``; None: they can."""
    if device.type != "cuda":
        return "no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no fp8"
    return None if _has_triton() else "Triton is not installed"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def frozen_of(layer: Any) -> Frozen:
    """The frozen weight of a linear layer, adapted or not, in the format that its tensors say."""
    if is_four_bit(layer.weight):
        return Nf4(plain_tensor(layer.weight), layer.weight.quant_state)
    if "scale_t" in layer._buffers:
        if layer.weight.dtype != torch.float8_e4m3fn:
            raise ModelError(
                f"an fp8 layer was cast to {layer.weight.dtype}, which loses its scales' meaning; load the model again "
                f"and leave its dtype"
            )
        return Fp8(layer.weight, layer.scale, layer.q_t, layer.scale_t)
    return Dense(layer.weight.t() if getattr(layer, "fan_in_fan_out", False) else layer.weight)


def frozen_weights(model: nn.Module) -> list[Frozen]:
    """Of all linear layers inside, adapted or not."""
    return [frozen_of(layer) for layer in model.modules() if isinstance(layer, nn.Linear)]


def base_format(model: nn.Module) -> str:
    """``"nf4"``, ``"fp8"``, or ``""`` where every linear weight is as it was loaded."""
    names = {type(weight).__name__.lower() for weight in frozen_weights(model)}
    return ", ".join(sorted(names - {"dense"}))


def plain_classes() -> tuple[type, ...]:
    """The linear layers that multiply as :func:`frozen_of` says. A subclass of theirs may have its own way."""
    package = sys.modules.get("bitsandbytes")  # where a model has layers of its, it has been imported
    four_bit = (package.nn.Linear4bit, package.nn.LinearNF4, package.nn.LinearFP4) if package is not None else ()
    return (nn.Linear, Fp8Linear, *four_bit)


def plain_class(weight: Tensor) -> type[nn.Linear]:
    """The class of the plain layer that has such a weight."""
    if is_four_bit(weight):
        return bitsandbytes().nn.Linear4bit
    return Fp8Linear if weight.dtype == torch.float8_e4m3fn else nn.Linear


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, frozen, unneeded_width):  # type: ignore[override]
        ctx.frozen = frozen
        if unneeded_width:
            return x.new_empty(*x.shape[:-1], unneeded_width)
        return frozen.matmul(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[override]
        return ctx.frozen.back(dy.flatten(0, -2)).unflatten(0, dy.shape[:-1]), None, None


def frozen_product(x: Tensor, frozen: Frozen, unneeded_width: int = 0) -> Tensor:
    """``x W'`` for x (..., in), with a gradient for x alone; nothing is kept for it.

    ``unneeded_width``: the output's width where a recomputation needs its place in the graph and not its numbers, which
    are left undefined.
    """
    return _FrozenProduct.apply(x, frozen, unneeded_width)

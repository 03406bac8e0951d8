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

logger = logging.getLogger("phi3lora")


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that ``x`` times a frozen ``weight`` is computed in: autocast's where it is on, else the weight's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    quantised = weight.dtype.itemsize == 1 or is_four_bit(weight)  # what those are stored in says nothing
    return x.dtype if quantised else weight.dtype


class BaseWeight(Protocol):
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
            from ..kernels import nf4

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
        from ..kernels.fp8 import quantize_rows

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
        y = base_linear(x.to(compute_dtype(x, self.weight)), base_weight_of(self))
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


def base_weight_of(layer: Any) -> BaseWeight:
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


def base_weights(model: nn.Module) -> list[BaseWeight]:
    """Of all linear layers inside, adapted or not."""
    return [base_weight_of(layer) for layer in model.modules() if isinstance(layer, nn.Linear)]


def base_format(model: nn.Module) -> str:
    """``"nf4"``, ``"fp8"``, or ``""`` where every linear weight is as it was loaded."""
    names = {type(weight).__name__.lower() for weight in base_weights(model)}
    return ", ".join(sorted(names - {"dense"}))


def plain_classes() -> tuple[type, ...]:
    """The linear layers that multiply as :func:`base_weight_of` says. A subclass of theirs may have its own way."""
    package = sys.modules.get("bitsandbytes")  # where a model has layers of its, it has been imported
    four_bit = (package.nn.Linear4bit, package.nn.LinearNF4, package.nn.LinearFP4) if package is not None else ()
    return (nn.Linear, Fp8Linear, *four_bit)


def plain_class(weight: Tensor) -> type[nn.Linear]:
    """The class of the plain layer that has such a weight."""
    if is_four_bit(weight):
        return bitsandbytes().nn.Linear4bit
    return Fp8Linear if weight.dtype == torch.float8_e4m3fn else nn.Linear


class _BaseLinear(torch.autograd.Function):
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


def base_linear(x: Tensor, frozen: BaseWeight, unneeded_width: int = 0) -> Tensor:
    """``x W'`` for x (..., in), with a gradient for x alone; nothing is kept for it.

    ``unneeded_width``: the output's width where a recomputation needs its place in the graph and not its numbers, which
    are left undefined.
    """
    return _BaseLinear.apply(x, frozen, unneeded_width)


# ----------------------------------------------------------------------------------------------------
# bitsandbytes' 4-bit weights and the layer that holds them, beside the products (frozen.py).
#
# A ``Params4bit`` is a Parameter with a packed tensor, (out * in / 2, 1) uint8, and a ``QuantState``: the scales, and
# the
# shape and dtype that the weight had. bitsandbytes is imported where a 4-bit weight is made or multiplied, not before.

PLAIN_SETTINGS = ("compute_dtype", "compute_type_is_set", "quant_storage", "support_avx512bf16_for_cpu", "source_cls")
"""What a ``Linear4bit`` has beside its parameters: an adapted layer carries it, for when the adapter is taken off."""


def bitsandbytes() -> Any:
    """The package, or one line that says how to get it.

    Raises:
        ModelError: it is not installed, or accelerate is not, by which transformers loads 4-bit models.
    """
    try:
        import accelerate  # noqa: F401
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f"4-bit weights need a package that is missing ({error}): pip install 'phi3lora[qlora]'"
        ) from error
    return bitsandbytes


def nf4_linear(base: nn.Linear) -> nn.Linear:
    """``base`` as ``bitsandbytes.nn.Linear4bit``: nf4, double quantisation, on the device it is on; the bias shared."""
    quantised = bitsandbytes().nn
    settings = {"compress_statistics": True, "quant_type": "nf4"}
    size = (base.in_features, base.out_features, base.bias is not None)
    layer = quantised.Linear4bit(*size, compute_dtype=base.weight.dtype, device="meta", **settings)
    weight = quantised.Params4bit(base.weight.detach(), requires_grad=False, module=layer, **settings)
    layer.weight, layer.bias = weight.to(base.weight.device), base.bias  # ``to`` is what quantises
    return layer.train(base.training)


def is_four_bit(weight: Tensor) -> bool:
    """Whether it is a ``bitsandbytes.nn.Params4bit`` whose values have been packed."""
    return getattr(weight, "quant_state", None) is not None


def plain_tensor(weight: Tensor) -> Tensor:
    """The packed bytes as a plain tensor: each operation on a ``Params4bit`` takes a detour through Python."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach().as_subclass(torch.Tensor)


def weight_shape(weight: Tensor) -> torch.Size:
    """Of the matrix that it stands for: a packed weight has a shape of its own."""
    return weight.quant_state.shape if is_four_bit(weight) else weight.shape  # type: ignore[attr-defined]


def count_parameters(model: nn.Module) -> int:
    """Entries of all parameters; a packed weight counts as the matrix that it stands for."""
    return sum(weight_shape(parameter).numel() for parameter in model.parameters())


def keep_packing(model: nn.Module) -> None:
    """Hold bitsandbytes to one layout of its 4-bit weights.

    On a CPU with AVX512-BF16 a ``Linear4bit`` repacks its weight at the first call in ``eval()``, with coarser scales;
    after that nothing gets a gradient through it. Layers that were repacked before are packed back.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = getattr(layer, "weight", None)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as pack_back

            weight.data, weight.quant_state = pack_back(weight.data, weight.quant_state)


def quant_state_dict(weight: Tensor, prefix: str) -> dict[str, Tensor]:
    """What a state dict says of a 4-bit weight beside its packed tensor, as ``Linear4bit`` has it; else nothing."""
    if not is_four_bit(weight):
        return {}
    return {prefix + name: t for name, t in weight.quant_state.as_dict(packed=True).items()}  # type: ignore[attr-defined]


def take_quant_state(weight: Tensor, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Take what :func:`quant_state_dict` gave out of ``state_dict``, into ``weight``."""
    if is_four_bit(weight):
        found = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        if found:
            state = type(weight.quant_state)  # type: ignore[attr-defined]
            weight.quant_state = state.from_dict(found, weight.device)  # type: ignore[attr-defined]

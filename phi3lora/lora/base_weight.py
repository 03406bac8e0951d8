"""Storage and products of a frozen weight: dense, fp8 or nf4. Nothing else in the package knows the formats.

    matmul(x) = x W'          matmul_backward(dy) = dy W          dequantize() = W

``Dense`` is the weight as it was loaded.

``Fp8`` is for GPUs that multiply float8 (Hopper, Ada and later), about twice as fast as bf16. The weight never changes,
so it is rounded once, in both orientations, each row with a scale of its own; activations and gradients are rounded row
by row at every product:

    scale of a row   largest absolute entry / 448, which is the largest number of float8_e4m3fn
    W (out, in)      q (out, in), scale (out, 1)         x W' :  x's row scale * (x_q q') * scale'
    W' (in, out)     q_t (in, out), scale_t (in, 1)      dy W :  dy's row scale * (dy_q q_t') * scale_t'

Two float8 copies take the memory of one bf16 weight.

``Nf4`` is bitsandbytes' format (https://arxiv.org/abs/2305.14314, section 3): 4 bits per entry, an index into 16 fixed
values; a scale for each block of 64 entries, itself in 8 bits ("double quantisation"); 4.13 bits per entry in all.
There is no 4-bit arithmetic: every product first writes the weight out in the compute dtype and drops it again. The
weight is a ``bitsandbytes.nn.Params4bit``: a Parameter with a packed tensor, (out * in / 2, 1) uint8, and a
``QuantState`` with the scales and the shape and dtype that the weight had. bitsandbytes is imported only where a 4-bit
weight is made or multiplied.

Shapes: N tokens, ``in`` and ``out`` features, x (N, in), dy (N, out).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import ModelError, install_hint

logger = logging.getLogger("phi3lora")


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
    """float8_e4m3fn in both orientations, with a float32 scale for each row."""

    q: Tensor
    scale: Tensor
    q_t: Tensor
    scale_t: Tensor

    def matmul(self, x: Tensor) -> Tensor:
        return _fp8_product(x, self.q, self.scale)

    def matmul_backward(self, dy: Tensor) -> Tensor:
        return _fp8_product(dy, self.q_t, self.scale_t)

    def dequantize(self) -> Tensor:
        return self.q.float() * self.scale


def quantize_rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(q, scale)``: x (N, D) as float8_e4m3fn (N, D) and float32 (N, 1), with ``x ~ q * scale``."""
    if x.is_cuda:
        from ..kernels.fp8 import quantize_rows

        return quantize_rows(x)
    scale = x.detach().float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _fp8_product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    x_q, x_scale = quantize_rows_to_fp8(x.contiguous())
    if not x.is_cuda:  # the same numbers, summed in float32: for tests, and to inspect a model without its GPU
        return ((x_q.float() @ q.float().t()) * x_scale * scale.t()).to(x.dtype)
    # bf16 whatever x is: the only output that row scales support on every GPU with fp8.
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(x_q, q.t(), scale_a=x_scale, scale_b=scale.t(), **options).to(x.dtype)


class Fp8Linear(nn.Linear):
    """A frozen ``nn.Linear`` in fp8: ``weight`` is q; ``scale``, ``q_t`` and ``scale_t`` are buffers beside it."""

    scale: Tensor
    q_t: Tensor
    scale_t: Tensor

    @classmethod
    def from_linear(cls, base: nn.Linear) -> Fp8Linear:
        """Return ``base`` rounded to fp8; the bias is shared."""
        layer = cls(base.in_features, base.out_features, bias=False, device="meta")
        weight = base.weight.detach()
        q, scale = quantize_rows_to_fp8(weight)
        q_t, scale_t = quantize_rows_to_fp8(weight.t().contiguous())
        layer.weight = nn.Parameter(q, requires_grad=False)
        layer.bias = base.bias
        for name, tensor in (("scale", scale), ("q_t", q_t), ("scale_t", scale_t)):
            layer.register_buffer(name, tensor)
        return layer.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: x (..., in) -> (..., out)."""
        y = base_linear(x.to(compute_dtype(x, self.weight)), base_weight_of(self))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def reason_against_fp8(device: torch.device) -> str | None:
    """Return why fp8 products cannot run on ``device``, or None where they can."""
    if device.type != "cuda":
        return "no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no fp8"
    return None if _has_triton() else "Triton is not installed"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# ----------------------------------------------------------------------------------------------------
# nf4: bitsandbytes' weights and its layer


@dataclass(frozen=True)
class Nf4(BaseWeight):
    """bitsandbytes' packed 4-bit weight and its ``QuantState``; also the ``fp4`` weights that a checkpoint may hold."""

    packed: Tensor
    """(out * in / 2, 1) uint8."""
    state: Any

    def dequantize(self) -> Tensor:
        if self.packed.is_cuda and _has_triton():
            from ..kernels import nf4

            if nf4.is_supported(self.packed, self.state):
                return nf4.dequantize(self.packed, self.state)
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.packed, self.state)  # in the dtype that the weight had
        return weight

    def tensors(self) -> tuple[Tensor, ...]:
        nested = (self.state.offset, self.state.state2.absmax, self.state.state2.code) if self.state.nested else ()
        return (self.packed, self.state.absmax, self.state.code, *nested)


def require_bitsandbytes() -> Any:
    """Return the package bitsandbytes.

    Raises:
        ModelError: it is not installed, or accelerate is not, which transformers needs to load 4-bit models.
    """
    try:
        import accelerate  # noqa: F401
        import bitsandbytes
    except ImportError as error:
        message = f"4-bit weights need a package that is missing ({error}): {install_hint('qlora')}"
        raise ModelError(message) from error
    return bitsandbytes


def nf4_linear(base: nn.Linear) -> nn.Linear:
    """Return ``base`` as a ``Linear4bit``: nf4 with double quantisation, on its device; the bias is shared."""
    bnb_nn = require_bitsandbytes().nn
    settings = {"compress_statistics": True, "quant_type": "nf4"}
    size = (base.in_features, base.out_features, base.bias is not None)
    layer: nn.Linear = bnb_nn.Linear4bit(*size, compute_dtype=base.weight.dtype, device="meta", **settings)
    weight = bnb_nn.Params4bit(base.weight.detach(), requires_grad=False, module=layer, **settings)
    layer.weight, layer.bias = weight.to(base.weight.device), base.bias  # ``to`` is what quantises
    return layer.train(base.training)


def is_4bit(weight: Tensor) -> bool:
    """Return whether a weight is a ``Params4bit`` with packed values."""
    return getattr(weight, "quant_state", None) is not None  # a Params4bit has one once its values are packed


def add_quant_state(weight: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Add a 4-bit weight's scales to a state dict, as ``Linear4bit`` does; other weights have none."""
    if is_4bit(weight):
        state_dict.update({prefix + name: t for name, t in weight.quant_state.as_dict(packed=True).items()})


def pop_quant_state(weight: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Move what :func:`add_quant_state` added from the state dict into a 4-bit weight."""
    if is_4bit(weight):
        found = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        if found:
            weight.quant_state = type(weight.quant_state).from_dict(found, weight.device)


def keep_4bit_packing(model: nn.Module) -> None:
    """Hold bitsandbytes to one layout of its 4-bit weights.

    On a CPU with AVX512-BF16 a ``Linear4bit`` repacks its weight at the first call in ``eval()``, with coarser scales;
    after that no gradient passes through it. Layers that were repacked before are packed back.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = getattr(layer, "weight", None)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as pack_back

            weight.data, weight.quant_state = pack_back(weight.data, weight.quant_state)


# ----------------------------------------------------------------------------------------------------
# The format of a layer, read from its tensors


def base_weight_of(layer: Any) -> BaseWeight:
    """Return the frozen weight of a linear layer, adapted or not, in the format that its tensors have."""
    weight = layer.weight
    if is_4bit(weight):
        with torch._C.DisableTorchFunctionSubclass():  # else each operation on a Params4bit takes a detour in Python
            packed = weight.detach().as_subclass(torch.Tensor)
        return Nf4(packed, weight.quant_state)
    if "scale_t" in layer._buffers:
        if weight.dtype != torch.float8_e4m3fn:
            raise ModelError(
                f"an fp8 layer was cast to {weight.dtype}, which makes its scales meaningless; load the model again "
                f"and keep its dtype"
            )
        return Fp8(weight, layer.scale, layer.q_t, layer.scale_t)
    return Dense(weight.t() if getattr(layer, "fan_in_fan_out", False) else weight)


def stored_tensors(layer: Any) -> tuple[Tensor, ...]:
    """Return the tensors that hold a linear layer's frozen weight: the objects themselves, the weight first."""
    return (layer.weight, *base_weight_of(layer).tensors()[1:])


def is_stored_from(stored: BaseWeight, dense: Tensor) -> bool:
    """Return whether storing ``dense`` gives this weight; of a quantised weight the first 64 rows are compared."""
    shape = stored.state.shape if isinstance(stored, Nf4) else stored.tensors()[0].shape
    if tuple(dense.shape) != tuple(shape):
        return False
    if isinstance(stored, Dense):
        return stored.weight.equal(dense.to(stored.weight))
    rows = dense[:64].contiguous()
    if isinstance(stored, Nf4):
        from bitsandbytes.functional import quantize_4bit

        state = stored.state
        codes, _ = quantize_4bit(rows.to(state.dtype), blocksize=state.blocksize, quant_type=state.quant_type)
        codes = codes.view(torch.uint8).flatten()
        own = stored.packed.view(torch.uint8).flatten()[: len(codes)]
    else:
        assert isinstance(stored, Fp8)
        own, codes = stored.q[:64].view(torch.uint8), quantize_rows_to_fp8(rows)[0].view(torch.uint8)
    return bool((own != codes.to(own.device)).float().mean() < 1e-3)  # devices may round a few entries differently


def plain_linear_class(weight: Tensor) -> type[nn.Linear]:
    """Return the class of the layer without an adapter that holds such a weight."""
    if is_4bit(weight):
        cls: type[nn.Linear] = require_bitsandbytes().nn.Linear4bit
        return cls
    return Fp8Linear if weight.dtype == torch.float8_e4m3fn else nn.Linear


def plain_linear_classes() -> tuple[type, ...]:
    """Return the classes that multiply as :func:`base_weight_of` says; a subclass of theirs may do it differently."""
    package = sys.modules.get("bitsandbytes")  # a model that has its layers has imported it
    four_bit = (package.nn.Linear4bit, package.nn.LinearNF4, package.nn.LinearFP4) if package is not None else ()
    return (nn.Linear, Fp8Linear, *four_bit)


def weight_shape(weight: Any) -> torch.Size:
    """Return the shape of the matrix that a weight stands for; a packed 4-bit weight's own shape is another."""
    shape: torch.Size = weight.quant_state.shape if is_4bit(weight) else weight.shape
    return shape


# ----------------------------------------------------------------------------------------------------
# The product, with a gradient for x alone


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of ``x`` times a frozen ``weight``: autocast's where it is on, else the weight's.

    A quantised weight has no dtype to compute in: the result is then x's.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype if weight.dtype.itemsize == 1 or is_4bit(weight) else weight.dtype


def needs_plain_operations() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode AD is on.

    A custom operator has no rule for them; a tangent would become zero without an error.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _BaseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: BaseWeight, unneeded_width: int) -> Tensor:
        ctx.weight = weight
        if unneeded_width:
            return x.new_empty(*x.shape[:-1], unneeded_width)
        y = weight.matmul(x.reshape(-1, x.shape[-1]))  # (N, out)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() or needs_plain_operations():  # the gradient is differentiated in its turn
            return dy @ ctx.weight.dequantize().to(dy.dtype), None, None
        dx = ctx.weight.matmul_backward(dy.reshape(-1, dy.shape[-1]))  # (N, in)
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None, None


def base_linear(x: Tensor, weight: BaseWeight, unneeded_width: int = 0) -> Tensor:
    """Return ``x W'`` for x (..., in), with a gradient for x alone; no activation is kept for it.

    ``unneeded_width``: the output's width where a recomputation needs the product's place in the graph but not its
    values, which are then undefined.
    """
    if needs_plain_operations():
        return F.linear(x, weight.dequantize().to(x.dtype))
    y: Tensor = _BaseLinear.apply(x, weight, unneeded_width)  # type: ignore[no-untyped-call]
    return y


# ----------------------------------------------------------------------------------------------------
# Whole models


def quantize_base(model: nn.Module, precision: str) -> None:
    """Convert a model's frozen linear weights, except the output head's, to another format, layer by layer.

    Args:
        model: a model without adapters, on the device where its weights are to stay.
        precision: ``"nf4"``, on any device; ``"fp8"``, on a GPU: where it cannot multiply that, the weights stay as
            they are and one warning says so.

    Raises:
        ModelError: another format; a layer that does not fit it; nf4 without bitsandbytes.
    """
    formats: dict[str, Callable[[nn.Linear], nn.Linear]] = {"fp8": Fp8Linear.from_linear, "nf4": nf4_linear}
    if precision not in formats:
        raise ModelError(f"base_precision={precision!r}; allowed: None (as loaded), 'fp8', 'nf4'")
    if usable_precision(precision, next(model.parameters()).device) is None:
        return
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for path in [p for p, m in model.named_modules() if type(m) is nn.Linear and m is not head]:
        layer: Any = model.get_submodule(path)  # fetched one at a time, so that each dense weight is freed at once
        if precision == "fp8" and (layer.in_features % 16 or layer.out_features % 16):
            raise ModelError(f"base_precision='fp8': {path!r} is {tuple(layer.weight.shape)}; allowed: multiples of 16")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, formats[precision](layer))
    keep_4bit_packing(model)


def usable_precision(precision: str | None, device: torch.device) -> str | None:
    """Return ``precision``; None, with a warning, if it is fp8 and ``device`` cannot multiply that."""
    reason = reason_against_fp8(device) if precision == "fp8" else None
    if reason:
        logger.warning("base_precision='fp8' is not possible here (%s): the frozen weights stay in 16 bits", reason)
    return None if reason else precision


def base_weights(model: nn.Module) -> list[BaseWeight]:
    """Return the frozen weights of all linear layers, adapted or not."""
    return [base_weight_of(layer) for layer in model.modules() if isinstance(layer, nn.Linear)]


def base_format(model: nn.Module) -> str:
    """Return ``"nf4"``, ``"fp8"``, or ``""`` where every linear weight is as it was loaded."""
    names = {type(weight).__name__.lower() for weight in base_weights(model)}
    return ", ".join(sorted(names - {"dense"}))


def sample_base(model: nn.Module, count: int = 64) -> str:
    """Return a SHA-256 of about ``count`` entries of each frozen parameter, which tells bases of one shape apart.

    It reads 15,000 of Phi-4's 14 billion numbers. Adapters and trained biases are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name or parameter.is_meta:
            continue
        if hasattr(parameter, "make_whole"):
            parameter.make_whole()  # model/sharding.py: all processes read it together
        stride = max(1, parameter.numel() // count) | 1  # odd, so that it does not stay in one column
        entries = parameter.detach().reshape(-1)[::stride].contiguous()
        digest.update(name.encode() + entries.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> int:
    """Return the number of entries in all parameters; a packed weight counts as the matrix that it stands for."""
    return sum(weight_shape(parameter).numel() for parameter in model.parameters())

"""Layers whose weight does not train: which format it has (weight_formats.py), its product, whole models.

``base_weight_of`` reads the format from a layer's tensors, and ``base_linear`` multiplies by it, with a gradient for x
alone. Nothing outside these two files knows the formats.

    dense      nn.Linear                  any 16- or 32-bit weight
    fp8        Fp8Linear                  weight float8_e4m3fn, buffer scale, fp8_products = True
    nf4        bitsandbytes' Linear4bit   weight a Params4bit
    nf4-fp8    the same                   and a buffer scale, fp8_products = True

Shapes: ``in`` and ``out`` features, x (..., in), dy (..., out).
"""

from __future__ import annotations

import hashlib
import logging
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..display import quiet_libraries
from ..errors import ModelError, install_hint
from .weight_formats import BaseWeight, Dense, Fp8, Nf4, Nf4Fp8, has_triton, quantize_rows_to_fp8

logger = logging.getLogger("phi3lora")

PRECISIONS = ("nf4", "fp8", "nf4-fp8")
"""Formats of a quantised base."""


# ----------------------------------------------------------------------------------------------------
# Layers in fp8 and nf4


class Fp8Linear(nn.Linear):
    """A frozen ``nn.Linear`` in fp8: ``weight`` is q, the buffer ``scale`` its rows' scales."""

    scale: Tensor

    @classmethod
    def from_linear(cls, base: nn.Linear) -> Fp8Linear:
        """Return ``base`` rounded to fp8; the bias is shared."""
        layer = cls(base.in_features, base.out_features, bias=False, device="meta")
        q, scale = quantize_rows_to_fp8(base.weight.detach())
        layer.weight = nn.Parameter(q, requires_grad=False)
        layer.bias = base.bias
        layer.register_buffer("scale", scale)
        layer.fp8_products = True  # type: ignore[assignment]
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
    return None if has_triton() else "Triton is not installed"


def require_bitsandbytes() -> Any:
    """Return the package bitsandbytes.

    Raises:
        ModelError: it is not installed, or accelerate is not, which transformers needs to load 4-bit models.
    """
    try:
        with quiet_libraries():
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


def multiply_in_fp8(layer: Any) -> None:
    """Make a layer's nf4 weight one that is multiplied in fp8."""
    weight = base_weight_of(layer)
    width = weight_shape(layer.weight)[1]
    if not isinstance(weight, Nf4) or not weight.state.nested or width % weight.state.blocksize:
        raise ModelError(
            f"base_precision='nf4-fp8': a weight of {tuple(weight_shape(layer.weight))}; allowed: nf4 with double "
            f"quantisation, a multiple of 64 columns; load it with base_precision='nf4'"
        )
    largest = weight.dequantize().abs().amax(1, keepdim=True).float()
    layer.register_buffer("scale", largest.clamp(min=1e-12) / 448, persistent=False)
    layer.fp8_products = True


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


def parameter_of(layer: Any, name: str) -> Any:
    """Return ``layer.name``, found at once; ``nn.Module`` searches longer than a small product takes."""
    own = layer._parameters
    return own[name] if name in own else getattr(layer, name)  # a replica or a parametrized layer has it elsewhere


def base_weight_of(layer: Any) -> BaseWeight:
    """Return the frozen weight of a linear layer, adapted or not, in the format that its tensors have."""
    weight, in_fp8 = parameter_of(layer, "weight"), vars(layer).get("fp8_products")
    if is_4bit(weight):
        with torch._C.DisableTorchFunctionSubclass():  # else each operation on a Params4bit takes a detour in Python
            packed = weight.detach().as_subclass(torch.Tensor)
        return Nf4Fp8(packed, weight.quant_state, layer.scale) if in_fp8 else Nf4(packed, weight.quant_state)
    if in_fp8:
        if weight.dtype != torch.float8_e4m3fn:
            raise ModelError(
                f"an fp8 layer was cast to {weight.dtype}, which makes its scales meaningless; load the model again "
                f"and keep its dtype"
            )
        return Fp8(weight, layer.scale)
    return Dense(weight.t() if vars(layer).get("fan_in_fan_out") else weight)


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
    if torch._C._is_any_autocast_enabled():  # which is rare, and asking for one device takes longer
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
        precision: ``"nf4"``, on any device; ``"fp8"`` or ``"nf4-fp8"``, on a GPU: where it cannot multiply that, one
            warning says so and the weights stay as they are, or become nf4. Weights that are nf4 stay nf4.

    Raises:
        ModelError: another format; a layer that does not fit it; nf4 without bitsandbytes.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"base_precision={precision!r}; allowed: None (as loaded), {', '.join(map(repr, PRECISIONS))}")
    usable = usable_precision(precision, next(model.parameters()).device)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for path in paths if usable else ():
        layer: Any = model.get_submodule(path)  # fetched one at a time, so that each dense weight is freed at once
        size = tuple(weight_shape(layer.weight))
        if usable != "nf4" and (size[0] % 16 or size[1] % 16):
            raise ModelError(f"base_precision={precision!r}: {path!r} is {size}; allowed: multiples of 16")
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            layer = Fp8Linear.from_linear(layer) if usable == "fp8" else nf4_linear(layer)
            setattr(model.get_submodule(parent), name, layer)
        if usable == "nf4-fp8":
            multiply_in_fp8(layer)
    keep_4bit_packing(model)


def usable_precision(precision: str | None, device: torch.device) -> str | None:
    """Return ``precision``; where ``device`` cannot multiply fp8, None or ``"nf4"`` in its place, with a warning."""
    reason = reason_against_fp8(device) if precision in ("fp8", "nf4-fp8") else None
    if reason is None:
        return precision
    instead = "nf4" if precision == "nf4-fp8" else None
    becomes = "are multiplied in 16 bits" if instead else "stay in the dtype of the model"
    logger.warning("base_precision=%r is not possible here (%s): the frozen weights %s", precision, reason, becomes)
    return instead


def base_weights(model: nn.Module) -> list[BaseWeight]:
    """Return the frozen weights of all linear layers, adapted or not."""
    return [base_weight_of(layer) for layer in model.modules() if isinstance(layer, nn.Linear)]


def base_format(model: nn.Module) -> str:
    """Return ``"nf4"``, ``"fp8"``, ``"nf4-fp8"``, or ``""`` where every linear weight is as it was loaded."""
    names = {Fp8: "fp8", Nf4: "nf4", Nf4Fp8: "nf4-fp8", Dense: ""}
    return ", ".join(sorted({names[type(weight)] for weight in base_weights(model)} - {""}))


def sample_base(model: nn.Module) -> str:
    """Return a SHA-256 of about 64 entries of each frozen parameter, which tells bases of one shape apart.

    It reads 15,000 of Phi-4's 14 billion numbers. Adapters and trained biases are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name or parameter.is_meta:
            continue
        if hasattr(parameter, "make_whole"):
            parameter.make_whole()  # model/sharding.py: all processes read it together
        stride = max(1, parameter.numel() // 64) | 1  # odd, so that it does not stay in one column
        entries = parameter.detach().reshape(-1)[::stride].contiguous()
        digest.update(name.encode() + entries.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> int:
    """Return the number of entries in all parameters; a packed weight counts as the matrix that it stands for."""
    return sum(weight_shape(parameter).numel() for parameter in model.parameters())


def count_trainable(module: nn.Module) -> int:
    """Return the number of entries in the parameters that require a gradient."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

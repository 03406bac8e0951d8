"""bitsandbytes' 4-bit weights and the layer that holds them, beside the products (frozen.py).

A ``Params4bit`` is a Parameter with a packed tensor, (out * in / 2, 1) uint8, and a ``QuantState``: the scales, and the
shape and dtype that the weight had. bitsandbytes is imported where a 4-bit weight is made or multiplied, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

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

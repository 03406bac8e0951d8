"""bf16, fp16 with a gradient scaler, or fp32: one policy object, so that the loop has no branches for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import TrainingConfig
from ..errors import TrainingError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Names of torch.cpu.get_capabilities: with one of them matrix products take about float32's time or less.
_CPU_INSTRUCTIONS = {
    "bf16": ("avx512_f", "avx_ne_convert", "amx_bf16", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "avx_ne_convert", "amx_fp16", "fp16_arith"),
}


@dataclass(frozen=True)
class Precision:
    """How the forward is computed. Adapters and optimizer state are float32 in every mode."""

    name: str
    """``"bf16"``, ``"fp16"`` or ``"fp32"``."""
    device_type: str
    scaler: Any
    """A ``torch.amp.GradScaler``, enabled for fp16 only: without it float16 gradients underflow."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that a forward runs in."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=_DTYPES[self.name])

    def can_scale_down(self) -> bool:
        """Whether a gradient that is not finite may be a float16 overflow, which the scaler mends by itself."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1


def resolve_precision(config: TrainingConfig, model: nn.Module, device: torch.device) -> Precision:
    """``bf16`` or ``fp16`` as configured; with neither, what the model's own dtype says.

    Raises:
        TrainingError: bf16 on a GPU without it.
    """
    if config.bf16 or config.fp16:
        name = "bf16" if config.bf16 else "fp16"
    else:
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        name = next((name for name, known in _DTYPES.items() if known == dtype), "fp32")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TrainingError(f"{torch.cuda.get_device_name(device)} has no bfloat16; set fp16=True and bf16=False")
    return Precision(name, device.type, torch.amp.GradScaler(device.type, enabled=name == "fp16"))


def has_instructions(name: str) -> bool:
    """Whether the CPU has some for ``"bf16"`` or ``"fp16"``. A torch that cannot tell has none but AVX-512's."""
    if name == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return True
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(instruction) for instruction in _CPU_INSTRUCTIONS[name])

"""One optimizer step: micro-batches in, update out. Nothing in it waits for the device.

    g = sum over micro-batches of grad(sum of losses) / count of supervised tokens in all of them, on all ranks

so 1 micro-batch of 8 rows and 8 of 1 give the same update to rounding (a mean of the micro-batches' means would not:
https://unsloth.ai/blog/gradient). A step whose loss or gradient is not finite changes nothing: ``found_inf`` tells the
optimizer on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import IGNORE_INDEX, TrainingConfig
from ..errors import TrainingError
from ..model.forward import causal_lm_loss
from .distributed import World
from .optim import set_learning_rate


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """``model.train()`` for the time of the block, then every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class StepOutcome:
    """What a step did: tensors on the device, to be read later."""

    values: Tensor
    """float32 (3,): sum of losses, gradient norm before clipping, 1 if the step was skipped else 0."""
    count: int
    """Supervised tokens, on all ranks."""


class OptimizerStep:
    """Called with the micro-batches of a step and its learning rate."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        max_grad_norm: float,
        world: World | None = None,
    ) -> None:
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.max_grad_norm, self.world = max_grad_norm, world or World()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, micro_batches: Sequence[dict[str, Any]], learning_rate: float) -> StepOutcome:
        scaler = self.precision.scaler
        own = sum(
            int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches
        )  # on the CPU, before any forward
        count = self.world.sum_over_ranks(own)
        assert count > 0, "every document has a supervised token"
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.parameters[0].device)
        for batch in micro_batches:
            with self.precision.autocast():
                loss_sum, _ = causal_lm_loss(self.model, batch)
            scaler.scale(loss_sum * (self.world.size / count)).backward()
            total += loss_sum.detach()
        scaler.unscale_(self.optimizer)
        norm = self._clip()
        bad = ~(torch.isfinite(norm) & torch.isfinite(total))
        set_learning_rate(self.optimizer, learning_rate)
        if not scaler.is_enabled():  # an enabled scaler says so itself
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        scaler.step(self.optimizer)
        scaler.update()
        return StepOutcome(torch.stack([total, norm, bad.float()]), count)

    def _clip(self) -> Tensor:
        """Scale the gradients down to ``max_grad_norm``; their global 2-norm before."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        return norm


# ----------------------------------------------------------------------------------------------------
# bf16, fp16 with a gradient scaler, or fp32: one policy object, so that the loop has no branches for it.

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

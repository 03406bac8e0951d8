"""One optimizer step: micro-batches in, update out. With torch's optimizers nothing in it waits for the GPU.

    gradient = sum over micro-batches of grad(sum of token losses) / supervised tokens of all micro-batches on all ranks

so 1 micro-batch of 8 rows and 8 micro-batches of 1 row give the same update to rounding, and so do 8 processes with a
row each. The mean of the micro-batches' means would not: https://unsloth.ai/blog/gradient. The count is known before
the step. Several processes add up their gradients and loss once (``distributed.GradientSum``).

A step whose loss or gradient is not finite changes nothing. torch's fused optimizers read that from ``found_inf`` on
the GPU; for bitsandbytes' optimizers, which wait for the GPU after every parameter anyway, the step reads it itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import IGNORE_INDEX, TrainingConfig
from ..errors import TrainingError, first_of
from ..lora.inject import unreached_layers
from ..model.forward import causal_lm_loss
from ..model.sharding import sharded_base
from .distributed import GradientSum, World
from .optim import set_learning_rate

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Instructions (named as in torch.cpu.get_capabilities) that make half-precision matrix products about as fast as
# float32's. With none of them a product takes many times as long.
_FAST_INSTRUCTIONS = {
    "bf16": ("avx512_f", "avx_ne_convert", "amx_bf16", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "avx_ne_convert", "amx_fp16", "fp16_arith"),
}


@dataclass(frozen=True)
class Precision:
    """Dtype of the forward pass. Adapters and optimizer state are float32 in every mode."""

    name: str
    """``"bf16"``, ``"fp16"`` or ``"fp32"``."""
    device_type: str
    """Device type of the model: ``"cuda"`` or ``"cpu"``."""
    scaler: torch.amp.GradScaler
    """Loss scaler, enabled for fp16 only: without it float16 gradients underflow."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that a forward runs in."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=_DTYPES[self.name])

    def can_scale_down(self) -> bool:
        """Return whether a non-finite gradient may be a float16 overflow, which a smaller scale will fix."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1


def resolve_precision(config: TrainingConfig, model: nn.Module, device: torch.device) -> Precision:
    """Return the configured precision, or with neither ``bf16`` nor ``fp16`` the one of the model's dtype."""
    if config.bf16 or config.fp16:
        name = "bf16" if config.bf16 else "fp16"
    else:
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        name = next((name for name, known in _DTYPES.items() if known == dtype), "fp32")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TrainingError(f"{torch.cuda.get_device_name(device)} has no bfloat16; set fp16=True and bf16=False")
    return Precision(name, device.type, torch.amp.GradScaler(device.type, enabled=name == "fp16"))


def has_instructions(name: str) -> bool:
    """Return whether the CPU computes ``"bf16"`` or ``"fp16"`` quickly; an older torch knows only AVX-512."""
    if name == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return True
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(instruction) for instruction in _FAST_INSTRUCTIONS[name])


class OptimizerStep:
    """Forward, backward and update of one optimizer step, of all processes together; the model is in train mode."""

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
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        trained = set(self.parameters)
        self.gradients = GradientSum([p for p in model.parameters() if p in trained], self.world)
        self._is_first = True

    def __call__(
        self, micro_batches: Sequence[dict[str, Any]], learning_rate: float, count: int | None = None, idle: int = 0
    ) -> Tensor:
        """Update the parameters from one step.

        Args:
            micro_batches: this rank's share of the step; a rank may have none.
            learning_rate: rate of the update.
            count: supervised tokens of all micro-batches on all ranks; None: those of ``micro_batches``.
            idle: micro-batches that another rank has more than this one; a split base is gathered for them here too.

        Returns:
            float32 (3,), still on the device: sum of token losses, gradient norm before clipping, 1 if the step was
            skipped else 0.
        """
        scaler = self.precision.scaler
        if count is None:
            count = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)
        assert count > 0, "every document has a supervised token"
        self.world.meet()
        self.optimizer.zero_grad(set_to_none=True)
        split = sharded_base(self.model)
        total = torch.zeros((), device=self.parameters[0].device)
        for i, batch in enumerate(micro_batches, 1):
            with self.precision.autocast():
                loss_sum, _ = causal_lm_loss(self.model, batch)
            if i == len(micro_batches):
                self.gradients.expect()
            scaler.scale(loss_sum * (1 / count)).backward()  # type: ignore[no-untyped-call]
            total += loss_sum.detach()
        if self._is_first and micro_batches:
            self._require_gradients()
        if split is not None:
            for _ in range(idle):
                split.idle(backward=True)
        total = self.gradients.finish(total)
        scaler.unscale_(self.optimizer)
        norm = self._clip()
        skip = ~(torch.isfinite(norm) & torch.isfinite(total))
        set_learning_rate(self.optimizer, learning_rate)
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):  # torch's fused optimizers
            if not scaler.is_enabled():  # an enabled scaler sets found_inf itself
                self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            scaler.step(self.optimizer)
        elif not skip.item():
            scaler.step(self.optimizer)
        scaler.update()
        return torch.stack([total, norm, skip.float()])

    def _require_gradients(self) -> None:
        """Raise if an adapter got no gradient in the first step: it would never learn."""
        self._is_first = False
        if paths := unreached_layers(self.model):
            raise TrainingError(
                f"no gradient reaches the adapters of {first_of(paths, 3)}: the module above reads the weight "
                f"itself, or never calls the layer; leave it out of target_modules"
            )

    def _clip(self) -> Tensor:
        """Scale the gradients down to ``max_grad_norm``, and return their global 2-norm before that."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        return norm

"""A run too small to learn from: how far it can move the adapters, before it; how far the loss fell, after it.

AdamW moves a number by about the learning rate in a step, however small its gradient is. B starts at zero, so after
steps with rates that add up to S no entry of B exceeds S, or ``lora_plus_lr_ratio`` times that. A is drawn from
+-1/sqrt(in), so an input x with entries of size 1 makes entries of A x of size 1/sqrt(3). The adapter adds ``scaling
B A x``, and therefore at most

    reach = scaling * r * S / sqrt(3)          lora_alpha * S / sqrt(3), without rsLoRA

to an output that is of size 1 itself. It takes steps that all point the same way to come near this.

     6 steps at 5e-5, lora_alpha 32      S = 0.00018    reach  0.3 %     too small
     6 steps at 2e-4, lora_alpha 32      S = 0.0007     reach  1.3 %     a beginning
    60 steps at 2e-4, lora_alpha 32      S = 0.006      reach 11 %       a small run that learns
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

from ..config import TrainingConfig
from ..errors import counted
from ..lora.inject import lora_layers
from .checkpoint import TrainingState
from .optim import schedule

LEAST_REACH = 2**-8
"""Reach below which a run is called too small: less than the rounding of an output in bfloat16."""

_MOST_RATES = 10_000
"""Learning rates that are added up; of a longer run every second, third, ... one."""

_LEAST_LOSSES = 8
"""Log lines that it takes to tell a falling loss from noise."""


def reach(model: nn.Module, config: TrainingConfig, total_steps: int, steps: int | None = None) -> float | None:
    """Return how far a run, or its first ``steps``, can change an adapted layer's output; None with SGD."""
    if config.optim == "sgd":  # its steps depend on the size of the gradient
        return None
    rate, steps = schedule(config, total_steps), total_steps if steps is None else steps
    stride = math.ceil(steps / _MOST_RATES) or 1
    rates = stride * sum(rate(step) for step in range(0, steps, stride))
    largest = rates * (config.lora_plus_lr_ratio or 1.0)
    return largest * max((layer.scaling * layer.r for layer in lora_layers(model).values()), default=0.0) / math.sqrt(3)


def too_small(model: nn.Module, config: TrainingConfig, total_steps: int, steps: int | None = None) -> str | None:
    """Return why a run, or its first ``steps``, is too small to learn from, and what to change; None if it is not."""
    share, steps = reach(model, config, total_steps, steps), total_steps if steps is None else steps
    if share is None or share >= LEAST_REACH:
        return None
    return (
        f"{counted(steps, 'step')} at up to {config.learning_rate:g} can change an adapted layer's output by "
        f"{100 * share:.2g} % at most, too little to learn from. Raise learning_rate (2e-4 is usual), max_steps or "
        f"num_train_epochs, or take more steps an epoch with a smaller per_device_train_batch_size"
    )


def learned_nothing(model: nn.Module, config: TrainingConfig, state: TrainingState) -> str | None:
    """Return why a run that is over has probably learned nothing, with its losses; None if it has."""
    losses = [line["loss"] for line in state.history if line.get("loss") is not None]
    fell = ""
    if state.first_loss is not None and losses:
        fell = f"loss {state.first_loss:.4g} at the first step, {losses[-1]:.4g} at the end"
    reason = too_small(model, config, state.total_steps, state.global_step)
    if reason is not None:
        return f"{fell}; {reason}" if fell else reason
    if fell and config.learning_rate > 0 and is_flat(losses):
        return f"{fell}: it did not fall by more than its noise"
    return None


def is_flat(losses: Sequence[float]) -> bool:
    """Return whether the last quarter of the losses is not below the first one by two standard errors.

    The noise is that of neighbours in the second half, where the loss hardly falls: their differences have twice the
    variance of one loss.
    """
    count = len(losses)
    if count < _LEAST_LOSSES:
        return False
    quarter, tail = count // 4, losses[count // 2 :]
    squares = [(after - before) ** 2 for before, after in itertools.pairwise(tail)]
    noise = math.sqrt(sum(squares) / len(squares) / 2)
    fall = (sum(losses[:quarter]) - sum(losses[-quarter:])) / quarter
    return fall <= 2 * noise * math.sqrt(2 / quarter)

"""CUDA out of memory, in words: what was wanted, what there was, and the setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import TrainingConfig
from ..errors import TrainingError
from ..model.memory import MemoryPlan


@contextmanager
def explained(config: TrainingConfig, mode: str, plan: MemoryPlan) -> Iterator[None]:
    """Turn torch's error inside the block into a :class:`TrainingError` that says the way out.

    Args:
        config: of the run.
        mode: the activation checkpointing that is on.
        plan: what each mode was predicted to take.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = str(error).partition("\n")[0]
        raise TrainingError(f"{wanted} Predicted peak by mode: {plan}. {_way_out(config, mode)}") from error


def _way_out(config: TrainingConfig, mode: str) -> str:
    ways = []
    if mode in ("none", "selective"):
        ways.append('activation_checkpointing="full" (or "auto")')
    if mode != "offload":
        ways.append('activation_checkpointing="offload"')
    rows, half = config.per_device_train_batch_size, config.per_device_train_batch_size // 2
    if half:
        steps = config.gradient_accumulation_steps * rows // half
        ways.append(f"per_device_train_batch_size={half}, gradient_accumulation_steps={steps} (the same step)")
    ways.append("a shorter max_length")
    ways.append('load_model(..., base_precision="nf4")')
    return f"Now: activation_checkpointing={mode!r}, {rows} rows. Ways out: {'; '.join(ways)}"

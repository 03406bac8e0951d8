"""Activation checkpointing: keep each decoder layer's input only, and recompute the rest in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ModelError


@contextmanager
def activation_checkpointing(model: nn.Module, mode: str) -> Iterator[None]:
    """``"full"`` for the time of the block; the model is left as it was. ``"none"`` changes nothing.

    The layers' own switch is used, not ``model.gradient_checkpointing_enable()``: that one also makes the embeddings'
    output require a gradient, for good, and the first layer then computes one that nobody needs.

    Raises:
        ModelError: another mode, or a model without layers that can be recomputed.
    """
    if mode not in ("none", "full"):
        raise ModelError(f"activation_checkpointing={mode!r}; allowed: 'none', 'full'")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if mode == "full" and not layers:
        raise ModelError(f"{type(model).__name__} has no layers that can be recomputed; allowed here: 'none'")
    switched = [layer for layer in layers if mode == "full" and not layer.gradient_checkpointing]
    for layer in switched:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer in switched:
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func

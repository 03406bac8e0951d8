"""Activation checkpointing: keep a part of what a decoder layer computes, and recompute the rest in the backward.

none        everything is kept
selective   the feed-forward part is recomputed from its input: most of the memory for an eighth of the time
full        a layer keeps its input only
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ModelError

MODES = ("none", "selective", "full")


@contextmanager
def activation_checkpointing(model: nn.Module, mode: str) -> Iterator[None]:
    """A mode of the above for the time of the block; the model is left as it was. ``"none"`` changes nothing.

    The layers' own switch is used, not ``model.gradient_checkpointing_enable()``: that one also makes the embeddings'
    output require a gradient, for good, and the first layer then computes one that nobody needs.

    Raises:
        ModelError: another mode, or a model without layers that can be recomputed.
    """
    if mode not in MODES:
        raise ModelError(f"activation_checkpointing={mode!r}; allowed: {', '.join(map(repr, MODES))}")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if mode == "selective":
        layers = [layer for layer in layers if isinstance(getattr(layer, "mlp", None), nn.Module)]
    if mode != "none" and not layers:
        raise ModelError(f"{type(model).__name__} has no layers that can be recomputed; allowed here: 'none'")
    full = [layer for layer in layers if mode == "full" and not layer.gradient_checkpointing]
    selective = [(layer.mlp, vars(layer.mlp).get("forward")) for layer in layers if mode == "selective"]
    for layer in full:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    for mlp, _ in selective:
        mlp.forward = partial(checkpoint, mlp.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in full:
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func
        for mlp, own in selective:
            del mlp.forward
            if own is not None:  # somebody had replaced it on this instance before
                mlp.forward = own


def recomputes_feed_forward(layer: Any) -> bool:
    """Whether ``"selective"`` is on for a decoder layer."""
    return getattr(vars(layer.mlp).get("forward"), "func", None) is checkpoint
